//! The port for announcements of changed functions, with which nodes invalidate each other's caches.
//!
//! Delivery is best effort: an announcement is received at most once, and may be lost while a subscription is
//! interrupted. The port reports the state of its subscription, so that the cache knows when to trust its
//! entries. `aws` uses one Redis channel per function table. `embedded` has no other nodes and no feed.

use crate::backend::BackendError;
use crate::backend::results::SubscriptionState;
use async_trait::async_trait;

/// An event of the subscription to changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChangeEvent {
    /// The text that a node announced: the id of a changed function. A node receives its own announcements
    /// too. Other texts are possible, because any client of the store can publish.
    Changed(String),
    /// The state of the subscription. After an interruption, earlier announcements may have been missed.
    Subscription(SubscriptionState),
}

/// Announces changes to all nodes, and receives their announcements.
#[async_trait]
pub trait ChangeFeed: Send + Sync {
    /// Publishes an announcement to all subscribed nodes. `Ok` does not prove that any node received it.
    async fn announce(&self, id: &str) -> Result<(), BackendError>;

    /// Returns the next event. Reconnects by itself and never ends. It must be called by one task at a time,
    /// without long pauses, because events accumulate in memory.
    async fn next(&self) -> ChangeEvent;
}
