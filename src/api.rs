//! What clients see: the route table, the handlers, and the one place that makes errors of them.
//!
//! Every handler has one shape: parse → call → reply. Nothing here knows the server: `gateway` turns a request
//! into a [`Call`] and a [`Reply`] into a response.

mod functions;
mod logs;
mod prefer;
mod problem;
mod routes;
mod run;
mod status;
mod system;

pub use problem::{ApiError, BODY_BYTES_SLACK};
pub use routes::{Endpoint, Found, Route, Scope, find, patterns};
pub use system::Health;

use crate::backend::{Backend, QueueTraits};
use crate::config::Conf;
use crate::dispatch::Dispatcher;
use crate::functions::Functions;
use crate::lifecycle::Lifecycle;
use crate::metrics::Metrics;
use bytes::Bytes;
use http::header::{HeaderName, HeaderValue};
use http::{HeaderMap, StatusCode};
use std::sync::Arc;

/// What a handler reads of a request.
#[derive(Debug, Default)]
pub struct Call {
    /// The parts of the path that the route's pattern names, decoded, in order.
    pub params: Vec<String>,
    /// Undecoded.
    pub query: Option<String>,
    pub headers: CallHeaders,
    pub body: Bytes,
}

/// The header fields that handlers read; a few shared values instead of a copy of the map.
#[derive(Debug, Default)]
pub struct CallHeaders {
    pub prefer: Vec<HeaderValue>,
    pub x_async: Option<HeaderValue>,
    pub content_type: Option<HeaderValue>,
    pub traceparent: Option<HeaderValue>,
    pub if_none_match: Option<HeaderValue>,
}

impl CallHeaders {
    pub fn of(map: &HeaderMap) -> Self {
        Self {
            prefer: map.get_all("prefer").iter().cloned().collect(),
            x_async: map.get("x-async").cloned(),
            content_type: map.get(http::header::CONTENT_TYPE).cloned(),
            traceparent: map.get("traceparent").cloned(),
            if_none_match: map.get(http::header::IF_NONE_MATCH).cloned(),
        }
    }
}

/// An answer.
#[derive(Debug)]
pub struct Reply {
    pub status: StatusCode,
    pub content_type: &'static str,
    pub headers: Vec<(HeaderName, HeaderValue)>,
    pub body: Bytes,
}

impl Reply {
    pub const JSON: &'static str = "application/json; charset=utf-8";

    /// JSON bytes as they are.
    pub fn json(status: StatusCode, body: impl Into<Bytes>) -> Self {
        Self { status, content_type: Self::JSON, headers: Vec::new(), body: body.into() }
    }

    /// A JSON value.
    pub fn value(status: StatusCode, value: &serde_json::Value) -> Self {
        Self::json(status, value.to_string())
    }

    pub fn with(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.headers.push((name, value));
        self
    }
}

/// All handlers. Cheap to share: each holds only what it uses.
pub struct Api {
    run: run::Run,
    status: status::Status,
    functions: functions::FunctionRoutes,
    logs: logs::Logs,
    system: system::System,
    queue: QueueTraits,
}

impl Api {
    pub fn new(
        conf: &Conf,
        backend: &Backend,
        dispatcher: Dispatcher,
        functions: Functions,
        lifecycle: Lifecycle,
        metrics: Arc<Metrics>,
        bucket: String,
    ) -> Self {
        let queue = backend.queue.traits();
        Self {
            run: run::Run::new(
                &conf.waits,
                queue,
                dispatcher.clone(),
                functions.clone(),
                lifecycle.clone(),
                bucket,
            ),
            status: status::Status::new(&conf.waits, dispatcher, lifecycle.clone()),
            functions: functions::FunctionRoutes::new(functions),
            logs: logs::Logs::new(Arc::clone(&backend.executions)),
            system: system::System::new(Health::new(backend, Arc::clone(&metrics)), lifecycle, metrics),
            queue,
        }
    }

    /// Largest body that any route takes, in bytes.
    pub fn body_bytes_max(&self) -> usize {
        self.queue.message_bytes_max + BODY_BYTES_SLACK
    }

    pub async fn call(&self, endpoint: Endpoint, call: &Call) -> Result<Reply, ApiError> {
        match endpoint {
            Endpoint::Index => Ok(system::index()),
            Endpoint::Run => self.run.post(call).await,
            Endpoint::Status => self.status.get(call).await,
            Endpoint::StatusWithoutId => Err(ApiError::invalid("the path names no job id: /status/<jobId>")),
            Endpoint::Function => self.functions.get(call).await,
            Endpoint::Logs => self.logs.list(call).await,
            Endpoint::Log => self.logs.get(call).await,
            Endpoint::Health => Ok(self.system.health().await),
            Endpoint::Livez => Ok(self.system.livez()),
            Endpoint::Readyz => self.system.readyz(),
            Endpoint::Metrics => Ok(self.system.metrics()),
        }
    }
}
