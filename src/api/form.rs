//! Parses forms (`multipart/form-data`, RFC 7578) with one file, as a stream.
//!
//! The file is written to the disk in pieces, and is never in memory as a whole. It is checked on the disk
//! before it is stored.

use super::call::{BodyStream, Call};
use super::parameters::parameter;
use super::problem::ApiError;
use bytes::Bytes;
use futures_util::stream;
use http::header::{CONTENT_DISPOSITION, CONTENT_TYPE, HeaderValue};
use multer::{Field, Multipart};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use tempfile::NamedTempFile;
use tokio::io::{AsyncWriteExt, BufWriter};

/// Maximum size of the file, in bytes.
const FILE_BYTES_MAX: usize = 50 << 20;
/// Maximum length of a text field, in bytes.
const FIELD_BYTES_MAX: usize = 64 << 10;
/// Maximum number of parts.
const PARTS_MAX: usize = 32;
/// Maximum length of a form, in bytes: the file, text fields, and the headers of parts.
pub const BODY_BYTES_MAX: usize = FILE_BYTES_MAX + (256 << 10);
/// Maximum number of bytes given to the parser without progress.
const UNPARSED_BYTES_MAX: usize = 256 << 10;
/// Buffer size of writes to the disk, in bytes.
const WRITE_BYTES: usize = 128 << 10;
/// Maximum length of a file name, in characters. The rest is cut off.
const FILE_NAME_CHARS_MAX: usize = 255;

/// A parsed form.
#[derive(Default)]
pub struct Form {
    fields: HashMap<String, String>,
    pub file: Option<UploadedFile>,
    /// The first field that was not requested.
    pub unknown: Option<String>,
}

/// An uploaded file on the disk. Deleted on drop.
pub struct UploadedFile {
    file: NamedTempFile,
    /// The client's name of the file, without the directories that some clients send. May be empty.
    pub name: String,
}

impl UploadedFile {
    pub fn path(&self) -> &Path {
        self.file.path()
    }
}

impl Form {
    /// Parses `body` with the boundary in the `Content-Type` of `call`. The part `file` is written to
    /// `spool_dir`. Parts other than `file` and `fields` are ignored.
    ///
    /// # Errors
    /// `Invalid` for a malformed form, `BodyTooLarge`, `BackendUnavailable` if the disk fails, and those of
    /// `body`.
    pub async fn read(
        call: &Call,
        body: &mut impl BodyStream,
        spool_dir: &Path,
        fields: &[&str],
    ) -> Result<Self, ApiError> {
        let content_type = call.headers.content_type.as_ref().map(HeaderValue::as_bytes);
        let boundary = parameter(content_type.unwrap_or_default(), "boundary");
        let boundary = boundary
            .filter(|boundary| !boundary.is_empty())
            .ok_or_else(|| ApiError::invalid(format!("the {CONTENT_TYPE} has no boundary")))?;
        let feed = BodyFeed::default();
        let pieces = stream::unfold(body, |body| async {
            // multer reads every piece that is ready before it parses any. A yield makes it parse each.
            tokio::task::yield_now().await;
            feed.next(&mut *body).await.map(|piece| (piece, body))
        });
        let parts = Multipart::new(Box::pin(pieces), boundary);
        let read = Self::read_parts(parts, &feed, spool_dir, fields).await;
        match feed.failure.into_inner() {
            Some(of_body) => Err(of_body),
            None => read,
        }
    }

