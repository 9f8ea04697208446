//! The start of `serve`, and `check`: either everything works, or exit code and output name the reason.

use crate::harness::aws::{Cloud, SECRET_ACCESS_KEY};
use crate::harness::aws_proxy::{AwsProxy, Policy};
use crate::harness::gateway::{Conf, Exited, run_to_end, start_process};
use crate::harness::platform::{HELLO, new_key};
use crate::harness::process::{Process, Scratch, free_port, listening_on};
use crate::harness::redis::Redis;
use crate::harness::{Gateway, SOON, Setup, eventually, path_env};
use serde_json::json;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::time::Duration;

const CONFIG: i32 = 78;
const UNAVAILABLE: i32 = 69;
/// The start-up deadline is 10 s.
const GIVES_UP_WITHIN: Duration = Duration::from_secs(90);

type Env = BTreeMap<String, String>;

/// One reason not to start.
struct Case {
    name: &'static str,
    env: Env,
    code: i32,
    /// Words that one line of stderr must contain.
    words: Vec<&'static str>,
}

impl Case {
    fn new(
        name: &'static str,
        code: i32,
        base: &Env,
        changes: &[(&str, &str)],
        words: &[&'static str],
    ) -> Self {
        let mut env = base.clone();
        for (name, value) in changes {
            env.insert((*name).to_owned(), (*value).to_owned());
        }
        Self { name, env, code, words: words.to_vec() }
    }

    /// A case without these variables.
    fn without(name: &'static str, base: &Env, missing: &[&'static str], words: &[&'static str]) -> Self {
        let mut case = Self::new(name, CONFIG, base, &[], words);
        case.env.retain(|name, _| !missing.contains(&name.as_str()));
        case
    }
}

/// A valid environment for `serve`.
fn good_env(cloud: &Cloud, redis: &Redis) -> Env {
    let mut env: Env = cloud.env(cloud.addr()).into_iter().collect();
    env.insert("REDIS_HOST".into(), "127.0.0.1".into());
    env.insert("REDIS_PORT".into(), redis.port().to_string());
    env.insert("INFRA_API_KEY".into(), new_key());
    env
}

/// An unused port below the ephemeral range, so that no client socket gets it.
fn quiet_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(21_000);
    loop {
        let port = NEXT.fetch_add(1, Ordering::Relaxed);
        if listening_on(port).is_empty() {
            return port;
        }
    }
}

/// Runs `serve` and `check`. Both must fail in the same way, and must not bind the port.
async fn check_all(cases: Vec<Case>) {
    for case in cases {
        tokio::join!(check_one(&case, "serve"), check_one(&case, "check"));
    }
}

