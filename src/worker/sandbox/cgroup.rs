//! A control group for each run: bounds its memory and processes, shares the CPU between runs, and measures.

use super::cgroup_tree::CgroupTree;
use super::view::TASKS_MAX;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use parking_lot::Mutex;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// Memory of a group beyond that of its function, in MiB: the processes of the sandbox, and what the kernel
/// counts for page tables and sockets.
const OVERHEAD_MB: u64 = 16;
/// Processes of the sandbox itself, beside those of the program.
const OWN_TASKS: u64 = 8;
/// Beginning of the names of all groups of runs.
const PREFIX: &str = "infra-run";
/// Groups of ended runs that could not be removed yet. A further one is left to the next start.
const LEFTOVERS_MAX: usize = 1_024;
/// Leftovers that are tried again with each new group.
const RETRIES_EACH: usize = 16;
/// Number of the next group of this process.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// Creates and removes the groups of runs.
#[derive(Debug)]
pub(super) struct Cgroups {
    tree: CgroupTree,
    creator: Creator,
    leftovers: Mutex<Vec<PathBuf>>,
}

impl Cgroups {
    /// Also removes what workers that have died have left behind.
    pub(super) fn new(tree: CgroupTree) -> io::Result<Self> {
        let creator = Creator::this_process()?;
        for parent in tree.parents() {
            creator.sweep(parent);
        }
        Ok(Self { tree, creator, leftovers: Mutex::default() })
    }

    pub(super) fn is_v2(&self) -> bool {
        self.tree.is_v2
    }

    /// A new group with limits, without processes.
    pub(super) fn create(self: &Arc<Self>, memory_mb: u64) -> io::Result<RunCgroup> {
        self.retry_leftovers();
        let name = self.creator.name(NEXT.fetch_add(1, Ordering::Relaxed));
        let group = RunCgroup { cgroups: Arc::clone(self), name, files: Default::default() };
        for parent in self.tree.parents() {
            fs::create_dir(parent.join(&group.name))?;
        }
        group.limit(memory_mb)?;
        if let Some(parent) = &self.tree.pids {
            let tasks = TASKS_MAX + OWN_TASKS;
            fs::write(parent.join(&group.name).join("pids.max"), tasks.to_string())?;
        }
        if self.tree.is_v2 {
            // If one process of a run has to be killed for its memory, so have all. From Linux 4.19.
            let _ = fs::write(group.memory_file("memory.oom.group"), "1");
        }
        Ok(group)
    }

    fn remove_or_keep(&self, dir: PathBuf) {
        if let Err(e) = remove(&dir) {
            let mut leftovers = self.leftovers.lock();
            if leftovers.len() < LEFTOVERS_MAX {
                leftovers.push(dir);
            } else {
                drop(leftovers);
                tracing::warn!(
                    group = %dir.display(), error = %e,
                    "Control group of a run not removed; the next start of the worker does it"
                );
            }
        }
    }

    fn retry_leftovers(&self) {
        let due: Vec<PathBuf> = {
            let mut leftovers = self.leftovers.lock();
            let count = leftovers.len().min(RETRIES_EACH);
            leftovers.drain(..count).collect()
        };
        due.into_iter().for_each(|dir| self.remove_or_keep(dir));
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        for dir in self.leftovers.get_mut().drain(..) {
            let _ = remove(&dir);
        }
    }
}

/// The control group of one run. Dropping it kills the processes that are left in it.
#[derive(Debug)]
pub(super) struct RunCgroup {
    cgroups: Arc<Cgroups>,
    name: String,
    /// Files that were read, by [`Measure`].
    files: [OnceLock<File>; 3],
}

/// What is read of a group for each run of a handler.
#[derive(Clone, Copy)]
enum Measure {
    OomKills,
    Processes,
    CpuTime,
}

impl RunCgroup {
    /// For each hierarchy the file to which a process with one thread writes `0` to join. The processes that
    /// it starts join with it.
    ///
    /// With version 1 that is not `cgroup.procs`, for which the kernel waits 10 ms until no process is
    /// starting a thread.
    pub(super) fn entrances(&self) -> io::Result<Vec<File>> {
        let entrance = if self.cgroups.tree.is_v2 { "cgroup.procs" } else { "tasks" };
        let open = |dir: PathBuf| OpenOptions::new().write(true).open(dir.join(entrance));
        self.directories().map(open).collect()
    }

