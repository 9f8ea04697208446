//! A job: its id, the request it came from, and the message the workers read.

use super::encoding_problem;
use super::escape::Escape;
use super::{Function, FunctionId, IdempotencyKey, Rfc3339Ms, Text, UnixMs};
use bytes::Bytes;
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;
use uuid::Uuid;

/// How long a run may take on its worker, in milliseconds; part of the message, enforced by the worker.
pub const TIMEOUT_MS_DEFAULT: u64 = 300_000;

/// Model a job names when the client names none.
const MODEL_DEFAULT: &str = "llama3:8b";

/// Deepest nesting of `inputData`, in levels: what common JSON readers accept.
const INPUT_DEPTH_MAX: usize = 128;

/// Names one running gateway. Job ids carry it, so that results find their way back.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u32);

impl NodeId {
    /// From eight lower-case hex digits.
    pub fn parse(text: &str) -> Option<Self> {
        let ours = text.len() == 8 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        ours.then(|| u32::from_str_radix(text, 16).ok().map(Self))?
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Tells the processes apart that have, or claim, the same node id: a random number, new with each process.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ProcessToken(pub u64);

impl ProcessToken {
    /// From sixteen lower-case hex digits.
    pub fn parse(text: &str) -> Option<Self> {
        let ours = text.len() == 16 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        ours.then(|| u64::from_str_radix(text, 16).ok().map(Self))?
    }
}

impl fmt::Display for ProcessToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for ProcessToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// An RFC 9562 UUID, version 8: 32 bits node, 42 bits Unix milliseconds of acceptance, 48 bits random.
///
/// So the id says which node waits for the job and when it was accepted, without a look-up.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(Uuid);

impl JobId {
    const RANDOM_BITS: u32 = 48;
    const TIME_BITS: u32 = 42;
    /// Bits below the variant: the last 62 of the UUID.
    const LOW_BITS: u32 = 62;

    /// The id of a job accepted by `node` at `at`; of `random` the low 48 bits count.
    pub fn new(node: NodeId, at: UnixMs, random: u64) -> Self {
        let random = u128::from(random) & ((1 << Self::RANDOM_BITS) - 1);
        let time = u128::from(at) & ((1 << Self::TIME_BITS) - 1);
        let payload = (u128::from(node.0) << (Self::TIME_BITS + Self::RANDOM_BITS))
            | (time << Self::RANDOM_BITS)
            | random;
        // 122 bits of ours around the 4 of the version and the 2 of the variant.
        let low = payload & ((1 << Self::LOW_BITS) - 1);
        let middle = (payload >> Self::LOW_BITS) & 0xfff;
        let high = payload >> (Self::LOW_BITS + 12);
        Self(Uuid::from_u128((high << 80) | (0x8 << 76) | (middle << 64) | (0b10 << 62) | low))
    }

    /// `None` if `text` is not an id that some node of this kind made. The digits may be in capitals: RFC
    /// 9562 asks readers to ignore case, and some clients store ids so.
    pub fn parse(text: &str) -> Option<Self> {
        let uuid = Uuid::try_parse(text).ok()?;
        // Not the other forms that `Uuid` reads: braces, `urn:uuid:`, no hyphens.
        let hyphenated = text.len() == Self::TEXT_BYTES;
        let ours = uuid.get_version_num() == 8 && uuid.get_variant() == uuid::Variant::RFC4122;
        (hyphenated && ours).then_some(Self(uuid))
    }

    /// Length of an id as text.
    pub const TEXT_BYTES: usize = 36;

    /// The id as text, written to a place of the caller's.
    pub fn text<'a>(&self, place: &'a mut [u8; Self::TEXT_BYTES]) -> &'a str {
        self.0.as_hyphenated().encode_lower(place)
    }

    /// From the 16 bytes that [`Self::as_bytes`] gave.
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(Uuid::from_bytes(bytes))
    }

    pub fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }

    /// The node that waits for this job.
    pub fn node(&self) -> NodeId {
        NodeId((self.0.as_u128() >> 96) as u32)
    }

    /// When the job was accepted.
    pub fn accepted_at(&self) -> UnixMs {
        ((self.payload() >> Self::RANDOM_BITS) & ((1 << Self::TIME_BITS) - 1)) as u64
    }

    /// The 80 bits beside the time: node, then random.
    pub(super) fn node_and_random(&self) -> u128 {
        (u128::from(self.node().0) << Self::RANDOM_BITS) | (self.payload() & ((1 << Self::RANDOM_BITS) - 1))
    }

    /// Time and random: the 90 bits below the node.
    fn payload(&self) -> u128 {
        let bits = self.0.as_u128();
        let low = bits & ((1 << Self::LOW_BITS) - 1);
        let middle = (bits >> 64) & 0xfff;
        let high = (bits >> 80) & 0xffff;
        (high << (Self::LOW_BITS + 12)) | (middle << Self::LOW_BITS) | low
    }

    /// A W3C `traceparent` that starts a trace at this job.
    fn traceparent(&self) -> [u8; 55] {
        let span = (self.0.as_u128() as u64) | 1; // a span id of zeros is invalid
        let mut text = *b"00-00000000000000000000000000000000-0000000000000000-00";
        self.0.as_simple().encode_lower(&mut text[3..35]);
        for (n, digit) in text[36..52].iter_mut().enumerate() {
            *digit = b"0123456789abcdef"[(span >> (60 - 4 * n)) as usize & 15];
        }
        text
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

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

/// The body of `POST /run`. `input` is the client's own text, uninterpreted.
#[derive(Debug)]
pub struct RunRequest<'a> {
    pub function: FunctionId,
    pub input: &'a str,
    pub model: Option<Cow<'a, str>>,
}

