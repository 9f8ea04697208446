//! Errors as `application/problem+json` (RFC 9457). Only this file gives them a status, a code and a text.
//!
//! `code` is stable and for programs. `detail` is for people, and never contains a key, a body or the error
//! text of a backend.

use super::reply::Reply;
use crate::backend::BackendError;
use crate::dispatch::{SubmitError, TooManyJobs};
use crate::functions::EditError;
use crate::limiter::Rejection;
use crate::model::Scope;
use crate::runs::RunError;
use bytes::Bytes;
use http::StatusCode;
use http::header::{ACCEPT_ENCODING, ALLOW, HeaderName, HeaderValue, RETRY_AFTER};
use serde_json::json;
use std::fmt::Display;

const X_RATELIMIT_LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit");
const X_RATELIMIT_REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining");

/// How much longer a request body may be than the longest queue message, in bytes.
pub const BODY_BYTES_SLACK: usize = 16 * 1024;

/// Maximum length of a detail, in characters.
const DETAIL_CHARS_MAX: usize = 300;
/// `Retry-After` of transient errors, in seconds.
const RETRY_AFTER_S: u64 = 1;

/// Every error that a client can receive.
#[derive(Debug)]
pub enum ApiError {
    NoSuchRoute,
    MethodNotAllowed {
        allow: String,
    },
    Unauthorized,
    /// The key is known, but is not valid yet, or has expired.
    KeyNotValidNow,
    /// Too many requests without a valid key from this address.
    TooManyFailures {
        /// At least 1.
        retry_after_s: u64,
        /// Failures allowed at once.
        burst: u32,
    },
    /// The key lacks this scope.
    Forbidden {
        scope: Scope,
    },
    /// The key may not run this function.
    FunctionForbidden,
    /// A rate limit is exhausted. `retry_after_s` is at least 1.
    RateLimited {
        retry_after_s: u64,
    },
    /// The limiter cannot count, and the limit is configured to reject then.
    LimiterUnavailable,
    /// The header is not valid HTTP. Names the part.
    MalformedHeader(&'static str),
    /// The end of the body is ambiguous. Gives the reason.
    BadFraming(&'static str),
    /// A field that may occur once is repeated. Names the field.
    RepeatedField(&'static str),
    /// `*` is combined with other tags. Names the field.
    MixedWildcard(&'static str),
    /// The body has an unknown transfer coding.
    TransferCodingUnknown,
    TargetTooLong,
    HeaderTooLarge,
    HeaderTimeout,
    VersionNotSupported,
    ExpectationFailed,
    TooManyConnections,
    BodyTooLarge {
        bytes_max: usize,
    },
    BodyTimeout,
    /// The body ended early, or its framing is malformed.
    BodyBroken,
    /// The body has an unknown content coding.
    ContentCodingUnknown,
    /// The body does not match its content coding.
    BodyUndecodable,
    NotJson,
    NotAForm,
    NotJsonNorForm,
    Invalid(String),
    /// The cursor is forged, or belongs to another list or filter.
    BadCursor,
    /// The uploaded code is not usable. Gives the reason.
    BadArchive(String),
    NoSuchFunction,
    /// `If-Match` or `If-None-Match` does not hold.
    PreconditionFailed,
    /// The auto-tuner has no recommendation to apply.
    NoRecommendation,
    /// Concurrent changes of the function won every attempt.
    Contended,
    TooManyUploads,
    TooManyWorkers,
    /// The idempotency key belongs to a request with another body.
    IdempotencyKeyReused,
    NoSuchJob,
    NoSuchLog,
    TooManyJobs(TooManyJobs),
    /// The queue is slow, and this job was shed. `retry_after_s` is at least 1.
    Shed {
        retry_after_s: u64,
    },
    Submit(SubmitError),
    /// A backend did not answer. The cause is already logged.
    BackendUnavailable,
    /// No address of the upstream can be reached.
    UpstreamUnavailable,
    UpstreamTimeout,
    /// The upstream's response is malformed or incomplete.
    UpstreamBroken,
    /// The request has passed through this fleet before.
    LoopDetected,
    NotReady,
}

/// Status, code and detail of an error.
struct Row<'a> {
    status: StatusCode,
    code: &'static str,
    /// `{}` stands for the value.
    template: &'static str,
    /// The part or bound that the detail names. Only `detail` formats it, so `code` does not allocate.
    value: Option<&'a dyn Display>,
}

fn row(status: u16, code: &'static str, template: &'static str) -> Row<'static> {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    Row { status, code, template, value: None }
}

impl<'a> Row<'a> {
    fn with(self, value: &'a dyn Display) -> Self {
        Self { value: Some(value), ..self }
    }

    fn detail(&self) -> String {
        match self.value {
            Some(value) => self.template.replace("{}", &value.to_string()),
            None => self.template.to_owned(),
        }
    }
}

impl ApiError {
    /// An invalid request. `detail` names the member, field or parameter, and is cut to its maximum length.
    pub fn invalid(detail: impl Into<String>) -> Self {
        let mut detail = detail.into();
        // It may contain names that the client sent, of any length.
        if let Some((end, _)) = detail.char_indices().nth(DETAIL_CHARS_MAX) {
            detail.truncate(end);
        }
        Self::Invalid(detail)
    }

    /// Logs the cause, which must not reach the client. `what` names the backend.
    pub fn backend(what: &'static str, error: &BackendError) -> Self {
        tracing::warn!(what, error = %error, "Backend Failed");
        Self::BackendUnavailable
    }

    /// Stable, for programs. Also the label of rejections in the metrics.
    pub fn code(&self) -> &'static str {
        self.row().code
    }

    /// The row of this error. The rows are split by topic because a function is at most one page long.
    fn row(&self) -> Row<'_> {
        let row = self.message_row().or_else(|| self.body_row()).or_else(|| self.key_row());
        let row = row.or_else(|| self.resource_row()).or_else(|| self.platform_row());
        row.or_else(|| self.upstream_row()).expect("a test requires a row for each error")
    }

