//! Workers that report, the status of the system, and the catalogue of models.

use crate::harness::http::{Conn, Message};
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
    let expected = if platform.is_serve() { ("offline", 0) } else { ("healthy", 1) };
    eventually("the status of a worker alone, or of none", SOON, || async {
        let alone = gateway.get("/system/status").await.expect(200).json();
        let fits = alone["status"] == expected.0 && alone["worker_count"] == expected.1;
        if fits { Ok(()) } else { Err(alone.to_string()) }
    })
    .await;

    let state = |id: &str, jobs: u64, status: &str| {
        json!({ "workerId": id, "status": status, "pools": { "python": { "warm": 2 } }, "activeJobs": jobs,
            "uptimeSeconds": 10.5 + jobs as f64, "timestamp": "2026-11-22T00:00:00Z", "more": "passed over" })
    };
    beat(gateway, &state("w-b", 1, "healthy")).await;
    beat(gateway, &state("w-a", 2, "healthy")).await;
    beat(gateway, &state("w-c", 4, "draining")).await;
    beat(gateway, &state("w-b", 3, "healthy")).await;
    for target in ["/workers", "/worker/status", "/api/workers"] {
        let workers = gateway.get(target).await.expect(200).json();
        assert_eq!(
            (&workers["totalWorkers"], &workers["healthyWorkers"]),
            (&json!(3), &json!(2)),
            "{workers}"
        );
        let ids: Vec<_> =
            workers["workers"].as_array().expect("an array").iter().map(|w| &w["workerId"]).collect();
        assert_eq!(ids, ["w-a", "w-b", "w-c"]);
        let second = &workers["workers"][1];
        assert_eq!(
            (&second["activeJobs"], &second["healthy"]),
            (&json!(3), &json!(true)),
            "the last word counts"
        );
        assert!(second["lastSeen"].is_string() && second.get("more").is_none(), "{second}");
    }
    let status = gateway.get("/system/status").await.expect(200).json();
    assert_eq!((&status["status"], &status["worker_count"]), (&json!("healthy"), &json!(2)));
    assert_eq!((&status["active_jobs"], &status["pools"]), (&json!(5), &json!({ "python": { "warm": 4 } })));
    assert_eq!(status["uptime_seconds"], 13.5);
    platform.finish().await;
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
        let mut expected: Value = serde_json::from_str(lone).expect("JSON");
        expected.as_object_mut().expect("an object").remove("x");
        assert_eq!(status, expected);
    }
    beat(here, &json!({ "workerId": "w-1" })).await;
    beat(&there, &json!({ "workerId": "w-2", "status": "healthy" })).await;
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
