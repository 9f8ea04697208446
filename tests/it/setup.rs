//! First installation: files of other editors, secrets with line breaks, an unusable Redis.

use crate::harness::aws::{Cloud, SECRET_ACCESS_KEY};
use crate::harness::conf_lines::upstream_lines;
use crate::harness::gateway::{Conf, run_to_end, start_process};
use crate::harness::http::Request;
use crate::harness::platform::{Backend, HELLO, LONG_START, new_key};
use crate::harness::process::{Process, Scratch, Stream, free_port};
use crate::harness::redis::Redis;
use crate::harness::tls::Authority;
use crate::harness::upstream::Upstream;
use crate::harness::{Gateway, SOON, Setup, eventually, join_all, path_env, spawn, within};
use nix::sys::signal::Signal;
use serde_json::json;
use std::fs;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

const CONFIG: i32 = 78;
/// Longer than the start-up deadline.
const ENDS_WITHIN: Duration = Duration::from_secs(90);

type Env = Vec<(String, String)>;

fn pair(name: &str, value: &str) -> (String, String) {
    (name.to_owned(), value.to_owned())
}

/// All variables of `serve` but those of Redis.
fn env_without_redis(cloud: &Cloud) -> Env {
    let mut env = cloud.env(cloud.addr());
    env.extend([pair("PORT", "0"), pair("INFRA_API_KEY", &new_key())]);
    env
}