    async fn read_parts(
        mut parts: Multipart<'_>,
        feed: &BodyFeed,
        spool_dir: &Path,
        fields: &[&str],
    ) -> Result<Self, ApiError> {
        let mut form = Self::default();
        let mut count = 0;
        while let Some(part) = parts.next_field().await.map_err(|e| broken(&e))? {
            feed.parsed();
            count += 1;
            if count > PARTS_MAX {
                return Err(ApiError::invalid(format!("the form has more than {PARTS_MAX} parts")));
            }
            let name = of_part(&part, "name").ok_or_else(|| {
                ApiError::invalid(
                    "a part of the form has no name: its Content-Disposition needs `name=\"…\"`",
                )
            })?;
            if name == "file" {
                if form.file.is_some() {
                    return Err(twice("file"));
                }
                form.file = Some(spool(part, feed, spool_dir).await?);
            } else if !fields.contains(&name.as_str()) {
                skip(part, feed).await?;
                form.unknown.get_or_insert(name);
            } else {
                let value = text(part, feed, &name).await?;
                if form.fields.insert(name.clone(), value).is_some() {
                    return Err(twice(&name));
                }
            }
        }
        Ok(form)
    }

    /// Removes and returns a text field.
    pub fn take(&mut self, name: &str) -> Option<String> {
        self.fields.remove(name)
    }
}

/// Feeds the body to the parser.
#[derive(Default)]
struct BodyFeed {
    /// The error of the body. The parser would report it as a malformed form, so it is kept here.
    failure: Mutex<Option<ApiError>>,
    /// Bytes given to the parser since its last progress.
    unparsed: AtomicUsize,
}

impl BodyFeed {
    async fn next(&self, body: &mut impl BodyStream) -> Option<Result<Bytes, std::io::Error>> {
        let failed = match body.next().await {
            Ok(Some(piece)) => {
                // The parser buffers the header of a part until it ends.
                if self.unparsed.fetch_add(piece.len(), Ordering::Relaxed) <= UNPARSED_BYTES_MAX {
                    return Some(Ok(piece));
                }
                ApiError::invalid("the form is malformed: the header of a part does not end")
            }
            Ok(None) => return None,
            Err(e) => e,
        };
        *self.failure.lock() = Some(failed);
        Some(Err(std::io::Error::other("the body failed")))
    }

    fn parsed(&self) {
        self.unparsed.store(0, Ordering::Relaxed);
    }
}

/// A parameter of the part's `Content-Disposition`.
fn of_part(part: &Field<'_>, name: &str) -> Option<String> {
    part.headers().get(CONTENT_DISPOSITION).and_then(|value| parameter(value.as_bytes(), name))
}

async fn spool(mut part: Field<'_>, feed: &BodyFeed, dir: &Path) -> Result<UploadedFile, ApiError> {
    let name = of_part(&part, "filename").unwrap_or_default();
    let name = name.rsplit(['/', '\\']).next().unwrap_or_default();
    let name = name.chars().filter(|c| !c.is_control()).take(FILE_NAME_CHARS_MAX).collect();
    let file = temp_file(dir).map_err(|e| no_room(&e))?;
    // Buffered, because each write is a task, and a client may send single bytes.
    let out = tokio::fs::File::from_std(file.reopen().map_err(|e| no_room(&e))?);
    let mut out = BufWriter::with_capacity(WRITE_BYTES, out);
    let mut bytes = 0;
    while let Some(piece) = part.chunk().await.map_err(|e| broken(&e))? {
        feed.parsed();
        bytes += piece.len();
        if bytes > FILE_BYTES_MAX {
            return Err(ApiError::BodyTooLarge { bytes_max: FILE_BYTES_MAX });
        }
        out.write_all(&piece).await.map_err(|e| no_room(&e))?;
    }
    out.flush().await.map_err(|e| no_room(&e))?;
    Ok(UploadedFile { file, name })
}

/// Creates a file in `dir`, and recreates `dir` if it is missing. Its parents are not recreated: if they are
/// missing, a disk may be missing as well.
fn temp_file(dir: &Path) -> std::io::Result<NamedTempFile> {
    let made = NamedTempFile::new_in(PathBuf::from(dir));
    if !made.as_ref().is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound) {
        return made;
    }
    match std::fs::create_dir(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(e),
        _ => tracing::warn!(dir = %dir.display(), "Upload directory was missing and was recreated"),
    }
    NamedTempFile::new_in(PathBuf::from(dir))
}

