//! The code bucket.

use super::error::class;
use crate::backend::{BackendError, CodeStore};
use async_trait::async_trait;
use aws_sdk_s3::Client;
use aws_sdk_s3::error::ProvideErrorMetadata;
use std::path::Path;

/// No upload has this key, so reading it costs next to nothing.
const ABSENT_KEY: &str = "infra-controller/probe";

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
    async fn put(&self, _s3_key: &str, _file: &Path) -> Result<(), BackendError> {
        Err(BackendError::Invalid("stub".into()))
    }

    async fn delete(&self, _s3_key: &str) -> Result<(), BackendError> {
        Err(BackendError::Invalid("stub".into()))
    }
}
