//! The spans of a job that was not recorded from its start, made at its end: it failed, or it was slow.
//!
//! Only the gateway's own spans can be made then. The worker has decided by the message, which named a trace
//! that is not recorded. The trace is that of the message, so log lines and spans of others fit to it.

use super::destination::Destination;
use super::message::{CREATE, SEND, name_of};
use super::recorder::{FinishedSpan, new_span_id, span_context, text};
use crate::config::TracesConf;
use crate::model::{FunctionId, JobId, JobTrace, TraceContext};
use opentelemetry::KeyValue;
use opentelemetry::trace::{Link, SpanKind};
use std::borrow::Cow;
use std::time::Duration;

/// The life of a job that has ended.
pub struct JobLife<'a> {
    pub id: JobId,
    pub function: &'a FunctionId,
    pub trace: Option<&'a JobTrace>,
    pub status: &'a str,
    pub is_success: bool,
    /// When the job was first sent, since the Unix epoch. `None`: not known.
    pub sent: Option<Duration>,
    /// When the queue last confirmed it. `None`: not known.
    pub confirmed: Option<Duration>,
    /// When the result arrived, or the job was given up.
    pub heard: Duration,
}

/// Whether the end of a job can make a difference.
pub(super) fn is_wanted(conf: TracesConf) -> bool {
    conf.failed || conf.slow_ms > 0
}

impl<'a> JobLife<'a> {
    fn accepted(&self) -> Duration {
        Duration::from_millis(self.id.accepted_at())
    }

    pub(super) fn is_traced_by(&self, conf: TracesConf) -> bool {
        let slow = Duration::from_millis(conf.slow_ms);
        let is_slow = !slow.is_zero() && self.heard.saturating_sub(self.accepted()) >= slow;
        // Its spans exist already if it is recorded.
        self.trace.is_none_or(|trace| !trace.is_recorded) && (conf.failed && !self.is_success || is_slow)
    }

    /// A span of the whole life, and below it the creation of the message and, if it is known, its send: from
    /// the first attempt to the confirmation.
    ///
    /// Without a trace of the client, the message names a trace whose id is that of the job, and the span
    /// `create` has the id in the message. With one, the message names the span of the client.
    pub(super) fn spans(&self, to: &Destination) -> Vec<FinishedSpan<'a>> {
        let (whole, message) = match self.trace {
            Some(trace) => (trace.context.recorded_child(new_span_id()), new_span_id()),
            None => (self.id.trace().recorded_child(new_span_id()), self.id.trace().span_id()),
        };
        let state = self.trace.and_then(|trace| trace.state.as_deref());
        let (began, of_client) = (self.accepted(), self.trace.map(|trace| trace.context.span_id()));
        let of_function = || text("faas.invoked_name", self.function.as_str());
        let id = || KeyValue::new("messaging.message.id", self.id.to_string());
        let error = (!self.is_success).then(|| Cow::Owned(self.status.to_owned()));
        let life = FinishedSpan {
            context: whole,
            parent: of_client,
            has_remote_parent: of_client.is_some(),
            state,
            kind: SpanKind::Internal,
            name: "run".into(),
            began,
            ended: self.heard,
            attributes: vec![of_function(), id(), text("infra.job.status", self.status)],
            links: Vec::new(),
            error,
        };
        let mut attributes = to.attributes(CREATE);
        attributes.extend([id(), of_function()]);
        let create = FinishedSpan {
            context: whole.recorded_child(message),
            parent: Some(whole.span_id()),
            has_remote_parent: false,
            state,
            kind: SpanKind::Producer,
            name: name_of(CREATE, to),
            began,
            // The message is created when the job is accepted.
            ended: began,
            attributes,
            links: Vec::new(),
            error: None,
        };
        let sent = self.sent.map(|began| self.send_span(&life, create.context, began, to));
        [life, create].into_iter().chain(sent).collect()
    }

    /// `created`: the span `create`.
    fn send_span(
        &self,
        whole: &FinishedSpan<'a>,
        created: TraceContext,
        began: Duration,
        to: &Destination,
    ) -> FinishedSpan<'a> {
        let mut attributes = to.attributes(SEND);
        attributes.extend(to.server_attributes());
        FinishedSpan {
            context: whole.context.recorded_child(new_span_id()),
            parent: Some(whole.context.span_id()),
            has_remote_parent: false,
            state: whole.state,
            kind: SpanKind::Client,
            name: name_of(SEND, to),
            began,
            ended: self.confirmed.unwrap_or(self.heard).max(began),
            attributes,
            links: vec![Link::with_context(span_context(created, whole.state, false))],
            error: self.confirmed.is_none().then_some(Cow::Borrowed("unconfirmed")),
        }
    }
}
