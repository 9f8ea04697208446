//! `/upload`, `/functions` and `/functions/:id`: make, list, show, change and delete functions.

use super::cursor::Cursors;
use super::form::{Form, Upload};
use super::query::Query;
use super::{ApiError, BodyStream, Call, CallHeaders, Reply, object, precondition};
use crate::backend::FunctionStore;
use crate::functions::{Change, EditError, Editor, NewCode, NewFunction};
use crate::model::{ConfigAction, Function, FunctionId, Runtime, archive};
use bytes::BytesMut;
use http::StatusCode;
use http::header::{ETAG, HeaderValue, LINK};
use percent_encoding::percent_decode;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::{Semaphore, SemaphorePermit};

/// Functions of a page when the client names no number: as many as a page may have, since the old controller
/// listed all.
const LIMIT_MAX: usize = 1000;
/// Uploads under way at a time, which bounds the disk they take; more are answered 503.
const UPLOADS_MAX: usize = 8;
/// Uploads that are unpacked at a time, which bounds the cores they take; more wait.
const CHECKS_MAX: usize = 2;
/// Longest name and description, in characters.
const NAME_CHARS_MAX: usize = 256;
const DESCRIPTION_CHARS_MAX: usize = 4096;
/// Longest JSON of environment variables, in bytes. It travels in each job, which has room for little more.
const ENV_BYTES_MAX: usize = 32 << 10;
/// Longest JSON body of a change, in bytes.
const CHANGE_BYTES_MAX: usize = 64 << 10;

/// The context of cursors.
const LIST: &str = "functions";

pub struct FunctionRoutes {
    store: Arc<dyn FunctionStore>,
    editor: Editor,
    cursors: Cursors,
    spool_dir: PathBuf,
    uploads: Semaphore,
    checks: Semaphore,
}

impl FunctionRoutes {
    pub fn new(store: Arc<dyn FunctionStore>, editor: Editor, cursors: Cursors, spool_dir: PathBuf) -> Self {
        let (uploads, checks) = (Semaphore::new(UPLOADS_MAX), Semaphore::new(CHECKS_MAX));
        Self { store, editor, cursors, spool_dir, uploads, checks }
    }

    pub async fn list(&self, call: &Call) -> Result<Reply, ApiError> {
        let query = Query::read(&call.uri, &["limit", "cursor"])?;
        let limit = query.limit(LIMIT_MAX, LIMIT_MAX)?;
        let after = query.get("cursor").map(|cursor| self.cursors.open(&[LIST], cursor)).transpose()?;
        let page = self.store.list(limit, after.as_deref()).await;
        let page = page.map_err(|e| ApiError::backend("the function table", &e))?;
        let functions = page.functions.iter().map(listed).collect();
        let reply = Reply::value(StatusCode::OK, &Value::Array(functions));
        Ok(match page.next {
            Some(place) => {
                let cursor = self.cursors.seal(&[LIST], &place);
                with_next(reply, call, &[("limit", query.get("limit")), ("cursor", Some(&cursor))])
            }
            None => reply,
        })
    }

    pub async fn get(&self, call: &Call) -> Result<Reply, ApiError> {
        let f = read(&*self.store, &function_id(call)?).await?;
        if precondition::is_unchanged(&call.headers, &f.tag()) {
            return Ok(tagged(Reply::json(StatusCode::NOT_MODIFIED, ""), &f));
        }
        let body = json!({
            "id": f.id.as_str(),
            "name": f.name,
            "description": f.description,
            "runtime": f.runtime,
            "memoryMb": f.memory_mb,
            "s3Key": f.s3_key,
            "uploadedAt": f.uploaded_at,
            "version": f.version,
        });
        Ok(tagged(Reply::value(StatusCode::OK, &body), &f))
    }

    pub async fn metrics(&self, call: &Call) -> Result<Reply, ApiError> {
        let f = read(&*self.store, &function_id(call)?).await?;
        let body = json!({
            "executions": f.counters.invocations,
            "avgResponseTime": average(f.counters.total_duration_ms, f.counters.invocations),
            "errors": f.counters.errors,
            // Workers do not report them.
            "coldStarts": null,
        });
        Ok(Reply::value(StatusCode::OK, &body))
    }

