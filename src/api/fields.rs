//! Parses and checks the properties of a function that clients send: form, bounds and error texts.

use super::call::CallHeaders;
use super::problem::ApiError;
use crate::model::{Function, Handler, Runtime};
use http::header::HeaderValue;
use percent_encoding::percent_decode;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;
use std::collections::HashSet;
use std::fmt;

/// Maximum length of a name, in characters.
const NAME_CHARS_MAX: usize = 256;
/// Maximum length of a description, in characters.
pub const DESCRIPTION_CHARS_MAX: usize = 4096;
/// Maximum length of the environment variables as JSON, in bytes. They are part of every queue message, whose
/// size is bounded.
const ENV_BYTES_MAX: usize = 32 << 10;

/// What a handler must be, for error texts.
pub const HANDLER_FORM: &str =
    "two or more identifiers with dots between them, such as main.handler, of at most 128 bytes; or empty";

/// Runtime and memory size (MiB) of a new function, from the header fields of its upload.
pub fn sizes(headers: &CallHeaders) -> Result<(Runtime, u64), ApiError> {
    let runtime = header_text("x-runtime", headers.x_runtime.as_ref())?;
    let runtime = match runtime.as_deref() {
        None | Some("") => Runtime::Python,
        Some(name) => Runtime::parse(name)
            .ok_or_else(|| ApiError::invalid("`x-runtime` must be python, nodejs, cpp or go"))?,
    };
    let memory_mb = header_text("x-memory-mb", headers.x_memory_mb.as_ref())?;
    let memory_mb = match memory_mb.as_deref() {
        None | Some("") => Some(Function::MEMORY_MB_DEFAULT),
        Some(text) => digits(text),
    };
    let bounds = runtime.new_memory_mb_bounds();
    let invalid = || {
        // Clients of the previous controller recognize this error by its first words.
        let (name, least, most) = (runtime.name(), bounds.start(), bounds.end());
        let wanted = format!("`x-memory-mb` must be a whole number from {least} to {most}");
        ApiError::invalid(format!("Invalid memoryMb for {name}: {wanted}"))
    };
    let memory_mb = memory_mb.filter(|mb| bounds.contains(mb)).ok_or_else(invalid)?;
    Ok((runtime, memory_mb))
}

/// Parses a number that consists of digits only. `name` is for the error text.
pub fn whole_number(name: &str, text: &str) -> Result<u64, ApiError> {
    digits(text).ok_or_else(|| ApiError::invalid(format!("`{name}` must be a whole number")))
}

fn digits(text: &str) -> Option<u64> {
    let is_number = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    text.parse().ok().filter(|_| is_number)
}

/// Checks the memory size of an existing function, in MiB, against the bounds of its runtime. `name` is for
/// the error text.
pub fn memory(name: &str, memory_mb: u64, runtime: &str) -> Result<(), ApiError> {
    let bounds = Runtime::memory_mb_bounds(runtime);
    let (least, most) = (bounds.start(), bounds.end());
    let told = || ApiError::invalid(format!("`{name}` must be from {least} to {most} for {runtime}"));
    bounds.contains(&memory_mb).then_some(()).ok_or_else(told)
}

/// The handler of a new function. Absent or empty: none. `name` is for the error text.
pub fn new_handler(name: &str, text: Option<String>, runtime: Runtime) -> Result<Option<Handler>, ApiError> {
    let handler = handler(name, text.as_deref().unwrap_or_default())?;
    handler_fits(name, handler.as_ref(), runtime.name())?;
    Ok(handler)
}

/// Parses a handler. The empty text is none. `name` is for the error text.
pub fn handler(name: &str, text: &str) -> Result<Option<Handler>, ApiError> {
    if text.is_empty() {
        return Ok(None);
    }
    let told = || ApiError::invalid(format!("`{name}` must be {HANDLER_FORM}"));
    Handler::parse(text).map(Some).ok_or_else(told)
}

/// Checks that functions of the runtime may have the handler. `name` is for the error text.
pub fn handler_fits(name: &str, handler: Option<&Handler>, runtime: &str) -> Result<(), ApiError> {
    let fits = handler.is_none() || Runtime::parse(runtime).is_some_and(Runtime::has_handlers);
    let told = || ApiError::invalid(format!("`{name}`: only functions in python and nodejs have a handler"));
    fits.then_some(()).ok_or_else(told)
}

