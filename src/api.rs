//! The HTTP API: the route table, the handlers, and the mapping of errors to problem responses.
//!
//! Every handler has the same structure: parse → call → reply. This module is independent of the HTTP server:
//! `gateway` turns a request into a [`Call`], and a [`Reply`] into a response.

mod auto_tuner;
mod call;
mod change;
mod cursor;
mod events;
mod fields;
mod form;
mod functions;
mod jobs;
mod logs;
mod models;
mod number;
mod object;
mod openapi;
mod overview;
mod parameters;
mod precondition;
mod prefer;
mod problem;
mod query;
mod queue_depth;
mod reply;
mod routes;
mod run;
mod status;
mod system;
mod upload;
mod workers;

pub use call::{BodyStream, Call, CallHeaders, whole};
pub use problem::{ApiError, BODY_BYTES_SLACK, X_RATELIMIT_LIMIT, X_RATELIMIT_REMAINING};
pub use reply::{Reply, ReplyStream};
pub use routes::{BodyMode, Endpoint, Route, RouteMatch, find, is_local, patterns, patterns_with_key};
pub use system::Health;

use crate::audit::{Event, RecentEvents};
use crate::backend::{Backend, QueueTraits};
use crate::catalogue::Catalogue;
use crate::config::{Live, Secret, WaitsConf};
use crate::dispatch::Dispatcher;
use crate::events::EventBus;
use crate::functions::Editor;
use crate::lifecycle::Lifecycle;
use crate::metrics::Metrics;
use crate::model::now_ms;
use crate::overview::Overview;
use crate::runs::Runs;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

/// The dependencies and settings of the handlers.
pub struct ApiParts<'a> {
    pub waits: Live<WaitsConf>,
    pub backend: &'a Backend,
    pub runs: Runs,
    pub dispatcher: Dispatcher,
    pub editor: Editor,
    pub tail: RecentEvents,
    pub events: EventBus,
    pub catalogue: Catalogue,
    pub overview: Overview,
    pub lifecycle: Lifecycle,
    pub metrics: Arc<Metrics>,
    /// The directory for uploads until they are validated and stored.
    pub spool_dir: PathBuf,
    /// The price of one second with one GB of memory, if it is configured.
    pub gb_second: Option<f64>,
    /// The key that signs cursors is derived from it.
    pub api_key: &'a Secret,
}

/// All handlers. Each holds only its own dependencies.
pub struct Api {
    run: run::RunRoute,
    status: status::StatusRoute,
    jobs: jobs::Jobs,
    functions: functions::FunctionRoutes,
    upload: upload::UploadRoute,
    change: change::ChangeRoute,
    auto_tuner: auto_tuner::AutoTuner,
    logs: logs::Logs,
    events: events::EventRoute,
    models: models::Models,
    workers: workers::Workers,
    system: system::System,
    overview: overview::OverviewRoute,
    queue: QueueTraits,
    tail: RecentEvents,
}

impl Api {
    pub fn new(parts: ApiParts<'_>) -> Self {
        let ApiParts { waits, backend, dispatcher, lifecycle, metrics, tail, events, .. } = parts;
        let queue = backend.queue.traits();
        let cursors = cursor::Cursors::new(parts.api_key);
        let uploads = Arc::new(upload::UploadSpool::new(parts.spool_dir));
        let run = run::RunRoute::new(parts.runs);
        let depth = Arc::new(queue_depth::QueueDepth::new(Arc::clone(&backend.queue)));
        let health = Health::new(backend, Arc::clone(&depth), Arc::clone(&metrics));
        let workers = workers::Workers::new(Arc::clone(&backend.workers), tail.clone(), events.clone());
        let jobs = jobs::Jobs::new(dispatcher.clone(), Arc::clone(&backend.executions), parts.gb_second);
        Self {
            run,
            status: status::StatusRoute::new(waits, dispatcher, lifecycle.clone()),
            jobs,
            functions: functions::FunctionRoutes::new(
                Arc::clone(&backend.functions),
                parts.editor.clone(),
                tail.clone(),
                cursors.clone(),
            ),
            upload: upload::UploadRoute::new(parts.editor.clone(), Arc::clone(&uploads), tail.clone()),
            change: change::ChangeRoute::new(
                Arc::clone(&backend.functions),
                parts.editor.clone(),
                uploads,
                tail.clone(),
            ),
            auto_tuner: auto_tuner::AutoTuner::new(
                Arc::clone(&backend.functions),
                parts.editor,
                tail.clone(),
            ),
            logs: logs::Logs::new(Arc::clone(&backend.executions), tail.clone(), cursors),
            events: events::EventRoute::new(events, lifecycle.clone()),
            models: models::Models::new(parts.catalogue),
            overview: overview::OverviewRoute::new(parts.overview, depth, workers.clone()),
            workers,
            system: system::System::new(health, lifecycle, metrics),
            queue,
            tail,
        }
    }

