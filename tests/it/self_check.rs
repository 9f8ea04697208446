//! Tests of the harness.

use crate::harness::aws::{Cloud, Service};
use crate::harness::aws_proxy::{AwsProxy, Policy};
use crate::harness::http::Conn;
use crate::harness::platform::HELLO;
use crate::harness::process::{Process, Scratch, Stream, listening_on};
use crate::harness::redis::{Client, Redis, Reply};
use crate::harness::worker::{PythonWorker, literal};
use crate::harness::{SOON, eventually, within};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::path::Path;

fn message(id: &str, input: &Value) -> Value {
    json!({
        "requestId": id, "functionId": HELLO, "runtime": "python", "memoryMb": 128, "s3Bucket": "b",
        "s3Key": "k", "timeoutMs": 300_000, "input": input, "modelId": "llama3:8b", "envVars": {},
    })
}

async fn send(cloud: &Cloud, message: &Value) {
    let send = json!({ "QueueUrl": cloud.queue_url, "MessageBody": message.to_string() });
    cloud.call(Service::Sqs, "SendMessage", &send).await;
}

async fn queued(cloud: &Cloud) -> Result<(), String> {
    let names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"];
    let ask = json!({ "QueueUrl": cloud.queue_url, "AttributeNames": names });
    let counts = cloud.call(Service::Sqs, "GetQueueAttributes", &ask).await;
    let empty = names.iter().all(|name| counts["Attributes"][name] == "0");
    if empty { Ok(()) } else { Err(counts.to_string()) }
}

/// The worker follows the contract: publication, stored result, deletion of the message.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_worker_publishes_stores_and_deletes() {
    let redis = Redis::start(Some("s3cret")).await;
    let cloud = Cloud::start(&[]).await;
    let worker = PythonWorker::start(&cloud, &redis, &[]);
    let mut subscriber = Client::open(&redis).await.expect("Redis accepts connections");
    subscriber.command(&[b"PSUBSCRIBE", b"result:*"]).await.expect("Redis answers");

    let cases = [
        ("echo", json!({ "token": "ä1" }), 1, true),
        ("null", json!(null), 1, true),
        ("fail", json!({ "behave": "fail" }), 1, true),
        ("literal", literal("not json"), 1, true),
        ("twice", json!({ "behave": "publish_twice" }), 2, true),
        ("publish", json!({ "behave": "publish_only" }), 1, false),
        ("store", json!({ "behave": "store_only" }), 0, true),
        ("huge", json!({ "behave": "huge", "bytes": 5_000_000 }), 1, true),
    ];
    for (id, input, publications, stored) in cases {
        send(&cloud, &message(id, &input)).await;
        let mut published = Vec::new();
        for _ in 0..publications {
            let reply = within("a publication", SOON, subscriber.reply()).await.expect("Redis answers");
            let Reply::Array(words) = reply else { panic!("{reply:?}") };
            assert_eq!(words[2], Reply::Bulk(format!("result:{id}").into_bytes()));
            let Reply::Bulk(payload) = &words[3] else { panic!("{words:?}") };
            published = payload.clone();
        }
        eventually("the queue is empty", SOON, || queued(&cloud)).await;
        let key = format!("job:{id}");
        let found = redis.command(&[b"GET", key.as_bytes()]).await;
        let Reply::Bulk(found) = found else {
            assert!(!stored, "{id}: {found:?}");
            continue;
        };
        assert!(publications == 0 || found == published, "{id}: stored and published results differ");
        match id {
            "literal" => assert_eq!(found, b"not json"),
            "huge" => assert!(found.len() > 5_000_000),
            _ => {
                let result: Value = serde_json::from_slice(&found).expect("JSON");
                assert_eq!(result["requestId"], id);
                let printed = result[if id == "fail" { "stderr" } else { "stdout" }].as_str();
                let printed: Value = serde_json::from_str(printed.expect("text")).expect("the input as JSON");
                assert_eq!(printed, input);
            }
        }
        let Reply::Integer(ttl) = redis.command(&[b"TTL", key.as_bytes()]).await else { panic!() };
        assert!((3500..=3600).contains(&ttl), "{ttl}");
    }
    worker.stop().await;
}

