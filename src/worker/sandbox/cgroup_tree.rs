//! Where this process may create control groups.
//!
//! The crate `cgroups-rs` was rejected. It brings D-Bus (`zbus`) and a second `nix` for what are writes to a
//! dozen files here. It neither finds the group of this process in a container nor makes room for the groups
//! of children.
//!
//! * Version 2: in the group of this process, if it was delegated to it: it can be written, and this process
//!   is alone in it. A group with processes cannot give controllers to its children, so this process moves to
//!   the child [`OWN_GROUP`]. With systemd that is `Delegate=yes`.
//! * Version 1: for each controller in the group of this process.

use nix::unistd::getpid;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The group that this process moves to with version 2.
const OWN_GROUP: &str = "infra-worker";
/// The controllers without which version 2 is not used.
const NEEDED: [&str; 2] = ["memory", "pids"];

/// The version of the control groups that bound functions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CgroupKind {
    V2,
    V1,
    None,
}

impl CgroupKind {
    /// Its name in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::V2 => "v2",
            Self::V1 => "v1",
            Self::None => "none",
        }
    }
}

/// The groups in which the group of each run is created, by controller. The same directory may have several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CgroupTree {
    pub(super) is_v2: bool,
    pub(super) memory: PathBuf,
    pub(super) pids: Option<PathBuf>,
    pub(super) cpu: Option<PathBuf>,
    /// The controller that measures CPU time.
    pub(super) cpu_time: Option<PathBuf>,
}

impl CgroupTree {
    /// The error is a sentence that says what to do.
    pub(super) fn find() -> Result<Self, String> {
        let read = |file: &str| fs::read_to_string(file).map_err(|e| format!("{file} cannot be read: {e}"));
        let (groups, mounts) = (read("/proc/self/cgroup")?, read("/proc/self/mountinfo")?);
        let no_v2 = match directory(&groups, &mounts, None).map(|dir| Self::in_v2(&dir)) {
            Some(Ok(tree)) => return Ok(tree),
            Some(Err(why)) => why,
            None => "there are no control groups of version 2".to_owned(),
        };
        Self::in_v1(&groups, &mounts).map_err(|no_v1| {
            format!(
                "no control groups: {no_v2}; {no_v1}. Start the worker as a systemd service with \
                 Delegate=yes, or as root where /sys/fs/cgroup can be written"
            )
        })
    }

    /// All directories in which a run needs a group.
    pub(super) fn parents(&self) -> Vec<&Path> {
        let mut parents = vec![self.memory.as_path()];
        for parent in [&self.pids, &self.cpu, &self.cpu_time].into_iter().flatten() {
            if !parents.contains(&parent.as_path()) {
                parents.push(parent);
            }
        }
        parents
    }

    /// Prepares `own`, the group of this process.
    fn in_v2(own: &Path) -> Result<Self, String> {
        let read = |file: PathBuf| fs::read_to_string(file).unwrap_or_default();
        // After an earlier preparation by this process, or by the one that started it as its successor.
        let is_prepared = own.file_name().is_some_and(|name| name == OWN_GROUP);
        let dir = if is_prepared { own.parent().unwrap_or(own) } else { own };
        let available = read(dir.join("cgroup.controllers"));
        let has = |controller: &str| available.split_ascii_whitespace().any(|found| found == controller);
        if let Some(missing) = NEEDED.into_iter().find(|needed| !has(needed)) {
            return Err(format!("{} has no controller `{missing}` of version 2", dir.display()));
        }
        // The root of all groups may have processes and children. Only it has no type.
        let is_root = !dir.join("cgroup.type").exists();
        if !is_root && !is_prepared {
            let others = read(dir.join("cgroup.procs"));
            let us = getpid().to_string();
            if others.lines().any(|pid| pid != us) {
                return Err(format!("{} has other processes than this one", dir.display()));
            }
        }
        let enable = || -> io::Result<()> {
            if !is_root && !is_prepared {
                let own_group = dir.join(OWN_GROUP);
                match fs::create_dir(&own_group) {
                    Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
                    _ => fs::write(own_group.join("cgroup.procs"), "0")?,
                }
            }
            let control = dir.join("cgroup.subtree_control");
            fs::write(&control, "+memory +pids")?;
            // Without it, runs share the CPU by their threads.
            let _ = fs::write(&control, "+cpu");
            Ok(())
        };
        enable().map_err(|e| format!("{} was not delegated: {e}", dir.display()))?;
        let dir = || dir.to_owned();
        Ok(Self { is_v2: true, memory: dir(), pids: Some(dir()), cpu: Some(dir()), cpu_time: Some(dir()) })
    }

    fn in_v1(groups: &str, mounts: &str) -> Result<Self, String> {
        let usable = |controller: &str| {
            let dir = directory(groups, mounts, Some(controller))?;
            can_create_in(&dir).then_some(dir)
        };
        Ok(Self {
            is_v2: false,
            memory: usable("memory").ok_or("no group of version 1 for memory can be created")?,
            pids: usable("pids"),
            cpu: usable("cpu"),
            cpu_time: usable("cpuacct"),
        })
    }
}

fn can_create_in(dir: &Path) -> bool {
    let trial = dir.join(format!("infra-trial.{}", getpid()));
    let is_created = fs::create_dir(&trial).is_ok();
    is_created && fs::remove_dir(&trial).is_ok()
}

