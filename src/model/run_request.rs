//! Parses the body of `POST /run` in one pass, without a JSON tree.
//!
//! `inputData` must reach the function byte for byte, so it stays text. A tree was rejected: it would change
//! numbers beyond f64 and repeated members, and cost an allocation for each value.

use super::text::JsonText;
use crate::model::escape::Escape;
use crate::model::{FunctionId, encoding_problem};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;

/// The model of a job whose client names none.
const MODEL_DEFAULT: &str = "llama3:8b";

/// Maximum nesting of `inputData`, in levels; common JSON parsers accept this.
const INPUT_DEPTH_MAX: usize = 128;

/// The parsed body of `POST /run`.
#[derive(Debug)]
pub struct RunRequest<'a> {
    pub function: FunctionId,
    /// The JSON text of `inputData`; `{}` if it is absent or null.
    pub input: &'a str,
    pub model: Option<Cow<'a, str>>,
}

/// Why a body was rejected. The text is for the client and never quotes the body.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RunRequestError {
    #[error("the body is not a JSON object: {0}")]
    NotJson(String),
    #[error("`{0}` is missing")]
    Missing(&'static str),
    #[error("`{member}` {problem}")]
    Member { member: &'static str, problem: &'static str },
    #[error("a member occurs twice in the body")]
    Twice,
}

impl<'a> RunRequest<'a> {
    /// Parses a body. Unknown members are ignored; a repeated one is an error.
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
        // Handlers call `event.get`, so absent or null input becomes an empty object.
        let input = members.input.map(RawValue::get).filter(|input| *input != "null").unwrap_or("{}");
        check_input(input).map_err(|problem| RunRequestError::Member { member: "inputData", problem })?;
        let model = match members.model {
            Some(raw) if raw.get() != "null" => Some(text(raw, "modelId")?),
            _ => None,
        };
        Ok(Self { function, input, model })
    }

    /// The model for the job, or the default.
    pub fn model(&self) -> &str {
        self.model.as_deref().unwrap_or(MODEL_DEFAULT)
    }
}

fn json_problem(body: &[u8], e: &serde_json::Error) -> String {
    encoding_problem(body).map_or_else(|| json_place(e), str::to_owned)
}

/// The kind and the place of a syntax error. The message of serde may quote the body, so it is not used.
fn json_place(e: &serde_json::Error) -> String {
    let kind = match e.classify() {
        serde_json::error::Category::Eof => "it ends too early",
        serde_json::error::Category::Data => "it has another type",
        _ => "it has a syntax error",
    };
    format!("{kind} at line {}, column {}", e.line(), e.column())
}

fn text<'a>(raw: &'a RawValue, member: &'static str) -> Result<Cow<'a, str>, RunRequestError> {
    let read: Result<JsonText<'a>, _> = serde_json::from_str(raw.get());
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
                let mut others = HashSet::new(); // allocates only if there is an unknown member
                while let Some(JsonText(key)) = map.next_key()? {
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

/// Rejects well-formed JSON that the parsers of workers may not accept: nesting beyond [`INPUT_DEPTH_MAX`],
/// and escapes of lone surrogates.
fn check_input(json: &str) -> Result<(), &'static str> {
    let bytes = json.as_bytes();
    let mut depth = 0_usize;
    let mut in_string = false;
    let mut i = 0;
    while i < bytes.len() {
        match (in_string, bytes[i]) {
            (true, b'\\') => match Escape::at(&bytes[i..]) {
                Escape::Whole(len) => i += len - 1,
                Escape::Half => return Err("contains an escape of a lone surrogate"),
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

    #[test]
    fn invalid_bodies_are_rejected() {
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
}
