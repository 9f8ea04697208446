//! Rate limits: which of them a request counts against, and what they say.
//!
//! A limit is counted by all nodes together, in the [`LimitStore`]. *Exact*, the store is asked on every request.
//! *Leased*, the node takes tokens in advance and spends them without asking (see [`lease`]); refusals are remembered, so
//! that a storm of refused requests asks nobody either. Where nothing is shared (a single machine), or while the store is
//! away and leases are spent, a bucket in this process counts, or nobody is let through, as the limit says.
//!
//! A request counts against a route's limits in two steps: those by key, address and all together before its body is
//! read, those by function when the body has told which. Within a step a request counts against all limits or none; what the
//! first step took stays taken if the second refuses.
//!
//! In reading order: [`who`] is counted; [`limit`], [`lease`], [`leaser`], [`store`]: the shared count; [`local`]: the
//! other; [`state`] of a request. Apart from all that: [`failures`] to show a key.

mod count;
mod failures;
mod lease;
mod leaser;
mod limit;
mod local;
mod plan;
#[cfg(test)]
mod simulation;
mod state;
mod store;
mod who;

pub use failures::{AuthFailureLimit, TooManyFailures};
pub use leaser::Leaser;
pub use state::{RateLimitState, Rejection, seconds_up};
pub use who::block_of;

use crate::backend::LimitStore;
use crate::config::{Identity, KeyConf, LimitConf, LimitMode, OnRedisLoss};
use crate::metrics::Metrics;
use crate::model::FunctionId;
use arc_swap::ArcSwap;
use count::{DecisionCounters, LimitDecision, Source, Step};
use lease::{Micros, Verdict};
use leaser::{DUE_MAX, DueCall, Swept};
use limit::{Limit, OnEmpty, TakeOutcome};
use plan::{Plan, Plans};
use std::net::IpAddr;
use std::sync::Arc;
use store::SharedStore;
use tokio::sync::mpsc;
use who::{LimitIdentity, Subject};

/// All limits of the configuration; cheap to clone.
#[derive(Clone)]
pub struct RateLimiter(Arc<LimiterState>);

struct LimiterState {
    plans: ArcSwap<Plans>,
    store: Arc<SharedStore>,
    due: mpsc::Sender<DueCall>,
    swept: Swept,
    counters: DecisionCounters,
}

impl RateLimiter {
    /// `shared`: where all nodes count together, if they do.
    pub fn new(
        conf: &[LimitConf],
        keys: &[KeyConf],
        shared: Option<Arc<dyn LimitStore>>,
        metrics: Arc<Metrics>,
    ) -> (Self, Leaser) {
        let counters = DecisionCounters::new(&metrics);
        let store = Arc::new(SharedStore::new(shared, metrics));
        let (due, dues) = mpsc::channel(DUE_MAX);
        let swept = Swept::default();
        let leaser = Leaser { due: dues, store: Arc::clone(&store), limits: Arc::clone(&swept) };
        let plans = ArcSwap::from_pointee(Plans::new(conf, keys, None));
        let limiter = Self(Arc::new(LimiterState { plans, store, due, swept, counters }));
        limiter.0.have_swept();
        (limiter, leaser)
    }

    /// Puts other limits in force. A limit that stays as it is keeps its leases; one whose numbers change goes on with the
    /// count of the shared store, as a holder of its own: what was leased before may be spent until it expires.
    pub fn set_conf(&self, conf: &[LimitConf], keys: &[KeyConf]) {
        let plans = Plans::new(conf, keys, Some(&self.0.plans.load()));
        self.0.plans.store(Arc::new(plans));
        self.0.have_swept();
    }

