//! Bounds the concurrent runs by the memory of the machine, however few cores it has.
//!
//! A function that calls another function waits for it, and uses no CPU meanwhile. If the number of cores
//! bounded the runs, enough such callers would wait forever for runs that cannot start.
//!
//! The memory that runs reserve is bounded as well, so the same could happen when callers reserve all of it.
//! But most runs use far less than they reserve. So a job that has waited for some time starts beyond the
//! reserved memory, if the memory in use leaves room. Waiting until all runs are idle was rejected, because a
//! caller that polls is never idle.
//!
//! A job that waits for memory lets later jobs that fit pass it, but only for a limited time, so that it does
//! not starve. [`AdmissionQueue`] measures both times.
//!
//! Runs that use the CPU share the cores with each other and with the gateway. While [`BUSY_A_CORE_MAX`] runs
//! per core are busy, others start slowly. They are not blocked completely, because the busy runs may poll
//! for their results.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// Most concurrent runs, whatever the memory and the settings. Each needs about ten descriptors.
pub(super) const RUNS_MAX: usize = 1_024;
/// Most busy runs per core: enough to use it fully, and few enough to leave time for the gateway.
pub(super) const BUSY_A_CORE_MAX: usize = 2;
/// Fraction of the memory that runs may reserve, as (numerator, denominator). The rest is for the gateway and
/// the system.
const PART: (u64, u64) = (3, 4);
/// How long a job waits for memory while nothing starts, until it may start beyond the reserved memory. In
/// this time, earlier runs show how much memory they use.
pub(super) const STALL: Duration = Duration::from_secs(5);
/// How long a job that waits for memory lets later jobs pass.
pub(super) const PASSING_MAX: Duration = Duration::from_secs(10);

/// Memory that all runs together may reserve, in MiB: three quarters of the memory of the machine, or of the
/// control group if that has less.
pub(super) fn memory_mb() -> u64 {
    let read = |path: &Path| std::fs::read_to_string(path).ok();
    let machine = read(Path::new("/proc/meminfo")).and_then(|text| mem_total_bytes(&text));
    let group = read(Path::new("/proc/self/cgroup")).and_then(|text| group_limit_bytes(&text, read));
    let bytes = machine.into_iter().chain(group).min().unwrap_or(u64::MAX);
    (bytes >> 20) / PART.1 * PART.0
}

fn mem_total_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// The lowest limit of the control group of this process and of its ancestors, in bytes. Reads version 2
/// (`0::/path`) and 1 (`4:memory:/path`). In a container the path may be that of the host, where only the
/// root is visible.
fn group_limit_bytes(groups: &str, read: impl Fn(&Path) -> Option<String>) -> Option<u64> {
    let mut least: Option<u64> = None;
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (root, file) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            names if names.split(',').any(|name| name == "memory") => {
                ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
            }
            _ => continue,
        };
        let mut dir = PathBuf::from(root);
        dir.push(path.trim_start_matches('/'));
        for dir in dir.ancestors().take_while(|dir| dir.starts_with(root)) {
            // `max`: no limit here.
            let limit = read(&dir.join(file)).and_then(|text| text.trim().parse().ok());
            least = limit.into_iter().chain(least).min();
        }
    }
    least
}

/// The memory of all runs, as the scheduler counts it. Processes that only wait get what is left.
#[derive(Debug, Default)]
pub(super) struct MemoryBudget {
    limit_mb: AtomicU64,
    reserved_mb: AtomicU64,
}

impl MemoryBudget {
    /// Sets what all runs may reserve, and what they have reserved, in MiB.
    pub(super) fn set(&self, limit_mb: u64, reserved_mb: u64) {
        self.limit_mb.store(limit_mb, Ordering::Relaxed);
        self.reserved_mb.store(reserved_mb, Ordering::Relaxed);
    }

    /// What is left for processes that wait, in MiB, if a run that has reserved `own_mb` did not run.
    pub(super) fn left_mb(&self, own_mb: u64) -> u64 {
        let reserved = self.reserved_mb.load(Ordering::Relaxed).saturating_sub(own_mb);
        self.limit_mb.load(Ordering::Relaxed).saturating_sub(reserved)
    }
}

