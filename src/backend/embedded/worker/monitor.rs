//! Looks at what a run uses, again and again, and finds when it must be stopped.

use super::tree::{self, Shares, Usage};
use nix::unistd::Pid;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

/// First and longest pause between two looks at what a run uses. The longest bounds how far a run gets beyond
/// its memory: some hundred MiB for one that does nothing but fill it.
const SAMPLE_MIN: Duration = Duration::from_millis(4);
const SAMPLE_MAX: Duration = Duration::from_millis(100);
/// The same for a run that uses more than half of its memory.
const SAMPLE_CLOSE: Duration = Duration::from_millis(10);
/// A look is followed by a pause of so many times what it took, up to [`SAMPLE_MAX`].
const SAMPLE_PAUSE_FACTOR: u32 = 9;
/// The same after the shares were asked for and are within the limit, which costs far more.
const SHARES_PAUSE_MIN: Duration = Duration::from_millis(100);
const SHARES_PAUSE_FACTOR: u32 = 20;
/// So many looks in a row above the limit are enough, even if the processes are others each time: a run that
/// forks without end never shows the same ones twice.
const LOOKS_MAX: u32 = 3;
/// A run that has used no CPU for so long waits for something.
const IDLE_AFTER: Duration = Duration::from_millis(200);
/// Stands for: not measured yet.
const UNKNOWN: u64 = u64::MAX;

/// What a run uses, for those who start others.
pub(super) struct Gauge {
    /// Whether it computes, and does not wait.
    is_busy: AtomicBool,
    memory_bytes: AtomicU64,
    /// Notified when it computes no more.
    idled: Arc<Notify>,
}

impl Gauge {
    /// Of a run that begins: it counts as busy until it is seen to wait.
    pub(super) fn new(idled: Arc<Notify>) -> Self {
        Self { is_busy: AtomicBool::new(true), memory_bytes: AtomicU64::new(UNKNOWN), idled }
    }

    pub(super) fn is_busy(&self) -> bool {
        self.is_busy.load(Ordering::Relaxed)
    }

    /// The memory that it used at the last look; `None` before the first.
    pub(super) fn memory_bytes(&self) -> Option<u64> {
        Some(self.memory_bytes.load(Ordering::Relaxed)).filter(|bytes| *bytes != UNKNOWN)
    }
}

/// Why a run was stopped.
pub(super) enum Stop {
    Time,
    Memory(u64),
    Tasks,
}

/// The watch over one run.
pub(super) struct Watch {
    supervisor: Pid,
    memory_bytes_max: u64,
    pause: Duration,
    cpu_ticks: u64,
    /// When it was last seen to have used CPU time.
    used_at: Instant,
    peak_bytes: u64,
    looks: Looks,
}

impl Watch {
    pub(super) fn new(supervisor: Pid, memory_mb: u64) -> Self {
        Self {
            supervisor,
            memory_bytes_max: memory_mb.saturating_mul(1 << 20),
            pause: SAMPLE_MIN,
            cpu_ticks: 0,
            used_at: Instant::now(),
            peak_bytes: 0,
            looks: Looks::new(),
        }
    }

    /// Most resident memory so far, if any was seen.
    pub(super) fn peak_bytes(&self) -> Option<u64> {
        Some(self.peak_bytes).filter(|bytes| *bytes > 0)
    }

