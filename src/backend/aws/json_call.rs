//! Calls AWS JSON services without the SDK, for the operations of every run: SendMessageBatch, BatchWriteItem
//! (or PutItem), and UpdateItem for the counters of a function.
//!
//! A call through the SDK (plug-ins, interceptors, endpoint rules, typed values) took 125 µs of CPU, a
//! quarter of the total cost of an asynchronous run. Here a call is a text, a signature and a request.
//! Everything else uses the SDK, including the discovery of address and identity: the first call to each
//! service is made by the SDK, and [`RouteRecorder`] records its address and the scope of its signature.
//!
//! Nothing is retried here. The batcher and the audit retry, because they know when a retry is allowed.

mod credentials;
mod route;
mod signature;

use crate::backend::aws::json_call::route::JsonRoute;
pub(super) use credentials::CredentialCache;

use super::error::{by_code, is_throttle};
use crate::backend::BackendError;
use crate::https::HttpsClient;
use crate::model::now_ms;
use aws_smithy_runtime_api::box_error::BoxError;
use aws_smithy_runtime_api::client::interceptors::Intercept;
use aws_smithy_runtime_api::client::interceptors::context::BeforeTransmitInterceptorContextRef;
use aws_smithy_runtime_api::client::runtime_components::RuntimeComponents;
use aws_smithy_types::DateTime;
use aws_smithy_types::config_bag::ConfigBag;
use aws_smithy_types::date_time::Format;
use bytes::Bytes;
use http::header::{AUTHORIZATION, CONTENT_TYPE, DATE, HOST, HeaderMap, HeaderName, HeaderValue, USER_AGENT};
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use serde::Deserialize;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// Timeout of one call, including the connection set-up.
const CALL_TIMEOUT: Duration = Duration::from_secs(2);
/// Clock differences below this are ignored.
const SKEW_MIN_MS: i64 = 60_000;
/// Maximum length of an answer, in bytes; these answers may repeat the request.
const ANSWER_BYTES_MAX: usize = 20 << 20;

const X_AMZ_DATE: HeaderName = HeaderName::from_static("x-amz-date");
const X_AMZ_SECURITY_TOKEN: HeaderName = HeaderName::from_static("x-amz-security-token");
const X_AMZ_TARGET: HeaderName = HeaderName::from_static("x-amz-target");
/// Makes SQS return its older error codes, which its clients know.
const X_AMZN_QUERY_MODE: HeaderName = HeaderName::from_static("x-amzn-query-mode");
const X_AMZN_QUERY_ERROR: HeaderName = HeaderName::from_static("x-amzn-query-error");
const OURS: HeaderValue = HeaderValue::from_static(concat!("infra-controller/", env!("CARGO_PKG_VERSION")));

/// Why a call did not succeed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum CallError {
    /// The service rejected the call.
    Refused { status: u16, code: Option<String>, message: Option<String> },
    /// The request was not sent.
    NotSent(BackendError),
    /// The call may have taken effect.
    Unknown(BackendError),
}

impl CallError {
    pub(super) fn class(&self) -> BackendError {
        match self {
            Self::Refused { status, code, message } => by_code(code.as_deref(), *status, message.as_deref()),
            Self::NotSent(error) | Self::Unknown(error) => error.clone(),
        }
    }

    pub(super) fn code(&self) -> Option<&str> {
        match self {
            Self::Refused { code, .. } => code.as_deref(),
            _ => None,
        }
    }

    /// Whether the call certainly had no effect: the service rejected it, or it was never sent.
    pub(super) fn took_no_effect(&self) -> bool {
        match self {
            // A 500 may follow after the work was done. A throttle or a 503 is sent instead of doing the
            // work.
            Self::Refused { status, code, .. } => {
                *status < 500 || *status == 503 || code.as_deref().is_some_and(is_throttle)
            }
            Self::NotSent(_) => true,
            Self::Unknown(_) => false,
        }
    }
}

/// Records the route of the SDK call that it is attached to.
#[derive(Clone, Debug, Default)]
pub(super) struct RouteRecorder(Arc<OnceLock<JsonRoute>>);

impl Intercept for RouteRecorder {
    fn name(&self) -> &'static str {
        "Seen"
    }

    fn read_before_transmit(
        &self,
        context: &BeforeTransmitInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let request = context.request();
        let scope = request.headers().get(AUTHORIZATION.as_str()).and_then(scope);
        if let (Some((region, service)), Ok(uri)) = (scope, request.uri().parse()) {
            let _ = self.0.set(JsonRoute { uri, region: region.to_owned(), service: service.to_owned() });
        }
        Ok(())
    }
}

/// Region and service of `AWS4-HMAC-SHA256 Credential=<key>/<day>/<region>/<service>/aws4_request, …`.
fn scope(authorization: &str) -> Option<(&str, &str)> {
    let (_, credential) = authorization.split_once("Credential=")?;
    let mut parts = credential.split(',').next()?.rsplit('/').skip(1);
    let service = parts.next()?;
    Some((parts.next()?, service))
}