/// Runs `check`, which must exit with `code` and print all of `words`. Returns the output.
async fn check(name: &str, env: Env, code: i32, words: &[&str]) -> String {
    let dir = Scratch::new("setup");
    Conf { server: LONG_START.into(), ..Conf::default() }.write(&dir.path().join("conf"));
    let run = run_to_end(&["check", "--conf", "conf"], &env, dir.path(), ENDS_WITHIN).await;
    assert_eq!(run.code, Some(code), "{name}: {}", run.output);
    for word in words {
        assert!(run.output.contains(word), "{name}: {word:?}: {}", run.output);
    }
    run.output
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unusable_redis_is_explained() {
    let (primary, replica) = (Redis::start(None).await, Redis::start(None).await);
    replica.follow(&primary).await;
    for (user, rights) in [
        ("all", "~* &* +@all -@dangerous +info"),
        ("reader", "~* &* +@all -@write"),
        ("otherkeys", "~other:* &* +@all"),
        ("unscripted", "~* &* +@all -@scripting"),
        ("nosubscribe", "~* resetchannels &functions:changed:* +@all"),
        ("nopublish", "~* &* +@all -publish"),
        // Redis compares patterns as texts, so this ACL fits one node only.
        ("onenode", "~* resetchannels &result:0000abcd* &functions:changed:* &beat:* +@all"),
        ("noinfo", "~* &* +@all -info"),
    ] {
        primary.order(&format!("ACL SETUSER {user} on >acl-secret-4c1 {rights}")).await;
    }
    let cloud = Cloud::start(&[]).await;
    let url = |user: &str| format!("redis://{user}:acl-secret-4c1@{}", primary.addr());
    let mut checks = Vec::new();
    for (name, redis, code, words) in [
        ("all rights", url("all"), 0, &["in order"][..]),
        ("a replica", replica.url(), CONFIG, &["it is a replica", "Name the primary"]),
        ("no writes", url("reader"), CONFIG, &["cannot write there", "NOPERM", "ACL SETUSER"]),
        ("other keys", url("otherkeys"), CONFIG, &["cannot write there", "NOPERM", "ACL SETUSER"]),
        ("no scripts", url("unscripted"), CONFIG, &["cannot write there", "NOPERM", "ACL SETUSER"]),
        ("no pattern", url("nosubscribe"), CONFIG, &["cannot subscribe to results", "NOPERM", "&*"]),
        ("no PUBLISH", url("nopublish"), CONFIG, &["publish changes", "NOPERM", "ACL SETUSER"]),
        ("no such node", url("onenode"), CONFIG, &["cannot subscribe to results", "&result:<node>*"]),
        ("no INFO", url("noinfo"), 0, &["warning: Redis does not report whether it evicts keys"]),
        ("a wrong user", url("nobody"), CONFIG, &["Put the right user and password into REDIS_URL", "%2F"]),
    ] {
        let mut env = env_without_redis(&cloud);
        env.push(pair("REDIS_URL", &redis));
        checks.push(spawn(async move {
            let output = check(name, env, code, words).await;
            assert!(!output.contains("acl-secret"), "{name}: {output}");
        }));
    }
    join_all("the checks", 4 * ENDS_WITHIN, checks).await;

    // A node with the id of that ACL.
    let state = Scratch::new("state");
    fs::create_dir(state.path().join("0000abcd")).expect("writable");
    let mut env = env_without_redis(&cloud);
    let state_dir = state.path().display().to_string();
    env.extend([pair("REDIS_URL", &url("onenode")), pair("STATE_DIR", &state_dir)]);
    let output = check("one node", env, 0, &["in order"]).await;
    assert!(!output.contains("warning"), "{output}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_evicting_redis_is_rejected_or_warned_of() {
    let cloud = Cloud::start(&[]).await;
    for (policy, maxmemory, code, words) in [
        ("noeviction", "100mb", 0, &["in order"][..]),
        ("volatile-lru", "100mb", 0, &["warning: Redis has the maxmemory-policy volatile-lru", "in order"]),
        (
            "allkeys-lru",
            "100mb",
            CONFIG,
            &["maxmemory-policy allkeys-lru", "Set its maxmemory-policy to noeviction"],
        ),
        ("allkeys-lru", "0", 0, &["warning: Redis has the maxmemory-policy allkeys-lru", "in order"]),
    ] {
        let redis = Redis::start(None).await;
        redis.order(&format!("CONFIG SET maxmemory {maxmemory} maxmemory-policy {policy}")).await;
        let mut env = env_without_redis(&cloud);
        env.extend([pair("REDIS_HOST", "127.0.0.1"), pair("REDIS_PORT", &redis.port().to_string())]);
        let output = check(policy, env, code, words).await;
        assert_eq!(output.contains("warning"), code == 0 && policy != "noeviction", "{output}");
    }
}

/// Errors name the variables that are set.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_forms_of_the_redis_address_are_read() {
    let redis = Redis::start(Some("pass-of-redis-8d")).await;
    let (open, cloud) = (Redis::start(None).await, Cloud::start(&[]).await);
    let (port, link) = (redis.port().to_string(), format!("tcp://{}", open.addr()));
    let at = format!("127.0.0.1:{port}");
    for (name, vars, code, words) in [
        ("a service link", vec![pair("REDIS_PORT", &link)], 0, vec!["in order"]),
        (
            "a host and a link",
            vec![pair("REDIS_HOST", "127.0.0.1"), pair("REDIS_PORT", &link)],
            0,
            vec!["in order"],
        ),
        (
            "no password",
            vec![pair("REDIS_HOST", "127.0.0.1"), pair("REDIS_PORT", &port)],
            CONFIG,
            vec![at.as_str(), "which takes the place of REDIS_HOST and REDIS_PORT"],
        ),
        (
            "a slash in the password",
            vec![pair("REDIS_URL", &format!("redis://u:pass-of/redis@{at}"))],
            CONFIG,
            vec!["REDIS_URL contains / ? or #", "%2F"],
        ),
        (
            "a wrong password",
            vec![pair("REDIS_URL", &format!("redis://:pass-of@redis@{at}"))],
            CONFIG,
            vec![at.as_str(), "%40"],
        ),
        (
            "a password with a line break",
            vec![pair("REDIS_URL", &format!("{}\n", redis.url()))],
            0,
            vec!["in order"],
        ),
    ] {
        let mut env = env_without_redis(&cloud);
        env.extend(vars);
        let output = check(name, env, code, &words).await;
        assert!(!output.contains("pass-of"), "{name}: {output}");
    }
}

/// Files of editors on Windows and old Macs, and secrets with line breaks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn env_files_and_secrets_in_common_forms_are_read() {
    let (redis, cloud) = (Redis::start(None).await, Cloud::start(&[]).await);
    let mut vars = env_without_redis(&cloud);
    vars.push(pair("REDIS_URL", &redis.url()));
    let text: String = vars.iter().map(|(name, value)| format!("{name}={value}\n")).collect();
    let utf16: Vec<u8> = text.encode_utf16().flat_map(u16::to_le_bytes).collect();
    for (name, bytes, code, words) in [
        ("BOM", [b"\xef\xbb\xbf", text.as_bytes()].concat(), 0, "in order"),
        ("CR LF", text.replace('\n', "\r\n").into_bytes(), 0, "in order"),
        ("CR", text.replace('\n', "\r").into_bytes(), 0, "in order"),
        ("UTF-16", [b"\xff\xfe", &utf16[..]].concat(), CONFIG, "./.env is UTF-16; save it as UTF-8"),
        ("UTF-16 without a mark", utf16, CONFIG, "./.env is UTF-16; save it as UTF-8"),
    ] {
        let dir = Scratch::new("env-file");
        fs::write(dir.path().join(".env"), bytes).expect("writable");
        let run = run_to_end(&["check"], &[], dir.path(), ENDS_WITHIN).await;
        assert_eq!(run.code, Some(code), "{name}: {}", run.output);
        assert!(run.output.contains(words), "{name}: {}", run.output);
    }
    for (name, value, code, words) in [
        ("AWS_ACCESS_KEY_ID", "emulated\n", 0, "in order"),
        ("AWS_ACCESS_KEY_ID", "\r\nemulated \r\n", 0, "in order"),
        ("AWS_SECRET_ACCESS_KEY", "emulated\n", 0, "in order"),
        ("AWS_SESSION_TOKEN", "token\n", 0, "in order"),
        ("AWS_ACCESS_KEY_ID", "emu\nlated", CONFIG, "the access key id holds a character"),
        ("AWS_ACCESS_KEY_ID", "emu\u{7f}lated", CONFIG, "the access key id holds a character"),
        (
            "AWS_SECRET_ACCESS_KEY",
            "\u{201c}emulated\u{201d}",
            CONFIG,
            "the secret access key holds a character",
        ),
        ("AWS_SESSION_TOKEN", "to\nken", CONFIG, "the session token holds a character"),
        ("AWS_REGION", "us-east-1\n", 0, "in order"),
        ("AWS_REGION", "us east 1", CONFIG, "AWS_REGION is"),
        ("AWS_REGION", "us-east\n-1", CONFIG, "AWS_REGION is"),
        // Compose sets empty values for unset variables.
        ("AWS_ENDPOINT_URL_SQS", "", 0, "in order"),
        ("AWS_ENDPOINT_URL_DYNAMODB", " ", 0, "in order"),
        ("AWS_ENDPOINT_URL_S3", "", 0, "in order"),
        ("AWS_SESSION_TOKEN", "", 0, "in order"),
        ("INFRA_API_KEY", "a-key-of-twenty-letters\n", 0, "in order"),
        ("INFRA_API_KEY", "a-key\nof-twenty-letters", CONFIG, "INFRA_API_KEY"),
        ("INFRA_API_KEY", "letmein", 0, "warning: INFRA_API_KEY has fewer than 16 characters"),
        ("INFRA_API_KEY", "your-secret-api-key", 0, "warning: INFRA_API_KEY is easy to guess"),
        ("INFRA_API_KEY", &"k7c3-".repeat(900), CONFIG, "INFRA_API_KEY has 4500 bytes"),
    ] {
        let mut env = vars.clone();
        env.push(pair(name, value));
        let output = check(&format!("{name} {value:?}"), env, code, &[words]).await;
        let is_shown = !value.trim().is_empty() && name != "AWS_REGION" && output.contains(value.trim());
        assert!(!output.contains("emulated") && !is_shown, "{output}");
    }
}

