//! The result of a run, as a worker published it: kept byte for byte, and parsed leniently.
//!
//! A broken worker may publish anything, so no member is assumed to be present or to have its type. Typed
//! `serde` structs were rejected: one member with another type, or one that occurs twice, would hide all
//! others.

use super::escape::Escape;
use super::text::JsonText;
use bytes::Bytes;
use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::fmt;

/// Maximum plausible duration, in milliseconds: 115 days. Larger values are ignored, here and below.
const DURATION_MS_MAX: f64 = 1e10;
/// Maximum plausible memory, in bytes: 2^50.
const MEMORY_BYTES_MAX: f64 = (1_u64 << 50) as f64;
/// Maximum plausible memory or recommendation, in MiB.
const MEMORY_MB_MAX: f64 = 1e6;
/// Maximum length of a member that may be a string or a number, in bytes of JSON. A longer one is ignored.
const SCALAR_BYTES_MAX: usize = 256;

/// The published result of one run, or the substitute for the result of a lost job.
#[derive(Clone, Debug)]
pub struct Outcome {
    published: Bytes,
    /// It was parsed before and is valid JSON.
    is_known_json: bool,
}

impl PartialEq for Outcome {
    fn eq(&self, other: &Self) -> bool {
        self.published == other.published
    }
}

/// The substitute for the result of a job that has none at its deadline.
const LOST: &[u8] = br#"{"status":"LOST"}"#;
/// The same, if it is not known whether the queue received the job.
const LOST_UNCONFIRMED: &[u8] = br#"{"status":"LOST","reason":"unconfirmed"}"#;

impl Outcome {
    pub fn new(published: Bytes) -> Self {
        Self { published, is_known_json: false }
    }

    /// The outcome of a job that has no result at its deadline. `is_unconfirmed`: it is not known whether the
    /// queue received the job.
    pub fn lost(is_unconfirmed: bool) -> Self {
        Self::new(Bytes::from_static(if is_unconfirmed { LOST_UNCONFIRMED } else { LOST }))
    }

    /// Whether the job had no result at its deadline.
    pub fn is_lost(&self) -> bool {
        self.published == LOST || self.is_unconfirmed()
    }

    /// Whether the job had no result at its deadline, and it is not known whether the queue received the job.
    pub fn is_unconfirmed(&self) -> bool {
        self.published == LOST_UNCONFIRMED
    }

    /// The bytes as the worker published them.
    pub fn published(&self) -> &Bytes {
        &self.published
    }

    /// The response body: the published bytes if they are JSON, otherwise `{"raw": …}` with the bytes as
    /// text.
    pub fn body(&self) -> Bytes {
        // IgnoredAny does not recurse, so the nesting depth is not limited.
        if self.is_known_json || serde_json::from_slice::<IgnoredAny>(&self.published).is_ok() {
            return self.published.clone();
        }
        let raw = String::from_utf8_lossy(&self.published);
        Bytes::from(serde_json::json!({ "raw": raw }).to_string())
    }

    /// The members for the row and the metrics; all `None` if the result is not a JSON object.
    pub fn fields(&self) -> ResultFields<'_> {
        self.read().unwrap_or_default()
    }

    /// Passes [`Self::fields`] to `take`. The returned outcome remembers that it is JSON, so [`Self::body`]
    /// need not parse it again.
    pub fn into_read<T>(mut self, take: impl FnOnce(&ResultFields<'_>) -> T) -> (Self, T) {
        let read = self.read();
        // An object that was parsed is JSON. Other values may be JSON too, so they are parsed again.
        let is_known_json = read.is_some();
        let taken = take(&read.unwrap_or_default());
        self.is_known_json = is_known_json;
        (self, taken)
    }

    fn read(&self) -> Option<ResultFields<'_>> {
        // UTF-8 is checked once for the whole text, not for each string in it.
        let text = std::str::from_utf8(&self.published).ok()?;
        serde_json::from_str(text).ok()
    }
}

