//! The membership loop of this node: renews its lease, adopts the jobs of dead nodes, and restores journals
//! that the store has lost.
//!
//! A node whose lease has lapsed is adopted *in place*. Its jobs enter the table of this node and end here
//! like its own jobs, but they leave the journal of the node that their ids name. Moving them to the journal
//! of this node was rejected: `/status` finds a job by the node in its id. No fence is needed if that node
//! was only frozen: rows are idempotent, and each job is counted once. So a node that comes back keeps its
//! id. It admits no jobs until its lease is renewed.
//!
//! A lease belongs to one process. Another process can hold it if it was started on a copy of `STATE_DIR`
//! while this one was frozen. Then this process admits no more jobs, logs an error, and ends the jobs that it
//! has. The holder takes over the jobs that this process cannot end. For that it reads its own journal again
//! whenever another process may have entered jobs there.

use crate::ambient;
use crate::audit::{Ledger, Outstanding};
use crate::backend::{
    AdoptOutcome, BackendError, FleetState, JournalEntry, JournalPart, LeaseRenewal, Membership,
};
use crate::config::FleetConf;
use crate::dispatch::NodeJobs;
use crate::events::{EventBus, FleetEvent, LeaveReason};
use crate::metrics::Metrics;
use crate::model::{FunctionId, JobId, NodeId, now_ms};
use crate::node_lease::NodeLease;
use rand::Rng;
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, MissedTickBehavior, interval};

/// Number of renewals per lease duration.
const RENEWALS: u32 = 10;
/// Minimum interval between two reads of the journal of an adopted node. The node may have been only slow,
/// and may still add jobs. Also applies to this node's own journal while another process may use its id.
const READ_AGAIN: Duration = Duration::from_secs(10);
/// Interval between the two reads that find unknown entries in this node's own journal. By the second read,
/// an entry that this process has entered or ended is known or has left the journal.
const LOOK_TWICE: Duration = Duration::from_secs(2);
/// The deadline, from now, of a restored entry whose row is on this node's disk. If this node dies, its
/// adopter waits this long for the result before the job ends as LOST.
const SPILLED_MAX: Duration = Duration::from_secs(3600);
/// Maximum number of entries per [`Membership::restore`].
const TOLD_MAX: usize = 1000;

/// The membership loop of this node.
pub struct Adopter {
    node: NodeId,
    store: Option<Arc<dyn Membership>>,
    lease: Arc<NodeLease>,
    lasts: Duration,
    jobs: NodeJobs,
    ledger: Arc<Ledger>,
    metrics: Arc<Metrics>,
    events: EventBus,
    /// Start of the current uninterrupted period in which this node holds its lease.
    standing_since: Option<Instant>,
    /// The adoptions of this node at the last renewal.
    adoptions: Option<u64>,
    /// The adopted nodes, and when their journals were last read.
    adopted: BTreeMap<NodeId, Instant>,
    /// Jobs of nodes that are back, for which clients still wait here.
    to_give_back: Vec<JobId>,
    /// When to read this node's own journal again, for jobs of another process with the same id.
    read_own_at: Option<Instant>,
    /// When it was last read for that.
    read_own: Option<Instant>,
    /// Entries of it that this process did not know at the last read.
    strangers: HashSet<JobId>,
    /// Nodes whose lost journal is not restored yet, and when that was first seen.
    lost: BTreeMap<NodeId, Instant>,
}

impl Adopter {
    pub fn new(
        node: NodeId,
        conf: &FleetConf,
        store: Option<Arc<dyn Membership>>,
        lease: Arc<NodeLease>,
        jobs: NodeJobs,
        ledger: Arc<Ledger>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let lasts = Duration::from_secs(conf.lease_s);
        // A predecessor that was wrongly taken as dead may have entered jobs until its lease expired.
        let read_own_at = Some(Instant::now() + lasts + LOOK_TWICE);
        Self {
            node,
            store,
            lease,
            lasts,
            jobs,
            ledger,
            metrics,
            events: EventBus::default(),
            standing_since: None,
            adoptions: None,
            adopted: BTreeMap::new(),
            to_give_back: Vec::new(),
            read_own_at,
            read_own: None,
            strangers: HashSet::new(),
            lost: BTreeMap::new(),
        }
    }

    /// Reports adopted nodes to `events`.
    pub fn reporting_to(self, events: EventBus) -> Self {
        Self { events, ..self }
    }

