//! The node's directory on the local disk: one locked subdirectory of `STATE_DIR` for each running node.
//!
//! Its name is the node id. A process takes over the most recently used directory that no process has locked,
//! and with it the node id, the journal and the unfinished jobs. Several processes on one machine get one
//! directory each. A start that fails removes a directory that it created, because the next start would take
//! that one.
//!
//! The lock does not protect a copy of the directory. So a process records its token and the identity of its
//! lock there: the boot id of the machine, and the inode and birth time of the lock file. No copy has the
//! same identity. If the identity matches, the lock proves that the recorded process is gone (see
//! [`StateDir::predecessor`]).

use super::plan::StateClaim;
use crate::backend::Predecessor;
use crate::model::{NodeId, ProcessToken};
use nix::fcntl::{Flock, FlockArg};
use parking_lot::Mutex;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

/// Changes with each boot of the machine.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// File with the token and the lock identity of the process that used the directory last.
const HOLDER: &str = "holder";
const LOCK: &str = "lock";

/// A locked directory. The lock is released on drop, and by the kernel when the process dies.
pub struct StateDir {
    pub node: NodeId,
    root: PathBuf,
    dir: PathBuf,
    lock: Mutex<Flock<File>>,
    /// Token of this process, once it is recorded.
    process: OnceLock<ProcessToken>,
    /// Created by this process, whose start has not succeeded yet.
    is_new: AtomicBool,
    /// The directory is missing, or another process has locked it. Logged once.
    is_lost: AtomicBool,
}

impl StateDir {
    /// Node ids with a directory under `root`, the most recently used first. Creates `root`.
    pub fn used(root: &Path) -> io::Result<Vec<NodeId>> {
        fs::create_dir_all(root)?;
        let mut nodes: Vec<(SystemTime, NodeId)> = fs::read_dir(root)?
            .filter_map(|entry| {
                let entry = entry.ok()?;
                let used = fs::metadata(entry.path().join(LOCK)).and_then(|lock| lock.modified());
                Some((used.unwrap_or(SystemTime::UNIX_EPOCH), NodeId::parse(entry.file_name().to_str()?)?))
            })
            .collect();
        nodes.sort_by_key(|(used, node)| (std::cmp::Reverse(*used), node.0));
        Ok(nodes.into_iter().map(|(_, node)| node).collect())
    }

    /// Locks the directory of `node`. `None`: another process has locked it.
    pub fn take(root: &Path, node: NodeId) -> io::Result<Option<Self>> {
        Self::lock(root, node, false)
    }

