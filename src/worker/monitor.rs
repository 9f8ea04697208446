//! Samples the resource usage of a run, and decides when the run must be stopped.

use super::tree::{self, Shares, Usage};
use nix::unistd::Pid;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

/// First pause of a process that is for one run: short, because many such runs take only some milliseconds.
const SAMPLE_MIN: Duration = Duration::from_millis(1);
/// First pause of a run in a process that stays. Most of these runs are shorter, and the process is sampled
/// from time to time.
const SAMPLE_MIN_HANDLER: Duration = Duration::from_millis(20);
/// Longest pause between two samples. It bounds how far a run can exceed its memory: by some hundred MiB, if
/// it does nothing but allocate.
const SAMPLE_MAX: Duration = Duration::from_millis(100);
/// Longest pause for a run that uses more than half of its memory.
const SAMPLE_CLOSE: Duration = Duration::from_millis(10);
/// The pause after a sample is at least this many times its duration, up to [`SAMPLE_MAX`].
const SAMPLE_PAUSE_FACTOR: u32 = 9;
/// Least pause after shares within the limit. Reading the shares costs far more than the rest of a sample.
const SHARES_PAUSE_MIN: Duration = Duration::from_millis(100);
/// That pause is also at least this many times the duration of the reading.
const SHARES_PAUSE_FACTOR: u32 = 20;
/// Consecutive samples above the limit after which a run is stopped, even if its processes differ each time.
/// A run that forks endlessly never has the same processes twice.
const LOOKS_MAX: u32 = 3;
/// A run that has used no CPU for this long is idle.
const IDLE_AFTER: Duration = Duration::from_millis(200);
/// Marker for memory that was not measured yet.
const UNKNOWN: u64 = u64::MAX;

/// The usage of a run as the scheduler sees it.
pub(super) struct RunUsage {
    /// Whether the run uses the CPU, and does not wait.
    is_busy: AtomicBool,
    memory_bytes: AtomicU64,
    /// Notified when the run becomes idle.
    idled: Arc<Notify>,
}

impl RunUsage {
    /// The gauge of a new run. It is busy until a sample shows that it is idle.
    pub(super) fn new(idled: Arc<Notify>) -> Self {
        Self { is_busy: AtomicBool::new(true), memory_bytes: AtomicU64::new(UNKNOWN), idled }
    }

    pub(super) fn is_busy(&self) -> bool {
        self.is_busy.load(Ordering::Relaxed)
    }

    /// The run uses the CPU from now on, until a sample shows that it is idle.
    pub(super) fn work(&self) {
        self.is_busy.store(true, Ordering::Relaxed);
    }

    /// The run does not use the CPU from now on, as far as is known: it waits, or has ended.
    pub(super) fn rest(&self) {
        if self.is_busy.swap(false, Ordering::Relaxed) {
            self.idled.notify_one();
        }
    }

    /// Memory in the last sample, in bytes. `None` before the first sample.
    pub(super) fn memory_bytes(&self) -> Option<u64> {
        Some(self.memory_bytes.load(Ordering::Relaxed)).filter(|bytes| *bytes != UNKNOWN)
    }
}

/// Why a run is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StopReason {
    Time,
    /// The memory that it used, in bytes. `None`: the kernel stopped it.
    Memory(Option<u64>),
    Tasks,
}

/// Takes the samples of one process tree: during one run, or during many, one after the other.
#[derive(Debug)]
pub(super) struct RunMonitor {
    supervisor: Pid,
    sandbox_levels: u32,
    memory_bytes_max: u64,
    pause: Duration,
    cpu_ticks: u64,
    /// Time of the last sample that showed CPU usage.
    used_at: Instant,
    peak_bytes: u64,
    looks: ExcessDetector,
}

