//! The changes that nodes tell each other of.
//!
//! A change is announced before it is answered, so it is in force on the other nodes a moment later. What cannot be
//! announced is kept and tried again: others may hear each other while this node does not reach them, and would use what
//! they know until the backstop.

use super::cache::Functions;
use crate::backend::{ChangeEvent, ChangeFeed};
use crate::metrics::Metrics;
use crate::model::FunctionId;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::{MissedTickBehavior, interval};

/// Changes that wait to be announced. Full: one announcement that everything may have changed takes their place.
const UNTOLD_MAX: usize = 1_000;
const RETRY_EVERY: Duration = Duration::from_millis(250);
/// Announces that any function may have changed; no id has such a character.
const ALL: &str = "*";

/// Tells other nodes. Cheap to clone.
#[derive(Clone)]
pub struct Feed(Option<Arc<Inner>>);

struct Inner {
    feed: Arc<dyn ChangeFeed>,
    untold: Mutex<BTreeSet<String>>,
}

impl Feed {
    /// `None`: there are no other nodes.
    pub(super) fn new(feed: Option<Arc<dyn ChangeFeed>>) -> Self {
        Self(feed.map(|feed| Arc::new(Inner { feed, untold: Mutex::default() })))
    }

    pub(super) fn is_alone(&self) -> bool {
        self.0.is_none()
    }

    /// Tells the other nodes that a function has changed, now or as soon as they can be told.
    pub(super) async fn announce(&self, id: &FunctionId) {
        let Some(inner) = &self.0 else { return };
        if let Err(error) = inner.feed.announce(id.as_str()).await {
            tracing::warn!(functionId = %id, %error, "Change Not Announced");
            inner.keep(id.as_str().to_owned());
        }
    }
}

impl Inner {
    fn keep(&self, id: String) {
        let mut untold = self.untold();
        if untold.len() >= UNTOLD_MAX {
            untold.clear();
            untold.insert(ALL.to_owned());
        } else if !untold.contains(ALL) {
            untold.insert(id);
        }
    }

    /// Announces what could not be announced before; stops at the first that cannot be yet.
    async fn try_again(&self) {
        loop {
            let Some(id) = self.untold().pop_first() else { return };
            if self.feed.announce(&id).await.is_err() {
                self.keep(id);
                return;
            }
        }
    }

    fn untold(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.untold.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Hears of changes, and announces what could not be announced at once.
pub struct ChangeLoop {
    feed: Feed,
    functions: Functions,
    metrics: Arc<Metrics>,
}

impl ChangeLoop {
    pub(super) fn new(feed: Feed, functions: Functions, metrics: Arc<Metrics>) -> Self {
        Self { feed, functions, metrics }
    }

    pub async fn run(self) {
        let Some(inner) = &self.feed.0 else { return std::future::pending().await };
        let hear = async {
            loop {
                self.heard(inner.feed.next().await).await;
            }
        };
        let tell = async {
            let mut tick = interval(RETRY_EVERY);
            tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                tick.tick().await;
                inner.try_again().await;
            }
        };
        tokio::join!(hear, tell);
    }

    async fn heard(&self, event: ChangeEvent) {
        match event {
            ChangeEvent::Heard => self.functions.hear(),
            ChangeEvent::Deaf => self.functions.be_deaf(),
            ChangeEvent::Changed(id) => {
                self.metrics.function_changes.inc();
                match FunctionId::parse(&id) {
                    Some(id) => self.functions.forget(&id).await,
                    // Everything, or something only a later program knows.
                    None => self.functions.hear(),
                }
            }
        }
    }
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
            let inner = feed.0.as_ref().unwrap();
            inner.try_again().await;
            assert_eq!(*flaky.told.lock().unwrap(), Vec::<String>::new());
            flaky.is_there.store(true, std::sync::atomic::Ordering::SeqCst);
            inner.try_again().await;
            assert_eq!(*flaky.told.lock().unwrap(), told);
            assert!(inner.untold().is_empty());
        }
    }
}
