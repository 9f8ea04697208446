//! A node without its edge: admission, dispatch, records, functions, limits and membership, built, started
//! and stopped in one place.
//!
//! `boot` puts the HTTP edge and the settings of a process around it. The simulation runs it without them, so
//! what it proves holds for the parts, and the order of their start and stop, that a process has.

use crate::ambient;
use crate::audit::{self, AuditLoops, RecentEvents, SpillDirs, Stores};
use crate::backend::Backend;
use crate::config::{BatchConf, Conf, Live, OverloadConf, WaitsConf};
use crate::dispatch::{self, DispatchLoops, DispatchParts, Dispatcher};
use crate::events::{self, EventBus, EventLoop};
use crate::fleet::Adopter;
use crate::functions::{self, ChangeLoop, Editor, FunctionCache, Sweeper};
use crate::lifecycle::Lifecycle;
use crate::limiter::{Leaser, RateLimiter};
use crate::metrics::Metrics;
use crate::model::NodeId;
use crate::node_lease::NodeLease;
use crate::runs::{RunParts, Runs};
use crate::traces::Traces;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// Deadline for clearing the journal at the very end. The next start finds the remaining entries settled.
const LAST_CALLS_MAX: Duration = Duration::from_secs(2);

/// What an engine is built from.
pub struct EngineParts<'a> {
    pub node: NodeId,
    pub conf: &'a Conf,
    pub backend: &'a Backend,
    /// The S3 bucket with the code of the functions.
    pub bucket: String,
    /// Directory for rows that wait for the log table. `None`: they wait in memory.
    pub spill_dir: Option<&'a Path>,
    pub lifecycle: &'a Lifecycle,
    pub traces: Traces,
    pub metrics: Arc<Metrics>,
}

/// The parts that requests use.
pub struct Engine {
    pub runs: Runs,
    pub dispatcher: Dispatcher,
    pub functions: FunctionCache,
    pub editor: Editor,
    pub limiter: RateLimiter,
    pub tail: RecentEvents,
    pub events: EventBus,
    pub lease: Arc<NodeLease>,
    pub waits: Live<WaitsConf>,
    pub batch: Live<BatchConf>,
    pub overload: Live<OverloadConf>,
}

/// The background loops, not started yet.
pub struct EngineLoops {
    pub adopter: Adopter,
    /// The directory for rows that wait for the log table. Must be probed at intervals.
    pub disk: Option<Arc<SpillDirs>>,
    dispatcher: Dispatcher,
    dispatch: DispatchLoops,
    changes: ChangeLoop,
    leaser: Leaser,
    sweeper: Sweeper,
    audit: AuditLoops,
    events: EventLoop,
}

/// Builds the parts of a node. Starts nothing.
///
/// # Errors
/// The spill directory cannot be opened.
pub fn new(parts: EngineParts<'_>) -> io::Result<(Engine, EngineLoops)> {
    let EngineParts { node, conf, backend, bucket, spill_dir, lifecycle, traces, metrics } = parts;
    let spill = spill_dir.map(|dir| SpillDirs::open(dir, &conf.audit, &metrics)).transpose()?;
    let lease = NodeLease::of_fleet(backend.membership.is_some());
    let stores = Stores::of(backend, node);
    let (audit, audit_loops) =
        audit::new(&conf.memory, stores, spill, Arc::clone(&lease), Arc::clone(&metrics));
    let tail = audit.tail();
    let (waits, batch) = (Live::new(conf.waits.clone()), Live::new(conf.batch.clone()));
    let overload = Live::new(conf.overload.clone());
    let (events, event_loop) = events::new(node, &conf.events, backend, &metrics);
    let (dispatcher, dispatch) = dispatch::new(DispatchParts {
        node,
        memory: &conf.memory,
        dead_letter: &conf.dead_letter,
        batch: batch.clone(),
        overload: overload.clone(),
        backend,
        audit,
        lease: Arc::clone(&lease),
        events: events.clone(),
        traces: traces.clone(),
        metrics: Arc::clone(&metrics),
    });
    let adopter = Adopter::new(
        node,
        &conf.fleet,
        backend.membership.clone(),
        Arc::clone(&lease),
        dispatch.node_jobs.clone(),
        Arc::clone(&audit_loops.ledger),
        Arc::clone(&metrics),
    )
    .reporting_to(events.clone());
    let (functions, changes) = functions::new(&conf.cache, backend, bucket, &metrics);
    let editor = Editor::new(backend, functions.clone()).reporting_to(events.clone());
    let (limiter, leaser) =
        RateLimiter::new(&conf.limits, &conf.keys, backend.limits.clone(), Arc::clone(&metrics));
    let runs = Runs::new(RunParts {
        backend,
        waits: waits.clone(),
        batch: batch.clone(),
        dispatcher: dispatcher.clone(),
        functions: functions.clone(),
        limiter: limiter.clone(),
        lifecycle: lifecycle.clone(),
        tail: tail.clone(),
        traces,
        metrics: Arc::clone(&metrics),
    });
    let sweeper = Sweeper::new(backend, metrics);
    let loops = EngineLoops {
        adopter,
        disk: audit_loops.disk.clone(),
        dispatcher: dispatcher.clone(),
        dispatch,
        changes,
        leaser,
        sweeper,
        audit: audit_loops,
        events: event_loop,
    };
    let parts =
        Engine { runs, dispatcher, functions, editor, limiter, tail, events, lease, waits, batch, overload };
    Ok((parts, loops))
}

