//! The identities that are close to a limit, for the overview of the fleet.
//!
//! Only a decision at 80 % or more of a limit is remembered. All others cost one comparison.

use super::count::{LimitDecision, Source};
use super::limit::Limit;
use super::who::LimitIdentity;
use crate::config::Identity;
use parking_lot::Mutex;
use std::time::Duration;
use tokio::time::Instant;

/// Identities that are remembered. A further one replaces the one that was seen least recently.
const REMEMBERED_MAX: usize = 64;
/// How long an identity counts as close to its limit.
const REMEMBERED_FOR: Duration = Duration::from_secs(60);
/// A limit is nearly exhausted if at most this part of the burst is left: a fifth.
const LEFT_PART: u64 = 5;
/// Number of identities that are reported.
pub const NEAR_LIMITS_MAX: usize = 10;

/// An identity that was recently close to a limit.
#[derive(Clone, Debug, PartialEq)]
pub struct NearLimit {
    /// The name of the limit.
    pub limit: String,
    /// What it counts by: `key`, `ip`, `function` or `global`.
    pub identity: &'static str,
    /// The name of the key, the address, the id of the function, or `(all)`.
    pub name: String,
    /// The used part of the burst at the last such decision, 0.8 to 1.
    pub level: f64,
    /// The time since then.
    pub age: Duration,
}

/// The identities that were recently close to a limit.
#[derive(Default)]
pub struct NearLimits(Mutex<Vec<LastLevel>>);

struct LastLevel {
    limit: String,
    identity: &'static str,
    who: LimitIdentity,
    level: f64,
    at: Instant,
}

impl NearLimits {
    /// Remembers the identity if it has nearly exhausted the limit. `nodes`: the number of nodes among which
    /// the limit is divided while it is counted in this process.
    pub fn note(
        &self,
        limit: &Limit,
        who: &LimitIdentity,
        said: &LimitDecision,
        nodes: impl FnOnce() -> u32,
    ) {
        let left = u64::from(said.decision.remaining);
        if left * LEFT_PART > u64::from(limit.quota.burst) {
            return;
        }
        let share = if matches!(said.source, Source::Local) { nodes().max(1) } else { 1 };
        let burst = u64::from((limit.quota.burst / share).max(1));
        if left * LEFT_PART > burst {
            return;
        }
        // A client may send many requests beyond its limit at once. They need not all be seen.
        let Some(mut all) = self.0.try_lock() else { return };
        let (level, at) = (1.0 - left as f64 / burst as f64, Instant::now());
        let known = all.iter_mut().find(|known| known.who == *who && known.limit == limit.conf.name);
        if let Some(known) = known {
            (known.level, known.at) = (level, at);
            return;
        }
        if all.len() >= REMEMBERED_MAX
            && let Some(oldest) = (0..all.len()).min_by_key(|n| all[*n].at)
        {
            all.swap_remove(oldest);
        }
        let (limit, identity) = (limit.conf.name.clone(), name_of(limit.conf.identity));
        all.push(LastLevel { limit, identity, who: who.clone(), level, at });
    }

    /// The identities that were seen within the last minute, at most [`NEAR_LIMITS_MAX`], the highest first.
    pub fn highest(&self) -> Vec<NearLimit> {
        let mut all = self.0.lock();
        all.retain(|near| near.at.elapsed() < REMEMBERED_FOR);
        let shown = |near: &LastLevel| NearLimit {
            limit: near.limit.clone(),
            identity: near.identity,
            name: near.who.to_string(),
            level: near.level,
            age: near.at.elapsed(),
        };
        let mut highest: Vec<NearLimit> = all.iter().map(shown).collect();
        drop(all);
        highest.sort_by(|a, b| b.level.total_cmp(&a.level).then_with(|| a.name.cmp(&b.name)));
        highest.truncate(NEAR_LIMITS_MAX);
        highest
    }
}

/// The name of the identity in `limits.toml`.
fn name_of(identity: Identity) -> &'static str {
    match identity {
        Identity::Key => "key",
        Identity::Ip => "ip",
        Identity::Function => "function",
        Identity::Global => "global",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{LimitConf, LimitMode, OnRedisLoss};
    use tokio::time::advance;

    fn limit(burst: u32) -> Limit {
        Limit::new(LimitConf {
            name: "api-key".to_owned(),
            identity: Identity::Key,
            mode: LimitMode::default(),
            routes: vec!["/run".to_owned()],
            rate: 10,
            period_s: 1,
            burst,
            on_redis_loss: OnRedisLoss::Local,
        })
    }

    fn key(name: &str) -> LimitIdentity {
        LimitIdentity::Key(name.into())
    }

    fn levels(near: &NearLimits) -> Vec<(String, f64)> {
        near.highest().into_iter().map(|near| (near.name, near.level)).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn only_levels_near_the_limit_are_remembered_for_a_minute() {
        let (near, limit) = (NearLimits::default(), limit(100));
        let note = |name: &str, remaining, source| {
            near.note(&limit, &key(name), &LimitDecision::allowed(remaining, source), || 4);
        };
        note("a", 21, Source::Lease);
        assert_eq!(levels(&near), []);
        note("a", 20, Source::Lease);
        note("b", 0, Source::Exact);
        // The share of one of four nodes is 25.
        note("c", 6, Source::Local);
        note("d", 5, Source::Local);
        let expected = [("b", 1.0), ("a", 0.8), ("d", 0.8)].map(|(name, level)| (name.to_owned(), level));
        assert_eq!(levels(&near), expected);
        advance(REMEMBERED_FOR / 2).await;
        note("a", 10, Source::Lease);
        assert_eq!(near.highest()[1].age, Duration::ZERO);
        advance(REMEMBERED_FOR / 2).await;
        assert_eq!(levels(&near), [("a".to_owned(), 0.9)]);
        let found = near.highest().remove(0);
        assert_eq!((found.limit.as_str(), found.identity), ("api-key", "key"));
    }

    #[tokio::test(start_paused = true)]
    async fn identities_are_bounded() {
        let (near, limit) = (NearLimits::default(), limit(1));
        for n in 0..2 * REMEMBERED_MAX {
            near.note(&limit, &key(&n.to_string()), &LimitDecision::refused(1, Source::Lease), || 1);
            advance(Duration::from_millis(1)).await;
        }
        assert_eq!(near.0.lock().len(), REMEMBERED_MAX);
        assert_eq!(near.highest().len(), NEAR_LIMITS_MAX);
        assert!(near.0.lock().iter().all(|near| near.who != key("0")), "the oldest are replaced");
    }
}
