//! `conf/`: `server.toml` and `limits.toml`.
//!
//! The shipped files are compiled in and are the defaults, so "built-in" and "shipped" cannot differ. A file
//! that an operator writes may leave out any key; a key nobody knows is an error, not a typo that waits.

use super::ConfigError;
use crate::backend::Quota;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use std::path::Path;
use std::time::Duration;
use toml::Table;

const SERVER_SHIPPED: &str = include_str!("../../conf/server.toml");
const LIMITS_SHIPPED: &str = include_str!("../../conf/limits.toml");

/// All of `conf/`.
#[derive(Clone, Debug, PartialEq)]
pub struct Conf {
    pub listen: ListenConf,
    pub http: HttpConf,
    pub start: StartConf,
    pub shutdown: ShutdownConf,
    pub memory: MemoryConf,
    pub metrics: MetricsConf,
    pub limits: Vec<LimitConf>,
    pub waits: WaitsConf,
    pub batch: BatchConf,
    pub cache: CacheConf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ServerFile {
    listen: ListenConf,
    http: HttpConf,
    start: StartConf,
    shutdown: ShutdownConf,
    memory: MemoryConf,
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
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListenConf {
    pub address: std::net::IpAddr,
    pub threads: usize,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HttpConf {
    pub keepalive_s: u64,
    pub body_timeout_s: u64,
    pub upload_timeout_s: u64,
    pub drain_body_timeout_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StartConf {
    pub deadline_s: u64,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShutdownConf {
    pub lame_duck_ms: u64,
    pub drain_timeout_s: u64,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryConf {
    pub jobs_in_flight_max: usize,
    pub audit_rows_max: usize,
    pub audit_bytes_max: usize,
    pub settled_bytes_max: usize,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MetricsConf {
    pub function_labels_max: usize,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LimitConf {
    pub name: String,
    pub identity: Identity,
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Identity {
    Key,
    Ip,
}

/// What a limit does while Redis is away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnRedisLoss {
    /// Counts in this process.
    Local,
    /// Refuses.
    Closed,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WaitsConf {
    pub sync_default_s: u64,
    pub sync_max_s: u64,
    pub status_max_s: u64,
    pub job_deadline_s: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BatchConf {
    pub linger_ms: u64,
    pub sends_eager: usize,
    pub sends_max: usize,
    pub queue_jobs_max: usize,
    pub send_deadline_ms: u64,
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CacheConf {
    pub functions_max: u64,
    pub function_ttl_ms: u64,
    pub function_backstop_s: u64,
}

impl Conf {
    /// The shipped `conf/`.
    pub fn shipped() -> Result<Self, ConfigError> {
        Self::from_texts(("conf/server.toml", None), ("conf/limits.toml", None))
    }

    /// Reads `server.toml` and `limits.toml` of `dir`; a file that is not there is the shipped one.
    pub fn load(dir: &Path) -> Result<Self, ConfigError> {
        if !dir.is_dir() {
            return Err(ConfigError(vec![format!("--conf {}: no such directory", dir.display())]));
        }
        let read = |name: &str| {
            let path = dir.join(name);
            match std::fs::read_to_string(&path) {
                Ok(text) => Ok((path.display().to_string(), Some(text))),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok((path.display().to_string(), None)),
                Err(e) => Err(ConfigError(vec![format!("{}: cannot be read: {e}", path.display())])),
            }
        };
        let (server, limits) = (read("server.toml")?, read("limits.toml")?);
        Self::from_texts((&server.0, server.1.as_deref()), (&limits.0, limits.1.as_deref()))
    }

    /// Each file as (name for messages, text if there is a file).
    fn from_texts(server: (&str, Option<&str>), limits: (&str, Option<&str>)) -> Result<Self, ConfigError> {
        let mut problems = Vec::new();
        let server = collect(&mut problems, merged::<ServerFile>(SERVER_SHIPPED, server));
        let limits = collect(&mut problems, merged::<LimitsFile>(LIMITS_SHIPPED, limits));
        let (Some(s), Some(l)) = (server, limits) else { return Err(ConfigError(problems)) };
        let conf = Self {
            listen: s.listen,
            http: s.http,
            start: s.start,
            shutdown: s.shutdown,
            memory: s.memory,
            metrics: s.metrics,
            limits: l.limit,
            waits: l.waits,
            batch: l.batch,
            cache: l.cache,
        };
        let problems = conf.problems();
        if problems.is_empty() { Ok(conf) } else { Err(ConfigError(problems)) }
    }

    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut at_least_one = |name: &str, value: u64| {
            if value == 0 {
                problems.push(format!("conf: {name} must be at least 1"));
            }
        };
        at_least_one("http.body_timeout_s", self.http.body_timeout_s);
        at_least_one("http.upload_timeout_s", self.http.upload_timeout_s);
        at_least_one("start.deadline_s", self.start.deadline_s);
        at_least_one("memory.jobs_in_flight_max", self.memory.jobs_in_flight_max as u64);
        at_least_one("memory.audit_rows_max", self.memory.audit_rows_max as u64);
        at_least_one("memory.audit_bytes_max", self.memory.audit_bytes_max as u64);
        at_least_one("batch.sends_eager", self.batch.sends_eager as u64);
        at_least_one("batch.sends_max", self.batch.sends_max as u64);
        at_least_one("batch.queue_jobs_max", self.batch.queue_jobs_max as u64);
        at_least_one("batch.send_deadline_ms", self.batch.send_deadline_ms);
        at_least_one("cache.functions_max", self.cache.functions_max);
        at_least_one("cache.function_backstop_s", self.cache.function_backstop_s);
        for limit in &self.limits {
            at_least_one(&format!("limit {}: rate", limit.name), limit.rate.into());
            at_least_one(&format!("limit {}: burst", limit.name), limit.burst.into());
            at_least_one(&format!("limit {}: period_s", limit.name), limit.period_s);
        }
        for limit in &self.limits {
            // The name goes into a header field and a Redis key.
            let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
            if limit.name.is_empty() || limit.name.len() > 64 || !limit.name.bytes().all(plain) {
                problems.push(format!("conf: limit name {:?} must be 1 to 64 of [A-Za-z0-9._-]", limit.name));
            }
        }
        problems
    }
}

fn collect<T>(problems: &mut Vec<String>, read: Result<T, String>) -> Option<T> {
    read.map_err(|problem| problems.push(problem)).ok()
}

/// The operator's file over the shipped one, table by table. `[[limit]]` is taken whole: a list cannot be merged,
/// so a file without limits has none.
fn merged<T: DeserializeOwned>(shipped: &str, (name, text): (&str, Option<&str>)) -> Result<T, String> {
    let mut all: Table = shipped.parse().map_err(|e| format!("shipped configuration: {e}"))?;
    let own: Table = text.unwrap_or_default().parse().map_err(|e: toml::de::Error| format!("{name}: {e}"))?;
    if text.is_some() {
        all.remove("limit");
    }
    for (key, value) in own {
        match (all.get_mut(&key), value) {
            (Some(toml::Value::Table(base)), toml::Value::Table(over)) => base.extend(over),
            (_, value) => {
                all.insert(key, value);
            }
        }
    }
    all.try_into().map_err(|e: toml::de::Error| format!("{name}: {}", e.message()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(server: &str, limits: &str) -> Result<Conf, ConfigError> {
        Conf::from_texts(("server.toml", Some(server)), ("limits.toml", Some(limits)))
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

    #[test]
    fn what_is_wrong_is_named() {
        for (server, limits, told) in [
            ("[listen]\nport = 1", "", "server.toml: unknown field `port`"),
            ("[listen]\naddress = \"x\"", "", "server.toml: "),
            ("x", "", "server.toml: TOML parse error at line 1"),
            ("", "[batch]\nsends_max = 0", "batch.sends_max must be at least 1"),
            ("", "[[limit]]\nname = \"a\"", "limits.toml: missing field"),
        ] {
            let error = load(server, limits).expect_err(told).to_string();
            assert!(error.contains(told), "{error:?} does not say {told:?}");
        }
        let both = load("x", "y").unwrap_err();
        assert_eq!(both.0.len(), 2, "{both}");
    }
}
