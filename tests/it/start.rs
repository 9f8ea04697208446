//! The start of `serve`, and `check`: all or nothing, and what is said when it is nothing.

use crate::harness::aws::{Cloud, SECRET_ACCESS_KEY};
use crate::harness::gateway::{Conf, Run, run_to_end};
use crate::harness::platform::{HELLO, new_key};
use crate::harness::process::{Process, Scratch, free_port, listening_on};
use crate::harness::proxy::{Policy, Proxy};
use crate::harness::redis::Redis;
use crate::harness::{Gateway, SOON, Setup, eventually, path_env};
use serde_json::json;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

const CONFIG: i32 = 78;
const UNAVAILABLE: i32 = 69;
/// The start-up deadline is 10 s.
const GIVES_UP_WITHIN: Duration = Duration::from_secs(30);

type Env = BTreeMap<String, String>;

/// One way not to start.
struct Case {
    name: &'static str,
    env: Env,
    code: i32,
    /// Words that stand in one line of stderr, all of them.
    says: Vec<&'static str>,
}

impl Case {
    fn new(
        name: &'static str,
        code: i32,
        base: &Env,
        changes: &[(&str, &str)],
        says: &[&'static str],
    ) -> Self {
        let mut env = base.clone();
        for (name, value) in changes {
            env.insert((*name).to_owned(), (*value).to_owned());
        }
        Self { name, env, code, says: says.to_vec() }
    }

    /// The environment without these.
    fn without(name: &'static str, base: &Env, missing: &[&'static str], says: &[&'static str]) -> Self {
        let mut case = Self::new(name, CONFIG, base, &[], says);
        case.env.retain(|name, _| !missing.contains(&name.as_str()));
        case
    }
}

/// Everything that `serve` wants, in order.
fn good_env(cloud: &Cloud, redis: &Redis) -> Env {
    let mut env: Env = cloud.env(cloud.addr()).into_iter().collect();
    env.insert("REDIS_HOST".into(), "127.0.0.1".into());
    env.insert("REDIS_PORT".into(), redis.port().to_string());
    env.insert("INFRA_API_KEY".into(), new_key());
    env
}

/// A port of its own that no client socket can get by chance: below the ephemeral range.
fn quiet_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(21_000);
    loop {
        let port = NEXT.fetch_add(1, Ordering::Relaxed);
        if listening_on(port).is_empty() {
            return port;
        }
    }
}

/// Runs `serve` and `check`, which must both fail in the same way without ever having bound the port.
async fn check_all(cases: Vec<Case>) {
    for case in cases {
        let both = tokio::task::spawn_blocking(move || {
            std::thread::scope(|scope| {
                let runs = ["serve", "check"].map(|command| scope.spawn(|| check_one(&case, command)));
                runs.into_iter().for_each(|run| run.join().unwrap_or_else(|e| std::panic::resume_unwind(e)));
            });
        });
        both.await.unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()));
    }
}

fn check_one(case: &Case, command: &str) {
    let port = quiet_port();
    let mut env = case.env.clone();
    env.entry("PORT".to_owned()).or_insert_with(|| port.to_string());
    let env: Vec<(String, String)> = env.into_iter().collect();
    let dir = Scratch::new("start");
    let mut bound = false;
    let run =
        run_to_end(&[command], &env, dir.path(), GIVES_UP_WITHIN, || bound |= !listening_on(port).is_empty());
    let what = format!("{command}, {}", case.name);
    assert_eq!(run.code, Some(case.code), "{what}:\n{}", run.output);
    assert!(!bound, "{what} bound its port");
    assert!(!run.output.contains("Started"), "{what} said that it started:\n{}", run.output);
    let words = |line: &str| -> Vec<String> {
        line.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').map(str::to_owned).collect()
    };
    let says_all = |line: &String| case.says.iter().all(|&word| words(line).iter().any(|w| w == word));
    assert!(
        run.stderr.iter().any(says_all),
        "{what}: no line of stderr says {:?}:\n{}",
        case.says,
        run.output
    );
    let secrets = [env_secret(case, "INFRA_API_KEY"), Some(SECRET_ACCESS_KEY), Some("wrong-password-77")];
    for secret in secrets.into_iter().flatten() {
        assert!(!run.output.contains(secret), "{what}: a secret is printed");
    }
}

