//! Where workers publish results.

use crate::backend::BackendError;
use crate::model::JobId;
use async_trait::async_trait;
use bytes::Bytes;

/// Most ids in one [`Results::stored`].
pub const STORED_MAX: usize = 64;

/// What [`Results::next`] tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ResultEvent {
    /// A worker published this result for one of the node's jobs.
    Published { id: JobId, payload: Bytes },
    /// Something was published under the node's prefix that is no job id.
    Malformed,
    /// The subscription stands (again): whatever was published before this may have been missed.
    Subscribed,
    /// What is known of the subscription has changed.
    Hearing(Hearing),
}

/// Whether a subscription receives what is published. A backend proves it with beats: messages to itself that
/// it publishes the way others publish theirs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hearing {
    /// It stands; after missed beats only once a beat has arrived.
    Proven,
    /// It stands, and beats are denied: whether it receives anything is not known.
    Unproven,
    /// Its connection broke, or cannot be made.
    Broken,
    /// Its connection stands, and beats did not arrive: it is made again.
    Missed,
}

impl Hearing {
    /// Whether the subscription may be relied on.
    pub fn is_heard(self) -> bool {
        matches!(self, Self::Proven | Self::Unproven)
    }
}

/// Where workers leave their results.
#[async_trait]
pub trait Results: Send + Sync {
    /// The next event for this node. Reconnects by itself and never ends; one caller at a time.
    async fn next(&self) -> ResultEvent;

    /// The stored result of each job, in order; at most [`STORED_MAX`] ids.
    async fn stored(&self, ids: &[JobId]) -> Result<Vec<Option<Bytes>>, BackendError>;

    /// The result stored under an id that is not of our kind (an old controller's job).
    async fn stored_foreign(&self, request_id: &str) -> Result<Option<Bytes>, BackendError>;

    /// Waits for the result of another node's job. Dropping the future ends the subscription.
    async fn wait_for(&self, id: JobId) -> Result<Bytes, BackendError>;

    /// What keeps the results, as `/health` names it.
    fn store_name(&self) -> &'static str;

    /// Health check.
    async fn ping(&self) -> Result<(), BackendError>;
}