    /// Connection and message: these checks do not depend on the route.
    fn message_row(&self) -> Option<Row<'_>> {
        Some(match self {
            Self::MalformedHeader(what) => {
                row(400, "malformed_header", "The request is not valid HTTP: {}.").with(what)
            }
            Self::BadFraming(what) => {
                row(400, "bad_framing", "The end of the body is ambiguous: {}.").with(what)
            }
            Self::RepeatedField(name) => {
                row(400, "repeated_field", "The header field {} may occur only once.").with(name)
            }
            Self::MixedWildcard(name) => {
                row(400, "repeated_field", "In {} the value * matches any tag, so it must be the only value.")
                    .with(name)
            }
            Self::TargetTooLong => row(414, "target_too_long", "The request target is too long."),
            Self::HeaderTooLarge => {
                row(431, "header_too_large", "The request header is too large, or has too many fields.")
            }
            Self::HeaderTimeout => row(408, "header_timeout", "The request header did not arrive in time."),
            Self::VersionNotSupported => row(
                505,
                "version_not_supported",
                "This server supports HTTP/1.0 and HTTP/1.1, and HTTP/2 over TLS.",
            ),
            Self::ExpectationFailed => {
                row(417, "expectation_failed", "The only supported expectation is 100-continue.")
            }
            Self::TooManyConnections => {
                row(503, "too_many_connections", "Too many connections are open. Retry later.")
            }
            _ => return None,
        })
    }

    /// The transfer and the format of the body.
    fn body_row(&self) -> Option<Row<'_>> {
        Some(match self {
            Self::TransferCodingUnknown => {
                row(501, "unsupported_transfer_coding", "The only supported transfer coding is chunked.")
            }
            Self::BodyTooLarge { bytes_max } => {
                row(413, "body_too_large", "The request is too large: the limit is {} bytes.").with(bytes_max)
            }
            Self::BodyTimeout => row(408, "body_timeout", "The body did not arrive in time."),
            Self::BodyBroken => row(400, "body_broken", "The body ended early or is malformed."),
            Self::ContentCodingUnknown => row(
                415,
                "unsupported_content_coding",
                "The supported content codings are gzip, deflate and identity, one at a time.",
            ),
            Self::BodyUndecodable => {
                row(400, "body_undecodable", "The body does not match its Content-Encoding.")
            }
            Self::NotJson => row(
                415,
                "unsupported_media_type",
                "The body must be JSON, with Content-Type: application/json.",
            ),
            Self::NotAForm => row(
                415,
                "unsupported_media_type",
                "The body must be a form, with Content-Type: multipart/form-data.",
            ),
            Self::NotJsonNorForm => {
                row(415, "unsupported_media_type", "The body must be JSON or a form (multipart/form-data).")
            }
            Self::Invalid(detail) => row(400, "invalid_request", "{}").with(detail),
            Self::BadArchive(detail) => row(400, "bad_archive", "{}").with(detail),
            _ => return None,
        })
    }

    /// API keys and limits.
    fn key_row(&self) -> Option<Row<'_>> {
        Some(match self {
            Self::Unauthorized => {
                row(401, "unauthorized", "The header field x-api-key is missing or is not a valid key.")
            }
            Self::KeyNotValidNow => {
                row(401, "key_not_valid_now", "The key is not valid yet, or has expired.")
            }
            Self::Forbidden { scope } => row(403, "forbidden", "The key lacks the scope \"{}\".").with(scope),
            Self::FunctionForbidden => row(403, "function_forbidden", "The key may not run this function."),
            Self::RateLimited { .. } => {
                row(429, "rate_limited", "Too many requests. Retry after the time in Retry-After.")
            }
            Self::TooManyFailures { .. } => row(
                429,
                "too_many_failures",
                "Too many requests from this address had no valid key. Retry after the time in Retry-After.",
            ),
            Self::TooManyJobs(cap) => cap_row(cap),
            Self::LimiterUnavailable => row(
                503,
                "limiter_unavailable",
                "The rate limiter is not available, so requests are rejected. Retry later.",
            ),
            _ => return None,
        })
    }

    /// Routes, functions, jobs and lists.
    fn resource_row(&self) -> Option<Row<'_>> {
        Some(match self {
            Self::NoSuchRoute => row(404, "no_such_route", "No route has this path."),
            Self::NoSuchFunction => row(404, "no_such_function", "Function not found"),
            Self::NoSuchJob => row(404, "no_such_job", "The job does not exist, or its result has expired."),
            Self::NoSuchLog => {
                row(404, "no_such_log", "The execution does not exist, or its record has expired.")
            }
            Self::MethodNotAllowed { allow } => {
                row(405, "method_not_allowed", "This path supports {}.").with(allow)
            }
            Self::BadCursor => row(
                400,
                "bad_cursor",
                "The cursor does not belong to this list and filter. Start without a cursor.",
            ),
            Self::NoRecommendation => {
                row(409, "no_recommendation", "There is no recommendation for this function yet.")
            }
            Self::PreconditionFailed => row(
                412,
                "precondition_failed",
                "The function does not match the precondition. Read it again.",
            ),
            Self::Contended => {
                row(503, "contended", "Concurrent changes of the function won every attempt. Retry later.")
            }
            _ => return None,
        })
    }

    /// Runs, and the bounds and backends of the node.
    fn platform_row(&self) -> Option<Row<'_>> {
        Some(match self {
            Self::IdempotencyKeyReused => row(
                422,
                "idempotency_key_reused",
                "This Idempotency-Key belongs to a request with another body.",
            ),
            Self::Shed { .. } => {
                row(503, "overloaded", "The queue is overloaded. Retry after the time in Retry-After.")
            }
            Self::TooManyUploads => row(503, "overloaded", "Too many uploads are in progress. Retry later."),
            Self::TooManyWorkers => {
                row(503, "overloaded", "The maximum number of workers is already registered.")
            }
            Self::Submit(error) => submit_row(error),
            Self::NotReady => not_ready_row(),
            Self::BackendUnavailable => {
                row(503, "backend_unavailable", "A part of the platform does not answer. Retry later.")
            }
            _ => return None,
        })
    }

    /// Upstreams.
    fn upstream_row(&self) -> Option<Row<'_>> {
        Some(match self {
            Self::UpstreamBroken => row(
                502,
                "upstream_broken",
                "The response of the service behind this path is incomplete or malformed.",
            ),
            Self::UpstreamUnavailable => {
                row(503, "upstream_unavailable", "The service behind this path does not answer. Retry later.")
            }
            Self::UpstreamTimeout => {
                row(504, "upstream_timeout", "The service behind this path did not answer in time.")
            }
            Self::LoopDetected => {
                row(508, "loop_detected", "The request has passed through this gateway before.")
            }
            _ => return None,
        })
    }

    /// The response to the request with this `X-Request-Id`.
    pub fn into_reply(self, request_id: &str) -> Reply {
        let row = self.row();
        let (status, code, detail) = (row.status, row.code, row.detail());
        let body = json!({
            "type": format!("urn:infra-controller:problem:{code}"),
            "title": status.canonical_reason().unwrap_or("Error"),
            "status": status.as_u16(),
            "detail": detail,
            "requestId": request_id,
            "code": code,
            "error": detail,
        });
        let mut reply = Reply {
            status,
            content_type: "application/problem+json",
            headers: Vec::new(),
            body: Bytes::from(body.to_string()),
        };
        match self {
            Self::RateLimited { retry_after_s } => {
                reply.headers.push((RETRY_AFTER, retry_after_s.into()));
            }
            Self::TooManyFailures { retry_after_s, burst } => {
                reply.headers.push((RETRY_AFTER, retry_after_s.into()));
                reply.headers.push((X_RATELIMIT_LIMIT, burst.into()));
                reply.headers.push((X_RATELIMIT_REMAINING, 0.into()));
            }
            Self::TooManyJobs(TooManyJobs::OfKey { max } | TooManyJobs::OfFunction { max }) => {
                reply.headers.push((RETRY_AFTER, RETRY_AFTER_S.into()));
                reply.headers.push((X_RATELIMIT_LIMIT, max.into()));
                reply.headers.push((X_RATELIMIT_REMAINING, 0.into()));
            }
            Self::Shed { retry_after_s } => reply.headers.push((RETRY_AFTER, retry_after_s.into())),
            Self::MethodNotAllowed { allow } => {
                reply.headers.extend(HeaderValue::from_str(&allow).ok().map(|value| (ALLOW, value)));
            }
            Self::ContentCodingUnknown => {
                reply.headers.push((ACCEPT_ENCODING, HeaderValue::from_static("gzip, deflate, identity")));
            }
            _ if status == StatusCode::SERVICE_UNAVAILABLE => {
                reply.headers.push((RETRY_AFTER, RETRY_AFTER_S.into()));
            }
            _ => {}
        }
        reply
    }
}

