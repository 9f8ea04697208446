//! `infra-controller`: arguments and exit codes.

use clap::{Parser, Subcommand};
use infra_controller::{boot, log};
use std::net::IpAddr;
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
        /// Where functions, logs and unfinished jobs are kept.
        #[arg(long, default_value = "./dev-data")]
        data_dir: PathBuf,
        /// Address to listen on; the loopback address unless named.
        #[arg(long)]
        listen: Option<IpAddr>,
        /// Directory with server.toml and limits.toml.
        #[arg(long)]
        conf: Option<PathBuf>,
    },
    /// Run a node of the fleet, on SQS, DynamoDB, S3 and Redis as the environment (or ./.env) says.
    #[cfg(feature = "aws")]
    Serve {
        /// Take the place of the process that listens on the same port, if there is one: it hands over its socket,
        /// finishes what it has begun, and ends.
        #[arg(long)]
        upgrade: bool,
        /// Directory with server.toml and limits.toml.
        #[arg(long)]
        conf: Option<PathBuf>,
    },
    /// Run the start-up checks of `serve` and exit.
    #[cfg(feature = "aws")]
    Check {
        /// Directory with server.toml and limits.toml.
        #[arg(long)]
        conf: Option<PathBuf>,
    },
}

fn main() -> ExitCode {
    let args = Args::parse();
    #[cfg(feature = "aws")]
    if matches!(args.command, Command::Serve { .. } | Command::Check { .. })
        && let Err(e) = read_dotenv()
    {
        eprintln!("infra-controller: ./.env cannot be read: {e}");
        return ExitCode::from(boot::Exit::Config.code());
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
        Command::Check { conf } => boot::check(&boot::ServeArgs { conf, upgrade: false }),
    };
    ExitCode::from(exit.code())
}

/// Takes `./.env` into the environment, where the AWS SDK finds it too. What is set already wins.
#[cfg(feature = "aws")]
fn read_dotenv() -> std::io::Result<()> {
    let text = match std::fs::read(".env") {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    for (name, value) in infra_controller::config::dotenv::parse(&text) {
        if std::env::var_os(&name).is_none() && !value.contains('\0') {
            #[expect(unsafe_code, reason = "no other thread runs yet that could read the environment")]
            // SAFETY: `main` has started no thread.
            unsafe {
                std::env::set_var(name, value);
            }
        }
    }
    Ok(())
}
