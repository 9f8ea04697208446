//! The files of `conf/` as they are on the disk: their contents, or why they cannot be used.

use super::error::ConfigError;
use super::line::line_of;
use super::reader::{self, FileError, FileReader};
use super::secret::Secret;
use std::path::Path;
use toml::Table;

/// A part of the settings that is read, compared, rejected and applied as a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ConfPart {
    Server,
    /// `certificate` and `key` of `[tls]`.
    Certificate,
    /// `client_ca` of `[tls]`.
    ClientCa,
    Limits,
    Keys,
    Upstreams,
    Worker,
}

impl ConfPart {
    pub const ALL: [Self; 7] = [
        Self::Server,
        Self::Certificate,
        Self::ClientCa,
        Self::Limits,
        Self::Keys,
        Self::Upstreams,
        Self::Worker,
    ];

    /// Its name in logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Server => "server.toml",
            Self::Certificate => "certificate",
            Self::ClientCa => "client_ca",
            Self::Limits => "limits.toml",
            Self::Keys => "keys.toml",
            Self::Upstreams => "upstreams.toml",
            Self::Worker => "worker.toml",
        }
    }
}

/// The files that a command reads. The others are not opened, so a mistake in them does not concern it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfFiles {
    /// All but `worker.toml`: `serve`.
    Gateway,
    /// `worker.toml` only: `worker`.
    Worker,
    /// All: `dev`.
    All,
}

impl ConfFiles {
    /// The parts of the settings that are in these files.
    pub fn parts(self) -> impl Iterator<Item = ConfPart> {
        ConfPart::ALL.into_iter().filter(move |part| match self {
            Self::Gateway => *part != ConfPart::Worker,
            Self::Worker => *part == ConfPart::Worker,
            Self::All => true,
        })
    }
}

/// All files, each with its text or the reason why it has none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfTexts {
    pub(super) server: ConfText,
    pub(super) limits: ConfText,
    pub(super) keys: ConfText,
    pub(super) upstreams: ConfText,
    pub(super) worker: ConfText,
    pub(super) certificate: Result<Option<CertificateText>, Vec<String>>,
    pub(super) client_ca: Result<Option<String>, Vec<String>>,
}

/// Maximum number of entries of the directory to examine, and of unknown files to report.
const ENTRIES_MAX: usize = 1_000;
const UNKNOWN_MAX: usize = 10;

/// The problem of a file without settings.
const EMPTY: &str = "the file is empty";

/// One file. `Ok(None)`: it does not exist. `Err`: its problem, as a complete message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ConfText {
    pub name: String,
    pub text: Result<Option<String>, String>,
}

/// A certificate and its key, in PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateText {
    pub certificate: String,
    pub key: Secret,
}

/// The contents of the files that `[tls]` of `server.toml` names, in PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsTexts {
    pub own: CertificateText,
    pub client_ca: Option<String>,
}

impl ConfText {
    fn none(name: &str) -> Self {
        Self { name: name.to_owned(), text: Ok(None) }
    }

    fn read(reader: &mut FileReader, dir: &Path, name: &str) -> Self {
        let path = dir.join(name);
        let name = path.display().to_string();
        let read = reader.read(&path).and_then(|bytes| bytes.map(reader::text).transpose());
        let text = read.map(|text| text.map(with_open_lists)).map_err(|e| match e {
            FileError::NoDirectory => format!("--conf {}: no such directory", dir.display()),
            FileError::Unusable(problem) => format!("{name}: {problem}"),
        });
        Self { name, text }
    }

    /// Its contents. `None`: there is no file, or it is not TOML.
    fn tables(&self) -> Option<Table> {
        self.text.as_ref().ok()?.as_deref()?.parse().ok()
    }

    /// The message for a problem of the setting at `path`, with its line if the file contains it.
    pub fn problem(&self, path: &str, problem: &str) -> String {
        let text = self.text.as_ref().ok().and_then(Option::as_deref);
        match text.and_then(|text| line_of(text, path)) {
            Some(line) => format!("{}:{line}: {path} {problem}", self.name),
            None => format!("{}: {path} {problem}", self.name),
        }
    }

    /// Why a change looks like an accident: the file has vanished or become empty, as it is briefly while it
    /// is written.
    fn lost_since(&self, before: &Self) -> Option<&'static str> {
        match (&before.text, &self.text) {
            (Ok(Some(_)), Ok(None)) => Some("the file has vanished"),
            _ => {
                let (before, now) = (before.tables()?, self.tables()?);
                (now.is_empty() && !before.is_empty()).then_some(EMPTY)
            }
        }
    }

    /// Whether a `limits.toml` contains limits. If it does not exist, the shipped one is used, which does.
    fn has_limits(&self) -> bool {
        self.tables().is_none_or(|tables| {
            tables.get("limit").and_then(toml::Value::as_array).is_some_and(|limits| !limits.is_empty())
        })
    }
}

