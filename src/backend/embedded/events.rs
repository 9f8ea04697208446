//! The stream of events of one process: a ring in memory. A restart loses it, and begins with greater ids,
//! because they contain the time.

use crate::backend::{BackendError, EventId, EventSpan, EventStream, StreamedEvent};
use crate::model::now_ms;
use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::time::Duration;
use tokio::time::Instant;

/// Events that the ring keeps; the oldest is dropped.
const RING_EVENTS_MAX: usize = 10_000;

#[derive(Default)]
pub(super) struct LocalEvents(Mutex<EventRing>);

#[derive(Default)]
struct EventRing {
    events: VecDeque<StreamedEvent>,
    /// The id of the last event, or the start of the current watch.
    last: EventId,
    /// The id of the last event that was dropped.
    dropped: EventId,
    /// Since when the ring is watched without a break, and until when the mark holds.
    watched: Option<(EventId, Instant)>,
}

impl EventRing {
    fn watched_since(&self) -> Option<EventId> {
        self.watched.filter(|(_, until)| *until > Instant::now()).map(|(since, _)| since)
    }

    /// An id after all others, also if the clock was set back.
    fn next_id(&self) -> EventId {
        let now = EventId::new(now_ms(), 0);
        if now > self.last { now } else { EventId::new(self.last.ms, self.last.seq + 1) }
    }

    fn push(&mut self, body: Bytes) {
        if self.events.len() == RING_EVENTS_MAX {
            self.dropped = self.events.pop_front().map_or(self.dropped, |event| event.id);
        }
        let id = self.next_id();
        self.last = id;
        self.events.push_back(StreamedEvent { id, body });
    }
}

#[async_trait]
impl EventStream for LocalEvents {
    async fn append(&self, bodies: &[Bytes]) -> Result<(), BackendError> {
        let mut ring = self.0.lock();
        bodies.iter().for_each(|body| ring.push(body.clone()));
        Ok(())
    }

    async fn after(&self, id: EventId, max: usize) -> Result<Vec<StreamedEvent>, BackendError> {
        let ring = self.0.lock();
        let first = ring.events.partition_point(|event| event.id <= id);
        Ok(ring.events.iter().skip(first).take(max).cloned().collect())
    }

    async fn watch(&self, lasts: Duration) -> Result<EventSpan, BackendError> {
        let mut ring = self.0.lock();
        let since = ring.watched_since().unwrap_or_else(|| {
            ring.last = ring.next_id();
            ring.last
        });
        ring.watched = Some((since, Instant::now() + lasts));
        Ok(EventSpan { since, from: since.max(ring.dropped), to: ring.last })
    }

    async fn is_watched(&self) -> Result<bool, BackendError> {
        Ok(self.0.lock().watched_since().is_some())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::advance;

    const LASTS: Duration = Duration::from_secs(60);

    fn bodies(texts: &[&'static str]) -> Vec<Bytes> {
        texts.iter().map(|text| Bytes::from_static(text.as_bytes())).collect()
    }

    async fn after(ring: &LocalEvents, id: EventId) -> Vec<Bytes> {
        ring.after(id, usize::MAX).await.unwrap().into_iter().map(|event| event.body).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn events_are_read_after_an_id() {
        let ring = LocalEvents::default();
        assert_eq!(ring.is_watched().await, Ok(false));
        let begun = ring.watch(LASTS).await.unwrap();
        assert_eq!((begun.since, begun.from), (begun.to, begun.to));
        ring.append(&bodies(&["a", "b"])).await.unwrap();
        assert_eq!(after(&ring, begun.to).await, bodies(&["a", "b"]));
        let first = ring.after(begun.to, 1).await.unwrap().pop().unwrap();
        assert_eq!(after(&ring, first.id).await, bodies(&["b"]));
        let span = ring.watch(LASTS).await.unwrap();
        assert!(span.covers(first.id) && span.covers(begun.to) && span.since == begun.since);
        assert!(!span.covers(EventId::new(span.to.ms + 1, 0)), "an id that nobody has given");
    }

    #[tokio::test(start_paused = true)]
    async fn a_break_of_the_watch_is_a_gap() {
        let ring = LocalEvents::default();
        let before = ring.watch(LASTS).await.unwrap();
        advance(LASTS / 2).await;
        assert_eq!(ring.watch(LASTS).await.unwrap().since, before.since);
        advance(LASTS).await;
        assert_eq!(ring.is_watched().await, Ok(false));
        let again = ring.watch(LASTS).await.unwrap();
        assert!(again.since > before.to && !again.covers(before.to), "{again:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn dropped_events_are_a_gap() {
        let ring = LocalEvents::default();
        let begun = ring.watch(LASTS).await.unwrap();
        ring.append(&vec![Bytes::from_static(b"x"); RING_EVENTS_MAX]).await.unwrap();
        assert!(ring.watch(LASTS).await.unwrap().covers(begun.to));
        let first = ring.after(begun.to, 1).await.unwrap()[0].id;
        ring.append(&bodies(&["one more"])).await.unwrap();
        let span = ring.watch(LASTS).await.unwrap();
        assert!(!span.covers(begun.to) && span.covers(first), "{span:?}");
        assert_eq!(after(&ring, begun.to).await.len(), RING_EVENTS_MAX);
    }
}
