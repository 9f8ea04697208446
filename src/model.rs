//! The data types of the crate: [`JobId`], [`FunctionId`], [`Function`], [`Job`], [`Outcome`],
//! [`Execution`].
//!
//! Everything here is plain data without I/O. External input is parsed once, at the boundary, into these
//! types. Inside, their validity is a precondition that no code checks again.

mod caller;
mod change;
mod encoding;
mod escape;
mod execution;
mod function;
mod handler;
mod idempotency;
mod ids;
mod job;
mod life;
mod outcome;
mod quota;
mod recommendation;
mod run_request;
mod runtime;
mod scope;
mod sums;
mod text;
mod time;
mod trace;

pub use caller::{AllowedFunctions, Caller};
pub use change::{ConfigAction, ConfigRecord, RetiredCode};
pub use encoding::encoding_problem;
pub use execution::{Execution, ExecutionEnd, LOG_TTL_S, MESSAGE_BYTES_MAX, RowId, RowKey, Status};
pub use function::{Function, FunctionCounters, FunctionId};
pub use handler::Handler;
pub use idempotency::{BodyHash, IdempotencyKey};
pub use ids::{JobId, NodeId, ProcessToken};
pub use job::{Job, JobDraft, JobTemplate, TIMEOUT_MS_DEFAULT};
pub use life::{JobOrigin, JobProgress, RowLife};
pub use outcome::{Outcome, ResultFields};
pub use quota::Quota;
pub use recommendation::Recommendation;
pub use run_request::{RunRequest, RunRequestError};
pub use runtime::Runtime;
pub use scope::Scope;
pub use sums::Sums;
pub use time::{Rfc3339Ms, UnixMs, millis, now_ms, parse_rfc3339_ms, rfc3339_ms};
pub use trace::{JobTrace, RequestTrace, TRACESTATE_BYTES_MAX, TraceContext, tracestate};
