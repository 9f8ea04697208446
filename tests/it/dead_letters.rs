//! Dead-lettered jobs end as FAILED. Their messages stay for a redrive, unless `dead_letter.consume` is set.

use crate::harness::aws::{Cloud, Service};
use crate::harness::gateway::Conf;
use crate::harness::platform::HELLO;
use crate::harness::{SOON, Setup, eventually, spawn, within};
use serde_json::{Value, json};

fn setup(consume: bool) -> Setup {
    let server = format!("[dead_letter]\nevery_s = 1\nconsume = {consume}\n");
    Setup::serve().no_worker().dead_letters().conf(Conf { server, ..Conf::default() })
}

/// Receives the message without deleting it, until the queue moves it to the dead-letter queue.
async fn exhaust_receives(cloud: &Cloud) {
    let ask = json!({ "QueueUrl": cloud.queue_url, "VisibilityTimeout": 0, "WaitTimeSeconds": 0 });
    eventually("the message is dead-lettered", SOON, || async {
        cloud.call(Service::Sqs, "ReceiveMessage", &ask).await;
        match cloud.messages(&cloud.queue_url).await {
            0 => Ok(()),
            left => Err(format!("{left} messages")),
        }
    })
    .await;
}

async fn row_of(cloud: &Cloud) -> Value {
    cloud.wait_for_rows(HELLO, 1).await.remove(0)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_lettered_job_ends_as_failed() {
    let platform = setup(false).start().await;
    let run = platform.gateway.run(HELLO, &json!(1));
    let client = spawn(async move { run.send().await });
    let cloud = &platform.fleet().cloud;
    eventually("the message", SOON, || async {
        if cloud.messages(&cloud.queue_url).await == 1 { Ok(()) } else { Err("none".to_owned()) }
    })
    .await;
    exhaust_receives(cloud).await;
    let result = within("the client's answer", SOON, client).await.expect("no panic").expect(200).json();
    assert_eq!((&result["status"], &result["exitCode"]), (&json!("FAILED"), &json!(1)));
    assert!(result["stderr"].as_str().is_some_and(|text| text.contains("dead-letter queue")), "{result}");
    let row = row_of(cloud).await;
    assert_eq!((&row["status"]["S"], &row["message"]["S"]), (&json!("FAILED"), &result["stderr"]));
    platform.gateway.wait_for_metric("infra_dead_letters_total", 1.0).await;
    assert_eq!(cloud.messages(&cloud.dead_letters_url()).await, 1, "the message stays for a redrive");
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dead_letters_are_deleted_with_consume() {
    let platform = setup(true).start().await;
    let cloud = &platform.fleet().cloud;
    // A message that is not a job stays, and does not block others.
    let foreign = json!({ "QueueUrl": cloud.dead_letters_url(), "MessageBody": "not a job" });
    cloud.call(Service::Sqs, "SendMessage", &foreign).await;
    let id = platform.gateway.run_async(HELLO, &json!(1)).await;
    // A stored result of a worker is kept.
    let result = format!(r#"{{"requestId":"{id}","status":"SUCCESS","stdout":"done"}}"#);
    platform.fleet().redis.store_result(&id, result.as_bytes()).await;
    exhaust_receives(cloud).await;
    eventually("only the other message is left", SOON, || async {
        match cloud.messages(&cloud.dead_letters_url()).await {
            1 => Ok(()),
            left => Err(format!("{left} messages")),
        }
    })
    .await;
    assert_eq!(row_of(cloud).await["status"]["S"], "SUCCESS");
    platform.finish().await;
}
