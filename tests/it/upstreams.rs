//! Requests to upstreams.

use crate::harness::conf_lines::{NO_HEALTH_CHECKS, key_lines, limit_lines, upstream_lines};
use crate::harness::gateway::{Conf, run_to_end};
use crate::harness::http::{Conn, Message, Request};
use crate::harness::platform::{Backend, Platform};
use crate::harness::process::Scratch;
use crate::harness::tls::{Authority, server};
use crate::harness::upstream::Upstream;
use crate::harness::{SOON, Setup, pause, spawn, within};
use serde_json::Value;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

async fn start(upstreams: String, server: &str) -> Platform {
    let keys = key_lines("reader", "key-reader", &["read"]) + &key_lines("runner", "key-runner", &["run"]);
    let conf = Conf { upstreams, keys, server: server.into(), ..Conf::default() };
    Setup::new(Backend::Dev).conf(conf).start().await
}

fn upstream(name: &str, services: &[&Upstream], more: &str) -> String {
    let addresses: Vec<SocketAddr> = services.iter().map(|service| service.addr()).collect();
    upstream_lines(name, &addresses, more)
}

fn received<'a>(answer: &'a Value, name: &str) -> Vec<&'a str> {
    let headers = answer["headers"].as_array().expect("the upstream echoes the header fields");
    headers
        .iter()
        .filter(|h| h[0].as_str().is_some_and(|n| n.eq_ignore_ascii_case(name)))
        .filter_map(|h| h[1].as_str())
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upstream_receives_rewritten_requests() {
    let service = Upstream::start().await;
    let more = "scope = \"read\"\nreplace_prefix = \"/v1\"\nhost = \"models.internal\"\n\
                remove_headers = [\"Cookie\"]\nadd_headers = { x-platform = \"edge\" }\n";
    let open = "scope = \"none\"\npass_key = true\n";
    let platform =
        start(upstream("catalogue", &[&service], more) + &upstream("open", &[&service], open), "").await;
    let gateway = &platform.gateway;
    let request = gateway
        .upstream_request("GET", "/catalogue/a%20b?x=1&y")
        .header("cookie", "secret=1")
        .header("x-request-id", "mine")
        .header("x-forwarded-for", "6.6.6.6")
        .header("forwarded", "for=6.6.6.6")
        .header("x-hop", "1")
        .header("connection", "x-hop");
    let answer = request.send().await.expect(200);
    assert_eq!((answer.need("x-request-id"), answer.need("x-upstream")), ("mine", "yes"));
    let echo = answer.json();
    assert_eq!(echo["start"], "GET /v1/a%20b?x=1&y HTTP/1.1");
    for (name, expected) in [
        ("host", vec!["models.internal"]),
        ("x-api-key", vec![]),
        ("cookie", vec![]),
        ("x-hop", vec![]),
        ("forwarded", vec![]),
        ("x-platform", vec!["edge"]),
        ("x-request-id", vec!["mine"]),
        ("x-forwarded-for", vec!["127.0.0.1"]),
        ("x-forwarded-proto", vec!["http"]),
        ("x-forwarded-host", vec![&*gateway.addr().to_string()]),
    ] {
        assert_eq!(received(&echo, name), expected, "{name}");
    }
    // With `pass_key` the key is forwarded. With the scope `none` no key is required.
    let echo = gateway.upstream_request("GET", "/open").send().await.expect(200).json();
    assert_eq!((received(&echo, "x-api-key").len(), &echo["start"]), (1, &"GET /open HTTP/1.1".into()));
    let body = vec![b'x'; 300_000];
    let echo = gateway
        .upstream_request("POST", "/open/upload")
        .body("text/plain", body)
        .send()
        .await
        .expect(200)
        .json();
    assert_eq!(echo["bodyBytes"], 300_000);
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_limits_and_size_caps_apply_to_upstreams() {
    let service = Upstream::start().await;
    let limit = |name: &str, identity: &str| {
        let numbers = "rate = 1\nperiod_s = 3600\nburst = 4\non_redis_loss = \"local\"\n";
        limit_lines(name, identity, &format!("/{name}/*"), numbers)
    };
    let conf = Conf {
        upstreams: upstream("up", &[&service], "scope = \"read\"\nbody_bytes_max = 1000\n")
            + &upstream("open", &[&service], "scope = \"none\"\n"),
        keys: key_lines("reader", "key-reader", &["read"]) + &key_lines("runner", "key-runner", &["run"]),
        limits: limit("up", "key") + &limit("open", "ip"),
        ..Conf::default()
    };
    let platform = Setup::new(Backend::Dev).conf(conf).start().await;
    let gateway = &platform.gateway;
    let without_key = |target| Request::new(gateway.addr(), "GET", target);
    let as_key = |key: &str| gateway.upstream_request_with(key, "GET", "/up/x");
    without_key("/up/x").send().await.expect_problem(401);
    as_key("wrong").send().await.expect_problem(401);
    as_key("key-runner").send().await.expect_problem(403);
    for path in ["/upper", "/up/../x", "/up/%2e%2e/x", "/up/a%2fb", "/up//x", "/up/..;/x", "/%75p/x"] {
        gateway.upstream_request("GET", path).send().await.expect_problem(404);
    }
    let large = gateway
        .upstream_request("POST", "/up/x")
        .body("text/plain", vec![b'x'; 1001])
        .send()
        .await
        .expect_problem(413);
    assert_eq!(large.json()["code"], "body_too_large");
    let chunked = gateway.upstream_request("POST", "/up/x").header("transfer-encoding", "chunked");
    let mut conn = Conn::open(gateway.addr()).await.expect("the gateway accepts connections");
    conn.write(&chunked.to_bytes()).await.expect("the gateway reads");
    conn.write(format!("5dc\r\n{}\r\n0\r\n\r\n", "x".repeat(1500)).as_bytes())
        .await
        .expect("the gateway reads");
    conn.answer(false).await.expect("an answer").expect_problem(413);
    let is_whole = |m: &Message| !m.body.is_empty();
    assert!(!service.requests().iter().any(is_whole), "the upstream has received a truncated body");
    for expected in [200, 200, 200, 200, 429] {
        let answer = as_key("key-reader").send().await.expect(expected);
        assert_eq!(answer.need("x-ratelimit-limit"), "4");
    }
    // Requests without a key are limited by address.
    for expected in [200, 200, 200, 200, 429] {
        without_key("/open/x").send().await.expect(expected);
    }
    // `Connection` must not remove a field of the gateway.
    let nominated =
        gateway.upstream_request("GET", "/up/x").header("connection", "x-forwarded-for").send().await;
    assert_eq!(nominated.expect_problem(400).json()["code"], "malformed_header");
    let series = r#"http_request_duration_seconds_count{method="GET",route="/up/*",status_code="200"}"#;
    assert_eq!(gateway.metric(series).await, Some(4.0));
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_healthy_addresses_are_used() {
    let (one, two) = (Upstream::start().await, Upstream::start().await);
    let more = "scope = \"none\"\nhealth = { path = \"/healthz\", every_s = 1 }\n";
    let platform = start(upstream("up", &[&one, &two], more), "").await;
    let gateway = &platform.gateway;
    for _ in 0..6 {
        gateway.upstream_request("GET", "/up/x").send().await.expect(200);
    }
    assert!(!one.requests().is_empty() && !two.requests().is_empty(), "an address gets no requests");
    one.fail_health_checks();
    gateway.wait_for_metric(r#"infra_upstream_healthy_addresses{upstream="up"}"#, 1.0).await;
    let before = one.requests().len();
    for _ in 0..6 {
        gateway.upstream_request("GET", "/up/x").send().await.expect(200);
    }
    assert_eq!(one.requests().len(), before);
    assert!(one.health_checks() > 0);
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn upstream_failures_are_answered_as_problems() {
    let service = Upstream::start().await;
    let gone = {
        let gone = Upstream::start().await;
        gone.addr()
    };
    let late = upstream("late", &[&service], "scope = \"none\"\nread_timeout_s = 1\n");
    let nobody = upstream_lines("gone", &[gone], "scope = \"none\"\nconnect_timeout_ms = 300\n");
    // At a path that the service does not list among its requests.
    let no_checks = format!("scope = \"none\"\n{NO_HEALTH_CHECKS}").replace("\"/\"", "\"/healthz\"");
    let half = upstream_lines("half", &[gone, service.addr()], &no_checks);
    let slow = upstream("slow", &[&service], "scope = \"none\"\nread_timeout_s = 60\nbody_timeout_s = 1\n");
    let up = upstream("up", &[&service], "scope = \"none\"\n");
    let platform = start(up + &late + &nobody + &half + &slow, "").await;
    let gateway = &platform.gateway;
    for _ in 0..4 {
        gateway.upstream_request("POST", "/half/x").body("text/plain", "once").send().await.expect(200);
    }
    let reached = service.requests().len();
    assert_eq!(reached, 4, "the next address is not tried, or a request is sent twice");
    let away = gateway.upstream_request("GET", "/gone").send().await.expect_problem(503);
    assert_eq!(
        (away.json()["code"].as_str(), away.header("retry-after")),
        (Some("upstream_unavailable"), Some("1"))
    );
    let late = gateway
        .upstream_request("GET", "/late/hang")
        .header("x-request-id", "mine")
        .send()
        .await
        .expect_problem(504);
    assert_eq!((late.json()["code"].as_str(), late.need("x-request-id")), (Some("upstream_timeout"), "mine"));
    let asked = service.requests().len() - reached;
    assert_eq!(asked, 1, "the request is retried");
    let mut conn = Conn::open(gateway.addr()).await.expect("the gateway accepts connections");
    let stalls = gateway.upstream_request("POST", "/slow/x").header("content-length", "10").to_bytes();
    conn.write(&stalls).await.expect("the gateway reads");
    let refused = within("the end of a body that stalls", SOON, conn.answer(false)).await.expect("an answer");
    assert_eq!(refused.expect_problem(408).json()["code"], "body_timeout");
    assert!(
        gateway.upstream_request("GET", "/up/break").try_send().await.is_err(),
        "an incomplete answer is passed on as complete"
    );
    gateway.upstream_request("GET", "/up/x").send().await.expect(200);
    platform.finish().await;
}

/// The upstream has the beginning of a body before the client sends the end, and vice versa.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_are_streamed_both_ways() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let addr = listener.local_addr().expect("it is bound");
    let upstreams = upstream_lines("up", &[addr], &format!("scope = \"none\"\n{NO_HEALTH_CHECKS}"));
    let platform = start(upstreams, "").await;
    let gateway = &platform.gateway;
    let mut conn = Conn::open(gateway.addr()).await.expect("the gateway accepts connections");
    let request = gateway.upstream_request("POST", "/up/x").header("transfer-encoding", "chunked");
    conn.write(&request.to_bytes()).await.expect("the gateway reads");
    conn.write(b"5\r\nfirst\r\n").await.expect("the gateway reads");
    let mut seen = Vec::new();
    let mut stream = within("the beginning", SOON, async {
        loop {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            seen.clear();
            // Health checks arrive, too.
            while stream.read_buf(&mut seen).await.is_ok_and(|n| n > 0) {
                if seen.windows(5).any(|part| part == b"first") {
                    return stream;
                }
            }
        }
    })
    .await;
    conn.write(b"6\r\nsecond\r\n0\r\n\r\n").await.expect("the gateway reads");
    within("the end", SOON, async {
        while !seen.windows(6).any(|part| part == b"second") {
            assert!(stream.read_buf(&mut seen).await.expect("more of the body") > 0);
        }
    })
    .await;
    // The answer.
    stream
        .write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n")
        .await
        .expect("the peer reads");
    let head = within("the head of the answer", SOON, conn.any_answer(true)).await.expect("an answer");
    assert_eq!(head.status, 200);
    let begun = within("the beginning of the answer", SOON, conn.bytes(8)).await.expect("a chunk");
    assert_eq!(begun, b"3\r\none\r\n");
    stream.write_all(b"0\r\n\r\n").await.expect("the peer reads");
    within("the end of the answer", SOON, conn.bytes(5)).await.expect("the last chunk");
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_of_upstreams_are_verified() {
    let authority = Authority::new();
    let acceptor = server(&authority.issue("models.internal"));
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let addr = listener.local_addr().expect("it is bound");
    let accepting = spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            spawn(async move {
                let Ok(mut stream) = acceptor.accept(stream).await else { return };
                let mut bytes = [0; 4096];
                while stream.read(&mut bytes).await.is_ok_and(|n| n > 0) {
                    let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nsecret";
                    let _ = stream.write_all(answer).await;
                    let _ = stream.flush().await;
                }
            });
        }
    });
    let of = |name: &str, known_as: &str| {
        let more = format!("scope = \"none\"\ntls = {{ name = {known_as:?} }}\n{NO_HEALTH_CHECKS}");
        upstream_lines(name, &[addr], &more)
    };
    let roots = Scratch::new("roots");
    let file = roots.path().join("roots.pem");
    std::fs::write(&file, authority.pem()).expect("writable");
    let conf =
        Conf { upstreams: of("good", "models.internal") + &of("bad", "evil.internal"), ..Conf::default() };
    let setup = Setup::new(Backend::Dev).conf(conf).env("SSL_CERT_FILE", &file.display().to_string());
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let answer = gateway.upstream_request("GET", "/good/x").send().await.expect(200);
    assert_eq!(answer.body(), b"secret");
    let refused = gateway.upstream_request("GET", "/bad/x").send().await;
    assert!(matches!(refused.status, 502 | 503), "{}", refused.text());
    platform.finish().await;
    accepting.abort();
}

/// A tunnel carries any bytes, for any time, until both sides are idle.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn websocket_tunnels_carry_any_bytes_until_both_sides_are_silent() {
    let service = Upstream::start().await;
    let platform = start(
        upstream("up", &[&service], "scope = \"read\"\nread_timeout_s = 15\n"),
        "[http]\nheader_timeout_s = 10\n",
    )
    .await;
    let gateway = &platform.gateway;
    let upgrade = |key: &str| {
        let request = gateway.upstream_request_with(key, "GET", "/up/socket");
        request.header("connection", "Upgrade").header("upgrade", "websocket")
    };
    upgrade("wrong").send().await.expect_problem(401);
    let mut conn = Conn::open(gateway.addr()).await.expect("the gateway accepts connections");
    conn.write(&upgrade("key-reader").to_bytes()).await.expect("the gateway reads");
    let switched = within("101", SOON, conn.any_answer(true)).await.expect("an answer");
    assert_eq!((switched.status, switched.need("upgrade")), (101, "websocket"));
    // The tunnel outlasts the header timeout, which ends an idle connection in the meantime.
    let mut idle = Conn::open(gateway.addr()).await.expect("the gateway accepts connections");
    let idle = spawn(async move { within("the end of an idle connection", SOON, idle.is_closed()).await });
    loop {
        let is_over = idle.is_finished();
        // Bytes that would be a malformed request.
        let message = b"\0 no HTTP at all \n\n";
        conn.write(message).await.expect("the tunnel is open");
        let echoed = within("the echo", SOON, conn.bytes(message.len())).await.expect("the echo");
        assert_eq!(echoed, message);
        if is_over {
            break;
        }
        pause(Duration::from_millis(100)).await;
    }
    assert!(idle.await.expect("no panic"), "the idle connection gets data");
    // Then it ends after the read timeout.
    assert!(within("the end of an idle tunnel", SOON, conn.is_closed()).await, "unexpected data");
    // Also if the upstream answers at once.
    for n in 0..100 {
        let mut conn = Conn::open(gateway.addr()).await.expect("the gateway accepts connections");
        conn.write(&upgrade("key-reader").to_bytes()).await.expect("the gateway reads");
        assert_eq!(within("101", SOON, conn.any_answer(true)).await.expect("an answer").status, 101);
        conn.write(b"hello").await.expect("the tunnel is open");
        let echoed = within("the echo", SOON, conn.bytes(5)).await;
        assert_eq!(echoed.unwrap_or_else(|e| panic!("tunnel {n}: {e:?}")), b"hello");
    }
    // On routes of the gateway an upgrade is ignored.
    gateway
        .anonymous("GET", "/livez")
        .header("connection", "Upgrade")
        .header("upgrade", "websocket")
        .send()
        .await
        .expect(200);
    platform.finish().await;
}

