//! The task queue as a worker sees it: jobs come from SQS, and their results go to Redis.
//!
//! A job leaves in a fixed order: its result is published and stored (see [`ResultPublisher`]), and then its
//! message is deleted. If the worker dies in between, the message is delivered again when its lease ends, and
//! the job runs again. The other order could lose the result.
//!
//! A message that is not a job is left alone: SQS moves it to the dead-letter queue after `maxReceiveCount`
//! deliveries.

use super::queue::{Attributes, is_fifo, number, read_attributes};
use crate::backend::aws::client::{RETRIES, long_poll_timeouts};
use crate::backend::aws::coalescer::{BatchBounds, Coalescer, ItemOutcome};
use crate::backend::aws::error::{class, is_throttle};
use crate::backend::aws::json_call::RouteRecorder;
use crate::backend::aws::redis::publisher::ResultPublisher;
use crate::backend::{BackendError, JobSource, JobSourceTraits, Receipt, ReceivedJob, is_request_id};
use crate::model::{FunctionId, ProcessToken, UnixMs, parse_rfc3339_ms};
use async_trait::async_trait;
use aws_sdk_sqs::Client;
use aws_sdk_sqs::config::Config;
use aws_sdk_sqs::types::{
    BatchResultErrorEntry, ChangeMessageVisibilityBatchRequestEntry, DeleteMessageBatchRequestEntry, Message,
    MessageSystemAttributeName, QueueAttributeName,
};
use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use parking_lot::Mutex;
use serde::Deserialize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// Maximum number of entries per call; the limit of SQS.
const ENTRIES_MAX: usize = 10;
/// How long SQS waits for a job before it answers that there is none; the limit of SQS.
const WAIT: Duration = Duration::from_secs(20);
/// Lease of a queue that does not report a VisibilityTimeout; the default of SQS.
const LEASE_DEFAULT: Duration = Duration::from_secs(30);
/// Shortest lease. With a shorter one, a late extension would already let a job run twice.
const LEASE_MIN: Duration = Duration::from_secs(30);
/// Longest lease; the limit of SQS.
const LEASE_MAX: Duration = Duration::from_secs(12 * 3600);
/// Calls that change visibility timeouts at the same time.
const CHANGES_AT_ONCE: usize = 8;
/// Deletes of jobs that end together share calls.
const DELETES: BatchBounds = BatchBounds { calls_max: 4, items_max: ENTRIES_MAX, bytes_max: usize::MAX };
/// Attempts to delete a message before the caller gets the error. Each call is also retried by the SDK.
const DELETE_ATTEMPTS_MAX: u32 = 3;
/// Shortest time between two log lines about the same.
const LOG_EVERY: Duration = Duration::from_secs(60);

/// What the attributes of the queue report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobQueueAttributes {
    /// How long a received message is hidden from other workers.
    pub lease: Duration,
    pub is_fifo: bool,
    pub has_dead_letter_queue: bool,
}

impl JobQueueAttributes {
    /// Reads the attributes, which shows that the queue exists.
    pub async fn read(client: &Client, url: &str) -> Result<Self, BackendError> {
        let names = [
            QueueAttributeName::VisibilityTimeout,
            QueueAttributeName::FifoQueue,
            QueueAttributeName::RedrivePolicy,
        ];
        let attributes = read_attributes(client, url, &names, &RouteRecorder::default()).await?;
        Ok(Self::of(&attributes, url))
    }

    fn of(attributes: &Attributes, url: &str) -> Self {
        let lease = number(attributes, &QueueAttributeName::VisibilityTimeout);
        Self {
            lease: lease.map_or(LEASE_DEFAULT, Duration::from_secs).clamp(LEASE_MIN, LEASE_MAX),
            is_fifo: is_fifo(attributes, url),
            has_dead_letter_queue: attributes.contains_key(&QueueAttributeName::RedrivePolicy),
        }
    }
}

/// The jobs of an SQS queue.
pub struct SqsJobs {
    client: Client,
    url: String,
    attributes: JobQueueAttributes,
    publisher: ResultPublisher,
    deletes: Coalescer<Receipt>,
    process: ProcessToken,
    /// Number of receptions so far.
    receptions: AtomicU64,
    unreadable: LogInterval,
    late: LogInterval,
}

impl SqsJobs {
    pub fn new(
        client: Client,
        url: &str,
        attributes: JobQueueAttributes,
        publisher: ResultPublisher,
        process: ProcessToken,
    ) -> Self {
        Self {
            client,
            url: url.to_owned(),
            attributes,
            publisher,
            deletes: Coalescer::new(DELETES),
            process,
            receptions: AtomicU64::new(0),
            unreadable: LogInterval::default(),
            late: LogInterval::default(),
        }
    }

    fn lease_s(&self) -> i32 {
        i32::try_from(self.attributes.lease.as_secs()).unwrap_or(i32::MAX)
    }

