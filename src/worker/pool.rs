//! Warm processes: interpreters that were started ahead, each for one run of any function, and processes in
//! handler mode between two runs of their function.
//!
//! Idle processes never take memory from a run: they get what the runs in progress have not reserved, and the
//! least recently used one ends first. Their number is bounded for each function, and in all.
//!
//! [`super::refill`] starts the interpreters, and ends what has been idle for too long.

use super::admission::MemoryBudget;
use super::handler_process::HandlerProcess;
use super::instance::Instance;
use super::message::Message;
use super::pool_state::{IdleHandler, LeavingProcesses, PoolState, READY_MB, Shelf, WarmKind};
use crate::backend::{WarmPools, WorkerActivity};
use crate::config::{Live, WarmConf, WorkerConf};
use crate::metrics::{WarmEnd, WorkerMetrics};
use crate::model::Runtime;
use parking_lot::Mutex;
use std::sync::Arc;
use tokio::sync::Notify;
use tokio::time::Instant;

/// Most interpreters that are being started at a time: their starts take time from runs.
const STARTS_MAX: usize = 2;

/// The warm processes of a worker.
pub(super) struct WarmPool {
    state: Mutex<PoolState>,
    settings: Live<WorkerConf>,
    budget: Arc<MemoryBudget>,
    activity: Arc<WorkerActivity>,
    metrics: Arc<WorkerMetrics>,
    /// Notified when interpreters may have to be started.
    pub(super) shortage: Notify,
}

/// A process that serves a run, for the metrics.
pub(super) struct BusyProcess<'a> {
    pool: &'a WarmPool,
    runtime: Runtime,
}

/// An interpreter that is being started.
pub(super) struct StartingInterpreter {
    pool: Arc<WarmPool>,
    pub(super) kind: WarmKind,
}

impl WarmPool {
    pub(super) fn new(
        settings: Live<WorkerConf>,
        budget: Arc<MemoryBudget>,
        activity: Arc<WorkerActivity>,
        metrics: Arc<WorkerMetrics>,
    ) -> Self {
        let (state, shortage) = (Mutex::default(), Notify::new());
        Self { state, settings, budget, activity, metrics, shortage }
    }

    fn warm(&self) -> WarmConf {
        self.settings.get().warm.clone()
    }

    /// Takes an interpreter of a kind, if one waits. From now on some of this kind are kept ready.
    pub(super) fn take_ready(&self, kind: WarmKind) -> Option<Instance> {
        if self.warm().interpreters == 0 {
            return None;
        }
        let mut leaving = LeavingProcesses::default();
        let taken = {
            let mut state = self.state.lock();
            let shelf = state.shelf(kind, &mut leaving);
            shelf.used_at = Instant::now();
            let taken = loop {
                match shelf.ready.pop_front() {
                    Some(instance) if !instance.is_quiet() => {
                        leaving.ready.push((instance, WarmEnd::Failed));
                    }
                    other => break other,
                }
            };
            self.show(&state, kind.runtime);
            taken
        };
        self.end(leaving);
        self.shortage.notify_one();
        taken
    }

    /// Puts an interpreter back that a run could not use.
    pub(super) fn return_ready(&self, kind: WarmKind, instance: Instance) {
        let mut leaving = LeavingProcesses::default();
        {
            let mut state = self.state.lock();
            if state.is_closed {
                leaving.ready.push((instance, WarmEnd::Full));
            } else {
                state.shelf(kind, &mut leaving).ready.push_front(instance);
            }
            self.show(&state, kind.runtime);
        }
        self.end(leaving);
    }

