//! The port for the stream of events: what happens to jobs, functions, workers and nodes, for those who
//! watch.
//!
//! The stream is a ring that all nodes append to and read. It is no record: nodes append only while somebody
//! watches, an append without an answer may be repeated, and old events are dropped. `aws` keeps it in Redis,
//! `embedded` in memory.

use crate::backend::BackendError;
use crate::model::UnixMs;
use async_trait::async_trait;
use bytes::Bytes;
use std::fmt;
use std::time::Duration;

/// The place of an event in the stream: a time by the clock of the store, and a number within that
/// millisecond. Later events have greater ids.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct EventId {
    pub ms: UnixMs,
    pub seq: u64,
}

impl EventId {
    /// Longest text of an id, in bytes: two numbers of 64 bits and a hyphen.
    const TEXT_BYTES_MAX: usize = 41;

    pub const fn new(ms: UnixMs, seq: u64) -> Self {
        Self { ms, seq }
    }

    /// Parses `<ms>-<seq>`.
    pub fn parse(text: &str) -> Option<Self> {
        if text.len() > Self::TEXT_BYTES_MAX {
            return None;
        }
        let (ms, seq) = text.split_once('-')?;
        let number = |text: &str| {
            let is_number = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            is_number.then(|| text.parse().ok())?
        };
        Some(Self { ms: number(ms)?, seq: number(seq)? })
    }
}

impl fmt::Display for EventId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.ms, self.seq)
    }
}

/// An event of the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamedEvent {
    pub id: EventId,
    /// A JSON object.
    pub body: Bytes,
}

/// The part of the stream that has no gap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EventSpan {
    /// Since when the stream is watched without a break. Nodes appended nothing before.
    pub since: EventId,
    /// The events after this id are all there. It is not before `since`.
    pub from: EventId,
    /// The last event, or `from` if there is none.
    pub to: EventId,
}

impl EventSpan {
    /// Whether a reader that has seen the event `id` finds all that came after it.
    pub fn covers(&self, id: EventId) -> bool {
        (self.from..=self.to).contains(&id)
    }
}

/// The stream of events.
#[async_trait]
pub trait EventStream: Send + Sync {
    /// Appends events, each a JSON object.
    async fn append(&self, bodies: &[Bytes]) -> Result<(), BackendError>;

    /// The events after `id`, oldest first, at most `max`.
    async fn after(&self, id: EventId, max: usize) -> Result<Vec<StreamedEvent>, BackendError>;

    /// Marks the stream as watched for the duration `lasts`, and returns the part without a gap.
    async fn watch(&self, lasts: Duration) -> Result<EventSpan, BackendError>;

    /// Whether any node has marked the stream as watched.
    async fn is_watched(&self) -> Result<bool, BackendError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_two_numbers() {
        for text in ["0-0", "1795305600000-7", "18446744073709551615-18446744073709551615"] {
            assert_eq!(EventId::parse(text).unwrap().to_string(), text);
        }
        for bad in ["", "-", "1", "1-", "-1", "1-2-3", "+1-2", " 1-2", "1-x", "18446744073709551616-0"] {
            assert_eq!(EventId::parse(bad), None, "{bad}");
        }
        assert_eq!(EventId::parse(&"0".repeat(50)), None);
        assert!(EventId::new(1, 9) < EventId::new(2, 0) && EventId::new(2, 0) < EventId::new(2, 1));
    }

    #[test]
    fn a_span_covers_its_ends() {
        let id = |ms| EventId::new(ms, 0);
        let span = EventSpan { since: id(1), from: id(3), to: id(5) };
        let covered: Vec<u64> = (1..8).filter(|ms| span.covers(id(*ms))).collect();
        assert_eq!(covered, [3, 4, 5]);
    }
}
