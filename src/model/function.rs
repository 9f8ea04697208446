//! The metadata of a function, as stored in the function table, and the counters of its runs.

use super::{Handler, Recommendation};
use sha2::{Digest, Sha256};
use std::fmt;
use std::fmt::Write;
use std::sync::Arc;

/// The id of a function: 1–128 characters of `[A-Za-z0-9._-]`, the first one a letter or a digit.
///
/// Cheap to clone, because every run copies it into the in-flight table, the log row and the metrics.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FunctionId(Arc<str>);

impl FunctionId {
    /// Maximum length of an id, in bytes; all its characters are ASCII.
    pub const LEN_MAX: usize = 128;

    /// Returns `None` if `raw` is not a valid function id.
    pub fn parse(raw: &str) -> Option<Self> {
        let bytes = raw.as_bytes();
        let (first, _) = bytes.split_first()?;
        let fits = bytes.len() <= Self::LEN_MAX
            && first.is_ascii_alphanumeric()
            && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(b));
        fits.then(|| Self(raw.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for FunctionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for FunctionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// One item of the function table.
#[derive(Clone, Debug, PartialEq)]
pub struct Function {
    pub id: FunctionId,
    pub name: String,
    pub description: String,
    /// `python`, `nodejs`, `cpp` or `go`. Older items may have any other text, which workers receive
    /// unchanged.
    pub runtime: String,
    /// In MiB.
    pub memory_mb: u64,
    /// Maximum number of jobs in flight on all nodes together; 0: no cap.
    pub max_concurrency: u64,
    /// What workers call for each run. `None` is script mode: they start the entry file as a program.
    pub handler: Option<Handler>,
    /// The key of the code in the bucket, or in the local store.
    pub s3_key: String,
    /// The file name of the uploaded code.
    pub original_name: String,
    /// RFC 3339, as stored.
    pub uploaded_at: String,
    /// RFC 3339, as stored; empty if the function was never changed.
    pub updated_at: String,
    /// The environment variables: always one valid JSON object, as text that is copied into messages.
    pub env_vars: String,
    /// Incremented by each change; 0 for items of the old controller.
    pub version: u64,
    pub counters: FunctionCounters,
    /// The newest recommendation of a worker for the memory of the function.
    pub recommendation: Option<Recommendation>,
}

impl Function {
    pub const RUNTIME_DEFAULT: &'static str = "python";
    pub const MEMORY_MB_DEFAULT: u64 = 128;

    /// The entity tag of the function: a quoted strong tag that differs after every change that clients can
    /// see.
    ///
    /// The version alone is not sufficient, because the old controller changes functions without
    /// incrementing it.
    pub fn tag(&self) -> String {
        let mut hash = Sha256::new();
        for part in
            [&self.name, &self.description, &self.runtime, &self.s3_key, &self.uploaded_at, &self.updated_at]
        {
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part);
        }
        hash.update(self.memory_mb.to_be_bytes());
        if self.max_concurrency > 0 {
            hash.update(self.max_concurrency.to_be_bytes());
        }
        if let Some(handler) = &self.handler {
            hash.update((handler.as_str().len() as u64).to_be_bytes());
            hash.update(handler.as_str());
        }
        let mut tag = format!("\"{}-", self.version);
        for byte in &hash.finalize()[..6] {
            let _ = write!(tag, "{byte:02x}");
        }
        tag + "\""
    }

    /// Returns `text` if it is a JSON object, otherwise `{}`. The `envVars` of an old item may be any text.
    pub fn env_vars_or_empty(text: &str) -> String {
        let object: Result<&serde_json::value::RawValue, _> = serde_json::from_str(text);
        match object {
            Ok(raw) if raw.get().starts_with('{') => raw.get().to_owned(),
            _ => "{}".to_owned(),
        }
    }
}

/// The totals of all runs of one function. Durations are in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct FunctionCounters {
    pub invocations: u64,
    /// Runs that did not end with SUCCESS. The old controller did not count them.
    pub errors: u64,
    pub total_duration_ms: f64,
    /// Runs whose worker reported the time in the handler.
    pub handler_invocations: u64,
    pub total_handler_duration_ms: f64,
    /// Runs whose worker reported a cold start.
    pub cold_starts: u64,
}

#[cfg(test)]
impl Function {
    /// A function for tests.
    pub fn sample(id: &str) -> Self {
        Self {
            id: FunctionId::parse(id).expect("a valid function id"),
            name: format!("the {id}"),
            description: "a test".to_owned(),
            runtime: "python".to_owned(),
            memory_mb: 256,
            max_concurrency: 0,
            handler: None,
            s3_key: format!("functions/{id}/a.zip"),
            original_name: "code.zip".to_owned(),
            uploaded_at: "2026-01-02T03:04:05.678Z".to_owned(),
            updated_at: String::new(),
            env_vars: "{}".to_owned(),
            version: 1,
            counters: FunctionCounters::default(),
            recommendation: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_valid_function_ids_are_parsed() {
        let long = "a".repeat(128);
        for good in ["a", "0", "func-123", "A.b_c-d", long.as_str()] {
            assert_eq!(FunctionId::parse(good).expect(good).as_str(), good);
        }
        let too_long = "a".repeat(129);
        for bad in ["", "-a", ".a", "..", "a/b", "a b", "ä", "a\0", "config#a", too_long.as_str()] {
            assert_eq!(FunctionId::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_tag_changes_exactly_with_visible_properties() {
        let f = Function::sample("f");
        let tag = f.tag();
        assert!(tag.starts_with("\"1-") && tag.ends_with('"') && tag.len() == 16, "{tag}");
        let counted = Function { counters: FunctionCounters { invocations: 1, ..f.counters }, ..f.clone() };
        assert_eq!(counted.tag(), tag);
        for changed in [
            Function { memory_mb: 512, ..f.clone() },
            Function { max_concurrency: 1, ..f.clone() },
            Function { handler: Handler::parse("main.handler"), ..f.clone() },
            Function { description: String::new(), ..f.clone() },
            Function { version: 2, ..f.clone() },
            Function { updated_at: "x".into(), ..f.clone() },
        ] {
            assert_ne!(changed.tag(), tag, "{changed:?}");
        }
    }

    #[test]
    fn env_vars_are_always_an_object() {
        for (stored, used) in [
            ("{\"A\":\"1\"}", "{\"A\":\"1\"}"),
            (" {} ", "{}"),
            ("", "{}"),
            ("[1]", "{}"),
            ("{", "{}"),
            ("null", "{}"),
        ] {
            assert_eq!(Function::env_vars_or_empty(stored), used, "{stored:?}");
        }
    }
}
