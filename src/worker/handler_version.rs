//! What processes in handler mode must have in common to be interchangeable: the function, its code and its
//! settings.

use super::message::Message;
use serde_json::value::RawValue;
use std::collections::BTreeMap;

/// A version of a function with a handler.
#[derive(Debug)]
pub(super) struct HandlerVersion {
    function: String,
    runtime: String,
    pub(super) memory_mb: u64,
    s3_bucket: String,
    s3_key: String,
    pub(super) handler: String,
    /// As in the message.
    env_vars: BTreeMap<String, Box<RawValue>>,
    /// Orders the versions of a function. Changes that do not concern its processes raise it too.
    config_version: u64,
}

impl HandlerVersion {
    pub(super) fn of(function: &str, handler: &str, message: &Message<'_>) -> Self {
        Self {
            function: function.to_owned(),
            runtime: message.runtime.as_ref().to_owned(),
            memory_mb: message.memory_mb,
            s3_bucket: message.s3_bucket.as_ref().to_owned(),
            s3_key: message.s3_key.as_ref().to_owned(),
            handler: handler.to_owned(),
            env_vars: owned(message),
            config_version: message.config_version,
        }
    }

    pub(super) fn function(&self) -> &str {
        &self.function
    }

    /// Whether a process of this version can serve a job of the function.
    pub(super) fn serves(&self, function: &str, handler: &str, message: &Message<'_>) -> bool {
        self.function == function
            && self.s3_key == message.s3_key
            && self.s3_bucket == message.s3_bucket
            && self.handler == handler
            && self.memory_mb == message.memory_mb
            && self.runtime == message.runtime
            && self.has_env_vars_of(message)
    }

    fn has_env_vars_of(&self, message: &Message<'_>) -> bool {
        let (own, others) = (self.env_vars.iter(), message.env_vars.iter());
        self.env_vars.len() == message.env_vars.len()
            && own.zip(others).all(|((a, x), (b, y))| a == b && x.get() == y.get())
    }

    /// Whether a job of the function shows that it has got new code or settings since.
    pub(super) fn is_outdated_by(&self, function: &str, message: &Message<'_>) -> bool {
        self.function == function && self.config_version < message.config_version
    }
}

fn owned(message: &Message<'_>) -> BTreeMap<String, Box<RawValue>> {
    let all = message.env_vars.iter();
    all.map(|(name, value)| (name.clone().into_owned(), (*value).to_owned())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn code_and_settings_make_a_version() {
        let base = json!({
            "s3Bucket": "b", "s3Key": "k", "memoryMb": 128, "runtime": "python", "envVars": { "A": 1 },
            "configVersion": 3,
        });
        let text = base.to_string();
        let version = HandlerVersion::of("f", "main.h", &Message::parse(text.as_bytes()).unwrap());
        for (function, handler, changes, serves, is_outdated) in [
            ("f", "main.h", json!({}), true, false),
            ("f", "main.h", json!({ "configVersion": 4, "input": 7, "modelId": "x" }), true, true),
            ("f", "main.h", json!({ "configVersion": 2, "timeoutMs": 1 }), true, false),
            ("g", "main.h", json!({ "configVersion": 4 }), false, false),
            ("f", "main.g", json!({}), false, false),
            ("f", "main.h", json!({ "s3Key": "l", "configVersion": 4 }), false, true),
            ("f", "main.h", json!({ "s3Bucket": "c" }), false, false),
            ("f", "main.h", json!({ "memoryMb": 256 }), false, false),
            ("f", "main.h", json!({ "runtime": "nodejs" }), false, false),
            ("f", "main.h", json!({ "envVars": { "A": 2 } }), false, false),
        ] {
            let mut message = base.clone();
            message.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
            let text = message.to_string();
            let message = Message::parse(text.as_bytes()).unwrap();
            assert_eq!(version.serves(function, handler, &message), serves, "{changes}");
            assert_eq!(version.is_outdated_by(function, &message), is_outdated, "{changes}");
        }
    }
}
