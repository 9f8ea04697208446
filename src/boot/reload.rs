//! Reloads the settings while the process runs: the files of `--conf`, and the files that they name.
//!
//! The files are read four times a second, and on SIGHUP. Notifications of the kernel (inotify) were
//! rejected: they miss changes on network file systems, and behind a symbolic link that is switched, as
//! Kubernetes does, they watch the wrong file. Reading a few kilobytes costs nothing.
//!
//! A change is applied only after two equal reads, because a half-written file can be valid and mean
//! something else: a `limits.toml` cut off after its first lines has no limits.
//!
//! Each file is applied by itself, unless it depends on another one (see [`ConfReload`]). A file that is not
//! valid is rejected, and its previous contents stay in force. Waits and sends in flight keep the settings
//! that they started with.

use super::notify;
use super::signals::ReloadSignals;
use crate::api;
use crate::config::{
    API_KEY_BYTES_MAX, BatchConf, CHANGES, Conf, ConfFiles, ConfPart, ConfReload, ConfTexts, ConfigError,
    FileReader, Identity, Live, OverloadConf, WaitsConf, WorkerConf,
};
use crate::functions::FunctionCache;
use crate::gateway::{self, GatewaySettings};
use crate::limiter::RateLimiter;
use crate::metrics::ConfMetrics;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{MissedTickBehavior, interval};

const READ_EVERY: Duration = Duration::from_millis(250);
/// Deadline for reading a file. A file that hangs delays the others once, and not again while it hangs.
const READ_MAX: Duration = Duration::from_secs(2);
/// The same deadline at start, when no settings are in force yet.
const FIRST_READ_MAX: Duration = Duration::from_secs(5);
/// Pause between the reads of a changed file, and most reads. A file that keeps changing is rejected.
const SETTLE_PAUSE: Duration = Duration::from_millis(50);
const SETTLE_TRIES: usize = 10;

/// The source of the settings, and what overrides them. Used at start, by `check`, and for each reload.
#[derive(Clone, Debug)]
pub struct ConfSource {
    /// `--conf`
    pub dir: Option<PathBuf>,
    /// Which of its files this command reads.
    pub files: ConfFiles,
    /// `RATE_LIMIT`: requests a minute of limits with the identity `key`.
    pub a_minute: Option<u32>,
    /// `--listen`
    pub listen: Option<IpAddr>,
    /// Length of the master key in bytes. It must fit into the header of a request. 0: not known yet.
    pub master_key_bytes: usize,
    /// `MAX_OUTPUT_SIZE`: replaces `output.bytes_max`.
    pub output_bytes_max: Option<usize>,
}

/// Least size of a request header without its key, in bytes: the request line and a few short fields.
const HEADER_BYTES_BESIDE_KEY: usize = 256;

impl ConfSource {
    /// Reads the files and parses them.
    pub fn load(&self) -> Result<(ConfTexts, Conf), ConfigError> {
        let texts = self.read(&mut FileReader::new(FIRST_READ_MAX), None);
        let conf = self.make(&texts)?;
        Ok((texts, conf))
    }

    /// Problems of the directory that do not prevent the start: files that are not known.
    pub fn warnings(&self) -> Vec<String> {
        self.dir.as_deref().map(ConfTexts::unknown_files).unwrap_or_default()
    }

    fn read(&self, reader: &mut FileReader, in_force: Option<&ConfTexts>) -> ConfTexts {
        let read = |dir| ConfTexts::read(reader, dir, self.files, in_force);
        self.dir.as_deref().map_or_else(ConfTexts::none, read)
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
        if let Some(bytes_max) = self.output_bytes_max {
            conf.worker.output.bytes_max = bytes_max;
        }
        self.check_master_key(texts, &conf)?;
        Ok(conf)
    }

    /// Rejects a master key that is too long for a request.
    pub fn check_master_key(&self, texts: &ConfTexts, conf: &Conf) -> Result<(), ConfigError> {
        let length = self.master_key_bytes;
        if length > API_KEY_BYTES_MAX {
            let problem =
                format!("INFRA_API_KEY has {length} bytes; take one of {API_KEY_BYTES_MAX} at most");
            return Err(ConfigError(vec![problem]));
        }
        let needed = length + HEADER_BYTES_BESIDE_KEY;
        if length > 0 && needed > conf.http.header_bytes_max {
            let problem = format!("must be at least {needed}: INFRA_API_KEY has {length} bytes");
            return Err(texts.of_server("http.header_bytes_max", &problem));
        }
        Ok(())
    }
}

