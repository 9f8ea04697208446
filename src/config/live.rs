//! Shared settings that a reload can replace while the process runs.

use arc_swap::{ArcSwap, Guard};
use std::sync::Arc;

/// The current value of a setting. Reads take no lock. Clones share the value.
#[derive(Debug)]
pub struct Live<T>(Arc<ArcSwap<T>>);

impl<T> Live<T> {
    pub fn new(value: T) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(value)))
    }

    /// The current value. Do not hold the guard across an await, because it keeps an old value alive.
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
