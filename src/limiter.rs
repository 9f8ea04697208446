//! Rate limits: which limits apply to a request, and how they are counted.
//!
//! All nodes count a limit together, in the [`LimitStore`]. In mode *exact* the store is called on every
//! request. In mode *leased* the node takes tokens in advance and spends them without a call (see [`lease`]).
//! It also remembers rejections, so that a burst of rejected requests causes no calls. A single node has no
//! shared store and counts in this process. While the store is unavailable and no lease is left, a limit
//! either counts in this process or rejects all requests, as configured.
//!
//! A request is counted in two steps. Limits by key, by address and of the whole route are checked before the
//! body is read. Limits by function follow once the body has named the function. Within a step a request
//! counts against all limits or none. Tokens of the first step are not returned if the second step rejects
//! the request.
//!
//! In reading order: [`who`] identifies the holder of a count; [`limit`], [`lease`], [`leaser`] and [`store`]
//! are the shared count; [`local`] is the count of this process; [`state`] belongs to one request.
//! [`near`] remembers who is close to a limit. [`failures`] is independent: it limits failed authentications.

mod count;
mod failures;
mod lease;
mod leaser;
mod limit;
mod local;
mod near;
mod plan;
#[cfg(test)]
mod simulation;
mod state;
mod store;
mod who;

pub use failures::{AuthFailureLimit, TooManyFailures};
pub use leaser::Leaser;
pub use near::{NEAR_LIMITS_MAX, NearLimit};
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
use near::NearLimits;
use plan::{Plan, Plans};
use std::net::IpAddr;
use std::sync::Arc;
use store::SharedStore;
use tokio::sync::mpsc;
use who::{LimitIdentity, Subject};

/// All configured limits. Cheap to clone.
#[derive(Clone)]
pub struct RateLimiter(Arc<LimiterState>);

struct LimiterState {
    plans: ArcSwap<Plans>,
    store: Arc<SharedStore>,
    due: mpsc::Sender<DueCall>,
    swept: Swept,
    counters: DecisionCounters,
    near: NearLimits,
}

impl RateLimiter {
    /// Creates the limits and the loop that makes their calls. `shared`: the store in which all nodes count;
    /// `None`: a single node.
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
        let near = NearLimits::default();
        let limiter = Self(Arc::new(LimiterState { plans, store, due, swept, counters, near }));
        limiter.0.have_swept();
        (limiter, leaser)
    }

    /// Replaces the limits. An unchanged limit keeps its leases. A changed limit continues the count of the
    /// shared store under a new holder. Tokens leased before remain valid until they expire.
    pub fn set_conf(&self, conf: &[LimitConf], keys: &[KeyConf]) {
        let plans = Plans::new(conf, keys, Some(&self.0.plans.load()));
        self.0.plans.store(Arc::new(plans));
        self.0.have_swept();
    }

    /// The identities that were close to a limit in the last minute, the closest first.
    pub fn near_limits(&self) -> Vec<NearLimit> {
        self.0.near.highest()
    }

    /// Counts a request against the limits of `route` that need no body, and stores the decisions in
    /// `counted`. Limits by key ignore a request without a key. `client` is called only if a limit is by
    /// address.
    ///
    /// # Errors
    /// A limit is exceeded, or it cannot be counted and is configured to reject requests then.
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

    /// Counts the same request against the limits by function. Errors as for [`Self::check`].
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

    /// Counts a request against the limits `from..to` of the plan: all of them or none.
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
            self.near.note(limit, &who, &said, || self.store.nodes());
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
            let who = step.exact.iter().find(|(of, _)| of == n);
            if let (Some((_, who)), Some(limit)) = (who, plan.limits.get(*n)) {
                self.near.note(limit, who, said, || self.store.nodes());
            }
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

    /// Counts one request by leases or in this process. Returns `None` if it cannot be counted and must be
    /// rejected.
    async fn take(&self, limit: &Arc<Limit>, who: &LimitIdentity) -> Option<LimitDecision> {
        if !self.store.is_shared() {
            return Some(Self::local(limit, who, 1));
        }
        let now = self.store.now();
        match limit.try_take(who, now, || self.on_empty()) {
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
            TakeOutcome::Full => self.take_without_lease(limit, who).await,
        }
    }

    fn on_empty(&self) -> OnEmpty {
        match self.store.is_away() {
            false => OnEmpty::Wait,
            true if self.store.take_probe() => OnEmpty::Probe,
            true => OnEmpty::Leave,
        }
    }

    /// Queues the call that is due. If the queue is full, the call counts as unanswered.
    fn call(&self, limit: &Arc<Limit>, who: &LimitIdentity) {
        let due = DueCall { limit: Arc::clone(limit), who: who.clone() };
        if self.due.try_send(due).is_err() {
            limit.settle(who, self.store.now(), None);
        }
    }

    async fn take_without_lease(&self, limit: &Limit, who: &LimitIdentity) -> Option<LimitDecision> {
        if self.on_empty() == OnEmpty::Leave {
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

    /// Counts against all exact limits of the step in one call. Returns `None` if a limit cannot be counted
    /// and the request must be rejected.
    async fn take_exact(&self, plan: &Plan, step: &Step) -> Option<Vec<(usize, LimitDecision)>> {
        let limits: Vec<(usize, &Arc<Limit>, &LimitIdentity)> =
            step.exact.iter().filter_map(|(n, who)| Some((*n, plan.limits.get(*n)?, who))).collect();
        if self.on_empty() != OnEmpty::Leave {
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
mod tests;
