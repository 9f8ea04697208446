//! The members of a queue message that the worker reads, and the environment that they define.

use super::runtime::ProcessEnv;
use crate::model::{Runtime, TIMEOUT_MS_DEFAULT, TraceContext, tracestate};
use serde::Deserialize;
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::collections::BTreeMap;

/// Longest input in the environment, in bytes. Linux allows 128 KiB for one variable, including its name.
const ENV_INPUT_BYTES_MAX: usize = 100 * 1024;
/// Longest variable, in bytes: its name, `=`, its value and a zero byte (`MAX_ARG_STRLEN` of Linux).
const VARIABLE_BYTES_MAX: usize = 128 * 1024;
/// Most variables of a function. bubblewrap takes at most 9,000 arguments, three for each.
const VARIABLES_MAX: usize = 2_000;
/// `PATH` of a run, unless the function sets another one.
const PATH: &str = "/usr/local/bin:/usr/bin:/bin";
/// Variables that a function cannot set.
const RESERVED: [&str; 10] = [
    "PAYLOAD",
    "PAYLOAD_FILE",
    "REQUEST_ID",
    "JOB_ID",
    "FUNCTION_ID",
    "MEMORY_MB",
    "MODEL_ID",
    "LLM_MODEL",
    "AI_ENDPOINT",
    "OUTPUT_DIR",
];

/// A queue message. The gateway writes every member. The earlier controller leaves some out, which then have
/// the values of docs/worker-protocol.md.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Message<'a> {
    #[serde(borrow, default = "python")]
    pub(super) runtime: Cow<'a, str>,
    #[serde(default = "memory_mb_default")]
    pub(super) memory_mb: u64,
    #[serde(borrow, default)]
    pub(super) s3_bucket: Cow<'a, str>,
    #[serde(borrow)]
    pub(super) s3_key: Cow<'a, str>,
    #[serde(default = "timeout_ms_default")]
    pub(super) timeout_ms: u64,
    #[serde(borrow, default = "empty_object")]
    pub(super) input: &'a RawValue,
    #[serde(borrow, default = "model_default")]
    pub(super) model_id: Cow<'a, str>,
    /// Values are kept as text: a number may have more digits than a double.
    #[serde(borrow, default)]
    pub(super) env_vars: BTreeMap<Cow<'a, str>, &'a RawValue>,
    /// Version of the function. 0: unknown.
    #[serde(default)]
    pub(super) config_version: u64,
    /// `None`: script mode.
    #[serde(borrow, default)]
    handler: Option<Cow<'a, str>>,
    /// Kept as text: a message whose trace has another form runs all the same.
    #[serde(borrow, default)]
    traceparent: Option<&'a RawValue>,
}

/// The trace that a message names: its span, and its `tracestate`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct MessageTrace {
    pub(super) context: Option<TraceContext>,
    pub(super) state: Option<Box<str>>,
}

impl MessageTrace {
    /// Reads two members of a message. What is not valid counts as missing.
    pub(super) fn of(message: &[u8]) -> Self {
        #[derive(Deserialize)]
        struct TraceMembers<'a> {
            #[serde(borrow, default)]
            traceparent: Option<&'a RawValue>,
            #[serde(borrow, default)]
            tracestate: Option<&'a RawValue>,
        }
        let Ok(members) = serde_json::from_slice::<TraceMembers<'_>>(message) else { return Self::default() };
        let context = members.traceparent.and_then(context_of);
        let text = members.tracestate.filter(|_| context.is_some());
        let text: Option<String> = text.and_then(|text| serde_json::from_str(text.get()).ok());
        let state = text.as_deref().and_then(|text| Some(tracestate([text])?.into()));
        Self { context, state }
    }
}

fn context_of(member: &RawValue) -> Option<TraceContext> {
    // A valid one has no escapes.
    TraceContext::parse(member.get().strip_prefix('"')?.strip_suffix('"')?)
}

fn python() -> Cow<'static, str> {
    Cow::Borrowed(Runtime::Python.name())
}

fn memory_mb_default() -> u64 {
    128
}

fn timeout_ms_default() -> u64 {
    TIMEOUT_MS_DEFAULT
}

fn empty_object() -> &'static RawValue {
    serde_json::from_str("{}").unwrap_or(RawValue::NULL)
}

fn model_default() -> Cow<'static, str> {
    Cow::Borrowed("llama3:8b")
}

/// Where a process finds its files, as it sees them.
#[derive(Clone, Debug)]
pub(super) struct ProcessPaths {
    /// Its code, and its working directory.
    pub(super) function: String,
    pub(super) home: String,
    pub(super) tmp: String,
    pub(super) output: String,
}

/// What the environment says of a run beside its message.
#[derive(Clone, Copy)]
pub(super) struct RunContext<'a> {
    pub(super) request_id: &'a str,
    pub(super) function: &'a str,
    pub(super) ai_endpoint: Option<&'a str>,
    pub(super) paths: &'a ProcessPaths,
}