/// Decodes a header field of percent-encoded UTF-8, without blanks around it.
///
/// # Errors
/// Invalid UTF-8 and control characters.
pub fn header_text(name: &str, value: Option<&HeaderValue>) -> Result<Option<String>, ApiError> {
    let Some(value) = value else { return Ok(None) };
    let text = percent_decode(value.as_bytes()).decode_utf8();
    let text = text.map_err(|_| ApiError::invalid(format!("`{name}` must be percent-encoded UTF-8")))?;
    if text.chars().any(char::is_control) {
        return Err(ApiError::invalid(format!("`{name}` must not contain control characters")));
    }
    Ok(Some(text.trim().to_owned()))
}

/// Checks the length of a description.
pub fn description(text: String) -> Result<String, ApiError> {
    let fits = text.chars().count() <= DESCRIPTION_CHARS_MAX;
    let told = || format!("`description` is longer than {DESCRIPTION_CHARS_MAX} characters");
    fits.then_some(text).ok_or_else(|| ApiError::invalid(told()))
}

/// Checks environment variables: a JSON object that maps names to strings, numbers or booleans. Returns it as
/// JSON text; `{}` if it is absent or empty.
pub fn env_vars(text: Option<String>) -> Result<String, ApiError> {
    let text = text.unwrap_or_default();
    if text.trim().is_empty() {
        return Ok("{}".to_owned());
    }
    let bad = |why: &str| ApiError::invalid(format!("`envVars` {why}"));
    if text.len() > ENV_BYTES_MAX {
        return Err(bad(&format!("is longer than {ENV_BYTES_MAX} bytes")));
    }
    let variables: Variables = serde_json::from_str(&text).map_err(|_| {
        bad("must be a JSON object that maps names, each given once, to strings, numbers or booleans")
    })?;
    Ok(variables.0)
}

/// The variables as JSON text. Values are kept byte for byte: a number may have more digits than an `f64`.
struct Variables(String);

impl<'de> Deserialize<'de> for Variables {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct VariablesVisitor;
        impl<'de> Visitor<'de> for VariablesVisitor {
            type Value = Variables;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of variables")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Variables, A::Error> {
                let mut seen = HashSet::new();
                let mut pairs = Vec::new();
                while let Some((name, value)) = map.next_entry::<String, &RawValue>()? {
                    let is_name = !name.is_empty() && !name.contains(['=', '\0']);
                    if !is_name || !is_scalar(value) {
                        return Err(A::Error::custom("not a variable"));
                    }
                    pairs.push(format!("{}:{}", Value::from(name.as_str()), value.get()));
                    if !seen.insert(name) {
                        return Err(A::Error::custom("duplicate name"));
                    }
                }
                Ok(Variables(format!("{{{}}}", pairs.join(","))))
            }
        }
        d.deserialize_map(VariablesVisitor)
    }
}

/// Whether the value is a string without NUL, a number or a boolean.
fn is_scalar(value: &RawValue) -> bool {
    match value.get().as_bytes().first() {
        Some(b'"') => serde_json::from_str::<String>(value.get()).is_ok_and(|text| !text.contains('\0')),
        Some(first) => first.is_ascii_digit() || b"-tf".contains(first),
        None => false,
    }
}