/// Calls one service.
pub(super) struct JsonClient {
    client: HttpsClient,
    credentials: Arc<CredentialCache>,
    route: JsonRoute,
    /// How far the clock of the service is ahead of ours, in milliseconds; 0 if the difference is small.
    skew_ms: AtomicI64,
}

impl JsonClient {
    /// Creates a caller for the service that the recorded SDK call went to.
    pub(super) fn new(
        client: HttpsClient,
        credentials: Arc<CredentialCache>,
        seen: &RouteRecorder,
    ) -> Result<Self, BackendError> {
        let route = seen.0.get().cloned();
        let route = route.ok_or_else(|| BackendError::Invalid("the SDK call had no signature".into()))?;
        Ok(Self { client, credentials, route, skew_ms: AtomicI64::new(0) })
    }

    /// Makes one call of the operation `target` (such as `AmazonSQS.SendMessageBatch`). Returns the body of
    /// the answer.
    pub(super) async fn call(&self, target: &'static str, body: Vec<u8>) -> Result<Bytes, CallError> {
        // Outside the time-out: a request that is not signed yet is not sent.
        let request = self.signed(target, body.into()).await.map_err(CallError::NotSent)?;
        let called = tokio::time::timeout(CALL_TIMEOUT, self.answer(request));
        let slow = || CallError::Unknown(BackendError::Unavailable("no answer in time".into()));
        let (status, headers, body) = called.await.unwrap_or_else(|_| Err(slow()))?;
        if status.is_success() {
            return Ok(body);
        }
        self.learn_skew(&headers);
        let error = refusal(status, &headers, &body);
        if matches!(error.class(), BackendError::Denied(_)) {
            // Refreshed credentials may be available already.
            self.credentials.forget();
        }
        Err(error)
    }

    /// Signatures are valid for some minutes around the service's time. With a larger clock difference all
    /// calls would be rejected, so later calls use the clock of the last rejection.
    fn learn_skew(&self, headers: &HeaderMap) {
        let date =
            headers.get(DATE).and_then(|date| DateTime::from_str(date.to_str().ok()?, Format::HttpDate).ok());
        let Some(theirs) = date.and_then(|date| date.to_millis().ok()) else { return };
        let ahead = theirs.saturating_sub(i64::try_from(now_ms()).unwrap_or(i64::MAX));
        let ahead = if ahead.abs() < SKEW_MIN_MS { 0 } else { ahead };
        if self.skew_ms.swap(ahead, Ordering::Relaxed) == 0 && ahead != 0 {
            tracing::warn!(
                aheadMs = ahead,
                "The clock differs from that of AWS; requests are signed with AWS time. Synchronize the clock"
            );
        }
    }

    async fn answer(
        &self,
        request: Request<Full<Bytes>>,
    ) -> Result<(StatusCode, HeaderMap, Bytes), CallError> {
        let answer = self.client.request(request).await.map_err(|error| {
            let away = BackendError::Unavailable("no connection".into());
            if error.is_connect() { CallError::NotSent(away) } else { CallError::Unknown(away) }
        })?;
        let (head, body) = answer.into_parts();
        let body = Limited::new(body, ANSWER_BYTES_MAX).collect().await.map_err(|_| {
            CallError::Unknown(BackendError::Unavailable("the answer could not be read".into()))
        })?;
        Ok((head.status, head.headers, body.to_bytes()))
    }

    async fn signed(&self, target: &'static str, body: Bytes) -> Result<Request<Full<Bytes>>, BackendError> {
        let credentials = self.credentials.get().await?;
        let invalid = || BackendError::Invalid("the request could not be built".into());
        let host = self.route.uri.authority().ok_or_else(invalid)?.as_str();
        let now = now_ms().saturating_add_signed(self.skew_ms.load(Ordering::Relaxed));
        let signature = signature::sign(&self.route, &credentials, host, target, &body, now);
        let secret = |text: &str| -> Result<HeaderValue, BackendError> {
            let mut value = HeaderValue::from_str(text).map_err(|_| invalid())?;
            value.set_sensitive(true); // not shown by Debug
            Ok(value)
        };
        let mut request = Request::post(self.route.uri.clone());
        if let Some(fields) = request.headers_mut() {
            fields.reserve(9);
            fields.insert(HOST, HeaderValue::from_str(host).map_err(|_| invalid())?);
            fields.insert(CONTENT_TYPE, HeaderValue::from_static(signature::CONTENT_TYPE_JSON));
            fields.insert(X_AMZ_TARGET, HeaderValue::from_static(target));
            fields.insert(X_AMZN_QUERY_MODE, HeaderValue::from_static("true"));
            fields.insert(USER_AGENT, OURS);
            fields.insert(X_AMZ_DATE, secret(&signature.date)?);
            fields.insert(AUTHORIZATION, secret(&signature.authorization)?);
            if let Some(token) = credentials.session_token() {
                fields.insert(X_AMZ_SECURITY_TOKEN, secret(token)?);
            }
        }
        request.body(Full::new(body)).map_err(|_| invalid())
    }
}

