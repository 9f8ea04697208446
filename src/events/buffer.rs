//! The events of this node that wait to be published, sampled.
//!
//! Above [`A_SECOND_MAX`] events a second the rest is skipped and counted. What matters comes first: a share
//! of the places is reserved for events that are not ordinary.

use super::event::FleetEvent;
use crate::model::UnixMs;
use std::time::Duration;
use tokio::time::Instant;

/// Events that a node publishes per second.
pub const A_SECOND_MAX: u64 = 500;
/// Of these, those that ordinary events leave to the others.
const RESERVED: u64 = 100;
/// Events that wait to be published. The rate fills it only if the store is slow.
const WAITING_MAX: usize = 1000;
/// Interval of the events that report how many were skipped.
const NOTE_EVERY: Duration = Duration::from_secs(1);

/// Places refill continuously, so a burst may use those of a second at once.
pub struct EventBuffer {
    waiting: Vec<(UnixMs, FleetEvent)>,
    places: u64,
    refilled: Instant,
    kept: u64,
    seen: u64,
    noted: Instant,
}

impl EventBuffer {
    pub fn new(now: Instant) -> Self {
        Self { waiting: Vec::new(), places: A_SECOND_MAX, refilled: now, kept: 0, seen: 0, noted: now }
    }

    /// Adds an event. Returns `false` if it is skipped.
    pub fn push(&mut self, now: Instant, at: UnixMs, event: FleetEvent) -> bool {
        self.refill(now);
        self.seen += 1;
        let reserved = if event.is_ordinary() { RESERVED } else { 0 };
        if self.places <= reserved || self.waiting.len() >= WAITING_MAX {
            return false;
        }
        self.places -= 1;
        self.kept += 1;
        self.waiting.push((at, event));
        true
    }

    fn refill(&mut self, now: Instant) {
        let micros = u64::try_from((now - self.refilled).as_micros()).unwrap_or(u64::MAX);
        let new = micros.saturating_mul(A_SECOND_MAX) / 1_000_000;
        if new > 0 {
            self.places = self.places.saturating_add(new).min(A_SECOND_MAX);
            self.refilled = now;
        }
    }

    /// Takes the events, and at most once a second the number of those that were skipped.
    pub fn take(&mut self, now: Instant, at: UnixMs) -> Vec<(UnixMs, FleetEvent)> {
        let mut taken = std::mem::take(&mut self.waiting);
        if now - self.noted >= NOTE_EVERY {
            self.noted = now;
            let (kept, seen) = (std::mem::take(&mut self.kept), std::mem::take(&mut self.seen));
            if kept < seen {
                taken.push((at, FleetEvent::Sampled { kept, seen }));
            }
        }
        taken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{FunctionId, JobId, NodeId};
    use tokio::time::advance;

    fn accepted() -> FleetEvent {
        FleetEvent::JobAccepted { id: JobId::new(NodeId(1), 0, 0), function: FunctionId::parse("f").unwrap() }
    }

    fn lost() -> FleetEvent {
        FleetEvent::JobLost { id: JobId::new(NodeId(1), 0, 0), function: FunctionId::parse("f").unwrap() }
    }

    fn push(buffer: &mut EventBuffer, count: u64, event: impl Fn() -> FleetEvent) -> u64 {
        (0..count).filter(|_| buffer.push(Instant::now(), 0, event())).count() as u64
    }

    #[tokio::test(start_paused = true)]
    async fn ordinary_events_leave_places_to_the_others() {
        let mut buffer = EventBuffer::new(Instant::now());
        assert_eq!(push(&mut buffer, 1000, accepted), A_SECOND_MAX - RESERVED);
        assert_eq!(push(&mut buffer, 1000, lost), RESERVED);
        assert_eq!(buffer.take(Instant::now(), 0).len() as u64, A_SECOND_MAX);
        advance(Duration::from_secs(1)).await;
        let noted = buffer.take(Instant::now(), 7);
        assert_eq!(noted, [(7, FleetEvent::Sampled { kept: A_SECOND_MAX, seen: 2000 })]);
        assert_eq!(push(&mut buffer, 10, accepted), 10, "places refill");
    }

    #[tokio::test(start_paused = true)]
    async fn places_refill_with_the_time() {
        let mut buffer = EventBuffer::new(Instant::now());
        push(&mut buffer, 1000, accepted);
        let mut kept = 0;
        // 1,000 events per second for two seconds, one every millisecond.
        for n in 0..2000 {
            advance(Duration::from_millis(1)).await;
            kept += push(&mut buffer, 1, accepted);
            if n % 100 == 0 {
                buffer.take(Instant::now(), 0);
            }
        }
        assert!((990..=1000).contains(&kept), "{kept}");
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_said_if_nothing_is_skipped() {
        let mut buffer = EventBuffer::new(Instant::now());
        assert_eq!(push(&mut buffer, 100, accepted), 100);
        advance(NOTE_EVERY).await;
        assert_eq!(buffer.take(Instant::now(), 0).len(), 100);
    }
}
