//! One table of the whole API: the answers of each route to valid and invalid calls. Every answer in the
//! OpenAPI document is produced by a call here.

use crate::harness::conf_lines::key_lines;
use crate::harness::gateway::Conf;
use crate::harness::http::Request;
use crate::harness::platform::HELLO;
use crate::harness::upload::{Part, form, printing};
use crate::harness::{Gateway, Setup};
use serde_json::{Value, json};
use std::collections::BTreeSet;

on_both_backends!(
    every_described_answer_is_produced,
    invalid_calls_are_rejected_as_problems,
    other_methods_are_405_and_head_matches_get,
);

/// A key with the scope `metrics` only.
const NARROW_KEY: &str = "narrow-key-for-metrics-alone";
/// Statuses that need a fault or load. Other tests produce them.
const ELSEWHERE: [u16; 3] = [408, 429, 503];

/// One call: (path pattern, request, status, code of the problem if it is one).
type Case = (&'static str, Request, u16, &'static str);

struct Table<'a> {
    gateway: &'a Gateway,
    /// The id of a function, for `{id}`.
    id: String,
    tag: String,
    job: String,
}

impl Table<'_> {
    fn call(&self, method: &str, target: &str) -> Request {
        self.gateway.request(method, &target.replace("{id}", &self.id))
    }

    fn json(&self, method: &str, target: &str, body: &str) -> Request {
        self.call(method, target).body("application/json", body)
    }

    fn runs_and_results(&self) -> Vec<Case> {
        let run = |body: &str| self.json("POST", "/run", body);
        let good = json!({ "functionId": HELLO, "inputData": { "behave": "echo" } }).to_string();
        let huge = format!("{{\"functionId\":\"{HELLO}\",\"inputData\":\"{}\"}}", "x".repeat(1 << 20));
        let huger = format!("{{\"functionId\":\"{HELLO}\",\"inputData\":{}}}", "1".repeat(10 << 20));
        let absent = "00000000-0000-8000-8000-000000000000";
        let twice = format!("/jobs/{}?functionId=a&functionId=a", self.job);
        vec![
            ("/run", run(&good), 200, ""),
            ("/run", run(&good).header("x-async", "true"), 202, ""),
            (
                "/run",
                self.gateway.anonymous("POST", "/run").body("application/json", good.clone()),
                401,
                "unauthorized",
            ),
            ("/run", run(&good).header("idempotency-key", "\"contract\""), 200, ""),
            (
                "/run",
                run(&good.replace("echo", "ECHO")).header("idempotency-key", "contract"),
                422,
                "idempotency_key_reused",
            ),
            ("/run", run(&good).header("idempotency-key", "a b"), 400, "invalid_request"),
            ("/run", run(r#"{"functionId":"no-such-function"}"#), 404, "no_such_function"),
            (
                "/run",
                run(r#"{"functionId":"no-such-function"}"#).header("idempotency-key", "a b"),
                400,
                "invalid_request",
            ),
            ("/run", run(&huge), 413, "body_too_large"),
            ("/run", run(&huger), 413, "body_too_large"),
            ("/run", self.call("POST", "/run").body("text/plain", good), 415, "unsupported_media_type"),
            ("/run", run("{"), 400, "invalid_request"),
            ("/status/{jobId}", self.call("GET", &format!("/status/{}?wait=20", self.job)), 200, ""),
            (
                "/status/{jobId}",
                self.call("GET", &format!("/status/{}?wait=soon", self.job)),
                400,
                "invalid_request",
            ),
            ("/status/{jobId}", self.call("GET", "/status/no-job"), 404, "no_such_job"),
            ("/status/{jobId}", self.gateway.anonymous("GET", "/status/x"), 401, "unauthorized"),
            ("/jobs/{id}", self.call("GET", &format!("/jobs/{}", self.job)), 200, ""),
            ("/jobs/{id}", self.call("GET", "/jobs/no-job"), 404, "no_such_job"),
            ("/jobs/{id}", self.call("GET", &format!("/jobs/{absent}")), 404, "function_needed"),
            ("/jobs/{id}", self.call("GET", &twice), 400, "invalid_request"),
            ("/jobs/{id}", self.gateway.anonymous("GET", "/jobs/x"), 401, "unauthorized"),
        ]
    }

    fn functions(&self) -> Vec<Case> {
        let zip = printing("x");
        let file = [Part::File("x.zip", &zip)];
        let upload = || self.call("POST", "/upload");
        let (one, absent) = ("/functions/{id}", "/functions/absent");
        let change = r#"{"memoryMb":192}"#;
        let stale = |request: Request| request.header("if-match", "\"stale\"");
        let long = format!("{{\"description\":\"{}\"}}", "x".repeat(70_000));
        let none = |method: &str, target: &str| self.gateway.anonymous(method, target);
        let too_large = upload().header("content-type", "multipart/form-data; boundary=x");
        vec![
            ("/upload", form(upload(), &file), 200, ""),
            ("/upload", form(upload(), &[]), 400, "invalid_request"),
            ("/upload", form(upload(), &[Part::File("x.zip", b"x")]), 400, "bad_archive"),
            ("/upload", none("POST", "/upload"), 401, "unauthorized"),
            ("/upload", too_large.header("content-length", "99999999"), 413, "body_too_large"),
            ("/upload", upload().body("application/zip", zip.clone()), 415, "unsupported_media_type"),
            ("/functions", self.call("GET", "/functions"), 200, ""),
            ("/functions", self.call("GET", "/functions?cursor=x"), 400, "bad_cursor"),
            ("/functions", none("GET", "/functions"), 401, "unauthorized"),
            (one, self.call("GET", one), 200, ""),
            (one, self.call("GET", one).header("if-none-match", &self.tag), 304, ""),
            (one, none("GET", one), 401, "unauthorized"),
            (one, self.call("GET", absent), 404, "no_such_function"),
            (one, stale(self.json("PUT", one, change)), 412, "precondition_failed"),
            (one, self.json("PUT", one, r#"{"name":"x"}"#), 400, "invalid_request"),
            (one, none("PUT", one), 401, "unauthorized"),
            (one, self.json("PUT", absent, change), 404, "no_such_function"),
            (one, self.json("PUT", one, &long), 413, "body_too_large"),
            (one, self.call("PUT", one).body("text/plain", change), 415, "unsupported_media_type"),
            (one, self.json("PUT", one, change), 200, ""),
            (one, self.call("GET", one).header("if-none-match", "*, \"1\""), 400, "repeated_field"),
            (one, self.call("DELETE", one).header("if-match", "*, \"1\""), 400, "repeated_field"),
            (one, none("DELETE", one), 401, "unauthorized"),
            (one, self.call("DELETE", absent), 404, "no_such_function"),
            (one, stale(self.call("DELETE", one)), 412, "precondition_failed"),
        ]
    }

    fn logs_and_metrics(&self) -> Vec<Case> {
        let (logs, log) = ("/functions/{id}/logs", "/functions/{id}/logs/{requestId}");
        let (metrics, tuner) = ("/functions/{id}/metrics", "/functions/{id}/auto-tuner");
        let apply = "/functions/{id}/auto-tuner/apply";
        let none = |method: &str, target: &str| self.gateway.anonymous(method, target);
        let row = format!("/functions/{HELLO}/logs/{}", self.job);
        vec![
            (logs, self.call("GET", logs), 200, ""),
            (logs, self.call("GET", &format!("{logs}?limit=0")), 400, "invalid_request"),
            (logs, none("GET", logs), 401, "unauthorized"),
            (logs, self.call("GET", "/functions/config%23hello/logs"), 404, "no_such_function"),
            (log, self.call("GET", &row), 200, ""),
            (log, none("GET", &row), 401, "unauthorized"),
            (log, self.call("GET", "/functions/{id}/logs/absent"), 404, "no_such_log"),
            (metrics, self.call("GET", metrics), 200, ""),
            (metrics, none("GET", metrics), 401, "unauthorized"),
            (metrics, self.call("GET", "/functions/absent/metrics"), 404, "no_such_function"),
            (tuner, self.call("GET", tuner), 200, ""),
            (tuner, none("GET", tuner), 401, "unauthorized"),
            (tuner, self.call("GET", "/functions/absent/auto-tuner"), 404, "no_such_function"),
            (apply, self.call("POST", apply), 409, "no_recommendation"),
            (apply, self.call("POST", apply).header("if-match", "\"stale\""), 412, "precondition_failed"),
            (apply, self.call("POST", apply).header("if-match", "*, *"), 400, "repeated_field"),
            (apply, none("POST", apply), 401, "unauthorized"),
            (apply, self.call("POST", "/functions/absent/auto-tuner/apply"), 404, "no_such_function"),
            ("/logs", self.call("GET", "/logs"), 200, ""),
            ("/logs", none("GET", "/logs"), 401, "unauthorized"),
            ("/events", self.call("GET", "/events?type=job"), 400, "invalid_request"),
            ("/events", none("GET", "/events"), 401, "unauthorized"),
        ]
    }

    fn workers_and_system(&self) -> Vec<Case> {
        let beat = |body: &str| self.json("POST", "/worker/heartbeat", body);
        let long = format!("{{\"workerId\":\"w\",\"pools\":\"{}\"}}", "x".repeat(70_000));
        let none = |target: &str| self.gateway.anonymous("GET", target);
        let mut cases = vec![
            ("/worker/heartbeat", beat(r#"{"workerId":"w-1","activeJobs":2}"#), 200, ""),
            ("/worker/heartbeat", beat(r#"{"workerId":7}"#), 400, "invalid_request"),
            ("/worker/heartbeat", beat(&long), 413, "body_too_large"),
            (
                "/worker/heartbeat",
                self.call("POST", "/worker/heartbeat").body("text/plain", "x"),
                415,
                "unsupported_media_type",
            ),
            ("/worker/heartbeat", self.gateway.anonymous("POST", "/worker/heartbeat"), 401, "unauthorized"),
        ];
        for scoped in ["/workers", "/worker/status", "/system/status", "/system/overview", "/models"] {
            cases.push((scoped, self.call("GET", scoped), 200, ""));
            cases.push((scoped, none(scoped), 401, "unauthorized"));
        }
        for open in ["/openapi.json", "/health", "/livez", "/readyz", "/metrics", "/"] {
            cases.push((open, none(open), 200, ""));
        }
        cases
    }
}

async fn every_described_answer_is_produced(setup: Setup) {
    let keys = key_lines("narrow", NARROW_KEY, &["metrics"]);
    let platform = setup.conf(Conf { keys, ..Conf::default() }).start().await;
    let gateway = &platform.gateway;
    let id = gateway.upload("x").await;
    let tag = gateway.get(&format!("/functions/{id}")).await.expect(200).need("etag").to_owned();
    let job = gateway.run_async(HELLO, &json!(1)).await;
    gateway.result_of(&job).await;
    gateway.wait_until_idle().await;
    let table = Table { gateway, id, tag, job };
    let mut cases = table.runs_and_results();
    cases.extend(table.functions());
    cases.extend(table.logs_and_metrics());
    cases.extend(table.workers_and_system());
    // The deletion of the function.
    cases.push(("/functions/{id}", table.call("DELETE", "/functions/{id}"), 200, ""));
    let mut seen: BTreeSet<(String, String, u16)> = BTreeSet::new();
    for (pattern, request, status, code) in cases {
        let answer = request.send().await;
        let label = format!("{} {pattern}", request.method());
        assert_eq!(answer.status, status, "{label}: {}", answer.text());
        if !code.is_empty() {
            assert_eq!(answer.expect_problem(status).json()["code"], code, "{label}");
        }
        seen.insert((pattern.to_owned(), request.method().to_lowercase(), status));
        if status == 401 {
            // A key without the scope.
            let answer = request.clone().header("x-api-key", NARROW_KEY).send().await.expect_problem(403);
            assert_eq!(answer.json()["code"], "forbidden", "{label}");
            seen.insert((pattern.to_owned(), request.method().to_lowercase(), 403));
        }
    }
    // With `metrics_need_key`; see `keys`.
    seen.extend([401, 403].map(|status| ("/metrics".to_owned(), "get".to_owned(), status)));
    // Its answer does not end; see `events`.
    seen.insert(("/events".into(), "get".into(), 200));
    // The workers here recommend nothing; see `changes`.
    seen.insert(("/functions/{id}/auto-tuner/apply".into(), "post".into(), 200));
    let described = statuses_of(&gateway.get("/openapi.json").await.expect(200).json());
    let unseen: Vec<_> = described.difference(&seen).filter(|case| !ELSEWHERE.contains(&case.2)).collect();
    assert!(unseen.is_empty(), "described, but not produced: {unseen:#?}");
    let undescribed: Vec<_> = seen.difference(&described).collect();
    assert!(undescribed.is_empty(), "produced, but not described: {undescribed:#?}");
    platform.finish().await;
}

fn statuses_of(document: &Value) -> BTreeSet<(String, String, u16)> {
    let mut statuses = BTreeSet::new();
    for (pattern, item) in document["paths"].as_object().expect("paths") {
        for (method, operation) in
            item.as_object().expect("a path").iter().filter(|(name, _)| *name != "parameters")
        {
            for status in operation["responses"].as_object().expect("responses").keys() {
                let status = status.parse().expect("a status");
                statuses.insert((pattern.clone(), method.clone(), status));
            }
        }
    }
    statuses
}

/// Each invalid call is rejected with a short problem, and the server keeps running.
async fn invalid_calls_are_rejected_as_problems(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let deep = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
    let bodies: Vec<(String, u16)> = vec![
        (String::new(), 400),
        ("null".into(), 400),
        ("[]".into(), 400),
        ("\u{feff}{}".into(), 400),
        ("{}".into(), 400),
        ("{\"a\"".into(), 400),
        (r#"{"functionId":"hello","functionId":"hello"}"#.into(), 400),
        (r#"{"functionId":"hello","\u0066unctionId":"hello"}"#.into(), 400),
        (r#"{"workerId":"w","workerId":"w"}"#.into(), 400),
        (r#"{"memoryMb":256,"memoryMb":256}"#.into(), 400),
        (r#"{"functionId":"\ud800","workerId":"\udfff","description":"\ud800x"}"#.into(), 400),
        (format!("{{\"functionId\":\"hello\",\"inputData\":{},\"description\":1}}", deep(5_000)), 400),
        (
            format!(
                "{{\"functionId\":\"hello\",\"inputData\":{0},\"pools\":{0},\"workerId\":\"w\"}}",
                "[".repeat(5_000)
            ),
            400,
        ),
        (r#"{"functionId":"..","workerId":"a b","description":null}"#.into(), 400),
        (r#"{"functionId":"a/b","workerId":"","memoryMb":0}"#.into(), 400),
        (
            format!(
                "{{\"functionId\":\"hello\",\"inputData\":{0},\"activeJobs\":{0},\"workerId\":\"w\",\
                 \"memoryMb\":{0}}}",
                "9".repeat(10 << 20)
            ),
            413,
        ),
        ("x".repeat(2 << 20), 413),
    ];
    for (method, target) in [("POST", "/run"), ("POST", "/worker/heartbeat"), ("PUT", "/functions/hello")] {
        for (body, status) in &bodies {
            let answer = gateway.request(method, target).body("application/json", body.clone()).send().await;
            let label = format!("{target} {body:.60}");
            // A route with a smaller cap answers 413 where another one reads the body.
            let fits = answer.status == *status || (answer.status == 413 && body.len() > 16_000);
            assert!(fits, "{label}: {} {}", answer.status, answer.text());
            let status = answer.status;
            let problem = answer.expect_problem(status).json();
            assert!(problem["detail"].as_str().is_some_and(|d| d.len() < 500), "{label}: {problem}");
        }
        for mime in ["text/plain", "application/xml", "application/x-www-form-urlencoded", "json", "*/*"] {
            gateway.request(method, target).body(mime, "{}").send().await.expect_problem(415);
        }
    }
    for id in [
        "..",
        ".",
        "%2e%2e",
        "%2E%2E%2Frun",
        "a%2fb",
        "%00",
        "%ff",
        "%",
        "%zz",
        "a%20b",
        "hello%23",
        "-a",
        "ä",
        "hello;x",
    ] {
        for target in
            [format!("/functions/{id}"), format!("/functions/{id}/logs"), format!("/functions/{id}/metrics")]
        {
            let answer = gateway.get(&target).await;
            assert!([400, 404].contains(&answer.status), "{target}: {} {}", answer.status, answer.text());
            if answer.header("content-type").is_some() {
                let status = answer.status;
                answer.expect_problem(status);
            }
        }
    }
    // Escapes in an id are decoded.
    gateway.get("/functions/%68ello").await.expect(200);
    gateway.get("/livez").await.expect(200);
    platform.finish().await;
}

async fn other_methods_are_405_and_head_matches_get(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    for (target, allowed) in [
        ("/upload", "POST"),
        ("/functions", "GET, HEAD"),
        ("/functions/hello", "DELETE, GET, HEAD, PUT"),
        ("/functions/hello/logs", "GET, HEAD"),
        ("/functions/hello/metrics", "GET, HEAD"),
        ("/functions/hello/auto-tuner", "GET, HEAD"),
        ("/functions/hello/auto-tuner/apply", "POST"),
        ("/models", "GET, HEAD"),
        ("/logs", "GET, HEAD"),
        ("/worker/heartbeat", "POST"),
        ("/workers", "GET, HEAD"),
        ("/worker/status", "GET, HEAD"),
        ("/system/status", "GET, HEAD"),
        ("/system/overview", "GET, HEAD"),
        ("/openapi.json", "GET, HEAD"),
    ] {
        for method in ["PATCH", "OPTIONS", "TRACE", "PROPFIND", "GET", "HEAD", "POST", "PUT", "DELETE"] {
            if allowed.split(", ").any(|allowed| allowed == method) {
                continue;
            }
            let answer =
                gateway.request(method, target).header("content-length", "0").send().await.expect(405);
            let mut allow: Vec<&str> = answer.need("allow").split(", ").collect();
            allow.sort_unstable();
            assert_eq!(allow.join(", "), allowed, "{method} {target}");
        }
        if allowed.contains("HEAD") {
            let (head, get) =
                (gateway.request("HEAD", target).send().await.expect(200), gateway.get(target).await);
            assert_eq!(head.header("content-type"), get.header("content-type"), "{target}");
            assert!(head.body().is_empty() && head.header("content-length").is_some(), "{target}");
        }
    }
    platform.finish().await;
}
