//! The stream of events in Redis: one stream for the fleet, and a mark with an expiry that says that it is
//! watched. Both keys are in one slot.
//!
//! A node asks for the mark with a cheap command instead of being told: an announcement could be lost, and
//! the node would never publish.

use super::connection::CommandConnection;
use crate::backend::{BackendError, EventId, EventSpan, EventStream, StreamedEvent};
use crate::model::millis;
use async_trait::async_trait;
use bytes::Bytes;
use redis::{Script, cmd, pipe};
use std::sync::Arc;
use std::time::Duration;

/// The field of an entry that holds the event.
const BODY: &str = "e";
/// Events that the stream keeps, or up to one node of its tree more: exact trimming costs more.
const EVENTS_KEPT: usize = 50_000;
/// Expiry of the stream after the last event or mark.
const STREAM_EXPIRES: Duration = Duration::from_secs(3600);

pub struct RedisEvents {
    commands: Arc<CommandConnection>,
    stream_key: String,
    watched_key: String,
    watch: Script,
}

impl RedisEvents {
    /// The keys have the table name in them, so that fleets that share Redis but no tables stay separate.
    pub fn new(commands: Arc<CommandConnection>, logs_table: &str) -> Self {
        Self {
            commands,
            stream_key: format!("events:{{{logs_table}}}"),
            watched_key: format!("events:watched:{{{logs_table}}}"),
            watch: Script::new(include_str!("events_watch.lua")),
        }
    }
}

/// An entry: its id, and its fields and values in turn.
type StreamEntry = (String, Vec<Bytes>);

#[async_trait]
impl EventStream for RedisEvents {
    /// After a broken connection the events are appended once more, so a reader may see them twice.
    async fn append(&self, bodies: &[Bytes]) -> Result<(), BackendError> {
        let mut calls = pipe();
        for body in bodies {
            let add = calls.cmd("XADD").arg(&self.stream_key).arg("MAXLEN").arg("~").arg(EVENTS_KEPT);
            add.arg("*").arg(BODY).arg(&body[..]).ignore();
        }
        calls.cmd("PEXPIRE").arg(&self.stream_key).arg(millis(STREAM_EXPIRES)).ignore();
        let calls = &calls;
        self.commands.run(async |mut connection| calls.query_async(&mut connection).await).await
    }

    async fn after(&self, id: EventId, max: usize) -> Result<Vec<StreamedEvent>, BackendError> {
        let mut range = cmd("XRANGE");
        range.arg(&self.stream_key).arg(format!("({id}")).arg("+").arg("COUNT").arg(max);
        let entries: Vec<StreamEntry> = self.commands.query(&range).await?;
        Ok(entries.into_iter().filter_map(streamed).collect())
    }

    async fn watch(&self, lasts: Duration) -> Result<EventSpan, BackendError> {
        let mut call = self.watch.key(&self.watched_key);
        call.key(&self.stream_key).arg(millis(lasts)).arg(EVENTS_KEPT).arg(millis(STREAM_EXPIRES));
        let call = &call;
        let answer: [String; 3] =
            self.commands.run(async |mut connection| call.invoke_async(&mut connection).await).await?;
        span(&answer)
    }

    async fn is_watched(&self) -> Result<bool, BackendError> {
        self.commands.query(cmd("EXISTS").arg(&self.watched_key)).await
    }
}

/// `None`: another program wrote the entry.
fn streamed((id, fields): StreamEntry) -> Option<StreamedEvent> {
    let body = fields.chunks_exact(2).find(|field| *field[0] == *BODY.as_bytes())?;
    Some(StreamedEvent { id: EventId::parse(&id)?, body: body[1].clone() })
}

/// The answer of the script: since when the stream is watched, its oldest entry if others may have been
/// dropped, and its newest entry. The last two may be empty.
fn span([since, oldest, newest]: &[String; 3]) -> Result<EventSpan, BackendError> {
    let unexpected = || BackendError::Invalid("the answer of the event script has no stream id".into());
    let since = EventId::parse(since).ok_or_else(unexpected)?;
    let from = EventId::parse(oldest).map_or(since, |oldest| oldest.max(since));
    let to = EventId::parse(newest).map_or(from, |newest| newest.max(from));
    Ok(EventSpan { since, from, to })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_span_begins_where_nothing_is_missing() {
        let id = |ms| EventId::new(ms, 0);
        for (answer, from, to) in [
            (["5-0", "", ""], 5, 5),
            (["5-0", "", "3-0"], 5, 5),
            (["5-0", "", "9-0"], 5, 9),
            (["5-0", "7-0", "9-0"], 7, 9),
            (["5-0", "2-0", "9-0"], 5, 9),
        ] {
            let expected = EventSpan { since: id(5), from: id(from), to: id(to) };
            assert_eq!(span(&answer.map(str::to_owned)), Ok(expected), "{answer:?}");
        }
        assert!(span(&["", "", ""].map(str::to_owned)).is_err());
    }

    #[test]
    fn entries_of_other_programs_are_skipped() {
        let entry = |id: &str, fields: &[&'static str]| {
            streamed((
                id.to_owned(),
                fields.iter().map(|field| Bytes::from_static(field.as_bytes())).collect(),
            ))
        };
        let event = StreamedEvent { id: EventId::new(1, 2), body: "{}".into() };
        assert_eq!(entry("1-2", &["x", "y", "e", "{}"]), Some(event));
        assert_eq!(entry("1-2", &["x", "e"]), None);
        assert_eq!(entry("one", &["e", "{}"]), None);
    }
}
