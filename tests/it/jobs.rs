//! `GET /jobs/:id`: the lives of jobs.

use crate::harness::conf_lines::key_lines;
use crate::harness::gateway::{Conf, Gateway};
use crate::harness::http::Answer;
use crate::harness::job::IdParts;
use crate::harness::platform::HELLO;
use crate::harness::{SOON, Setup, eventually};
use serde_json::{Value, json};

on_both_backends!(
    a_job_is_shown_in_flight_and_at_its_end,
    unknown_jobs_are_not_shown,
    keys_see_the_jobs_of_their_functions,
);

const TRACEPARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

fn code(answer: &Answer) -> String {
    answer.json()["code"].as_str().unwrap_or_default().to_owned()
}

/// Waits for the row of a job, and returns the life that it tells.
async fn written(gateway: &Gateway, id: &str, function: &str) -> Value {
    let target = format!("/jobs/{id}?functionId={function}");
    eventually(&format!("the row of {id}"), 3 * SOON, || async {
        let life = gateway.get(&target).await.expect(200).json();
        if life["times"]["rowWritten"].is_string() { Ok(life) } else { Err(life.to_string()) }
    })
    .await
}

/// Times of one node are in order as text.
fn assert_in_order(times: &Value, steps: &[&str]) {
    let texts: Vec<&str> =
        steps.iter().map(|step| times[step].as_str().unwrap_or_else(|| panic!("{step}: {times}"))).collect();
    assert!(texts.is_sorted(), "{times}");
}

async fn a_job_is_shown_in_flight_and_at_its_end(setup: Setup) {
    let server = "[cost]\ngb_second = 2\n".to_owned();
    let platform = setup.conf(Conf { server, ..Conf::default() }).start().await;
    let gateway = &platform.gateway;
    let hold = platform.hold().await;
    let run = gateway.run(&hold.function, &hold.input("x"));
    let accepted = run.header("x-async", "true").header("traceparent", TRACEPARENT).send().await.expect(202);
    let id = accepted.json()["jobId"].as_str().expect("a job id").to_owned();
    hold.wait_for_runs(1).await;
    let parts = IdParts::of(&id);
    for target in
        [format!("/jobs/{id}"), format!("/api/jobs/{}?functionId={}", id.to_uppercase(), hold.function)]
    {
        let life = gateway.get(&target).await.expect(200).json();
        for (member, expected) in [
            ("requestId", json!(id)),
            ("functionId", json!(hold.function)),
            ("status", json!("pending")),
            ("node", json!(format!("{:08x}", parts.node))),
            ("traceId", json!("0af7651916cd43dd8448eb211c80319c")),
        ] {
            assert_eq!(life[member], expected, "{member}: {life}");
        }
        assert_eq!(life["times"]["accepted"], parts.timestamp());
        assert_in_order(&life["times"], &["accepted", "sent", "confirmed"]);
        assert!(life["key"].is_string() && life["memoryMb"].is_u64() && life["version"].is_u64(), "{life}");
        assert!(life["deadline"].is_string() && life.get("cost").is_none(), "{life}");
    }
    gateway.request("HEAD", &format!("/jobs/{id}")).send().await.expect(200);
    hold.release();
    gateway.result_of(&id).await;

    let life = written(gateway, &id, &hold.function).await;
    assert_eq!((&life["status"], &life["exitCode"]), (&json!("SUCCESS"), &json!(0)), "{life}");
    assert_in_order(&life["times"], &["accepted", "sent", "confirmed", "resultHeard", "rowWritten"]);
    assert!(life["workerId"].is_string() && life.get("adopter").is_none(), "{life}");
    let figure = |member: &str| life[member].as_f64().unwrap_or_else(|| panic!("{member}: {life}"));
    let expected = figure("memoryMb") / 1024.0 * figure("durationMs") / 1000.0 * 2.0;
    assert!((figure("cost") - expected).abs() < 1e-9, "{expected}: {life}");
    assert_eq!(gateway.get(&format!("/jobs/{id}")).await.expect(200).json(), life, "the result is stored");
    platform.finish().await;
}

async fn unknown_jobs_are_not_shown(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let id = gateway.run_async(HELLO, &json!(1)).await;
    gateway.result_of(&id).await;
    written(gateway, &id, HELLO).await;
    let node = &id[..8];
    let never = format!("{node}-0000-8000-8000-000000000000");
    for unknown in [never.as_str(), "67e55044-10b1-426f-9247-bb680e5fe0c8"] {
        let alone = gateway.get(&format!("/jobs/{unknown}")).await.expect_problem(404);
        assert_eq!(code(&alone), "function_needed", "{unknown}");
        let with_function = gateway.get(&format!("/jobs/{unknown}?functionId={HELLO}")).await;
        assert_eq!(code(&with_function.expect_problem(404)), "no_such_job", "{unknown}");
    }
    for (target, status, expected) in [
        (format!("/jobs/{id}?functionId=other"), 404, "no_such_job"),
        (format!("/jobs/{id}?functionId=no/id"), 404, "no_such_job"),
        ("/jobs/garbage".to_owned(), 404, "no_such_job"),
        (format!("/jobs/{id}?functionId=a&functionId=b"), 400, "invalid_request"),
    ] {
        let answer = gateway.get(&target).await.expect_problem(status);
        assert_eq!(code(&answer), expected, "{target}");
    }
    platform.finish().await;
}

