//! The ports over SQS: the task queue, for the gateway and for workers, and its dead-letter queue.

pub mod dead_letters;
pub mod jobs;
pub mod queue;