    /// Logs only the id of SQS: the rest of such a message may be anything.
    fn job_or_warning(&self, message: Message) -> Option<ReceivedJob> {
        let id = message.message_id.clone().unwrap_or_default();
        let job = job(message, self.attributes.is_fifo);
        if job.is_none()
            && let Some(unlogged) = self.unreadable.pass()
        {
            tracing::warn!(
                sqs_message = id,
                unlogged,
                "Message of the task queue is not a job; SQS moves it to the dead-letter queue"
            );
        }
        job
    }

    /// Sets the visibility timeout of messages, in seconds from now. Messages that have left the queue, or
    /// were received again since, are ignored.
    async fn set_visibility(&self, receipts: &[&Receipt], seconds: i32) -> Result<(), BackendError> {
        let mut calls = Vec::with_capacity(receipts.len().div_ceil(ENTRIES_MAX));
        for batch in receipts.chunks(ENTRIES_MAX) {
            calls.push(self.set_visibility_of_batch(batch, seconds));
        }
        let mut changes = stream::iter(calls).buffer_unordered(CHANGES_AT_ONCE);
        let mut outcome = Ok(());
        // All are tried, because each call is for other jobs.
        while let Some(changed) = changes.next().await {
            outcome = outcome.and(changed);
        }
        outcome
    }

    async fn set_visibility_of_batch(&self, batch: &[&Receipt], seconds: i32) -> Result<(), BackendError> {
        let mut entries = Vec::with_capacity(batch.len());
        for (n, receipt) in batch.iter().enumerate() {
            let entry = ChangeMessageVisibilityBatchRequestEntry::builder();
            let entry = entry.id(n.to_string()).receipt_handle(&*receipt.text()).visibility_timeout(seconds);
            entries.push(entry.build().map_err(|e| BackendError::Invalid(e.to_string()))?);
        }
        let call = self.client.change_message_visibility_batch().queue_url(&self.url);
        let answer = call.set_entries(Some(entries)).send().await.map_err(|e| class(&e))?;
        let failed = answer.failed.iter().find(|entry| !is_gone(entry));
        match failed {
            None => Ok(()),
            Some(entry) => {
                let text = format!("the visibility timeout of a message was not changed: {}", entry.code);
                Err(BackendError::Unavailable(text))
            }
        }
    }

    /// Deletes a message, together with others that are deleted at the same time. Repeats a call that fails
    /// a few times.
    async fn delete(&self, receipt: &Receipt) -> Result<(), BackendError> {
        let mut attempt = 0;
        loop {
            attempt += 1;
            let deleted = self.deletes.call(receipt.clone(), 0, |batch| self.delete_batch(batch)).await;
            match deleted {
                Err(error) if error.is_transient() && attempt < DELETE_ATTEMPTS_MAX => {
                    RETRIES.sleep(attempt).await;
                }
                done => return done,
            }
        }
    }

    async fn delete_batch(&self, receipts: Vec<Receipt>) -> Vec<ItemOutcome> {
        let silent = || Err(BackendError::Unavailable("the answer does not mention the message".into()));
        match self.try_delete_batch(&receipts).await {
            Ok((deleted, failed)) => {
                let mut outcomes: Vec<ItemOutcome> = receipts.iter().map(|_| silent()).collect();
                let mut set = |id: &str, outcome| {
                    if let Some(slot) = id.parse::<usize>().ok().and_then(|n| outcomes.get_mut(n)) {
                        *slot = outcome;
                    }
                };
                deleted.iter().for_each(|id| set(id, Ok(())));
                failed.iter().for_each(|entry| set(&entry.id, self.outcome_of(entry)));
                outcomes
            }
            Err(error) => vec![Err(error); receipts.len()],
        }
    }

    /// Returns the ids of the entries that were deleted, and the failures of the others.
    async fn try_delete_batch(
        &self,
        receipts: &[Receipt],
    ) -> Result<(Vec<String>, Vec<BatchResultErrorEntry>), BackendError> {
        let mut entries = Vec::with_capacity(receipts.len());
        for (n, receipt) in receipts.iter().enumerate() {
            let entry = DeleteMessageBatchRequestEntry::builder();
            let entry = entry.id(n.to_string()).receipt_handle(&*receipt.text()).build();
            entries.push(entry.map_err(|e| BackendError::Invalid(e.to_string()))?);
        }
        let call = self.client.delete_message_batch().queue_url(&self.url).set_entries(Some(entries));
        let answer = call.send().await.map_err(|e| class(&e))?;
        Ok((answer.successful.into_iter().map(|entry| entry.id).collect(), answer.failed))
    }

    fn outcome_of(&self, entry: &BatchResultErrorEntry) -> ItemOutcome {
        if !is_gone(entry) {
            return Err(BackendError::Unavailable(format!("a message was not deleted: {}", entry.code)));
        }
        // Another attempt would fail in the same way, and the result is stored.
        if let Some(unlogged) = self.late.pass() {
            tracing::warn!(
                code = entry.code,
                unlogged,
                "A job ended after its lease, so its message could not be deleted, and it may run again"
            );
        }
        Ok(())
    }
}

/// Whether an entry failed because its message has left the queue, or was received again since.
fn is_gone(entry: &BatchResultErrorEntry) -> bool {
    // SQS reports such a receipt as ReceiptHandleIsInvalid, InvalidParameterValue or MessageNotInflight.
    entry.sender_fault && !is_throttle(&entry.code)
}

