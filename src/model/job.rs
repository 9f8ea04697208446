//! A job: its id, the request it came from, and the message the workers read.

use super::{Function, FunctionId, IdempotencyKey, Rfc3339Ms, UnixMs};
use crate::model::NodeId;
use crate::model::ids::JobId;
use crate::model::run_request::RunRequest;
use bytes::Bytes;

/// How long a run may take on its worker, in milliseconds; part of the message, enforced by the worker.
pub const TIMEOUT_MS_DEFAULT: u64 = 300_000;

/// One accepted run on its way to the queue.
#[derive(Clone, Debug)]
pub struct Job {
    pub id: JobId,
    pub function: FunctionId,
    /// After this a result is no longer waited for.
    pub deadline: UnixMs,
    /// Of the request that it belongs to, if that may be repeated; few have one.
    pub idempotency_key: Option<Box<IdempotencyKey>>,
    /// The queue message: JSON in UTF-8, of characters every queue accepts.
    pub message: Bytes,
}

/// What all jobs of a function have in common, written once. Nothing else of the function is kept, and that in one
/// piece: there may be a hundred thousand of these, and what is used seldom is read slowly.
#[derive(Debug)]
pub struct JobTemplate {
    pub function: FunctionId,
    /// Most jobs in flight, on all nodes together; 0: no cap.
    pub max_concurrency: usize,
    text: Box<str>,
    /// Where in `text` the input belongs, and where the times.
    input_at: usize,
    times_at: usize,
}

impl JobTemplate {
    pub fn of(function: &Function, bucket: &str) -> Self {
        let f = function;
        let mut text = String::with_capacity(f.env_vars.len() + f.s3_key.len() + 256);
        // No character of an id needs an escape.
        text.extend(["\",\"functionId\":\"", f.id.as_str(), "\",\"runtime\":", &quoted(&f.runtime)]);
        text.extend([",\"memoryMb\":", &f.memory_mb.to_string()]);
        text.extend([",\"s3Bucket\":", &quoted(bucket), ",\"s3Key\":", &quoted(&f.s3_key)]);
        text.extend([",\"timeoutMs\":", &TIMEOUT_MS_DEFAULT.to_string(), ",\"input\":"]);
        let input_at = text.len();
        text.extend([",\"envVars\":", &f.env_vars, ",\"acceptedAt\":\""]);
        let times_at = text.len();
        text.extend(["\",\"configVersion\":", &f.version.to_string(), ",\"traceparent\":\""]);
        let max_concurrency = usize::try_from(f.max_concurrency).unwrap_or(usize::MAX);
        Self { function: f.id.clone(), max_concurrency, text: text.into(), input_at, times_at }
    }

    /// The message of some job, as the workers read it.
    #[cfg(test)]
    pub fn sample(&self) -> serde_json::Value {
        let body = format!("{{\"functionId\":\"{}\"}}", self.function);
        let request = RunRequest::parse(body.as_bytes()).unwrap();
        let id = JobId::new(NodeId(1), 0, 0);
        let draft = JobDraft { id, template: self, deadline: 0, request: &request, traceparent: None };
        serde_json::from_slice(&draft.build().message).unwrap()
    }
}

fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// What a job is made of. [`JobDraft::build`] writes the message.
pub struct JobDraft<'a> {
    pub id: JobId,
    pub template: &'a JobTemplate,
    pub deadline: UnixMs,
    pub request: &'a RunRequest<'a>,
    /// The client's own `traceparent`, if it sent a valid one: hex and hyphens.
    pub traceparent: Option<&'a str>,
}

impl JobDraft<'_> {
    /// Writes the message by hand rather than through a tree: `input` is copied as it came.
    pub fn build(&self) -> Job {
        let own_trace = self.id.traceparent();
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
        // No character of these needs an escape.
        m.extend_from_slice(Rfc3339Ms::of(self.id.accepted_at()).as_str().as_bytes());
        m.extend_from_slice(b"\",\"deadline\":\"");
        m.extend_from_slice(Rfc3339Ms::of(self.deadline).as_str().as_bytes());
        m.extend_from_slice(&text.as_bytes()[*times_at..]);
        m.extend_from_slice(self.traceparent.map_or(&own_trace[..], str::as_bytes));
        m.extend_from_slice(b"\"}");
        Job {
            id: self.id,
            function: function.clone(),
            deadline: self.deadline,
            idempotency_key: None,
            message: escape_noncharacters(m).into(),
        }
    }
}

