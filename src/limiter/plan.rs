//! The limits that apply to a request, by route and API key.

use super::limit::Limit;
use crate::config::{Identity, KeyConf, KeyLimitConf, LimitConf, LimitMode, OnRedisLoss};
use ahash::AHashMap;
use bytes::Bytes;
use std::sync::Arc;

/// The limits of one route.
pub struct Plan {
    /// Those that are counted before the body is read come first.
    pub limits: Vec<Arc<Limit>>,
    /// The number of limits that are counted before the body is read.
    pub early: usize,
    /// The values of `RateLimit-Policy` for all limits, and for the early ones.
    pub policy: Option<Bytes>,
    pub policy_early: Option<Bytes>,
}

pub struct Plans {
    pub limits: Vec<Arc<Limit>>,
    pub by_route: ByRoute,
    /// The limits of keys that have their own, by the name of the key.
    pub own: AHashMap<String, Own>,
}

pub type ByRoute = AHashMap<String, Arc<Plan>>;

/// The limits of a key that has its own.
pub struct Own {
    /// They replace the shared limits by key. All other limits apply to every key.
    pub limits: Vec<Arc<Limit>>,
    pub by_route: ByRoute,
}

impl Plans {
    /// Reuses the unchanged limits of `old`, with their counts.
    pub fn new(conf: &[LimitConf], keys: &[KeyConf], old: Option<&Self>) -> Self {
        let limits = made(conf, old.map_or(&[], |old| &old.limits));
        let by_route = by_route(&limits);
        let mut own = AHashMap::new();
        for key in keys {
            let Some(numbers) = key.limit else { continue };
            let before = old.and_then(|old| old.own.get(&key.name));
            let conf = own_conf(conf, numbers);
            let own_limits = made(&conf, before.map_or(&[], |own| &own.limits));
            let others = limits.iter().filter(|limit| limit.conf.identity != Identity::Key).cloned();
            let all: Vec<_> = own_limits.iter().cloned().chain(others).collect();
            own.insert(key.name.clone(), Own { limits: own_limits, by_route: self::by_route(&all) });
        }
        Self { limits, by_route, own }
    }

    pub fn of(&self, key_name: Option<&Arc<str>>, route: &str) -> Option<Arc<Plan>> {
        let own = if self.own.is_empty() { None } else { key_name.and_then(|name| self.own.get(&**name)) };
        own.map_or(&self.by_route, |own| &own.by_route).get(route).map(Arc::clone)
    }

    pub fn all(&self) -> impl Iterator<Item = &Arc<Limit>> {
        self.limits.iter().chain(self.own.values().flat_map(|own| &own.limits))
    }
}

fn made(conf: &[LimitConf], old: &[Arc<Limit>]) -> Vec<Arc<Limit>> {
    let same = |conf: &LimitConf| old.iter().find(|limit| limit.conf == *conf).map(Arc::clone);
    conf.iter().map(|conf| same(conf).unwrap_or_else(|| Arc::new(Limit::new(conf.clone())))).collect()
}

fn by_route(limits: &[Arc<Limit>]) -> ByRoute {
    let routes = limits.iter().flat_map(|limit| &limit.conf.routes);
    routes.map(|route| (route.clone(), Arc::new(Plan::new(route, limits)))).collect()
}

/// The limits by key with the numbers of one key. If there are none, one limit on the routes of the shipped
/// configuration.
fn own_conf(conf: &[LimitConf], numbers: KeyLimitConf) -> Vec<LimitConf> {
    let KeyLimitConf { rate, period_s, burst } = numbers;
    let mut own: Vec<_> = conf.iter().filter(|limit| limit.identity == Identity::Key).cloned().collect();
    if own.is_empty() {
        own.push(LimitConf {
            name: "api-key".to_owned(),
            identity: Identity::Key,
            mode: LimitMode::default(),
            routes: vec!["/run".to_owned(), "/upload".to_owned()],
            rate,
            period_s,
            burst,
            on_redis_loss: OnRedisLoss::Local,
        });
    }
    for limit in &mut own {
        (limit.rate, limit.period_s, limit.burst) = (rate, period_s, burst);
    }
    own
}

impl Plan {
    pub fn new(route: &str, limits: &[Arc<Limit>]) -> Self {
        let here = limits.iter().filter(|limit| limit.conf.routes.iter().any(|r| r == route)).map(Arc::clone);
        let (late, early): (Vec<_>, Vec<_>) =
            here.partition(|limit| limit.conf.identity == Identity::Function);
        let (count, policy_early) = (early.len(), policy(early.iter()));
        let limits = [early, late].concat();
        let policy = policy(limits.iter());
        Self { limits, early: count, policy, policy_early }
    }
}

/// The value of `RateLimit-Policy` for some limits (IETF draft-ietf-httpapi-ratelimit-headers). `None`: no
/// limits.
#[expect(single_use_lifetimes, reason = "an anonymous lifetime is not stable in this position")]
pub fn policy<'a>(limits: impl Iterator<Item = &'a Arc<Limit>>) -> Option<Bytes> {
    let quota = |limit: &Arc<Limit>| {
        let LimitConf { name, rate, period_s, .. } = &limit.conf;
        format!("\"{name}\";q={rate};w={period_s}")
    };
    let all: Vec<String> = limits.map(quota).collect();
    (!all.is_empty()).then(|| all.join(", ").into())
}
