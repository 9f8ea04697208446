//! What the processes of a run use, all together, as `/proc` says.
//!
//! Memory is what is resident and backed by no file (anonymous pages and shared memory). Address space is not
//! memory: a thread's stack takes 8 MiB of it. Pages of files are not the run's: the kernel can drop them at
//! any time, and an interpreter's program is most of them (34 of the 40 MiB of Node.js).

use nix::unistd::Pid;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// Most processes and threads of a run; it is stopped when it has more. It also bounds what a look costs.
pub(super) const TASKS_MAX: usize = 4_096;

/// What a run uses at a moment. A page that processes share counts once a process.
#[derive(Clone, Debug, Default)]
pub(super) struct Usage {
    /// Processes and threads, up to one more than there may be.
    pub(super) tasks: usize,
    /// The processes that hold memory, sorted.
    pub(super) pids: Vec<i32>,
    /// The sum over all processes, in bytes.
    pub(super) memory_bytes: u64,
    /// Of the process that has the most: all together have at least as much.
    pub(super) largest_bytes: u64,
    /// The sum of resident memory over all processes, with the pages of files, in bytes.
    pub(super) resident_bytes: u64,
    /// The most resident memory that one of the processes ever held, in bytes.
    pub(super) peak_bytes: u64,
    /// CPU time of those that live and those they waited for, in clock ticks.
    pub(super) cpu_ticks: u64,
}

/// The proportional shares (PSS) of processes: a page that they share counts once.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Shares {
    pub(super) memory_bytes: u64,
    /// With the pages of files.
    pub(super) resident_bytes: u64,
    /// How long it took to ask for them.
    pub(super) took: Duration,
}

/// Whether the kernel lists the children of a process (CONFIG_PROC_CHILDREN) in this `/proc`. Without that
/// nothing is measured.
pub(super) fn lists_children(proc: &Path) -> bool {
    proc.join("thread-self/children").exists()
}

/// Measures all descendants of `root`, without itself. Blocks for some 50 µs a process.
pub(super) fn measure(root: Pid) -> Usage {
    let mut usage = Usage::default();
    let mut unseen = children(root.as_raw(), &mut 0);
    while let Some(pid) = unseen.pop() {
        if usage.tasks > TASKS_MAX {
            break;
        }
        unseen.extend(children(pid, &mut usage.tasks));
        // It may have ended by now.
        let Some(status) = status(pid) else { continue };
        let memory = memory_bytes(&status);
        usage.memory_bytes += memory;
        usage.largest_bytes = usage.largest_bytes.max(memory);
        usage.peak_bytes = usage.peak_bytes.max(kib(&status, "VmHWM:").unwrap_or(0));
        usage.cpu_ticks += cpu_ticks(pid).unwrap_or(0);
        if let Some(resident) = kib(&status, "VmRSS:") {
            usage.resident_bytes += resident;
            usage.pids.push(pid);
        }
    }
    usage.pids.sort_unstable();
    usage
}

/// Asks for the shares of these processes, for which the kernel visits each of their pages: about a
/// millisecond a process.
///
/// The shares of several processes are no snapshot. The share of one grows when another one exits, so the sum
/// over those asked before and after an exit would be too large. Hence those that are gone in the end count
/// nothing: then the sum is too small at most, as far as exits and forks are concerned.
pub(super) fn shares(pids: &[i32]) -> Shares {
    let began = Instant::now();
    let asked: Vec<_> = pids.iter().filter_map(|pid| Some((*pid, share(*pid)?))).collect();
    let is_there = |pid| status(pid).is_some_and(|status| kib(&status, "VmRSS:").is_some());
    let (mut memory_bytes, mut resident_bytes) = (0, 0);
    for (_, (memory, resident)) in asked.into_iter().filter(|(pid, _)| is_there(*pid)) {
        memory_bytes += memory;
        resident_bytes += resident;
    }
    Shares { memory_bytes, resident_bytes, took: began.elapsed() }
}

/// The children of all threads of a process; adds the number of its threads to `tasks`.
fn children(pid: i32, tasks: &mut usize) -> Vec<i32> {
    let mut found = Vec::new();
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return found };
    for thread in threads.flatten() {
        *tasks += 1;
        if *tasks > TASKS_MAX {
            break;
        }
        let list = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        found.extend(list.split_ascii_whitespace().filter_map(|pid| pid.parse::<i32>().ok()));
    }
    found
}

fn status(pid: i32) -> Option<String> {
    fs::read_to_string(format!("/proc/{pid}/status")).ok()
}

fn memory_bytes(status: &str) -> u64 {
    kib(status, "RssAnon:").unwrap_or(0) + kib(status, "RssShmem:").unwrap_or(0)
}

/// The memory and the resident memory of a process, by its shares.
fn share(pid: i32) -> Option<(u64, u64)> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let resident = kib(&rollup, "Pss:")?;
    // Linux before 5.4 gives the sum only.
    let memory = match (kib(&rollup, "Pss_Anon:"), kib(&rollup, "Pss_Shmem:")) {
        (Some(anonymous), Some(shared)) => anonymous + shared,
        _ => resident,
    };
    Some((memory, resident))
}

/// The value in bytes of a line such as `VmRSS:  1234 kB`.
fn kib(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// `utime`, `stime`, `cutime` and `cstime` (proc_pid_stat(5)). The name before them may hold anything.
fn cpu_ticks(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields = stat.rsplit_once(") ")?.1.split(' ').skip(11).take(4);
    Some(fields.filter_map(|field| field.parse::<u64>().ok()).sum())
}

/// The most memory a process has held so far, in bytes.
pub(super) fn peak_memory_bytes(pid: Pid) -> Option<u64> {
    kib(&status(pid.as_raw())?, "VmHWM:")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_noticed_where_children_are_not_listed() {
        assert!(lists_children(Path::new("/proc")));
        assert!(!lists_children(Path::new("/proc/sys")));
    }

    #[test]
    fn a_process_that_is_gone_has_no_share() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let (us, pid) = (std::process::id().cast_signed(), child.id().cast_signed());
        assert!(shares(&[us]).memory_bytes > 0);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!((shares(&[pid]).memory_bytes, shares(&[pid]).resident_bytes), (0, 0));
    }
}