/// U+FFFE and U+FFFF are fine in JSON, but SQS refuses them: they go as escapes.
/// They can only stand inside strings, so the replacement keeps the value.
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
    use crate::model::Counters;
    use crate::model::NodeId;
    use crate::model::ProcessToken;

    const AT: UnixMs = 1_795_305_600_123;

    #[test]
    fn a_token_is_read_as_it_is_written() {
        for token in [0, 0xab, u64::MAX] {
            assert_eq!(ProcessToken::parse(&ProcessToken(token).to_string()), Some(ProcessToken(token)));
        }
        for bad in ["", "00000000000000a", "00000000000000aG", "00000000000000AB", "+0000000000000ab"] {
            assert_eq!(ProcessToken::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn an_id_carries_node_and_time() {
        for (node, at, random) in
            [(0, 0, 0), (u32::MAX, (1 << 42) - 1, u64::MAX), (0xdead_beef, AT, 0x1234_5678_9abc)]
        {
            let id = JobId::new(NodeId(node), at, random);
            assert_eq!((id.node(), id.accepted_at()), (NodeId(node), at));
            let text = id.to_string();
            assert!(text.starts_with(&format!("{node:08x}-")), "{text}");
            assert_eq!(text.as_bytes()[14], b'8', "version of {text}");
            assert!(b"89ab".contains(&text.as_bytes()[19]), "variant of {text}");
            assert_eq!(JobId::parse(&text), Some(id));
            assert_eq!(JobId::parse(&text.to_ascii_uppercase()), Some(id), "in capitals");
            assert_eq!(
                id.node_and_random(),
                (u128::from(node) << 48) | u128::from(random & 0xffff_ffff_ffff)
            );
        }
        for bad in [
            "",
            "x",
            "67e55044-10b1-426f-9247-bb680e5fe0c8",
            "{deadbeef-9c2a-8f00-8000-123456789abc}",
            "urn:uuid:deadbeef-9c2a-8f00-8000-123456789abc",
            "deadbeef9c2a8f008000123456789abc",
        ] {
            assert_eq!(JobId::parse(bad), None, "{bad}");
        }
    }

    fn function() -> Function {
        Function {
            id: FunctionId::parse("f.1").unwrap(),
            name: "f".into(),
            description: String::new(),
            runtime: "python".into(),
            memory_mb: 256,
            max_concurrency: 0,
            s3_key: "functions/\"x\".zip".into(),
            original_name: "x.zip".into(),
            uploaded_at: Rfc3339Ms::of(AT).as_str().to_owned(),
            updated_at: String::new(),
            env_vars: r#"{"A":"1"}"#.into(),
            version: 7,
            counters: Counters::default(),
            recommendation: None,
        }
    }

    fn message(body: &str) -> String {
        let function = function();
        let request = RunRequest::parse(body.as_bytes()).expect(body);
        let id = JobId::new(NodeId(1), AT, 2);
        let template = &JobTemplate::of(&function, "b");
        let draft = JobDraft { id, template, deadline: AT + 1000, request: &request, traceparent: None };
        String::from_utf8(draft.build().message.to_vec()).unwrap()
    }

    #[test]
    fn the_message_is_what_workers_read() {
        let id = JobId::new(NodeId(1), AT, 2);
        let trace = String::from_utf8(id.traceparent().to_vec()).unwrap();
        let expected = format!(
            r#"{{"requestId":"{id}","functionId":"f.1","runtime":"python","memoryMb":256,"s3Bucket":"b","s3Key":"functions/\"x\".zip","timeoutMs":300000,"input":{{"a": [1, 2]}},"modelId":"llama3:8b","envVars":{{"A":"1"}},"acceptedAt":"2026-11-22T00:00:00.123Z","deadline":"2026-11-22T00:00:01.123Z","configVersion":7,"traceparent":"{trace}"}}"#
        );
        assert_eq!(message(r#"{"functionId":"f.1","inputData":{"a": [1, 2]},"other":[]}"#), expected);
    }

    #[test]
    fn input_passes_byte_for_byte() {
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
    fn what_sqs_refuses_goes_as_an_escape() {
        let message =
            message("{\"functionId\":\"f.1\",\"inputData\":\"a\u{FFFE}b\u{FFFF}\u{FFFD}\u{FF00}\"}");
        assert!(message.contains("\"input\":\"a\\uFFFEb\\uFFFF\u{FFFD}\u{FF00}\""), "{message}");
        let read: serde_json::Value = serde_json::from_str(&message).unwrap();
        assert_eq!(read["input"], "a\u{FFFE}b\u{FFFF}\u{FFFD}\u{FF00}");
    }

    #[test]
    fn bad_bodies_are_refused() {
        use RunRequestError::{Member, Missing, NotJson, Twice};
        let kind = |body: &str| RunRequest::parse(body.as_bytes()).expect_err(body);
        for body in
            ["", "[]", "1", "{", "{}x", "nul", "{\"functionId\":\"a\",\"inputData\":}", "{\"a\":\u{1}}"]
        {
            assert!(matches!(kind(body), NotJson(_)), "{body}: {:?}", kind(body));
        }
        assert_eq!(kind("{}"), Missing("functionId"));
        for body in [
            "{\"functionId\":1}",
            "{\"functionId\":null}",
            "{\"functionId\":\"\"}",
            "{\"functionId\":\"../a\"}",
        ] {
            assert!(matches!(kind(body), Member { member: "functionId", .. }), "{body}");
        }
        assert!(matches!(kind(r#"{"functionId":"a","modelId":5}"#), Member { member: "modelId", .. }));
        for body in [
            r#"{"functionId":"a","functionId":"b"}"#,
            r#"{"functionId":"a","x":1,"x":2}"#,
            r#"{"functionId":"a","\u0066unctionId":"b"}"#,
        ] {
            assert_eq!(kind(body), Twice, "{body}");
        }
        let nested =
            |n: usize| format!("{{\"functionId\":\"a\",\"inputData\":{}{}}}", "[".repeat(n), "]".repeat(n));
        assert!(RunRequest::parse(nested(128).as_bytes()).is_ok());
        for n in [129, 100_000] {
            assert!(matches!(kind(&nested(n)), Member { member: "inputData", .. }), "{n}");
        }
        for lone in [r"\ud800", r"\udc00", r"\ud800\ud800", r"\ud800x", r"\ud800\n", r"\ud83d\\ude00"] {
            let body = format!("{{\"functionId\":\"a\",\"inputData\":[\"{lone}\"]}}");
            assert!(matches!(kind(&body), Member { member: "inputData", .. }), "{body}");
        }
        assert!(RunRequest::parse(b"{\"functionId\":\"a\",\"inputData\":\"\xff\"}").is_err());
    }

    #[test]
    fn fuzz_job_ids() {
        crate::fuzz::run("job_id", |input| {
            let Ok(text) = std::str::from_utf8(input) else { return };
            if let Some(id) = JobId::parse(text) {
                assert_eq!(id.to_string(), text.to_ascii_lowercase());
                assert_eq!(JobId::parse(&id.to_string()), Some(id));
                assert!(id.accepted_at() < 1 << 42);
            }
            if let Some(node) = NodeId::parse(text) {
                assert_eq!(NodeId::parse(&node.to_string()), Some(node));
            }
        });
    }

    /// Whatever passes becomes a message that holds the input as it came.
    #[test]
    fn fuzz_run_requests() {
        let template = JobTemplate::of(&Function::sample("f"), "b");
        crate::fuzz::run("run_request", |input| {
            let Ok(request) = RunRequest::parse(input) else { return };
            let id = JobId::new(NodeId(1), AT, 2);
            let draft =
                JobDraft { id, template: &template, deadline: AT, request: &request, traceparent: None };
            let message = draft.build().message;
            let text = std::str::from_utf8(&message).expect("a message is UTF-8");
            serde_json::from_str::<&RawValue>(text).expect("a message is JSON");
            // Numbers beyond those of f64 are JSON and pass, but are no `Value`.
            if let Ok(sent) = serde_json::from_str::<serde_json::Value>(request.input) {
                let read: serde_json::Value = serde_json::from_str(text).expect("nor has it larger numbers");
                assert_eq!(read["input"], sent);
            }
            assert!(!text.contains(['\u{fffe}', '\u{ffff}']), "the queue refuses these");
        });
    }
}