/// Values that could never match are rejected.
#[tokio::test]
async fn settings_without_effect_are_rejected() {
    let upstream = |address: &str| {
        format!("[[upstream]]\nname = \"u\"\nprefix = \"/u\"\naddresses = [{address:?}]\nscope = \"none\"\n")
    };
    let server = |line: &str| format!("[http]\n{line}\n");
    for (conf, expected) in [
        (
            Conf { upstreams: upstream("http://127.0.0.1:1"), ..Conf::default() },
            "conf/upstreams.toml:4: upstream[0].addresses",
        ),
        (
            Conf { server: server("cors_origins = [\"https://a.example/app\"]"), ..Conf::default() },
            "conf/server.toml:2: http.cors_origins",
        ),
        (Conf { server: server("cors_origins = [\"a.example\"]"), ..Conf::default() }, "has no scheme"),
        (
            Conf { server: server("header_bytes_max = 1024"), ..Conf::default() },
            "conf/server.toml:2: http.header_bytes_max must be at least",
        ),
    ] {
        let dir = Scratch::new("conf");
        conf.write(&dir.path().join("conf"));
        let env = [pair("INFRA_API_KEY", &"k7c3-".repeat(200))];
        let args = ["dev", "--port", "0", "--data-dir", "data", "--conf", "conf"];
        let run = run_to_end(&args, &env, dir.path(), ENDS_WITHIN).await;
        assert_eq!(run.code, Some(CONFIG), "{expected}: {}", run.output);
        assert!(run.output.contains(expected), "{expected}: {}", run.output);
    }
}