#[tokio::test]
async fn invalid_upstreams_are_rejected_at_start() {
    let dir = Scratch::new("upstreams");
    let of = |prefix: &str| {
        format!(
            "[[upstream]]\nname = \"a\"\nprefix = {prefix:?}\n\
             addresses = [\"127.0.0.1:1\"]\nscope = \"none\"\n"
        )
    };
    for (text, error) in [
        (of("/functions"), "upstreams.toml:3: upstream[0].prefix \"/functions\" is a route of the gateway"),
        (of("up"), "upstreams.toml:3: upstream[0].prefix must start, but not end, with /"),
        (
            of("/a").replace("127.0.0.1:1", "127.0.0.1"),
            "upstreams.toml:4: upstream[0].addresses must be host:port",
        ),
        (of("/a").replace("none", "all"), "upstreams.toml:5: upstream[0].scope must be a scope"),
        (of("/a") + "add_headers = { host = \"x\" }\n", "upstreams.toml:6: upstream[0].add_headers"),
    ] {
        let conf = dir.path().join("conf");
        Conf { upstreams: text, ..Conf::default() }.write(&conf);
        let args = ["dev", "--port", "0", "--conf", conf.to_str().expect("UTF-8")];
        let run = run_to_end(&args, &[], dir.path(), SOON).await;
        assert_eq!(run.code, Some(78), "{}", run.output);
        assert!(run.output.contains(error), "{error}: {}", run.output);
    }
}
