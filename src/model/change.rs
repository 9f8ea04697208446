//! Changes to a function, and the record each leaves.

use super::{Function, FunctionId, RowKey, UnixMs};
use serde_json::{Value, json};

/// How long the record of a change is kept, in seconds: 400 days.
const CHANGE_TTL_S: u64 = 400 * 24 * 3600;

/// What was done to a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigAction {
    Create,
    Update,
    /// An update to what the auto-tuner recommended.
    Apply,
    Delete,
}

impl ConfigAction {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Create => "CREATE",
            Self::Update => "UPDATE",
            Self::Apply => "AUTO_TUNE",
            Self::Delete => "DELETE",
        }
    }
}

/// Who changed what, and when. The values of environment variables may be secrets, so only their names are in it.
#[derive(Clone, Debug, PartialEq)]
pub struct ConfigRecord {
    pub function: FunctionId,
    /// Unique within a function: time and version.
    pub key: String,
    pub at: UnixMs,
    pub action: ConfigAction,
    /// The name of the API key.
    pub by: String,
    /// JSON objects, as text; `null` where there was, or is, no function.
    pub before: String,
    pub after: String,
    pub expires_at_s: u64,
}

impl ConfigRecord {
    pub fn new(
        action: ConfigAction,
        by: &str,
        at: UnixMs,
        before: Option<&Function>,
        after: Option<&Function>,
    ) -> Option<Self> {
        let function = after.or(before)?;
        // A deletion is a change of its own, and may come in the millisecond of the one before.
        let version = if after.is_some() { function.version } else { function.version + 1 };
        Some(Self {
            function: function.id.clone(),
            key: RowKey::at(at, version.into()).as_str().to_owned(),
            at,
            action,
            by: by.to_owned(),
            before: shown(before).to_string(),
            after: shown(after).to_string(),
            expires_at_s: at / 1000 + CHANGE_TTL_S,
        })
    }
}

fn shown(function: Option<&Function>) -> Value {
    let Some(f) = function else { return Value::Null };
    let env: serde_json::Map<String, Value> = serde_json::from_str(&f.env_vars).unwrap_or_default();
    json!({
        "name": f.name, "description": f.description, "runtime": f.runtime, "memoryMb": f.memory_mb, "maxConcurrency": f.max_concurrency,
        "s3Key": f.s3_key, "version": f.version, "envVars": env.keys().collect::<Vec<_>>(),
    })
}

/// Code that nothing points to any more, or not yet: deleted when it is due, unless its function points to it then.
///
/// Queued jobs carry the key of their code, so code is due only after the queue has forgotten every message that
/// was sent while it was current.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetiredCode {
    pub s3_key: String,
    pub function: FunctionId,
    pub due: UnixMs,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_shows_no_value_of_a_variable() {
        let function = Function { env_vars: r#"{"TOKEN":"hunter2"}"#.into(), ..Function::sample("f") };
        let record =
            ConfigRecord::new(ConfigAction::Create, "master", 1_795_305_600_123, None, Some(&function))
                .unwrap();
        assert_eq!(record.before, "null");
        assert!(record.after.contains("TOKEN") && !record.after.contains("hunter2"), "{}", record.after);
        assert_eq!(record.key, format!("2026-11-22T00:00:00.123{:025}Z", function.version));
        let deleted =
            ConfigRecord::new(ConfigAction::Delete, "master", record.at, Some(&function), None).unwrap();
        assert_ne!(deleted.key, record.key);
        assert_eq!(ConfigRecord::new(ConfigAction::Delete, "master", 0, None, None), None);
    }
}
