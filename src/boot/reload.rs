//! New settings while the process runs: the files of `--conf` and those that they name, watched and read again on SIGHUP.
//!
//! Watched by reading it four times a second. Notifications of the kernel (inotify) were rejected: they miss files on a
//! network, and behind a link that is moved, as Kubernetes does, they tell of the wrong file; to read a few kilobytes costs
//! nothing. What changed counts once it was read the same twice, since a file that is half written can be valid and
//! mean something else: a `limits.toml` cut off after its first lines has no limits.
//!
//! What cannot be used is refused as a whole, and what was in force stays. A wait or a send that has begun ends as it
//! began.

use super::signals::Hangups;
use crate::api;
use crate::config::{BatchConf, Conf, ConfTexts, ConfigError, Identity, Live, OverloadConf, WaitsConf};
use crate::functions::Functions;
use crate::gateway::{self, Edge};
use crate::limiter::RateLimiter;
use crate::metrics::Metrics;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{MissedTickBehavior, interval};

const READ_EVERY: Duration = Duration::from_millis(250);
/// What has changed is read until it was the same twice, or so often: then as it was last.
const SETTLE_PAUSE: Duration = Duration::from_millis(50);
const SETTLE_TRIES: usize = 10;

/// Where the settings come from, and what goes before them: one way for the start, for `check`, and for later.
#[derive(Clone, Debug)]
pub struct ConfSource {
    /// `--conf`
    pub dir: Option<PathBuf>,
    /// `RATE_LIMIT`: requests a minute of limits with the identity `key`.
    pub a_minute: Option<u32>,
    /// `--listen`
    pub listen: Option<IpAddr>,
}

impl ConfSource {
    /// The files, read and made settings of.
    pub fn load(&self) -> Result<(ConfTexts, Conf), ConfigError> {
        let texts = self.read()?;
        let conf = self.make(&texts)?;
        Ok((texts, conf))
    }

    fn read(&self) -> Result<ConfTexts, ConfigError> {
        self.dir.as_deref().map_or_else(|| Ok(ConfTexts::none()), ConfTexts::read)
    }

    fn make(&self, texts: &ConfTexts) -> Result<Conf, ConfigError> {
        let mut conf = Conf::of(texts)?;
        conf.check_routes(texts, api::is_local, |route| {
            api::patterns_with_key().any(|pattern| pattern == route)
        })?;
        gateway::tls_of(&conf).map_err(|(setting, problem)| texts.of_server(setting, &problem))?;
        if let Some(a_minute) = self.a_minute {
            for limit in conf.limits.iter_mut().filter(|limit| limit.identity == Identity::Key) {
                (limit.rate, limit.burst, limit.period_s) = (a_minute, a_minute, 60);
                if !limit.is_countable() {
                    return Err(ConfigError(vec![format!("RATE_LIMIT is too large: {a_minute}")]));
                }
            }
        }
        if let Some(listen) = self.listen {
            conf.listen.address = listen;
        }
        Ok(conf)
    }
}

/// Those who are told of new settings.
pub struct Targets {
    pub edge: Edge,
    pub waits: Live<WaitsConf>,
    pub batch: Live<BatchConf>,
    pub overload: Live<OverloadConf>,
    pub functions: Functions,
    pub limiter: RateLimiter,
}

impl Targets {
    fn set(&self, conf: &Conf) {
        self.waits.set(conf.waits.clone());
        self.batch.set(conf.batch.clone());
        self.overload.set(conf.overload.clone());
        self.functions.set_conf(&conf.cache);
        self.limiter.set_conf(&conf.limits, &conf.keys);
        self.edge.set_conf(conf);
    }
}

/// The loop.
pub struct Reload {
    source: ConfSource,
    hangups: Hangups,
    targets: Targets,
    metrics: Arc<Metrics>,
    in_force: Conf,
    /// What `in_force` was made of.
    texts: ConfTexts,
    /// What was applied or refused last: each is told once.
    dealt_with: Read,
}

type Read = Result<ConfTexts, ConfigError>;

impl Reload {
    pub fn new(
        source: ConfSource,
        hangups: Hangups,
        (texts, conf): (ConfTexts, Conf),
        targets: Targets,
        metrics: Arc<Metrics>,
    ) -> Self {
        metrics.conf_applied_at.set(now_s());
        let dealt_with = Ok(texts.clone());
        Self { source, hangups, targets, metrics, in_force: conf, texts, dealt_with }
    }

