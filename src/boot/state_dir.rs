//! The node's place on the local disk: one locked subdirectory of `STATE_DIR` for each running node.
//!
//! Its name is the node's id. A process takes over a directory that no process holds, and so the id, the
//! journal and the unfinished jobs of the one before; several processes on one machine get one each.

use crate::model::NodeId;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File};
use std::io;
use std::path::Path;

/// The lock; given up when dropped, and by the kernel when the process dies.
pub struct StateDir {
    pub node: NodeId,
    _lock: Flock<File>,
}

impl StateDir {
    /// Takes the first free directory under `root`, or makes one.
    pub fn take(root: &Path) -> io::Result<Self> {
        fs::create_dir_all(root)?;
        let mut nodes: Vec<NodeId> =
            fs::read_dir(root)?.filter_map(|entry| parse(entry.ok()?.file_name().to_str()?)).collect();
        nodes.sort_by_key(|node| node.0);
        for node in nodes {
            if let Some(taken) = Self::lock(root, node)? {
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
            if let Some(taken) = Self::lock(root, node)? {
                return Ok(taken);
            }
        }
    }

    fn lock(root: &Path, node: NodeId) -> io::Result<Option<Self>> {
        let path = root.join(node.to_string()).join("lock");
        let file = File::options().create(true).truncate(false).write(true).open(path)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Some(Self { node, _lock: lock })),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, e)) => Err(e.into()),
        }
    }
}

fn parse(name: &str) -> Option<NodeId> {
    let ours = name.len() == 8 && name.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    ours.then(|| u32::from_str_radix(name, 16).ok().map(NodeId))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_process_has_its_own_and_a_free_one_is_taken_over() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("not-a-node")).unwrap();
        let one = StateDir::take(root.path()).unwrap();
        let two = StateDir::take(root.path()).unwrap();
        assert_ne!(one.node, two.node);
        let free = one.node;
        drop(one);
        assert_eq!(StateDir::take(root.path()).unwrap().node, free);
    }
}
