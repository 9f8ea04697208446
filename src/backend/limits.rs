//! The count behind the rate limits.

use crate::backend::BackendError;
use crate::model::Quota;
use async_trait::async_trait;
use std::time::Duration;

/// What a limiter says of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    pub allowed: bool,
    /// Requests that would be let through at once after this one.
    pub remaining: u32,
    /// Until one request would be let through; zero if allowed.
    pub retry_after: Duration,
}

/// A call about a lease: what its holder still has, what it gives back, and what it would like. In tokens; a token
/// is one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseCall {
    pub bucket: String,
    pub quota: Quota,
    /// Never used by two processes, nor by one before and after it lost what it knew.
    pub holder: u64,
    /// Grows with each call of the holder for the bucket. 0: the call is for `need` alone, and nothing is leased.
    pub seq: u64,
    /// Tokens kept from the lease before.
    pub held: u32,
    /// Tokens given back.
    pub back: u32,
    /// Tokens to be spent at once; as many of them as there are.
    pub need: u32,
    /// Tokens to be leased on top of `held`, if there is plenty.
    pub want: u32,
    /// How long the lease lasts, from when the call takes effect.
    pub ttl: Duration,
}

/// The answer to a [`LeaseCall`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// `false`: a later call of the holder came first, and this one changed nothing.
    pub applied: bool,
    /// Tokens leased in all, those still held included.
    pub amount: u32,
    /// Tokens of `need` that may be spent.
    pub taken: u32,
    /// Tokens the bucket has left.
    pub left: u32,
    /// Until the bucket has a token; zero if it has.
    pub retry_after: Duration,
    /// Holders with a live lease of the bucket, this one included.
    pub nodes: u32,
}

/// The count behind the rate limits, shared by all nodes.
#[async_trait]
pub trait LimitStore: Send + Sync {
    /// Takes one request from each bucket, unless one of them is empty: then from none. One decision per bucket.
    async fn take(&self, buckets: &[(String, Quota)]) -> Result<Vec<Decision>, BackendError>;

    /// Reports on a lease and renews it. The buckets of [`Self::take`] are others, also where they have the same name. A
    /// call that fails may have taken effect.
    async fn lease(&self, call: &LeaseCall) -> Result<Grant, BackendError>;
}
