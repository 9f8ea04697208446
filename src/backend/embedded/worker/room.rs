//! How much runs at once: as much as the memory of the machine allows, however few its cores are.
//!
//! A function that calls a function waits for it, and takes no CPU meanwhile. Were runs bounded by the cores,
//! so many callers would wait for ever for a run that cannot begin. Memory is bounded too, so the same can
//! still happen when callers hold all of it: then all runs idle while a job waits, which [`Stall`] notices.
//!
//! Runs that compute do share the cores, with the gateway among others. While there are [`BUSY_A_CORE_MAX`]
//! for each core others begin at a slow pace: they are not held up for good, since those that compute may
//! wait for them so.

use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::Instant;

/// Most runs at once, whatever the memory. Each has a blocking thread of the runtime, which has 512.
pub(super) const RUNS_MAX: usize = 256;
/// Runs a core that compute at once: enough to use it all, and few enough for the gateway to have its part.
pub(super) const BUSY_A_CORE_MAX: usize = 2;
/// The part of the memory that runs may be promised; the rest is the gateway's, and the system's.
const PART: (u64, u64) = (3, 4);
/// CPU time below which runs count as idle over the time of a stall, in clock ticks (of 10 ms).
const IDLE_TICKS_MAX: u64 = 20;

/// The memory that runs may be promised together, in MiB: three quarters of the machine's, or of the control
/// group's if that has less.
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

/// The least limit of our control group and those above it, of version 2 (`0::/path`) or 1
/// (`4:memory:/path`). In a container the path may be one of the host, of which only the root is seen.
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

/// Tells a job that waits for memory while others work from one that waits for those that wait for it.
#[derive(Default)]
pub(super) struct Stall {
    /// Since when the runs idle, and the CPU time that they had used then.
    idle: Option<(Instant, u64)>,
}

impl Stall {
    /// No job waits, or a run has begun or ended.
    pub(super) fn clear(&mut self) {
        self.idle = None;
    }

    /// A job waits for memory, and the runs have used `cpu_ticks` in all: whether they have idled for
    /// `longest`.
    pub(super) fn is_over(&mut self, cpu_ticks: u64, longest: Duration) -> bool {
        match self.idle {
            Some((since, before)) if cpu_ticks.saturating_sub(before) <= IDLE_TICKS_MAX => {
                since.elapsed() >= longest
            }
            _ => {
                self.idle = Some((Instant::now(), cpu_ticks));
                false
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_limit_counts() {
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
            // In a container: the path is the host's.
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

    #[tokio::test(start_paused = true)]
    async fn only_runs_that_idle_stall() {
        let longest = Duration::from_secs(20);
        let mut stall = Stall::default();
        let mut looks = Vec::new();
        // (seconds later, CPU time until then)
        for (seconds, ticks) in
            [(0, 100), (19, 100), (0, 100 + IDLE_TICKS_MAX), (1, 110), (1, 300), (19, 301)]
        {
            tokio::time::advance(Duration::from_secs(seconds)).await;
            looks.push(stall.is_over(ticks, longest));
        }
        assert_eq!(looks, [false, false, false, true, false, false]);
        stall.clear();
        tokio::time::advance(longest).await;
        assert!(!stall.is_over(301, longest), "it begins anew");
        tokio::time::advance(longest).await;
        assert!(stall.is_over(301, longest));
    }
}
