//! Group commit for the queue: jobs that arrive together are sent together.
//!
//! A fixed linger was rejected, because it delays every call on an idle server. Instead a job is sent
//! immediately while few sends are in flight; under load batches fill while sends are in flight. The rules,
//! with their settings in `conf/limits.toml`: below `sends_eager` sends in flight, send immediately; up to
//! `sends_max`, send when a batch is full, or `linger_ms` after its oldest job arrived. Sending the waiting
//! jobs at each completion was rejected too. At 10,000 jobs per second eight sends are in flight, so one
//! completes every millisecond, and batches held only seven jobs.
//!
//! One loop owns the state. The jobs of a batch enter the journal before the batch is sent. A job whose send
//! has definitely failed leaves the journal again. The loop does this and not the caller, because the caller
//! may be gone by then.

mod sender;
mod steps;

pub use sender::SubmitError;

use super::breaker::Breaker;
use super::in_flight::InFlight;
use super::journal::NodeJournal;
use super::shedder::Shedder;
use crate::backend::{BATCH_JOBS_MAX, JobQueue, SendError};
use crate::config::{BatchConf, Live};
use crate::metrics::Metrics;
use crate::model::{FunctionId, Job, UnixMs, now_ms};
use crate::traces::Traces;
use futures_util::stream::{FuturesUnordered, StreamExt};
use sender::{BatchOutcome, BatchSender, PendingSend, RETRIES};
use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

/// How often the breaker and the shedder are checked for expiry, in case no job is sent any more.
const FORGET_EVERY: Duration = Duration::from_secs(1);

/// A batch counts as full at this percentage of the queue's size limit, because the next job would rarely
/// fit.
const FULL_PERCENT: usize = 88;

/// Receives the result of a send.
pub type Sending = oneshot::Receiver<Result<(), SubmitError>>;

/// The handle that passes jobs to the loop.
#[derive(Clone)]
pub struct Batcher {
    sender: mpsc::Sender<PendingSend>,
    conf: Live<BatchConf>,
    /// Jobs that wait to be sent or retried.
    waiting: Arc<AtomicUsize>,
    breaker: Arc<Breaker>,
    traces: Traces,
}

/// A new attempt to send a job, after one with an unknown result.
#[derive(Clone, Copy, Debug)]
pub struct Resend {
    /// When the attempt was claimed, in Unix milliseconds. Its send deadline counts from then.
    pub since: UnixMs,
    /// The journal holds the job.
    pub is_journaled: bool,
    /// The queue may hold the job. True if the journal holds it, or if its former contents are unknown.
    pub maybe_sent: bool,
}

impl Batcher {
    /// Queues a job to be sent. The receiver gets the result. Dropping it does not cancel the send.
    pub fn send(&self, job: Job, resend: Option<Resend>) -> Result<Sending, SubmitError> {
        if !self.breaker.admits() {
            return Err(SubmitError::Unavailable);
        }
        let traced = job.trace.is_some().then(|| job.clone());
        let (done, result) = oneshot::channel();
        let conf = self.conf.get();
        let give_up = Instant::now() + send_time(&job, resend, conf.send_deadline_ms);
        let pending = PendingSend {
            job,
            done,
            give_up,
            attempts: 0,
            journaled: resend.is_some_and(|resend| resend.is_journaled),
            maybe_sent: resend.is_some_and(|resend| resend.maybe_sent),
            is_resend: resend.is_some(),
        };
        // Counted here and not by the channel, because the capacity of a channel cannot change at run time.
        if self.waiting.fetch_add(1, Ordering::Relaxed) >= conf.queue_jobs_max {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            return Err(SubmitError::Overloaded);
        }
        self.sender.try_send(pending).map_err(|e| {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
            match e {
                mpsc::error::TrySendError::Full(_) => SubmitError::Overloaded,
                mpsc::error::TrySendError::Closed(_) => SubmitError::Stopping,
            }
        })?;
        if let Some(job) = traced {
            self.traces.created(&job);
        }
        Ok(result)
    }
}

