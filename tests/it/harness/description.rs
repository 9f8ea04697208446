//! Validates every answer of a gateway against the OpenAPI document of the gateway.
//!
//! Status, content type, body and header fields of each answer must be described. So the document cannot fall
//! behind the code, and single tests need not check it.

use super::http::Answer;
use jsonschema::Validator;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::OnceLock;

const DOCUMENT: &str = include_str!("../../../src/api/openapi.json");
const PROBLEM: &str = "application/problem+json";

/// The responses of one operation, by status.
type Responses = BTreeMap<u16, Response>;

struct Description {
    /// (segments of the path, methods in lower case)
    paths: Vec<(Vec<String>, BTreeMap<String, Responses>)>,
    problem: Validator,
}

struct Response {
    headers: Vec<Header>,
    /// Content type and schema; `None`: no body.
    content: Option<(String, Schema)>,
}

struct Header {
    name: String,
    required: bool,
    is_integer: bool,
    schema: Validator,
}

enum Schema {
    /// Anything, at any depth: what a worker has published.
    Free,
    Json(Box<Validator>),
    Text,
}

fn description() -> &'static Description {
    static DESCRIPTION: OnceLock<Description> = OnceLock::new();
    DESCRIPTION.get_or_init(|| {
        let document: Value = serde_json::from_str(DOCUMENT).expect("the description is JSON");
        Description::read(&document)
    })
}

/// Panics if the document does not describe this answer.
#[track_caller]
pub fn check(method: &str, target: &str, answer: &Answer) {
    if let Err(why) = description().verify(method, target, answer) {
        panic!("{method} {target}: the answer {} is not as openapi.json describes it: {why}", answer.status);
    }
}

impl Description {
    fn read(document: &Value) -> Self {
        let mut paths = Vec::new();
        for (path, item) in document["paths"].as_object().expect("paths") {
            let methods = item.as_object().expect("a path").iter().filter(|(name, _)| *name != "parameters");
            let methods = methods.map(|(method, operation)| (method.clone(), responses(document, operation)));
            paths.push((segments(path), methods.collect()));
        }
        let problem = validator(document, &json!({ "$ref": "#/components/schemas/Problem" }));
        Self { paths, problem }
    }

    fn verify(&self, method: &str, target: &str, answer: &Answer) -> Result<(), String> {
        let path = target.split('?').next().unwrap_or_default();
        let path = match path.strip_prefix("/api") {
            Some(rest) if rest.is_empty() || rest.starts_with('/') => rest,
            _ => path,
        };
        let path = segments(path.strip_suffix('/').unwrap_or(path));
        let is_head = method == "HEAD";
        let method = if is_head { "get".to_owned() } else { method.to_ascii_lowercase() };
        let Some((_, methods)) = self.paths.iter().find(|(pattern, _)| fits(pattern, &path)) else {
            // `/status` without an id has a special answer.
            let may = if path == ["", "status"] { &[400, 401][..] } else { &[404] };
            return self.verify_unrouted(may, is_head, answer);
        };
        let Some(responses) = methods.get(&method) else {
            return self.verify_unrouted(&[405], is_head, answer);
        };
        let response = responses.get(&answer.status).ok_or("the status is not described")?;
        response.verify(is_head, answer)
    }

    fn verify_unrouted(&self, statuses: &[u16], is_head: bool, answer: &Answer) -> Result<(), String> {
        if !statuses.contains(&answer.status) {
            return Err(format!("expected one of {statuses:?} where nothing is described"));
        }
        verify_type(PROBLEM, answer)?;
        if is_head { Ok(()) } else { verify_json(&self.problem, answer) }
    }
}

impl Response {
    fn verify(&self, is_head: bool, answer: &Answer) -> Result<(), String> {
        for header in &self.headers {
            header.verify(answer)?;
        }
        let Some((mime, schema)) = &self.content else {
            let is_empty = answer.body().is_empty() && answer.header("content-type").is_none();
            return if is_empty { Ok(()) } else { Err("no body is described".to_owned()) };
        };
        verify_type(mime, answer)?;
        match schema {
            Schema::Json(schema) if !is_head => verify_json(schema, answer),
            _ => Ok(()),
        }
    }
}

impl Header {
    fn verify(&self, answer: &Answer) -> Result<(), String> {
        let Some(text) = answer.header(&self.name) else {
            return if self.required { Err(format!("no header {}", self.name)) } else { Ok(()) };
        };
        let number = text.parse::<i64>().ok().filter(|_| self.is_integer);
        let value = number.map_or_else(|| json!(text), |number| json!(number));
        self.schema.validate(&value).map_err(|e| format!("header {}: {text}: {e}", self.name))
    }
}

fn verify_type(mime: &str, answer: &Answer) -> Result<(), String> {
    let given = answer.header("content-type").unwrap_or_default();
    let essence = given.split(';').next().unwrap_or_default().trim();
    if essence == mime { Ok(()) } else { Err(format!("content type {given}, not {mime}")) }
}

fn verify_json(schema: &Validator, answer: &Answer) -> Result<(), String> {
    let body: Value = serde_json::from_slice(answer.body()).map_err(|e| format!("no JSON: {e}"))?;
    let wrong: Vec<String> =
        schema.iter_errors(&body).map(|e| format!("{}: {e}", e.instance_path())).collect();
    if wrong.is_empty() { Ok(()) } else { Err(format!("{}\n{body}", wrong.join("\n"))) }
}

