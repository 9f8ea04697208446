//! Sets up the AWS SDK. Without the limits set here the SDK waits indefinitely.

use crate::backoff::Backoff;
use crate::https::POOL_IDLE;
use aws_config::retry::RetryConfig;
use aws_config::stalled_stream_protection::StalledStreamProtectionConfig;
use aws_config::timeout::TimeoutConfig;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_credential_types::Credentials;
use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::{
    ProvideCredentials, Result as Provided, SharedCredentialsProvider, future,
};
use aws_smithy_http_client::tls::Provider;
use aws_smithy_http_client::tls::rustls_provider::CryptoMode;
use aws_types::service_config::ServiceConfigKey;
use std::time::Duration;

pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// Timeout of one attempt.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(2);
/// Timeout of one call with all its attempts.
const OPERATION_TIMEOUT: Duration = Duration::from_secs(5);
const ATTEMPTS_MAX: u32 = 3;
const BACKOFF_FIRST: Duration = Duration::from_millis(25);
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// The pauses after attempts of calls that the SDK does not retry.
pub(super) const RETRIES: Backoff = Backoff::new(BACKOFF_FIRST, BACKOFF_MAX);
/// Timeout of one attempt to upload a file: 50 MB at 1 MB/s.
const UPLOAD_ATTEMPT_TIMEOUT: Duration = Duration::from_secs(60);
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(120);
/// How long an attempt at a long poll may take beyond the time for which the service waits.
const LONG_POLL_MARGIN: Duration = Duration::from_secs(5);

/// The configuration that all clients share: region, credential chain, HTTP pool, timeouts.
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
    let config = aws_config::defaults(BehaviorVersion::v2026_01_12())
        .region(Region::new(region.to_owned()))
        .http_client(http)
        .timeout_config(timeouts)
        .retry_config(retries)
        // Responses are small and each attempt has a deadline, so monitoring the throughput is a needless
        // cost.
        .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
        .load()
        .await;
    match config.credentials_provider() {
        Some(provider) => {
            let usable = SharedCredentialsProvider::new(ValidatingProvider(provider));
            config.into_builder().credentials_provider(usable).build()
        }
        None => config,
    }
}

/// Trims blanks and line ends from the credentials of a provider; files and variables often have them.
/// Rejects characters that a header field cannot carry, because the SDK panics when it signs with them.
#[derive(Debug)]
struct ValidatingProvider(SharedCredentialsProvider);

impl ProvideCredentials for ValidatingProvider {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        future::ProvideCredentials::new(async { usable(self.0.provide_credentials().await?) })
    }

    fn fallback_on_interrupt(&self) -> Option<Credentials> {
        usable(self.0.fallback_on_interrupt()?).ok()
    }
}

