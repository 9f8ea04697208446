//! The platform of one test, on either backend.

use super::aws::{Cloud, SECRET_ACCESS_KEY};
use super::aws_proxy::{AwsProxy, Policy};
use super::gateway::{Conf, Gateway, put_file, reloads};
use super::hold::{HOLDING, Hold};
use super::own_worker::{OwnWorker, WorkerSettings};
use super::process::Scratch;
use super::redis::Redis;
use super::worker::{Worker, WorkerKind};
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// The function that exists on both backends: `dev` seeds it, and for `serve` the harness puts it into the
/// table. Its output contains its input.
pub const HELLO: &str = "hello";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    Dev,
    Serve,
}

/// The settings of a platform. The default has a worker and no faults.
pub struct Setup {
    pub backend: Backend,
    conf: Option<Conf>,
    env: Vec<(String, String)>,
    queue_attributes: Vec<(&'static str, &'static str)>,
    redis_password: Option<&'static str>,
    policy: Policy,
    worker: Option<WorkerKind>,
    worker_settings: WorkerSettings,
    dead_letters: bool,
}

impl Setup {
    pub fn new(backend: Backend) -> Self {
        Self {
            backend,
            conf: None,
            env: Vec::new(),
            queue_attributes: Vec::new(),
            redis_password: None,
            policy: Policy::PassAll,
            worker: Some(WorkerKind::of_this_run()),
            worker_settings: WorkerSettings::new(),
            dead_letters: false,
        }
    }

    pub fn serve() -> Self {
        Self::new(Backend::Serve)
    }

