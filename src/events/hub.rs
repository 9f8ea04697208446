//! The watchers of this node, and where the one reader of the stream is.
//!
//! A watcher enters paused, so that its place is taken while the store is asked. It then starts at its own
//! event: what the reader has passed already it reads itself, the rest comes from here. So it gets each event
//! once, and misses none.

use super::filter::EventFilter;
use super::queue::PieceQueue;
use super::record::{EventRecord, joined, place, resync};
use crate::backend::{EventId, EventSpan};
use crate::metrics::EventMetrics;
use crate::model::UnixMs;
use bytes::Bytes;
use parking_lot::Mutex;
use std::sync::Arc;

/// After every event: a watcher that has not started.
const PAUSED: EventId = EventId::new(u64::MAX, u64::MAX);

/// How often a watcher gets the current id of the stream, if no event passes its filter.
const ID_EVERY_MS: UnixMs = 2000;

pub struct WatcherHub {
    state: Mutex<HubState>,
    watchers_max: usize,
    metrics: EventMetrics,
}

#[derive(Default)]
struct HubState {
    watchers: Vec<HubEntry>,
    /// The number of the next watcher.
    next: u64,
    /// The last event that the reader has passed. `None`: nobody watches.
    position: Option<EventId>,
    /// Since when the stream is watched.
    since: EventId,
}

struct HubEntry {
    number: u64,
    filter: Arc<EventFilter>,
    /// The watcher gets the events after this one.
    after: EventId,
    /// The time of the last id that was sent to it, in Unix milliseconds.
    last_id_ms: UnixMs,
    queue: Arc<PieceQueue>,
}

/// The place of a watcher.
pub struct HubPlace {
    pub number: u64,
    pub filter: Arc<EventFilter>,
    pub queue: Arc<PieceQueue>,
}

/// Where a watcher starts.
#[derive(Debug, PartialEq, Eq)]
pub struct WatchStart {
    /// The event after which it gets all.
    pub after: EventId,
    /// It reads the events up to this one itself.
    pub till: EventId,
    /// It asked for events that are gone.
    pub is_resync: bool,
}

impl WatcherHub {
    pub fn new(watchers_max: usize, metrics: EventMetrics) -> Self {
        Self { state: Mutex::default(), watchers_max, metrics }
    }

    pub fn has_watchers(&self) -> bool {
        !self.state.lock().watchers.is_empty()
    }

    /// Where the reader is. `None`: nobody watches.
    pub fn position(&self) -> Option<EventId> {
        self.state.lock().position
    }

    /// Takes a place. `None`: all are taken.
    pub fn enter(&self, filter: EventFilter) -> Option<HubPlace> {
        let mut state = self.state.lock();
        if state.watchers.len() >= self.watchers_max {
            return None;
        }
        // Watchers with equal filters share one, and thereby their messages.
        let known = state.watchers.iter().find(|watcher| *watcher.filter == filter);
        let filter = known.map_or_else(|| Arc::new(filter), |watcher| Arc::clone(&watcher.filter));
        let (number, queue) = (state.next, Arc::new(PieceQueue::default()));
        state.next += 1;
        state.watchers.push(HubEntry {
            number,
            filter: Arc::clone(&filter),
            after: PAUSED,
            last_id_ms: 0,
            queue: Arc::clone(&queue),
        });
        self.count(&state);
        Some(HubPlace { number, filter, queue })
    }

    /// Frees the place of a watcher, unless it was dropped already.
    pub fn leave(&self, number: u64) {
        let mut state = self.state.lock();
        state.watchers.retain(|watcher| watcher.number != number);
        self.settle(&mut state);
    }

    /// Starts a paused watcher. `last`: the event after which it continues.
    pub fn start(&self, number: u64, span: EventSpan, last: Option<Result<EventId, ()>>) -> WatchStart {
        let mut state = self.state.lock();
        if state.position.is_none() {
            (state.position, state.since) = (Some(span.to), span.since);
        }
        let position = state.position.unwrap_or(span.to);
        // The reader may have passed more since the span was read.
        let span = EventSpan { to: span.to.max(position), ..span };
        let known = last.map(|last| last.ok().filter(|id| span.covers(*id)));
        let is_resync = known == Some(None);
        let after = known.flatten().unwrap_or(span.to);
        // What the reader has passed does not come from here any more.
        let (after_here, till) = (after.max(position), position);
        if let Some(watcher) = state.watchers.iter_mut().find(|watcher| watcher.number == number) {
            (watcher.after, watcher.last_id_ms) = (after_here, after_here.ms);
        }
        WatchStart { after, till, is_resync }
    }

