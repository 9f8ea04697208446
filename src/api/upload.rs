//! `/upload`: new functions; and what every upload of code goes through.

use super::form::{Form, Upload};
use super::functions::changed;
use super::problem::ApiError;
use super::call::{BodyStream, Call};
use super::reply::Reply;
use super::fields;
use crate::audit::{Event, Tail};
use crate::code_archive;
use crate::functions::{Editor, NewCode, NewFunction};
use crate::model::{Runtime, now_ms};
use std::path::PathBuf;
use std::sync::Arc;
use tokio::sync::{Semaphore, SemaphorePermit};

/// Uploads under way at a time, which bounds the disk they take; more are answered 503.
const UPLOADS_MAX: usize = 8;
/// Uploads that are unpacked at a time, which bounds the cores they take; more wait.
const CHECKS_MAX: usize = 2;

/// The door for code: how much of it comes in at a time, where it lies, and whether it is good.
pub struct Uploads {
    spool_dir: PathBuf,
    slots: Semaphore,
    checks: Semaphore,
}

impl Uploads {
    pub fn new(spool_dir: PathBuf) -> Self {
        Self { spool_dir, slots: Semaphore::new(UPLOADS_MAX), checks: Semaphore::new(CHECKS_MAX) }
    }

    /// Room for one more upload, to be held until it is done with.
    pub fn slot(&self) -> Result<SemaphorePermit<'_>, ApiError> {
        self.slots.try_acquire().map_err(|_| ApiError::TooManyUploads)
    }

    /// Reads a form; the caller holds a slot.
    pub async fn read(
        &self,
        call: &Call,
        body: &mut impl BodyStream,
        fields: &[&str],
    ) -> Result<Form, ApiError> {
        Form::read(call, body, &self.spool_dir, fields).await
    }

    /// The upload, if it is good code. Unpacks it once, off the asynchronous threads.
    pub async fn checked(&self, upload: Upload, runtime: Runtime) -> Result<Upload, ApiError> {
        let _turn = self.checks.acquire().await.map_err(|_| ApiError::BackendAway)?;
        let checked = tokio::task::spawn_blocking(move || {
            let file = std::fs::File::open(upload.path());
            let file = file.map_err(|e| {
                tracing::error!(error = %e, "Upload Not Read");
                ApiError::BackendAway
            })?;
            let good = code_archive::check(std::io::BufReader::new(file), runtime);
            good.map_err(|problem| ApiError::BadArchive(problem.to_string()))?;
            Ok(upload)
        });
        checked.await.unwrap_or(Err(ApiError::BackendAway))
    }
}

pub struct UploadRoute {
    editor: Editor,
    uploads: Arc<Uploads>,
    tail: Tail,
}

impl UploadRoute {
    pub fn new(editor: Editor, uploads: Arc<Uploads>, tail: Tail) -> Self {
        Self { editor, uploads, tail }
    }

    pub async fn post(&self, call: &Call, body: &mut impl BodyStream) -> Result<Reply, ApiError> {
        if !call.headers.is_form() {
            return Err(ApiError::NotAForm);
        }
        let (runtime, memory_mb) = fields::sizes(&call.headers)?;
        let name = fields::header_text("x-function-name", call.headers.x_function_name.as_ref())?;
        let _slot = self.uploads.slot()?;
        // Fields nobody knows are passed over: clients of the old controller send some.
        let mut form = self.uploads.read(call, body, &["description", "envVars"]).await?;
        let description = fields::description(form.take("description").unwrap_or_default())?;
        let env_vars = fields::env_vars(form.take("envVars"))?;
        let file = form.file.ok_or_else(|| ApiError::invalid("the form holds no `file`"))?;
        let file = self.uploads.checked(file, runtime).await?;
        let name = name.filter(|name| !name.is_empty()).unwrap_or_else(|| file.name.clone());
        if name.is_empty() {
            return Err(ApiError::invalid(
                "the function has no name: send it in the header `x-function-name` (percent-encoded UTF-8), or give \
                 the part `file` a `filename`",
            ));
        }
        let name = fields::name(name)?;
        let code = NewCode { file: file.path(), original_name: file.name.clone() };
        let new = NewFunction { name, description, runtime, memory_mb, env_vars, code };
        let function = self.editor.create(call.key_name(), new).await.map_err(ApiError::from)?;
        self.tail.note(now_ms(), || Event::Uploaded(function.id.clone()));
        Ok(changed(&function))
    }
}
