//! Overload: caps on jobs, and load shedding.

use crate::harness::aws_proxy::Policy;
use crate::harness::conf_lines::key_lines;
use crate::harness::gateway::Conf;
use crate::harness::http::Answer;
use crate::harness::platform::HELLO;
use crate::harness::{Gateway, SOON, Setup, eventually};
use serde_json::json;

async fn run(gateway: &Gateway, key: &str, function: &str) -> Answer {
    let request = gateway.anonymous("POST", "/run").header("x-api-key", key).header("x-async", "true");
    request.json(&json!({ "functionId": function })).send().await
}

/// The cap is set by a PUT, applies at once, and counts jobs in flight.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_of_a_function_are_capped() {
    let platform = Setup::serve().no_worker().start().await;
    let gateway = &platform.gateway;
    let target = format!("/functions/{HELLO}");
    let cap = async |max: u32| {
        let change = json!({ "maxConcurrency": max });
        gateway.request("PUT", &target).json(&change).send().await
    };
    cap(2).await.expect(200);
    assert_eq!(gateway.get(&target).await.expect(200).json()["maxConcurrency"], 2);
    let first =
        run(gateway, gateway.key(), HELLO).await.expect(202).json()["jobId"].as_str().unwrap().to_owned();
    run(gateway, gateway.key(), HELLO).await.expect(202);
    let refused = run(gateway, gateway.key(), HELLO).await.expect_problem(429);
    assert_eq!(refused.json()["code"], "too_many_jobs");
    assert_eq!((refused.need("x-ratelimit-limit"), refused.need("retry-after")), ("2", "1"));
    // Synchronous runs count, too.
    gateway.run(HELLO, &json!(1)).send().await.expect_problem(429);
    let fleet = platform.fleet();
    let result = json!({ "requestId": first, "status": "SUCCESS", "exitCode": 0 }).to_string();
    fleet.redis.publish(&format!("result:{first}"), result.as_bytes()).await;
    eventually("a job below the cap", SOON, || async {
        let answer = run(gateway, gateway.key(), HELLO).await;
        if answer.status == 202 { Ok(()) } else { Err(answer.text()) }
    })
    .await;
    cap(0).await.expect(200);
    for _ in 0..5 {
        run(gateway, gateway.key(), HELLO).await.expect(202);
    }
    platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_of_a_key_are_capped() {
    let conf = Conf {
        limits: "[overload]\njobs_per_key_max = 3\n".into(),
        keys: format!(
            "{}jobs_max = 1\n{}",
            key_lines("one", "key-one", &["run"]),
            key_lines("many", "key-many", &["run"])
        ),
        ..Conf::default()
    };
    let platform = Setup::serve().no_worker().conf(conf).start().await;
    let gateway = &platform.gateway;
    for (key, cap) in [("key-one", 1), ("key-many", 3)] {
        for _ in 0..cap {
            run(gateway, key, HELLO).await.expect(202);
        }
        let refused = run(gateway, key, HELLO).await.expect_problem(429);
        assert_eq!(
            (refused.json()["code"].as_str(), refused.need("x-ratelimit-limit")),
            (Some("too_many_jobs"), &*cap.to_string())
        );
    }
    // A rejected request does not claim its idempotency key.
    let keyed = |key: &str| {
        let request = gateway.anonymous("POST", "/run").header("x-api-key", key).header("x-async", "true");
        request.header("idempotency-key", "again").json(&json!({ "functionId": HELLO }))
    };
    keyed("key-one").send().await.expect_problem(429);
    platform.put_conf("keys.toml", &key_lines("one", "key-one", &["run"]));
    eventually("a higher cap", SOON, || async {
        let answer = keyed("key-one").send().await;
        if answer.status == 202 { Ok(()) } else { Err(answer.text()) }
    })
    .await;
    platform.stop().await;
}

/// A part of the jobs is rejected with `Retry-After`. Health checks and metrics are answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_queue_sheds_jobs() {
    let limits = "[overload]\nconfirm_target_ms = 50\n[batch]\nsends_max = 2\nsends_eager = 1\n";
    let conf = Conf { limits: limits.into(), ..Conf::default() };
    let setup = Setup::serve()
        .no_worker()
        .conf(conf)
        .policy(Policy::SlowSends(std::time::Duration::from_millis(150)));
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    eventually("a rejection", SOON, || async {
        let answers =
            futures_util::future::join_all((0..20).map(|_| run(gateway, gateway.key(), HELLO))).await;
        let shed = answers.into_iter().find(|answer| answer.status == 503);
        let shed = shed.ok_or_else(|| "all are accepted".to_owned())?.expect_problem(503);
        assert_eq!((shed.json()["code"].as_str(), shed.need("retry-after")), (Some("overloaded"), "1"));
        // The part shrinks as soon as the load does.
        let part = gateway.metric("infra_queue_shed_permille").await;
        if part > Some(0.0) { Ok(()) } else { Err(format!("{part:?} permille are shed")) }
    })
    .await;
    for target in ["/health", "/livez", "/readyz", "/metrics"] {
        gateway.anonymous("GET", target).send().await.expect(200);
    }
    platform.stop().await;
}