    pub async fn upload(&self, call: &Call, body: &mut dyn BodyStream) -> Result<Reply, ApiError> {
        if !call.headers.is_form() {
            return Err(ApiError::NotAForm);
        }
        let (runtime, memory_mb) = sizes(&call.headers)?;
        let name = header_text("x-function-name", call.headers.x_function_name.as_ref())?;
        let _slot = self.upload_slot()?;
        // Fields nobody knows are passed over: clients of the old controller send some.
        let mut form = Form::read(call, body, &self.spool_dir, &["description", "envVars"]).await?;
        let description = checked_description(form.take("description").unwrap_or_default())?;
        let env_vars = checked_env(form.take("envVars"))?;
        let file = form.file.ok_or_else(|| ApiError::invalid("the form holds no `file`"))?;
        let file = self.checked_code(file, runtime).await?;
        let name = name.filter(|name| !name.is_empty()).unwrap_or_else(|| file.name.clone());
        if name.is_empty() || name.chars().count() > NAME_CHARS_MAX {
            return Err(ApiError::invalid(format!(
                "the function's name must have 1 to {NAME_CHARS_MAX} characters"
            )));
        }
        let code = NewCode { file: file.path(), original_name: file.name.clone() };
        let new = NewFunction { name, description, runtime, memory_mb, env_vars, code };
        let function = self.editor.create(&call.key_name, new).await.map_err(ApiError::from)?;
        Ok(changed(&function))
    }

    pub async fn change(&self, call: &Call, body: &mut dyn BodyStream) -> Result<Reply, ApiError> {
        let id = function_id(call)?;
        if call.headers.is_form() {
            let _slot = self.upload_slot()?;
            let fields = ["description", "memoryMb", "memory"];
            let form = Form::read(call, body, &self.spool_dir, &fields).await?;
            return self.change_by_form(call, &id, form).await;
        }
        if !call.headers.is_json() {
            return Err(ApiError::NotJsonNorForm);
        }
        let wanted = Wanted::parse(&whole(body, CHANGE_BYTES_MAX).await?)?;
        self.apply(call, &id, &wanted, None).await
    }

    async fn change_by_form(&self, call: &Call, id: &FunctionId, mut form: Form) -> Result<Reply, ApiError> {
        let number = |name: &str, text: String| {
            let is_number = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
            let number = text.parse::<u64>().ok().filter(|_| is_number);
            number.ok_or_else(|| ApiError::invalid(format!("`{name}` must be a whole number")))
        };
        let wanted = Wanted {
            description: form.take("description"),
            memory_mb: form.take("memoryMb").map(|text| number("memoryMb", text)).transpose()?,
            memory: form.take("memory").map(|text| number("memory", text)).transpose()?,
        };
        if let Some(name) = &form.unknown {
            return Err(ApiError::invalid(format!("a change has no field `{name}`")));
        }
        let wanted = wanted.checked(form.file.is_some())?;
        let file = match form.file {
            Some(file) => {
                let function = read(&*self.store, id).await?;
                // Old items may name any runtime; what it starts with is then not known.
                let runtime = Runtime::parse(&function.runtime);
                let runtime =
                    runtime.ok_or_else(|| ApiError::invalid("the function's runtime takes no code"))?;
                Some(self.checked_code(file, runtime).await?)
            }
            None => None,
        };
        self.apply(call, id, &wanted, file.as_ref()).await
    }

    async fn apply(
        &self,
        call: &Call,
        id: &FunctionId,
        wanted: &Wanted,
        file: Option<&Upload>,
    ) -> Result<Reply, ApiError> {
        let decide = |f: &Function| {
            precondition::check(&call.headers, &f.tag())?;
            if let Some(memory_mb) = wanted.memory_mb {
                let name = if wanted.memory.is_some() { "memory" } else { "memoryMb" };
                checked_memory(name, memory_mb, &f.runtime)?;
            }
            let code = file.map(|file| NewCode { file: file.path(), original_name: file.name.clone() });
            Ok(Change { description: wanted.description.clone(), memory_mb: wanted.memory_mb, code })
        };
        let done = self.editor.change(&call.key_name, id, ConfigAction::Update, decide).await;
        Ok(changed(&done.map_err(ApiError::from)?))
    }

    pub async fn delete(&self, call: &Call) -> Result<Reply, ApiError> {
        let id = function_id(call)?;
        let check = |f: &Function| precondition::check(&call.headers, &f.tag());
        self.editor.delete(&call.key_name, &id, check).await.map_err(ApiError::from)?;
        Ok(Reply::value(StatusCode::OK, &json!({ "success": true, "deletedId": id.as_str() })))
    }