    pub async fn run(mut self) {
        let mut tick = interval(READ_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tick.tick(), if self.source.dir.is_some() => {
                    if self.read().await == self.dealt_with {
                        continue;
                    }
                    let read = self.read_settled().await;
                    if read != self.dealt_with {
                        self.take(&read);
                    }
                }
                () = self.hangups.next() => {
                    if self.source.dir.is_some() {
                        let read = self.read_settled().await;
                        self.take(&read);
                    } else {
                        tracing::info!("Nothing To Reload: There Is No --conf");
                    }
                }
            }
        }
    }

    /// Not on the runtime's own threads: a disk may be slow.
    async fn read(&self) -> Read {
        let source = self.source.clone();
        let read = tokio::task::spawn_blocking(move || source.read()).await;
        read.unwrap_or_else(|e| Err(ConfigError(vec![format!("the configuration cannot be read: {e}")])))
    }

    /// The same twice, or as it was last if it goes on changing.
    async fn read_settled(&self) -> Read {
        let mut last = self.read().await;
        for _ in 0..SETTLE_TRIES {
            tokio::time::sleep(SETTLE_PAUSE).await;
            let again = self.read().await;
            if again == last {
                break;
            }
            last = again;
        }
        last
    }

    fn take(&mut self, read: &Read) {
        self.dealt_with = read.clone();
        let made = read.as_ref().map_err(Clone::clone).and_then(|texts| {
            // First: what is no TOML seems to be empty.
            let conf = self.source.make(texts)?;
            let lost = texts.lost_since(&self.texts);
            if lost.is_empty() { Ok((texts.clone(), conf)) } else { Err(ConfigError(lost)) }
        });
        match made {
            Ok((texts, conf)) => {
                self.texts = texts;
                self.apply(conf);
            }
            Err(ConfigError(problems)) => {
                for problem in problems {
                    tracing::error!(problem, "Configuration Refused");
                }
                self.metrics.conf_refused.inc();
            }
        }
    }

    fn apply(&mut self, conf: Conf) {
        let (changes, at_start_only) = differences(&self.in_force, &conf);
        if !at_start_only.is_empty() {
            tracing::warn!(changes = at_start_only.join(", "), "Restart Needed");
        }
        self.targets.set(&conf);
        self.in_force = conf;
        self.metrics.conf_applied.inc();
        self.metrics.conf_applied_at.set(now_s());
        tracing::info!(changes = changes.join(", "), "Configuration Applied");
    }
}

fn now_s() -> i64 {
    i64::try_from(crate::model::now_ms() / 1000).unwrap_or(i64::MAX)
}

/// What differs, as `waits.sync_max_s 290 → 60`: what changes while the process runs, and what is read at start only.
fn differences(before: &Conf, after: &Conf) -> (Vec<String>, Vec<String>) {
    const LIVE: [&str; 9] =
        ["limit", "waits", "batch", "cache", "overload", "key", "upstream", "http", "auth"];
    let (before, after) = (settings(before), settings(after));
    let paths = before.keys().chain(after.keys().filter(|path| !before.contains_key(*path)));
    let shown = |value: Option<&String>| value.map_or("(none)", String::as_str).to_owned();
    let changed = paths.filter(|path| before.get(*path) != after.get(*path));
    let told = changed.map(|path| {
        if path.contains(".add_headers") {
            return format!("{path} (changed)"); // an upstream may want a password
        }
        format!("{path} {} → {}", shown(before.get(path)), shown(after.get(path)))
    });
    told.partition(|told| LIVE.contains(&told.split(['.', ' ']).next().unwrap_or_default()))
}

/// Every setting by its path; limits by their name.
fn settings(conf: &Conf) -> BTreeMap<String, String> {
    fn put(all: &mut BTreeMap<String, String>, path: &str, value: &toml::Value) {
        match value {
            toml::Value::Table(table) => {
                for (name, value) in table {
                    let separator = if path.is_empty() { "" } else { "." };
                    put(all, &format!("{path}{separator}{name}"), value);
                }
            }
            toml::Value::Array(list) if list.iter().any(toml::Value::is_table) => {
                for value in list {
                    let name = value.get("name").and_then(toml::Value::as_str).unwrap_or_default();
                    put(all, &format!("{path}.{name}"), value);
                }
            }
            value => {
                all.insert(path.to_owned(), value.to_string());
            }
        }
    }
    let mut all = BTreeMap::new();
    if let Ok(value) = toml::Value::try_from(conf) {
        put(&mut all, "", &value);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_named() {
        let before = Conf::shipped().unwrap();
        let mut after = before.clone();
        assert_eq!(differences(&before, &after), (vec![], vec![]));
        after.waits.sync_max_s = 60;
        after.limits[0].burst = 5;
        after.shutdown.drain_timeout_s = 7;
        let (live, at_start) = differences(&before, &after);
        assert_eq!(live, ["limit.api-key.burst 3000 → 5", "waits.sync_max_s 290 → 60"]);
        assert_eq!(at_start, ["shutdown.drain_timeout_s 30 → 7"]);
        after = before.clone();
        after.limits.clear();
        let (live, _) = differences(&before, &after);
        assert!(live.contains(&"limit.api-key.rate 3000 → (none)".to_owned()), "{live:?}");
    }
}
