//! `PUT /functions/:id`: changes a function, by JSON or by a form with new code.

use super::call::{BodyStream, Call, function_id};
use super::form::{Form, UploadedFile};
use super::functions::{changed, read};
use super::problem::ApiError;
use super::reply::Reply;
use super::upload::UploadSpool;
use super::{fields, object, precondition};
use crate::audit::{Event, RecentEvents};
use crate::backend::FunctionStore;
use crate::functions::{Editor, FunctionChange, NewCode};
use crate::model::{ConfigAction, Function, FunctionId, Handler, Runtime, now_ms};
use serde::Deserialize;
use std::sync::Arc;

/// Maximum length of a JSON body, in bytes.
const CHANGE_BYTES_MAX: usize = 64 << 10;

/// Largest `maxConcurrency`.
const CONCURRENCY_MOST: u64 = 1_000_000;

/// The handler of changes.
pub struct ChangeRoute {
    store: Arc<dyn FunctionStore>,
    editor: Editor,
    uploads: Arc<UploadSpool>,
    tail: RecentEvents,
}

impl ChangeRoute {
    pub fn new(
        store: Arc<dyn FunctionStore>,
        editor: Editor,
        uploads: Arc<UploadSpool>,
        tail: RecentEvents,
    ) -> Self {
        Self { store, editor, uploads, tail }
    }

    /// Applies a change.
    ///
    /// # Errors
    /// `NoSuchFunction`, `PreconditionFailed`, and those of the body.
    pub async fn put(&self, call: &Call, body: &mut impl BodyStream) -> Result<Reply, ApiError> {
        let id = function_id(call)?;
        // Checked before the body is read, so that no client uploads 50 MiB in vain.
        let function = read(&*self.store, &id).await?;
        precondition::check(&call.headers, &function.tag())?;
        if call.headers.is_form() {
            let _slot = self.uploads.slot()?;
            let names = ["description", "memoryMb", "memory", "maxConcurrency", "handler"];
            let form = self.uploads.read(call, body, &names).await?;
            return self.by_form(call, &function, form).await;
        }
        if !call.headers.is_json() {
            return Err(ApiError::NotJsonNorForm);
        }
        let wanted = Wanted::parse(&super::whole(body, CHANGE_BYTES_MAX).await?)?;
        self.apply(call, &id, &wanted, None).await
    }

    async fn by_form(&self, call: &Call, function: &Function, mut form: Form) -> Result<Reply, ApiError> {
        let number = |name: &str, text: String| fields::whole_number(name, &text);
        let wanted = Wanted {
            description: form.take("description"),
            memory_mb: form.take("memoryMb").map(|text| number("memoryMb", text)).transpose()?,
            memory: form.take("memory").map(|text| number("memory", text)).transpose()?,
            max_concurrency: form
                .take("maxConcurrency")
                .map(|text| number("maxConcurrency", text))
                .transpose()?,
            handler: form.take("handler").map(|text| fields::handler("handler", &text)).transpose()?,
        };
        if let Some(name) = &form.unknown {
            return Err(ApiError::invalid(format!("unknown field `{name}`")));
        }
        let wanted = wanted.checked(form.file.is_some())?;
        wanted.check_for(function)?;
        let file = match form.file {
            Some(file) => {
                // Items of the previous controller may name any runtime. The entry file of an unknown
                // runtime is not known.
                let runtime = Runtime::parse(&function.runtime);
                let runtime =
                    runtime.ok_or_else(|| ApiError::invalid("the function has an unknown runtime"))?;
                let handler = wanted.handler.as_ref().unwrap_or(&function.handler);
                Some(self.uploads.checked(file, runtime, handler.as_ref()).await?)
            }
            None => None,
        };
        self.apply(call, &function.id, &wanted, file.as_ref()).await
    }

