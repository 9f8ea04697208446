//! The Python worker (`tests/it/worker/worker.py`): written from the contract, not from our code.

use super::aws::{Cloud, credentials_env, venv};
use super::process::{Process, Scratch, Stream};
use super::redis::Redis;
use super::wait::poll_blocking;
use nix::sys::signal::Signal;
use std::path::Path;
use std::time::Duration;

const READY_WITHIN: Duration = Duration::from_secs(60);

pub struct Worker {
    process: Process,
    _dir: Scratch,
}

impl Worker {
    /// Returns before the worker is ready; its messages wait for it on the queue.
    pub fn start(cloud: &Cloud, redis: &Redis) -> Self {
        let dir = Scratch::new("worker");
        let mut env = super::path_env();
        env.extend(credentials_env());
        env.push(("AWS_ENDPOINT_URL_SQS".into(), format!("http://{}", cloud.addr())));
        env.push(("AWS_ENDPOINT_URL_S3".into(), format!("http://{}", cloud.addr())));
        env.push(("SQS_URL".into(), cloud.queue_url.clone()));
        env.push(("REDIS_URL".into(), redis.url()));
        env.push(("PYTHONDONTWRITEBYTECODE".into(), "1".into()));
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/worker/worker.py");
        let script = script.to_str().expect("the path is UTF-8");
        let process = Process::start("worker.py", &venv("python"), &[script], &env, dir.path());
        Self { process: process.expect("the venv's Python starts"), _dir: dir }
    }

    pub fn wait_ready(&self) {
        let ready = poll_blocking(READY_WITHIN, || {
            let output = self.process.output();
            if output.contains("worker ready") { Ok(()) } else { Err(output.tail(20)) }
        });
        assert!(ready.is_ok(), "the worker is not ready: {ready:?}");
    }

    /// Ends it, and asserts that no job broke it.
    pub fn stop(&self) {
        self.wait_ready();
        self.process.signal(Signal::SIGTERM);
        let status = self.process.wait(Duration::from_secs(10));
        assert!(status.is_some_and(|s| s.success()), "the worker ended with {status:?}");
        let errors = self.process.output().lines(Stream::Err);
        assert!(errors.is_empty(), "the worker complained: {errors:#?}");
    }
}