    /// Counts a request against the limits of `route` that need no body. What they say goes into `counted`. Limits by key
    /// pass over a request that shows none. `client` is asked only if a limit is by address.
    pub async fn check(
        &self,
        route: &str,
        key_name: Option<&Arc<str>>,
        client: impl FnOnce() -> Option<IpAddr>,
        counted: &mut RateLimitState,
    ) -> Result<(), Rejection> {
        let Some(plan) = self.0.plans.load().of(key_name, route) else { return Ok(()) };
        let mut step = Step::default();
        let by_address = plan.limits.iter().any(|limit| limit.conf.identity == Identity::Ip);
        let subject = Subject::Caller { key_name, client: by_address.then(client).flatten() };
        let result = self.0.count(&plan, 0, plan.early, subject, &mut step).await;
        *counted = RateLimitState::early(plan, step.decisions);
        result
    }

    /// Counts the same request against the limits by function.
    pub async fn check_function(
        &self,
        function: &FunctionId,
        counted: &RateLimitState,
    ) -> Result<(), Rejection> {
        let Some(plan) = counted.plan_with_late_limits() else { return Ok(()) };
        let mut step = Step::default();
        let subject = Subject::Function(function);
        let result = self.0.count(plan, plan.early, plan.limits.len(), subject, &mut step).await;
        counted.set_late(step.decisions);
        result
    }
}

impl LimiterState {
    fn have_swept(&self) {
        *self.swept.lock() = self.plans.load().all().map(Arc::downgrade).collect();
    }

    /// Counts against the limits `from..to` of the plan: against all of them or none.
    async fn count(
        &self,
        plan: &Plan,
        from: usize,
        to: usize,
        subject: Subject<'_>,
        step: &mut Step,
    ) -> Result<(), Rejection> {
        for (n, limit) in plan.limits.iter().enumerate().take(to).skip(from) {
            let Some(who) = subject.who(limit.conf.identity) else { continue };
            if limit.conf.mode == LimitMode::Exact && self.store.is_shared() {
                step.exact.push((n, who));
                continue;
            }
            let Some(said) = self.take(limit, &who).await else { return self.refuse_unasked(plan, step) };
            self.note(n, &said, step);
            if !said.decision.allowed {
                return self.refuse(plan, step);
            }
            step.spent.extend(said.lease.map(|seq| (n, who, seq)));
        }
        if step.exact.is_empty() {
            return Ok(());
        }
        let Some(all) = self.take_exact(plan, step).await else { return self.refuse_unasked(plan, step) };
        for (n, said) in &all {
            self.note(*n, said, step);
        }
        if all.iter().all(|(_, said)| said.decision.allowed) { Ok(()) } else { self.refuse(plan, step) }
    }

    fn note(&self, n: usize, said: &LimitDecision, step: &mut Step) {
        self.counters.count(said.source, said.decision.allowed);
        step.decisions.push((n, said.decision));
    }

    fn refuse(&self, plan: &Plan, step: &mut Step) -> Result<(), Rejection> {
        self.refund(plan, step);
        let wait = step.decisions.iter().map(|(_, d)| d.retry_after).max().unwrap_or_default();
        Err(Rejection::Limited { retry_after_s: seconds_up(wait).max(1) })
    }

    fn refuse_unasked(&self, plan: &Plan, step: &mut Step) -> Result<(), Rejection> {
        self.counters.count(Source::Closed, false);
        self.refund(plan, step);
        Err(Rejection::Away)
    }

    fn refund(&self, plan: &Plan, step: &mut Step) {
        for (n, who, seq) in step.spent.drain(..) {
            if let Some(limit) = plan.limits.get(n) {
                limit.refund(&who, seq, self.store.now());
            }
        }
    }

