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
use crate::model::{ConfigAction, Function, FunctionId, Runtime, now_ms};
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
            let form = self
                .uploads
                .read(call, body, &["description", "memoryMb", "memory", "maxConcurrency"])
                .await?;
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
        };
        if let Some(name) = &form.unknown {
            return Err(ApiError::invalid(format!("unknown field `{name}`")));
        }
        let wanted = wanted.checked(form.file.is_some())?;
        let file = match form.file {
            Some(file) => {
                // Items of the previous controller may name any runtime. The entry file of an unknown
                // runtime is not known.
                let runtime = Runtime::parse(&function.runtime);
                let runtime =
                    runtime.ok_or_else(|| ApiError::invalid("the function has an unknown runtime"))?;
                Some(self.uploads.checked(file, runtime).await?)
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
            if let Some(memory_mb) = wanted.memory_mb {
                let name = if wanted.memory.is_some() { "memory" } else { "memoryMb" };
                fields::memory(name, memory_mb, &f.runtime)?;
            }
            let Wanted { description, memory_mb, max_concurrency, .. } = wanted.clone();
            Ok(FunctionChange { description, memory_mb, max_concurrency })
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
}

/// Rejects `null`. A member that does not change is left out.
fn given<'de, T: Deserialize<'de>, D: serde::Deserializer<'de>>(d: D) -> Result<Option<T>, D::Error> {
    T::deserialize(d).map(Some)
}

fn given_whole<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Option<u64>, D::Error> {
    let null = || serde::de::Error::custom("not a whole number");
    object::whole(d)?.map(Some).ok_or_else(null)
}

impl Wanted {
    fn parse(body: &[u8]) -> Result<Self, ApiError> {
        let wanted: Self = object::parse(body, |member| match member {
            "description" => Some("a string"),
            "memoryMb" | "memory" | "maxConcurrency" => Some("a whole number"),
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
        let is_empty =
            self.description.is_none() && self.memory_mb.is_none() && self.max_concurrency.is_none();
        if !has_file && is_empty {
            let names = "`description`, `memoryMb` or `maxConcurrency`";
            return Err(ApiError::invalid(format!("the change is empty; set {names}")));
        }
        self.description = self.description.map(fields::description).transpose()?;
        Ok(self)
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
}
