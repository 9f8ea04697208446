//! Traces: spans of requests, messages and runs, exported with OpenTelemetry.
//!
//! Off unless `OTEL_*` variables name a collector. Then each function here is one branch.
//!
//! Spans are recorded by hand, as finished [`SpanData`](opentelemetry_sdk::trace::SpanData).
//! `tracing-opentelemetry` was rejected: each `tracing` span costs an allocation and calls of the subscriber,
//! also in a process that exports nothing. So was the tracer of the SDK. The id of a span must be known
//! before the span begins, because the message of its job contains it, and a job that failed gets its spans
//! at its end. The batch processor of the SDK was rejected as well: it does not count what it drops, and its
//! thread has no Tokio runtime for the HTTP client. The types, the encoding and the retries are those of the
//! OpenTelemetry crates.
//!
//! Names follow the semantic conventions for HTTP, messaging and FaaS, version 1.42.
//!
//! * [`request`] — the SERVER span of a request
//! * [`message`] — the spans of a job: `create`, `send`, and `process` in a worker
//! * [`life`] — the spans of a job that was not traced from its start, but failed or was slow
//! * [`sampler`] — which traces are recorded; [`destination`] — the queue, as spans name it
//! * [`recorder`] — the queue of finished spans; [`export`] — the loop that sends them, over [`collector`]

mod collector;
mod destination;
mod export;
mod life;
mod message;
mod recorder;
mod request;
mod sampler;

pub use destination::Destination;
pub use export::ExportLoop;
pub use life::JobLife;
pub use message::{ProcessEnd, ProcessSpan, SendSpan};
pub use request::{RequestEnd, RequestSpan};

use crate::ambient;
use crate::config::{TraceExport, TraceSampling, TracesConf};
use crate::metrics::TraceMetrics;
use crate::model::{Job, JobTrace, RequestTrace, TraceContext};
use recorder::{Recorder, new_span_id};
use std::sync::Arc;

/// What traces are built from.
pub struct TraceParts<'a> {
    pub export: &'a TraceExport,
    pub conf: TracesConf,
    pub destination: Destination,
    /// The default of `service.name`.
    pub service: &'static str,
    /// `service.instance.id`.
    pub instance: String,
    pub metrics: TraceMetrics,
}

/// The handle that records spans. Cheap to clone. The default records nothing.
#[derive(Clone, Default)]
pub struct Traces(Option<Arc<Tracing>>);

struct Tracing {
    sampling: TraceSampling,
    conf: TracesConf,
    destination: Destination,
    recorder: Recorder,
}

/// Builds the handle and the loop that exports. Starts nothing.
///
/// # Errors
/// Why the collector cannot be used.
pub fn new(parts: TraceParts<'_>) -> Result<(Traces, ExportLoop), String> {
    let TraceParts { export, conf, destination, service, instance, metrics } = parts;
    let (recorder, export_loop) = export::new(export, service, instance, metrics)?;
    let tracing = Tracing { sampling: export.sampling, conf, destination, recorder };
    Ok((Traces(Some(Arc::new(tracing))), export_loop))
}

impl Traces {
    /// Begins the span of a request. `caller`: the span that its `traceparent` names, if it is valid. `None`:
    /// the request is not recorded.
    pub fn begin_request(&self, caller: impl FnOnce() -> Option<TraceContext>) -> Option<RequestSpan> {
        let tracing = self.0.as_deref()?;
        let parent = caller();
        let context = sampler::recorded(tracing.sampling, parent)?;
        Some(RequestSpan { context, parent, state: None, began: ambient::unix_time() })
    }

    pub fn end_request(&self, span: &RequestSpan, end: &RequestEnd<'_>) {
        if let Some(tracing) = &self.0 {
            tracing.recorder.record(request::finished(span, end));
        }
    }

    /// The trace of a new job. `client`: what its client sent. `None`: the message passes that on unchanged,
    /// and the job needs no trace.
    pub fn of_job(
        &self,
        request: Option<&RequestTrace>,
        client: Option<TraceContext>,
        state: Option<&str>,
    ) -> Option<Arc<JobTrace>> {
        let tracing = self.0.as_deref()?;
        let is_recorded = request.is_some();
        let context = match request {
            Some(request) => request.context.recorded_child(new_span_id()),
            // Its end decides, and then its spans belong to the trace of the client.
            None => client.filter(|_| life::is_wanted(tracing.conf))?,
        };
        Some(Arc::new(JobTrace {
            context,
            is_recorded,
            parent: request.map(|request| request.context.span_id()),
            state: state.map(Box::from),
            began: ambient::unix_time(),
            request_id: request.map(|request| Arc::clone(&request.request_id)),
        }))
    }

    /// Records that a message was created and handed over to be sent.
    pub fn created(&self, job: &Job) {
        if let (Some(tracing), Some(trace)) = (&self.0, job.trace.as_deref().filter(|of| of.is_recorded)) {
            tracing.recorder.record(message::created(job, trace, &tracing.destination));
        }
    }

    /// Begins the span of a batch. `None`: none of its jobs is recorded.
    pub fn begin_send(&self, jobs: &[Job]) -> Option<SendSpan> {
        self.0.as_ref().and_then(|_| SendSpan::begin(jobs))
    }

    /// `error`: why at least one job of the batch was not confirmed.
    pub fn end_send(&self, span: SendSpan, error: Option<&'static str>) {
        if let Some(tracing) = &self.0 {
            tracing.recorder.record(span.finished(error, &tracing.destination));
        }
    }

    /// Whether [`Self::job_ended`] has an effect.
    pub fn follows_jobs(&self) -> bool {
        self.0.as_ref().is_some_and(|tracing| life::is_wanted(tracing.conf))
    }

    /// Records the spans of a job that was not recorded from its start, if it failed or was slow.
    pub fn job_ended(&self, ended: &JobLife<'_>) {
        if let Some(tracing) = self.0.as_ref().filter(|tracing| ended.is_traced_by(tracing.conf)) {
            for span in ended.spans(&tracing.destination) {
                tracing.recorder.record(span);
            }
        }
    }

    /// Begins the span of a run. `message`: the span that the message names, and its `tracestate`. `None`:
    /// the run is not recorded.
    pub fn begin_process(
        &self,
        message: impl FnOnce() -> (Option<TraceContext>, Option<Box<str>>),
    ) -> Option<ProcessSpan> {
        let tracing = self.0.as_deref()?;
        let (parent, state) = message();
        let context = sampler::recorded(tracing.sampling, parent)?;
        Some(ProcessSpan { context, parent, state, began: ambient::unix_time() })
    }

    pub fn end_process(&self, span: &ProcessSpan, end: &ProcessEnd<'_>) {
        if let Some(tracing) = &self.0 {
            tracing.recorder.record(message::processed(span, end, &tracing.destination));
        }
    }
}

#[cfg(test)]
mod tests;