    /// One request of a limit that is counted by leases, or in this process. `None`: it cannot be counted, and so
    /// must not be let through.
    async fn take(&self, limit: &Arc<Limit>, who: &LimitIdentity) -> Option<LimitDecision> {
        if !self.store.is_shared() {
            return Some(Self::local(limit, who, 1));
        }
        let now = self.store.now();
        match limit.try_take(who, now, || self.on_empty(now)) {
            TakeOutcome::Allowed { remaining, seq, call } => {
                if call {
                    self.call(limit, who);
                }
                Some(LimitDecision { lease: Some(seq), ..LimitDecision::allowed(remaining, Source::Lease) })
            }
            TakeOutcome::Refused { retry } => Some(LimitDecision::refused(retry, Source::RefusalMemory)),
            TakeOutcome::Waiting { verdict, call } => {
                if call {
                    self.call(limit, who);
                }
                match verdict.await {
                    Ok(Verdict::Allowed { remaining }) => {
                        Some(LimitDecision::allowed(remaining, Source::Lease))
                    }
                    Ok(Verdict::Refused { retry }) => Some(LimitDecision::refused(retry, Source::Lease)),
                    Ok(Verdict::Away) | Err(_) => self.without_store(limit, who),
                }
            }
            TakeOutcome::Empty { call } => {
                if call {
                    self.call(limit, who);
                }
                self.without_store(limit, who)
            }
            TakeOutcome::TooManyWaiters => self.without_store(limit, who),
            TakeOutcome::Full => self.take_without_lease(limit, who, now).await,
        }
    }

    fn on_empty(&self, now: Micros) -> OnEmpty {
        match self.store.is_away() {
            false => OnEmpty::Wait,
            true if self.store.is_probe_due(now) => OnEmpty::Probe,
            true => OnEmpty::Leave,
        }
    }

    /// Has the call made that is due. Where too many are due already it counts as unanswered.
    fn call(&self, limit: &Arc<Limit>, who: &LimitIdentity) {
        let due = DueCall { limit: Arc::clone(limit), who: who.clone() };
        if self.due.try_send(due).is_err() {
            limit.settle(who, self.store.now(), None);
        }
    }

    async fn take_without_lease(
        &self,
        limit: &Limit,
        who: &LimitIdentity,
        now: Micros,
    ) -> Option<LimitDecision> {
        if self.on_empty(now) == OnEmpty::Leave {
            return self.without_store(limit, who);
        }
        let Some(grant) = self.store.lease(&limit.call_without_lease(who)).await else {
            return self.without_store(limit, who);
        };
        let retry = Micros::try_from(grant.retry_after.as_micros()).unwrap_or(Micros::MAX);
        Some(match grant.taken {
            0 => LimitDecision::refused(retry, Source::Lease),
            _ => LimitDecision::allowed(grant.left, Source::Lease),
        })
    }

    /// All exact limits of the step, in one call.
    async fn take_exact(&self, plan: &Plan, step: &Step) -> Option<Vec<(usize, LimitDecision)>> {
        let limits: Vec<(usize, &Arc<Limit>, &LimitIdentity)> =
            step.exact.iter().filter_map(|(n, who)| Some((*n, plan.limits.get(*n)?, who))).collect();
        if self.on_empty(self.store.now()) != OnEmpty::Leave {
            let buckets: Vec<_> = limits.iter().map(|(_, l, who)| (l.bucket(who), l.quota)).collect();
            if let Some(decisions) = self.store.take(&buckets).await {
                let said = |decision| LimitDecision { decision, source: Source::Exact, lease: None };
                return Some(limits.iter().map(|(n, ..)| *n).zip(decisions.into_iter().map(said)).collect());
            }
        }
        if limits.iter().any(|(_, limit, _)| limit.conf.on_redis_loss == OnRedisLoss::Closed) {
            return None;
        }
        let nodes = self.store.nodes();
        Some(limits.into_iter().map(|(n, limit, who)| (n, Self::local(limit, who, nodes))).collect())
    }

    fn without_store(&self, limit: &Limit, who: &LimitIdentity) -> Option<LimitDecision> {
        match limit.conf.on_redis_loss {
            OnRedisLoss::Local => Some(Self::local(limit, who, self.store.nodes())),
            OnRedisLoss::Closed => None,
        }
    }

