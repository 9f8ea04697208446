//! Functions, their logs, and the rows in the log table.

use crate::harness::http::Request;
use crate::harness::job::IdParts;
use crate::harness::platform::{Backend, HELLO};
use crate::harness::upload::{Part, form, printing, zipped};
use crate::harness::worker::literal;
use crate::harness::{Gateway, SOON, Setup, eventually};
use serde_json::{Value, json};

on_all_workers!(executions_are_listed_and_filtered);
on_both_backends!(
    a_function_is_shown_with_an_etag,
    averages_are_those_of_the_sums,
    long_messages_are_truncated_in_lists,
    a_handler_is_set_at_upload,
    a_handler_is_changed_and_removed,
    invalid_handlers_are_rejected,
);

async fn a_function_is_shown_with_an_etag(setup: Setup) {
    let is_dev = setup.backend == Backend::Dev;
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    for target in ["/functions/hello", "/api/functions/hello"] {
        let answer = gateway.get(target).await.expect(200);
        let etag = answer.need("etag").to_owned();
        assert!(etag.trim_start_matches("W/").starts_with('"') && etag.ends_with('"'), "{etag}");
        let function = answer.json();
        assert_eq!(function["id"], HELLO);
        assert_eq!(function["runtime"], "python");
        for text in ["name", "description", "s3Key", "uploadedAt"] {
            assert!(function[text].is_string(), "{text}: {function}");
        }
        for number in ["memoryMb", "version"] {
            assert!(function[number].is_u64(), "{number}: {function}");
        }
        if !is_dev {
            assert_eq!(function["name"], "the hello");
            assert_eq!(function["memoryMb"], 256);
            assert_eq!(function["uploadedAt"], "2026-01-02T03:04:05.678Z");
        }
        assert_eq!(gateway.get(target).await.need("etag"), etag, "the ETag is stable");
    }
    for unknown in ["no-such-function", "Hello", "a%20b", &"a".repeat(129)] {
        for target in [format!("/functions/{unknown}"), format!("/functions/{unknown}/logs/x")] {
            let answer = gateway.get(&target).await;
            assert!([400, 404].contains(&answer.status), "{target}: {}", answer.status);
            let status = answer.status;
            answer.expect_problem(status);
        }
    }
    gateway.get("/functions/no-such-function").await.expect_problem(404);
    platform.finish().await;
}

/// The first page of the log; `query` starts with `?` or is empty.
async fn page(gateway: &Gateway, query: &str) -> Vec<Value> {
    let answer = gateway.get(&format!("/functions/{HELLO}/logs{query}")).await.expect(200);
    answer.json().as_array().unwrap_or_else(|| panic!("an array: {}", answer.text())).clone()
}

fn ids(rows: &[Value]) -> Vec<&str> {
    rows.iter().map(|row| row["requestId"].as_str().expect("an id")).collect()
}

async fn executions_are_listed_and_filtered(setup: Setup) {
    const COUNT: usize = 5;
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    assert_eq!(page(gateway, "").await, [] as [Value; 0]);
    let mut newest_first = Vec::new();
    for n in 0..COUNT {
        let input = json!({ "text": "x".repeat(500), "end": format!("end-of-{n}") });
        let result = gateway.run(HELLO, &input).send().await.expect(200).json();
        newest_first.insert(0, result["requestId"].as_str().expect("an id").to_owned());
    }
    let rows = eventually("five rows", SOON, || async {
        let rows = page(gateway, "").await;
        if rows.len() == COUNT { Ok(rows) } else { Err(format!("{} rows", rows.len())) }
    })
    .await;
    assert_eq!(ids(&rows), newest_first);
    for row in &rows {
        let id = row["requestId"].as_str().expect("an id");
        assert_eq!(row["timestamp"], *IdParts::of(id).timestamp());
        assert_eq!(row["status"], "SUCCESS");
        assert!(row["id"].is_string() && row["duration"].is_number() && row["memory"].is_number(), "{row}");
        assert!(row.get("handlerDurationMs").is_some_and(|ms| ms.is_number() || ms.is_null()), "{row}");
        let message = row["message"].as_str().expect("a message");
        assert_eq!((message.encode_utf16().count(), &message[200..]), (203, "..."), "{message}");
        assert!(row["duration"].is_u64(), "whole milliseconds: {row}");
    }

    // A single execution has the complete message.
    for (n, id) in newest_first.iter().rev().enumerate() {
        for prefix in ["", "/api"] {
            let detail =
                gateway.get(&format!("{prefix}/functions/{HELLO}/logs/{id}")).await.expect(200).json();
            let message = detail["message"].as_str().expect("a message");
            assert!(message.contains(&format!("end-of-{n}")) && message.len() > 500, "{message}");
            assert_eq!(detail["requestId"], *id);
            assert_eq!(detail["status"], "SUCCESS");
            let capitals = format!("{prefix}/functions/{HELLO}/logs/{}", id.to_uppercase());
            assert_eq!(gateway.get(&capitals).await.expect(200).json(), detail, "ids are case-insensitive");
        }
    }
    for unknown in ["67e55044-10b1-426f-9247-bb680e5fe0c8", "00000000-0000-8000-8000-000000000000", "x"] {
        gateway.get(&format!("/functions/{HELLO}/logs/{unknown}")).await.expect_problem(404);
    }

    check_limit(gateway, &newest_first).await;
    check_bounds(gateway, &rows, &newest_first).await;
    platform.finish().await;
}

