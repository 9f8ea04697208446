//! What a node needs to start, and how a process ends.

use super::reload::ConfSource;
use crate::backend::{Backend, StartProblem};
use crate::config::{AiNode, Conf, ConfTexts, ConfigError, Live, Secret, TraceExport, WorkerConf};
use crate::gateway::Pseudonym;
use crate::metrics::WorkerMetrics;
use crate::model::NodeId;
use crate::traces::{Destination, Traces};
use std::future::Future;
use std::net::Ipv6Addr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use tokio::sync::watch;

/// How a process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The process stopped on request.
    Ok,
    /// An internal error (EX_SOFTWARE).
    Internal,
    /// A backend did not answer (EX_UNAVAILABLE).
    Unavailable,
    /// Something is missing, malformed, does not exist or is refused (EX_CONFIG).
    Config,
}

impl Exit {
    /// The exit code, as in `sysexits.h`.
    pub fn code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Internal => 70,
            Self::Unavailable => 69,
            Self::Config => 78,
        }
    }
}

/// The worker of the backend, as a background loop. It ends some time after the watch turns true.
pub type BackendLoop = Box<
    dyn FnOnce(watch::Receiver<bool>, Arc<WorkerMetrics>, Traces) -> Pin<Box<dyn Future<Output = ()> + Send>>
        + Send,
>;

/// A connected backend, and the identity of this node in it.
pub struct ConnectedBackend {
    pub node: NodeId,
    pub backend: Backend,
    pub bucket: String,
    /// An empty directory for uploads in progress.
    pub spool_dir: PathBuf,
    /// Directory for rows that wait for the log table. `None`: the table is on the same disk.
    pub spill_dir: Option<PathBuf>,
    pub extra_loop: Option<BackendLoop>,
    /// Held for as long as the process runs.
    pub claim: Option<Arc<dyn StateClaim>>,
    /// Problems that do not prevent the start.
    pub warnings: Vec<String>,
}

/// The claim of a node to its state directory. A start that fails drops it, which removes a new directory.
pub trait StateClaim: Send + Sync {
    /// Makes the claim permanent, because the start succeeded.
    fn keep(&self);

    /// Checks that the directory exists and is locked by this process, and restores it if not. Called
    /// periodically; blocks.
    fn tend(&self);
}

/// Connects to the backend. The error lists every problem found.
pub type Connect = Box<
    dyn FnOnce() -> Pin<Box<dyn Future<Output = Result<ConnectedBackend, Vec<StartProblem>>> + Send>>
        + Send
        + Sync,
>;

/// Everything a node needs to start.
pub struct NodePlan {
    pub settings: NodeSettings,
    pub connect: Connect,
}

/// The settings of a node, from the command line, the environment and `conf/`.
pub struct NodeSettings {
    pub conf: Conf,
    /// Where `conf` was read from, and where it is reloaded from.
    pub source: ConfSource,
    pub texts: ConfTexts,
    pub port: u16,
    /// Directory in which a successor finds the process on the same port. `None`: there is no handover.
    pub meet_in: Option<PathBuf>,
    /// Whether to take over the sockets of a running process, if there is one.
    pub is_upgrade: bool,
    pub api_key: Secret,
    /// Name of this fleet in `Via` fields of forwarded requests.
    pub pseudonym: Pseudonym,
    /// Address of the model catalogue. `None`: there is no catalogue.
    pub ai_node: Option<AiNode>,
    /// Where spans are exported. `None`: nowhere.
    pub traces: Option<TracePlan>,
    /// The settings of the worker in this process, if there is one. A reload replaces them.
    pub worker: Option<Live<WorkerConf>>,
    /// Second listen address, besides `conf.listen.address`. Ignored if this machine does not have it.
    pub listen_beside: Option<Ipv6Addr>,
    /// Printed to standard error once the port is bound. `{url}` is replaced by the URL of the server.
    pub banner: Option<String>,
}

/// The settings of traces.
pub struct TracePlan {
    pub export: TraceExport,
    /// The queue of the jobs.
    pub destination: Destination,
}

/// Subdirectory of a node's directory for uploads in progress.
pub const SPOOL: &str = "spool";

/// Subdirectory of a node's directory for rows that wait for the log table.
#[cfg(feature = "aws")]
pub const SPILL: &str = "spill";

/// Prints the problems of the configuration.
pub fn refuse(error: &ConfigError) -> Exit {
    eprintln!("infra-controller: the configuration cannot be used");
    for problem in &error.0 {
        eprintln!("  {problem}");
    }
    Exit::Config
}

/// Prints the problems that prevent the start. [`Exit::Unavailable`] if all of them are transient, else
/// [`Exit::Config`].
pub fn explain(problems: &[StartProblem]) -> Exit {
    eprintln!("infra-controller: cannot start");
    for problem in problems {
        eprintln!("  {}: {}. {}", problem.what, problem.error, problem.remedy);
    }
    if problems.iter().all(|p| p.error.is_transient()) { Exit::Unavailable } else { Exit::Config }
}
