//! HTTP: routes, methods, HEAD, request ids, persistent connections, CORS.

use crate::harness::gateway::{Conf, reloads};
use crate::harness::http::{Conn, Request};
use crate::harness::platform::HELLO;
use crate::harness::{SOON, Setup, within};
use serde_json::{Value, json};

on_both_backends!(
    unknown_routes_are_404_and_other_methods_405,
    request_ids_are_echoed_or_generated,
    a_connection_serves_many_requests_in_order,
    expect_100_continue_is_answered_after_the_key_check,
    unread_bodies_are_never_taken_for_requests,
    cors_is_limited_to_configured_origins
);

async fn unknown_routes_are_404_and_other_methods_405(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    for unknown in
        ["/nope", "/run/more", "/status", "/functions/hello/nope", "/apirun", "/api/api/run", "/RUN"]
    {
        for target in [unknown.to_owned(), format!("/api{unknown}")] {
            let answer = gateway.get(&target).await;
            // `/status` without an id may be 400, too.
            if unknown == "/status" && answer.status == 400 {
                continue;
            }
            answer.expect_problem(404);
        }
    }
    for (method, target, allowed) in [
        ("GET", "/run", "POST"),
        ("PATCH", "/run", "POST"),
        ("POST", "/status/x", "GET"),
        ("DELETE", "/health", "GET"),
        ("POST", "/livez", "GET"),
        ("POST", "/readyz", "GET"),
        ("POST", "/metrics", "GET"),
        ("POST", "/", "GET"),
        ("PATCH", "/functions/hello", "GET"),
        ("PUT", "/functions/hello/logs", "GET"),
        ("DELETE", "/functions/hello/logs/x", "GET"),
    ] {
        for prefix in ["", "/api"] {
            if prefix == "/api" && target == "/" {
                continue;
            }
            let answer =
                gateway.request(method, &format!("{prefix}{target}")).send().await.expect_problem(405);
            let allow: Vec<&str> = answer.need("allow").split(',').map(str::trim).collect();
            assert!(allow.contains(&allowed), "{method} {target}: {allow:?}");
            assert!(!allow.contains(&method), "{method} {target}: {allow:?}");
            assert_eq!(
                allow.contains(&"GET"),
                allow.contains(&"HEAD"),
                "HEAD works where GET does: {allow:?}"
            );
        }
    }
    for target in
        ["/", "/health", "/livez", "/readyz", "/metrics", "/functions/hello", "/functions/hello/logs"]
    {
        let head = gateway.request("HEAD", target).send().await.expect(200);
        assert!(head.body().is_empty());
        let get = gateway.get(target).await.expect(200);
        assert_eq!(head.header("content-type"), get.header("content-type"), "{target}");
        head.need("content-length");
    }
    gateway.request("HEAD", "/functions/no-such-function").send().await.expect(404);

    let root = gateway.get("/").await.expect(200).json();
    assert!(root["version"].is_string(), "{root}");
    assert!(root.to_string().contains("/run"), "no endpoints: {root}");
    platform.finish().await;
}

async fn request_ids_are_echoed_or_generated(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let longest = "r".repeat(128);
    for target in ["/livez", "/nope", "/functions/hello", "/run"] {
        for given in ["a", "client-id-1", "!~/?\"<>", &longest] {
            let answer = gateway.request("GET", target).header("x-request-id", given).send().await;
            assert_eq!(answer.need("x-request-id"), given, "{target}");
        }
        let too_long = "r".repeat(129);
        let mut ours = Vec::new();
        for bad in [None, Some(""), Some("two words"), Some("tab\there"), Some("schlüssel"), Some(&too_long)]
        {
            let mut request = gateway.request("GET", target);
            if let Some(bad) = bad {
                request = request.header("X-Request-Id", bad);
            }
            let id = request.send().await.need("x-request-id").to_owned();
            assert_ne!(Some(id.as_str()), bad, "{target}");
            assert!((1..=128).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic()), "{id}");
            ours.push(id);
        }
        ours.sort();
        ours.dedup();
        assert_eq!(ours.len(), 6, "request ids are not unique: {ours:?}");
    }
    // The id of a job is generated, whatever the request id is.
    let run = gateway.run(HELLO, &json!(1)).header("x-request-id", "mine").send().await.expect(200);
    assert_eq!(run.need("x-request-id"), "mine");
    assert_ne!(run.json()["requestId"], "mine");
    platform.finish().await;
}

