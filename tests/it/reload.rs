//! Configuration files that change while the server runs.

use crate::harness::conf_lines::{key_lines, limit_lines, upstream_lines};
use crate::harness::gateway::{Conf, put_file, reloads};
use crate::harness::http::Request;
use crate::harness::platform::{Backend, HELLO, LONG_START, Platform};
use crate::harness::{Gateway, SOON, Setup, eventually, join_all, spawn, within};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use serde_json::json;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Instant;

const LIMITS: &str = "limits.toml";
const KEYS: &str = "keys.toml";

/// Writes the file in place, so a reader may find it empty.
fn write(platform: &Platform, limits: &str) {
    fs::write(platform.conf_file(LIMITS), limits).expect("the scratch directory is writable");
}

async fn start(limits: &str) -> Platform {
    Setup::serve().no_worker().conf(Conf { limits: limits.into(), ..Conf::default() }).start().await
}

/// `limits.toml` with a limit of so many requests per minute, and waits of one second at most.
fn settings(limit: u32) -> String {
    let numbers = format!("rate = {limit}\nperiod_s = 60\nburst = {limit}\non_redis_loss = \"local\"");
    "[waits]\nsync_max_s = 1\n".to_owned() + &limit_lines("test", "key", "/run", &numbers)
}

async fn refusals(gateway: &Gateway, file: &str) -> u32 {
    gateway.metric(&reloads(file, "refused")).await.unwrap_or_default() as u32
}

async fn applied_is(gateway: &Gateway, file: &str, expected: u32) {
    gateway.wait_for_metric(&reloads(file, "applied"), expected.into()).await;
}

async fn refused_is(gateway: &Gateway, file: &str, expected: u32) {
    gateway.wait_for_metric(&reloads(file, "refused"), expected.into()).await;
}

/// Waits for a log line. Returns a field of the first one.
async fn logged(gateway: &Gateway, message: &str, field: &str) -> String {
    eventually(message, SOON, || async {
        let lines = gateway.log();
        let line = lines.iter().find(|line| line["msg"] == message);
        line.and_then(|line| line[field].as_str()).map(str::to_owned).ok_or_else(|| "no line".to_owned())
    })
    .await
}

async fn limit_of(gateway: &Gateway) -> Option<String> {
    let answer = gateway.run(HELLO, &json!(1)).header("x-async", "true").send().await;
    answer.header("x-ratelimit-limit").map(str::to_owned)
}