fn env_secret<'a>(case: &'a Case, name: &str) -> Option<&'a str> {
    case.env.get(name).map(String::as_str).filter(|value| !value.is_empty())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_missing_or_malformed() {
    let redis = Redis::start(None);
    let cloud = Cloud::start(&[]).await;
    let good = good_env(&cloud, &redis);
    let all = ["AWS_REGION", "TABLE_NAME", "LOGS_TABLE_NAME", "SQS_URL", "INFRA_API_KEY", "BUCKET_NAME"];
    let mut cases = vec![
        Case::new("nothing at all", CONFIG, &Env::new(), &[], &[&all[..], &["REDIS_HOST"]].concat()),
        Case::without("no Redis", &good, &["REDIS_HOST", "REDIS_PORT"], &["REDIS_HOST"]),
        Case::without("two missing", &good, &["SQS_URL", "BUCKET_NAME"], &["SQS_URL", "BUCKET_NAME"]),
        Case::new("an empty key", CONFIG, &good, &[("INFRA_API_KEY", "")], &["INFRA_API_KEY"]),
    ];
    for name in all {
        cases.push(Case::without("one missing", &good, &[name], &[name]));
    }
    for (name, value) in [
        ("PORT", "http"),
        ("PORT", "65536"),
        ("REDIS_PORT", "x"),
        ("REDIS_URL", "http://127.0.0.1"),
        ("SQS_URL", "not a url"),
        ("RATE_LIMIT", "many"),
        ("RATE_LIMIT", "-1"),
    ] {
        cases.push(Case::new(name, CONFIG, &good, &[(name, value)], &[name]));
    }
    check_all(cases).await;
}