    /// Takes an idle process that can serve a job of the function. Ends those that have other code or
    /// settings, if the job has newer ones.
    pub(super) fn take_handler(
        &self,
        function: &str,
        handler: &str,
        message: &Message<'_>,
    ) -> Option<HandlerProcess> {
        let mut leaving = LeavingProcesses::default();
        let mut taken = None;
        {
            let mut state = self.state.lock();
            // The most recently used one is taken, so that those above the need become old.
            for at in (0..state.handlers.len()).rev() {
                let version = state.handlers[at].process.version();
                let serves = version.serves(function, handler, message);
                if !(serves && taken.is_none()) && (serves || !version.is_outdated_by(function, message)) {
                    continue;
                }
                let Some(idle) = state.handlers.remove(at) else { continue };
                match serves {
                    true if idle.process.is_quiet() => taken = Some(idle),
                    true => leaving.handlers.push((idle.process, WarmEnd::Failed)),
                    false => leaving.handlers.push((idle.process, WarmEnd::Changed)),
                }
            }
            if let Some(IdleHandler { runtime, .. }) = taken {
                self.show(&state, runtime);
            }
        }
        self.end(leaving);
        taken.map(|idle| idle.process)
    }

    /// Keeps a process for the next run of its function, if there is room for it. The memory of the run that
    /// it has just served is still reserved.
    pub(super) fn keep(&self, runtime: Runtime, process: HandlerProcess) {
        let warm = self.warm();
        let mut leaving = LeavingProcesses::default();
        {
            let mut state = self.state.lock();
            let version = process.version();
            let own_mb = version.memory_mb;
            // Of one function, the one that was used last stays: the least used ones go first.
            while warm.function_max > 0
                && state.count_of(version.function()) >= warm.function_max
                && let Some(idle) = state.remove_oldest_of(version.function())
            {
                leaving.handlers.push((idle.process, WarmEnd::Full));
            }
            let end = if !process.is_usable() {
                Some(WarmEnd::Failed)
            } else if process.runs() >= warm.handler_runs_max {
                Some(WarmEnd::Runs)
            } else {
                (state.is_closed || warm.function_max == 0).then_some(WarmEnd::Full)
            };
            match end {
                Some(reason) => leaving.handlers.push((process, reason)),
                None => state.handlers.push_back(IdleHandler { process, runtime, since: Instant::now() }),
            }
            state.bound(warm.total_max, self.budget.left_mb(own_mb), &mut leaving);
            self.show(&state, runtime);
        }
        self.end(leaving);
    }

    /// Ends a process that cannot serve another run.
    pub(super) fn discard(&self, process: HandlerProcess) {
        self.end(LeavingProcesses { handlers: vec![(process, WarmEnd::Failed)], ready: Vec::new() });
    }

    /// Ends idle processes if the runs in progress need their memory.
    pub(super) fn make_room(&self) {
        let total_max = self.warm().total_max;
        let mut leaving = LeavingProcesses::default();
        {
            let mut state = self.state.lock();
            state.bound(total_max, self.budget.left_mb(0), &mut leaving);
            if !leaving.is_empty() {
                Runtime::ALL.into_iter().for_each(|runtime| self.show(&state, runtime));
            }
        }
        self.end(leaving);
    }