/// To 200 UTF-16 units, as clients count, and three dots.
async fn long_messages_are_truncated_in_lists(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let is_dev = !platform.is_serve();
    for (text, times) in [("x", 10), ("x", 500), ("ä", 500), ("😀", 500)] {
        // With and without one more character, so that the limit falls into a surrogate pair once.
        for lead in ["", "y"] {
            let result = gateway.run(HELLO, &json!(format!("{lead}{}", text.repeat(times)))).send().await;
            let result = result.expect(200).json();
            let id = result["requestId"].as_str().expect("an id").to_owned();
            let whole: Vec<u16> = result["stdout"].as_str().expect("stdout").encode_utf16().collect();
            let row = eventually("the row", SOON, || async {
                let rows = page(gateway, "?limit=1").await;
                rows.into_iter().find(|row| row["requestId"] == *id).ok_or_else(|| "not yet".to_owned())
            })
            .await;
            let message = row["message"].as_str().expect("a message");
            if whole.len() <= 200 {
                assert_eq!(message.encode_utf16().collect::<Vec<_>>(), whole);
                continue;
            }
            let kept: Vec<u16> = message.strip_suffix("...").expect("three dots").encode_utf16().collect();
            // Half a surrogate pair is omitted.
            assert!(kept.len() == 200 || (kept.len() == 199 && text == "😀"), "{}: {message}", kept.len());
            assert_eq!(kept, whole[..kept.len()], "{is_dev}");
        }
    }
    platform.finish().await;
}

/// Of functions with and without executions.
async fn averages_are_those_of_the_sums(setup: Setup) {
    let platform = setup.python_worker().start().await;
    let gateway = &platform.gateway;
    let id = gateway.upload("never run").await;
    gateway.run(HELLO, &json!(1)).send().await.expect(200);
    let listed = async |id: &str| {
        let all = gateway.get("/api/functions").await.expect(200).json();
        let found = all.as_array().expect("an array").iter().find(|f| f["functionId"] == *id).cloned();
        found.unwrap_or_else(|| panic!("{id} in {all}"))
    };
    let never = listed(&id).await;
    assert_eq!((&never["avgDuration"], &never["avgHandlerDuration"]), (&json!(0), &Value::Null));
    let ran = eventually("the sums", SOON, || async {
        let ran = listed(HELLO).await;
        if ran["invocations"] == 1 { Ok(ran) } else { Err(ran.to_string()) }
    })
    .await;
    assert!(ran["avgDuration"].is_u64(), "{ran}");
    // A program has no handler.
    let handler = if platform.is_serve() { json!(5) } else { Value::Null };
    assert_eq!(ran["avgHandlerDuration"], handler);
    if platform.is_serve() {
        let cloud = &platform.fleet().cloud;
        let item = json!({ "functionId": { "S": "nameless" }, "s3Key": { "S": "k" },
            "invocations": { "N": "3" }, "totalDuration": { "N": "200" }, "handlerInvocations": { "N": "3" },
            "totalHandlerDuration": { "N": "1" } });
        cloud.put_item(&cloud.functions_table, item).await;
        let old = listed("nameless").await;
        let shown = (&old["name"], &old["avgDuration"], &old["avgHandlerDuration"]);
        assert_eq!(shown, (&json!("Unknown"), &json!(67), &json!(0.333)));
        assert_eq!(gateway.get("/functions/nameless").await.expect(200).json()["name"], "Unknown");
    }
    platform.finish().await;
}