    /// Sets the memory of the function, in MiB. If the run has more and the kernel cannot free it, version 2
    /// kills it, and version 1 fails.
    pub(super) fn limit(&self, memory_mb: u64) -> io::Result<()> {
        let bytes = memory_mb.saturating_add(OVERHEAD_MB).saturating_mul(1 << 20).to_string();
        if self.cgroups.tree.is_v2 {
            fs::write(self.memory_file("memory.max"), &bytes)?;
            // Without swap there is no such file.
            let _ = fs::write(self.memory_file("memory.swap.max"), "0");
            return Ok(());
        }
        // Memory is at most memory with swap. So that comes first if the limit rises, and last if it falls.
        let (limit, with_swap) = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes");
        if fs::write(self.memory_file(limit), &bytes).is_err() {
            fs::write(self.memory_file(with_swap), &bytes)?;
            fs::write(self.memory_file(limit), &bytes)?;
        }
        let _ = fs::write(self.memory_file(with_swap), &bytes);
        Ok(())
    }

    /// Processes that the kernel killed because the run had too much memory. `None`: the group is gone.
    pub(super) fn oom_kills(&self) -> Option<u64> {
        let events = if self.cgroups.tree.is_v2 { "memory.events" } else { "memory.oom_control" };
        let events = self.read(Measure::OomKills, || Some(self.memory_file(events)))?;
        Some(field(&events, "oom_kill").unwrap_or(0))
    }

    /// The number of processes in the group. `None`: the group is gone.
    pub(super) fn processes(&self) -> Option<usize> {
        let path = || self.memory_file("cgroup.procs");
        let processes = if self.cgroups.tree.is_v2 {
            self.read(Measure::Processes, || Some(path()))?
        } else {
            // Version 1 makes the list when the file is opened.
            fs::read_to_string(path()).ok()?
        };
        Some(processes.lines().count())
    }

    /// CPU time of the processes of the group, also of those that have ended.
    pub(super) fn cpu_time(&self) -> Option<Duration> {
        let is_v2 = self.cgroups.tree.is_v2;
        let file = if is_v2 { "cpu.stat" } else { "cpuacct.usage" };
        let path = || Some(self.cgroups.tree.cpu_time.as_ref()?.join(&self.name).join(file));
        let text = self.read(Measure::CpuTime, path)?;
        if is_v2 {
            field(&text, "usage_usec").map(Duration::from_micros)
        } else {
            text.trim().parse().ok().map(Duration::from_nanos)
        }
    }

    /// The contents of a file, which stays open: to find it takes longer than to read it.
    fn read(&self, measure: Measure, path: impl FnOnce() -> Option<PathBuf>) -> Option<String> {
        let file = &self.files[measure as usize];
        let file = match file.get() {
            Some(file) => file,
            None => {
                let opened = File::open(path()?).ok()?;
                file.get_or_init(|| opened)
            }
        };
        let mut buffer = [0; 512];
        let read = file.read_at(&mut buffer, 0).ok()?;
        let text = String::from_utf8_lossy(&buffer[..read]);
        if read < buffer.len() {
            return Some(text.into_owned());
        }
        // A long list.
        let mut text = text.into_owned();
        loop {
            let read = file.read_at(&mut buffer, text.len() as u64).ok().filter(|read| *read > 0);
            let Some(read) = read else { return Some(text) };
            text.push_str(&String::from_utf8_lossy(&buffer[..read]));
        }
    }

    fn memory_file(&self, file: &str) -> PathBuf {
        self.cgroups.tree.memory.join(&self.name).join(file)
    }

    fn directories(&self) -> impl Iterator<Item = PathBuf> {
        self.cgroups.tree.parents().into_iter().map(|parent| parent.join(&self.name))
    }
}

impl Drop for RunCgroup {
    fn drop(&mut self) {
        for dir in self.directories() {
            self.cgroups.remove_or_keep(dir);
        }
    }
}

/// Removes a group. If processes are left in it, kills them, and fails if they have not ended at once.
fn remove(dir: &Path) -> io::Result<()> {
    match fs::remove_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(_) => kill_all(dir),
        Ok(()) => return Ok(()),
    }
    fs::remove_dir(dir)
}

fn kill_all(dir: &Path) {
    // Version 2 from Linux 5.14. It also kills what is starting right now.
    if fs::write(dir.join("cgroup.kill"), "1").is_ok() {
        return;
    }
    let processes = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    // `0` is a process that this one cannot see, and the signal would go to the own process group.
    for pid in processes.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|pid| *pid > 0) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// The value of a line `<name> <value>`.
fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

#[cfg(test)]
fn read_number(file: &Path) -> Option<u64> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

/// The process that has created a group. Its start time tells it from a later process with the same id.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Creator {
    /// Of its PID namespace. In another one the same id means another process.
    namespace: u64,
    pid: u32,
    /// In clock ticks since the boot.
    started: u64,
}

impl Creator {
    fn this_process() -> io::Result<Self> {
        use std::os::unix::fs::MetadataExt;
        let pid = std::process::id();
        let namespace = fs::metadata("/proc/self/ns/pid")?.ino();
        let started = started(pid).ok_or_else(|| io::Error::other("/proc has no start times"))?;
        Ok(Self { namespace, pid, started })
    }

