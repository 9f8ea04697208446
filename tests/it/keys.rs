//! API keys: scopes, functions, validity, limits, rotation.

use crate::harness::conf_lines::{key_lines, limit_lines};
use crate::harness::gateway::{Conf, run_to_end};
use crate::harness::http::{Answer, Request};
use crate::harness::platform::{HELLO, new_key};
use crate::harness::process::{Process, Scratch};
use crate::harness::{Gateway, Platform, SOON, Setup, eventually};
use serde_json::json;
use std::fs;
use std::path::Path;

on_both_backends!(
    each_route_requires_its_scope,
    a_key_runs_only_its_functions,
    wrong_keys_are_limited_by_address,
    a_key_may_have_its_own_limit,
);

fn with(gateway: &Gateway, key: &str, method: &str, target: &str) -> Request {
    gateway.anonymous(method, target).header("x-api-key", key)
}

async fn run(gateway: &Gateway, key: &str, function: &str) -> Answer {
    let body = json!({ "functionId": function });
    with(gateway, key, "POST", "/run").header("x-async", "true").json(&body).send().await
}

fn code(answer: &Answer) -> String {
    answer.json()["code"].as_str().unwrap_or_default().to_owned()
}

async fn start(setup: Setup, server: &str, keys: &str) -> Platform {
    setup.conf(Conf { server: server.into(), keys: keys.into(), ..Conf::default() }).start().await
}

async fn each_route_requires_its_scope(setup: Setup) {
    let all = ["run", "read", "write", "worker", "metrics", "admin"];
    let keys: String = all.iter().map(|scope| key_lines(scope, &format!("key-{scope}"), &[scope])).collect();
    let expired = format!("{}expires = 2026-01-01T00:00:00Z\n", key_lines("old", "key-old", &["run"]));
    let early = format!("{}not_before = 2099-01-01T00:00:00Z\n", key_lines("early", "key-early", &["run"]));
    let platform =
        start(setup, "[auth]\nmetrics_need_key = true\n", &format!("{keys}{expired}{early}")).await;
    let gateway = &platform.gateway;
    let calls: [(&str, &str, &str, u16); 5] = [
        ("run", "GET", "/status/x", 404),
        ("read", "GET", "/functions", 200),
        ("write", "DELETE", "/functions/absent", 404),
        ("worker", "POST", "/worker/heartbeat", 400),
        ("metrics", "GET", "/metrics", 200),
    ];
    for (needed, method, target, status) in calls {
        for scope in all {
            let mut request = with(gateway, &format!("key-{scope}"), method, target);
            if method == "POST" {
                request = request.body("application/json", "{}");
            }
            let answer = request.send().await;
            let expected = if scope == needed || scope == "admin" { status } else { 403 };
            assert_eq!(answer.status, expected, "{scope}: {method} {target}: {}", answer.text());
            if expected == 403 {
                assert_eq!(code(&answer), "forbidden");
            }
        }
    }
    gateway.anonymous("GET", "/metrics").send().await.expect_problem(401);
    gateway.request("GET", "/metrics").send().await.expect(200);
    for key in ["key-old", "key-early"] {
        assert_eq!(code(&run(gateway, key, HELLO).await.expect_problem(401)), "key_not_valid_now");
    }
    assert!(!gateway.output().contains("key-run"), "a key is in the log");
    platform.stop().await;
}

async fn a_key_runs_only_its_functions(setup: Setup) {
    let keys = format!(
        "{}functions = [\"{HELLO}\", \"team-*\"]\n",
        key_lines("narrow", "key-narrow", &["run", "write"])
    );
    let platform = start(setup, "", &keys).await;
    let gateway = &platform.gateway;
    let other = gateway.upload("x").await;
    run(gateway, "key-narrow", HELLO).await.expect(202);
    assert_eq!(code(&run(gateway, "key-narrow", &other).await.expect_problem(403)), "function_forbidden");
    run(gateway, "key-narrow", "no-such-function").await.expect_problem(404);
    // A malformed idempotency key is reported after the permission of an existing function. Without a
    // function it is reported first.
    for (function, status, expected) in
        [(other.as_str(), 403, "function_forbidden"), ("no-such-function", 400, "invalid_request")]
    {
        let body = json!({ "functionId": function });
        let malformed = with(gateway, "key-narrow", "POST", "/run").header("idempotency-key", "a b");
        let answer = malformed.json(&body).send().await.expect_problem(status);
        assert_eq!(code(&answer), expected, "{function}");
    }
    platform.finish().await;
}