/// The members of a job message that its handling needs.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct JobEnvelope {
    request_id: String,
    function_id: String,
    deadline: Option<String>,
}

/// Parses a message. `None`: it is not a job.
fn job(message: Message, is_fifo: bool) -> Option<ReceivedJob> {
    let Message { body, receipt_handle, attributes, .. } = message;
    let (body, attributes) = (body?, attributes.unwrap_or_default());
    let JobEnvelope { request_id, function_id, deadline } = serde_json::from_str(&body).ok()?;
    let function = FunctionId::parse(&function_id)?.to_string();
    let deadline = match deadline {
        Some(text) => parse_rfc3339_ms(&text)?,
        None => UnixMs::MAX,
    };
    let received = attributes.get(&MessageSystemAttributeName::ApproximateReceiveCount);
    let received: u32 = received.and_then(|count| count.parse().ok()).unwrap_or(1);
    // On a standard queue the group only shares the queue fairly, and orders nothing.
    let group = is_fifo.then(|| {
        let group = attributes.get(&MessageSystemAttributeName::MessageGroupId);
        group.unwrap_or(&function).clone()
    });
    is_request_id(&request_id).then_some(ReceivedJob {
        receipt: Receipt::new(receipt_handle?),
        request_id,
        function,
        deadline,
        starts: received.saturating_sub(1),
        group,
        message: Bytes::from(body),
    })
}

#[async_trait]
impl JobSource for SqsJobs {
    fn traits(&self) -> JobSourceTraits {
        // The queue itself gives jobs up, after the `maxReceiveCount` of its RedrivePolicy.
        JobSourceTraits { lease: Some(self.attributes.lease), starts_max: None, receive_max: ENTRIES_MAX }
    }

    async fn receive(&self, max: usize) -> Result<Vec<ReceivedJob>, BackendError> {
        let most = i32::try_from(max.clamp(1, ENTRIES_MAX)).unwrap_or(1);
        let mut call = self
            .client
            .receive_message()
            .queue_url(&self.url)
            .max_number_of_messages(most)
            .wait_time_seconds(i32::try_from(WAIT.as_secs()).unwrap_or(0))
            .visibility_timeout(self.lease_s())
            .message_system_attribute_names(MessageSystemAttributeName::ApproximateReceiveCount);
        if self.attributes.is_fifo {
            // If an answer is lost, the retry of the SDK gets the same messages. Otherwise their groups would
            // wait until the leases end.
            let number = self.receptions.fetch_add(1, Ordering::Relaxed);
            call = call
                .message_system_attribute_names(MessageSystemAttributeName::MessageGroupId)
                .receive_request_attempt_id(format!("{}-{number}", self.process));
        }
        let call = call.customize();
        let call = call.config_override(Config::builder().timeout_config(long_poll_timeouts(WAIT)));
        let messages = call.send().await.map_err(|e| class(&e))?.messages.unwrap_or_default();
        Ok(messages.into_iter().filter_map(|message| self.job_or_warning(message)).collect())
    }

    /// SQS counts deliveries, so there is nothing to record.
    async fn start(&self, _job: &ReceivedJob) -> Result<(), BackendError> {
        Ok(())
    }

    async fn extend(&self, receipts: &[Receipt]) -> Result<(), BackendError> {
        let receipts: Vec<&Receipt> = receipts.iter().collect();
        self.set_visibility(&receipts, self.lease_s()).await
    }

    /// The delivery still counts towards `maxReceiveCount`, though the job did not run: SQS cannot take it
    /// back.
    async fn give_back(&self, jobs: &[ReceivedJob]) -> Result<(), BackendError> {
        let receipts: Vec<&Receipt> = jobs.iter().map(|job| &job.receipt).collect();
        self.set_visibility(&receipts, 0).await
    }

    /// A delete that fails is repeated here, and then by the caller, who publishes the result again. If no
    /// delete succeeds before the lease ends, the message is delivered again and the job runs again. The
    /// gateway keeps the first result.
    async fn finish(&self, job: &ReceivedJob, result: Bytes) -> Result<(), BackendError> {
        self.publisher.publish(&job.request_id, result).await?;
        self.delete(&job.receipt).await
    }

    async fn discard(&self, job: &ReceivedJob) -> Result<(), BackendError> {
        self.delete(&job.receipt).await
    }
}

/// Lets one log line pass per [`LOG_EVERY`], and counts the others.
#[derive(Default)]
struct LogInterval(Mutex<(Option<Instant>, u64)>);

impl LogInterval {
    /// Returns the number of lines that did not pass since the last one that did. `None`: this one does not.
    fn pass(&self) -> Option<u64> {
        let now = Instant::now();
        let mut state = self.0.lock();
        let (last, unlogged) = &mut *state;
        if last.is_some_and(|last| now < last + LOG_EVERY) {
            *unlogged += 1;
            return None;
        }
        *last = Some(now);
        Some(std::mem::take(unlogged))
    }
}

#[cfg(test)]
mod tests;