/// Parses a rejection. SQS sends its code in a header, the other services in the body.
fn refusal(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> CallError {
    #[derive(Default, Deserialize)]
    struct Said {
        #[serde(rename = "__type")]
        kind: Option<String>,
        #[serde(alias = "Message")]
        message: Option<String>,
    }
    let said: Said = serde_json::from_slice(body).unwrap_or_default();
    let old = headers.get(X_AMZN_QUERY_ERROR).and_then(|value| value.to_str().ok()?.split(';').next());
    // `com.amazonaws.dynamodb.v20120810#ThrottlingException`
    let new = said.kind.as_deref().and_then(|kind| kind.rsplit('#').next()?.split(':').next());
    let code = old.or(new).map(str::to_owned);
    CallError::Refused { status: status.as_u16(), code, message: said.message }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::Uri;

    #[test]
    fn scopes_are_parsed() {
        let given = "AWS4-HMAC-SHA256 Credential=AK/2026/20261122/eu-west-1/sqs/aws4_request, \
                     SignedHeaders=a;b, Signature=c";
        assert_eq!(scope(given), Some(("eu-west-1", "sqs")));
        for bad in ["", "Bearer x", "Credential=", "Credential=a"] {
            assert_eq!(scope(bad), None, "{bad}");
        }
    }

    fn refused(status: u16, old: Option<&'static str>, body: &str) -> CallError {
        let mut headers = HeaderMap::new();
        headers.extend(old.map(|old| (X_AMZN_QUERY_ERROR, HeaderValue::from_static(old))));
        refusal(StatusCode::from_u16(status).unwrap(), &headers, body.as_bytes())
    }

    #[test]
    fn rejections_are_parsed_and_classified() {
        use BackendError::*;
        let dynamodb =
            |kind: &str| format!(r#"{{"__type":"com.amazonaws.dynamodb.v20120810#{kind}","message":"m"}}"#);
        for (error, class, no_effect) in [
            (
                refused(400, Some("AWS.SimpleQueueService.NonExistentQueue;Sender"), r#"{"__type":"x#Q"}"#),
                Missing("AWS.SimpleQueueService.NonExistentQueue (HTTP 400)".into()),
                true,
            ),
            (
                refused(400, None, &dynamodb("ThrottlingException")),
                Unavailable("ThrottlingException (HTTP 400)".into()),
                true,
            ),
            (
                refused(400, None, &dynamodb("AccessDeniedException")),
                Denied("AccessDeniedException: m".into()),
                true,
            ),
            (
                refused(500, None, &dynamodb("InternalServerError")),
                Unavailable("InternalServerError (HTTP 500)".into()),
                false,
            ),
            (refused(503, None, "no JSON"), Unavailable("no error code (HTTP 503)".into()), true),
            (CallError::Unknown(Unavailable("x".into())), Unavailable("x".into()), false),
            (CallError::NotSent(Unavailable("x".into())), Unavailable("x".into()), true),
        ] {
            assert_eq!((error.class(), error.took_no_effect()), (class, no_effect));
        }
    }

    #[tokio::test]
    async fn signatures_use_the_clock_of_the_last_rejection() {
        use aws_credential_types::Credentials;
        use aws_credential_types::provider::SharedCredentialsProvider;
        let keys = SharedCredentialsProvider::new(Credentials::new("AK", "secret", None, None, "test"));
        let route = JsonRoute {
            uri: Uri::from_static("http://127.0.0.1:1/"),
            region: "eu-west-1".into(),
            service: "sqs".into(),
        };
        let direct = JsonClient {
            client: crate::https::client(CALL_TIMEOUT).unwrap(),
            credentials: Arc::new(CredentialCache::new(keys)),
            route,
            skew_ms: AtomicI64::new(0),
        };
        let signed_at = async || {
            let request = direct.signed("AmazonSQS.SendMessageBatch", Bytes::new()).await.unwrap();
            request.headers()[X_AMZ_DATE].to_str().unwrap().to_owned()
        };
        let reject_at = |date: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(DATE, HeaderValue::from_static(date));
            direct.learn_skew(&headers);
        };
        reject_at("Fri, 01 Jan 2100 00:00:00 GMT");
        assert!(signed_at().await.starts_with("21000101T0000"), "{}", signed_at().await);
        reject_at("no date");
        assert!(signed_at().await.starts_with("21000101T0000"));
        let now = DateTime::from_millis(i64::try_from(now_ms()).unwrap()).fmt(Format::HttpDate).unwrap();
        reject_at(now.leak());
        assert!(!signed_at().await.starts_with("2100"), "the clocks agree again");
    }
}
