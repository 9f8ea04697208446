//! Results of workers: any bytes, by publication or look-up.

use crate::harness::aws_proxy::Policy;
use crate::harness::gateway::Conf;
use crate::harness::platform::HELLO;
use crate::harness::worker::literal;
use crate::harness::{Platform, SOON, Setup, eventually, spawn, within};
use serde_json::{Value, json};

/// Publishes and stores `result` for the next job on the queue, as a worker does. Returns the id of the job.
async fn work_one(platform: &Platform, result: &[u8]) -> String {
    let (_, body) = platform.fleet().cloud.receive().await;
    let message: Value = serde_json::from_str(&body).expect("JSON");
    let id = message["requestId"].as_str().expect("an id").to_owned();
    let redis = &platform.fleet().redis;
    let receivers = redis.publish_until_received(&format!("result:{id}"), result).await;
    assert_eq!(receivers, 1, "only the node of the job receives its result");
    redis.store_result(&id, result).await;
    id
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unusual_results_are_passed_byte_for_byte() {
    let platform = Setup::serve().no_worker().start().await;
    let gateway = &platform.gateway;
    let deep = format!("{}{}", "[".repeat(50_000), "]".repeat(50_000));
    let same: Vec<&[u8]> = vec![
        b"{}",
        b"null",
        b"[1, 2 ,3]",
        br#""just a string""#,
        br#"{"stdout":"no status"}"#,
        br#"{"status":null,"exitCode":null,"stdout":null}"#,
        br#"{"status":7,"exitCode":"0","stdout":["x"],"durationMs":"fast"}"#,
        br#"{ "n": 1e400, "m":-0.0, "big":12345678901234567890123 }"#,
        br#"{"status":"SUCCESS","status":"FAILED","a":1,"a":2}"#,
        br#"{"stdout":"\ud800 half a pair"}"#,
        br#"{"durationMs":-1,"peakMemoryBytes":1e300}"#,
        deep.as_bytes(),
    ];
    let wrapped: Vec<(&[u8], Value)> = vec![
        (b"", json!({ "raw": "" })),
        (b"Traceback: \"boom\"", json!({ "raw": "Traceback: \"boom\"" })),
        (b"{\"status\":\"SUCC", json!({ "raw": "{\"status\":\"SUCC" })),
        (b"\xff\xfe", json!({ "raw": "\u{fffd}\u{fffd}" })),
    ];
    let count = same.len() + wrapped.len();
    let cases = same.into_iter().map(|result| (result, None));
    let cases = cases.chain(wrapped.into_iter().map(|(result, raw)| (result, Some(raw))));
    for (n, (result, raw)) in cases.enumerate() {
        let shown = String::from_utf8_lossy(&result[..result.len().min(60)]).into_owned();
        let run = gateway.run(HELLO, &json!(n));
        let client = spawn(async move { run.send().await });
        let id = work_one(&platform, result).await;
        let answer = within(&shown, SOON, client).await.expect("no panic").expect(200);
        let later = gateway.get(&format!("/status/{id}")).await.expect(200);
        for answer in [answer, later] {
            assert!(answer.need("content-type").starts_with("application/json"));
            match &raw {
                None => assert_eq!(answer.body(), result, "{shown}"),
                Some(raw) => assert_eq!(answer.json(), *raw, "{shown}"),
            }
        }
    }
    // Each has a row, with a status.
    let rows = platform.fleet().cloud.wait_for_rows(HELLO, count).await;
    assert!(rows.iter().all(|row| row["status"]["S"].as_str().is_some_and(|s| !s.is_empty())), "{rows:#?}");
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn results_of_the_python_worker_are_passed_on() {
    let platform = Setup::serve().python_worker().start().await;
    let gateway = &platform.gateway;
    let run = async |input: Value| gateway.run(HELLO, &input).send().await;

    let huge = run(json!({ "behave": "huge", "bytes": 5_000_000 })).await.expect(200);
    assert!(huge.body().len() > 5_000_000);
    assert_eq!(huge.json()["stdout"].as_str().map(str::len), Some(5_000_000));

    // With spaces, a number beyond f64, and a member twice.
    let unusual = " {\"n\":1e400, \"n\":\"ä\"} ";
    assert_eq!(run(literal(unusual)).await.expect(200).text(), unusual);
    let raw = run(literal("not json")).await.expect(200);
    assert_eq!(raw.json(), json!({ "raw": "not json" }));
    let bare = run(json!({ "behave": "no_status" })).await.expect(200).json();
    assert!(bare["status"].is_null() && bare["stdout"].is_string(), "{bare}");
    let failed = run(json!({ "behave": "fail" })).await.expect(200).json();
    assert_eq!((&failed["status"], &failed["exitCode"]), (&json!("FAILED"), &json!(1)));
    let twice = run(json!({ "behave": "publish_twice", "token": "once" })).await.expect(200).json();
    assert!(twice["stdout"].as_str().is_some_and(|printed| printed.contains("once")), "{twice}");

    // Six runs have six rows. The result that was published twice counts once.
    platform.fleet().cloud.wait_for_rows(HELLO, 6).await;
    gateway.wait_until_idle().await;
    platform.fleet().cloud.wait_for_invocations(HELLO, 6).await;
    platform.finish().await;
}

/// The worker has received the message and published the result before SQS confirms the send.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_result_published_before_the_send_returns_is_delivered() {
    let platform = Setup::serve().policy(Policy::Hold("SendMessageBatch")).start().await;
    let proxy = platform.fleet().proxy.as_ref().expect("the policy has a proxy");
    let run = platform.gateway.run(HELLO, &json!({ "token": "early" }));
    let answer = within("the client's answer", SOON, run.send()).await.expect(200);
    let result = answer.json();
    assert!(result["stdout"].as_str().is_some_and(|printed| printed.contains("early")), "{result}");
    assert!(proxy.count("SendMessageBatch").held >= 1, "a send has returned");
    proxy.release();
    // One row, counted once, even if the send was retried and the job ran twice.
    platform.fleet().cloud.wait_for_rows(HELLO, 1).await;
    platform.gateway.wait_until_idle().await;
    platform.fleet().cloud.wait_for_invocations(HELLO, 1).await;
    let id = result["requestId"].as_str().expect("an id");
    eventually("an empty journal", SOON, || async {
        let left = platform.fleet().redis.journaled(id).await;
        if left == 0 { Ok(()) } else { Err(format!("{left} left")) }
    })
    .await;
    platform.finish().await;
}

/// A lost job counts as an error until its late result arrives. Then it counts by its result.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_result_replaces_lost() {
    let limits = "[waits]\njob_deadline_s = 4\n[batch]\nsend_deadline_ms = 1000\n";
    let conf = Conf { limits: limits.into(), ..Conf::default() };
    let platform = Setup::serve().no_worker().conf(conf).start().await;
    let (gateway, cloud) = (&platform.gateway, &platform.fleet().cloud);
    // An attribute of a node that is gone.
    let mut item = cloud.function_item(HELLO).await;
    item["posted_00000001"] = json!({ "N": "1" });
    cloud.put_item(&cloud.functions_table, item).await;
    let id = gateway.run_async(HELLO, &json!(1)).await;
    let row = async |status: &str, errors: &str, duration: &str| {
        eventually(&format!("a row with the status {status}"), SOON, || async {
            let rows = cloud.log_rows(HELLO).await;
            let item = cloud.function_item(HELLO).await;
            let counted = [("invocations", "1"), ("errorCount", errors), ("totalDuration", duration)];
            let is_counted = counted.iter().all(|(name, number)| item[name]["N"] == **number);
            let is_written = rows.len() == 1 && rows[0]["status"]["S"] == status;
            if is_written && is_counted { Ok(()) } else { Err(format!("{rows:?}, {item}")) }
        })
        .await;
    };
    row("LOST", "1", "0").await;
    gateway.wait_until_idle().await;

    let result = format!(r#"{{"requestId":"{id}","status":"SUCCESS","stdout":"late","durationMs":12}}"#);
    for _ in 0..2 {
        platform.fleet().redis.publish(&format!("result:{id}"), result.as_bytes()).await;
    }
    row("SUCCESS", "0", "12").await;
    gateway.wait_for_metric(r#"infra_results_total{kind="late"}"#, 1.0).await;
    let item = cloud.function_item(HELLO).await;
    let marks = item.as_object().expect("an item").keys().filter(|name| name.starts_with("posted_"));
    assert_eq!(marks.count(), 1, "marks of other nodes are kept: {item}");
    gateway.wait_for_metric(r#"infra_results_total{kind="unknown_job"}"#, 1.0).await;
    platform.finish().await;
}

/// Number of look-ups of stored results in Redis.
async fn look_ups(platform: &Platform) -> u64 {
    platform.fleet().redis.calls(&["mget"]).await
}

/// After a lost publication the stored result is looked up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stored_result_is_found_without_a_publication() {
    let platform = Setup::serve().no_worker().start().await;
    let run = platform.gateway.run(HELLO, &json!(1));
    let client = spawn(async move { run.send().await });
    let (_, body) = platform.fleet().cloud.receive().await;
    let message: Value = serde_json::from_str(&body).expect("JSON");
    let id = message["requestId"].as_str().expect("an id");
    // While a client waits there is one look-up per second. Without a client the eighth comes at an age of
    // two minutes.
    let before = look_ups(&platform).await;
    eventually("eight look-ups", SOON, || async {
        let count = look_ups(&platform).await - before;
        if count >= 8 { Ok(()) } else { Err(count.to_string()) }
    })
    .await;
    let result = format!(r#"{{"requestId":"{id}","stdout":"stored only"}}"#);
    platform.fleet().redis.store_result(id, result.as_bytes()).await;
    let answer = within("the client's answer", SOON, client).await.expect("no panic");
    assert_eq!(answer.expect(200).text(), result);

    // A result without a waiting client is found by its own schedule.
    let id = platform.gateway.run_async(HELLO, &json!(2)).await;
    platform.fleet().redis.store_result(&id, result.as_bytes()).await;
    platform.fleet().cloud.wait_for_rows(HELLO, 2).await;
    platform.finish().await;
}
