//! Builds, starts and stops a process. The only module that chooses a backend.
//!
//! A process is one Pingora server with one service (see [`node`]). Its runtime hosts the Redis and AWS
//! clients as well as the listeners, because a hop to another runtime would cost about 10 µs a request. The
//! service connects first and listens afterwards, so a process that cannot work never binds its port.

mod accept;
mod build;
mod dev;
mod disk;
mod init;
mod node;
#[cfg(feature = "aws")]
mod node_id;
mod process;
mod reload;
#[cfg(feature = "aws")]
mod serve;
mod signals;
mod sockets;
#[cfg(feature = "aws")]
mod state_dir;
mod upgrade;

pub use dev::{DevArgs, dev};
pub use init::run_beneath_init;
#[cfg(feature = "aws")]
pub use serve::{ServeArgs, check, serve};

use crate::backend::{Backend, StartProblem};
use crate::config::{self, AiNode, Conf, ConfTexts, ConfigError, NewKey, Secret};
use crate::gateway::Pseudonym;
use crate::model::{NodeId, Scope};
use reload::ConfSource;
use std::future::Future;
use std::io::Write;
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

/// A background loop of the backend. It ends some time after the watch turns true.
type BackendLoop = Box<dyn FnOnce(watch::Receiver<bool>) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send>;

/// A connected backend, and the identity of this node in it.
struct ConnectedBackend {
    node: NodeId,
    backend: Backend,
    bucket: String,
    /// An empty directory for uploads in progress.
    spool_dir: PathBuf,
    /// Directory for rows that wait for the log table. `None`: the table is on the same disk.
    spill_dir: Option<PathBuf>,
    extra_loop: Option<BackendLoop>,
    /// Held for as long as the process runs.
    claim: Option<Arc<dyn StateClaim>>,
    /// Problems that do not prevent the start.
    warnings: Vec<String>,
}

/// The claim of a node to its state directory. A start that fails drops it, which removes a new directory.
trait StateClaim: Send + Sync {
    /// Makes the claim permanent, because the start succeeded.
    fn keep(&self);

    /// Checks that the directory exists and is locked by this process, and restores it if not. Called
    /// periodically; blocks.
    fn tend(&self);
}

/// Connects to the backend. The error lists every problem found.
type Connect = Box<
    dyn FnOnce() -> Pin<Box<dyn Future<Output = Result<ConnectedBackend, Vec<StartProblem>>> + Send>>
        + Send
        + Sync,
>;

/// Everything a node needs to start.
struct NodePlan {
    settings: NodeSettings,
    connect: Connect,
}

/// The settings of a node, from the command line, the environment and `conf/`.
struct NodeSettings {
    conf: Conf,
    /// Where `conf` was read from, and where it is reloaded from.
    source: ConfSource,
    texts: ConfTexts,
    port: u16,
    /// Directory in which a successor finds the process on the same port. `None`: there is no handover.
    meet_in: Option<PathBuf>,
    /// Whether to take over the sockets of a running process, if there is one.
    is_upgrade: bool,
    api_key: Secret,
    /// Name of this fleet in `Via` fields of forwarded requests.
    pseudonym: Pseudonym,
    /// Address of the model catalogue. `None`: there is no catalogue.
    ai_node: Option<AiNode>,
    /// Second listen address, besides `conf.listen.address`. Ignored if this machine does not have it.
    listen_beside: Option<Ipv6Addr>,
    /// Printed to standard error once the port is bound. `{url}` is replaced by the URL of the server.
    banner: Option<String>,
}

/// Subdirectory of a node's directory for uploads in progress.
const SPOOL: &str = "spool";
/// Subdirectory of a node's directory for rows that wait for the log table.
#[cfg(feature = "aws")]
const SPILL: &str = "spill";

/// Creates an API key. The key goes to standard error and its entry to standard output, so that
/// `>> conf/keys.toml` appends the entry only.
pub fn new_key(name: String, scopes: Vec<Scope>, functions: Vec<String>, expires: Option<&str>) -> Exit {
    let functions = (!functions.is_empty()).then_some(functions);
    match config::new_key(name, scopes, functions, expires) {
        Ok(NewKey { key, lines }) => {
            let mut out = std::io::stdout();
            // Write the entry first. Without it the key is not valid, so it must not be shown.
            if let Err(e) = out.write_all(lines.as_bytes()).and_then(|()| out.flush()) {
                eprintln!("infra-controller: no key was created: its entry could not be written: {e}");
                return Exit::Internal;
            }
            eprintln!("API key (it is not stored and shown only now): {}", key.reveal());
            Exit::Ok
        }
        Err(ConfigError(problems)) => {
            eprintln!("infra-controller: the key cannot be created");
            problems.iter().for_each(|problem| eprintln!("  {problem}"));
            Exit::Config
        }
    }
}

/// Prints the problems of the configuration.
fn refuse(error: &ConfigError) -> Exit {
    eprintln!("infra-controller: the configuration cannot be used");
    for problem in &error.0 {
        eprintln!("  {problem}");
    }
    Exit::Config
}

/// Prints the problems that prevent the start. [`Exit::Unavailable`] if all of them are transient, else
/// [`Exit::Config`].
fn explain(problems: &[StartProblem]) -> Exit {
    eprintln!("infra-controller: cannot start");
    for problem in problems {
        eprintln!("  {}: {}. {}", problem.what, problem.error, problem.remedy);
    }
    if problems.iter().all(|p| p.error.is_transient()) { Exit::Unavailable } else { Exit::Config }
}
