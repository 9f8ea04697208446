//! Rules of this repository that no compiler and no formatter checks.
//!
//! Each file below is one group of rules. Its tables of rules and exceptions stand at the top. Its tests
//! include one that plants each fault and finds it. An exception states its reason. An exception that is no
//! longer needed is a finding.

mod contributing;
mod graph;
mod interface;
mod lengths;
pub mod markdown;
mod metrics;
mod names;
mod reader;
mod rooms;
mod settings;
mod source;
mod tree;
mod walls;
