//! This node among the others: it keeps its lease, looks after the jobs of nodes that are gone, and tells a store that
//! has lost its data what it should hold.
//!
//! A node whose lease has lapsed is adopted *in place*: its jobs enter this node's table and end here as its own do,
//! but they leave the journal of the node that they name. So nothing is moved, `/status` finds them all the time, and
//! it does no harm if their node was only frozen: a row is the same whoever writes it, and a job ends once. For the same
//! reason a node that comes back keeps its id. It admits nothing until its lease is renewed.
//!
//! A lease belongs to one process. If another one holds it (it was started on a copy of `STATE_DIR` while
//! this one was frozen), this one admits nothing more, says so, and ends the jobs it has. What it cannot end
//! any more is taken up by the holder, which reads its own journal again whenever another process may have
//! entered jobs there.

use crate::audit::{Ledger, Outstanding};
use crate::backend::{BackendError, FleetState, JournalEntry, JournalPart, LeaseRenewal, Membership};
use crate::config::FleetConf;
use crate::dispatch::NodeJobs;
use crate::metrics::Metrics;
use crate::model::{FunctionId, JobId, NodeId, now_ms};
use crate::node_lease::NodeLease;
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, MissedTickBehavior, interval};

/// Times a lease is renewed before it would lapse.
const RENEWALS: u32 = 10;
/// How often the journal of an adopted node is read again: it may have been only slow, and have added jobs.
/// Also how often this node's own is, while another process has its id.
const READ_AGAIN: Duration = Duration::from_secs(10);
/// Between two looks at entries of this node's own journal that this process does not know. Those that it has
/// entered or ended itself are known, or gone, by the second look.
const LOOK_TWICE: Duration = Duration::from_secs(2);
/// How long others wait for the row of a job that is on this node's disk, if the journal has lost it and this node
/// dies.
const SPILLED_MAX: Duration = Duration::from_secs(3600);
/// Entries told in one call.
const TOLD_MAX: usize = 1000;

