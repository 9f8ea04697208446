//! Finds what the nodes know of a job apart from its row: the table of this node, the results, and the
//! journal of the node that accepted the job.

use super::in_flight::InFlight;
use super::journal::NodeJournal;
use super::settler::Settler;
use crate::backend::{BackendError, JournalState, Results};
use crate::model::{FunctionId, JobId, NodeId, Outcome, RowLife, UnixMs};
use std::sync::Arc;

/// What is known of a job apart from its row.
#[derive(Debug)]
pub struct KnownLife {
    pub function: FunctionId,
    /// `None`: it has no result yet.
    pub outcome: Option<Outcome>,
    /// `None`: it is not in flight.
    pub deadline: Option<UnixMs>,
    /// It is not known whether the queue received the job, because its send was not answered or its process
    /// ended.
    pub is_unconfirmed: bool,
    pub life: RowLife,
}

impl KnownLife {
    fn new(function: FunctionId) -> Self {
        let life = RowLife::default();
        Self { function, outcome: None, deadline: None, is_unconfirmed: false, life }
    }

    /// A job with a result and no more. `None`: the result does not name its function.
    fn of_result(outcome: Outcome) -> Option<Self> {
        let (outcome, function) =
            outcome.into_read(|fields| fields.function_id.as_deref().and_then(FunctionId::parse));
        Some(Self { outcome: Some(outcome), ..Self::new(function?) })
    }
}

/// Reads the lives of jobs.
pub struct JobLives {
    node: NodeId,
    in_flight: Arc<InFlight>,
    journal: Arc<NodeJournal>,
    results: Arc<dyn Results>,
    settler: Arc<Settler>,
}

impl JobLives {
    pub fn new(
        node: NodeId,
        in_flight: Arc<InFlight>,
        journal: Arc<NodeJournal>,
        results: Arc<dyn Results>,
        settler: Arc<Settler>,
    ) -> Self {
        Self { node, in_flight, journal, results, settler }
    }

    /// What is known of a job. `None`: nothing, so it has ended long ago or never existed.
    ///
    /// # Errors
    /// The store of results or the journal does not answer.
    pub async fn of(&self, id: JobId) -> Result<Option<KnownLife>, BackendError> {
        if self.in_flight.awaited(id).is_some() {
            // Its publication may be lost, and its next look-up a minute away. An error is logged there, and
            // the job is pending as far as this node knows.
            self.settler.look_up(&[id]).await;
        }
        if let Some((mut known, lacks_result)) = self.here(id) {
            if lacks_result {
                // Only LOST has no stored result.
                let stored = self.settler.stored(id).await?;
                known.outcome = Some(stored.map_or_else(|| Outcome::lost(false), Outcome::new));
            }
            return Ok(Some(known));
        }
        if let Some(known) = self.stored(id).await? {
            return Ok(Some(known));
        }
        let Some(entry) = self.journal.entry(id).await? else {
            // It may have ended between the two reads.
            return self.stored(id).await;
        };
        let is_unconfirmed = self.journal.standing(id).await? == JournalState::Orphaned;
        let deadline = Some(entry.deadline);
        let life = RowLife { ended_by: self.journal.adopter(id.node()).await?, ..RowLife::default() };
        Ok(Some(KnownLife { deadline, is_unconfirmed, life, ..KnownLife::new(entry.function) }))
    }

    /// The same for a job of the old controller, of which only the result is kept.
    ///
    /// # Errors
    /// The store of results does not answer.
    pub async fn of_foreign(&self, request_id: &str) -> Result<Option<KnownLife>, BackendError> {
        let found = self.results.stored_foreign(request_id).await?;
        Ok(found.and_then(|payload| KnownLife::of_result(Outcome::new(payload))))
    }

    /// What this node has in memory, and whether the job has a result that only the store has.
    fn here(&self, id: JobId) -> Option<(KnownLife, bool)> {
        let recent = self.in_flight.recent(id);
        let Some(entry) = self.in_flight.entry_life(id) else {
            let recent = recent?;
            // The substitute for a result names no function.
            let known = match self.in_flight.lost_function(id).filter(|_| recent.is_lost()) {
                Some(function) => Some(KnownLife { outcome: Some(recent), ..KnownLife::new(function) }),
                None => KnownLife::of_result(recent),
            };
            return known.map(|known| (known, false));
        };
        let adopter = (id.node() != self.node).then_some(self.node);
        let outcome = recent.filter(|_| entry.is_settled);
        let lacks_result = entry.is_settled && outcome.is_none();
        let known = KnownLife {
            outcome,
            deadline: Some(entry.deadline),
            is_unconfirmed: entry.is_unconfirmed,
            life: RowLife { ended_by: adopter, ..entry.life },
            ..KnownLife::new(entry.function)
        };
        Some((known, lacks_result))
    }

    async fn stored(&self, id: JobId) -> Result<Option<KnownLife>, BackendError> {
        let found = self.settler.stored(id).await?;
        Ok(found.and_then(|payload| KnownLife::of_result(Outcome::new(payload))))
    }
}
