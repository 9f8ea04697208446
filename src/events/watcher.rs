//! One watcher: what it gets, piece by piece.

use super::hub::{HubPlace, WatchStart, WatcherHub};
use super::record::{EventRecord, HEARTBEAT, greeting, joined, resync};
use crate::backend::{BackendError, EventId, EventStream};
use bytes::Bytes;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

/// Events that a watcher reads at once when it continues.
const REPLAYED_MAX: usize = 500;

/// A watcher of the events. Dropping it frees its place.
pub struct Watcher {
    hub: Arc<WatcherHub>,
    stream: Arc<dyn EventStream>,
    place: HubPlace,
    /// Messages at the start.
    first: VecDeque<Bytes>,
    /// The events that it reads itself: after the one, up to the other.
    replay: Option<(EventId, EventId)>,
    /// How long the mark of watchers lasts.
    lasts: Duration,
    /// Longest silence.
    heartbeat: Duration,
}

impl Watcher {
    /// A watcher that has a place, and has not started.
    pub fn new(
        hub: Arc<WatcherHub>,
        stream: Arc<dyn EventStream>,
        place: HubPlace,
        heartbeat: Duration,
    ) -> Self {
        let (first, lasts) = (VecDeque::new(), Duration::ZERO);
        Self { hub, stream, place, first, replay: None, lasts, heartbeat }
    }

    /// Starts it. `last`: the event after which it continues; an error is an id that cannot be parsed.
    ///
    /// # Errors
    /// The stream does not answer.
    pub async fn start(
        &mut self,
        lasts: Duration,
        last: Option<Result<EventId, ()>>,
    ) -> Result<(), BackendError> {
        self.lasts = lasts;
        let span = self.stream.watch(lasts).await?;
        let WatchStart { after, till, is_resync } = self.hub.start(self.place.number, span, last);
        self.first.push_back(greeting(after));
        if is_resync {
            self.first.push_back(resync(after));
        }
        self.replay = (after < till).then_some((after, till));
        Ok(())
    }

    /// The next piece of the body. `None`: the watcher is dropped, because it is too slow or because the
    /// stream does not answer.
    pub async fn next(&mut self) -> Option<Bytes> {
        if let Some(first) = self.first.pop_front() {
            return Some(first);
        }
        while let Some((after, till)) = self.replay {
            let read = self.stream.after(after, REPLAYED_MAX).await;
            let read = read.inspect_err(|e| tracing::debug!(error = %e, "Events not replayed")).ok()?;
            // What is read slowly may be dropped from the stream meanwhile. The next connection is told.
            let span = self.stream.watch(self.lasts).await;
            let span = span.inspect_err(|e| tracing::debug!(error = %e, "Events not replayed")).ok()?;
            if span.from > after {
                return None;
            }
            let reached = read.last().map_or(till, |event| event.id);
            self.replay = (reached < till).then_some((reached, till));
            let events: Vec<EventRecord> =
                read.iter().filter(|event| event.id <= till).filter_map(EventRecord::of).collect();
            let piece = joined(&events, |event| self.place.filter.admits(event));
            if !piece.is_empty() {
                return Some(piece);
            }
        }
        match tokio::time::timeout(self.heartbeat, self.place.queue.next()).await {
            Ok(piece) => piece,
            Err(_) => Some(HEARTBEAT),
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.hub.leave(self.place.number);
    }
}
