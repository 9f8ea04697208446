//! Requests forwarded to upstreams.
//!
//! * [`pool`] — upstreams, their addresses and health checks
//! * [`forward`] — one forwarded request: its limits, and the changes to its header fields
//! * [`origin`] — the fields that describe the client
//! * [`via`] — the `Via` field, and loops
//! * [`tunnel`] — connections that outlive their request

pub mod forward;
pub mod origin;
pub mod pool;
pub mod tunnel;
pub mod via;