/// Checks the length of a function's name.
pub fn name(text: String) -> Result<String, ApiError> {
    let fits = (1..=NAME_CHARS_MAX).contains(&text.chars().count());
    let told = || format!("the function's name must have 1 to {NAME_CHARS_MAX} characters");
    fits.then_some(text).ok_or_else(|| ApiError::invalid(told()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_bounded_by_runtime() {
        for (mb, runtime, fits) in [
            (31, "python", false),
            (32, "python", true),
            (32, "go", true),
            (10_240, "python", true),
            (10_241, "python", false),
            (1_024, "cpp", true),
            (1_025, "nodejs", false),
        ] {
            assert_eq!(memory("memoryMb", mb, runtime).is_ok(), fits, "{mb} {runtime}");
        }
        assert!(
            ApiError::refusal(memory("memory", 1, "go")).contains("`memory` must be from 32 to 1024 for go")
        );
    }

    #[test]
    fn uploads_have_their_own_memory_bounds() {
        let sizes = |runtime: &'static str, mb: &'static str| {
            let value = |text| Some(HeaderValue::from_static(text));
            sizes(&CallHeaders {
                x_runtime: value(runtime),
                x_memory_mb: value(mb),
                ..CallHeaders::default()
            })
        };
        for (runtime, mb, given) in [
            ("", "", (Runtime::Python, 128)),
            ("python", "10240", (Runtime::Python, 10_240)),
            ("nodejs", " 128 ", (Runtime::Nodejs, 128)),
            ("go", "1024", (Runtime::Go, 1_024)),
        ] {
            assert_eq!(sizes(runtime, mb).unwrap(), given, "{runtime} {mb}");
        }
        for (runtime, mb) in [
            ("python", "127"),
            ("python", "10241"),
            ("nodejs", "1025"),
            ("cpp", "32"),
            ("go", "2g"),
            ("go", "-128"),
            ("python", "99999999999999999999999"),
        ] {
            let detail = ApiError::refusal(sizes(runtime, mb));
            assert!(detail.starts_with(&format!("Invalid memoryMb for {runtime}")), "{mb}: {detail}");
        }
    }

    #[test]
    fn handlers_depend_on_the_runtime() {
        let parsed = |text: &str, runtime| new_handler("x-handler", Some(text.to_owned()), runtime);
        for runtime in [Runtime::Python, Runtime::Nodejs] {
            let handler = parsed("pkg.mod.fn", runtime).unwrap();
            assert_eq!(handler.as_ref().map(Handler::as_str), Some("pkg.mod.fn"), "{runtime:?}");
            for bad in ["main", "main.", " main.handler", "lib/main.handler", "main.händler"] {
                let detail = ApiError::refusal(parsed(bad, runtime));
                assert!(detail.starts_with("`x-handler` must be two or more identifiers"), "{bad}: {detail}");
            }
        }
        for runtime in [Runtime::Cpp, Runtime::Go] {
            let detail = ApiError::refusal(parsed("main.handler", runtime));
            assert!(detail.contains("only functions in python and nodejs"), "{runtime:?}: {detail}");
        }
        for runtime in Runtime::ALL {
            assert_eq!(parsed("", runtime).unwrap(), None);
            assert_eq!(new_handler("handler", None, runtime).unwrap(), None);
        }
        assert!(HANDLER_FORM.contains(&format!("at most {} bytes", Handler::LEN_MAX)));
        ApiError::refusal(handler_fits("handler", Handler::parse("a.b").as_ref(), "ruby"));
    }

    #[test]
    fn variables_are_an_object_of_scalars() {
        for (given, kept) in [
            (None, "{}"),
            (Some(" "), "{}"),
            (Some(r#"{"B":"1","A":2,"C":true}"#), r#"{"B":"1","A":2,"C":true}"#),
            (Some(r#" { "A\u0042" : 12345678901234567890123 } "#), r#"{"AB":12345678901234567890123}"#),
        ] {
            assert_eq!(env_vars(given.map(str::to_owned)).unwrap(), kept);
        }
        for bad in [
            "[]",
            "{",
            r#"{"A":null}"#,
            r#"{"A":{}}"#,
            r#"{"":"x"}"#,
            r#"{"A=B":"x"}"#,
            r#"{"A":"1","A":"2"}"#,
            r#"{"A":"1","\u0041":"2"}"#,
            r#"{"A":"\ud800"}"#,
            r#"{"A":"\u0000"}"#,
        ] {
            assert!(ApiError::refusal(env_vars(Some(bad.to_owned()))).contains("envVars"), "{bad}");
        }
    }

    #[test]
    fn header_fields_are_percent_encoded() {
        let text = |value: &'static [u8]| header_text("x", Some(&HeaderValue::from_bytes(value).unwrap()));
        assert_eq!(text(b" a%20b%C3%A4 ").unwrap().as_deref(), Some("a bä"));
        assert_eq!(text("ä".as_bytes()).unwrap().as_deref(), Some("ä"));
        for bad in [&b"%ff"[..], b"\xff", b"a%00b"] {
            ApiError::refusal(text(bad));
        }
    }
}