/// Only what is missing is named, and in one line.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_line_names_all_that_is_missing() {
    let dir = Scratch::new("start");
    let env =
        [("AWS_REGION".to_owned(), "us-east-1".to_owned()), ("SQS_URL".to_owned(), "http://x/q".to_owned())];
    let run =
        tokio::task::block_in_place(|| run_to_end(&["serve"], &env, dir.path(), GIVES_UP_WITHIN, || {}));
    assert_eq!(run.code, Some(CONFIG));
    let naming: Vec<&String> = run.stderr.iter().filter(|line| line.contains("BUCKET_NAME")).collect();
    assert_eq!(naming.len(), 1, "{:#?}", run.stderr);
    for name in ["TABLE_NAME", "LOGS_TABLE_NAME", "REDIS_HOST", "INFRA_API_KEY", "BUCKET_NAME"] {
        assert!(naming[0].contains(name), "{name}: {}", naming[0]);
    }
    for present in ["AWS_REGION", "SQS_URL"] {
        assert!(!naming[0].contains(present), "{present} is there: {}", naming[0]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_exist_or_is_refused() {
    let redis = Redis::start(None);
    let guarded = Redis::start(Some("right-password-31"));
    let cloud = Cloud::start(&[]).await;
    let good = good_env(&cloud, &redis);
    let no_queue = format!("{}-gone", cloud.queue_url);
    let guarded_port = guarded.port().to_string();
    let wrong = format!("redis://:wrong-password-77@{}", guarded.addr());
    let mut cases = vec![
        Case::new("no such queue", CONFIG, &good, &[("SQS_URL", &no_queue)], &[]),
        Case::new("no function table", CONFIG, &good, &[("TABLE_NAME", "Gone1")], &["Gone1"]),
        Case::new("no log table", CONFIG, &good, &[("LOGS_TABLE_NAME", "Gone2")], &["Gone2"]),
        Case::new("a wrong Redis password", CONFIG, &good, &[("REDIS_URL", &wrong)], &["Redis"]),
        Case::new("no Redis password", CONFIG, &good, &[("REDIS_PORT", &guarded_port)], &["Redis"]),
    ];
    let mut proxies = Vec::new();
    for denied in ["GetQueueAttributes", "GetItem"] {
        let proxy = Proxy::start(&cloud, Policy::Deny(denied)).await;
        let endpoint = format!("http://{}", proxy.addr());
        cases.push(Case::new(denied, CONFIG, &good, &[("AWS_ENDPOINT_URL", &endpoint)], &[]));
        proxies.push(proxy);
    }
    check_all(cases).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_does_not_answer() {
    let redis = Redis::start(None);
    let cloud = Cloud::start(&[]).await;
    let good = good_env(&cloud, &redis);
    // The kernel takes the connections; nobody ever speaks on them.
    let mute = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("loopback has a free port");
    let mute = mute.local_addr().map(|addr| (mute, addr)).expect("a bound socket has an address");
    let (silent, closed) = (mute.1.port().to_string(), free_port().to_string());
    let url = |port: &str| format!("http://127.0.0.1:{port}");
    let cases = vec![
        Case::new("Redis is not there", UNAVAILABLE, &good, &[("REDIS_PORT", &closed)], &["Redis"]),
        Case::new("Redis is silent", UNAVAILABLE, &good, &[("REDIS_PORT", &silent)], &["Redis"]),
        Case::new("AWS is not there", UNAVAILABLE, &good, &[("AWS_ENDPOINT_URL", &url(&closed))], &[]),
        Case::new("AWS is silent", UNAVAILABLE, &good, &[("AWS_ENDPOINT_URL", &url(&silent))], &[]),
        Case::new("SQS is silent", UNAVAILABLE, &good, &[("AWS_ENDPOINT_URL_SQS", &url(&silent))], &[]),
        Case::new(
            "DynamoDB is silent",
            UNAVAILABLE,
            &good,
            &[("AWS_ENDPOINT_URL_DYNAMODB", &url(&silent))],
            &[],
        ),
    ];
    // Each waits for its deadline, so all together.
    let checks = cases.into_iter().map(|case| crate::harness::spawn(check_all(vec![case]))).collect();
    crate::harness::join_all("the deadlines", 3 * GIVES_UP_WITHIN, checks).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_conf_that_cannot_be_read() {
    let redis = Redis::start(None);
    let cloud = Cloud::start(&[]).await;
    let env: Vec<(String, String)> = good_env(&cloud, &redis).into_iter().collect();
    let limit = |identity: &str, rate: &str| {
        format!(
            "[[limit]]\nname = \"x\"\nidentity = \"{identity}\"\nroutes = [\"/run\"]\nrate = {rate}\n\
             period_s = 60\nburst = 1\non_redis_loss = \"local\"\n"
        )
    };
    let cases = [
        Conf { limits: "[[limit]".into(), ..Conf::default() },
        Conf { limits: limit("shoe-size", "1"), ..Conf::default() },
        Conf { limits: limit("key", "\"fast\""), ..Conf::default() },
        Conf { limits: limit("key", "0"), ..Conf::default() },
        Conf { server: "[shutdown]\ndrain_timeout_s = \"long\"\n".into(), ..Conf::default() },
        Conf { server: "[shutdown]\ndrain_timeout = 3\n".into(), ..Conf::default() },
    ];
    for conf in cases {
        let dir = Scratch::new("conf");
        conf.write(&dir.path().join("conf"));
        for command in ["serve", "check"] {
            let args = [command, "--conf", "conf"];
            let run =
                tokio::task::block_in_place(|| run_to_end(&args, &env, dir.path(), GIVES_UP_WITHIN, || {}));
            let shown = format!("{}{}", conf.server, conf.limits);
            assert_eq!(run.code, Some(CONFIG), "{shown}\n{}", run.output);
            // The file, or the limit in it by its name.
            let file = if conf.server.is_empty() { "limits.toml" } else { "server.toml" };
            assert!(
                run.stderr.iter().any(|line| line.contains(file) || line.contains("limit x")),
                "{shown}\n{}",
                run.output
            );
        }
    }
    let dir = Scratch::new("conf");
    let args = ["check", "--conf", "no-such-directory"];
    let run = tokio::task::block_in_place(|| run_to_end(&args, &env, dir.path(), GIVES_UP_WITHIN, || {}));
    assert_eq!(run.code, Some(CONFIG), "{}", run.output);
}

/// What hangs or never ends is no file of settings: nobody waits for it, and it is told.
#[test]
fn settings_are_regular_files() {
    use std::os::unix::fs::symlink;
    let fifo = |path: &Path| nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).expect("a FIFO");
    let zero = |path: &Path| symlink("/dev/zero", path).expect("a link");
    let tls = "[tls]\nport = 0\ncertificate = \"c.pem\"\nkey = \"k.pem\"\nclient_ca = \"ca.pem\"\n";
    type Spoil<'a> = &'a dyn Fn(&Path);
    let cases: [(&str, Spoil<'_>, &[&str]); 10] = [
        ("conf/keys.toml", &fifo, &["conf/keys.toml: is a FIFO"]),
        ("conf/limits.toml", &zero, &["conf/limits.toml: is a device"]),
        ("conf/upstreams.toml", &|path| fs::create_dir(path).expect("writable"), &["is a directory"]),
        (
            "conf/server.toml",
            &|path| symlink("gone", path).expect("a link"),
            &["link to gone, which does not exist"],
        ),
        (
            "conf/c.pem",
            &fifo,
            &["conf/server.toml:3: tls.certificate conf/c.pem: is a FIFO", "k.pem: does not exist"],
        ),
        ("conf/k.pem", &zero, &["conf/server.toml:4: tls.key conf/k.pem: is a device"]),
        ("conf/ca.pem", &fifo, &["conf/server.toml:5: tls.client_ca conf/ca.pem: is a FIFO"]),
        (".env", &fifo, &["./.env is a FIFO"]),
        (
            ".env",
            &|path| fs::write(path, b"PORT=1\nA=\0\n").expect("writable"),
            &["./.env contains a NUL byte in line 2"],
        ),
        (".env", &|path| fs::create_dir(path).expect("writable"), &["./.env is a directory"]),
    ];
    for (file, spoil, told) in cases {
        for command in ["serve", "check", "dev"] {
            if command == "dev" && file == ".env" {
                continue; // it reads none
            }
            let dir = Scratch::new("conf");
            fs::create_dir(dir.path().join("conf")).expect("writable");
            if file.ends_with(".pem") {
                fs::write(dir.path().join("conf/server.toml"), tls).expect("writable");
            }
            spoil(&dir.path().join(file));
            let run = run_to_end(&[command, "--conf", "conf"], &[], dir.path(), GIVES_UP_WITHIN, || {});
            assert_eq!(run.code, Some(CONFIG), "{command}, {file}: {}", run.output);
            for told in told {
                assert!(run.output.contains(told), "{command}, {file}: {told:?}: {}", run.output);
            }
        }
    }
    let dir = Scratch::new("conf");
    fs::create_dir(dir.path().join("data")).expect("writable");
    fifo(&dir.path().join("data/api-key"));
    let run = run_to_end(&["dev", "--data-dir", "data"], &[], dir.path(), GIVES_UP_WITHIN, || {});
    assert_eq!(run.code, Some(CONFIG), "{}", run.output);
    assert!(run.output.contains("the API key in data/api-key: is a FIFO"), "{}", run.output);
}

/// A data directory that cannot be used: what is wrong, and advice that costs no data.
#[test]
fn a_data_directory_that_cannot_be_used() {
    let garbage = |dir: &Path| {
        fs::create_dir(dir).expect("writable");
        fs::write(dir.join("infra.sqlite"), "x".repeat(8192)).expect("writable");
    };
    let file = |dir: &Path| fs::write(dir, "mine").expect("writable");
    type Spoil<'a> = &'a dyn Fn(&Path);
    let cases: [(Spoil<'_>, &str, &str); 2] = [
        (&garbage, "infra.sqlite in it is not an SQLite database", "Copy it first."),
        (&file, "is not a directory", "Name a directory with --data-dir"),
    ];
    for (spoil, told, advised) in cases {
        // The key is looked for in the directory unless it is given.
        for env in [vec![], vec![("INFRA_API_KEY".to_owned(), new_key())]] {
            let dir = Scratch::new("data");
            spoil(&dir.path().join("data"));
            let args = ["dev", "--port", "0", "--data-dir", "data"];
            let run = run_to_end(&args, &env, dir.path(), GIVES_UP_WITHIN, || {});
            assert_eq!(run.code, Some(CONFIG), "{told}: {}", run.output);
            assert!(run.output.contains(told) && run.output.contains(advised), "{told}: {}", run.output);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn check_passes_where_serve_would_start() {
    let redis = Redis::start(Some("right-password-31"));
    let cloud = Cloud::start(&[]).await;
    let mut env = good_env(&cloud, &redis);
    env.insert("REDIS_URL".into(), redis.url()); // wins over REDIS_HOST, which lacks the password
    env.insert("PORT".into(), quiet_port().to_string());
    let env: Vec<(String, String)> = env.into_iter().collect();
    let dir = Scratch::new("check");
    let run: Run =
        tokio::task::block_in_place(|| run_to_end(&["check"], &env, dir.path(), GIVES_UP_WITHIN, || {}));
    assert_eq!(run.code, Some(0), "{}", run.output);
    assert!(!run.output.contains("right-password-31"), "{}", run.output);
}

/// The `.env` of the old controller, with the old names, works unchanged; the environment wins over it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_old_env_file() {
    let redis = Redis::start(None);
    let cloud = Cloud::start(&[]).await;
    cloud.put_function(HELLO).await;
    let endpoint = format!("http://{}", cloud.addr());
    let mut file = good_env(&cloud, &redis);
    file.remove("AWS_ENDPOINT_URL");
    for name in ["SQS_ENDPOINT", "DYNAMODB_ENDPOINT", "S3_ENDPOINT"] {
        file.insert(name.into(), endpoint.clone());
    }
    file.insert("PORT".into(), "1".into());
    let key = file["INFRA_API_KEY"].clone();
    let dir = Scratch::new("env-file");
    let text: String = file.iter().map(|(name, value)| format!("{name}={value}\n")).collect();
    std::fs::write(dir.path().join(".env"), format!("# the old file\n\n{text}"))
        .expect("scratch is writable");
    let env = [("PORT".to_owned(), "0".to_owned())];
    let gateway = Gateway::start_in(dir, &["serve"], &env, &key, &[SECRET_ACCESS_KEY]).await;
    gateway.run_async(HELLO, &json!(1)).await;
    cloud.receive().await;
    gateway.stop().await;
}

/// With no more than the old controller was allowed, the record is kept all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_old_iam_role() {
    const RUNS: usize = 12;
    let platform = Setup::serve().policy(Policy::OldRole).start().await;
    let gateway = &platform.gateway;
    let cloud = &platform.fleet().cloud;
    let proxy = platform.fleet().proxy.as_ref().expect("asked for");
    for n in 0..RUNS / 2 {
        gateway.run(HELLO, &json!(n)).send().await.expect(200);
        gateway.run_async(HELLO, &json!(n)).await;
    }
    cloud.wait_for_rows(HELLO, RUNS).await;
    eventually("the counters", SOON, || async {
        let item = cloud.function_item(HELLO).await;
        if item["invocations"]["N"] == "12" { Ok(()) } else { Err(item.to_string()) }
    })
    .await;
    gateway.get("/functions/hello/logs").await.expect(200);
    gateway.anonymous("GET", "/health").send().await.expect(200);
    assert!(proxy.count("PutItem").passed >= 12, "{:?}", proxy.count("PutItem"));
    // Where the wider policy would help, the log says so, but not for every row.
    assert!(proxy.count("BatchWriteItem").denied > 0, "the wider call is tried");
    let says_so = |line: &&serde_json::Value| line.to_string().contains("BatchWriteItem");
    let said = gateway.log().iter().filter(says_so).count();
    assert!((1..RUNS).contains(&said), "{said} lines:\n{}", gateway.output().tail(50));
    platform.finish().await;
}

/// A process that is started with few open files allowed, as many systems do, takes what it may have.
#[tokio::test]
async fn what_it_asks_of_the_kernel() {
    let dir = Scratch::new("gateway");
    let program = env!("CARGO_BIN_EXE_infra-controller");
    let args = ["--nofile=256:4096", program, "dev", "--port", "0", "--data-dir", "data"];
    let process =
        Process::start("prlimit", Path::new("prlimit"), &args, &path_env(), dir.path()).expect("util-linux");
    let started = || async {
        let started = process.output().contains("Infra Controller is ready");
        started.then_some(()).ok_or_else(|| process.output().tail(20))
    };
    eventually("the start", SOON, started).await;
    let of_process = |file: &str, name: &str| {
        let text = fs::read_to_string(format!("/proc/{}/{file}", process.pid())).expect("it runs");
        let line = text.lines().find_map(|line| line.strip_prefix(name)).expect("the kernel tells");
        line.split_whitespace().next().expect("a value").to_owned()
    };
    assert_eq!(of_process("limits", "Max open files"), "4096");
    assert_eq!(of_process("status", "THP_enabled:"), "0");
}