/// The members of a result that the gateway reads. `None`: absent, null, of another type or not plausible.
#[derive(Debug, Default, PartialEq)]
pub struct ResultFields<'a> {
    pub function_id: Option<Cow<'a, str>>,
    pub worker_id: Option<Cow<'a, str>>,
    pub status: Option<Cow<'a, str>>,
    pub exit_code: Option<i64>,
    pub stdout: Option<Cow<'a, str>>,
    pub stderr: Option<Cow<'a, str>>,
    pub duration_ms: Option<f64>,
    pub handler_duration_ms: Option<f64>,
    pub cold_start: Option<bool>,
    pub started_at: Option<Cow<'a, str>>,
    pub peak_memory_bytes: Option<f64>,
    pub allocated_memory_mb: Option<f64>,
    pub recommended_memory_mb: Option<f64>,
    pub optimization_tip: Option<Cow<'a, str>>,
    /// A JSON string or number, as JSON text.
    pub estimated_savings: Option<&'a str>,
}

impl<'de> Deserialize<'de> for ResultFields<'de> {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct FieldsVisitor;
        impl<'de> Visitor<'de> for FieldsVisitor {
            type Value = ResultFields<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<ResultFields<'de>, A::Error> {
                let mut fields = ResultFields::default();
                while let Some(JsonText(key)) = map.next_key()? {
                    let value: &'de RawValue = map.next_value()?;
                    fields.take(&key, value);
                }
                Ok(fields)
            }
        }
        d.deserialize_map(FieldsVisitor)
    }
}

impl<'a> ResultFields<'a> {
    fn take(&mut self, key: &str, value: &'a RawValue) {
        match key {
            "functionId" => self.function_id = text(value),
            "workerId" => self.worker_id = text(value).filter(|id| !id.is_empty()),
            "startedAt" => self.started_at = text(value),
            "status" => self.status = text(value).filter(|status| !status.is_empty()),
            // Some workers write whole numbers as 0.0.
            "exitCode" => {
                self.exit_code = read(value).filter(|code: &f64| code.fract() == 0.0).map(|code| code as i64);
            }
            "stdout" => self.stdout = text(value),
            "stderr" => self.stderr = text(value),
            "durationMs" | "duration_ms" => {
                self.duration_ms = number(value, DURATION_MS_MAX).or(self.duration_ms);
            }
            "handlerDurationMs" | "handler_duration_ms" => {
                self.handler_duration_ms = number(value, DURATION_MS_MAX).or(self.handler_duration_ms);
            }
            "coldStart" => self.cold_start = read(value),
            "peakMemoryBytes" | "peak_memory_bytes" => {
                self.peak_memory_bytes = number(value, MEMORY_BYTES_MAX).or(self.peak_memory_bytes);
            }
            "allocatedMemoryMb" => self.allocated_memory_mb = number(value, MEMORY_MB_MAX),
            "recommendedMemoryMb" => self.recommended_memory_mb = number(value, MEMORY_MB_MAX),
            "optimizationTip" => self.optimization_tip = text(value),
            "estimatedSavings" => self.estimated_savings = scalar(value),
            _ => {}
        }
    }
}

/// A string or a finite number, as JSON text of at most [`SCALAR_BYTES_MAX`] bytes.
fn scalar(value: &RawValue) -> Option<&str> {
    if value.get() == "null" {
        return None;
    }
    let is_number = || read(value).is_some_and(|n: f64| n.is_finite());
    let fits =
        value.get().len() <= SCALAR_BYTES_MAX && (read::<JsonText<'_>>(value).is_some() || is_number());
    fits.then(|| value.get())
}

fn read<'a, T: Deserialize<'a>>(value: &'a RawValue) -> Option<T> {
    serde_json::from_str(value.get()).ok()
}

/// A string. A lone surrogate becomes U+FFFD, so that the rest of the text is kept. Python writes lone
/// surrogates for bytes that are not UTF-8.
fn text(value: &RawValue) -> Option<Cow<'_, str>> {
    // Skips null, which most absent members are, because an error of serde allocates.
    if !value.get().starts_with('"') {
        return None;
    }
    let whole = read(value).map(|JsonText(text)| text);
    whole.or_else(|| serde_json::from_str(&without_halves(value.get())).map(Cow::Owned).ok())
}

fn without_halves(json: &str) -> String {
    let mut out = String::with_capacity(json.len());
    let mut rest = json;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let len = match Escape::at(&rest.as_bytes()[at..]) {
            Escape::Whole(len) => {
                out.push_str(&rest[at..at + len]);
                len
            }
            Escape::Half => {
                out.push('\u{FFFD}');
                Escape::HALF_LEN
            }
        };
        rest = &rest[at + len..];
    }
    out + rest
}

