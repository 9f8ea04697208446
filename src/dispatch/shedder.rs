//! Sheds load while the queue confirms jobs too slowly.
//!
//! A slow queue makes all clients wait until none is served in time. So when even the fastest confirmation in
//! a window exceeds the target, a growing share of the jobs is rejected immediately; otherwise the share
//! shrinks. The signal is a standing delay, as in CoDel (RFC 8289), because a burst delays only some jobs.
//! The share grows additively and shrinks multiplicatively, so that many nodes converge to a common share.

use crate::ambient;
use crate::config::{Live, OverloadConf};
use crate::metrics::Metrics;
use parking_lot::Mutex;
use rand::Rng;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// The window over which the fastest confirmation is taken.
const WINDOW: Duration = Duration::from_millis(100);
/// After this time without a confirmation the state of the queue counts as unknown.
const FORGET_AFTER: Duration = Duration::from_secs(2);
/// In thousandths: the increase of the share after a slow window; the factor applied after a fast one; and
/// the maximum share. The remaining jobs show how the queue performs.
const STEP: u32 = 50;
const LEFT: u32 = 700;
const MOST: u32 = 950;

pub struct Shedder {
    conf: Live<OverloadConf>,
    /// The share of rejected jobs, in thousandths. Beside the lock, because every job reads it.
    part: AtomicU32,
    window: Mutex<Window>,
    metrics: Arc<Metrics>,
}

struct Window {
    began: Instant,
    /// The fastest confirmation in this window.
    least: Option<Duration>,
    /// The fastest confirmation in the window before.
    last: Duration,
}

impl Shedder {
    pub fn new(conf: Live<OverloadConf>, metrics: Arc<Metrics>) -> Self {
        let window = Mutex::new(Window { began: Instant::now(), least: None, last: Duration::ZERO });
        Self { conf, part: AtomicU32::new(0), window, metrics }
    }

    /// Decides whether a job may proceed.
    ///
    /// # Errors
    /// The current confirmation latency, if the job should be shed.
    pub fn admit(&self) -> Result<(), Duration> {
        self.admit_if(|| ambient::rng().random_range(0..1000))
    }

    fn admit_if(&self, draw: impl FnOnce() -> u32) -> Result<(), Duration> {
        let part = self.part.load(Ordering::Relaxed);
        if part == 0 || draw() >= part {
            return Ok(());
        }
        self.forget();
        if self.is_shedding() { Err(self.window.lock().last) } else { Ok(()) }
    }

    /// Whether jobs are being rejected, so that [`Self::forget`] may have something to do.
    pub fn is_shedding(&self) -> bool {
        self.part.load(Ordering::Relaxed) > 0
    }

    /// Stops shedding if nothing was confirmed for `FORGET_AFTER`, or if shedding is switched off.
    pub fn forget(&self) {
        if self.window.lock().began.elapsed() >= FORGET_AFTER || self.target().is_zero() {
            self.set(0);
        }
    }

    /// Records that jobs were confirmed; `after` is the latency of the youngest of them.
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
    async fn a_standing_delay_causes_shedding_and_a_burst_does_not() {
        let shedder = shedder(100);
        confirm(&shedder, 5, &[90]).await;
        assert_eq!(admitted(&shedder), 1000);
        confirm(&shedder, 4, &[150]).await;
        assert_eq!(admitted(&shedder), 800);
        assert_eq!(shedder.admit_if(|| 0), Err(Duration::from_millis(150)));
        confirm(&shedder, 100, &[500]).await;
        assert_eq!(admitted(&shedder), 50, "some jobs are always admitted");
        confirm(&shedder, 1, &[100]).await;
        assert_eq!(admitted(&shedder), 1000 - 665);
        confirm(&shedder, 20, &[10]).await;
        assert_eq!(admitted(&shedder), 1000);
        // One fast confirmation per window shows that the delay is not standing.
        for _ in 0..20 {
            shedder.confirmed(Duration::from_millis(10));
            advance(WINDOW).await;
            shedder.confirmed(Duration::from_millis(900));
        }
        assert_eq!(admitted(&shedder), 1000);
    }

    #[tokio::test(start_paused = true)]
    async fn an_old_state_expires_and_target_0_disables_shedding() {
        let slow = shedder(100);
        confirm(&slow, 10, &[500]).await;
        assert_eq!(admitted(&slow), 500);
        assert!(slow.is_shedding());
        advance(FORGET_AFTER).await;
        // Even if no more jobs arrive.
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