async fn shown(gateway: &Gateway, id: &str) -> Value {
    gateway.get(&format!("/functions/{id}")).await.expect(200).json()
}

/// The id of the function that the upload creates.
async fn uploaded(upload: Request) -> String {
    let made = upload.send().await.expect(200).json();
    made["functionId"].as_str().expect("an id").to_owned()
}

async fn a_handler_is_set_at_upload(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    // (runtime, header field, part of the form, the file of its module, what is shown)
    for (runtime, header, part, file, expected) in [
        ("python", Some("main.handler"), None, "main.py", json!("main.handler")),
        ("python", Some("pkg.mod.fn"), None, "pkg/mod.py", json!("pkg.mod.fn")),
        ("python", None, Some("pkg.fn"), "pkg/__init__.py", json!("pkg.fn")),
        ("python", Some("app.run"), Some("app.run"), "app.py", json!("app.run")),
        ("python", Some("app.run"), Some(""), "app.py", json!("app.run")),
        ("nodejs", Some("index.handler"), None, "index.js", json!("index.handler")),
        ("nodejs", Some("lib.tasks.run"), None, "lib/tasks.mjs", json!("lib.tasks.run")),
        ("nodejs", None, Some("app.run"), "app.cjs", json!("app.run")),
        ("python", None, None, "main.py", Value::Null),
        ("nodejs", Some(""), Some(""), "index.js", Value::Null),
        ("go", Some(""), None, "main.go", Value::Null),
    ] {
        let zip = zipped(&[(file, b"1")]);
        let mut parts = vec![Part::File("code.zip", &zip)];
        parts.extend(part.map(|handler| Part::Field("handler", handler)));
        let mut upload = gateway.request("POST", "/upload").header("x-runtime", runtime);
        if let Some(handler) = header {
            upload = upload.header("x-handler", handler);
        }
        let function = shown(gateway, &uploaded(form(upload, &parts)).await).await;
        let found = (&function["handler"], &function["version"], &function["runtime"]);
        assert_eq!(found, (&expected, &json!(1), &json!(runtime)), "{header:?} {part:?}");
    }
    platform.finish().await;
}

