//! The ports: what the gateway needs from the outside, one trait family per file.
//!
//! A trait exists only where the fleet ([`aws`]) and the single machine ([`embedded`]) differ. The traits are
//! object-safe and small. Only `boot` chooses the backend; no other room knows which one runs.
//!
//! In the order in which a job meets them: [`functions`], [`limits`], [`claims`], [`queue`], [`journal`],
//! [`results`], [`dead_letters`], [`executions`]. Beside them: [`membership`] of nodes and their
//! [`summaries`], the registry of [`workers`], announcements of [`changes`], the stream of [`events`],
//! [`error`], and [`empty_dir`] for local files.

mod activity;
#[cfg(feature = "aws")]
pub mod aws;
mod changes;
mod claims;
mod dead_letters;
pub mod embedded;
mod empty_dir;
mod error;
mod events;
mod executions;
mod functions;
mod journal;
mod limits;
mod lone_status;
mod membership;
mod ports;
mod queue;
mod results;
mod summaries;
mod work;
mod workers;

pub use activity::{ActiveWorker, WarmPools, WorkerActivity, WorkerPart};
pub use changes::{ChangeEvent, ChangeFeed};
pub use claims::{CLAIM_TTL, Claim, Claims, STORED_RESULT_BYTES_MAX, StoredClaim};
pub use dead_letters::{DeadLetter, DeadLetters};
pub use empty_dir::make_empty_dir;
pub use error::{BackendError, StartProblem};
pub use events::{EventId, EventSpan, EventStream, StreamedEvent};
pub use executions::{ExecutionStore, LogPage, LogQuery, ROWS_MAX};
pub use functions::{CodeList, CodeStore, FunctionPage, FunctionStore, FunctionWrite, FunctionWriteOutcome};
pub use journal::{
    Addition, ENDED_MAX, EndOutcome, EndedJob, GIVEN_UP_KEPT, GIVEN_UP_MAX, Journal, JournalEntry,
    JournalPart, JournalState, NumberedSums, POSTED_MAX, UnpostedSums,
};
pub use limits::{Decision, Grant, LeaseCall, LimitStore};
pub use lone_status::{LONE_STATUS_TTL, LoneStatusStore};
pub use membership::{
    AdoptOutcome, FleetState, LeaseHolder, LeaseOutcome, LeaseRenewal, Membership, Predecessor,
};
pub use ports::Backend;
pub use queue::{BATCH_JOBS_MAX, JobQueue, QueueTraits, SendError};
pub use results::{ResultEvent, Results, STORED_MAX, SubscriptionState};
pub use summaries::{NodeSummaries, SUMMARIES_MAX, SUMMARY_BYTES_MAX, SUMMARY_LISTED, StoredSummary};
pub use work::{
    CodeSource, FetchError, JobSource, JobSourceTraits, OutputStore, Receipt, ReceivedJob, is_request_id,
};
pub use workers::{
    HEALTHY_WITHIN, HeartbeatOutcome, SILENCE_FORGOTTEN, WORKER_TTL, WORKERS_MAX, WorkerRecord,
    WorkerRegistry, reports_well,
};
