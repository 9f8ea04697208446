//! Pages of logs, and recent events.

use crate::changes::next_of;
use crate::harness::aws::{Cloud, Service};
use crate::harness::job::{IdParts, now_ms};
use crate::harness::platform::HELLO;
use crate::harness::{Gateway, SOON, Setup, eventually};
use serde_json::{Value, json};

on_both_backends!(pages_follow_cursors_of_their_own_list);
on_all_workers!(recent_events_have_the_fields_of_the_dashboard);

/// All rows, by following the links from `target`. Adds the lengths of the pages to `lengths`.
async fn walk(gateway: &Gateway, target: &str, lengths: &mut Vec<usize>) -> Vec<Value> {
    let mut rows = Vec::new();
    let mut next = Some(target.to_owned());
    while let Some(target) = next {
        let page = gateway.get(&target).await.expect(200);
        let found = page.json().as_array().expect("an array").clone();
        lengths.push(found.len());
        rows.extend(found);
        next = next_of(&page);
        assert!(lengths.len() < 2_000, "the pages do not end");
    }
    rows
}

fn ids(rows: &[Value]) -> Vec<&str> {
    rows.iter().map(|row| row["requestId"].as_str().expect("an id")).collect()
}

async fn pages_follow_cursors_of_their_own_list(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let other = gateway.upload("other").await;
    for _ in 0..5 {
        gateway.run(HELLO, &json!(1)).send().await.expect(200);
    }
    gateway.run(&other, &json!(1)).send().await.expect(200);
    let path = format!("/api/functions/{HELLO}/logs");
    let all = eventually("five rows", SOON, || async {
        let rows = gateway.get(&path).await.expect(200).json();
        let count = rows.as_array().map_or(0, Vec::len);
        if count == 5 {
            Ok(rows.as_array().cloned().unwrap_or_default())
        } else {
            Err(format!("{count} rows"))
        }
    })
    .await;
    for (query, pages) in [
        ("limit=1", 5),
        ("limit=2", 3),
        ("limit=5", 1),
        ("limit=2&status=SUCCESS&startTime=2020-01-01T00:00:00%2B01:00", 3),
        ("limit=2&startTime=2020-01-01", 3),
        ("limit=5000", 1),
    ] {
        let mut lengths = Vec::new();
        assert_eq!(walk(gateway, &format!("{path}?{query}"), &mut lengths).await, all, "{query}");
        assert_eq!(lengths.len(), pages, "{query}");
    }
    // Only the limit may change between pages.
    let first = gateway.get(&format!("{path}?limit=2&status=SUCCESS")).await.expect(200);
    let next = next_of(&first).expect("a next page");
    assert!(next.starts_with(&format!("{path}?limit=2&status=SUCCESS&cursor=")), "{next}");
    let cursor = next.split("cursor=").nth(1).expect("a cursor");
    // Without the escapes of the link: a modified escape would be another error than a modified cursor.
    let cursor = &cursor.replace("%2D", "-").replace("%5F", "_");
    let rest =
        gateway.get(&format!("{path}?limit=100&status=SUCCESS&cursor={cursor}")).await.expect(200).json();
    assert_eq!(rest.as_array().expect("an array")[..], all[2..]);
    let mut modified = cursor.to_owned();
    modified.replace_range(5..6, if &modified[5..6] == "A" { "B" } else { "A" });
    let foreign = format!("/functions/{other}/logs?status=SUCCESS&cursor={cursor}");
    for target in [
        foreign,
        format!("{path}?cursor={cursor}"),
        format!("{path}?status=FAILED&cursor={cursor}"),
        format!("{path}?status=SUCCESS&startTime=2020-01-01T00:00:00Z&cursor={cursor}"),
        format!("{path}?status=SUCCESS&cursor={modified}"),
        format!("{path}?status=SUCCESS&cursor={}", &cursor[..10]),
        format!("{path}?status=SUCCESS&cursor="),
    ] {
        let refused = gateway.get(&target).await.expect_problem(400);
        assert_eq!(refused.json()["code"], "bad_cursor", "{target}");
    }
    for bad in [
        "limit=2&limit=2",
        "status=",
        "status=%ff",
        "startTime=2026-11-31",
        "startTime=2026-11",
        "endTime=2026-11-22T25:00:00Z",
    ] {
        gateway.get(&format!("{path}?{bad}")).await.expect_problem(400);
    }
    platform.finish().await;
}