    /// The upload, if it is good code. Unpacks it once, off the asynchronous threads.
    async fn checked_code(&self, upload: Upload, runtime: Runtime) -> Result<Upload, ApiError> {
        let _turn = self.checks.acquire().await.map_err(|_| ApiError::BackendAway)?;
        let checked = tokio::task::spawn_blocking(move || {
            let file = std::fs::File::open(upload.path());
            let file = file.map_err(|e| {
                tracing::error!(error = %e, "Upload Not Read");
                ApiError::BackendAway
            })?;
            let good = archive::check(std::io::BufReader::new(file), runtime);
            good.map_err(|problem| ApiError::BadArchive(problem.to_string()))?;
            Ok(upload)
        });
        checked.await.unwrap_or(Err(ApiError::BackendAway))
    }

    fn upload_slot(&self) -> Result<SemaphorePermit<'_>, ApiError> {
        self.uploads.try_acquire().map_err(|_| ApiError::TooManyUploads)
    }
}

impl From<EditError<ApiError>> for ApiError {
    fn from(error: EditError<ApiError>) -> Self {
        match error {
            EditError::NoSuchFunction => Self::NoSuchFunction,
            EditError::Refused(why) => why,
            EditError::Contended => Self::Contended,
            EditError::Backend(what, e) => Self::backend(what, &e),
        }
    }
}

/// What a PUT asks for.
#[derive(Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", expecting = "an object")]
struct Wanted {
    #[serde(default, deserialize_with = "given")]
    description: Option<String>,
    #[serde(default, deserialize_with = "given_whole")]
    memory_mb: Option<u64>,
    /// The same by its old name.
    #[serde(default, deserialize_with = "given_whole")]
    memory: Option<u64>,
}

/// `null` is no value: to leave a member as it is, it is left out.
fn given<'de, T: Deserialize<'de>, D: serde::Deserializer<'de>>(d: D) -> Result<Option<T>, D::Error> {
    T::deserialize(d).map(Some)
}

fn given_whole<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Option<u64>, D::Error> {
    let null = || serde::de::Error::custom("no whole number");
    object::whole(d)?.map(Some).ok_or_else(null)
}

impl Wanted {
    fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let wanted: Self = object::parse(body, |member| match member {
            "description" => Some("a string"),
            "memoryMb" | "memory" => Some("a whole number"),
            _ => None,
        })?;
        wanted.checked(false)
    }

    /// Brings the two names of the memory together.
    fn checked(mut self, has_file: bool) -> Result<Self, ApiError> {
        if self.memory_mb.is_some() && self.memory.is_some() {
            return Err(ApiError::invalid(
                "`memory` and `memoryMb` are one member by two names; give one of them",
            ));
        }
        self.memory_mb = self.memory_mb.or(self.memory);
        if !has_file && self.description.is_none() && self.memory_mb.is_none() {
            return Err(ApiError::invalid("the change is empty: give `description` or `memoryMb`"));
        }
        self.description = self.description.map(checked_description).transpose()?;
        Ok(self)
    }
}

/// The id in the path; what cannot be an id cannot be a function.
pub fn function_id(call: &Call) -> Result<FunctionId, ApiError> {
    call.params.first().and_then(|raw| FunctionId::parse(raw)).ok_or(ApiError::NoSuchFunction)
}

/// The function as the table has it.
pub async fn read(store: &dyn FunctionStore, id: &FunctionId) -> Result<Function, ApiError> {
    let found = store.get(id).await.map_err(|e| ApiError::backend("the function table", &e))?;
    found.ok_or(ApiError::NoSuchFunction)
}

/// A reply with the function's tag.
pub fn tagged(reply: Reply, function: &Function) -> Reply {
    match HeaderValue::try_from(function.tag()) {
        Ok(tag) => reply.with(ETAG, tag),
        Err(_) => reply, // a tag is always visible ASCII
    }
}

/// What a function was changed to.
pub fn changed(function: &Function) -> Reply {
    let body = json!({ "success": true, "functionId": function.id.as_str() });
    tagged(Reply::value(StatusCode::OK, &body), function)
}

/// A reply with the place of the next page: the request's own path, with this query.
pub fn with_next(reply: Reply, call: &Call, query: &[(&str, Option<&str>)]) -> Reply {
    let given = query.iter().filter_map(|(name, value)| Some((name, (*value)?)));
    let query: Vec<String> = given.map(|(name, value)| format!("{name}={}", encoded(value))).collect();
    let link = format!("<{}?{}>; rel=\"next\"", call.uri.path(), query.join("&"));
    match HeaderValue::try_from(link) {
        Ok(link) => reply.with(LINK, link),
        Err(_) => reply, // a path and encoded values are always visible ASCII
    }
}

