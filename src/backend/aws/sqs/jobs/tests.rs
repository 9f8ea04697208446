//! Tests of the jobs of a queue, over a scripted SQS and a Redis that accepts everything.

use super::*;
use crate::backend::aws::redis::connection::CommandConnection;
use crate::backend::aws::redis::simulated::{Command, LinkError, RedisLink, Reply};
use crate::backend::aws::scripted::{ScriptedRequest, ScriptedService};
use crate::backend::work::REQUEST_ID_BYTES_MAX;
use futures_util::future::BoxFuture;
use serde_json::{Value, json};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use tokio::time::advance;

const URL: &str = "http://sqs/1/tasks";
const LEASE_S: u64 = 420;

/// A Redis without replicas. While it is full it stores nothing.
#[derive(Default)]
struct Redis {
    is_full: AtomicBool,
    commands: Mutex<Vec<String>>,
}

impl RedisLink for Redis {
    fn connect(&self) -> BoxFuture<'static, Result<u64, LinkError>> {
        Box::pin(async { Ok(1) })
    }

    fn call(
        &self,
        _connection: u64,
        commands: Vec<Command>,
        _is_transaction: bool,
    ) -> BoxFuture<'static, Result<Vec<Reply>, LinkError>> {
        let mut replies = Vec::new();
        for command in commands {
            let words: Vec<_> = command.iter().map(|word| String::from_utf8_lossy(word)).collect();
            replies.push(match &*words[0] {
                "CLIENT" => Reply::Bulk(b"addr=10.0.0.1:1".to_vec()),
                "INFO" => Reply::Bulk(b"role:master".to_vec()),
                "SETEX" if self.is_full.load(Ordering::Relaxed) => {
                    Reply::Error { code: "OOM".into(), text: "full".into() }
                }
                _ => {
                    self.commands.lock().push(words.join(" "));
                    Reply::Int(1)
                }
            });
        }
        Box::pin(async move { Ok(replies) })
    }
}

struct Fixture {
    sqs: ScriptedService,
    redis: Arc<Redis>,
    jobs: SqsJobs,
}

impl Fixture {
    fn new(is_fifo: bool) -> Self {
        let (sqs, redis) = (ScriptedService::default(), Arc::new(Redis::default()));
        let link: Arc<dyn RedisLink> = redis.clone();
        let publisher = ResultPublisher::new(CommandConnection::simulated(link));
        let lease = Duration::from_secs(LEASE_S);
        let attributes = JobQueueAttributes { lease, is_fifo, has_dead_letter_queue: true };
        let jobs = SqsJobs::new(sqs.sqs(), URL, attributes, publisher, ProcessToken(0xab));
        Self { sqs, redis, jobs }
    }

    /// The only request since the last call.
    fn request(&self) -> ScriptedRequest {
        let mut requests = self.sqs.requests();
        let last = requests.pop().expect("a request");
        assert!(requests.is_empty(), "{requests:?}");
        last
    }
}

fn received(n: usize) -> ReceivedJob {
    let (receipt, message) = (Receipt::new(format!("receipt-{n}")), Bytes::from_static(b"{}"));
    ReceivedJob { receipt, message, ..ReceivedJob::sample(&format!("job-{n}")) }
}

fn accepted(count: usize) -> Value {
    let successful: Vec<Value> = (0..count).map(|n| json!({ "Id": n.to_string() })).collect();
    json!({ "Successful": successful, "Failed": [] })
}

fn refused(code: &str, sender_fault: bool) -> Value {
    json!({ "Successful": [], "Failed": [{ "Id": "0", "Code": code, "SenderFault": sender_fault }] })
}

/// The receipts of the entries of a batch.
fn receipts(request: &ScriptedRequest) -> Vec<&str> {
    let entries = request.body["Entries"].as_array().expect("entries");
    entries.iter().filter_map(|entry| entry["ReceiptHandle"].as_str()).collect()
}

