//! Builds all parts of a node: the engine, and the HTTP edge around it. No constructor starts a task:
//! [`super::node`] runs the loops afterwards.

use super::plan::{ConnectedBackend, NodeSettings, TracePlan};
use super::reload::{Reload, ReloadTargets};
use super::signals::ReloadSignals;
use crate::api::{Api, ApiParts};
use crate::catalogue::Catalogue;
use crate::config::{Conf, Http2Conf};
use crate::engine::{self, Engine, EngineLoops, EngineParts};
use crate::gateway::{Gateway, GatewaySettings, HealthLoop, certificate_ends};
use crate::lifecycle::Lifecycle;
use crate::metrics::{Metrics, WorkerMetrics};
use crate::model::NodeId;
use crate::overview::{self, Overview, OverviewParts, SummaryLoop};
use crate::traces::{self, ExportLoop, TraceParts, Traces};
use anyhow::{Context, anyhow};
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
    pub engine: EngineLoops,
    pub reload: Reload,
    pub tending: HealthLoop,
    pub summaries: SummaryLoop,
    /// For the loop of the backend, if there is one.
    pub worker: Option<Arc<WorkerMetrics>>,
    pub traces: Traces,
    /// `None`: no spans are exported.
    pub export: Option<ExportLoop>,
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
        let (traces, export) = traces_of(settings, connected.node, &metrics)?;
        let parts = EngineParts {
            node: connected.node,
            conf,
            backend: &connected.backend,
            bucket: connected.bucket.clone(),
            spill_dir: connected.spill_dir.as_deref(),
            lifecycle,
            traces: traces.clone(),
            metrics: Arc::clone(&metrics),
        };
        let (engine, loops) = engine::new(parts).context("the spill directory cannot be opened")?;
        let edge = GatewaySettings::new(conf, &settings.api_key, settings.pseudonym.clone())
            .map_err(|(setting, e)| anyhow!("{setting} {e}"))?;
        let targets = ReloadTargets {
            waits: engine.waits.clone(),
            batch: engine.batch.clone(),
            overload: engine.overload.clone(),
            functions: engine.functions.clone(),
            limiter: engine.limiter.clone(),
            edge: edge.clone(),
            worker: settings.worker.clone(),
        };
        let loaded = (settings.texts.clone(), conf.clone());
        metrics.edge.show_certificates(&certificate_ends(conf));
        let shown = Arc::clone(&metrics);
        let set = move |conf: &Conf| {
            targets.set(conf);
            shown.edge.show_certificates(&certificate_ends(conf));
        };
        let reload = Reload::new(settings.source.clone(), hangups, loaded, set, metrics.conf.clone());
        let worker = connected.extra_loop.is_some().then(|| metrics.add_worker()).transpose()?;
        let tending = HealthLoop { upstreams: edge.upstreams.clone(), metrics: Arc::clone(&metrics) };
        let limiter = engine.limiter.clone();
        let (overview, summaries) = overview_of(&engine, connected, lifecycle, &metrics);
        let api = api(settings, engine, overview, connected, lifecycle, &metrics)?;
        let (of_gateway, lifecycle) = (Arc::clone(&metrics), lifecycle.clone());
        let gateway = Gateway::new(api, edge.clone(), limiter, lifecycle, traces.clone(), of_gateway);
        let door = ListenerParts { gateway, edge, http2: conf.http2.clone(), metrics };
        let background = Background { engine: loops, reload, tending, summaries, worker, traces, export };
        Ok(Self { door, background })
    }
}

fn overview_of(
    engine: &Engine,
    connected: &ConnectedBackend,
    lifecycle: &Lifecycle,
    metrics: &Arc<Metrics>,
) -> (Overview, SummaryLoop) {
    overview::new(OverviewParts {
        node: connected.node,
        summaries: Arc::clone(&connected.backend.summaries),
        is_fleet: connected.backend.membership.is_some(),
        lease: Arc::clone(&engine.lease),
        oldest: engine.dispatcher.oldest_job(),
        limiter: engine.limiter.clone(),
        lifecycle: lifecycle.clone(),
        metrics: Arc::clone(metrics),
    })
}

fn traces_of(
    settings: &NodeSettings,
    node: NodeId,
    metrics: &Metrics,
) -> anyhow::Result<(Traces, Option<ExportLoop>)> {
    let Some(TracePlan { export, destination }) = &settings.traces else {
        return Ok((Traces::default(), None));
    };
    let parts = TraceParts {
        export,
        conf: settings.conf.traces,
        destination: destination.clone(),
        service: "infra-controller",
        instance: node.to_string(),
        metrics: metrics.traces.clone(),
    };
    let (traces, export) = traces::new(parts).map_err(|e| anyhow!("spans cannot be exported: {e}"))?;
    Ok((traces, Some(export)))
}

fn api(
    settings: &NodeSettings,
    engine: Engine,
    overview: Overview,
    connected: &ConnectedBackend,
    lifecycle: &Lifecycle,
    metrics: &Arc<Metrics>,
) -> anyhow::Result<Api> {
    let Engine { runs, dispatcher, editor, tail, events, waits, .. } = engine;
    Ok(Api::new(ApiParts {
        runs,
        waits,
        backend: &connected.backend,
        dispatcher,
        editor,
        tail,
        events,
        catalogue: Catalogue::new(settings.ai_node.as_ref())?,
        overview,
        lifecycle: lifecycle.clone(),
        metrics: Arc::clone(metrics),
        spool_dir: connected.spool_dir.clone(),
        gb_second: settings.conf.cost.gb_second,
        api_key: &settings.api_key,
    }))
}
