//! The fleet backend: SQS, DynamoDB, S3 and Redis. Nothing outside this module names a type of theirs.
//!
//! In reading order:
//!
//! * [`client`] — the SDK's set-up: credentials, endpoints, time-outs
//! * [`error`] — what an AWS failure means, by its code
//! * [`json_call`] — the two calls of every run, without the SDK around them
//! * [`sqs`], [`dynamodb`], [`s3`], [`redis`] — the ports, by service
//! * [`start`] — the checks before the first request

mod client;
mod dynamodb;
mod error;
mod json_call;
mod redis;
mod s3;
mod sqs;
mod start;

pub use redis::connection::RedisUrl;
pub use start::{Connected, connect};

use crate::model::ProcessToken;
use std::time::Duration;

/// Where the fleet's parts are (CONTRACT §1), and who asks.
#[derive(Clone, Debug)]
pub struct Settings {
    pub region: String,
    pub functions_table: String,
    pub logs_table: String,
    pub queue_url: String,
    pub bucket: String,
    pub redis_url: RedisUrl,
    /// The variables that the URL was made of.
    pub redis_variables: &'static str,
    /// The old `SQS_ENDPOINT`; used where the SDK's own configuration names no endpoint. So are its two siblings.
    pub sqs_endpoint: Option<String>,
    pub dynamodb_endpoint: Option<String>,
    pub s3_endpoint: Option<String>,
    pub process: ProcessToken,
    /// How long all the checks together may take; they run side by side.
    pub start_deadline: Duration,
}