impl ConfTexts {
    /// The state without any file.
    pub fn none() -> Self {
        Self {
            server: ConfText::none("conf/server.toml"),
            limits: ConfText::none("conf/limits.toml"),
            keys: ConfText::none("conf/keys.toml"),
            upstreams: ConfText::none("conf/upstreams.toml"),
            worker: ConfText::none("conf/worker.toml"),
            certificate: Ok(None),
            client_ca: Ok(None),
        }
    }

    /// Reads `files` of `dir`, and those that `[tls]` names. The shipped settings stand for a file that is
    /// not read or does not exist. If `server.toml` cannot be read, the certificates are read from the paths
    /// in `in_force`.
    pub fn read(reader: &mut FileReader, dir: &Path, files: ConfFiles, in_force: Option<&Self>) -> Self {
        let mut texts = Self::none();
        let mut read = |name: &str| ConfText::read(reader, dir, name);
        if files != ConfFiles::Gateway {
            texts.worker = read("worker.toml");
        }
        if files == ConfFiles::Worker {
            return texts;
        }
        (texts.keys, texts.limits) = (read("keys.toml"), read("limits.toml"));
        (texts.server, texts.upstreams) = (read("server.toml"), read("upstreams.toml"));
        let names = texts.server.tables().or_else(|| in_force.and_then(|texts| texts.server.tables()));
        let mut pem = PemReader { reader, dir, server: &texts.server, tls: names.as_ref().and_then(tls_of) };
        let (certificate, client_ca) = (pem.certificate(), pem.client_ca());
        Self { certificate, client_ca, ..texts }
    }