/// Each change has a new version and a new `ETag`. New code must match the handler that it runs with.
async fn a_handler_is_changed_and_removed(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let id = gateway.upload("a handler").await;
    let put = || gateway.request("PUT", &format!("/functions/{id}"));
    let by_form = |parts: &[Part<'_>]| form(put(), parts);
    let (main, app) = (printing("main"), zipped(&[("app.py", b"1")]));
    let (main, app) = (Part::File("main.zip", &main), Part::File("app.zip", &app));
    let handler = |text| Part::Field("handler", text);
    let mut tags = vec![gateway.get(&format!("/functions/{id}")).await.need("etag").to_owned()];
    for (change, expected) in [
        (put().json(&json!({ "handler": "main.handler" })), json!("main.handler")),
        (put().json(&json!({ "memoryMb": 256 })), json!("main.handler")),
        (put().json(&json!({ "handler": "pkg.mod.fn", "memoryMb": 128 })), json!("pkg.mod.fn")),
        (put().json(&json!({ "handler": "" })), Value::Null),
        (by_form(&[handler("main.other")]), json!("main.other")),
        (by_form(&[main]), json!("main.other")),
        (by_form(&[app, handler("app.run")]), json!("app.run")),
        (by_form(&[handler("")]), Value::Null),
    ] {
        let changed = change.send().await.expect(200);
        let tag = changed.need("etag").to_owned();
        assert!(!tags.contains(&tag), "{expected}: {tag} of {tags:?}");
        tags.push(tag);
        let function = shown(gateway, &id).await;
        assert_eq!((&function["handler"], &function["version"]), (&expected, &json!(tags.len())));
    }

    put().json(&json!({ "handler": "app.run" })).send().await.expect(200);
    let before = shown(gateway, &id).await;
    let (main, app) = (printing("main"), zipped(&[("app.py", b"1")]));
    for parts in [
        &[Part::File("main.zip", &main)][..],
        &[Part::File("main.zip", &main), handler("pkg.mod.fn")],
        // In script mode the entry file is needed again.
        &[Part::File("app.zip", &app), handler("")],
    ] {
        let refused = by_form(parts).send().await.expect_problem(400).json();
        assert_eq!(refused["code"], "bad_archive", "{refused}");
    }
    assert_eq!(shown(gateway, &id).await, before);
    platform.finish().await;
}

async fn invalid_handlers_are_rejected(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let functions = gateway.get("/functions").await.expect(200).json();
    let before = gateway.get("/functions/hello").await.expect(200).json();
    let code = zipped(&[("main.py", b"1"), ("index.js", b"1"), ("main.go", b"1"), ("main.cpp", b"1")]);
    let file = || Part::File("code.zip", &code);
    let upload = |runtime: &str| gateway.request("POST", "/upload").header("x-runtime", runtime);
    let long = format!("main.{}", "h".repeat(124));
    for bad in ["main", "main.", ".handler", "a..b", "1.a", "a.1", "a-b.c", "a/b.c", "main.h%C3%A4", &long] {
        let requests = [
            form(upload("python").header("x-handler", bad), &[file()]),
            form(upload("nodejs"), &[file(), Part::Field("handler", bad)]),
            gateway.request("PUT", "/functions/hello").json(&json!({ "handler": bad })),
            form(gateway.request("PUT", "/functions/hello"), &[Part::Field("handler", bad)]),
        ];
        for (n, request) in requests.into_iter().enumerate() {
            let refused = request.send().await.expect_problem(400).json();
            let detail = refused["detail"].as_str().unwrap_or_default();
            assert!(detail.contains("handler` must be two or more identifiers"), "{bad} {n}: {detail}");
            assert_eq!(refused["code"], "invalid_request", "{bad} {n}");
        }
    }
    for (request, code) in [
        (form(upload("python").header("x-handler", "app.run"), &[file()]), "bad_archive"),
        (form(upload("nodejs").header("x-handler", "main.run"), &[file()]), "bad_archive"),
        (form(upload("go").header("x-handler", "main.run"), &[file()]), "invalid_request"),
        (form(upload("cpp"), &[file(), Part::Field("handler", "main.run")]), "invalid_request"),
        (
            form(upload("python").header("x-handler", "main.a"), &[file(), Part::Field("handler", "main.b")]),
            "invalid_request",
        ),
        (gateway.request("PUT", "/functions/hello").json(&json!({ "handler": null })), "invalid_request"),
        (gateway.request("PUT", "/functions/hello").json(&json!({ "handler": ["a.b"] })), "invalid_request"),
    ] {
        let refused = request.send().await.expect_problem(400).json();
        assert_eq!(refused["code"], code, "{refused}");
    }
    let twice = upload("python").header("x-handler", "main.a").header("x-handler", "main.a");
    let refused = form(twice, &[file()]).send().await.expect_problem(400).json();
    assert_eq!(refused["code"], "repeated_field");
    assert_eq!(gateway.get("/functions").await.expect(200).json(), functions, "no function was created");
    assert_eq!(gateway.get("/functions/hello").await.expect(200).json(), before);

    for (runtime, name) in [("go", "main.go"), ("cpp", "main.cpp")] {
        let id = uploaded(form(upload(runtime), &[Part::File("x.zip", &zipped(&[(name, b"1")]))])).await;
        let put = |handler: &str| {
            gateway.request("PUT", &format!("/functions/{id}")).json(&json!({ "handler": handler }))
        };
        let refused = put("main.handler").send().await.expect_problem(400).json();
        assert_eq!(refused["code"], "invalid_request", "{runtime}");
        put("").send().await.expect(200);
    }
    platform.finish().await;
}

/// In the function table, the queue message and the records of changes. Script functions have it nowhere.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handler_is_stored_recorded_and_sent_to_workers() {
    let platform = Setup::serve().no_worker().start().await;
    let gateway = &platform.gateway;
    let cloud = &platform.fleet().cloud;
    let message = async |id: &str| {
        gateway.run_async(id, &json!({})).await;
        cloud.receive().await.1
    };
    // An item of the old controller.
    assert!(!message(HELLO).await.contains("\"handler\""));
    assert_eq!(shown(gateway, HELLO).await["handler"], Value::Null);

    let id = gateway.upload("a handler").await;
    assert!(cloud.function_item(&id).await.get("handler").is_none());
    assert!(!message(&id).await.contains("\"handler\""));
    for (handler, version) in [("main.handler", 2), ("main.other", 3), ("", 4)] {
        let put = gateway.request("PUT", &format!("/functions/{id}"));
        put.json(&json!({ "handler": handler })).send().await.expect(200);
        assert_eq!(cloud.function_item(&id).await["handler"]["S"], handler);
        let body = message(&id).await;
        let sent = format!("\"configVersion\":{version},\"handler\":\"{handler}\",\"traceparent\":");
        assert_eq!(body.contains(&sent), !handler.is_empty(), "{body}");
        assert_eq!(body.contains("\"handler\""), !handler.is_empty(), "{body}");
    }
    let records = cloud.log_rows(&format!("config#{id}")).await;
    let after = |row: &Value| -> Value { serde_json::from_str(text(row, "after")).expect("JSON") };
    let handlers: Vec<Value> = records.iter().map(|row| after(row)["handler"].clone()).collect();
    assert_eq!(handlers, [Value::Null, json!("main.handler"), json!("main.other"), Value::Null]);
    platform.stop().await;
}

