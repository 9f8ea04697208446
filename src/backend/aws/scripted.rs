//! A service of AWS with prepared answers, for tests of code over the SDK.

use aws_credential_types::Credentials;
use aws_smithy_runtime_api::client::http::{
    HttpConnector, HttpConnectorFuture, SharedHttpClient, SharedHttpConnector, http_client_fn,
};
use aws_smithy_runtime_api::client::orchestrator::{HttpRequest, HttpResponse};
use aws_smithy_types::body::SdkBody;
use aws_smithy_types::retry::RetryConfig;
use parking_lot::Mutex;
use serde_json::Value;
use std::collections::VecDeque;
use std::fmt::Display;
use std::sync::Arc;

/// Records each request, and answers it with the next prepared answer. It never retries.
#[derive(Clone, Debug, Default)]
pub struct ScriptedService(Arc<Mutex<Script>>);

#[derive(Debug, Default)]
struct Script {
    answers: VecDeque<(u16, String)>,
    requests: Vec<ScriptedRequest>,
}

#[derive(Clone, Debug)]
pub struct ScriptedRequest {
    pub method: String,
    pub path: String,
    /// The operation, for example `ReceiveMessage`. Empty: this service does not name it.
    pub operation: String,
    /// `Null`: the body is not JSON, or a stream.
    pub body: Value,
}

impl ScriptedService {
    /// Prepares an answer: its HTTP status and body.
    pub fn answer(&self, status: u16, body: impl Display) {
        self.0.lock().answers.push_back((status, body.to_string()));
    }

    /// The requests since the last call.
    pub fn requests(&self) -> Vec<ScriptedRequest> {
        std::mem::take(&mut self.0.lock().requests)
    }

    pub fn sqs(&self) -> aws_sdk_sqs::Client {
        use aws_sdk_sqs::config::{BehaviorVersion, Config, Region};
        let config = Config::builder()
            .behavior_version(BehaviorVersion::v2026_01_12())
            .region(Region::new("us-east-1"))
            .credentials_provider(credentials())
            .retry_config(RetryConfig::disabled())
            .http_client(self.http());
        aws_sdk_sqs::Client::from_conf(config.build())
    }

    pub fn s3(&self) -> aws_sdk_s3::Client {
        use aws_sdk_s3::config::{BehaviorVersion, Config, Region, StalledStreamProtectionConfig};
        let config = Config::builder()
            .behavior_version(BehaviorVersion::v2026_01_12())
            .region(Region::new("us-east-1"))
            .credentials_provider(credentials())
            .retry_config(RetryConfig::disabled())
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
            .force_path_style(true)
            .http_client(self.http());
        aws_sdk_s3::Client::from_conf(config.build())
    }

    fn http(&self) -> SharedHttpClient {
        let service = self.clone();
        http_client_fn(move |_, _| SharedHttpConnector::new(service.clone()))
    }
}

impl HttpConnector for ScriptedService {
    fn call(&self, request: HttpRequest) -> HttpConnectorFuture {
        let target = request.headers().get("x-amz-target").unwrap_or_default();
        let uri: http::Uri = request.uri().parse().expect("the SDK sends valid URIs");
        let body = request.body().bytes().and_then(|bytes| serde_json::from_slice(bytes).ok());
        let recorded = ScriptedRequest {
            method: request.method().to_owned(),
            path: uri.path().to_owned(),
            operation: target.rsplit('.').next().unwrap_or_default().to_owned(),
            body: body.unwrap_or_default(),
        };
        let mut script = self.0.lock();
        let (status, body) =
            script.answers.pop_front().unwrap_or_else(|| panic!("no answer for {recorded:?}"));
        script.requests.push(recorded);
        let answer = HttpResponse::new(status.try_into().expect("an HTTP status"), SdkBody::from(body));
        HttpConnectorFuture::ready(Ok(answer))
    }
}

fn credentials() -> Credentials {
    Credentials::new("AK", "secret", None, None, "test")
}