fn segments(path: &str) -> Vec<String> {
    path.trim_end_matches('/').split('/').map(str::to_owned).collect()
}

fn fits(pattern: &[String], path: &[String]) -> bool {
    let fits = |(part, given): (&String, &String)| {
        if part.starts_with('{') { !given.is_empty() } else { part == given }
    };
    pattern.len() == path.len() && pattern.iter().zip(path).all(fits)
}

fn responses(document: &Value, operation: &Value) -> Responses {
    let responses = operation["responses"].as_object().expect("responses");
    let read = |(status, response): (&String, &Value)| {
        (status.parse().expect("a status"), read_response(document, resolved(document, response)))
    };
    responses.iter().map(read).collect()
}

fn read_response(document: &Value, response: &Value) -> Response {
    let headers = response["headers"].as_object().into_iter().flatten().map(|(name, header)| {
        let header = resolved(document, header);
        Header {
            name: name.clone(),
            required: header["required"] == true,
            is_integer: header["schema"]["type"] == "integer",
            schema: validator(document, &header["schema"]),
        }
    });
    let mut contents = response["content"].as_object().into_iter().flatten();
    let content = contents.next().map(|(mime, content)| {
        let schema = resolved(document, &content["schema"]);
        let is_free = schema.as_object().is_some_and(|words| words.keys().all(|word| word == "description"));
        let schema = match (mime.ends_with("json"), is_free) {
            (true, false) => Schema::Json(Box::new(validator(document, schema))),
            (true, true) => Schema::Free,
            (false, _) => Schema::Text,
        };
        (mime.clone(), schema)
    });
    assert!(contents.next().is_none(), "an answer has one content type: {response}");
    Response { headers: headers.collect(), content }
}

/// Resolves a `$ref`.
fn resolved<'a>(document: &'a Value, value: &'a Value) -> &'a Value {
    match value["$ref"].as_str().and_then(|pointer| pointer.strip_prefix('#')) {
        Some(pointer) => document.pointer(pointer).expect("the target of a $ref exists"),
        None => value,
    }
}

/// A validator with the targets of all `$ref`s.
fn validator(document: &Value, schema: &Value) -> Validator {
    let whole = json!({ "components": document["components"], "allOf": [schema] });
    let options = jsonschema::options().should_validate_formats(true);
    options.build(&whole).unwrap_or_else(|e| panic!("{schema} is no schema: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::http::Message;

    fn answer(status: u16, mime: &str, body: &str) -> Answer {
        let headers = [("content-type", mime), ("x-request-id", "r"), ("retry-after", "1")];
        let headers = headers.map(|(name, value)| (name.to_owned(), value.to_owned()));
        Answer {
            status,
            message: Message { start: String::new(), headers: headers.into(), body: body.into() },
        }
    }

    fn problem(status: u16, code: &str) -> Answer {
        let body = json!({
            "type": format!("urn:infra-controller:problem:{code}"), "title": "t", "status": status,
            "detail": "d", "requestId": "r", "code": code, "error": "d",
        });
        answer(status, PROBLEM, &body.to_string())
    }

    #[test]
    fn undescribed_answers_are_found() {
        let json = "application/json; charset=utf-8";
        let ok = r#"{"status":"OK"}"#;
        let nameless = Answer {
            message: Message {
                headers: vec![("content-type".into(), json.into())],
                ..answer(200, json, ok).message
            },
            ..answer(200, json, ok)
        };
        for (method, target, answer, reason) in [
            ("GET", "/livez", answer(200, json, ok), ""),
            ("HEAD", "/api/livez/?x", answer(200, json, ""), ""),
            ("GET", "/run", problem(405, "method_not_allowed"), ""),
            ("GET", "/nope", problem(404, "no_such_route"), ""),
            ("GET", "/status/", problem(400, "invalid_request"), ""),
            ("GET", "/readyz", problem(503, "not_ready"), ""),
            ("POST", "/run", answer(200, json, &"[".repeat(1000)), ""),
            ("GET", "/livez", answer(200, json, "{}"), "required"),
            ("GET", "/livez", answer(200, json, r#"{"status":"OK","more":1}"#), "more"),
            ("GET", "/livez", answer(200, json, "{"), "no JSON"),
            ("GET", "/livez", answer(200, "text/plain", ok), "content type"),
            ("GET", "/livez", answer(201, json, ok), "status"),
            ("GET", "/livez", nameless, "x-request-id"),
            ("GET", "/nope", answer(200, json, ok), "nothing is described"),
            ("POST", "/livez", problem(404, "no_such_route"), "nothing is described"),
            ("GET", "/readyz", problem(503, "no_such_code"), "no_such_code"),
            ("GET", "/functions/f", answer(304, json, ""), "header ETag"),
        ] {
            let verified = description().verify(method, target, &answer);
            let why = verified.err().unwrap_or_default();
            assert_eq!(why.is_empty(), reason.is_empty(), "{method} {target} {}: {why}", answer.status);
            assert!(why.to_lowercase().contains(&reason.to_lowercase()), "{reason}: {why}");
        }
    }
}
