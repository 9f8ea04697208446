//! A job, and the queue message that workers read.
//!
//! The message format is a contract with existing workers, so its members are fixed. The message is written
//! as text, without a JSON tree: every run pays for it, and `input` must not change.

use super::ids::JobId;
use super::time::{Rfc3339Ms, UnixMs};
use super::{Function, FunctionId, IdempotencyKey, JobProgress};
use crate::model::run_request::RunRequest;
use crate::model::trace::{JobTrace, TraceContext};
use bytes::Bytes;
use std::sync::Arc;

/// The time limit of a run, in milliseconds. It is part of the message, and the worker enforces it.
pub const TIMEOUT_MS_DEFAULT: u64 = 300_000;

/// One accepted run.
#[derive(Clone, Debug)]
pub struct Job {
    pub id: JobId,
    pub function: FunctionId,
    /// If no result has arrived by then, the job ends as LOST.
    pub deadline: UnixMs,
    /// `None`: an earlier process or another node accepted it.
    pub progress: Option<Arc<JobProgress>>,
    /// The key of its request. Boxed, because few jobs have one.
    pub idempotency_key: Option<Box<IdempotencyKey>>,
    /// Somebody may learn that the job exists before it has ended: its client is answered early, or sends
    /// the request again with its key. If not, a power failure may take the job with the connection of its
    /// client.
    pub is_promised: bool,
    /// The queue message: JSON in UTF-8, without characters that SQS rejects.
    pub message: Bytes,
    /// `None`, if neither its spans are recorded nor its end decides about that.
    pub trace: Option<Arc<JobTrace>>,
}

/// The part of the message that all jobs of a function share, written once.
///
/// The function cache holds up to a hundred thousand of these. So a template keeps nothing else of the
/// function, and its text is one allocation: a rarely used entry is not in the CPU caches.
#[derive(Debug)]
pub struct JobTemplate {
    pub function: FunctionId,
    /// Maximum number of jobs in flight on all nodes together; 0: no cap.
    pub max_concurrency: usize,
    /// In MiB.
    pub memory_mb: u64,
    /// The version of the configuration.
    pub version: u64,
    text: Box<str>,
    /// The positions in `text` at which the input and the times are inserted.
    input_at: usize,
    times_at: usize,
}

impl JobTemplate {
    /// `bucket`: the S3 bucket that contains the code.
    pub fn of(function: &Function, bucket: &str) -> Self {
        let f = function;
        let mut text = String::with_capacity(f.env_vars.len() + f.s3_key.len() + 256);
        // A function id has no characters that need an escape.
        text.extend(["\",\"functionId\":\"", f.id.as_str(), "\",\"runtime\":", &quoted(&f.runtime)]);
        text.extend([",\"memoryMb\":", &f.memory_mb.to_string()]);
        text.extend([",\"s3Bucket\":", &quoted(bucket), ",\"s3Key\":", &quoted(&f.s3_key)]);
        text.extend([",\"timeoutMs\":", &TIMEOUT_MS_DEFAULT.to_string(), ",\"input\":"]);
        let input_at = text.len();
        text.extend([",\"envVars\":", &f.env_vars, ",\"acceptedAt\":\""]);
        let times_at = text.len();
        text.extend(["\",\"configVersion\":", &f.version.to_string()]);
        if let Some(handler) = &f.handler {
            // A handler has no characters that need an escape.
            text.extend([",\"handler\":\"", handler.as_str(), "\""]);
        }
        text.push_str(",\"traceparent\":\"");
        let max_concurrency = usize::try_from(f.max_concurrency).unwrap_or(usize::MAX);
        let (memory_mb, version) = (f.memory_mb, f.version);
        let function = f.id.clone();
        Self { function, max_concurrency, memory_mb, version, text: text.into(), input_at, times_at }
    }

    /// The message of an arbitrary job, for tests.
    #[cfg(test)]
    pub fn sample(&self) -> serde_json::Value {
        let body = format!("{{\"functionId\":\"{}\"}}", self.function);
        let request = RunRequest::parse(body.as_bytes()).unwrap();
        let id = JobId::new(super::ids::NodeId(1), 0, 0);
        let draft = JobDraft {
            id,
            template: self,
            deadline: 0,
            request: &request,
            traceparent: None,
            tracestate: None,
        };
        serde_json::from_slice(&draft.build().message).unwrap()
    }
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// The parts of a job. [`JobDraft::build`] writes its message.
pub struct JobDraft<'a> {
    pub id: JobId,
    pub template: &'a JobTemplate,
    pub deadline: UnixMs,
    pub request: &'a RunRequest<'a>,
    /// The span that the message names. `None`: the job starts a new trace.
    pub traceparent: Option<TraceContext>,
    /// The `tracestate` of the client, if it sent a valid one.
    pub tracestate: Option<&'a str>,
}

