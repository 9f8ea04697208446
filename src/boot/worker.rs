//! The `worker` command: a worker of the fleet, on its queue, buckets and Redis.
//!
//! The start has this order. First the settings, then the directory: only the operator can correct them. Then
//! the sandbox and the backends, at the same time, and the listener. All problems of these are reported
//! together. The last step is the worker itself, which takes jobs from then on.

use super::plan::{Exit, explain, refuse};
use super::reload::Reload;
use super::signals::{ReloadSignals, Signals};
use super::sockets::bound_to;
use super::worker_dir::WorkerDir;
use super::{ConfSource, isolation, notify, process};
use crate::backend::{BackendError, StartProblem, WorkerActivity, aws};
use crate::config::{
    Conf, ConfFiles, ConfTexts, ConfigError, Live, SandboxMode, TraceExport, TracesConf, WorkerEnv,
};
use crate::metrics::WorkerProcessMetrics;
use crate::model::ProcessToken;
use crate::traces::{self, Destination, ExportLoop, TraceParts, Traces};
use crate::worker::{
    GatewayTarget, HeartbeatTarget, Heartbeats, Sandbox, Worker, WorkerHealth, WorkerListener, WorkerParts,
};
use std::convert::Infallible;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Time for all backends to answer at start.
const START_DEADLINE: Duration = Duration::from_secs(10);
/// Most threads for calls that block. Each run needs one from time to time, and there are at most 1,024.
const BLOCKING_THREADS_MAX: usize = 1536;
/// How long threads that hang, for example in a file system, delay the exit.
const THREADS_END_MAX: Duration = Duration::from_secs(2);
/// Longest name of the machine that is used, in bytes.
const HOST_BYTES_MAX: usize = 100;

/// Command-line arguments of `worker`.
pub struct WorkerArgs {
    pub conf: Option<PathBuf>,
}

/// Runs a worker of the fleet.
pub fn worker(args: &WorkerArgs) -> Exit {
    let settings = match WorkerPlan::load(args) {
        Ok(settings) => settings,
        Err(e) => return refuse(&e),
    };
    process::prepare();
    let dir = match WorkerDir::take(&settings.env.state_dir) {
        Ok(dir) => dir,
        Err(e) => return explain(&[dir_problem(&settings.env, &e)]),
    };
    let mut threads = tokio::runtime::Builder::new_multi_thread();
    let runtime = match threads.enable_all().max_blocking_threads(BLOCKING_THREADS_MAX).build() {
        Ok(runtime) => runtime,
        Err(e) => {
            eprintln!("infra-controller: the runtime cannot be started: {e}");
            return Exit::Internal;
        }
    };
    let exit = runtime.block_on(live(settings, dir));
    runtime.shutdown_timeout(THREADS_END_MAX);
    exit
}

/// The settings of `worker`, from the environment and `conf/`.
struct WorkerPlan {
    env: WorkerEnv,
    source: ConfSource,
    texts: ConfTexts,
    conf: Conf,
    /// Where heartbeats go. `None`: to Redis.
    gateway: Option<GatewayTarget>,
    /// Where spans are exported. `None`: nowhere.
    traces: Option<TraceExport>,
}

impl WorkerPlan {
    /// The error lists the problems of the environment and of `conf/`.
    fn load(args: &WorkerArgs) -> Result<Self, ConfigError> {
        let env = WorkerEnv::from_process();
        let output_bytes_max = env.as_ref().ok().and_then(|env| env.run.output_bytes_max);
        let (dir, files) = (args.conf.clone(), ConfFiles::Worker);
        // Nothing else of the gateway's settings applies.
        let (a_minute, listen, master_key_bytes) = (None, None, 0);
        let source = ConfSource { dir, files, a_minute, listen, master_key_bytes, output_bytes_max };
        let (mut env, (texts, conf)) = match (env, source.load()) {
            (Ok(env), Ok(loaded)) => (env, loaded),
            (Err(e), Ok(_)) | (Ok(_), Err(e)) => return Err(e),
            (Err(ConfigError(mut one)), Err(ConfigError(two))) => {
                one.extend(two);
                return Err(ConfigError(one));
            }
        };
        let gateway = env.controller.as_ref().map(GatewayTarget::new).transpose();
        let gateway = gateway.map_err(|e| ConfigError(vec![format!("CONTROLLER_URL {e}")]))?;
        let (traces, warnings) = TraceExport::from_process()?;
        env.warnings.extend(warnings);
        Ok(Self { env, source, texts, conf, gateway, traces })
    }
}

/// What a start has found.
struct StartedWorker {
    connection: aws::WorkerPorts,
    sandbox: Sandbox,
    socket: TcpListener,
}

