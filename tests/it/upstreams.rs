//! What is passed on to services behind the gateway.

use crate::harness::gateway::Conf;
use crate::harness::http::{Conn, Message};
use crate::harness::keys::key_lines;
use crate::harness::platform::{Backend, Platform};
use crate::harness::process::Scratch;
use crate::harness::tls::{Authority, server};
use crate::harness::upstream::Upstream;
use crate::harness::{SOON, Setup, eventually, spawn, within};
use serde_json::Value;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

async fn start(upstreams: String, server: &str) -> Platform {
    let keys = key_lines("reader", "key-reader", &["read"]) + &key_lines("runner", "key-runner", &["run"]);
    let conf = Conf { upstreams, keys, server: server.into(), ..Conf::default() };
    Setup::new(Backend::Dev).conf(conf).start().await
}

fn upstream(name: &str, addresses: &[&Upstream], more: &str) -> String {
    let addresses: Vec<String> = addresses.iter().map(|upstream| upstream.addr().to_string()).collect();
    format!("[[upstream]]\nname = {name:?}\nprefix = \"/{name}\"\naddresses = {addresses:?}\n{more}\n")
}

fn seen<'a>(answer: &'a Value, name: &str) -> Vec<&'a str> {
    let headers = answer["headers"].as_array().expect("the upstream says what it saw");
    headers
        .iter()
        .filter(|h| h[0].as_str().is_some_and(|n| n.eq_ignore_ascii_case(name)))
        .filter_map(|h| h[1].as_str())
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_upstream_sees() {
    let service = Upstream::start().await;
    let more = "scope = \"read\"\nreplace_prefix = \"/v1\"\nhost = \"models.internal\"\nremove_headers = [\"Cookie\"]\nadd_headers = { x-platform = \"edge\" }\n";
    let open = "scope = \"none\"\npass_key = true\n";
    let platform =
        start(upstream("catalogue", &[&service], more) + &upstream("open", &[&service], open), "").await;
    let gateway = &platform.gateway;
    let request = gateway
        .beyond("GET", "/catalogue/a%20b?x=1&y")
        .header("cookie", "secret=1")
        .header("x-request-id", "mine")
        .header("x-forwarded-for", "6.6.6.6")
        .header("forwarded", "for=6.6.6.6")
        .header("x-hop", "1")
        .header("connection", "x-hop");
    let answer = request.send().await.expect(200);
    assert_eq!((answer.need("x-request-id"), answer.need("x-upstream")), ("mine", "yes"));
    let told = answer.json();
    assert_eq!(told["start"], "GET /v1/a%20b?x=1&y HTTP/1.1");
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
        assert_eq!(seen(&told, name), expected, "{name}");
    }
    // Its own key, if that is said; and no key is asked for, if that is.
    let told = gateway.beyond("GET", "/open").send().await.expect(200).json();
    assert_eq!((seen(&told, "x-api-key").len(), &told["start"]), (1, &"GET /open HTTP/1.1".into()));
    let body = vec![b'x'; 300_000];
    let told =
        gateway.beyond("POST", "/open/upload").body("text/plain", body).send().await.expect(200).json();
    assert_eq!(told["bodyBytes"], 300_000);
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_filters() {
    let service = Upstream::start().await;
    let limit = |name: &str, identity: &str| {
        format!(
            "[[limit]]\nname = {name:?}\nidentity = {identity:?}\nroutes = [\"/{name}/*\"]\nrate = 1\nperiod_s = 3600\nburst = 4\non_redis_loss = \"local\"\n"
        )
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
    let as_key = |key: &str| {
        crate::harness::http::Request::new(gateway.addr(), "GET", "/up/x").header("x-api-key", key)
    };
    crate::harness::http::Request::new(gateway.addr(), "GET", "/up/x").send().await.expect_problem(401);
    as_key("wrong").send().await.expect_problem(401);
    as_key("key-runner").send().await.expect_problem(403);
    for path in ["/upper", "/up/../x", "/up/%2e%2e/x", "/up/a%2fb", "/up//x", "/up/..;/x", "/%75p/x"] {
        gateway.beyond("GET", path).send().await.expect_problem(404);
    }
    let large =
        gateway.beyond("POST", "/up/x").body("text/plain", vec![b'x'; 1001]).send().await.expect_problem(413);
    assert_eq!(large.json()["code"], "body_too_large");
    let chunked = gateway.beyond("POST", "/up/x").header("transfer-encoding", "chunked");
    let mut conn = Conn::open(gateway.addr()).await.expect("the gateway takes connections");
    conn.write(&chunked.to_bytes()).await.expect("the gateway reads");
    conn.write(format!("5dc\r\n{}\r\n0\r\n\r\n", "x".repeat(1500)).as_bytes())
        .await
        .expect("the gateway reads");
    conn.answer(false).await.expect("an answer").expect_problem(413);
    let is_whole = |m: &Message| !m.body.is_empty();
    assert!(!service.requests().iter().any(is_whole), "no part of it was taken for all");
    for expected in [200, 200, 200, 200, 429] {
        let answer = as_key("key-reader").send().await.expect(expected);
        assert_eq!(answer.need("x-ratelimit-limit"), "4");
    }
    // Who needs no key is counted by address all the same.
    for expected in [200, 200, 200, 200, 429] {
        crate::harness::http::Request::new(gateway.addr(), "GET", "/open/x").send().await.expect(expected);
    }
    // A field that would be taken away on the way must not be the gateway's own.
    let nominated = gateway.beyond("GET", "/up/x").header("connection", "x-forwarded-for").send().await;
    assert_eq!(nominated.expect_problem(400).json()["code"], "malformed_header");
    let series = r#"http_request_duration_seconds_count{method="GET",route="/up/*",status_code="200"}"#;
    assert_eq!(gateway.metric(series).await, Some(4.0));
    platform.finish().await;
}

/// Addresses are asked in turn; those that are sick or gone are left out, and come back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_healthy_addresses_are_asked() {
    let (one, two) = (Upstream::start().await, Upstream::start().await);
    let more = "scope = \"none\"\nhealth = { path = \"/healthz\", every_s = 1 }\n";
    let platform = start(upstream("up", &[&one, &two], more), "").await;
    let gateway = &platform.gateway;
    for _ in 0..6 {
        gateway.beyond("GET", "/up/x").send().await.expect(200);
    }
    assert!(!one.requests().is_empty() && !two.requests().is_empty(), "both are asked");
    one.fall_sick();
    eventually("one address", SOON, || async {
        let healthy = gateway.metric(r#"infra_upstream_healthy_addresses{upstream="up"}"#).await;
        if healthy == Some(1.0) { Ok(()) } else { Err(format!("{healthy:?}")) }
    })
    .await;
    let before = one.requests().len();
    for _ in 0..6 {
        gateway.beyond("GET", "/up/x").send().await.expect(200);
    }
    assert_eq!(one.requests().len(), before);
    assert!(one.checks() > 0);
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failures_of_an_upstream_are_told() {
    let service = Upstream::start().await;
    let gone = {
        let gone = Upstream::start().await;
        gone.addr()
    };
    let more = "scope = \"none\"\nread_timeout_s = 1\n";
    let nobody = format!(
        "[[upstream]]\nname = \"gone\"\nprefix = \"/gone\"\naddresses = [\"{gone}\"]\nscope = \"none\"\nconnect_timeout_ms = 300\n"
    );
    // Its health is not looked after again for an hour.
    let half = format!(
        "[[upstream]]\nname = \"half\"\nprefix = \"/half\"\naddresses = [\"{gone}\", \"{}\"]\nscope = \"none\"\nhealth = {{ path = \"/healthz\", every_s = 3600 }}\n",
        service.addr()
    );
    let slow = upstream("slow", &[&service], "scope = \"none\"\nread_timeout_s = 9\nbody_timeout_s = 1\n");
    let platform = start(upstream("up", &[&service], more) + &nobody + &half + &slow, "").await;
    let gateway = &platform.gateway;
    for _ in 0..4 {
        gateway.beyond("POST", "/half/x").body("text/plain", "once").send().await.expect(200);
    }
    let reached = service.requests().len();
    assert_eq!(reached, 4, "the next address is tried, and none is asked twice");
    let away = gateway.beyond("GET", "/gone").send().await.expect_problem(503);
    assert_eq!(
        (away.json()["code"].as_str(), away.header("retry-after")),
        (Some("upstream_unavailable"), Some("1"))
    );
    let late =
        gateway.beyond("GET", "/up/hang").header("x-request-id", "mine").send().await.expect_problem(504);
    assert_eq!((late.json()["code"].as_str(), late.need("x-request-id")), (Some("upstream_timeout"), "mine"));
    let asked = service.requests().len() - reached;
    assert_eq!(asked, 1, "it is not asked again");
    let mut conn = Conn::open(gateway.addr()).await.expect("the gateway takes connections");
    let stalls = gateway.beyond("POST", "/slow/x").header("content-length", "10").to_bytes();
    conn.write(&stalls).await.expect("the gateway reads");
    let refused = within("the end of a body that stalls", SOON, conn.answer(false)).await.expect("an answer");
    assert_eq!(refused.expect_problem(408).json()["code"], "body_timeout");
    assert!(gateway.beyond("GET", "/up/break").try_send().await.is_err(), "half an answer is no answer");
    gateway.beyond("GET", "/up/x").send().await.expect(200);
    platform.finish().await;
}

/// A body goes on as it comes: the upstream has the beginning while the client still has the end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_stream() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let addr = listener.local_addr().expect("it is bound");
    let upstreams = format!(
        "[[upstream]]\nname = \"up\"\nprefix = \"/up\"\naddresses = [\"{addr}\"]\nscope = \"none\"\nhealth = {{ path = \"/\", every_s = 3600 }}\n"
    );
    let platform = start(upstreams, "").await;
    let gateway = &platform.gateway;
    let mut conn = Conn::open(gateway.addr()).await.expect("the gateway takes connections");
    let request = gateway.beyond("POST", "/up/x").header("transfer-encoding", "chunked");
    conn.write(&request.to_bytes()).await.expect("the gateway reads");
    conn.write(b"5\r\nfirst\r\n").await.expect("the gateway reads");
    let mut seen = Vec::new();
    let mut stream = within("the beginning", SOON, async {
        loop {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            seen.clear();
            // Health checks come too.
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
            assert!(stream.read_buf(&mut seen).await.expect("the body goes on") > 0);
        }
    })
    .await;
    // So does the answer.
    stream
        .write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n")
        .await
        .expect("it reads");
    let head = within("the head of the answer", SOON, conn.any_answer(true)).await.expect("an answer");
    assert_eq!(head.status, 200);
    let begun = within("the beginning of the answer", SOON, conn.bytes(8)).await.expect("a chunk");
    assert_eq!(begun, b"3\r\none\r\n");
    stream.write_all(b"0\r\n\r\n").await.expect("it reads");
    within("the end of the answer", SOON, conn.bytes(5)).await.expect("the last chunk");
    platform.finish().await;
}

/// An upstream behind TLS must be who it says it is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn upstreams_behind_tls() {
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
        format!(
            "[[upstream]]\nname = {name:?}\nprefix = \"/{name}\"\naddresses = [\"{addr}\"]\nscope = \"none\"\ntls = {{ name = {known_as:?} }}\nhealth = {{ path = \"/\", every_s = 3600 }}\n"
        )
    };
    let roots = Scratch::new("roots");
    let file = roots.path().join("roots.pem");
    std::fs::write(&file, authority.pem()).expect("writable");
    let conf =
        Conf { upstreams: of("good", "models.internal") + &of("bad", "evil.internal"), ..Conf::default() };
    let setup = Setup::new(Backend::Dev).conf(conf).env("SSL_CERT_FILE", &file.display().to_string());
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let answer = gateway.beyond("GET", "/good/x").send().await.expect(200);
    assert_eq!(answer.body(), b"secret");
    let refused = gateway.beyond("GET", "/bad/x").send().await;
    assert!(matches!(refused.status, 502 | 503), "{}", refused.text());
    platform.finish().await;
    accepting.abort();
}