/// Concurrency caps.
fn cap_row(cap: &TooManyJobs) -> Row<'_> {
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
fn submit_row(error: &SubmitError) -> Row<'static> {
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
        SubmitError::Stopping => not_ready_row(),
    }
}

/// A node that starts or drains: as a whole, or when a job is submitted.
fn not_ready_row() -> Row<'static> {
    row(503, "not_ready", "This node does not accept requests.")
}

#[cfg(test)]
impl ApiError {
    /// The detail of an invalid request.
    pub fn refusal<T: std::fmt::Debug>(result: Result<T, Self>) -> String {
        match result {
            Err(Self::Invalid(detail)) => detail,
            other => panic!("{other:?}"),
        }
    }
}

impl From<Rejection> for ApiError {
    fn from(refusal: Rejection) -> Self {
        match refusal {
            Rejection::Limited { retry_after_s } => Self::RateLimited { retry_after_s },
            Rejection::Away => Self::LimiterUnavailable,
        }
    }
}

impl From<RunError> for ApiError {
    fn from(error: RunError) -> Self {
        match error {
            RunError::Shed { retry_after } => Self::Shed { retry_after_s: retry_after.as_secs() + 1 },
            RunError::NoSuchFunction => Self::NoSuchFunction,
            RunError::FunctionForbidden => Self::FunctionForbidden,
            RunError::RateLimit(rejection) => rejection.into(),
            RunError::TooManyJobs(cap) => Self::TooManyJobs(cap),
            RunError::MessageTooLarge { bytes_max } => Self::BodyTooLarge { bytes_max },
            RunError::KeyReused => Self::IdempotencyKeyReused,
            RunError::Submit(error) => Self::Submit(error),
            RunError::Backend { store, error } => Self::backend(store, &error),
            RunError::AttemptUnresolved => Self::BackendUnavailable,
        }
    }
}

