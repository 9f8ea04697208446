//! Parses the environment and `conf/`.
//!
//! Settings are read only in this module. The values that it returns are typed and valid. It collects all
//! problems instead of stopping at the first, so that an operator can fix them in one round.

mod checks;
mod conf;
pub mod dotenv;
mod env;
mod error;
mod files;
mod keys;
mod limits;
mod line;
mod live;
mod merge;
mod origin;
mod reader;
mod renewal;
mod secret;
mod server;
mod trace_env;
mod upstreams;
mod worker;
mod worker_env;

pub use conf::Conf;
pub use env::{
    API_KEY_BYTES_MAX, AiNode, Env, api_key_problem, master_key_warning, rate_limit_from_process,
    unreadable_variables,
};
pub use error::ConfigError;
pub use files::{ConfFiles, ConfPart, ConfTexts, TlsTexts};
pub use keys::{KeyConf, KeyHash, KeyLimitConf, NewKey, new_key};
pub use limits::{
    BatchConf, CacheConf, Identity, LimitConf, LimitMode, OnRedisLoss, OverloadConf, WaitsConf,
};
pub use live::Live;
pub use origin::ANY as ANY_ORIGIN;
pub use reader::{CHANGES, FILE_BYTES_MAX, FileError, FileReader, text};
pub use renewal::ConfReload;
pub use secret::Secret;
pub use server::{
    AuditConf, AuthConf, ClientCertificates, CostConf, DeadLetterConf, EventsConf, FleetConf, Http2Conf,
    HttpConf, ListenConf, MemoryConf, MetricsConf, ShutdownConf, StartConf, TlsConf, TracesConf,
};
pub use trace_env::{SAMPLING_RANGE, TraceExport, TraceSampling};
pub use upstreams::{HealthConf, UpstreamConf, UpstreamTlsConf};
pub use worker::{
    CapacityConf, CodeConf, JobsConf, ListenerConf, Network, OutputConf, SandboxConf, SandboxMode, WarmConf,
    WorkerConf,
};
pub use worker_env::{ControllerAddress, RunEnv, WorkerEnv};