/// The loop behind [`Batcher`].
pub struct BatchLoop {
    conf: Live<BatchConf>,
    receiver: mpsc::Receiver<PendingSend>,
    sender: Arc<BatchSender>,
    counted: Arc<AtomicUsize>,
    waiting: VecDeque<QueuedSend>,
    delayed: Vec<(Instant, PendingSend)>,
    /// FIFO queues only: functions with a batch in flight, or with a job that waits for a retry.
    busy: HashSet<FunctionId>,
}

struct QueuedSend {
    since: Instant,
    pending: PendingSend,
}

/// Creates a handle and its loop.
pub fn new(
    conf: Live<BatchConf>,
    queue: Arc<dyn JobQueue>,
    journal: Arc<NodeJournal>,
    in_flight: Arc<InFlight>,
    shedder: Arc<Shedder>,
    traces: Traces,
    metrics: Arc<Metrics>,
) -> (Batcher, BatchLoop) {
    let (sender, receiver) = mpsc::channel(BatchConf::QUEUE_JOBS_MAX);
    let counted = Arc::<AtomicUsize>::default();
    let breaker = Arc::new(Breaker::new(Arc::clone(&metrics)));
    let (waiting, before) = (Arc::clone(&counted), Arc::clone(&breaker));
    let of_handle = traces.clone();
    let handle = Batcher { sender, conf: conf.clone(), waiting, breaker: before, traces: of_handle };
    let sender = Arc::new(BatchSender { queue, journal, in_flight, breaker, shedder, traces, metrics });
    let batch_loop = BatchLoop {
        conf,
        receiver,
        sender,
        counted,
        waiting: VecDeque::new(),
        delayed: Vec::new(),
        busy: HashSet::new(),
    };
    (handle, batch_loop)
}

impl BatchLoop {
    /// Runs until `stop` resolves, then until every queued job is sent or has failed.
    pub async fn run(mut self, stop: impl Future<Output = ()>) {
        tokio::pin!(stop);
        let mut stopping = false;
        let mut sends = FuturesUnordered::new();
        let mut arrived = Vec::with_capacity(BATCH_JOBS_MAX);
        let mut open = true;
        while open || !self.waiting.is_empty() || !self.delayed.is_empty() || !sends.is_empty() {
            self.wake_delayed();
            self.give_up_late();
            while let Some(batch) = self.next_batch(sends.len()) {
                sends.push(Arc::clone(&self.sender).send(batch));
            }
            self.publish_gauges(sends.len());
            let timer = self.next_timer(sends.len());
            let is_refusing = self.sender.breaker.is_open() || self.sender.shedder.is_shedding();
            tokio::select! {
                biased;
                Some(tried) = sends.next() => self.after_send(tried),
                n = self.receiver.recv_many(&mut arrived, BATCH_JOBS_MAX), if open => {
                    open = n > 0;
                    let since = Instant::now();
                    self.waiting.extend(arrived.drain(..).map(|pending| QueuedSend { since, pending }));
                }
                () = sleep_until(timer), if timer.is_some() => {}
                () = tokio::time::sleep(FORGET_EVERY), if is_refusing => {
                    self.sender.breaker.expire();
                    self.sender.shedder.forget();
                }
                () = &mut stop, if !stopping => {
                    stopping = true;
                    self.receiver.close();
                }
            }
        }
        self.publish_gauges(0);
    }

    fn publish_gauges(&self, sends: usize) {
        let metrics = &self.sender.metrics;
        metrics.queue_waiting.set((self.waiting.len() + self.delayed.len()) as i64);
        metrics.sends_in_flight.set(sends as i64);
    }

    /// When the loop must act next, even if nothing else happens.
    fn next_timer(&self, sends: usize) -> Option<Instant> {
        let oldest = self
            .waiting
            .front()
            .filter(|_| sends < self.conf.get().sends_max)
            .map(|w| w.since + self.linger());
        // On a FIFO queue the oldest job may be blocked by its function. A timer in the past would spin.
        let oldest = oldest.filter(|at| *at > Instant::now());
        let given_up = self.waiting.front().map(|w| w.pending.give_up);
        self.delayed.iter().map(|(at, _)| *at).chain(oldest).chain(given_up).min()
    }

    fn linger(&self) -> Duration {
        Duration::from_millis(self.conf.get().linger_ms)
    }

