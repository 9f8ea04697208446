//! The code bucket.

use super::client::upload_timeouts;
use super::error::class;
use crate::backend::{BackendError, CodeStore};
use async_trait::async_trait;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::Config;
use aws_sdk_s3::error::ProvideErrorMetadata;
use aws_sdk_s3::primitives::ByteStream;
use std::path::Path;

/// No upload has this key, so reading it costs next to nothing.
const ABSENT_KEY: &str = "infra-controller/probe";

/// Read from a file at a time while it is sent.
const READ_BYTES: usize = 64 * 1024;

/// Reads an absent object. A refusal counts as well: without ListBucket that is what S3 says of an absent key.
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
        // A path and not a stream: the SDK opens the file anew for each try, and reads it as it is sent. The checksum
        // it adds by itself goes behind the body, so the file is read once a try. A store that does not understand
        // that takes AWS_REQUEST_CHECKSUM_CALCULATION=when_required.
        let body = ByteStream::read_from().path(file).buffer_size(READ_BYTES).build().await;
        let body =
            body.map_err(|_| BackendError::Invalid("the file of the code could not be read".into()))?;
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
            // S3 itself says nothing of an absent key; what stands in for it may.
            Err(error) if error.code() == Some("NoSuchKey") => Ok(()),
            done => done.map(drop).map_err(|e| class(&e)),
        }
    }
}