/// The modules of a node that receive new settings.
pub struct ReloadTargets {
    pub edge: GatewaySettings,
    pub waits: Live<WaitsConf>,
    pub batch: Live<BatchConf>,
    pub overload: Live<OverloadConf>,
    pub functions: FunctionCache,
    pub limiter: RateLimiter,
    /// The worker in this process, if there is one.
    pub worker: Option<Live<WorkerConf>>,
}

impl ReloadTargets {
    pub fn set(&self, conf: &Conf) {
        self.waits.set(conf.waits.clone());
        self.batch.set(conf.batch.clone());
        self.overload.set(conf.overload.clone());
        self.functions.set_conf(&conf.cache);
        self.limiter.set_conf(&conf.limits, &conf.keys);
        self.edge.set_conf(conf);
        if let Some(worker) = &self.worker {
            worker.set(conf.worker.clone());
        }
    }
}

/// The reload loop.
pub struct Reload {
    source: ConfSource,
    hangups: ReloadSignals,
    /// Hands new settings to the modules that use them.
    set: Box<dyn Fn(&Conf) + Send + Sync>,
    metrics: ConfMetrics,
    /// `None` while a read is in progress.
    reader: Option<FileReader>,
    in_force: Conf,
    /// The texts from which `in_force` was parsed.
    texts: Arc<ConfTexts>,
    /// The texts that were last applied or rejected. Each outcome is reported once.
    dealt_with: ConfTexts,
    refused: BTreeMap<ConfPart, Vec<String>>,
}

impl Reload {
    pub fn new(
        source: ConfSource,
        hangups: ReloadSignals,
        (texts, conf): (ConfTexts, Conf),
        set: impl Fn(&Conf) + Send + Sync + 'static,
        metrics: ConfMetrics,
    ) -> Self {
        metrics.applied_at.set(now_s());
        for part in source.files.parts() {
            for result in [APPLIED, REFUSED] {
                metrics.reloads.with_label_values(&[part.name(), result]);
            }
        }
        let (set, dealt_with, refused) = (Box::new(set), texts.clone(), BTreeMap::new());
        let texts = Arc::new(texts);
        Self { source, hangups, set, metrics, reader: None, in_force: conf, texts, dealt_with, refused }
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
                        self.take(read, false);
                    }
                }
                () = self.hangups.next() => {
                    notify::reloading();
                    if self.source.dir.is_some() {
                        let read = self.read_settled().await;
                        self.take(read, true);
                    } else {
                        tracing::info!("Nothing to reload: this process was started without --conf");
                    }
                    notify::ready();
                }
            }
        }
    }

    /// Reads the files on a blocking thread, because a disk may be slow.
    async fn read(&mut self) -> ConfTexts {
        let mut reader = self.reader.take().unwrap_or_else(|| FileReader::new(READ_MAX));
        let (source, in_force) = (self.source.clone(), Arc::clone(&self.texts));
        let read = tokio::task::spawn_blocking(move || (source.read(&mut reader, Some(&in_force)), reader));
        match read.await {
            Ok((texts, reader)) => {
                self.reader = Some(reader);
                texts
            }
            Err(error) => {
                tracing::error!(%error, "Configuration not read, internal error; the settings in force stay");
                self.dealt_with.clone()
            }
        }
    }

    /// Reads until two reads are equal. Parts that keep changing are marked as not usable.
    async fn read_settled(&mut self) -> ConfTexts {
        let mut last = self.read().await;
        for n in 1.. {
            tokio::time::sleep(SETTLE_PAUSE).await;
            let mut again = self.read().await;
            if again == last {
                break;
            }
            if n >= SETTLE_TRIES {
                let changed = ConfPart::ALL.map(|part| (part, !again.is_same(part, &last)));
                for (part, _) in changed.into_iter().filter(|(_, is_changed)| *is_changed) {
                    again.refuse(part, CHANGES);
                }
                return again;
            }
            last = again;
        }
        last
    }

    /// Applies what is valid. `is_asked`: SIGHUP asked for it, so repeated rejections are reported again.
    fn take(&mut self, read: ConfTexts, is_asked: bool) {
        let before = (ConfTexts::clone(&self.texts), self.in_force.clone());
        let ConfReload { texts, conf, refused } =
            ConfReload::new(before, &read, |texts| self.source.make(texts));
        let mut applied = Vec::new();
        for part in ConfPart::ALL {
            let is_new = !read.is_same(part, &self.dealt_with);
            match refused.get(&part) {
                Some(problems) if is_new || is_asked || self.refused.get(&part) != Some(problems) => {
                    for problem in problems {
                        tracing::error!(file = part.name(), problem, "Configuration Refused");
                    }
                    self.metrics.reloads.with_label_values(&[part.name(), REFUSED]).inc();
                }
                // Also if the file is back to the contents in force.
                None if is_new || !texts.is_same(part, &self.texts) => applied.push(part),
                _ => {}
            }
        }
        if is_asked && applied.is_empty() && refused.is_empty() {
            tracing::info!("Configuration Unchanged");
        }
        (self.dealt_with, self.refused) = (read, refused);
        if !applied.is_empty() {
            self.apply(texts, conf, &applied);
        }
    }

    fn apply(&mut self, texts: ConfTexts, conf: Conf, parts: &[ConfPart]) {
        let Differences { mut live, at_start_only } = Differences::new(&self.in_force, &conf);
        if !at_start_only.is_empty() {
            tracing::warn!(changes = at_start_only.join(", "), "Restart Needed");
        }
        for part in [ConfPart::Certificate, ConfPart::ClientCa] {
            if !texts.is_same(part, &self.texts) {
                live.insert(part, vec!["(changed)".to_owned()]);
            }
        }
        (self.set)(&conf);
        (self.in_force, self.texts) = (conf, Arc::new(texts));
        self.metrics.applied_at.set(now_s());
        for part in parts {
            self.metrics.reloads.with_label_values(&[part.name(), APPLIED]).inc();
            let changes = live.remove(part).unwrap_or_default().join(", ");
            tracing::info!(file = part.name(), changes, "Configuration Applied");
        }
    }
}

