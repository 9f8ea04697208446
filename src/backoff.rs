//! Exponential backoff with jitter, for every retry of this process.

use crate::ambient;
use rand::Rng;
use std::time::Duration;

/// The pauses between attempts: they double from `first` to `max`.
///
/// Each pause is multiplied by a random factor from 0.5 to 1 ("equal jitter"), so that nodes that failed
/// together do not retry together.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    first: Duration,
    max: Duration,
}

impl Backoff {
    pub const fn new(first: Duration, max: Duration) -> Self {
        Self { first, max }
    }

    /// The pause after the failed attempt with this number, from 1.
    pub fn pause(self, attempt: u32) -> Duration {
        let doublings = attempt.saturating_sub(1).min(u32::BITS - 1);
        self.first.saturating_mul(1 << doublings).min(self.max).mul_f64(ambient::rng().random_range(0.5..1.0))
    }

    /// Sleeps for [`Self::pause`].
    pub async fn sleep(self, attempt: u32) {
        tokio::time::sleep(self.pause(attempt)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_maximum() {
        let backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(1));
        for (attempt, longest_ms) in
            [(0, 100), (1, 100), (2, 200), (3, 400), (4, 800), (5, 1000), (u32::MAX, 1000)]
        {
            for _ in 0..100 {
                let pause = backoff.pause(attempt);
                let longest = Duration::from_millis(longest_ms);
                assert!(longest / 2 <= pause && pause <= longest, "attempt {attempt}: {pause:?}");
            }
        }
    }
}