async fn live(settings: WorkerPlan, dir: WorkerDir) -> Exit {
    let (mut signals, hangups) = match Signals::listen(false) {
        Ok(signals) => signals,
        Err(e) => return internal("cannot listen for signals", &e),
    };
    let metrics = match WorkerProcessMetrics::new() {
        Ok(metrics) => Arc::new(metrics),
        Err(e) => return internal("the metrics cannot be made", &e),
    };
    let started = tokio::select! {
        started = start(&settings, &dir) => started,
        _ = signals.next() => return Exit::Ok,
    };
    let started = match started {
        Ok(started) => started,
        Err(problems) => return explain(&problems),
    };
    let own = [settings.env.warnings.clone(), settings.source.warnings()].concat();
    for warning in own.iter().chain(&started.connection.warnings) {
        tracing::warn!(warning, "Warning at start");
    }
    let port = started.socket.local_addr().map_or(0, |at| at.port());
    let worker_id = worker_id(settings.env.worker_id.clone(), dir.number);
    let traces = match traces_of(&settings, &worker_id, &metrics) {
        Ok(traces) => traces,
        Err(e) => return internal("spans cannot be exported", &e),
    };
    let mut loops = WorkerLoops::start(settings, started, hangups, &metrics, (&worker_id, &dir), traces);
    let activity = Arc::clone(&loops.activity);
    let announce = async || -> Infallible {
        activity.begun().await;
        notify::ready();
        tracing::info!(port, worker = worker_id, "Infra Worker v{} Started", env!("CARGO_PKG_VERSION"));
        std::future::pending().await
    };

    let exit = tokio::select! {
        never = announce() => match never {},
        signal = signals.next() => {
            tracing::info!(signal, "Stopping");
            Exit::Ok
        }
        () = loops.any_ended() => Exit::Internal,
    };
    notify::stopping();
    loops.endless.spawn(signals.exit_on_next());
    loops.stop().await;
    tracing::info!("Stopped");
    exit
}

/// The worker, and the loops around it.
struct WorkerLoops {
    activity: Arc<WorkerActivity>,
    work: JoinSet<()>,
    /// They never end by themselves.
    endless: JoinSet<()>,
    /// The export of spans.
    export: JoinSet<()>,
    stop: watch::Sender<bool>,
    stop_export: watch::Sender<bool>,
}

impl WorkerLoops {
    fn start(
        settings: WorkerPlan,
        started: StartedWorker,
        hangups: ReloadSignals,
        metrics: &Arc<WorkerProcessMetrics>,
        (worker_id, dir): (&str, &WorkerDir),
        (traces, export): (Traces, Option<ExportLoop>),
    ) -> Self {
        let WorkerPlan { env, source, texts, conf, gateway, .. } = settings;
        let StartedWorker { connection, sandbox, socket } = started;
        let report = isolation::report(sandbox.status(), &metrics.worker);
        let (activity, store) = (Arc::new(WorkerActivity::default()), connection.lone_status);
        let (stop, stopped) = watch::channel(false);
        let (stop_export, export_stopped) = watch::channel(false);
        let (mut work, mut endless, mut exports) = (JoinSet::new(), JoinSet::new(), JoinSet::new());
        if let Some(export) = export {
            exports.spawn(export.run(turned(export_stopped)));
        }

        let live = Live::new(conf.worker.clone());
        let (drain, target) = (Duration::from_secs(conf.worker.jobs.drain_s), live.clone());
        let set = move |conf: &Conf| target.set(conf.worker.clone());
        endless.spawn(Reload::new(source, hangups, (texts, conf), set, metrics.conf.clone()).run());
        let shown = Some(Arc::clone(&store));
        let health = WorkerHealth::new(worker_id.to_owned(), Arc::clone(&activity), shown, report);
        endless.spawn(WorkerListener { socket, health, metrics: Arc::clone(metrics) }.run());
        let beats = Heartbeats {
            to: gateway
                .map_or(HeartbeatTarget::Store(store), |gateway| HeartbeatTarget::Gateway(Box::new(gateway))),
            worker_id: worker_id.to_owned(),
            activity: Arc::clone(&activity),
            metrics: Arc::clone(&metrics.worker),
        };
        endless.spawn(beats.run(stopped.clone()));

        let parts = WorkerParts {
            jobs: connection.jobs,
            code: connection.code,
            outputs: connection.outputs,
            sandbox,
            activity: Arc::clone(&activity),
            settings: live,
            runs_dir: dir.runs.clone(),
            code_dir: dir.code.clone(),
            worker_id: worker_id.to_owned(),
            ai_endpoint: env.run.ai_endpoint,
            traces,
            metrics: Arc::clone(&metrics.worker),
            drain,
        };
        work.spawn(Worker::new(parts).run(stopped));
        Self { activity, work, endless, export: exports, stop, stop_export }
    }

    /// Resolves when a loop has ended that should not end. It has panicked.
    async fn any_ended(&mut self) {
        tokio::select! {
            _ = self.work.join_next() => {}
            _ = self.endless.join_next() => {}
        }
        tracing::error!("A loop ended unexpectedly; the process stops");
    }