/// Values of the label `result`.
const APPLIED: &str = "applied";
const REFUSED: &str = "refused";

fn now_s() -> i64 {
    i64::try_from(crate::model::now_ms() / 1000).unwrap_or(i64::MAX)
}

/// The settings that differ, each as `waits.sync_max_s 290 → 60`.
#[derive(Debug, Default, PartialEq)]
struct Differences {
    /// Settings that apply while the process runs, by their file.
    live: BTreeMap<ConfPart, Vec<String>>,
    at_start_only: Vec<String>,
}

impl Differences {
    fn new(before: &Conf, after: &Conf) -> Self {
        let (before, after) = (settings(before), settings(after));
        let paths = before.keys().chain(after.keys().filter(|path| !before.contains_key(*path)));
        let shown = |value: Option<&String>| value.map_or("(none)", String::as_str).to_owned();
        let mut all = Self::default();
        for path in paths.filter(|path| before.get(*path) != after.get(*path)) {
            let change = if path.contains(".add_headers") {
                "(changed)".to_owned() // the value may be a password
            } else {
                format!("{} → {}", shown(before.get(path)), shown(after.get(path)))
            };
            let changes = match live_part(path) {
                Some(part) => all.live.entry(part).or_default(),
                None => &mut all.at_start_only,
            };
            changes.push(format!("{path} {change}"));
        }
        all
    }
}

/// The file of a setting that applies while the process runs. `None`: it is read at start only.
fn live_part(path: &str) -> Option<ConfPart> {
    match path.split('.').next().unwrap_or_default() {
        "limit" | "waits" | "batch" | "cache" | "overload" => Some(ConfPart::Limits),
        "key" => Some(ConfPart::Keys),
        "upstream" => Some(ConfPart::Upstreams),
        "http" | "auth" => Some(ConfPart::Server),
        section => WorkerConf::is_live(section).then_some(ConfPart::Worker),
    }
}

/// All settings by path. Elements of a list are identified by their names.
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
    use crate::config::SandboxMode;

    #[test]
    fn differences_are_named() {
        let before = Conf::shipped().unwrap();
        let mut after = before.clone();
        assert_eq!(Differences::new(&before, &after), Differences::default());
        after.waits.sync_max_s = 60;
        after.limits[0].burst = 5;
        after.shutdown.drain_timeout_s = 7;
        after.auth.failures_burst = 61;
        after.worker.warm.idle_s = 9;
        after.worker.sandbox.mode = Some(SandboxMode::Off);
        let Differences { live, at_start_only } = Differences::new(&before, &after);
        assert_eq!(live[&ConfPart::Limits], ["limit.api-key.burst 3000 → 5", "waits.sync_max_s 290 → 60"]);
        assert_eq!(live[&ConfPart::Server], ["auth.failures_burst 60 → 61"]);
        assert_eq!(live[&ConfPart::Worker], ["warm.idle_s 300 → 9"]);
        let at_start = ["shutdown.drain_timeout_s 30 → 7", "sandbox.mode (none) → \"off\""];
        assert_eq!((live.len(), at_start_only), (3, at_start.map(str::to_owned).to_vec()));
        after = before.clone();
        after.limits.clear();
        let Differences { live, .. } = Differences::new(&before, &after);
        assert!(live[&ConfPart::Limits].contains(&"limit.api-key.rate 3000 → (none)".to_owned()), "{live:?}");
    }
}