    /// Moves jobs whose pause is over to the front, so that retries go first.
    fn wake_delayed(&mut self) {
        let now = Instant::now();
        let due: Vec<_> = self.delayed.extract_if(.., |(at, _)| *at <= now).collect();
        for (_, pending) in due.into_iter().rev() {
            self.busy.remove(&pending.job.function);
            self.waiting.push_front(QueuedSend { since: now, pending });
        }
    }

    /// Fails jobs that have waited past their send deadline, because the queue accepts less than arrives. The
    /// oldest job is in front.
    fn give_up_late(&mut self) {
        let now = Instant::now();
        while let Some(late) = self.waiting.pop_front_if(|waiting| waiting.pending.give_up <= now) {
            self.counted.fetch_sub(1, Ordering::Relaxed);
            self.sender.give_up(late.pending, &SendError::NotSent("the send deadline has passed".into()));
        }
    }

    /// Returns the next batch, if one may be sent now.
    fn next_batch(&mut self, sends: usize) -> Option<Vec<PendingSend>> {
        let oldest = self.waiting.front()?;
        let conf = self.conf.get();
        let lingered = oldest.since.elapsed() >= Duration::from_millis(conf.linger_ms);
        let eager = sends < conf.sends_eager || lingered;
        if sends >= conf.sends_max || !(eager || self.batch_is_full()) {
            return None;
        }
        let batch = self.take_batch();
        self.counted.fetch_sub(batch.len(), Ordering::Relaxed);
        (!batch.is_empty()).then_some(batch)
    }

    fn batch_is_full(&self) -> bool {
        let bytes: usize =
            self.waiting.iter().take(BATCH_JOBS_MAX).map(|w| w.pending.job.message.len()).sum();
        self.waiting.len() >= BATCH_JOBS_MAX || bytes >= self.bytes_max() / 100 * FULL_PERCENT
    }

    fn bytes_max(&self) -> usize {
        self.sender.queue.traits().message_bytes_max
    }

    /// Takes jobs from the front until the call is full. On a FIFO queue, jobs of a busy function stay in
    /// order.
    fn take_batch(&mut self) -> Vec<PendingSend> {
        let fifo = self.sender.queue.traits().fifo;
        let mut batch: Vec<PendingSend> = Vec::with_capacity(BATCH_JOBS_MAX);
        let (mut bytes, mut at) = (0, 0);
        while batch.len() < BATCH_JOBS_MAX && at < self.waiting.len() {
            let job = &self.waiting[at].pending.job;
            if fifo && self.busy.contains(&job.function) {
                at += 1;
                continue;
            }
            bytes += job.message.len();
            if bytes > self.bytes_max() && !batch.is_empty() {
                break;
            }
            batch.extend(self.waiting.remove(at).map(|w| w.pending));
        }
        if fifo {
            self.busy.extend(batch.iter().map(|pending| pending.job.function.clone()));
        }
        batch
    }

    /// Frees the functions of a batch, and schedules its retries.
    fn after_send(&mut self, tried: BatchOutcome) {
        for function in &tried.functions {
            self.busy.remove(function);
        }
        let fifo = self.sender.queue.traits().fifo;
        // One pause for all of them, so that jobs of one function keep their order.
        let attempts = tried.again.iter().map(|pending| pending.attempts).max().unwrap_or_default();
        let at = Instant::now() + RETRIES.pause(attempts);
        self.counted.fetch_add(tried.again.len(), Ordering::Relaxed);
        for pending in tried.again {
            if fifo {
                self.busy.insert(pending.job.function.clone());
            }
            self.delayed.push((at, pending));
        }
    }
}

/// How long attempts to send a job may go on. With an idempotency key this counts from the claim of the
/// attempt: a process that was frozen since then must not send a job that another process has resent.
fn send_time(job: &Job, resend: Option<Resend>, deadline_ms: u64) -> Duration {
    let claimed_at = job.idempotency_key.as_ref().map(|_| resend.map_or(job.id.accepted_at(), |r| r.since));
    let age = claimed_at.map_or(0, |at| now_ms().saturating_sub(at));
    Duration::from_millis(deadline_ms.saturating_sub(age))
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
