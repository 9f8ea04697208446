//! Workers that report, the status of the system, and the catalogue of models.

use crate::harness::http::{Conn, Message};
use crate::harness::job::now_ms;
use crate::harness::redis::Client;
use crate::harness::{Gateway, SOON, Setup, eventually, spawn, within};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::net::TcpListener;

over_both!(heartbeats, bad_heartbeats, models_of_a_node, models_without_a_node);

async fn beat(gateway: &Gateway, state: &Value) {
    let answer = gateway.request("POST", "/api/worker/heartbeat").json(state).send().await.expect(200);
    assert_eq!(answer.text(), r#"{"ok":true}"#);
}

async fn heartbeats(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let none = gateway.get("/workers").await.expect(200).json();
    assert_eq!(none, json!({ "totalWorkers": 0, "healthyWorkers": 0, "workers": [] }));
    let none = json!({ "python": 0, "nodejs": 0, "cpp": 0, "go": 0 });
    let is_serve = platform.is_serve();
    let alone = eventually("the status of a worker alone, or of none", SOON, || async {
        let alone = gateway.get("/api/system/status").await.expect(200).json();
        let fits = alone["status"] == if is_serve { "offline" } else { "online" };
        if fits { Ok(alone) } else { Err(alone.to_string()) }
    })
    .await;
    if is_serve {
        assert_eq!(alone, json!({ "pools": none, "active_jobs": 0, "status": "offline" }));
    } else {
        assert_eq!((&alone["worker_count"], &alone["pools"]), (&json!(1), &none));
        is_now_in_seconds(&alone["timestamp"]);
    }

    let state = |id: &str, jobs: f64, status: &str| {
        json!({ "workerId": id, "status": status, "pools": { "python": 2, "go": 1.0 }, "activeJobs": jobs,
            "uptimeSeconds": 10.5 + jobs, "timestamp": 1_795_305_600.25, "more": "passed over" })
    };
    // One that is not well is no one.
    beat(gateway, &state("w-c", 4.0, "draining")).await;
    assert_eq!(gateway.get("/system/status").await.expect(200).json()["status"], alone["status"]);
    for (id, jobs) in [("w-b", 1.0), ("w-a", 2.0), ("w-b", 3.0)] {
        beat(gateway, &state(id, jobs, "healthy")).await;
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
            let said = state(id, jobs, status);
            for name in ["workerId", "status", "pools", "uptimeSeconds", "timestamp"] {
                assert_eq!(worker[name], said[name], "{name} of {worker}");
            }
            assert_eq!(worker["activeJobs"].as_f64(), Some(jobs), "the last word counts");
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

async fn bad_heartbeats(setup: Setup) {
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
    // There is an end to how many are known.
    for n in 0..1000 {
        beat(json!({ "workerId": format!("w-{n}") }).to_string()).send().await.expect(200);
    }
    let refused = beat(json!({ "workerId": "one-more" }).to_string()).send().await.expect_problem(503);
    assert_eq!(refused.json()["code"], "overloaded");
    beat(json!({ "workerId": "w-0" }).to_string()).send().await.expect(200);
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_node_gives_the_same_answer() {
    let platform = Setup::serve().start().await;
    let (here, there) = (&platform.gateway, platform.fleet().start_gateway().await);
    let mut redis = Client::open(&platform.fleet().redis).await.expect("Redis takes connections");
    let lone = r#"{"status":"busy","worker_count":1,"active_jobs":2,"pools":{"go":1},"uptime_seconds":7,"timestamp":1.5,"x":0}"#;
    redis.command(&[b"SET", b"system:status", lone.as_bytes()]).await.expect("Redis answers");
    for node in [here, &there] {
        let status = node.get("/system/status").await.expect(200).json();
        let expected = json!({ "status": "online", "worker_count": 1, "active_jobs": 2,
            "pools": { "python": 0, "nodejs": 0, "cpp": 0, "go": 1 }, "uptime_seconds": 7, "timestamp": 1.5 });
        assert_eq!(status, expected);
    }
    beat(here, &json!({ "workerId": "w-1" })).await;
    beat(&there, &json!({ "workerId": "w-2", "status": "healthy" })).await;
    let seen = async |node: &Gateway| {
        let workers = node.get("/workers").await.expect(200).json();
        workers["workers"]
            .as_array()
            .expect("an array")
            .iter()
            .map(|w| w["lastSeen"].clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(seen(here).await, seen(&there).await, "nodes need not agree on the time");
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

/// An AI node that answers as told, and counts how often it is asked.
struct AiNode {
    addr: SocketAddr,
    asked: Arc<AtomicUsize>,
}

impl AiNode {
    /// `None`: it takes the question and says nothing.
    async fn start(answer: Option<(&'static str, String)>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let addr = listener.local_addr().expect("it is bound");
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (answer, count) = (answer.clone(), Arc::clone(&count));
                spawn(async move {
                    let mut conn = Conn::over(stream);
                    while let Ok(Some(request)) = conn.request().await {
                        count.fetch_add(1, Ordering::Relaxed);
                        assert_eq!(request.start, "GET /api/tags HTTP/1.1");
                        assert!(request.header("x-api-key").is_none(), "nobody else learns the key");
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
        Self { addr, asked }
    }

    fn url(&self) -> String {
        format!("http://{}/", self.addr)
    }
}

async fn models_of_a_node(setup: Setup) {
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
    for _ in 0..5 {
        assert_eq!(gateway.get("/models").await.expect(200).json(), expected);
    }
    assert_eq!(node.asked.load(Ordering::Relaxed), 1, "one answer serves many");
    platform.finish().await;
}

async fn is_fallback(gateway: &Gateway) {
    let answer = gateway.get("/api/models").await.expect(200);
    let models = answer.json();
    assert_eq!(models["models"].as_array().map(Vec::len), Some(1), "{models}");
    let fallback = (&models["models"][0]["id"], &models["models"][0]["status"]);
    assert_eq!(fallback, (&json!("llama3:8b"), &json!("fallback")));
    assert!(models["warning"].is_string() && !answer.text().contains("127.0.0.1"), "{models}");
}

async fn models_without_a_node(setup: Setup) {
    let platform = setup.start().await;
    is_fallback(&platform.gateway).await;
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn models_of_a_broken_node() {
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
        within("the fallback", SOON, is_fallback(&platform.gateway)).await;
        // It is asked again after a while, not each time.
        is_fallback(&platform.gateway).await;
        assert_eq!(node.asked.load(Ordering::Relaxed), 1);
        eventually("the next try", SOON, || async {
            is_fallback(&platform.gateway).await;
            if node.asked.load(Ordering::Relaxed) > 1 { Ok(()) } else { Err("asked once".to_owned()) }
        })
        .await;
        platform.finish().await;
    }
}
