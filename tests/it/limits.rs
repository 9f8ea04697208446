//! Rate limits: their headers, and their refusals.

use crate::harness::gateway::Conf;
use crate::harness::http::Answer;
use crate::harness::platform::HELLO;
use crate::harness::{Gateway, Setup};
use serde_json::json;

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
