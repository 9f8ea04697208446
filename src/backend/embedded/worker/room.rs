//! How much runs at once: as much as the memory of the machine allows, however few its cores are.
//!
//! A function that calls a function waits for it, and takes no CPU meanwhile. Were runs bounded by the cores,
//! so many callers would wait for ever for a run that cannot begin. The memory that runs are promised is
//! bounded too, so the same would happen when callers hold all of it. But most use far less than they are
//! promised: a job that has waited for a while starts beyond the promises if the memory that is really used
//! leaves room. To wait until all runs idle was rejected: a caller that polls never does.
//!
//! A job that waits for memory lets later ones that fit pass it, for a limited time, so that it does not
//! starve. [`Line`] keeps both times.
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
/// How long a job waits for promised memory while nothing starts; then it may start beyond that. It is also
/// the time in which what started before shows how much it uses.
pub(super) const STALL: Duration = Duration::from_secs(5);
/// How long a job that waits for memory lets others pass.
pub(super) const PASSING_MAX: Duration = Duration::from_secs(10);

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

/// The line of jobs that wait for memory, by its first.
pub(super) struct Line {
    stall: Duration,
    passing_max: Duration,
    /// Number of the first job, and since when it is the first.
    first: Option<(i64, Instant)>,
    /// When a run was last started.
    started_at: Option<Instant>,
}

impl Line {
    pub(super) fn new(stall: Duration, passing_max: Duration) -> Self {
        Self { stall, passing_max, first: None, started_at: None }
    }

    /// The job with number `seq` is the first that waits, or none does.
    pub(super) fn set_first(&mut self, seq: Option<i64>) {
        if self.first.map(|(first, _)| first) != seq {
            self.first = seq.map(|seq| (seq, Instant::now()));
        }
    }

    pub(super) fn started(&mut self) {
        self.started_at = Some(Instant::now());
    }

    /// Whether nothing was started for `time`.
    pub(super) fn is_quiet_for(&self, time: Duration) -> bool {
        self.started_at.is_none_or(|at| at.elapsed() >= time)
    }

    /// Whether others may pass the job with number `seq`.
    pub(super) fn may_pass(&self, seq: i64) -> bool {
        self.first.is_none_or(|(first, since)| first != seq || since.elapsed() < self.passing_max)
    }

    /// The first job, if it has waited long enough to start beyond the promised memory.
    pub(super) fn stalled(&self) -> Option<i64> {
        let (seq, since) = self.first?;
        (since.elapsed() >= self.stall && self.is_quiet_for(self.stall)).then_some(seq)
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
    async fn the_first_stalls_only_while_nothing_starts() {
        let second = Duration::from_secs(1);
        let mut line = Line::new(5 * second, 10 * second);
        line.set_first(Some(7));
        for at in 0..20 {
            // Others pass it until it lets none pass any more.
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
        assert!(line.may_pass(8), "its own time begins");
        tokio::time::advance(4 * second).await;
        assert_eq!(line.stalled(), None);
        tokio::time::advance(second).await;
        assert_eq!(line.stalled(), Some(8));
        line.set_first(None);
        assert_eq!(line.stalled(), None);
    }
}
