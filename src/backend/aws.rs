//! The fleet backend on SQS, DynamoDB, S3 and Redis. No module outside this one names their types.
//!
//! In reading order:
//!
//! * [`client`] — the SDK's set-up: credentials, endpoints, time-outs
//! * [`error`] — what an AWS failure means, by its code
//! * [`json_call`] — the most frequent calls, without the SDK
//! * [`sqs`], [`dynamodb`], [`s3`], [`redis`] — the ports, by service
//! * [`start`] — the checks before the first request

mod client;
mod dynamodb;
mod error;
mod json_call;
mod redis;
mod retry;
mod s3;
mod settings;
mod sqs;
mod start;

pub use redis::connection::RedisUrl;
pub use settings::AwsSettings;
pub use start::{AwsConnection, connect};
