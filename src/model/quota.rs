//! A rate limit as numbers.

use std::time::Duration;

/// A rate limit: `rate` requests each `period`, with up to `burst` at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Quota {
    pub rate: u32,
    pub period: Duration,
    pub burst: u32,
}

impl Quota {
    /// What drains from a bucket in a microsecond and what a request costs, in the smallest whole numbers that stand
    /// in the quota's proportion. A period counts in whole microseconds, and no quota is slower than one request
    /// in it.
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
