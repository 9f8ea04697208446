//! The Infra Controller: the gateway of a function platform.
//!
//! The modules, in reading order, each using only those below it:
//!
//! * [`config`] — one parse of environment and `conf/`
//! * [`backend`] — the ports to the outside, and the two backends behind them
//! * [`model`] — the nouns: jobs, functions, outcomes, executions

pub mod backend;
pub mod config;
pub mod model;
