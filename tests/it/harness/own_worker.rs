//! `infra-controller worker`: settings, start, `/health` and `/metrics`, stop.

use super::aws::{Cloud, SECRET_ACCESS_KEY};
use super::gateway::{Exited, Gateway, put_file, reloads, series_value, start_process};
use super::http::{Answer, Request};
use super::process::{Process, Scratch, Stream};
use super::redis::Redis;
use super::wait::{SOON, eventually};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const START_WITHIN: Duration = Duration::from_secs(90);
/// More than the default of `jobs.drain_s`, 30 s.
const STOP_WITHIN: Duration = Duration::from_secs(90);
/// The exit code if a backend did not answer in time.
const UNAVAILABLE: i32 = 69;
/// Starts of one worker. A service manager starts it again as well, and the emulator may be slow.
const STARTS_MAX: u32 = 5;
/// Users of a worker, and the first of all workers of the tests; see [`WorkerSettings::new`].
const USERS_EACH: u32 = 4096;
const USERS_FIRST: u32 = 1_000_000_000;

/// A `worker.toml`, for `worker` and for `dev`.
#[derive(Clone)]
pub struct WorkerSettings(BTreeMap<String, Value>);

impl WorkerSettings {
    /// Functions reach the loopback addresses, where a [`super::hold::Hold`] listens. Few processes are
    /// started ahead, because many workers of tests share the machine. A stop does not wait for runs.
    ///
    /// Each worker has users of its own: a user has one limit of processes on the whole machine.
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let users = USERS_FIRST + COUNT.fetch_add(1, Ordering::Relaxed) * USERS_EACH;
        Self(BTreeMap::new())
            .with("sandbox.network", "full")
            .with("sandbox.uid_first", users)
            .with("warm.interpreters", 1)
            .with("jobs.drain_s", 0)
            .with("listener.address", "127.0.0.1")
            .with("listener.port", 0)
    }

    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.set(key, value);
        self
    }

    pub fn set(&mut self, key: &str, value: impl Into<Value>) {
        self.0.insert(key.to_owned(), value.into());
    }

    /// Texts, numbers and truth values are the same in TOML and in JSON.
    pub fn to_toml(&self) -> String {
        self.0.iter().map(|(key, value)| format!("{key} = {value}\n")).collect()
    }
}

/// What a worker is started with.
#[derive(Clone)]
pub struct WorkerSetup {
    settings: WorkerSettings,
    env: Vec<(String, String)>,
    /// Whether the variables are in `./.env`, and the environment is empty.
    is_in_file: bool,
    secrets: Vec<String>,
}

impl WorkerSetup {
    /// The files of functions go to the bucket that has their code.
    pub fn new(cloud: &Cloud, redis: &Redis) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("worker-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let secrets = [Some(SECRET_ACCESS_KEY), redis.password()];
        let secrets = secrets.into_iter().flatten().map(str::to_owned).collect();
        let (settings, env) = (WorkerSettings::new(), cloud.env(cloud.addr()));
        Self { settings, env, is_in_file: false, secrets }
            .env("S3_USER_DATA_BUCKET", &cloud.bucket)
            .env("REDIS_URL", &redis.url())
            .env("WORKER_ID", &name)
    }

    /// Replaces all settings.
    pub fn settings(mut self, settings: WorkerSettings) -> Self {
        self.settings = settings;
        self
    }

    pub fn with(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.settings.set(key, value);
        self
    }

    /// The last value of a variable wins.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Sends heartbeats to this gateway.
    pub fn heartbeats_to(mut self, gateway: &Gateway) -> Self {
        self.secrets.push(gateway.key().to_owned());
        self.env("CONTROLLER_URL", &format!("http://{}", gateway.addr())).env("INFRA_API_KEY", gateway.key())
    }

    /// Puts all variables into `./.env`.
    pub fn in_env_file(mut self) -> Self {
        self.is_in_file = true;
        self
    }

    pub fn without_env(mut self, names: &[&str]) -> Self {
        self.env.retain(|(name, _)| !names.contains(&name.as_str()));
        self
    }

    /// The whole environment.
    pub fn all_env(&self) -> Vec<(String, String)> {
        self.env.clone()
    }

    /// Returns before the worker is ready. Its messages wait on the queue.
    pub fn spawn(self) -> OwnWorker {
        let dir = Scratch::new("own-worker");
        std::fs::create_dir(dir.path().join("conf")).expect("the scratch directory is writable");
        std::fs::write(dir.path().join(FILE), self.settings.to_toml()).expect("the directory is writable");
        if self.is_in_file {
            let text: String = self.env.iter().map(|(name, value)| format!("{name}={value}\n")).collect();
            std::fs::write(dir.path().join(".env"), text).expect("the directory is writable");
        }
        let process = Mutex::new(Arc::new(self.start_in(&dir)));
        OwnWorker { setup: self, process, dir }
    }

    pub async fn start(self) -> OwnWorker {
        let worker = self.spawn();
        worker.wait_ready().await;
        worker
    }

    /// Starts a worker that must exit by itself.
    pub async fn run_to_end(self) -> Exited {
        let worker = self.spawn();
        Exited::of(&worker.process(), START_WITHIN).await
    }

    fn start_in(&self, dir: &Scratch) -> Process {
        let env = if self.is_in_file { &[][..] } else { &self.env[..] };
        start_process(&["worker", "--conf", "conf"], env, dir.path())
    }
}