    /// Counts a process as busy, until the guard is dropped.
    pub(super) fn busy(&self, runtime: Runtime) -> BusyProcess<'_> {
        let mut state = self.state.lock();
        state.busy[runtime as usize] += 1;
        self.show(&state, runtime);
        BusyProcess { pool: self, runtime }
    }

    /// The interpreters to start now.
    pub(super) fn to_start(self: &Arc<Self>) -> Vec<StartingInterpreter> {
        let warm = self.warm();
        let (now, left_mb) = (Instant::now(), self.budget.left_mb(0));
        let mut to_start = Vec::new();
        let mut state = self.state.lock();
        while !state.is_closed
            && state.starting() < STARTS_MAX
            && state.count() + state.starting() < warm.total_max
            && state.idle_mb() + READY_MB * (1 + state.starting() as u64) <= left_mb
        {
            let is_short = |shelf: &&mut Shelf| {
                shelf.ready.len() + shelf.starting < warm.interpreters && now >= shelf.retry_at
            };
            // The kind with the fewest goes first.
            let shelves = state.shelves.iter_mut().filter(is_short);
            let Some(shelf) = shelves.min_by_key(|shelf| shelf.ready.len() + shelf.starting) else { break };
            shelf.starting += 1;
            to_start.push(StartingInterpreter { pool: Arc::clone(self), kind: shelf.kind });
        }
        to_start
    }

    /// Ends what has been idle for too long, what is more than the settings allow, and what has died. Runs
    /// end what is in their way themselves: here, a run that was admitted and has not yet taken its own idle
    /// process would count twice.
    pub(super) fn tend(&self) {
        let warm = self.warm();
        let mut leaving = LeavingProcesses::default();
        {
            let mut state = self.state.lock();
            state.end_dead(&mut leaving);
            state.end_old(&warm, &mut leaving);
            state.bound(warm.total_max, u64::MAX, &mut leaving);
            Runtime::ALL.into_iter().for_each(|runtime| self.show(&state, runtime));
        }
        self.end(leaving);
    }

    /// Ends all idle processes, and keeps none from now on.
    pub(super) fn close(&self) {
        let mut leaving = LeavingProcesses::default();
        {
            let mut state = self.state.lock();
            state.is_closed = true;
            state.bound(0, 0, &mut leaving);
        }
        self.end(leaving);
    }

    /// Shows the numbers of processes of a runtime.
    fn show(&self, state: &PoolState, runtime: Runtime) {
        let idle = |runtime: Runtime| {
            let ready = state.shelves.iter().filter(|shelf| shelf.kind.runtime == runtime);
            let handlers = state.handlers.iter().filter(|idle| idle.runtime == runtime).count();
            ready.map(|shelf| shelf.ready.len()).sum::<usize>() + handlers
        };
        self.metrics.warm.show(runtime, idle(runtime), state.busy[runtime as usize]);
        let [python, nodejs, cpp, go] =
            [Runtime::Python, Runtime::Nodejs, Runtime::Cpp, Runtime::Go].map(idle);
        self.activity.show_pools(WarmPools { python, nodejs, cpp, go });
    }

    fn end(&self, leaving: LeavingProcesses) {
        for (process, reason) in leaving.handlers {
            self.metrics.warm.ended(reason);
            match reason {
                WarmEnd::Failed | WarmEnd::Memory => drop(process),
                _ => process.dismiss(),
            }
        }
        for (instance, reason) in leaving.ready {
            self.metrics.warm.ended(reason);
            drop(instance);
        }
    }
}

impl Drop for BusyProcess<'_> {
    fn drop(&mut self) {
        let mut state = self.pool.state.lock();
        state.busy[self.runtime as usize] -= 1;
        self.pool.show(&state, self.runtime);
    }
}

impl StartingInterpreter {
    /// Adds the interpreter to those that wait.
    pub(super) fn started(self, instance: Instance) {
        let mut leaving = LeavingProcesses::default();
        {
            let mut state = self.pool.state.lock();
            match state.shelves.iter_mut().find(|shelf| shelf.kind == self.kind) {
                Some(shelf) => {
                    shelf.failures = 0;
                    shelf.ready.push_back(instance);
                }
                None => leaving.ready.push((instance, WarmEnd::Full)),
            }
            if state.is_closed {
                state.bound(0, 0, &mut leaving);
            }
            self.pool.show(&state, self.kind.runtime);
        }
        self.pool.end(leaving);
    }

    /// Returns the number of consecutive failures.
    pub(super) fn failed(self) -> u32 {
        let mut state = self.pool.state.lock();
        let Some(shelf) = state.shelves.iter_mut().find(|shelf| shelf.kind == self.kind) else { return 0 };
        shelf.failed();
        shelf.failures
    }
}

impl Drop for StartingInterpreter {
    fn drop(&mut self) {
        let mut state = self.pool.state.lock();
        if let Some(shelf) = state.shelves.iter_mut().find(|shelf| shelf.kind == self.kind) {
            shelf.starting = shelf.starting.saturating_sub(1);
        }
    }
}
