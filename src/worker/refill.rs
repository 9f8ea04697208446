//! Keeps interpreters ready, and ends warm processes that are not needed any more.
//!
//! Only kinds that were used lately are kept ready, so a worker that runs no function has no processes.

use super::code_cache::CodeCache;
use super::instance::Instance;
use super::instance_start::{InstancePlan, InstanceStarter, StartError};
use super::message::base_environment;
use super::pool::{StartingInterpreter, WarmPool};
use super::pool_state::WarmKind;
use super::runtime::Runtimes;
use crate::config::{Live, WorkerConf};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

/// Interval at which idle processes are looked at.
const TICK: Duration = Duration::from_secs(1);
/// Memory of an interpreter until it gets a job, in MiB. Also the heap limit, if it has one that can be
/// changed later.
const WAITING_MB: u64 = 256;
/// The most memory that a function can have, in MiB. What an interpreter may request is fixed at its start.
const FUNCTION_MB_MAX: u64 = 10_240;

/// The loop that keeps the pool in order.
pub(super) struct PoolRefill {
    pub(super) pool: Arc<WarmPool>,
    pub(super) starter: Arc<InstanceStarter>,
    pub(super) runtimes: Arc<Runtimes>,
    pub(super) code: CodeCache,
    pub(super) settings: Live<WorkerConf>,
}

impl PoolRefill {
    /// Runs until it is dropped.
    pub(super) async fn run(self) {
        let mut starts = JoinSet::new();
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut cache_mb = 0;
        loop {
            for starting in self.pool.to_start() {
                starts.spawn(start(Arc::clone(&self.starter), Arc::clone(&self.runtimes), starting));
            }
            tokio::select! {
                Some(_) = starts.join_next() => {}
                () = self.pool.shortage.notified() => {}
                _ = tick.tick() => {
                    self.pool.tend();
                    let wanted = self.settings.get().code.cache_mb;
                    if std::mem::replace(&mut cache_mb, wanted) != wanted {
                        self.code.set_bytes_max(wanted << 20);
                    }
                }
            }
        }
    }
}

async fn start(starter: Arc<InstanceStarter>, runtimes: Arc<Runtimes>, starting: StartingInterpreter) {
    match start_waiting(&starter, &runtimes, starting.kind).await {
        Ok(instance) => starting.started(instance),
        Err(reason) => {
            let runtime = starting.kind.runtime.name();
            if starting.failed() == 1 {
                tracing::warn!(runtime, reason, "Interpreter not started ahead; runs start their own");
            }
        }
    }
}

/// Starts an interpreter that waits for its job.
async fn start_waiting(
    starter: &Arc<InstanceStarter>,
    runtimes: &Runtimes,
    kind: WarmKind,
) -> Result<Instance, String> {
    let runtime = runtimes.get(kind.runtime.name())?;
    let text = |e: StartError| match e {
        StartError::Function(text) | StartError::Worker(text) => text,
    };
    let (place, _) = starter.place(None).await.map_err(text)?;
    let env = base_environment(&place.paths, runtime.environment());
    let start = runtime.warm(kind.heap_mb.unwrap_or(WAITING_MB), env.clone())?;
    let plan = InstancePlan::waiting(&start, env, WAITING_MB).map_err(|e| e.to_string())?;
    let data_bytes_max = runtime.request_bytes_max(FUNCTION_MB_MAX);
    starter.start(place, InstancePlan { data_bytes_max, ..plan }).await.map_err(text)
}