/// The file with the settings, in the directory of the worker.
const FILE: &str = "conf/worker.toml";

pub struct OwnWorker {
    setup: WorkerSetup,
    process: Mutex<Arc<Process>>,
    dir: Scratch,
}

impl OwnWorker {
    pub fn process(&self) -> Arc<Process> {
        Arc::clone(&self.process.lock().expect("the lock is not poisoned"))
    }

    /// The name that it has in results and heartbeats.
    pub fn name(&self) -> &str {
        let mut latest_first = self.setup.env.iter().rev();
        latest_first.find(|(name, _)| name == "WORKER_ID").map_or("", |(_, id)| id)
    }

    /// The directory with the directories of its runs.
    pub fn runs_dir(&self) -> PathBuf {
        self.dir.path().join("state/worker-0/work/runs")
    }

    pub async fn wait_ready(&self) {
        self.addr().await;
    }

    /// The address of its listener, once it is ready.
    pub async fn addr(&self) -> SocketAddr {
        for _ in 0..STARTS_MAX {
            let process = self.process();
            let outcome = eventually("the start of the worker", START_WITHIN, || async {
                match (started_port(&process), process.exit_status()) {
                    (Some(port), _) => Ok(Ok(port)),
                    (None, Some(status)) => Ok(Err(status)),
                    (None, None) => Err(process.output().tail(20)),
                }
            })
            .await;
            match outcome {
                Ok(port) => return SocketAddr::from(([127, 0, 0, 1], port)),
                Err(status) if status.code() == Some(UNAVAILABLE) => {
                    *self.process.lock().expect("the lock is not poisoned") =
                        Arc::new(self.setup.start_in(&self.dir));
                }
                Err(status) => panic!("the worker exited, {status}:\n{}", process.output().tail(50)),
            }
        }
        panic!("{STARTS_MAX} starts found a backend that does not answer");
    }

    pub async fn get(&self, target: &str) -> Answer {
        Request::new(self.addr().await, "GET", target).send().await
    }

    /// Waits until `/health` answers with a status and a body that `is_expected` accepts.
    pub async fn wait_for_health(&self, what: &str, is_expected: impl Fn(u16, &Value) -> bool) -> Value {
        eventually(&format!("/health: {what}"), 3 * SOON, || async {
            let answer = self.get("/health").await;
            let health = answer.json();
            if is_expected(answer.status, &health) { Ok(health) } else { Err(health.to_string()) }
        })
        .await
    }

    /// The value of a series in `/metrics`. `series` includes the labels. `None`: no such series.
    pub async fn metric(&self, series: &str) -> Option<f64> {
        series_value(&self.get("/metrics").await.expect(200).text(), series)
    }

    /// Waits until the series is `least` or more.
    pub async fn wait_for_metric_at_least(&self, series: &str, least: f64) {
        eventually(&format!("{series} {least} or more"), 3 * SOON, || async {
            let value = self.metric(series).await;
            if value >= Some(least) { Ok(()) } else { Err(format!("{value:?}")) }
        })
        .await;
    }

    /// Replaces the settings, and waits until they are applied.
    pub async fn change(&self, settings: &WorkerSettings) {
        let applied = reloads("worker.toml", "applied");
        let before = self.metric(&applied).await.unwrap_or_default();
        self.put_conf(&settings.to_toml());
        self.wait_for_metric_at_least(&applied, before + 1.0).await;
    }

    pub fn put_conf(&self, text: &str) {
        put_file(&self.dir.path().join(FILE), text);
    }

    pub fn settings(&self) -> WorkerSettings {
        self.setup.settings.clone()
    }

    /// The log lines that are JSON.
    pub fn log(&self) -> Vec<Value> {
        let lines = self.process().output().lines(Stream::Out);
        lines.iter().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    pub fn signal(&self, signal: Signal) {
        self.process().signal(signal);
    }

    pub fn kill(&self) {
        self.process().kill();
    }

    pub async fn wait_for_exit(&self, deadline: Duration) -> ExitStatus {
        self.process().wait_for_exit(deadline).await
    }

    /// Asserts a clean end: exit code 0 on SIGTERM, and no log line with an error.
    pub async fn stop(&self) {
        self.stop_after(&[]).await;
    }

    /// As [`Self::stop`], but these errors are in the log, in this order.
    pub async fn stop_after(&self, expected: &[&str]) {
        self.wait_ready().await;
        self.signal(Signal::SIGTERM);
        let status = self.wait_for_exit(STOP_WITHIN).await;
        assert_eq!(status.code(), Some(0), "after SIGTERM:\n{}", self.process().output().tail(50));
        let errors: Vec<Value> = self.log().into_iter().filter(|line| line["level"] == "ERROR").collect();
        assert!(errors.iter().map(|line| &line["msg"]).eq(expected.iter()), "{errors:#?}");
    }
}

impl Drop for OwnWorker {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let process = self.process();
            for secret in &self.setup.secrets {
                assert!(!process.output().contains(secret), "a secret is in the log of the worker");
            }
        }
    }
}

fn started_port(process: &Process) -> Option<u16> {
    let port = |line: &String| {
        let line: Value = serde_json::from_str(line).ok()?;
        let msg = line["msg"].as_str()?;
        let is_it = msg.starts_with("Infra Worker v") && msg.ends_with(" Started");
        is_it.then(|| u16::try_from(line["port"].as_u64().expect("a port")).expect("the port fits"))
    };
    process.output().lines(Stream::Out).iter().find_map(port)
}