/// Another protocol goes through, both ways, for as long as it likes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upgrade_goes_through() {
    let service = Upstream::start().await;
    let platform = start(
        upstream("up", &[&service], "scope = \"read\"\nread_timeout_s = 2\n"),
        "[http]\nheader_timeout_s = 1\n",
    )
    .await;
    let gateway = &platform.gateway;
    let upgrade = |key: &str| {
        let request = crate::harness::http::Request::new(gateway.addr(), "GET", "/up/socket");
        request.header("x-api-key", key).header("connection", "Upgrade").header("upgrade", "websocket")
    };
    upgrade("wrong").send().await.expect_problem(401);
    let mut conn = Conn::open(gateway.addr()).await.expect("the gateway takes connections");
    conn.write(&upgrade("key-reader").to_bytes()).await.expect("the gateway reads");
    let switched = within("101", SOON, conn.any_answer(true)).await.expect("an answer");
    assert_eq!((switched.status, switched.need("upgrade")), (101, "websocket"));
    for n in 0..3 {
        // What would be a bad request is only bytes now.
        let message = format!("\0 no HTTP at all \n\n{n}");
        conn.write(message.as_bytes()).await.expect("the tunnel stands");
        let echoed = within("the echo", SOON, conn.bytes(message.len())).await.expect("the echo");
        assert_eq!(echoed, message.as_bytes());
        tokio::time::sleep(Duration::from_millis(600)).await;
    }
    // In which nothing is said it ends, and nothing is said in it by others.
    assert!(within("the end of a silent tunnel", SOON, conn.is_closed()).await, "something came");
    // However quick the upstream is.
    for n in 0..100 {
        let mut conn = Conn::open(gateway.addr()).await.expect("the gateway takes connections");
        conn.write(&upgrade("key-reader").to_bytes()).await.expect("the gateway reads");
        assert_eq!(within("101", SOON, conn.any_answer(true)).await.expect("an answer").status, 101);
        conn.write(b"hello").await.expect("the tunnel stands");
        let echoed = within("the echo", SOON, conn.bytes(5)).await;
        assert_eq!(echoed.unwrap_or_else(|e| panic!("tunnel {n}: {e:?}")), b"hello");
    }
    // On a route of ours there is nothing to upgrade to.
    gateway
        .anonymous("GET", "/livez")
        .header("connection", "Upgrade")
        .header("upgrade", "websocket")
        .send()
        .await
        .expect(200);
    platform.finish().await;
}

#[test]
fn what_cannot_be_passed_on_is_told_at_start() {
    let dir = Scratch::new("upstreams");
    let of = |prefix: &str| {
        format!(
            "[[upstream]]\nname = \"a\"\nprefix = {prefix:?}\naddresses = [\"127.0.0.1:1\"]\nscope = \"none\"\n"
        )
    };
    for (text, told) in [
        (of("/functions"), "upstreams.toml:3: upstream[0].prefix \"/functions\" is a route of the gateway"),
        (of("up"), "upstreams.toml:3: upstream[0].prefix must begin with /"),
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
        let run = crate::harness::gateway::run_to_end(&args, &[], dir.path(), SOON, || {});
        assert_eq!(run.code, Some(78), "{}", run.output);
        assert!(run.output.contains(told), "{told}: {}", run.output);
    }
}