    async fn apply(
        &self,
        call: &Call,
        id: &FunctionId,
        wanted: &Wanted,
        file: Option<&UploadedFile>,
    ) -> Result<Reply, ApiError> {
        let decide = |f: &Function| {
            precondition::check(&call.headers, &f.tag())?;
            wanted.check_for(f)?;
            let Wanted { description, memory_mb, max_concurrency, handler, .. } = wanted.clone();
            Ok(FunctionChange { description, memory_mb, max_concurrency, handler })
        };
        let code = file.map(|file| NewCode { file: file.path(), original_name: file.name.clone() });
        let done = self.editor.change(call.key_name(), id, ConfigAction::Update, code, decide).await;
        let function = done.map_err(ApiError::from)?;
        self.tail.note(now_ms(), || Event::Updated(id.clone()));
        Ok(changed(&function))
    }
}

/// The requested change.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase", expecting = "an object")]
struct Wanted {
    #[serde(default, deserialize_with = "given")]
    description: Option<String>,
    #[serde(default, deserialize_with = "given_whole")]
    memory_mb: Option<u64>,
    /// An older name of `memoryMb`.
    #[serde(default, deserialize_with = "given_whole")]
    memory: Option<u64>,
    #[serde(default, deserialize_with = "given_whole")]
    max_concurrency: Option<u64>,
    /// `Some(None)`, sent as the empty string, removes the handler.
    #[serde(default, deserialize_with = "given_handler")]
    handler: Option<Option<Handler>>,
}

/// Rejects `null`. A member that does not change is left out.
fn given<'de, T: Deserialize<'de>, D: serde::Deserializer<'de>>(d: D) -> Result<Option<T>, D::Error> {
    T::deserialize(d).map(Some)
}

fn given_whole<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Option<u64>, D::Error> {
    let null = || serde::de::Error::custom("not a whole number");
    object::whole(d)?.map(Some).ok_or_else(null)
}

fn given_handler<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Option<Option<Handler>>, D::Error> {
    let parsed = fields::handler("handler", &String::deserialize(d)?);
    parsed.map(Some).map_err(|_| serde::de::Error::custom("not a handler"))
}