impl RunMonitor {
    /// `sandbox_levels`: see [`tree::measure`].
    pub(super) fn new(supervisor: Pid, sandbox_levels: u32, memory_mb: u64) -> Self {
        Self {
            supervisor,
            sandbox_levels,
            memory_bytes_max: memory_mb.saturating_mul(1 << 20),
            pause: SAMPLE_MIN,
            cpu_ticks: 0,
            used_at: Instant::now(),
            peak_bytes: 0,
            looks: ExcessDetector::new(),
        }
    }

    /// Begins the next run of a process that stays.
    pub(super) fn begin_handler_run(&mut self) {
        self.pause = SAMPLE_MIN_HANDLER;
        self.used_at = Instant::now();
    }

    /// Highest resident memory so far, in bytes. `None`: none was sampled.
    pub(super) fn peak_bytes(&self) -> Option<u64> {
        Some(self.peak_bytes).filter(|bytes| *bytes > 0)
    }

    /// The number of processes now, without those of the sandbox. `None`: the count failed.
    pub(super) async fn count_processes(&self) -> Option<usize> {
        let (supervisor, levels) = (self.supervisor, self.sandbox_levels);
        let count = tokio::task::spawn_blocking(move || tree::measure(supervisor, levels).pids.len());
        count.await.ok()
    }

    /// Takes the next sample after a pause, and returns why the run must be stopped, if it must. Cancel safe.
    pub(super) async fn next(&mut self, gauge: &RunUsage) -> Option<StopReason> {
        sleep(self.pause).await;
        self.sample(gauge).await
    }

    /// Takes a sample now.
    pub(super) async fn sample(&mut self, gauge: &RunUsage) -> Option<StopReason> {
        let (supervisor, levels) = (self.supervisor, self.sandbox_levels);
        let (most, peak, is_due) = (self.memory_bytes_max, self.peak_bytes, self.looks.are_due());
        // The kernel may take long to count the pages of a large run.
        let look = tokio::task::spawn_blocking(move || {
            let began = Instant::now();
            let usage = tree::measure(supervisor, levels);
            let took = began.elapsed();
            // A single process shares no pages, so its shares say nothing new.
            let matters = usage.memory_bytes > most || usage.resident_bytes > peak;
            let shares = (is_due && matters && usage.pids.len() > 1).then(|| tree::shares(&usage.pids));
            (usage, shares, took)
        });
        let (usage, shares, took) = look.await.ok()?;
        let is_close = usage.memory_bytes > most / 2;
        let pause = (self.pause * 2).min(if is_close { SAMPLE_CLOSE } else { SAMPLE_MAX });
        self.pause = pause.max((took * SAMPLE_PAUSE_FACTOR).min(SAMPLE_MAX));
        self.show(&usage, shares, gauge);
        self.peak_bytes =
            self.peak_bytes.max(usage.peak_bytes).max(shares.map_or(0, |shares| shares.resident_bytes));
        if usage.tasks > tree::TASKS_MAX {
            return Some(StopReason::Tasks);
        }
        self.looks.excess(most, &usage, shares).map(|bytes| StopReason::Memory(Some(bytes)))
    }

    fn show(&mut self, usage: &Usage, shares: Option<Shares>, gauge: &RunUsage) {
        let ticks = usage.cpu_ticks.saturating_sub(self.cpu_ticks);
        self.cpu_ticks = usage.cpu_ticks;
        if ticks > 0 {
            self.used_at = Instant::now();
            gauge.is_busy.store(true, Ordering::Relaxed);
        } else if self.used_at.elapsed() >= IDLE_AFTER {
            gauge.rest();
        }
        // The sum over processes may be far too high. A run never exceeds its limit for long, so cap it.
        let memory = shares.map_or(usage.memory_bytes, |shares| shares.memory_bytes);
        gauge.memory_bytes.store(memory.min(self.memory_bytes_max), Ordering::Relaxed);
    }
}

/// Decides when the shares of a run's processes are read, and when they prove an excess.
#[derive(Debug)]
struct ExcessDetector {
    next_at: Instant,
    /// Consecutive samples above the limit, and the processes in the last one.
    above: u32,
    pids: Vec<i32>,
}