    /// Sends the events to the watchers. The reader has read them after `from`, and has now passed `to`.
    /// Watchers that have not taken enough of the earlier ones are dropped.
    pub fn fan_out(&self, from: EventId, to: EventId, events: &[EventRecord]) {
        let mut state = self.state.lock();
        if state.position != Some(from) {
            return; // all watchers have left meanwhile
        }
        state.position = Some(to);
        let mut pieces: Vec<(Arc<EventFilter>, Bytes)> = Vec::new();
        let first = events.first().map_or(to, |event| event.id);
        let mut piece_of = |watcher: &HubEntry| {
            let is_wanted = |event: &EventRecord| event.id > watcher.after && watcher.filter.admits(event);
            if watcher.after >= first {
                // It has just started, within these events.
                return joined(events, is_wanted);
            }
            if let Some((_, piece)) = pieces.iter().find(|(filter, _)| Arc::ptr_eq(filter, &watcher.filter)) {
                return piece.clone();
            }
            let piece = joined(events, is_wanted);
            pieces.push((Arc::clone(&watcher.filter), piece.clone()));
            piece
        };
        let before = state.watchers.len();
        state.watchers.retain_mut(|watcher| {
            let mut piece = piece_of(watcher);
            if piece.is_empty() {
                // Without an id of its own, its next connection would find that the last one is too old.
                if to <= watcher.after || to.ms.saturating_sub(watcher.last_id_ms) < ID_EVERY_MS {
                    return true;
                }
                piece = place(to);
            }
            watcher.last_id_ms = to.ms;
            watcher.queue.push(piece)
        });
        self.settle_slow(&mut state, before);
    }

    /// Compares the place of the reader with the stream. Returns `true`, and tells the watchers, if events
    /// are missing between them.
    pub fn check(&self, span: EventSpan) -> bool {
        let mut state = self.state.lock();
        let Some(position) = state.position else { return false };
        let is_whole = state.since == span.since && span.from <= position;
        if is_whole {
            return false;
        }
        (state.position, state.since) = (Some(span.to), span.since);
        let (message, before) = (resync(span.to), state.watchers.len());
        state.watchers.retain_mut(|watcher| {
            if watcher.after == PAUSED {
                return true;
            }
            watcher.after = span.to;
            watcher.queue.push(message.clone())
        });
        self.settle_slow(&mut state, before);
        true
    }

    /// `before`: the number of watchers before those that are too slow were dropped.
    fn settle_slow(&self, state: &mut HubState, before: usize) {
        let slow = before - state.watchers.len();
        self.metrics.watchers_dropped.with_label_values(&["slow"]).inc_by(slow as u64);
        self.settle(state);
    }

    fn settle(&self, state: &mut HubState) {
        if state.watchers.is_empty() {
            state.position = None;
        }
        self.count(state);
    }

