//! What clients see: the route table, the handlers, and the one place that makes errors of them.
//!
//! Every handler has one shape: parse → call → reply. Nothing here knows the server: `gateway` turns a request
//! into a [`Call`] and a [`Reply`] into a response.

mod auto_tuner;
mod change;
mod cursor;
mod fields;
mod form;
mod functions;
mod logs;
mod models;
mod object;
mod once;
mod openapi;
mod parameters;
mod precondition;
mod prefer;
mod problem;
mod query;
mod routes;
mod run;
mod status;
mod system;
mod upload;
mod workers;

use crate::model::Caller;
pub use problem::{ApiError, BODY_BYTES_SLACK};
pub use routes::{Endpoint, Found, Route, Takes, find, is_local, patterns_with_key};
pub use system::Health;

use crate::audit::{Event, Tail};
use crate::backend::{Backend, QueueTraits};
use crate::catalogue::Catalogue;
use crate::config::{BatchConf, Live, Secret, WaitsConf};
use crate::dispatch::Dispatcher;
use crate::functions::{Editor, Functions};
use crate::lifecycle::Lifecycle;
use crate::limiter::{Counted, RateLimiter};
use crate::metrics::Metrics;
use crate::model::now_ms;
use bytes::{Bytes, BytesMut};
use http::header::{HeaderName, HeaderValue};
use http::{HeaderMap, StatusCode, Uri};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

/// What a handler reads of a request.
#[derive(Debug, Default)]
pub struct Call {
    /// The parts of the path that the route's pattern names, decoded, in order.
    pub params: Vec<String>,
    pub uri: Uri,
    pub headers: CallHeaders,
    /// Empty on routes that read it piece by piece, or not at all.
    pub body: Bytes,
    /// `None` on routes that ask for no key.
    pub caller: Option<Arc<Caller>>,
    /// What the rate limits have said so far.
    pub counted: Counted,
}

impl Call {
    /// The prefix of the path that the client used, which what it is pointed to keeps.
    pub fn prefix(&self) -> &'static str {
        routes::split_prefix(self.uri.path()).0
    }

    /// The name of the API key, which stands for it; empty on routes that ask for none.
    pub fn key_name(&self) -> &str {
        self.caller.as_ref().map_or("", |caller| &caller.name)
    }
}

/// A body that is read piece by piece; whoever gives it has bounded its length and its time.
pub trait BodyStream: Send {
    /// `None`: it has ended.
    fn next(&mut self) -> impl Future<Output = Result<Option<Bytes>, ApiError>> + Send;
}

/// A whole body, of at most `bytes_max` bytes.
pub async fn whole(body: &mut impl BodyStream, bytes_max: usize) -> Result<Bytes, ApiError> {
    let fits = |bytes: usize| (bytes <= bytes_max).then_some(()).ok_or(ApiError::BodyTooLarge { bytes_max });
    let Some(first) = body.next().await? else { return Ok(Bytes::new()) };
    fits(first.len())?;
    // Most bodies come in one piece, which is then not copied.
    let Some(second) = body.next().await? else { return Ok(first) };
    let mut whole = BytesMut::from(first);
    let mut next = Some(second);
    while let Some(piece) = next {
        fits(whole.len() + piece.len())?;
        whole.extend_from_slice(&piece);
        next = body.next().await?;
    }
    Ok(whole.freeze())
}

/// The header fields that handlers read; a few shared values instead of a copy of the map.
#[derive(Debug, Default)]
pub struct CallHeaders {
    pub prefer: Vec<HeaderValue>,
    pub x_async: Option<HeaderValue>,
    pub content_type: Option<HeaderValue>,
    pub traceparent: Option<HeaderValue>,
    pub idempotency_key: Option<HeaderValue>,
    pub if_match: Vec<HeaderValue>,
    pub if_none_match: Vec<HeaderValue>,
    pub x_runtime: Option<HeaderValue>,
    pub x_memory_mb: Option<HeaderValue>,
    pub x_function_name: Option<HeaderValue>,
}