    fn local(limit: &Limit, who: &LimitIdentity, nodes: u32) -> LimitDecision {
        LimitDecision { decision: limit.local.take(who, nodes), source: Source::Local, lease: None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Decision;
    use crate::backend::{BackendError, Grant, LeaseCall};
    use crate::config::KeyLimitConf;
    use crate::model::Quota;
    use async_trait::async_trait;
    use http::HeaderName;
    use http::HeaderValue;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
    use std::time::Duration;
    use tokio::time::{advance, sleep};

    fn conf(name: &str, identity: Identity, burst: u32, on_redis_loss: OnRedisLoss) -> LimitConf {
        let (name, routes, mode) = (name.into(), vec!["/run".to_owned()], LimitMode::Leased);
        LimitConf { name, identity, mode, routes, rate: 60, period_s: 60, burst, on_redis_loss }
    }

    /// A limiter whose loop runs until the test ends.
    fn limiter(conf: &[LimitConf], shared: Option<Arc<dyn LimitStore>>) -> RateLimiter {
        let (limiter, leaser) = RateLimiter::new(conf, &[], shared, Arc::new(Metrics::new(1).unwrap()));
        #[expect(clippy::disallowed_methods, reason = "no boot here")]
        tokio::spawn(leaser.run());
        limiter
    }

    async fn ask(
        limiter: &RateLimiter,
        key: &str,
        client: Option<&str>,
    ) -> (Result<(), Rejection>, RateLimitState) {
        let mut counted = RateLimitState::default();
        let client = client.map(|ip| ip.parse().unwrap());
        let result = limiter.check("/run", Some(&key.into()), || client, &mut counted).await;
        (result, counted)
    }

    async fn passes(limiter: &RateLimiter, key: &str) -> bool {
        ask(limiter, key, None).await.0.is_ok()
    }

    fn fields(counted: &RateLimitState) -> Vec<(HeaderName, HeaderValue)> {
        let mut fields = Vec::new();
        crate::gateway::rate_limit::add_fields(counted, &mut fields);
        fields
    }

    fn field<'a>(fields: &'a [(HeaderName, HeaderValue)], name: &str) -> &'a str {
        fields.iter().find(|(n, _)| n == name).map(|(_, v)| v.to_str().unwrap()).unwrap()
    }

    /// A bucket that never fills again, and whatever may go wrong with it.
    #[derive(Default)]
    struct Tank {
        tokens: AtomicU32,
        calls: AtomicU32,
        is_away: AtomicBool,
        takes: Duration,
        nodes: u32,
    }

    impl Tank {
        fn of(tokens: u32) -> Self {
            let takes = Duration::from_millis(2);
            Self { tokens: AtomicU32::new(tokens), takes, nodes: 1, ..Self::default() }
        }

        async fn serve(&self) -> Result<(), BackendError> {
            self.calls.fetch_add(1, Ordering::Relaxed);
            sleep(self.takes).await;
            let is_away = self.is_away.load(Ordering::Relaxed);
            if is_away { Err(BackendError::Unavailable("away".into())) } else { Ok(()) }
        }

        fn draw(&self, tokens: u32) -> u32 {
            let there = self.tokens.load(Ordering::Relaxed);
            self.tokens.store(there - tokens.min(there), Ordering::Relaxed);
            tokens.min(there)
        }

        fn calls(&self) -> u32 {
            self.calls.swap(0, Ordering::Relaxed)
        }
    }

    #[tokio::test]
    async fn a_key_may_have_numbers_of_its_own() {
        let key = |burst| KeyConf {
            name: "vip".into(),
            sha256: crate::config::KeyHash([0; 32]),
            scopes: Vec::new(),
            functions: None,
            not_before: None,
            expires: None,
            limit: Some(KeyLimitConf { rate: 1, period_s: 3600, burst }),
            jobs_max: None,
        };
        let shared = [
            conf("a", Identity::Key, 1, OnRedisLoss::Local),
            conf("all", Identity::Global, 6, OnRedisLoss::Local),
        ];
        let limiter = limiter(&shared, None);
        limiter.set_conf(&shared, &[key(3)]);
        assert!(passes(&limiter, "x").await && !passes(&limiter, "x").await);
        for expected in [true, true, true, false] {
            assert_eq!(passes(&limiter, "vip").await, expected);
        }
        // What was counted stays counted while the numbers are the same.
        limiter.set_conf(&shared, &[key(3)]);
        assert!(!passes(&limiter, "vip").await);
        limiter.set_conf(&shared, &[key(9)]);
        assert!(passes(&limiter, "vip").await);
        assert!(passes(&limiter, "vip").await, "the sixth of all");
        assert!(!passes(&limiter, "vip").await, "the limits of all are the key's as well");
    }