/// Discards a part.
async fn skip(mut part: Field<'_>, feed: &BodyFeed) -> Result<(), ApiError> {
    while part.chunk().await.map_err(|e| broken(&e))?.is_some() {
        feed.parsed();
    }
    Ok(())
}

async fn text(mut part: Field<'_>, feed: &BodyFeed, name: &str) -> Result<String, ApiError> {
    let mut bytes = Vec::new();
    while let Some(piece) = part.chunk().await.map_err(|e| broken(&e))? {
        feed.parsed();
        if bytes.len() + piece.len() > FIELD_BYTES_MAX {
            return Err(ApiError::invalid(format!("`{name}` is longer than {FIELD_BYTES_MAX} bytes")));
        }
        bytes.extend_from_slice(&piece);
    }
    String::from_utf8(bytes).map_err(|_| ApiError::invalid(format!("`{name}` is not UTF-8")))
}

fn twice(name: &str) -> ApiError {
    ApiError::invalid(format!("the form contains `{name}` twice"))
}

fn broken(_: &multer::Error) -> ApiError {
    ApiError::invalid("the form is malformed: its parts do not match the boundary")
}

fn no_room(error: &std::io::Error) -> ApiError {
    tracing::error!(error = %error, "Upload not written to disk; check the space in the state directory");
    ApiError::BackendUnavailable
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A body in pieces. An error ends it.
    struct Pieces(Vec<Result<Bytes, ApiError>>);

    impl BodyStream for Pieces {
        async fn next(&mut self) -> Result<Option<Bytes>, ApiError> {
            if self.0.is_empty() { Ok(None) } else { self.0.remove(0).map(Some) }
        }
    }

    fn call() -> Call {
        let mut call = Call::default();
        call.headers.content_type = Some(HeaderValue::from_static("multipart/form-data; boundary=X"));
        call
    }

    async fn read(body: &[u8], piece: usize) -> Result<Form, ApiError> {
        let dir = tempfile::tempdir().unwrap();
        let pieces = body.chunks(piece).map(|c| Ok(Bytes::copy_from_slice(c))).collect();
        let form = Form::read(&call(), &mut Pieces(pieces), dir.path(), &["a", "description"]).await;
        if let Ok(Form { file: Some(upload), .. }) = &form {
            assert_eq!(std::fs::read(upload.path()).unwrap(), b"a\r\nzip");
        }
        form
    }

    #[tokio::test]
    async fn a_missing_directory_is_recreated_but_not_its_parents() {
        let root = tempfile::tempdir().unwrap();
        let spool = root.path().join("node").join("spool");
        let body = Bytes::from(part("name=\"file\"; filename=\"x\"", "a\r\nzip") + "--X--\r\n");
        let read = async || {
            Form::read(&call(), &mut Pieces(vec![Ok(body.clone())]), &spool, &[])
                .await
                .map(|form| form.file.is_some())
        };
        assert!(matches!(read().await, Err(ApiError::BackendUnavailable)));
        std::fs::create_dir(root.path().join("node")).unwrap();
        assert!(matches!(read().await, Ok(true)));
        assert_eq!(std::fs::read_dir(&spool).unwrap().count(), 0, "no file is left");
    }

    fn part(disposition: &str, value: &str) -> String {
        format!("--X\r\nContent-Disposition: form-data; {disposition}\r\n\r\n{value}\r\n")
    }

    #[tokio::test]
    async fn a_form_in_pieces_of_any_size() {
        let body = part("name=\"description\"", "ä")
            + &part("name=\"file\"; filename=\"C:\\\\dir\\\\x.zip\"", "a\r\nzip")
            + &part("name=\"other\"", "1")
            + &part("name=\"other\"", "2")
            + "--X--\r\n";
        for piece in [1, 7, 1000] {
            let mut form = read(body.as_bytes(), piece).await.unwrap();
            assert_eq!(form.take("description").as_deref(), Some("ä"));
            assert_eq!((form.take("other"), form.unknown.as_deref()), (None, Some("other")));
            assert_eq!(form.file.as_ref().map(|f| f.name.as_str()), Some("x.zip"));
        }
    }

    #[tokio::test]
    async fn file_names_in_the_forms_that_clients_send() {
        for (disposition, expected) in [
            (&b"Name=\"file\"; FileName=\"x.zip\""[..], "x.zip"),
            (b"filename=\"a; name=b=c.zip\"; name=file", "a; name=b=c.zip"),
            (b"name=\"file\"; filename=\"C:\\dir\\x.zip\"", "x.zip"),
            (b"name=\"file\"; filename*=UTF-8''gr%C3%BC%C3%9Fe.zip", "grüße.zip"),
            (b"name=\"file\"; filename*=UTF-8''..%2Fx%0D%0A.zip", "x.zip"),
            (b"name=\"file\"; filename=\"gr\xfc\xdfe.zip\"", "grüße.zip"),
            (b"name=\"file\"; filename=\"\"", ""),
            (b"name=\"file\"", ""),
        ] {
            let head = [b"--X\r\ncontent-disposition: form-data; ", disposition, b"\r\n\r\n"].concat();
            let body = [&head[..], b"a\r\nzip\r\n--X--\r\n"].concat();
            let form = read(&body, 7).await.unwrap();
            let name = form.file.as_ref().map(|file| file.name.as_str());
            assert_eq!(name, Some(expected), "{}", String::from_utf8_lossy(disposition));
        }
    }

    /// Its length does not matter: it makes progress, unlike a header that does not end.
    #[tokio::test]
    async fn an_unrequested_field_is_ignored() {
        let long = part("name=\"other\"", &"x".repeat(3 * UNPARSED_BYTES_MAX));
        let body = long + &part("name=\"a\"", "1") + "--X--\r\n";
        let mut form = read(body.as_bytes(), 4096).await.unwrap();
        assert_eq!(form.take("a").as_deref(), Some("1"));
    }

    #[tokio::test]
    async fn an_unrequested_field_may_be_long() {
        let body = part("name=\"other\"", &"x".repeat(2 * UNPARSED_BYTES_MAX)) + "--X--\r\n";
        let form = read(body.as_bytes(), 4096).await.unwrap();
        assert!(form.fields.is_empty() && form.file.is_none());
    }

    #[tokio::test]
    async fn malformed_forms_are_rejected() {
        let file = part("name=\"file\"; filename=\"x\"", "a\r\nzip");
        let long = part("name=\"a\"", &"x".repeat(FIELD_BYTES_MAX + 1));
        for (bad, told) in [
            (file.clone() + &file + "--X--\r\n", "`file` twice"),
            (part("name=\"a\"", "1") + &part("name=\"a\"", "1") + "--X--\r\n", "`a` twice"),
            (file.clone(), "malformed"),
            ("no form".to_owned(), "malformed"),
            (String::new(), "malformed"),
            (part("nom=\"a\"", "1") + "--X--\r\n", "no name"),
            (long + "--X--\r\n", "longer than"),
            ("--X\r\n".to_owned() + &"x".repeat(2 * UNPARSED_BYTES_MAX), "does not end"),
            ("x".repeat(2 * UNPARSED_BYTES_MAX), "does not end"),
            (part("name=\"b\"", "1").repeat(PARTS_MAX + 1) + "--X--\r\n", "more than 32 parts"),
        ] {
            match read(bad.as_bytes(), 4096).await {
                Err(ApiError::Invalid(detail)) => assert!(detail.contains(told), "{told}: {detail}"),
                other => panic!("{told}: {:?}", other.err()),
            }
        }
    }

    #[tokio::test]
    async fn the_error_of_the_body_is_returned() {
        let dir = tempfile::tempdir().unwrap();
        let head = Bytes::from(part("name=\"file\"; filename=\"x\"", "")[..60].to_owned());
        let mut body = Pieces(vec![Ok(head), Err(ApiError::BodyTimeout)]);
        let failed = Form::read(&call(), &mut body, dir.path(), &[]).await.err();
        assert!(matches!(failed, Some(ApiError::BodyTimeout)), "{failed:?}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "no file is left");
    }
}
