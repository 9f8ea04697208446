//! One parse of the environment and of `conf/`.
//!
//! Everything is read here and nowhere else; what leaves this module is typed and valid. Every problem is
//! collected, so that an operator mends them in one round.

mod conf;
pub mod dotenv;
mod env;
mod live;
mod place;

pub use conf::{
    AuditConf, BatchConf, CacheConf, Conf, ConfTexts, DeadLetterConf, FleetConf, HttpConf, Identity,
    LimitConf, LimitMode, ListenConf, MemoryConf, MetricsConf, OnRedisLoss, ShutdownConf, StartConf,
    WaitsConf,
};
pub use env::{AiNode, Env, Secret, api_key_problem};
pub use live::Live;

/// What is wrong with the configuration, one line a problem. `serve` and `check` exit with 78 on it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct ConfigError(pub Vec<String>);
