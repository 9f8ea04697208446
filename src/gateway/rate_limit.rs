//! Rate limits: which of them a request counts against, what they say, and how the client is told.
//!
//! The count is shared by all nodes through the [`LimitStore`]. Without one (a single machine), or while it is
//! away and the limit says so, a `governor` bucket in this process counts instead.

use super::api_key::Caller;
use crate::api::ApiError;
use crate::backend::{Decision, LimitStore};
use crate::config::{Identity, LimitConf, OnRedisLoss};
use crate::metrics::Metrics;
use governor::clock::{Clock, DefaultClock};
use governor::middleware::StateInformationMiddleware;
use governor::state::keyed::DashMapStateStore;
use http::header::{HeaderName, HeaderValue};
use std::fmt::Write;
use std::net::IpAddr;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

/// Most identities counted in this process, per limit; more share one bucket, so that memory is bounded and
/// nobody is let through uncounted.
const LOCAL_IDENTITIES_MAX: usize = 100_000;
const OVERFLOW: &str = "(overflow)";

type LocalLimiter =
    governor::RateLimiter<String, DashMapStateStore<String>, DefaultClock, StateInformationMiddleware>;

/// All limits of the configuration.
pub struct RateLimiter {
    limits: Vec<Limit>,
    shared: Option<Arc<dyn LimitStore>>,
    metrics: Arc<Metrics>,
}

struct Limit {
    conf: LimitConf,
    local: LocalLimiter,
}

impl RateLimiter {
    pub fn new(conf: &[LimitConf], shared: Option<Arc<dyn LimitStore>>, metrics: Arc<Metrics>) -> Self {
        let limits = conf.iter().cloned().map(Limit::new).collect();
        Self { limits, shared, metrics }
    }

    /// Counts one request of `caller` on `route` against every limit that holds there.
    pub async fn check(
        &self,
        route: &str,
        caller: &Caller,
        client: Option<IpAddr>,
    ) -> Result<LimitHeaders, ApiError> {
        let limits: Vec<(&Limit, String)> = self
            .limits
            .iter()
            .filter(|limit| limit.conf.routes.iter().any(|r| r == route))
            .filter_map(|limit| Some((limit, limit.identity(caller, client)?)))
            .collect();
        if limits.is_empty() {
            return Ok(LimitHeaders::default());
        }
        let (decisions, source) = self.decide(&limits).await?;
        let allowed = decisions.iter().all(|d| d.allowed);
        let decision = if allowed { "allowed" } else { "limited" };
        self.metrics.limiter.with_label_values(&[decision, source]).inc();
        let headers =
            LimitHeaders { limits: limits.iter().map(|(l, _)| l.conf.clone()).zip(decisions).collect() };
        if allowed { Ok(headers) } else { Err(headers.refusal()) }
    }

    async fn decide(&self, limits: &[(&Limit, String)]) -> Result<(Vec<Decision>, &'static str), ApiError> {
        let Some(shared) = &self.shared else { return Ok((local(limits), "local")) };
        let buckets: Vec<_> =
            limits.iter().map(|(l, who)| (format!("{}:{who}", l.conf.name), l.conf.quota())).collect();
        match shared.take(&buckets).await {
            Ok(decisions) => Ok((decisions, "shared")),
            // Redis being away is logged by the pump; a line for each request would only drown that one.
            Err(_) if limits.iter().any(|(l, _)| l.conf.on_redis_loss == OnRedisLoss::Closed) => {
                self.metrics.limiter.with_label_values(&["limited", "closed"]).inc();
                Err(ApiError::LimiterAway)
            }
            Err(_) => Ok((local(limits), "local")),
        }
    }
}

fn local(limits: &[(&Limit, String)]) -> Vec<Decision> {
    limits.iter().map(|(limit, who)| limit.take_local(who)).collect()
}

impl Limit {
    fn new(conf: LimitConf) -> Self {
        let burst = NonZeroU32::new(conf.burst).unwrap_or(NonZeroU32::MIN);
        let interval = (conf.quota().period / conf.rate.max(1)).max(Duration::from_nanos(1));
        let quota = governor::Quota::with_period(interval)
            .unwrap_or_else(|| governor::Quota::per_second(burst))
            .allow_burst(burst);
        let local = governor::RateLimiter::dashmap(quota).with_middleware::<StateInformationMiddleware>();
        Self { conf, local }
    }

    /// `None`: there is nothing to count by.
    fn identity(&self, caller: &Caller, client: Option<IpAddr>) -> Option<String> {
        match self.conf.identity {
            Identity::Key => Some(caller.key_name.to_string()),
            Identity::Ip => client.map(|ip| ip.to_canonical().to_string()),
        }
    }

    fn take_local(&self, who: &str) -> Decision {
        if self.local.len() >= LOCAL_IDENTITIES_MAX {
            self.local.retain_recent();
        }
        let who = if self.local.len() >= LOCAL_IDENTITIES_MAX { OVERFLOW } else { who };
        match self.local.check_key(&who.to_owned()) {
            Ok(state) => {
                let remaining = state.remaining_burst_capacity();
                Decision { allowed: true, remaining, retry_after: Duration::ZERO }
            }
            Err(until) => {
                let retry_after = until.wait_time_from(DefaultClock::default().now());
                Decision { allowed: false, remaining: 0, retry_after }
            }
        }
    }
}

/// What the client is told of the limits its request counted against.
#[derive(Debug, Default)]
pub struct LimitHeaders {
    limits: Vec<(LimitConf, Decision)>,
}

