//! The queue: at least once, with visibility, dead letters, partial batches and, in some runs, FIFO groups.

use super::faults::Profile;
use super::network::{NoAnswer, call};
use super::truth::number_of;
use super::world::{Service, World, elapsed_us, trace, world};
use crate::ambient::replaced;
use crate::backend::aws::simulation::{Command, Reply};
use crate::backend::{BackendError, DeadLetter, DeadLetters, JobQueue, QueueTraits, SendError};
use crate::model::{FunctionId, Job, JobId, RowKey};
use async_trait::async_trait;
use bytes::Bytes;
use rand::Rng;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// How long a received message is hidden from other workers.
const VISIBILITY_US: u64 = 8_000_000;
/// A message that was received this often goes to the dead-letter queue.
const RECEIVES_MAX: u32 = 4;
/// The retention of the queue. Deadlines of jobs are set lower.
const RETENTION: Duration = Duration::from_secs(24 * 3600);
const MESSAGE_BYTES_MAX: usize = 1 << 18;

pub struct Queue {
    pub is_fifo: bool,
    /// By the order in which they arrived.
    pub messages: BTreeMap<u64, Message>,
    pub dead: BTreeMap<u64, Message>,
    next: u64,
    /// FIFO only: ids of all messages, for deduplication.
    seen: BTreeSet<JobId>,
}

#[derive(Clone)]
pub struct Message {
    pub id: JobId,
    pub function: FunctionId,
    pub body: Bytes,
    /// When it may be received, in microseconds since the run began.
    visible_at: u64,
    received: u32,
}

impl Queue {
    pub fn new(profile: &Profile) -> Self {
        Self {
            is_fifo: profile.is_fifo,
            messages: BTreeMap::new(),
            dead: BTreeMap::new(),
            next: 0,
            seen: BTreeSet::new(),
        }
    }

    fn add(&mut self, job: &Job) {
        if self.is_fifo && !self.seen.insert(job.id) {
            return;
        }
        let message = Message {
            id: job.id,
            function: job.function.clone(),
            body: job.message.clone(),
            visible_at: elapsed_us(),
            received: 0,
        };
        self.messages.insert(self.next, message);
        self.next += 1;
    }

    /// The next message for a worker, with its number.
    pub fn receive(&mut self) -> Option<(u64, Message)> {
        let now = elapsed_us();
        let over: Vec<u64> = self
            .messages
            .iter()
            .filter(|(_, message)| message.received >= RECEIVES_MAX && message.visible_at <= now)
            .map(|(number, _)| *number)
            .collect();
        for number in over {
            self.dead.extend(self.messages.remove(&number).map(|message| (number, message)));
        }
        let mut blocked: BTreeSet<&FunctionId> = BTreeSet::new();
        let mut found = None;
        for (number, message) in &self.messages {
            if message.visible_at <= now && !blocked.contains(&message.function) {
                found = Some(*number);
                break;
            }
            if self.is_fifo {
                blocked.insert(&message.function);
            }
        }
        let number = found?;
        let message = self.messages.get_mut(&number)?;
        message.received += 1;
        message.visible_at = now + VISIBILITY_US;
        Some((number, message.clone()))
    }
}

pub struct SqsStandIn(pub bool);

#[async_trait]
impl JobQueue for SqsStandIn {
    async fn send_batch(&self, jobs: &[Job]) -> Vec<Result<(), SendError>> {
        let batch = jobs.to_vec();
        world(|world| {
            let sender = replaced::current().and_then(|process| world.processes.all[process.0].node);
            let resent = jobs.iter().map(|job| job.id).filter(|id| Some(id.node()) != sender);
            resent.for_each(|id| world.truth.resent_at(id));
            world.truth.attempted.extend(jobs.iter().map(|job| (job.id, number_of(&job.message))));
        });
        // Drawn once for the call: if it is applied twice, the queue accepts the same entries.
        let throttled: Vec<bool> = world(|world| {
            let probability = world.profile.partial_batches;
            jobs.iter().map(|_| world.chance(probability)).collect()
        });
        let sent = call(Service::Queue, "send", move |world| {
            let entries = batch.iter().zip(&throttled);
            entries.map(|(job, is_throttled)| world.enqueue(job, *is_throttled)).collect::<Vec<_>>()
        });
        match sent.await {
            Ok(results) => results,
            Err(NoAnswer::Refused) => vec![Err(SendError::NotSent("simulated".into())); jobs.len()],
            Err(NoAnswer::Lost) => vec![Err(SendError::Unknown("simulated".into())); jobs.len()],
        }
    }

