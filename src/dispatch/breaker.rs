//! A circuit breaker before the queue: when nothing could be sent for a while, new jobs are refused at once and not
//! only after their send deadline. A job now and then is let through to see whether the queue is back, and those that
//! wait go on trying.

use crate::metrics::Metrics;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// It opens when sends have failed for so long without one that succeeded.
const OPENS_AFTER: Duration = Duration::from_secs(2);
/// While it is open one job in so long is let through.
const PROBE_EVERY: Duration = Duration::from_millis(250);
/// It closes when nothing was tried for so long: nothing is known of the queue then. Whoever balances load by
/// `/health` sends no jobs while that says that the queue is away, and then nobody would ever try.
pub const FORGETS_AFTER: Duration = Duration::from_secs(10);

pub struct Breaker {
    /// Beside the state, so that the usual case takes no lock.
    is_open: AtomicBool,
    is_failing: AtomicBool,
    state: Mutex<State>,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct State {
    failing_since: Option<Instant>,
    failed_last: Option<Instant>,
    next_probe: Option<Instant>,
}

impl Breaker {
    pub fn new(metrics: Arc<Metrics>) -> Self {
        let (is_open, is_failing) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { is_open, is_failing, state: Mutex::default(), metrics }
    }

    /// Whether a new job may wait to be sent.
    pub fn admits(&self) -> bool {
        if !self.is_open.load(Ordering::Relaxed) {
            return true;
        }
        let now = Instant::now();
        let mut state = self.state();
        if state.next_probe.is_some_and(|at| now < at) {
            return false;
        }
        state.next_probe = Some(now + PROBE_EVERY);
        true
    }

    /// A send took a job to the queue.
    pub fn succeeded(&self) {
        if !self.is_failing.load(Ordering::Relaxed) {
            return;
        }
        let mut state = self.state();
        *state = State::default();
        self.is_failing.store(false, Ordering::Relaxed);
        if self.is_open.swap(false, Ordering::Relaxed) {
            self.metrics.queue_refuses.set(0);
            tracing::info!("Queue Is Back");
        }
    }

    /// A send took no job to the queue, and the jobs were not to blame.
    pub fn failed(&self) {
        let now = Instant::now();
        let mut state = self.state();
        self.is_failing.store(true, Ordering::Relaxed);
        state.failed_last = Some(now);
        let since = *state.failing_since.get_or_insert(now);
        if now - since >= OPENS_AFTER && !self.is_open.swap(true, Ordering::Relaxed) {
            state.next_probe = Some(now + PROBE_EVERY);
            self.metrics.queue_refuses.set(1);
            tracing::error!("Queue Away, Jobs Are Refused");
        }
    }

    /// Whether it has something to forget.
    pub fn is_open(&self) -> bool {
        self.is_open.load(Ordering::Relaxed)
    }

    /// Closes it if nothing was tried for a while.
    pub fn forget(&self) {
        let mut state = self.state();
        if self.is_open() && state.failed_last.is_none_or(|at| at.elapsed() >= FORGETS_AFTER) {
            *state = State::default();
            self.is_failing.store(false, Ordering::Relaxed);
            self.is_open.store(false, Ordering::Relaxed);
            self.metrics.queue_refuses.set(0);
            tracing::info!("Queue Not Tried For A While, Jobs Are Let Through Again");
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::advance;

    fn breaker() -> Breaker {
        Breaker::new(Arc::new(Metrics::new(10).unwrap()))
    }

    #[tokio::test(start_paused = true)]
    async fn it_opens_when_nothing_has_succeeded_for_a_while() {
        let breaker = breaker();
        breaker.failed();
        advance(OPENS_AFTER / 2).await;
        breaker.succeeded();
        breaker.failed();
        advance(OPENS_AFTER / 2).await;
        breaker.failed();
        assert!(breaker.admits(), "not long enough without a success");
        advance(OPENS_AFTER / 2).await;
        breaker.failed();
        assert!(!breaker.admits());
        assert_eq!(breaker.metrics.queue_refuses.get(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn while_open_a_job_now_and_then_is_let_through_until_one_succeeds() {
        let breaker = breaker();
        breaker.failed();
        advance(OPENS_AFTER).await;
        breaker.failed();
        for _ in 0..3 {
            assert!(!breaker.admits());
            advance(PROBE_EVERY).await;
            assert!(breaker.admits());
            breaker.failed();
        }
        breaker.succeeded();
        assert!(breaker.admits() && breaker.admits());
        assert_eq!(breaker.metrics.queue_refuses.get(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_nobody_has_tried_for_a_while_is_forgotten() {
        let breaker = breaker();
        breaker.failed();
        advance(OPENS_AFTER).await;
        breaker.failed();
        advance(FORGETS_AFTER / 2).await;
        breaker.forget();
        assert!(breaker.is_open());
        breaker.failed();
        advance(FORGETS_AFTER / 2).await;
        breaker.forget();
        assert!(breaker.is_open(), "it was tried");
        advance(FORGETS_AFTER / 2).await;
        breaker.forget();
        assert!(!breaker.is_open() && breaker.admits() && breaker.admits());
        assert_eq!(breaker.metrics.queue_refuses.get(), 0);
        breaker.failed();
        assert!(!breaker.is_open(), "it opens as it did first");
    }
}