impl Wanted {
    fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let wanted: Self = object::parse(body, |member| match member {
            "description" => Some("a string"),
            "memoryMb" | "memory" | "maxConcurrency" => Some("a whole number"),
            "handler" => Some(fields::HANDLER_FORM),
            _ => None,
        })?;
        wanted.checked(false)
    }

    /// Merges the two names of the memory size and checks the change.
    fn checked(mut self, has_file: bool) -> Result<Self, ApiError> {
        // Some clients send both names, to be compatible with the previous controller.
        if self.memory_mb.zip(self.memory).is_some_and(|(one, other)| one != other) {
            return Err(ApiError::invalid(
                "`memory` and `memoryMb` are two names of one member and must be equal; send one of them",
            ));
        }
        self.memory_mb = self.memory_mb.or(self.memory);
        if self.max_concurrency.is_some_and(|max| max > CONCURRENCY_MOST) {
            let most = format!("`maxConcurrency` must be from 0 to {CONCURRENCY_MOST}; 0 removes the cap");
            return Err(ApiError::invalid(most));
        }
        let is_empty = self.description.is_none()
            && self.memory_mb.is_none()
            && self.max_concurrency.is_none()
            && self.handler.is_none();
        if !has_file && is_empty {
            let names = "`description`, `memoryMb`, `maxConcurrency` or `handler`";
            return Err(ApiError::invalid(format!("the change is empty; set {names}")));
        }
        self.description = self.description.map(fields::description).transpose()?;
        Ok(self)
    }

    /// Checks what depends on the runtime of the function.
    fn check_for(&self, f: &Function) -> Result<(), ApiError> {
        if let Some(memory_mb) = self.memory_mb {
            let name = if self.memory.is_some() { "memory" } else { "memoryMb" };
            fields::memory(name, memory_mb, &f.runtime)?;
        }
        fields::handler_fits("handler", self.handler.as_ref().and_then(Option::as_ref), &f.runtime)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_strict() {
        let parse = |text: &str| Wanted::parse(text.as_bytes());
        let both = parse(r#" {"description":"","memory":512} "#).unwrap();
        assert_eq!((both.description.as_deref(), both.memory_mb), (Some(""), Some(512)));
        let escaped = parse(r#"{"m\u0065moryMb":128}"#).unwrap();
        assert_eq!(escaped.memory_mb, Some(128));
        assert_eq!(parse(r#"{"maxConcurrency":0}"#).unwrap().max_concurrency, Some(0));
        for (same, mb) in [
            (r#"{"memory":256.0}"#, 256),
            (r#"{"memory":64,"memoryMb":64}"#, 64),
            (r#"{"memoryMb":64.0,"memory":64}"#, 64),
        ] {
            assert_eq!(parse(same).unwrap().memory_mb, Some(mb), "{same}");
        }
        assert_eq!(
            parse(r#"{"handler":"main.handler"}"#).unwrap().handler,
            Some(Handler::parse("main.handler"))
        );
        assert_eq!(parse(r#"{"handler":""}"#).unwrap().handler, Some(None), "script mode");
        assert_eq!(both.handler, None, "unchanged");
        let deep = format!("{{\"memoryMb\":{}1{}}}", "[".repeat(5000), "]".repeat(5000));
        for (bad, told) in [
            ("", "object"),
            ("[]", "object"),
            ("null", "object"),
            ("{", "EOF"),
            ("{}", "empty"),
            (r#"{"memoryMb":128}x"#, "trailing"),
            (r#"{"memoryMb":128,"memoryMb":256}"#, "duplicate field `memoryMb`"),
            (r#"{"memoryMb":128,"memory":129}"#, "two names"),
            (r#"{"memoryMb":128,"memory":null}"#, "`memory`"),
            (r#"{"runtime":"go"}"#, "unknown field `runtime`"),
            (r#"{"memoryMb":"128"}"#, "`memoryMb`"),
            (r#"{"memoryMb":128.5}"#, "`memoryMb`"),
            (r#"{"memoryMb":-128}"#, "`memoryMb`"),
            (r#"{"memoryMb":1e400}"#, "`memoryMb`"),
            (r#"{"memoryMb":null}"#, "`memoryMb`"),
            (r#"{"maxConcurrency":-1}"#, "`maxConcurrency`"),
            (r#"{"maxConcurrency":1000001}"#, "`maxConcurrency`"),
            (r#"{"maxConcurrency":null}"#, "`maxConcurrency`"),
            (r#"{"handler":null}"#, "`handler` must be two or more identifiers"),
            (r#"{"handler":7}"#, "`handler` must be"),
            (r#"{"handler":"main"}"#, "`handler` must be"),
            (r#"{"handler":"main.handler "}"#, "`handler` must be"),
            (r#"{"handler":"a.b","handler":"a.b"}"#, "`handler`"),
            (r#"{"description":null}"#, "`description`"),
            (r#"{"description":7}"#, "`description`"),
            (r#"{"description":"\ud800"}"#, "`description`"),
            (&deep, "`memoryMb`"),
        ] {
            let detail = ApiError::refusal(parse(bad));
            assert!(detail.contains(told), "{}: {detail}", &bad[..bad.len().min(40)]);
        }
        let long = format!("{{\"description\":\"{}\"}}", "ä".repeat(fields::DESCRIPTION_CHARS_MAX + 1));
        assert!(ApiError::refusal(parse(&long)).contains("longer"));
    }

    #[test]
    fn a_handler_is_checked_against_the_runtime() {
        for (handler, runtime, fits) in [
            ("main.handler", "python", true),
            ("index.handler", "nodejs", true),
            ("main.handler", "cpp", false),
            ("main.handler", "go", false),
            ("main.handler", "ruby", false),
            ("", "go", true),
            ("", "ruby", true),
        ] {
            let wanted = Wanted::parse(format!("{{\"handler\":{handler:?}}}").as_bytes()).unwrap();
            let f = Function { runtime: runtime.into(), ..Function::sample("f") };
            assert_eq!(wanted.check_for(&f).is_ok(), fits, "{handler:?} {runtime}");
        }
    }
}
