//! Live events: what happens to jobs, functions, workers and nodes, for the clients of `GET /events`.
//!
//! ```text
//! report  bus → buffer (sampled) ── every 100 ms ──▶ stream of the fleet (a port)
//! watch   stream ── one reader for all watchers of the node ──▶ hub → a queue for each watcher
//! ```
//!
//! Nobody pays for it while nobody watches: then a report is one relaxed load. Nodes learn from a mark in the
//! store that somebody watches anywhere. Events are no record. Under load most are skipped, and a node that
//! dies takes those of its last moment with it.
//!
//! [`new`] builds an [`EventBus`], the handle of all other rooms, and the [`EventLoop`] that `engine` starts.

mod buffer;
mod bus;
mod event;
mod event_loop;
mod filter;
mod hub;
mod queue;
mod record;
mod watcher;

pub use bus::{EventBus, WatchError};
pub use event::{EventType, FleetEvent, LeaveReason};
pub use event_loop::EventLoop;
pub use filter::EventFilter;
pub use watcher::Watcher;

use crate::backend::Backend;
use crate::config::EventsConf;
use crate::metrics::Metrics;
use crate::model::NodeId;
use std::sync::Arc;

/// Builds the events of a node. Starts nothing.
pub fn new(node: NodeId, conf: &EventsConf, backend: &Backend, metrics: &Metrics) -> (EventBus, EventLoop) {
    let bus = match &backend.events {
        Some(stream) => EventBus::new(node, conf, Arc::clone(stream), metrics.events.clone()),
        None => EventBus::default(),
    };
    (bus.clone(), EventLoop::new(bus, Arc::clone(&backend.workers)))
}