fn encoded(value: &str) -> impl std::fmt::Display + '_ {
    percent_encoding::utf8_percent_encode(value, percent_encoding::NON_ALPHANUMERIC)
}

fn listed(f: &Function) -> Value {
    let c = &f.counters;
    json!({
        "functionId": f.id.as_str(),
        "name": f.name,
        "description": f.description,
        "runtime": f.runtime,
        "memoryMb": f.memory_mb,
        "invocations": c.invocations,
        "avgDuration": average(c.total_duration_ms, c.invocations),
        "avgHandlerDuration": average(c.total_handler_duration_ms, c.handler_invocations),
        "uploadedAt": f.uploaded_at,
    })
}

/// In milliseconds, 0 if there is nothing to average.
fn average(total_ms: f64, count: u64) -> f64 {
    // A count below 2^53 is exact as a float.
    if count == 0 { 0.0 } else { total_ms / count as f64 }
}

fn sizes(headers: &CallHeaders) -> Result<(Runtime, u64), ApiError> {
    let runtime = header_text("x-runtime", headers.x_runtime.as_ref())?;
    let runtime = match runtime.as_deref() {
        None | Some("") => Runtime::Python,
        Some(name) => Runtime::parse(name)
            .ok_or_else(|| ApiError::invalid("`x-runtime` must be python, nodejs, cpp or go"))?,
    };
    let memory_mb = header_text("x-memory-mb", headers.x_memory_mb.as_ref())?;
    let memory_mb = match memory_mb.as_deref() {
        None | Some("") => Function::MEMORY_MB_DEFAULT,
        Some(text) => {
            let is_number = text.bytes().all(|b| b.is_ascii_digit());
            let number = text.parse().ok().filter(|_| is_number);
            number.ok_or_else(|| ApiError::invalid("`x-memory-mb` must be a whole number"))?
        }
    };
    checked_memory("x-memory-mb", memory_mb, runtime.name())?;
    Ok((runtime, memory_mb))
}

fn checked_memory(name: &str, memory_mb: u64, runtime: &str) -> Result<(), ApiError> {
    let bounds = Runtime::memory_mb_bounds(runtime);
    let (least, most) = (bounds.start(), bounds.end());
    let told = || ApiError::invalid(format!("`{name}` must be from {least} to {most} for {runtime}"));
    bounds.contains(&memory_mb).then_some(()).ok_or_else(told)
}

/// A header field that is percent-encoded UTF-8.
fn header_text(name: &str, value: Option<&HeaderValue>) -> Result<Option<String>, ApiError> {
    let Some(value) = value else { return Ok(None) };
    let text = percent_decode(value.as_bytes()).decode_utf8();
    let text = text.map_err(|_| ApiError::invalid(format!("`{name}` must be percent-encoded UTF-8")))?;
    if text.chars().any(char::is_control) {
        return Err(ApiError::invalid(format!("`{name}` must not hold control characters")));
    }
    Ok(Some(text.trim().to_owned()))
}

fn checked_description(text: String) -> Result<String, ApiError> {
    let fits = text.chars().count() <= DESCRIPTION_CHARS_MAX;
    let told = || format!("`description` is longer than {DESCRIPTION_CHARS_MAX} characters");
    fits.then_some(text).ok_or_else(|| ApiError::invalid(told()))
}

/// The variables as JSON text: names to strings, numbers or truth values.
fn checked_env(text: Option<String>) -> Result<String, ApiError> {
    let text = text.unwrap_or_default();
    if text.trim().is_empty() {
        return Ok("{}".to_owned());
    }
    let bad = |why: &str| ApiError::invalid(format!("`envVars` {why}"));
    if text.len() > ENV_BYTES_MAX {
        return Err(bad(&format!("is longer than {ENV_BYTES_MAX} bytes")));
    }
    let map: Map<String, Value> = serde_json::from_str(&text).map_err(|_| bad("must be a JSON object"))?;
    for (name, value) in &map {
        if name.is_empty() || name.contains(['=', '\0']) {
            return Err(bad("holds a name that no variable can have"));
        }
        let fits = match value {
            Value::String(text) => !text.contains('\0'),
            Value::Number(_) | Value::Bool(_) => true,
            _ => false,
        };
        if !fits {
            return Err(bad("must map names to strings, numbers or truth values"));
        }
    }
    Ok(Value::Object(map).to_string())
}