    #[async_trait]
    impl LimitStore for Tank {
        async fn take(&self, buckets: &[(String, Quota)]) -> Result<Vec<Decision>, BackendError> {
            self.serve().await?;
            let decide = |_: &_| {
                let allowed = self.draw(1) == 1;
                let remaining = self.tokens.load(Ordering::Relaxed);
                Decision { allowed, remaining, retry_after: Duration::from_secs(u64::from(!allowed)) }
            };
            Ok(buckets.iter().map(decide).collect())
        }

        async fn lease(&self, call: &LeaseCall) -> Result<Grant, BackendError> {
            self.serve().await?;
            self.tokens.fetch_add(call.back, Ordering::Relaxed);
            let taken = self.draw(call.need);
            let half = self.tokens.load(Ordering::Relaxed) / 2;
            let amount = call.held + self.draw(call.want.min(half));
            let left = self.tokens.load(Ordering::Relaxed);
            let retry_after = if left == 0 { Duration::from_secs(1) } else { Duration::ZERO };
            Ok(Grant { applied: true, amount, taken, left, retry_after, nodes: self.nodes })
        }
    }

    #[tokio::test]
    async fn a_key_is_limited_and_told_so() {
        let limiter = limiter(&[conf("k", Identity::Key, 2, OnRedisLoss::Local)], None);
        for remaining in ["1", "0"] {
            let (result, counted) = ask(&limiter, "a", None).await;
            let fields = fields(&counted);
            assert_eq!(result, Ok(()));
            assert_eq!(field(&fields, "x-ratelimit-limit"), "2");
            assert_eq!(field(&fields, "x-ratelimit-remaining"), remaining);
            assert_eq!(field(&fields, "ratelimit-policy"), "\"k\";q=60;w=60");
        }
        let (result, counted) = ask(&limiter, "a", None).await;
        assert_eq!(result, Err(Rejection::Limited { retry_after_s: 1 }));
        assert_eq!(field(&fields(&counted), "ratelimit"), "\"k\";r=0;t=2");
        assert!(passes(&limiter, "b").await, "another key has its own bucket");
        let mut counted = RateLimitState::default();
        let free = limiter.check("/status/:jobId", Some(&"a".into()), || None, &mut counted).await;
        assert_eq!((free, fields(&counted)), (Ok(()), vec![]), "another route is free");
    }

