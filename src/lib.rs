//! The Infra Controller: the gateway of a function platform.
//!
//! The modules, in reading order, each using only those below it:
//!
//! * [`lifecycle`] — the phases from start to exit
//! * [`boot`] — wires everything, the only place that chooses a backend
//! * [`gateway`] — the Pingora side: the filters around the API
//! * [`api`] — the route table, the handlers, and errors as clients see them
//! * [`limiter`] — rate limits, counted by all nodes together
//! * [`functions`] — functions: cached, changed, their old code swept
//! * [`catalogue`] — the models of an AI node
//! * [`dispatch`] — submit, wait, settle: the way of a job
//! * [`audit`] — execution rows and counters, written in the background
//! * [`https`] — the HTTP client for what needs no SDK
//! * [`metrics`] — every metric, in one struct
//! * [`log`] — log lines
//! * [`config`] — one parse of environment and `conf/`
//! * [`backend`] — the ports to the outside, and the two backends behind them
//! * [`model`] — the nouns: jobs, functions, outcomes, executions

pub mod api;
pub mod audit;
mod availability;
pub mod backend;
mod backoff;
pub mod boot;
pub mod catalogue;
pub mod code_archive;
pub mod config;
pub mod dispatch;
pub mod fleet;
pub mod functions;
#[cfg(test)]
mod fuzz;
pub mod gateway;
mod https;
pub mod lifecycle;
pub mod limiter;
pub mod log;
pub mod metrics;
pub mod model;
mod node_lease;
pub mod runs;