impl CallHeaders {
    /// One pass: requests have few fields, and most of these are among none of them. What may stand once does.
    pub fn of(map: &HeaderMap) -> Self {
        let mut found = Self::default();
        let mut traces = 0;
        for (name, value) in map {
            let place = match name.as_str() {
                "prefer" => {
                    found.prefer.push(value.clone());
                    continue;
                }
                "if-match" => {
                    found.if_match.push(value.clone());
                    continue;
                }
                "if-none-match" => {
                    found.if_none_match.push(value.clone());
                    continue;
                }
                "x-async" => &mut found.x_async,
                "content-type" => &mut found.content_type,
                "traceparent" => {
                    traces += 1;
                    // Two are as good as none (W3C Trace Context, section 3.2).
                    found.traceparent = (traces == 1).then(|| value.clone());
                    continue;
                }
                "idempotency-key" => &mut found.idempotency_key,
                "x-runtime" => &mut found.x_runtime,
                "x-memory-mb" => &mut found.x_memory_mb,
                "x-function-name" => &mut found.x_function_name,
                _ => continue,
            };
            *place = Some(value.clone());
        }
        found
    }

    /// Whether the body is said to be JSON. A missing `Content-Type` is taken as JSON, as the body says clearly
    /// enough whether it is.
    pub fn is_json(&self) -> bool {
        let Some(value) = &self.content_type else { return true };
        if value.as_bytes() == b"application/json" {
            return true; // the usual case, without a copy
        }
        let essence = essence(value);
        essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"))
    }

    pub fn is_form(&self) -> bool {
        self.content_type.as_ref().is_some_and(|value| essence(value) == "multipart/form-data")
    }
}

/// A media type without its parameters, in small letters.
fn essence(value: &HeaderValue) -> String {
    let essence = value.to_str().unwrap_or_default().split(';').next().unwrap_or_default();
    essence.trim().to_ascii_lowercase()
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

/// What the handlers are made of.
pub struct Parts<'a> {
    pub waits: Live<WaitsConf>,
    pub batch: Live<BatchConf>,
    pub backend: &'a Backend,
    pub dispatcher: Dispatcher,
    pub functions: Functions,
    pub editor: Editor,
    pub tail: Tail,
    pub catalogue: Catalogue,
    pub limiter: RateLimiter,
    pub lifecycle: Lifecycle,
    pub metrics: Arc<Metrics>,
    /// Where uploads lie until they are checked and stored.
    pub spool_dir: PathBuf,
    /// What cursors are signed with is derived from it.
    pub api_key: &'a Secret,
}

/// All handlers; each holds only what it uses.
pub struct Api {
    run: run::Run,
    status: status::Status,
    functions: functions::FunctionRoutes,
    upload: upload::UploadRoute,
    change: change::ChangeRoute,
    auto_tuner: auto_tuner::AutoTuner,
    logs: logs::Logs,
    models: models::Models,
    workers: workers::Workers,
    system: system::System,
    queue: QueueTraits,
    tail: Tail,
}

impl Api {
    pub fn new(parts: Parts<'_>) -> Self {
        let Parts { waits, backend, dispatcher, lifecycle, metrics, tail, .. } = parts;
        let queue = backend.queue.traits();
        let cursors = cursor::Cursors::new(parts.api_key);
        let uploads = Arc::new(upload::Uploads::new(parts.spool_dir));
        let once = once::Once::new(
            backend,
            dispatcher.clone(),
            parts.batch,
            lifecycle.clone(),
            Arc::clone(&metrics),
        );
        let run = run::Run::new(
            waits.clone(),
            queue,
            dispatcher.clone(),
            once,
            parts.functions,
            parts.limiter,
            lifecycle.clone(),
            tail.clone(),
        );
        Self {
            run,
            status: status::Status::new(waits, dispatcher, lifecycle.clone()),
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
            models: models::Models::new(parts.catalogue),
            workers: workers::Workers::new(Arc::clone(&backend.workers), tail.clone()),
            system: system::System::new(Health::new(backend, Arc::clone(&metrics)), lifecycle, metrics),
            queue,
            tail,
        }
    }

