//! Heartbeats of workers, the status of the system, and the model catalogue.

use crate::harness::http::{Conn, Message};
use crate::harness::job::now_ms;
use crate::harness::redis::Client;
use crate::harness::{Gateway, SOON, Setup, eventually, spawn, within};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;
use tokio::net::TcpListener;

on_both_backends!(
    heartbeats_make_up_the_system_status,
    invalid_heartbeats_are_rejected,
    models_of_the_ai_node_are_cached,
    without_an_ai_node_there_is_a_fallback,
);

async fn send_heartbeat(gateway: &Gateway, state: &Value) {
    let answer = gateway.request("POST", "/api/worker/heartbeat").json(state).send().await.expect(200);
    assert_eq!(answer.text(), r#"{"ok":true}"#);
}

async fn heartbeats_make_up_the_system_status(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let none = gateway.get("/workers").await.expect(200).json();
    assert_eq!(none, json!({ "totalWorkers": 0, "healthyWorkers": 0, "workers": [] }));
    let none = json!({ "python": 0, "nodejs": 0, "cpp": 0, "go": 0 });
    // The Python worker writes no status.
    let is_alone = platform.runs_code();
    let alone = eventually("the status of the local worker, or of none", SOON, || async {
        let alone = gateway.get("/api/system/status").await.expect(200).json();
        let fits = alone["status"] == if is_alone { "online" } else { "offline" };
        if fits { Ok(alone) } else { Err(alone.to_string()) }
    })
    .await;
    if is_alone {
        // The processes that it has started ahead.
        let pools = alone["pools"].as_object().expect("an object");
        assert!(pools.keys().eq(none.as_object().expect("an object").keys()), "{alone}");
        assert!(pools.values().all(Value::is_number) && alone["worker_count"] == 1, "{alone}");
        is_now_in_seconds(&alone["timestamp"]);
    } else {
        assert_eq!(alone, json!({ "pools": none, "active_jobs": 0, "status": "offline" }));
    }

    let state = |id: &str, jobs: f64, status: &str| {
        json!({ "workerId": id, "status": status, "pools": { "python": 2, "go": 1.0 }, "activeJobs": jobs,
            "uptimeSeconds": 10.5 + jobs, "timestamp": 1_795_305_600.25, "more": "ignored" })
    };
    // An unhealthy worker does not count.
    send_heartbeat(gateway, &state("w-c", 4.0, "draining")).await;
    assert_eq!(gateway.get("/system/status").await.expect(200).json()["status"], alone["status"]);
    for (id, jobs) in [("w-b", 1.0), ("w-a", 2.0), ("w-b", 3.0)] {
        send_heartbeat(gateway, &state(id, jobs, "healthy")).await;
    }
    for target in ["/workers", "/worker/status", "/api/workers", "/api/worker/status"] {
        let workers = gateway.get(target).await.expect(200).json();
        let counts = (&workers["totalWorkers"], &workers["healthyWorkers"]);
        assert_eq!(counts, (&json!(3), &json!(2)), "{workers}");
        let all = workers["workers"].as_array().expect("an array");
        for (worker, (id, jobs, status, health)) in all.iter().zip([
            ("w-a", 2.0, "healthy", "healthy"),
            ("w-b", 3.0, "healthy", "healthy"),
            ("w-c", 4.0, "draining", "unhealthy"),
        ]) {
            let sent = state(id, jobs, status);
            for name in ["workerId", "status", "pools", "uptimeSeconds", "timestamp"] {
                assert_eq!(worker[name], sent[name], "{name} of {worker}");
            }
            assert_eq!(worker["activeJobs"].as_f64(), Some(jobs), "not the last heartbeat");
            assert_eq!(worker["healthStatus"], health);
            let seen = worker["lastSeen"].as_u64().expect("epoch milliseconds");
            assert!(now_ms().abs_diff(seen) < 600_000, "{worker}");
            assert_eq!(worker["receivedAt"], seen);
            let ago = worker["lastSeenAgo"].as_str().and_then(|ago| ago.strip_suffix('s'));
            assert!(ago.is_some_and(|ago| ago.parse::<u64>().is_ok()), "{worker}");
            assert!(worker.get("more").is_none(), "{worker}");
        }
    }
    let mut status = gateway.get("/system/status").await.expect(200).json();
    is_now_in_seconds(&status.as_object_mut().expect("an object").remove("timestamp").expect("a time"));
    let expected = json!({ "status": "online", "worker_count": 2, "active_jobs": 5, "uptime_seconds": 13.5,
        "pools": { "python": 4, "nodejs": 0, "cpp": 0, "go": 2 } });
    assert_eq!(status, expected);
    platform.finish().await;
}

#[track_caller]
fn is_now_in_seconds(at: &Value) {
    let now = now_ms() as f64 / 1000.0;
    assert!(at.as_f64().is_some_and(|at| (at - now).abs() < 600.0), "{at} at {now}");
}

async fn invalid_heartbeats_are_rejected(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let beat = |body: String| gateway.request("POST", "/worker/heartbeat").body("application/json", body);
    for (body, named) in [
        ("{}".to_owned(), "workerId"),
        ("[]".to_owned(), "object"),
        (json!({ "workerId": "a b" }).to_string(), "workerId"),
        (json!({ "workerId": "w".repeat(129) }).to_string(), "workerId"),
        (json!({ "workerId": "w", "activeJobs": "many" }).to_string(), "activeJobs"),
        (json!({ "workerId": "w", "activeJobs": 2_000_000 }).to_string(), "activeJobs"),
        (json!({ "workerId": "w", "pools": [] }).to_string(), "pools"),
        (json!({ "workerId": "w", "pools": { "p": "x".repeat(9_000) } }).to_string(), "pools"),
        (json!({ "workerId": "w", "uptimeSeconds": -1 }).to_string(), "uptimeSeconds"),
        (r#"{"workerId":"w","status":"a","status":"b"}"#.to_owned(), "status"),
    ] {
        let refused = beat(body.clone()).send().await.expect_problem(400).json();
        assert!(
            refused["detail"].as_str().is_some_and(|detail| detail.contains(named)),
            "{body:.60}: {refused}"
        );
    }
    beat(" ".repeat(17_000)).send().await.expect_problem(413);
    gateway.request("POST", "/worker/heartbeat").body("text/plain", "{}").send().await.expect_problem(415);
    assert_eq!(gateway.get("/workers").await.expect(200).json()["totalWorkers"], 0);
    // The number of workers is bounded.
    for n in 0..1000 {
        beat(json!({ "workerId": format!("w-{n}") }).to_string()).send().await.expect(200);
    }
    let refused = beat(json!({ "workerId": "one-more" }).to_string()).send().await.expect_problem(503);
    assert_eq!(refused.json()["code"], "overloaded");
    beat(json!({ "workerId": "w-0" }).to_string()).send().await.expect(200);
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_nodes_report_the_same_workers() {
    // It writes no status of its own.
    let platform = Setup::serve().python_worker().start().await;
    let (here, there) = (&platform.gateway, platform.fleet().start_gateway().await);
    let mut redis = Client::open(&platform.fleet().redis).await.expect("Redis accepts connections");
    let lone = json!({ "status": "busy", "worker_count": 1, "active_jobs": 2, "pools": { "go": 1 },
        "uptime_seconds": 7, "timestamp": 1.5, "x": 0 })
    .to_string();
    redis.command(&[b"SET", b"system:status", lone.as_bytes()]).await.expect("Redis answers");
    for node in [here, &there] {
        let status = node.get("/system/status").await.expect(200).json();
        let expected = json!({ "status": "online", "worker_count": 1, "active_jobs": 2,
            "pools": { "python": 0, "nodejs": 0, "cpp": 0, "go": 1 },
            "uptime_seconds": 7, "timestamp": 1.5 });
        assert_eq!(status, expected);
    }
    send_heartbeat(here, &json!({ "workerId": "w-1" })).await;
    send_heartbeat(&there, &json!({ "workerId": "w-2", "status": "healthy" })).await;
    let seen = async |node: &Gateway| {
        let workers = node.get("/workers").await.expect(200).json();
        workers["workers"]
            .as_array()
            .expect("an array")
            .iter()
            .map(|w| w["lastSeen"].clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(seen(here).await, seen(&there).await, "the nodes differ");
    for node in [here, &there] {
        let workers = node.get("/workers").await.expect(200).json();
        assert_eq!(
            (&workers["totalWorkers"], &workers["healthyWorkers"]),
            (&json!(2), &json!(2)),
            "{workers}"
        );
        assert_eq!(node.get("/system/status").await.expect(200).json()["worker_count"], 2);
    }
    there.finish().await;
    platform.finish().await;
}

/// How long the gateway caches an answer, and how long a failure, in seconds.
const KEPT_S: u64 = 10;
const FAILURE_KEPT_S: u64 = 2;

/// An AI node with a fixed answer that counts requests.
struct AiNode {
    addr: SocketAddr,
    requests: Arc<AtomicUsize>,
}

impl AiNode {
    /// `None`: it does not answer.
    async fn start(answer: Option<(&'static str, String)>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let addr = listener.local_addr().expect("it is bound");
        let requests = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&requests);
        spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (answer, count) = (answer.clone(), Arc::clone(&count));
                spawn(async move {
                    let mut conn = Conn::over(stream);
                    while let Ok(Some(request)) = conn.request().await {
                        count.fetch_add(1, Ordering::Relaxed);
                        assert_eq!(request.start, "GET /api/tags HTTP/1.1");
                        assert!(request.header("x-api-key").is_none(), "the API key is forwarded");
                        let Some((status, body)) = &answer else { std::future::pending().await };
                        let headers = vec![("content-length".to_owned(), body.len().to_string())];
                        let start = format!("HTTP/1.1 {status}");
                        let answer = Message { start, headers, body: body.clone().into_bytes() };
                        if conn.write(&answer.to_bytes()).await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        Self { addr, requests }
    }

    #[track_caller]
    fn assert_requests_at_most(&self, most: u64) {
        let requests = self.requests.load(Ordering::Relaxed) as u64;
        assert!(requests <= most, "{requests} requests, at most {most} expected");
    }

    fn url(&self) -> String {
        format!("http://{}/", self.addr)
    }
}

async fn models_of_the_ai_node_are_cached(setup: Setup) {
    let tags = json!({ "models": [
        { "name": "llama3:8b", "size": 4_661_224_676_u64, "digest": "x", "details": { "family": "llama" } },
        { "name": "tiny", "size": null, "details": null },
        { "size": 1 },
    ] });
    let node = AiNode::start(Some(("200 OK", tags.to_string()))).await;
    let platform = setup.env("AI_NODE_URL", &node.url()).start().await;
    let gateway = &platform.gateway;
    let expected = json!({ "models": [
        { "id": "llama3:8b", "name": "llama3:8b", "size": 4_661_224_676_u64, "details": { "family": "llama" },
          "status": "available" },
        { "id": "tiny", "name": "tiny", "size": 0, "details": {}, "status": "available" },
    ] });
    let begun = Instant::now();
    for _ in 0..5 {
        assert_eq!(gateway.get("/models").await.expect(200).json(), expected);
    }
    node.assert_requests_at_most(1 + begun.elapsed().as_secs() / KEPT_S);
    platform.finish().await;
}

async fn assert_fallback(gateway: &Gateway) {
    let answer = gateway.get("/api/models").await.expect(200);
    let models = answer.json();
    assert_eq!(models["models"].as_array().map(Vec::len), Some(1), "{models}");
    let fallback = (&models["models"][0]["id"], &models["models"][0]["status"]);
    assert_eq!(fallback, (&json!("llama3:8b"), &json!("fallback")));
    assert!(models["warning"].is_string() && !answer.text().contains("127.0.0.1"), "{models}");
}

async fn without_an_ai_node_there_is_a_fallback(setup: Setup) {
    let platform = setup.start().await;
    assert_fallback(&platform.gateway).await;
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failing_ai_node_is_retried_after_a_pause() {
    let long = format!("{{\"models\":[],\"x\":\"{}\"}}", "x".repeat(2 << 20));
    for answer in [
        Some(("500 Internal Server Error", "{}".to_owned())),
        Some(("302 Found", json!({ "models": [] }).to_string())),
        Some(("200 OK", "no JSON".to_owned())),
        Some(("200 OK", r#"{"models":7}"#.to_owned())),
        Some(("200 OK", long)),
        None,
    ] {
        let node = AiNode::start(answer).await;
        let setup = Setup::new(crate::harness::platform::Backend::Dev);
        let platform = setup.env("AI_NODE_URL", &node.url()).env("AI_NODE_TIMEOUT", "300").start().await;
        // The failure is cached.
        let begun = Instant::now();
        within("the fallback", SOON, assert_fallback(&platform.gateway)).await;
        assert_fallback(&platform.gateway).await;
        node.assert_requests_at_most(1 + begun.elapsed().as_secs() / FAILURE_KEPT_S);
        eventually("another request", SOON, || async {
            assert_fallback(&platform.gateway).await;
            if node.requests.load(Ordering::Relaxed) > 1 { Ok(()) } else { Err("one request".to_owned()) }
        })
        .await;
        platform.finish().await;
    }
}