/// The first job that waits for memory, and the times that depend on it.
pub(super) struct AdmissionQueue {
    stall: Duration,
    passing_max: Duration,
    /// Number of the first job that waits for memory, and since when it is the first.
    first: Option<(u64, Instant)>,
    /// When a run was last started.
    started_at: Option<Instant>,
}

impl AdmissionQueue {
    pub(super) fn new(stall: Duration, passing_max: Duration) -> Self {
        Self { stall, passing_max, first: None, started_at: None }
    }

    /// Sets the first job that waits for memory. `None`: no job waits.
    pub(super) fn set_first(&mut self, number: Option<u64>) {
        if self.first.map(|(first, _)| first) != number {
            self.first = number.map(|number| (number, Instant::now()));
        }
    }

    pub(super) fn started(&mut self) {
        self.started_at = Some(Instant::now());
    }

    /// Whether nothing was started for `time`.
    pub(super) fn is_quiet_for(&self, time: Duration) -> bool {
        self.started_at.is_none_or(|at| at.elapsed() >= time)
    }

    /// Whether later jobs may pass the job with this number.
    pub(super) fn may_pass(&self, number: u64) -> bool {
        self.first.is_none_or(|(first, since)| first != number || since.elapsed() < self.passing_max)
    }

    /// The first job, if it has waited long enough to start beyond the reserved memory.
    pub(super) fn stalled(&self) -> Option<u64> {
        let (number, since) = self.first?;
        (since.elapsed() >= self.stall && self.is_quiet_for(self.stall)).then_some(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_limit_applies() {
        let v1 = "9:name=systemd:/\n4:memory:/a/b\n0::/\n";
        let hybrid = "5:cpu,memory:/\n0::/x\n";
        for (groups, files, expected) in [
            ("0::/\n", &[("/sys/fs/cgroup/memory.max", "max\n")][..], None),
            ("0::/\n", &[("/sys/fs/cgroup/memory.max", "1000\n")], Some(1000)),
            (
                "0::/a/b\n",
                &[("/sys/fs/cgroup/a/b/memory.max", "max\n"), ("/sys/fs/cgroup/a/memory.max", "7\n")],
                Some(7),
            ),
            (v1, &[("/sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", "5")], Some(5)),
            // In a container, where the path is one of the host.
            (v1, &[("/sys/fs/cgroup/memory/memory.limit_in_bytes", "6")], Some(6)),
            (
                hybrid,
                &[
                    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712"),
                    ("/sys/fs/cgroup/x/memory.max", "8"),
                ],
                Some(8),
            ),
            ("", &[], None),
            ("nonsense", &[], None),
        ] {
            let read = |path: &Path| {
                let (_, text) = files.iter().find(|(name, _)| Path::new(name) == path)?;
                Some((*text).to_owned())
            };
            assert_eq!(group_limit_bytes(groups, read), expected, "{groups}");
        }
        assert_eq!(mem_total_bytes("MemFree: 1 kB\nMemTotal:       2048 kB\n"), Some(2 << 20));
        assert!(memory_mb() > 0);
    }

    #[test]
    fn waiting_processes_get_what_runs_leave() {
        let budget = MemoryBudget::default();
        assert_eq!(budget.left_mb(0), 0);
        for (reserved, own, left) in [(0, 0, 100), (60, 0, 40), (60, 50, 90), (60, 70, 100), (130, 0, 0)] {
            budget.set(100, reserved);
            assert_eq!(budget.left_mb(own), left, "{reserved} {own}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_job_stalls_only_while_nothing_starts() {
        let second = Duration::from_secs(1);
        let mut line = AdmissionQueue::new(5 * second, 10 * second);
        line.set_first(Some(7));
        for at in 0..20 {
            // Others pass it until its passing time is over.
            let passes = line.may_pass(7) && at % 3 == 0;
            assert_eq!(passes, at % 3 == 0 && at < 10, "{at} s");
            assert_eq!(line.stalled(), (at >= 14).then_some(7), "{at} s");
            if passes {
                line.started();
            }
            line.set_first(Some(7));
            tokio::time::advance(second).await;
        }
        line.started();
        line.set_first(Some(8));
        assert!(line.may_pass(8), "its own time starts");
        tokio::time::advance(4 * second).await;
        assert_eq!(line.stalled(), None);
        tokio::time::advance(second).await;
        assert_eq!(line.stalled(), Some(8));
        line.set_first(None);
        assert_eq!(line.stalled(), None);
    }
}
