//! Errors as `application/problem+json` (RFC 9457). Only this file and [`rows`] give them a status, a code
//! and a text.
//!
//! `code` is stable and for programs. `detail` is for people, and never contains a key, a body or the error
//! text of a backend.

mod rows;

use super::reply::Reply;
use crate::backend::BackendError;
use crate::dispatch::{SubmitError, TooManyJobs};
use crate::functions::EditError;
use crate::limiter::Rejection;
use crate::model::Scope;
use crate::runs::{InvalidKey, RunError};
use bytes::Bytes;
use http::StatusCode;
use http::header::{ACCEPT_ENCODING, ALLOW, HeaderName, HeaderValue, RETRY_AFTER};
use rows::Row;
use serde_json::json;

pub const X_RATELIMIT_LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit");
pub const X_RATELIMIT_REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining");

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
    TooManyWatchers,
    /// The idempotency key belongs to a request with another body.
    IdempotencyKeyReused,
    NoSuchJob,
    /// Nothing is known of the job without its function.
    FunctionNeeded,
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
        tracing::warn!(
            what,
            error = %error,
            "A backend call failed; the client received 503. Check the backend named in `what`"
        );
        Self::BackendUnavailable
    }

    /// Stable, for programs. Also the label of rejections in the metrics.
    pub fn code(&self) -> &'static str {
        self.row().code
    }

    /// The row of this error. A variant without a row does not compile.
    fn row(&self) -> Row<'_> {
        match self {
            Self::MalformedHeader(what) => rows::MALFORMED_HEADER.with(what),
            Self::BadFraming(what) => rows::BAD_FRAMING.with(what),
            Self::RepeatedField(name) => rows::REPEATED_FIELD.with(name),
            Self::MixedWildcard(name) => rows::MIXED_WILDCARD.with(name),
            Self::TargetTooLong => rows::TARGET_TOO_LONG,
            Self::HeaderTooLarge => rows::HEADER_TOO_LARGE,
            Self::HeaderTimeout => rows::HEADER_TIMEOUT,
            Self::VersionNotSupported => rows::VERSION_NOT_SUPPORTED,
            Self::ExpectationFailed => rows::EXPECTATION_FAILED,
            Self::TooManyConnections => rows::TOO_MANY_CONNECTIONS,
            Self::TransferCodingUnknown => rows::TRANSFER_CODING_UNKNOWN,
            Self::BodyTooLarge { bytes_max } => rows::BODY_TOO_LARGE.with(bytes_max),
            Self::BodyTimeout => rows::BODY_TIMEOUT,
            Self::BodyBroken => rows::BODY_BROKEN,
            Self::ContentCodingUnknown => rows::CONTENT_CODING_UNKNOWN,
            Self::BodyUndecodable => rows::BODY_UNDECODABLE,
            Self::NotJson => rows::NOT_JSON,
            Self::NotAForm => rows::NOT_A_FORM,
            Self::NotJsonNorForm => rows::NOT_JSON_NOR_FORM,
            Self::Invalid(detail) => rows::INVALID.with(detail),
            Self::BadArchive(detail) => rows::BAD_ARCHIVE.with(detail),
            Self::Unauthorized => rows::UNAUTHORIZED,
            Self::KeyNotValidNow => rows::KEY_NOT_VALID_NOW,
            Self::Forbidden { scope } => rows::FORBIDDEN.with(scope),
            Self::FunctionForbidden => rows::FUNCTION_FORBIDDEN,
            Self::RateLimited { .. } => rows::RATE_LIMITED,
            Self::TooManyFailures { .. } => rows::TOO_MANY_FAILURES,
            Self::TooManyJobs(cap) => rows::of_cap(cap),
            Self::LimiterUnavailable => rows::LIMITER_UNAVAILABLE,
            Self::NoSuchRoute => rows::NO_SUCH_ROUTE,
            Self::NoSuchFunction => rows::NO_SUCH_FUNCTION,
            Self::NoSuchJob => rows::NO_SUCH_JOB,
            Self::FunctionNeeded => rows::FUNCTION_NEEDED,
            Self::NoSuchLog => rows::NO_SUCH_LOG,
            Self::MethodNotAllowed { allow } => rows::METHOD_NOT_ALLOWED.with(allow),
            Self::BadCursor => rows::BAD_CURSOR,
            Self::NoRecommendation => rows::NO_RECOMMENDATION,
            Self::PreconditionFailed => rows::PRECONDITION_FAILED,
            Self::Contended => rows::CONTENDED,
            Self::IdempotencyKeyReused => rows::IDEMPOTENCY_KEY_REUSED,
            Self::Shed { .. } => rows::SHED,
            Self::TooManyUploads => rows::TOO_MANY_UPLOADS,
            Self::TooManyWorkers => rows::TOO_MANY_WORKERS,
            Self::TooManyWatchers => rows::TOO_MANY_WATCHERS,
            Self::Submit(error) => rows::of_send(error),
            Self::NotReady => rows::NOT_READY,
            Self::BackendUnavailable => rows::BACKEND_UNAVAILABLE,
            Self::UpstreamBroken => rows::UPSTREAM_BROKEN,
            Self::UpstreamUnavailable => rows::UPSTREAM_UNAVAILABLE,
            Self::UpstreamTimeout => rows::UPSTREAM_TIMEOUT,
            Self::LoopDetected => rows::LOOP_DETECTED,
        }
    }

    /// The response to the request with this `X-Request-Id`.
    pub fn into_reply(self, request_id: &str) -> Reply {
        let row = self.row();
        let (status, code, detail) = (row.status(), row.code, row.detail());
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
            stream: None,
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
            RunError::InvalidKey(InvalidKey { bytes_max }) => {
                Self::invalid(format!("Idempotency-Key must be 1 to {bytes_max} visible ASCII characters"))
            }
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
                NoSuchRoute, NoSuchFunction, NoSuchJob, FunctionNeeded, NoSuchLog,
                MethodNotAllowed { allow: String::new() },
                BadCursor, NoRecommendation, PreconditionFailed, Contended,
                IdempotencyKeyReused, Shed { retry_after_s: 1 }, TooManyUploads, TooManyWorkers,
                TooManyWatchers,
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
            assert_ne!(row.status(), StatusCode::INTERNAL_SERVER_ERROR, "{error:?}: invalid status");
            assert!(row.status().canonical_reason().is_some(), "{error:?}: no title");
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
