//! Which job starts when.
//!
//! Jobs start in their order of arrival, as far as memory allows (see [`super::admission`]). Jobs of one
//! group start one after the other. The leases of all jobs that this worker has are extended until their runs
//! end.
//!
//! A worker takes only jobs that it can start soon: what it holds, no other worker can run. But while no job
//! waits here and there is a place for a run, it always asks for one, whatever memory is left. It may be the
//! one that the runs in progress wait for.

use super::admission::{AdmissionQueue, MemoryBudget, RUNS_MAX};
use super::inbox::{self, Inbox, ReceivedBatch, WaitingJob};
use super::monitor::RunUsage;
use super::runner::{RunEnded, Runner};
use crate::backend::{Receipt, ReceivedJob};
use crate::metrics::{GiveBackReason, RunStop};
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::{self, JoinSet};
use tokio::time::{Instant, timeout};

/// Most bytes of jobs that wait for their start, and most of these jobs. With leases they are reached only by
/// jobs whose groups run.
const WAITING_BYTES_MAX: usize = 64 << 20;
const WAITING_MAX: usize = 1_024;
/// Most jobs that are received ahead of their start, where the source has no leases and thus no other worker.
const AHEAD_MAX: usize = 32;
/// Most jobs in memory that wait for their last start.
const LAST_CHANCES_MAX: usize = 64;
/// Interval at which a waiting job is looked at again without an event, and at which one more run may start
/// while too many are busy.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Leases are extended this many times while one lasts, so that two calls may fail.
const EXTENSIONS: u32 = 3;
/// Deadline for giving jobs back while the worker stops.
const GIVE_BACK_MAX: Duration = Duration::from_secs(5);

/// How many runs there may be.
#[derive(Clone, Copy, Debug)]
pub(super) struct Capacity {
    /// Memory that all runs together may reserve, in MiB.
    pub(super) memory_mb: u64,
    /// Most concurrent runs.
    pub(super) runs_max: usize,
    /// While this many runs are busy, another one starts only once per [`LOOK_EVERY`].
    pub(super) busy_max: usize,
}

/// The running jobs, and the jobs that wait for their start.
pub(super) struct Scheduler {
    runner: Arc<Runner>,
    capacity: Capacity,
    budget: Arc<MemoryBudget>,
    runs: JoinSet<RunEnded>,
    held: HashMap<task::Id, RunReservation>,
    inbox: Inbox,
    /// Received jobs, in order of arrival.
    waiting: VecDeque<WaitingJob>,
    /// Jobs whose next start is the last one. They run one at a time, so that it is clear which of them kills
    /// the process. Otherwise, jobs that run beside it would fail with it.
    last_chances: VecDeque<WaitingJob>,
    /// Groups with a run in progress.
    groups: HashSet<String>,
    line: AdmissionQueue,
    /// Notified when a run becomes idle.
    idled: Arc<Notify>,
    extended_at: Instant,
    /// Calls to the source.
    calls: JoinSet<SourceCall>,
    is_receiving: bool,
    is_extending: bool,
    /// The worker stops, and takes no more jobs.
    is_draining: bool,
}

/// A call to the source that has ended.
enum SourceCall {
    Received(ReceivedBatch),
    Extended,
    GaveBack,
}

/// The resources of a run in progress.
struct RunReservation {
    job: Arc<ReceivedJob>,
    memory_mb: u64,
    gauge: Arc<RunUsage>,
    since: Instant,
}

impl Scheduler {
    pub(super) fn new(
        runner: Arc<Runner>,
        capacity: Capacity,
        budget: Arc<MemoryBudget>,
        line: AdmissionQueue,
    ) -> Self {
        Self {
            runner,
            capacity,
            budget,
            runs: JoinSet::new(),
            held: HashMap::new(),
            inbox: Inbox::new(),
            waiting: VecDeque::new(),
            last_chances: VecDeque::new(),
            groups: HashSet::new(),
            line,
            idled: Arc::new(Notify::new()),
            extended_at: Instant::now(),
            calls: JoinSet::new(),
            is_receiving: false,
            is_extending: false,
            is_draining: false,
        }
    }

