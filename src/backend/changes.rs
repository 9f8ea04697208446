//! Announcements of changed functions.

use crate::backend::BackendError;
use crate::backend::results::Hearing;
use async_trait::async_trait;

/// What is heard of changes to functions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChangeEvent {
    /// Announced by some node, this one included.
    Changed(String),
    /// From now on every announcement is heard, or none is. When they are heard again, some of before may not
    /// have been.
    Hearing(Hearing),
}

/// How nodes tell each other which functions they have changed.
#[async_trait]
pub trait ChangeFeed: Send + Sync {
    /// Tells every node that hears.
    async fn announce(&self, id: &str) -> Result<(), BackendError>;

    /// The next event. One caller at a time; it must not pause for long.
    async fn next(&self) -> ChangeEvent;
}
