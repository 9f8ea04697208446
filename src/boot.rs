//! Wires everything; the only place that chooses a backend.
//!
//! A process is one Pingora server with one service (see [`node`]). Its runtime hosts the clients of Redis and
//! AWS as well as the listener: a hop to another runtime would cost about 10 µs a request. The service connects
//! first and listens then, so a process that cannot work never binds its port.

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

/// How a process ends; the numbers are those of `sysexits.h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Stopped as asked.
    Ok,
    /// A part of the program failed that must not.
    Internal,
    /// A backend did not answer (EX_UNAVAILABLE).
    Unavailable,
    /// Something is missing, malformed, does not exist or is refused (EX_CONFIG).
    Config,
}

impl Exit {
    pub fn code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Internal => 70,
            Self::Unavailable => 69,
            Self::Config => 78,
        }
    }
}

/// A loop that a backend brings along; it ends some time after the watch turns true.
type BackendLoop = Box<dyn FnOnce(watch::Receiver<bool>) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send>;

/// A backend that is connected, and who we are in it.
struct Connected {
    node: NodeId,
    backend: Backend,
    bucket: String,
    /// An empty directory for uploads on their way.
    spool_dir: PathBuf,
    /// Where rows wait for a log table that is away; `None`: the table is on the same disk.
    spill_dir: Option<PathBuf>,
    extra_loop: Option<BackendLoop>,
    /// Held as long as the process runs.
    claim: Option<Arc<dyn Claim>>,
    /// What is amiss but keeps nobody from starting.
    warnings: Vec<String>,
}

/// A place that a node takes, and gives back if the start fails.
trait Claim: Send + Sync {
    /// The start succeeded.
    fn keep(&self);

    /// Sees to it that the place is there and ours, now and then; blocks.
    fn tend(&self);
}

/// Connects; fails with every problem there is.
type Connect = Box<
    dyn FnOnce() -> Pin<Box<dyn Future<Output = Result<Connected, Vec<StartProblem>>> + Send>> + Send + Sync,
>;

/// Everything a node needs to start.
struct Plan {
    settings: Settings,
    connect: Connect,
}

/// What a node is told.
struct Settings {
    conf: Conf,
    /// Where `conf` came from, and will come from again.
    source: ConfSource,
    texts: ConfTexts,
    port: u16,
    /// Where processes that listen on the same port meet; `None`: there is only one.
    meet_in: Option<PathBuf>,
    /// Takes the place of a running process, if there is one.
    is_upgrade: bool,
    api_key: Secret,
    /// What this fleet calls itself to the services behind it.
    pseudonym: Pseudonym,
    /// Where the model catalogue is.
    ai_node: Option<AiNode>,
    /// Listened on beside `conf.listen.address`, if this machine has it.
    listen_beside: Option<Ipv6Addr>,
    /// Printed for the person at the terminal once the port is bound; `{url}` stands for where.
    banner: Option<String>,
}

/// Where uploads on their way lie, in the directory of a node.
const SPOOL: &str = "spool";
/// And rows that wait for the log table.
#[cfg(feature = "aws")]
const SPILL: &str = "spill";

/// Makes an API key. It goes to standard error, so that `>> conf/keys.toml` takes the lines alone.
pub fn new_key(name: String, scopes: Vec<Scope>, functions: Vec<String>, expires: Option<&str>) -> Exit {
    let functions = (!functions.is_empty()).then_some(functions);
    match config::new_key(name, scopes, functions, expires) {
        Ok(NewKey { key, lines }) => {
            let mut out = std::io::stdout();
            // The lines first: without them the key opens nothing, and must not look as if it did.
            if let Err(e) = out.write_all(lines.as_bytes()).and_then(|()| out.flush()) {
                eprintln!("infra-controller: no key was made: its lines could not be written: {e}");
                return Exit::Internal;
            }
            eprintln!("The key, which is shown only now: {}", key.reveal());
            Exit::Ok
        }
        Err(ConfigError(problems)) => {
            eprintln!("infra-controller: no such key can be made");
            problems.iter().for_each(|problem| eprintln!("  {problem}"));
            Exit::Config
        }
    }
}

/// Says what is wrong with the configuration.
fn refuse(error: &ConfigError) -> Exit {
    eprintln!("infra-controller: the configuration cannot be used");
    for problem in &error.0 {
        eprintln!("  {problem}");
    }
    Exit::Config
}

/// Says what keeps the process from starting. What an operator must mend goes before what may pass.
fn explain(problems: &[StartProblem]) -> Exit {
    eprintln!("infra-controller: cannot start");
    for problem in problems {
        eprintln!("  {}: {}. {}", problem.what, problem.error, problem.mend);
    }
    if problems.iter().all(|p| p.error.is_transient()) { Exit::Unavailable } else { Exit::Config }
}
