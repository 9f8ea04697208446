//! What the worker of this process does now, for its status.

use crate::model::now_ms;
use parking_lot::Mutex;
use serde::Serialize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;

/// The state of the worker of this process while its loop runs.
#[derive(Default)]
pub struct WorkerActivity {
    since: watch::Sender<Option<Instant>>,
    runs: AtomicUsize,
    is_draining: AtomicBool,
    pools: Mutex<WarmPools>,
    /// By [`WorkerPart`].
    failing: [AtomicBool; 3],
}

/// A part of the backend that a worker calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkerPart {
    /// Where jobs come from.
    Queue,
    /// Where results go.
    Results,
    /// Where the code of functions is.
    Code,
}

/// Idle processes, by runtime. The names are those of heartbeats.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct WarmPools {
    pub python: usize,
    pub nodejs: usize,
    pub cpp: usize,
    pub go: usize,
}

/// The JSON of a worker that sends no heartbeats, as `system:status` holds it.
#[derive(Serialize)]
struct LoneStatus {
    status: &'static str,
    worker_count: usize,
    active_jobs: usize,
    pools: WarmPools,
    uptime_seconds: u64,
    /// Epoch seconds.
    timestamp: f64,
}

impl WorkerActivity {
    /// Marks the loop as running, until the guard is dropped.
    pub fn begin(self: &Arc<Self>) -> ActiveWorker {
        self.set_since(Some(Instant::now()));
        ActiveWorker(Arc::clone(self))
    }

    fn set_since(&self, since: Option<Instant>) {
        self.runs.store(0, Ordering::Relaxed);
        self.is_draining.store(false, Ordering::Relaxed);
        *self.pools.lock() = WarmPools::default();
        self.failing.iter().for_each(|failing| failing.store(false, Ordering::Relaxed));
        self.since.send_replace(since);
    }

    /// How long the loop has run. `None`: it does not run.
    pub fn uptime(&self) -> Option<Duration> {
        self.since.borrow().map(|since| since.elapsed())
    }

    /// Waits until the loop runs.
    pub async fn begun(&self) {
        // It fails only if the sender is gone, and `self` holds it.
        let _ = self.since.subscribe().wait_for(Option::is_some).await;
    }

    /// The number of runs in progress.
    pub fn runs(&self) -> usize {
        self.runs.load(Ordering::Relaxed)
    }

    /// Whether the worker finishes its last jobs.
    pub fn is_draining(&self) -> bool {
        self.is_draining.load(Ordering::Relaxed)
    }

    /// The idle processes.
    pub fn pools(&self) -> WarmPools {
        *self.pools.lock()
    }

    /// Sets the numbers of idle processes.
    pub fn show_pools(&self, pools: WarmPools) {
        *self.pools.lock() = pools;
    }

    /// Records the outcome of a call.
    pub fn note(&self, part: WorkerPart, is_ok: bool) {
        self.failing[part as usize].store(!is_ok, Ordering::Relaxed);
    }

    /// Whether the last call to this part failed.
    pub fn is_failing_in(&self, part: WorkerPart) -> bool {
        self.failing[part as usize].load(Ordering::Relaxed)
    }

    /// Whether the last call to any part failed.
    pub fn is_failing(&self) -> bool {
        self.failing.iter().any(|failing| failing.load(Ordering::Relaxed))
    }

    /// The status as a JSON object. `None`: the loop does not run.
    pub fn lone_status(&self) -> Option<String> {
        let uptime = self.uptime()?;
        let status = LoneStatus {
            status: "healthy",
            worker_count: 1,
            active_jobs: self.runs(),
            pools: self.pools(),
            uptime_seconds: uptime.as_secs(),
            timestamp: now_ms() as f64 / 1000.0,
        };
        // Text and numbers can always be serialized.
        serde_json::to_string(&status).ok()
    }
}

/// Guard of the running loop of a worker.
pub struct ActiveWorker(Arc<WorkerActivity>);

impl ActiveWorker {
    /// Sets the number of runs in progress.
    pub fn show_runs(&self, runs: usize) {
        self.0.runs.store(runs, Ordering::Relaxed);
    }

    /// The worker takes no more jobs.
    pub fn show_draining(&self) {
        self.0.is_draining.store(true, Ordering::Relaxed);
    }
}

impl Drop for ActiveWorker {
    fn drop(&mut self) {
        self.0.set_since(None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_call_to_each_part_counts() {
        let activity = Arc::new(WorkerActivity::default());
        let active = activity.begin();
        for part in [WorkerPart::Queue, WorkerPart::Results, WorkerPart::Code] {
            activity.note(part, false);
            assert!(activity.is_failing_in(part) && activity.is_failing());
            activity.note(part, true);
            assert!(!activity.is_failing());
        }
        activity.note(WorkerPart::Code, false);
        activity.show_pools(WarmPools { go: 1, ..WarmPools::default() });
        drop(active);
        assert_eq!((activity.is_failing(), activity.pools()), (false, WarmPools::default()));
    }
}
