//! A whole platform for one test, over either backend, so that one test can say what both must do.

use super::aws::{Cloud, SECRET_ACCESS_KEY};
use super::gateway::{Conf, Gateway};
use super::process::Scratch;
use super::proxy::{Policy, Proxy};
use super::redis::Redis;
use super::worker::Worker;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

/// The function both backends know: `dev` seeds it, and for `serve` the harness puts it into the table.
/// It prints its input back, whatever else it prints.
pub const HELLO: &str = "hello";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    Dev,
    Serve,
}

/// What a test wants of its platform. The default has everything and no odd conditions.
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

    /// Puts a proxy between the gateway and AWS.
    pub fn policy(mut self, policy: Policy) -> Self {
        self.policy = policy;
        self
    }

    /// No worker: the test plays it.
    pub fn no_worker(mut self) -> Self {
        self.worker = false;
        self
    }

    /// The queue has a dead-letter queue.
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
        let redis = tokio::task::block_in_place(|| Redis::start(self.redis_password));
        let cloud = Cloud::start(&self.queue_attributes).await;
        cloud.put_function(HELLO).await;
        if self.dead_letters {
            cloud.add_dead_letter_queue().await;
        }
        let worker = self.worker.then(|| Worker::start(&cloud, &redis));
        let proxy = match self.policy {
            Policy::PassAll => None,
            policy => Some(Proxy::start(&cloud, policy).await),
        };
        let conf = self.conf.map(|conf| conf_dir(&conf, &dir));
        let fleet = Fleet { cloud, redis, worker, proxy, conf, env: self.env, key: new_key() };
        let gateway = fleet.start_gateway().await;
        if let Some(worker) = &fleet.worker {
            tokio::task::block_in_place(|| worker.wait_ready());
        }
        Platform { gateway, fleet: Some(fleet), dir }
    }
}

/// Writes a `conf/`, and says where.
fn conf_dir(conf: &Conf, dir: &Scratch) -> String {
    let conf_dir = dir.path().join("conf");
    conf.write(&conf_dir);
    conf_dir.to_str().expect("the path is UTF-8").to_owned()
}

/// What a gateway in `serve` mode works with.
pub struct Fleet {
    pub cloud: Cloud,
    pub redis: Redis,
    pub worker: Option<Worker>,
    pub proxy: Option<Proxy>,
    conf: Option<String>,
    env: Vec<(String, String)>,
    /// One for all gateways, as a fleet has it.
    key: String,
}

impl Fleet {
    /// One more gateway over the same queue, tables and Redis.
    pub async fn start_gateway(&self) -> Gateway {
        self.start_gateway_with(&[]).await
    }

    /// The same with an environment of its own.
    pub async fn start_gateway_with(&self, env: &[(String, String)]) -> Gateway {
        self.start(vec!["serve"], env).await
    }

    /// One that takes over the port of the one that runs.
    pub async fn start_successor(&self) -> Gateway {
        self.start_successor_with(&[]).await
    }

    /// The same with an environment of its own.
    pub async fn start_successor_with(&self, env: &[(String, String)]) -> Gateway {
        self.start(vec!["serve", "--upgrade"], env).await
    }

    async fn start(&self, mut args: Vec<&str>, env: &[(String, String)]) -> Gateway {
        if let Some(conf) = &self.conf {
            args.extend(["--conf", conf]);
        }
        let mut secrets = vec![SECRET_ACCESS_KEY];
        secrets.extend(self.redis.password());
        let env = [self.gateway_env(), env.to_vec()].concat(); // the last of a name wins
        Gateway::start(&args, &env, &self.key, &secrets).await
    }

    /// Everything that `serve` requires, and what the test added.
    pub fn gateway_env(&self) -> Vec<(String, String)> {
        let endpoint = self.proxy.as_ref().map_or(self.cloud.addr(), Proxy::addr);
        let mut env = self.cloud.env(endpoint);
        env.push(("PORT".into(), "0".into()));
        env.push(("REDIS_URL".into(), self.redis.url()));
        env.push(("INFRA_API_KEY".into(), self.key.clone()));
        // Nobody listens there: tests ask nothing beyond this machine.
        env.push(("AI_NODE_URL".into(), "http://127.0.0.1:1".into()));
        env.extend_from_slice(&self.env);
        env
    }
}

pub struct Platform {
    pub gateway: Gateway,
    fleet: Option<Fleet>,
    dir: Scratch,
}

impl Platform {
    /// The parts outside the gateway. `serve` only.
    pub fn fleet(&self) -> &Fleet {
        self.fleet.as_ref().expect("a platform over AWS")
    }

    pub fn conf_dir(&self) -> PathBuf {
        self.dir.path().join("conf")
    }

    /// A file of the `--conf` directory.
    pub fn conf_file(&self, name: &str) -> PathBuf {
        self.conf_dir().join(name)
    }

    pub fn is_serve(&self) -> bool {
        self.fleet.is_some()
    }

    pub fn fleet_mut(&mut self) -> &mut Fleet {
        self.fleet.as_mut().expect("a platform over AWS")
    }

    /// Ends the gateway outright, lets something happen meanwhile, and starts it again.
    pub async fn kill_and_restart(self, meanwhile: impl AsyncFnOnce(&Fleet)) -> Self {
        let Self { gateway, fleet, dir } = self;
        gateway.kill();
        let fleet = fleet.expect("a platform over AWS");
        meanwhile(&fleet).await;
        let gateway = fleet.start_gateway().await;
        Self { gateway, fleet: Some(fleet), dir }
    }

    /// Asserts a clean end of every part.
    pub async fn finish(self) {
        self.gateway.finish().await;
        end(self.fleet);
    }

    /// [`Self::finish`] for a test that leaves jobs behind on purpose.
    pub async fn stop(self) {
        self.gateway.stop().await;
        end(self.fleet);
    }
}

fn end(fleet: Option<Fleet>) {
    // The rest outlives the worker: it stores a result, and takes its message off the queue, after it has published.
    if let Some(worker) = fleet.as_ref().and_then(|fleet| fleet.worker.as_ref()) {
        tokio::task::block_in_place(|| worker.stop());
    }
}

/// A key that no other gateway has, and that nothing else contains.
pub fn new_key() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("test-key-{}-{:04}-7f3c2b", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}
