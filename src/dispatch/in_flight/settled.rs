//! What the table of accepted jobs answers to a result.

use crate::audit::KeyedResult;
use crate::model::{FunctionId, JobTrace, RowLife, UnixMs};
use std::sync::Arc;

/// The first result of a job.
#[derive(Debug, PartialEq, Eq)]
pub struct FirstResult {
    pub function: FunctionId,
    pub kept: Option<Box<KeyedResult>>,
    /// Another node may end the job too.
    pub is_shared: bool,
    /// When the result arrived, by the same clock as the steps before. `None`: the steps are not known.
    pub heard_at: Option<UnixMs>,
    pub life: RowLife,
    pub trace: Option<Arc<JobTrace>>,
}

/// The outcome of [`InFlight::settle`](super::InFlight::settle).
#[derive(Debug, PartialEq, Eq)]
pub enum SettleOutcome {
    /// The first result of the job. The caller must record a row.
    First(FirstResult),
    /// The first result of a job that ended as LOST. The caller must replace its row.
    Late(FunctionId, RowLife),
    /// The job has a result already.
    Repeated,
    /// The job is not on this node, or its row is written.
    UnknownJob,
}
