//! Valid and invalid requests, and sequences of them, that schemathesis generates from the OpenAPI document.
//!
//! It is short in `make test`. In `make schema` it takes `SCHEMA_SECONDS`.

use crate::harness::aws::venv;
use crate::harness::gateway::Conf;
use crate::harness::process::{Process, Scratch};
use crate::harness::{Gateway, Setup, path_env};
use std::path::Path;
use std::time::Duration;

on_both_backends!(generated_requests_get_described_answers);

/// Additional time to start, to shrink examples and to report.
const OVERHEAD: Duration = Duration::from_secs(180);
const SECONDS_DEFAULT: &str = "30";
const SEED_DEFAULT: &str = "20261122";

/// No limits, and short waits: generated requests ask for long ones.
const LIMITS: &str = "[waits]\nsync_default_s = 2\nsync_max_s = 2\nstatus_max_s = 2\n";

/// Many requests have wrong keys.
const SERVER: &str = "[auth]\nfailures_a_minute = 1000000\nfailures_burst = 1000000\n";

async fn generated_requests_get_described_answers(setup: Setup) {
    let platform =
        setup.conf(Conf { limits: LIMITS.into(), server: SERVER.into(), ..Conf::default() }).start().await;
    let gateway = &platform.gateway;
    // Functions and executions to be found.
    for marker in ["one", "two"] {
        let id = gateway.upload(marker).await;
        gateway.run_code(&id).await;
    }
    check(gateway).await;
    platform.finish().await;
}

async fn check(gateway: &Gateway) {
    let variable = |name: &str, default: &str| std::env::var(name).unwrap_or_else(|_| default.to_owned());
    let (seconds, seed) =
        (variable("SCHEMA_SECONDS", SECONDS_DEFAULT), variable("SCHEMA_SEED", SEED_DEFAULT));
    let duration = Duration::from_secs(seconds.parse().expect("SCHEMA_SECONDS is a number"));

    let dir = Scratch::new("schema");
    let files = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it");
    let config = files.join("schemathesis.toml").display().to_string();
    let mut env = path_env();
    env.push(("INFRA_API_KEY".into(), gateway.key().to_owned()));
    env.push(("HOME".into(), dir.path().display().to_string()));
    env.push(("PYTHONPATH".into(), files.display().to_string()));
    env.push(("PYTHONDONTWRITEBYTECODE".into(), "1".into()));
    let document = format!("http://{}/openapi.json", gateway.addr());
    let args = [
        "--config-file",
        &config,
        "run",
        &document,
        // Its answer does not end.
        "--exclude-path",
        "/events",
        "--checks",
        "all",
        "--no-color",
        "--max-time",
        &seconds,
        "--seed",
        &seed,
    ];
    let process = Process::start("schemathesis", &venv("st"), &args, &env, dir.path());
    let process = process.expect("setpriv (util-linux) is there");
    let status = process.wait_for_exit(duration + OVERHEAD).await;
    assert!(
        status.success(),
        "schemathesis (seed {seed}) exits with {status}:\n{}",
        process.output().tail(10_000)
    );
}
