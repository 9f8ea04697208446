//! The task queue on SQS.
//!
//! A send is a direct call (see `json_call`) without retries, so each result describes exactly one attempt.

use super::dead_letters::DeadLetterQueue;
use crate::backend::aws::error::class;
use crate::backend::aws::json_call::{CallError, CredentialCache, JsonClient, RouteRecorder};
use crate::backend::aws::redis::connection::CommandConnection;
use crate::backend::{BATCH_JOBS_MAX, BackendError, JobQueue, QueueTraits, SendError};
use crate::https::HttpsClient;
use crate::model::Job;
use async_trait::async_trait;
use aws_sdk_sqs::Client;
use aws_sdk_sqs::types::QueueAttributeName;
use serde::Deserialize;
use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

const SEND: &str = "AmazonSQS.SendMessageBatch";
/// Maximum message size of SQS, in bytes.
const MESSAGE_BYTES_MAX: usize = 1 << 20;
/// Message size limit of a queue that does not report one, in bytes: the SQS limit before 2025.
const MESSAGE_BYTES_DEFAULT: usize = 256 << 10;
/// Retention of a queue that does not report one: 4 days, the default of SQS.
const RETENTION_DEFAULT: Duration = Duration::from_secs(4 * 24 * 3600);

/// Codes for the rejection of a whole batch that one of its jobs has caused. All others concern the queue or
/// the caller.
const JOB_AT_FAULT: &[&str] = &[
    "AWS.SimpleQueueService.BatchRequestTooLong",
    "BatchRequestTooLong",
    "InvalidMessageContents",
    "InvalidParameterValue",
    "MissingParameter",
];

pub struct SqsQueue {
    client: Client,
    direct: JsonClient,
    url: String,
    traits: QueueTraits,
    /// The RedrivePolicy of the queue, if it has one.
    redrive: Option<String>,
}

impl SqsQueue {
    /// Returns the dead-letter queue of this queue, if it has one.
    pub async fn dead_letters(
        &self,
        commands: Arc<CommandConnection>,
    ) -> Result<Option<DeadLetterQueue>, BackendError> {
        match &self.redrive {
            None => Ok(None),
            Some(policy) => DeadLetterQueue::find(self.client.clone(), commands, policy).await.map(Some),
        }
    }

    /// Reads the attributes of the queue, which shows that it exists.
    pub async fn open(
        client: Client,
        https: HttpsClient,
        credentials: Arc<CredentialCache>,
        url: &str,
    ) -> Result<Self, BackendError> {
        let seen = RouteRecorder::default();
        let names = [
            QueueAttributeName::MaximumMessageSize,
            QueueAttributeName::MessageRetentionPeriod,
            QueueAttributeName::FifoQueue,
            QueueAttributeName::RedrivePolicy,
        ];
        let attributes = read_attributes(&client, url, &names, &seen).await?;
        let direct = JsonClient::new(https, credentials, &seen)?;
        let redrive = attributes.get(&QueueAttributeName::RedrivePolicy).cloned();
        Ok(Self { client, direct, url: url.to_owned(), traits: traits(&attributes, url), redrive })
    }

    /// Makes one call. Returns the result of each job, or the reason why none of them is known to be on the
    /// queue.
    async fn send(&self, jobs: &[Job]) -> Result<Vec<Result<(), SendError>>, SendError> {
        let body = batch(&self.url, self.traits.fifo, jobs)?;
        let answer = self.direct.call(SEND, body).await.map_err(|error| not_sent(&error))?;
        let answer: SendBatchResponse<'_> = serde_json::from_slice(&answer)
            .map_err(|_| SendError::Unknown("the answer is malformed".into()))?;
        Ok(per_job(&answer, jobs.len()))
    }
}

fn not_sent(error: &CallError) -> SendError {
    let text = error.class().to_string();
    match error.code() {
        Some(code) if JOB_AT_FAULT.contains(&code) => SendError::Refused(text),
        _ if error.took_no_effect() => SendError::NotSent(text),
        _ => SendError::Unknown(text),
    }
}

