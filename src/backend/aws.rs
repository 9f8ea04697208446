//! The fleet backend: SQS, DynamoDB, S3 and Redis. Nothing outside this module names a type of theirs.
//!
//! In reading order:
//!
//! * [`client`] — the SDK's set-up: credentials, endpoints, time-outs
//! * [`error`] — what an AWS failure means, by its code
//! * [`direct`] — the two calls that every run takes part in, without the SDK around them
//! * [`sqs`], [`functions`] (with [`function_writes`] and [`recommended`]), [`executions`], [`code_list`], [`claims`] (all over
//!   [`item`]), [`s3`], [`dead_letters`] — the AWS ports
//! * [`redis`] — the command connection, [`subscriber`] — one that listens, [`beats`] — the proof that it
//!   receives what the other publishes; [`results`], [`changes`], [`journal`], [`membership`], [`limits`],
//!   [`workers`] — the Redis ports
//! * [`start`] — the checks before the first request; [`redis_probe`] — what they ask of Redis

mod beats;
mod changes;
mod claims;
mod client;
mod code_list;
mod dead_letters;
mod direct;
mod error;
mod executions;
mod function_writes;
mod functions;
mod item;
mod journal;
mod limits;
mod membership;
mod recommended;
mod redis;
mod redis_probe;
mod results;
mod s3;
mod sqs;
mod start;
mod subscriber;
mod workers;

pub use redis::RedisUrl;
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
