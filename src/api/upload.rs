//! `POST /upload`: creates functions. Also the bounds and checks that all uploads of code share.

use super::call::{BodyStream, Call};
use super::fields;
use super::form::{Form, UploadedFile};
use super::functions::changed;
use super::problem::ApiError;
use super::reply::Reply;
use crate::audit::{Event, RecentEvents};
use crate::code_archive;
use crate::functions::{Editor, NewCode, NewFunction};
use crate::model::{Handler, Runtime, now_ms};
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::{Semaphore, SemaphorePermit};

/// Maximum number of concurrent uploads, to bound their disk space. Further uploads are answered 503.
const UPLOADS_MAX: usize = 8;
/// Maximum number of archives that are unpacked concurrently, to bound their CPU time. Further ones wait.
const CHECKS_MAX: usize = 2;

/// Receives code: bounds the number of uploads, writes them to disk and checks them.
pub struct UploadSpool {
    spool_dir: PathBuf,
    slots: Semaphore,
    checks: Semaphore,
}

impl UploadSpool {
    pub fn new(spool_dir: PathBuf) -> Self {
        Self { spool_dir, slots: Semaphore::new(UPLOADS_MAX), checks: Semaphore::new(CHECKS_MAX) }
    }

    /// A slot for one upload. Held until the upload is finished.
    ///
    /// # Errors
    /// `TooManyUploads` if no slot is free.
    pub fn slot(&self) -> Result<SemaphorePermit<'_>, ApiError> {
        self.slots.try_acquire().map_err(|_| ApiError::TooManyUploads)
    }

    /// Parses a form. The caller holds a slot.
    pub async fn read(
        &self,
        call: &Call,
        body: &mut impl BodyStream,
        fields: &[&str],
    ) -> Result<Form, ApiError> {
        Form::read(call, body, &self.spool_dir, fields).await
    }

    /// Checks an upload by unpacking it once, on a blocking thread. With a handler, its module must be there.
    ///
    /// # Errors
    /// `BadArchive`, and `BackendUnavailable` if the disk fails.
    pub async fn checked(
        &self,
        upload: UploadedFile,
        runtime: Runtime,
        handler: Option<&Handler>,
    ) -> Result<UploadedFile, ApiError> {
        let handler = handler.cloned();
        let _turn = self.checks.acquire().await.map_err(|_| ApiError::BackendUnavailable)?;
        let checked = tokio::task::spawn_blocking(move || {
            let file = std::fs::File::open(upload.path());
            let file = file.map_err(|e| {
                tracing::error!(error = %e, "Upload not read back from disk; check the state directory");
                ApiError::BackendUnavailable
            })?;
            let good = code_archive::check(std::io::BufReader::new(file), runtime, handler.as_ref());
            good.map_err(|problem| ApiError::BadArchive(problem.to_string()))?;
            Ok(upload)
        });
        checked.await.unwrap_or(Err(ApiError::BackendUnavailable))
    }
}

/// The handler of new functions.
pub struct UploadRoute {
    editor: Editor,
    uploads: Arc<UploadSpool>,
    tail: RecentEvents,
}

impl UploadRoute {
    pub fn new(editor: Editor, uploads: Arc<UploadSpool>, tail: RecentEvents) -> Self {
        Self { editor, uploads, tail }
    }

    /// Creates a function from a form.
    pub async fn post(&self, call: &Call, body: &mut impl BodyStream) -> Result<Reply, ApiError> {
        if !call.headers.is_form() {
            return Err(ApiError::NotAForm);
        }
        let (runtime, memory_mb) = fields::sizes(&call.headers)?;
        let name = fields::header_text("x-function-name", call.headers.x_function_name.as_ref())?;
        let handler = fields::header_text("x-handler", call.headers.x_handler.as_ref())?;
        let handler = fields::new_handler("x-handler", handler, runtime)?;
        let _slot = self.uploads.slot()?;
        // Unknown fields are ignored, because clients of the previous controller send some.
        let mut form = self.uploads.read(call, body, &["description", "envVars", "handler"]).await?;
        let description = fields::description(form.take("description").unwrap_or_default())?;
        let env_vars = fields::env_vars(form.take("envVars"))?;
        let of_form = fields::new_handler("handler", form.take("handler"), runtime)?;
        let handler = one_handler(handler, of_form)?;
        let file = form.file.ok_or_else(|| ApiError::invalid("the form has no part `file`"))?;
        let file = self.uploads.checked(file, runtime, handler.as_ref()).await?;
        let name = name.filter(|name| !name.is_empty()).unwrap_or_else(|| file.name.clone());
        if name.is_empty() {
            return Err(ApiError::invalid(
                "the function has no name: send it in the header field `x-function-name` (percent-encoded \
                 UTF-8), or give the part `file` a `filename`",
            ));
        }
        let name = fields::name(name)?;
        let code = NewCode { file: file.path(), original_name: file.name.clone() };
        let new = NewFunction { name, description, runtime, memory_mb, handler, env_vars, code };
        let function = self.editor.create(call.key_name(), new).await.map_err(ApiError::from)?;
        self.tail.note(now_ms(), || Event::Uploaded(function.id.clone()));
        Ok(changed(&function))
    }
}

/// The handler of the header field or of the form. They must be equal if there are both.
fn one_handler(of_header: Option<Handler>, of_form: Option<Handler>) -> Result<Option<Handler>, ApiError> {
    match (of_header, of_form) {
        (Some(one), Some(other)) if one != other => Err(ApiError::invalid(
            "`x-handler` and `handler` of the form are one property and must be equal; send one of them",
        )),
        (of_header, of_form) => Ok(of_header.or(of_form)),
    }
}
