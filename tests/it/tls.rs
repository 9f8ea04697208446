//! The TLS listener, HTTP/2, and configuration changes under load.

use crate::harness::conf_lines::{key_lines, limit_lines, upstream_lines};
use crate::harness::gateway::{put_file, reloads};
use crate::harness::platform::HELLO;
use crate::harness::process::{Process, Scratch};
use crate::harness::tls::{Authority, client, connect};
use crate::harness::tls_gateway::{NAME, TlsGateway};
use crate::harness::upstream::Upstream;
use crate::harness::{SOON, eventually, path_env, pause, spawn, within};
use bytes::Bytes;
use h2::client::SendRequest;
use http::{Method, Request, StatusCode};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsConnector;

impl TlsGateway {
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

async fn read_all(response: http::Response<h2::RecvStream>) -> (StatusCode, Vec<u8>) {
    let status = response.status();
    let mut stream = response.into_body();
    let mut body = Vec::new();
    while let Some(bytes) = stream.data().await {
        let bytes = bytes.expect("a part of the body");
        let _ = stream.flow_control().release_capacity(bytes.len());
        body.extend_from_slice(&bytes);
    }
    (status, body)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http_1_1_and_http_2_are_served_over_tls() {
    let service = Upstream::start().await;
    let secure = TlsGateway::start("", "", Authority::new()).await;
    let upstream = upstream_lines("up", &[service.addr()], "scope = \"read\"\n");
    secure.platform.put_conf("upstreams.toml", &upstream);
    secure.gateway().wait_for_metric(&reloads("upstreams.toml", "applied"), 1.0).await;
    // HTTP/1.1.
    let mut stream =
        connect(&client(&secure.authority, &["http/1.1"], None), secure.addr).await.expect("a handshake");
    let request = secure.gateway().run(HELLO, &json!("over TLS")).to_bytes();
    for _ in 0..2 {
        stream.write_all(&request).await.expect("the peer reads");
        let mut bytes = [0; 4096];
        let n = within("the answer", SOON, stream.read(&mut bytes)).await.expect("an answer");
        let text = String::from_utf8_lossy(&bytes[..n]).into_owned();
        assert!(text.starts_with("HTTP/1.1 200") && text.contains("over TLS"), "{text}");
    }
    // HTTP/2: concurrent streams with bodies, and a rejection.
    let (send, _connection) = secure.http2().await;
    let runs = (0..20).map(|n| {
        let mut send = send.clone();
        let request = secure.request(Method::POST, "/run");
        async move {
            send = send.ready().await.expect("room");
            let (answer, mut body) = send.send_request(request, false).expect("a stream");
            let input = json!({ "functionId": HELLO, "inputData": format!("stream-{n}-end") }).to_string();
            body.send_data(input.into(), true).expect("the body");
            let (status, body) = read_all(answer.await.expect("an answer")).await;
            let result: Value = serde_json::from_slice(&body).expect("JSON");
            assert_eq!(status, 200, "{result}");
            assert!(
                result["stdout"].as_str().is_some_and(|out| out.contains(&format!("stream-{n}-end"))),
                "{result}"
            );
        }
    });
    futures_util::future::join_all(runs).await;
    // An upstream receives HTTP/1.1.
    let mut send = send.ready().await.expect("room");
    let (answer, _) = send.send_request(secure.request(Method::GET, "/up/x?y"), true).expect("a stream");
    let (status, body) = read_all(answer.await.expect("an answer")).await;
    let received: Value = serde_json::from_slice(&body).expect("JSON");
    assert_eq!((status, &received["start"]), (StatusCode::OK, &"GET /up/x?y HTTP/1.1".into()), "{received}");
    for (name, value) in [("host", NAME), ("x-forwarded-proto", "https"), ("x-forwarded-host", NAME)] {
        assert!(
            received["headers"]
                .as_array()
                .into_iter()
                .flatten()
                .any(|h| h[0].as_str().is_some_and(|n| n.eq_ignore_ascii_case(name)) && h[1] == value),
            "{name}: {received}"
        );
    }
    let mut send = send.ready().await.expect("room");
    let request = Request::builder().uri(format!("https://{NAME}/functions")).body(()).expect("a request");
    let (answer, _) = send.send_request(request, true).expect("a stream");
    assert_eq!(read_all(answer.await.expect("an answer")).await.0, 401);
    // A client without TLS is disconnected.
    let mut plain =
        crate::harness::http::Conn::open(secure.addr).await.expect("the gateway accepts connections");
    plain.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.expect("the peer reads");
    within("the end", SOON, async { while plain.bytes(1).await.is_ok() {} }).await;
    secure.gateway().wait_for_metric("infra_tls_handshakes_failed_total", 1.0).await;
    drop(send);
    secure.platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn client_certificates_are_required_if_configured() {
    let authority = Authority::new();
    let shown = authority.issue("client");
    let secure = TlsGateway::start("client_ca = \"clients.pem\"\n", "", authority).await;
    let foreign = Authority::new().issue("client");
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
    assert!(asks(None).await.is_none(), "without a certificate");
    assert!(asks(Some(&foreign)).await.is_none(), "with a certificate of another authority");
    secure.platform.finish().await;
}

/// New connections get the new certificate. Open connections persist.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn certificates_are_replaced_without_a_restart() {
    let secure = TlsGateway::start("", "", Authority::new()).await;
    let (send, _connection) = secure.http2().await;
    let next = Authority::new();
    // What rcgen takes if it is not told: the first of January 4096.
    let end = "infra_tls_certificate_expiry_timestamp_seconds{file=\"certificate\"}";
    secure.gateway().wait_for_metric(end, 67_090_118_400.0).await;
    next.issue(NAME).write(&secure.platform.conf_dir());
    eventually("the new certificate", SOON, || async {
        connect(&client(&next, &["h2"], None), secure.addr).await.map(|_| ()).map_err(|e| e.to_string())
    })
    .await;
    assert!(connect(&client(&secure.authority, &["h2"], None), secure.addr).await.is_err());
    let mut send = send.ready().await.expect("the old connection persists");
    let (answer, _) = send.send_request(secure.request(Method::GET, "/functions"), true).expect("a stream");
    assert_eq!(read_all(answer.await.expect("an answer")).await.0, 200);
    // A key of another certificate is rejected. (This may also happen between the writes of the two files
    // above.)
    let refused = reloads("certificate", "refused");
    let before = secure.gateway().metric(&refused).await.unwrap_or_default();
    secure.platform.put_conf("key.pem", &Authority::new().issue(NAME).key);
    secure.gateway().wait_for_metric(&refused, before + 1.0).await;
    connect(&client(&next, &["h2"], None), secure.addr).await.expect("the certificate is unchanged");
    drop(send);
    secure.platform.finish().await;
}

/// A flood ends its connection or is answered frame by frame. Other clients are served.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http2_floods_are_bounded() {
    let secure = TlsGateway::start("", "[http2]\nidle_timeout_s = 10\n", Authority::new()).await;
    let before = secure.gateway().peak_memory();
    for flood in [Flood::Resets, Flood::Continuations, Flood::Pings, Flood::Settings] {
        let stream =
            connect(&client(&secure.authority, &["h2"], None), secure.addr).await.expect("a handshake");
        let sent = within("the end of a flood", 6 * SOON, flood.send(stream)).await;
        println!("{flood:?}: {sent} frames until the connection ended");
        let (send, connection) = secure.http2().await;
        let mut send = send.ready().await.expect("room");
        let (answer, _) =
            send.send_request(secure.request(Method::GET, "/functions"), true).expect("a stream");
        assert_eq!(read_all(answer.await.expect("an answer")).await.0, 200, "after {flood:?}");
        drop(send);
        connection.abort();
    }
    let grown = secure.gateway().peak_memory().saturating_sub(before);
    assert!(grown < 64 << 20, "the floods took {grown} bytes");
    // An idle connection is closed.
    let mut idle =
        connect(&client(&secure.authority, &["h2"], None), secure.addr).await.expect("a handshake");
    idle.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.expect("the peer reads");
    within("the end of an idle connection", SOON, async {
        let mut bytes = [0; 256];
        while idle.read(&mut bytes).await.is_ok_and(|n| n > 0) {}
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

/// Frames after which a flood counts as unbounded.
const FLOOD_FRAMES: u32 = 200_000;

impl Flood {
    /// Sends frames until the gateway closes the connection. Returns their number. Pings and settings may go
    /// on: each is only acknowledged.
    async fn send(self, stream: tokio_rustls::client::TlsStream<tokio::net::TcpStream>) -> u32 {
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
        assert!(!must_end || sent < FLOOD_FRAMES, "{self:?} is not bounded");
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
            // A header block without end. Each frame has one field.
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

/// With `h2load`, of nghttp2.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_requests_over_ten_connections_succeed() {
    let secure = TlsGateway::start("", "", Authority::new()).await;
    let dir = Scratch::new("h2load");
    let url = format!("https://127.0.0.1:{}/livez", secure.addr.port());
    let args = ["-n", "10000", "-c", "10", "-m", "20", &url];
    let process = Process::start("h2load", Path::new("h2load"), &args, &path_env(), dir.path());
    let process = process.expect("setpriv (util-linux) is there");
    let status = process.wait_for_exit(6 * SOON).await;
    let report = process.output().tail(40);
    assert!(
        status.success() && report.contains("10000 succeeded, 0 failed, 0 errored, 0 timeout"),
        "{report}"
    );
    secure.platform.finish().await;
}

/// Sends a request on a new TLS connection.
async fn request_over_tls(connector: &TlsConnector, addr: SocketAddr) {
    let mut stream = connect(connector, addr).await.expect("a handshake");
    let request = b"GET /functions HTTP/1.1\r\nHost: a\r\nx-api-key: key-steady\r\nConnection: close\r\n\r\n";
    stream.write_all(request).await.expect("the peer reads");
    let mut text = String::new();
    let _ = stream.read_to_string(&mut text).await;
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
}

/// Deadline for 20 changes to be applied.
const APPLIED_WITHIN: Duration = Duration::from_secs(120);

/// Keys, limits, certificates and upstreams are replaced every 100 ms. In the end the last change is in
/// force.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_request_fails_under_continuous_changes() {
    let (one, two) = (Upstream::start().await, Upstream::start().await);
    let secure = TlsGateway::start("", "", Authority::new()).await;
    let conf: PathBuf = secure.platform.conf_dir();
    let steady = key_lines("steady", "key-steady", &["run", "read"]);
    let (first, second) = (secure.authority.issue(NAME), secure.authority.issue(NAME));
    let write_all = |n: usize| {
        let odd = n % 2 == 1;
        let turn = key_lines(&format!("turn-{n}"), &format!("key-{n}"), &["read"]);
        let limit = 1_000_000 + n;
        let numbers = format!("rate = {limit}\nperiod_s = 1\nburst = {limit}\non_redis_loss = \"local\"");
        let limits = limit_lines("test", "key", "/run", &numbers) + "[overload]\nconfirm_target_ms = 0\n";
        let service = if odd { &one } else { &two };
        let more = format!("scope = \"read\"\nadd_headers = {{ x-turn = \"{n}\" }}\n");
        let upstreams = upstream_lines("up", &[service.addr()], &more);
        for (name, text) in [
            ("keys.toml", &format!("{steady}{turn}")),
            ("limits.toml", &limits),
            ("upstreams.toml", &upstreams),
        ] {
            put_file(&conf.join(name), text);
        }
        if odd { &first } else { &second }.write(&conf);
    };
    write_all(0);
    let gateway = secure.gateway();
    let in_force = async |n: usize| {
        eventually(&format!("change {n}"), SOON, || async {
            let key = format!("key-{n}");
            let answer = gateway.upstream_request_with(&key, "GET", "/up/x").send().await;
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
            let (stop, served) = (Arc::clone(&stop), Arc::clone(&served));
            let (connector, tls_addr) = (connector.clone(), secure.addr);
            let upstream_request = gateway.upstream_request_with("key-steady", "GET", "/up/x");
            let body = json!({ "functionId": HELLO, "inputData": 1 });
            let run = gateway.anonymous("POST", "/run").header("x-api-key", "key-steady");
            let run = run.header("x-async", "true").json(&body);
            spawn(async move {
                while !stop.load(Ordering::Relaxed) {
                    match n % 3 {
                        0 => drop(upstream_request.send().await.expect(200)),
                        1 => drop(run.send().await.expect(202)),
                        _ => request_over_tls(&connector, tls_addr).await,
                    }
                    served.fetch_add(1, Ordering::Relaxed);
                }
            })
        })
        .collect();
    let begun = Instant::now();
    let mut n = 0;
    let applied = async || gateway.metric(&reloads("limits.toml", "applied")).await.unwrap_or_default();
    // Changes are applied while others are written.
    while applied().await < 20.0 {
        assert!(begun.elapsed() < APPLIED_WITHIN, "{} of {n} changes are applied", applied().await);
        n += 1;
        write_all(n);
        pause(Duration::from_millis(100)).await;
    }
    stop.store(true, Ordering::Relaxed);
    for load in loads {
        load.await.expect("no request fails");
    }
    in_force(n).await;
    println!(
        "{n} changes of all files, {} applied, {} requests served",
        applied().await,
        served.load(Ordering::Relaxed)
    );
    // Without `finish`: the local worker needs long for these jobs.
    secure.platform.stop().await;
}