    pub(super) fn set_capacity(&mut self, capacity: Capacity) {
        self.capacity = capacity;
    }

    /// The number of runs in progress.
    pub(super) fn runs(&self) -> usize {
        self.runs.len()
    }

    /// Starts all jobs that may start now, then waits until there may be more to do.
    pub(super) async fn step(&mut self) {
        self.fill();
        self.receive();
        self.extend();
        self.show();
        let pause = self.lease().map_or(LOOK_EVERY, |lease| LOOK_EVERY.min(lease / EXTENSIONS / 2));
        tokio::select! {
            Some(ended) = self.runs.join_next_with_id() => self.ended(ended),
            Some(call) = self.calls.join_next() => self.called(call),
            () = self.idled.notified() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }

    /// Gives the waiting jobs back and waits for the runs, at most for `time`. Then kills the runs that are
    /// left, and gives their jobs back too.
    pub(super) async fn drain(&mut self, time: Duration) {
        self.is_draining = true;
        // An extension that arrives after a job was given back would hide it for a whole lease.
        let extended = async {
            while self.is_extending {
                let Some(call) = self.calls.join_next().await else { return };
                self.called(call);
            }
        };
        let _ = timeout(GIVE_BACK_MAX, extended).await;
        let waiting = self.waiting.drain(..).chain(self.last_chances.drain(..));
        let waiting = waiting.map(|waiting| waiting.job).collect();
        self.give_back(waiting, GiveBackReason::Drain);
        let end = Instant::now() + time;
        while !self.runs.is_empty() && Instant::now() < end {
            let _ = timeout(end - Instant::now(), self.step()).await;
        }
        // Dropping a run kills its processes. Their jobs are not the cause, so these starts do not count.
        self.runs.shutdown().await;
        let held: Vec<_> = self.held.drain().map(|(_, held)| held.job).collect();
        held.iter().for_each(|_| self.runner.metrics.runs.stopped(RunStop::Drain));
        self.give_back(held, GiveBackReason::Drain);
        // What a call for jobs would still bring is delivered again when its lease ends.
        let answers = async {
            while self.is_calling() {
                let Some(call) = self.calls.join_next().await else { return };
                self.called(call);
            }
        };
        if timeout(GIVE_BACK_MAX, answers).await.is_err() {
            tracing::warn!("Jobs not given back: no answer. They run again when their leases end");
        }
        self.show();
    }

    fn lease(&self) -> Option<Duration> {
        self.runner.jobs.traits().lease
    }

    /// Whether a call is in progress, besides the one that waits for jobs.
    fn is_calling(&self) -> bool {
        self.calls.len() > usize::from(self.is_receiving)
    }

    /// Asks for more jobs, if there is room for them.
    fn receive(&mut self) {
        let room = self.room();
        if self.is_receiving || room == 0 {
            return;
        }
        self.is_receiving = true;
        let Runner { jobs, activity, metrics, .. } = &*self.runner;
        let (jobs, activity, metrics) = (Arc::clone(jobs), Arc::clone(activity), Arc::clone(metrics));
        let failures = self.inbox.failures();
        self.calls.spawn(async move {
            SourceCall::Received(inbox::receive(jobs, room, failures, activity, metrics).await)
        });
    }

    /// How many jobs to take now.
    fn room(&self) -> usize {
        if self.is_draining || !self.inbox.takes_jobs() {
            return 0;
        }
        if self.lease().is_none() {
            return AHEAD_MAX.saturating_sub(self.waiting.len());
        }
        // Those that wait for another job of their group do not wait for a place.
        let is_free = |waiting: &&WaitingJob| {
            waiting.job.group.as_ref().is_none_or(|group| !self.groups.contains(group))
        };
        let ahead = self.waiting.iter().filter(is_free).count();
        let are_short = self.inbox.are_runs_short();
        let ahead_max = if are_short { self.runner.jobs.traits().receive_max } else { 1 };
        let bytes: usize = self.waiting.iter().map(|waiting| waiting.job.message.len()).sum();
        if ahead >= ahead_max || self.waiting.len() >= WAITING_MAX || bytes >= WAITING_BYTES_MAX {
            return 0;
        }
        let left_mb = self.capacity.memory_mb.saturating_sub(self.promised_mb());
        let by_memory = usize::try_from(left_mb / self.inbox.typical_mb()).unwrap_or(usize::MAX);
        let by_number = self.runs_max().saturating_sub(self.runs.len());
        if by_number == 0 {
            // Unlike memory, a place does not become free by waiting for what the runs wait for.
            return 0;
        }
        let by_cpu = if are_short { usize::MAX } else { self.capacity.busy_max.saturating_sub(self.busy()) };
        by_memory.min(by_number).min(by_cpu).saturating_sub(ahead).max(1)
    }

    /// The same job, if this worker has it already.
    fn known(&self, job: &ReceivedJob) -> Option<&ReceivedJob> {
        let waiting = self.waiting.iter().chain(&self.last_chances).map(|waiting| &*waiting.job);
        let mut all = waiting.chain(self.held.values().map(|held| &*held.job));
        all.find(|known| known.request_id == job.request_id)
    }

    fn called(&mut self, call: Result<SourceCall, task::JoinError>) {
        match call {
            Ok(SourceCall::Received(received)) => {
                self.is_receiving = false;
                let arrived = self.inbox.arrived(received);
                if self.is_draining {
                    let jobs = arrived.into_iter().map(|waiting| waiting.job).collect();
                    self.give_back(jobs, GiveBackReason::Drain);
                    return;
                }
                for waiting in arrived {
                    match self.known(&waiting.job) {
                        // Its lease had ended: the queue did not answer, or does not let this worker extend.
                        Some(known) => known.receipt.renew(&waiting.job.receipt),
                        None => self.waiting.push_back(waiting),
                    }
                }
            }
            Ok(SourceCall::Extended) => self.is_extending = false,
            Ok(SourceCall::GaveBack) => {}
            Err(e) => {
                tracing::error!(error = %e, "Call to the queue failed: a task panicked");
                // It is not known which one.
                (self.is_receiving, self.is_extending) = (false, false);
            }
        }
    }

    /// Starts all jobs that may start now.
    fn fill(&mut self) {
        let last_chance = self.start_last_chance();
        let first = self.start_waiting(last_chance);
        self.line.set_first(first);
        if let Some(number) = self.line.stalled() {
            self.start_beyond(number);
        }
    }

    /// Whether the next start of a job is its last one.
    fn is_last_chance(&self, job: &ReceivedJob) -> bool {
        self.runner.jobs.traits().starts_max.is_some_and(|starts_max| job.starts + 1 == starts_max)
    }

    /// Starts a job for the last time, unless another last start is running. Returns the number of a job that
    /// waits for memory.
    fn start_last_chance(&mut self) -> Option<u64> {
        let waiting = self.last_chances.front()?;
        if self.held.values().any(|held| self.is_last_chance(&held.job)) {
            return None;
        }
        if !self.has_memory(waiting.memory_mb) {
            return Some(waiting.number);
        }
        if self.has_slot()
            && let Some(waiting) = self.last_chances.pop_front()
        {
            self.start(waiting);
        }
        None
    }

    /// Starts the jobs that fit, in order of arrival. Returns the number of the first job that waits for
    /// memory. `first`: the number of a job that waits for memory before its last start.
    fn start_waiting(&mut self, mut first: Option<u64>) -> Option<u64> {
        let mut at = 0;
        // Groups with a job that waits.
        let mut held_up = HashSet::new();
        while let Some(WaitingJob { number, job, memory_mb }) = self.waiting.get(at) {
            let (number, memory_mb, job) = (*number, *memory_mb, Arc::clone(job));
            if let Some(group) = &job.group
                && (self.groups.contains(group) || held_up.contains(group))
            {
                at += 1;
                continue;
            }
            let is_last_chance = self.is_last_chance(&job);
            if is_last_chance && self.last_chances.len() == LAST_CHANCES_MAX {
                return first;
            }
            if !is_last_chance && !self.has_memory(memory_mb) {
                first = first.into_iter().chain([number]).min();
                // Set it now, because the next jobs of this loop may pass it.
                self.line.set_first(first);
                held_up.extend(job.group.clone());
                at += 1;
                continue;
            }
            let may_pass = first.is_none_or(|first| self.line.may_pass(first));
            let may_leave = is_last_chance || may_pass && self.has_slot();
            if !may_leave {
                return first;
            }
            let Some(waiting) = self.waiting.remove(at) else { return first };
            if is_last_chance {
                self.last_chances.push_back(waiting);
                self.start_last_chance();
            } else {
                self.start(waiting);
            }
        }
        first
    }

    /// Starts the stalled job with this number, if the memory in use leaves room. Otherwise it waits until a
    /// run ends, which happens at its time limit at the latest.
    fn start_beyond(&mut self, number: u64) {
        let used_mb = self.used_mb();
        if used_mb >= self.capacity.memory_mb || !self.has_slot() {
            return;
        }
        let waiting = match self.waiting.iter().position(|waiting| waiting.number == number) {
            Some(at) => self.waiting.remove(at),
            None => self.last_chances.pop_front_if(|waiting| waiting.number == number),
        };
        if let Some(waiting) = waiting {
            let (promised_mb, job) = (self.promised_mb(), &waiting.job);
            tracing::info!(
                job = job.request_id,
                function = job.function,
                promised_mb,
                used_mb,
                "Job started beyond the reserved memory, because the memory in use leaves room"
            );
            self.start(waiting);
        }
    }

    /// Whether the memory can be reserved. A single run may always start, however much its function has.
    fn has_memory(&self, memory_mb: u64) -> bool {
        let promised = self.promised_mb();
        promised == 0 || promised.saturating_add(memory_mb) <= self.capacity.memory_mb
    }

    /// Whether one more run may start, and not too many runs are busy. If too many are busy, one still starts
    /// once per [`LOOK_EVERY`], because the busy runs may poll for its result.
    fn has_slot(&self) -> bool {
        self.runs.len() < self.runs_max()
            && (self.busy() < self.capacity.busy_max || self.line.is_quiet_for(LOOK_EVERY))
    }

    fn runs_max(&self) -> usize {
        self.capacity.runs_max.min(RUNS_MAX)
    }

    fn busy(&self) -> usize {
        self.held.values().filter(|held| held.gauge.is_busy()).count()
    }

    fn promised_mb(&self) -> u64 {
        self.held.values().fold(0, |sum, held| sum.saturating_add(held.memory_mb))
    }

    /// Memory in use by all runs, in MiB. A run that was not measured yet counts with all its reserved
    /// memory.
    fn used_mb(&self) -> u64 {
        let used =
            |held: &RunReservation| held.gauge.memory_bytes().map_or(held.memory_mb, |bytes| bytes >> 20);
        self.held.values().fold(0, |sum, held| sum.saturating_add(used(held)))
    }

    fn start(&mut self, WaitingJob { job, memory_mb, .. }: WaitingJob) {
        self.line.started();
        self.groups.extend(job.group.clone());
        let gauge = Arc::new(RunUsage::new(Arc::clone(&self.idled)));
        // Before the run looks for a process that waits.
        self.budget.set(self.capacity.memory_mb, self.promised_mb().saturating_add(memory_mb));
        let run = self.runs.spawn(Arc::clone(&self.runner).settle(Arc::clone(&job), Arc::clone(&gauge)));
        self.held.insert(run.id(), RunReservation { job, memory_mb, gauge, since: Instant::now() });
    }

    fn ended(&mut self, ended: Result<(task::Id, RunEnded), task::JoinError>) {
        let (id, ended) = match ended {
            Ok(ended) => ended,
            Err(e) => {
                tracing::error!(error = %e, "Run panicked; its job runs again");
                (e.id(), RunEnded::Unfinished)
            }
        };
        let Some(held) = self.held.remove(&id) else { return };
        self.inbox.ended(ended, held.since.elapsed());
        if ended == RunEnded::Unfinished {
            self.runner.metrics.jobs.gave_back(1, GiveBackReason::Code);
        }
        let Some(group) = &held.job.group else { return };
        self.groups.remove(group);
        if ended == RunEnded::Unfinished {
            // The job is delivered again. Jobs behind it must not pass it.
            let is_behind = |waiting: &WaitingJob| waiting.job.group == held.job.group;
            let (behind, others): (Vec<_>, _) = self.waiting.drain(..).partition(is_behind);
            self.waiting = others.into();
            self.give_back(behind.into_iter().map(|waiting| waiting.job).collect(), GiveBackReason::Group);
        }
    }

    /// Extends the leases of all jobs, if that is due and the last call has ended.
    fn extend(&mut self) {
        let Some(lease) = self.lease() else { return };
        if self.extended_at.elapsed() < lease / EXTENSIONS || self.is_extending {
            return;
        }
        self.extended_at = Instant::now();
        let waiting = self.waiting.iter().chain(&self.last_chances).map(|waiting| &waiting.job);
        let held = self.held.values().map(|held| &held.job);
        let receipts: Vec<Receipt> = waiting.chain(held).map(|job| job.receipt.clone()).collect();
        if receipts.is_empty() {
            return;
        }
        self.is_extending = true;
        let runner = Arc::clone(&self.runner);
        self.calls.spawn(async move {
            let metrics = &runner.metrics.jobs;
            match runner.jobs.extend(&receipts).await {
                Ok(()) => metrics.leases_extended.inc_by(receipts.len() as u64),
                Err(e) => {
                    metrics.lease_failures.inc();
                    tracing::warn!(jobs = receipts.len(), error = %e, "Leases not extended; retrying");
                }
            }
            SourceCall::Extended
        });
    }

    fn give_back(&mut self, jobs: Vec<Arc<ReceivedJob>>, reason: GiveBackReason) {
        if jobs.is_empty() {
            return;
        }
        let jobs: Vec<ReceivedJob> = jobs.iter().map(|job| ReceivedJob::clone(job)).collect();
        let runner = Arc::clone(&self.runner);
        self.calls.spawn(async move {
            match runner.jobs.give_back(&jobs).await {
                Ok(()) => runner.metrics.jobs.gave_back(jobs.len(), reason),
                Err(e) => {
                    tracing::warn!(jobs = jobs.len(), error = %e, "Jobs not given back; they run later");
                }
            }
            SourceCall::GaveBack
        });
    }

    fn show(&self) {
        let promised_mb = self.promised_mb();
        self.budget.set(self.capacity.memory_mb, promised_mb);
        let bytes = |mb: u64| i64::try_from(mb.saturating_mul(1 << 20)).unwrap_or(i64::MAX);
        let held = self.held.len() + self.waiting.len() + self.last_chances.len();
        let metrics = &self.runner.metrics;
        metrics.jobs.held.set(held as i64);
        metrics.runs.in_progress.set(self.runs.len() as i64);
        metrics.runs.memory_reserved.set(bytes(promised_mb));
        metrics.runs.memory_limit.set(bytes(self.capacity.memory_mb));
    }
}