/// PEM with other text around it, in any encoding. Other formats are named in the error.
#[tokio::test]
async fn certificates_in_common_forms_are_read() {
    let identity = Authority::new().issue("gateway.test");
    let der = b"\x30\x82\x01\x0a\x02\x82\x01\x01\x00\xc3\xff".to_vec();
    let around = |pem: &str| {
        [b"\xef\xbb\xbfSubject: CN=M\xfcller\r\n\r\n", pem.as_bytes(), b"\nkept by \xe9t\xe9\n"].concat()
    };
    let indented = identity.key.lines().map(|line| format!("  {line}  \r\n")).collect::<String>();
    let (certificate, key) = (identity.certificate.as_bytes().to_vec(), identity.key.as_bytes().to_vec());
    let encrypted =
        b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n".to_vec();
    let old = b"-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\nAAAA\n\
                -----END RSA PRIVATE KEY-----\n"
        .to_vec();
    for (name, certificate, key, error) in [
        ("text around", around(&identity.certificate), around(&identity.key), None),
        ("indented", certificate.clone(), indented.into_bytes(), None),
        ("DER", der.clone(), key.clone(), Some("c.pem: is DER or PKCS #12")),
        ("DER", certificate.clone(), der, Some("k.pem: is DER or PKCS #12")),
        ("encrypted", certificate.clone(), encrypted, Some("tls.key is encrypted")),
        ("encrypted", certificate.clone(), old, Some("tls.key is encrypted")),
        ("swapped", key, certificate, Some("the two files may be swapped")),
    ] {
        let dir = Scratch::new("tls");
        let server = "[tls]\nport = 0\ncertificate = \"c.pem\"\nkey = \"k.pem\"\n".to_owned();
        Conf { server, ..Conf::default() }.write(&dir.path().join("conf"));
        fs::write(dir.path().join("conf/c.pem"), certificate).expect("writable");
        fs::write(dir.path().join("conf/k.pem"), key).expect("writable");
        let args = ["dev", "--port", "0", "--data-dir", "data", "--conf", "conf"];
        let process = start_process(&args, &[], dir.path());
        let outcome = eventually(name, ENDS_WITHIN, || async {
            match process.exit_status() {
                Some(status) => Ok(status.code()),
                None if process.output().contains("Infra Controller is ready") => Ok(None),
                None => Err(process.output().tail(20)),
            }
        })
        .await;
        let output = process.output().tail(20);
        assert_eq!(outcome, error.map(|_| CONFIG), "{name}: {output}");
        assert!(output.contains(error.unwrap_or_default()), "{name}: {output}");
        process.kill();
    }
}

/// It also warns of an unknown file, and does not print its key without a terminal.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dev_applies_rate_limit_and_cors_for_any_origin() {
    let dir = Scratch::new("dev");
    let conf = Conf {
        server: "[http]\ncors_origins = [\"*\"]\n".into(),
        limits: include_str!("../../conf/limits.toml").into(),
        files: vec![("limit.toml".into(), "[limits]\nrate = 1\n".into())],
        ..Conf::default()
    };
    conf.write(&dir.path().join("conf"));
    let key = "f00dfeedf00dfeedf00dfeedf00dfeed";
    fs::create_dir(dir.path().join("data")).expect("writable");
    fs::write(dir.path().join("data/api-key"), key).expect("writable");
    let args = ["dev", "--port", "0", "--data-dir", "data", "--conf", "conf"];
    // Its drop asserts that the key is not in the output.
    let gateway = Gateway::start_in(dir, &args, &[pair("RATE_LIMIT", "2")], key, &[]).await;
    let limit =
        gateway.run(HELLO, &json!(1)).header("origin", "https://any.example").send().await.expect(200);
    assert_eq!(limit.need("x-ratelimit-limit"), "2");
    assert_eq!(limit.need("access-control-allow-origin"), "*");
    let preflight = gateway.upstream_request("OPTIONS", "/run").header("origin", "https://any.example");
    let preflight = preflight.header("access-control-request-method", "POST").send().await.expect(204);
    assert_eq!((preflight.need("access-control-allow-origin"), preflight.header("vary")), ("*", None));
    gateway.run(HELLO, &json!(1)).send().await.expect(200);
    gateway.run(HELLO, &json!(1)).send().await.expect_problem(429);
    let output = gateway.output();
    assert!(output.contains("conf/limit.toml: this file is not read"), "{}", output.tail(20));
    let banner = output.lines(Stream::Err).into_iter().find(|line| line.contains("API key:"));
    assert_eq!(banner.expect("a banner").trim(), "API key: in data/api-key");
    gateway.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dev_shows_its_key_on_a_terminal() {
    let dir = Scratch::new("terminal");
    let line = format!("{} dev --port 0 --data-dir data", env!("CARGO_BIN_EXE_infra-controller"));
    let args = ["-qec", &line, "/dev/null"];
    let env = path_env();
    let process = Process::start("script", Path::new("script"), &args, &env, dir.path()).expect("bsdutils");
    let shown = || async {
        let lines = process.output().lines(Stream::Out);
        lines.into_iter().find(|line| line.contains("API key:")).ok_or_else(|| process.output().tail(20))
    };
    let shown = eventually("the banner", SOON, shown).await;
    let key = fs::read_to_string(dir.path().join("data/api-key")).expect("made at the first start");
    assert!(shown.contains(&format!("{key} (in data/api-key)")), "{shown}");
    // `script` stops the gateway, too.
    process.signal(Signal::SIGTERM);
    process.wait_for_exit(SOON).await;
}

