//! Errors as `application/problem+json` (RFC 9457): the one place where they get a status, a code and words.
//!
//! `code` is stable and for machines; `detail` is for people and never holds a key, a body or a backend's text.

use super::reply::Reply;
use crate::backend::BackendError;
use crate::dispatch::{SubmitError, TooManyJobs};
use crate::functions::EditError;
use crate::limiter::Refusal;
use crate::model::Scope;
use bytes::Bytes;
use http::StatusCode;
use http::header::{ACCEPT_ENCODING, ALLOW, HeaderName, HeaderValue, RETRY_AFTER};
use serde_json::json;

const X_RATELIMIT_LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit");
const X_RATELIMIT_REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining");

/// Room for what a request's body has beside the queue message made of it, in bytes.
pub const BODY_BYTES_SLACK: usize = 16 * 1024;

/// Longest detail, in characters.
const DETAIL_CHARS_MAX: usize = 300;
/// Seconds a client should wait before it tries again what failed for a passing reason.
const RETRY_AFTER_S: u64 = 1;

/// Everything that can go wrong for a client.
#[derive(Debug)]
pub enum ApiError {
    NoSuchRoute,
    MethodNotAllowed {
        allow: String,
    },
    Unauthorized,
    /// The key is right, but its time has not come, or has passed.
    KeyNotValidNow,
    /// Too many wrong keys from this address; at least 1.
    TooManyFailures {
        retry_after_s: u64,
        /// How many at once.
        burst: u32,
    },
    /// The key may do other things.
    Forbidden {
        scope: Scope,
    },
    /// The key may run other functions.
    FunctionForbidden,
    /// At least 1.
    RateLimited {
        retry_after_s: u64,
    },
    /// The limiter cannot count, and is configured to refuse then.
    LimiterAway,
    /// The header is not as HTTP wants it; names the part.
    MalformedHeader(&'static str),
    /// Where the body ends could be read in two ways; says why.
    BadFraming(&'static str),
    /// A field that may stand once is there more than once; names it.
    RepeatedField(&'static str),
    /// `*` stands beside other tags; names the field.
    StarBesideTags(&'static str),
    /// The body is in a transfer coding that is not known here.
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
    /// The body ended early or its framing is broken.
    BodyBroken,
    /// The body is in a content coding that is not known here.
    ContentCodingUnknown,
    /// The body is not in the content coding that it is said to be in.
    BodyUndecodable,
    NotJson,
    NotAForm,
    NotJsonNorForm,
    Invalid(String),
    /// A cursor that was not made for this list and filter, or not by us.
    BadCursor,
    /// What is uploaded is no good code; says why.
    BadArchive(String),
    NoSuchFunction,
    /// The function is not (or no longer) as `If-Match` or `If-None-Match` wants it.
    PreconditionFailed,
    /// The auto-tuner has nothing to apply.
    NoRecommendation,
    /// Others changed the function again and again meanwhile.
    Contended,
    TooManyUploads,
    TooManyWorkers,
    /// The idempotency key belongs to a request with another body.
    KeyReused,
    NoSuchJob,
    NoSuchLog,
    TooManyJobs(TooManyJobs),
    /// The queue is slow; at least 1.
    Shed {
        retry_after_s: u64,
    },
    Submit(SubmitError),
    /// A backend did not answer; the cause was logged where it was met.
    BackendAway,
    /// No address of the upstream can be reached.
    UpstreamAway,
    UpstreamTimeout,
    /// The upstream's answer is none, or breaks off.
    UpstreamBroken,
    /// The request has been here before.
    Loop,
    NotReady,
}

impl ApiError {
    pub fn invalid(detail: impl Into<String>) -> Self {
        let mut detail = detail.into();
        // It may name what the client sent, whose names may be long.
        if let Some((end, _)) = detail.char_indices().nth(DETAIL_CHARS_MAX) {
            detail.truncate(end);
        }
        Self::Invalid(detail)
    }

    /// Logs the cause, which must not go out, and makes it an answer.
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

    /// Stable, for machines; also the label of the refusals in the metrics.
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

    /// What names the part that is wrong, or a bound. `None`: all of its kind are told the same.
    fn detail_of_case(&self) -> Option<String> {
        Some(match self {
            Self::Invalid(detail) | Self::BadArchive(detail) => detail.clone(),
            Self::BodyTooLarge { bytes_max } => {
                format!("The request is too large: at most {bytes_max} bytes fit.")
            }
            Self::MethodNotAllowed { allow } => format!("This path answers to {allow}."),
            Self::Forbidden { scope } => {
                format!("The key has not the scope {scope:?}.", scope = scope.name())
            }
            Self::MalformedHeader(what) => {
                format!("The request cannot be read as HTTP. What is wrong: {what}.")
            }
            Self::RepeatedField(name) => format!("The header field {name} may have one value."),
            Self::StarBesideTags(name) => {
                format!("In {name} the value * is any tag, so no other may stand beside it.")
            }
            Self::BadFraming(what) => {
                format!("Where the body ends could be read in two ways: {what}.")
            }
            Self::TooManyJobs(TooManyJobs::OfKey { max }) => {
                format!("The key has {max} jobs in flight, which is as many as it may have.")
            }
            Self::TooManyJobs(TooManyJobs::OfFunction { max }) => {
                format!("The function has as many jobs in flight as it may have: maxConcurrency is {max}.")
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
            | Self::TooManyJobs(_) => "", // each case has its own
            Self::Shed { .. } => "The queue is slow at the moment. Please wait as long as Retry-After says.",
            Self::NoSuchRoute => "There is nothing at this path.",
            Self::KeyNotValidNow => "The key is not valid yet, or has expired.",
            Self::TooManyFailures { .. } => {
                "Too many requests without a valid key from this address. Please wait as long as Retry-After says."
            }
            Self::FunctionForbidden => "The key may not run this function.",
            Self::TransferCodingUnknown => "Of Transfer-Encoding only chunked is known.",
            Self::TargetTooLong => "The target of the request is too long.",
            Self::HeaderTooLarge => "The header of the request is too large, or has too many fields.",
            Self::HeaderTimeout => "The header of the request did not arrive in time.",
            Self::VersionNotSupported => "This server speaks HTTP/1.1 here, and HTTP/2 over TLS.",
            Self::ExpectationFailed => "Of Expect only 100-continue is known.",
            Self::TooManyConnections => "Too many connections are open. Please try again soon.",
            Self::UpstreamAway => "The service behind this path does not answer. Please try again soon.",
            Self::UpstreamTimeout => "The service behind this path did not answer in time.",
            Self::UpstreamBroken => {
                "The answer of the service behind this path broke off or could not be read."
            }
            Self::Loop => "The request has passed through this gateway before.",
            Self::Unauthorized => "The header x-api-key is missing or names no valid key.",
            Self::RateLimited { .. } => "Too many requests. Please wait as long as Retry-After says.",
            Self::LimiterAway => "Requests cannot be counted at the moment, so none are let through.",
            Self::BodyTimeout => "The body did not arrive in time.",
            Self::BodyBroken => "The body ended early or could not be read.",
            Self::ContentCodingUnknown => {
                "Of Content-Encoding gzip, deflate and identity are known, one at a time."
            }
            Self::BodyUndecodable => "The body is not in the coding that Content-Encoding names.",
            Self::NotJson => "The body must be JSON, with Content-Type: application/json.",
            Self::NotAForm => "The body must be a form, with Content-Type: multipart/form-data.",
            Self::NotJsonNorForm => "The body must be JSON or a form (multipart/form-data).",
            Self::BadCursor => {
                "The cursor does not belong to this list and filter. Please begin without one."
            }
            Self::PreconditionFailed => "The function is not as the request wants it. Please read it again.",
            Self::NoRecommendation => "There is no recommendation for this function yet.",
            Self::Contended => "The function was changed by others meanwhile. Please try again.",
            Self::TooManyUploads => "Too many uploads are under way. Please try again soon.",
            Self::TooManyWorkers => "Too many workers report already.",
            Self::NoSuchFunction => "Function not found",
            Self::KeyReused => "This Idempotency-Key belongs to a request with another body.",
            Self::NoSuchJob => "There is no such job, or its result has expired.",
            Self::NoSuchLog => "There is no such execution, or its record has expired.",
            Self::Submit(SubmitError::Overloaded) => "Too many jobs are waiting. Please try again soon.",
            Self::Submit(SubmitError::Refused) => "The queue refused the job because of its content.",
            Self::Submit(SubmitError::Unavailable) => "The job could not be queued. Please try again soon.",
            Self::Submit(SubmitError::Unknown) => {
                "The queue did not confirm the job in time. It may still run; a second try may run it twice."
            }
            Self::Submit(SubmitError::Stopping) | Self::NotReady => "This server is not taking requests.",
            Self::BackendAway => "A part of the platform does not answer. Please try again soon.",
        }
    }

    /// The answer to the request `request_id`.
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
    /// What a client is told that sent something invalid.
    pub fn refusal<T: std::fmt::Debug>(result: Result<T, Self>) -> String {
        match result {
            Err(Self::Invalid(detail)) => detail,
            other => panic!("{other:?}"),
        }
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Limited { retry_after_s } => Self::RateLimited { retry_after_s },
            Refusal::Away => Self::LimiterAway,
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
    /// One of each kind, for tests.
    pub fn each() -> Vec<Self> {
        std::iter::successors(Some(Self::NoSuchRoute), Self::next).collect()
    }

    /// The kind after this one. A new kind has no arm, so the compiler asks for its place in the row.
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
            "detail": "Function not found", "requestId": "r-1", "code": "no_such_function", "error": "Function not found",
        });
        assert_eq!((reply.status, body), (StatusCode::NOT_FOUND, expected));
    }

    #[test]
    fn each_says_what_is_wrong() {
        for error in ApiError::each() {
            let told = format!("{error:?}");
            let is_given = matches!(error, ApiError::Invalid(_) | ApiError::BadArchive(_));
            assert!(is_given || error.detail().len() > 10, "{told}");
        }
    }

    #[test]
    fn what_may_pass_says_when_to_try_again() {
        let limited = ApiError::RateLimited { retry_after_s: 7 }.into_reply("");
        assert_eq!(limited.headers, [(RETRY_AFTER, HeaderValue::from(7))]);
        for error in [ApiError::BackendAway, ApiError::NotReady, ApiError::Submit(SubmitError::Overloaded)] {
            assert_eq!(error.into_reply("").headers, [(RETRY_AFTER, HeaderValue::from(1))]);
        }
    }
}
