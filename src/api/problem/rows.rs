//! The rows of the problem table: status, code and detail of each error, by topic. The title is the reason
//! phrase of the status.

use crate::dispatch::{SubmitError, TooManyJobs};
use http::StatusCode;
use std::fmt::Display;

/// Status, code and detail of an error.
pub struct Row<'a> {
    status: u16,
    pub code: &'static str,
    /// `{}` stands for the value.
    pub template: &'static str,
    /// The part or bound that the detail names. Only `detail` formats it, so `code` does not allocate.
    pub value: Option<&'a dyn Display>,
}

const fn row(status: u16, code: &'static str, template: &'static str) -> Row<'static> {
    Row { status, code, template, value: None }
}

impl<'a> Row<'a> {
    pub fn with(self, value: &'a dyn Display) -> Self {
        Self { value: Some(value), ..self }
    }

    pub fn status(&self) -> StatusCode {
        StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
    }

    pub fn detail(&self) -> String {
        match self.value {
            Some(value) => self.template.replace("{}", &value.to_string()),
            None => self.template.to_owned(),
        }
    }
}

// Connection and message: these checks do not depend on the route.
pub const MALFORMED_HEADER: Row<'static> = row(400, "malformed_header", "The request is not valid HTTP: {}.");
pub const BAD_FRAMING: Row<'static> = row(400, "bad_framing", "The end of the body is ambiguous: {}.");
pub const REPEATED_FIELD: Row<'static> =
    row(400, "repeated_field", "The header field {} may occur only once.");
pub const MIXED_WILDCARD: Row<'static> =
    row(400, "repeated_field", "In {} the value * matches any tag, so it must be the only value.");
pub const TARGET_TOO_LONG: Row<'static> = row(414, "target_too_long", "The request target is too long.");
pub const HEADER_TOO_LARGE: Row<'static> =
    row(431, "header_too_large", "The request header is too large, or has too many fields.");
pub const HEADER_TIMEOUT: Row<'static> =
    row(408, "header_timeout", "The request header did not arrive in time.");
pub const VERSION_NOT_SUPPORTED: Row<'static> =
    row(505, "version_not_supported", "This server supports HTTP/1.0 and HTTP/1.1, and HTTP/2 over TLS.");
pub const EXPECTATION_FAILED: Row<'static> =
    row(417, "expectation_failed", "The only supported expectation is 100-continue.");
pub const TOO_MANY_CONNECTIONS: Row<'static> =
    row(503, "too_many_connections", "Too many connections are open. Retry later.");

// The transfer and the format of the body.
pub const TRANSFER_CODING_UNKNOWN: Row<'static> =
    row(501, "unsupported_transfer_coding", "The only supported transfer coding is chunked.");
pub const BODY_TOO_LARGE: Row<'static> =
    row(413, "body_too_large", "The request is too large: the limit is {} bytes.");
pub const BODY_TIMEOUT: Row<'static> = row(408, "body_timeout", "The body did not arrive in time.");
pub const BODY_BROKEN: Row<'static> = row(400, "body_broken", "The body ended early or is malformed.");
pub const CONTENT_CODING_UNKNOWN: Row<'static> = row(
    415,
    "unsupported_content_coding",
    "The supported content codings are gzip, deflate and identity, one at a time.",
);
pub const BODY_UNDECODABLE: Row<'static> =
    row(400, "body_undecodable", "The body does not match its Content-Encoding.");
pub const NOT_JSON: Row<'static> =
    row(415, "unsupported_media_type", "The body must be JSON, with Content-Type: application/json.");
pub const NOT_A_FORM: Row<'static> =
    row(415, "unsupported_media_type", "The body must be a form, with Content-Type: multipart/form-data.");
pub const NOT_JSON_NOR_FORM: Row<'static> =
    row(415, "unsupported_media_type", "The body must be JSON or a form (multipart/form-data).");
pub const INVALID: Row<'static> = row(400, "invalid_request", "{}");
pub const BAD_ARCHIVE: Row<'static> = row(400, "bad_archive", "{}");

// API keys and limits.
pub const UNAUTHORIZED: Row<'static> =
    row(401, "unauthorized", "The header field x-api-key is missing or is not a valid key.");
pub const KEY_NOT_VALID_NOW: Row<'static> =
    row(401, "key_not_valid_now", "The key is not valid yet, or has expired.");
pub const FORBIDDEN: Row<'static> = row(403, "forbidden", "The key lacks the scope \"{}\".");
pub const FUNCTION_FORBIDDEN: Row<'static> =
    row(403, "function_forbidden", "The key may not run this function.");
pub const RATE_LIMITED: Row<'static> =
    row(429, "rate_limited", "Too many requests. Retry after the time in Retry-After.");
