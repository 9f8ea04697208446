//! The handle of the other rooms: they report events, and clients watch them.

use super::buffer::EventBuffer;
use super::event::FleetEvent;
use super::filter::EventFilter;
use super::hub::WatcherHub;
use super::watcher::Watcher;
use crate::backend::{BackendError, EventId, EventStream};
use crate::config::EventsConf;
use crate::metrics::EventMetrics;
use crate::model::{NodeId, UnixMs, now_ms};
use bytes::Bytes;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// How long nodes publish after the last watcher has left, so that one that comes back misses nothing.
pub const WATCHED_FOR: Duration = Duration::from_secs(60);

/// Why a client cannot watch.
#[derive(Debug)]
pub enum WatchError {
    /// All places of this node are taken.
    TooMany,
    Backend(BackendError),
}

/// Reports events. Cheap to clone. The default one reports nothing, and cannot be watched.
#[derive(Clone, Default)]
pub struct EventBus(Option<Arc<BusState>>);

/// What the bus and its loop share.
pub struct BusState {
    pub node: NodeId,
    pub stream: Arc<dyn EventStream>,
    pub hub: Arc<WatcherHub>,
    pub metrics: EventMetrics,
    /// The first watcher of this node has come.
    pub watched_now: Notify,
    /// Somebody watches, on any node.
    is_watched: AtomicBool,
    buffer: Mutex<EventBuffer>,
    heartbeat: Duration,
}

impl EventBus {
    pub fn new(node: NodeId, conf: &EventsConf, stream: Arc<dyn EventStream>, metrics: EventMetrics) -> Self {
        Self(Some(Arc::new(BusState {
            node,
            stream,
            hub: Arc::new(WatcherHub::new(conf.watchers_max, metrics.clone())),
            metrics,
            watched_now: Notify::new(),
            is_watched: AtomicBool::new(false),
            buffer: Mutex::new(EventBuffer::new(Instant::now())),
            heartbeat: Duration::from_secs(conf.heartbeat_s),
        })))
    }

    pub fn state(&self) -> Option<&Arc<BusState>> {
        self.0.as_ref()
    }

    /// Whether anybody watches. One relaxed load: an event may be late or missing when a watch begins.
    pub fn is_watched(&self) -> bool {
        self.0.as_ref().is_some_and(|state| state.is_watched.load(Ordering::Relaxed))
    }

    /// Reports an event, if anybody watches.
    pub fn report(&self, event: impl FnOnce() -> FleetEvent) {
        if let Some(state) = self.0.as_ref().filter(|_| self.is_watched()) {
            state.add(event());
        }
    }

    /// Starts to watch. `last`: the event after which the watcher continues, as the client has sent it.
    ///
    /// # Errors
    /// `TooMany` if all places are taken. `Backend` if the stream does not answer.
    pub async fn watch(&self, filter: EventFilter, last: Option<&[u8]>) -> Result<Watcher, WatchError> {
        let Some(state) = &self.0 else { return Err(WatchError::TooMany) };
        let place = state.hub.enter(filter).ok_or(WatchError::TooMany)?;
        let (hub, stream) = (Arc::clone(&state.hub), Arc::clone(&state.stream));
        let mut watcher = Watcher::new(hub, stream, place, state.heartbeat);
        let last = last.map(|text| std::str::from_utf8(text).ok().and_then(EventId::parse).ok_or(()));
        watcher.start(WATCHED_FOR, last).await.map_err(WatchError::Backend)?;
        if !state.is_watched.swap(true, Ordering::Relaxed) {
            state.watched_now.notify_one();
        }
        Ok(watcher)
    }
}

impl BusState {
    fn add(&self, event: FleetEvent) {
        if !self.buffer.lock().push(Instant::now(), now_ms(), event) {
            self.metrics.dropped.with_label_values(&["sampled"]).inc();
        }
    }

    pub fn set_watched(&self, is_watched: bool) {
        self.is_watched.store(is_watched, Ordering::Relaxed);
    }

    pub fn is_watched(&self) -> bool {
        self.is_watched.load(Ordering::Relaxed)
    }

    /// Takes the events that wait, as JSON.
    pub fn take(&self) -> Vec<Bytes> {
        let taken: Vec<(UnixMs, FleetEvent)> = self.buffer.lock().take(Instant::now(), now_ms());
        taken.iter().map(|(at, event)| event.body(*at, self.node)).collect()
    }
}
