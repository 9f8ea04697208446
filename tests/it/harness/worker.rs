//! The worker of a platform: the one in Python (`tests/it/worker/worker.py`), or `infra-controller worker`.
//!
//! The Python worker is written from the contract, not from the code, and does whatever a broken worker may
//! do. `make test-worker` runs the tests with our own worker in its place.

use super::aws::{Cloud, credentials_env, venv};
use super::own_worker::{OwnWorker, WorkerSettings, WorkerSetup};
use super::process::{Process, Scratch, Stream};
use super::redis::Redis;
use super::wait::SOON;
use base64::Engine;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;

const READY_WITHIN: Duration = Duration::from_secs(60);
/// The variable with the name of the worker for tests that need no certain one: `own`, or `python`.
const WORKER: &str = "INFRA_TEST_WORKER";

/// The input of a run whose result is exactly this text.
pub fn literal(result: &str) -> Value {
    let base64 = base64::engine::general_purpose::STANDARD.encode(result);
    json!({ "behave": "literal", "base64": base64 })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkerKind {
    Python,
    Own,
}

impl WorkerKind {
    /// The worker of this test run.
    pub fn of_this_run() -> Self {
        match std::env::var(WORKER).as_deref() {
            Ok("own") => Self::Own,
            Ok("python") | Err(_) => Self::Python,
            Ok(other) => panic!("{WORKER}={other}: the workers are `own` and `python`"),
        }
    }
}

pub enum Worker {
    Python(PythonWorker),
    Own(OwnWorker),
}

impl Worker {
    /// Returns before the worker is ready. Its messages wait on the queue. `settings`: of our own worker.
    pub fn start(kind: WorkerKind, cloud: &Cloud, redis: &Redis, settings: WorkerSettings) -> Self {
        match kind {
            WorkerKind::Python => Self::Python(PythonWorker::start(cloud, redis, &[])),
            WorkerKind::Own => Self::Own(WorkerSetup::new(cloud, redis).settings(settings).spawn()),
        }
    }

    pub async fn wait_ready(&self) {
        match self {
            Self::Python(worker) => worker.wait_ready().await,
            Self::Own(worker) => worker.wait_ready().await,
        }
    }

    /// Stops the worker, and asserts that it has reported no errors.
    pub async fn stop(&self) {
        match self {
            Self::Python(worker) => worker.stop().await,
            Self::Own(worker) => worker.stop().await,
        }
    }
}

pub struct PythonWorker {
    process: Process,
    _dir: Scratch,
}

impl PythonWorker {
    /// Returns before the worker is ready. Its messages wait on the queue.
    pub fn start(cloud: &Cloud, redis: &Redis, more: &[(&str, &str)]) -> Self {
        let dir = Scratch::new("worker");
        let mut env = super::path_env();
        env.extend(credentials_env());
        env.push(("AWS_ENDPOINT_URL_SQS".into(), format!("http://{}", cloud.addr())));
        env.push(("AWS_ENDPOINT_URL_S3".into(), format!("http://{}", cloud.addr())));
        env.push(("SQS_URL".into(), cloud.queue_url.clone()));
        env.push(("REDIS_URL".into(), redis.url()));
        env.push(("PYTHONDONTWRITEBYTECODE".into(), "1".into()));
        env.extend(more.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/worker/worker.py");
        let script = script.to_str().expect("the path is UTF-8");
        let process = Process::start("worker.py", &venv("python"), &[script], &env, dir.path());
        Self { process: process.expect("the venv's Python starts"), _dir: dir }
    }

    pub async fn wait_ready(&self) {
        self.process.wait_for_output("worker ready", READY_WITHIN).await;
    }

    /// Stops the worker, and asserts that it has printed no errors.
    pub async fn stop(&self) {
        self.wait_ready().await;
        self.process.signal(Signal::SIGTERM);
        let status = self.process.wait_for_exit(SOON).await;
        assert!(status.success(), "the worker exited with {status}");
        let errors = self.process.output().lines(Stream::Err);
        assert!(errors.is_empty(), "the worker printed errors: {errors:#?}");
    }
}
