//! What runs leave behind: processes, mounts, control groups and files.

use super::wait::{SOON, eventually};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Depth below `/sys/fs/cgroup` down to which groups are looked for: controller, and the group of a service
/// in a session in a slice.
const GROUPS_DEPTH: usize = 6;

/// The ids of the processes of this machine that have `mark` among their arguments or in the environment that
/// they were started with.
pub fn processes_with(mark: &str) -> Vec<i32> {
    let own = std::process::id().to_string();
    let entries = fs::read_dir("/proc").expect("Linux").flatten();
    let ids = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let is_marked = |id: &String| {
        ["cmdline", "environ"].iter().any(|file| {
            let bytes = fs::read(Path::new("/proc").join(id).join(file)).unwrap_or_default();
            bytes.windows(mark.len()).any(|window| window == mark.as_bytes())
        })
    };
    let marked = ids.filter(|id| *id != own && id.bytes().all(|byte| byte.is_ascii_digit()));
    marked.filter(is_marked).filter_map(|id| id.parse().ok()).collect()
}

/// Waits until no process has this mark.
pub async fn wait_until_gone(mark: &str) {
    eventually(&format!("the end of all processes with {mark}"), SOON, || async {
        let left = processes_with(mark);
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    })
    .await;
}

/// The children of a process.
pub fn children(pid: i32) -> Vec<i32> {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let lists = threads.map(|thread| fs::read_to_string(thread.path().join("children")).unwrap_or_default());
    let lists: Vec<String> = lists.collect();
    lists.iter().flat_map(|list| list.split_whitespace()).filter_map(|id| id.parse().ok()).collect()
}

/// The control groups of the runs of a worker, or of `dev`: `infra-run.<PID namespace>.<pid>.…`.
pub fn groups_of(worker: i32) -> Vec<PathBuf> {
    let namespace = fs::metadata("/proc/self/ns/pid").expect("Linux").ino();
    let mut found = Vec::new();
    find_groups(Path::new("/sys/fs/cgroup"), &format!("infra-run.{namespace}.{worker}."), 0, &mut found);
    found
}

fn find_groups(dir: &Path, prefix: &str, depth: usize, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        // Not for links: `cpu` is one to `cpu,cpuacct`.
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            found.push(entry.path());
        } else if depth < GROUPS_DEPTH {
            find_groups(&entry.path(), prefix, depth + 1, found);
        }
    }
}

/// The mounts of this machine that name the directory.
pub fn mounts_in(dir: &Path) -> Vec<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("Linux");
    let dir = dir.to_str().expect("the path is UTF-8");
    mounts.lines().filter(|line| line.contains(dir)).map(str::to_owned).collect()
}

/// What a worker has of its runs. All are zero if it keeps no processes and runs nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leftovers {
    pub children: usize,
    pub groups: usize,
    pub mounts: usize,
    /// Directories of runs.
    pub slots: usize,
}

impl Leftovers {
    /// `worker`: the process, of `worker` or of `dev`. `runs_dir`: the directory of its runs.
    pub fn of(worker: i32, runs_dir: &Path) -> Self {
        Self {
            children: children(worker).len(),
            groups: groups_of(worker).len(),
            mounts: mounts_in(runs_dir).len(),
            slots: fs::read_dir(runs_dir).into_iter().flatten().count(),
        }
    }

    /// Waits until a worker that keeps no processes has none.
    pub async fn wait_for_none(worker: i32, runs_dir: &Path) {
        eventually("a worker without leftovers", SOON, || async {
            let left = Self::of(worker, runs_dir);
            if left == Self::default() { Ok(()) } else { Err(format!("{left:?}")) }
        })
        .await;
    }

    /// Waits until nothing is left of a worker that has ended.
    pub async fn wait_for_none_after(worker: i32, runs_dir: &Path) {
        eventually("nothing of an ended worker", SOON, || async {
            let left = (groups_of(worker), mounts_in(runs_dir));
            if left.0.is_empty() && left.1.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
        })
        .await;
    }
}