/// The AWS proxy denies what the old role does not allow, and holds answers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_aws_proxy_denies_and_holds() {
    let cloud = Cloud::start(&[]).await;
    cloud.put_function(HELLO).await;
    let depth = json!({ "QueueUrl": cloud.queue_url, "AttributeNames": ["All"] });
    let key = json!({ "TableName": cloud.functions_table, "Key": { "functionId": { "S": HELLO } } });
    let table = json!({ "TableName": cloud.functions_table });

    let proxy = AwsProxy::start(&cloud, Policy::OldRole).await;
    let via =
        |service, operation: &str, input: &Value| cloud.request(service, operation, input).to(proxy.addr());
    via(Service::Sqs, "GetQueueAttributes", &depth).send().await.expect(200);
    let item = via(Service::DynamoDb, "GetItem", &key).send().await.expect(200).json();
    assert_eq!(item["Item"]["functionId"]["S"], HELLO);
    let denied = via(Service::DynamoDb, "DescribeTable", &table).send().await.expect(400);
    assert!(denied.text().contains("AccessDeniedException"), "{}", denied.text());
    let denied = via(Service::Sqs, "GetQueueUrl", &json!({ "QueueName": "q" })).send().await.expect(403);
    assert_eq!(denied.need("x-amzn-query-error"), "AccessDenied;Sender");
    assert_eq!((proxy.count("GetItem").passed, proxy.count("DescribeTable").denied), (1, 1));
    drop(proxy);

    let proxy = AwsProxy::start(&cloud, Policy::Hold("SendMessageBatch")).await;
    let entries = json!([{ "Id": "0", "MessageBody": "held" }]);
    let batch = json!({ "QueueUrl": cloud.queue_url, "Entries": entries });
    let mut conn = Conn::open(proxy.addr()).await.expect("the proxy accepts connections");
    let request = cloud.request(Service::Sqs, "SendMessageBatch", &batch);
    conn.write(&request.to_bytes()).await.expect("the peer reads");
    let (_, body) = cloud.receive().await;
    assert_eq!(body, "held", "the message is not the one whose answer is held");
    eventually("the answer is held", SOON, || async {
        if proxy.count("SendMessageBatch").held == 1 { Ok(()) } else { Err("not held".to_owned()) }
    })
    .await;
    proxy.release();
    let answer = conn.answer(false).await.expect("an answer after the release");
    assert_eq!(answer.status, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn redis_restarts_without_data_on_the_same_port() {
    let mut redis = Redis::start(None).await;
    redis.store_result("some-id", b"{}").await;
    assert_eq!(redis.command(&[b"GET", b"job:some-id"]).await, Reply::Bulk(b"{}".to_vec()));
    assert_eq!(redis.publish("result:x", b"{}").await, 0);
    redis.kill();
    assert!(listening_on(redis.addr().port()).is_empty());
    redis.restart().await;
    assert_eq!(listening_on(redis.addr().port()), ["0100007F"]);
    assert_eq!(redis.command(&[b"GET", b"job:some-id"]).await, Reply::Nil);
}

/// The kernel kills children when the thread that forked them ends, so tests must not fork themselves.
#[tokio::test]
async fn children_outlive_the_thread_that_started_them() {
    let dir = Scratch::new("children");
    let path = [("PATH".to_owned(), std::env::var("PATH").unwrap_or_default())];
    let start = {
        let dir = dir.path().to_owned();
        move || {
            let script = "trap 'echo alive' USR1; echo started; echo oops >&2; while :; do sleep 0.1; done";
            let child = Process::start("sh", Path::new("sh"), &["-c", script], &path, &dir);
            (child.expect("sh is there"), nix::unistd::gettid())
        }
    };
    let (child, thread) = std::thread::spawn(start).join().expect("the thread does not panic");
    let printed = || async {
        let printed = child.output().contains("oops") && child.output().contains("started");
        if printed { Ok(()) } else { Err(child.output().tail(5)) }
    };
    eventually("the child's output", SOON, printed).await;
    assert_eq!(child.output().lines(Stream::Err), ["oops"]);
    // The kernel sends the signal before it removes the thread from its list. Only then is the child tested.
    let threads = Path::new("/proc/self/task");
    eventually("the end of the thread", SOON, || async {
        if threads.join(thread.to_string()).exists() { Err("it is listed".to_owned()) } else { Ok(()) }
    })
    .await;
    child.signal(Signal::SIGUSR1);
    child.wait_for_output("alive", SOON).await;
    assert_eq!(child.exit_status(), None, "it outlives the thread that requested it");
    child.kill();
    assert!(!Path::new("/proc").join(child.pid().to_string()).exists());
}
