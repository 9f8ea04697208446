//! The ports over the two DynamoDB tables.
//!
//! * [`functions`], [`function_writes`], [`recommendation`] — the function table
//! * [`executions`], [`execution_writes`] — the rows of the execution log
//! * [`claims`], [`code_list`] — idempotency keys and retired code, items of the log table
//! * [`item`] — attributes of an item, read and written

pub mod claims;
pub mod code_list;
mod execution_writes;
pub mod executions;
mod function_item;
mod function_writes;
pub mod functions;
pub mod item;
mod recommendation;
