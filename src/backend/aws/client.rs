//! The SDK's set-up. The SDK alone waits forever: every limit here is ours.

use super::Settings;
use crate::https::POOL_IDLE;
use aws_config::retry::RetryConfig;
use aws_config::stalled_stream_protection::StalledStreamProtectionConfig;
use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_smithy_http_client::tls::{Provider, rustls_provider::CryptoMode};
use aws_types::service_config::ServiceConfigKey;
use std::time::Duration;

pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// One try of one call.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(2);
/// One call with all its tries.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(5);
const ATTEMPTS_MAX: u32 = 3;
const BACKOFF_FIRST: Duration = Duration::from_millis(25);
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// One try to send a whole file: 50 MB at 1 MB/s.
const UPLOAD_ATTEMPT_TIMEOUT: Duration = Duration::from_secs(60);
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(120);

/// What the three clients share: region, credential chain, HTTP pool, limits.
pub(super) async fn sdk_config(region: &str) -> SdkConfig {
    let http = aws_smithy_http_client::Builder::new()
        .tls_provider(Provider::Rustls(CryptoMode::Ring))
        .pool_idle_timeout(POOL_IDLE)
        .build_https();
    let timeouts = TimeoutConfig::builder()
        .connect_timeout(CONNECT_TIMEOUT)
        .operation_attempt_timeout(ATTEMPT_TIMEOUT)
        .operation_timeout(OPERATION_TIMEOUT)
        .build();
    let retries = RetryConfig::standard()
        .with_max_attempts(ATTEMPTS_MAX)
        .with_initial_backoff(BACKOFF_FIRST)
        .with_max_backoff(BACKOFF_MAX);
    aws_config::defaults(BehaviorVersion::v2026_01_12())
        .region(Region::new(region.to_owned()))
        .http_client(http)
        .timeout_config(timeouts)
        .retry_config(retries)
        // Answers are small and the attempt has a deadline, so watching throughput would only cost.
        .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
        .load()
        .await
}

/// Limits for a request with a large body, in place of those of [`sdk_config`].
pub(super) fn upload_timeouts() -> TimeoutConfig {
    TimeoutConfig::builder()
        .connect_timeout(CONNECT_TIMEOUT)
        .operation_attempt_timeout(UPLOAD_ATTEMPT_TIMEOUT)
        .operation_timeout(UPLOAD_TIMEOUT)
        .build()
}

/// The pause after try number `tried` of what the SDK does not retry. Doubles with each; half of it is random, so
/// that nodes do not come back in step.
pub(super) fn backoff(tried: u32) -> Duration {
    let pause = BACKOFF_FIRST * 2_u32.saturating_pow(tried.saturating_sub(1).min(10));
    pause.min(BACKOFF_MAX).mul_f64(rand::random_range(0.5..1.5))
}

pub(super) fn sqs(config: &SdkConfig, settings: &Settings) -> aws_sdk_sqs::Client {
    let builder = aws_sdk_sqs::config::Builder::from(config);
    let builder = match old_endpoint(config, "SQS", settings.sqs_endpoint.as_deref()) {
        Some(url) => builder.endpoint_url(url),
        None => builder,
    };
    aws_sdk_sqs::Client::from_conf(builder.build())
}

pub(super) fn dynamodb(config: &SdkConfig, settings: &Settings) -> aws_sdk_dynamodb::Client {
    let builder = aws_sdk_dynamodb::config::Builder::from(config);
    let builder = match old_endpoint(config, "DynamoDB", settings.dynamodb_endpoint.as_deref()) {
        Some(url) => builder.endpoint_url(url),
        None => builder,
    };
    aws_sdk_dynamodb::Client::from_conf(builder.build())
}

pub(super) fn s3(config: &SdkConfig, settings: &Settings) -> aws_sdk_s3::Client {
    let builder = aws_sdk_s3::config::Builder::from(config);
    let old = old_endpoint(config, "S3", settings.s3_endpoint.as_deref());
    // Names like `bucket.localhost` resolve nowhere, so behind an endpoint of one's own the bucket goes in the path.
    let builder = builder.force_path_style(old.is_some() || sdk_endpoint(config, "S3").is_some());
    let builder = match old {
        Some(url) => builder.endpoint_url(url),
        None => builder,
    };
    aws_sdk_s3::Client::from_conf(builder.build())
}

/// The endpoint by its old name, where the SDK's own names say nothing.
fn old_endpoint<'a>(config: &SdkConfig, service: &str, old: Option<&'a str>) -> Option<&'a str> {
    old.filter(|url| !url.is_empty() && sdk_endpoint(config, service).is_none())
}

/// The endpoint that the SDK itself resolves: `AWS_ENDPOINT_URL_<SERVICE>` or `AWS_ENDPOINT_URL`, from the
/// environment or the profile. The same steps as in the `From<&SdkConfig>` of each service's builder, which
/// has no getter for its outcome.
fn sdk_endpoint(config: &SdkConfig, service: &str) -> Option<String> {
    let key = ServiceConfigKey::builder()
        .service_id(service)
        .env("AWS_ENDPOINT_URL")
        .profile("endpoint_url")
        .build()
        .ok()?;
    let own = config.service_config().and_then(|service| service.load_config(key));
    own.or_else(|| config.endpoint_url().map(str::to_owned))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Env(Option<(&'static str, &'static str)>);

    impl aws_types::service_config::LoadServiceConfig for Env {
        fn load_config(&self, key: ServiceConfigKey<'_>) -> Option<String> {
            self.0.filter(|(service, _)| *service == key.service_id()).map(|(_, url)| url.to_owned())
        }
    }

    #[test]
    fn the_old_endpoint_names_come_last() {
        let old = Some("http://old");
        for (own, general, given, used) in [
            (None, None, old, old),
            (None, None, Some(""), None),
            (None, None, None, None),
            (Some(("SQS", "http://own")), None, old, None),
            (Some(("S3", "http://own")), None, old, old),
            (None, Some("http://all"), old, None),
        ] {
            let mut builder = SdkConfig::builder().service_config(Env(own));
            builder.set_endpoint_url(general.map(str::to_owned));
            assert_eq!(old_endpoint(&builder.build(), "SQS", given), used, "{own:?} {general:?} {given:?}");
        }
    }
}