    /// Creates and locks a directory with a new random id.
    pub fn make(root: &Path) -> io::Result<Self> {
        loop {
            let node = NodeId(rand::random());
            match fs::create_dir(root.join(node.to_string())) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(e) => return Err(e),
            }
            // Another process that starts now may have locked the new directory first.
            if let Some(taken) = Self::lock(root, node, true)? {
                return Ok(taken);
            }
        }
    }

    /// The process that used this directory last, if it is certainly gone. It is, if it held the same lock
    /// that this process holds now.
    pub fn predecessor(&self) -> Predecessor {
        let left = fs::read_to_string(self.dir.join(HOLDER)).unwrap_or_default();
        let left = left.trim_end().split_once(' ');
        match left.and_then(|(token, lock)| Some((ProcessToken::parse(token)?, lock))) {
            Some((token, lock)) if self.lock_identity().is_ok_and(|ours| ours == lock) => {
                Predecessor::Process(token)
            }
            _ => Predecessor::Nobody,
        }
    }

    /// Records that `process` uses this directory. Without the record, the next start may have to wait until
    /// the lease of `process` expires.
    pub fn leave_word(&self, process: ProcessToken) -> io::Result<()> {
        let process = self.process.get_or_init(|| process);
        fs::write(self.dir.join(HOLDER), format!("{process} {}\n", self.lock_identity()?))
    }

    /// Boot id, inode and birth time of the lock file. The device number stands in for the birth time only if
    /// the file system has none, because it may change with each mount.
    fn lock_identity(&self) -> io::Result<String> {
        let boot = fs::read_to_string(BOOT_ID)?;
        let file = self.lock.lock().metadata()?;
        let born = file.created().ok().and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok());
        let place = born.map_or_else(|| format!("device {}", file.dev()), |at| format!("{}", at.as_nanos()));
        Ok(format!("{} {} {place}", boot.trim_end(), file.ino()))
    }

    /// Path of the directory.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Creates `root` if it is missing, and checks that it is writable.
    pub fn probe(root: &Path) -> io::Result<()> {
        fs::create_dir_all(root)?;
        let probe = root.join(format!("probe-{}", std::process::id()));
        File::create(&probe)?;
        fs::remove_file(probe)
    }

    fn lock(root: &Path, node: NodeId, is_new: bool) -> io::Result<Option<Self>> {
        let dir = root.join(node.to_string());
        let Some(lock) = lock_in(&dir)? else { return Ok(None) };
        let (lock, is_new, is_lost) = (Mutex::new(lock), AtomicBool::new(is_new), AtomicBool::new(false));
        let process = OnceLock::new();
        Ok(Some(Self { node, root: root.to_owned(), dir, lock, process, is_new, is_lost }))
    }

    /// Whether the lock file at the path is the one that this process holds.
    fn is_in_place(&self) -> bool {
        let there = fs::metadata(self.dir.join(LOCK)).map(|there| there.ino());
        let ours = self.lock.lock().metadata().map(|ours| ours.ino());
        matches!((there, ours), (Ok(there), Ok(ours)) if there == ours)
    }

    /// Recreates the directory and locks it. Never recreates `STATE_DIR` itself: if that is missing, its disk
    /// may be missing as well.
    fn restore(&self) -> io::Result<()> {
        if !self.root.is_dir() {
            return Err(io::Error::new(io::ErrorKind::NotFound, "STATE_DIR is missing"));
        }
        match fs::create_dir(&self.dir) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        let lock = lock_in(&self.dir)?;
        *self.lock.lock() = lock.ok_or_else(|| io::Error::other("another process has locked it"))?;
        self.process.get().map_or(Ok(()), |process| self.leave_word(*process))
    }
}

/// Locks a directory by a file in it. `None`: another process has locked it.
pub(super) fn lock_in(dir: &Path) -> io::Result<Option<Flock<File>>> {
    let file = File::options().create(true).truncate(false).write(true).open(dir.join(LOCK))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, e)) => Err(e.into()),
    }
}

impl StateClaim for StateDir {
    fn keep(&self) {
        self.is_new.store(false, Ordering::Relaxed);
        if let Err(e) = self.lock.lock().set_modified(SystemTime::now()) {
            tracing::warn!(error = %e, "State directory not marked; the next start may choose another");
        }
    }

    fn tend(&self) {
        let dir = self.dir.display();
        if self.is_in_place() {
            if self.is_lost.swap(false, Ordering::Relaxed) {
                tracing::info!(%dir, "State directory is back");
            }
            return;
        }
        match self.restore() {
            Ok(()) => {
                self.is_lost.store(false, Ordering::Relaxed);
                tracing::warn!(
                    %dir,
                    "State directory was missing and was recreated; rows that waited in it may be lost"
                );
            }
            Err(e) => {
                if !self.is_lost.swap(true, Ordering::Relaxed) {
                    tracing::error!(
                        %dir,
                        error = %e,
                        "State directory is missing. Restore it, or restart this node"
                    );
                }
            }
        }
    }
}

impl Drop for StateDir {
    fn drop(&mut self) {
        if self.is_new.load(Ordering::Relaxed) {
            // If this fails, an unused directory remains, which a later node takes over.
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes the most recently used free directory, or a new one.
    fn taken(root: &Path) -> StateDir {
        let used = StateDir::used(root).unwrap();
        let free = used.into_iter().find_map(|node| StateDir::take(root, node).unwrap());
        free.unwrap_or_else(|| StateDir::make(root).unwrap())
    }

    fn started(root: &Path) -> StateDir {
        let taken = taken(root);
        taken.keep();
        taken
    }

    #[test]
    fn each_process_gets_its_own_directory_or_takes_over_a_free_one() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("not-a-node")).unwrap();
        let one = started(root.path());
        let two = started(root.path());
        assert_ne!(one.node, two.node);
        let free = one.node;
        drop(one);
        assert_eq!(taken(root.path()).node, free);
    }

