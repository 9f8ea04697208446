//! Builds, starts and stops a process. The only module that chooses a backend.
//!
//! A gateway is one Pingora server with one service (see [`node`]). Its runtime hosts the Redis and AWS
//! clients as well as the listeners, because a hop to another runtime would cost about 10 µs per request. The
//! service connects first and listens afterwards, so a process that cannot work never binds its port.
//!
//! A worker of a fleet ([`worker()`]) has no gateway, and so no Pingora.

mod accept;
mod build;
mod dev;
mod disk;
mod init;
mod isolation;
mod node;
#[cfg(feature = "aws")]
mod node_id;
mod notify;
mod plan;
mod process;
mod reload;
#[cfg(feature = "aws")]
mod serve;
mod signals;
mod sockets;
#[cfg(feature = "aws")]
mod state_dir;
mod upgrade;
#[cfg(feature = "aws")]
mod worker;
#[cfg(feature = "aws")]
mod worker_dir;

pub use dev::{DevArgs, dev};
pub use init::run_beneath_init;
pub use plan::Exit;
#[cfg(feature = "aws")]
pub use serve::{ServeArgs, check, serve};
#[cfg(feature = "aws")]
pub use worker::{WorkerArgs, worker};

use crate::config::{self, ConfigError, NewKey};
use crate::model::Scope;
use reload::ConfSource;
use std::io::Write;

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
