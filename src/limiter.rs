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
//! other; [`fields`] of the answer.

mod fields;
#[cfg(test)]
mod fleet;
mod lease;
mod leaser;
mod limit;
mod local;
mod store;
mod who;

pub use leaser::Leaser;

use crate::backend::{Decision, LimitStore};
use crate::config::{Identity, LimitConf, LimitMode, OnRedisLoss};
use crate::metrics::Metrics;
use crate::model::FunctionId;
use ahash::AHashMap;
use arc_swap::ArcSwap;
use fields::seconds_up;
use http::HeaderValue;
use lease::{Micros, Verdict};
use leaser::{DUE_MAX, Due, Swept};
use limit::{Limit, OnEmpty, Tried};
use prometheus::IntCounter;
use smallvec::SmallVec;
use std::net::IpAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use store::Store;
use tokio::sync::mpsc;
use who::{Subject, Who};

/// Why a request is not let through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    Limited {
        /// At least 1.
        retry_after_s: u64,
    },
    /// The count cannot be had, and the limit says that nobody is let through then.
    Away,
}

/// What the limits of its route said of one request.
#[derive(Default)]
pub struct Counted {
    plan: Option<Arc<Plan>>,
    early: Decisions,
    late: OnceLock<Decisions>,
}

impl std::fmt::Debug for Counted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Counted")
            .field("early", &self.early)
            .field("late", &self.late)
            .finish_non_exhaustive()
    }
}

/// By the place of the limit in the [`Plan`]. Few routes have more limits than two.
type Decisions = SmallVec<[(usize, Decision); 2]>;

/// The limits of one route.
struct Plan {
    /// Those counted before the body is read come first.
    limits: Vec<Arc<Limit>>,
    /// How many these are.
    early: usize,
    /// Field values of all limits, and of the early ones.
    policy: Option<HeaderValue>,
    policy_early: Option<HeaderValue>,
}

struct Plans {
    limits: Vec<Arc<Limit>>,
    by_route: AHashMap<String, Arc<Plan>>,
}

/// All limits of the configuration; cheap to clone.
#[derive(Clone)]
pub struct RateLimiter(Arc<Inner>);

struct Inner {
    plans: ArcSwap<Plans>,
    store: Arc<Store>,
    due: mpsc::Sender<Due>,
    swept: Swept,
    counters: Counters,
}

/// Where a decision came from.
#[derive(Clone, Copy)]
enum Source {
    Lease,
    RefusalMemory,
    Exact,
    Local,
    Closed,
}

impl Source {
    const ALL: [(Self, &str); 5] = [
        (Self::Lease, "lease"),
        (Self::RefusalMemory, "refusal_memory"),
        (Self::Exact, "exact"),
        (Self::Local, "local"),
        (Self::Closed, "closed"),
    ];
}

/// Looked up once, as every request counts.
struct Counters {
    allowed: [IntCounter; 5],
    limited: [IntCounter; 5],
}

impl Counters {
    fn new(metrics: &Metrics) -> Self {
        let all =
            |decision| Source::ALL.map(|(_, name)| metrics.limiter.with_label_values(&[decision, name]));
        Self { allowed: all("allowed"), limited: all("limited") }
    }

    fn count(&self, source: Source, allowed: bool) {
        let counters = if allowed { &self.allowed } else { &self.limited };
        if let Some(counter) = counters.get(source as usize) {
            counter.inc();
        }
    }
}

/// What one limit says. `lease`: the call its token came with, for the refund.
struct Said {
    decision: Decision,
    source: Source,
    lease: Option<u64>,
}

impl Said {
    fn allowed(remaining: u32, source: Source) -> Self {
        Self {
            decision: Decision { allowed: true, remaining, retry_after: Duration::ZERO },
            source,
            lease: None,
        }
    }

    fn refused(retry: Micros, source: Source) -> Self {
        let retry_after = Duration::from_micros(retry);
        Self { decision: Decision { allowed: false, remaining: 0, retry_after }, source, lease: None }
    }
}

/// One step of counting, on its way.
#[derive(Default)]
struct Step {
    decisions: Decisions,
    /// Tokens from leases, to be given back if another limit refuses.
    spent: SmallVec<[(usize, Who, u64); 2]>,
    exact: SmallVec<[(usize, Who); 1]>,
}

