//! `server.toml`: listeners, connections, timeouts, leases, memory and disk.

use super::checks::within;
use crate::config::checks::{ENTRIES_MAX, SECONDS_MAX};
use crate::config::origin::normalized;
use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize};
use std::net::IpAddr;
use std::path::PathBuf;

/// The contents of `server.toml`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerFile {
    pub listen: ListenConf,
    pub tls: Option<TlsConf>,
    pub http: HttpConf,
    pub http2: Http2Conf,
    pub auth: AuthConf,
    pub start: StartConf,
    pub shutdown: ShutdownConf,
    pub fleet: FleetConf,
    pub dead_letter: DeadLetterConf,
    pub memory: MemoryConf,
    pub audit: AuditConf,
    pub metrics: MetricsConf,
    pub events: EventsConf,
    pub traces: TracesConf,
    #[serde(default)]
    pub cost: CostConf,
}

/// `[listen]`: the plain listener and the threads.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ListenConf {
    /// Address of the plain listener of `serve`. `::` accepts IPv4 as well.
    pub address: std::net::IpAddr,
    /// Number of worker threads. 0: one per core.
    pub threads: usize,
}

/// `[http]`: bounds of connections, headers and bodies.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct HttpConf {
    /// Maximum number of open client connections.
    pub connections_max: usize,
    /// The same per client address (IPv6: per /64). 0: no cap.
    pub connections_per_address_max: usize,
    /// Proxies whose `X-Forwarded-For` or `Forwarded` names the client.
    #[serde(deserialize_with = "networks")]
    pub trusted_proxies: Vec<IpNet>,
    /// Origins whose scripts may use the API, as browsers spell them. `*`: any.
    #[serde(deserialize_with = "origins")]
    pub cors_origins: Vec<String>,
    /// Idle time of a client connection, in seconds. 0: no end.
    pub keepalive_s: u64,
    /// Time for a complete header, in seconds.
    pub header_timeout_s: u64,
    /// Maximum size of a header over HTTP/1.1, in bytes.
    pub header_bytes_max: usize,
    /// Maximum number of header fields.
    pub header_fields_max: usize,
    /// Time for a complete body, in seconds.
    pub body_timeout_s: u64,
    /// The same on routes that upload code, in seconds.
    pub upload_timeout_s: u64,
    /// Time to drain an unread body, in ms.
    pub drain_body_timeout_ms: u64,
    /// Time without progress of a response, in seconds.
    pub write_timeout_s: u64,
}

/// `[http2]`: bounds of HTTP/2 connections.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Http2Conf {
    /// Maximum number of concurrent streams of a connection.
    pub streams_max: u32,
    /// Maximum size of a header list, in bytes.
    pub header_list_bytes_max: u32,
    /// Time without a stream until the connection is closed, in seconds.
    pub idle_timeout_s: u64,
}

/// Parses networks and single addresses.
pub fn networks<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<IpNet>, D::Error> {
    let texts = Vec::<String>::deserialize(from)?;
    let network = |text: &String| text.parse().ok().or_else(|| text.parse::<IpAddr>().ok().map(IpNet::from));
    let networks: Option<Vec<_>> = texts.iter().map(network).collect();
    networks.ok_or_else(|| serde::de::Error::custom("must be networks (\"10.0.0.0/8\") or addresses"))
}

/// Parses and normalizes origins.
pub fn origins<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<String>, D::Error> {
    let texts = Vec::<String>::deserialize(from)?;
    let origins: Result<Vec<_>, _> = texts.iter().map(|text| normalized(text)).collect();
    origins.map_err(serde::de::Error::custom)
}

/// `[tls]`: the TLS listener. Paths are relative to the directory of the file, and the files are PEM.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TlsConf {
    /// Address of the TLS listener. `None`: `listen.address`.
    pub address: Option<IpAddr>,
    /// Port of the TLS listener.
    pub port: u16,
    /// Certificate with its chain.
    pub certificate: PathBuf,
    /// Private key, not encrypted.
    pub key: PathBuf,
    /// Issuers of client certificates. `None`: no client certificates are requested.
    pub client_ca: Option<PathBuf>,
    /// Whether clients need a certificate. Without effect if `client_ca` is `None`.
    #[serde(default)]
    pub client_certificates: ClientCertificates,
}