    /// Warnings about `.toml` files in `dir` that are not read, such as a misspelled `limit.toml`. Empty if
    /// the directory cannot be listed.
    pub fn unknown_files(dir: &Path) -> Vec<String> {
        let known = ["server.toml", "limits.toml", "keys.toml", "upstreams.toml", "worker.toml"];
        let entries = std::fs::read_dir(dir).into_iter().flatten().take(ENTRIES_MAX).flatten();
        let mut unknown: Vec<String> = entries
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| name.to_ascii_lowercase().ends_with(".toml") && !known.contains(&name.as_str()))
            .collect();
        unknown.sort();
        unknown.truncate(UNKNOWN_MAX);
        let warning = |name: String| {
            format!(
                "{}: this file is not read. Files of settings are {}",
                dir.join(name).display(),
                known.join(", ")
            )
        };
        unknown.into_iter().map(warning).collect()
    }

    /// The error for a problem of a setting in `server.toml`.
    pub fn of_server(&self, setting: &str, problem: &str) -> ConfigError {
        ConfigError(vec![self.server.problem(setting, problem)])
    }

    /// The files that `[tls]` names. `None`: it names none, or they cannot be read.
    pub(super) fn tls(&self) -> Option<TlsTexts> {
        let own = self.certificate.clone().ok()??;
        Some(TlsTexts { own, client_ca: self.client_ca.clone().ok()? })
    }

    /// Whether the file of a part exists and is TOML.
    pub(super) fn has_tables(&self, part: ConfPart) -> bool {
        self.file(part).is_some_and(|file| file.tables().is_some())
    }

    /// Whether `[tls]` of `server.toml` is the same in both.
    pub(super) fn has_same_tls(&self, other: &Self) -> bool {
        let tls = |texts: &Self| texts.server.tables().as_ref().and_then(tls_of).cloned();
        tls(self) == tls(other)
    }

    /// Whether a part is the same in both.
    pub fn is_same(&self, part: ConfPart, other: &Self) -> bool {
        match part {
            ConfPart::Server => self.server == other.server,
            ConfPart::Certificate => self.certificate == other.certificate,
            ConfPart::ClientCa => self.client_ca == other.client_ca,
            ConfPart::Limits => self.limits == other.limits,
            ConfPart::Keys => self.keys == other.keys,
            ConfPart::Upstreams => self.upstreams == other.upstreams,
            ConfPart::Worker => self.worker == other.worker,
        }
    }

    /// These files, with one part of `other`.
    pub(super) fn with(mut self, part: ConfPart, other: &Self) -> Self {
        match part {
            ConfPart::Server => self.server = other.server.clone(),
            ConfPart::Certificate => self.certificate = other.certificate.clone(),
            ConfPart::ClientCa => self.client_ca = other.client_ca.clone(),
            ConfPart::Limits => self.limits = other.limits.clone(),
            ConfPart::Keys => self.keys = other.keys.clone(),
            ConfPart::Upstreams => self.upstreams = other.upstreams.clone(),
            ConfPart::Worker => self.worker = other.worker.clone(),
        }
        self
    }

    /// Marks a part as unusable. `problem` is appended to its name.
    pub fn refuse(&mut self, part: ConfPart, problem: &str) {
        match part {
            ConfPart::Certificate => {
                self.certificate = Err(vec![self.server.problem("tls.certificate", problem)]);
            }
            ConfPart::ClientCa => self.client_ca = Err(vec![self.server.problem("tls.client_ca", problem)]),
            ConfPart::Server => self.server.text = Err(format!("{}: {problem}", self.server.name)),
            ConfPart::Limits => self.limits.text = Err(format!("{}: {problem}", self.limits.name)),
            ConfPart::Keys => self.keys.text = Err(format!("{}: {problem}", self.keys.name)),
            ConfPart::Upstreams => self.upstreams.text = Err(format!("{}: {problem}", self.upstreams.name)),
            ConfPart::Worker => self.worker.text = Err(format!("{}: {problem}", self.worker.name)),
        }
    }

    /// The name of the file of a part in messages.
    pub(super) fn name(&self, part: ConfPart) -> &str {
        self.file(part).map_or(part.name(), |file| &file.name)
    }

    /// Why a part cannot be read. Empty if it can.
    pub(super) fn problems(&self, part: ConfPart) -> Vec<String> {
        let of_file = |file: &ConfText| file.text.clone().err().into_iter().collect();
        match part {
            ConfPart::Certificate => self.certificate.clone().err().unwrap_or_default(),
            ConfPart::ClientCa => self.client_ca.clone().err().unwrap_or_default(),
            _ => self.file(part).map(of_file).unwrap_or_default(),
        }
    }

    /// Why a change of a part looks like an accident; see [`ConfText::lost_since`]. The removal of all limits
    /// does as well, unless the file contains `limit = []`.
    pub(super) fn lost_since(&self, part: ConfPart, before: &Self) -> Option<String> {
        let (now, before) = self.file(part).zip(before.file(part))?;
        let lifts_all = || {
            let is_silent = now.tables().is_some_and(|tables| !tables.contains_key("limit"));
            let lifts = part == ConfPart::Limits && is_silent && before.has_limits();
            lifts.then_some("no limit is left; to remove all limits, write `limit = []`")
        };
        let problem = now.lost_since(before).or_else(lifts_all)?;
        let mend = match part {
            ConfPart::Keys if problem == EMPTY => "; to remove all keys, write `key = []`",
            ConfPart::Upstreams if problem == EMPTY => "; to remove all upstreams, write `upstream = []`",
            _ => "",
        };
        Some(format!("{}: {problem}{mend}", now.name))
    }

    fn file(&self, part: ConfPart) -> Option<&ConfText> {
        match part {
            ConfPart::Server => Some(&self.server),
            ConfPart::Limits => Some(&self.limits),
            ConfPart::Keys => Some(&self.keys),
            ConfPart::Upstreams => Some(&self.upstreams),
            ConfPart::Worker => Some(&self.worker),
            ConfPart::Certificate | ConfPart::ClientCa => None,
        }
    }
}

/// The lists of tables in all files.
const LISTS: [&str; 3] = ["key", "limit", "upstream"];

/// Removes an empty list (`key = []`) if blocks of that list (`[[key]]`) follow, which TOML does not allow.
/// An operator who appends the output of `key new` to such a file wants the key. The list is replaced by
/// blanks, so that lines and columns stay the same.
fn with_open_lists(text: String) -> String {
    if text.parse::<Table>().is_ok() {
        return text;
    }
    let is_element = |line: &str, name: &str| {
        let inner = line.trim_start().strip_prefix("[[").and_then(|rest| rest.split_once("]]"));
        inner.is_some_and(|(inner, _)| inner.trim() == name)
    };
    let is_no_list = |line: &str, name: &str| {
        let value = line.trim_start().strip_prefix(name).and_then(|rest| rest.trim_start().strip_prefix('='));
        let value = value.map(|value| value.split('#').next().unwrap_or_default());
        value.is_some_and(|value| value.split_whitespace().collect::<String>() == "[]")
    };
    let grown: Vec<&str> =
        LISTS.into_iter().filter(|name| text.lines().any(|line| is_element(line, name))).collect();
    let gives_way = |line: &str| grown.iter().any(|name| is_no_list(line, name));
    let open: String = text
        .split_inclusive('\n')
        .map(|line| {
            if !gives_way(line) {
                return line.to_owned();
            }
            let end = line.trim_end_matches(['\r', '\n']).len();
            " ".repeat(end) + &line[end..]
        })
        .collect();
    // Other mistakes are reported for the original text.
    if open.parse::<Table>().is_ok() { open } else { text }
}

