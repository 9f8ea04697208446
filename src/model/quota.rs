//! The numbers of a rate limit, in the form that the limiter and its stores compute with.

use std::time::Duration;

/// A rate limit: `rate` requests per `period`, and at most `burst` at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Quota {
    pub rate: u32,
    pub period: Duration,
    pub burst: u32,
}

impl Quota {
    /// The amount that drains from a bucket per microsecond, and the cost of one request, as reduced whole
    /// numbers. So no computation rounds. The period is cut to whole microseconds, at least one. A rate of 0
    /// counts as 1.
    pub fn drain(&self) -> (u64, u64) {
        let rate = u64::from(self.rate.max(1));
        let period = u64::try_from(self.period.as_micros()).unwrap_or(u64::MAX).max(1);
        let divisor = gcd(rate, period);
        (rate / divisor, period / divisor)
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotas_are_reduced() {
        for (rate, period_s, reduced) in [
            (3000, 60, (1, 20_000)),
            (7, 1, (7, 1_000_000)),
            (0, 1, (1, 1_000_000)),
            (100_000, 86_400, (1, 864_000)),
        ] {
            let quota = Quota { rate, period: Duration::from_secs(period_s), burst: 1 };
            assert_eq!(quota.drain(), reduced);
        }
    }
}