    /// Somebody showed no key, or a wrong one.
    pub fn note_unauthorized(&self, ip: Option<IpAddr>) {
        self.tail.note(now_ms(), || Event::Unauthorized { ip });
    }

    /// Largest body that a route takes, in bytes.
    pub fn body_bytes_max(&self, endpoint: Endpoint) -> usize {
        match endpoint {
            Endpoint::Upload | Endpoint::ChangeFunction => form::BODY_BYTES_MAX,
            Endpoint::Heartbeat => workers::BODY_BYTES_MAX,
            _ => self.queue.message_bytes_max + BODY_BYTES_SLACK,
        }
    }

    /// Answers a request whose body, if its route takes one, is read.
    pub async fn call(&self, endpoint: Endpoint, call: &Call) -> Result<Reply, ApiError> {
        match endpoint {
            Endpoint::Run => self.run.post(call).await,
            // Set apart: a request would else take the room of the largest of all handlers, run for run.
            _ => Box::pin(self.call_other(endpoint, call)).await,
        }
    }

    async fn call_other(&self, endpoint: Endpoint, call: &Call) -> Result<Reply, ApiError> {
        match endpoint {
            Endpoint::Index => Ok(system::index()),
            Endpoint::Status => self.status.get(call).await,
            Endpoint::StatusWithoutId => Err(ApiError::invalid("the path names no job id: /status/<jobId>")),
            Endpoint::Functions => self.functions.list(call).await,
            Endpoint::Function => self.functions.get(call).await,
            Endpoint::DeleteFunction => self.functions.delete(call).await,
            Endpoint::FunctionMetrics => self.functions.metrics(call).await,
            Endpoint::AutoTuner => self.auto_tuner.get(call).await,
            Endpoint::ApplyAutoTuner => self.auto_tuner.apply(call).await,
            Endpoint::Logs => self.logs.list(call).await,
            Endpoint::Log => self.logs.get(call).await,
            Endpoint::NodeLogs => Ok(self.logs.of_node()),
            Endpoint::Models => Ok(self.models.get().await),
            Endpoint::Heartbeat => self.workers.heartbeat(call).await,
            Endpoint::Workers => self.workers.list().await,
            Endpoint::SystemStatus => self.workers.system_status().await,
            Endpoint::OpenApi => Ok(openapi::document()),
            Endpoint::Health => Ok(self.system.health().await),
            Endpoint::Livez => Ok(self.system.livez()),
            Endpoint::Readyz => self.system.readyz(),
            Endpoint::Metrics => Ok(self.system.metrics()),
            // Runs are answered above, and the bodies of the others are streams.
            Endpoint::Run | Endpoint::Upload | Endpoint::ChangeFunction => Err(ApiError::BodyBroken),
        }
    }

    /// Answers a request whose handler reads the body itself.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_types() {
        let of = |value| CallHeaders { content_type: value, ..CallHeaders::default() };
        assert!(of(None).is_json() && !of(None).is_form());
        for (value, json, form) in [
            ("application/json", true, false),
            ("Application/JSON; charset=utf-8", true, false),
            ("application/cloudevents+json", true, false),
            ("text/plain", false, false),
            ("application/x-www-form-urlencoded", false, false),
            ("application/jsonp", false, false),
            ("multipart/form-data; boundary=x", false, true),
            ("multipart/mixed; boundary=x", false, false),
            ("", false, false),
        ] {
            let headers = of(Some(HeaderValue::from_static(value)));
            assert_eq!((headers.is_json(), headers.is_form()), (json, form), "{value}");
        }
    }
}
