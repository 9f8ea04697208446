//! Health, metrics and log lines, as operators and the dashboard read them.

use crate::harness::http::Request;
use crate::harness::platform::{Backend, HELLO};
use crate::harness::process::Stream;
use crate::harness::{Gateway, SOON, Setup, eventually};
use flate2::read::GzDecoder;
use serde_json::{Value, json};
use std::io::Read;

on_both_backends!(
    health_lists_the_dependencies,
    metrics_have_their_fixed_names_and_labels,
    metrics_are_compressed_for_clients_that_ask,
    log_lines_have_their_fixed_messages,
);

async fn health_lists_the_dependencies(setup: Setup) {
    let is_dev = setup.backend == Backend::Dev;
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    for target in ["/health", "/api/health"] {
        let health = gateway.anonymous("GET", target).send().await.expect(200).json();
        assert_eq!(health["status"], "OK", "{health}");
        assert_eq!(health["version"], env!("CARGO_PKG_VERSION"));
        let checks = health["checks"].as_object().expect("the checks");
        let of_dev = ["queue", "database", "functionsTable", "logsTable"];
        let redis =
            ["redis", "functionsTable", "logsTable", "nodeId", "resultsSubscription", "changesSubscription"];
        let expected = if is_dev { of_dev.to_vec() } else { [&["queue"], &redis[..]].concat() };
        let names: Vec<&String> = checks.keys().collect();
        assert_eq!(names, expected, "{health}");
        assert!(health["checks"].to_string().contains("depth"), "no depth of the queue: {health}");
    }
    for target in ["/livez", "/readyz"] {
        gateway.anonymous("GET", target).send().await.expect(200);
    }
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_is_503_while_redis_is_down() {
    let mut platform = Setup::serve().no_worker().start().await;
    platform.fleet_mut().redis.kill();
    let gateway = &platform.gateway;
    let health = gateway.wait_for_health("Redis is down", |status, _| status == 503).await;
    assert!(["DEGRADED", "ERROR"].contains(&health["status"].as_str().unwrap_or_default()), "{health}");
    let address = platform.fleet().redis.addr().to_string();
    assert!(!health.to_string().contains(&address), "an error text of a backend is exposed: {health}");
    gateway.anonymous("GET", "/livez").send().await.expect(200);

    platform.fleet_mut().redis.restart().await;
    platform.gateway.wait_for_health("Redis is up", |status, _| status == 200).await;
    platform.finish().await;
}

async fn metrics_have_their_fixed_names_and_labels(setup: Setup) {
    let is_dev = setup.backend == Backend::Dev;
    let platform = setup.python_worker().start().await;
    let gateway = &platform.gateway;
    for prefix in ["", "/api"] {
        let body = json!({ "functionId": HELLO, "inputData": 1 });
        gateway.request("POST", &format!("{prefix}/run")).json(&body).send().await.expect(200);
        gateway.get(&format!("{prefix}/functions/hello")).await.expect(200);
        gateway.get(&format!("{prefix}/no/such/{prefix}/route")).await.expect(404);
        gateway.get(&format!("{prefix}/status/{}", "0".repeat(36))).await;
    }
    gateway.wait_until_idle().await;
    let labels = format!(r#"{{functionId="{HELLO}",status="SUCCESS"}}"#);
    gateway.wait_for_metric(&format!("function_invocations_total{labels}"), 2.0).await;
    gateway.wait_for_metric(&format!("function_duration_seconds_count{labels}"), 2.0).await;
    for (method, route, status, count) in
        [("POST", "/run", 200, 2.0), ("GET", "/functions/:id", 200, 2.0), ("GET", "/status/:jobId", 404, 2.0)]
    {
        let labels = format!(r#"{{method="{method}",route="{route}",status_code="{status}"}}"#);
        let series = format!("http_request_duration_seconds_count{labels}");
        if route == "/status/:jobId" && gateway.metric(&series).await.is_none() {
            // 36 zeros are not an id, so 400 is acceptable, too.
            let series = series.replace("404", "400");
            gateway.wait_for_metric(&series, count).await;
            continue;
        }
        gateway.wait_for_metric(&series, count).await;
    }

    let answer = gateway.anonymous("GET", "/metrics").send().await.expect(200);
    assert!(answer.need("content-type").starts_with("text/plain"), "{answer:?}");
    let text = answer.text();
    for line in text.lines().filter(|line| line.starts_with("http_request_duration_seconds_bucket")) {
        assert!(!line.contains("/api") && !line.contains("no/such"), "a route is not a pattern: {line}");
    }
    let bounds: Vec<&str> = text
        .lines()
        .filter(|line| line.starts_with(r#"http_request_duration_seconds_bucket{method="POST",route="/run""#))
        .filter_map(|line| line.split_once(r#"le=""#)?.1.split('"').next())
        .collect();
    assert_eq!((bounds.first(), bounds.last()), (Some(&"0.0005"), Some(&"+Inf")), "{bounds:?}");
    assert_eq!(bounds.get(bounds.len() - 2), Some(&"300"), "{bounds:?}");
    let histograms =
        ["function_duration_seconds", "http_request_duration_seconds", "function_handler_duration_seconds"];
    // The function of `dev` is a program, which has no handler.
    for name in &histograms[..if is_dev { 2 } else { 3 }] {
        assert!(text.contains(&format!("# TYPE {name} histogram")), "{name}");
    }
    assert!(text.contains("# TYPE function_invocations_total counter"));
    platform.finish().await;
}

async fn metrics_are_compressed_for_clients_that_ask(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    for (method, accepted, is_packed) in [
        ("GET", None, false),
        ("GET", Some("identity"), false),
        ("GET", Some("gzip;q=0, deflate"), false),
        ("GET", Some("gzip"), true),
        ("GET", Some("gzip;q=0.1, *;q=0"), true),
        ("HEAD", Some("br, *;q=0.5"), true),
        ("HEAD", Some("*;q=0"), false),
    ] {
        let mut request = Request::new(gateway.addr(), method, "/metrics");
        if let Some(accepted) = accepted {
            request = request.header("accept-encoding", accepted);
        }
        let answer = request.send().await.expect(200);
        assert_eq!(answer.header("content-encoding"), is_packed.then_some("gzip"), "{accepted:?}");
        assert!(answer.need("content-type").starts_with("text/plain"), "{answer:?}");
        assert_eq!(answer.need("vary"), "accept-encoding");
        let length: usize = answer.need("content-length").parse().expect("a number");
        assert!(length > 0);
        if method == "HEAD" {
            continue;
        }
        assert_eq!(answer.body().len(), length);
        let mut text = String::new();
        match is_packed {
            true => GzDecoder::new(answer.body()).read_to_string(&mut text).expect("gzip of UTF-8"),
            false => answer.body().read_to_string(&mut text).expect("UTF-8"),
        };
        assert!(text.contains("# TYPE infra_jobs_in_flight gauge"), "{text}");
    }
    // Other answers are not compressed.
    let health = Request::new(gateway.addr(), "GET", "/health").header("accept-encoding", "gzip");
    assert_eq!(health.send().await.expect(200).json()["status"], "OK");
    platform.finish().await;
}

/// Waits for a log line with this message. Returns the first one.
async fn line(gateway: &Gateway, msg: &str, request_id: Option<&str>) -> Value {
    eventually(msg, SOON, || async {
        let is_it =
            |line: &Value| line["msg"] == *msg && request_id.is_none_or(|id| line["requestId"] == *id);
        gateway.log().into_iter().find(is_it).ok_or_else(|| gateway.output().tail(20))
    })
    .await
}

async fn log_lines_have_their_fixed_messages(setup: Setup) {
    let is_dev = setup.backend == Backend::Dev;
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let sync = gateway.run(HELLO, &json!({ "private": "body-of-a-client" })).send().await.expect(200).json();
    let sync = sync["requestId"].as_str().expect("an id");
    let job = gateway.run_async(HELLO, &json!(1)).await;
    for (id, mode) in [(sync, "SYNC"), (&job, "ASYNC")] {
        let run = line(gateway, "Run Request", Some(id)).await;
        assert_eq!((&run["functionId"], &run["mode"]), (&json!(HELLO), &json!(mode)), "{run}");
        let done = line(gateway, "Execution Success", Some(id)).await;
        assert!(done["duration"].is_number(), "{done}");
    }
    if !is_dev {
        line(gateway, "Global Redis Connected Successfully", None).await;
    }
    let started = format!("Infra Controller v{} Started", env!("CARGO_PKG_VERSION"));
    assert_eq!(line(gateway, &started, None).await["port"], gateway.addr().port());
    for line in gateway.output().lines(Stream::Out).iter().filter(|line| line.starts_with('{')) {
        let second = line.strip_prefix(r#"{"level":"#).and_then(|rest| rest.split_once(','));
        let is_first = |(level, rest): (&str, &str)| {
            [r#""ERROR""#, r#""WARN""#, r#""INFO""#].contains(&level) && rest.starts_with(r#""msg":"#)
        };
        assert!(second.is_some_and(is_first), "level in capitals and msg are not first: {line}");
    }
    assert!(!gateway.output().contains("body-of-a-client"), "a body is logged");
    platform.finish().await;
}

/// API key, Redis password and AWS secret. Every test asserts that they are not in its log (see
/// `Gateway::drop`). Here are the requests that are most likely to log them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn secrets_stay_out_of_the_log() {
    let setup = Setup::serve().redis_password("redis-secret-5be1").env("RUST_LOG", "debug");
    let mut platform = setup.no_worker().start().await;
    let gateway = &platform.gateway;
    gateway.run_async(HELLO, &json!(1)).await;
    gateway.anonymous("GET", "/functions/hello").header("x-api-key", "almost").send().await.expect(401);
    let in_query = format!("/nope?x-api-key={}", gateway.key());
    gateway.get(&in_query).await.expect(404);
    platform.fleet_mut().redis.kill();
    platform.gateway.wait_for_health("Redis is down", |status, _| status == 503).await;
    platform.stop().await;
}
