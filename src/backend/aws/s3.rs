//! The code of functions in an S3 bucket, and the files that functions write.

use super::client::upload_timeouts;
use super::error::class;
use crate::backend::{BackendError, CodeSource, CodeStore, FetchError, OutputStore};
use async_trait::async_trait;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::Config;
use aws_sdk_s3::error::ProvideErrorMetadata;
use aws_sdk_s3::primitives::ByteStream;
use std::path::Path;
use std::time::Duration;
use tokio::fs::{File, OpenOptions, remove_file};
use tokio::io::AsyncWriteExt;
use tokio::time::timeout;

/// A key that no upload has, so that reading it costs little.
const ABSENT_KEY: &str = "infra-controller/probe";

/// Buffer size for reading a file while it is sent, in bytes.
const READ_BYTES: usize = 64 * 1024;

/// Maximum size of an archive that is fetched, in bytes; that of an upload.
const CODE_BYTES_MAX: usize = 50 << 20;
/// Deadline of a fetch: [`CODE_BYTES_MAX`] at 1 MB/s.
const FETCH_TIMEOUT: Duration = Duration::from_secs(60);

/// For the owner of a function whose code is gone.
const NO_CODE: &str = "The code of the function does not exist any more: it was deleted after this run was \
     accepted.";

/// Reads an absent object. A denial counts as success, because that is what S3 answers for an absent key
/// without the ListBucket permission.
pub(super) async fn probe(client: &Client, bucket: &str) -> Result<(), BackendError> {
    let Err(error) = client.get_object().bucket(bucket).key(ABSENT_KEY).send().await else { return Ok(()) };
    match (error.code(), class(&error)) {
        (Some("NoSuchKey"), _) | (_, BackendError::Denied(_)) => Ok(()),
        (_, problem) => Err(problem),
    }
}

pub(super) struct CodeBucket {
    client: Client,
    bucket: String,
}

impl CodeBucket {
    pub(super) fn new(client: Client, bucket: &str) -> Self {
        Self { client, bucket: bucket.to_owned() }
    }
}

#[async_trait]
impl CodeStore for CodeBucket {
    async fn put(&self, s3_key: &str, file: &Path) -> Result<(), BackendError> {
        put_file(&self.client, &self.bucket, s3_key, Some("application/zip"), file).await
    }

    async fn delete(&self, s3_key: &str) -> Result<(), BackendError> {
        match self.client.delete_object().bucket(&self.bucket).key(s3_key).send().await {
            // S3 itself reports success for an absent key; other implementations may not.
            Err(error) if error.code() == Some("NoSuchKey") => Ok(()),
            done => done.map(drop).map_err(|e| class(&e)),
        }
    }
}

async fn put_file(
    client: &Client,
    bucket: &str,
    s3_key: &str,
    content_type: Option<&str>,
    file: &Path,
) -> Result<(), BackendError> {
    // A path instead of a stream: the SDK opens the file for each attempt and reads it while it is sent.
    // The SDK's checksum follows the body, so each attempt reads the file once. A store that does not
    // support this needs AWS_REQUEST_CHECKSUM_CALCULATION=when_required.
    let body = ByteStream::read_from().path(file).buffer_size(READ_BYTES).build().await;
    let body = body.map_err(|_| BackendError::Invalid("a file could not be read".into()))?;
    let call = client
        .put_object()
        .bucket(bucket)
        .key(s3_key)
        .set_content_type(content_type.map(str::to_owned))
        .body(body)
        .customize()
        .config_override(Config::builder().timeout_config(upload_timeouts()));
    call.send().await.map(drop).map_err(|e| class(&e))
}

/// Reads code from the bucket that the job names.
pub(super) struct CodeReader {
    client: Client,
}

impl CodeReader {
    pub(super) fn new(client: Client) -> Self {
        Self { client }
    }

    async fn copy(&self, bucket: &str, s3_key: &str, file: &mut File) -> Result<(), FetchError> {
        let too_large = || {
            let size_mib = CODE_BYTES_MAX >> 20;
            FetchError::Missing(format!("The code of the function is larger than {size_mib} MiB."))
        };
        let answer = match self.client.get_object().bucket(bucket).key(s3_key).send().await {
            Ok(answer) => answer,
            // Without s3:ListBucket, S3 answers AccessDenied instead. The job then stays on the queue.
            Err(error) if error.code() == Some("NoSuchKey") => {
                return Err(FetchError::Missing(NO_CODE.to_owned()));
            }
            Err(error) => return Err(class(&error).into()),
        };
        let (mut body, mut bytes) = (answer.body, 0);
        // The SDK does not repeat a body that breaks off; the caller tries again.
        let broken = |_| BackendError::Unavailable("the code could not be received to its end".into());
        while let Some(part) = body.try_next().await.map_err(broken)? {
            bytes += part.len();
            if bytes > CODE_BYTES_MAX {
                return Err(too_large());
            }
            file.write_all(&part).await.map_err(|e| not_written(&e))?;
        }
        file.flush().await.map_err(|e| not_written(&e))?;
        Ok(())
    }
}

