//! Finished spans, on their way to the loop that exports them.

use crate::ambient;
use crate::metrics::TraceMetrics;
use crate::model::TraceContext;
use opentelemetry::trace::{Link, SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_sdk::trace::{SpanData, SpanEvents, SpanLinks};
use rand::Rng;
use std::borrow::Cow;
use std::str::FromStr;
use std::time::{Duration, UNIX_EPOCH};
use tokio::sync::mpsc;

/// Longest text of an attribute, in bytes. The rest is cut off.
const TEXT_BYTES_MAX: usize = 1024;
/// The version of the semantic conventions.
const SCHEMA_URL: &str = "https://opentelemetry.io/schemas/1.42.0";

pub fn new_span_id() -> u64 {
    // An id of zeros is invalid.
    ambient::rng().random::<u64>().max(1)
}

pub fn new_trace_id() -> u128 {
    ambient::rng().random::<u128>().max(1)
}

/// A text from outside, as an attribute.
pub fn text(name: &'static str, value: &str) -> KeyValue {
    let end = value.floor_char_boundary(TEXT_BYTES_MAX);
    KeyValue::new(name, value[..end].to_owned())
}

/// A finished span.
pub struct FinishedSpan<'a> {
    pub context: TraceContext,
    pub parent: Option<u64>,
    /// The parent is a span of another process.
    pub has_remote_parent: bool,
    pub state: Option<&'a str>,
    pub kind: SpanKind,
    pub name: Cow<'static, str>,
    /// Since the Unix epoch, and so is `ended`.
    pub began: Duration,
    pub ended: Duration,
    pub attributes: Vec<KeyValue>,
    pub links: Vec<Link>,
    /// `error.type`, if the operation failed.
    pub error: Option<Cow<'static, str>>,
}

/// The handle that queues spans.
pub struct Recorder {
    sender: mpsc::Sender<SpanData>,
    scope: InstrumentationScope,
    metrics: TraceMetrics,
}

impl Recorder {
    pub fn new(sender: mpsc::Sender<SpanData>, metrics: TraceMetrics) -> Self {
        let scope = InstrumentationScope::builder("infra-controller")
            .with_version(env!("CARGO_PKG_VERSION"))
            .with_schema_url(SCHEMA_URL)
            .build();
        Self { sender, scope, metrics }
    }

    /// Queues a span. If the queue is full, the span is dropped and counted: nothing waits for a collector.
    pub fn record(&self, span: FinishedSpan<'_>) {
        match self.sender.try_reserve() {
            Ok(place) => place.send(span.into_data(self.scope.clone())),
            Err(_) => self.metrics.dropped.inc(),
        }
    }
}

/// A span as the crates of OpenTelemetry name it.
pub fn span_context(of: TraceContext, state: Option<&str>, is_remote: bool) -> SpanContext {
    // The state is valid, so parsing succeeds.
    let state = state.and_then(|text| TraceState::from_str(text).ok()).unwrap_or_default();
    let (trace, span) = (TraceId::from(of.trace_id()), SpanId::from(of.span_id()));
    SpanContext::new(trace, span, TraceFlags::new(of.flags()), is_remote, state)
}

impl FinishedSpan<'_> {
    fn into_data(self, scope: InstrumentationScope) -> SpanData {
        let Self { context, parent, has_remote_parent, state, kind, name, began, ended, .. } = self;
        let mut attributes = self.attributes;
        let status = match self.error {
            Some(error) => {
                attributes.push(KeyValue::new("error.type", error));
                Status::error("")
            }
            None => Status::Unset,
        };
        let mut links = SpanLinks::default();
        links.links = self.links;
        SpanData {
            span_context: span_context(context, state, false),
            parent_span_id: parent.map_or(SpanId::INVALID, SpanId::from),
            parent_span_is_remote: has_remote_parent,
            span_kind: kind,
            name,
            start_time: UNIX_EPOCH + began,
            // The clock may have been set back meanwhile.
            end_time: UNIX_EPOCH + ended.max(began),
            attributes,
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links,
            status,
            instrumentation_scope: scope,
        }
    }
}
