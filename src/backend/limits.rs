//! The port for rate limits that all nodes share.
//!
//! A bucket follows GCRA, by the clock of the store. It is used in one of two ways: exact, with one call per
//! request, or leased, where a node takes tokens in advance and spends them locally. In both, the admissions
//! in any window never exceed burst + rate × window. The exceptions are a store that loses its data, and a
//! clock that is set forward. `aws` uses Redis. `embedded` has no port, because its only process counts in
//! memory.

use crate::backend::BackendError;
use crate::model::Quota;
use async_trait::async_trait;
use std::time::Duration;

/// The decision of a bucket about one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    pub allowed: bool,
    /// Further requests that the bucket would admit now.
    pub remaining: u32,
    /// Time until the bucket admits one request; zero if `allowed`.
    pub retry_after: Duration,
}

/// A report of a lease holder and its request for more tokens. A token admits one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseCall {
    pub bucket: String,
    pub quota: Quota,
    /// A unique id of the holder. A process that has lost its lease state must use a new one.
    pub holder: u64,
    /// Increases with each call of the holder for the bucket. 0: the call only takes `need`, and stores no
    /// lease.
    pub seq: u64,
    /// Tokens of the previous lease that the holder keeps.
    pub held: u32,
    /// Tokens of the previous lease that the holder returns.
    pub back: u32,
    /// Tokens to be spent immediately. Fewer are granted if the bucket has fewer.
    pub need: u32,
    /// Tokens to be leased in addition to `held`. Fewer are granted if the bucket is low.
    pub want: u32,
    /// Duration of the lease, from the moment at which the call takes effect.
    pub ttl: Duration,
}

/// The answer to a [`LeaseCall`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// `false`: a later call of the holder was applied before, and this one changed nothing.
    pub applied: bool,
    /// Tokens of the lease, those that were still held included.
    pub amount: u32,
    /// Tokens of `need` that may be spent.
    pub taken: u32,
    /// Tokens that are left in the bucket.
    pub left: u32,
    /// Time until the bucket has a token; zero if it has one.
    pub retry_after: Duration,
    /// The number of holders with a live lease of the bucket, this one included.
    pub nodes: u32,
}

/// The buckets of the rate limits, shared by all nodes.
#[async_trait]
pub trait LimitStore: Send + Sync {
    /// Takes one token from each bucket, or from none if one of them is empty. Returns one decision per
    /// bucket, in order. Not idempotent: a repeated call takes tokens again.
    async fn take(&self, buckets: &[(String, Quota)]) -> Result<Vec<Decision>, BackendError>;

    /// Reports and renews a lease. A repeated call gets the answer of the first one. A call that failed may
    /// have taken effect. The buckets are separate from those of [`Self::take`], even under the same name.
    async fn lease(&self, call: &LeaseCall) -> Result<Grant, BackendError>;
}
