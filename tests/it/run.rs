//! `POST /run`: accepted and rejected requests, and messages on the queue.

use crate::harness::aws::Service;
use crate::harness::gateway::{Conf, is_pending};
use crate::harness::http::{Answer, Conn, Request};
use crate::harness::job::IdParts;
use crate::harness::platform::{Backend, HELLO};
use crate::harness::{Platform, SOON, Setup, within};
use serde_json::value::RawValue;
use serde_json::{Value, json};
use std::collections::BTreeMap;

on_both_backends!(invalid_bodies_are_rejected, requests_without_a_valid_key_are_401);
on_all_workers!(
    runs_are_synchronous_or_asynchronous_on_request,
    a_wait_that_ends_is_answered_202,
    any_json_input_is_accepted,
    oversized_bodies_are_413,
);

/// Asserts that the output of the run contains the token. Returns the result.
#[track_caller]
fn assert_printed(answer: &Answer, token: &str) -> Value {
    let result = answer.json();
    assert_eq!(result["status"], "SUCCESS", "{result}");
    assert!(result["stdout"].as_str().is_some_and(|printed| printed.contains(token)), "{token}: {result}");
    result
}

async fn runs_are_synchronous_or_asynchronous_on_request(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let mut nodes = Vec::new();
    for prefix in ["", "/api"] {
        let token = format!("sync-token{}", prefix.len());
        let body = json!({ "functionId": HELLO, "inputData": { "token": token } });
        let run = |body: &Value| gateway.request("POST", &format!("{prefix}/run")).json(body);
        let answer = run(&body).send().await.expect(200);
        assert!(answer.need("content-type").starts_with("application/json"));
        assert_eq!(answer.need("content-length"), answer.body().len().to_string());
        let result = assert_printed(&answer, &token);
        nodes.push(IdParts::of(result["requestId"].as_str().expect("an id")).node);

        for (header, value) in
            [("x-async", "true"), ("prefer", "respond-async"), ("Prefer", "foo, respond-async")]
        {
            let token = format!("async-token-{}{}", value.len(), prefix.len());
            let body = json!({ "functionId": HELLO, "inputData": { "token": token } });
            let accepted = run(&body).header(header, value).send().await.expect(202);
            let id = accepted.json()["jobId"].as_str().expect("an id").to_owned();
            assert_eq!(accepted.json()["status"], "ACCEPTED");
            assert_eq!(accepted.need("location"), format!("{prefix}/status/{id}"));
            nodes.push(IdParts::of(&id).node);
            // The job is pending, or has ended already.
            let now = gateway.get(&format!("{prefix}/status/{id}")).await.expect(200).json();
            assert!(
                now["status"] == "pending" && now["message"].is_string() || now["stdout"].is_string(),
                "{now}"
            );
            let result = assert_printed(&gateway.result_of(&id).await, &token);
            assert_eq!(result["requestId"], *id);
            // The result can be read again.
            assert_printed(&gateway.get(&format!("{prefix}/status/{id}")).await, &token);
        }
    }
    assert!(nodes.iter().all(|&node| node == nodes[0]), "every id names the node that waits: {nodes:x?}");
    platform.finish().await;
}

/// `Location` has the prefix that the client has used.
async fn a_wait_that_ends_is_answered_202(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    for prefix in ["", "/api"] {
        // With an idempotency key the answer has another code path.
        for key in [None, Some(format!("wait-{}", prefix.len()))] {
            let hold = platform.hold().await;
            let body = json!({ "functionId": hold.function, "inputData": hold.input("slow") });
            let run = gateway.request("POST", &format!("{prefix}/run")).json(&body);
            let run = if let Some(key) = &key { run.header("idempotency-key", key) } else { run };
            let answer = run.clone().header("prefer", "wait=0").send().await.expect(202);
            let timeout = answer.json();
            assert_eq!(timeout["status"], "TIMEOUT");
            let id = timeout["jobId"].as_str().expect("an id");
            assert_eq!(answer.need("location"), format!("{prefix}/status/{id}"));
            assert!(is_pending(&gateway.get(answer.need("location")).await.expect(200)), "the job has ended");
            hold.release();
            gateway.result_of(id).await;
            if key.is_some() {
                let again = run.header("x-async", "true").send().await.expect(202);
                assert_eq!(again.need("location"), format!("{prefix}/status/{id}"));
            }
            let entries = gateway.get("/logs").await.expect(200).json();
            let entries = entries.as_array().expect("an array");
            let is_it = |entry: &&Value| entry["msg"] == "Sync Wait Timed Out" && entry["requestId"] == *id;
            let entry = entries.iter().find(is_it).unwrap_or_else(|| panic!("{id} in {entries:?}"));
            assert_eq!(entry["level"], "WARN");
        }
    }
    platform.finish().await;
}