impl LimitHeaders {
    /// The header fields of CONTRACT §2: the old `X-RateLimit-*` of the tightest limit, and `RateLimit` and
    /// `RateLimit-Policy` (IETF draft) of all.
    pub fn into_fields(self) -> Vec<(HeaderName, HeaderValue)> {
        let Some((tightest, decision)) = self.limits.iter().min_by_key(|(_, d)| (d.allowed, d.remaining))
        else {
            return Vec::new();
        };
        let (mut state, mut policy) = (String::new(), String::new());
        for (limit, d) in &self.limits {
            let sep = if state.is_empty() { "" } else { ", " };
            // Writing to a String cannot fail.
            let _ =
                write!(state, "{sep}\"{}\";r={};t={}", limit.name, d.remaining, seconds_up(limit.refill(d)));
            let _ = write!(policy, "{sep}\"{}\";q={};w={}", limit.name, limit.rate, limit.period_s);
        }
        let mut fields = vec![
            (HeaderName::from_static("x-ratelimit-limit"), tightest.burst.into()),
            (HeaderName::from_static("x-ratelimit-remaining"), decision.remaining.into()),
        ];
        for (name, value) in [("ratelimit", state), ("ratelimit-policy", policy)] {
            fields.extend(HeaderValue::try_from(value).ok().map(|v| (HeaderName::from_static(name), v)));
        }
        fields
    }

    fn refusal(self) -> ApiError {
        let wait = self.limits.iter().map(|(_, d)| d.retry_after).max().unwrap_or_default();
        ApiError::RateLimited { retry_after_s: seconds_up(wait).max(1), headers: self.into_fields() }
    }
}

impl LimitConf {
    /// Until the bucket would be full again.
    fn refill(&self, decision: &Decision) -> Duration {
        let used = self.burst.saturating_sub(decision.remaining);
        self.quota().period.mul_f64(f64::from(used) / f64::from(self.rate.max(1)))
    }
}

/// Whole seconds, rounded up: a client that waits as told must not be refused again.
fn seconds_up(duration: Duration) -> u64 {
    duration.as_secs() + u64::from(duration.subsec_nanos() > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{BackendError, Quota};
    use async_trait::async_trait;

    fn conf(name: &str, identity: Identity, burst: u32, on_redis_loss: OnRedisLoss) -> LimitConf {
        let routes = vec!["/run".to_owned()];
        LimitConf { name: name.into(), identity, routes, rate: 60, period_s: 60, burst, on_redis_loss }
    }

    fn limiter(conf: &[LimitConf], shared: Option<Arc<dyn LimitStore>>) -> RateLimiter {
        RateLimiter::new(conf, shared, Arc::new(Metrics::new(1).unwrap()))
    }

    fn caller(name: &str) -> Caller {
        Caller { key_name: name.into() }
    }

    fn field<'a>(fields: &'a [(HeaderName, HeaderValue)], name: &str) -> &'a str {
        fields.iter().find(|(n, _)| n == name).map(|(_, v)| v.to_str().unwrap()).unwrap()
    }

    #[tokio::test]
    async fn a_key_is_limited_and_told_so() {
        let limiter = limiter(&[conf("k", Identity::Key, 2, OnRedisLoss::Local)], None);
        for remaining in ["1", "0"] {
            let fields = limiter.check("/run", &caller("a"), None).await.unwrap().into_fields();
            assert_eq!(field(&fields, "x-ratelimit-limit"), "2");
            assert_eq!(field(&fields, "x-ratelimit-remaining"), remaining);
            assert_eq!(field(&fields, "ratelimit-policy"), "\"k\";q=60;w=60");
        }
        let Err(ApiError::RateLimited { retry_after_s, headers }) =
            limiter.check("/run", &caller("a"), None).await
        else {
            panic!("refused")
        };
        assert_eq!((retry_after_s, field(&headers, "ratelimit")), (1, "\"k\";r=0;t=2"));
        assert!(limiter.check("/run", &caller("b"), None).await.is_ok(), "another key has its own bucket");
        assert!(limiter.check("/status/:jobId", &caller("a"), None).await.is_ok(), "another route is free");
    }

    #[tokio::test]
    async fn addresses_are_counted_apart() {
        let limiter = limiter(&[conf("ip", Identity::Ip, 1, OnRedisLoss::Local)], None);
        let one = Some("127.0.0.1".parse().unwrap());
        assert!(limiter.check("/run", &caller("a"), one).await.is_ok());
        assert!(
            limiter.check("/run", &caller("b"), Some("::ffff:127.0.0.1".parse().unwrap())).await.is_err()
        );
        assert!(limiter.check("/run", &caller("a"), Some("127.0.0.2".parse().unwrap())).await.is_ok());
    }

    struct Away;

    #[async_trait]
    impl LimitStore for Away {
        async fn take(&self, _: &[(String, Quota)]) -> Result<Vec<Decision>, BackendError> {
            Err(BackendError::Unavailable("away".into()))
        }
    }

    #[tokio::test]
    async fn without_the_shared_count_a_limit_does_as_configured() {
        let open = limiter(&[conf("k", Identity::Key, 1, OnRedisLoss::Local)], Some(Arc::new(Away)));
        assert!(open.check("/run", &caller("a"), None).await.is_ok());
        assert!(matches!(open.check("/run", &caller("a"), None).await, Err(ApiError::RateLimited { .. })));
        let closed = limiter(&[conf("k", Identity::Key, 1, OnRedisLoss::Closed)], Some(Arc::new(Away)));
        assert!(matches!(closed.check("/run", &caller("a"), None).await, Err(ApiError::LimiterAway)));
    }
}