    fn traits(&self) -> QueueTraits {
        QueueTraits { message_bytes_max: MESSAGE_BYTES_MAX, retention: RETENTION, fifo: self.0 }
    }

    async fn depth(&self) -> Result<u64, BackendError> {
        Ok(call(Service::Queue, "depth", |world| world.queue.messages.len() as u64).await?)
    }
}

impl World {
    fn enqueue(&mut self, job: &Job, is_throttled: bool) -> Result<(), SendError> {
        if self.truth.is_refused_by_queue(&job.message) {
            self.bite("message refused by the queue");
            return Err(SendError::Refused("simulated".into()));
        }
        if is_throttled {
            self.bite("entry of a batch not sent");
            return Err(SendError::NotSent("simulated: throttled".into()));
        }
        self.check_journaled(job);
        self.queue.add(job);
        self.truth.enqueued(job);
        self.note(|| format!("queued {}", job.id));
        Ok(())
    }
}

impl World {
    /// A job is on the queue only if the journal of its node has it.
    fn check_journaled(&mut self, job: &Job) {
        let key = RowKey::of(job.id);
        // A call may take so long that its job has ended as LOST.
        let has_row = self.tables.executions.contains_key(&(job.function.clone(), key.as_str().to_owned()));
        if has_row || self.truth.on_queue.contains_key(&job.id) || self.truth.redis_lost_at.is_some() {
            return;
        }
        let key = format!("inflight:{{{}}}", job.id.node());
        let is_held: Command = vec![b"HEXISTS".to_vec(), key.into(), job.id.to_string().into()];
        let now = self.redis_us();
        if self.redis.server.run(now, &is_held) != Reply::Int(1) {
            self.truth.violated(format!("job {} is on the queue and not in the journal", job.id));
        }
    }
}

pub struct DeadLetterQueue;

#[async_trait]
impl DeadLetters for DeadLetterQueue {
    async fn read(&self) -> Result<Vec<DeadLetter>, BackendError> {
        let letters = call(Service::Queue, "read dead letters", |world| {
            let now = elapsed_us();
            let visible =
                world.queue.dead.iter_mut().filter(|(_, message)| message.visible_at <= now).take(10);
            let read = visible.map(|(number, message)| {
                message.visible_at = now + 30_000_000;
                let job = Some((message.id, message.function.clone()));
                DeadLetter { job, receipt: number.to_string() }
            });
            read.collect::<Vec<_>>()
        });
        Ok(letters.await?)
    }

    async fn answer(&self, id: JobId, result: Bytes) -> Result<bool, BackendError> {
        let payload = result.clone();
        let stored = call(Service::Redis, "answer dead letter", move |world| {
            let words = |words: &[&[u8]]| -> Command { words.iter().map(|word| word.to_vec()).collect() };
            let key = format!("job:{id}");
            let set = words(&[b"SET", key.as_bytes(), &payload, b"NX", b"EX", b"3600"]);
            let stored = world.run_on_redis(&[set]) != [Reply::Nil];
            if stored {
                world.truth.produced(id, &payload, true);
            }
            stored
        })
        .await?;
        if stored {
            trace(|| format!("dead letter {id} answered"));
            call(Service::Redis, "publish dead letter", move |world| {
                world.bite("job failed by its dead letter");
                world.publish(&format!("result:{id}"), result.to_vec());
            })
            .await?;
        }
        Ok(stored)
    }

    async fn delete(&self, letters: &[DeadLetter]) -> Result<(), BackendError> {
        let numbers: Vec<u64> = letters.iter().filter_map(|letter| letter.receipt.parse().ok()).collect();
        let deleted = call(Service::Queue, "delete dead letters", move |world| {
            for number in &numbers {
                world.queue.dead.remove(number);
            }
        });
        Ok(deleted.await?)
    }
}

impl World {
    /// Draws how long something takes, in milliseconds.
    pub fn millis(&mut self, range: std::ops::Range<u64>) -> Duration {
        Duration::from_millis(self.rng.random_range(range))
    }
}
