//! The task queue on SQS.
//!
//! The SDK does not retry here (see `client`): one call is one attempt, so each outcome says what is known of
//! the jobs.

use super::error::{class, took_no_effect};
use crate::backend::{BATCH_JOBS_MAX, BackendError, JobQueue, QueueTraits, SendError};
use crate::model::Job;
use async_trait::async_trait;
use aws_sdk_sqs::Client;
use aws_sdk_sqs::error::ProvideErrorMetadata;
use aws_sdk_sqs::operation::send_message_batch::SendMessageBatchOutput;
use aws_sdk_sqs::types::{QueueAttributeName, SendMessageBatchRequestEntry};
use std::collections::HashMap;
use std::time::Duration;

/// Largest message SQS takes at all, in bytes.
const MESSAGE_BYTES_MAX: usize = 1 << 20;
/// What a queue takes that does not say, in bytes: the limit before 2025.
const MESSAGE_BYTES_DEFAULT: usize = 256 << 10;
/// How long a queue keeps a message that does not say: 4 days, the default of SQS.
const RETENTION_DEFAULT: Duration = Duration::from_secs(4 * 24 * 3600);

/// Refusals of a whole batch that one of its jobs has brought about. All others are the queue's state or ours.
const JOB_AT_FAULT: &[&str] = &[
    "AWS.SimpleQueueService.BatchRequestTooLong",
    "BatchRequestTooLong",
    "InvalidMessageContents",
    "InvalidParameterValue",
    "MissingParameter",
];

pub(super) struct SqsQueue {
    client: Client,
    url: String,
    traits: QueueTraits,
}

impl SqsQueue {
    /// Reads what the queue is like, and so finds out that it exists.
    pub(super) async fn open(client: Client, url: &str) -> Result<Self, BackendError> {
        let attributes = attributes(
            &client,
            url,
            &[
                QueueAttributeName::MaximumMessageSize,
                QueueAttributeName::MessageRetentionPeriod,
                QueueAttributeName::FifoQueue,
            ],
        );
        // A standard queue may answer InvalidAttributeName to FifoQueue; All is always fine.
        let attributes = match attributes.await {
            Err(BackendError::Invalid(_)) => {
                self::attributes(&client, url, &[QueueAttributeName::All]).await?
            }
            other => other?,
        };
        Ok(Self { client, url: url.to_owned(), traits: traits(&attributes, url) })
    }

    fn entry(&self, index: usize, job: &Job) -> Result<SendMessageBatchRequestEntry, SendError> {
        let body = std::str::from_utf8(&job.message)
            .map_err(|_| SendError::Refused("the message is not UTF-8".into()))?;
        SendMessageBatchRequestEntry::builder()
            .id(index.to_string())
            .message_body(body)
            // On standard queues too: there it shares the queue fairly among functions.
            .message_group_id(job.function.as_str())
            .set_message_deduplication_id(self.traits.fifo.then(|| job.id.to_string()))
            .build()
            .map_err(|_| SendError::Refused("the entry could not be built".into()))
    }

    /// One call: what became of each job, or why none of them is known to be on the queue.
    async fn send(&self, jobs: &[Job]) -> Result<Vec<Result<(), SendError>>, SendError> {
        let entries = jobs.iter().enumerate().map(|(i, job)| self.entry(i, job)).collect::<Result<_, _>>()?;
        let call = self.client.send_message_batch().queue_url(&self.url).set_entries(Some(entries));
        match call.send().await {
            Ok(output) => Ok(per_job(&output, jobs.len())),
            Err(error) => {
                let text = class(&error).to_string();
                Err(match error.code() {
                    Some(code) if JOB_AT_FAULT.contains(&code) => SendError::Refused(text),
                    _ if took_no_effect(&error) => SendError::NotSent(text),
                    _ => SendError::Unknown(text),
                })
            }
        }
    }
}

#[async_trait]
impl JobQueue for SqsQueue {
    async fn send_batch(&self, jobs: &[Job]) -> Vec<Result<(), SendError>> {
        assert!(jobs.len() <= BATCH_JOBS_MAX, "a batch of {} jobs", jobs.len());
        if jobs.is_empty() {
            return Vec::new();
        }
        match self.send(jobs).await {
            Ok(results) => results,
            // One bad job has the whole batch refused. Alone each gets its own answer; in turn, for the order.
            Err(SendError::Refused(_)) if jobs.len() > 1 => {
                let mut results = Vec::with_capacity(jobs.len());
                for job in jobs {
                    let alone = self.send(std::slice::from_ref(job)).await;
                    results.extend(alone.unwrap_or_else(|error| vec![Err(error)]));
                }
                results
            }
            Err(error) => vec![Err(error); jobs.len()],
        }
    }