impl RateLimiter {
    /// `shared`: where all nodes count together, if they do.
    pub fn new(
        conf: &[LimitConf],
        shared: Option<Arc<dyn LimitStore>>,
        metrics: Arc<Metrics>,
    ) -> (Self, Leaser) {
        let counters = Counters::new(&metrics);
        let store = Arc::new(Store::new(shared, metrics));
        let (due, dues) = mpsc::channel(DUE_MAX);
        let swept = Swept::default();
        let leaser = Leaser { due: dues, store: Arc::clone(&store), limits: Arc::clone(&swept) };
        let plans = ArcSwap::from_pointee(Plans::new(conf, &[]));
        let limiter = Self(Arc::new(Inner { plans, store, due, swept, counters }));
        limiter.0.have_swept();
        (limiter, leaser)
    }

    /// Puts other limits in force. A limit that stays as it is keeps its leases; one whose numbers change goes on with the
    /// count of the shared store, as a holder of its own: what was leased before may be spent until it expires.
    pub fn set_conf(&self, conf: &[LimitConf]) {
        let plans = Plans::new(conf, &self.0.plans.load().limits);
        self.0.plans.store(Arc::new(plans));
        self.0.have_swept();
    }

    /// Counts a request against the limits of `route` that need no body. What they say goes into `counted`.
    pub async fn check(
        &self,
        route: &str,
        key_name: &Arc<str>,
        client: Option<IpAddr>,
        counted: &mut Counted,
    ) -> Result<(), Refusal> {
        let Some(plan) = self.0.plans.load().by_route.get(route).map(Arc::clone) else { return Ok(()) };
        let mut step = Step::default();
        let subject = Subject::Caller { key_name, client };
        let result = self.0.count(&plan, 0, plan.early, subject, &mut step).await;
        *counted = Counted { plan: Some(plan), early: step.decisions, late: OnceLock::new() };
        result
    }

    /// Counts the same request against the limits by function.
    pub async fn check_function(&self, function: &FunctionId, counted: &Counted) -> Result<(), Refusal> {
        let Some(plan) = counted.plan.as_ref().filter(|plan| plan.early < plan.limits.len()) else {
            return Ok(());
        };
        let mut step = Step::default();
        let subject = Subject::Function(function);
        let result = self.0.count(plan, plan.early, plan.limits.len(), subject, &mut step).await;
        let _ = counted.late.set(step.decisions); // a request has one function
        result
    }
}

impl Inner {
    fn have_swept(&self) {
        *self.swept.lock() = self.plans.load().limits.iter().map(Arc::downgrade).collect();
    }

