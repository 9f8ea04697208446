//! Announces changes of functions to the other nodes.
//!
//! A change is announced before its request is answered, so other nodes apply it shortly afterwards. A failed
//! announcement is retried until it succeeds. Otherwise other nodes, whose own subscriptions work, would use
//! their cached function for up to `cache.function_backstop_s`. A write without an answer is announced twice:
//! now, and when it can no longer take effect. A node that read after the first announcement may have read
//! too early.

use crate::backend::{ChangeEvent, ChangeFeed};
use crate::model::FunctionId;
use parking_lot::Mutex;
use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Maximum number of changes that wait to be announced. When it is reached, one announcement of [`ALL`]
/// replaces them.
const UNTOLD_MAX: usize = 1_000;
/// Maximum time after which an abandoned write may still take effect.
const LATE_WRITE_MAX: Duration = Duration::from_secs(10);
/// Maximum number of unanswered writes. When it is reached, one entry that stands for all functions replaces
/// them.
const DOUBTFUL_MAX: usize = 1_000;
/// The announcement that any function may have changed. It is not a valid function id.
const ALL: &str = "*";

/// Announces changes. Cheap to clone.
#[derive(Clone)]
pub struct Announcer(Arc<AnnouncerState>);

struct AnnouncerState {
    /// `None`: there are no other nodes.
    feed: Option<Arc<dyn ChangeFeed>>,
    /// The announcements that have failed.
    untold: Mutex<BTreeSet<String>>,
    /// The functions of unanswered writes (`None`: any function), and the time after which the write can no
    /// longer take effect. In the order of that time.
    doubtful: Mutex<VecDeque<(Instant, Option<FunctionId>)>>,
}

impl Announcer {
    pub fn new(feed: Option<Arc<dyn ChangeFeed>>) -> Self {
        Self(Arc::new(AnnouncerState { feed, untold: Mutex::default(), doubtful: Mutex::default() }))
    }

    pub fn is_alone(&self) -> bool {
        self.0.feed.is_none()
    }

    /// Announces that a function has changed. If that fails, the announcement is retried in the background.
    pub async fn announce(&self, id: &FunctionId) {
        self.announce_text(id.as_str()).await;
    }

    /// The next announcement of another node. `None`: there are no other nodes.
    pub async fn next(&self) -> Option<ChangeEvent> {
        match &self.0.feed {
            Some(feed) => Some(feed.next().await),
            None => None,
        }
    }

    /// Announces that any function may have changed.
    pub async fn announce_all(&self) {
        self.announce_text(ALL).await;
    }

    /// The next unanswered write that can no longer take effect: the function that it may have changed, or
    /// `None` for any function.
    pub fn next_settled_write(&self) -> Option<Option<FunctionId>> {
        self.0.doubtful.lock().pop_front_if(|(due, _)| *due <= Instant::now()).map(|(_, id)| id)
    }

    /// Records a write without an answer. When it can no longer take effect, the function is invalidated and
    /// announced once more.
    pub fn doubt(&self, id: &FunctionId) {
        let due = Instant::now() + LATE_WRITE_MAX;
        let mut doubtful = self.0.doubtful.lock();
        if doubtful.len() >= DOUBTFUL_MAX {
            doubtful.clear();
            doubtful.push_back((due, None));
        } else {
            doubtful.push_back((due, Some(id.clone())));
        }
    }
}

impl Announcer {
    async fn announce_text(&self, id: &str) {
        let Some(feed) = &self.0.feed else { return };
        if let Err(error) = feed.announce(id).await {
            tracing::warn!(
                functionId = id,
                %error,
                "Change of a function not announced; retrying. Other nodes may use the old version until then"
            );
            self.keep(id.to_owned());
        }
    }

    fn keep(&self, id: String) {
        let mut untold = self.0.untold.lock();
        if untold.len() >= UNTOLD_MAX {
            untold.clear();
            untold.insert(ALL.to_owned());
        } else if !untold.contains(ALL) {
            untold.insert(id);
        }
    }

    /// Retries the failed announcements, up to the first one that fails again.
    pub async fn try_again(&self) {
        let Some(feed) = &self.0.feed else { return };
        loop {
            let Some(id) = self.0.untold.lock().pop_first() else { return };
            if feed.announce(&id).await.is_err() {
                self.keep(id);
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::BackendError;
    use async_trait::async_trait;

    /// Accepts announcements only while `is_there`.
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
            self.told.lock().push(id.to_owned());
            Ok(())
        }

        async fn next(&self) -> ChangeEvent {
            std::future::pending().await
        }
    }

    #[tokio::test]
    async fn failed_announcements_are_retried() {
        for (changes, told) in [(3, vec!["f-0", "f-1", "f-2"]), (UNTOLD_MAX + 5, vec![ALL])] {
            let flaky = Arc::new(Flaky::default());
            let feed = Announcer::new(Some(Arc::clone(&flaky) as _));
            for n in 0..changes {
                feed.announce(&FunctionId::parse(&format!("f-{n}")).unwrap()).await;
            }
            feed.try_again().await;
            assert_eq!(*flaky.told.lock(), Vec::<String>::new());
            flaky.is_there.store(true, std::sync::atomic::Ordering::SeqCst);
            feed.try_again().await;
            assert_eq!(*flaky.told.lock(), told);
            assert!(feed.0.untold.lock().is_empty());
        }
    }

    #[tokio::test]
    async fn too_many_unanswered_writes_become_one() {
        let feed = Announcer::new(None);
        for n in 0..=DOUBTFUL_MAX {
            feed.doubt(&FunctionId::parse(&format!("f-{n}")).unwrap());
        }
        let doubtful = feed.0.doubtful.lock();
        assert!(matches!(doubtful.iter().collect::<Vec<_>>()[..], [(_, None)]), "{}", doubtful.len());
    }
}
