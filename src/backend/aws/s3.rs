//! The code bucket. The gateway only checks at start that it answers.

use super::error::class;
use crate::backend::BackendError;
use aws_sdk_s3::Client;
use aws_sdk_s3::error::ProvideErrorMetadata;

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
