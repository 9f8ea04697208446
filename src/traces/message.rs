//! The spans of a job, by the conventions for messaging: a PRODUCER span `create` for each job, a CLIENT span
//! `send` for a batch, and a CONSUMER span `process` in the worker.

use super::destination::Destination;
use super::recorder::{FinishedSpan, new_span_id, span_context, text};
use crate::ambient;
use crate::model::{Job, JobTrace, TraceContext};
use opentelemetry::KeyValue;
use opentelemetry::trace::{Link, SpanKind};
use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

pub(super) const CREATE: &str = "create";
pub(super) const SEND: &str = "send";
const PROCESS: &str = "process";

pub(super) fn name_of(operation: &str, destination: &Destination) -> Cow<'static, str> {
    format!("{operation} {}", destination.name).into()
}

/// From the first byte of the message until it was handed over to be sent.
pub(super) fn created<'a>(job: &Job, trace: &'a JobTrace, to: &Destination) -> FinishedSpan<'a> {
    let mut attributes = to.attributes(CREATE);
    attributes.push(KeyValue::new("messaging.message.id", job.id.to_string()));
    let bytes = i64::try_from(job.message.len()).unwrap_or(i64::MAX);
    attributes.push(KeyValue::new("messaging.message.body.size", bytes));
    attributes.push(text("faas.invoked_name", job.function.as_str()));
    FinishedSpan {
        context: trace.context,
        parent: trace.parent,
        has_remote_parent: false,
        state: trace.state.as_deref(),
        kind: SpanKind::Producer,
        name: name_of(CREATE, to),
        began: trace.began,
        ended: ambient::unix_time(),
        attributes,
        links: Vec::new(),
        error: None,
    }
}

/// A batch that is being sent.
///
/// Its jobs may belong to many traces, and a span belongs to one. It is below the request of the first
/// recorded job, and has a link to the `create` span of each. A trace of its own was rejected: most
/// collectors show no links to a span, only those from it, so no request would show its send.
pub struct SendSpan {
    context: TraceContext,
    first: Arc<JobTrace>,
    links: Vec<Link>,
    messages: usize,
    began: Duration,
}

impl SendSpan {
    pub(super) fn begin(jobs: &[Job]) -> Option<Self> {
        let of_job = |job: &Job| job.trace.clone().filter(|trace| trace.is_recorded);
        let first = jobs.iter().find_map(of_job)?;
        // At most as many as a batch has jobs.
        let links = jobs.iter().filter_map(|job| Some((job, of_job(job)?))).map(|(job, trace)| {
            let id = KeyValue::new("messaging.message.id", job.id.to_string());
            Link::new(span_context(trace.context, trace.state.as_deref(), false), vec![id], 0)
        });
        Some(Self {
            context: first.context.recorded_child(new_span_id()),
            links: links.collect(),
            messages: jobs.len(),
            began: ambient::unix_time(),
            first,
        })
    }

    pub(super) fn finished(self, error: Option<&'static str>, to: &Destination) -> FinishedSpan<'static> {
        let mut attributes = to.attributes(SEND);
        attributes.extend(to.server_attributes());
        let messages = i64::try_from(self.messages).unwrap_or(i64::MAX);
        attributes.push(KeyValue::new("messaging.batch.message_count", messages));
        FinishedSpan {
            context: self.context,
            parent: self.first.parent,
            has_remote_parent: false,
            state: None,
            kind: SpanKind::Client,
            name: name_of(SEND, to),
            began: self.began,
            ended: ambient::unix_time(),
            attributes,
            links: self.links,
            error: error.map(Cow::Borrowed),
        }
    }
}

/// A run in progress that is recorded.
pub struct ProcessSpan {
    pub context: TraceContext,
    /// The span that the message names.
    pub(super) parent: Option<TraceContext>,
    pub(super) state: Option<Box<str>>,
    pub(super) began: Duration,
}

/// A run that has ended.
pub struct ProcessEnd<'a> {
    pub request_id: &'a str,
    pub function: &'a str,
    /// Version of the function. 0: unknown.
    pub version: u64,
    pub memory_mb: u64,
    pub worker_id: &'a str,
    /// `None`: no process ran.
    pub is_cold: Option<bool>,
    /// Why the run has failed.
    pub error: Option<&'static str>,
}

/// The `create` span is its parent, because the message is processed alone, and it has the link that the
/// conventions demand.
pub(super) fn processed<'a>(
    span: &'a ProcessSpan,
    end: &ProcessEnd<'_>,
    from: &Destination,
) -> FinishedSpan<'a> {
    let mut attributes = from.attributes(PROCESS);
    attributes.push(text("messaging.message.id", end.request_id));
    attributes.push(KeyValue::new("faas.trigger", "pubsub"));
    attributes.push(text("faas.name", end.function));
    attributes.push(text("faas.invocation_id", end.request_id));
    attributes.push(text("faas.instance", end.worker_id));
    let memory = i64::try_from(end.memory_mb.saturating_mul(1 << 20)).unwrap_or(i64::MAX);
    attributes.push(KeyValue::new("faas.max_memory", memory));
    if end.version > 0 {
        attributes.push(KeyValue::new("faas.version", end.version.to_string()));
    }
    attributes.extend(end.is_cold.map(|is_cold| KeyValue::new("faas.coldstart", is_cold)));
    let link = |parent| Link::with_context(span_context(parent, span.state.as_deref(), true));
    FinishedSpan {
        context: span.context,
        parent: span.parent.map(|parent| parent.span_id()),
        has_remote_parent: span.parent.is_some(),
        state: span.state.as_deref(),
        kind: SpanKind::Consumer,
        name: name_of(PROCESS, from),
        began: span.began,
        ended: ambient::unix_time(),
        attributes,
        links: span.parent.map(link).into_iter().collect(),
        error: end.error.map(Cow::Borrowed),
    }
}
