//! A function as the metadata table knows it, and the sums kept beside it.

use super::Recommendation;
use sha2::{Digest, Sha256};
use std::fmt;
use std::fmt::Write;
use std::sync::Arc;

/// The name a function is stored and called by: 1–128 of `[A-Za-z0-9._-]`, the first a letter or digit.
///
/// Cheap to clone: it is copied into the in-flight table, the log row and the metrics of every run.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FunctionId(Arc<str>);

impl FunctionId {
    /// Longest id, in characters (all of them ASCII).
    pub const LEN_MAX: usize = 128;

    /// `None` if `raw` is not a function id.
    pub fn parse(raw: &str) -> Option<Self> {
        let bytes = raw.as_bytes();
        let (first, _) = bytes.split_first()?;
        let fits = bytes.len() <= Self::LEN_MAX
            && first.is_ascii_alphanumeric()
            && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(b));
        fits.then(|| Self(raw.into()))
    }

    /// The id as text.
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
    /// `python`, `nodejs`, `cpp` or `go`; older items may hold anything, and it is passed on as it is.
    pub runtime: String,
    pub memory_mb: u64,
    /// Most jobs in flight, on all nodes together; 0: no cap.
    pub max_concurrency: u64,
    /// Where the code lies in the bucket (or the local store).
    pub s3_key: String,
    /// File name the code was uploaded under.
    pub original_name: String,
    /// RFC 3339, as stored.
    pub uploaded_at: String,
    /// RFC 3339, as stored; empty if the function was never changed.
    pub updated_at: String,
    /// A JSON object, as text, ready to be copied into a message. Always valid JSON of one object.
    pub env_vars: String,
    /// Grows by one with every change; 0 on items the old controller wrote.
    pub version: u64,
    pub counters: Counters,
    /// The newest advice of a worker about the function's size.
    pub recommendation: Option<Recommendation>,
}

impl Function {
    pub const RUNTIME_DEFAULT: &'static str = "python";
    pub const MEMORY_MB_DEFAULT: u64 = 128;

    /// The entity tag of the function as clients see it: another one after every change of what they see.
    ///
    /// The version alone would not do: the old controller changes functions without counting it up.
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
        let mut tag = format!("\"{}-", self.version);
        for byte in &hash.finalize()[..6] {
            let _ = write!(tag, "{byte:02x}");
        }
        tag + "\""
    }

    /// `text` if it is a JSON object, else `{}`: an old item may hold anything in `envVars`.
    pub fn env_vars_or_empty(text: &str) -> String {
        let object: Result<&serde_json::value::RawValue, _> = serde_json::from_str(text);
        match object {
            Ok(raw) if raw.get().starts_with('{') => raw.get().to_owned(),
            _ => "{}".to_owned(),
        }
    }
}

/// What the runs of one function add up to. Durations are in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Counters {
    pub invocations: u64,
    /// Those that did not end in SUCCESS; counted since this controller is in charge.
    pub errors: u64,
    pub total_duration_ms: f64,
    /// Runs whose worker reported the handler's own time.
    pub handler_invocations: u64,
    pub total_handler_duration_ms: f64,
}

#[cfg(test)]
impl Function {
    /// Some function, for tests.
    pub fn sample(id: &str) -> Self {
        Self {
            id: FunctionId::parse(id).expect("a test names functions well"),
            name: format!("the {id}"),
            description: "a test".to_owned(),
            runtime: "python".to_owned(),
            memory_mb: 256,
            max_concurrency: 0,
            s3_key: format!("functions/{id}/a.zip"),
            original_name: "code.zip".to_owned(),
            uploaded_at: "2026-01-02T03:04:05.678Z".to_owned(),
            updated_at: String::new(),
            env_vars: "{}".to_owned(),
            version: 1,
            counters: Counters::default(),
            recommendation: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn function_ids() {
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
    fn a_tag_changes_with_what_is_seen_and_with_nothing_else() {
        let f = Function::sample("f");
        let tag = f.tag();
        assert!(tag.starts_with("\"1-") && tag.ends_with('"') && tag.len() == 16, "{tag}");
        let counted = Function { counters: Counters { invocations: 1, ..f.counters }, ..f.clone() };
        assert_eq!(counted.tag(), tag);
        for changed in [
            Function { memory_mb: 512, ..f.clone() },
            Function { max_concurrency: 1, ..f.clone() },
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