async fn a_connection_serves_many_requests_in_order(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;

    // The connection persists after answers and rejections.
    let mut conn = Conn::open(gateway.addr()).await.expect("the gateway accepts connections");
    let wrong_type = gateway.request("POST", "/run").body("text/plain", "x");
    let bad_body = gateway.request("POST", "/run").body("application/json", "{");
    let head = gateway.request("HEAD", "/livez");
    for (request, status) in [
        (&gateway.anonymous("GET", "/livez"), 200),
        (&gateway.request("GET", "/nope"), 404),
        (&bad_body, 400),
        (&wrong_type, 415),
        (&gateway.request("GET", "/run"), 405),
        (&head, 200),
        (&gateway.run(HELLO, &json!(1)), 200),
        (&gateway.anonymous("GET", "/functions/hello"), 401),
        (&gateway.anonymous("GET", "/livez"), 200),
    ] {
        conn.write(&request.to_bytes()).await.expect("the connection is kept");
        let is_head = std::ptr::eq(request, &raw const head);
        let answer = conn.answer(is_head).await.expect("an answer on the same connection").expect(status);
        request.check(&answer);
    }

    // Ten pipelined requests are answered in order.
    let mut conn = Conn::open(gateway.addr()).await.expect("the gateway accepts connections");
    let tokens: Vec<String> = (0..10).map(|n| format!("pipelined-{n}-end")).collect();
    let runs = tokens.iter().map(|token| gateway.run(HELLO, &json!({ "token": token })));
    let bytes: Vec<u8> = runs.flat_map(|run| run.to_bytes()).collect();
    conn.write(&bytes).await.expect("the gateway reads");
    for token in &tokens {
        let result = conn.answer(false).await.expect("an answer each").expect(200).json();
        assert!(
            result["stdout"].as_str().is_some_and(|printed| printed.contains(token)),
            "{token}: {result}"
        );
    }
    // Different requests, identified by their ids.
    let requests: Vec<(u16, Request)> = vec![
        (200, gateway.anonymous("GET", "/livez")),
        (404, gateway.request("GET", "/nope")),
        (202, gateway.run(HELLO, &json!(1)).header("x-async", "true")),
        (401, gateway.anonymous("GET", "/functions/hello")),
        (200, gateway.request("GET", "/functions/hello")),
        (400, gateway.request("POST", "/run").body("application/json", "[")),
        (405, gateway.request("GET", "/run")),
        (200, gateway.anonymous("GET", "/readyz")),
        (404, gateway.run("no-such-function", &json!(1))),
        (200, gateway.anonymous("GET", "/health")),
    ];
    let with_id = |(n, (_, request)): (usize, &(u16, Request))| {
        request.clone().header("x-request-id", &format!("mixed-{n}")).to_bytes()
    };
    let bytes: Vec<u8> = requests.iter().enumerate().flat_map(with_id).collect();
    conn.write(&bytes).await.expect("the gateway reads");
    for (n, (status, request)) in requests.iter().enumerate() {
        let answer = conn.answer(false).await.expect("an answer each").expect(*status);
        request.check(&answer);
        assert_eq!(answer.need("x-request-id"), format!("mixed-{n}"));
    }

    // `Connection: close` is honoured.
    let last = gateway.anonymous("GET", "/livez").header("connection", "close");
    conn.write(&last.to_bytes()).await.expect("the gateway reads");
    conn.answer(false).await.expect("an answer").expect(200);
    assert!(within("the end of the connection", SOON, conn.is_closed()).await);
    platform.finish().await;
}

async fn expect_100_continue_is_answered_after_the_key_check(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let body = json!({ "functionId": HELLO, "inputData": "patient" }).to_string();
    let announce = |request: Request| {
        let request = request.header("content-type", "application/json").header("expect", "100-continue");
        request.header("content-length", &body.len().to_string()).to_bytes()
    };
    let mut conn = Conn::open(gateway.addr()).await.expect("the gateway accepts connections");
    // Twice, because the connection must persist after an interim answer.
    for _ in 0..2 {
        conn.write(&announce(gateway.request("POST", "/run"))).await.expect("the gateway reads");
        let interim = within("100 Continue", SOON, conn.any_answer(false)).await.expect("an answer");
        assert_eq!(interim.status, 100);
        conn.write(body.as_bytes()).await.expect("the gateway reads");
        let result: Value = conn.any_answer(false).await.expect("an answer").expect(200).json();
        assert!(result["stdout"].as_str().is_some_and(|printed| printed.contains("patient")), "{result}");
    }
    // A client without a key is rejected before it sends the body.
    let mut conn = Conn::open(gateway.addr()).await.expect("the gateway accepts connections");
    conn.write(&announce(gateway.anonymous("POST", "/run"))).await.expect("the gateway reads");
    let refused = within("the rejection", SOON, conn.any_answer(false)).await.expect("an answer");
    refused.expect_problem(401);
    platform.finish().await;
}