    fn count(&self, state: &HubState) {
        self.metrics.watchers.set(i64::try_from(state.watchers.len()).unwrap_or(i64::MAX));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::StreamedEvent;
    use crate::metrics::Metrics;
    use crate::model::FunctionId;
    use futures_util::FutureExt;

    fn id(ms: u64) -> EventId {
        EventId::new(ms, 0)
    }

    fn hub(watchers_max: usize) -> WatcherHub {
        WatcherHub::new(watchers_max, Metrics::new(1).unwrap().events.clone())
    }

    fn span(from: u64, to: u64) -> EventSpan {
        EventSpan { since: id(1), from: id(from), to: id(to) }
    }

    fn events(all: std::ops::RangeInclusive<u64>) -> Vec<EventRecord> {
        let body = |n: u64| format!(r#"{{"type":"job.accepted","functionId":"f{n}"}}"#);
        let of = |n| EventRecord::of(&StreamedEvent { id: id(n), body: body(n).into() }).unwrap();
        all.map(of).collect()
    }

    /// The ids in the messages that wait.
    fn waiting(place: &HubPlace) -> Vec<u64> {
        let mut text = String::new();
        while let Some(Some(piece)) = place.queue.next().now_or_never() {
            text += std::str::from_utf8(&piece).unwrap();
        }
        let ids = text.lines().filter_map(|line| line.strip_prefix("id: ")?.strip_suffix("-0"));
        ids.map(|id| id.parse().unwrap()).collect()
    }

    #[test]
    fn a_watcher_gets_each_event_once() {
        let hub = hub(9);
        assert!(!hub.has_watchers() && hub.position().is_none());
        let one = hub.enter(EventFilter::default()).unwrap();
        hub.fan_out(id(3), id(4), &events(4..=4));
        let start = hub.start(one.number, span(3, 5), None);
        assert_eq!(start, WatchStart { after: id(5), till: id(5), is_resync: false });
        hub.fan_out(id(5), id(7), &events(6..=7));
        assert_eq!(waiting(&one), [6, 7], "not what came before its start");

        // It has seen 6 elsewhere, and reads 7 itself.
        let two = hub.enter(EventFilter::default()).unwrap();
        let start = hub.start(two.number, span(3, 8), Some(Ok(id(6))));
        assert_eq!(start, WatchStart { after: id(6), till: id(7), is_resync: false });
        // It has seen 8 elsewhere, where the reader of this node is not yet.
        let three = hub.enter(EventFilter::default()).unwrap();
        let start = hub.start(three.number, span(3, 8), Some(Ok(id(8))));
        assert_eq!(start, WatchStart { after: id(8), till: id(7), is_resync: false });
        hub.fan_out(id(7), id(9), &events(8..=9));
        assert_eq!((waiting(&one), waiting(&two), waiting(&three)), (vec![8, 9], vec![8, 9], vec![9]));
        hub.leave(one.number);
        hub.leave(two.number);
        hub.leave(three.number);
        assert!(hub.position().is_none());
    }

    #[test]
    fn an_unknown_id_is_a_resync() {
        let hub = hub(9);
        for last in [Err(()), Ok(id(2)), Ok(id(9))] {
            let place = hub.enter(EventFilter::default()).unwrap();
            let start = hub.start(place.number, span(3, 5), Some(last));
            assert_eq!(start, WatchStart { after: id(5), till: id(5), is_resync: true }, "{last:?}");
            hub.leave(place.number);
        }
    }

    #[test]
    fn a_gap_before_the_reader_is_a_resync() {
        let hub = hub(9);
        let place = hub.enter(EventFilter::default()).unwrap();
        hub.start(place.number, span(3, 5), None);
        assert!(!hub.check(span(5, 6)));
        assert!(hub.check(span(7, 8)), "the reader was overtaken");
        assert_eq!((waiting(&place), hub.position()), (vec![8], Some(id(8))));
        assert!(hub.check(EventSpan { since: id(2), ..span(7, 8) }), "the store has lost its data");
        assert_eq!(waiting(&place), [8]);
    }

    #[test]
    fn places_are_bounded_and_slow_watchers_lose_theirs() {
        let hub = hub(2);
        let (one, two) =
            (hub.enter(EventFilter::default()).unwrap(), hub.enter(EventFilter::default()).unwrap());
        assert!(Arc::ptr_eq(&one.filter, &two.filter) && hub.enter(EventFilter::default()).is_none());
        hub.start(one.number, span(0, 0), None);
        hub.start(two.number, span(0, 0), None);
        let mut got = 0;
        for n in 1..=1000 {
            hub.fan_out(id(n - 1), id(n), &events(n..=n));
            got += waiting(&one).len();
        }
        assert_eq!(got, 1000);
        assert_eq!(two.queue.next().now_or_never(), Some(None), "closed");
        assert_eq!(hub.metrics.watchers_dropped.with_label_values(&["slow"]).get(), 1);
        assert!(hub.enter(EventFilter::default()).is_some());
    }

    #[test]
    fn each_watcher_gets_what_its_filter_admits() {
        let hub = hub(9);
        let only =
            EventFilter { functions: vec![FunctionId::parse("f2").unwrap()], ..EventFilter::default() };
        let (all, few) = (hub.enter(EventFilter::default()).unwrap(), hub.enter(only).unwrap());
        hub.start(all.number, span(0, 0), None);
        hub.start(few.number, span(0, 0), None);
        hub.fan_out(id(0), id(3), &events(1..=3));
        assert_eq!((waiting(&all), waiting(&few)), (vec![1, 2, 3], vec![2]));
    }
}