/// The dashboard classifies events by text, level and members.
async fn recent_events_have_the_fields_of_the_dashboard(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let id = gateway.upload("x").await;
    let sync = gateway.run(&id, &json!(1)).send().await.expect(200).json()["requestId"].clone();
    let job =
        gateway.run(&id, &json!({ "behave": "fail" })).header("x-async", "true").send().await.expect(202);
    let job = job.json()["jobId"].clone();
    gateway.result_of(job.as_str().expect("an id")).await;
    gateway
        .request("PUT", &format!("/functions/{id}"))
        .json(&json!({ "memory": 256 }))
        .send()
        .await
        .expect(200);
    gateway.request("DELETE", &format!("/functions/{id}")).send().await.expect(200);
    let beat =
        json!({ "workerId": "w-1", "activeJobs": 3.0, "pools": { "python": 2 }, "uptimeSeconds": 1.5 });
    gateway.request("POST", "/worker/heartbeat").json(&beat).send().await.expect(200);
    gateway.anonymous("GET", "/functions").send().await.expect(401);
    gateway.anonymous("GET", "/functions").header("x-api-key", "wrong").send().await.expect(401);

    let run = |id: &Value, mode: &str| {
        let model = "llama3:8b";
        json!({ "requestId": id, "functionId": null, "modelId": model, "mode": mode })
    };
    let of_function = json!({ "functionId": null });
    let refused = json!({ "ip": "127.0.0.1" });
    // The uploaded code does not fail. The Python worker does not run it.
    let failed = if platform.runs_code() { ("INFO", "SUCCESS", 0) } else { ("ERROR", "FAILED", 1) };
    let executed = |id: &Value, status: &str, code: u64| {
        let function = Value::Null;
        json!({ "functionId": function, "requestId": id, "status": status, "exitCode": code })
    };
    let executed_msg = format!("Function Executed: {id}");
    let expected = [
        ("WARN", "Unauthorized access", refused.clone()),
        ("WARN", "Unauthorized access", refused), // one for each of the two requests
        ("INFO", "Heartbeat received from w-1", json!({ "activeJobs": 3, "pools": { "python": 2 } })),
        ("INFO", "Function Deleted", of_function.clone()),
        ("INFO", "Function Updated", of_function.clone()),
        (failed.0, &executed_msg, executed(&job, failed.1, failed.2)),
        ("INFO", "Run Request", run(&job, "ASYNC")),
        ("INFO", &executed_msg, executed(&sync, "SUCCESS", 0)),
        ("INFO", "Run Request", run(&sync, "SYNC")),
        ("INFO", "Upload Success", of_function),
    ];
    // A result may be answered before its event is listed.
    let entries = eventually("all events", SOON, || async {
        let entries: Vec<Value> =
            serde_json::from_slice(gateway.get("/api/logs").await.expect(200).body()).expect("rows");
        if entries.len() == expected.len() { Ok(entries) } else { Err(format!("{entries:#?}")) }
    })
    .await;
    for (level, msg, members) in &expected {
        let is_it = |entry: &&Value| {
            let members = members.as_object().expect("an object").iter();
            let fits = |(name, value): (&String, &Value)| {
                entry[name] == if name == "functionId" { json!(id) } else { value.clone() }
            };
            entry["level"] == *level && entry["msg"] == *msg && members.into_iter().all(fits)
        };
        let entry = entries.iter().find(is_it).unwrap_or_else(|| panic!("{msg} {members} in {entries:#?}"));
        if *msg == executed_msg {
            assert!(entry["duration"].is_number() && entry["memory"].is_u64(), "{entry}");
            assert!(
                entry.get("handlerDurationMs").is_some_and(|ms| ms.is_number() || ms.is_null()),
                "{entry}"
            );
        }
    }
    let times: Vec<&str> = entries.iter().map(|entry| entry["timestamp"].as_str().expect("a time")).collect();
    assert!(times.is_sorted_by(|newer, older| newer >= older), "not newest first: {times:?}");
    let ids: std::collections::HashSet<_> = entries.iter().map(|entry| entry["id"].to_string()).collect();
    assert_eq!(ids.len(), entries.len(), "ids are not unique");
    platform.finish().await;
}

