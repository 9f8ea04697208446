//! Refusing a part of the jobs while the queue confirms them too slowly.
//!
//! A queue that has become slow makes everybody wait until nobody is served in time. So when even the quickest confirmation of a while
//! takes longer than the target, a growing part of the jobs is refused at once, and a shrinking one when it does not: the
//! standing delay is the sign, as in CoDel (RFC 8289), for a burst makes only some wait; and the steps are additive up and
//! multiplicative down, so that many nodes find a common part.

use crate::config::{Live, OverloadConf};
use crate::metrics::Metrics;
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// A while.
const WINDOW: Duration = Duration::from_millis(100);
/// After that nothing is known of the queue any more.
const FORGET_AFTER: Duration = Duration::from_secs(2);
/// Parts of a thousand: what is refused more after a bad while; what is left of it after a good one; and at most. The rest goes
/// through and shows how the queue does.
const STEP: u32 = 50;
const LEFT: u32 = 700;
const MOST: u32 = 950;

pub struct Shedder {
    conf: Live<OverloadConf>,
    /// Parts of a thousand that are refused; beside the lock, as every job asks.
    part: AtomicU32,
    window: Mutex<Window>,
    metrics: Arc<Metrics>,
}

struct Window {
    began: Instant,
    /// The quickest confirmation.
    least: Option<Duration>,
    /// That of the window before.
    last: Duration,
}

impl Shedder {
    pub fn new(conf: Live<OverloadConf>, metrics: Arc<Metrics>) -> Self {
        let window = Mutex::new(Window { began: Instant::now(), least: None, last: Duration::ZERO });
        Self { conf, part: AtomicU32::new(0), window, metrics }
    }

    /// Whether a job may go on.
    ///
    /// # Errors
    /// How long the queue takes now.
    pub fn admit(&self) -> Result<(), Duration> {
        self.admit_if(|| rand::random_range(0..1000))
    }

    fn admit_if(&self, draw: impl FnOnce() -> u32) -> Result<(), Duration> {
        let part = self.part.load(Ordering::Relaxed);
        if part == 0 || draw() >= part {
            return Ok(());
        }
        self.forget();
        if self.is_shedding() { Err(self.window.lock().last) } else { Ok(()) }
    }

    /// Whether it has something to forget.
    pub fn is_shedding(&self) -> bool {
        self.part.load(Ordering::Relaxed) > 0
    }

    /// Refuses nothing any more if nothing was confirmed for a while.
    pub fn forget(&self) {
        if self.window.lock().began.elapsed() >= FORGET_AFTER || self.target().is_zero() {
            self.set(0);
        }
    }

    /// Jobs were confirmed; the youngest of them after so long.
    pub fn confirmed(&self, after: Duration) {
        let mut window = self.window.lock();
        window.least = Some(window.least.map_or(after, |least| least.min(after)));
        if window.began.elapsed() < WINDOW {
            return;
        }
        let least = window.least.take().unwrap_or_default();
        (window.began, window.last) = (Instant::now(), least);
        drop(window);
        let (part, target) = (self.part.load(Ordering::Relaxed), self.target());
        let is_slow = !target.is_zero() && least > target;
        self.set(if is_slow { (part + STEP).min(MOST) } else { part * LEFT / 1000 });
    }

    fn target(&self) -> Duration {
        Duration::from_millis(self.conf.get().confirm_target_ms)
    }

    fn set(&self, part: u32) {
        if self.part.swap(part, Ordering::Relaxed) != part {
            self.metrics.queue_shed_permille.set(part.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::advance;

    fn shedder(target_ms: u64) -> Shedder {
        let conf = OverloadConf { jobs_per_key_max: 0, confirm_target_ms: target_ms };
        Shedder::new(Live::new(conf), Arc::new(Metrics::new(1).unwrap()))
    }

    async fn confirm(shedder: &Shedder, windows: u32, ms: &[u64]) {
        for _ in 0..windows {
            advance(WINDOW).await;
            for ms in ms {
                shedder.confirmed(Duration::from_millis(*ms));
            }
        }
    }

    fn admitted(shedder: &Shedder) -> usize {
        (0..1000).filter(|draw| shedder.admit_if(|| *draw).is_ok()).count()
    }

    #[tokio::test(start_paused = true)]
    async fn a_standing_delay_is_shed_and_a_burst_is_not() {
        let shedder = shedder(100);
        confirm(&shedder, 5, &[90]).await;
        assert_eq!(admitted(&shedder), 1000);
        confirm(&shedder, 4, &[150]).await;
        assert_eq!(admitted(&shedder), 800);
        assert_eq!(shedder.admit_if(|| 0), Err(Duration::from_millis(150)));
        confirm(&shedder, 100, &[500]).await;
        assert_eq!(admitted(&shedder), 50, "some go through always");
        confirm(&shedder, 1, &[100]).await;
        assert_eq!(admitted(&shedder), 1000 - 665);
        confirm(&shedder, 20, &[10]).await;
        assert_eq!(admitted(&shedder), 1000);
        // One quick answer in a while shows that the delay does not stand.
        for _ in 0..20 {
            shedder.confirmed(Duration::from_millis(10));
            advance(WINDOW).await;
            shedder.confirmed(Duration::from_millis(900));
        }
        assert_eq!(admitted(&shedder), 1000);
    }

    #[tokio::test(start_paused = true)]
    async fn what_was_long_ago_is_forgotten_and_0_turns_it_off() {
        let slow = shedder(100);
        confirm(&slow, 10, &[500]).await;
        assert_eq!(admitted(&slow), 500);
        assert!(slow.is_shedding());
        advance(FORGET_AFTER).await;
        // Also where nobody comes any more.
        slow.forget();
        assert_eq!((slow.is_shedding(), slow.metrics.queue_shed_permille.get()), (false, 0));
        confirm(&slow, 10, &[500]).await;
        advance(FORGET_AFTER).await;
        assert_eq!(admitted(&slow), 1000);
        let off = shedder(0);
        confirm(&off, 10, &[5000]).await;
        assert_eq!(admitted(&off), 1000);
    }
}
