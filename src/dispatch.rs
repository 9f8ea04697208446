//! The path of a job from acceptance to its row: submit, wait, settle. Independent of HTTP.
//!
//! ```text
//! submit  enter the table (with the waiter) → batcher → journal → queue
//! settle  publication or look-up → waiters → audit row
//! end     row written → job leaves the table and the journal
//! ```
//!
//! [`new`] builds a [`Dispatcher`], the handle that requests use, and the [`DispatchLoops`] that `boot`
//! starts.

mod batcher;
mod breaker;
mod caps;
mod dead_letters;
mod dispatcher;
mod given_up;
mod in_flight;
mod journal;
mod lives;
mod node_jobs;
mod oldest;
mod recent;
mod result_loops;
mod schedule;
mod settler;
mod shedder;
#[cfg(test)]
mod tests;

pub use batcher::{Resend, Sending, SubmitError};
pub use caps::TooManyJobs;
pub use dead_letters::DeadLetterReader;
pub use dispatcher::{Dispatcher, JobState, Pending, PendingJob, Submitted};
pub use in_flight::{Permits, Waiter};
pub use lives::KnownLife;
pub use node_jobs::NodeJobs;
pub use oldest::OldestJob;
pub use result_loops::{Lookups, Pump};

use crate::audit::{Audit, RowsStored};
use crate::backend::Backend;
use crate::config::{BatchConf, DeadLetterConf, Live, MemoryConf, OverloadConf};
use crate::events::EventBus;
use crate::metrics::Metrics;
use crate::model::NodeId;
use crate::node_lease::NodeLease;
use crate::traces::Traces;
use batcher::BatchLoop;
use caps::ConcurrencyCaps;
use dispatcher::DispatcherParts;
use in_flight::InFlight;
use journal::NodeJournal;
use lives::JobLives;
use schedule::LookupSchedule;
use settler::{Settler, SettlerParts};
use shedder::Shedder;
use std::sync::Arc;

/// The loops of the dispatcher, started by `boot`. `batches` ends when it is stopped; the others never end.
pub struct DispatchLoops {
    pub batches: BatchLoop,
    pub pump: Pump,
    pub lookups: Lookups,
    /// The jobs of this node and of the nodes that it adopts, for `fleet`.
    pub node_jobs: NodeJobs,
    pub dead_letters: DeadLetterReader,
    /// Receives the ids of jobs whose rows are written, from the audit.
    pub rows: Arc<dyn RowsStored>,
}

/// The dependencies and settings of a dispatcher.
pub struct DispatchParts<'a> {
    pub node: NodeId,
    pub memory: &'a MemoryConf,
    pub dead_letter: &'a DeadLetterConf,
    pub batch: Live<BatchConf>,
    pub overload: Live<OverloadConf>,
    pub backend: &'a Backend,
    pub audit: Audit,
    /// The lease of this node. Without it no jobs are admitted.
    pub lease: Arc<NodeLease>,
    pub events: EventBus,
    pub traces: Traces,
    pub metrics: Arc<Metrics>,
}

/// Builds the dispatcher of a node and its loops. Starts nothing.
pub fn new(parts: DispatchParts<'_>) -> (Dispatcher, DispatchLoops) {
    let DispatchParts { node, memory, dead_letter, batch, overload, backend, audit, lease, .. } = parts;
    let DispatchParts { events, traces, metrics, .. } = parts;
    let shedder = Arc::new(Shedder::new(overload.clone(), Arc::clone(&metrics)));
    let in_flight =
        Arc::new(InFlight::new(memory.jobs_in_flight_max, memory.settled_bytes_max, Arc::clone(&metrics)));
    let journal = Arc::new(NodeJournal::new(Arc::clone(&backend.journal), Arc::clone(&lease)));
    let schedule = Arc::new(LookupSchedule::default());
    let (batcher, batches) = batcher::new(
        batch,
        Arc::clone(&backend.queue),
        Arc::clone(&journal),
        Arc::clone(&in_flight),
        Arc::clone(&shedder),
        traces.clone(),
        Arc::clone(&metrics),
    );
    let dead_letters = DeadLetterReader::new(dead_letter, backend.dead_letters.clone(), Arc::clone(&metrics));
    let settler = Arc::new(Settler::new(SettlerParts {
        in_flight: Arc::clone(&in_flight),
        schedule: Arc::clone(&schedule),
        results: Arc::clone(&backend.results),
        audit,
        lease: Arc::clone(&lease),
        events: events.clone(),
        traces,
        metrics: Arc::clone(&metrics),
    }));
    let loops = DispatchLoops {
        batches,
        pump: Pump::new(Arc::clone(&settler), Arc::clone(&backend.results)),
        lookups: Lookups::new(Arc::clone(&settler), Arc::clone(&in_flight), Arc::clone(&journal)),
        node_jobs: NodeJobs::new(Arc::clone(&settler), Arc::clone(&in_flight), Arc::clone(&journal)),
        dead_letters,
        rows: Arc::clone(&settler) as Arc<dyn RowsStored>,
    };
    let lives = JobLives::new(
        node,
        Arc::clone(&in_flight),
        Arc::clone(&journal),
        Arc::clone(&backend.results),
        Arc::clone(&settler),
    );
    let dispatcher = Dispatcher::new(DispatcherParts {
        node,
        batcher,
        in_flight,
        schedule,
        journal,
        results: Arc::clone(&backend.results),
        settler,
        shedder,
        slots: ConcurrencyCaps::default(),
        lease,
        membership: backend.membership.clone(),
        overload,
        events,
        lives,
    });
    (dispatcher, loops)
}
