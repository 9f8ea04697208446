//! Fields that each log line of a traced request or job has in addition: its trace id, and the request id.
//!
//! The context belongs to a task. Spans of `tracing` were rejected: a span costs an allocation and two calls
//! of the subscriber for each request, traced or not.

use crate::model::{JobTrace, TraceContext};
use std::fmt::{self, Write};
use std::sync::Arc;

tokio::task_local! {
    static CURRENT: LogContext;
}

/// The fields as text: `,"name":"value"` each.
#[derive(Clone)]
pub struct LogContext(Arc<str>);

impl LogContext {
    /// `request_id`: `X-Request-Id` of the request. Not `requestId`, which is the id of the job.
    pub fn new(trace: TraceContext, request_id: Option<&str>) -> Self {
        let mut text = format!(",\"traceId\":\"{:032x}\"", trace.trace_id());
        if let Some(id) = request_id {
            // An id may contain quotes.
            text.push_str(&format!(",\"httpRequestId\":{}", serde_json::Value::from(id)));
        }
        Self(text.into())
    }

    /// Adds the fields to the lines that `work` logs in its task.
    pub async fn scope<F: Future>(self, work: F) -> F::Output {
        CURRENT.scope(self, work).await
    }

    /// As [`Self::scope`], for work that does not wait.
    pub fn run<T>(self, work: impl FnOnce() -> T) -> T {
        CURRENT.sync_scope(self, work)
    }
}

/// Does `work` for a job. Its log lines have the ids of the job's trace, if it is recorded.
pub fn within_trace<T>(trace: Option<&Arc<JobTrace>>, work: impl FnOnce() -> T) -> T {
    match trace.filter(|trace| trace.is_recorded) {
        Some(trace) => LogContext::new(trace.context, trace.request_id.as_deref()).run(work),
        None => work(),
    }
}

/// Writes the fields of the current task, if it has any.
pub(super) fn write_fields(out: &mut impl Write) -> fmt::Result {
    CURRENT.try_with(|context| out.write_str(&context.0)).unwrap_or(Ok(()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields() -> String {
        let mut text = String::new();
        write_fields(&mut text).unwrap();
        text
    }

    #[tokio::test]
    async fn fields_belong_to_their_scope() {
        let trace = TraceContext::new(0xab, 1, true);
        let id = format!("\"traceId\":\"{}ab\"", "0".repeat(30));
        assert_eq!(fields(), "");
        LogContext::new(trace, Some("a\"b"))
            .scope(async {
                tokio::task::yield_now().await;
                assert_eq!(fields(), format!(",{id},\"httpRequestId\":\"a\\\"b\""));
                assert_eq!(LogContext::new(trace, None).run(fields), format!(",{id}"));
            })
            .await;
        assert_eq!(fields(), "");
        for is_recorded in [true, false] {
            let job = JobTrace {
                context: trace,
                is_recorded,
                parent: None,
                state: None,
                began: std::time::Duration::ZERO,
                request_id: None,
            };
            assert_eq!(within_trace(Some(&Arc::new(job)), fields).is_empty(), !is_recorded);
        }
    }
}