fn not_written(error: &std::io::Error) -> BackendError {
    BackendError::Unavailable(format!("the code could not be written: {error}"))
}

#[async_trait]
impl CodeSource for CodeReader {
    /// If it fails, the file is removed.
    async fn fetch(&self, bucket: &str, s3_key: &str, to: &Path) -> Result<(), FetchError> {
        let file = OpenOptions::new().write(true).create_new(true).open(to).await;
        let mut file = file.map_err(|e| not_written(&e))?;
        // The timeouts of the SDK end with the head of the answer.
        let copied = timeout(FETCH_TIMEOUT, self.copy(bucket, s3_key, &mut file)).await;
        let late = || BackendError::Unavailable("the code was not received in time".into());
        let copied = copied.unwrap_or_else(|_| Err(late().into()));
        if copied.is_err() {
            drop(file);
            let _ = remove_file(to).await;
        }
        copied
    }
}

/// The bucket for the files that functions write.
pub(super) struct OutputBucket {
    client: Client,
    bucket: String,
}

impl OutputBucket {
    pub(super) fn new(client: Client, bucket: &str) -> Self {
        Self { client, bucket: bucket.to_owned() }
    }
}

#[async_trait]
impl OutputStore for OutputBucket {
    /// Returns the path of the file below the directory of its run, as the old workers listed it: of
    /// `outputs/<requestId>/a/b.png`, `a/b.png`.
    async fn store(&self, key: &str, file: &Path) -> Result<String, BackendError> {
        put_file(&self.client, &self.bucket, key, None, file).await?;
        Ok(listed(key).to_owned())
    }
}

fn listed(key: &str) -> &str {
    key.splitn(3, '/').nth(2).unwrap_or(key)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::aws::scripted::ScriptedService;

    fn not_found(code: &str) -> String {
        format!("<?xml version=\"1.0\"?><Error><Code>{code}</Code><Message>m</Message></Error>")
    }

    #[tokio::test]
    async fn code_is_fetched_to_a_new_file() {
        let dir = tempfile::tempdir().expect("a directory");
        let service = ScriptedService::default();
        let code = CodeReader::new(service.s3());
        let to = dir.path().join("code.zip");
        service.answer(200, "zipped");
        assert!(code.fetch("bucket", "functions/f/1.zip", &to).await.is_ok());
        assert_eq!(std::fs::read(&to).expect("the file"), b"zipped");
        let request = service.requests().pop().expect("a request");
        assert_eq!((request.method.as_str(), request.path.as_str()), ("GET", "/bucket/functions/f/1.zip"));
        let again = code.fetch("bucket", "functions/f/1.zip", &to).await;
        assert!(matches!(again, Err(FetchError::Away(_))), "the file exists: {again:?}");
        assert!(to.exists() && service.requests().is_empty());
    }

    #[tokio::test]
    async fn code_that_cannot_be_fetched_leaves_no_file() {
        let dir = tempfile::tempdir().expect("a directory");
        let service = ScriptedService::default();
        let code = CodeReader::new(service.s3());
        let to = dir.path().join("code.zip");
        for (status, body, is_missing) in [
            (404, not_found("NoSuchKey"), true),
            (200, "x".repeat(CODE_BYTES_MAX + 1), true),
            (404, not_found("NoSuchBucket"), false),
            (403, not_found("AccessDenied"), false),
            (503, not_found("SlowDown"), false),
        ] {
            service.answer(status, body);
            match code.fetch("bucket", "key", &to).await {
                Err(FetchError::Missing(sentence)) => assert!(is_missing && sentence.ends_with('.')),
                Err(FetchError::Away(error)) => assert!(!is_missing, "{error}"),
                Ok(()) => panic!("{status}"),
            }
            assert!(!to.exists(), "{status}");
        }
    }

    #[tokio::test]
    async fn outputs_are_stored_and_listed_by_their_path() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("b.png");
        std::fs::write(&file, "png").expect("a file");
        let service = ScriptedService::default();
        let outputs = OutputBucket::new(service.s3(), "bucket");
        service.answer(200, "");
        assert_eq!(outputs.store("outputs/job-1/a/b.png", &file).await, Ok("a/b.png".into()));
        let request = service.requests().pop().expect("a request");
        assert_eq!(
            (request.method.as_str(), request.path.as_str()),
            ("PUT", "/bucket/outputs/job-1/a/b.png")
        );
        service.answer(403, not_found("AccessDenied"));
        assert!(matches!(outputs.store("outputs/job-1/c", &file).await, Err(BackendError::Denied(_))));
        let absent = outputs.store("outputs/job-1/c", &dir.path().join("absent")).await;
        assert!(matches!(absent, Err(BackendError::Invalid(_))), "{absent:?}");
    }

    #[test]
    fn keys_are_listed_without_their_prefix() {
        for (key, path) in [("outputs/id/c.txt", "c.txt"), ("outputs/id/a/c.txt", "a/c.txt"), ("c", "c")] {
            assert_eq!(listed(key), path);
        }
    }
}