/// A body on a route without one is drained, or the connection ends.
async fn unread_bodies_are_never_taken_for_requests(setup: Setup) {
    let drain = |ms: u32| format!("[http]\ndrain_body_timeout_ms = {ms}\n");
    let platform = setup.conf(Conf { server: drain(60_000), ..Conf::default() }).start().await;
    let gateway = &platform.gateway;
    let victim = gateway.upload("x").await;
    let inner = gateway.request("DELETE", &format!("/functions/{victim}")).to_bytes();
    let inner = String::from_utf8(inner).expect("a head is ASCII");

    // A late body within the drain timeout: the connection persists.
    let mut conn = Conn::open(gateway.addr()).await.expect("the gateway accepts connections");
    for n in 0..20 {
        let delete = gateway.request("DELETE", "/functions/absent");
        let (head, body) = if n % 2 == 0 {
            (delete.header("content-length", &inner.len().to_string()), inner.clone())
        } else {
            (
                delete.header("transfer-encoding", "chunked"),
                format!("{:x}\r\n{inner}\r\n0\r\n\r\n", inner.len()),
            )
        };
        conn.write(&head.to_bytes()).await.expect("the gateway reads");
        // The head has arrived when a later request is answered.
        gateway.get("/livez").await.expect(200);
        conn.write(body.as_bytes()).await.expect("the gateway reads");
        conn.answer(false).await.expect("an answer").expect_problem(404);
        conn.write(&gateway.anonymous("GET", "/livez").to_bytes()).await.expect("the gateway reads");
        conn.answer(false).await.expect("an answer").expect(200);
    }

    // After the drain timeout: there is an answer, and the connection ends.
    platform.put_conf("server.toml", &drain(100));
    gateway.wait_for_metric(&reloads("server.toml", "applied"), 1.0).await;
    let mut conn = Conn::open(gateway.addr()).await.expect("the gateway accepts connections");
    let head = gateway.request("DELETE", "/functions/absent").header("transfer-encoding", "chunked");
    conn.write(&head.to_bytes()).await.expect("the gateway reads");
    let answer = conn.answer(false).await.expect("an answer").expect_problem(404);
    assert_eq!(answer.need("connection"), "close");
    let _ = conn.write(format!("{:x}\r\n{inner}\r\n0\r\n\r\n{inner}", inner.len()).as_bytes()).await;
    assert!(within("the end of the connection", SOON, conn.is_closed()).await);

    gateway.get(&format!("/functions/{victim}")).await.expect(200);
    platform.finish().await;
}

/// Without configured origins CORS is off.
async fn cors_is_limited_to_configured_origins(setup: Setup) {
    let server = "[http]\ncors_origins = [\"https://dashboard.example\"]\n";
    let platform = setup.conf(Conf { server: server.into(), ..Conf::default() }).start().await;
    let gateway = &platform.gateway;
    let asks = |origin: &str| {
        let request = gateway.upstream_request("OPTIONS", "/run").header("origin", origin);
        request
            .header("access-control-request-method", "POST")
            .header("access-control-request-headers", "x-api-key")
    };
    let allowed = asks("https://dashboard.example").send().await.expect(204);
    assert_eq!(allowed.need("access-control-allow-origin"), "https://dashboard.example");
    assert!(allowed.need("access-control-allow-methods").contains("POST"));
    assert!(allowed.need("access-control-allow-headers").contains("x-api-key"));
    for origin in
        ["https://evil.example", "null", "https://dashboard.example.evil", "http://dashboard.example"]
    {
        let refused = asks(origin).send().await.expect(405);
        assert_eq!((refused.header("access-control-allow-origin"), refused.need("vary")), (None, "origin"));
        let answer = gateway.request("GET", "/livez").header("origin", origin).send().await.expect(200);
        assert_eq!(answer.header("access-control-allow-origin"), None);
    }
    let from = |status: u16, request: Request| async move {
        let answer = request.header("origin", "https://dashboard.example").send().await.expect(status);
        assert_eq!(answer.need("access-control-allow-origin"), "https://dashboard.example");
        assert!(answer.need("access-control-expose-headers").contains("x-request-id"));
    };
    from(200, gateway.run(HELLO, &json!(1))).await;
    from(401, gateway.anonymous("GET", "/functions")).await;
    platform.finish().await;
}
