//! Runs jobs: receives them, runs their functions in sandboxes, and hands their results on.
//!
//! Where jobs, code and results come from is a matter of the ports ([`crate::backend`]): `dev` uses one file,
//! a fleet uses SQS, S3 and Redis.
//!
//! * [`scheduler`] — which job starts when; with [`inbox`] and [`admission`]
//! * [`runner`] — one job, from its [`message`] to its [`result`]
//! * [`function_runner`] — one run: code, process, outputs; then [`script_run`] or [`handler_process`]
//! * [`pool`], [`pool_state`] — processes that wait; [`refill`] starts them
//! * [`instance`] — one process in its place; [`instance_start`] starts it, through the [`sandbox`] and the
//!   [`supervisor`]
//! * [`runtime`] — the languages; [`control`] — what a process is told, and what it answers
//! * [`monitor`] — memory and time of a run; [`code_cache`], [`outputs`], [`advice`] — files and figures
//! * [`heartbeat`], [`listener`] — what a worker of a fleet shows

mod admission;
mod advice;
mod code_cache;
mod code_layout;
mod code_version;
mod control;
mod function_runner;
mod handler_process;
mod handler_version;
mod heartbeat;
mod inbox;
mod instance;
mod instance_start;
mod listener;
mod message;
mod monitor;
mod output;
mod outputs;
mod owned_dir;
mod pool;
mod pool_state;
mod program_build;
mod refill;
mod result;
mod run_end;
mod runner;
mod runtime;
mod sandbox;
mod scheduler;
mod script_run;
mod slot_dir;
mod slot_number;
mod supervised;
mod supervisor;
mod tree;

pub use heartbeat::{GatewayTarget, HeartbeatFailure, HeartbeatTarget, Heartbeats};
pub use listener::{SandboxReport, WorkerHealth, WorkerListener};
pub use owned_dir::make_empty;
pub use runtime::on_path;
pub use sandbox::{CgroupKind, Enclosed, Sandbox, SandboxSettings, SandboxStatus, View};
pub use slot_number::SLOTS_MAX;

use crate::ambient;
use crate::backend::{CodeSource, JobSource, OutputStore, WorkerActivity};
use crate::config::{Live, WorkerConf};
use crate::metrics::WorkerMetrics;
use crate::traces::Traces;
use admission::{AdmissionQueue, BUSY_A_CORE_MAX, MemoryBudget, PASSING_MAX, RUNS_MAX, STALL};
use code_cache::CodeCache;
use function_runner::{FETCH_MAX, FunctionRunner};
use instance_start::InstanceStarter;
use pool::WarmPool;
use program_build::ProgramBuilder;
use refill::PoolRefill;
use runner::Runner;
use runtime::Runtimes;
use scheduler::{Capacity, Scheduler};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;

/// How long the last processes have to end when the worker stops. They are killed, so this takes some
/// milliseconds; the rest is for a busy machine.
const END_MAX: Duration = Duration::from_secs(10);

/// What a worker works with.
pub struct WorkerParts {
    pub jobs: Arc<dyn JobSource>,
    pub code: Arc<dyn CodeSource>,
    /// `None`: files that functions leave for their callers are not stored.
    pub outputs: Option<Arc<dyn OutputStore>>,
    pub sandbox: Sandbox,
    pub activity: Arc<WorkerActivity>,
    pub settings: Live<WorkerConf>,
    /// Directory for the runs in progress. It is emptied.
    pub runs_dir: PathBuf,
    /// Directory for unpacked code. It is created or emptied.
    pub code_dir: PathBuf,
    /// Name of this worker in results.
    pub worker_id: String,
    /// Address of the models, for functions.
    pub ai_endpoint: Option<String>,
    pub traces: Traces,
    pub metrics: Arc<WorkerMetrics>,
    /// How long the last runs may go on after a stop.
    pub drain: Duration,
}

/// A worker. [`Worker::run`] is its loop.
pub struct Worker {
    parts: WorkerParts,
    /// Memory for runs, in MiB, and busy runs, unless the settings say otherwise.
    memory_mb: u64,
    busy_max: usize,
    /// See [`STALL`], [`PASSING_MAX`] and [`FETCH_MAX`].
    stall: Duration,
    passing_max: Duration,
    fetch_max: Duration,
}

/// What a running worker consists of.
struct WorkerLoop {
    scheduler: Scheduler,
    pool: Arc<WarmPool>,
    refill: PoolRefill,
    starter: Arc<InstanceStarter>,
}