/// A number from 0 to `max`. Any other number would corrupt sums and histograms permanently.
fn number(value: &RawValue, max: f64) -> Option<f64> {
    if !value.get().starts_with(|c: char| c.is_ascii_digit() || c == '-') {
        return None;
    }
    read(value).filter(|n: &f64| (0.0..=max).contains(n))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(published: impl Into<Vec<u8>>) -> Outcome {
        Outcome::new(Bytes::from(published.into()))
    }

    #[test]
    fn json_is_returned_byte_for_byte() {
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        for json in ["{ \"a\":1 , \"a\":2}", "null", "[]", " 1e999 ", "\"\\ud800\"", deep.as_str()] {
            assert_eq!(outcome(json).body(), json.as_bytes(), "{}", &json[..json.len().min(20)]);
        }
    }

    #[test]
    fn results_that_are_not_json_are_wrapped() {
        assert_eq!(outcome("").body(), r#"{"raw":""}"#);
        assert_eq!(outcome("oh \"no\"").body(), r#"{"raw":"oh \"no\""}"#);
        assert_eq!(outcome(b"\xff\x00".to_vec()).body(), "{\"raw\":\"\u{fffd}\\u0000\"}");
        assert_eq!(outcome("{} {}").body(), r#"{"raw":"{} {}"}"#);
    }

    #[test]
    fn a_parsed_result_is_not_parsed_again_and_does_not_change() {
        let invalid_key = r#"{"\ud800":1}"#;
        for (published, is_known) in [
            ("{}", true),
            (r#" {"a":[1e999]} "#, true),
            ("[]", false),
            (invalid_key, false),
            ("{", false),
            ("", false),
        ] {
            let (read, status) =
                outcome(published).into_read(|fields| fields.status.clone().map(Cow::into_owned));
            assert_eq!((read.is_known_json, status), (is_known, None), "{published}");
            assert_eq!(read.body(), outcome(published).body());
        }
        let (_, status) =
            outcome(r#"{"status":"S"}"#).into_read(|fields| fields.status.clone().map(Cow::into_owned));
        assert_eq!(status.as_deref(), Some("S"));
    }

    #[test]
    fn an_invalid_member_does_not_hide_others() {
        let published = outcome(
            r#"{"status":7,"exitCode":0,"exitCode":3,"stdout":"o","durationMs":null,"duration_ms":2,
                "handlerDurationMs":-1,"peakMemoryBytes":1e400}"#,
        );
        let fields = published.fields();
        let expected = ResultFields {
            exit_code: Some(3),
            stdout: Some("o".into()),
            duration_ms: Some(2.0),
            ..Default::default()
        };
        assert_eq!(fields, expected);
        let odd = outcome(
            r#"{"exitCode":0.0,"durationMs":1e300,"peakMemoryBytes":1e30,
                "stdout":"\ud800 x\\\ud83d\ude00\udc00"}"#,
        );
        let odd = odd.fields();
        assert_eq!((odd.exit_code, odd.duration_ms, odd.peak_memory_bytes), (Some(0), None, None));
        assert_eq!(odd.stdout.as_deref(), Some("\u{FFFD} x\\\u{1F600}\u{FFFD}"));
        for not_an_object in ["", "[]", "1", "x", "{"] {
            assert_eq!(outcome(not_an_object).fields(), ResultFields::default(), "{not_an_object}");
        }
    }

    /// Any publication, even of a broken worker, results in a response and a row.
    #[test]
    fn fuzz_worker_results() {
        use crate::model::{Execution, FunctionId, JobId, MESSAGE_BYTES_MAX, NodeId};
        crate::fuzz::run("worker_result", |input| {
            let outcome = Outcome::new(Bytes::copy_from_slice(input));
            let id = JobId::new(NodeId(1), 0, 0);
            let row = Execution::of(id, FunctionId::parse("f").unwrap(), &outcome.fields());
            assert!(row.message.len() <= MESSAGE_BYTES_MAX + 200 && row.duration_ms.is_finite());
            assert!(!row.status.as_str().is_empty());
            let body = outcome.body();
            assert!(serde_json::from_slice::<IgnoredAny>(&body).is_ok(), "the client gets JSON");
            let is_json = serde_json::from_slice::<IgnoredAny>(input).is_ok();
            assert_eq!(is_json, body == input, "JSON is returned byte for byte");
        });
    }
}