    pub fn conf(mut self, conf: Conf) -> Self {
        self.conf = Some(conf);
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    pub fn queue_attribute(mut self, name: &'static str, value: &'static str) -> Self {
        self.queue_attributes.push((name, value));
        self
    }

    pub fn redis_password(mut self, password: &'static str) -> Self {
        self.redis_password = Some(password);
        self
    }

    /// Starts a proxy between the gateway and AWS.
    pub fn policy(mut self, policy: Policy) -> Self {
        self.policy = policy;
        self
    }

    /// No worker: the test acts as the worker.
    pub fn no_worker(mut self) -> Self {
        self.worker = None;
        self
    }

    /// The Python worker, whatever the worker of this test run is: for results that our own worker never
    /// writes.
    pub fn python_worker(mut self) -> Self {
        self.worker = Some(WorkerKind::Python);
        self
    }

    /// `infra-controller worker`, whatever the worker of this test run is.
    pub fn own_worker(mut self) -> Self {
        self.worker = Some(WorkerKind::Own);
        self
    }

    /// A setting of the worker of `dev`, or of our own worker.
    pub fn worker_setting(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.worker_settings.set(key, value);
        self
    }

    /// Adds a dead-letter queue.
    pub fn dead_letters(mut self) -> Self {
        self.dead_letters = true;
        self
    }

    pub async fn start(self) -> Platform {
        match self.backend {
            Backend::Dev => self.start_dev().await,
            Backend::Serve => self.start_serve().await,
        }
    }

    async fn start_dev(self) -> Platform {
        let dir = Scratch::new("data");
        let key = new_key();
        let mut env = self.env;
        env.push(("INFRA_API_KEY".into(), key.clone()));
        let data = dir.path().join("data");
        let mut args = vec!["dev", "--port", "0", "--data-dir", data.to_str().expect("the path is UTF-8")];
        let conf = dir.path().join("conf");
        match self.conf {
            Some(conf_of_test) => conf_of_test.write(&conf),
            // A file that does not exist has the built-in contents.
            None => std::fs::create_dir(&conf).expect("the scratch directory is writable"),
        }
        put_worker_settings(&conf, &self.worker_settings);
        args.extend(["--conf", conf.to_str().expect("the path is UTF-8")]);
        let gateway = Gateway::start(&args, &env, &key, &[]).await;
        Platform { gateway, fleet: None, dir, worker_settings: self.worker_settings }
    }

    async fn start_serve(self) -> Platform {
        let dir = Scratch::new("platform");
        let redis = Redis::start(self.redis_password).await;
        let mut cloud = Cloud::start(&self.queue_attributes).await;
        // Our own worker calls a handler many times in the time in which it starts one program.
        cloud.has_handlers = self.worker == Some(WorkerKind::Own);
        cloud.put_function(HELLO).await;
        if self.dead_letters {
            cloud.add_dead_letter_queue().await;
        }
        let settings = self.worker_settings;
        let worker = self.worker.map(|kind| Worker::start(kind, &cloud, &redis, settings.clone()));
        let proxy = match self.policy {
            Policy::PassAll => None,
            policy => Some(AwsProxy::start(&cloud, policy).await),
        };
        let conf = conf_dir(&for_slow_backends(self.conf), &dir);
        let fleet = Fleet { cloud, redis, worker, proxy, conf, env: self.env, key: new_key() };
        let gateway = fleet.start_gateway().await;
        if let Some(worker) = &fleet.worker {
            worker.wait_ready().await;
        }
        Platform { gateway, fleet: Some(fleet), dir, worker_settings: settings }
    }
}

/// A start-up deadline for a slow emulator, in `server.toml`.
pub const LONG_START: &str = "[start]\ndeadline_s = 60\n";

/// Settings for a slow queue, in `limits.toml`: the table, its shipped line, and the line for tests.
const SLOW_QUEUE: [(&str, &str, &str); 2] = [
    ("[batch]", "send_deadline_ms = 5000", "send_deadline_ms = 30000"),
    ("[overload]", "confirm_target_ms = 1000", "confirm_target_ms = 0"),
];

/// The emulator is one process for all tests. On a busy machine it may exceed the default deadlines of a
/// gateway, and be so slow that jobs are shed. Tables that a test sets itself are unchanged.
fn for_slow_backends(conf: Option<Conf>) -> Conf {
    let Some(mut conf) = conf else {
        let mut limits = include_str!("../../../conf/limits.toml").to_owned();
        for (_, shipped, line) in SLOW_QUEUE {
            limits = limits.replace(shipped, line);
        }
        return Conf { server: LONG_START.into(), limits, ..Conf::default() };
    };
    if !conf.server.contains("[start]") {
        conf.server = format!("{LONG_START}{}", conf.server);
    }
    for (table, _, line) in SLOW_QUEUE {
        if !conf.limits.contains(table) {
            conf.limits += &format!("\n{table}\n{line}\n");
        }
    }
    conf
}

/// The settings of the worker of `dev`.
fn put_worker_settings(conf: &Path, settings: &WorkerSettings) {
    put_file(&conf.join("worker.toml"), &settings.to_toml());
}

/// Writes a `conf/` directory. Returns its path.
fn conf_dir(conf: &Conf, dir: &Scratch) -> String {
    let conf_dir = dir.path().join("conf");
    conf.write(&conf_dir);
    conf_dir.to_str().expect("the path is UTF-8").to_owned()
}

/// The services that a gateway in `serve` mode uses.
pub struct Fleet {
    pub cloud: Cloud,
    pub redis: Redis,
    pub worker: Option<Worker>,
    pub proxy: Option<AwsProxy>,
    conf: String,
    env: Vec<(String, String)>,
    /// The master key of all gateways.
    key: String,
}

impl Fleet {
    /// Starts one more gateway on the same queue, tables and Redis.
    pub async fn start_gateway(&self) -> Gateway {
        self.start_gateway_with(&[]).await
    }

    /// [`Self::start_gateway`] with more environment variables.
    pub async fn start_gateway_with(&self, env: &[(String, String)]) -> Gateway {
        self.start(vec!["serve"], env).await
    }

    /// Starts a gateway that takes over the sockets of the running one.
    pub async fn start_successor(&self) -> Gateway {
        self.start_successor_with(&[]).await
    }

    /// [`Self::start_successor`] with more environment variables.
    pub async fn start_successor_with(&self, env: &[(String, String)]) -> Gateway {
        self.start(vec!["serve", "--upgrade"], env).await
    }

    async fn start(&self, mut args: Vec<&str>, env: &[(String, String)]) -> Gateway {
        args.extend(["--conf", &self.conf]);
        let mut secrets = vec![SECRET_ACCESS_KEY];
        secrets.extend(self.redis.password());
        let env = [self.gateway_env(), env.to_vec()].concat(); // the last value of a variable wins
        Gateway::start(&args, &env, &self.key, &secrets).await
    }

