//! The limit of open files: it caps connections, and when it is reached health checks are still answered.

use crate::harness::gateway::Conf;
use crate::harness::http::{Answer, Conn, Request};
use crate::harness::platform::{Backend, HELLO, new_key};
use crate::harness::process::Scratch;
use crate::harness::{Gateway, SOON, Setup, eventually, within};
use serde_json::{Value, json};

const LIMIT: u64 = 64;
/// Idle clients stay connected, however slow the machine is.
const PATIENT: &str = "[http]\nheader_timeout_s = 3600\n";

/// Opens connections that send nothing.
async fn idle(gateway: &Gateway, count: usize) -> Vec<Conn> {
    let mut held = Vec::new();
    for _ in 0..count {
        held.push(
            within("a connection", SOON, Conn::open(gateway.addr()))
                .await
                .expect("the gateway accepts connections"),
        );
    }
    held
}

/// Retries until the status is as expected: a client that is slow to send may be evicted in favour of others.
async fn answer_of(gateway: &Gateway, request: Request, status: u16) -> Answer {
    let what = format!("{status} from {}", request.method());
    eventually(&what, 3 * SOON, || async {
        match request.try_send().await {
            Ok(answer) if answer.status == status => Ok(answer),
            other => Err(format!("{other:?}, {}", gateway.output().tail(3))),
        }
    })
    .await
}

async fn metric(gateway: &Gateway, series: &str) -> Option<f64> {
    let metrics = answer_of(gateway, gateway.anonymous("GET", "/metrics"), 200).await.text();
    metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.parse().ok())
}

fn warnings(gateway: &Gateway) -> Vec<Value> {
    gateway.log().into_iter().filter(|line| line["open_files_max"].is_number()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_are_capped_below_the_open_file_limit() {
    let (dir, key) = (Scratch::new("limited"), new_key());
    let conf_dir = dir.path().join("conf");
    Conf { server: PATIENT.into(), ..Conf::default() }.write(&conf_dir);
    let data = dir.path().join("data");
    let [data, conf] = [&data, &conf_dir].map(|path| path.to_str().expect("the path is UTF-8"));
    let args = ["dev", "--port", "0", "--data-dir", data, "--conf", conf];
    let gateway = Gateway::start_limited(LIMIT, &args, &[("INFRA_API_KEY".into(), key.clone())], &key).await;
    let warned = warnings(&gateway);
    assert_eq!(warned.len(), 1, "{warned:?}");
    assert_eq!((&warned[0]["configured"], &warned[0]["open_files_max"]), (&json!(10_000), &json!(LIMIT)));
    assert!(warned[0]["open_files_needed"].as_u64() > Some(10_000), "{warned:?}");
    let in_force = warned[0]["in_force"].as_u64().expect("a number");
    assert!((1..LIMIT).contains(&in_force), "{warned:?}");

    for round in 0..2 {
        let held = idle(&gateway, 3 * usize::try_from(LIMIT).expect("it fits")).await;
        for target in ["/livez", "/readyz", "/health", "/metrics", "/livez"] {
            answer_of(&gateway, gateway.anonymous("GET", target), 200).await;
        }
        assert!(metric(&gateway, "infra_connections").await <= Some(LIMIT as f64));
        let refused = answer_of(&gateway, gateway.run(HELLO, &json!(1)), 503).await;
        assert_eq!(refused.expect_problem(503).json()["code"], "too_many_connections");
        drop(held);
        eventually("a free connection", SOON, || async {
            let answer = gateway.run(HELLO, &json!(1)).try_send().await;
            let is_run = answer.as_ref().is_ok_and(|answer| answer.status == 200);
            if is_run { Ok(()) } else { Err(format!("{answer:?}")) }
        })
        .await;
        // The same with reloaded settings.
        if round == 0 {
            let server = format!("{PATIENT}connections_max = 5000\n");
            Conf { server, ..Conf::default() }.write(&conf_dir);
            eventually("another warning", SOON, || async {
                let warned = warnings(&gateway);
                let last = warned.last().expect("the first");
                if last["configured"] == 5000 { Ok(()) } else { Err(format!("{warned:?}")) }
            })
            .await;
        }
    }
    assert_eq!(gateway.metric("infra_accepts_failed_total").await, Some(0.0), "no accept fails");
    gateway.finish().await;
}

/// As when the limit is lowered, or other code uses all descriptors.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn health_is_answered_without_free_descriptors() {
    let conf = Conf { server: PATIENT.into(), ..Conf::default() };
    let platform = Setup::new(Backend::Dev).conf(conf).start().await;
    let gateway = &platform.gateway;
    let mut kept = Conn::open(gateway.addr()).await.expect("the gateway accepts connections");
    let livez = gateway.anonymous("GET", "/livez").to_bytes();
    kept.write(&livez).await.expect("the gateway reads");
    kept.answer(false).await.expect("an answer").expect(200);
    let limit = 1 + gateway.open_files().into_iter().max().expect("some are open");
    gateway.limit_open_files(limit);

    // More connections than free descriptors below the limit.
    let held = idle(gateway, usize::try_from(limit).expect("it fits")).await;
    let logged = |text: &str| {
        let of = |line: &Value| line["msg"].as_str().is_some_and(|msg| msg.contains(text));
        gateway.log().iter().filter(|line| of(line)).count()
    };
    eventually("an error", SOON, || async {
        if logged("no file descriptor is left") > 0 { Ok(()) } else { Err(gateway.output().tail(5)) }
    })
    .await;
    // Not /health: the database of `dev` needs a descriptor, too.
    for target in ["/livez", "/readyz", "/metrics", "/livez"] {
        answer_of(gateway, gateway.anonymous("GET", target), 200).await;
    }
    assert_eq!(metric(gateway, "infra_file_descriptors_short").await, Some(1.0));
    assert!(metric(gateway, "infra_accepts_failed_total").await > Some(0.0));
    let refused = answer_of(gateway, gateway.run(HELLO, &json!(1)), 503).await;
    assert_eq!(refused.expect_problem(503).json()["code"], "too_many_connections");
    kept.write(&livez).await.expect("the gateway reads");
    kept.answer(false).await.expect("an answer").expect(200);
    assert_eq!(logged("no file descriptor is left"), 1, "once");
    assert_eq!(logged("File descriptors are available again"), 0);

    gateway.limit_open_files(limit + 10_000);
    eventually("free descriptors", SOON, || async {
        let short = metric(gateway, "infra_file_descriptors_short").await;
        if short == Some(0.0) { Ok(()) } else { Err(format!("{short:?}")) }
    })
    .await;
    eventually("the log line that it is over", SOON, || async {
        let count = logged("File descriptors are available again");
        if count == 1 { Ok(()) } else { Err(format!("{count} times")) }
    })
    .await;
    gateway.run(HELLO, &json!(1)).send().await.expect(200);
    assert_eq!(logged("no file descriptor is left"), 1);
    drop((held, kept));
    platform.finish().await;
}
