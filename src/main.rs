//! The `infra-controller` binary: parses the command line, prepares the environment and returns the exit
//! code.

use clap::{Parser, Subcommand};
use infra_controller::model::Scope;
use infra_controller::{boot, log};
use std::net::IpAddr;
#[cfg(feature = "aws")]
use std::path::Path;
use std::path::PathBuf;
use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The gateway of a function platform.
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run everything on this machine: queue, tables and a worker in one process.
    Dev {
        /// Port to listen on; 0 takes any free one.
        #[arg(long, default_value_t = 8080)]
        port: u16,
        /// Directory for functions, logs and unfinished jobs.
        #[arg(long, default_value = "./dev-data")]
        data_dir: PathBuf,
        /// Address to listen on. Default: the loopback addresses 127.0.0.1 and ::1.
        #[arg(long)]
        listen: Option<IpAddr>,
        /// Directory with server.toml, limits.toml, keys.toml, upstreams.toml and worker.toml.
        #[arg(long)]
        conf: Option<PathBuf>,
    },
    /// Run a node of the fleet, on the SQS, DynamoDB, S3 and Redis that the environment (or ./.env) names.
    #[cfg(feature = "aws")]
    Serve {
        /// Replace the process that listens on the same port, if there is one: it hands over its sockets,
        /// finishes the requests in flight, and exits.
        #[arg(long)]
        upgrade: bool,
        /// Directory with server.toml, limits.toml, keys.toml and upstreams.toml.
        #[arg(long)]
        conf: Option<PathBuf>,
    },
    /// Run a worker of the fleet: takes jobs from the SQS queue that the environment (or ./.env) names, runs
    /// their functions in a sandbox, and hands their results on through Redis.
    #[cfg(feature = "aws")]
    Worker {
        /// Directory with worker.toml.
        #[arg(long)]
        conf: Option<PathBuf>,
    },
    /// Run the start-up checks of `serve` and exit.
    #[cfg(feature = "aws")]
    Check {
        /// Directory with server.toml, limits.toml, keys.toml and upstreams.toml.
        #[arg(long)]
        conf: Option<PathBuf>,
    },
    /// Manage API keys.
    Key {
        #[command(subcommand)]
        command: KeyCommand,
    },
}

#[derive(Subcommand)]
enum KeyCommand {
    /// Create a key. The key is printed once, to standard error; its entry for conf/keys.toml goes to
    /// standard output.
    New {
        /// Name of the key in limits, logs and change records.
        #[arg(long)]
        name: String,
        /// Scope of the key: run, read, write, worker, metrics, or admin for everything. May be repeated.
        #[arg(long = "scope", required = true, value_parser = scope)]
        scopes: Vec<Scope>,
        /// Function that the key may run, or a prefix followed by *. May be repeated. Default: all functions.
        #[arg(long = "function")]
        functions: Vec<String>,
        /// Expiry time, such as 2027-01-01T00:00:00Z. Default: never.
        #[arg(long)]
        expires: Option<String>,
    },
}

impl Command {
    /// Whether functions run beneath this process. Orphans among them become children of process 1.
    fn runs_functions(&self) -> bool {
        #[cfg(feature = "aws")]
        if matches!(self, Self::Worker { .. }) {
            return true;
        }
        matches!(self, Self::Dev { .. })
    }

    /// Whether the settings come from `./.env` as well.
    #[cfg(feature = "aws")]
    fn reads_dotenv(&self) -> bool {
        matches!(self, Self::Serve { .. } | Self::Worker { .. } | Self::Check { .. })
    }
}

fn scope(name: &str) -> Result<Scope, String> {
    let names = || Scope::ALL.map(Scope::name).join(", ");
    Scope::parse(name).ok_or_else(|| format!("must be one of {}", names()))
}

fn main() -> ExitCode {
    let args = Args::parse();
    // Must run before the first thread starts: threads inherit the signal mask.
    if args.command.runs_functions() {
        match boot::run_beneath_init() {
            None => {}
            Some(Ok(code)) => return ExitCode::from(code),
            Some(Err(e)) => {
                eprintln!("infra-controller: cannot start the program as a child of process 1: {e}");
                return ExitCode::from(boot::Exit::Internal.code());
            }
        }
    }
    #[cfg(feature = "aws")]
    if args.command.reads_dotenv() {
        if let Err(e) = read_dotenv() {
            eprintln!("infra-controller: ./.env {e}");
            return ExitCode::from(boot::Exit::Config.code());
        }
        trim_sdk_variables();
    }
    let exit = match args.command {
        Command::Dev { port, data_dir, listen, conf } => {
            let _log = log::start();
            boot::dev(boot::DevArgs { port, data_dir, listen, conf })
        }
        #[cfg(feature = "aws")]
        Command::Serve { upgrade, conf } => {
            let _log = log::start();
            boot::serve(&boot::ServeArgs { conf, upgrade })
        }
        #[cfg(feature = "aws")]
        Command::Worker { conf } => {
            let _log = log::start();
            boot::worker(&boot::WorkerArgs { conf })
        }
        #[cfg(feature = "aws")]
        Command::Check { conf } => boot::check(&boot::ServeArgs { conf, upgrade: false }),
        Command::Key { command: KeyCommand::New { name, scopes, functions, expires } } => {
            boot::new_key(name, scopes, functions, expires.as_deref())
        }
    };
    ExitCode::from(exit.code())
}

/// Loads `./.env` into the process environment, which the AWS SDK reads too. Variables that are set already
/// win.
#[cfg(feature = "aws")]
fn read_dotenv() -> Result<(), String> {
    for (name, value) in infra_controller::config::dotenv::read(Path::new(".env"))? {
        if std::env::var_os(&name).is_none() {
            set_variable(&name, Some(&value));
        }
    }
    Ok(())
}

/// Trims the variables that the AWS SDK reads itself. A secret that was read from a file often ends with a
/// line break, which no header field can carry. A variable that is then empty is removed, because the SDK
/// would treat it as a value. All other variables are treated the same way.
#[cfg(feature = "aws")]
fn trim_sdk_variables() {
    for (name, value) in std::env::vars_os() {
        let (Ok(name), Ok(value)) = (name.into_string(), value.into_string()) else { continue };
        let trimmed = value.trim();
        if name.starts_with("AWS_") && (trimmed.is_empty() || trimmed != value) {
            set_variable(&name, (!trimmed.is_empty()).then_some(trimmed));
        }
    }
}

/// Sets a variable, or removes it if `value` is `None`.
#[cfg(feature = "aws")]
fn set_variable(name: &str, value: Option<&str>) {
    #[expect(unsafe_code, reason = "no other thread runs yet that could read the environment")]
    // SAFETY: `main` calls this before it starts any thread, and the thread that read `.env` has ended.
    unsafe {
        match value {
            Some(value) => std::env::set_var(name, value),
            None => std::env::remove_var(name),
        }
    }
}
