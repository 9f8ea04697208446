//! The Infra Controller: the gateway of a function platform.
//!
//! The modules, in reading order, each using only those below it:
//!
//! * [`boot`] — builds and runs a process; the only place that chooses a backend
//! * [`engine`] — a node without its edge: its parts, built, started and stopped
//! * [`fleet`] — this node among the others: its lease, and the jobs of nodes that are gone
//! * [`gateway`] — the Pingora side: the filters around the API
//! * [`api`] — the route table, the handlers, and errors as clients see them
//! * [`worker`] — runs the functions: of a fleet, or of `dev`
//! * [`overview`] — what all nodes do now, and did in the last hour
//! * [`runs`] — the use case of a run: admit, look up, claim, submit, wait
//! * [`dispatch`] — the life of a job: submitted, waited for, settled
//! * [`functions`] — functions: cached, changed, their old code deleted
//! * [`limiter`] — rate limits, counted by all nodes together
//! * [`catalogue`] — the models of an AI node
//! * [`events`] — live events: reported, sampled, streamed to those who watch
//! * [`audit`] — execution rows and counters, written in the background
//! * [`backend`] — the ports to the outside, and the two backends behind them
//!
//! Used by many of them:
//!
//! * [`config`] — one parse of the environment and of `conf/`
//! * [`metrics`] — every metric; [`log`] — log lines; [`traces`] — spans, exported to a collector
//! * [`lifecycle`] — the phases from start to exit; [`node_lease`] — how long this node may admit jobs
//! * [`ambient`] — clock, random numbers, tasks; [`backoff`] — the pauses of retries
//! * [`availability`] — when to try what is down
//! * [`code_archive`] — checks of uploaded code; [`https`] — the HTTP client for what needs no SDK
//! * [`model`] — plain data: ids, jobs, functions, outcomes, executions

mod ambient;
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
pub mod engine;
pub mod events;
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
pub mod node_lease;
pub mod overview;
pub mod runs;
#[cfg(test)]
mod simulation;
pub mod traces;
pub mod worker;
