//! The ports over Redis, each with its Lua scripts beside it.
//!
//! * [`connection`] — the connection for commands; [`subscriber`] — a connection that listens; [`beats`] — the proof
//!   that it receives what is published
//! * [`results`], [`changes`], [`journal`], [`membership`], [`limits`], [`workers`] — the ports
//! * [`probe`] — what the start checks ask of Redis

pub mod beats;
pub mod changes;
pub mod connection;
pub mod journal;
pub mod limits;
pub mod membership;
pub mod probe;
pub mod results;
mod subscriber;
pub mod workers;