#[test]
fn messages_are_parsed() {
    let parsed = |body: &str, attributes: &[(MessageSystemAttributeName, &str)], is_fifo| {
        let mut message = Message::builder().message_id("m").receipt_handle("r").body(body);
        for (name, value) in attributes {
            message = message.attributes(name.clone(), *value);
        }
        job(message.build(), is_fifo)
    };
    let body = r#"{"requestId":"a-1","functionId":"f","input":{"deadline":7},
        "deadline":"1970-01-01T00:00:01Z"}"#;
    use MessageSystemAttributeName::{ApproximateReceiveCount, MessageGroupId};
    let attributes = [(ApproximateReceiveCount, "3"), (MessageGroupId, "g")];
    let job = parsed(body, &attributes, false).expect("a job");
    assert_eq!((job.request_id.as_str(), job.function.as_str(), &*job.receipt.text()), ("a-1", "f", "r"));
    assert_eq!((job.deadline, job.starts, job.group), (1000, 2, None));
    assert_eq!(job.message, body.as_bytes());
    let group = |attributes: &[(MessageSystemAttributeName, &str)]| {
        parsed(body, attributes, true).expect("a job").group
    };
    assert_eq!(group(&attributes).as_deref(), Some("g"));
    assert_eq!(group(&[]).as_deref(), Some("f"), "without an attribute");

    let old = r#"{"requestId":"6f1ed002-ab5f-4d5e-8f3c-0123456789ab","functionId":"f"}"#;
    let job = parsed(old, &[], false).expect("a job of the old controller");
    assert_eq!((job.deadline, job.starts), (UnixMs::MAX, 0));

    let long = "a".repeat(REQUEST_ID_BYTES_MAX + 1);
    for bad in [
        "",
        "no JSON",
        "[]",
        r#"{"requestId":"a"}"#,
        r#"{"functionId":"f"}"#,
        r#"{"requestId":"","functionId":"f"}"#,
        r#"{"requestId":"a/b","functionId":"f"}"#,
        r#"{"requestId":"a","functionId":"../f"}"#,
        r#"{"requestId":"a","functionId":"f","deadline":"soon"}"#,
        r#"{"requestId":"a","functionId":"f","deadline":7}"#,
        &format!(r#"{{"requestId":"{long}","functionId":"f"}}"#),
    ] {
        assert!(parsed(bad, &[], false).is_none(), "{bad}");
    }
}

#[test]
fn attributes_are_read() {
    use QueueAttributeName::{FifoQueue, RedrivePolicy, VisibilityTimeout};
    let of = |pairs: &[(QueueAttributeName, &str)], url: &str| {
        let attributes = pairs.iter().map(|(name, value)| (name.clone(), (*value).to_owned())).collect();
        let JobQueueAttributes { lease, is_fifo, has_dead_letter_queue } =
            JobQueueAttributes::of(&attributes, url);
        (lease.as_secs(), is_fifo, has_dead_letter_queue)
    };
    assert_eq!(of(&[], "q"), (30, false, false));
    let all = [(VisibilityTimeout, "420"), (FifoQueue, "true"), (RedrivePolicy, "{}")];
    assert_eq!(of(&all, "q"), (420, true, true));
    assert_eq!(of(&[(VisibilityTimeout, "0")], "q.fifo"), (30, true, false));
    assert_eq!(of(&[(VisibilityTimeout, "99999999")], "q"), (43_200, false, false));
}

