//! The loop of the events: publishes those of this node, reads those of all nodes while this one has
//! watchers, and finds out whether anybody watches.

use super::bus::{BusState, EventBus, WATCHED_FOR};
use super::event::{FleetEvent, LeaveReason};
use super::record::EventRecord;
use crate::backend::{HEALTHY_WITHIN, WorkerRegistry, reports_well};
use serde::Deserialize;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// How often events are published and read while somebody watches.
const FLUSHED_EVERY: Duration = Duration::from_millis(100);
/// How often the mark of watchers is read or renewed.
const LOOKED_EVERY: Duration = Duration::from_secs(1);
/// How often silent workers are looked for while somebody watches.
const WORKERS_EVERY: Duration = Duration::from_secs(5);
/// Events per read, and reads in a row. A reader that does not keep up is overtaken in the end, and its
/// watchers get `resync`.
const READ_MAX: usize = 1000;
const READS_MAX: usize = 4;
/// Time to publish the last events at a stop.
const LAST_EVENTS_MAX: Duration = Duration::from_secs(1);

/// The loop behind an [`EventBus`].
pub struct EventLoop {
    bus: EventBus,
    workers: Arc<dyn WorkerRegistry>,
}

/// The members of a heartbeat that say who has become silent.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct SilentWorker {
    worker_id: String,
    status: Option<String>,
}

impl EventLoop {
    pub fn new(bus: EventBus, workers: Arc<dyn WorkerRegistry>) -> Self {
        Self { bus, workers }
    }

    /// Runs until `stopped`. Then publishes what waits, and that this node has left.
    pub async fn run(self, stopped: impl Future<Output = ()>) {
        let Some(state) = self.bus.state().cloned() else { return stopped.await };
        let node = state.node;
        let mut stopped = std::pin::pin!(stopped);
        look(&state).await;
        self.bus.report(|| FleetEvent::NodeJoined { node });
        let (mut looked, mut workers_seen) = (Instant::now(), Instant::now());
        loop {
            let pause = if state.is_watched() { FLUSHED_EVERY } else { LOOKED_EVERY };
            tokio::select! {
                biased;
                () = &mut stopped => break,
                () = sleep(pause) => {}
                () = state.watched_now.notified() => {}
            }
            if looked.elapsed() >= LOOKED_EVERY {
                looked = Instant::now();
                look(&state).await;
            }
            if state.is_watched() && workers_seen.elapsed() >= WORKERS_EVERY {
                workers_seen = Instant::now();
                self.look_for_silent_workers().await;
            }
            tokio::join!(flush(&state), read(&state));
        }
        self.bus.report(|| FleetEvent::NodeLeft { node, reason: LeaveReason::Stopped });
        let _ = timeout(LAST_EVENTS_MAX, flush(&state)).await;
    }

    /// Reports workers that send no heartbeats any more. Those that have reported an end are known to have
    /// left.
    async fn look_for_silent_workers(&self) {
        match self.workers.newly_silent(HEALTHY_WITHIN).await {
            Ok(silent) => {
                let known =
                    silent.iter().filter_map(|json| serde_json::from_slice::<SilentWorker>(json).ok());
                let was_well = |worker: &SilentWorker| worker.status.as_deref().is_none_or(reports_well);
                for SilentWorker { worker_id: worker, .. } in known.filter(was_well) {
                    self.bus.report(|| FleetEvent::WorkerLeft { worker, reason: LeaveReason::Silent });
                }
            }
            Err(e) => tracing::debug!(error = %e, "Silent workers not looked for; retrying"),
        }
    }
}

/// Renews the mark if this node has watchers, and else reads it.
async fn look(state: &BusState) {
    if !state.hub.has_watchers() {
        match state.stream.is_watched().await {
            // A watcher may have come meanwhile.
            Ok(is_watched) => state.set_watched(is_watched || state.hub.has_watchers()),
            Err(e) => tracing::debug!(error = %e, "Unknown whether events are watched; asking again"),
        }
        return;
    }
    match state.stream.watch(WATCHED_FOR).await {
        Ok(span) => {
            if state.hub.check(span) {
                tracing::info!("Events are missing in the stream; the watchers of this node get `resync`");
            }
        }
        Err(e) => tracing::debug!(error = %e, "Mark of the watchers of events not renewed; retrying"),
    }
}

/// Publishes the events that wait. If that fails they are lost: they would be old, and others follow.
async fn flush(state: &BusState) {
    let bodies = state.take();
    if bodies.is_empty() {
        return;
    }
    let count = bodies.len() as u64;
    match state.stream.append(&bodies).await {
        Ok(()) => state.metrics.published.inc_by(count),
        Err(e) => {
            state.metrics.dropped.with_label_values(&["failed"]).inc_by(count);
            tracing::debug!(error = %e, events = count, "Events not published");
        }
    }
}