impl ExcessDetector {
    fn new() -> Self {
        Self { next_at: Instant::now(), above: 0, pids: Vec::new() }
    }

    fn are_due(&self) -> bool {
        Instant::now() >= self.next_at
    }

    /// The memory of a run that certainly exceeds its limit, in bytes.
    fn excess(&mut self, most: u64, usage: &Usage, shares: Option<Shares>) -> Option<u64> {
        if usage.largest_bytes > most {
            return Some(usage.largest_bytes);
        }
        if let Some(shares) = shares {
            if shares.memory_bytes > most {
                // Processes allocate and free memory while the shares are read, so one sample proves nothing.
                self.above += 1;
                let are_same = std::mem::replace(&mut self.pids, usage.pids.clone()) == usage.pids;
                let is_certain = self.above >= LOOKS_MAX || self.above > 1 && are_same;
                return is_certain.then_some(shares.memory_bytes);
            }
            self.next_at = Instant::now() + SHARES_PAUSE_MIN.max(shares.took * SHARES_PAUSE_FACTOR);
        }
        if shares.is_some() || usage.memory_bytes <= most {
            self.above = 0;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: u64 = 100;

    /// The usage of processes that share memory. Each has as much as the limit allows.
    fn usage(pids: &[i32]) -> Usage {
        let memory_bytes = MOST * pids.len() as u64;
        Usage { pids: pids.to_vec(), memory_bytes, largest_bytes: MOST, ..Usage::default() }
    }

    fn shares(memory_bytes: u64, took_ms: u64) -> Option<Shares> {
        Some(Shares { memory_bytes, resident_bytes: 0, took: Duration::from_millis(took_ms) })
    }

    #[tokio::test(start_paused = true)]
    async fn one_sample_above_the_limit_proves_nothing() {
        let (within, above) = (shares(MOST, 1), shares(MOST + 1, 1));
        for (what, looks, expected) in [
            ("the same processes", &[(above, &[1, 2][..]), (above, &[1, 2])][..], &[false, true][..]),
            ("a child exits", &[(above, &[1, 2, 3]), (above, &[1, 2]), (within, &[1, 2])], &[false; 3]),
            ("fork bomb", &[(above, &[1, 2]), (above, &[1, 3]), (above, &[1, 4])], &[false, false, true]),
            ("not in a row", &[(above, &[1, 2]), (within, &[1, 2]), (above, &[1, 2])], &[false; 3]),
        ] {
            let mut state = ExcessDetector::new();
            let found: Vec<_> = looks
                .iter()
                .map(|(shares, pids)| state.excess(MOST, &usage(pids), *shares).is_some())
                .collect();
            assert_eq!(found, expected, "{what}");
        }
        let one = Usage { memory_bytes: MOST + 1, largest_bytes: MOST + 1, ..usage(&[1]) };
        assert_eq!(ExcessDetector::new().excess(MOST, &one, None), Some(MOST + 1), "one process is certain");
    }

    #[tokio::test(start_paused = true)]
    async fn shares_within_the_limit_are_read_rarely() {
        let mut state = ExcessDetector::new();
        for (took_ms, pause_ms) in [(1, 100), (5, 100), (20, 400)] {
            assert!(state.are_due());
            assert_eq!(state.excess(MOST, &usage(&[1, 2]), shares(MOST, took_ms)), None);
            tokio::time::advance(Duration::from_millis(pause_ms - 1)).await;
            assert!(!state.are_due(), "{took_ms} ms");
            tokio::time::advance(Duration::from_millis(1)).await;
        }
        assert!(state.are_due());
        assert_eq!(state.excess(MOST, &usage(&[1, 2]), shares(MOST + 1, 20)), None);
        assert!(state.are_due(), "an excess is verified immediately");
    }
}