impl Worker {
    pub fn new(parts: WorkerParts) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let busy_max = cores.saturating_mul(BUSY_A_CORE_MAX);
        let (stall, passing_max, fetch_max) = (STALL, PASSING_MAX, FETCH_MAX);
        Self { parts, memory_mb: admission::memory_mb(), busy_max, stall, passing_max, fetch_max }
    }

    /// Runs jobs, as many at once as their memory allows, until `stop` turns true or its sender is gone. Then
    /// waits for the runs in progress, and kills those that are left after [`WorkerParts::drain`]. Their jobs
    /// go back to the queue.
    pub async fn run(self, mut stop: watch::Receiver<bool>) {
        if !tree::lists_children(Path::new("/proc")) {
            tracing::warn!(
                "The worker cannot measure the memory of runs: /proc lists no children. Use a kernel with \
                 CONFIG_PROC_CHILDREN"
            );
        }
        let (settings, activity) = (self.parts.settings.clone(), Arc::clone(&self.parts.activity));
        let (drain, memory_mb, busy_max) = (self.parts.drain, self.memory_mb, self.busy_max);
        let WorkerLoop { mut scheduler, pool, refill, starter } = match self.assemble().await {
            Ok(assembled) => assembled,
            Err(error) => {
                tracing::error!(%error, "The worker cannot start: a directory cannot be prepared");
                return;
            }
        };
        let mut background = JoinSet::new();
        background.spawn(refill.run());
        let active = activity.begin();
        loop {
            scheduler.set_capacity(capacity(&settings.get(), memory_mb, busy_max));
            active.show_runs(scheduler.runs());
            tokio::select! {
                _ = stop.wait_for(|stop| *stop) => break,
                () = scheduler.step() => {}
            }
        }
        active.show_draining();
        background.shutdown().await;
        pool.close();
        scheduler.drain(drain).await;
        if timeout(END_MAX, starter.all_ended()).await.is_err() {
            tracing::warn!("Processes of functions have not ended in time; they end with the worker");
        }
    }

    /// Finds the runtimes, and prepares the directories.
    async fn assemble(self) -> io::Result<WorkerLoop> {
        let Self { parts, memory_mb, busy_max, stall, passing_max, fetch_max } = self;
        let WorkerParts { jobs, code, outputs, sandbox, activity, settings, metrics, .. } = parts;
        let WorkerParts { runs_dir, code_dir, worker_id, ai_endpoint, traces, .. } = parts;
        let capacity = capacity(&settings.get(), memory_mb, busy_max);
        let (cache_bytes, of_cache) = (settings.get().code.cache_mb << 20, Arc::clone(&metrics));
        let runtimes = Arc::new(Runtimes::find().await);
        let opened = ambient::blocking(move || -> io::Result<_> {
            let starter = InstanceStarter::open(sandbox, runs_dir)?;
            Ok((Arc::new(starter), CodeCache::open(code_dir, cache_bytes, code, of_cache)?))
        });
        let (starter, code) = opened.await?;
        report(&runtimes, starter.is_isolated());
        let budget = Arc::new(MemoryBudget::default());
        budget.set(capacity.memory_mb, 0);
        let pool = WarmPool::new(settings.clone(), budget.clone(), activity.clone(), metrics.clone());
        let pool = Arc::new(pool);
        let refill = PoolRefill {
            pool: pool.clone(),
            starter: starter.clone(),
            runtimes: runtimes.clone(),
            code: code.clone(),
            settings: settings.clone(),
        };
        let functions = FunctionRunner {
            builder: ProgramBuilder::new(starter.clone()),
            starter: starter.clone(),
            runtimes,
            pool: pool.clone(),
            code,
            outputs,
            settings,
            activity: activity.clone(),
            metrics: metrics.clone(),
            ai_endpoint,
            fetch_max,
        };
        let runner = Arc::new(Runner { jobs, functions, activity, traces, metrics, worker_id });
        let line = AdmissionQueue::new(stall, passing_max);
        let scheduler = Scheduler::new(runner, capacity, budget, line);
        Ok(WorkerLoop { scheduler, pool, refill, starter })
    }
}

/// How many runs there may be now. `memory_mb` and `busy_max`: those of the machine.
fn capacity(settings: &WorkerConf, memory_mb: u64, busy_max: usize) -> Capacity {
    let conf = &settings.capacity;
    Capacity {
        memory_mb: if conf.memory_mb == 0 { memory_mb } else { conf.memory_mb },
        runs_max: if conf.runs_max == 0 { RUNS_MAX } else { conf.runs_max },
        busy_max,
    }
}

/// Logs which functions this worker can run.
fn report(runtimes: &Runtimes, is_isolated: bool) {
    for runtime in runtimes.iter() {
        let name = runtime.runtime().name();
        let (Some(program), version) = (runtime.program(), runtime.version().unwrap_or_default()) else {
            tracing::info!(runtime = name, "Runtime not found on this machine");
            continue;
        };
        let program = program.display();
        if is_isolated && !runtime.is_in_sandbox() {
            tracing::warn!(
                runtime = name, %program, version,
                "Runtime found where the sandbox does not show it: install it below /usr"
            );
        } else {
            tracing::info!(runtime = name, %program, version, "Runtime found");
        }
    }
}

#[cfg(test)]
mod tests;
