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
    LimiterAway,
    /// The header is not valid HTTP. Names the part.
    MalformedHeader(&'static str),
    /// The end of the body is ambiguous. Gives the reason.
    BadFraming(&'static str),
    /// A field that may occur once is repeated. Names the field.
    RepeatedField(&'static str),
    /// `*` is combined with other tags. Names the field.
    StarBesideTags(&'static str),
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
    KeyReused,
    NoSuchJob,
    NoSuchLog,
    TooManyJobs(TooManyJobs),
    /// The queue is slow, and this job was shed. `retry_after_s` is at least 1.
    Shed {
        retry_after_s: u64,
    },
    Submit(SubmitError),
    /// A backend did not answer. The cause is already logged.
    BackendAway,
    /// No address of the upstream can be reached.
    UpstreamAway,
    UpstreamTimeout,
    /// The upstream's response is malformed or incomplete.
    UpstreamBroken,
    /// The request has passed through this fleet before.
    Loop,
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
        tracing::warn!(what, error = %error, "Backend Failed");
        Self::BackendAway
    }

    fn status(&self) -> StatusCode {
        match self {
            Self::NoSuchRoute | Self::NoSuchFunction | Self::NoSuchJob | Self::NoSuchLog => {
                StatusCode::NOT_FOUND
            }
            Self::MethodNotAllowed { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::Unauthorized | Self::KeyNotValidNow => StatusCode::UNAUTHORIZED,
            Self::Forbidden { .. } | Self::FunctionForbidden => StatusCode::FORBIDDEN,
            Self::RateLimited { .. } | Self::TooManyFailures { .. } | Self::TooManyJobs(_) => {
                StatusCode::TOO_MANY_REQUESTS
            }
            Self::TargetTooLong => StatusCode::URI_TOO_LONG,
            Self::TransferCodingUnknown => StatusCode::NOT_IMPLEMENTED,
            Self::Loop => StatusCode::LOOP_DETECTED,
            Self::HeaderTooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::VersionNotSupported => StatusCode::HTTP_VERSION_NOT_SUPPORTED,
            Self::ExpectationFailed => StatusCode::EXPECTATION_FAILED,
            Self::BodyTooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
            Self::BodyTimeout | Self::HeaderTimeout => StatusCode::REQUEST_TIMEOUT,
            Self::UpstreamBroken => StatusCode::BAD_GATEWAY,
            Self::UpstreamTimeout => StatusCode::GATEWAY_TIMEOUT,
            Self::MalformedHeader(_)
            | Self::BadFraming(_)
            | Self::RepeatedField(_)
            | Self::StarBesideTags(_) => StatusCode::BAD_REQUEST,
            Self::BodyBroken
            | Self::BodyUndecodable
            | Self::Invalid(_)
            | Self::BadCursor
            | Self::BadArchive(_)
            | Self::Submit(SubmitError::Refused) => StatusCode::BAD_REQUEST,
            Self::NotJson | Self::NotAForm | Self::NotJsonNorForm | Self::ContentCodingUnknown => {
                StatusCode::UNSUPPORTED_MEDIA_TYPE
            }
            Self::PreconditionFailed => StatusCode::PRECONDITION_FAILED,
            Self::NoRecommendation => StatusCode::CONFLICT,
            Self::KeyReused => StatusCode::UNPROCESSABLE_ENTITY,
            Self::Submit(_)
            | Self::Shed { .. }
            | Self::BackendAway
            | Self::UpstreamAway
            | Self::TooManyConnections
            | Self::LimiterAway
            | Self::NotReady
            | Self::Contended
            | Self::TooManyUploads
            | Self::TooManyWorkers => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// Stable, for programs. Also the label of rejections in the metrics.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NoSuchRoute => "no_such_route",
            Self::MethodNotAllowed { .. } => "method_not_allowed",
            Self::Unauthorized => "unauthorized",
            Self::KeyNotValidNow => "key_not_valid_now",
            Self::TooManyFailures { .. } => "too_many_failures",
            Self::Forbidden { .. } => "forbidden",
            Self::FunctionForbidden => "function_forbidden",
            Self::MalformedHeader(_) => "malformed_header",
            Self::BadFraming(_) => "bad_framing",
            Self::RepeatedField(_) | Self::StarBesideTags(_) => "repeated_field",
            Self::TransferCodingUnknown => "unsupported_transfer_coding",
            Self::TargetTooLong => "target_too_long",
            Self::HeaderTooLarge => "header_too_large",
            Self::HeaderTimeout => "header_timeout",
            Self::VersionNotSupported => "version_not_supported",
            Self::ExpectationFailed => "expectation_failed",
            Self::TooManyConnections => "too_many_connections",
            Self::UpstreamAway => "upstream_unavailable",
            Self::UpstreamTimeout => "upstream_timeout",
            Self::UpstreamBroken => "upstream_broken",
            Self::Loop => "loop_detected",
            Self::RateLimited { .. } => "rate_limited",
            Self::LimiterAway => "limiter_unavailable",
            Self::BodyTooLarge { .. } => "body_too_large",
            Self::BodyTimeout => "body_timeout",
            Self::BodyBroken => "body_broken",
            Self::BodyUndecodable => "body_undecodable",
            Self::ContentCodingUnknown => "unsupported_content_coding",
            Self::NotJson | Self::NotAForm | Self::NotJsonNorForm => "unsupported_media_type",
            Self::BadCursor => "bad_cursor",
            Self::BadArchive(_) => "bad_archive",
            Self::PreconditionFailed => "precondition_failed",
            Self::NoRecommendation => "no_recommendation",
            Self::Contended => "contended",
            Self::TooManyUploads | Self::TooManyWorkers => "overloaded",
            Self::Invalid(_) => "invalid_request",
            Self::NoSuchFunction => "no_such_function",
            Self::KeyReused => "idempotency_key_reused",
            Self::NoSuchJob => "no_such_job",
            Self::NoSuchLog => "no_such_log",
            Self::TooManyJobs(_) => "too_many_jobs",
            Self::Shed { .. } | Self::Submit(SubmitError::Overloaded) => "overloaded",
            Self::Submit(SubmitError::Refused) => "refused_by_queue",
            Self::Submit(SubmitError::Unavailable) => "queue_unavailable",
            Self::Submit(SubmitError::Unknown) => "queue_timeout",
            Self::Submit(SubmitError::Stopping) | Self::NotReady => "not_ready",
            Self::BackendAway => "backend_unavailable",
        }
    }

    fn detail(&self) -> String {
        self.detail_of_case().unwrap_or_else(|| self.detail_of_kind().to_owned())
    }

    /// The detail that names a part or a bound. `None`: all errors of this kind have one detail.
    fn detail_of_case(&self) -> Option<String> {
        Some(match self {
            Self::Invalid(detail) | Self::BadArchive(detail) => detail.clone(),
            Self::BodyTooLarge { bytes_max } => {
                format!("The request is too large: the limit is {bytes_max} bytes.")
            }
            Self::MethodNotAllowed { allow } => format!("This path supports {allow}."),
            Self::Forbidden { scope } => {
                format!("The key lacks the scope {scope:?}.", scope = scope.name())
            }
            Self::MalformedHeader(what) => {
                format!("The request is not valid HTTP: {what}.")
            }
            Self::RepeatedField(name) => format!("The header field {name} may occur only once."),
            Self::StarBesideTags(name) => {
                format!("In {name} the value * matches any tag, so it must be the only value.")
            }
            Self::BadFraming(what) => {
                format!("The end of the body is ambiguous: {what}.")
            }
            Self::TooManyJobs(TooManyJobs::OfKey { max }) => {
                format!("The key has reached its cap of {max} jobs in flight.")
            }
            Self::TooManyJobs(TooManyJobs::OfFunction { max }) => {
                format!("The function has reached its cap of jobs in flight: maxConcurrency is {max}.")
            }
            _ => return None,
        })
    }

    fn detail_of_kind(&self) -> &'static str {
        match self {
            Self::Invalid(_)
            | Self::BadArchive(_)
            | Self::BodyTooLarge { .. }
            | Self::MethodNotAllowed { .. }
            | Self::Forbidden { .. }
            | Self::MalformedHeader(_)
            | Self::RepeatedField(_)
            | Self::StarBesideTags(_)
            | Self::BadFraming(_)
            | Self::TooManyJobs(_) => "", // see detail_of_case
            Self::Shed { .. } => "The queue is overloaded. Retry after the time in Retry-After.",
            Self::NoSuchRoute => "No route has this path.",
            Self::KeyNotValidNow => "The key is not valid yet, or has expired.",
            Self::TooManyFailures { .. } => {
                "Too many requests from this address had no valid key. Retry after the time in Retry-After."
            }
            Self::FunctionForbidden => "The key may not run this function.",
            Self::TransferCodingUnknown => "The only supported transfer coding is chunked.",
            Self::TargetTooLong => "The request target is too long.",
            Self::HeaderTooLarge => "The request header is too large, or has too many fields.",
            Self::HeaderTimeout => "The request header did not arrive in time.",
            Self::VersionNotSupported => "This server supports HTTP/1.0 and HTTP/1.1, and HTTP/2 over TLS.",
            Self::ExpectationFailed => "The only supported expectation is 100-continue.",
            Self::TooManyConnections => "Too many connections are open. Retry later.",
            Self::UpstreamAway => "The service behind this path does not answer. Retry later.",
            Self::UpstreamTimeout => "The service behind this path did not answer in time.",
            Self::UpstreamBroken => {
                "The response of the service behind this path is incomplete or malformed."
            }
            Self::Loop => "The request has passed through this gateway before.",
            Self::Unauthorized => "The header field x-api-key is missing or is not a valid key.",
            Self::RateLimited { .. } => "Too many requests. Retry after the time in Retry-After.",
            Self::LimiterAway => "The rate limiter is not available, so requests are rejected. Retry later.",
            Self::BodyTimeout => "The body did not arrive in time.",
            Self::BodyBroken => "The body ended early or is malformed.",
            Self::ContentCodingUnknown => {
                "The supported content codings are gzip, deflate and identity, one at a time."
            }
            Self::BodyUndecodable => "The body does not match its Content-Encoding.",
            Self::NotJson => "The body must be JSON, with Content-Type: application/json.",
            Self::NotAForm => "The body must be a form, with Content-Type: multipart/form-data.",
            Self::NotJsonNorForm => "The body must be JSON or a form (multipart/form-data).",
            Self::BadCursor => "The cursor does not belong to this list and filter. Start without a cursor.",
            Self::PreconditionFailed => "The function does not match the precondition. Read it again.",
            Self::NoRecommendation => "There is no recommendation for this function yet.",
            Self::Contended => "Concurrent changes of the function won every attempt. Retry later.",
            Self::TooManyUploads => "Too many uploads are in progress. Retry later.",
            Self::TooManyWorkers => "The maximum number of workers is already registered.",
            Self::NoSuchFunction => "Function not found",
            Self::KeyReused => "This Idempotency-Key belongs to a request with another body.",
            Self::NoSuchJob => "The job does not exist, or its result has expired.",
            Self::NoSuchLog => "The execution does not exist, or its record has expired.",
            Self::Submit(SubmitError::Overloaded) => "Too many jobs are waiting. Retry later.",
            Self::Submit(SubmitError::Refused) => "The queue rejected the job because of its content.",
            Self::Submit(SubmitError::Unavailable) => "The job was not queued. Retry later.",
            Self::Submit(SubmitError::Unknown) => {
                "The queue did not confirm the job in time, so it may still run. A retry may run it twice, \
                 unless it repeats the Idempotency-Key."
            }
            Self::Submit(SubmitError::Stopping) | Self::NotReady => "This node does not accept requests.",
            Self::BackendAway => "A part of the platform does not answer. Retry later.",
        }
    }

    /// The response to the request with this `X-Request-Id`.
    pub fn into_reply(self, request_id: &str) -> Reply {
        let (status, code, detail) = (self.status(), self.code(), self.detail());
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
            Rejection::Away => Self::LimiterAway,
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
            RunError::KeyReused => Self::KeyReused,
            RunError::Submit(error) => Self::Submit(error),
            RunError::Backend { store, error } => Self::backend(store, &error),
            RunError::AttemptUnresolved => Self::BackendAway,
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
impl ApiError {
    /// One error of each kind.
    pub fn each() -> Vec<Self> {
        std::iter::successors(Some(Self::NoSuchRoute), Self::next).collect()
    }

    /// The kind after this one. A new kind has no arm, so the compiler requires one.
    fn next(&self) -> Option<Self> {
        let text = String::new;
        Some(match self {
            Self::NoSuchRoute => Self::MethodNotAllowed { allow: text() },
            Self::MethodNotAllowed { .. } => Self::Unauthorized,
            Self::Unauthorized => Self::KeyNotValidNow,
            Self::KeyNotValidNow => Self::TooManyFailures { retry_after_s: 1, burst: 1 },
            Self::TooManyFailures { .. } => Self::Forbidden { scope: Scope::Run },
            Self::Forbidden { .. } => Self::FunctionForbidden,
            Self::FunctionForbidden => Self::RateLimited { retry_after_s: 1 },
            Self::RateLimited { .. } => Self::LimiterAway,
            Self::LimiterAway => Self::MalformedHeader(""),
            Self::MalformedHeader(_) => Self::BadFraming(""),
            Self::BadFraming(_) => Self::RepeatedField(""),
            Self::RepeatedField(_) => Self::StarBesideTags(""),
            Self::StarBesideTags(_) => Self::TransferCodingUnknown,
            Self::TransferCodingUnknown => Self::TargetTooLong,
            Self::TargetTooLong => Self::HeaderTooLarge,
            Self::HeaderTooLarge => Self::HeaderTimeout,
            Self::HeaderTimeout => Self::VersionNotSupported,
            Self::VersionNotSupported => Self::ExpectationFailed,
            Self::ExpectationFailed => Self::TooManyConnections,
            Self::TooManyConnections => Self::UpstreamAway,
            Self::UpstreamAway => Self::UpstreamTimeout,
            Self::UpstreamTimeout => Self::UpstreamBroken,
            Self::UpstreamBroken => Self::Loop,
            Self::Loop => Self::BodyTooLarge { bytes_max: 1 },
            Self::BodyTooLarge { .. } => Self::BodyTimeout,
            Self::BodyTimeout => Self::BodyBroken,
            Self::BodyBroken => Self::ContentCodingUnknown,
            Self::ContentCodingUnknown => Self::BodyUndecodable,
            Self::BodyUndecodable => Self::NotJson,
            Self::NotJson => Self::NotAForm,
            Self::NotAForm => Self::NotJsonNorForm,
            Self::NotJsonNorForm => Self::Invalid(text()),
            Self::Invalid(_) => Self::BadCursor,
            Self::BadCursor => Self::BadArchive(text()),
            Self::BadArchive(_) => Self::NoSuchFunction,
            Self::NoSuchFunction => Self::PreconditionFailed,
            Self::PreconditionFailed => Self::NoRecommendation,
            Self::NoRecommendation => Self::Contended,
            Self::Contended => Self::TooManyUploads,
            Self::TooManyUploads => Self::TooManyWorkers,
            Self::TooManyWorkers => Self::KeyReused,
            Self::KeyReused => Self::NoSuchJob,
            Self::NoSuchJob => Self::NoSuchLog,
            Self::NoSuchLog => Self::TooManyJobs(TooManyJobs::OfKey { max: 1 }),
            Self::TooManyJobs(TooManyJobs::OfKey { .. }) => {
                Self::TooManyJobs(TooManyJobs::OfFunction { max: 1 })
            }
            Self::TooManyJobs(TooManyJobs::OfFunction { .. }) => Self::Shed { retry_after_s: 1 },
            Self::Shed { .. } => Self::Submit(SubmitError::Overloaded),
            Self::Submit(SubmitError::Overloaded) => Self::Submit(SubmitError::Refused),
            Self::Submit(SubmitError::Refused) => Self::Submit(SubmitError::Unavailable),
            Self::Submit(SubmitError::Unavailable) => Self::Submit(SubmitError::Unknown),
            Self::Submit(SubmitError::Unknown) => Self::Submit(SubmitError::Stopping),
            Self::Submit(SubmitError::Stopping) => Self::BackendAway,
            Self::BackendAway => Self::NotReady,
            Self::NotReady => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
    fn each_error_has_a_detail() {
        for error in ApiError::each() {
            let told = format!("{error:?}");
            let is_given = matches!(error, ApiError::Invalid(_) | ApiError::BadArchive(_));
            assert!(is_given || error.detail().len() > 10, "{told}");
        }
    }

    #[test]
    fn transient_errors_have_retry_after() {
        let limited = ApiError::RateLimited { retry_after_s: 7 }.into_reply("");
        assert_eq!(limited.headers, [(RETRY_AFTER, HeaderValue::from(7))]);
        for error in [ApiError::BackendAway, ApiError::NotReady, ApiError::Submit(SubmitError::Overloaded)] {
            assert_eq!(error.into_reply("").headers, [(RETRY_AFTER, HeaderValue::from(1))]);
        }
    }
}
