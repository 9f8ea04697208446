//! The decisions of all limits about one request, for its response.

use super::count::Decisions;
use super::limit::Limit;
use super::plan::{Plan, policy};
use crate::backend::Decision;
use crate::config::LimitConf;
use bytes::Bytes;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// The reason why a request is rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejection {
    Limited {
        /// Time until a retry may succeed, in seconds; at least 1.
        retry_after_s: u64,
    },
    /// The shared store is unavailable, and the limit is configured to reject requests then.
    Away,
}

/// The decisions of the limits about one request.
#[derive(Default)]
pub struct RateLimitState {
    plan: Option<Arc<Plan>>,
    early: Decisions,
    late: OnceLock<Decisions>,
}

impl std::fmt::Debug for RateLimitState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RateLimitState")
            .field("early", &self.early)
            .field("late", &self.late)
            .finish_non_exhaustive()
    }
}

impl RateLimitState {
    /// The state after the limits that need no body.
    pub fn early(plan: Arc<Plan>, early: Decisions) -> Self {
        Self { plan: Some(plan), early, late: OnceLock::new() }
    }

    /// The plan, if it has limits that are counted once the body is known.
    pub fn plan_with_late_limits(&self) -> Option<&Arc<Plan>> {
        self.plan.as_ref().filter(|plan| plan.early < plan.limits.len())
    }

    /// Adds the decisions of the limits by function. Called once, because a request has one function.
    pub fn set_late(&self, late: Decisions) {
        let _ = self.late.set(late);
    }

    /// The counted limits, each with its decision. Empty if no limit applies to the route.
    pub fn decisions(&self) -> impl Iterator<Item = (&LimitConf, Decision)> {
        self.limits().map(|(limit, decision)| (&limit.conf, decision))
    }

    /// The value of `RateLimit-Policy` for the counted limits. Usually without an allocation.
    pub fn policy(&self) -> Option<Bytes> {
        let plan = self.plan.as_ref()?;
        match self.limits().count() {
            n if n == plan.limits.len() => plan.policy.clone(),
            n if n == plan.early && self.late.get().is_none() => plan.policy_early.clone(),
            _ => policy(self.limits().map(|(limit, _)| limit)),
        }
    }

    fn limits(&self) -> impl Iterator<Item = (&Arc<Limit>, Decision)> {
        let late = self.late.get().into_iter().flatten();
        let limits = self.plan.as_ref().map_or(&[][..], |plan| &plan.limits);
        self.early.iter().chain(late).filter_map(|(n, decision)| Some((limits.get(*n)?, *decision)))
    }
}

/// Whole seconds, rounded up. A client that waits this long must not be rejected again because of rounding.
pub fn seconds_up(duration: Duration) -> u64 {
    duration.as_secs() + u64::from(duration.subsec_nanos() > 0)
}
