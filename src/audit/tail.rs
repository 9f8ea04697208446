//! Keeps the last events of this node for the dashboard, which lists them under `/logs`.
//!
//! This is not a log: under load most events are skipped. A fixed number per second is kept, so that a person
//! can read the list. A skipped event costs one atomic operation and no memory.

use crate::model::{FunctionId, JobId, Status, UnixMs};
use parking_lot::Mutex;
use serde_json::{Map, Value};
use std::cmp::Reverse;
use std::collections::VecDeque;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use uuid::Uuid;

/// Maximum number of events; the oldest is evicted.
const ENTRIES_MAX: usize = 100;
/// Executions kept per second, and the same number of all other events, so that neither displaces the other.
/// Further events are skipped.
const HALF_A_SECOND_MAX: u64 = 100;
/// A clock that goes back further than this was set. Differences between threads are smaller.
const CLOCK_SET_BACK_S: u64 = 10;

/// An event, as the dashboard shows it.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    Executed(Executed),
    Requested { id: JobId, function: FunctionId, model: String, is_async: bool },
    WaitTimedOut(JobId),
    Uploaded(FunctionId),
    Updated(FunctionId),
    Deleted(FunctionId),
    Heartbeat { worker: String, active_jobs: u64, pools: Map<String, Value> },
    Unauthorized { ip: Option<IpAddr> },
}

/// An execution, without its message.
#[derive(Clone, Debug, PartialEq)]
pub struct Executed {
    pub id: JobId,
    pub function: FunctionId,
    pub status: Status,
    pub duration_ms: f64,
    pub handler_duration_ms: Option<f64>,
    pub memory_mb: u64,
    pub exit_code: Option<i64>,
}

/// An event in the list.
#[derive(Clone, Debug, PartialEq)]
pub struct EventEntry {
    /// Identifies the entry; one job has several.
    pub id: Uuid,
    pub at: UnixMs,
    pub event: Event,
}

/// A ring of the last events. Cheap to clone; clones share the ring.
#[derive(Clone, Default)]
pub struct RecentEvents(Arc<EventList>);

#[derive(Default)]
struct EventList {
    executions: Gate,
    others: Gate,
    entries: Mutex<VecDeque<EventEntry>>,
}

impl RecentEvents {
    /// Adds an event that is not an execution, unless the limit of its second is reached.
    pub fn note(&self, at: UnixMs, event: impl FnOnce() -> Event) {
        if self.0.others.admits(at) {
            self.push(at, event());
        }
    }

    /// Adds an execution, unless the limit of its second is reached.
    pub(super) fn note_execution(&self, at: UnixMs, executed: impl FnOnce() -> Executed) {
        if self.0.executions.admits(at) {
            self.push(at, Event::Executed(executed()));
        }
    }

    fn push(&self, at: UnixMs, event: Event) {
        let entry = EventEntry { id: Uuid::new_v4(), at, event };
        let mut entries = self.0.entries.lock();
        if entries.len() == ENTRIES_MAX {
            entries.pop_front();
        }
        entries.push_back(entry);
    }

    /// Returns the events, newest first.
    pub fn entries(&self) -> Vec<EventEntry> {
        let entries = self.0.entries.lock();
        let mut newest_first: Vec<EventEntry> = entries.iter().rev().cloned().collect();
        drop(entries);
        // Threads append slightly out of order.
        newest_first.sort_by_key(|entry| Reverse(entry.at));
        newest_first
    }
}

/// Admits [`HALF_A_SECOND_MAX`] events per second. The word holds the second and the number admitted in it.
#[derive(Default)]
struct Gate(AtomicU64);

impl Gate {
    const COUNT_BITS: u32 = 8;

    fn admits(&self, at: UnixMs) -> bool {
        let second = at / 1000;
        let next = |word: u64| {
            let (of, count) = (word >> Self::COUNT_BITS, word & ((1 << Self::COUNT_BITS) - 1));
            if second > of || of - second > CLOCK_SET_BACK_S {
                Some((second << Self::COUNT_BITS) | 1)
            } else {
                (count < HALF_A_SECOND_MAX).then_some(word + 1)
            }
        };
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::NodeId;

    fn job(n: u64) -> JobId {
        JobId::new(NodeId(1), 0, n)
    }

    fn function() -> FunctionId {
        FunctionId::parse("f").unwrap()
    }

    fn executed(n: u64) -> Executed {
        Executed {
            id: job(n),
            function: function(),
            status: Status::new("SUCCESS"),
            duration_ms: 1.5,
            handler_duration_ms: None,
            memory_mb: 1,
            exit_code: Some(0),
        }
    }

    #[test]
    fn the_last_hundred_are_listed_newest_first_with_unique_ids() {
        let tail = RecentEvents::default();
        for n in 0..250 {
            tail.note(n * 20, || Event::WaitTimedOut(job(n)));
        }
        let entries = tail.entries();
        let events: Vec<Event> = entries.iter().map(|entry| entry.event.clone()).collect();
        let expected: Vec<Event> = (150..250).rev().map(|n| Event::WaitTimedOut(job(n))).collect();
        assert_eq!(events, expected);
        let ids: std::collections::HashSet<Uuid> = entries.iter().map(|entry| entry.id).collect();
        assert_eq!(ids.len(), 100);
    }

    #[test]
    fn each_kind_of_event_has_its_own_limit_per_second() {
        let tail = RecentEvents::default();
        let mut made = (0, 0);
        for n in 0..5_000 {
            tail.note(1_000 + n / 10, || {
                made.0 += 1;
                Event::Updated(function())
            });
        }
        // Earlier events of the same second do not displace it.
        tail.note_execution(1_999, || executed(7));
        assert_eq!(tail.entries()[0].event, Event::Executed(executed(7)));
        for n in 0..5_000 {
            tail.note_execution(1_999, || {
                made.1 += 1;
                executed(n)
            });
        }
        // Skipped events are not constructed.
        assert_eq!(made, (100, 99));
        tail.note(2_000, || Event::Deleted(function()));
        assert_eq!(tail.entries()[0].event, Event::Deleted(function()), "the next second has room");
    }

    #[test]
    fn a_late_thread_does_not_reset_the_count_and_the_clock_may_be_set() {
        let gate = Gate::default();
        // Two threads at the end of a second: the late one does not reset the count.
        let admitted = (0..1_000).filter(|n| gate.admits(if n % 2 == 0 { 5_000 } else { 4_999 })).count();
        assert_eq!(admitted, 100);
        for at in [6_000, u64::MAX, 6_000, 30_000, 10_000] {
            assert!(gate.admits(at), "{at}");
        }
    }
}
