//! One parse of the environment and of `conf/`.
//!
//! Everything is read here and nowhere else; what leaves this module is typed and valid. Every problem is
//! collected, so that an operator mends them in one round.

mod conf;
pub mod dotenv;
mod env;
mod keys;
mod live;
mod origin;
mod place;
mod reader;
mod renewal;
mod texts;
mod upstreams;

pub use conf::{
    AuditConf, AuthConf, BatchConf, CacheConf, ClientCertificates, Conf, DeadLetterConf, FleetConf,
    Http2Conf, HttpConf, Identity, LimitConf, LimitMode, ListenConf, MemoryConf, MetricsConf, OnRedisLoss,
    OverloadConf, ShutdownConf, StartConf, TlsConf, WaitsConf,
};
pub use env::{
    API_KEY_BYTES_MAX, AiNode, Env, Secret, api_key_problem, master_key_warning, rate_limit_from_process,
    unreadable_variables,
};
pub use keys::{KeyConf, KeyHash, KeyLimitConf, NewKey, new_key};
pub use live::Live;
pub use origin::ANY as ANY_ORIGIN;
pub use reader::{CHANGES, FILE_BYTES_MAX, FileError, FileReader, text};
pub use renewal::Renewal;
pub use texts::{ConfPart, ConfTexts, TlsTexts};
pub use upstreams::{HealthConf, UpstreamConf, UpstreamTlsConf};

/// What is wrong with the configuration, one line a problem. `serve` and `check` exit with 78 on it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct ConfigError(pub Vec<String>);
