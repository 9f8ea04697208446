//! Which node id a process has: that of a directory in `STATE_DIR`, if no other process holds its lease.
//!
//! A directory can be copied with its node, so the lock on it is not enough: the lease in the store belongs
//! to one process, by its token. A restart takes the lease of the process before at once, because the lock
//! proves that that one is gone. In all other cases a lease that has not lapsed is left alone. If it is
//! renewed the id is in use, and another one is taken; if it lapses, the process that held it is gone.

use super::state_dir::StateDir;
use crate::backend::{BackendError, HeldBy, Membership, Predecessor, Taken};
use crate::model::{NodeId, ProcessToken};
use std::io;
use std::path::Path;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// Between two looks at a lease that another process holds.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// A process without a token, of an earlier version, renews its lease ten times while it lasts. One that has
/// not done so for this part of it, in tenths, is taken as gone: what it left is mostly a stop for an
/// upgrade.
const SILENT_TENTHS: u32 = 3;

/// Why there is no node id.
pub enum NodeIdError {
    Directory(io::Error),
    Store(BackendError),
}

impl From<io::Error> for NodeIdError {
    fn from(error: io::Error) -> Self {
        Self::Directory(error)
    }
}

/// Takes the directory that was used last, and whose lock and lease are free, or makes one.
pub struct NodeIdChoice<'a> {
    pub root: &'a Path,
    pub membership: &'a dyn Membership,
    /// This one.
    pub process: ProcessToken,
    pub lease: Duration,
    /// Until then it waits for leases to lapse.
    pub deadline: Instant,
}

impl NodeIdChoice<'_> {
    pub async fn take(self) -> Result<StateDir, NodeIdError> {
        for node in StateDir::used(self.root)? {
            let Some(dir) = StateDir::take(self.root, node)? else { continue };
            if self.claim(&dir).await? {
                return Ok(dir);
            }
        }
        loop {
            let dir = StateDir::make(self.root)?;
            // Any id may be in use somewhere.
            if self.claim(&dir).await? {
                return Ok(dir);
            }
        }
    }

    /// Takes the lease of a directory. `false`: another process holds it.
    async fn claim(&self, dir: &StateDir) -> Result<bool, NodeIdError> {
        let node = dir.node;
        let mut predecessor = dir.predecessor();
        let (began, mut first) = (Instant::now(), None);
        loop {
            let held = match self.try_once(node, predecessor).await? {
                Taken::Yes => {
                    if let Err(e) = dir.leave_word(self.process) {
                        tracing::warn!(
                            %node, error = %e,
                            "Process Token Not Kept: the next start may wait for the lease of this one"
                        );
                    }
                    return Ok(true);
                }
                Taken::No(held) => held,
            };
            let first = first.get_or_insert_with(|| {
                tracing::warn!(%node, lapsesInMs = u64::try_from(held.left.as_millis()).unwrap_or(u64::MAX),
                    "Node Id Held By Another Process: waiting for its lease to lapse");
                held
            });
            if *first != (HeldBy { left: first.left, ..held }) {
                tracing::warn!(%node, directory = %dir.path().display(),
                    "Node Id In Use: another process renews its lease, so this one takes another id. \
                     Do not run two nodes on copies of one STATE_DIR");
                return Ok(false);
            }
            if Instant::now() >= self.deadline {
                tracing::warn!(
                    %node,
                    "Node Id Not Free: its lease did not lapse within start.deadline_s. Another id is taken"
                );
                return Ok(false);
            }
            if held.process.is_none() && began.elapsed() >= self.lease * SILENT_TENTHS / 10 {
                predecessor = Predecessor::Unnamed;
            } else {
                sleep(LOOK_EVERY.min(held.left)).await;
            }
        }
    }

    /// The store may be away for a moment.
    async fn try_once(&self, node: NodeId, predecessor: Predecessor) -> Result<Taken, NodeIdError> {
        loop {
            match self.membership.take(node, self.lease, predecessor).await {
                Err(e) if e.is_transient() && Instant::now() < self.deadline => sleep(LOOK_EVERY).await,
                taken => return taken.map_err(NodeIdError::Store),
            }
        }
    }
}
