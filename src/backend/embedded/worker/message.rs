//! What the local worker reads of a queue message (CONTRACT §3).

use crate::model::JobId;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use std::collections::BTreeMap;

/// Longest input passed in the environment, in bytes; Linux takes 128 KiB in one variable, name and all.
pub(super) const ENV_INPUT_BYTES_MAX: usize = 100 * 1024;

/// The only programs a function finds without naming a path.
const PATH: &str = "/usr/local/bin:/usr/bin:/bin";

/// The gateway writes every member, so all are required: one that is absent is a message gone bad.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Message<'a> {
    pub(super) runtime: String,
    pub(super) memory_mb: u64,
    pub(super) s3_key: String,
    pub(super) timeout_ms: u64,
    #[serde(borrow)]
    pub(super) input: &'a RawValue,
    model_id: String,
    env_vars: BTreeMap<String, Value>,
}

impl<'a> Message<'a> {
    /// The error says where, never what: a message holds the user's data.
    pub(super) fn parse(message: &'a [u8]) -> Result<Self, String> {
        serde_json::from_slice(message).map_err(|e| {
            format!("the message of the job cannot be read (line {}, column {})", e.line(), e.column())
        })
    }

    /// The memory of a message's function, in MiB; 0 if it cannot be read, since then nothing runs.
    pub(super) fn memory_mb_of(message: &[u8]) -> u64 {
        Message::parse(message).map_or(0, |message| message.memory_mb)
    }

    /// Whether the input is too long for a variable and goes by a file.
    pub(super) fn input_by_file(&self) -> bool {
        self.input.get().len() > ENV_INPUT_BYTES_MAX
    }

    /// The whole environment of the run; `home` is its private directory, `input_file` where a long input lies.
    /// A function may change where programs and files are looked for, but not what was asked of it.
    pub(super) fn environment(
        &self,
        id: JobId,
        function: &str,
        home: &str,
        input_file: &str,
    ) -> Result<BTreeMap<String, String>, String> {
        let mut env: BTreeMap<String, String> =
            [("PATH", PATH), ("HOME", home), ("TMPDIR", home)].map(|(k, v)| (k.into(), v.into())).into();
        if self.runtime == "python" {
            // What it keeps back to write at once is lost when it is killed.
            env.insert("PYTHONUNBUFFERED".into(), "1".into());
        }
        for (name, value) in &self.env_vars {
            let value = match value {
                Value::Null => continue,
                Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
                return Err("envVars holds a name or a value that no environment can hold".into());
            }
            env.insert(name.clone(), value);
        }
        let id = id.to_string();
        let payload = match self.input_by_file() {
            true => ("PAYLOAD_FILE", input_file),
            false => ("PAYLOAD", self.input.get()),
        };
        // One of the two stands for certain, and never the function's own.
        env.remove("PAYLOAD");
        env.remove("PAYLOAD_FILE");
        let asked = [payload, ("MODEL_ID", &*self.model_id), ("REQUEST_ID", &*id), ("FUNCTION_ID", function)];
        if self.model_id.contains('\0') {
            return Err("modelId holds a character that no environment can hold".into());
        }
        env.extend(asked.map(|(k, v)| (k.to_owned(), v.to_owned())));
        Ok(env)
    }
}
