//! The ports over SQS: the task queue and its dead-letter queue.

pub mod dead_letters;
pub mod queue;
