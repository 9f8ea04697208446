//! The files of a `conf/` as they stand on the disk.

use super::place::line_of;
use super::{ConfigError, Secret};
use std::io;
use std::path::Path;
use toml::Table;

/// All files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfTexts {
    pub(super) server: ConfText,
    pub(super) limits: ConfText,
    pub(super) keys: ConfText,
    pub(super) upstreams: ConfText,
    pub(super) tls: Option<TlsTexts>,
}

/// One file; `text` is `None` if it is not there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ConfText {
    pub name: String,
    pub text: Option<String>,
}

/// What `[tls]` of `server.toml` names, in PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsTexts {
    pub certificate: String,
    pub key: Secret,
    pub client_ca: Option<String>,
}

impl ConfText {
    fn none(name: &str) -> Self {
        Self { name: name.to_owned(), text: None }
    }

    /// What stands in it; nothing if it cannot be read. `None`: there is no file.
    fn tables(&self) -> Option<Table> {
        self.text.as_deref().map(|text| text.parse().unwrap_or_default())
    }

    /// Whether it sets limits, as a `limits.toml`; if there is no file the shipped one does.
    fn has_limits(&self) -> bool {
        self.tables().is_none_or(|tables| {
            tables.get("limit").and_then(toml::Value::as_array).is_some_and(|limits| !limits.is_empty())
        })
    }

    /// A problem with the setting at `path`, with its line if the file names it.
    pub fn problem(&self, path: &str, problem: &str) -> String {
        let line = self.text.as_deref().and_then(|text| line_of(text, path));
        match line {
            Some(line) => format!("{}:{line}: {path} {problem}", self.name),
            None => format!("{}: {path} {problem}", self.name),
        }
    }
}

impl ConfTexts {
    /// No files.
    pub fn none() -> Self {
        Self {
            server: ConfText::none("conf/server.toml"),
            limits: ConfText::none("conf/limits.toml"),
            keys: ConfText::none("conf/keys.toml"),
            upstreams: ConfText::none("conf/upstreams.toml"),
            tls: None,
        }
    }

    /// Reads the files of `dir`, and what they name; a file that is not there is the shipped one.
    pub fn read(dir: &Path) -> Result<Self, ConfigError> {
        if !dir.is_dir() {
            return Err(ConfigError(vec![format!("--conf {}: no such directory", dir.display())]));
        }
        let read = |name: &str| {
            let path = dir.join(name);
            let name = path.display().to_string();
            match std::fs::read_to_string(&path) {
                Ok(text) => Ok(ConfText { name, text: Some(text) }),
                Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(ConfText { name, text: None }),
                Err(e) => Err(ConfigError(vec![format!("{name}: cannot be read: {e}")])),
            }
        };
        let server = read("server.toml")?;
        let tls = TlsTexts::read(dir, &server)?;
        Ok(Self {
            server,
            limits: read("limits.toml")?,
            keys: read("keys.toml")?,
            upstreams: read("upstreams.toml")?,
            tls,
        })
    }

    /// A problem with a setting of `server.toml`.
    pub fn of_server(&self, setting: &str, problem: &str) -> ConfigError {
        ConfigError(vec![self.server.problem(setting, problem)])
    }

    /// What nobody means by a change: files that were there before and are gone or empty, and limits that are all
    /// lifted though the file does not say so. A file is so for a moment while it is written.
    pub fn lost_since(&self, before: &Self) -> Vec<String> {
        let files = [
            (&before.server, &self.server),
            (&before.limits, &self.limits),
            (&before.keys, &self.keys),
            (&before.upstreams, &self.upstreams),
        ];
        let lost = files.into_iter().filter_map(|(before, now)| {
            let problem = match (before.tables(), now.tables()) {
                (Some(_), None) => "the file is gone",
                (Some(before), Some(now)) if now.is_empty() && !before.is_empty() => "the file is empty",
                _ => return None,
            };
            Some(format!("{}: {problem}", now.name))
        });
        let lost: Vec<String> = lost.collect();
        let lifts_all = self.limits.tables().is_some_and(|now| !now.contains_key("limit"));
        if lost.is_empty() && lifts_all && before.limits.has_limits() {
            let problem = "no limit is left; to lift them all, say `limit = []`";
            return vec![format!("{}: {problem}", self.limits.name)];
        }
        lost
    }
}

impl TlsTexts {
    /// Reads what `server.toml` names, relative to its directory. What is wrong with `[tls]` itself is told when the
    /// settings are made of it.
    fn read(dir: &Path, server: &ConfText) -> Result<Option<Self>, ConfigError> {
        let tables = server.tables().unwrap_or_default();
        let Some(tls) = tables.get("tls").and_then(toml::Value::as_table) else { return Ok(None) };
        let mut problems = Vec::new();
        let mut read = |setting: &str| {
            let path = dir.join(tls.get(setting)?.as_str()?);
            let text = std::fs::read_to_string(&path);
            let problem = |e| server.problem(&format!("tls.{setting}"), &format!("{}: {e}", path.display()));
            text.map_err(|e| problems.push(problem(e))).ok()
        };
        let (certificate, key, client_ca) = (read("certificate"), read("key"), read("client_ca"));
        if !problems.is_empty() {
            return Err(ConfigError(problems));
        }
        Ok(certificate.zip(key).map(|(certificate, key)| Self {
            certificate,
            key: Secret::new(key),
            client_ca,
        }))
    }
}