async fn check_limit(gateway: &Gateway, newest_first: &[String]) {
    for (limit, count) in [(1, 1), (2, 2), (5, 5), (1000, 5), (1001, 5), (u64::MAX, 5)] {
        let rows = page(gateway, &format!("?limit={limit}")).await;
        assert_eq!(ids(&rows), &newest_first[..count], "limit={limit}");
    }
    for bad in [
        "limit=0",
        "limit=-1",
        "limit=abc",
        "limit=",
        "startTime=yesterday",
        "endTime=",
        &format!("status={}", "a".repeat(65)),
    ] {
        gateway.get(&format!("/functions/{HELLO}/logs?{bad}")).await.expect_problem(400);
    }
}

async fn check_bounds(gateway: &Gateway, rows: &[Value], newest_first: &[String]) {
    let middle = rows[2]["timestamp"].as_str().expect("a time");
    let cases = [
        (format!("?startTime={middle}"), &newest_first[..3]),
        (format!("?endTime={middle}"), &newest_first[3..]),
        (format!("?startTime={middle}&endTime={middle}"), &[][..]),
        // The same instant with another offset.
        (format!("?startTime={}%2B00:00", middle.trim_end_matches('Z')), &newest_first[..3]),
        ("?startTime=2020-01-01T00:00:00Z".to_owned(), newest_first),
        ("?startTime=2020-01-01".to_owned(), newest_first),
        ("?endTime=2020-01-01".to_owned(), &[][..]),
        ("?startTime=1969-12-31&endTime=9999-12-31".to_owned(), newest_first),
        ("?startTime=0001-01-01T00:00:00Z&endTime=9999-12-31T23:59:59Z".to_owned(), newest_first),
        ("?endTime=1969-12-31T23:59:59Z".to_owned(), &[][..]),
        (format!("?status={}", "%C3%A4".repeat(64)), &[][..]),
        ("?endTime=2020-01-01T01:00:00%2B01:00".to_owned(), &[][..]),
        ("?status=SUCCESS".to_owned(), newest_first),
        ("?status=FAILED".to_owned(), &[][..]),
        (format!("?status=SUCCESS&startTime={middle}&limit=2"), &newest_first[..2]),
    ];
    for (query, expected) in cases {
        let found = page(gateway, &query).await;
        assert_eq!(ids(&found), expected, "{query}");
    }
}

fn text<'a>(row: &'a Value, name: &str) -> &'a str {
    row[name]["S"].as_str().unwrap_or_else(|| panic!("{name} in {row}"))
}

fn number(row: &Value, name: &str) -> f64 {
    let number = row[name]["N"].as_str().and_then(|n| n.parse().ok());
    number.unwrap_or_else(|| panic!("{name} in {row}"))
}

/// A result with member names in snake case, which are read, too.
const SNAKE_CASE: &str = r#"{"exitCode":0,"stdout":"o","stderr":"","duration_ms":11,"handler_duration_ms":2,
    "peak_memory_bytes":1572864}"#;