/// Reads the new events of all nodes for the watchers of this one.
async fn read(state: &BusState) {
    for _ in 0..READS_MAX {
        let Some(from) = state.hub.position() else { return };
        let read = match state.stream.after(from, READ_MAX).await {
            Ok(read) => read,
            Err(e) => return tracing::debug!(error = %e, "Events not read; retrying"),
        };
        let Some(last) = read.last() else { return };
        let events: Vec<EventRecord> = read.iter().filter_map(EventRecord::of).collect();
        state.hub.fan_out(from, last.id, &events);
        if read.len() < READ_MAX {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{EventId, embedded};
    use crate::config::EventsConf;
    use crate::events::filter::EventFilter;
    use crate::events::watcher::Watcher;
    use crate::metrics::Metrics;
    use crate::model::{FunctionId, NodeId};
    use tokio::sync::oneshot;
    use tokio::task::JoinSet;

    /// A node whose loop runs, in virtual time.
    struct Fixture {
        bus: EventBus,
        stop: Option<oneshot::Sender<()>>,
        running: JoinSet<()>,
        _dir: tempfile::TempDir,
    }

    impl Fixture {
        fn start() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let backend = embedded::open(dir.path(), false).unwrap().backend;
            let conf = EventsConf { watchers_max: 2, heartbeat_s: 15 };
            let metrics = Metrics::new(1).unwrap();
            let (bus, event_loop) = crate::events::new(NodeId(1), &conf, &backend, &metrics);
            let (stop, stopped) = oneshot::channel();
            let mut running = JoinSet::new();
            running.spawn(event_loop.run(async {
                let _ = stopped.await;
            }));
            Self { bus, stop: Some(stop), running, _dir: dir }
        }

        fn change(&self, version: u64) {
            let function = FunctionId::parse("f").unwrap();
            self.bus.report(|| FleetEvent::FunctionChanged { function, version });
        }

        async fn watch(&self, last: Option<&str>) -> Watcher {
            self.bus.watch(EventFilter::default(), last.map(str::as_bytes)).await.unwrap()
        }
    }

    /// The next piece that has data.
    async fn next(watcher: &mut Watcher) -> String {
        loop {
            let piece = watcher.next().await.expect("the watcher is not dropped");
            let text = String::from_utf8(piece.to_vec()).unwrap();
            if text.contains("data: ") {
                return text;
            }
        }
    }

    fn last_id(text: &str) -> String {
        text.lines().filter_map(|line| line.strip_prefix("id: ")).next_back().unwrap().to_owned()
    }

    #[tokio::test(start_paused = true)]
    async fn events_reach_watchers_and_later_ones() {
        let mut node = Fixture::start();
        node.change(1);
        let mut one = node.watch(None).await;
        assert!(node.bus.is_watched());
        node.change(2);
        let text = next(&mut one).await;
        assert!(text.contains("event: function.changed") && text.contains("\"version\":2"), "{text}");
        assert!(!text.contains("\"version\":1"), "nobody watched then");
        let seen = last_id(&text);
        drop(one);
        node.change(3);
        sleep(WATCHED_FOR / 4).await;
        let mut again = node.watch(Some(&seen)).await;
        let text = next(&mut again).await;
        assert!(text.contains("\"version\":3"), "{text}");
        drop(again);
        node.stop = None;
        while node.running.join_next().await.is_some() {}
        let mut other = node.watch(Some(&last_id(&text))).await;
        assert!(next(&mut other).await.contains("event: node.left"), "published at the end");
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_pays_long_after_the_last_watcher() {
        let node = Fixture::start();
        let mut one = node.watch(None).await;
        node.change(1);
        let seen = last_id(&next(&mut one).await);
        drop(one);
        sleep(2 * WATCHED_FOR).await;
        assert!(!node.bus.is_watched());
        for last in [seen.as_str(), "nonsense", "1-1"] {
            let mut late = node.watch(Some(last)).await;
            assert!(next(&mut late).await.contains("event: resync"), "{last}");
        }
        assert_eq!(EventId::parse(&seen).map(|id| id.to_string()), Some(seen));
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_stream_has_heartbeats() {
        let node = Fixture::start();
        // The loop has started, and has nothing to report.
        sleep(LOOKED_EVERY).await;
        let mut one = node.watch(None).await;
        let begun = Instant::now();
        assert!(one.next().await.unwrap().starts_with(b"retry: "));
        assert_eq!(one.next().await.unwrap(), ":\n\n");
        assert_eq!(begun.elapsed().as_secs(), 15);
        let _two = node.watch(None).await;
        assert!(node.bus.watch(EventFilter::default(), None).await.is_err(), "two places");
        drop(one);
        assert!(node.bus.watch(EventFilter::default(), None).await.is_ok());
    }
}
