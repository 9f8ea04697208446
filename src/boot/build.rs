//! Builds all parts of a node. No constructor starts a task: [`super::node`] runs the loops afterwards.

use super::plan::{ConnectedBackend, NodeSettings};
use super::reload::{Reload, ReloadTargets};
use super::signals::ReloadSignals;
use crate::api::{Api, ApiParts};
use crate::audit::{self, AuditLoops, SpillDirs};
use crate::catalogue::Catalogue;
use crate::config::{FleetConf, Http2Conf, Live};
use crate::dispatch::{self, DispatchLoops, Dispatcher, NodeJobs};
use crate::fleet::Adopter;
use crate::functions::{self, ChangeLoop, Editor, Sweeper};
use crate::gateway::{Gateway, GatewaySettings, HealthLoop};
use crate::lifecycle::Lifecycle;
use crate::limiter::{Leaser, RateLimiter};
use crate::metrics::Metrics;
use crate::node_lease::NodeLease;
use crate::runs::{RunParts, Runs};
use anyhow::{Context, anyhow};
use std::path::Path;
use std::sync::Arc;

pub struct Built {
    pub door: ListenerParts,
    pub background: Background,
}

/// What the listeners need.
pub struct ListenerParts {
    pub gateway: Gateway,
    pub edge: GatewaySettings,
    pub http2: Http2Conf,
    pub metrics: Arc<Metrics>,
}

/// The background loops, not started yet.
pub struct Background {
    pub dispatcher: Dispatcher,
    pub loops: DispatchLoops,
    pub changes: ChangeLoop,
    pub reload: Reload,
    pub leaser: Leaser,
    pub sweeper: Sweeper,
    pub tending: HealthLoop,
    pub books: AuditLoops,
    pub adopter: Adopter,
}

impl Built {
    pub fn new(
        settings: &NodeSettings,
        hangups: ReloadSignals,
        connected: &ConnectedBackend,
        lifecycle: &Lifecycle,
    ) -> anyhow::Result<Self> {
        let conf = &settings.conf;
        let metrics = Arc::new(Metrics::new(conf.metrics.function_labels_max)?);
        let ConnectedBackend { node, backend, bucket, spool_dir, spill_dir, .. } = connected;
        let disk = spill_dir.as_ref().map(|dir| SpillDirs::open(dir, &conf.audit, &metrics));
        let disk = disk.transpose().context("the spill directory cannot be opened")?;
        let (audit, books) = audit::new(&conf.memory, backend.into(), disk, Arc::clone(&metrics));
        let tail = audit.tail();
        let (waits, batch) = (Live::new(conf.waits.clone()), Live::new(conf.batch.clone()));
        let overload = Live::new(conf.overload.clone());
        let lease = NodeLease::of_fleet(backend.membership.is_some());
        let (dispatcher, loops) = dispatch::new(dispatch::DispatchParts {
            node: *node,
            memory: &conf.memory,
            dead_letter: &conf.dead_letter,
            batch: batch.clone(),
            overload: overload.clone(),
            backend,
            audit,
            lease: Arc::clone(&lease),
            metrics: Arc::clone(&metrics),
        });
        let adopter = adopter(connected, &conf.fleet, lease, loops.node_jobs.clone(), &books, &metrics);
        let (functions, changes) = functions::new(&conf.cache, backend, bucket.clone(), &metrics);
        let editor = Editor::new(backend, functions.clone());
        let (limiter, leaser) =
            RateLimiter::new(&conf.limits, &conf.keys, backend.limits.clone(), Arc::clone(&metrics));
        let edge = GatewaySettings::new(conf, &settings.api_key, settings.pseudonym.clone())
            .map_err(|(setting, e)| anyhow!("{setting} {e}"))?;
        let targets = ReloadTargets {
            waits: waits.clone(),
            batch: batch.clone(),
            overload,
            functions: functions.clone(),
            limiter: limiter.clone(),
            edge: edge.clone(),
        };
        let reload = reload(settings, hangups, targets, &metrics);
        let run_parts = RunParts {
            backend,
            waits,
            batch,
            dispatcher: dispatcher.clone(),
            functions,
            limiter: limiter.clone(),
            lifecycle: lifecycle.clone(),
            tail,
            metrics: Arc::clone(&metrics),
        };
        let api = api(settings, run_parts, editor, spool_dir)?;
        let sweeper = Sweeper::new(backend, Arc::clone(&metrics));
        let tending = HealthLoop { upstreams: edge.upstreams.clone(), metrics: Arc::clone(&metrics) };
        let gateway = Gateway::new(api, edge.clone(), limiter, lifecycle.clone(), Arc::clone(&metrics));
        let background =
            Background { dispatcher, loops, changes, reload, leaser, sweeper, tending, books, adopter };
        let door = ListenerParts { gateway, edge, http2: conf.http2.clone(), metrics };
        Ok(Self { door, background })
    }
}

/// The handlers, and the use case of runs behind one of them.
fn api(settings: &NodeSettings, runs: RunParts<'_>, editor: Editor, spool_dir: &Path) -> anyhow::Result<Api> {
    let parts = ApiParts {
        waits: runs.waits.clone(),
        backend: runs.backend,
        dispatcher: runs.dispatcher.clone(),
        editor,
        tail: runs.tail.clone(),
        catalogue: Catalogue::new(settings.ai_node.as_ref())?,
        lifecycle: runs.lifecycle.clone(),
        metrics: Arc::clone(&runs.metrics),
        spool_dir: spool_dir.to_owned(),
        api_key: &settings.api_key,
        runs: Runs::new(runs),
    };
    Ok(Api::new(parts))
}

fn reload(
    settings: &NodeSettings,
    hangups: ReloadSignals,
    targets: ReloadTargets,
    metrics: &Arc<Metrics>,
) -> Reload {
    let loaded = (settings.texts.clone(), settings.conf.clone());
    Reload::new(settings.source.clone(), hangups, loaded, targets, Arc::clone(metrics))
}

fn adopter(
    connected: &ConnectedBackend,
    conf: &FleetConf,
    lease: Arc<NodeLease>,
    jobs: NodeJobs,
    books: &AuditLoops,
    metrics: &Arc<Metrics>,
) -> Adopter {
    let membership = connected.backend.membership.clone();
    Adopter::new(
        connected.node,
        conf,
        membership,
        lease,
        jobs,
        Arc::clone(&books.ledger),
        Arc::clone(metrics),
    )
}
