//! The fleet backend on SQS, DynamoDB, S3 and Redis. No module outside this one names their types.
//!
//! In reading order:
//!
//! * [`client`] — the SDK's set-up: credentials, endpoints, time-outs
//! * [`error`] — what an AWS failure means, by its code
//! * [`json_call`] — the most frequent calls, without the SDK
//! * [`coalescer`] — calls that are made together share a batch
//! * [`sqs`], [`dynamodb`], [`s3`], [`redis`] — the ports, by service
//! * [`start`] — the checks before the first request; [`worker_start`] — those of a worker

mod client;
mod coalescer;
mod dynamodb;
mod error;
mod json_call;
mod redis;
mod retry;
mod s3;
#[cfg(test)]
mod scripted;
mod settings;
mod sqs;
mod start;
mod worker_start;

pub use redis::connection::RedisUrl;
pub use settings::AwsSettings;
pub use start::{AwsConnection, connect};
pub use worker_start::{AwsWorkerSettings, WorkerPorts, connect_worker};

/// The parts that a simulation of the fleet runs over a simulated Redis.
#[cfg(test)]
pub mod simulation {
    pub use super::dynamodb::functions::{CounterStore, PostNumber};
    pub use super::redis::connection::CommandConnection;
    pub use super::redis::journal::RedisJournal;
    pub use super::redis::limits::RedisLimits;
    pub use super::redis::membership::RedisMembership;
    pub use super::redis::simulated::{Command, Keyspace, LinkError, RedisLink, Reply, SimulatedRedis};
    use crate::backend::Results;
    use crate::model::{NodeId, ProcessToken};
    use std::sync::Arc;

    /// The stored results, read over a simulated connection. Its subscription does not work.
    pub fn stored_results(
        commands: Arc<CommandConnection>,
        node: NodeId,
        process: ProcessToken,
    ) -> Arc<dyn Results> {
        let beats = super::redis::beats::Beats::new(Arc::clone(&commands), node, process);
        Arc::new(super::redis::results::RedisResults::new(commands.client(), commands, Arc::new(beats), node))
    }
}