    fn traits(&self) -> QueueTraits {
        self.traits
    }

    async fn depth(&self) -> Result<u64, BackendError> {
        let name = QueueAttributeName::ApproximateNumberOfMessages;
        let attributes = attributes(&self.client, &self.url, std::slice::from_ref(&name)).await?;
        Ok(number(&attributes, &name).unwrap_or(0))
    }
}

type Attributes = HashMap<QueueAttributeName, String>;

async fn attributes(
    client: &Client,
    url: &str,
    names: &[QueueAttributeName],
) -> Result<Attributes, BackendError> {
    let call = client.get_queue_attributes().queue_url(url).set_attribute_names(Some(names.to_vec()));
    let output = call.send().await.map_err(|e| class(&e))?;
    Ok(output.attributes.unwrap_or_default())
}

fn number(attributes: &Attributes, name: &QueueAttributeName) -> Option<u64> {
    attributes.get(name)?.parse().ok()
}

fn traits(attributes: &Attributes, url: &str) -> QueueTraits {
    let bytes = number(attributes, &QueueAttributeName::MaximumMessageSize)
        .and_then(|bytes| usize::try_from(bytes).ok())
        .unwrap_or(MESSAGE_BYTES_DEFAULT);
    let retention = number(attributes, &QueueAttributeName::MessageRetentionPeriod);
    let says_fifo = attributes.get(&QueueAttributeName::FifoQueue).is_some_and(|fifo| fifo == "true");
    QueueTraits {
        message_bytes_max: bytes.min(MESSAGE_BYTES_MAX),
        retention: retention.map_or(RETENTION_DEFAULT, Duration::from_secs),
        fifo: says_fifo || url.ends_with(".fifo"),
    }
}

/// The answer's word on each of `count` jobs; an Id in neither list is in doubt.
fn per_job(output: &SendMessageBatchOutput, count: usize) -> Vec<Result<(), SendError>> {
    let silent = || Err(SendError::Unknown("the answer does not name the job".into()));
    let mut results: Vec<_> = (0..count).map(|_| silent()).collect();
    let mut set = |id: &str, result| {
        if let Some(slot) = id.parse::<usize>().ok().and_then(|i| results.get_mut(i)) {
            *slot = result;
        }
    };
    for sent in output.successful() {
        set(sent.id(), Ok(()));
    }
    for failed in output.failed() {
        let code = failed.code().to_owned();
        let error = if failed.sender_fault() { SendError::Refused(code) } else { SendError::NotSent(code) };
        set(failed.id(), Err(error));
    }
    results
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_sdk_sqs::types::{BatchResultErrorEntry, SendMessageBatchResultEntry};

    #[test]
    fn queues_say_what_they_are_like() {
        let said = |pairs: &[(QueueAttributeName, &str)], url: &str| {
            let attributes = pairs.iter().map(|(name, value)| (name.clone(), (*value).to_owned())).collect();
            let traits = traits(&attributes, url);
            (traits.message_bytes_max, traits.retention.as_secs(), traits.fifo)
        };
        use QueueAttributeName::*;
        assert_eq!(said(&[], "q"), (262_144, 345_600, false));
        let all = [(MaximumMessageSize, "9999999"), (MessageRetentionPeriod, "60"), (FifoQueue, "true")];
        assert_eq!(said(&all, "q"), (1_048_576, 60, true));
        assert_eq!(
            said(&[(MaximumMessageSize, "1024"), (FifoQueue, "false")], "q.fifo"),
            (1024, 345_600, true)
        );
    }

    #[test]
    fn each_job_has_its_own_result() {
        let failed = |id: &str, sender_fault| {
            let entry = BatchResultErrorEntry::builder().id(id).code("Code").sender_fault(sender_fault);
            entry.build().unwrap()
        };
        let sent = |id: &str| {
            let entry = SendMessageBatchResultEntry::builder().id(id).message_id("m").md5_of_message_body("");
            entry.build().unwrap()
        };
        let output = SendMessageBatchOutput::builder()
            .successful(sent("3"))
            .successful(sent("77"))
            .failed(failed("0", true))
            .failed(failed("1", false))
            .build()
            .unwrap();
        let results = per_job(&output, 4);
        assert_eq!(results[0], Err(SendError::Refused("Code".into())));
        assert_eq!(results[1], Err(SendError::NotSent("Code".into())));
        assert!(matches!(results[2], Err(SendError::Unknown(_))));
        assert_eq!(results[3], Ok(()));
    }
}
