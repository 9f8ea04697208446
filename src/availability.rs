//! Whether a dependency is available, and when to probe it while it is not.
//!
//! Used by the circuit breaker of the queue, the shared store of the limiter, the log table and its batch
//! writes. Others keep their own form, because they pause after each failure and have no single caller that
//! probes:
//!
//! * Beats of subscriptions: both subscriptions subscribe again after the pause. A probe would let only one.
//! * The command connection to Redis: callers that share one attempt to connect share its error for 50 ms.
//! * AWS credentials: the pause moves the time of the next refresh, which also depends on their expiry.
//! * Failing rows: the pause depends on the number of rows, and each row has its own count of attempts.
//! * The function cache: each entry has its own pause.
//! * The model catalogue: its failure is a cached answer with an age, like its success.

use parking_lot::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// Counts a dependency as down when it has failed for a given time without a success. While it is down, one
/// attempt per interval is a probe. The common case, a dependency that does not fail, takes no lock.
pub struct Availability {
    down_after: Duration,
    probe_every: Duration,
    is_failing: AtomicBool,
    is_down: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    failing_since: Option<Instant>,
    failed_last: Option<Instant>,
    next_probe: Option<Instant>,
}

impl Availability {
    /// `down_after`: how long failures must last; zero: the first failure counts.
    pub fn new(down_after: Duration, probe_every: Duration) -> Self {
        let (is_failing, is_down) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { down_after, probe_every, is_failing, is_down, state: Mutex::default() }
    }

    pub fn is_down(&self) -> bool {
        self.is_down.load(Ordering::Relaxed)
    }

    /// How long it has failed without a success. `None`: the last attempt succeeded.
    pub fn failing_for(&self) -> Option<Duration> {
        if !self.is_failing.load(Ordering::Relaxed) {
            return None;
        }
        self.state.lock().failing_since.map(|since| since.elapsed())
    }

    /// Whether an attempt may be made: always while it is up, once per interval while it is down.
    pub fn may_try(&self) -> bool {
        !self.is_down() || self.take_probe()
    }

    /// Whether the caller is the one that probes now.
    pub fn take_probe(&self) -> bool {
        let now = Instant::now();
        let mut state = self.state.lock();
        let is_due = state.next_probe.is_none_or(|at| now >= at);
        if is_due {
            state.next_probe = Some(now + self.probe_every);
        }
        is_due
    }

    /// Records a failed attempt. Returns whether the dependency went down by it.
    pub fn failed(&self) -> bool {
        let now = Instant::now();
        let mut state = self.state.lock();
        self.is_failing.store(true, Ordering::Relaxed);
        state.failed_last = Some(now);
        let since = *state.failing_since.get_or_insert(now);
        let went_down = now - since >= self.down_after && !self.is_down.swap(true, Ordering::Relaxed);
        if went_down {
            state.next_probe = Some(now + self.probe_every);
        }
        went_down
    }

    /// Records a successful attempt. Returns whether the dependency was down.
    pub fn succeeded(&self) -> bool {
        if !self.is_failing.load(Ordering::Relaxed) {
            return false;
        }
        self.reset(&mut self.state.lock())
    }

    /// Counts the dependency as up again if its last failure is at least `after` ago, because its state is
    /// then unknown. Returns whether it was down.
    pub fn expire(&self, after: Duration) -> bool {
        let mut state = self.state.lock();
        let is_old = state.failed_last.is_none_or(|at| at.elapsed() >= after);
        self.is_down() && is_old && self.reset(&mut state)
    }

    fn reset(&self, state: &mut State) -> bool {
        *state = State::default();
        self.is_failing.store(false, Ordering::Relaxed);
        self.is_down.swap(false, Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::advance;

    const EVERY: Duration = Duration::from_secs(60);

    #[tokio::test(start_paused = true)]
    async fn it_goes_down_after_a_time_without_success() {
        let availability = Availability::new(Duration::from_secs(2), EVERY);
        assert!(!availability.failed() && availability.may_try());
        advance(Duration::from_millis(1999)).await;
        assert!(!availability.failed() && !availability.succeeded(), "it was not down");
        assert!(!availability.failed(), "the time starts again");
        advance(Duration::from_secs(2)).await;
        assert_eq!(availability.failing_for(), Some(Duration::from_secs(2)));
        assert!(availability.failed() && !availability.failed(), "reported once");
        assert!(availability.is_down() && !availability.may_try());
        assert!(availability.succeeded() && !availability.succeeded(), "reported once");
        assert!(availability.may_try() && availability.may_try());
        assert_eq!(availability.failing_for(), None);
    }

    #[tokio::test(start_paused = true)]
    async fn while_it_is_down_one_attempt_per_interval_is_made() {
        let availability = Availability::new(Duration::ZERO, EVERY);
        assert!(availability.failed());
        for _ in 0..3 {
            assert!(!availability.may_try());
            advance(EVERY).await;
            assert!(availability.may_try() && !availability.may_try());
            assert!(!availability.failed());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn without_attempts_it_counts_as_up_again() {
        let availability = Availability::new(Duration::ZERO, EVERY);
        availability.failed();
        advance(EVERY).await;
        availability.failed();
        advance(EVERY / 2).await;
        assert!(!availability.expire(EVERY), "failed half an interval ago");
        advance(EVERY / 2).await;
        assert!(availability.expire(EVERY) && !availability.is_down());
    }
}