impl JobDraft<'_> {
    /// Writes the message. `input` is copied byte for byte.
    pub fn build(&self) -> Job {
        let JobTemplate { function, text, input_at, times_at, .. } = self.template;
        let mut m = Vec::with_capacity(self.request.input.len() + text.len() + 256);
        m.extend_from_slice(b"{\"requestId\":\"");
        m.extend_from_slice(self.id.text(&mut [0; JobId::TEXT_BYTES]).as_bytes());
        m.extend_from_slice(&text.as_bytes()[..*input_at]);
        m.extend_from_slice(self.request.input.as_bytes());
        m.extend_from_slice(b",\"modelId\":");
        // Writing a string to memory cannot fail.
        let _ = serde_json::to_writer(&mut m, self.request.model());
        m.extend_from_slice(&text.as_bytes()[*input_at..*times_at]);
        // Times have no characters that need an escape.
        m.extend_from_slice(Rfc3339Ms::of(self.id.accepted_at()).as_str().as_bytes());
        m.extend_from_slice(b"\",\"deadline\":\"");
        m.extend_from_slice(Rfc3339Ms::of(self.deadline).as_str().as_bytes());
        m.extend_from_slice(&text.as_bytes()[*times_at..]);
        m.extend_from_slice(&self.traceparent.unwrap_or_else(|| self.id.trace()).text());
        m.push(b'"');
        if let Some(state) = self.tracestate {
            m.extend_from_slice(b",\"tracestate\":");
            // It may contain quotes and backslashes.
            let _ = serde_json::to_writer(&mut m, state);
        }
        m.push(b'}');
        Job {
            id: self.id,
            function: function.clone(),
            deadline: self.deadline,
            progress: None,
            idempotency_key: None,
            is_promised: true,
            message: escape_noncharacters(m).into(),
            trace: None,
        }
    }
}