/// A valid key from the same address is not limited.
async fn wrong_keys_are_limited_by_address(setup: Setup) {
    let server =
        "[auth]\nfailures_a_minute = 1\nfailures_burst = 5\n[http]\ntrusted_proxies = [\"127.0.0.1\"]\n";
    let platform = start(setup, server, &key_lines("edge", "key-edge", &["run"])).await;
    let gateway = &platform.gateway;
    let from =
        |client: &str, key: &str| with(gateway, key, "GET", "/functions").header("x-forwarded-for", client);
    for n in 0..5 {
        from("2001:db8::1", &format!("guess-{n}")).send().await.expect_problem(401);
    }
    let refused = from("2001:db8::2", "guess-6").send().await.expect_problem(429);
    assert_eq!((code(&refused).as_str(), refused.need("x-ratelimit-remaining")), ("too_many_failures", "0"));
    let retry: u64 = refused.need("retry-after").parse().expect("seconds");
    assert!((1..=60).contains(&retry), "{retry}");
    // Other addresses are not limited.
    from("2001:db8:0:1::1", "guess").send().await.expect_problem(401);
    for n in 0..5 {
        // Addresses to the left of the last one that a trusted proxy has seen may be forged.
        from(&format!("6.6.6.{n}, 9.9.9.9"), "guess").send().await.expect_problem(401);
    }
    from("6.6.6.6, 9.9.9.9, 127.0.0.1", "guess").send().await.expect_problem(429);
    from("6.6.6.6", "guess").send().await.expect_problem(401);
    from("2001:db8::1", "key-edge").send().await.expect_problem(403);
    from("2001:db8::1", gateway.key()).send().await.expect(200);
    platform.finish().await;
}

async fn a_key_may_have_its_own_limit(setup: Setup) {
    let keys = format!(
        "{}limit = {{ rate = 60, period_s = 3600, burst = 2 }}\n{}",
        key_lines("slow", "key-slow", &["run"]),
        key_lines("usual", "key-usual", &["run"])
    );
    let numbers = "rate = 70\nperiod_s = 60\nburst = 70\non_redis_loss = \"local\"\n";
    let limits = limit_lines("test", "key", "/run", numbers);
    let platform = setup.conf(Conf { limits, keys, ..Conf::default() }).start().await;
    let gateway = &platform.gateway;
    for expected in [202, 202, 429] {
        let answer = run(gateway, "key-slow", HELLO).await.expect(expected);
        assert_eq!(answer.need("x-ratelimit-limit"), "2");
    }
    assert_eq!(run(gateway, "key-usual", HELLO).await.expect(202).need("x-ratelimit-limit"), "70");
    platform.finish().await;
}

/// A new key is accepted, and a removed key is rejected.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_rotated_without_a_restart() {
    let (old, new) = (key_lines("edge", "key-one", &["run"]), key_lines("edge", "key-two", &["run"]));
    let platform = start(Setup::serve().no_worker(), "", &old).await;
    let gateway = &platform.gateway;
    run(gateway, "key-one", HELLO).await.expect(202);
    run(gateway, "key-two", HELLO).await.expect_problem(401);
    let write = |keys: &str| platform.put_conf("keys.toml", keys);
    write(&format!("{old}{new}"));
    let answers = |key: &'static str, status: u16| async move {
        eventually(&format!("{key}: {status}"), SOON, || async {
            let answer = run(gateway, key, HELLO).await;
            if answer.status == status { Ok(()) } else { Err(answer.text()) }
        })
        .await;
    };
    answers("key-two", 202).await;
    run(gateway, "key-one", HELLO).await.expect(202);
    write(&new);
    answers("key-one", 401).await;
    run(gateway, "key-two", HELLO).await.expect(202);
    // An invalid file changes nothing. The log has the line number.
    write("[[key]]\nname = \"x\"\nsha256 = \"12\"\nscopes = []\n");
    eventually("the log line", SOON, || async {
        let lines = gateway.log();
        let line = lines.iter().find(|line| line["msg"] == "Configuration Refused");
        let problem = line.and_then(|line| line["problem"].as_str()).unwrap_or_default();
        if problem.contains("keys.toml:3:") { Ok(()) } else { Err(problem.to_owned()) }
    })
    .await;
    run(gateway, "key-two", HELLO).await.expect(202);
    platform.stop().await;
}