    /// Records a request without a key or with a wrong key in the recent events.
    pub fn note_unauthorized(&self, ip: Option<IpAddr>) {
        self.tail.note(now_ms(), || Event::Unauthorized { ip });
    }

    /// The maximum size of a request body of a route, in bytes.
    pub fn body_bytes_max(&self, endpoint: Endpoint) -> usize {
        match endpoint {
            Endpoint::Upload | Endpoint::ChangeFunction => form::BODY_BYTES_MAX,
            Endpoint::Heartbeat => workers::BODY_BYTES_MAX,
            _ => self.queue.message_bytes_max + BODY_BYTES_SLACK,
        }
    }

    /// Handles a request. Its body has been read, if the route has one.
    pub async fn call(&self, endpoint: Endpoint, call: &Call) -> Result<Reply, ApiError> {
        match endpoint {
            Endpoint::Run => self.run.post(call).await,
            // Boxed, because otherwise the future of every run would be as large as that of the largest
            // handler.
            _ => Box::pin(self.call_other(endpoint, call)).await,
        }
    }

    async fn call_other(&self, endpoint: Endpoint, call: &Call) -> Result<Reply, ApiError> {
        match endpoint {
            Endpoint::Index => Ok(system::index()),
            Endpoint::Status => self.status.get(call).await,
            Endpoint::StatusWithoutId => Err(ApiError::invalid("the path names no job id: /status/<jobId>")),
            Endpoint::Job => self.jobs.get(call).await,
            Endpoint::Functions => self.functions.list(call).await,
            Endpoint::Function => self.functions.get(call).await,
            Endpoint::DeleteFunction => self.functions.delete(call).await,
            Endpoint::FunctionMetrics => self.functions.metrics(call).await,
            Endpoint::AutoTuner => self.auto_tuner.get(call).await,
            Endpoint::ApplyAutoTuner => self.auto_tuner.apply(call).await,
            Endpoint::Logs => self.logs.list(call).await,
            Endpoint::Log => self.logs.get(call).await,
            Endpoint::NodeLogs => Ok(self.logs.of_node()),
            Endpoint::Events => self.events.get(call).await,
            Endpoint::Models => Ok(self.models.get().await),
            Endpoint::Heartbeat => self.workers.heartbeat(call).await,
            Endpoint::Workers => self.workers.list().await,
            Endpoint::SystemStatus => self.workers.system_status().await,
            Endpoint::Overview => self.overview.get().await,
            Endpoint::OpenApi => Ok(openapi::document()),
            Endpoint::Health => Ok(self.system.health().await),
            Endpoint::Livez => Ok(self.system.livez()),
            Endpoint::Readyz => self.system.readyz(),
            Endpoint::Metrics => Ok(self.system.metrics(call.accepts_gzip)),
            // `call` handles runs, and `call_streaming` handles the other two.
            Endpoint::Run | Endpoint::Upload | Endpoint::ChangeFunction => Err(ApiError::BodyBroken),
        }
    }

    /// Handles a request whose handler reads the body as a stream.
    pub async fn call_streaming(
        &self,
        endpoint: Endpoint,
        call: &Call,
        body: &mut impl BodyStream,
    ) -> Result<Reply, ApiError> {
        match endpoint {
            Endpoint::Upload => self.upload.post(call, body).await,
            Endpoint::ChangeFunction => self.change.put(call, body).await,
            _ => self.call(endpoint, call).await,
        }
    }
}
