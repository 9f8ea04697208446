//! The port for results: workers publish each one, and store a copy for one hour.
//!
//! A publication is only a wake-up and may be lost. The stored copy is authoritative, so callers also look it
//! up. A fleet worker publishes first and stores afterwards; `embedded` stores first. Either way the same
//! result may arrive more than once.
//!
//! `aws` uses Redis: channels `result:<job id>` and keys `job:<job id>`. `embedded` uses a table of its
//! database and a channel in the process.

use crate::backend::BackendError;
use crate::model::JobId;
use async_trait::async_trait;
use bytes::Bytes;

/// Maximum number of ids per [`Results::stored`].
pub const STORED_MAX: usize = 64;

/// An event of the subscription to results.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ResultEvent {
    /// A worker published a result of one of this node's jobs.
    Published { id: JobId, payload: Bytes },
    /// A publication under the prefix of this node whose channel is not a job id.
    Malformed,
    /// The subscription is active, at first or again. Earlier publications may have been missed.
    Subscribed,
    /// The state of the subscription has changed.
    Subscription(SubscriptionState),
}

/// The state of a subscription. Whether it receives what others publish is proven by beats: messages of this
/// process to itself, published in the same way as theirs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SubscriptionState {
    /// It is active, and beats are published. After missed beats: beats arrive again.
    Verified,
    /// It is active, but beats are denied, so it is not known whether it receives anything.
    Unverified,
    /// Its connection broke, or could not be established. It reconnects.
    Disconnected,
    /// Its connection is up, but beats did not arrive. It reconnects.
    BeatsMissed,
}

impl SubscriptionState {
    /// Whether the subscription counts as receiving. `Unverified` does, because beats are optional.
    pub fn is_receiving(self) -> bool {
        matches!(self, Self::Verified | Self::Unverified)
    }
}

/// The published and the stored results of workers.
#[async_trait]
pub trait Results: Send + Sync {
    /// Returns the next event for this node. Reconnects by itself and never ends. It must be called by one
    /// task at a time, without long pauses, because publications accumulate in memory.
    async fn next(&self) -> ResultEvent;

    /// Reads the stored results of at most [`STORED_MAX`] jobs. Returns one entry per id, in order. `None`:
    /// no result is stored.
    async fn stored(&self, ids: &[JobId]) -> Result<Vec<Option<Bytes>>, BackendError>;

    /// Stores the result of a job unless one is stored. Workers do that themselves; a worker that has died
    /// after it published a result does not. A store that workers write before they publish needs nothing.
    async fn store(&self, _id: JobId, _result: &Bytes) -> Result<(), BackendError> {
        Ok(())
    }

    /// Reads the stored result of a job of the old controller, whose id is not a [`JobId`].
    async fn stored_foreign(&self, request_id: &str) -> Result<Option<Bytes>, BackendError>;

    /// Waits for the result of a job of another node, without a time limit. Dropping the future ends the
    /// wait.
    async fn wait_for(&self, id: JobId) -> Result<Bytes, BackendError>;

    /// The name of the store in `/health`: `redis` or `database`.
    fn store_name(&self) -> &'static str;

    /// Health check: reaches the store.
    async fn ping(&self) -> Result<(), BackendError>;
}