async fn invalid_bodies_are_rejected(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let nested =
        |n: usize| format!(r#"{{"functionId":"hello","inputData":{}{}}}"#, "[".repeat(n), "]".repeat(n));
    let long_id = format!(r#"{{"functionId":"{}"}}"#, "a".repeat(129));
    let cases: [(u16, &[u8]); 29] = [
        (400, b""),
        (400, b"{"),
        (400, b"[]"),
        (400, b"1"),
        (400, b"null"),
        (400, b"{}"),
        (400, b"nonsense"),
        (400, br#"{"functionId":"hello"} x"#),
        (400, b"{\"functionId\":\"hello\",\"inputData\":\"\xff\"}"),
        (400, br#"{"functionId":null}"#),
        (400, br#"{"functionId":7}"#),
        (400, br#"{"functionId":["hello"]}"#),
        (400, br#"{"functionId":""}"#),
        (400, br#"{"functionId":"../hello"}"#),
        (400, br#"{"functionId":"-hello"}"#),
        (400, br#"{"functionId":"config#hello"}"#),
        (400, br#"{"functionId":"he\u0000llo"}"#),
        (400, long_id.as_bytes()),
        (400, br#"{"functionId":"hello","functionId":"hello"}"#),
        (400, br#"{"functionId":"hello","inputData":1,"inputData":1}"#),
        (400, br#"{"functionId":"hello","other":1,"other":2}"#),
        (400, br#"{"functionId":"hello","\u0066unctionId":"hello"}"#),
        (400, br#"{"functionId":"hello","inputData":"\ud800"}"#),
        (400, br#"{"functionId":"hello","inputData":{"\udc00":1}}"#),
        (400, br#"{"functionId":"hello","inputData":"\ud800\ud800"}"#),
        (400, &nested(129).into_bytes()),
        (400, &nested(20_000).into_bytes()),
        (404, br#"{"functionId":"no-such-function"}"#),
        (404, br#"{"functionId":"Hello"}"#),
    ];
    for (status, body) in cases {
        for prefix in ["", "/api"] {
            let run = gateway.request("POST", &format!("{prefix}/run"));
            let shown = String::from_utf8_lossy(&body[..body.len().min(60)]).into_owned();
            let answer = run.body("application/json", body).send().await;
            assert_eq!(answer.status, status, "{shown}: {}", answer.text());
            answer.expect_problem(status);
        }
    }
    let body = r#"{"functionId":"hello"}"#;
    for mime in ["text/plain", "application/xml", "multipart/form-data; boundary=x", "application/jsonx"] {
        gateway.request("POST", "/run").body(mime, body).send().await.expect_problem(415);
    }
    for mime in ["application/json; charset=utf-8", "Application/JSON"] {
        let run = gateway.request("POST", "/run").body(mime, body);
        run.send().await.expect(200);
    }
    platform.finish().await;
}

async fn any_json_input_is_accepted(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let deep = format!("{}{}", "[".repeat(128), "]".repeat(128));
    // Above 100 KiB `dev` passes the payload in a file.
    let large = format!(r#"{{"text":"{}","end":"the-end"}}"#, "x".repeat(150_000));
    for (input, printed) in [
        ("0", "0"),
        ("false", "false"),
        ("null", "{}"),
        ("[null]", "[null]"),
        (r#""""#, ""),
        (r#"{"a":[1,{"b":null}]}"#, "b"),
        (r#""\ud83d\ude00 ok""#, "ok"),
        (&deep, "[[["),
        (&large, "the-end"),
    ] {
        let body = format!(r#"{{"ignored":[{{}}],"inputData":{input},"functionId":"hello"}}"#);
        let run = gateway.request("POST", "/run").body("application/json", body);
        let answer = run.send().await.expect(200);
        // Member by member: the value of a handler is nested too deeply for a parser of the whole.
        let members: BTreeMap<&str, &RawValue> = serde_json::from_slice(answer.body()).expect("an object");
        let text = |name: &str| serde_json::from_str::<String>(members[name].get()).expect("a text");
        assert_eq!(text("status"), "SUCCESS", "{printed}");
        assert!(text("stdout").contains(printed), "{printed}");
    }
    // No input is an empty object: handlers call `event.get`.
    for none in ["", r#","inputData":null"#, r#","inputData" : null "#] {
        let body = format!(r#"{{"functionId":"hello"{none}}}"#);
        let run = gateway.request("POST", "/run").body("application/json", body);
        let result = assert_printed(&run.send().await.expect(200), "{}");
        let printed = result["stdout"].as_str().unwrap_or_default();
        assert!(!printed.contains("null") && !printed.contains("None"), "{none}: {printed}");
    }
    let no_input = gateway.request("POST", "/run").body("application/json", r#"{"functionId":"hello"}"#);
    assert_printed(&no_input.send().await.expect(200), "{}");
    platform.finish().await;
}

async fn oversized_bodies_are_413(setup: Setup) {
    let is_dev = setup.backend == Backend::Dev;
    // 64 KiB for the queue of this test. The limit of `dev` is the maximum of SQS, 1 MiB.
    let platform = setup.queue_attribute("MaximumMessageSize", "65536").start().await;
    let gateway = &platform.gateway;
    let limit = if is_dev { 1 << 20 } else { 1 << 16 };
    let of_size = |bytes: usize| gateway.run(HELLO, &json!({ "text": "x".repeat(bytes), "end": "the-end" }));
    assert_printed(&of_size(limit - 4096).send().await.expect(200), "the-end");
    // The body fits, but the message around it does not.
    of_size(limit - 100).send().await.expect_problem(413);
    of_size(limit + 1).send().await.expect_problem(413);
    of_size(3 << 20).send().await.expect_problem(413);

    // A declared length is rejected before the body is sent.
    let head = gateway
        .request("POST", "/run")
        .header("content-type", "application/json")
        .header("content-length", "1000000000");
    head_only(&head).await.expect_problem(413);

    // Chunks have no declared total.
    let mut conn = Conn::open(gateway.addr()).await.expect("the gateway accepts connections");
    let chunked = gateway
        .request("POST", "/run")
        .header("content-type", "application/json")
        .header("transfer-encoding", "chunked");
    conn.write(&chunked.to_bytes()).await.expect("the gateway reads");
    let chunk = format!("10000\r\n{}\r\n", "x".repeat(0x10000));
    for _ in 0..40 {
        // The gateway may have answered and closed the connection.
        if conn.write(chunk.as_bytes()).await.is_err() {
            break;
        }
    }
    conn.answer(false).await.expect("an answer").expect_problem(413);
    platform.finish().await;
}

/// The answer to a request whose body never arrives.
async fn head_only(request: &Request) -> Answer {
    let mut conn = Conn::open(request.addr()).await.expect("the gateway accepts connections");
    conn.write(&request.to_bytes()).await.expect("the gateway reads");
    within("an answer to the head alone", SOON, conn.answer(false)).await.expect("an answer")
}

async fn requests_without_a_valid_key_are_401(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let key = gateway.key();
    let shorter = &key[..key.len() - 1];
    let longer = format!("{key}x");
    let routes = [
        ("POST", "/run"),
        ("GET", "/status/x"),
        ("GET", "/functions/hello"),
        ("GET", "/functions/hello/logs"),
    ];
    for (method, route) in routes {
        for prefix in ["", "/api"] {
            let target = format!("{prefix}{route}");
            for wrong in
                [None, Some(""), Some("wrong"), Some(shorter), Some(&longer), Some(&key.to_uppercase())]
            {
                let mut request = gateway.anonymous(method, &target);
                if let Some(wrong) = wrong {
                    request = request.header("x-api-key", wrong);
                }
                request.send().await.expect_problem(401);
            }
        }
    }
    // The key is checked before the body is read: the body never arrives.
    for framing in [("content-length", "1000"), ("transfer-encoding", "chunked")] {
        let head = gateway.anonymous("POST", "/run").header("content-type", "application/json");
        head_only(&head.header(framing.0, framing.1)).await.expect_problem(401);
    }
    for open in ["/health", "/livez", "/readyz", "/metrics", "/"] {
        gateway.anonymous("GET", open).send().await.expect(200);
        if open != "/" {
            gateway.anonymous("GET", &format!("/api{open}")).send().await.expect(200);
        }
    }
    platform.finish().await;
}

/// Starts a run, and receives its message from the queue: (attributes, body).
async fn message_of(platform: &Platform, body: &str) -> (Value, String) {
    let run = platform.gateway.request("POST", "/run").header("x-async", "true");
    run.body("application/json", body).send().await.expect(202);
    platform.fleet().cloud.receive().await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_have_the_members_that_workers_read() {
    let platform = Setup::serve().no_worker().start().await;
    let cloud = &platform.fleet().cloud;
    let (_, body) =
        message_of(&platform, r#"{"functionId":"hello","inputData":{"a":1},"modelId":"m"}"#).await;
    let message: Value = serde_json::from_str(&body).expect("JSON");
    let id = IdParts::of(message["requestId"].as_str().expect("an id"));
    assert_eq!(message["acceptedAt"], *id.timestamp());
    for (member, expected) in [
        ("functionId", json!("hello")),
        ("runtime", json!("python")),
        ("memoryMb", json!(256)),
        ("s3Bucket", json!(cloud.bucket)),
        ("s3Key", json!("functions/hello.zip")),
        ("timeoutMs", json!(300_000)),
        ("input", json!({ "a": 1 })),
        ("modelId", json!("m")),
        ("envVars", json!({ "GREETING": "hi" })),
    ] {
        assert_eq!(message[member], expected, "{member}");
    }
    for member in ["acceptedAt", "deadline", "configVersion", "traceparent"] {
        assert!(!message[member].is_null(), "{member} in {message}");
    }
    // The deadline is the acceptance plus the retention of the queue: an hour here.
    let hour_later = IdParts { accepted_ms: id.accepted_ms + 3_600_000, ..id };
    assert_eq!(message["deadline"], *hour_later.timestamp());

    // An item with only its key, as the first controller wrote it.
    cloud.put_item(&cloud.functions_table, json!({ "functionId": { "S": "bare" } })).await;
    let (_, body) = message_of(&platform, r#"{"functionId":"bare"}"#).await;
    let message: Value = serde_json::from_str(&body).expect("JSON");
    for (member, expected) in [
        ("runtime", json!("python")),
        ("memoryMb", json!(128)),
        ("timeoutMs", json!(300_000)),
        ("input", json!({})),
        ("modelId", json!("llama3:8b")),
        ("envVars", json!({})),
    ] {
        assert_eq!(message[member], expected, "{member}");
    }
    platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn input_is_passed_byte_for_byte() {
    let platform = Setup::serve().no_worker().start().await;
    for input in [
        "0",
        "[null]",
        "-0.0",
        "1e400",
        "12345678901234567890123",
        "{\"a\":1, \"a\" : 2}",
        "[ 1.0,\t2 ]",
        r#""\u0041\/\ud83d\ude00é😀""#,
    ] {
        let (_, body) =
            message_of(&platform, &format!(r#"{{"functionId":"hello","inputData": {input} }}"#)).await;
        assert!(body.contains(&format!(r#""input":{input},"#)), "{input} in {body}");
    }
    // No input is an empty object, as with the old controller: handlers call `event.get`.
    for none in ["", r#","inputData":null"#, r#","inputData" : null "#] {
        let (_, body) = message_of(&platform, &format!(r#"{{"functionId":"hello"{none}}}"#)).await;
        assert!(body.contains(r#""input":{},"#), "{none:?} in {body}");
    }
    // SQS rejects these two characters, so they are escaped.
    let (_, body) =
        message_of(&platform, "{\"functionId\":\"hello\",\"inputData\":\"a\u{FFFE}b\u{FFFF}\"}").await;
    assert!(body.contains(r#""input":"a\uFFFEb\uFFFF","#), "{body}");
    platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fifo_queue_gets_group_and_deduplication_id() {
    let platform = Setup::serve().queue_attribute("FifoQueue", "true").no_worker().start().await;
    let (attributes, body) = message_of(&platform, r#"{"functionId":"hello"}"#).await;
    let message: Value = serde_json::from_str(&body).expect("JSON");
    assert_eq!(attributes["MessageGroupId"], "hello");
    assert_eq!(attributes["MessageDeduplicationId"], message["requestId"]);
    platform.stop().await;
}

/// No 202 and no 200 for a job that is not on the queue.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deleted_queue_is_a_503() {
    let limits = "[batch]\nsend_deadline_ms = 2000\n".into();
    let platform = Setup::serve().no_worker().conf(Conf { limits, ..Conf::default() }).start().await;
    let cloud = &platform.fleet().cloud;
    cloud.call(Service::Sqs, "DeleteQueue", &json!({ "QueueUrl": cloud.queue_url })).await;
    for prefer in ["wait=20", "respond-async"] {
        let run = platform.gateway.run(HELLO, &json!(1)).header("prefer", prefer);
        let refused = run.send().await.expect_problem(503);
        assert!(refused.need("retry-after").parse::<u32>().is_ok());
        // Error texts of backends are not exposed.
        assert!(!refused.text().contains("NonExistent"), "{}", refused.text());
    }
    platform.finish().await;
}