pub const TOO_MANY_FAILURES: Row<'static> = row(
    429,
    "too_many_failures",
    "Too many requests from this address had no valid key. Retry after the time in Retry-After.",
);
pub const LIMITER_UNAVAILABLE: Row<'static> = row(
    503,
    "limiter_unavailable",
    "The rate limiter is not available, so requests are rejected. Retry later.",
);

// Routes, functions, jobs and lists.
pub const NO_SUCH_ROUTE: Row<'static> = row(404, "no_such_route", "No route has this path.");
pub const NO_SUCH_FUNCTION: Row<'static> = row(404, "no_such_function", "Function not found");
pub const NO_SUCH_JOB: Row<'static> =
    row(404, "no_such_job", "The job does not exist, or its result has expired.");
pub const FUNCTION_NEEDED: Row<'static> = row(
    404,
    "function_needed",
    "No running job and no stored result has this id. Add ?functionId= to look for its record.",
);
pub const NO_SUCH_LOG: Row<'static> =
    row(404, "no_such_log", "The execution does not exist, or its record has expired.");
pub const METHOD_NOT_ALLOWED: Row<'static> = row(405, "method_not_allowed", "This path supports {}.");
pub const BAD_CURSOR: Row<'static> =
    row(400, "bad_cursor", "The cursor does not belong to this list and filter. Start without a cursor.");
pub const NO_RECOMMENDATION: Row<'static> =
    row(409, "no_recommendation", "There is no recommendation for this function yet.");
pub const PRECONDITION_FAILED: Row<'static> =
    row(412, "precondition_failed", "The function does not match the precondition. Read it again.");
pub const CONTENDED: Row<'static> =
    row(503, "contended", "Concurrent changes of the function won every attempt. Retry later.");

// Runs, and the bounds and backends of the node.
pub const IDEMPOTENCY_KEY_REUSED: Row<'static> =
    row(422, "idempotency_key_reused", "This Idempotency-Key belongs to a request with another body.");
pub const SHED: Row<'static> =
    row(503, "overloaded", "The queue is overloaded. Retry after the time in Retry-After.");
pub const TOO_MANY_UPLOADS: Row<'static> =
    row(503, "overloaded", "Too many uploads are in progress. Retry later.");
pub const TOO_MANY_WORKERS: Row<'static> =
    row(503, "overloaded", "The maximum number of workers is already registered.");
pub const TOO_MANY_WATCHERS: Row<'static> =
    row(503, "overloaded", "The maximum number of clients watches events on this node. Retry later.");
pub const BACKEND_UNAVAILABLE: Row<'static> =
    row(503, "backend_unavailable", "A part of the platform does not answer. Retry later.");

// A node that starts or drains: as a whole, or when a job is submitted.
pub const NOT_READY: Row<'static> = row(503, "not_ready", "This node does not accept requests.");

// Upstreams.
pub const UPSTREAM_BROKEN: Row<'static> =
    row(502, "upstream_broken", "The response of the service behind this path is incomplete or malformed.");
pub const UPSTREAM_UNAVAILABLE: Row<'static> =
    row(503, "upstream_unavailable", "The service behind this path does not answer. Retry later.");
pub const UPSTREAM_TIMEOUT: Row<'static> =
    row(504, "upstream_timeout", "The service behind this path did not answer in time.");
pub const LOOP_DETECTED: Row<'static> =
    row(508, "loop_detected", "The request has passed through this gateway before.");

/// Concurrency caps.
pub fn of_cap(cap: &TooManyJobs) -> Row<'_> {
    match cap {
        TooManyJobs::OfKey { max } => {
            row(429, "too_many_jobs", "The key has reached its cap of {} jobs in flight.").with(max)
        }
        TooManyJobs::OfFunction { max } => row(
            429,
            "too_many_jobs",
            "The function has reached its cap of jobs in flight: maxConcurrency is {}.",
        )
        .with(max),
    }
}

/// Sends to the queue.
pub fn of_send(error: &SubmitError) -> Row<'static> {
    match error {
        SubmitError::Overloaded => row(503, "overloaded", "Too many jobs are waiting. Retry later."),
        SubmitError::Refused => {
            row(400, "refused_by_queue", "The queue rejected the job because of its content.")
        }
        SubmitError::Unavailable => row(503, "queue_unavailable", "The job was not queued. Retry later."),
        SubmitError::Unknown => row(
            503,
            "queue_timeout",
            "The queue did not confirm the job in time, so it may still run. A retry may run it twice, \
             unless it repeats the Idempotency-Key.",
        ),
        SubmitError::Stopping => NOT_READY,
    }
}
