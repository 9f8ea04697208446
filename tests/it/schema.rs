//! Requests of all kinds, made of the description of the interface by schemathesis: good ones, bad ones, and sequences.
//!
//! It is fast as part of all tests; `make schema` lets it go on for as long as `SCHEMA_SECONDS` says.

use crate::harness::aws::venv;
use crate::harness::gateway::Conf;
use crate::harness::process::{Process, Scratch};
use crate::harness::{Gateway, Setup, eventually, path_env};
use std::path::Path;
use std::time::Duration;

over_both!(whatever_is_sent);

/// What it takes to start, to shrink what it found and to tell of it, on a busy machine.
const BESIDES: Duration = Duration::from_secs(120);
const SECONDS_DEFAULT: &str = "30";
const SEED_DEFAULT: &str = "20261122";

/// No limit, so that nothing is refused for coming often, and short waits: made-up requests ask for long ones.
const LIMITS: &str = "[waits]\nsync_default_s = 2\nsync_max_s = 2\nstatus_max_s = 2\n";

/// Guessing keys is what it does.
const SERVER: &str = "[auth]\nfailures_a_minute = 1000000\nfailures_burst = 1000000\n";

async fn whatever_is_sent(setup: Setup) {
    let platform =
        setup.conf(Conf { limits: LIMITS.into(), server: SERVER.into(), ..Conf::default() }).start().await;
    let gateway = &platform.gateway;
    // Something to find, beside what the requests themselves make.
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
    let ended = || async { process.exit_status().ok_or_else(|| process.output().tail(1_000)) };
    let status = eventually("the end of schemathesis", duration + BESIDES, ended).await;
    assert!(
        status.success(),
        "schemathesis (seed {seed}) ends with {status}:\n{}",
        process.output().tail(10_000)
    );
}
