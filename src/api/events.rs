//! `GET /events`: live events as Server-Sent Events.

use super::call::Call;
use super::problem::ApiError;
use super::query::lists;
use super::reply::{Reply, ReplyStream};
use crate::events::{EventBus, EventFilter, EventType, WatchError};
use crate::lifecycle::{Lifecycle, Phase};
use crate::model::FunctionId;
use futures_util::stream::unfold;
use http::header::{HeaderName, HeaderValue};

/// The media type of Server-Sent Events.
const EVENT_STREAM: &str = "text/event-stream";
/// Makes nginx pass each event on at once.
const X_ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");
/// Most values of one parameter.
const VALUES_MAX: usize = 100;
/// Maximum length of a status, in characters. No status is longer.
const STATUS_CHARS_MAX: usize = 64;

/// The handler of events.
pub struct EventRoute {
    events: EventBus,
    lifecycle: Lifecycle,
}

impl EventRoute {
    pub fn new(events: EventBus, lifecycle: Lifecycle) -> Self {
        Self { events, lifecycle }
    }

    /// The events from now on, or from the one after `Last-Event-ID`.
    ///
    /// # Errors
    /// `TooManyWatchers` if all places are taken. `NotReady` during a drain, which ends streams.
    pub async fn get(&self, call: &Call) -> Result<Reply, ApiError> {
        let filter = filter_of(call)?;
        if self.lifecycle.phase() >= Phase::Draining {
            return Err(ApiError::NotReady);
        }
        if call.is_head {
            // It needs no place, and the nodes need not publish for it.
            return Ok(reply(ReplyStream::new(futures_util::stream::empty())));
        }
        let last = call.headers.last_event_id.as_ref().map(HeaderValue::as_bytes);
        let watcher = self.events.watch(filter, last.filter(|id| !id.is_empty())).await;
        let watcher = watcher.map_err(|error| match error {
            WatchError::TooMany => ApiError::TooManyWatchers,
            WatchError::Backend(e) => ApiError::backend("the stream of events", &e),
        })?;
        let pieces = unfold(watcher, async |mut watcher| {
            let piece = watcher.next().await?;
            Some((piece, watcher))
        });
        Ok(reply(ReplyStream::new(pieces)))
    }
}

fn reply(stream: ReplyStream) -> Reply {
    Reply::stream(EVENT_STREAM, stream).with(X_ACCEL_BUFFERING, HeaderValue::from_static("no"))
}

fn filter_of(call: &Call) -> Result<EventFilter, ApiError> {
    let [functions, statuses, kinds] = lists(&call.uri, ["functionId", "status", "type"], VALUES_MAX)?;
    let function = |id: &String| {
        FunctionId::parse(id).ok_or_else(|| ApiError::invalid("`functionId` must be a function id"))
    };
    let kind = |name: &String| {
        let kind = EventType::parse(name);
        kind.ok_or_else(|| ApiError::invalid("`type` must be a type of events, such as job.finished"))
    };
    if statuses.iter().any(|status| !(1..=STATUS_CHARS_MAX).contains(&status.chars().count())) {
        return Err(ApiError::invalid(format!("`status` must have 1 to {STATUS_CHARS_MAX} characters")));
    }
    Ok(EventFilter {
        functions: functions.iter().map(function).collect::<Result<_, _>>()?,
        kinds: kinds.iter().map(kind).collect::<Result<_, _>>()?,
        statuses,
        caller: call.caller.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(query: &str) -> Result<EventFilter, ApiError> {
        filter_of(&Call { uri: format!("/events?{query}").parse().unwrap(), ..Call::default() })
    }

    #[test]
    fn queries_become_filters() {
        let filter = of("functionId=a,b&status=FAILED&type=job.lost&functionId=c").unwrap();
        let ids: Vec<&str> = filter.functions.iter().map(FunctionId::as_str).collect();
        assert_eq!((ids, filter.statuses), (vec!["a", "b", "c"], vec!["FAILED".to_owned()]));
        assert_eq!(filter.kinds, [EventType::JobLost]);
        assert_eq!(of("").unwrap(), EventFilter::default());
        let long = format!("status={}", "x".repeat(65));
        let many = format!("functionId={}", ["f"; VALUES_MAX + 1].join(","));
        for bad in ["functionId=a%20b", "functionId=", "type=job", "type=", "status=", &long, &many] {
            assert!(of(bad).is_err(), "{bad:.30}");
        }
        // A key in the query would be in the log of every proxy, so it is not ignored silently.
        for unknown in ["key=1", "x-api-key=secret", "functionid=a"] {
            let detail = ApiError::refusal(of(unknown));
            assert!(detail.contains("`functionId`") && !detail.contains("secret"), "{detail}");
        }
    }
}