/// The loop of this node's membership.
pub struct Adopter {
    node: NodeId,
    store: Option<Arc<dyn Membership>>,
    lease: Arc<NodeLease>,
    lasts: Duration,
    jobs: NodeJobs,
    ledger: Arc<Ledger>,
    metrics: Arc<Metrics>,
    /// Since when this node has heard of the others without a gap.
    standing_since: Option<Instant>,
    /// The nodes whose jobs are looked after here, and when their journals were read last.
    adopted: BTreeMap<NodeId, Instant>,
    /// Jobs of nodes that are back, which somebody still waits for here.
    to_give_back: Vec<JobId>,
    /// When this node's own journal is read again for jobs of another process with its id.
    read_own_at: Option<Instant>,
    /// When that was done last.
    read_own: Option<Instant>,
    /// Entries of it that this process did not know when it read it last.
    strangers: HashSet<JobId>,
    /// Nodes that nobody has told a lost journal again yet, and since when.
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
        // A predecessor that was only taken as gone may have entered jobs for as long as its lease was good.
        let read_own_at = Some(Instant::now() + lasts + LOOK_TWICE);
        Self {
            node,
            store,
            lease,
            lasts,
            jobs,
            ledger,
            metrics,
            standing_since: None,
            adopted: BTreeMap::new(),
            to_give_back: Vec::new(),
            read_own_at,
            read_own: None,
            strangers: HashSet::new(),
            lost: BTreeMap::new(),
        }
    }

    /// Takes the lease, and goes on with what an earlier life of this node has left: gives how many jobs it was. Before the
    /// other loops start.
    pub async fn begin(&mut self) -> Result<usize, BackendError> {
        self.jobs.started(self.node).await?;
        let entries = self.jobs.journaled(self.node).await?;
        let restored = self.restore(&entries, usize::MAX);
        if let Some(store) = self.store.clone()
            && self.renew(store.as_ref()).await?.is_none()
        {
            let held = format!("another process has taken the id of node {}", self.node);
            return Err(BackendError::Unavailable(held));
        }
        // A journal that was never told, or is told again just now, says nothing of its sums before.
        self.take_over(self.node).await?;
        Ok(restored)
    }

    /// Never ends.
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
                tracing::debug!(error = %e, "Fleet Not Heard Of");
            }
        }
    }

    /// `None`: another process holds the lease.
    async fn renew(&mut self, store: &dyn Membership) -> Result<Option<FleetState>, BackendError> {
        let asked = Instant::now();
        let (others, is_contested) = match store.renew(self.node, self.lasts).await? {
            LeaseRenewal::Renewed { others, is_contested } => (others, is_contested),
            LeaseRenewal::Lost => {
                self.lost();
                return Ok(None);
            }
        };
        if !self.lease.holds() {
            if self.standing_since.is_some() {
                // Meanwhile another process may have had the id, and is gone.
                self.read_own_soon(asked);
            }
            self.standing_since = Some(asked);
        }
        if is_contested || self.ledger.take_has_lost_rows() {
            self.read_own_soon(asked + LOOK_TWICE);
        }
        self.mend(store, self.node).await?;
        if self.lease.is_lost() {
            tracing::warn!(node = %self.node, "Node Id Held Again: this process admits jobs again");
            self.metrics.jobs.node_id_lost.set(0);
        }
        self.lease.renewed(asked, self.lasts, others.alive);
        self.look_for_strangers().await?;
        Ok(Some(others))
    }

    /// Another process holds the lease. The jobs that are here end here, as long as this process runs.
    fn lost(&mut self) {
        if !self.lease.is_lost() {
            tracing::error!(
                node = %self.node,
                "Node Id Lost: another process holds the lease of this id, and this one admits no more jobs. \
                 Restart it, and it takes another id. Do not run two nodes on copies of one STATE_DIR"
            );
            self.metrics.jobs.node_id_lost.set(1);
        }
        self.lease.lost();
    }

    fn read_own_soon(&mut self, at: Instant) {
        let at = self.read_own.map_or(at, |read| at.max(read + READ_AGAIN));
        self.read_own_at = Some(self.read_own_at.map_or(at, |planned| planned.min(at)));
    }

    /// Goes on with jobs in this node's own journal that it does not know: another process has entered them, or their rows
    /// were lost with their disk.
    async fn look_for_strangers(&mut self) -> Result<(), BackendError> {
        if self.read_own_at.is_none_or(|at| at > Instant::now()) {
            return Ok(());
        }
        let mut entries = self.jobs.journaled(self.node).await?;
        self.read_own = Some(Instant::now());
        // In this order: a job of this process leaves the table for one of the others.
        entries.retain(|entry| !self.jobs.contains(entry.id));
        let (ended, leaving) = (self.ledger.ended(self.node), self.jobs.being_removed());
        entries.retain(|entry| !ended.contains(&entry.id) && !leaving.contains(&entry.id));
        let seen = std::mem::take(&mut self.strangers);
        let (known, new): (Vec<_>, Vec<_>) = entries.into_iter().partition(|entry| seen.contains(&entry.id));
        let jobs = self.restore(&known, self.jobs.room() / 2);
        if jobs > 0 {
            tracing::warn!(node = %self.node, jobs, "Unknown Jobs In The Journal Of This Node Taken Over");
        }
        // Those without room stay strangers, and so do those whose rows wait on this node's disk: they leave
        // by themselves.
        let spilled: HashSet<JobId> = self.ledger.spilled().into_iter().collect();
        let left = new.iter().chain(known.iter().filter(|entry| !self.jobs.contains(entry.id)));
        self.strangers = left.map(|entry| entry.id).filter(|id| !spilled.contains(id)).collect();
        self.read_own_at = (!self.strangers.is_empty()).then(|| Instant::now() + LOOK_TWICE);
        Ok(())
    }

    /// Tells the journal of a node again what is known of it here, if the store has lost it.
    async fn mend(&self, store: &dyn Membership, node: NodeId) -> Result<(), BackendError> {
        if store.is_complete(node).await? {
            return Ok(());
        }
        let moving = || self.jobs.of_node(node);
        let tell = async |moving, books| self.tell(store, node, moving, books).await;
        let jobs = self.ledger.tell_outstanding(node, moving, tell).await?;
        if jobs > 0 {
            tracing::warn!(%node, jobs, "Journal Told Again");
        }
        Ok(())
    }

    /// Gives how many jobs were told. Until all is told, and to one store, nothing ends there.
    async fn tell(
        &self,
        store: &dyn Membership,
        node: NodeId,
        (in_flight, mut given_up): (Vec<JournalEntry>, Vec<(JobId, FunctionId)>),
        books: Outstanding,
    ) -> Result<usize, BackendError> {
        let token = rand::random();
        store.begin_restore(node, token).await?;
        let entry = |id, function, deadline| JournalEntry { id, function, deadline, idempotency_key: None };
        // Their rows are written: whoever adopts them has nothing to wait for.
        let ended = books.ended.into_iter().map(|ended| entry(ended.id, ended.function, 0));
        let deadline = now_ms() + SPILLED_MAX.as_secs() * 1000;
        let spilled = books.spilled.into_iter().map(|(id, function)| entry(id, function, deadline));
        let entries: Vec<JournalEntry> = in_flight.into_iter().chain(ended).chain(spilled).collect();
        // A job that is still to be counted as lost is remembered when it is.
        given_up.extend(books.late);
        let held: HashSet<JobId> = entries.iter().map(|entry| entry.id).collect();
        given_up.retain(|(id, _)| !held.contains(id));
        let told = async {
            for entries in entries.chunks(TOLD_MAX) {
                store.restore(node, JournalPart::Jobs(entries)).await?;
            }
            for sums in books.sums.chunks(TOLD_MAX) {
                store.restore(node, JournalPart::Sums(sums)).await?;
            }
            for numbered in books.numbered.chunks(TOLD_MAX) {
                store.restore(node, JournalPart::Numbered(numbered)).await?;
            }
            for given_up in given_up.chunks(TOLD_MAX) {
                store.restore(node, JournalPart::GivenUp(given_up)).await?;
            }
            store.finish_restore(node, token).await
        };
        let told = told.await;
        // Also of what was told in vain: nobody else takes it out.
        self.leave_unsent(node, &entries);
        match told? {
            true => Ok(entries.len()),
            false => Err(BackendError::Unavailable("the store has lost its data again meanwhile".into())),
        }
    }

    /// A send that failed meanwhile left the journal before it was told of it. What has ended has not left it; it is looked
    /// for on the way that jobs take.
    fn leave_unsent(&self, node: NodeId, told: &[JournalEntry]) {
        let told = told.iter().map(|entry| entry.id);
        let mut unsent: Vec<JobId> = told.filter(|id| !self.jobs.contains(*id)).collect();
        let spilled: HashSet<JobId> = self.ledger.spilled().into_iter().collect();
        let ended = self.ledger.ended(node);
        unsent.retain(|id| !spilled.contains(id) && !ended.contains(id));
        self.jobs.remove_from_journal(&unsent);
    }

    /// Adopts nodes whose lease has lapsed, and leaves those alone that are back.
    async fn look_after(&mut self, store: &dyn Membership, lapsed: Vec<NodeId>) -> Result<(), BackendError> {
        let gone: Vec<NodeId> = self.adopted.keys().filter(|node| !lapsed.contains(node)).copied().collect();
        for node in gone {
            self.adopted.remove(&node);
            // Not listed at all: the store has lost its data, and only this node knows of the jobs.
            if store.relist(node).await? {
                self.mend(store, node).await?;
            } else {
                self.to_give_back.extend(self.jobs.ids_of_node(node));
                tracing::info!(adopted = %node, "Adopted Node Is Back");
            }
        }
        let jobs = std::mem::take(&mut self.to_give_back);
        self.to_give_back = self.jobs.give_back(jobs);
        // After a gap, for which the store may be to blame, the others first have time to renew theirs.
        if self.standing_since.is_none_or(|since| since.elapsed() < self.lasts) {
            return Ok(());
        }
        for node in lapsed.into_iter().chain(self.left_alone(store).await?) {
            if node == self.node {
                continue;
            }
            if store.adopt(node, self.node, self.lasts).await? {
                self.to_give_back.retain(|id| id.node() != node);
                self.adopt(store, node).await?;
            } else {
                self.adopted.remove(&node);
            }
        }
        Ok(())
    }

    /// Nodes that this one has still something to end for, whose journal is lost, and that nobody has listed for a whole lease
    /// since: they are gone, and nobody would ever tell their journals again. (Before that they may only not have come to
    /// it. If this node told a journal first, the node itself would find it whole, and tell nothing.)
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
        // Half of the room is for what this node is asked itself.
        let room = self.jobs.room() / 2;
        let jobs = self.restore(&entries, room);
        let sums = self.take_over(node).await?;
        if self.adopted.insert(node, Instant::now()).is_none() {
            tracing::warn!(adopted = %node, jobs, sums, "Node Adopted");
            self.metrics.jobs.adopted_nodes.inc();
        }
        if entries.is_empty() && sums == 0 && store.dismiss(node).await? {
            self.adopted.remove(&node);
            tracing::info!(adopted = %node, "Adopted Node Has Nothing Left");
        }
        Ok(())
    }

    /// Goes on with jobs of a journal, but for those whose rows wait on this node's disk. Gives how many are new.
    fn restore(&self, entries: &[JournalEntry], max: usize) -> usize {
        let spilled: HashSet<JobId> = self.ledger.spilled().into_iter().collect();
        let waiting = entries.iter().filter(|entry| !spilled.contains(&entry.id));
        waiting.filter(|entry| self.jobs.restore(entry)).take(max).count()
    }

    /// Goes on with what a node has left beside its jobs in flight. Gives how many functions have sums to be posted.
    async fn take_over(&self, node: NodeId) -> Result<usize, BackendError> {
        for (id, function) in self.jobs.given_up(node).await? {
            self.jobs.remember(id, function);
        }
        self.ledger.take_over(node).await
    }
}

#[cfg(test)]
mod tests;