/// Key, mapping, expiry and truncation of rows, and the sums of the counters.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_and_counters_match_the_results() {
    let platform = Setup::serve().python_worker().start().await;
    let gateway = &platform.gateway;
    let cloud = &platform.fleet().cloud;
    // (input, expected status, part of the message)
    let long = json!({ "behave": "stdout", "text": "ä€😀", "times": 100_000 });
    let cases = [
        (json!({ "token": "plain" }), "SUCCESS", "plain"),
        (json!({ "behave": "fail", "token": "broken" }), "FAILED", "broken"),
        (json!({ "behave": "no_status" }), "ERROR", "no_status"),
        (literal("not json"), "ERROR", ""),
        (literal(SNAKE_CASE), "SUCCESS", "o"),
        (long, "SUCCESS", "ä€😀ä€😀"),
    ];
    let mut jobs = Vec::new();
    for (input, status, message) in &cases {
        jobs.push((gateway.run_async(HELLO, input).await, *status, *message));
    }
    let rows = cloud.wait_for_rows(HELLO, cases.len()).await;
    let mut duration = 0.0;
    let mut handler = (0, 0.0);
    for (id, status, message) in &jobs {
        let row =
            rows.iter().find(|row| text(row, "requestId") == id).unwrap_or_else(|| panic!("no row of {id}"));
        let parts = IdParts::of(id);
        assert_eq!(text(row, "timestamp"), parts.row_key());
        assert_eq!((text(row, "functionId"), text(row, "status")), (HELLO, *status), "{id}");
        assert!(text(row, "message").contains(message), "{row}");
        assert!(text(row, "message").len() < 400 * 1024, "too many bytes");
        let month = 30.0 * 86_400.0;
        #[expect(clippy::cast_precision_loss, reason = "seconds since 1970 fit a float")]
        let accepted_s = (parts.accepted_ms / 1000) as f64;
        let kept = number(row, "expiresAt") - accepted_s;
        assert!((month - 60.0..=month + 600.0).contains(&kept), "{kept}");
        duration += number(row, "duration");
        if row.get("handlerDurationMs").is_some() {
            handler = (handler.0 + 1, handler.1 + number(row, "handlerDurationMs"));
        }
    }
    let last = rows.iter().find(|row| text(row, "requestId") == jobs[5].0).expect("checked above");
    assert!(text(last, "message").contains("cut"), "no note of the truncation");
    let snake_case = rows.iter().find(|row| text(row, "requestId") == jobs[4].0).expect("checked above");
    let numbers = ["duration", "handlerDurationMs", "memoryMb"].map(|name| number(snake_case, name));
    assert_eq!(numbers, [11.0, 2.0, 2.0], "1.5 MiB are rounded to 2");

    eventually("the counters", SOON, || async {
        let item = cloud.function_item(HELLO).await;
        let expected = [
            ("invocations", 6.0),
            ("totalDuration", duration),
            ("handlerInvocations", f64::from(handler.0)),
            ("totalHandlerDuration", handler.1),
        ];
        let is_equal = |(name, sum): &(&str, f64)| item[*name].is_object() && number(&item, name) == *sum;
        if expected.iter().all(is_equal) { Ok(()) } else { Err(format!("{item}, not {expected:?}")) }
    })
    .await;
    platform.finish().await;
}

/// Rows of the old controller are listed and found. Expired rows are not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_of_the_old_controller_are_listed_and_found() {
    let platform = Setup::serve().start().await;
    let gateway = &platform.gateway;
    let cloud = &platform.fleet().cloud;
    let row = |timestamp: &str, id: &str, expires: Option<&str>| {
        let mut row = json!({
            "functionId": { "S": HELLO }, "timestamp": { "S": timestamp }, "requestId": { "S": id },
            "status": { "S": "SUCCESS" }, "duration": { "N": "12" }, "memoryMb": { "N": "64" },
            "message": { "S": "an old row" },
        });
        if let Some(expires) = expires {
            row["expiresAt"] = json!({ "N": expires });
        }
        row
    };
    let old = "67e55044-10b1-426f-9247-bb680e5fe0c8";
    let expired = "9b2c1f7e-0c8e-4f7a-8f6e-1d2c3b4a5968";
    cloud.put_item(&cloud.logs_table, row("2026-01-02T03:04:05.678Z", old, None)).await;
    cloud.put_item(&cloud.logs_table, row("2026-01-02T03:04:05.679Z", expired, Some("1767323046"))).await;
    let new = gateway.run_async(HELLO, &json!(1)).await;
    cloud.wait_for_rows(HELLO, 3).await;
    let rows = page(gateway, "").await;
    assert_eq!(ids(&rows), [new.as_str(), old]);
    assert_eq!(rows[1]["timestamp"], "2026-01-02T03:04:05.678Z");
    assert_eq!((&rows[1]["duration"], &rows[1]["memory"]), (&json!(12), &json!(64)));
    let detail = gateway.get(&format!("/functions/{HELLO}/logs/{old}")).await.expect(200).json();
    assert_eq!(detail["message"], "an old row");
    let capitals = format!("/functions/{HELLO}/logs/{}", old.to_uppercase());
    assert_eq!(gateway.get(&capitals).await.expect(200).json(), detail);
    gateway.get(&format!("/functions/{HELLO}/logs/{expired}")).await.expect_problem(404);
    platform.finish().await;
}
