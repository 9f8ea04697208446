//! Rate limits: their headers, and their refusals.

use crate::harness::gateway::Conf;
use crate::harness::http::Answer;
use crate::harness::platform::HELLO;
use crate::harness::redis::Reply;
use crate::harness::wait::{SOON, eventually, spawn};
use crate::harness::{Gateway, Setup};
use serde_json::json;
use std::sync::Arc;
use std::time::{Duration, Instant};

over_both!(headers_of_the_default_limit);

async fn run(gateway: &Gateway) -> Answer {
    gateway.run(HELLO, &json!(1)).header("x-async", "true").send().await
}

fn number(answer: &Answer, header: &str) -> u64 {
    let value = answer.need(header);
    value.parse().unwrap_or_else(|_| panic!("{header}: {value}"))
}

async fn headers_of_the_default_limit(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let first = run(gateway).await.expect(202);
    assert_eq!(number(&first, "x-ratelimit-limit"), 3000);
    assert!((2900..3000).contains(&number(&first, "x-ratelimit-remaining")), "{first:?}");
    first.need("ratelimit");
    let policy = first.need("ratelimit-policy");
    assert!(policy.contains("q=3000") && policy.contains("w=60"), "{policy}");
    // Routes without a limit say nothing of one.
    let free = gateway.get("/functions/hello").await.expect(200);
    assert_eq!(free.header("x-ratelimit-limit"), None);
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_then_refusals() {
    let limits = r#"
        [[limit]]
        name = "test-key"
        identity = "key"
        mode = "exact"
        routes = ["/run"]
        rate = 5
        period_s = 60
        burst = 5
        on_redis_loss = "local"
    "#;
    let platform = Setup::serve().conf(Conf { limits: limits.into(), ..Conf::default() }).start().await;
    let other = platform.fleet().start_gateway().await;
    let gateway = &platform.gateway;
    for left in (0..5).rev() {
        // By either path it is the same route.
        let answer = run(gateway).await.expect(202);
        assert_eq!(number(&answer, "x-ratelimit-limit"), 5);
        assert_eq!(number(&answer, "x-ratelimit-remaining"), left);
    }
    let by_alias = gateway.request("POST", "/api/run").json(&json!({ "functionId": HELLO }));
    for refused in [run(gateway).await, by_alias.send().await] {
        let refused = refused.expect_problem(429);
        assert!((1..=60).contains(&number(&refused, "retry-after")), "{refused:?}");
        assert_eq!(number(&refused, "x-ratelimit-limit"), 5);
        assert_eq!(number(&refused, "x-ratelimit-remaining"), 0);
        assert!(refused.need("ratelimit").contains("test-key"), "{refused:?}");
        let policy = refused.need("ratelimit-policy");
        assert!(policy.contains("test-key") && policy.contains("q=5") && policy.contains("w=60"), "{policy}");
    }
    // One bucket on all nodes; routes without a limit are free.
    run(&other).await.expect_problem(429);
    gateway.get("/functions/hello").await.expect(200);
    other.stop().await;
    platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limit_by_address_comes_on_top() {
    let limits = r#"
        [[limit]]
        name = "by-key"
        identity = "key"
        routes = ["/run"]
        rate = 1000
        period_s = 60
        burst = 1000
        on_redis_loss = "local"

        [[limit]]
        name = "by-address"
        identity = "ip"
        routes = ["/run", "/upload"]
        rate = 3
        period_s = 60
        burst = 3
        on_redis_loss = "closed"
    "#;
    let platform = Setup::serve().conf(Conf { limits: limits.into(), ..Conf::default() }).start().await;
    let gateway = &platform.gateway;
    for _ in 0..3 {
        run(gateway).await.expect(202);
    }
    let refused = run(gateway).await.expect_problem(429);
    assert!(refused.need("ratelimit").contains("by-address"), "{refused:?}");
    platform.stop().await;
}

/// `RATE_LIMIT` of the old `.env` overrides the default; a conf without limits has none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_variable_and_no_limit() {
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

fn limit(name: &str, identity: &str, route: &str, rest: &str) -> String {
    format!("[[limit]]\nname = {name:?}\nidentity = {identity:?}\nroutes = [{route:?}]\n{rest}\n")
}

fn limits(limits: &[String]) -> Setup {
    Setup::serve().conf(Conf { limits: limits.concat(), ..Conf::default() })
}

/// Asks again and again until `end`. How many were let through.
async fn hammer(gateway: Arc<Gateway>, end: Instant) -> usize {
    let mut through = 0;
    while Instant::now() < end {
        let answer = gateway.get("/logs").await;
        assert!([200, 429].contains(&answer.status), "{answer:?}");
        through += usize::from(answer.status == 200);
    }
    through
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_lease_from_one_bucket() {
    let leased =
        limit("l", "key", "/logs", "rate = 40\nperiod_s = 1\nburst = 60\non_redis_loss = \"closed\"");
    let platform = limits(&[leased]).no_worker().start().await;
    let other = Arc::new(platform.fleet().start_gateway().await);
    // A third one, as the first is the platform's own.
    let third = Arc::new(platform.fleet().start_gateway().await);
    let start = Instant::now();
    let end = start + Duration::from_secs(3);
    let clients: Vec<_> =
        (0..6).map(|n| spawn(hammer(Arc::clone(if n % 2 == 0 { &other } else { &third }), end))).collect();
    let mut through = 0;
    for client in clients {
        through += client.await.expect("a client");
    }
    let elapsed = start.elapsed().as_secs_f64();
    let may = 60.0 + 40.0 * elapsed;
    assert!(through as f64 <= may, "{through} of {may} in {elapsed} s");
    assert!(through > 60 + 40, "{through}: hardly more than the burst in {elapsed} s");
    for gateway in [other, third] {
        assert!(
            gateway.metric("infra_limiter_decisions_total{decision=\"allowed\",source=\"lease\"}").await
                > Some(0.0)
        );
        Arc::into_inner(gateway).expect("its clients are done").stop().await;
    }
    platform.stop().await;
}

/// Script calls that Redis has counted.
async fn script_calls(platform: &crate::harness::Platform) -> u64 {
    let Reply::Bulk(stats) = platform.fleet().redis.command(&[b"INFO", b"commandstats"]).await else {
        panic!("INFO is text")
    };
    let stats = String::from_utf8(stats).expect("INFO is text");
    let calls = |line: &str| {
        let rest = line.strip_prefix("cmdstat_evalsha:calls=").or(line.strip_prefix("cmdstat_eval:calls="))?;
        rest.split(',').next()?.parse::<u64>().ok()
    };
    stats.lines().filter_map(calls).sum()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_of_refusals_asks_nobody() {
    let leased =
        limit("l", "key", "/logs", "rate = 1\nperiod_s = 3600\nburst = 3\non_redis_loss = \"closed\"");
    let platform = limits(&[leased]).no_worker().start().await;
    let gateway = &platform.gateway;
    for _ in 0..3 {
        gateway.get("/logs").await.expect(200);
    }
    let refused = gateway.get("/logs").await.expect_problem(429);
    assert!((3000..=3600).contains(&number(&refused, "retry-after")), "{refused:?}");
    assert_eq!((number(&refused, "x-ratelimit-limit"), number(&refused, "x-ratelimit-remaining")), (3, 0));
    let before = script_calls(&platform).await;
    assert!(before >= 3, "{before}: the calls are seen");
    for _ in 0..300 {
        gateway.get("/logs").await.expect_problem(429);
    }
    // The node's own lease is renewed by a script, too: once a second.
    let calls = script_calls(&platform).await - before;
    assert!(calls < 100, "{calls} calls for 300 refusals");
    let memory = "infra_limiter_decisions_total{decision=\"limited\",source=\"refusal_memory\"}";
    assert!(gateway.metric(memory).await >= Some(300.0));
    platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_redis_a_limit_does_as_it_says() {
    let numbers =
        |on_loss: &str| format!("rate = 4\nperiod_s = 3600\nburst = 4\non_redis_loss = {on_loss:?}");
    let both =
        [limit("l", "key", "/logs", &numbers("local")), limit("c", "key", "/functions", &numbers("closed"))];
    let mut platform = limits(&both).no_worker().start().await;
    platform.fleet_mut().redis.kill();
    let gateway = &platform.gateway;
    let away = gateway.get("/functions").await.expect_problem(503);
    assert_eq!(away.json()["code"], "limiter_unavailable");
    for left in (0..4).rev() {
        assert_eq!(number(&gateway.get("/logs").await.expect(200), "x-ratelimit-remaining"), left);
    }
    gateway.get("/logs").await.expect_problem(429);
    platform.fleet_mut().redis.restart();
    let gateway = &platform.gateway;
    eventually("the limiter counts in Redis again", SOON, || async {
        let status = gateway.get("/functions").await.status;
        if status == 200 { Ok(()) } else { Err(status.to_string()) }
    })
    .await;
    platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn by_function_and_all_together() {
    let numbers = |burst: u32, mode: &str| {
        format!("rate = 1\nperiod_s = 3600\nburst = {burst}\non_redis_loss = \"closed\"\nmode = {mode:?}")
    };
    for mode in ["leased", "exact"] {
        let both = [
            limit("by-function", "function", "/run", &numbers(2, mode)),
            limit("all", "global", "/run", &numbers(5, mode)),
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
        // A function that is none counts for all together, and for no function.
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