/// The directory of this process's group. `controller`: of version 1. `None`: version 2.
/// `groups`: the text of `/proc/self/cgroup`. `mounts`: that of `/proc/self/mountinfo`.
fn directory(groups: &str, mounts: &str, controller: Option<&str>) -> Option<PathBuf> {
    let has = |list: &str| match controller {
        Some(controller) => list.split(',').any(|found| found == controller),
        None => list.is_empty(),
    };
    // `<hierarchy>:<controllers>:<path>`
    let own = groups.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (list, path) = (fields.next()?, fields.next()?);
        has(list).then_some(path)
    })?;
    mounts.lines().find_map(|line| {
        // `<id> <parent> <device> <root> <point> <options> … - <type> <source> <options of the file system>`
        let (mount, system) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(3);
        let (root, point) = (mount.next()?, mount.next()?);
        let mut system = system.split(' ');
        let is_it = match (system.next()?, controller) {
            ("cgroup2", None) => true,
            ("cgroup", Some(controller)) => system.nth(1)?.split(',').any(|option| option == controller),
            _ => false,
        };
        // The mount shows the tree from `root` on.
        let below = Path::new(own).strip_prefix(root).ok().filter(|_| is_it)?;
        let point = Path::new(point);
        Some(if below.as_os_str().is_empty() { point.to_owned() } else { point.join(below) })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
        30 23 0:26 / /sys/fs/cgroup ro,nosuid shared:9 - tmpfs tmpfs ro,mode=755\n\
        31 30 0:27 / /sys/fs/cgroup/unified rw shared:10 - cgroup2 cgroup2 rw,nsdelegate\n\
        32 30 0:28 / /sys/fs/cgroup/cpu,cpuacct rw shared:11 - cgroup cgroup rw,cpu,cpuacct\n\
        33 30 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n";
    const CONTAINER: &str = "\
        901 900 0:29 /docker/f00 /sys/fs/cgroup/memory ro,nosuid - cgroup cgroup rw,memory\n\
        902 900 0:27 /docker/f00 /sys/fs/cgroup rw - cgroup2 cgroup rw\n";

    #[test]
    fn the_group_of_this_process_is_found() {
        let own = "9:cpu,cpuacct:/user\n4:memory:/a/b\n0::/system.slice/worker.service\n";
        let docker = "4:memory:/docker/f00\n0::/docker/f00/inner\n";
        let other = "4:memory:/docker/e11\n0::/../sibling\n";
        for (groups, mounts, controller, expected) in [
            (own, HYBRID, None, Some("/sys/fs/cgroup/unified/system.slice/worker.service")),
            (own, HYBRID, Some("memory"), Some("/sys/fs/cgroup/memory/a/b")),
            (own, HYBRID, Some("cpuacct"), Some("/sys/fs/cgroup/cpu,cpuacct/user")),
            (own, HYBRID, Some("pids"), None),
            ("0::/\n", HYBRID, None, Some("/sys/fs/cgroup/unified")),
            (docker, CONTAINER, Some("memory"), Some("/sys/fs/cgroup/memory")),
            (docker, CONTAINER, None, Some("/sys/fs/cgroup/inner")),
            (other, CONTAINER, Some("memory"), None),
            (other, CONTAINER, None, None),
            ("", HYBRID, None, None),
            (own, "", None, None),
            ("nonsense", "nonsense - nonsense", None, None),
        ] {
            let found = directory(groups, mounts, controller);
            assert_eq!(found.as_deref(), expected.map(Path::new), "{groups} {controller:?}");
        }
    }

    /// A directory that looks like a group of version 2.
    fn group_v2(controllers: &str, processes: &str) -> tempfile::TempDir {
        let group = tempfile::tempdir().unwrap();
        for (file, text) in [
            ("cgroup.type", "domain"),
            ("cgroup.controllers", controllers),
            ("cgroup.procs", processes),
            ("cgroup.subtree_control", ""),
        ] {
            fs::write(group.path().join(file), text).unwrap();
        }
        group
    }

    #[test]
    fn a_group_is_used_if_it_was_delegated_to_this_process_alone() {
        let us = getpid().to_string();
        for (controllers, processes, expected) in [
            ("cpu io memory pids", us.clone(), None),
            ("cpu io pids", us.clone(), Some("no controller `memory`")),
            ("memory", us.clone(), Some("no controller `pids`")),
            ("memory pids", format!("{us}\n1\n"), Some("other processes")),
        ] {
            let group = group_v2(controllers, &processes);
            match (CgroupTree::in_v2(group.path()), expected) {
                (Ok(tree), None) => {
                    assert_eq!(tree.parents(), [group.path()]);
                    let own = group.path().join(OWN_GROUP);
                    assert_eq!(fs::read_to_string(own.join("cgroup.procs")).unwrap(), "0");
                    // A successor of this process starts in the group that it has moved to.
                    assert_eq!(CgroupTree::in_v2(&own).unwrap(), tree);
                }
                (Err(why), Some(expected)) => assert!(why.contains(expected), "{why}"),
                (found, _) => panic!("{controllers}, {processes}: {found:?}"),
            }
        }
    }
}
