//! Settings that change while the server runs.

use crate::harness::gateway::Conf;
use crate::harness::keys::key_lines;
use crate::harness::platform::{Backend, HELLO, Platform};
use crate::harness::{Gateway, SOON, Setup, eventually, spawn, within};
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

fn applied(file: &str) -> String {
    format!(r#"infra_conf_reloads_total{{file="{file}",result="applied"}}"#)
}

fn refused(file: &str) -> String {
    format!(r#"infra_conf_reloads_total{{file="{file}",result="refused"}}"#)
}

fn write(platform: &Platform, limits: &str) {
    std::fs::write(platform.conf_file("limits.toml"), limits).expect("the scratch directory is writable");
}

async fn start(limits: &str) -> Platform {
    Setup::serve().no_worker().conf(Conf { limits: limits.into(), ..Conf::default() }).start().await
}

/// A limit of so many requests a minute, and no longer wait than a second.
fn settings(limit: u32) -> String {
    format!(
        "[waits]\nsync_max_s = 1\n[[limit]]\nname = \"test\"\nidentity = \"key\"\nroutes = [\"/run\"]\nrate = {limit}\nperiod_s = 60\nburst = {limit}\non_redis_loss = \"local\"\n"
    )
}

async fn count(gateway: &Gateway, series: &str) -> u32 {
    gateway.metric(series).await.unwrap_or_default() as u32
}

async fn counted(gateway: &Gateway, series: &str, expected: u32) {
    eventually(&format!("{series} {expected}"), SOON, || async {
        let seen = count(gateway, series).await;
        if seen == expected { Ok(()) } else { Err(seen.to_string()) }
    })
    .await;
}

async fn applied_is(gateway: &Gateway, file: &str, expected: u32) {
    counted(gateway, &applied(file), expected).await;
}

async fn refused_is(gateway: &Gateway, file: &str, expected: u32) {
    counted(gateway, &refused(file), expected).await;
}

/// One field of the first such line; lines come a moment after what they tell of.
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_saved_file_is_in_force_within_a_second() {
    let platform = start("").await;
    let gateway = &platform.gateway;
    assert_eq!(limit_of(gateway).await, None);
    write(&platform, &settings(77));
    eventually("the new limit", SOON, || async {
        let limit = limit_of(gateway).await;
        if limit.as_deref() == Some("77") { Ok(()) } else { Err(format!("{limit:?}")) }
    })
    .await;
    // Nobody works: the run ends with the longest wait, which was 290 s.
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
async fn a_broken_file_is_refused_whole_and_told_once() {
    let platform = start(&settings(50)).await;
    let gateway = &platform.gateway;
    write(&platform, &format!("{}\n[batch]\nsends_max = 0\n", settings(60)));
    refused_is(gateway, LIMITS, 1).await;
    let problem = logged(gateway, "Configuration Refused", "problem").await;
    assert!(problem.ends_with("limits.toml:13: batch.sends_max must be at least 1"), "{problem}");
    assert_eq!(limit_of(gateway).await.as_deref(), Some("50"), "the old settings");

    // A file that is gone lifts no limit.
    std::fs::remove_file(platform.conf_file("limits.toml")).expect("it is there");
    refused_is(gateway, LIMITS, 2).await;
    assert_eq!(limit_of(gateway).await.as_deref(), Some("50"));
    gateway.signal(Signal::SIGHUP);
    refused_is(gateway, LIMITS, 3).await;

    write(&platform, &settings(60));
    applied_is(gateway, LIMITS, 1).await;
    assert_eq!(limit_of(gateway).await.as_deref(), Some("60"));
    assert_eq!(count(gateway, &refused(LIMITS)).await, 3, "each is told once");
    platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_are_all_lifted_only_by_saying_so() {
    let platform = start(&settings(50)).await;
    let gateway = &platform.gateway;
    // As a file is for a moment while it is written.
    for (n, text) in [(1, ""), (2, "# soon\n"), (3, "[waits]\nsync_max_s = 5\n")] {
        write(&platform, text);
        refused_is(gateway, LIMITS, n).await;
        assert_eq!(limit_of(gateway).await.as_deref(), Some("50"), "{text:?}");
    }
    write(&platform, "limit = []\n");
    applied_is(gateway, LIMITS, 1).await;
    assert_eq!(limit_of(gateway).await, None);
    platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_read_at_start_only_says_so() {
    let platform = start(&settings(50)).await;
    std::fs::write(platform.conf_file("server.toml"), "[shutdown]\ndrain_timeout_s = 7\n").expect("writable");
    applied_is(&platform.gateway, "server.toml", 1).await;
    let changes = logged(&platform.gateway, "Restart Needed", "changes").await;
    assert_eq!(changes, "shutdown.drain_timeout_s 30 → 7");
    platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_environment_goes_before_a_new_file_as_well() {
    let conf = Conf { limits: settings(50), ..Conf::default() };
    let platform = Setup::serve().no_worker().conf(conf).env("RATE_LIMIT", "33").start().await;
    assert_eq!(limit_of(&platform.gateway).await.as_deref(), Some("33"));
    write(&platform, &settings(60).replace("sync_max_s = 1", "sync_max_s = 2"));
    applied_is(&platform.gateway, LIMITS, 1).await;
    assert_eq!(limit_of(&platform.gateway).await.as_deref(), Some("33"));
    platform.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_while_settings_change() {
    const RELOADS: u32 = 100;
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
    for n in 1..=RELOADS {
        write(&platform, &settings(1_000_000 + n));
        gateway.signal(Signal::SIGHUP);
        applied_is(gateway, LIMITS, n).await;
    }
    stop.store(true, Ordering::Relaxed);
    for client in clients {
        within("the client's end", SOON, client).await.expect("no request failed");
    }
    assert!(answered.load(Ordering::Relaxed) > RELOADS, "{answered:?} requests");
    assert_eq!(limit_of(gateway).await.as_deref(), Some("1000100"));
    platform.finish().await;
}

async fn start_dev(conf: Conf) -> Platform {
    Setup::new(Backend::Dev).conf(conf).start().await
}

async fn answers(gateway: &Gateway, key: &str, status: u16) {
    eventually(&format!("{key}: {status}"), SOON, || async {
        let answer = gateway.anonymous("GET", "/functions").header("x-api-key", key).send().await;
        if answer.status == status { Ok(()) } else { Err(answer.text()) }
    })
    .await;
}

/// Puts a file in the place of another in one step.
fn put(path: &Path, text: &str) {
    let draft = path.with_extension("draft");
    fs::write(&draft, text).expect("the scratch directory is writable");
    fs::rename(draft, path).expect("the scratch directory is writable");
}

/// (what `keys.toml` becomes, how, what is said of it)
type Obstacle = (&'static str, fn(&Path), &'static str);

const OBSTACLES: [Obstacle; 9] = [
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

/// What hangs, never ends or is no text is rejected with its reason. The other files go on taking force, and
/// so does this one once it is a file again: with the key gone that was removed meanwhile.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_no_text_file_is_refused_and_reloading_goes_on() {
    let (one, both) = (key_lines("one", "key-one", &["read"]), key_lines("two", "key-two", &["read"]));
    let both = format!("{one}{both}");
    let conf = Conf { keys: both.clone(), limits: settings(1000), ..Conf::default() };
    let platform = start_dev(conf).await;
    let (gateway, path) = (&platform.gateway, platform.conf_file(KEYS));
    for (n, (what, make, told)) in (1..).zip(OBSTACLES) {
        fs::remove_file(&path).expect("it is there");
        make(&path);
        eventually(what, SOON, || async {
            let lines = gateway.log();
            let is_of_it = |line: &&serde_json::Value| {
                let problem = line["problem"].as_str().unwrap_or_default();
                line["msg"] == "Configuration Refused" && line["file"] == KEYS && problem.contains(told)
            };
            lines.iter().find(is_of_it).map(drop).ok_or_else(|| gateway.output().tail(5))
        })
        .await;
        answers(gateway, "key-two", 200).await;
        // The others.
        put(&platform.conf_file(LIMITS), &settings(1000 + n));
        applied_is(gateway, LIMITS, n).await;
        assert_eq!(limit_of(gateway).await, Some((1000 + n).to_string()), "{what}");
        if path.is_dir() {
            fs::remove_dir(&path).expect("it is empty");
        }
        put(&path, &one);
        answers(gateway, "key-two", 401).await;
        answers(gateway, "key-one", 200).await;
        put(&path, &both);
        answers(gateway, "key-two", 200).await;
    }
    assert_eq!(count(gateway, &refused(LIMITS)).await, 0, "each file is counted by itself");
    platform.finish().await;
}

/// Whatever is wrong with the other files, a key that is removed is refused.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mistake_in_one_file_keeps_no_removed_key_in_force() {
    let key = |name: &str| key_lines(name, &format!("key-{name}"), &["read"]);
    let all = ["a", "b", "c", "d"];
    let upstream =
        "[[upstream]]\nname = \"u\"\nprefix = \"/u\"\naddresses = [\"127.0.0.1:9\"]\nscope = \"none\"\n";
    let conf = Conf { keys: all.map(key).concat(), limits: settings(50), ..Conf::default() };
    let platform = start_dev(conf).await;
    let gateway = &platform.gateway;
    let broken =
        [("upstreams.toml", "[[upstream]]\nname = 1\n"), ("server.toml", "[http"), (LIMITS, "rate = 1\n")];
    for (n, (file, text)) in broken.into_iter().enumerate() {
        put(&platform.conf_file(file), text);
        refused_is(gateway, file, 1).await;
        let left = all[n + 1..].iter().map(|name| key(name)).collect::<String>();
        put(&platform.conf_file(KEYS), &left);
        answers(gateway, &format!("key-{}", all[n]), 401).await;
        answers(gateway, "key-d", 200).await;
        assert_eq!(count(gateway, &refused(file)).await, 1, "{file} is told once");
    }
    assert_eq!(count(gateway, &refused(KEYS)).await, 0);
    assert_eq!(limit_of(gateway).await.as_deref(), Some("50"), "what was in force stays");
    // Asked for, all that is rejected is told again.
    gateway.signal(Signal::SIGHUP);
    for (file, _) in broken {
        refused_is(gateway, file, 2).await;
    }
    // An upstream waits for the limits that may be on it, and takes force with them.
    put(&platform.conf_file("upstreams.toml"), upstream);
    refused_is(gateway, "upstreams.toml", 3).await;
    let up = crate::harness::http::Request::new(gateway.addr(), "GET", "/u/x");
    up.clone().send().await.expect_problem(404);
    put(&platform.conf_file(LIMITS), &settings(60));
    applied_is(gateway, "upstreams.toml", 1).await;
    assert_eq!(limit_of(gateway).await.as_deref(), Some("60"));
    up.send().await.expect_problem(503); // nobody listens there
    platform.finish().await;
}

/// As Kubernetes mounts a ConfigMap: each file is a link through a directory that is replaced as a whole. And
/// files that are written with the size and the time that they had.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn links_are_followed_and_times_are_not_believed() {
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
    let before = fs::metadata(&file).and_then(|metadata| metadata.modified()).expect("it is there");
    fs::write(&file, settings(52)).expect("writable");
    let written = fs::File::options().write(true).open(&file).expect("it is there");
    written.set_modified(before).expect("its own");
    eventually("the new limit", SOON, || async {
        let limit = limit_of(gateway).await;
        if limit.as_deref() == Some("52") { Ok(()) } else { Err(format!("{limit:?}")) }
    })
    .await;
    assert_eq!(count(gateway, &refused(LIMITS)).await, 0);
    platform.finish().await;
}

/// A file that is never the same twice is not used, and keeps nothing else from being used.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_that_goes_on_changing_waits() {
    let platform = start_dev(Conf { limits: settings(50), ..Conf::default() }).await;
    let gateway = &platform.gateway;
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, limits) = (Arc::clone(&stop), platform.conf_file(LIMITS));
    let end = Instant::now() + 4 * SOON;
    let goes_on = move |_: &u32| !stopped.load(Ordering::Relaxed) && Instant::now() < end;
    let writer = tokio::task::spawn_blocking(move || {
        for n in (1000..).take_while(goes_on) {
            put(&limits, &settings(n));
        }
        put(&limits, &settings(60));
    });
    refused_is(gateway, LIMITS, 1).await;
    put(&platform.conf_file(KEYS), &key_lines("new", "key-new", &["read"]));
    answers(gateway, "key-new", 200).await;
    let problem = logged(gateway, "Configuration Refused", "problem").await;
    assert!(problem.contains("changes while it is read"), "{problem}");
    stop.store(true, Ordering::Relaxed);
    within("the end of the writer", SOON, writer).await.expect("it writes");
    eventually("the last limit", SOON, || async {
        let limit = limit_of(gateway).await;
        if limit.as_deref() == Some("60") { Ok(()) } else { Err(format!("{limit:?}")) }
    })
    .await;
    platform.finish().await;
}