/// Serializes the request. The id of each entry is its index.
fn batch(url: &str, fifo: bool, jobs: &[Job]) -> Result<Vec<u8>, SendError> {
    let bytes: usize = jobs.iter().map(|job| job.message.len() + job.message.len() / 8 + 256).sum();
    let mut body = Vec::with_capacity(bytes + url.len() + 64);
    body.extend_from_slice(b"{\"QueueUrl\":");
    put_text(&mut body, url);
    body.extend_from_slice(b",\"Entries\":[");
    for (index, job) in jobs.iter().enumerate() {
        let message = std::str::from_utf8(&job.message)
            .map_err(|_| SendError::Refused("the message is not UTF-8".into()))?;
        body.extend_from_slice(if index == 0 { b"{\"Id\":\"" } else { b",{\"Id\":\"" });
        body.extend_from_slice(index.to_string().as_bytes());
        body.extend_from_slice(b"\",\"MessageBody\":");
        put_text(&mut body, message);
        // On standard queues too, where the group id enables fair queueing among functions.
        body.extend_from_slice(b",\"MessageGroupId\":");
        put_text(&mut body, job.function.as_str());
        if fifo {
            body.extend_from_slice(b",\"MessageDeduplicationId\":");
            put_text(&mut body, &job.id.to_string());
        }
        body.push(b'}');
    }
    body.extend_from_slice(b"]}");
    Ok(body)
}