async fn put_all(cloud: &Cloud, rows: &[Value]) {
    for rows in rows.chunks(25) {
        let puts: Vec<Value> = rows.iter().map(|row| json!({ "PutRequest": { "Item": row } })).collect();
        let batch = json!({ "RequestItems": { &cloud.logs_table: puts } });
        cloud.call(Service::DynamoDb, "BatchWriteItem", &batch).await;
    }
}

/// Rows of both controllers, many with the same millisecond, some written twice, some expired.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_rows_are_listed_once_each() {
    let platform = Setup::serve().start().await;
    let cloud = &platform.fleet().cloud;
    let start_ms = now_ms() - 3_600_000;
    let (soon, past) = ((now_ms() / 1000 + 3600).to_string(), (now_ms() / 1000 - 60).to_string());
    let mut live: Vec<(String, String)> = Vec::new();
    let mut rows = Vec::new();
    for n in 0..1_000_u64 {
        // Ten rows share a millisecond. Each seventh row is one of the old controller, with its own
        // millisecond.
        let parts = IdParts { node: (n % 3) as u32, accepted_ms: start_ms + n / 10 * 10, random: n };
        let (key, id) = if n % 7 == 3 {
            let parts = IdParts { accepted_ms: start_ms + n / 10 * 10 + 1 + n % 9, ..parts };
            (parts.timestamp(), format!("67e55044-10b1-426f-9247-{n:012x}"))
        } else {
            (parts.row_key(), format!("job-{n}"))
        };
        let is_expired = (200..260).contains(&n) || n % 11 == 5;
        let mut row = json!({
            "functionId": { "S": HELLO }, "timestamp": { "S": key }, "requestId": { "S": id },
            "status": { "S": "SUCCESS" }, "duration": { "N": "12" }, "memoryMb": { "N": "64" },
            "message": { "S": format!("row {n}") },
            "expiresAt": { "N": if is_expired { &past } else { &soon } },
        });
        if n % 13 == 0 {
            row.as_object_mut().expect("an object").remove("expiresAt");
        }
        if !is_expired || n % 13 == 0 {
            live.push((key, id));
        }
        rows.push(row);
    }
    put_all(cloud, &rows).await;
    let again: Vec<Value> = rows.iter().step_by(5).cloned().collect();
    put_all(cloud, &again).await;
    live.sort();
    live.dedup_by(|one, two| one.0 == two.0);
    assert!(live.len() > 800, "{}", live.len());

    let gateway = &platform.gateway;
    let expected: Vec<&str> = live.iter().rev().map(|(_, id)| id.as_str()).collect();
    for (query, limit) in [("limit=7", 7), ("limit=7&status=SUCCESS", 7), ("limit=1000", 1000)] {
        let mut lengths = Vec::new();
        let found = walk(gateway, &format!("/functions/{HELLO}/logs?{query}"), &mut lengths).await;
        assert_eq!(ids(&found), expected, "{query}");
        assert!(lengths.iter().all(|length| *length <= limit), "{lengths:?}");
        let (_, full) = lengths.split_last().expect("a page");
        assert!(full.iter().all(|length| *length == limit), "a page before the last is short: {lengths:?}");
    }
    // A row of the old controller is found by its id.
    let (_, old) = live.iter().find(|(_, id)| id.starts_with("67e55044")).expect("an old row");
    gateway.get(&format!("/functions/{HELLO}/logs/{old}")).await.expect(200);
    platform.finish().await;
}
