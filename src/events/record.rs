//! An event of the stream as a watcher receives it: a message of Server-Sent Events (WHATWG HTML, section
//! 9.2), and what filters need of it.

use super::event::EventType;
use crate::backend::{EventId, StreamedEvent};
use crate::model::FunctionId;
use bytes::{Bytes, BytesMut};
use serde::Deserialize;
use std::borrow::Cow;
use std::fmt::Write;

/// A comment, which keeps proxies from closing an idle connection. It has no id.
pub const HEARTBEAT: Bytes = Bytes::from_static(b":\n\n");
/// How long a client should wait before it connects again, in ms.
const RETRY_MS: u32 = 2000;
/// The type of the message that says that events are missing.
const RESYNC: &str = "resync";

/// An event that was read from the stream.
#[derive(Clone, Debug)]
pub struct EventRecord {
    pub id: EventId,
    pub kind: EventType,
    pub function: Option<FunctionId>,
    pub status: Option<String>,
    /// The whole message.
    pub message: Bytes,
}

/// The members that filters need.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct EventHead<'a> {
    #[serde(borrow)]
    r#type: Cow<'a, str>,
    #[serde(borrow, default)]
    function_id: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    status: Option<Cow<'a, str>>,
}

impl EventRecord {
    /// `None`: it is no event that this version knows.
    pub fn of(event: &StreamedEvent) -> Option<Self> {
        // A line break would end the field. Our own events have none.
        let text = std::str::from_utf8(&event.body).ok().filter(|text| !text.contains(['\n', '\r']))?;
        let head: EventHead<'_> = serde_json::from_str(text).ok()?;
        let kind = EventType::parse(&head.r#type)?;
        let function = match head.function_id {
            // An event of an invalid function would pass the filter of every key.
            Some(id) => Some(FunctionId::parse(&id)?),
            None => None,
        };
        let message = message(event.id, kind.name(), text);
        Some(Self { id: event.id, kind, function, status: head.status.map(Cow::into_owned), message })
    }
}

fn message(id: EventId, kind: &str, data: &str) -> Bytes {
    let mut text = String::with_capacity(data.len() + kind.len() + 64);
    // Writing to a `String` does not fail.
    let _ = write!(text, "id: {id}\nevent: {kind}\ndata: {data}\n\n");
    text.into()
}

/// The first message of a connection. It has no data, so clients only remember the id: a client that
/// disconnects before the first event misses nothing.
pub fn greeting(id: EventId) -> Bytes {
    format!("retry: {RETRY_MS}\nid: {id}\n\n").into()
}

/// Says where the stream is. Like the greeting, it has no data.
pub fn place(id: EventId) -> Bytes {
    format!("id: {id}\n\n").into()
}

/// Says that events before `id` may be missing.
pub fn resync(id: EventId) -> Bytes {
    message(id, RESYNC, "{\"type\":\"resync\"}")
}

/// The messages of the wanted events, in one piece.
pub fn joined(events: &[EventRecord], is_wanted: impl Fn(&EventRecord) -> bool) -> Bytes {
    let mut all = BytesMut::new();
    let wanted = events.iter().filter(|event| is_wanted(event));
    wanted.for_each(|event| all.extend_from_slice(&event.message));
    all.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(body: &str) -> Option<EventRecord> {
        EventRecord::of(&StreamedEvent { id: EventId::new(5, 1), body: body.to_owned().into() })
    }

    #[test]
    fn an_event_becomes_a_message() {
        let body = r#"{"type":"job.lost","functionId":"f","status":"LOST"}"#;
        let record = of(body).unwrap();
        assert_eq!(record.message, format!("id: 5-1\nevent: job.lost\ndata: {body}\n\n"));
        assert_eq!((record.kind, record.status.as_deref()), (EventType::JobLost, Some("LOST")));
        let two = joined(&[record.clone(), record.clone()], |_| true);
        assert_eq!(two.len(), 2 * record.message.len());
    }

    #[test]
    fn what_is_no_event_is_skipped() {
        for bad in [
            "",
            "{}",
            "7",
            r#"{"type":"job.unknown"}"#,
            r#"{"type":"job.lost","functionId":"a b"}"#,
            "{\"type\":\"job.lost\",\n\"functionId\":\"f\"}",
        ] {
            assert!(of(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn only_events_have_data() {
        assert_eq!(greeting(EventId::new(7, 0)), "retry: 2000\nid: 7-0\n\n");
        assert_eq!(resync(EventId::new(7, 0)), "id: 7-0\nevent: resync\ndata: {\"type\":\"resync\"}\n\n");
        assert!(!HEARTBEAT.windows(2).any(|two| two == b"id"));
    }
}