/// Why a body is not a run. The text is for the client and never quotes the body.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RunRequestError {
    #[error("the body is not a JSON object: {0}")]
    NotJson(String),
    #[error("`{0}` is missing")]
    Missing(&'static str),
    #[error("`{member}` {problem}")]
    Member { member: &'static str, problem: &'static str },
    #[error("a member stands twice in the body")]
    Twice,
}

impl<'a> RunRequest<'a> {
    /// One pass over the body that keeps slices of it, no tree.
    pub fn parse(body: &'a [u8]) -> Result<Self, RunRequestError> {
        let members: Members<'a> =
            serde_json::from_slice(body).map_err(|e| RunRequestError::NotJson(json_problem(body, &e)))?;
        if members.twice {
            return Err(RunRequestError::Twice);
        }
        let function = members.function.ok_or(RunRequestError::Missing("functionId"))?;
        let function: Cow<'_, str> = text(function, "functionId")?;
        let function = FunctionId::parse(&function).ok_or(RunRequestError::Member {
            member: "functionId",
            problem: "must be 1 to 128 letters, digits, '.', '_' or '-', the first a letter or digit",
        })?;
        // Handlers call `event.get`, so no input is an empty object, and `null` is no input.
        let input = members.input.map(RawValue::get).filter(|input| *input != "null").unwrap_or("{}");
        check_input(input).map_err(|problem| RunRequestError::Member { member: "inputData", problem })?;
        let model = match members.model {
            Some(raw) if raw.get() != "null" => Some(text(raw, "modelId")?),
            _ => None,
        };
        Ok(Self { function, input, model })
    }

    /// The model that the job names.
    pub fn model(&self) -> &str {
        self.model.as_deref().unwrap_or(MODEL_DEFAULT)
    }
}

fn json_problem(body: &[u8], e: &serde_json::Error) -> String {
    encoding_problem(body).map_or_else(|| json_place(e), str::to_owned)
}

/// Where the JSON breaks; serde's own text may quote what it read, so only the kind and place are used.
fn json_place(e: &serde_json::Error) -> String {
    let kind = match e.classify() {
        serde_json::error::Category::Eof => "it ends too early",
        serde_json::error::Category::Data => "it is of another type",
        _ => "it cannot be read",
    };
    format!("{kind} at line {}, column {}", e.line(), e.column())
}

fn text<'a>(raw: &'a RawValue, member: &'static str) -> Result<Cow<'a, str>, RunRequestError> {
    let read: Result<Text<'a>, _> = serde_json::from_str(raw.get());
    read.map(|t| t.0).map_err(|_| RunRequestError::Member { member, problem: "must be a string" })
}

#[derive(Default)]
struct Members<'a> {
    function: Option<&'a RawValue>,
    input: Option<&'a RawValue>,
    model: Option<&'a RawValue>,
    twice: bool,
}

impl<'de> Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct MembersVisitor;
        impl<'de> Visitor<'de> for MembersVisitor {
            type Value = Members<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members<'de>, A::Error> {
                let mut members = Members::default();
                let mut others = HashSet::new(); // allocates only when an unknown member comes
                while let Some(Text(key)) = map.next_key()? {
                    let value: &'de RawValue = map.next_value()?;
                    let before = match &*key {
                        "functionId" => members.function.replace(value).is_some(),
                        "inputData" => members.input.replace(value).is_some(),
                        "modelId" => members.model.replace(value).is_some(),
                        _ => !others.insert(key),
                    };
                    members.twice |= before;
                }
                Ok(members)
            }
        }
        d.deserialize_map(MembersVisitor)
    }
}

/// Refuses what the workers' JSON readers would stumble over, in JSON that is known to be well formed:
/// nesting past [`INPUT_DEPTH_MAX`], and escapes of half a surrogate pair.
fn check_input(json: &str) -> Result<(), &'static str> {
    let bytes = json.as_bytes();
    let mut depth = 0_usize;
    let mut in_string = false;
    let mut i = 0;
    while i < bytes.len() {
        match (in_string, bytes[i]) {
            (true, b'\\') => match Escape::at(&bytes[i..]) {
                Escape::Whole(len) => i += len - 1,
                Escape::Half => return Err("holds an escape of half a surrogate pair"),
            },
            (_, b'"') => in_string = !in_string,
            (false, b'{' | b'[') => {
                depth += 1;
                if depth > INPUT_DEPTH_MAX {
                    return Err("is nested deeper than 128 levels");
                }
            }
            (false, b'}' | b']') => depth -= 1,
            _ => {}
        }
        i += 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Counters;

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