/// `key new` prints the key once, and lines for `keys.toml` that contain only its hash.
#[tokio::test]
async fn a_new_key_is_printed_once() {
    let dir = Scratch::new("key");
    let args = ["key", "new", "--name", "edge", "--scope", "run", "--scope", "read", "--function", "a-*"];
    let run = run_to_end(&args, &[], dir.path(), SOON).await;
    assert_eq!(run.code, Some(0), "{}", run.output);
    let key = run.stderr.iter().find_map(|line| line.split_whitespace().find(|word| word.starts_with("ic_")));
    let key = key.expect("the key");
    // The outputs come from two pipes, so the key may be between the lines.
    let is_for_people = |line: &&str| run.stderr.iter().any(|shown| shown.trim() == *line);
    let lines: Vec<&str> = run.output.lines().map(str::trim).filter(|line| !is_for_people(line)).collect();
    let expected = key_lines("edge", key, &["run", "read"]) + "functions = [\"a-*\"]";
    assert!(lines.join("\n").contains(&expected), "{}", run.output);
    let args = ["key", "new", "--name", "a b", "--scope", "run"];
    let run = run_to_end(&args, &[], dir.path(), SOON).await;
    assert_eq!(run.code, Some(78), "{}", run.output);
}

/// The `key new` commands in docs/configuration.md and in the shipped files.
fn documented_key_commands() -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut commands = Vec::new();
    for file in ["docs/configuration.md", "conf/keys.toml"] {
        let text = fs::read_to_string(root.join(file)).expect("a file of the project");
        let shown = text.match_indices("infra-controller key new").map(|(at, _)| {
            let line = text[at..].lines().next().expect("a line");
            line.split('`').next().expect("a part").trim().to_owned()
        });
        let before = commands.len();
        commands.extend(shown);
        assert!(commands.len() > before, "{file} has no such command");
    }
    commands
}

/// Runs a documented command in `dir`. Returns its output.
async fn shell(dir: &Path, line: &str) -> String {
    let program = Path::new(env!("CARGO_BIN_EXE_infra-controller"));
    let path = std::env::var("PATH").unwrap_or_default();
    let path = format!("{}:{path}", program.parent().expect("a directory").display());
    let process =
        Process::start("sh", Path::new("sh"), &["-c", line], &[("PATH".to_owned(), path)], dir).expect("sh");
    let status = process.wait_for_exit(SOON).await;
    assert!(status.success(), "{line}: {}", process.output().tail(20));
    process.output().tail(20)
}

/// With the shipped files, and with other common contents of `keys.toml`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_documented_command_adds_a_key() {
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("conf");
    let old = key_lines("old", "key-old", &["run"]);
    for keys in [
        None,
        Some("# no line break at the end".to_owned()),
        Some(old.trim_end().to_owned()),
        // As in an earlier version of the shipped file.
        Some("key = []\n".to_owned()),
        Some("key = []".to_owned()),
    ] {
        let dir = Scratch::new("documented");
        fs::create_dir(dir.path().join("conf")).expect("writable");
        for file in fs::read_dir(&shipped).expect("a directory of the project").flatten() {
            fs::copy(file.path(), dir.path().join("conf").join(file.file_name())).expect("writable");
        }
        if let Some(keys) = &keys {
            fs::write(dir.path().join("conf/keys.toml"), keys).expect("writable");
        }
        let mut made = Vec::new();
        for line in documented_key_commands() {
            let output = shell(dir.path(), &line).await;
            let key = output.split_whitespace().find(|word| word.starts_with("ic_"));
            let key = key.unwrap_or_else(|| panic!("{line} prints no key: {output}")).to_owned();
            made.push((key, line.contains("--expires")));
        }
        let master = new_key();
        let env = [("INFRA_API_KEY".to_owned(), master.clone())];
        let args = ["dev", "--port", "0", "--data-dir", "data", "--conf", "conf"];
        let gateway = Gateway::start_in(dir, &args, &env, &master, &[]).await;
        for (key, expires) in &made {
            let answer = with(&gateway, key, "GET", "/status/x").send().await;
            // The documented expiry may have passed.
            let is_known = answer.status == 404 || *expires && code(&answer) == "key_not_valid_now";
            assert!(is_known, "{keys:?}: {}", answer.text());
        }
        if keys.is_some_and(|keys| keys.contains("old")) {
            with(&gateway, "key-old", "GET", "/status/x").send().await.expect(404);
        }
        gateway.stop().await;
    }
}