    /// Renews the lease, and resumes the jobs that an earlier process of this node has left. Returns their
    /// number. Must be called before the other loops start.
    ///
    /// # Errors
    /// The store did not answer, or another process holds the lease.
    pub async fn begin(&mut self) -> Result<usize, BackendError> {
        self.jobs.started(self.node).await?;
        let entries = self.jobs.journaled(self.node).await?;
        let restored = self.restore(&entries, usize::MAX);
        // A late result replaces their rows. The journal lists them as lost only after that is written.
        for (id, function) in self.ledger.spilled_lost() {
            self.jobs.remember(id, function);
        }
        if let Some(store) = self.store.clone()
            && self.renew(store.as_ref()).await?.is_none()
        {
            let held = format!("another process holds the lease of node {}", self.node);
            return Err(BackendError::Unavailable(held));
        }
        // After the renewal, which restores a lost journal. An incomplete journal does not return its sums.
        self.take_over(self.node).await?;
        Ok(restored)
    }

    /// Runs the loop. Never returns.
    pub async fn run(mut self) {
        let Some(store) = self.store.clone() else { return std::future::pending().await };
        let mut tick = interval(self.lasts / RENEWALS);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            let done = match self.renew(store.as_ref()).await {
                Ok(Some(others)) => self.look_after(store.as_ref(), others.lapsed).await,
                Ok(None) => Ok(()),
                Err(e) => Err(e),
            };
            if let Err(e) = done {
                tracing::debug!(error = %e, "Fleet membership not updated; retrying at the next tick");
            }
        }
    }

    /// Renews the lease. Returns `None` if another process holds it.
    async fn renew(&mut self, store: &dyn Membership) -> Result<Option<FleetState>, BackendError> {
        let asked = Instant::now();
        let (others, is_contested, adoptions) = match store.renew(self.node, self.lasts).await? {
            LeaseRenewal::Renewed { others, is_contested, adoptions } => (others, is_contested, adoptions),
            LeaseRenewal::Lost => {
                self.lost();
                return Ok(None);
            }
        };
        let is_adopted = self.adoptions.replace(adoptions).is_some_and(|before| before != adoptions);
        if is_adopted || self.lease.is_lost() {
            // While the lease was lapsed, another node has adopted the jobs, or another process has used the
            // id and may have died.
            self.lease.shared();
            self.jobs.share_all();
            self.read_own_soon(asked);
        }
        if !self.lease.holds() {
            self.standing_since = Some(asked);
        }
        let has_strangers = self.jobs.take_has_strangers();
        if is_contested || has_strangers || self.ledger.take_has_lost_rows() {
            self.read_own_soon(asked + LOOK_TWICE);
        }
        self.mend(store, self.node).await?;
        if self.lease.is_lost() {
            tracing::warn!(node = %self.node, "Lease of this node id regained; jobs are admitted again");
            self.metrics.jobs.node_id_lost.set(0);
        }
        self.lease.renewed(asked, self.lasts, others.alive);
        let left = (asked + self.lasts).saturating_duration_since(Instant::now());
        self.show_lease_end(left);
        self.look_for_strangers().await?;
        Ok(Some(others))
    }

    /// Stops admission, because another process holds the lease. The jobs in the table still end here.
    fn lost(&mut self) {
        if !self.lease.is_lost() {
            tracing::error!(
                node = %self.node,
                "Node id lost: another process holds its lease, and this one admits no more jobs. \
                 Restart this process; it then takes another id. Do not run two nodes on copies of one \
                 STATE_DIR"
            );
            self.metrics.jobs.node_id_lost.set(1);
            self.show_lease_end(Duration::ZERO);
        }
        self.lease.lost();
    }

    /// Sets the metric to the end of the lease: `left` from now.
    fn show_lease_end(&self, left: Duration) {
        let end = now_ms() / 1000 + left.as_secs();
        self.metrics.jobs.lease_ends_at.set(i64::try_from(end).unwrap_or(i64::MAX));
    }

    fn read_own_soon(&mut self, at: Instant) {
        let at = self.read_own.map_or(at, |read| at.max(read + READ_AGAIN));
        self.read_own_at = Some(self.read_own_at.map_or(at, |planned| planned.min(at)));
    }

    /// Resumes what this process does not know of its own journal: jobs that another process has entered, or
    /// whose rows were lost with the disk, and sums that another process has added.
    async fn look_for_strangers(&mut self) -> Result<(), BackendError> {
        if self.read_own_at.is_none_or(|at| at > Instant::now()) {
            return Ok(());
        }
        let mut entries = self.jobs.journaled(self.node).await?;
        self.take_over(self.node).await?;
        self.read_own = Some(Instant::now());
        // The order matters: a job moves from the table to the ledger or to the removals, never back.
        entries.retain(|entry| !self.jobs.contains(entry.id));
        let (ended, leaving) = (self.ledger.ended(self.node), self.jobs.being_removed());
        entries.retain(|entry| !ended.contains(&entry.id) && !leaving.contains(&entry.id));
        let seen = std::mem::take(&mut self.strangers);
        let (known, new): (Vec<_>, Vec<_>) = entries.into_iter().partition(|entry| seen.contains(&entry.id));
        let jobs = self.restore(&known, self.jobs.room() / 2);
        if jobs > 0 {
            tracing::warn!(node = %self.node, jobs, "Unknown jobs in the journal of this node taken over");
        }
        // Jobs for which the table has no room stay unknown. Those whose rows are on this node's disk are not
        // counted: they leave the journal once their rows are written.
        let spilled: HashSet<JobId> = self.ledger.spilled().into_iter().collect();
        let left = new.iter().chain(known.iter().filter(|entry| !self.jobs.contains(entry.id)));
        self.strangers = left.map(|entry| entry.id).filter(|id| !spilled.contains(id)).collect();
        self.read_own_at = (!self.strangers.is_empty()).then(|| Instant::now() + LOOK_TWICE);
        Ok(())
    }

    /// Restores the journal of a node from what this node knows, if the store has lost it.
    async fn mend(&self, store: &dyn Membership, node: NodeId) -> Result<(), BackendError> {
        if store.is_complete(node).await? {
            return Ok(());
        }
        let moving = || self.jobs.of_node(node);
        let tell = async |moving, books| self.tell(store, node, moving, books).await;
        let jobs = self.ledger.tell_outstanding(node, moving, tell).await?;
        if jobs > 0 {
            tracing::warn!(%node, jobs, "Journal restored after the store lost its data");
        }
        Ok(())
    }

    /// Writes the journal of a node to the store. Returns the number of jobs. No job of the node ends until
    /// all parts are written to the same incarnation of the store.
    async fn tell(
        &self,
        store: &dyn Membership,
        node: NodeId,
        (in_flight, mut given_up): (Vec<JournalEntry>, Vec<(JobId, FunctionId)>),
        books: Outstanding,
    ) -> Result<usize, BackendError> {
        let token = ambient::rng().random();
        if !store.begin_restore(node, token).await? {
            return Ok(0);
        }
        let entry = |id, function, deadline| JournalEntry { id, function, deadline, idempotency_key: None };
        // Their rows are written, so an adopter need not wait for a result.
        let ended = books.ended.into_iter().map(|ended| entry(ended.id, ended.function, 0));
        let deadline = now_ms() + SPILLED_MAX.as_secs() * 1000;
        let spilled = books.spilled.into_iter().map(|(id, function)| entry(id, function, deadline));
        let in_flight = in_flight.into_iter().filter(|entry| !books.overtaken.contains(&entry.id));
        let entries: Vec<JournalEntry> = in_flight.chain(ended).chain(spilled).collect();
        // A job that is in the journal is not remembered yet: `Journal::end` does that when it counts it as
        // lost.
        given_up.extend(books.late);
        let held: HashSet<JobId> = entries.iter().map(|entry| entry.id).collect();
        given_up.retain(|(id, _)| !held.contains(id));
        let parts = entries.chunks(TOLD_MAX).map(JournalPart::Jobs);
        let parts = parts.chain(books.sums.chunks(TOLD_MAX).map(JournalPart::Sums));
        let parts = parts.chain(books.numbered.chunks(TOLD_MAX).map(JournalPart::Numbered));
        let parts = parts.chain(given_up.chunks(TOLD_MAX).map(JournalPart::GivenUp));
        let told = async {
            for part in parts {
                if !store.restore(node, token, part).await? {
                    return Ok(false);
                }
            }
            store.finish_restore(node, token).await
        };
        let told = told.await;
        // Also after a failed restore: no other step removes the entries that it wrote.
        self.leave_unsent(node, &entries);
        match told? {
            true => Ok(entries.len()),
            false => Err(BackendError::Unavailable(
                "the store lost its data during the restore, or another node restores the journal".into(),
            )),
        }
    }

    /// Removes restored jobs whose send has failed meanwhile. They left the journal before the restore
    /// entered them again. The places are searched in the order in which jobs move, so that no ended job is
    /// removed.
    fn leave_unsent(&self, node: NodeId, told: &[JournalEntry]) {
        let told = told.iter().map(|entry| entry.id);
        let mut unsent: Vec<JobId> = told.filter(|id| !self.jobs.contains(*id)).collect();
        let spilled: HashSet<JobId> = self.ledger.spilled().into_iter().collect();
        let ended = self.ledger.ended(node);
        unsent.retain(|id| !spilled.contains(id) && !ended.contains(id));
        self.jobs.remove_from_journal(unsent);
    }

    /// Adopts nodes whose lease has lapsed, and gives back the jobs of nodes that are back.
    async fn look_after(&mut self, store: &dyn Membership, lapsed: Vec<NodeId>) -> Result<(), BackendError> {
        let gone: Vec<NodeId> = self.adopted.keys().filter(|node| !lapsed.contains(node)).copied().collect();
        for node in gone {
            // If it was not listed, the store has lost its data, and perhaps only this node knows the jobs.
            // The node stays adopted until it is seen to be back.
            if store.relist(node).await? {
                self.mend(store, node).await?;
            } else {
                self.adopted.remove(&node);
                self.to_give_back.extend(self.jobs.ids_of_node(node));
                tracing::info!(adopted = %node, "Adopted node is back; it tracks its jobs itself again");
                self.events.report(|| FleetEvent::NodeJoined { node });
            }
        }
        let jobs = std::mem::take(&mut self.to_give_back);
        self.to_give_back = self.jobs.give_back(jobs);
        // After a gap, which may be a failure of the store, the other nodes get time to renew their leases.
        if self.standing_since.is_none_or(|since| since.elapsed() < self.lasts) {
            return Ok(());
        }
        for node in lapsed.into_iter().chain(self.left_alone(store).await?) {
            if node == self.node {
                continue;
            }
            match store.adopt(node, self.node, self.lasts).await? {
                AdoptOutcome::Adopted => {
                    self.to_give_back.retain(|id| id.node() != node);
                    self.adopt(store, node).await?;
                }
                AdoptOutcome::ByAnother => {
                    self.adopted.remove(&node);
                }
                // Its jobs are given back at the next tick.
                AdoptOutcome::Alive => {}
            }
        }
        Ok(())
    }

    /// Lists and returns the dead nodes whose lost journals no node would restore: this node has pending work
    /// for them, and they stayed unlisted for a whole lease. A shorter wait was rejected. A live node may
    /// only be late. If this node restored its journal first, the live node would find it complete and add
    /// nothing.
    async fn left_alone(&mut self, store: &dyn Membership) -> Result<Vec<NodeId>, BackendError> {
        let nodes = self.ledger.nodes();
        self.lost.retain(|node, _| nodes.contains(node));
        let mut alone = Vec::new();
        for node in nodes {
            if node == self.node || self.adopted.contains_key(&node) || store.is_complete(node).await? {
                self.lost.remove(&node);
                continue;
            }
            let since = *self.lost.entry(node).or_insert_with(Instant::now);
            if since.elapsed() >= self.lasts && store.relist(node).await? {
                alone.push(node);
            }
        }
        Ok(alone)
    }

    async fn adopt(&mut self, store: &dyn Membership, node: NodeId) -> Result<(), BackendError> {
        if self.adopted.get(&node).is_some_and(|read| read.elapsed() < READ_AGAIN) {
            return Ok(());
        }
        self.mend(store, node).await?;
        let entries = self.jobs.journaled(node).await?;
        // Half of the room is reserved for new jobs of this node.
        let room = self.jobs.room() / 2;
        let jobs = self.restore(&entries, room);
        let sums = self.take_over(node).await?;
        if self.adopted.insert(node, Instant::now()).is_none() {
            tracing::warn!(adopted = %node, jobs, sums, "Node adopted: its lease has lapsed");
            self.metrics.jobs.adopted_nodes.inc();
            self.events.report(|| FleetEvent::NodeLeft { node, reason: LeaveReason::Adopted });
        }
        if entries.is_empty() && sums == 0 && store.dismiss(node).await? {
            self.adopted.remove(&node);
            tracing::info!(adopted = %node, "Adopted node has no jobs left and is no longer listed");
        }
        Ok(())
    }

    /// Resumes at most `max` jobs of a journal, except those whose rows are on this node's disk. Returns how
    /// many were not in the table.
    fn restore(&self, entries: &[JournalEntry], max: usize) -> usize {
        let spilled: HashSet<JobId> = self.ledger.spilled().into_iter().collect();
        let waiting = entries.iter().filter(|entry| !spilled.contains(&entry.id));
        waiting.filter(|entry| self.jobs.restore(entry)).take(max).count()
    }

    /// Takes over the lost jobs and the unposted sums of a node. Returns the number of functions with
    /// unposted sums.
    async fn take_over(&self, node: NodeId) -> Result<usize, BackendError> {
        for (id, function) in self.jobs.given_up(node).await? {
            self.jobs.remember(id, function);
        }
        self.ledger.take_over(node).await
    }
}

#[cfg(test)]
mod tests;