async fn limit_becomes(gateway: &Gateway, limit: &str) {
    eventually(&format!("the limit {limit}"), SOON, || async {
        let found = limit_of(gateway).await;
        if found.as_deref() == Some(limit) { Ok(()) } else { Err(format!("{found:?}")) }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_saved_file_is_applied_without_a_signal() {
    let platform = start("").await;
    let gateway = &platform.gateway;
    assert_eq!(limit_of(gateway).await, None);
    write(&platform, &settings(77));
    limit_becomes(gateway, "77").await;
    // Without a worker the wait ends after `sync_max_s`, which was 290 s before.
    let run = gateway.run(HELLO, &json!(1)).header("prefer", "wait=100");
    let answer = within("the end of the wait", SOON, run.send()).await.expect(202);
    assert_eq!(answer.json()["status"], "TIMEOUT");
    let changes = logged(gateway, "Configuration Applied", "changes").await;
    assert!(
        changes.contains("waits.sync_max_s 290 → 1") && changes.contains("limit.test.rate (none) → 77"),
        "{changes}"
    );
    platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invalid_file_is_rejected_as_a_whole_and_once() {
    let platform = start(&settings(50)).await;
    let gateway = &platform.gateway;
    platform.put_conf(LIMITS, &format!("{}\n[batch]\nsends_max = 0\n", settings(60)));
    refused_is(gateway, LIMITS, 1).await;
    let problem = logged(gateway, "Configuration Refused", "problem").await;
    assert!(problem.ends_with("limits.toml:13: batch.sends_max must be at least 1"), "{problem}");
    assert_eq!(limit_of(gateway).await.as_deref(), Some("50"), "the new settings are in force");

    // A deleted file removes no limit.
    fs::remove_file(platform.conf_file(LIMITS)).expect("it exists");
    refused_is(gateway, LIMITS, 2).await;
    assert_eq!(limit_of(gateway).await.as_deref(), Some("50"));
    gateway.signal(Signal::SIGHUP);
    refused_is(gateway, LIMITS, 3).await;

    platform.put_conf(LIMITS, &settings(60));
    applied_is(gateway, LIMITS, 1).await;
    assert_eq!(limit_of(gateway).await.as_deref(), Some("60"));
    assert_eq!(refusals(gateway, LIMITS).await, 3, "a rejection is counted twice");
    platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_an_explicit_empty_list_removes_all_limits() {
    let platform = start(&settings(50)).await;
    let gateway = &platform.gateway;
    // Such contents may be those of a file that is being written.
    for (n, text) in [(1, ""), (2, "# soon\n"), (3, "[waits]\nsync_max_s = 5\n")] {
        platform.put_conf(LIMITS, text);
        refused_is(gateway, LIMITS, n).await;
        assert_eq!(limit_of(gateway).await.as_deref(), Some("50"), "{text:?}");
    }
    platform.put_conf(LIMITS, "limit = []\n");
    applied_is(gateway, LIMITS, 1).await;
    assert_eq!(limit_of(gateway).await, None);
    platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_that_need_a_restart_are_logged() {
    let platform = start(&settings(50)).await;
    platform.put_conf("server.toml", &format!("{LONG_START}[shutdown]\ndrain_timeout_s = 7\n"));
    applied_is(&platform.gateway, "server.toml", 1).await;
    let changes = logged(&platform.gateway, "Restart Needed", "changes").await;
    assert_eq!(changes, "shutdown.drain_timeout_s 30 → 7");
    platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rate_limit_overrides_reloaded_files() {
    let conf = Conf { limits: settings(50), ..Conf::default() };
    let platform = Setup::serve().no_worker().conf(conf).env("RATE_LIMIT", "33").start().await;
    assert_eq!(limit_of(&platform.gateway).await.as_deref(), Some("33"));
    platform.put_conf(LIMITS, &settings(60).replace("sync_max_s = 1", "sync_max_s = 2"));
    applied_is(&platform.gateway, LIMITS, 1).await;
    assert_eq!(limit_of(&platform.gateway).await.as_deref(), Some("33"));
    platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_while_settings_change() {
    const RELOADS: u32 = 100;
    // A busy machine makes the queue slow. No job is shed for that.
    let settings = |limit| settings(limit) + "[overload]\nconfirm_target_ms = 0\n";
    let platform = Setup::serve().conf(Conf { limits: settings(1_000_000), ..Conf::default() }).start().await;
    let gateway = &platform.gateway;
    let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
    let clients: Vec<_> = (0..4)
        .map(|_| {
            let (stop, answered) = (Arc::clone(&stop), Arc::clone(&answered));
            let request = gateway.run(HELLO, &json!(1)).header("x-async", "true");
            spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    request.clone().send().await.expect(202);
                    answered.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let answered = || answered.load(Ordering::Relaxed);
    for n in 1..=RELOADS {
        let before = answered();
        platform.put_conf(LIMITS, &settings(1_000_000 + n));
        gateway.signal(Signal::SIGHUP);
        applied_is(gateway, LIMITS, n).await;
        // At least one request is answered for each change.
        eventually("an answer", SOON, || async {
            let failed = clients.iter().any(tokio::task::JoinHandle::is_finished);
            if failed || answered() > before { Ok(()) } else { Err("none".to_owned()) }
        })
        .await;
    }
    stop.store(true, Ordering::Relaxed);
    join_all("the clients", SOON, clients).await;
    assert_eq!(limit_of(gateway).await.as_deref(), Some("1000100"));
    platform.finish().await;
}

async fn start_dev(conf: Conf) -> Platform {
    Setup::new(Backend::Dev).conf(conf).start().await
}

async fn wait_for_status(gateway: &Gateway, key: &str, status: u16) {
    eventually(&format!("{key}: {status}"), SOON, || async {
        let answer = gateway.anonymous("GET", "/functions").header("x-api-key", key).send().await;
        if answer.status == status { Ok(()) } else { Err(answer.text()) }
    })
    .await;
}

/// (name, function that makes it of `keys.toml`, text of the problem)
type InvalidFile = (&'static str, fn(&Path), &'static str);

const INVALID_FILES: [InvalidFile; 9] = [
    ("a FIFO", |path| nix::unistd::mkfifo(path, Mode::S_IRWXU).expect("a FIFO"), "is a FIFO"),
    ("endless", |path| symlink("/dev/zero", path).expect("a link"), "is a device"),
    ("a terminal", |path| symlink("/dev/ptmx", path).expect("a link"), "is a device"),
    ("a directory", |path| fs::create_dir(path).expect("a directory"), "is a directory"),
    (
        "huge",
        |path| fs::File::create(path).and_then(|file| file.set_len(1 << 40)).expect("a sparse file"),
        "is larger than 8 MiB",
    ),
    ("a link to nothing", |path| symlink("gone", path).expect("a link"), "symbolic link to gone"),
    ("a link to itself", |path| symlink("keys.toml", path).expect("a link"), "cannot be read"),
    ("zeros", |path| fs::write(path, [b'#', b'\n', 0, 0]).expect("writable"), "a NUL byte in line 2"),
    ("Latin-1", |path| fs::write(path, b"# \xfc\n").expect("writable"), "is not UTF-8 in line 1"),
];

/// Files that block, never end or are not text are rejected with the reason. Other files are still applied,
/// and so is this one when it is a text file again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_that_are_not_text_are_rejected_and_reloading_continues() {
    let (one, both) = (key_lines("one", "key-one", &["read"]), key_lines("two", "key-two", &["read"]));
    let both = format!("{one}{both}");
    let conf = Conf { keys: both.clone(), limits: settings(1000), ..Conf::default() };
    let platform = start_dev(conf).await;
    let (gateway, path) = (&platform.gateway, platform.conf_file(KEYS));
    for (n, (what, make, expected)) in (1..).zip(INVALID_FILES) {
        fs::remove_file(&path).expect("it exists");
        make(&path);
        eventually(what, SOON, || async {
            let lines = gateway.log();
            let is_expected = |line: &&serde_json::Value| {
                let problem = line["problem"].as_str().unwrap_or_default();
                line["msg"] == "Configuration Refused" && line["file"] == KEYS && problem.contains(expected)
            };
            lines.iter().find(is_expected).map(drop).ok_or_else(|| gateway.output().tail(5))
        })
        .await;
        wait_for_status(gateway, "key-two", 200).await;
        // Another file.
        platform.put_conf(LIMITS, &settings(1000 + n));
        applied_is(gateway, LIMITS, n).await;
        assert_eq!(limit_of(gateway).await, Some((1000 + n).to_string()), "{what}");
        if path.is_dir() {
            fs::remove_dir(&path).expect("it is empty");
        }
        put_file(&path, &one);
        wait_for_status(gateway, "key-two", 401).await;
        wait_for_status(gateway, "key-one", 200).await;
        put_file(&path, &both);
        wait_for_status(gateway, "key-two", 200).await;
    }
    assert_eq!(refusals(gateway, LIMITS).await, 0, "a rejection is counted for another file");
    platform.finish().await;
}

/// A removed key is rejected, although other files are invalid.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invalid_file_does_not_delay_the_removal_of_a_key() {
    let key = |name: &str| key_lines(name, &format!("key-{name}"), &["read"]);
    let all = ["a", "b", "c", "d"];
    let upstream = upstream_lines("u", &[([127, 0, 0, 1], 9).into()], "scope = \"none\"\n");
    let conf = Conf { keys: all.map(key).concat(), limits: settings(50), ..Conf::default() };
    let platform = start_dev(conf).await;
    let gateway = &platform.gateway;
    let broken =
        [("upstreams.toml", "[[upstream]]\nname = 1\n"), ("server.toml", "[http"), (LIMITS, "rate = 1\n")];
    for (n, (file, text)) in broken.into_iter().enumerate() {
        platform.put_conf(file, text);
        refused_is(gateway, file, 1).await;
        let left = all[n + 1..].iter().map(|name| key(name)).collect::<String>();
        platform.put_conf(KEYS, &left);
        wait_for_status(gateway, &format!("key-{}", all[n]), 401).await;
        wait_for_status(gateway, "key-d", 200).await;
        assert_eq!(refusals(gateway, file).await, 1, "{file} is rejected twice");
    }
    assert_eq!(refusals(gateway, KEYS).await, 0);
    assert_eq!(limit_of(gateway).await.as_deref(), Some("50"), "an invalid file has changed the limit");
    // A signal reports all rejected files again.
    gateway.signal(Signal::SIGHUP);
    for (file, _) in broken {
        refused_is(gateway, file, 2).await;
    }
    // A new upstream waits for valid limits, because they may name it.
    platform.put_conf("upstreams.toml", &upstream);
    refused_is(gateway, "upstreams.toml", 3).await;
    let up = Request::new(gateway.addr(), "GET", "/u/x");
    up.clone().send().await.expect_problem(404);
    platform.put_conf(LIMITS, &settings(60));
    applied_is(gateway, "upstreams.toml", 1).await;
    assert_eq!(limit_of(gateway).await.as_deref(), Some("60"));
    up.send().await.expect_problem(503); // without a listener
    platform.finish().await;
}

/// As in a ConfigMap volume of Kubernetes: each file is a link through a directory link that is replaced. A
/// file that keeps its size and modification time is read, too.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn links_are_followed_and_modification_times_are_ignored() {
    let platform = start_dev(Conf { limits: settings(50), ..Conf::default() }).await;
    let gateway = &platform.gateway;
    let at = |name: &str| platform.conf_file(name);
    let version = |name: &str, limit: u32| {
        fs::create_dir(at(name)).expect("writable");
        fs::write(at(name).join(LIMITS), settings(limit)).expect("writable");
        symlink(name, at("..new")).expect("writable");
        fs::rename(at("..new"), at("..data")).expect("writable");
    };
    version("..1", 50);
    symlink("..data/limits.toml", at("link")).expect("writable");
    fs::rename(at("link"), at(LIMITS)).expect("writable");
    version("..2", 51);
    applied_is(gateway, LIMITS, 1).await;
    assert_eq!(limit_of(gateway).await.as_deref(), Some("51"));
    let file = at(LIMITS);
    let before = fs::metadata(&file).and_then(|metadata| metadata.modified()).expect("it exists");
    fs::write(&file, settings(52)).expect("writable");
    let written = fs::File::options().write(true).open(&file).expect("it exists");
    written.set_modified(before).expect("its own");
    limit_becomes(gateway, "52").await;
    assert_eq!(refusals(gateway, LIMITS).await, 0);
    platform.finish().await;
}

/// Other files are still applied.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_keeps_changing_is_not_applied() {
    let platform = start_dev(Conf { limits: settings(50), ..Conf::default() }).await;
    let gateway = &platform.gateway;
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, limits) = (Arc::clone(&stop), platform.conf_file(LIMITS));
    // The writer ends if the test fails.
    let end = Instant::now() + 4 * SOON;
    let goes_on = move |_: &u32| !stopped.load(Ordering::Relaxed) && Instant::now() < end;
    let writer = tokio::task::spawn_blocking(move || {
        for n in (1000..).take_while(goes_on) {
            put_file(&limits, &settings(n));
        }
        put_file(&limits, &settings(60));
    });
    // On a busy machine the file may be applied between two writes, and be rejected again later.
    gateway.wait_for_metric_at_least(&reloads(LIMITS, "refused"), 1.0).await;
    platform.put_conf(KEYS, &key_lines("new", "key-new", &["read"]));
    wait_for_status(gateway, "key-new", 200).await;
    let problem = logged(gateway, "Configuration Refused", "problem").await;
    assert!(problem.contains("changes while it is read"), "{problem}");
    stop.store(true, Ordering::Relaxed);
    within("the end of the writer", SOON, writer).await.expect("it writes");
    limit_becomes(gateway, "60").await;
    platform.finish().await;
}
