//! The node's place on the local disk: one locked subdirectory of `STATE_DIR` for each running node.
//!
//! Its name is the node's id. A process takes over the directory that was used last and that no process holds, and
//! so the id, the journal and the unfinished jobs of the one before; several processes on one machine get one each.
//! A start that fails gives a new directory back: else it would be the one that the next start takes.

use super::Claim;
use crate::model::NodeId;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The lock; given up when dropped, and by the kernel when the process dies.
pub struct StateDir {
    pub node: NodeId,
    dir: PathBuf,
    lock: Flock<File>,
    /// Made by this process, which has not started yet.
    is_new: bool,
}

impl StateDir {
    /// Takes the free directory under `root` that was used last, or makes one.
    pub fn take(root: &Path) -> io::Result<Self> {
        fs::create_dir_all(root)?;
        let mut nodes: Vec<(SystemTime, NodeId)> = fs::read_dir(root)?
            .filter_map(|entry| {
                let entry = entry.ok()?;
                let used = fs::metadata(entry.path().join("lock")).and_then(|lock| lock.modified());
                Some((used.unwrap_or(SystemTime::UNIX_EPOCH), NodeId::parse(entry.file_name().to_str()?)?))
            })
            .collect();
        nodes.sort_by_key(|(used, node)| (std::cmp::Reverse(*used), node.0));
        for (_, node) in nodes {
            if let Some(taken) = Self::lock(root, node, false)? {
                return Ok(taken);
            }
        }
        loop {
            let node = NodeId(rand::random());
            match fs::create_dir(root.join(node.to_string())) {
                Ok(()) => {}
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(e) => return Err(e),
            }
            // Another process that starts now may have found the new directory before us.
            if let Some(taken) = Self::lock(root, node, true)? {
                return Ok(taken);
            }
        }
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        &self.dir
    }

    /// Whether a node could have a place under `root`; leaves nothing behind.
    pub fn probe(root: &Path) -> io::Result<()> {
        fs::create_dir_all(root)?;
        let probe = root.join(format!("probe-{}", std::process::id()));
        File::create(&probe)?;
        fs::remove_file(probe)
    }

    fn lock(root: &Path, node: NodeId, is_new: bool) -> io::Result<Option<Self>> {
        let dir = root.join(node.to_string());
        let file = File::options().create(true).truncate(false).write(true).open(dir.join("lock"))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Some(Self { node, dir, lock, is_new })),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, e)) => Err(e.into()),
        }
    }
}

impl Claim for StateDir {
    fn keep(&mut self) {
        self.is_new = false;
        if let Err(e) = self.lock.set_modified(SystemTime::now()) {
            tracing::warn!(error = %e, "State Directory Not Marked");
        }
    }
}

impl Drop for StateDir {
    fn drop(&mut self) {
        if self.is_new {
            // What cannot be removed is an empty directory that some later node takes.
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn started(root: &Path) -> StateDir {
        let mut taken = StateDir::take(root).unwrap();
        taken.keep();
        taken
    }

    #[test]
    fn each_process_has_its_own_and_a_free_one_is_taken_over() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("not-a-node")).unwrap();
        let one = started(root.path());
        let two = started(root.path());
        assert_ne!(one.node, two.node);
        let free = one.node;
        drop(one);
        assert_eq!(StateDir::take(root.path()).unwrap().node, free);
    }

    #[test]
    fn a_start_that_fails_leaves_nothing_for_the_next_one_to_take() {
        let root = tempfile::tempdir().unwrap();
        let running = started(root.path());
        for _ in 0..5 {
            drop(StateDir::take(root.path()).unwrap());
            StateDir::probe(root.path()).unwrap();
        }
        let node = running.node;
        drop(running);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
        assert_eq!(StateDir::take(root.path()).unwrap().node, node);
    }

    #[test]
    fn the_one_used_last_comes_first() {
        let root = tempfile::tempdir().unwrap();
        let nodes: Vec<_> = (0..4).map(|_| started(root.path())).collect();
        let last = nodes[2].node;
        nodes[2].lock.set_modified(SystemTime::now() + std::time::Duration::from_secs(9)).unwrap();
        drop(nodes);
        assert_eq!(StateDir::take(root.path()).unwrap().node, last);
    }
}