/// Whether clients need a certificate, if `client_ca` is set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum ClientCertificates {
    /// A client without a certificate is rejected.
    #[default]
    Required,
    /// A client without a certificate is accepted. A certificate that is sent must be valid.
    Optional,
}

/// `[auth]`: failed keys, and the access to metrics.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct AuthConf {
    /// Requests without a valid key per minute and client address (IPv6: /64).
    pub failures_a_minute: u32,
    /// The same at once.
    pub failures_burst: u32,
    /// Whether `/metrics` requires a key with the scope `metrics`.
    pub metrics_need_key: bool,
}

/// `[start]`: the deadline of a start.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct StartConf {
    /// Time for all backends to answer at start, in seconds.
    pub deadline_s: u64,
}

/// `[shutdown]`: the deadlines of a stop.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ShutdownConf {
    /// How long `/readyz` answers 503 before the listeners close, in ms.
    pub lame_duck_ms: u64,
    /// Time for requests in flight, in seconds.
    pub drain_timeout_s: u64,
}

/// `[fleet]`: the leases of nodes.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct FleetConf {
    /// Silence after which a node is lost, in seconds. The same on all nodes.
    pub lease_s: u64,
}

/// `[cost]`: the price of runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct CostConf {
    /// The price of one second with one GB of memory. `None`: no cost is shown.
    pub gb_second: Option<f64>,
}

impl CostConf {
    /// A price that is not a number would not be JSON.
    fn problem(self) -> Option<(String, String)> {
        let is_price = self.gb_second.is_none_or(|price| (0.0..=PRICE_MOST).contains(&price));
        let problem = format!("must be a number from 0 to {PRICE_MOST}");
        (!is_price).then(|| ("cost.gb_second".to_owned(), problem))
    }
}

/// `[dead_letter]`: the dead-letter queue.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct DeadLetterConf {
    /// Interval of reads, in seconds.
    pub every_s: u64,
    /// Whether messages are deleted after their jobs have ended as FAILED.
    pub consume: bool,
}

/// `[memory]`: bounds of what is kept in memory.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryConf {
    /// Maximum number of accepted jobs without a row. Further jobs are answered 503.
    pub jobs_in_flight_max: usize,
    /// Maximum number of rows that wait for the log table.
    pub audit_rows_max: usize,
    /// Maximum size of those rows, in bytes.
    pub audit_bytes_max: usize,
    /// Maximum size of results kept for `/status`, in bytes. Each counts 256 bytes more than its size.
    pub settled_bytes_max: usize,
}

/// `[audit]`: rows that the log table does not accept.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct AuditConf {
    /// Maximum size of rows on the disk while the log table is away, in bytes.
    pub spill_bytes_max: u64,
    /// Time until a failing row is set aside while other rows are written, in seconds.
    pub aside_after_s: u64,
}

/// `[metrics]`: bounds of labels.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MetricsConf {
    /// Maximum number of function ids with their own series. Others share the label `other`.
    pub function_labels_max: usize,
}

/// `[events]`: the watchers of events.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct EventsConf {
    /// Maximum number of clients that watch events on this node. 0: none may.
    pub watchers_max: usize,
    /// Longest silence of their streams, in seconds.
    pub heartbeat_s: u64,
}

/// Upper bound of `events.watchers_max`. Each may keep a MiB waiting.
pub const WATCHERS_MOST: u64 = 10_000;

/// `[traces]`: jobs that are traced only because of how they ended. Without effect unless `OTEL_*` variables
/// name a collector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct TracesConf {
    /// Jobs that do not end as SUCCESS.
    pub failed: bool,
    /// Jobs whose result arrives this long after their acceptance or later, in ms. 0: none.
    pub slow_ms: u64,
}