async fn keys_see_the_jobs_of_their_functions(setup: Setup) {
    let keys = [
        key_lines("reader", "key-reader", &["read"]),
        key_lines("runner", "key-runner", &["run"]),
        key_lines("writer", "key-writer", &["write"]),
        format!("{}functions = [{HELLO:?}]\n", key_lines("own", "key-own", &["run"])),
        format!("{}functions = [\"other\"]\n", key_lines("other", "key-other", &["run", "read"])),
    ];
    let platform = setup.conf(Conf { keys: keys.concat(), ..Conf::default() }).start().await;
    let gateway = &platform.gateway;
    let run = gateway.anonymous("POST", "/run").header("x-api-key", "key-own").header("x-async", "true");
    let accepted = run.json(&json!({ "functionId": HELLO })).send().await.expect(202);
    let id = accepted.json()["jobId"].as_str().expect("a job id").to_owned();
    gateway.result_of(&id).await;
    assert_eq!(written(gateway, &id, HELLO).await["key"], "own");
    let (alone, with_function) = (format!("/jobs/{id}"), format!("/jobs/{id}?functionId={HELLO}"));
    for (key, target, status, expected) in [
        ("key-reader", &alone, 200, ""),
        ("key-runner", &alone, 200, ""),
        ("key-own", &with_function, 200, ""),
        ("key-writer", &alone, 403, "forbidden"),
        ("key-other", &alone, 404, "function_needed"),
        ("key-other", &with_function, 404, "no_such_job"),
        ("key-unknown", &alone, 401, "unauthorized"),
    ] {
        let answer = gateway.anonymous("GET", target).header("x-api-key", key).send().await;
        assert_eq!(answer.status, status, "{key}: {}", answer.text());
        if status != 200 {
            assert_eq!(code(&answer), expected, "{key}");
        }
    }
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_row_of_a_job_is_found_by_its_function_after_its_result_has_expired() {
    let platform = Setup::serve().start().await;
    let gateway = &platform.gateway;
    let id = gateway.run_async(HELLO, &json!(1)).await;
    gateway.result_of(&id).await;
    let life = written(gateway, &id, HELLO).await;
    // Another node has no recent result.
    let other = platform.fleet().start_gateway().await;
    assert_eq!(other.get(&format!("/jobs/{id}")).await.expect(200).json(), life);
    platform.fleet().redis.command(&[b"DEL", format!("job:{id}").as_bytes()]).await;
    let alone = other.get(&format!("/jobs/{id}")).await.expect_problem(404);
    assert_eq!(code(&alone), "function_needed");
    assert_eq!(other.get(&format!("/jobs/{id}?functionId={HELLO}")).await.expect(200).json(), life);
    let rows = platform.fleet().cloud.wait_for_rows(HELLO, 1).await;
    for attribute in
        ["sentAt", "confirmedAt", "writtenAt", "workerId", "keyName", "configVersion", "exitCode"]
    {
        assert!(rows[0][attribute].is_object(), "{attribute}: {}", rows[0]);
    }
    assert!(rows[0]["endedBy"].is_null() && rows[0]["traceId"].is_null(), "{}", rows[0]);
    other.finish().await;
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_in_flight_is_shown_by_another_node() {
    let platform = Setup::serve().start().await;
    let other = platform.fleet().start_gateway().await;
    let hold = platform.hold().await;
    let id = platform.gateway.run_async(&hold.function, &hold.input("x")).await;
    hold.wait_for_runs(1).await;
    let life = other.get(&format!("/jobs/{id}")).await.expect(200).json();
    let parts = IdParts::of(&id);
    assert_eq!((&life["status"], &life["functionId"]), (&json!("pending"), &json!(hold.function)), "{life}");
    assert_eq!(life["node"], format!("{:08x}", parts.node));
    assert_eq!(life["times"], json!({ "accepted": parts.timestamp() }));
    assert!(life["deadline"].is_string(), "{life}");
    hold.release();
    platform.gateway.result_of(&id).await;
    written(&other, &id, &hold.function).await;
    other.finish().await;
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_of_the_old_controller_are_shown() {
    let platform = Setup::serve().no_worker().start().await;
    let id = "67e55044-10b1-426f-9247-bb680e5fe0c8";
    let result = json!({ "requestId": id, "functionId": HELLO, "status": "SUCCESS", "durationMs": 12 });
    platform.fleet().redis.store_result(id, result.to_string().as_bytes()).await;
    let get = async |target: &str| platform.gateway.get(target).await.expect(200).json();
    let without_row = get(&format!("/jobs/{}", id.to_uppercase())).await;
    assert_eq!(without_row["requestId"], id, "{without_row}");
    assert_eq!((&without_row["status"], &without_row["durationMs"]), (&json!("SUCCESS"), &json!(12)));
    assert_eq!((without_row.get("node"), &without_row["times"]), (None, &json!({})));
    let row = json!({
        "functionId": { "S": HELLO }, "timestamp": { "S": "2024-01-02T03:04:05.678Z" },
        "requestId": { "S": id }, "status": { "S": "SUCCESS" }, "duration": { "N": "12" },
    });
    let cloud = &platform.fleet().cloud;
    cloud.put_item(&cloud.logs_table, row).await;
    let life = get(&format!("/jobs/{id}?functionId={HELLO}")).await;
    assert_eq!(life["times"], json!({ "accepted": "2024-01-02T03:04:05.678Z" }), "{life}");
    platform.finish().await;
}
