//! The body of `POST /run`, read without a tree.

use crate::model::escape::Escape;
use crate::model::{FunctionId, Text, encoding_problem};
use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;

/// Model a job names when the client names none.
const MODEL_DEFAULT: &str = "llama3:8b";

/// Deepest nesting of `inputData`, in levels: what common JSON readers accept.
const INPUT_DEPTH_MAX: usize = 128;

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
