//! The ports over Redis, each with its Lua scripts beside it.
//!
//! * [`connection`] — the connection for commands; [`subscriber`] — a connection for subscriptions; [`beats`]
//!   — the proof that a subscription receives publications
//! * [`registry`] — members that report at intervals
//! * [`results`], [`changes`], [`journal`], [`membership`], [`limits`], [`workers`], [`summaries`],
//!   [`events`] — the ports
//! * [`publisher`], [`lone_status`] — the ports of a worker
//! * [`probe`] — the start checks of Redis

pub mod beats;
pub mod changes;
pub mod connection;
pub mod events;
pub mod journal;
pub mod limits;
pub mod lone_status;
pub mod membership;
pub mod probe;
pub mod publisher;
mod registry;
pub mod results;
#[cfg(test)]
pub mod simulated;
mod subscriber;
pub mod summaries;
pub mod workers;
