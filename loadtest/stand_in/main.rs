//! A stand-in for AWS under load: SQS and DynamoDB over AwsJson with settable latency and faults, and a worker that
//! answers at once. An operation costs it some ten microseconds, so that on a small machine the gateway is what is
//! measured.
//!
//! It keeps counts, not contents: messages go to the worker and are gone, of log rows only a hash of the key remains, and
//! functions `fn-0`, `fn-1` … are made up as they are asked for. The emulator of the tests keeps contents; it takes a
//! hundred times longer.
//!
//! Everything runs on one thread, so the state needs no locks.

mod dynamodb;
mod http;
mod settings;
mod sqs;
mod worker;

use clap::Parser;
use settings::{Settings, Stats};
use std::cell::RefCell;
use std::collections::HashSet;
use std::net::SocketAddr;
use std::rc::Rc;
use tokio::net::TcpListener;
use worker::Worker;

#[derive(Parser)]
struct Args {
    #[arg(long)]
    listen: SocketAddr,
    /// Where the worker publishes results; without it nobody answers the jobs.
    #[arg(long)]
    redis: Option<SocketAddr>,
    /// Functions that exist: `fn-0` to `fn-<N-1>`.
    #[arg(long, default_value_t = 1)]
    functions: u64,
    /// From the last byte of a request to the queue until its answer.
    #[arg(long, default_value_t = 8)]
    sqs_ms: u64,
    /// The same for the tables.
    #[arg(long, default_value_t = 4)]
    dynamodb_ms: u64,
    /// From the queue's answer until the result is published.
    #[arg(long, default_value_t = 5)]
    worker_ms: u64,
}

/// Everything the stand-in knows.
struct State {
    settings: RefCell<Settings>,
    stats: RefCell<Stats>,
    /// Hashes of the keys of the log rows.
    rows: RefCell<HashSet<u64>>,
    worker: Option<Worker>,
    functions: u64,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    tokio::task::LocalSet::new().block_on(&runtime, run(args))
}

async fn run(args: Args) -> anyhow::Result<()> {
    let settings = Settings::new(args.sqs_ms, args.dynamodb_ms, args.worker_ms);
    let worker = match args.redis {
        Some(address) => Some(Worker::start(address).await?),
        None => None,
    };
    let state = Rc::new(State {
        settings: RefCell::new(settings),
        stats: RefCell::default(),
        rows: RefCell::default(),
        worker,
        functions: args.functions,
    });
    let listener = TcpListener::bind(args.listen).await?;
    println!("ready");
    loop {
        let (connection, _) = listener.accept().await?;
        connection.set_nodelay(true)?;
        spawn(http::serve(connection, Rc::clone(&state)));
    }
}

#[expect(clippy::disallowed_methods, reason = "one thread, and everything ends with the process")]
fn spawn(task: impl Future<Output = ()> + 'static) {
    tokio::task::spawn_local(task);
}