    /// The name of its group with this number.
    fn name(&self, serial: u64) -> String {
        format!("{PREFIX}.{}.{}.{}.{serial}", self.namespace, self.pid, self.started)
    }

    fn of(name: &str) -> Option<Self> {
        let mut fields = name.strip_prefix(PREFIX)?.strip_prefix('.')?.split('.');
        let namespace = fields.next()?.parse().ok()?;
        let pid = fields.next()?.parse().ok()?;
        let started = fields.next()?.parse().ok()?;
        Some(Self { namespace, pid, started })
    }

    /// Removes the groups of creators that have ended. Others may belong to a worker that runs beside this
    /// one.
    fn sweep(&self, parent: &Path) {
        for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
            let creator = entry.file_name().to_str().and_then(Self::of);
            let has_ended = creator.is_some_and(|creator| {
                creator.namespace == self.namespace && started(creator.pid) != Some(creator.started)
            });
            if has_ended && let Err(e) = remove(&entry.path()) {
                tracing::warn!(
                    group = %entry.path().display(), error = %e,
                    "Control group of an ended worker not removed; the next start tries again"
                );
            }
        }
    }
}

/// When a process started, in clock ticks since the boot: the field `starttime` of proc_pid_stat(5). The name
/// of the program before it may contain any byte.
fn started(pid: u32) -> Option<u64> {
    let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let stat = String::from_utf8_lossy(&stat);
    stat.rsplit_once(") ")?.1.split(' ').nth(19)?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    /// A worker with groups, if this machine lets tests create them.
    fn cgroups() -> Option<Arc<Cgroups>> {
        let tree = CgroupTree::find().inspect_err(|why| eprintln!("not tested: {why}")).ok()?;
        Some(Arc::new(Cgroups::new(tree).unwrap()))
    }

    fn sleeping_in(group: &RunCgroup) -> Child {
        let child = Command::new("sleep").arg("600").spawn().unwrap();
        for dir in group.directories() {
            fs::write(dir.join("cgroup.procs"), child.id().to_string()).unwrap();
        }
        child
    }

    #[test]
    fn a_name_tells_its_creator() {
        let us = Creator::this_process().unwrap();
        assert_eq!(Creator::of(&us.name(7)), Some(us));
        for name in ["infra-run", "infra-run.1.2", "infra-run.1.x.3.4", "docker", "infra-worker", ""] {
            assert_eq!(Creator::of(name), None, "{name}");
        }
    }

    #[test]
    fn only_groups_of_ended_workers_are_swept() {
        let us = Creator::this_process().unwrap();
        let parent = tempfile::tempdir().unwrap();
        let earlier = Creator { started: us.started - 1, ..us.clone() };
        let elsewhere = Creator { namespace: us.namespace + 1, ..earlier.clone() };
        for name in [us.name(0), earlier.name(0), earlier.name(1), elsewhere.name(0), "other".into()] {
            fs::create_dir(parent.path().join(name)).unwrap();
        }
        us.sweep(parent.path());
        let left = fs::read_dir(parent.path()).unwrap().map(|entry| entry.unwrap().file_name());
        let mut left: Vec<_> = left.map(|name| name.into_string().unwrap()).collect();
        left.sort();
        let mut expected = [us.name(0), elsewhere.name(0), "other".into()];
        expected.sort();
        assert_eq!(left, expected);
    }

    #[test]
    fn a_group_has_its_limits_and_measures() {
        let Some(cgroups) = cgroups() else { return };
        let group = cgroups.create(64).unwrap();
        let file = if cgroups.is_v2() { "memory.max" } else { "memory.limit_in_bytes" };
        for memory_mb in [64, 32, 128, 16] {
            group.limit(memory_mb).unwrap();
            let limit = read_number(&group.memory_file(file)).unwrap();
            assert_eq!(limit, (memory_mb + OVERHEAD_MB) << 20);
        }
        let mut child = sleeping_in(&group);
        assert_eq!(group.oom_kills(), Some(0));
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_dropped_group_kills_its_processes_and_is_removed() {
        let Some(cgroups) = cgroups() else { return };
        let group = cgroups.create(64).unwrap();
        let dirs: Vec<_> = group.directories().collect();
        let mut child = sleeping_in(&group);
        drop(group);
        assert!(!child.wait().unwrap().success(), "it was killed");
        // What could not be removed while the process ended is removed before the next group is created.
        drop(cgroups.create(64).unwrap());
        assert!(dirs.iter().all(|dir| !dir.exists()), "{dirs:?}");
    }

    #[test]
    fn fields_are_read() {
        let events = "low 0\nhigh 0\noom 3\noom_kill 2\noom_group_kill 1\n";
        for (name, expected) in [("oom_kill", Some(2)), ("oom", Some(3)), ("max", None), ("oom_", None)] {
            assert_eq!(field(events, name), expected, "{name}");
        }
    }
}
