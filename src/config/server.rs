//! `server.toml`: listeners, connections, time-outs, leases, memory and disk.

use crate::config::origin::normalized;
use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize};
use serde::de::DeserializeOwned;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;
use super::checks::within;
use super::merge::collect;
use toml::Table;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ServerFile {
    listen: ListenConf,
    tls: Option<TlsConf>,
    http: HttpConf,
    http2: Http2Conf,
    auth: AuthConf,
    start: StartConf,
    shutdown: ShutdownConf,
    fleet: FleetConf,
    dead_letter: DeadLetterConf,
    memory: MemoryConf,
    audit: AuditConf,
    metrics: MetricsConf,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ListenConf {
    pub address: std::net::IpAddr,
    pub threads: usize,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct HttpConf {
    pub connections_max: usize,
    pub connections_per_address_max: usize,
    #[serde(deserialize_with = "networks")]
    pub trusted_proxies: Vec<IpNet>,
    /// As browsers write them; `*`: any.
    #[serde(deserialize_with = "origins")]
    pub cors_origins: Vec<String>,
    pub keepalive_s: u64,
    pub header_timeout_s: u64,
    pub header_bytes_max: usize,
    pub header_fields_max: usize,
    pub body_timeout_s: u64,
    pub upload_timeout_s: u64,
    pub drain_body_timeout_ms: u64,
    pub write_timeout_s: u64,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Http2Conf {
    pub streams_max: u32,
    pub header_list_bytes_max: u32,
    pub idle_timeout_s: u64,
}

/// Networks, and addresses by themselves.
fn networks<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<IpNet>, D::Error> {
    let texts = Vec::<String>::deserialize(from)?;
    let network = |text: &String| text.parse().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
    let networks: Option<Vec<_>> = texts.iter().map(network).collect();
    networks.ok_or_else(|| serde::de::Error::custom("must be networks (\"10.0.0.0/8\") or addresses"))
}

fn origins<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    let texts = Vec::<String>::deserialize(from)?;
    let origins: Result<Vec<_>, _> = texts.iter().map(|text| normalized(text)).collect();
    origins.map_err(serde::de::Error::custom)
}

/// A second listener, which speaks TLS.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConf {
    /// As `listen.address` if there is none.
    pub address: Option<IpAddr>,
    pub port: u16,
    /// Relative to the directory of the file.
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// Whoever has issued the certificates of clients.
    pub client_ca: Option<PathBuf>,
    #[serde(default)]
    pub client_certificates: ClientCertificates,
}

/// What a client without a certificate meets, where `client_ca` is set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ClientCertificates {
    /// No connection.
    #[default]
    Required,
    /// As if there were no `client_ca`; a certificate that is shown must be good.
    Optional,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct AuthConf {
    pub failures_a_minute: u32,
    pub failures_burst: u32,
    pub metrics_need_key: bool,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct StartConf {
    pub deadline_s: u64,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ShutdownConf {
    pub lame_duck_ms: u64,
    pub drain_timeout_s: u64,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct FleetConf {
    pub lease_s: u64,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DeadLetterConf {
    pub every_s: u64,
    pub consume: bool,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryConf {
    pub jobs_in_flight_max: usize,
    pub audit_rows_max: usize,
    pub audit_bytes_max: usize,
    pub settled_bytes_max: usize,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct AuditConf {
    pub spill_bytes_max: u64,
    pub aside_after_s: u64,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MetricsConf {
    pub function_labels_max: usize,
}

const THREADS_MAX: u64 = 1024;

/// A browser's cookies fit, and Pingora reads no more.
const HEADER_BYTES_LEAST: u64 = 1024;

const HEADER_BYTES_MOST: u64 = 1 << 20;

const HEADER_FIELDS_MOST: u64 = 256;

const STREAMS_MOST: u64 = 10_000;

impl ServerFile {
    /// (path, problem) of each value out of its bounds.
    pub fn problems(&self) -> Vec<(String, String)> {
        [
            within("listen.threads", self.listen.threads as u64, 0..=THREADS_MAX),
            within("http.body_timeout_s", self.http.body_timeout_s, 1..=SECONDS_MAX),
            within("http.upload_timeout_s", self.http.upload_timeout_s, 1..=SECONDS_MAX),
            within("http.keepalive_s", self.http.keepalive_s, 0..=SECONDS_MAX),
            within("http.connections_max", self.http.connections_max as u64, 1..=ENTRIES_MAX),
            within("http.header_timeout_s", self.http.header_timeout_s, 1..=SECONDS_MAX),
            within("http.header_bytes_max", self.http.header_bytes_max as u64, HEADER_BYTES_LEAST..=HEADER_BYTES_MOST),
            within("http.header_fields_max", self.http.header_fields_max as u64, 1..=HEADER_FIELDS_MOST),
            within("http.write_timeout_s", self.http.write_timeout_s, 1..=SECONDS_MAX),
            within("http2.header_list_bytes_max", self.http2.header_list_bytes_max.into(), HEADER_BYTES_LEAST..=HEADER_BYTES_MOST),
            within("http2.streams_max", self.http2.streams_max.into(), 1..=STREAMS_MOST),
            within("http2.idle_timeout_s", self.http2.idle_timeout_s, 1..=SECONDS_MAX),
            within("http.drain_body_timeout_ms", self.http.drain_body_timeout_ms, 0..=SECONDS_MAX * 1000),
            within("start.deadline_s", self.start.deadline_s, 1..=SECONDS_MAX),
            within("shutdown.lame_duck_ms", self.shutdown.lame_duck_ms, 0..=SECONDS_MAX * 1000),
            within("shutdown.drain_timeout_s", self.shutdown.drain_timeout_s, 0..=SECONDS_MAX),
            within("fleet.lease_s", self.fleet.lease_s, 1..=SECONDS_MAX),
            within("dead_letter.every_s", self.dead_letter.every_s, 1..=SECONDS_MAX),
            within("memory.jobs_in_flight_max", self.memory.jobs_in_flight_max as u64, 1..=ENTRIES_MAX),
            within("memory.audit_rows_max", self.memory.audit_rows_max as u64, 1..=ENTRIES_MAX),
            within("audit.aside_after_s", self.audit.aside_after_s, 0..=SECONDS_MAX),
            // The largest row that the log table accepts must fit.
            within("memory.audit_bytes_max", self.memory.audit_bytes_max as u64, (1 << 20)..=u64::MAX),
            within("auth.failures_a_minute", self.auth.failures_a_minute.into(), 1..=u64::MAX),
            within("auth.failures_burst", self.auth.failures_burst.into(), 1..=u64::MAX),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}
