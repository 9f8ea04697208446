//! What the processes of a run use, all together, as `/proc` says.
//!
//! Memory is what is resident: address space is not memory, and a thread's stack takes 8 MiB of it.

use nix::unistd::Pid;
use std::fs;

/// Most processes and threads of a run; it is stopped when it has more. It also bounds what a look costs.
pub(super) const TASKS_MAX: usize = 4_096;

/// What a run uses at a moment.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Usage {
    /// Processes and threads, up to one more than there may be.
    pub(super) tasks: usize,
    /// Resident memory. Pages that processes share count once if it matters: see [`measure`].
    pub(super) memory_bytes: u64,
    /// The most that one of the processes ever held.
    pub(super) peak_bytes: u64,
    /// CPU time of those that live and those they waited for, in clock ticks.
    pub(super) cpu_ticks: u64,
}

/// Measures all descendants of `root`, without itself. Blocks for some 50 µs a process.
///
/// The sum of the resident memory counts pages twice that processes share after a fork. Only if it is more
/// than `memory_max_bytes` each process's proportional share (PSS) is asked for, which takes the kernel about
/// a millisecond.
pub(super) fn measure(root: Pid, memory_max_bytes: u64) -> Usage {
    let mut usage = Usage::default();
    let mut processes = Vec::new();
    let mut unseen = children(root.as_raw(), &mut 0);
    while let Some(pid) = unseen.pop() {
        if usage.tasks > TASKS_MAX {
            break;
        }
        unseen.extend(children(pid, &mut usage.tasks));
        // It may have ended by now.
        let Ok(status) = fs::read_to_string(format!("/proc/{pid}/status")) else { continue };
        let resident = kib(&status, "VmRSS:").unwrap_or(0);
        usage.memory_bytes += resident;
        usage.peak_bytes = usage.peak_bytes.max(kib(&status, "VmHWM:").unwrap_or(0));
        usage.cpu_ticks += cpu_ticks(pid).unwrap_or(0);
        processes.push((pid, resident));
    }
    if usage.memory_bytes > memory_max_bytes && processes.len() > 1 {
        usage.memory_bytes = processes.iter().map(|(pid, resident)| share(*pid).unwrap_or(*resident)).sum();
    }
    usage.peak_bytes = usage.peak_bytes.max(usage.memory_bytes);
    usage
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

fn share(pid: i32) -> Option<u64> {
    kib(&fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?, "Pss:")
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
    kib(&fs::read_to_string(format!("/proc/{pid}/status")).ok()?, "VmHWM:")
}