    async fn stop(&mut self) {
        self.stop.send_replace(true);
        // Bounded by `jobs.drain_s`, and by the deadline for giving jobs back.
        while self.work.join_next().await.is_some() {}
        // After everything that records spans. It has a deadline of its own.
        self.stop_export.send_replace(true);
        while self.export.join_next().await.is_some() {}
        // Last: the task that waits for a second signal is one of them.
        self.endless.shutdown().await;
    }
}

fn traces_of(
    settings: &WorkerPlan,
    worker_id: &str,
    metrics: &WorkerProcessMetrics,
) -> Result<(Traces, Option<ExportLoop>), String> {
    let Some(export) = &settings.traces else { return Ok((Traces::default(), None)) };
    let parts = TraceParts {
        export,
        // They concern the jobs of a gateway.
        conf: TracesConf::default(),
        destination: Destination::sqs(&settings.env.queue_url),
        service: "infra-worker",
        instance: worker_id.to_owned(),
        metrics: metrics.traces.clone(),
    };
    traces::new(parts).map(|(traces, export)| (traces, Some(export)))
}

async fn turned(mut watch: watch::Receiver<bool>) {
    // A dropped sender means that the process ends.
    let _ = watch.wait_for(|stop| *stop).await;
}

fn internal(what: &str, error: &dyn std::fmt::Display) -> Exit {
    eprintln!("infra-controller: {what}: {error}");
    Exit::Internal
}

/// Probes the sandbox, connects to the backends and binds the listener. The error lists every problem found.
async fn start(settings: &WorkerPlan, dir: &WorkerDir) -> Result<StartedWorker, Vec<StartProblem>> {
    let WorkerPlan { env, conf, .. } = settings;
    let (sandbox, connection) = tokio::join!(
        isolation::probed(
            &conf.worker.sandbox,
            SandboxMode::Required,
            (&dir.runs, u32::try_from(dir.number).unwrap_or(u32::MAX)),
            settings.source.dir.as_deref()
        ),
        aws::connect_worker(aws_settings(env, conf)),
    );
    let socket = bound_to(conf.worker.listener.address, conf.worker.listener.port);
    let socket = socket.and_then(|socket| TcpListener::from_std(socket).map_err(|e| e.to_string()));
    let socket = socket.map_err(|problem| listener_problem(conf, problem));
    match (sandbox, connection, socket) {
        (Ok(sandbox), Ok(connection), Ok(socket)) => {
            tracing::info!("Global Redis Connected Successfully");
            Ok(StartedWorker { connection, sandbox, socket })
        }
        (sandbox, connection, socket) => {
            let mut problems: Vec<StartProblem> = sandbox.err().into_iter().collect();
            problems.extend(connection.err().into_iter().flatten());
            problems.extend(socket.err());
            Err(problems)
        }
    }
}

fn aws_settings(env: &WorkerEnv, conf: &Conf) -> aws::AwsWorkerSettings {
    let visibility_s = conf.worker.jobs.visibility_s;
    aws::AwsWorkerSettings {
        region: env.region.clone(),
        queue_url: env.queue_url.clone(),
        bucket: env.bucket.clone(),
        output_bucket: env.output_bucket.clone(),
        redis_url: aws::RedisUrl::new(env.redis.url.reveal()),
        redis_variables: env.redis.variables,
        sqs_endpoint: env.sqs_endpoint.clone(),
        s3_endpoint: env.s3_endpoint.clone(),
        process: ProcessToken(rand::random()),
        lease: (visibility_s > 0).then(|| Duration::from_secs(visibility_s)),
        start_deadline: START_DEADLINE,
    }
}

/// The name of this worker. Several workers on one machine, with one environment, get different ones.
fn worker_id(named: Option<String>, number: usize) -> String {
    let name = named.unwrap_or_else(host);
    if number == 0 { name } else { format!("{name}-{number}") }
}

/// The name of this machine, as far as a heartbeat can carry it.
fn host() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name: String = name.trim().chars().filter(char::is_ascii_graphic).take(HOST_BYTES_MAX).collect();
    if name.is_empty() { "worker".to_owned() } else { name }
}

fn dir_problem(env: &WorkerEnv, error: &std::io::Error) -> StartProblem {
    StartProblem {
        what: format!("the directory of this worker in {}", env.state_dir.display()),
        error: BackendError::Invalid(error.to_string()),
        remedy: "Make it writable, or set STATE_DIR.".to_owned(),
    }
}

fn listener_problem(conf: &Conf, problem: String) -> StartProblem {
    let at = &conf.worker.listener;
    StartProblem {
        what: format!("the listener for /health and /metrics on {}, port {}", at.address, at.port),
        error: BackendError::Invalid(problem.trim_end_matches('.').to_owned()),
        remedy: "They are listener.address and listener.port in worker.toml.".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_of_one_machine_have_different_names() {
        for (named, number, expected) in [
            (Some("w"), 0, "w".to_owned()),
            (Some("w"), 2, "w-2".to_owned()),
            (None, 1, format!("{}-1", host())),
        ] {
            assert_eq!(worker_id(named.map(str::to_owned), number), expected);
        }
        assert!((1..=HOST_BYTES_MAX).contains(&host().len()));
    }
}
