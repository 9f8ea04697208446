//! The settings of the `aws` backend.

use crate::backend::aws::RedisUrl;
use crate::model::ProcessToken;
use std::time::Duration;

/// The addresses of the backend services, and the identity of this process.
#[derive(Clone, Debug)]
pub struct AwsSettings {
    pub region: String,
    pub functions_table: String,
    pub logs_table: String,
    pub queue_url: String,
    pub bucket: String,
    pub redis_url: RedisUrl,
    /// The environment variables from which `redis_url` was built; named in error messages.
    pub redis_variables: &'static str,
    /// The old `SQS_ENDPOINT`. Used only where the SDK's own configuration names no endpoint, like the two
    /// below.
    pub sqs_endpoint: Option<String>,
    pub dynamodb_endpoint: Option<String>,
    pub s3_endpoint: Option<String>,
    pub process: ProcessToken,
    /// Deadline for all checks together; they run in parallel.
    pub start_deadline: Duration,
}
