//! The Infra Controller: the gateway of a function platform.
//!
//! The modules, in reading order, each using only those below it:
//!
//! * [`lifecycle`] — the phases from start to exit
//! * [`dispatch`] — submit, wait, settle: the way of a job
//! * [`audit`] — execution rows and counters, written in the background
//! * [`metrics`] — every metric, in one struct
//! * [`log`] — log lines
//! * [`config`] — one parse of environment and `conf/`
//! * [`backend`] — the ports to the outside, and the two backends behind them
//! * [`model`] — the nouns: jobs, functions, outcomes, executions

pub mod audit;
pub mod backend;
pub mod config;
pub mod dispatch;
pub mod lifecycle;
pub mod log;
pub mod metrics;
pub mod model;
