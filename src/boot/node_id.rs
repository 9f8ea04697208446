//! Chooses the node id of a process: that of a directory in `STATE_DIR` whose lease no other process holds.
//!
//! The lock on the directory is not enough, because a directory can be copied together with its node id. So
//! the lease in the store belongs to one process, identified by its token. A restart takes the lease of its
//! predecessor immediately, because the lock proves that the predecessor is gone. In all other cases, a lease
//! that has not expired is left alone. If it is renewed, the id is in use, and another id is taken. If it
//! expires, the process that held it is gone.

use super::state_dir::StateDir;
use crate::backend::{BackendError, LeaseHolder, LeaseOutcome, Membership, Predecessor};
use crate::model::{NodeId, ProcessToken};
use std::io;
use std::path::Path;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// Interval between checks of a lease that another process holds.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// After this part of a lease without a renewal, in tenths, a process without a token counts as gone. Such a
/// process is of an earlier version, which renews its lease ten times per lease. Most of them were stopped
/// for an upgrade.
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

/// Takes the most recently used directory whose lock and lease are free, or creates one.
pub struct NodeIdChoice<'a> {
    pub root: &'a Path,
    pub membership: &'a dyn Membership,
    /// Token of this process.
    pub process: ProcessToken,
    pub lease: Duration,
    /// Until then, it waits for leases to expire.
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
            // A random id may be in use by another node.
            if self.claim(&dir).await? {
                return Ok(dir);
            }
        }
    }

    /// Takes the lease of a directory's node id. `false`: another process holds it.
    async fn claim(&self, dir: &StateDir) -> Result<bool, NodeIdError> {
        let node = dir.node;
        let mut predecessor = dir.predecessor();
        let (began, mut first) = (Instant::now(), None);
        loop {
            let held = match self.try_once(node, predecessor).await? {
                LeaseOutcome::Yes => {
                    if let Err(e) = dir.leave_word(self.process) {
                        tracing::warn!(
                            %node, error = %e,
                            "Process token not written; the next start may have to wait for this lease"
                        );
                    }
                    return Ok(true);
                }
                LeaseOutcome::No(held) => held,
            };
            let first = first.get_or_insert_with(|| {
                tracing::warn!(%node, lapsesInMs = u64::try_from(held.left.as_millis()).unwrap_or(u64::MAX),
                    "Node id is held by another process; waiting for its lease to expire");
                held
            });
            if *first != (LeaseHolder { left: first.left, ..held }) {
                tracing::warn!(%node, directory = %dir.path().display(),
                    "Node id is in use: another process renews its lease. This one takes another id. \
                     Do not run two nodes on copies of one STATE_DIR");
                return Ok(false);
            }
            if Instant::now() >= self.deadline {
                tracing::warn!(
                    %node,
                    "The lease of a node id did not expire within start.deadline_s; taking another id"
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

    /// Tries to take the lease. Retries transient errors until the deadline.
    async fn try_once(&self, node: NodeId, predecessor: Predecessor) -> Result<LeaseOutcome, NodeIdError> {
        loop {
            match self.membership.take(node, self.lease, predecessor).await {
                Err(e) if e.is_transient() && Instant::now() < self.deadline => sleep(LOOK_EVERY).await,
                taken => return taken.map_err(NodeIdError::Store),
            }
        }
    }
}
