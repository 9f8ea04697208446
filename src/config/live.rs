//! Settings that may change while the process runs.

use arc_swap::{ArcSwap, Guard};
use std::sync::Arc;

/// A setting as it is now. Reading takes no lock; clones share it.
#[derive(Debug)]
pub struct Live<T>(Arc<ArcSwap<T>>);

impl<T> Live<T> {
    pub fn new(value: T) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(value)))
    }

    /// The setting as it is at this moment. Not to be held over an await: what it was then is kept alive.
    pub fn get(&self) -> Guard<Arc<T>> {
        self.0.load()
    }

    pub fn set(&self, value: T) {
        self.0.store(Arc::new(value));
    }
}

impl<T> Clone for Live<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}
