//! Measures the resource usage of all processes of a run, from `/proc`.
//!
//! Memory means resident pages that are not backed by a file: anonymous pages and shared memory. Address
//! space is not memory: the stack of a thread takes 8 MiB of it. Pages of files do not count. The kernel can
//! drop them at any time, and most of them are the program of the interpreter (34 of the 40 MiB of Node.js).

use super::sandbox;
use nix::unistd::Pid;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// Most processes and threads of a run, and those of its sandbox. A run with more is stopped, if the kernel
/// does not bound them before that. This also bounds the cost of a sample.
pub(super) const TASKS_MAX: usize = sandbox::TASKS_MAX as usize + 16;

/// The usage of a run in one sample. A page that processes share counts once for each of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Usage {
    /// Number of processes and threads. Counting stops above [`TASKS_MAX`].
    pub(super) tasks: usize,
    /// Processes that have memory, sorted.
    pub(super) pids: Vec<i32>,
    /// Memory, summed over all processes, in bytes.
    pub(super) memory_bytes: u64,
    /// Memory of the largest process, in bytes. The run has at least as much.
    pub(super) largest_bytes: u64,
    /// Resident memory with the pages of files, summed over all processes, in bytes.
    pub(super) resident_bytes: u64,
    /// Highest resident memory that one of the processes has ever had, in bytes.
    pub(super) peak_bytes: u64,
    /// CPU time of the processes and of the children that they have reaped, in clock ticks.
    pub(super) cpu_ticks: u64,
}

/// The proportional set sizes (PSS) of processes, summed. A page that they share counts once.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Shares {
    pub(super) memory_bytes: u64,
    /// Including the pages of files.
    pub(super) resident_bytes: u64,
    /// Duration of the reading.
    pub(super) took: Duration,
}

/// Whether the kernel lists the children of processes in this `/proc` (CONFIG_PROC_CHILDREN). If not, nothing
/// can be measured.
pub(super) fn lists_children(proc: &Path) -> bool {
    proc.join("thread-self/children").exists()
}

/// Measures all descendants of `root`, without `root` itself. The memory of the first `sandbox_levels`
/// generations does not count, because they are processes of the sandbox. Blocks for about 50 µs per process.
pub(super) fn measure(root: Pid, sandbox_levels: u32) -> Usage {
    let mut usage = Usage::default();
    let below =
        |pid, level, tasks: &mut usize| children(pid, tasks).into_iter().map(move |child| (child, level));
    let mut unseen: Vec<(i32, u32)> = below(root.as_raw(), 1, &mut 0).collect();
    while let Some((pid, level)) = unseen.pop() {
        if usage.tasks > TASKS_MAX {
            break;
        }
        unseen.extend(below(pid, level + 1, &mut usage.tasks));
        usage.cpu_ticks += cpu_ticks(pid).unwrap_or(0);
        if level <= sandbox_levels {
            continue;
        }
        // It may have ended meanwhile.
        let Some(status) = status(pid) else { continue };
        let memory = memory_bytes(&status);
        usage.memory_bytes += memory;
        usage.largest_bytes = usage.largest_bytes.max(memory);
        usage.peak_bytes = usage.peak_bytes.max(kib(&status, "VmHWM:").unwrap_or(0));
        if let Some(resident) = kib(&status, "VmRSS:") {
            usage.resident_bytes += resident;
            usage.pids.push(pid);
        }
    }
    usage.pids.sort_unstable();
    usage
}

/// Reads the shares of these processes. The kernel visits each of their pages for it, which takes about a
/// millisecond per process.
///
/// The shares of several processes are not a snapshot. When a process exits, the shares of others grow. So a
/// sum of shares that were read before and after the exit would be too high. Therefore, processes that have
/// exited by the end are not counted. Exits and forks can then only make the sum too low.
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

/// The children of all threads of a process. Adds the number of its threads to `tasks`.
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

/// The shares of a process, in bytes: memory, and resident memory.
fn share(pid: i32) -> Option<(u64, u64)> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let resident = kib(&rollup, "Pss:")?;
    // Linux before 5.4 reports the sum only.
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

/// Sum of `utime`, `stime`, `cutime` and `cstime` (proc_pid_stat(5)). The name before them may contain any
/// byte.
fn cpu_ticks(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields = stat.rsplit_once(") ")?.1.split(' ').skip(11).take(4);
    Some(fields.filter_map(|field| field.parse::<u64>().ok()).sum())
}

/// Highest resident memory of a process so far, in bytes.
pub(super) fn peak_memory_bytes(pid: Pid) -> Option<u64> {
    kib(&status(pid.as_raw())?, "VmHWM:")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::process::Stdio;

    #[test]
    fn a_kernel_without_lists_of_children_is_detected() {
        assert!(lists_children(Path::new("/proc")));
        assert!(!lists_children(Path::new("/proc/sys")));
    }

    #[test]
    fn processes_of_the_sandbox_have_no_memory() {
        let mut shell = std::process::Command::new("/bin/sh");
        shell
            .args(["-c", "sleep 600 & echo; read line; kill $!"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut shell = shell.spawn().unwrap();
        shell.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
        let root = Pid::from_raw(shell.id().cast_signed());
        let (all, others) = (measure(root, 0), measure(root, 1));
        drop(shell.stdin.take());
        shell.wait().unwrap();
        assert!(all.tasks == 1 && all.pids.len() == 1 && all.memory_bytes > 0, "{all:?}");
        assert!(others.tasks == 1 && others.pids.is_empty() && others.memory_bytes == 0, "{others:?}");
    }

    #[test]
    fn an_ended_process_has_no_share() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let (us, pid) = (std::process::id().cast_signed(), child.id().cast_signed());
        assert!(shares(&[us]).memory_bytes > 0);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!((shares(&[pid]).memory_bytes, shares(&[pid]).resident_bytes), (0, 0));
    }
}
