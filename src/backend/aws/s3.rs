//! Stores the code of functions in an S3 bucket.

use super::client::upload_timeouts;
use super::error::class;
use crate::backend::{BackendError, CodeStore};
use async_trait::async_trait;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::Config;
use aws_sdk_s3::error::ProvideErrorMetadata;
use aws_sdk_s3::primitives::ByteStream;
use std::path::Path;

/// A key that no upload has, so that reading it costs little.
const ABSENT_KEY: &str = "infra-controller/probe";

/// Buffer size for reading a file while it is sent, in bytes.
const READ_BYTES: usize = 64 * 1024;

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
        // A path instead of a stream: the SDK opens the file for each attempt and reads it while it is sent.
        // The SDK's checksum follows the body, so each attempt reads the file once. A store that does not
        // support this needs AWS_REQUEST_CHECKSUM_CALCULATION=when_required.
        let body = ByteStream::read_from().path(file).buffer_size(READ_BYTES).build().await;
        let body = body.map_err(|_| BackendError::Invalid("the code file could not be read".into()))?;
        let call = self
            .client
            .put_object()
            .bucket(&self.bucket)
            .key(s3_key)
            .content_type("application/zip")
            .body(body)
            .customize()
            .config_override(Config::builder().timeout_config(upload_timeouts()));
        call.send().await.map(drop).map_err(|e| class(&e))
    }

    async fn delete(&self, s3_key: &str) -> Result<(), BackendError> {
        match self.client.delete_object().bucket(&self.bucket).key(s3_key).send().await {
            // S3 itself reports success for an absent key; other implementations may not.
            Err(error) if error.code() == Some("NoSuchKey") => Ok(()),
            done => done.map(drop).map_err(|e| class(&e)),
        }
    }
}
