//! Changes of functions: their audit records, and the code that a change leaves behind.

use super::time::UnixMs;
use super::{Function, FunctionId, Handler, RowKey};
use serde_json::{Value, json};

/// How long a change record is kept, in seconds: 400 days.
const CHANGE_TTL_S: u64 = 400 * 24 * 3600;

/// The kind of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConfigAction {
    Create,
    Update,
    /// An update to the recommendation of the auto-tuner.
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

/// The audit record of one change. It contains only the names of environment variables, because their values
/// may be secrets.
#[derive(Clone, Debug, PartialEq)]
pub struct ConfigRecord {
    pub function: FunctionId,
    /// Time and version of the change; unique within a function.
    pub key: String,
    pub at: UnixMs,
    pub action: ConfigAction,
    /// The name of the API key.
    pub by: String,
    /// The function before the change, a JSON object as text; `null` if there was none.
    pub before: String,
    /// The function after the change, a JSON object as text; `null` if it was deleted.
    pub after: String,
    /// When the record may be deleted, in Unix seconds.
    pub expires_at_s: u64,
}

impl ConfigRecord {
    /// Creates the record of a change from `before` to `after`. `by` is the name of the API key that made it.
    /// Returns `None` if there is no function on either side.
    pub fn new(
        action: ConfigAction,
        by: &str,
        at: UnixMs,
        before: Option<&Function>,
        after: Option<&Function>,
    ) -> Option<Self> {
        let function = after.or(before)?;
        // A deletion does not increment the stored version. Its key must differ from that of a change in the
        // same millisecond.
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
        "name": f.name, "description": f.description, "runtime": f.runtime, "memoryMb": f.memory_mb,
        "maxConcurrency": f.max_concurrency, "handler": f.handler.as_ref().map(Handler::as_str),
        "s3Key": f.s3_key, "version": f.version, "envVars": env.keys().collect::<Vec<_>>(),
    })
}

/// Code that its function no longer uses, or does not use yet. It is deleted when it is due, unless its
/// function uses it then.
///
/// Queued jobs contain the key of their code. So replaced code is due only after the queue has expired every
/// message that was sent while the code was current.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RetiredCode {
    pub s3_key: String,
    pub function: FunctionId,
    /// The earliest time at which it may be deleted.
    pub due: UnixMs,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_hides_the_values_of_variables() {
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
        assert!(record.after.contains("\"handler\":null"), "{}", record.after);
        let with_handler = Function { handler: Handler::parse("main.handler"), ..function };
        assert!(shown(Some(&with_handler)).to_string().contains("\"handler\":\"main.handler\""));
        assert_eq!(ConfigRecord::new(ConfigAction::Delete, "master", 0, None, None), None);
    }
}