    #[test]
    fn a_start_that_fails_removes_its_new_directory() {
        let root = tempfile::tempdir().unwrap();
        let running = started(root.path());
        for _ in 0..5 {
            drop(taken(root.path()));
            StateDir::probe(root.path()).unwrap();
        }
        let node = running.node;
        drop(running);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
        assert_eq!(taken(root.path()).node, node);
    }

    #[test]
    fn the_most_recently_used_directory_comes_first() {
        let root = tempfile::tempdir().unwrap();
        let nodes: Vec<_> = (0..4).map(|_| started(root.path())).collect();
        let last = nodes[2].node;
        nodes[2].lock.lock().set_modified(SystemTime::now() + std::time::Duration::from_secs(9)).unwrap();
        drop(nodes);
        assert_eq!(taken(root.path()).node, last);
    }

    #[test]
    fn the_predecessor_is_known_in_its_own_directory_but_not_in_a_copy() {
        let root = tempfile::tempdir().unwrap();
        let token = ProcessToken(7);
        let dir = started(root.path());
        assert_eq!(dir.predecessor(), Predecessor::Nobody, "no process has used it");
        dir.leave_word(token).unwrap();
        let (node, lock) = (dir.node, dir.path().join("lock"));
        drop(dir);
        assert_eq!(taken(root.path()).predecessor(), Predecessor::Process(token));

        // A copy of the directory, and a copy of the lock file in place of the original.
        let copy = root.path().join("copy");
        fs::create_dir_all(copy.join(node.to_string())).unwrap();
        for name in ["lock", HOLDER] {
            let from = root.path().join(node.to_string()).join(name);
            fs::copy(from, copy.join(node.to_string()).join(name)).unwrap();
        }
        assert_eq!(taken(&copy).predecessor(), Predecessor::Nobody);
        fs::rename(&lock, root.path().join("kept")).unwrap();
        fs::copy(root.path().join("kept"), &lock).unwrap();
        assert_eq!(taken(root.path()).predecessor(), Predecessor::Nobody);
        fs::rename(root.path().join("kept"), &lock).unwrap();
        assert_eq!(taken(root.path()).predecessor(), Predecessor::Process(token));

        // Another boot of the machine, and truncated records.
        let holder = root.path().join(node.to_string()).join(HOLDER);
        let text = fs::read_to_string(&holder).unwrap();
        let boot = fs::read_to_string(BOOT_ID).unwrap();
        for other in [text.replace(boot.trim_end(), "another-boot"), text[..20].to_owned(), String::new()] {
            fs::write(&holder, &other).unwrap();
            assert_eq!(taken(root.path()).predecessor(), Predecessor::Nobody, "{other}");
        }
    }

    /// Without its lock, the next process would take the same directory and the same node id.
    #[test]
    fn a_missing_directory_is_recreated_and_locked() {
        let parent = tempfile::tempdir().unwrap();
        let (root, away) = (parent.path().join("state"), parent.path().join("away"));
        let running = started(&root);
        running.tend();
        let other = |root: &Path| taken(root).node;
        fs::remove_dir_all(running.path()).unwrap();
        running.tend();
        assert!(running.is_in_place());
        assert_ne!(other(&root), running.node);

        fs::rename(&root, &away).unwrap();
        running.tend();
        assert!(!root.exists(), "it would be in the way of the one that is restored");
        fs::rename(&away, &root).unwrap();
        running.tend();
        assert_ne!(other(&root), running.node);

        // A disk that is unmounted leaves an empty mount point. Mounted again, it hides what was created
        // there, and brings back the first lock file, which is locked.
        fs::rename(&root, &away).unwrap();
        fs::create_dir(&root).unwrap();
        running.tend();
        assert!(running.is_in_place());
        fs::remove_dir_all(&root).unwrap();
        fs::rename(&away, &root).unwrap();
        running.tend();
        assert!(running.is_in_place());
        assert_ne!(other(&root), running.node);

        // Another process locks the recreated directory first.
        fs::remove_dir_all(running.path()).unwrap();
        fs::create_dir(running.path()).unwrap();
        let other_process = StateDir::lock(&root, running.node, false).unwrap().unwrap();
        running.tend();
        assert!(!running.is_in_place() && other_process.is_in_place());
    }
}