    /// Looks once more, after a pause: whether the run must be stopped. May be dropped and called again.
    pub(super) async fn next(&mut self, gauge: &Gauge) -> Option<Stop> {
        sleep(self.pause).await;
        let (supervisor, most, peak) = (self.supervisor, self.memory_bytes_max, self.peak_bytes);
        let is_due = self.looks.are_due();
        // The kernel may take a while to count a large run.
        let look = tokio::task::spawn_blocking(move || {
            let began = Instant::now();
            let usage = tree::measure(supervisor);
            let took = began.elapsed();
            // What one process has, it shares with nobody.
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
            return Some(Stop::Tasks);
        }
        self.looks.excess(most, &usage, shares).map(Stop::Memory)
    }

    fn show(&mut self, usage: &Usage, shares: Option<Shares>, gauge: &Gauge) {
        let ticks = usage.cpu_ticks.saturating_sub(self.cpu_ticks);
        self.cpu_ticks = usage.cpu_ticks;
        if ticks > 0 {
            self.used_at = Instant::now();
            gauge.is_busy.store(true, Ordering::Relaxed);
        } else if self.used_at.elapsed() >= IDLE_AFTER && gauge.is_busy.swap(false, Ordering::Relaxed) {
            gauge.idled.notify_one();
        }
        // The sum over processes may be far too large. More than its limit it does not use for long.
        let memory = shares.map_or(usage.memory_bytes, |shares| shares.memory_bytes);
        gauge.memory_bytes.store(memory.min(self.memory_bytes_max), Ordering::Relaxed);
    }
}

/// When the shares of a run's processes are asked for, and what they prove.
struct Looks {
    next_at: Instant,
    /// Looks in a row that were above the limit, and the processes at the last.
    above: u32,
    pids: Vec<i32>,
}

impl Looks {
    fn new() -> Self {
        Self { next_at: Instant::now(), above: 0, pids: Vec::new() }
    }

    fn are_due(&self) -> bool {
        Instant::now() >= self.next_at
    }

    /// The memory of a run that is above its limit without doubt.
    fn excess(&mut self, most: u64, usage: &Usage, shares: Option<Shares>) -> Option<u64> {
        if usage.largest_bytes > most {
            return Some(usage.largest_bytes);
        }
        if let Some(shares) = shares {
            if shares.memory_bytes > most {
                // Processes free and take memory between one share and the next, so one look proves nothing.
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

    /// Processes that share memory: each has the most it may.
    fn usage(pids: &[i32]) -> Usage {
        let memory_bytes = MOST * pids.len() as u64;
        Usage { pids: pids.to_vec(), memory_bytes, largest_bytes: MOST, ..Usage::default() }
    }

    fn shares(memory_bytes: u64, took_ms: u64) -> Option<Shares> {
        Some(Shares { memory_bytes, resident_bytes: 0, took: Duration::from_millis(took_ms) })
    }

    #[tokio::test(start_paused = true)]
    async fn one_look_above_the_limit_proves_nothing() {
        let (within, above) = (shares(MOST, 1), shares(MOST + 1, 1));
        for (what, looks, expected) in [
            ("the same processes", &[(above, &[1, 2][..]), (above, &[1, 2])][..], &[false, true][..]),
            ("a child exits", &[(above, &[1, 2, 3]), (above, &[1, 2]), (within, &[1, 2])], &[false; 3]),
            ("fork bomb", &[(above, &[1, 2]), (above, &[1, 3]), (above, &[1, 4])], &[false, false, true]),
            ("not in a row", &[(above, &[1, 2]), (within, &[1, 2]), (above, &[1, 2])], &[false; 3]),
        ] {
            let mut state = Looks::new();
            let found: Vec<_> = looks
                .iter()
                .map(|(shares, pids)| state.excess(MOST, &usage(pids), *shares).is_some())
                .collect();
            assert_eq!(found, expected, "{what}");
        }
        let one = Usage { memory_bytes: MOST + 1, largest_bytes: MOST + 1, ..usage(&[1]) };
        assert_eq!(Looks::new().excess(MOST, &one, None), Some(MOST + 1), "one process is certain");
    }

    #[tokio::test(start_paused = true)]
    async fn shares_within_the_limit_are_asked_for_seldom() {
        let mut state = Looks::new();
        for (took_ms, pause_ms) in [(1, 100), (5, 100), (20, 400)] {
            assert!(state.are_due());
            assert_eq!(state.excess(MOST, &usage(&[1, 2]), shares(MOST, took_ms)), None);
            tokio::time::advance(Duration::from_millis(pause_ms - 1)).await;
            assert!(!state.are_due(), "{took_ms} ms");
            tokio::time::advance(Duration::from_millis(1)).await;
        }
        assert!(state.are_due());
        assert_eq!(state.excess(MOST, &usage(&[1, 2]), shares(MOST + 1, 20)), None);
        assert!(state.are_due(), "a doubt is settled at once");
    }
}