/// The environment of a process that waits for its job. `of_runtime`: variables that each run of a runtime
/// has.
pub(super) fn base_environment(paths: &ProcessPaths, of_runtime: &[(&str, &str)]) -> ProcessEnv {
    let base = [("PATH", PATH), ("HOME", &*paths.home), ("TMPDIR", &*paths.tmp)];
    let all = base.iter().chain(of_runtime);
    all.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
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
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct MemoryMember {
            #[serde(default = "memory_mb_default")]
            memory_mb: u64,
        }
        serde_json::from_slice::<MemoryMember>(message).map_or(0, |message| message.memory_mb)
    }

    /// The handler. `None`: script mode.
    pub(super) fn handler(&self) -> Option<&str> {
        self.handler.as_deref().filter(|handler| !handler.is_empty())
    }

    /// The span that the message names, if it is valid.
    pub(super) fn trace(&self) -> Option<TraceContext> {
        self.traceparent.and_then(context_of)
    }

    /// Whether the input is too long for a variable and is passed in a file.
    pub(super) fn input_by_file(&self) -> bool {
        self.input.get().len() > ENV_INPUT_BYTES_MAX
    }

    /// The complete environment of a run in script mode. `input_file`: the path of the input, if it is passed
    /// in a file. A function may override `PATH`, `HOME` and the like, but not the variables of the request.
    ///
    /// # Errors
    /// A sentence for the owner of the function.
    pub(super) fn environment(
        &self,
        run: RunContext<'_>,
        of_runtime: &[(&str, &str)],
        input_file: Option<&str>,
    ) -> Result<ProcessEnv, String> {
        let mut env = self.handler_environment(run, of_runtime)?;
        env.extend(self.event_environment(run));
        let (name, value) = match input_file {
            Some(file) => ("PAYLOAD_FILE", file),
            None => ("PAYLOAD", self.input.get()),
        };
        env.insert(name.to_owned(), value.to_owned());
        Ok(env)
    }

    /// The environment of a process in handler mode: of all its runs, without what differs between them.
    ///
    /// # Errors
    /// A sentence for the owner of the function.
    pub(super) fn handler_environment(
        &self,
        run: RunContext<'_>,
        of_runtime: &[(&str, &str)],
    ) -> Result<ProcessEnv, String> {
        let mut env = base_environment(run.paths, of_runtime);
        if self.env_vars.len() > VARIABLES_MAX {
            let count = self.env_vars.len();
            return Err(format!("envVars has {count} variables, and at most {VARIABLES_MAX} are possible"));
        }
        for (name, value) in &self.env_vars {
            let value: Cow<'_, str> = match value.get() {
                "null" => continue,
                text if text.starts_with('"') => match serde_json::from_str(text) {
                    Ok(text) => Cow::Owned(text),
                    Err(_) => return Err("envVars contains a text that cannot be read".into()),
                },
                other => Cow::Borrowed(other),
            };
            if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
                return Err("envVars contains a name or a value that is not valid in an environment".into());
            }
            if name.len() + value.len() + 2 > VARIABLE_BYTES_MAX {
                let max = VARIABLE_BYTES_MAX >> 10;
                return Err(format!("envVars contains a variable that is longer than {max} KiB"));
            }
            if !RESERVED.contains(&&**name) {
                env.insert(name.clone().into_owned(), value.into_owned());
            }
        }
        if self.model_id.contains('\0') {
            return Err("modelId contains a character that is not valid in an environment".into());
        }
        env.insert("FUNCTION_ID".to_owned(), run.function.to_owned());
        env.insert("MEMORY_MB".to_owned(), self.memory_mb.to_string());
        env.insert("OUTPUT_DIR".to_owned(), run.paths.output.clone());
        if let Some(endpoint) = run.ai_endpoint {
            env.insert("AI_ENDPOINT".to_owned(), endpoint.to_owned());
        }
        Ok(env)
    }

    /// The variables that differ between the runs of one process.
    pub(super) fn event_environment(&self, run: RunContext<'_>) -> ProcessEnv {
        let variables = [
            ("REQUEST_ID", run.request_id),
            ("JOB_ID", run.request_id),
            ("MODEL_ID", &*self.model_id),
            ("LLM_MODEL", &*self.model_id),
        ];
        variables.map(|(name, value)| (name.to_owned(), value.to_owned())).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn paths() -> ProcessPaths {
        let path = |name: &str| format!("/{name}");
        ProcessPaths { function: path("f"), home: path("h"), tmp: path("t"), output: path("o") }
    }

    fn run(paths: &ProcessPaths) -> RunContext<'_> {
        RunContext { request_id: "r", function: "f", ai_endpoint: Some("http://ai"), paths }
    }

    #[test]
    fn members_that_the_earlier_controller_leaves_out_have_values() {
        let message = Message::parse(br#"{"requestId":"r","functionId":"f","s3Key":"k"}"#).unwrap();
        assert_eq!((&*message.runtime, message.memory_mb, message.timeout_ms), ("python", 128, 300_000));
        assert_eq!((message.input.get(), &*message.model_id), ("{}", "llama3:8b"));
        assert!(message.env_vars.is_empty() && message.handler().is_none() && message.config_version == 0);
        assert!(Message::parse(b"{}").is_err_and(|e| e.contains("cannot be read")));
        for (text, memory_mb) in [(r#"{"memoryMb":7,"input":{"a":[1]}}"#, 7), ("{}", 128), ("x", 0)] {
            assert_eq!(Message::memory_mb_of(text.as_bytes()), memory_mb);
        }
        for (handler, expected) in [(json!("main.h"), Some("main.h")), (json!(""), None), (json!(null), None)]
        {
            let text = json!({ "s3Key": "k", "handler": handler }).to_string();
            assert_eq!(Message::parse(text.as_bytes()).unwrap().handler(), expected);
        }
    }

    #[test]
    fn the_environment_is_that_of_the_request() {
        let vars = json!({
            "MINE": "ä=1", "NUMBER": 5, "NONE": null, "FLAG": true, "HOME": "/mine", "PAYLOAD_FILE": "theirs",
            "AI_ENDPOINT": "theirs", "REQUEST_ID": "theirs",
        });
        let text = json!({ "s3Key": "k", "input": [1], "modelId": "m", "memoryMb": 64, "envVars": vars });
        let text = text.to_string();
        let (message, paths) = (Message::parse(text.as_bytes()).unwrap(), paths());
        let of_runtime = [("PYTHONUNBUFFERED", "1")];
        let env = message.environment(run(&paths), &of_runtime, None).unwrap();
        let shown: Vec<String> = env.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let expected = "AI_ENDPOINT=http://ai FLAG=true FUNCTION_ID=f HOME=/mine JOB_ID=r LLM_MODEL=m \
                        MEMORY_MB=64 MINE=ä=1 MODEL_ID=m NUMBER=5 OUTPUT_DIR=/o \
                        PATH=/usr/local/bin:/usr/bin:/bin PAYLOAD=[1] PYTHONUNBUFFERED=1 \
                        REQUEST_ID=r TMPDIR=/t";
        assert_eq!(shown.join(" "), expected);
        let by_file = message.environment(run(&paths), &[], Some("/f/in")).unwrap();
        assert_eq!((by_file.get("PAYLOAD"), by_file["PAYLOAD_FILE"].as_str()), (None, "/f/in"));
        let handler = message.handler_environment(run(&paths), &[]).unwrap();
        assert!(["PAYLOAD", "REQUEST_ID", "MODEL_ID"].iter().all(|name| !handler.contains_key(*name)));
    }

    #[test]
    fn a_trace_that_is_not_valid_counts_as_missing() {
        let parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        for (traceparent, state, is_valid, expected) in [
            (json!(parent), json!("a=\"1\\"), true, Some("a=\"1\\")),
            (json!(parent), json!("a"), true, None),
            (json!(parent), json!(5), true, None),
            (json!("x"), json!("a=1"), false, None),
            (json!(7), json!(null), false, None),
            (json!(null), json!(null), false, None),
        ] {
            let text = json!({ "s3Key": "k", "traceparent": traceparent, "tracestate": state }).to_string();
            let trace = MessageTrace::of(text.as_bytes());
            assert_eq!((trace.context.is_some(), trace.state.as_deref()), (is_valid, expected), "{text}");
            assert_eq!(Message::parse(text.as_bytes()).unwrap().trace(), trace.context);
        }
        assert_eq!(MessageTrace::of(b"x"), MessageTrace::default());
    }

    #[test]
    fn numbers_keep_their_digits() {
        let text = r#"{"s3Key":"k","envVars":{"A":12345678901234567890123,"B":1.10,"C":{"d":[1e2]}}}"#;
        let message = Message::parse(text.as_bytes()).unwrap();
        let env = message.handler_environment(run(&paths()), &[]).unwrap();
        assert_eq!([&env["A"], &env["B"], &env["C"]], ["12345678901234567890123", "1.10", r#"{"d":[1e2]}"#]);
    }

    #[test]
    fn variables_that_no_process_can_have_are_rejected() {
        let paths = paths();
        for (vars, reason) in [
            (json!({ "": "x" }), "not valid"),
            (json!({ "A=B": "x" }), "not valid"),
            (json!({ "A": "x\0" }), "not valid"),
            (json!({ "A": "x".repeat(VARIABLE_BYTES_MAX) }), "longer than 128 KiB"),
            ((0..2_001).map(|n| (format!("A{n}"), json!(n))).collect(), "2001 variables"),
        ] {
            let text = json!({ "s3Key": "k", "envVars": vars }).to_string();
            let message = Message::parse(text.as_bytes()).unwrap();
            let refused = message.environment(run(&paths), &[], None).unwrap_err();
            assert!(refused.contains(reason), "{refused}");
        }
    }
}
