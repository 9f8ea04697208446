//! Rate limits: header fields, rejections, leases, Redis outages.

use crate::harness::conf_lines::limit_lines;
use crate::harness::gateway::Conf;
use crate::harness::http::Answer;
use crate::harness::platform::HELLO;
use crate::harness::wait::{SOON, eventually, join_all, spawn};
use crate::harness::{Gateway, Setup};
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

on_both_backends!(the_default_limit_is_in_the_header_fields);

async fn run(gateway: &Gateway) -> Answer {
    gateway.run(HELLO, &json!(1)).header("x-async", "true").send().await
}

fn number(answer: &Answer, header: &str) -> u64 {
    let value = answer.need(header);
    value.parse().unwrap_or_else(|_| panic!("{header}: {value}"))
}

async fn the_default_limit_is_in_the_header_fields(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let first = run(gateway).await.expect(202);
    assert_eq!(number(&first, "x-ratelimit-limit"), 3000);
    assert!((2900..3000).contains(&number(&first, "x-ratelimit-remaining")), "{first:?}");
    first.need("ratelimit");
    let policy = first.need("ratelimit-policy");
    assert!(policy.contains("q=3000") && policy.contains("w=60"), "{policy}");
    // Routes without a limit have no header fields of limits.
    let free = gateway.get("/functions/hello").await.expect(200);
    assert_eq!(free.header("x-ratelimit-limit"), None);
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_past_the_burst_are_429_on_all_nodes() {
    let numbers = "mode = \"exact\"\nrate = 5\nperiod_s = 3600\nburst = 5\non_redis_loss = \"local\"\n";
    let platform = limits(&[limit_lines("test-key", "key", "/run", numbers)]).start().await;
    let other = platform.fleet().start_gateway().await;
    let gateway = &platform.gateway;
    for left in (0..5).rev() {
        // The route has the same limit under either prefix.
        let answer = run(gateway).await.expect(202);
        assert_eq!(number(&answer, "x-ratelimit-limit"), 5);
        assert_eq!(number(&answer, "x-ratelimit-remaining"), left);
    }
    let by_alias = gateway.request("POST", "/api/run").json(&json!({ "functionId": HELLO }));
    for refused in [run(gateway).await, by_alias.send().await] {
        let refused = refused.expect_problem(429);
        assert!((1..=720).contains(&number(&refused, "retry-after")), "{refused:?}");
        assert_eq!(number(&refused, "x-ratelimit-limit"), 5);
        assert_eq!(number(&refused, "x-ratelimit-remaining"), 0);
        assert!(refused.need("ratelimit").contains("test-key"), "{refused:?}");
        let policy = refused.need("ratelimit-policy");
        assert!(policy.contains("test-key") && policy.contains("q=5;w=3600"), "{policy}");
    }
    // All nodes share one bucket. Other routes are not limited.
    run(&other).await.expect_problem(429);
    gateway.get("/functions/hello").await.expect(200);
    other.stop().await;
    platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limit_by_address_applies_beside_one_by_key() {
    let numbers = |count: u32, on_loss: &str| {
        format!("rate = {count}\nperiod_s = 3600\nburst = {count}\non_redis_loss = {on_loss:?}\n")
    };
    let by_key = limit_lines("by-key", "key", "/run", &numbers(1000, "local"));
    let by_address = limit_lines("by-address", "ip", "/run", &numbers(3, "closed"));
    let platform = limits(&[by_key, by_address]).start().await;
    let gateway = &platform.gateway;
    for _ in 0..3 {
        run(gateway).await.expect(202);
    }
    let refused = run(gateway).await.expect_problem(429);
    assert!(refused.need("ratelimit").contains("by-address"), "{refused:?}");
    platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rate_limit_overrides_the_default_and_an_empty_file_has_no_limit() {
    let platform = Setup::serve().env("RATE_LIMIT", "2").no_worker().start().await;
    let gateway = &platform.gateway;
    let first = run(gateway).await.expect(202);
    assert_eq!(number(&first, "x-ratelimit-limit"), 2);
    run(gateway).await.expect(202);
    run(gateway).await.expect_problem(429);
    platform.stop().await;

    let platform = Setup::serve().conf(Conf::default()).no_worker().start().await;
    let free = run(&platform.gateway).await.expect(202);
    assert_eq!(free.header("x-ratelimit-limit"), None);
    platform.stop().await;
}

fn limits(limits: &[String]) -> Setup {
    Setup::serve().conf(Conf { limits: limits.concat(), ..Conf::default() })
}

/// Sends requests for at least three seconds, and until more are admitted than the burst and one second
/// allow.
async fn send_until_past_burst(gateway: Arc<Gateway>, start: Instant, admitted: Arc<AtomicUsize>) {
    const LEAST: Duration = Duration::from_secs(3);
    while start.elapsed() < LEAST || admitted.load(Ordering::Relaxed) <= BURST + RATE {
        let answer = gateway.get("/logs").await;
        assert!([200, 429].contains(&answer.status), "{answer:?}");
        admitted.fetch_add(usize::from(answer.status == 200), Ordering::Relaxed);
    }
}

/// The limit that two nodes lease from: requests per second, and burst.
const RATE: usize = 40;
const BURST: usize = 60;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leases_of_two_nodes_never_exceed_the_limit() {
    let numbers = format!("rate = {RATE}\nperiod_s = 1\nburst = {BURST}\non_redis_loss = \"closed\"");
    let leased = limit_lines("l", "key", "/logs", &numbers);
    let platform = limits(&[leased]).no_worker().start().await;
    let other = Arc::new(platform.fleet().start_gateway().await);
    // A third node, because the clients need an `Arc`.
    let third = Arc::new(platform.fleet().start_gateway().await);
    let (start, admitted) = (Instant::now(), Arc::new(AtomicUsize::new(0)));
    let clients = (0..6).map(|n| {
        let node = Arc::clone(if n % 2 == 0 { &other } else { &third });
        spawn(send_until_past_burst(node, start, Arc::clone(&admitted)))
    });
    join_all("more requests than the burst admits", 2 * SOON, clients.collect()).await;
    // The time from before the first request to after the last answer. The bucket cannot have gained more
    // tokens.
    let elapsed_s = start.elapsed().as_secs_f64();
    let most = BURST as f64 + RATE as f64 * elapsed_s;
    let admitted = admitted.load(Ordering::Relaxed);
    assert!(admitted as f64 <= most, "{admitted} admitted, at most {most} allowed in {elapsed_s} s");
    for gateway in [other, third] {
        assert!(
            gateway.metric("infra_limiter_decisions_total{decision=\"allowed\",source=\"lease\"}").await
                > Some(0.0)
        );
        Arc::into_inner(gateway).expect("its clients have ended").stop().await;
    }
    platform.stop().await;
}

/// Number of script calls in Redis.
async fn script_calls(platform: &crate::harness::Platform) -> u64 {
    platform.fleet().redis.calls(&["eval", "evalsha"]).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn repeated_rejections_do_not_call_redis() {
    let leased =
        limit_lines("l", "key", "/logs", "rate = 1\nperiod_s = 3600\nburst = 3\non_redis_loss = \"closed\"");
    // A long lease of the node, because its renewals are script calls, too.
    let conf = Conf { limits: leased, server: "[fleet]\nlease_s = 3600\n".into(), ..Conf::default() };
    let platform = Setup::serve().conf(conf).no_worker().start().await;
    let gateway = &platform.gateway;
    for _ in 0..3 {
        gateway.get("/logs").await.expect(200);
    }
    let refused = gateway.get("/logs").await.expect_problem(429);
    assert!((3000..=3600).contains(&number(&refused, "retry-after")), "{refused:?}");
    assert_eq!((number(&refused, "x-ratelimit-limit"), number(&refused, "x-ratelimit-remaining")), (3, 0));
    let (before, start) = (script_calls(&platform).await, Instant::now());
    assert!(before >= 3, "{before}: script calls are not counted");
    for _ in 0..300 {
        gateway.get("/logs").await.expect_problem(429);
    }
    let calls = script_calls(&platform).await - before;
    // The summary of the node is one call per second.
    let of_summaries = start.elapsed().as_secs() + 1;
    assert!(calls < 20 + of_summaries, "{calls} calls for 300 rejections");
    let memory = "infra_limiter_decisions_total{decision=\"limited\",source=\"refusal_memory\"}";
    assert!(gateway.metric(memory).await >= Some(300.0));
    platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_redis_on_redis_loss_decides() {
    let numbers =
        |on_loss: &str| format!("rate = 4\nperiod_s = 3600\nburst = 4\non_redis_loss = {on_loss:?}");
    let both = [
        limit_lines("l", "key", "/logs", &numbers("local")),
        limit_lines("c", "key", "/functions", &numbers("closed")),
    ];
    let mut platform = limits(&both).no_worker().start().await;
    platform.fleet_mut().redis.kill();
    let gateway = &platform.gateway;
    let away = gateway.get("/functions").await.expect_problem(503);
    assert_eq!(away.json()["code"], "limiter_unavailable");
    for left in (0..4).rev() {
        assert_eq!(number(&gateway.get("/logs").await.expect(200), "x-ratelimit-remaining"), left);
    }
    gateway.get("/logs").await.expect_problem(429);
    platform.fleet_mut().redis.restart().await;
    let gateway = &platform.gateway;
    eventually("a limiter that uses Redis again", SOON, || async {
        let status = gateway.get("/functions").await.status;
        if status == 200 { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
    platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_by_function_and_global_limits_apply_together() {
    let numbers = |burst: u32, mode: &str| {
        format!("rate = 1\nperiod_s = 3600\nburst = {burst}\non_redis_loss = \"closed\"\nmode = {mode:?}")
    };
    for mode in ["leased", "exact"] {
        let both = [
            limit_lines("by-function", "function", "/run", &numbers(2, mode)),
            limit_lines("all", "global", "/run", &numbers(5, mode)),
        ];
        let platform = limits(&both).no_worker().start().await;
        let gateway = &platform.gateway;
        platform.fleet().cloud.put_function("another").await;
        for left in [1, 0] {
            let answer = run(gateway).await.expect(202);
            assert_eq!(answer.need("ratelimit-policy"), "\"all\";q=1;w=3600, \"by-function\";q=1;w=3600");
            assert_eq!(
                (number(&answer, "x-ratelimit-limit"), number(&answer, "x-ratelimit-remaining")),
                (2, left)
            );
        }
        let refused = run(gateway).await.expect_problem(429);
        assert!(refused.need("ratelimit").contains("\"by-function\";r=0"), "{refused:?}");
        gateway.run("another", &json!(1)).header("x-async", "true").send().await.expect(202);
        // An unknown function counts for the global limit only.
        let nobody = gateway.run("nobody", &json!(1)).send().await.expect_problem(404);
        assert_eq!(nobody.need("ratelimit-policy"), "\"all\";q=1;w=3600");
        let refused = gateway.run("another", &json!(1)).send().await.expect_problem(429);
        assert_eq!(
            (number(&refused, "x-ratelimit-limit"), number(&refused, "x-ratelimit-remaining")),
            (5, 0)
        );
        platform.stop().await;
    }
}
