//! The platform of one test, on either backend.

use super::aws::{Cloud, SECRET_ACCESS_KEY};
use super::aws_proxy::{AwsProxy, Policy};
use super::gateway::{Conf, Gateway, put_file};
use super::process::Scratch;
use super::redis::Redis;
use super::worker::Worker;
use serde_json::{Value, json};
use std::path::PathBuf;
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
    worker: bool,
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
            worker: true,
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
        self.worker = false;
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
        let conf = self.conf.map(|conf| conf_dir(&conf, &dir));
        if let Some(conf) = &conf {
            args.extend(["--conf", conf]);
        }
        let gateway = Gateway::start(&args, &env, &key, &[]).await;
        Platform { gateway, fleet: None, dir }
    }

    async fn start_serve(self) -> Platform {
        let dir = Scratch::new("platform");
        let redis = Redis::start(self.redis_password).await;
        let cloud = Cloud::start(&self.queue_attributes).await;
        cloud.put_function(HELLO).await;
        if self.dead_letters {
            cloud.add_dead_letter_queue().await;
        }
        let worker = self.worker.then(|| Worker::start(&cloud, &redis));
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
        Platform { gateway, fleet: Some(fleet), dir }
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

/// Runs that complete when the test releases them.
pub struct Hold<'a> {
    platform: &'a Platform,
    /// The function to run.
    pub function: String,
    /// What the runs wait for: a key in Redis, or a file with the worker of `dev`.
    until: String,
}

impl Hold<'_> {
    /// The input of a run that prints `token` when it is released.
    pub fn input(&self, token: &str) -> Value {
        json!({ "behave": "hold", "until": self.until, "token": token })
    }

    pub async fn release(&self) {
        match &self.platform.fleet {
            Some(fleet) => drop(fleet.redis.order(&format!("SET {} 1", self.until)).await),
            None => std::fs::write(&self.until, "").expect("the scratch directory is writable"),
        }
    }
}

/// Waits for the file that its input names, then prints its input.
const HOLDING: &str = "import json, os, time
asked = json.loads(os.environ['PAYLOAD'])
while not os.path.exists(asked['until']):
    time.sleep(0.05)
print(json.dumps(asked))
";

pub struct Platform {
    pub gateway: Gateway,
    fleet: Option<Fleet>,
    dir: Scratch,
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

    pub async fn hold(&self) -> Hold<'_> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("release-{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let (function, until) = if self.is_serve() {
            (HELLO.to_owned(), name)
        } else {
            let path = self.dir.path().join(name).display().to_string();
            (self.gateway.upload_python(HOLDING).await, path)
        };
        Hold { platform: self, function, until }
    }

    pub fn is_serve(&self) -> bool {
        self.fleet.is_some()
    }

    pub fn fleet_mut(&mut self) -> &mut Fleet {
        self.fleet.as_mut().expect("the backend is AWS")
    }

    /// Kills the gateway, runs `meanwhile`, and starts the gateway again.
    pub async fn kill_and_restart(self, meanwhile: impl AsyncFnOnce(&Fleet)) -> Self {
        let Self { gateway, fleet, dir } = self;
        gateway.kill();
        let fleet = fleet.expect("the backend is AWS");
        meanwhile(&fleet).await;
        let gateway = fleet.start_gateway().await;
        Self { gateway, fleet: Some(fleet), dir }
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