/// For any RUST_LOG: debug lines of libraries would contain requests with keys.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn log_lines_of_libraries_contain_no_keys() {
    let service = Upstream::start().await;
    for backend in [Backend::Dev, Backend::Serve] {
        for level in ["debug", "trace", "info,pingora_core=trace,h2=trace,hyper=trace"] {
            let upstreams = upstream_lines("u", &[service.addr()], "scope = \"read\"\npass_key = true\n");
            let conf = Conf { upstreams, ..Conf::default() };
            let platform = Setup::new(backend).conf(conf).env("RUST_LOG", level).start().await;
            let gateway = &platform.gateway;
            let request =
                gateway.upstream_request("GET", "/u/x").header("authorization", "Bearer topsecret-9f");
            request.send().await.expect(200);
            gateway.run(HELLO, &json!(1)).send().await.expect(200);
            // Lines of the gateway are logged.
            gateway.wait_for_output("Execution Success").await;
            let output = gateway.output();
            for secret in ["topsecret-9f", gateway.key(), SECRET_ACCESS_KEY] {
                assert!(!output.contains(secret), "{level}: {secret} is in the log");
            }
            platform.stop().await;
        }
    }
}

/// The reader of the output closes it. The gateway keeps running.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn log_lines_lost_to_a_closed_output_are_counted() {
    const LINES: usize = 20;
    let dir = Scratch::new("closed");
    let port = free_port();
    let fifo = dir.path().join("output");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).expect("a FIFO");
    let program = env!("CARGO_BIN_EXE_infra-controller");
    let line = format!("exec {program} dev --port {port} --data-dir data > output");
    let key = new_key();
    let mut env = path_env();
    env.push(pair("INFRA_API_KEY", &key));
    let process = Process::start("sh", Path::new("sh"), &["-c", &line], &env, dir.path()).expect("sh");
    // Reads the first line, then closes the FIFO.
    let reader = tokio::task::spawn_blocking(move || {
        let mut line = String::new();
        BufReader::new(fs::File::open(fifo)?).read_line(&mut line).map(|_| line)
    });
    let first = within("the first line", SOON, reader).await.expect("no panic").expect("it can be read");
    assert!(first.starts_with('{'), "{first}");
    let at = SocketAddr::from(([127, 0, 0, 1], port));
    let get = |target: &str| {
        Request::new(at, "POST", target).header("x-api-key", &key).json(&json!({ "functionId": HELLO }))
    };
    let ran = || async {
        match get("/run").try_send().await {
            Ok(answer) if answer.status == 200 => Ok(()),
            other => Err(format!("{other:?}: {}", process.output().tail(20))),
        }
    };
    eventually("the first run", SOON, ran).await;
    for _ in 0..LINES {
        get("/run").send().await.expect(200);
    }
    let counted = || async {
        let text = Request::new(at, "GET", "/metrics").send().await.expect(200).text();
        let count = text.lines().find_map(|line| line.strip_prefix("infra_log_lines_dropped "));
        let count: usize = count.and_then(|count| count.parse().ok()).unwrap_or(0);
        // Each run logs two lines.
        if count >= 2 * LINES { Ok(()) } else { Err(format!("{count} lines")) }
    };
    eventually("the lost lines", SOON, counted).await;
    process.kill();
}