async fn check_one(case: &Case, command: &str) {
    let port = quiet_port();
    let mut env = case.env.clone();
    env.entry("PORT".to_owned()).or_insert_with(|| port.to_string());
    let env: Vec<(String, String)> = env.into_iter().collect();
    let dir = Scratch::new("start");
    let process = start_process(&[command], &env, dir.path());
    let bound = AtomicBool::new(false);
    let exited = eventually("the exit", GIVES_UP_WITHIN, || async {
        bound.fetch_or(!listening_on(port).is_empty(), Ordering::Relaxed);
        process.exit_status().ok_or_else(|| process.output().tail(20))
    });
    exited.await;
    let (bound, run) = (bound.into_inner(), Exited::of(&process, SOON).await);
    let what = format!("{command}, {}", case.name);
    assert_eq!(run.code, Some(case.code), "{what}:\n{}", run.output);
    assert!(!bound, "{what} has bound its port");
    assert!(!run.output.contains("Started"), "{what} has started:\n{}", run.output);
    let words = |line: &str| -> Vec<String> {
        line.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').map(str::to_owned).collect()
    };
    let has_all = |line: &String| case.words.iter().all(|&word| words(line).iter().any(|w| w == word));
    assert!(
        run.stderr.iter().any(has_all),
        "{what}: no line of stderr with {:?}:\n{}",
        case.words,
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
async fn missing_or_malformed_variables_are_exit_78() {
    let redis = Redis::start(None).await;
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_line_names_all_missing_variables_and_no_others() {
    let dir = Scratch::new("start");
    let env =
        [("AWS_REGION".to_owned(), "us-east-1".to_owned()), ("SQS_URL".to_owned(), "http://x/q".to_owned())];
    let run = run_to_end(&["serve"], &env, dir.path(), GIVES_UP_WITHIN).await;
    assert_eq!(run.code, Some(CONFIG));
    let naming: Vec<&String> = run.stderr.iter().filter(|line| line.contains("BUCKET_NAME")).collect();
    assert_eq!(naming.len(), 1, "{:#?}", run.stderr);
    for name in ["TABLE_NAME", "LOGS_TABLE_NAME", "REDIS_HOST", "INFRA_API_KEY", "BUCKET_NAME"] {
        assert!(naming[0].contains(name), "{name}: {}", naming[0]);
    }
    for present in ["AWS_REGION", "SQS_URL"] {
        assert!(!naming[0].contains(present), "{present} is set: {}", naming[0]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn absent_or_denied_backends_are_exit_78() {
    let redis = Redis::start(None).await;
    let guarded = Redis::start(Some("right-password-31")).await;
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
        let proxy = AwsProxy::start(&cloud, Policy::Deny(denied)).await;
        let endpoint = format!("http://{}", proxy.addr());
        cases.push(Case::new(denied, CONFIG, &good, &[("AWS_ENDPOINT_URL", &endpoint)], &[]));
        proxies.push(proxy);
    }
    check_all(cases).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_backends_are_exit_69() {
    let redis = Redis::start(None).await;
    let cloud = Cloud::start(&[]).await;
    let good = good_env(&cloud, &redis);
    // The kernel accepts connections, but there is no answer.
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
    // Concurrently, because each waits for its deadline.
    let checks = cases.into_iter().map(|case| crate::harness::spawn(check_all(vec![case]))).collect();
    crate::harness::join_all("the deadlines", 3 * GIVES_UP_WITHIN, checks).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_invalid_conf_is_exit_78() {
    let redis = Redis::start(None).await;
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
            let run = run_to_end(&args, &env, dir.path(), GIVES_UP_WITHIN).await;
            let shown = format!("{}{}", conf.server, conf.limits);
            assert_eq!(run.code, Some(CONFIG), "{shown}\n{}", run.output);
            // The error names the file, or the limit.
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
    let run = run_to_end(&args, &env, dir.path(), GIVES_UP_WITHIN).await;
    assert_eq!(run.code, Some(CONFIG), "{}", run.output);
}

/// Other kinds of files are rejected without waiting for them.
#[tokio::test]
async fn configuration_files_must_be_regular_files() {
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
    for (file, spoil, expected) in cases {
        for command in ["serve", "check", "dev"] {
            if command == "dev" && file == ".env" {
                continue; // `dev` does not read it
            }
            let dir = Scratch::new("conf");
            fs::create_dir(dir.path().join("conf")).expect("writable");
            if file.ends_with(".pem") {
                fs::write(dir.path().join("conf/server.toml"), tls).expect("writable");
            }
            spoil(&dir.path().join(file));
            let run = run_to_end(&[command, "--conf", "conf"], &[], dir.path(), GIVES_UP_WITHIN).await;
            assert_eq!(run.code, Some(CONFIG), "{command}, {file}: {}", run.output);
            for text in expected {
                assert!(run.output.contains(text), "{command}, {file}: {text:?}: {}", run.output);
            }
        }
    }
    let dir = Scratch::new("conf");
    fs::create_dir(dir.path().join("data")).expect("writable");
    fifo(&dir.path().join("data/api-key"));
    let run = run_to_end(&["dev", "--data-dir", "data"], &[], dir.path(), GIVES_UP_WITHIN).await;
    assert_eq!(run.code, Some(CONFIG), "{}", run.output);
    assert!(run.output.contains("the API key in data/api-key: is a FIFO"), "{}", run.output);
}

/// The advice loses no data.
#[tokio::test]
async fn an_unusable_data_directory_is_explained() {
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
    for (spoil, error, advice) in cases {
        // Without the variable the key is read from the directory.
        for env in [vec![], vec![("INFRA_API_KEY".to_owned(), new_key())]] {
            let dir = Scratch::new("data");
            spoil(&dir.path().join("data"));
            let args = ["dev", "--port", "0", "--data-dir", "data"];
            let run = run_to_end(&args, &env, dir.path(), GIVES_UP_WITHIN).await;
            assert_eq!(run.code, Some(CONFIG), "{error}: {}", run.output);
            assert!(run.output.contains(error) && run.output.contains(advice), "{error}: {}", run.output);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn check_passes_where_serve_would_start() {
    let redis = Redis::start(Some("right-password-31")).await;
    let cloud = Cloud::start(&[]).await;
    let mut env = good_env(&cloud, &redis);
    env.insert("REDIS_URL".into(), redis.url()); // wins over REDIS_HOST, which has no password
    env.insert("PORT".into(), quiet_port().to_string());
    let env: Vec<(String, String)> = env.into_iter().collect();
    let dir = Scratch::new("check");
    let run = run_to_end(&["check"], &env, dir.path(), GIVES_UP_WITHIN).await;
    assert_eq!(run.code, Some(0), "{}", run.output);
    assert!(!run.output.contains("right-password-31"), "{}", run.output);
}

/// With the old names of variables. The environment overrides the file.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_env_file_of_the_old_controller_works_unchanged() {
    let redis = Redis::start(None).await;
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

/// Rows and counters are written with the permissions of the old controller.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_iam_role_of_the_old_controller_suffices() {
    const RUNS: usize = 12;
    let platform = Setup::serve().policy(Policy::OldRole).start().await;
    let gateway = &platform.gateway;
    let cloud = &platform.fleet().cloud;
    let proxy = platform.fleet().proxy.as_ref().expect("the policy has a proxy");
    for n in 0..RUNS / 2 {
        gateway.run(HELLO, &json!(n)).send().await.expect(200);
        gateway.run_async(HELLO, &json!(n)).await;
    }
    cloud.wait_for_rows(HELLO, RUNS).await;
    cloud.wait_for_invocations(HELLO, RUNS).await;
    gateway.get("/functions/hello/logs").await.expect(200);
    gateway.anonymous("GET", "/health").send().await.expect(200);
    assert!(proxy.count("PutItem").passed >= 12, "{:?}", proxy.count("PutItem"));
    // The log recommends the wider policy, but not for every row.
    assert!(proxy.count("BatchWriteItem").denied > 0, "the wider call is not tried");
    let is_expected = |line: &&serde_json::Value| line.to_string().contains("BatchWriteItem");
    let lines = gateway.log().iter().filter(is_expected).count();
    assert!((1..RUNS).contains(&lines), "{lines} lines:\n{}", gateway.output().tail(50));
    platform.finish().await;
}

/// Many systems start processes with a low soft limit. Transparent huge pages are off.
#[tokio::test]
async fn the_limit_of_open_files_is_raised_to_the_hard_limit() {
    let dir = Scratch::new("gateway");
    let program = env!("CARGO_BIN_EXE_infra-controller");
    let args = ["--nofile=256:4096", program, "dev", "--port", "0", "--data-dir", "data"];
    let process =
        Process::start("prlimit", Path::new("prlimit"), &args, &path_env(), dir.path()).expect("util-linux");
    process.wait_for_output("Infra Controller is ready", SOON).await;
    let of_process = |file: &str, name: &str| {
        let text = fs::read_to_string(format!("/proc/{}/{file}", process.pid())).expect("it runs");
        let line = text.lines().find_map(|line| line.strip_prefix(name)).expect("the line exists");
        line.split_whitespace().next().expect("a value").to_owned()
    };
    assert_eq!(of_process("limits", "Max open files"), "4096");
    assert_eq!(of_process("status", "THP_enabled:"), "0");
}
