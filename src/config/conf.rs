//! `conf/`: `server.toml`, `limits.toml`, `keys.toml` and `upstreams.toml`.
//!
//! The shipped files are compiled in and are the defaults, so "built-in" and "shipped" cannot differ. A file
//! that an operator writes may leave out any key; a key nobody knows is an error, not a typo that waits.

use super::ConfigError;
use super::keys::{KeyConf, key_problems};
use super::origin::normalized;
use super::place::line_at;
use super::texts::{ConfPart, ConfText, ConfTexts, TlsTexts};
use super::upstreams::{UpstreamConf, upstream_problems};
use crate::model::Quota;
use ipnet::IpNet;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;
use toml::Table;

const SERVER_SHIPPED: &str = include_str!("../../conf/server.toml");
const LIMITS_SHIPPED: &str = include_str!("../../conf/limits.toml");
const KEYS_SHIPPED: &str = include_str!("../../conf/keys.toml");
const UPSTREAMS_SHIPPED: &str = include_str!("../../conf/upstreams.toml");

/// A full bucket, in the smallest steps that are counted: Lua's numbers are exact up to four times that.
const LIMIT_STEPS_MAX: u128 = 1 << 51;
/// From how many characters on a word in an error is not shown: no setting's name is that long.
const SECRET_CHARS_MIN: usize = 30;