/// The text of a file of PEM blocks. Text around the blocks is ignored in any encoding (RFC 7468), and so are
/// blanks around lines. `Err`: the problem, as text to append to the name of the file.
fn pem_text(bytes: Vec<u8>) -> Result<String, FileError> {
    if reader::is_utf16(&bytes) {
        return Err(FileError::Unusable("is UTF-16; save it as ASCII or UTF-8".to_owned()));
    }
    let text = String::from_utf8_lossy(&bytes);
    // DER and PKCS #12 begin with an ASN.1 SEQUENCE.
    if bytes.first() == Some(&0x30) && !text.contains("-----BEGIN ") {
        return Err(FileError::Unusable(
            "is DER or PKCS #12 and must be PEM; convert it: openssl x509 (or pkey) -inform DER -in FILE, or \
             openssl pkcs12 -nodes -in FILE"
                .to_owned(),
        ));
    }
    let is_around = |c: char| c.is_whitespace() || c == reader::BYTE_ORDER_MARK;
    Ok(text.split(['\n', '\r']).map(|line| line.trim_matches(is_around)).collect::<Vec<_>>().join("\n"))
}

fn tls_of(server: &Table) -> Option<&Table> {
    server.get("tls")?.as_table()
}

/// Reads the files that `[tls]` names, relative to the directory of `server.toml`. Problems of `[tls]` itself
/// are reported when the settings are parsed.
struct PemReader<'a> {
    reader: &'a mut FileReader,
    dir: &'a Path,
    server: &'a ConfText,
    tls: Option<&'a Table>,
}

impl PemReader<'_> {
    fn certificate(&mut self) -> Result<Option<CertificateText>, Vec<String>> {
        let (certificate, key) = (self.read("certificate"), self.read("key"));
        match (certificate, key) {
            (Ok(certificate), Ok(key)) => Ok(certificate
                .zip(key)
                .map(|(certificate, key)| CertificateText { certificate, key: Secret::new(key) })),
            (certificate, key) => Err(certificate.err().into_iter().chain(key.err()).flatten().collect()),
        }
    }

    fn client_ca(&mut self) -> Result<Option<String>, Vec<String>> {
        self.read("client_ca")
    }

    fn read(&mut self, setting: &str) -> Result<Option<String>, Vec<String>> {
        let name = self.tls.and_then(|tls| tls.get(setting)).and_then(toml::Value::as_str);
        let Some(name) = name else { return Ok(None) };
        let path = self.dir.join(name);
        let absent = || FileError::Unusable("does not exist".to_owned());
        let read = self.reader.read(&path).and_then(|bytes| bytes.ok_or_else(absent)).and_then(pem_text);
        let problem = |e| self.server.problem(&format!("tls.{setting}"), &format!("{}: {e}", path.display()));
        read.map(Some).map_err(|e| vec![problem(e)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_list_is_removed_before_its_blocks() {
        for (text, expected) in [
            ("key = []\n[[key]]\nname = \"a\"\n", "        \n[[key]]\nname = \"a\"\n"),
            ("# keys\nkey=[ ] # none\r\n\n[[key]]\na = 1", "# keys\n              \r\n\n[[key]]\na = 1"),
            ("upstream = []\n[[ upstream ]]\na = 1", "             \n[[ upstream ]]\na = 1"),
            // Unchanged.
            ("key = []\n", "key = []\n"),
            ("key = []\nlimit = []\n[[upstream]]\na = 1", "key = []\nlimit = []\n[[upstream]]\na = 1"),
            ("key = [1]\n[[key]]\n", "key = [1]\n[[key]]\n"),
            ("key = []\n[[key]]\nname =\n", "key = []\n[[key]]\nname =\n"),
            ("", ""),
        ] {
            assert_eq!(with_open_lists(text.to_owned()), expected, "{text:?}");
        }
    }

    #[test]
    fn unknown_toml_files_cause_warnings() {
        let dir = tempfile::tempdir().unwrap();
        for name in [
            "server.toml",
            "limits.toml",
            "limit.toml",
            "Keys.toml",
            "key.pem",
            "upstreams.toml.bak",
            "worker.toml",
        ] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let warnings = ConfTexts::unknown_files(dir.path());
        assert_eq!(warnings.len(), 2, "{warnings:?}");
        assert!(warnings[0].contains("/Keys.toml: this file is not read"), "{warnings:?}");
        assert!(warnings[1].contains("/limit.toml: this file is not read"), "{warnings:?}");
        for n in 0..2 * UNKNOWN_MAX {
            std::fs::write(dir.path().join(format!("{n}.toml")), "").unwrap();
        }
        assert_eq!(ConfTexts::unknown_files(dir.path()).len(), UNKNOWN_MAX);
        assert!(ConfTexts::unknown_files(&dir.path().join("gone")).is_empty());
    }
}
