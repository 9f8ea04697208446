//! The HTTP client for calls without an SDK: HTTP/1.1, over TLS for `https` URLs, with the system's root
//! certificates.

use bytes::Bytes;
use http_body_util::Full;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls::{ClientConfig, RootCertStore};
use std::sync::Arc;
use std::time::Duration;

/// How long an idle connection stays in the pool. Load balancers silently drop idle connections after about
/// 60 s.
pub const POOL_IDLE: Duration = Duration::from_secs(20);

pub type HttpsClient = Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// Builds a client with a connection pool of its own. It connects on the first request.
///
/// # Errors
/// The TLS settings are not supported by the provider.
pub fn client(connect_timeout: Duration) -> Result<HttpsClient, rustls::Error> {
    // Explicit: if several providers are linked, rustls has no default.
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    // Errors are ignored: `http` URLs must work on a machine without root certificates.
    let mut trusted = RootCertStore::empty();
    trusted.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    let tls = tls.with_root_certificates(trusted).with_no_client_auth();
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(connect_timeout));
    let https = HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_http1();
    Ok(Client::builder(TokioExecutor::new())
        .pool_idle_timeout(POOL_IDLE)
        .pool_timer(TokioTimer::new())
        .build(https.wrap_connector(tcp)))
}
