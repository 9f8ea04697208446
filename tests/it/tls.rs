//! The listener that speaks TLS, HTTP/2 over it, and settings that change under load.

use crate::harness::keys::key_lines;
use crate::harness::platform::HELLO;
use crate::harness::process::{Process, Scratch};
use crate::harness::secure::{NAME, Secure};
use crate::harness::tls::{Authority, client, connect};
use crate::harness::upstream::Upstream;
use crate::harness::{SOON, eventually, path_env, spawn, within};
use bytes::Bytes;
use h2::client::SendRequest;
use http::{Method, Request, StatusCode};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, sleep, timeout};

impl Secure {
    async fn http2(&self) -> (SendRequest<Bytes>, tokio::task::JoinHandle<Result<(), h2::Error>>) {
        let stream = connect(&client(&self.authority, &["h2"], None), self.addr).await.expect("a handshake");
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
        let (send, connection) = h2::client::handshake(stream).await.expect("a connection");
        (send, spawn(connection))
    }

    fn request(&self, method: Method, path: &str) -> Request<()> {
        let uri = format!("https://{NAME}{path}");
        let request = Request::builder().method(method).uri(uri).header("x-api-key", self.gateway().key());
        request.body(()).expect("a request")
    }
}

async fn whole(response: http::Response<h2::RecvStream>) -> (StatusCode, Vec<u8>) {
    let status = response.status();
    let mut stream = response.into_body();
    let mut body = Vec::new();
    while let Some(bytes) = stream.data().await {
        let bytes = bytes.expect("the body comes");
        let _ = stream.flow_control().release_capacity(bytes.len());
        body.extend_from_slice(&bytes);
    }
    (status, body)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn both_protocols_are_spoken() {
    let service = Upstream::start().await;
    let secure = Secure::start("", "", Authority::new()).await;
    let upstream = format!(
        "[[upstream]]\nname = \"up\"\nprefix = \"/up\"\naddresses = [\"{}\"]\nscope = \"read\"\n",
        service.addr()
    );
    std::fs::write(secure.platform.conf_file("upstreams.toml"), upstream).expect("writable");
    secure
        .gateway()
        .wait_for_metric(r#"infra_conf_reloads_total{file="upstreams.toml",result="applied"}"#, 1.0)
        .await;
    // HTTP/1.1, as every client knows it.
    let mut stream =
        connect(&client(&secure.authority, &["http/1.1"], None), secure.addr).await.expect("a handshake");
    let request = secure.gateway().run(HELLO, &json!("over TLS")).to_bytes();
    for _ in 0..2 {
        stream.write_all(&request).await.expect("it reads");
        let mut bytes = [0; 4096];
        let n = within("the answer", SOON, stream.read(&mut bytes)).await.expect("an answer");
        let text = String::from_utf8_lossy(&bytes[..n]).into_owned();
        assert!(text.starts_with("HTTP/1.1 200") && text.contains("over TLS"), "{text}");
    }
    // HTTP/2: several at once on one connection, a body, a refusal.
    let (send, _connection) = secure.http2().await;
    let runs = (0..20).map(|n| {
        let mut send = send.clone();
        let request = secure.request(Method::POST, "/run");
        async move {
            send = send.ready().await.expect("room");
            let (answer, mut body) = send.send_request(request, false).expect("a stream");
            let input = json!({ "functionId": HELLO, "inputData": format!("stream-{n}-end") }).to_string();
            body.send_data(input.into(), true).expect("the body");
            let (status, body) = whole(answer.await.expect("an answer")).await;
            let result: Value = serde_json::from_slice(&body).expect("JSON");
            assert_eq!(status, 200, "{result}");
            assert!(
                result["stdout"].as_str().is_some_and(|out| out.contains(&format!("stream-{n}-end"))),
                "{result}"
            );
        }
    });
    futures_util::future::join_all(runs).await;
    // What is passed on looks to its upstream like any other request.
    let mut send = send.ready().await.expect("room");
    let (answer, _) = send.send_request(secure.request(Method::GET, "/up/x?y"), true).expect("a stream");
    let (status, body) = whole(answer.await.expect("an answer")).await;
    let told: Value = serde_json::from_slice(&body).expect("JSON");
    assert_eq!((status, &told["start"]), (StatusCode::OK, &"GET /up/x?y HTTP/1.1".into()), "{told}");
    for (name, value) in [("host", NAME), ("x-forwarded-proto", "https"), ("x-forwarded-host", NAME)] {
        assert!(
            told["headers"]
                .as_array()
                .into_iter()
                .flatten()
                .any(|h| h[0].as_str().is_some_and(|n| n.eq_ignore_ascii_case(name)) && h[1] == value),
            "{name}: {told}"
        );
    }
    let mut send = send.ready().await.expect("room");
    let request = Request::builder().uri(format!("https://{NAME}/functions")).body(()).expect("a request");
    let (answer, _) = send.send_request(request, true).expect("a stream");
    assert_eq!(whole(answer.await.expect("an answer")).await.0, 401);
    // Who speaks no TLS there is not understood, and harms nobody.
    let mut plain = crate::harness::http::Conn::open(secure.addr).await.expect("it takes connections");
    plain.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.expect("it reads");
    within("the end", SOON, async { while plain.bytes(1).await.is_ok() {} }).await;
    secure.gateway().wait_for_metric("infra_tls_handshakes_failed_total", 1.0).await;
    drop(send);
    secure.platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_may_have_to_show_a_certificate() {
    let authority = Authority::new();
    let shown = authority.issue("client");
    let secure = Secure::start("client_ca = \"clients.pem\"\n", "", authority).await;
    let strangers = Authority::new();
    let strange = strangers.issue("client");
    let asks = |identity| {
        let connector = client(&secure.authority, &["http/1.1"], identity);
        let addr = secure.addr;
        async move {
            let mut stream = connect(&connector, addr).await.ok()?;
            stream.write_all(b"GET /livez HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await.ok()?;
            let mut text = String::new();
            let _ = stream.read_to_string(&mut text).await;
            text.starts_with("HTTP/1.1 200").then_some(())
        }
    };
    assert!(asks(Some(&shown)).await.is_some());
    assert!(asks(None).await.is_none(), "without one there is no connection");
    assert!(asks(Some(&strange)).await.is_none(), "nor with one of somebody else");
    secure.platform.finish().await;
}

/// A certificate that is replaced is shown to the next client; who is connected stays so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_are_replaced_while_it_runs() {
    let secure = Secure::start("", "", Authority::new()).await;
    let (send, _connection) = secure.http2().await;
    let next = Authority::new();
    next.issue(NAME).write(&secure.platform.conf_dir());
    eventually("the new certificate", SOON, || async {
        connect(&client(&next, &["h2"], None), secure.addr).await.map(|_| ()).map_err(|e| e.to_string())
    })
    .await;
    assert!(connect(&client(&secure.authority, &["h2"], None), secure.addr).await.is_err());
    let mut send = send.ready().await.expect("the old connection stands");
    let (answer, _) = send.send_request(secure.request(Method::GET, "/functions"), true).expect("a stream");
    assert_eq!(whole(answer.await.expect("an answer")).await.0, 200);
    // A key that is not the certificate's changes nothing.
    std::fs::write(secure.platform.conf_file("key.pem"), Authority::new().issue(NAME).key).expect("writable");
    let refused = r#"infra_conf_reloads_total{file="certificate",result="refused"}"#;
    secure.gateway().wait_for_metric(refused, 1.0).await;
    connect(&client(&next, &["h2"], None), secure.addr).await.expect("what was in force stays");
    drop(send);
    secure.platform.finish().await;
}

/// Streams that are opened and reset at once, and header blocks without end: the connection ends, and others are served.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn floods_of_http2_are_bounded() {
    let secure = Secure::start("", "[http2]\nidle_timeout_s = 2\n", Authority::new()).await;
    let before = secure.gateway().peak_memory();
    for flood in [Flood::Resets, Flood::Continuations, Flood::Pings, Flood::Settings] {
        let stream =
            connect(&client(&secure.authority, &["h2"], None), secure.addr).await.expect("a handshake");
        let sent = within("the end of a flood", 2 * SOON, flood.pour(stream)).await;
        println!("{flood:?}: {sent} frames until the connection ended");
        let (send, connection) = secure.http2().await;
        let mut send = send.ready().await.expect("room");
        let (answer, _) =
            send.send_request(secure.request(Method::GET, "/functions"), true).expect("a stream");
        assert_eq!(whole(answer.await.expect("an answer")).await.0, 200, "after {flood:?}");
        drop(send);
        connection.abort();
    }
    let grown = secure.gateway().peak_memory().saturating_sub(before);
    assert!(grown < 64 << 20, "the floods took {grown} bytes");
    // A client that begins and says no more is closed.
    let mut silent =
        connect(&client(&secure.authority, &["h2"], None), secure.addr).await.expect("a handshake");
    silent.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.expect("it reads");
    within("the end of a silent connection", SOON, async {
        let mut bytes = [0; 256];
        while silent.read(&mut bytes).await.is_ok_and(|n| n > 0) {}
    })
    .await;
    secure.platform.finish().await;
}

#[derive(Clone, Copy, Debug)]
enum Flood {
    Resets,
    Continuations,
    Pings,
    Settings,
}

/// Most frames of a flood: what is not refused by then is not bounded.
const FLOOD_FRAMES: u32 = 200_000;

impl Flood {
    /// Sends until the other side has closed; gives how many frames it took. Pings and settings may go on: they are only
    /// answered, one for one.
    async fn pour(self, stream: tokio_rustls::client::TlsStream<tokio::net::TcpStream>) -> u32 {
        let (mut read, mut write) = tokio::io::split(stream);
        let ended = Arc::new(AtomicBool::new(false));
        let closed = Arc::clone(&ended);
        let reading = spawn(async move {
            let mut bytes = [0; 4096];
            while read.read(&mut bytes).await.is_ok_and(|n| n > 0) {}
            closed.store(true, Ordering::Relaxed);
        });
        let mut begin = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
        begin.extend(frame(4, 0, 0, b""));
        let mut sent = 0;
        if write.write_all(&begin).await.is_ok() {
            while sent < FLOOD_FRAMES && !ended.load(Ordering::Relaxed) {
                if write.write_all(&self.frames(sent)).await.is_err() {
                    break;
                }
                sent += 1;
            }
        }
        let must_end = matches!(self, Self::Resets | Self::Continuations);
        assert!(!must_end || sent < FLOOD_FRAMES, "{self:?} goes on for ever");
        drop(write);
        let _ = timeout(SOON, reading).await;
        sent
    }

    fn frames(self, n: u32) -> Vec<u8> {
        // :method GET, :scheme https, :path /, and :authority a, by the static table of HPACK.
        let head = b"\x82\x87\x84\x41\x01a";
        match self {
            Self::Resets => {
                let stream = 2 * n + 1;
                [frame(1, 0x5, stream, head), frame(3, 0, stream, &8_u32.to_be_bytes())].concat()
            }
            // A header block that never ends; each part holds a field of its own.
            Self::Continuations if n == 0 => frame(1, 0x1, 1, head),
            Self::Continuations => frame(9, 0, 1, b"\0\x01x\x01y"),
            Self::Pings => frame(6, 0, 0, b"12345678"),
            Self::Settings => frame(4, 0, 0, b"\0\x03\0\0\0\x64"),
        }
    }
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("it is short").to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// `h2load`, of nghttp2: 10,000 requests over 10 connections, without an error.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_requests_over_ten_connections() {
    let secure = Secure::start("", "", Authority::new()).await;
    let dir = Scratch::new("h2load");
    let url = format!("https://127.0.0.1:{}/livez", secure.addr.port());
    let args = ["-n", "10000", "-c", "10", "-m", "20", &url];
    let process = Process::start("h2load", Path::new("h2load"), &args, &path_env(), dir.path());
    let process = process.expect("setpriv (util-linux) is there");
    let ended = || async { process.exit_status().ok_or_else(|| process.output().tail(30)) };
    let status = eventually("the end of h2load", 3 * SOON, ended).await;
    let told = process.output().tail(40);
    assert!(status.success() && told.contains("10000 succeeded, 0 failed, 0 errored, 0 timeout"), "{told}");
    secure.platform.finish().await;
}

/// Longest storm of changes.
const STORM_MAX: Duration = Duration::from_secs(120);

/// Keys, limits, certificates and upstreams are written anew every 100 ms during 10 s of load: no request fails, and what was
/// written last is in force.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_of_changes_fails_no_request() {
    let (one, two) = (Upstream::start().await, Upstream::start().await);
    let secure = Secure::start("", "", Authority::new()).await;
    let conf: PathBuf = secure.platform.conf_dir();
    let steady = key_lines("steady", "key-steady", &["run", "read"]);
    let (first, second) = (secure.authority.issue(NAME), secure.authority.issue(NAME));
    let write_all = |n: usize| {
        let odd = n % 2 == 1;
        let turn = key_lines(&format!("turn-{n}"), &format!("key-{n}"), &["read"]);
        let limit = 1_000_000 + n;
        let limits = format!(
            "[[limit]]\nname = \"test\"\nidentity = \"key\"\nroutes = [\"/run\"]\nrate = {limit}\nperiod_s = 1\nburst = {limit}\non_redis_loss = \"local\"\n"
        );
        let service = if odd { &one } else { &two };
        let upstreams = format!(
            "[[upstream]]\nname = \"up\"\nprefix = \"/up\"\naddresses = [\"{}\"]\nscope = \"read\"\nadd_headers = {{ x-turn = \"{n}\" }}\n",
            service.addr()
        );
        for (name, text) in [
            ("keys.toml", &format!("{steady}{turn}")),
            ("limits.toml", &limits),
            ("upstreams.toml", &upstreams),
        ] {
            // As an operator's tools do it: whole, or not at all.
            let draft = conf.join(format!("{name}.new"));
            std::fs::write(&draft, text).expect("writable");
            std::fs::rename(draft, conf.join(name)).expect("writable");
        }
        if odd { &first } else { &second }.write(&conf);
    };
    write_all(0);
    let gateway = secure.gateway();
    let in_force = async |n: usize| {
        eventually(&format!("change {n}"), SOON, || async {
            let key = format!("key-{n}");
            let answer = crate::harness::http::Request::new(gateway.addr(), "GET", "/up/x")
                .header("x-api-key", &key)
                .send()
                .await;
            if answer.status != 200 {
                return Err(answer.text());
            }
            let turn = answer.json()["headers"]
                .as_array()
                .into_iter()
                .flatten()
                .any(|h| h[0] == "x-turn" && h[1].as_str() == Some(&n.to_string()));
            let run =
                gateway.anonymous("POST", "/run").header("x-api-key", "key-steady").header("x-async", "true");
            let run = run.json(&json!({ "functionId": HELLO })).send().await;
            let limit = run.need("x-ratelimit-limit").to_owned();
            if turn && limit == (1_000_000 + n).to_string() { Ok(()) } else { Err(format!("{turn} {limit}")) }
        })
        .await;
    };
    in_force(0).await;
    let (stop, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let connector = client(&secure.authority, &["http/1.1"], None);
    let loads: Vec<_> = (0..6)
        .map(|n| {
            let (stop, served, addr, tls_addr) = (Arc::clone(&stop), Arc::clone(&served), gateway.addr(), secure.addr);
            let connector = connector.clone();
            spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    match n % 3 {
                        0 => {
                            let request = crate::harness::http::Request::new(addr, "GET", "/up/x").header("x-api-key", "key-steady");
                            request.send().await.expect(200);
                        }
                        1 => {
                            let request = crate::harness::http::Request::new(addr, "POST", "/run").header("x-api-key", "key-steady");
                            let body = json!({ "functionId": HELLO, "inputData": 1 });
                            request.header("x-async", "true").json(&body).send().await.expect(202);
                        }
                        _ => {
                            let mut stream = connect(&connector, tls_addr).await.expect("a handshake");
                            let request = b"GET /functions HTTP/1.1\r\nHost: a\r\nx-api-key: key-steady\r\nConnection: close\r\n\r\n";
                            stream.write_all(request).await.expect("it reads");
                            let mut text = String::new();
                            let _ = stream.read_to_string(&mut text).await;
                            assert!(text.starts_with("HTTP/1.1 200"), "{text}");
                        }
                    }
                    served.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let begun = Instant::now();
    let mut n = 0;
    let applied = async || {
        let series = r#"infra_conf_reloads_total{file="limits.toml",result="applied"}"#;
        gateway.metric(series).await.unwrap_or_default()
    };
    // A busy machine puts fewer of them in force, so it has longer.
    while begun.elapsed() < Duration::from_secs(10) || (applied().await < 20.0 && begun.elapsed() < STORM_MAX)
    {
        n += 1;
        write_all(n);
        sleep(Duration::from_millis(100)).await;
    }
    stop.store(true, Ordering::Relaxed);
    for load in loads {
        load.await.expect("no request fails");
    }
    in_force(n).await;
    let applied = applied().await;
    println!(
        "{n} changes of all files, {applied} times put in force, {} requests served",
        served.load(Ordering::Relaxed)
    );
    assert!(applied >= 20.0, "changes are put in force while others come: {applied}");
    // Its jobs are more than the worker of this machine runs in a while.
    secure.platform.stop().await;
}