/// Escapes U+FFFE and U+FFFF, which JSON allows and SQS rejects. They occur only inside strings, so the value
/// does not change.
fn escape_noncharacters(message: Vec<u8>) -> Vec<u8> {
    let is_at = |i: usize| message[i] == 0xEF && message[i + 1] == 0xBF && message[i + 2] >= 0xBE;
    let last = message.len().saturating_sub(2);
    let first = memchr::memchr_iter(0xEF, &message[..last]).find(|&i| is_at(i));
    let Some(first) = first else { return message };
    let mut out = message[..first].to_vec();
    let mut i = first;
    while i < message.len() {
        if i < last && is_at(i) {
            out.extend_from_slice(if message[i + 2] == 0xBE { b"\\uFFFE" } else { b"\\uFFFF" });
            i += 3;
        } else {
            out.push(message[i]);
            i += 1;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{FunctionCounters, Handler, NodeId};
    use serde_json::value::RawValue;

    const AT: UnixMs = 1_795_305_600_123;

    fn function() -> Function {
        Function {
            id: FunctionId::parse("f.1").unwrap(),
            name: "f".into(),
            description: String::new(),
            runtime: "python".into(),
            memory_mb: 256,
            max_concurrency: 0,
            handler: None,
            s3_key: "functions/\"x\".zip".into(),
            original_name: "x.zip".into(),
            uploaded_at: Rfc3339Ms::of(AT).as_str().to_owned(),
            updated_at: String::new(),
            env_vars: r#"{"A":"1"}"#.into(),
            version: 7,
            counters: FunctionCounters::default(),
            recommendation: None,
        }
    }

    fn message(body: &str) -> String {
        message_of(&function(), body)
    }

    fn message_of(function: &Function, body: &str) -> String {
        let request = RunRequest::parse(body.as_bytes()).expect(body);
        let id = JobId::new(NodeId(1), AT, 2);
        let template = &JobTemplate::of(function, "b");
        let draft = JobDraft {
            id,
            template,
            deadline: AT + 1000,
            request: &request,
            traceparent: None,
            tracestate: None,
        };
        String::from_utf8(draft.build().message.to_vec()).unwrap()
    }

    #[test]
    fn the_message_has_the_format_that_workers_read() {
        let id = JobId::new(NodeId(1), AT, 2);
        let trace = id.trace();
        let expected = format!(
            "{{\"requestId\":\"{id}\",\"functionId\":\"f.1\",\"runtime\":\"python\",\"memoryMb\":256,\
             \"s3Bucket\":\"b\",\"s3Key\":\"functions/\\\"x\\\".zip\",\"timeoutMs\":300000,\
             \"input\":{{\"a\": [1, 2]}},\"modelId\":\"llama3:8b\",\"envVars\":{{\"A\":\"1\"}},\
             \"acceptedAt\":\"2026-11-22T00:00:00.123Z\",\"deadline\":\"2026-11-22T00:00:01.123Z\",\
             \"configVersion\":7,\"traceparent\":\"{trace}\"}}"
        );
        assert_eq!(message(r#"{"functionId":"f.1","inputData":{"a": [1, 2]},"other":[]}"#), expected);
    }

    #[test]
    fn a_message_passes_the_trace_of_its_client_on() {
        let request = RunRequest::parse(br#"{"functionId":"f.1"}"#).unwrap();
        let (id, template) = (JobId::new(NodeId(1), AT, 2), &JobTemplate::of(&function(), "b"));
        let text = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let (traceparent, tracestate) = (TraceContext::parse(text), Some(r#"a="\,b=1"#));
        let draft = JobDraft { id, template, deadline: AT, request: &request, traceparent, tracestate };
        let message: serde_json::Value = serde_json::from_slice(&draft.build().message).unwrap();
        assert_eq!((&message["traceparent"], &message["tracestate"]), (&text.into(), &r#"a="\,b=1"#.into()));
    }

    #[test]
    fn only_the_message_of_a_handler_names_it() {
        let body = r#"{"functionId":"f.1"}"#;
        let script = message(body);
        let with_handler = Function { handler: Handler::parse("pkg.mod.fn"), ..function() };
        let expected = script.replace(
            "\"configVersion\":7,\"traceparent\"",
            "\"configVersion\":7,\"handler\":\"pkg.mod.fn\",\"traceparent\"",
        );
        assert_ne!(expected, script);
        assert_eq!(message_of(&with_handler, body), expected);
    }

    #[test]
    fn input_is_copied_byte_for_byte() {
        for input in [
            "0",
            "false",
            "[null]",
            "{\"a\":null}",
            "\"null\"",
            "\"\"",
            "1e400",
            "-0.0",
            "{\"a\":1,\"a\":2}",
            "[ ]",
            "\"\\ud83d\\ude00 \\\\ud800\"",
            "12345678901234567890123",
        ] {
            let message = message(&format!("{{\"functionId\":\"f.1\",\"inputData\":{input} }}"));
            assert!(message.contains(&format!("\"input\":{input},\"modelId\"")), "{message}");
        }
        for none in ["", r#","inputData":null"#, r#","inputData": null "#, r#","inputData":{}"#] {
            let message = message(&format!("{{\"functionId\":\"f.1\"{none}}}"));
            assert!(message.contains("\"input\":{},\"modelId\""), "{none}: {message}");
        }
        assert!(message(r#"{"functionId":"f.1","modelId":null}"#).contains("\"modelId\":\"llama3:8b\""));
        assert!(message(r#"{"function\u0049d":"f.1","modelId":"m\u0031"}"#).contains("\"modelId\":\"m1\""));
    }

    #[test]
    fn noncharacters_are_escaped_for_sqs() {
        let message =
            message("{\"functionId\":\"f.1\",\"inputData\":\"a\u{FFFE}b\u{FFFF}\u{FFFD}\u{FF00}\"}");
        assert!(message.contains("\"input\":\"a\\uFFFEb\\uFFFF\u{FFFD}\u{FF00}\""), "{message}");
        let read: serde_json::Value = serde_json::from_str(&message).unwrap();
        assert_eq!(read["input"], "a\u{FFFE}b\u{FFFF}\u{FFFD}\u{FF00}");
    }

    /// Every request that parses becomes a message that contains its input unchanged.
    #[test]
    fn fuzz_run_requests() {
        let template = JobTemplate::of(&Function::sample("f"), "b");
        crate::fuzz::run("run_request", |input| {
            let Ok(request) = RunRequest::parse(input) else { return };
            let id = JobId::new(NodeId(1), AT, 2);
            let draft = JobDraft {
                id,
                template: &template,
                deadline: AT,
                request: &request,
                traceparent: None,
                tracestate: None,
            };
            let message = draft.build().message;
            let text = std::str::from_utf8(&message).expect("a message is UTF-8");
            serde_json::from_str::<&RawValue>(text).expect("a message is JSON");
            // Numbers beyond the range of f64 are valid JSON, but not a `Value`.
            if let Ok(sent) = serde_json::from_str::<serde_json::Value>(request.input) {
                let read: serde_json::Value =
                    serde_json::from_str(text).expect("all numbers are in the range of f64");
                assert_eq!(read["input"], sent);
            }
            assert!(!text.contains(['\u{fffe}', '\u{ffff}']), "SQS rejects these characters");
        });
    }
}
