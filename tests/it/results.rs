//! What comes back from workers: byte for byte, whatever it is, however it arrives.

use crate::harness::gateway::Conf;
use crate::harness::platform::HELLO;
use crate::harness::proxy::Policy;
use crate::harness::{Platform, SOON, Setup, eventually, spawn, within};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// Publishes and stores `result` for the next job on the queue, as a worker does.
async fn work_one(platform: &Platform, result: &[u8]) -> String {
    let (_, body) = platform.fleet().cloud.receive().await;
    let message: Value = serde_json::from_str(&body).expect("JSON");
    let id = message["requestId"].as_str().expect("an id").to_owned();
    let redis = &platform.fleet().redis;
    let heard = redis.publish(&format!("result:{id}"), result).await;
    assert_eq!(heard, 1, "one node hears of a job");
    redis.store_result(&id, result).await;
    id
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn odd_results_pass_byte_for_byte() {
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
    // Each left its row, with a status that says no more than was known.
    let rows = platform.fleet().cloud.wait_for_rows(HELLO, count).await;
    assert!(rows.iter().all(|row| row["status"]["S"].as_str().is_some_and(|s| !s.is_empty())), "{rows:#?}");
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn results_of_the_python_worker() {
    let platform = Setup::serve().start().await;
    let gateway = &platform.gateway;
    let run = async |input: Value| gateway.run(HELLO, &input).send().await;

    let huge = run(json!({ "behave": "huge", "bytes": 5_000_000 })).await.expect(200);
    assert!(huge.body().len() > 5_000_000);
    assert_eq!(huge.json()["stdout"].as_str().map(str::len), Some(5_000_000));

    // {"n":1e400,"n":"ä"} with odd blanks
    let exact =
        run(json!({ "behave": "literal", "base64": "IHsibiI6MWU0MDAsICJuIjoiw6QifSA=" })).await.expect(200);
    assert_eq!(exact.text(), " {\"n\":1e400, \"n\":\"ä\"} ");
    let raw = run(json!({ "behave": "literal", "base64": "bm90IGpzb24=" })).await.expect(200);
    assert_eq!(raw.json(), json!({ "raw": "not json" }));
    let bare = run(json!({ "behave": "no_status" })).await.expect(200).json();
    assert!(bare["status"].is_null() && bare["stdout"].is_string(), "{bare}");
    let failed = run(json!({ "behave": "fail" })).await.expect(200).json();
    assert_eq!((&failed["status"], &failed["exitCode"]), (&json!("FAILED"), &json!(1)));
    let twice = run(json!({ "behave": "publish_twice", "token": "once" })).await.expect(200).json();
    assert!(twice["stdout"].as_str().is_some_and(|printed| printed.contains("once")), "{twice}");

    // Six runs, six rows, and the one that came twice counts once.
    platform.fleet().cloud.wait_for_rows(HELLO, 6).await;
    gateway.idle().await;
    eventually("the counters", SOON, || async {
        let item = platform.fleet().cloud.function_item(HELLO).await;
        if item["invocations"]["N"] == "6" { Ok(()) } else { Err(item.to_string()) }
    })
    .await;
    platform.finish().await;
}

/// The message is with the worker, and its result published, before SQS has confirmed the send.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn published_before_send_has_returned() {
    let platform = Setup::serve().policy(Policy::Hold("SendMessageBatch")).start().await;
    let proxy = platform.fleet().proxy.as_ref().expect("asked for");
    let run = platform.gateway.run(HELLO, &json!({ "token": "early" }));
    let answer = within("the client's answer", SOON, run.send()).await.expect(200);
    let result = answer.json();
    assert!(result["stdout"].as_str().is_some_and(|printed| printed.contains("early")), "{result}");
    assert!(proxy.count("SendMessageBatch").held >= 1, "no send has returned yet");
    proxy.release();
    // Even if the send was tried again, and so the job ran twice: one row, counted once.
    platform.fleet().cloud.wait_for_rows(HELLO, 1).await;
    platform.gateway.idle().await;
    eventually("the counters", SOON, || async {
        let item = platform.fleet().cloud.function_item(HELLO).await;
        if item["invocations"]["N"] == "1" { Ok(()) } else { Err(item.to_string()) }
    })
    .await;
    let id = result["requestId"].as_str().expect("an id");
    eventually("an empty journal", SOON, || async {
        let left = platform.fleet().redis.journaled(id).await;
        if left == 0 { Ok(()) } else { Err(format!("{left} left")) }
    })
    .await;
    platform.finish().await;
}

/// A job that was given up is counted as an error until its worker speaks after all, and then as what it was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_result_replaces_lost() {
    let limits = "[waits]\njob_deadline_s = 4\n[batch]\nsend_deadline_ms = 1000\n";
    let conf = Conf { limits: limits.into(), ..Conf::default() };
    let platform = Setup::serve().no_worker().conf(conf).start().await;
    let (gateway, cloud) = (&platform.gateway, &platform.fleet().cloud);
    // What a node that is long gone has left there.
    let mut item = cloud.function_item(HELLO).await;
    item["posted_00000001"] = json!({ "N": "1" });
    cloud.put_item(&cloud.functions_table, item).await;
    let id = gateway.run_async(HELLO, &json!(1)).await;
    let row = async |status: &str, errors: &str, duration: &str| {
        eventually(&format!("a row that says {status}"), SOON, || async {
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
    gateway.idle().await;

    let result = format!(r#"{{"requestId":"{id}","status":"SUCCESS","stdout":"late","durationMs":12}}"#);
    for _ in 0..2 {
        platform.fleet().redis.publish(&format!("result:{id}"), result.as_bytes()).await;
    }
    row("SUCCESS", "0", "12").await;
    gateway.wait_for_metric(r#"infra_results_total{kind="late"}"#, 1.0).await;
    let item = cloud.function_item(HELLO).await;
    let marks = item.as_object().expect("an item").keys().filter(|name| name.starts_with("posted_"));
    assert_eq!(marks.count(), 1, "only this node's: {item}");
    gateway.wait_for_metric(r#"infra_results_total{kind="unknown_job"}"#, 1.0).await;
    platform.finish().await;
}

/// A publication that Redis lost heals: the stored result is looked up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stored_but_never_published() {
    let platform = Setup::serve().no_worker().start().await;
    let run = platform.gateway.run(HELLO, &json!(1));
    let client = spawn(async move { (run.send().await, Instant::now()) });
    let (_, body) = platform.fleet().cloud.receive().await;
    let message: Value = serde_json::from_str(&body).expect("JSON");
    let id = message["requestId"].as_str().expect("an id");
    let result = format!(r#"{{"requestId":"{id}","stdout":"stored only"}}"#);
    platform.fleet().redis.store_result(id, result.as_bytes()).await;
    let stored_at = Instant::now();
    let (answer, answered_at) = within("the client's answer", SOON, client).await.expect("no panic");
    assert_eq!(answer.expect(200).text(), result);
    let took = answered_at.saturating_duration_since(stored_at);
    assert!(took <= Duration::from_secs(2), "{took:?}");

    // The same for one that nobody waits for, in its own time.
    let id = platform.gateway.run_async(HELLO, &json!(2)).await;
    platform.fleet().redis.store_result(&id, result.as_bytes()).await;
    platform.fleet().cloud.wait_for_rows(HELLO, 2).await;
    platform.finish().await;
}
