//! All ports of a backend.

use crate::backend::ChangeFeed;
use crate::backend::Claims;
use crate::backend::CodeList;
use crate::backend::CodeStore;
use crate::backend::DeadLetters;
use crate::backend::EventStream;
use crate::backend::ExecutionStore;
use crate::backend::FunctionStore;
use crate::backend::JobQueue;
use crate::backend::Journal;
use crate::backend::LimitStore;
use crate::backend::Membership;
use crate::backend::NodeSummaries;
use crate::backend::Results;
use crate::backend::WorkerRegistry;
use std::sync::Arc;

/// Everything a backend gives, for `boot` to hand on piece by piece.
#[derive(Clone)]
pub struct Backend {
    pub queue: Arc<dyn JobQueue>,
    pub results: Arc<dyn Results>,
    pub journal: Arc<dyn Journal>,
    pub claims: Arc<dyn Claims>,
    /// `None`: the queue gives no message up.
    pub dead_letters: Option<Arc<dyn DeadLetters>>,
    /// `None`: there is one node.
    pub membership: Option<Arc<dyn Membership>>,
    pub functions: Arc<dyn FunctionStore>,
    pub executions: Arc<dyn ExecutionStore>,
    pub code: Arc<dyn CodeStore>,
    pub code_list: Arc<dyn CodeList>,
    pub workers: Arc<dyn WorkerRegistry>,
    pub summaries: Arc<dyn NodeSummaries>,
    /// `None`: the process is alone.
    pub changes: Option<Arc<dyn ChangeFeed>>,
    /// `None`: nobody can watch events.
    pub events: Option<Arc<dyn EventStream>>,
    /// `None`: limits are counted in this process.
    pub limits: Option<Arc<dyn LimitStore>>,
}