    /// The variables that `serve` requires, and those of the test.
    pub fn gateway_env(&self) -> Vec<(String, String)> {
        let endpoint = self.proxy.as_ref().map_or(self.cloud.addr(), AwsProxy::addr);
        let mut env = self.cloud.env(endpoint);
        env.push(("PORT".into(), "0".into()));
        env.push(("REDIS_URL".into(), self.redis.url()));
        env.push(("INFRA_API_KEY".into(), self.key.clone()));
        // Without a listener: tests send nothing to other machines.
        env.push(("AI_NODE_URL".into(), "http://127.0.0.1:1".into()));
        env.extend_from_slice(&self.env);
        env
    }
}

pub struct Platform {
    pub gateway: Gateway,
    fleet: Option<Fleet>,
    dir: Scratch,
    worker_settings: WorkerSettings,
}

impl Platform {
    /// The services that the gateway uses. `serve` only.
    pub fn fleet(&self) -> &Fleet {
        self.fleet.as_ref().expect("the backend is AWS")
    }

    pub fn conf_dir(&self) -> PathBuf {
        self.dir.path().join("conf")
    }

    /// The path of a file in the `--conf` directory.
    pub fn conf_file(&self, name: &str) -> PathBuf {
        self.conf_dir().join(name)
    }

    /// Replaces a file in the `--conf` directory.
    pub fn put_conf(&self, name: &str, text: &str) {
        put_file(&self.conf_file(name), text);
    }

    /// Runs of a function that behaves so on this platform.
    pub async fn hold(&self) -> Hold {
        if self.is_serve() { Hold::of(HELLO.to_owned()).await } else { self.hold_of_code().await }
    }

    /// Runs of a function that was uploaded, for a worker that runs its code.
    pub async fn hold_of_code(&self) -> Hold {
        Hold::of(self.gateway.upload_python(HOLDING).await).await
    }

    /// Whether a run executes the code of its function. The Python worker of the tests does not.
    pub fn runs_code(&self) -> bool {
        self.fleet.is_none() || self.own_worker().is_some()
    }

    /// Our own worker. `None`: `dev`, or another worker.
    pub fn own_worker(&self) -> Option<&OwnWorker> {
        match self.fleet.as_ref()?.worker.as_ref()? {
            Worker::Own(worker) => Some(worker),
            Worker::Python(_) => None,
        }
    }

    /// The value of a series of the worker: that of `dev`, or our own.
    pub async fn worker_metric(&self, series: &str) -> Option<f64> {
        match self.own_worker() {
            Some(worker) => worker.metric(series).await,
            None => self.gateway.metric(series).await,
        }
    }

    pub async fn wait_for_worker_metric_at_least(&self, series: &str, least: f64) {
        match self.own_worker() {
            Some(worker) => worker.wait_for_metric_at_least(series, least).await,
            None => self.gateway.wait_for_metric_at_least(series, least).await,
        }
    }

    /// Changes a setting of the worker, and waits until it is applied.
    pub async fn change_worker(&mut self, key: &str, value: impl Into<Value>) {
        self.worker_settings.set(key, value);
        if let Some(worker) = self.own_worker() {
            return worker.change(&self.worker_settings).await;
        }
        let applied = reloads("worker.toml", "applied");
        let before = self.gateway.metric(&applied).await.unwrap_or_default();
        put_worker_settings(&self.conf_dir(), &self.worker_settings);
        self.gateway.wait_for_metric_at_least(&applied, before + 1.0).await;
    }

    /// The data directory of `dev`.
    pub fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    pub fn is_serve(&self) -> bool {
        self.fleet.is_some()
    }

    pub fn fleet_mut(&mut self) -> &mut Fleet {
        self.fleet.as_mut().expect("the backend is AWS")
    }

    /// Kills the gateway, runs `meanwhile`, and starts the gateway again.
    pub async fn kill_and_restart(self, meanwhile: impl AsyncFnOnce(&Fleet)) -> Self {
        let Self { gateway, fleet, dir, worker_settings } = self;
        gateway.kill();
        let fleet = fleet.expect("the backend is AWS");
        meanwhile(&fleet).await;
        let gateway = fleet.start_gateway().await;
        Self { gateway, fleet: Some(fleet), dir, worker_settings }
    }

    /// Asserts a clean exit of gateway and worker.
    pub async fn finish(self) {
        self.gateway.finish().await;
        end(self.fleet).await;
    }

    /// [`Self::finish`] for a test that leaves jobs in flight.
    pub async fn stop(self) {
        self.gateway.stop().await;
        end(self.fleet).await;
    }
}

async fn end(fleet: Option<Fleet>) {
    // The worker stops before Redis and the queue: after it has published a result it stores it, and deletes
    // the message.
    if let Some(worker) = fleet.as_ref().and_then(|fleet| fleet.worker.as_ref()) {
        worker.stop().await;
    }
}

/// A unique API key, which is part of no other text.
pub fn new_key() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("test-key-{}-{:04}-7f3c2b", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}