/// The part of the credentials that is invalid.
#[derive(Debug, thiserror::Error)]
#[error("{0} holds a character that is not visible ASCII, such as a line break or a typographic quote")]
pub(super) struct UnusablePart(&'static str);

fn usable(given: Credentials) -> Provided {
    let (key_id, secret, token) =
        (given.access_key_id(), given.secret_access_key(), given.session_token().unwrap_or_default());
    for (name, value) in
        [("the access key id", key_id), ("the secret access key", secret), ("the session token", token)]
    {
        // The secret itself is never sent, so it may contain blanks.
        let is_inner_blank = |b: u8| b == b' ' && name == "the secret access key";
        if !value.trim().bytes().all(|b| b.is_ascii_graphic() || is_inner_blank(b)) {
            return Err(CredentialsError::invalid_configuration(UnusablePart(name)));
        }
    }
    if [key_id, secret, token].iter().all(|value| value.trim() == *value) {
        return Ok(given);
    }
    let token = Some(token.trim()).filter(|token| !token.is_empty()).map(str::to_owned);
    Ok(Credentials::new(key_id.trim(), secret.trim(), token, given.expiry(), "trimmed"))
}

/// Timeouts for requests with a large body, in place of those of [`sdk_config`].
pub(super) fn upload_timeouts() -> TimeoutConfig {
    TimeoutConfig::builder()
        .connect_timeout(CONNECT_TIMEOUT)
        .operation_attempt_timeout(UPLOAD_ATTEMPT_TIMEOUT)
        .operation_timeout(UPLOAD_TIMEOUT)
        .build()
}

/// Timeouts for a request that the service answers after `wait`, in place of those of [`sdk_config`].
pub(super) fn long_poll_timeouts(wait: Duration) -> TimeoutConfig {
    TimeoutConfig::builder()
        .connect_timeout(CONNECT_TIMEOUT)
        .operation_attempt_timeout(wait + LONG_POLL_MARGIN)
        .operation_timeout(wait + 2 * LONG_POLL_MARGIN)
        .build()
}

/// `old_url`: the endpoint of the old variable, as for the two below.
pub(super) fn sqs(config: &SdkConfig, old_url: Option<&str>) -> aws_sdk_sqs::Client {
    let builder = aws_sdk_sqs::config::Builder::from(config);
    let builder = match old_endpoint(config, "SQS", old_url) {
        Some(url) => builder.endpoint_url(url),
        None => builder,
    };
    aws_sdk_sqs::Client::from_conf(builder.build())
}

pub(super) fn dynamodb(config: &SdkConfig, old_url: Option<&str>) -> aws_sdk_dynamodb::Client {
    let builder = aws_sdk_dynamodb::config::Builder::from(config);
    let builder = match old_endpoint(config, "DynamoDB", old_url) {
        Some(url) => builder.endpoint_url(url),
        None => builder,
    };
    aws_sdk_dynamodb::Client::from_conf(builder.build())
}

pub(super) fn s3(config: &SdkConfig, old_url: Option<&str>) -> aws_sdk_s3::Client {
    let builder = aws_sdk_s3::config::Builder::from(config);
    let old = old_endpoint(config, "S3", old_url);
    // Names such as `bucket.localhost` do not resolve, so with a custom endpoint the bucket name goes in the
    // path.
    let builder = builder.force_path_style(old.is_some() || sdk_endpoint(config, "S3").is_some());
    let builder = match old {
        Some(url) => builder.endpoint_url(url),
        None => builder,
    };
    aws_sdk_s3::Client::from_conf(builder.build())
}

/// The endpoint of the old variable, unless the SDK's own configuration names one.
fn old_endpoint<'a>(config: &SdkConfig, service: &str, old: Option<&'a str>) -> Option<&'a str> {
    old.filter(|url| !url.is_empty() && sdk_endpoint(config, service).is_none())
}

/// The endpoint that the SDK resolves: `AWS_ENDPOINT_URL_<SERVICE>` or `AWS_ENDPOINT_URL`, from the
/// environment or the profile. Repeats the steps of `From<&SdkConfig>` of each service's builder, which has
/// no getter for the result.
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
    fn old_endpoint_variables_have_the_lowest_precedence() {
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

    #[tokio::test]
    async fn credentials_are_trimmed_or_rejected() {
        for (key_id, secret, token, expected) in [
            ("AKIA", "s/+=", None, Ok(("AKIA", "s/+=", None))),
            ("AKIA\n", "s\r\n", Some("t \n"), Ok(("AKIA", "s", Some("t")))),
            ("\u{a0}AKIA", "a secret", Some("\n"), Ok(("AKIA", "a secret", None))),
            ("AK\nIA", "s", None, Err("the access key id")),
            ("AK IA", "s", None, Err("the access key id")),
            ("AK\u{feff}IA", "s", None, Err("the access key id")),
            ("\u{feff}AKIA", "s", None, Err("the access key id")),
            ("AKIA", "s\0", None, Err("the secret access key")),
            ("AKIA", "\u{201c}s\u{201d}", None, Err("the secret access key")),
            ("AKIA", "s", Some("t\u{7f}"), Err("the session token")),
        ] {
            let given = Credentials::new(key_id, secret, token.map(str::to_owned), None, "test");
            let provider = ValidatingProvider(SharedCredentialsProvider::new(given));
            match (provider.provide_credentials().await, expected) {
                (Ok(credentials), Ok(expected)) => {
                    let (key_id, secret) = (credentials.access_key_id(), credentials.secret_access_key());
                    assert_eq!((key_id, secret, credentials.session_token()), expected);
                }
                (Err(error), Err(part)) => {
                    let problem = crate::backend::aws::error::credentials_class(&error);
                    assert!(matches!(problem, crate::backend::BackendError::Invalid(_)), "{problem:?}");
                    assert!(problem.to_string().starts_with(part), "{problem}");
                    assert!(!problem.to_string().contains("AK"), "{problem}");
                }
                (given, expected) => panic!("{key_id:?}: {given:?} is not {expected:?}"),
            }
        }
    }
}