impl From<EditError<ApiError>> for ApiError {
    fn from(error: EditError<ApiError>) -> Self {
        match error {
            EditError::NoSuchFunction => Self::NoSuchFunction,
            EditError::Refused(why) => why,
            EditError::Contended => Self::Contended,
            EditError::Backend(what, e) => Self::backend(what, &e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One error of each variant. It does not compile while a variant is missing.
    macro_rules! one_of_each {
        ($($variant:ident $(($($value:tt)*))? $({ $($field:tt)* })?),* $(,)?) => {{
            let _exhaustive: fn(&ApiError) = |error| match error { $(ApiError::$variant { .. } => {})* };
            vec![$(ApiError::$variant $(($($value)*))? $({ $($field)* })?),*]
        }};
    }

    impl ApiError {
        /// One error of each row.
        pub fn each() -> Vec<Self> {
            let mut errors = one_of_each! {
                MalformedHeader(""), BadFraming(""), RepeatedField(""), MixedWildcard(""), TargetTooLong,
                HeaderTooLarge, HeaderTimeout, VersionNotSupported, ExpectationFailed, TooManyConnections,
                TransferCodingUnknown, BodyTooLarge { bytes_max: 1 }, BodyTimeout, BodyBroken,
                ContentCodingUnknown, BodyUndecodable, NotJson, NotAForm, NotJsonNorForm,
                Invalid(String::new()), BadArchive(String::new()),
                Unauthorized, KeyNotValidNow, Forbidden { scope: Scope::Run }, FunctionForbidden,
                RateLimited { retry_after_s: 1 }, TooManyFailures { retry_after_s: 1, burst: 1 },
                TooManyJobs(TooManyJobs::OfKey { max: 1 }), LimiterUnavailable,
                NoSuchRoute, NoSuchFunction, NoSuchJob, NoSuchLog, MethodNotAllowed { allow: String::new() },
                BadCursor, NoRecommendation, PreconditionFailed, Contended,
                IdempotencyKeyReused, Shed { retry_after_s: 1 }, TooManyUploads, TooManyWorkers,
                Submit(SubmitError::Overloaded), NotReady, BackendUnavailable,
                UpstreamBroken, UpstreamUnavailable, UpstreamTimeout, LoopDetected,
            };
            errors.push(Self::TooManyJobs(TooManyJobs::OfFunction { max: 1 }));
            let of_queue =
                [SubmitError::Refused, SubmitError::Unavailable, SubmitError::Unknown, SubmitError::Stopping];
            errors.extend(of_queue.map(Self::Submit));
            errors
        }
    }

    #[test]
    fn a_problem_has_all_members() {
        let reply = ApiError::NoSuchFunction.into_reply("r-1");
        let body: serde_json::Value = serde_json::from_slice(&reply.body).unwrap();
        let expected = json!({
            "type": "urn:infra-controller:problem:no_such_function", "title": "Not Found", "status": 404,
            "detail": "Function not found", "requestId": "r-1", "code": "no_such_function",
            "error": "Function not found",
        });
        assert_eq!((reply.status, body), (StatusCode::NOT_FOUND, expected));
    }

    #[test]
    fn each_error_has_a_status_and_a_detail() {
        for error in ApiError::each() {
            let row = error.row();
            assert_ne!(row.status, StatusCode::INTERNAL_SERVER_ERROR, "{error:?}: invalid status");
            assert!(row.status.canonical_reason().is_some(), "{error:?}: no title");
            assert_eq!(row.template.matches("{}").count(), row.value.iter().count(), "{error:?}");
            let is_given = matches!(error, ApiError::Invalid(_) | ApiError::BadArchive(_));
            assert!(is_given || row.detail().len() > 10, "{error:?}: no detail");
        }
    }

    #[test]
    fn a_detail_names_the_value() {
        let error = ApiError::Forbidden { scope: Scope::Run };
        assert_eq!(error.row().detail(), "The key lacks the scope \"run\".");
        let cap = ApiError::TooManyJobs(TooManyJobs::OfKey { max: 5 });
        assert_eq!(cap.row().detail(), "The key has reached its cap of 5 jobs in flight.");
        // The text of the client is not a template.
        assert_eq!(ApiError::invalid("a{}b").row().detail(), "a{}b");
    }

    #[test]
    fn transient_errors_have_retry_after() {
        let limited = ApiError::RateLimited { retry_after_s: 7 }.into_reply("");
        assert_eq!(limited.headers, [(RETRY_AFTER, HeaderValue::from(7))]);
        for error in
            [ApiError::BackendUnavailable, ApiError::NotReady, ApiError::Submit(SubmitError::Overloaded)]
        {
            assert_eq!(error.into_reply("").headers, [(RETRY_AFTER, HeaderValue::from(1))]);
        }
    }
}