    /// Counts against the limits `from..to` of the plan: against all of them or none.
    async fn count(
        &self,
        plan: &Plan,
        from: usize,
        to: usize,
        subject: Subject<'_>,
        step: &mut Step,
    ) -> Result<(), Refusal> {
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

    fn note(&self, n: usize, said: &Said, step: &mut Step) {
        self.counters.count(said.source, said.decision.allowed);
        step.decisions.push((n, said.decision));
    }

    fn refuse(&self, plan: &Plan, step: &mut Step) -> Result<(), Refusal> {
        self.refund(plan, step);
        let wait = step.decisions.iter().map(|(_, d)| d.retry_after).max().unwrap_or_default();
        Err(Refusal::Limited { retry_after_s: seconds_up(wait).max(1) })
    }

    fn refuse_unasked(&self, plan: &Plan, step: &mut Step) -> Result<(), Refusal> {
        self.counters.count(Source::Closed, false);
        self.refund(plan, step);
        Err(Refusal::Away)
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
    async fn take(&self, limit: &Arc<Limit>, who: &Who) -> Option<Said> {
        if !self.store.is_shared() {
            return Some(Self::local(limit, who, 1));
        }
        let now = self.store.now();
        match limit.try_take(who, now, || self.on_empty(now)) {
            Tried::Allowed { remaining, seq, call } => {
                if call {
                    self.call(limit, who);
                }
                Some(Said { lease: Some(seq), ..Said::allowed(remaining, Source::Lease) })
            }
            Tried::Refused { retry } => Some(Said::refused(retry, Source::RefusalMemory)),
            Tried::Waiting { verdict, call } => {
                if call {
                    self.call(limit, who);
                }
                match verdict.await {
                    Ok(Verdict::Allowed { remaining }) => Some(Said::allowed(remaining, Source::Lease)),
                    Ok(Verdict::Refused { retry }) => Some(Said::refused(retry, Source::Lease)),
                    Ok(Verdict::Away) | Err(_) => self.without_store(limit, who),
                }
            }
            Tried::Nothing { call } => {
                if call {
                    self.call(limit, who);
                }
                self.without_store(limit, who)
            }
            Tried::Crowded => self.without_store(limit, who),
            Tried::Full => self.take_without_lease(limit, who, now).await,
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
    fn call(&self, limit: &Arc<Limit>, who: &Who) {
        let due = Due { limit: Arc::clone(limit), who: who.clone() };
        if self.due.try_send(due).is_err() {
            limit.settle(who, self.store.now(), None);
        }
    }

    async fn take_without_lease(&self, limit: &Limit, who: &Who, now: Micros) -> Option<Said> {
        if self.on_empty(now) == OnEmpty::Leave {
            return self.without_store(limit, who);
        }
        let Some(grant) = self.store.lease(&limit.call_without_lease(who)).await else {
            return self.without_store(limit, who);
        };
        let retry = Micros::try_from(grant.retry_after.as_micros()).unwrap_or(Micros::MAX);
        Some(match grant.taken {
            0 => Said::refused(retry, Source::Lease),
            _ => Said::allowed(grant.left, Source::Lease),
        })
    }

    /// All exact limits of the step, in one call.
    async fn take_exact(&self, plan: &Plan, step: &Step) -> Option<Vec<(usize, Said)>> {
        let limits: Vec<(usize, &Arc<Limit>, &Who)> =
            step.exact.iter().filter_map(|(n, who)| Some((*n, plan.limits.get(*n)?, who))).collect();
        if self.on_empty(self.store.now()) != OnEmpty::Leave {
            let buckets: Vec<_> = limits.iter().map(|(_, l, who)| (l.bucket(who), l.quota)).collect();
            if let Some(decisions) = self.store.take(&buckets).await {
                let said = |decision| Said { decision, source: Source::Exact, lease: None };
                return Some(limits.iter().map(|(n, ..)| *n).zip(decisions.into_iter().map(said)).collect());
            }
        }
        if limits.iter().any(|(_, limit, _)| limit.conf.on_redis_loss == OnRedisLoss::Closed) {
            return None;
        }
        let nodes = self.store.nodes();
        Some(limits.into_iter().map(|(n, limit, who)| (n, Self::local(limit, who, nodes))).collect())
    }

    fn without_store(&self, limit: &Limit, who: &Who) -> Option<Said> {
        match limit.conf.on_redis_loss {
            OnRedisLoss::Local => Some(Self::local(limit, who, self.store.nodes())),
            OnRedisLoss::Closed => None,
        }
    }

    fn local(limit: &Limit, who: &Who, nodes: u32) -> Said {
        Said { decision: limit.local.take(who, nodes), source: Source::Local, lease: None }
    }
}

impl Plans {
    /// Limits that stay as they are are taken over from `old`.
    fn new(conf: &[LimitConf], old: &[Arc<Limit>]) -> Self {
        let same = |conf: &LimitConf| old.iter().find(|limit| limit.conf == *conf).map(Arc::clone);
        let limits: Vec<Arc<Limit>> = conf
            .iter()
            .map(|conf| same(conf).unwrap_or_else(|| Arc::new(Limit::new(conf.clone()))))
            .collect();
        let routes = limits.iter().flat_map(|limit| &limit.conf.routes);
        let by_route = routes.map(|route| (route.clone(), Arc::new(Plan::new(route, &limits)))).collect();
        Self { limits, by_route }
    }
}

impl Plan {
    fn new(route: &str, limits: &[Arc<Limit>]) -> Self {
        let here = limits.iter().filter(|limit| limit.conf.routes.iter().any(|r| r == route)).map(Arc::clone);
        let (late, early): (Vec<_>, Vec<_>) =
            here.partition(|limit| limit.conf.identity == Identity::Function);
        let (count, policy_early) =
            (early.len(), fields::policy(early.iter().map(|limit| fields::quota(limit))));
        let limits = [early, late].concat();
        let policy = fields::policy(limits.iter().map(|limit| fields::quota(limit)));
        Self { limits, early: count, policy, policy_early }
    }
}