    #[tokio::test]
    async fn both_steps_stand_in_the_fields() {
        let by_function = conf("f", Identity::Function, 1, OnRedisLoss::Local);
        let all = [
            by_function,
            conf("k", Identity::Key, 9, OnRedisLoss::Local),
            conf("g", Identity::Global, 5, OnRedisLoss::Local),
        ];
        let limiter = limiter(&all, None);
        let function = FunctionId::parse("fn-1").unwrap();
        for (result, state) in [
            (Ok(()), "\"k\";r=8;t=1, \"g\";r=4;t=1, \"f\";r=0;t=1"),
            (Err(Rejection::Limited { retry_after_s: 1 }), "\"k\";r=7;t=2, \"g\";r=3;t=2, \"f\";r=0;t=1"),
        ] {
            let (early, counted) = ask(&limiter, "a", None).await;
            assert_eq!(early, Ok(()));
            assert_eq!(field(&fields(&counted), "ratelimit-policy"), "\"k\";q=60;w=60, \"g\";q=60;w=60");
            assert_eq!(limiter.check_function(&function, &counted).await, result);
            let fields = fields(&counted);
            assert_eq!(field(&fields, "ratelimit"), state);
            assert_eq!(
                (field(&fields, "x-ratelimit-limit"), field(&fields, "x-ratelimit-remaining")),
                ("1", "0")
            );
            assert_eq!(
                field(&fields, "ratelimit-policy"),
                "\"k\";q=60;w=60, \"g\";q=60;w=60, \"f\";q=60;w=60"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn requests_share_calls_and_refusals_make_none() {
        let store = Arc::new(Tank::of(1000));
        let limiter =
            limiter(&[conf("k", Identity::Key, 1000, OnRedisLoss::Closed)], Some(Arc::clone(&store) as _));
        let crowd = futures_util::future::join_all((0..500).map(|_| passes(&limiter, "a"))).await;
        assert!(crowd.iter().all(|passed| *passed));
        assert_eq!(store.calls(), 1, "all found nothing, and one call was made for them");
        let mut through = 500;
        while passes(&limiter, "a").await {
            through += 1;
        }
        assert_eq!(through, 1000);
        store.calls();
        for _ in 0..10_000 {
            assert!(!passes(&limiter, "a").await);
        }
        assert_eq!(store.calls(), 0, "a refusal is remembered");
        store.tokens.store(1, Ordering::Relaxed);
        advance(Duration::from_millis(1100)).await;
        assert!(passes(&limiter, "a").await);
        assert_eq!(store.calls(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_leaves_ends_no_call() {
        let store = Arc::new(Tank::of(1));
        let limiter =
            limiter(&[conf("k", Identity::Key, 2, OnRedisLoss::Closed)], Some(Arc::clone(&store) as _));
        let gone = tokio::time::timeout(Duration::from_millis(1), passes(&limiter, "a"));
        let (gone, other) = tokio::join!(gone, passes(&limiter, "a"));
        assert!(gone.is_err() && other);
        assert_eq!(store.calls(), 1, "the one token went to the other");
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_left_alone_goes_back() {
        let store = Arc::new(Tank::of(100));
        let limiter =
            limiter(&[conf("k", Identity::Key, 100, OnRedisLoss::Closed)], Some(Arc::clone(&store) as _));
        let mut passed = 0;
        while store.tokens.load(Ordering::Relaxed) + passed >= 95 {
            assert!(passes(&limiter, "a").await);
            passed += 1;
        }
        sleep(Duration::from_secs(1)).await;
        assert_eq!(store.tokens.load(Ordering::Relaxed) + passed, 100);
        sleep(Duration::from_secs(3)).await;
        assert!(limiter.0.plans.load().limits.iter().all(|limit| limit.leases() == 0), "it is forgotten");
    }

    #[tokio::test(start_paused = true)]
    async fn what_another_limit_refuses_is_given_back() {
        let store = Arc::new(Tank::of(40));
        let exact = LimitConf { mode: LimitMode::Exact, ..conf("e", Identity::Key, 1, OnRedisLoss::Closed) };
        let both = [conf("k", Identity::Key, 40, OnRedisLoss::Closed), exact];
        let limiter = limiter(&both, Some(Arc::clone(&store) as _));
        for _ in 0..4 {
            assert!(passes(&limiter, "a").await);
        }
        store.tokens.store(0, Ordering::Relaxed);
        let remaining = |counted: &RateLimitState| counted.decisions().next().map(|(_, d)| d.remaining);
        let (first, before) = ask(&limiter, "a", None).await;
        let (second, after) = ask(&limiter, "a", None).await;
        assert!(first.is_err() && second.is_err());
        assert_eq!(remaining(&before), remaining(&after));
    }

    #[tokio::test(start_paused = true)]
    async fn without_the_shared_count_a_limit_does_as_configured() {
        for (on_loss, nodes, through) in
            [(OnRedisLoss::Local, 1, 4), (OnRedisLoss::Local, 3, 1), (OnRedisLoss::Closed, 1, 0)]
        {
            for mode in [LimitMode::Leased, LimitMode::Exact] {
                let store = Arc::new(Tank { nodes, ..Tank::of(100) });
                let limiter = limiter(
                    &[LimitConf { mode, ..conf("k", Identity::Key, 4, on_loss) }],
                    Some(Arc::clone(&store) as _),
                );
                // An exact limit learns of other nodes from leased ones only.
                limiter
                    .0
                    .store
                    .lease(&limiter.0.plans.load().limits[0].call_without_lease(&LimitIdentity::Global))
                    .await;
                store.is_away.store(true, Ordering::Relaxed);
                let start = tokio::time::Instant::now();
                let mut passed = 0;
                for _ in 0..20 {
                    passed += u32::from(passes(&limiter, "a").await);
                }
                assert_eq!(passed, through, "{on_loss:?} {mode:?}");
                assert!(
                    start.elapsed() < Duration::from_millis(10),
                    "one waits to learn it, the others do not"
                );
                let refusal = ask(&limiter, "a", None).await.0.unwrap_err();
                assert_eq!(refusal == Rejection::Away, on_loss == OnRedisLoss::Closed, "{refusal:?}");
                store.is_away.store(false, Ordering::Relaxed);
                // So long that nobody expects another request: one is let ask all the same.
                advance(Duration::from_secs(1)).await;
                passes(&limiter, "a").await;
                sleep(Duration::from_millis(10)).await;
                assert!(passes(&limiter, "a").await, "it is back: {on_loss:?} {mode:?}");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn leases_paid_for_are_spent_while_the_store_is_away() {
        let store = Arc::new(Tank::of(1000));
        let limiter =
            limiter(&[conf("k", Identity::Key, 1000, OnRedisLoss::Closed)], Some(Arc::clone(&store) as _));
        for _ in 0..50 {
            assert!(passes(&limiter, "a").await);
        }
        store.is_away.store(true, Ordering::Relaxed);
        let mut passed = 0;
        while passes(&limiter, "a").await {
            passed += 1;
        }
        assert!(passed > 0);
        assert_eq!(ask(&limiter, "a", None).await.0, Err(Rejection::Away));
    }

    #[tokio::test(start_paused = true)]
    async fn without_room_for_a_lease_each_request_asks() {
        let store = Arc::new(Tank::of(2));
        let limiter =
            limiter(&[conf("ip", Identity::Ip, 2, OnRedisLoss::Closed)], Some(Arc::clone(&store) as _));
        limiter.0.plans.load().limits[0].fill();
        for passed in [true, true, false, false] {
            assert_eq!(ask(&limiter, "a", Some("::1")).await.0.is_ok(), passed);
        }
        assert_eq!((store.calls(), limiter.0.plans.load().limits[0].leases()), (4, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn new_limits_hold_at_once_and_the_same_go_on() {
        let store = Arc::new(Tank::of(100));
        let (same, old) = (
            conf("a", Identity::Key, 50, OnRedisLoss::Closed),
            conf("b", Identity::Global, 50, OnRedisLoss::Closed),
        );
        let new = LimitConf { burst: 70, ..old.clone() };
        let limiter = limiter(&[same.clone(), old], Some(Arc::clone(&store) as _));
        for _ in 0..5 {
            assert!(passes(&limiter, "a").await);
        }
        let leases = |limiter: &RateLimiter| {
            limiter.0.plans.load().limits.iter().map(|l| l.leases()).collect::<Vec<_>>()
        };
        assert_eq!(leases(&limiter), [1, 1]);
        limiter.set_conf(&[new, same], &[]);
        assert_eq!(leases(&limiter), [0, 1]);
        let (passed, counted) = ask(&limiter, "a", None).await;
        assert_eq!(passed, Ok(()));
        assert!(field(&fields(&counted), "ratelimit").starts_with("\"b\""));
        limiter.set_conf(&[], &[]);
        assert_eq!(fields(&ask(&limiter, "a", None).await.1), []);
        sleep(Duration::from_secs(3)).await;
        assert_eq!(limiter.0.swept.lock().len(), 0, "old limits go");
    }
}