/// Upper bound of `listen.threads`.
pub const THREADS_MAX: u64 = 1024;

/// Lower bound of the size of headers, in bytes.
pub const HEADER_BYTES_LEAST: u64 = 1024;

/// Upper bound of the size of headers, in bytes. Pingora reads no larger ones.
pub const HEADER_BYTES_MOST: u64 = 1 << 20;

/// Upper bound of the number of header fields. Pingora parses no more.
pub const HEADER_FIELDS_MOST: u64 = 256;

/// Upper bound of `http2.streams_max`.
pub const STREAMS_MOST: u64 = 10_000;

/// Highest price of a GB second.
const PRICE_MOST: f64 = 1e9;

impl ServerFile {
    /// Returns (path, problem) of each value out of bounds.
    pub fn problems(&self) -> Vec<(String, String)> {
        [
            within("listen.threads", self.listen.threads as u64, 0..=THREADS_MAX),
            within("http.body_timeout_s", self.http.body_timeout_s, 1..=SECONDS_MAX),
            within("http.upload_timeout_s", self.http.upload_timeout_s, 1..=SECONDS_MAX),
            within("http.keepalive_s", self.http.keepalive_s, 0..=SECONDS_MAX),
            within("http.connections_max", self.http.connections_max as u64, 1..=ENTRIES_MAX),
            within("http.header_timeout_s", self.http.header_timeout_s, 1..=SECONDS_MAX),
            within(
                "http.header_bytes_max",
                self.http.header_bytes_max as u64,
                HEADER_BYTES_LEAST..=HEADER_BYTES_MOST,
            ),
            within("http.header_fields_max", self.http.header_fields_max as u64, 1..=HEADER_FIELDS_MOST),
            within("http.write_timeout_s", self.http.write_timeout_s, 1..=SECONDS_MAX),
            within(
                "http2.header_list_bytes_max",
                self.http2.header_list_bytes_max.into(),
                HEADER_BYTES_LEAST..=HEADER_BYTES_MOST,
            ),
            within("http2.streams_max", self.http2.streams_max.into(), 1..=STREAMS_MOST),
            within("http2.idle_timeout_s", self.http2.idle_timeout_s, 1..=SECONDS_MAX),
            within("http.drain_body_timeout_ms", self.http.drain_body_timeout_ms, 0..=SECONDS_MAX * 1000),
            within("start.deadline_s", self.start.deadline_s, 1..=SECONDS_MAX),
            within("shutdown.lame_duck_ms", self.shutdown.lame_duck_ms, 0..=SECONDS_MAX * 1000),
            within("shutdown.drain_timeout_s", self.shutdown.drain_timeout_s, 0..=SECONDS_MAX),
            within("events.watchers_max", self.events.watchers_max as u64, 0..=WATCHERS_MOST),
            within("events.heartbeat_s", self.events.heartbeat_s, 1..=SECONDS_MAX),
            within("fleet.lease_s", self.fleet.lease_s, 1..=SECONDS_MAX),
            within("dead_letter.every_s", self.dead_letter.every_s, 1..=SECONDS_MAX),
            within("memory.jobs_in_flight_max", self.memory.jobs_in_flight_max as u64, 1..=ENTRIES_MAX),
            within("memory.audit_rows_max", self.memory.audit_rows_max as u64, 1..=ENTRIES_MAX),
            within("audit.aside_after_s", self.audit.aside_after_s, 0..=SECONDS_MAX),
            // The largest row that the log table accepts must fit.
            within("memory.audit_bytes_max", self.memory.audit_bytes_max as u64, (1 << 20)..=u64::MAX),
            within("traces.slow_ms", self.traces.slow_ms, 0..=SECONDS_MAX * 1000),
            within("auth.failures_a_minute", self.auth.failures_a_minute.into(), 1..=u64::MAX),
            within("auth.failures_burst", self.auth.failures_burst.into(), 1..=u64::MAX),
            self.cost.problem(),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}