/// All of `conf/`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Conf {
    pub listen: ListenConf,
    pub tls: Option<TlsConf>,
    #[serde(skip)]
    pub tls_texts: Option<TlsTexts>,
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
    /// Those of the other files may change while the process runs, as `http` and `auth` may.
    #[serde(rename = "key")]
    pub keys: Vec<KeyConf>,
    #[serde(rename = "upstream")]
    pub upstreams: Vec<UpstreamConf>,
    #[serde(rename = "limit")]
    pub limits: Vec<LimitConf>,
    pub waits: WaitsConf,
    pub batch: BatchConf,
    pub cache: CacheConf,
    pub overload: OverloadConf,
}

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

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct LimitsFile {
    #[serde(default)]
    limit: Vec<LimitConf>,
    waits: WaitsConf,
    batch: BatchConf,
    cache: CacheConf,
    overload: OverloadConf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KeysFile {
    #[serde(default)]
    key: Vec<KeyConf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct UpstreamsFile {
    #[serde(default)]
    upstream: Vec<UpstreamConf>,
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
pub struct OverloadConf {
    pub jobs_per_key_max: usize,
    pub confirm_target_ms: u64,
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

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct LimitConf {
    pub name: String,
    pub identity: Identity,
    #[serde(default)]
    pub mode: LimitMode,
    pub routes: Vec<String>,
    pub rate: u32,
    pub period_s: u64,
    pub burst: u32,
    pub on_redis_loss: OnRedisLoss,
}

impl LimitConf {
    pub fn quota(&self) -> Quota {
        Quota { rate: self.rate, period: Duration::from_secs(self.period_s), burst: self.burst }
    }
}

/// Whose requests a limit counts together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Identity {
    Key,
    Ip,
    /// The function that is run.
    Function,
    /// All requests together.
    Global,
}

/// How nodes count together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LimitMode {
    /// Each node takes requests in advance.
    #[default]
    Leased,
    /// Redis is asked on every request.
    Exact,
}

/// What a limit does while Redis is away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OnRedisLoss {
    /// Counts in this process.
    Local,
    /// Refuses.
    Closed,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct WaitsConf {
    pub sync_default_s: u64,
    pub sync_max_s: u64,
    pub status_max_s: u64,
    pub job_deadline_s: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct BatchConf {
    pub linger_ms: u64,
    pub sends_eager: usize,
    pub sends_max: usize,
    pub queue_jobs_max: usize,
    pub send_deadline_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct CacheConf {
    pub functions_max: u64,
    pub function_ttl_ms: u64,
    pub function_backstop_s: u64,
}

/// A day, as the longest wait of any kind.
const SECONDS_MAX: u64 = 24 * 3600;
/// A send that takes longer holds up the end of the process.
const SEND_DEADLINE_MS_MAX: u64 = 60_000;
/// A send that began just before its deadline may take so long.
const CALL_S: u64 = 3;
/// Functions are not known for longer, whatever is configured.
const FUNCTION_AGE_S_MAX: u64 = 3600;
const THREADS_MAX: u64 = 1024;
/// A browser's cookies fit, and Pingora reads no more.
const HEADER_BYTES_LEAST: u64 = 1024;
const HEADER_BYTES_MOST: u64 = 1 << 20;
const HEADER_FIELDS_MOST: u64 = 256;
const STREAMS_MOST: u64 = 10_000;
/// Most that a queue or table in memory may be said to hold.
const ENTRIES_MAX: u64 = 1 << 28;

impl BatchConf {
    /// Most that `queue_jobs_max` may be: some 2 GB of waiting jobs.
    pub const QUEUE_JOBS_MAX: usize = 1 << 20;
}

impl Conf {
    /// The shipped `conf/`.
    pub fn shipped() -> Result<Self, ConfigError> {
        Self::of(&ConfTexts::none())
    }

    /// The settings that files make.
    ///
    /// # Errors
    /// Every problem, with file, line and reason.
    pub fn of(texts: &ConfTexts) -> Result<Self, ConfigError> {
        let mut problems = Vec::new();
        let server = collect(&mut problems, merged::<ServerFile>(SERVER_SHIPPED, &texts.server));
        let limits = collect(&mut problems, merged::<LimitsFile>(LIMITS_SHIPPED, &texts.limits));
        let keys = collect(&mut problems, merged::<KeysFile>(KEYS_SHIPPED, &texts.keys));
        let upstreams = collect(&mut problems, merged::<UpstreamsFile>(UPSTREAMS_SHIPPED, &texts.upstreams));
        let (Some(s), Some(l), Some(k), Some(u)) = (server, limits, keys, upstreams) else {
            // The same directory may be missing to all.
            problems.dedup();
            return Err(ConfigError(problems));
        };
        let tls_parts = [ConfPart::Certificate, ConfPart::ClientCa];
        let unreadable: Vec<String> = tls_parts.iter().flat_map(|part| texts.problems(*part)).collect();
        let conf = Self {
            listen: s.listen,
            tls: s.tls,
            tls_texts: texts.tls(),
            http: s.http,
            http2: s.http2,
            auth: s.auth,
            start: s.start,
            shutdown: s.shutdown,
            fleet: s.fleet,
            dead_letter: s.dead_letter,
            memory: s.memory,
            audit: s.audit,
            metrics: s.metrics,
            keys: k.key,
            upstreams: u.upstream,
            limits: l.limit,
            waits: l.waits,
            batch: l.batch,
            cache: l.cache,
            overload: l.overload,
        };
        let problems: Vec<String> = [
            (&texts.server, conf.server_problems()),
            (&texts.limits, conf.limits_problems()),
            (&texts.keys, key_problems(&conf.keys)),
            (&texts.upstreams, upstream_problems(&conf.upstreams)),
        ]
        .into_iter()
        .flat_map(|(file, problems)| {
            problems.into_iter().map(|(path, problem)| file.problem(&path, &problem))
        })
        .chain(unreadable)
        .collect();
        if problems.is_empty() { Ok(conf) } else { Err(ConfigError(problems)) }
    }

    /// Whether a limit names an upstream.
    pub(super) fn limits_upstreams(&self) -> bool {
        let patterns: Vec<_> = self.upstreams.iter().map(UpstreamConf::pattern).collect();
        self.limits.iter().flat_map(|limit| &limit.routes).any(|route| patterns.contains(route))
    }

    /// Limits on routes that are none, on those of ours that anybody may ask, or by key where none is asked for, would silently
    /// be off, and so would upstreams on paths that are answered here.
    pub fn check_routes(
        &self,
        texts: &ConfTexts,
        is_local: impl Fn(&str) -> bool,
        is_route: impl Fn(&str) -> bool,
    ) -> Result<(), ConfigError> {
        let mut problems = Vec::new();
        for (n, limit) in self.limits.iter().enumerate() {
            let counts =
                |upstream: &UpstreamConf| upstream.scope.is_some() || limit.identity != Identity::Key;
            let counted: Vec<_> =
                self.upstreams.iter().filter(|up| counts(up)).map(UpstreamConf::pattern).collect();
            let is_unknown = |route: &&String| !is_route(route) && !counted.contains(*route);
            for route in limit.routes.iter().filter(is_unknown) {
                let problem =
                    format!("(limit {}): there is no route {route:?} that asks for a key", limit.name);
                problems.push(texts.limits.problem(&format!("limit[{n}].routes"), &problem));
            }
        }
        for (n, upstream) in
            self.upstreams.iter().enumerate().filter(|(_, upstream)| is_local(&upstream.prefix))
        {
            let problem = format!("{:?} is answered here", upstream.prefix);
            problems.push(texts.upstreams.problem(&format!("upstream[{n}].prefix"), &problem));
        }
        if problems.is_empty() { Ok(()) } else { Err(ConfigError(problems)) }
    }

    /// (path, problem) of each.
    fn server_problems(&self) -> Vec<(String, String)> {
        [
            ("http.body_timeout_s", self.http.body_timeout_s),
            ("http.upload_timeout_s", self.http.upload_timeout_s),
            ("http.connections_max", self.http.connections_max as u64),
            ("http.header_timeout_s", self.http.header_timeout_s),
            ("http.header_fields_max", self.http.header_fields_max as u64),
            ("http.write_timeout_s", self.http.write_timeout_s),
            ("http2.streams_max", self.http2.streams_max.into()),
            ("http2.idle_timeout_s", self.http2.idle_timeout_s),
            ("auth.failures_a_minute", self.auth.failures_a_minute.into()),
            ("auth.failures_burst", self.auth.failures_burst.into()),
            ("start.deadline_s", self.start.deadline_s),
            ("fleet.lease_s", self.fleet.lease_s),
            ("dead_letter.every_s", self.dead_letter.every_s),
            ("memory.jobs_in_flight_max", self.memory.jobs_in_flight_max as u64),
            ("memory.audit_rows_max", self.memory.audit_rows_max as u64),
        ]
        .into_iter()
        .filter_map(|(path, value)| at_least_one(path, value))
        .chain(
            [
                between("listen.threads", self.listen.threads as u64, 0, THREADS_MAX),
                between("http.body_timeout_s", self.http.body_timeout_s, 0, SECONDS_MAX),
                between("http.upload_timeout_s", self.http.upload_timeout_s, 0, SECONDS_MAX),
                between("http.keepalive_s", self.http.keepalive_s, 0, SECONDS_MAX),
                between("http.connections_max", self.http.connections_max as u64, 0, ENTRIES_MAX),
                between("http.header_timeout_s", self.http.header_timeout_s, 0, SECONDS_MAX),
                between(
                    "http.header_bytes_max",
                    self.http.header_bytes_max as u64,
                    HEADER_BYTES_LEAST,
                    HEADER_BYTES_MOST,
                ),
                between("http.header_fields_max", self.http.header_fields_max as u64, 0, HEADER_FIELDS_MOST),
                between("http.write_timeout_s", self.http.write_timeout_s, 0, SECONDS_MAX),
                between(
                    "http2.header_list_bytes_max",
                    self.http2.header_list_bytes_max.into(),
                    HEADER_BYTES_LEAST,
                    HEADER_BYTES_MOST,
                ),
                between("http2.streams_max", self.http2.streams_max.into(), 0, STREAMS_MOST),
                between("http2.idle_timeout_s", self.http2.idle_timeout_s, 0, SECONDS_MAX),
                between("http.drain_body_timeout_ms", self.http.drain_body_timeout_ms, 0, SECONDS_MAX * 1000),
                between("start.deadline_s", self.start.deadline_s, 0, SECONDS_MAX),
                between("shutdown.lame_duck_ms", self.shutdown.lame_duck_ms, 0, SECONDS_MAX * 1000),
                between("shutdown.drain_timeout_s", self.shutdown.drain_timeout_s, 0, SECONDS_MAX),
                between("fleet.lease_s", self.fleet.lease_s, 0, SECONDS_MAX),
                between("dead_letter.every_s", self.dead_letter.every_s, 0, SECONDS_MAX),
                between("memory.jobs_in_flight_max", self.memory.jobs_in_flight_max as u64, 0, ENTRIES_MAX),
                between("memory.audit_rows_max", self.memory.audit_rows_max as u64, 0, ENTRIES_MAX),
                between("audit.aside_after_s", self.audit.aside_after_s, 0, SECONDS_MAX),
                // The largest row that the log table takes must have room.
                between("memory.audit_bytes_max", self.memory.audit_bytes_max as u64, 1 << 20, u64::MAX),
            ]
            .into_iter()
            .flatten(),
        )
        .collect()
    }

    fn limits_problems(&self) -> Vec<(String, String)> {
        let mut problems: Vec<_> = [
            ("batch.sends_eager", self.batch.sends_eager as u64),
            ("batch.sends_max", self.batch.sends_max as u64),
            ("batch.queue_jobs_max", self.batch.queue_jobs_max as u64),
            ("batch.send_deadline_ms", self.batch.send_deadline_ms),
            ("cache.functions_max", self.cache.functions_max),
            ("cache.function_backstop_s", self.cache.function_backstop_s),
        ]
        .into_iter()
        .filter_map(|(path, value)| at_least_one(path, value))
        .collect();
        let given_up_s = self.batch.send_deadline_ms.div_ceil(1000);
        problems.extend(
            [
                between(
                    "batch.queue_jobs_max",
                    self.batch.queue_jobs_max as u64,
                    0,
                    BatchConf::QUEUE_JOBS_MAX as u64,
                ),
                between("batch.send_deadline_ms", self.batch.send_deadline_ms, 0, SEND_DEADLINE_MS_MAX),
                between("batch.linger_ms", self.batch.linger_ms, 0, SEND_DEADLINE_MS_MAX),
                between("waits.sync_default_s", self.waits.sync_default_s, 0, SECONDS_MAX),
                between("waits.sync_max_s", self.waits.sync_max_s, 0, SECONDS_MAX),
                between("waits.status_max_s", self.waits.status_max_s, 0, SECONDS_MAX),
                // A job must not be lost while it is still to be sent.
                self.waits.job_deadline_s.and_then(|s| {
                    between("waits.job_deadline_s", s, given_up_s + CALL_S, u64::from(u32::MAX))
                }),
                between("cache.function_ttl_ms", self.cache.function_ttl_ms, 0, FUNCTION_AGE_S_MAX * 1000),
                between("cache.function_backstop_s", self.cache.function_backstop_s, 0, FUNCTION_AGE_S_MAX),
                between(
                    "overload.confirm_target_ms",
                    self.overload.confirm_target_ms,
                    0,
                    SEND_DEADLINE_MS_MAX,
                ),
            ]
            .into_iter()
            .flatten(),
        );
        for (n, limit) in self.limits.iter().enumerate() {
            let numbers =
                [("rate", limit.rate.into()), ("burst", limit.burst.into()), ("period_s", limit.period_s)];
            problems.extend(
                numbers
                    .iter()
                    .filter_map(|(name, value)| at_least_one(&format!("limit[{n}].{name}"), *value)),
            );
            let is_named_before = self.limits.iter().take(n).any(|other| other.name == limit.name);
            let not_unique = is_named_before.then_some(("name", "stands for another limit already"));
            problems.extend(
                not_unique
                    .into_iter()
                    .chain(limit.problems())
                    .map(|(name, problem)| (format!("limit[{n}].{name}"), problem.to_owned())),
            );
        }
        problems
    }
}

pub(super) fn between(path: &str, value: u64, least: u64, most: u64) -> Option<(String, String)> {
    if value > most {
        return Some((path.to_owned(), format!("must be at most {most}")));
    }
    (value < least).then(|| (path.to_owned(), format!("must be at least {least}")))
}

pub(super) fn at_least_one(path: &str, value: u64) -> Option<(String, String)> {
    (value == 0).then(|| (path.to_owned(), "must be at least 1".to_owned()))
}

/// Redis counts in steps; see limits.lua.
pub(super) fn is_countable(quota: &Quota) -> bool {
    u128::from(quota.drain().1) * u128::from(quota.burst) <= LIMIT_STEPS_MAX
}

impl LimitConf {
    pub fn is_countable(&self) -> bool {
        is_countable(&self.quota())
    }

    /// (key, problem) of each.
    fn problems(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        // The name goes into a header field and a Redis key.
        let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
        let is_named = !self.name.is_empty() && self.name.len() <= 64 && self.name.bytes().all(plain);
        let is_by_function = self.identity == Identity::Function;
        [
            (!is_named, "name", "must be 1 to 64 of [A-Za-z0-9._-]"),
            (self.routes.is_empty(), "routes", "must name a route"),
            (!self.is_countable(), "burst", "is too large together with period_s"),
            (
                is_by_function && self.routes.iter().any(|route| route != "/run"),
                "routes",
                "may be \"/run\" alone where the identity is \"function\"",
            ),
        ]
        .into_iter()
        .filter_map(|(is_wrong, key, problem)| is_wrong.then_some((key, problem)))
    }
}

fn collect<T>(problems: &mut Vec<String>, read: Result<T, String>) -> Option<T> {
    read.map_err(|problem| problems.push(problem)).ok()
}

/// The operator's file over the shipped one, table by table. Lists (`[[limit]]`) are taken whole: they cannot be
/// merged, so a file without limits has none.
fn merged<T: DeserializeOwned>(shipped: &str, file: &ConfText) -> Result<T, String> {
    let mut all: Table = shipped.parse().map_err(|e| format!("shipped configuration: {e}"))?;
    let is_there = file.text.as_ref().is_ok_and(Option::is_some);
    let text = file.text.as_ref().map_err(Clone::clone)?.as_deref().unwrap_or_default();
    let own: Table = text.parse().map_err(|e: toml::de::Error| {
        let line = line_at(text, e.span().map_or(0, |span| span.start));
        format!("{}:{line}: {}", file.name, without_secrets(e.message()))
    })?;
    if is_there {
        for list in ["limit", "key", "upstream"] {
            all.remove(list);
        }
    }
    for (key, value) in own {
        match (all.get_mut(&key), value) {
            (Some(toml::Value::Table(base)), toml::Value::Table(over)) => base.extend(over),
            (_, value) => {
                all.insert(key, value);
            }
        }
    }
    serde_path_to_error::deserialize(all).map_err(|e| {
        let path = e.path().to_string();
        without_secrets(&file.problem(&path, e.into_inner().message()))
    })
}

/// Errors quote what stands in the wrong place, which may be a key or its hash.
fn without_secrets(problem: &str) -> String {
    let is_of_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '+' | '=');
    let mut told = String::with_capacity(problem.len());
    let mut rest = problem;
    while let Some(start) = rest.find(is_of_word) {
        let (before, from) = rest.split_at(start);
        let (word, after) = from.split_at(from.find(|c| !is_of_word(c)).unwrap_or(from.len()));
        told.push_str(before);
        told.push_str(if word.len() < SECRET_CHARS_MIN { word } else { "…" });
        rest = after;
    }
    told + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(server: &str, limits: &str) -> Result<Conf, ConfigError> {
        let file = |name: &str, text: &str| ConfText { name: name.into(), text: Ok(Some(text.into())) };
        let (server, limits) = (file("server.toml", server), file("limits.toml", limits));
        Conf::of(&ConfTexts { server, limits, ..ConfTexts::none() })
    }

    #[test]
    fn the_shipped_files_are_the_contract() {
        let conf = Conf::shipped().unwrap();
        let [limit] = conf.limits.as_slice() else { panic!("one limit") };
        assert_eq!(limit.quota(), Quota { rate: 3000, period: Duration::from_secs(60), burst: 3000 });
        assert_eq!(
            (limit.identity, limit.routes.as_slice()),
            (Identity::Key, &["/run".into(), "/upload".into()][..])
        );
        assert_eq!((conf.waits.sync_default_s, conf.waits.status_max_s), (290, 60));
    }

    #[test]
    fn a_file_may_name_only_what_it_changes() {
        let conf = load("[shutdown]\ndrain_timeout_s = 2", "[waits]\nsync_max_s = 5").unwrap();
        assert_eq!((conf.shutdown.drain_timeout_s, conf.shutdown.lame_duck_ms), (2, 0));
        assert_eq!((conf.waits.sync_max_s, conf.waits.sync_default_s), (5, 290));
        assert_eq!(conf.limits, [], "a limits.toml without limits has none");
    }

    const LIMIT: &str = "[[limit]]\nname = \"a\"\nidentity = \"key\"\nroutes = [\"/run\"]\nrate = 1\nperiod_s = 1\nburst = 1\non_redis_loss = \"local\"\n";

    fn limit(name: &str, identity: &str, route: &str, burst: u32) -> String {
        format!(
            "[[limit]]\nname = {name:?}\nidentity = {identity:?}\nroutes = [{route:?}]\nrate = 1\nperiod_s = 86400\n\
             burst = {burst}\non_redis_loss = \"local\"\n"
        )
    }

    #[test]
    fn limits_are_leased_unless_they_say_exact() {
        let exact = limit("b", "function", "/run", 1) + "mode = \"exact\"\n";
        let conf = load("", &(limit("a", "global", "/upload", 1) + &exact)).unwrap();
        let read: Vec<_> = conf.limits.iter().map(|limit| (limit.identity, limit.mode)).collect();
        assert_eq!(read, [(Identity::Global, LimitMode::Leased), (Identity::Function, LimitMode::Exact)]);
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        let in_second = |from: &str, to: &str| format!("{LIMIT}{}", LIMIT.replace(from, to));
        for (server, limits, told) in [
            ("\n[listen]\nport = 1", String::new(), "server.toml:3: listen.port unknown field `port`"),
            ("[listen]\naddress = \"x\"", String::new(), "server.toml:2: listen.address "),
            ("\n\nx", String::new(), "server.toml:3: "),
            (
                "[http]\nkeepalive_s = 1\ncors_origins = [\"a.example\"]",
                String::new(),
                "server.toml:3: http.cors_origins \"a.example\" has no scheme",
            ),
            ("[nothing]", String::new(), "server.toml:1: nothing unknown field `nothing`"),
            (
                "[memory]\naudit_rows_max = 0",
                String::new(),
                "server.toml:2: memory.audit_rows_max must be at least 1",
            ),
            ("", "[batch]\n\nsends_max = 0".into(), "limits.toml:3: batch.sends_max must be at least 1"),
            ("", "[batch]\nlinger_ms = \"x\"".into(), "limits.toml:2: batch.linger_ms invalid type"),
            (
                "",
                "[batch]\nqueue_jobs_max = 9999999".into(),
                "limits.toml:2: batch.queue_jobs_max must be at most",
            ),
            ("", in_second("rate = 1", "rate = 0"), "limits.toml:13: limit[1].rate must be at least 1"),
            ("", in_second("rate = 1\n", ""), "limits.toml:9: limit[1] missing field `rate`"),
            ("", in_second("\"a\"", "\"a b\""), "limits.toml:10: limit[1].name must be"),
            ("", in_second("\"key\"", "\"user\""), "limits.toml:11: limit[1].identity unknown variant"),
            ("", limit("a b", "ip", "/run", 1), "limits.toml:2: limit[0].name must be 1 to 64"),
            (
                "",
                limit("a", "function", "/upload", 1),
                "limits.toml:4: limit[0].routes may be \"/run\" alone",
            ),
            ("", limit("a", "ip", "/run", u32::MAX), "limits.toml:7: limit[0].burst is too large"),
            ("", LIMIT.replace("[\"/run\"]", "[]"), "limits.toml:4: limit[0].routes must name a route"),
            (
                "",
                "[waits]\njob_deadline_s = 7".into(),
                "limits.toml:2: waits.job_deadline_s must be at least 8",
            ),
            (
                "",
                "[waits]\nsync_max_s = 86401".into(),
                "limits.toml:2: waits.sync_max_s must be at most 86400",
            ),
            (
                "[memory]\naudit_bytes_max = 1",
                String::new(),
                "server.toml:2: memory.audit_bytes_max must be at least",
            ),
            (
                "",
                [limit("a", "ip", "/run", 1), limit("a", "key", "/run", 1)].concat(),
                "limits.toml:10: limit[1].name stands for another limit",
            ),
        ] {
            let error = load(server, &limits).expect_err(told).to_string();
            assert!(error.starts_with(told), "{error:?} is not {told:?}");
        }
        let both = load("x", "y").unwrap_err();
        assert_eq!(both.0.len(), 2, "{both}");
        let limits = ConfText { name: "limits.toml".into(), text: Ok(Some(LIMIT.into())) };
        let texts = ConfTexts { limits, ..ConfTexts::none() };
        let error = Conf::of(&texts).unwrap().check_routes(&texts, |_| false, |_| false).unwrap_err();
        assert_eq!(
            error.0,
            ["limits.toml:4: limit[0].routes (limit a): there is no route \"/run\" that asks for a key"]
        );
    }

    /// Whatever stands in a file, it makes settings that can be used, or it is told what is wrong with which file.
    #[test]
    fn fuzz_conf_files() {
        crate::fuzz::run("conf", |input| {
            let Ok(text) = std::str::from_utf8(input) else { return };
            for n in 0..4 {
                let mut texts = ConfTexts::none();
                let file = match n {
                    0 => &mut texts.server,
                    1 => &mut texts.limits,
                    2 => &mut texts.keys,
                    _ => &mut texts.upstreams,
                };
                file.text = Ok(Some(text.to_owned()));
                let name = file.name.clone();
                match Conf::of(&texts) {
                    Ok(conf) => {
                        assert!(conf.limits.iter().all(LimitConf::is_countable));
                        assert!(conf.http.connections_max > 0 && conf.batch.sends_max > 0);
                        assert!(ConfPart::ALL.iter().all(|part| texts.lost_since(*part, &texts).is_none()));
                    }
                    Err(ConfigError(problems)) => {
                        assert!(problems.iter().all(|problem| problem.starts_with(&name)), "{problems:?}");
                        assert!(!problems.is_empty());
                    }
                }
            }
        });
    }
}