#[tokio::test]
async fn jobs_are_received() {
    let message = |body: &str| json!({ "MessageId": "m", "ReceiptHandle": "r", "Body": body });
    let good = message(r#"{"requestId":"a","functionId":"f"}"#);
    for (is_fifo, max, most, names) in [
        (false, 3, 3, json!(["ApproximateReceiveCount"])),
        (true, 99, 10, json!(["ApproximateReceiveCount", "MessageGroupId"])),
    ] {
        let fixture = Fixture::new(is_fifo);
        fixture.sqs.answer(200, json!({ "Messages": [good, message("broken"), good] }));
        let jobs = fixture.jobs.receive(max).await.expect("jobs");
        assert_eq!(jobs.len(), 2, "the broken message is left alone");
        let request = fixture.request();
        assert_eq!(request.operation, "ReceiveMessage");
        assert_eq!(request.body["MaxNumberOfMessages"], most);
        assert_eq!(request.body["WaitTimeSeconds"], 20);
        assert_eq!(request.body["VisibilityTimeout"], LEASE_S);
        assert_eq!(request.body["MessageSystemAttributeNames"], names);
        let attempt = request.body["ReceiveRequestAttemptId"].as_str();
        assert_eq!(attempt, is_fifo.then_some("00000000000000ab-0"));

        fixture.sqs.answer(200, "{}");
        assert_eq!(fixture.jobs.receive(1).await.map(|jobs| jobs.len()), Ok(0));
        fixture.sqs.answer(400, json!({ "__type": "com.amazonaws.sqs#QueueDoesNotExist" }));
        assert!(matches!(fixture.jobs.receive(1).await, Err(BackendError::Missing(_))));
    }
}

#[tokio::test(start_paused = true)]
async fn a_message_is_deleted_after_its_result_is_stored() {
    let Fixture { sqs, redis, jobs } = Fixture::new(false);
    redis.is_full.store(true, Ordering::Relaxed);
    assert!(matches!(jobs.finish(&received(1), "{}".into()).await, Err(BackendError::Unavailable(_))));
    assert!(sqs.requests().is_empty(), "not deleted");

    redis.is_full.store(false, Ordering::Relaxed);
    redis.commands.lock().clear();
    for (answers, expected) in [
        (vec![accepted(1)], Ok(())),
        (vec![refused("InternalError", false), accepted(1)], Ok(())),
        (
            vec![json!({ "Successful": [], "Failed": [] }), refused("RequestThrottled", true), accepted(1)],
            Ok(()),
        ),
        // The message has left the queue.
        (vec![refused("ReceiptHandleIsInvalid", true)], Ok(())),
        (
            vec![refused("InternalError", false); 3],
            Err(BackendError::Unavailable("a message was not deleted: InternalError".into())),
        ),
    ] {
        let count = answers.len();
        answers.into_iter().for_each(|answer| sqs.answer(200, answer));
        assert_eq!(jobs.finish(&received(1), "{}".into()).await, expected);
        assert_eq!(
            std::mem::take(&mut *redis.commands.lock()),
            ["PUBLISH result:job-1 {}", "SETEX job:job-1 3600 {}"]
        );
        let requests = sqs.requests();
        assert_eq!(requests.len(), count);
        for request in &requests {
            assert_eq!(
                (request.operation.as_str(), receipts(request)),
                ("DeleteMessageBatch", vec!["receipt-1"])
            );
        }
    }
    sqs.answer(200, accepted(1));
    assert_eq!(jobs.discard(&received(2)).await, Ok(()));
    assert!(redis.commands.lock().is_empty(), "a job without a result");
}

#[tokio::test(start_paused = true)]
async fn visibility_timeouts_are_changed_in_batches() {
    let Fixture { sqs, jobs, .. } = Fixture::new(false);
    let held: Vec<ReceivedJob> = (0..25).map(received).collect();
    let all: Vec<Receipt> = held.iter().map(|job| job.receipt.clone()).collect();
    let mut sorted: Vec<String> = all.iter().map(|receipt| receipt.text().to_string()).collect();
    sorted.sort_unstable();
    for (seconds, failure, is_ok) in [
        (LEASE_S, accepted(10), true),
        (0, refused("InvalidParameterValue", true), true),
        (LEASE_S, refused("InternalError", false), false),
        (0, refused("InternalError", false), false),
    ] {
        for answer in [accepted(10), failure, accepted(5)] {
            sqs.answer(200, answer);
        }
        let changed = if seconds == 0 { jobs.give_back(&held).await } else { jobs.extend(&all).await };
        assert_eq!(changed.is_ok(), is_ok, "{changed:?}");
        let requests = sqs.requests();
        let mut changed: Vec<&str> = requests.iter().flat_map(receipts).collect();
        changed.sort_unstable();
        assert_eq!(changed, sorted);
        for request in &requests {
            assert_eq!(request.operation, "ChangeMessageVisibilityBatch");
            assert_eq!(request.body["Entries"][0]["VisibilityTimeout"], seconds);
        }
    }
    assert_eq!(jobs.extend(&[]).await, Ok(()));
    assert!(sqs.requests().is_empty());
}

#[tokio::test(start_paused = true)]
async fn repeated_warnings_are_counted() {
    let interval = LogInterval::default();
    assert_eq!([(); 3].map(|()| interval.pass()), [Some(0), None, None]);
    advance(LOG_EVERY).await;
    assert_eq!([(); 2].map(|()| interval.pass()), [Some(2), None]);
}