impl EngineLoops {
    /// Starts all loops. [`Adopter::begin`] must have succeeded.
    #[expect(clippy::disallowed_methods, reason = "four loops, which `RunningEngine::stop` awaits")]
    pub fn start(self) -> RunningEngine {
        let Self { adopter, dispatcher, dispatch, changes, leaser, sweeper, audit, events, disk: _ } = self;
        let (stop_batches, batches_stopped) = watch::channel(false);
        let (stop_flusher, flusher_stopped) = watch::channel(false);
        let (stop_ledger, ledger_stopped) = watch::channel(false);
        let (stop_events, events_stopped) = watch::channel(false);
        let mut endless = JoinSet::new();
        endless.spawn(ambient::scoped(dispatch.pump.run()));
        endless.spawn(ambient::scoped(dispatch.lookups.run()));
        endless.spawn(ambient::scoped(adopter.run()));
        endless.spawn(ambient::scoped(dispatch.dead_letters.run()));
        endless.spawn(ambient::scoped(changes.run()));
        endless.spawn(ambient::scoped(sweeper.run()));
        endless.spawn(ambient::scoped(leaser.run()));
        RunningEngine {
            dispatcher,
            endless,
            batches: Some(ambient::spawn(dispatch.batches.run(turned(batches_stopped)))),
            flusher: Some(ambient::spawn(audit.flusher.run(dispatch.rows, turned(flusher_stopped)))),
            ledger: Some(ambient::spawn(audit.ledger.run(turned(ledger_stopped)))),
            events: Some(ambient::spawn(events.run(turned(events_stopped)))),
            stop_batches,
            stop_flusher,
            stop_ledger,
            stop_events,
        }
    }
}

/// The loops of a node that runs.
pub struct RunningEngine {
    dispatcher: Dispatcher,
    /// Loops that never end by themselves.
    endless: JoinSet<()>,
    batches: Option<JoinHandle<()>>,
    flusher: Option<JoinHandle<()>>,
    ledger: Option<JoinHandle<()>>,
    events: Option<JoinHandle<()>>,
    stop_batches: watch::Sender<bool>,
    stop_flusher: watch::Sender<bool>,
    stop_ledger: watch::Sender<bool>,
    stop_events: watch::Sender<bool>,
}

impl RunningEngine {
    /// Resolves when a loop has ended that should not end. It has panicked.
    pub async fn any_ended(&mut self) {
        tokio::select! {
            _ = self.endless.join_next() => {}
            _ = ended(&mut self.batches) => {}
            _ = ended(&mut self.flusher) => {}
            _ = ended(&mut self.ledger) => {}
            _ = ended(&mut self.events) => {}
        }
        tracing::error!("A background loop ended unexpectedly; the process stops");
    }

    /// Stops the loops in the order in which jobs pass them: accepted jobs are sent or given up, then their
    /// rows are written, then jobs leave the journal and sums are posted.
    pub async fn stop(&mut self) {
        self.stop_batches.send_replace(true);
        if let Some(batches) = self.batches.take() {
            // This ends, because jobs that wait are given up at their deadline.
            let _ = batches.await;
        }
        self.stop_flusher.send_replace(true);
        if let Some(flusher) = self.flusher.take() {
            // The flusher and the ledger have deadlines of their own.
            let _ = flusher.await;
        }
        self.stop_ledger.send_replace(true);
        if let Some(ledger) = self.ledger.take() {
            let _ = ledger.await;
        }
        let _ = tokio::time::timeout(LAST_CALLS_MAX, self.dispatcher.clear_journal()).await;
        // Last, because the others report events.
        self.stop_events.send_replace(true);
        if let Some(events) = self.events.take() {
            let _ = events.await;
        }
        self.endless.shutdown().await;
    }
}

async fn ended(handle: &mut Option<JoinHandle<()>>) {
    match handle {
        Some(running) => {
            let _ = running.await;
            *handle = None;
        }
        None => std::future::pending().await,
    }
}

async fn turned(mut watch: watch::Receiver<bool>) {
    // A dropped sender means that the node is gone.
    let _ = watch.wait_for(|stop| *stop).await;
}
