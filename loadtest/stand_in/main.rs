//! A stand-in for AWS under load: SQS and DynamoDB over AWS JSON, with settable latency and faults, and a
//! worker that answers after a fixed time, or an inbox and code for a worker of ours. An operation costs some
//! ten microseconds of CPU, so a small machine measures the gateway and not the stand-in.
//!
//! It keeps counts, not contents. Messages go to the worker and are dropped; of a log row a hash of its key
//! remains; the functions `fn-0`, `fn-1` … are generated when they are read. The emulator that the tests use
//! keeps contents, and an operation takes a hundred times as long.
//!
//! Everything runs on one thread, so the state needs no locks.

mod answer;
mod dynamodb;
mod http;
mod inbox;
mod settings;
mod sqs;
mod worker;

use bytes::Bytes;
use clap::Parser;
use inbox::Inbox;
use settings::{Settings, Stats};
use std::cell::RefCell;
use std::collections::HashSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use tokio::net::TcpListener;
use worker::Worker;

#[derive(Parser)]
struct Args {
    #[arg(long)]
    listen: SocketAddr,
    /// Where the worker publishes results. Without it, jobs get no results.
    #[arg(long)]
    redis: Option<SocketAddr>,
    /// Functions that exist: `fn-0` to `fn-<N-1>`.
    #[arg(long, default_value_t = 1)]
    functions: u64,
    /// The code of all functions, a zip. Messages then wait for a worker of ours.
    #[arg(long)]
    code: Option<PathBuf>,
    /// The handler of all functions.
    #[arg(long)]
    handler: Option<String>,
    /// Latency of the queue: from the last byte of a request to its answer.
    #[arg(long, default_value_t = 8)]
    sqs_ms: u64,
    /// Latency of the tables.
    #[arg(long, default_value_t = 4)]
    dynamodb_ms: u64,
    /// Time of a run: from the queue's answer to the publication of the result.
    #[arg(long, default_value_t = 5)]
    worker_ms: u64,
}

/// Shared by all connections.
struct State {
    settings: RefCell<Settings>,
    stats: RefCell<Stats>,
    /// Hashes of the keys of the log rows.
    rows: RefCell<HashSet<u64>>,
    worker: Option<Worker>,
    functions: u64,
    code: Bytes,
    handler: Option<String>,
    /// For a worker of ours.
    inbox: Option<Inbox>,
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
    let code = args.code.as_ref().map(std::fs::read).transpose()?;
    let state = Rc::new(State {
        settings: RefCell::new(settings),
        stats: RefCell::default(),
        rows: RefCell::default(),
        worker,
        functions: args.functions,
        inbox: code.is_some().then(Inbox::default),
        code: code.unwrap_or_default().into(),
        handler: args.handler,
    });
    let listener = TcpListener::bind(args.listen).await?;
    println!("ready");
    loop {
        let (connection, _) = listener.accept().await?;
        connection.set_nodelay(true)?;
        spawn(http::serve(connection, Rc::clone(&state)));
    }
}

#[expect(clippy::disallowed_methods, reason = "there is one thread, and tasks end with the process")]
fn spawn(task: impl Future<Output = ()> + 'static) {
    tokio::task::spawn_local(task);
}