fn put_text(body: &mut Vec<u8>, text: &str) {
    // Writing a string to memory cannot fail.
    let _ = serde_json::to_writer(body, text);
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SendBatchResponse<'a> {
    #[serde(borrow, default)]
    successful: Vec<SentEntry<'a>>,
    #[serde(borrow, default)]
    failed: Vec<Failed<'a>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SentEntry<'a> {
    #[serde(borrow)]
    id: Cow<'a, str>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Failed<'a> {
    #[serde(borrow)]
    id: Cow<'a, str>,
    #[serde(borrow, default)]
    code: Cow<'a, str>,
    #[serde(default)]
    sender_fault: bool,
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
            // One invalid job causes the rejection of the batch. Alone, each job gets its own result;
            // sequentially, to keep the order.
            Err(SendError::Refused(_)) if jobs.len() > 1 => {
                let mut results = Vec::with_capacity(jobs.len());
                for job in jobs {
                    let alone = self.send(std::slice::from_ref(job)).await;
                    results.extend(alone.unwrap_or_else(|error| vec![Err(error)]));
                    // Later jobs would overtake this one, or fail in the same way.
                    if !matches!(results.last(), Some(Ok(()) | Err(SendError::Refused(_)))) {
                        break;
                    }
                }
                let not_tried =
                    || Err(SendError::NotSent("an earlier job of the batch could not be sent".into()));
                results.resize_with(jobs.len(), not_tried);
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
        let names = std::slice::from_ref(&name);
        let attributes = attributes(&self.client, &self.url, names, &RouteRecorder::default()).await?;
        Ok(number(&attributes, &name).unwrap_or(0))
    }
}

pub type Attributes = HashMap<QueueAttributeName, String>;

/// Reads attributes of a queue.
pub async fn read_attributes(
    client: &Client,
    url: &str,
    names: &[QueueAttributeName],
    seen: &RouteRecorder,
) -> Result<Attributes, BackendError> {
    // Some implementations answer InvalidAttributeName if a standard queue is asked for FifoQueue. All is
    // always accepted.
    match attributes(client, url, names, seen).await {
        Err(BackendError::Invalid(_)) => attributes(client, url, &[QueueAttributeName::All], seen).await,
        read => read,
    }
}

async fn attributes(
    client: &Client,
    url: &str,
    names: &[QueueAttributeName],
    seen: &RouteRecorder,
) -> Result<Attributes, BackendError> {
    let call = client.get_queue_attributes().queue_url(url).set_attribute_names(Some(names.to_vec()));
    let output = call.customize().interceptor(seen.clone()).send().await.map_err(|e| class(&e))?;
    Ok(output.attributes.unwrap_or_default())
}

pub fn number(attributes: &Attributes, name: &QueueAttributeName) -> Option<u64> {
    attributes.get(name)?.parse().ok()
}

pub fn is_fifo(attributes: &Attributes, url: &str) -> bool {
    let is_reported = attributes.get(&QueueAttributeName::FifoQueue).is_some_and(|fifo| fifo == "true");
    is_reported || url.ends_with(".fifo")
}

fn traits(attributes: &Attributes, url: &str) -> QueueTraits {
    let bytes = number(attributes, &QueueAttributeName::MaximumMessageSize)
        .and_then(|bytes| usize::try_from(bytes).ok())
        .unwrap_or(MESSAGE_BYTES_DEFAULT);
    let retention = number(attributes, &QueueAttributeName::MessageRetentionPeriod);
    QueueTraits {
        message_bytes_max: bytes.min(MESSAGE_BYTES_MAX),
        retention: retention.map_or(RETENTION_DEFAULT, Duration::from_secs),
        fifo: is_fifo(attributes, url),
    }
}

/// The result of each of `count` jobs. An id in neither list has an unknown result.
fn per_job(answer: &SendBatchResponse<'_>, count: usize) -> Vec<Result<(), SendError>> {
    let silent = || Err(SendError::Unknown("the answer does not mention the job".into()));
    let mut results: Vec<_> = (0..count).map(|_| silent()).collect();
    let mut set = |id: &str, result| {
        if let Some(slot) = id.parse::<usize>().ok().and_then(|i| results.get_mut(i)) {
            *slot = result;
        }
    };
    for sent in &answer.successful {
        set(&sent.id, Ok(()));
    }
    for failed in &answer.failed {
        let code = failed.code.clone().into_owned();
        let error = if failed.sender_fault { SendError::Refused(code) } else { SendError::NotSent(code) };
        set(&failed.id, Err(error));
    }
    results
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{FunctionId, JobId, NodeId};

    #[test]
    fn queue_attributes_are_parsed() {
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
        let answer = r#"{"Successful":[{"Id":"3","MessageId":"m","MD5OfMessageBody":"x"},{"Id":"77"}],
            "Failed":[{"Id":"0","SenderFault":true,"Code":"Code"},
            {"Id":"1","Code":"Code","Message":"a \"b\""}]}"#;
        let results = per_job(&serde_json::from_str(answer).unwrap(), 4);
        assert_eq!(results[0], Err(SendError::Refused("Code".into())));
        assert_eq!(results[1], Err(SendError::NotSent("Code".into())));
        assert!(matches!(results[2], Err(SendError::Unknown(_))));
        assert_eq!(results[3], Ok(()));
        for short in ["{}", r#"{"Successful":[]}"#] {
            let results = per_job(&serde_json::from_str(short).unwrap(), 1);
            assert!(matches!(results[0], Err(SendError::Unknown(_))), "{short}");
        }
    }

    #[test]
    fn a_batch_is_serialized_for_sqs() {
        let job = |n: u64, message: &'static str| Job {
            progress: None,
            id: JobId::new(NodeId(1), 0, n),
            function: FunctionId::parse("f").unwrap(),
            idempotency_key: None,
            is_promised: true,
            deadline: 0,
            message: message.into(),
            trace: None,
        };
        let jobs = [job(1, "{\"a\":\"\\n\u{1F600}\"}"), job(2, "{}")];
        for fifo in [false, true] {
            let body = batch("http://q/1/t", fifo, &jobs).unwrap();
            let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
            assert_eq!(body["QueueUrl"], "http://q/1/t");
            assert_eq!(body["Entries"].as_array().unwrap().len(), 2);
            for (n, job) in jobs.iter().enumerate() {
                let entry = &body["Entries"][n];
                assert_eq!(entry["Id"], n.to_string());
                assert_eq!(entry["MessageBody"].as_str().unwrap().as_bytes(), job.message);
                assert_eq!(entry["MessageGroupId"], "f");
                let deduplication = entry.get("MessageDeduplicationId").and_then(|id| id.as_str());
                assert_eq!(deduplication.map(str::to_owned), fifo.then(|| job.id.to_string()));
            }
        }
        let broken = Job { message: bytes::Bytes::from_static(b"\xff"), ..job(3, "") };
        assert!(matches!(batch("q", false, &[broken]), Err(SendError::Refused(_))));
    }
}
