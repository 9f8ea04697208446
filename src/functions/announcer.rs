//! The changes that nodes tell each other of.
//!
//! A change is announced before it is answered, so it is in force on the other nodes a moment later. What cannot be
//! announced is kept and tried again: others may hear each other while this node does not reach them, and would use what
//! they know until the backstop. A write that was not answered is announced once more when it can no longer take effect:
//! whoever read after the first announcement may have read too early.

use super::cache::Functions;
use crate::backend::{ChangeEvent, ChangeFeed};
use crate::model::FunctionId;
use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, MissedTickBehavior, interval};

/// Changes that wait to be announced. Full: one announcement that everything may have changed takes their place.
const UNTOLD_MAX: usize = 1_000;
const RETRY_EVERY: Duration = Duration::from_millis(250);
/// Longest a write may still take effect after it was given up.
const LATE_WRITE_MAX: Duration = Duration::from_secs(10);
/// Writes that were not answered. Full: they become one, of which nobody knows what it writes.
const DOUBTFUL_MAX: usize = 1_000;
/// Announces that any function may have changed; no id has such a character.
const ALL: &str = "*";

/// Tells other nodes. Cheap to clone.
#[derive(Clone)]
pub struct Feed(Arc<Inner>);

struct Inner {
    /// `None`: there are no other nodes.
    feed: Option<Arc<dyn ChangeFeed>>,
    untold: Mutex<BTreeSet<String>>,
    /// What the writes that were not answered change (`None`: anything), and from when on it is certain whether they
    /// did; in that order.
    doubtful: Mutex<VecDeque<(Instant, Option<FunctionId>)>>,
}

impl Feed {
    pub(super) fn new(feed: Option<Arc<dyn ChangeFeed>>) -> Self {
        Self(Arc::new(Inner { feed, untold: Mutex::default(), doubtful: Mutex::default() }))
    }

    pub(super) fn is_alone(&self) -> bool {
        self.0.feed.is_none()
    }

    /// Tells the other nodes that a function has changed, now or as soon as they can be told.
    pub(super) async fn announce(&self, id: &FunctionId) {
        self.0.announce(id.as_str()).await;
    }

    /// A change of the function may take effect later: then it is forgotten, and announced, once more.
    pub(super) fn doubt(&self, id: &FunctionId) {
        let due = Instant::now() + LATE_WRITE_MAX;
        let mut doubtful = lock(&self.0.doubtful);
        if doubtful.len() >= DOUBTFUL_MAX {
            doubtful.clear();
            doubtful.push_back((due, None));
        } else {
            doubtful.push_back((due, Some(id.clone())));
        }
    }
}

impl Inner {
    async fn announce(&self, id: &str) {
        let Some(feed) = &self.feed else { return };
        if let Err(error) = feed.announce(id).await {
            tracing::warn!(functionId = id, %error, "Change Not Announced");
            self.keep(id.to_owned());
        }
    }

    fn keep(&self, id: String) {
        let mut untold = lock(&self.untold);
        if untold.len() >= UNTOLD_MAX {
            untold.clear();
            untold.insert(ALL.to_owned());
        } else if !untold.contains(ALL) {
            untold.insert(id);
        }
    }

    /// Announces what could not be announced before; stops at the first that cannot be yet.
    async fn try_again(&self) {
        let Some(feed) = &self.feed else { return };
        loop {
            let Some(id) = lock(&self.untold).pop_first() else { return };
            if feed.announce(&id).await.is_err() {
                self.keep(id);
                return;
            }
        }
    }

    /// Forgets and announces what is certain by now.
    async fn settle_doubts(&self, functions: &Functions) {
        loop {
            let next = {
                let mut doubtful = lock(&self.doubtful);
                doubtful.pop_front_if(|(due, _)| *due <= Instant::now())
            };
            match next {
                Some((_, Some(id))) => functions.changed(&id).await,
                Some((_, None)) => {
                    functions.doubt_all();
                    self.announce(ALL).await;
                }
                None => return,
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::BackendError;
    use async_trait::async_trait;

    /// Takes announcements only while it is there.
    #[derive(Default)]
    struct Flaky {
        told: Mutex<Vec<String>>,
        is_there: std::sync::atomic::AtomicBool,
    }

    #[async_trait]
    impl ChangeFeed for Flaky {
        async fn announce(&self, id: &str) -> Result<(), BackendError> {
            if !self.is_there.load(std::sync::atomic::Ordering::SeqCst) {
                return Err(BackendError::Unavailable("away".into()));
            }
            self.told.lock().unwrap().push(id.to_owned());
            Ok(())
        }

        async fn next(&self) -> ChangeEvent {
            std::future::pending().await
        }
    }

    #[tokio::test]
    async fn what_could_not_be_told_is_told_later() {
        for (changes, told) in [(3, vec!["f-0", "f-1", "f-2"]), (UNTOLD_MAX + 5, vec![ALL])] {
            let flaky = Arc::new(Flaky::default());
            let feed = Feed::new(Some(Arc::clone(&flaky) as _));
            for n in 0..changes {
                feed.announce(&FunctionId::parse(&format!("f-{n}")).unwrap()).await;
            }
            let inner = &feed.0;
            inner.try_again().await;
            assert_eq!(*flaky.told.lock().unwrap(), Vec::<String>::new());
            flaky.is_there.store(true, std::sync::atomic::Ordering::SeqCst);
            inner.try_again().await;
            assert_eq!(*flaky.told.lock().unwrap(), told);
            assert!(lock(&inner.untold).is_empty());
        }
    }

    #[tokio::test]
    async fn too_many_doubts_are_one() {
        let feed = Feed::new(None);
        for n in 0..=DOUBTFUL_MAX {
            feed.doubt(&FunctionId::parse(&format!("f-{n}")).unwrap());
        }
        let doubtful = lock(&feed.0.doubtful);
        assert!(matches!(doubtful.iter().collect::<Vec<_>>()[..], [(_, None)]), "{}", doubtful.len());
    }
}
