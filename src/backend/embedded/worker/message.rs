//! The members of a queue message that the local worker reads, and the environment that they define.

use crate::model::JobId;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use std::collections::BTreeMap;

/// Longest input in the environment, in bytes. Linux allows 128 KiB for one variable, including its name.
pub(super) const ENV_INPUT_BYTES_MAX: usize = 100 * 1024;

/// `PATH` of a run, unless the function sets another one.
const PATH: &str = "/usr/local/bin:/usr/bin:/bin";

/// A queue message. The gateway writes every member, so a message that lacks one is corrupt.
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
    /// Parses a message. The error contains the position only, because a message contains user data.
    pub(super) fn parse(message: &'a [u8]) -> Result<Self, String> {
        serde_json::from_slice(message).map_err(|e| {
            format!("the message of the job cannot be read (line {}, column {})", e.line(), e.column())
        })
    }

    /// Memory of the function in MiB. 0 if the message cannot be parsed, because then nothing runs.
    pub(super) fn memory_mb_of(message: &[u8]) -> u64 {
        Message::parse(message).map_or(0, |message| message.memory_mb)
    }

    /// Whether the input is too long for a variable and is passed in a file.
    pub(super) fn input_by_file(&self) -> bool {
        self.input.get().len() > ENV_INPUT_BYTES_MAX
    }

    /// The complete environment of the run. `home`: its private directory. `input_file`: the path of a long
    /// input. A function may override `PATH`, `HOME` and the like, but not the variables of the request.
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
            // Otherwise buffered output is lost when the run is killed.
            env.insert("PYTHONUNBUFFERED".into(), "1".into());
        }
        for (name, value) in &self.env_vars {
            let value = match value {
                Value::Null => continue,
                Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
                return Err("envVars contains a name or a value that is not valid in an environment".into());
            }
            env.insert(name.clone(), value);
        }
        let id = id.to_string();
        let payload = match self.input_by_file() {
            true => ("PAYLOAD_FILE", input_file),
            false => ("PAYLOAD", self.input.get()),
        };
        // Exactly one of the two is set, and never to a value of the function.
        env.remove("PAYLOAD");
        env.remove("PAYLOAD_FILE");
        let fixed = [payload, ("MODEL_ID", &*self.model_id), ("REQUEST_ID", &*id), ("FUNCTION_ID", function)];
        if self.model_id.contains('\0') {
            return Err("modelId contains a character that is not valid in an environment".into());
        }
        env.extend(fixed.map(|(k, v)| (k.to_owned(), v.to_owned())));
        Ok(env)
    }
}