async fn whole(body: &mut dyn BodyStream, bytes_max: usize) -> Result<BytesMut, ApiError> {
    let mut whole = BytesMut::new();
    while let Some(piece) = body.next().await? {
        if whole.len() + piece.len() > bytes_max {
            return Err(ApiError::BodyTooLarge { bytes_max });
        }
        whole.extend_from_slice(&piece);
    }
    Ok(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal<T: std::fmt::Debug>(result: Result<T, ApiError>) -> String {
        match result {
            Err(ApiError::Invalid(detail)) => detail,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn changes_are_strict() {
        let parse = |text: &str| Wanted::parse(text.as_bytes());
        let both = parse(r#" {"description":"","memory":512} "#).unwrap();
        assert_eq!((both.description.as_deref(), both.memory_mb), (Some(""), Some(512)));
        let escaped = parse(r#"{"m\u0065moryMb":128}"#).unwrap();
        assert_eq!(escaped.memory_mb, Some(128));
        assert_eq!(parse(r#"{"memory":256.0}"#).unwrap().memory_mb, Some(256));
        let deep = format!("{{\"memoryMb\":{}1{}}}", "[".repeat(5000), "]".repeat(5000));
        for (bad, told) in [
            ("", "object"),
            ("[]", "object"),
            ("null", "object"),
            ("{", "EOF"),
            ("{}", "empty"),
            (r#"{"memoryMb":128}x"#, "trailing"),
            (r#"{"memoryMb":128,"memoryMb":256}"#, "duplicate field `memoryMb`"),
            (r#"{"memoryMb":128,"memory":128}"#, "two names"),
            (r#"{"runtime":"go"}"#, "unknown field `runtime`"),
            (r#"{"memoryMb":"128"}"#, "`memoryMb`"),
            (r#"{"memoryMb":128.5}"#, "`memoryMb`"),
            (r#"{"memoryMb":-128}"#, "`memoryMb`"),
            (r#"{"memoryMb":1e400}"#, "`memoryMb`"),
            (r#"{"memoryMb":null}"#, "`memoryMb`"),
            (r#"{"description":null}"#, "`description`"),
            (r#"{"description":7}"#, "`description`"),
            (r#"{"description":"\ud800"}"#, "`description`"),
            (&deep, "`memoryMb`"),
        ] {
            let detail = refusal(parse(bad));
            assert!(detail.contains(told), "{}: {detail}", &bad[..bad.len().min(40)]);
        }
        let long = format!("{{\"description\":\"{}\"}}", "ä".repeat(DESCRIPTION_CHARS_MAX + 1));
        assert!(refusal(parse(&long)).contains("longer"));
    }

    #[test]
    fn memory_is_bounded_by_runtime() {
        for (mb, runtime, fits) in
            [(127, "python", false), (128, "go", true), (10_240, "python", true), (1_025, "nodejs", false)]
        {
            assert_eq!(checked_memory("memoryMb", mb, runtime).is_ok(), fits, "{mb} {runtime}");
        }
        assert!(
            refusal(checked_memory("memory", 1, "go")).contains("`memory` must be from 128 to 1024 for go")
        );
    }

    #[test]
    fn variables_are_an_object_of_scalars() {
        for (given, kept) in [
            (None, "{}"),
            (Some(" "), "{}"),
            (Some(r#"{"A":"1","B":2,"C":true}"#), r#"{"A":"1","B":2,"C":true}"#),
        ] {
            assert_eq!(checked_env(given.map(str::to_owned)).unwrap(), kept);
        }
        for bad in
            ["[]", "{", r#"{"A":null}"#, r#"{"A":{}}"#, r#"{"":"x"}"#, r#"{"A=B":"x"}"#, r#"{"A":"\u0000"}"#]
        {
            assert!(refusal(checked_env(Some(bad.to_owned()))).contains("envVars"), "{bad}");
        }
    }

    #[test]
    fn header_fields_are_percent_encoded() {
        let text = |value: &'static [u8]| header_text("x", Some(&HeaderValue::from_bytes(value).unwrap()));
        assert_eq!(text(b" a%20b%C3%A4 ").unwrap().as_deref(), Some("a bä"));
        assert_eq!(text("ä".as_bytes()).unwrap().as_deref(), Some("ä"));
        for bad in [&b"%ff"[..], b"\xff", b"a%00b"] {
            refusal(text(bad));
        }
    }
}
