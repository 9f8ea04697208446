//! HTTP/1.0, HTTP/1.1 and HTTP/2 in detail: what clients get, and what upstreams receive. One table for each
//! rule.

use crate::harness::conf_lines::{NO_HEALTH_CHECKS, key_lines, upstream_lines};
use crate::harness::gateway::{Conf, put_file, reloads};
use crate::harness::http::{Answer, Conn};
use crate::harness::http2::Http2;
use crate::harness::platform::{Backend, HELLO};
use crate::harness::tls::{Authority, client};
use crate::harness::tls_gateway::{NAME, TlsGateway};
use crate::harness::upload::printing;
use crate::harness::upstream::Upstream;
use crate::harness::{Gateway, SOON, Setup, eventually, spawn, within};
use flate2::Compression;
use flate2::write::{GzEncoder, ZlibEncoder};
use parking_lot::Mutex;
use serde_json::json;
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// Deadline for an answer. Some requests inflate and parse tens of MiB first, in a debug build on a busy
/// machine.
const ANSWERED_WITHIN: Duration = Duration::from_secs(120);
const ORIGIN: &str = "https://app.example";

/// A service that answers each path with fixed bytes (see [`ANSWERS`]), and records the heads of requests.
struct ScriptedUpstream {
    addr: SocketAddr,
    heads: Arc<Mutex<Vec<String>>>,
    accepting: JoinHandle<()>,
}

impl ScriptedUpstream {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let addr = listener.local_addr().expect("it is bound");
        let heads = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&heads);
        let accepting = spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                spawn(Self::answer(stream, Arc::clone(&seen)));
            }
        });
        Self { addr, heads, accepting }
    }

    /// Answers before it reads and discards the body.
    async fn answer(mut stream: TcpStream, heads: Arc<Mutex<Vec<String>>>) {
        let mut bytes = Vec::new();
        while let Some(head) = read_until(&mut stream, &mut bytes, b"\r\n\r\n").await {
            let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
            let length =
                received(&head, "content-length").first().and_then(|length| length.parse().ok()).unwrap_or(0);
            let is_chunked = !received(&head, "transfer-encoding").is_empty();
            heads.lock().push(head);
            let answer = ANSWERS.iter().find(|(known, _)| *known == path);
            let _ = stream.write_all(answer.map_or("", |(_, answer)| answer).as_bytes()).await;
            if path.ends_with("/closing") {
                return;
            }
            if is_chunked {
                read_until(&mut stream, &mut bytes, b"0\r\n\r\n").await;
            }
            while bytes.len() < length && stream.read_buf(&mut bytes).await.is_ok_and(|n| n > 0) {}
            bytes.drain(..length.min(bytes.len()));
        }
    }

    /// The received heads, without health checks.
    fn heads(&self) -> Vec<String> {
        let heads = self.heads.lock();
        heads.iter().filter(|head| !head.starts_with("GET / ")).cloned().collect()
    }
}

impl Drop for ScriptedUpstream {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Reads up to `end`, and removes it. `None`: the peer has closed the connection.
async fn read_until(stream: &mut TcpStream, bytes: &mut Vec<u8>, end: &[u8]) -> Option<String> {
    loop {
        if let Some(at) = bytes.windows(end.len()).position(|part| part == end) {
            let taken = String::from_utf8_lossy(&bytes[..at]).into_owned();
            bytes.drain(..at + end.len());
            return Some(taken);
        }
        if !stream.read_buf(bytes).await.is_ok_and(|n| n > 0) {
            return None;
        }
    }
}

fn upstream(name: &str, addr: SocketAddr, more: &str) -> String {
    upstream_lines(name, &[addr], &format!("scope = \"none\"\n{NO_HEALTH_CHECKS}{more}"))
}

/// The protocol of a request.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Protocol {
    Http1,
    Http2,
}

const PROTOCOLS: [Protocol; 2] = [Protocol::Http1, Protocol::Http2];

/// A gateway with both listeners.
struct Edge {
    secure: TlsGateway,
}

impl Edge {
    async fn start(upstreams: String, server: &str) -> Self {
        let conf = Conf { upstreams, server: server.into(), ..Conf::default() };
        Self { secure: TlsGateway::start_with(conf, "", Authority::new()).await }
    }

    /// With an upstream under `/s`.
    async fn with_upstream(server: &str) -> (ScriptedUpstream, Self) {
        let script = ScriptedUpstream::start().await;
        let edge = Self::start(upstream("s", script.addr, ""), server).await;
        (script, edge)
    }

    fn gateway(&self) -> &Gateway {
        self.secure.gateway()
    }

    async fn http2(&self) -> Http2 {
        let connector = client(&self.secure.authority, &["h2"], None);
        Http2::open(&connector, self.secure.addr).await.expect("a connection")
    }

    async fn http1(&self) -> Conn {
        Conn::open(self.gateway().addr()).await.expect("the gateway accepts connections")
    }

    /// Sends a request with these fields and the mandatory ones.
    async fn ask(
        &self,
        protocol: Protocol,
        method: &str,
        path: &str,
        fields: &[(&str, &str)],
        body: Option<&[u8]>,
    ) -> Answer {
        match protocol {
            Protocol::Http1 => {
                let mut head = format!("{method} {path} HTTP/1.1\r\nhost: {NAME}\r\n");
                for (name, value) in fields {
                    let _ = write!(head, "{name}: {value}\r\n");
                }
                if let Some(body) = body {
                    let _ = write!(head, "content-length: {}\r\n", body.len());
                }
                head += "\r\n";
                let mut conn = self.http1().await;
                let _ = conn.write(&[head.as_bytes(), body.unwrap_or_default()].concat()).await;
                within(path, ANSWERED_WITHIN, conn.answer(method == "HEAD")).await.expect("an answer")
            }
            Protocol::Http2 => {
                let mut all =
                    vec![(":method", method), (":scheme", "https"), (":authority", NAME), (":path", path)];
                all.extend_from_slice(fields);
                let mut http2 = self.http2().await;
                within(path, ANSWERED_WITHIN, http2.ask(&all, body)).await.answer()
            }
        }
    }

    /// Sends a request with the API key.
    async fn call(
        &self,
        protocol: Protocol,
        method: &str,
        path: &str,
        fields: &[(&str, &str)],
        body: Option<&[u8]>,
    ) -> Answer {
        let mut all = vec![("x-api-key", self.gateway().key())];
        all.extend_from_slice(fields);
        self.ask(protocol, method, path, &all, body).await
    }

    async fn refusals(&self, code: &str) -> f64 {
        self.gateway().metric(&format!("infra_requests_refused_total{{code={code:?}}}")).await.unwrap_or(0.0)
    }

    async fn finish(self) {
        self.secure.platform.finish().await;
    }
}

fn values<'a>(answer: &'a Answer, name: &str) -> Vec<&'a str> {
    let fields = answer.message.headers.iter();
    fields.filter(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str()).collect()
}

/// The values of a field in a head that an upstream has received.
fn received(head: &str, name: &str) -> Vec<String> {
    let lines = head.lines().skip(1).filter_map(|line| line.split_once(':'));
    lines
        .filter(|(known, _)| known.eq_ignore_ascii_case(name))
        .map(|(_, value)| value.trim().to_owned())
        .collect()
}

/// (path, bytes of the answer)
const ANSWERS: &[(&str, &str)] = &[
    ("/s/100", "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\nvary: accept\r\n\r\nok"),
    (
        "/s/102",
        "HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\nvary: accept\r\n\r\nok",
    ),
    (
        "/s/103",
        "HTTP/1.1 103 Early Hints\r\nlink: </a.css>\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </b.css>\r\n\r\n\
         HTTP/1.1 200 OK\r\ncontent-length: 2\r\nvary: accept\r\n\r\nok",
    ),
    ("/s/101", "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"),
    ("/s/chunked", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
    (
        "/s/trailers",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n\
         5\r\nhello\r\n0\r\nx-sum: 1\r\n\r\n",
    ),
    ("/s/length", "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"),
    ("/s/closing", "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nhello"),
    ("/s/early", "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"),
    ("/patient/early", "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"),
    ("/patient/length", "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"),
];

/// CORS fields are on the final answer, not on interim ones.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn interim_answers_are_passed_on_without_added_fields() {
    let (script, edge) = Edge::with_upstream(&format!("[http]\ncors_origins = [{ORIGIN:?}]\n")).await;
    for (path, interim) in
        [("/s/100", &[100][..]), ("/s/102", &[102]), ("/s/103", &[103, 103]), ("/s/length", &[])]
    {
        let mut conn = edge.http1().await;
        let request = format!("GET {path} HTTP/1.1\r\nhost: a\r\norigin: {ORIGIN}\r\n\r\n");
        conn.write(request.as_bytes()).await.expect("the peer reads");
        for status in interim {
            let answer =
                within(path, SOON, conn.any_answer(false)).await.expect("an interim answer").expect(*status);
            for name in ["access-control-allow-origin", "vary", "x-request-id", "date", "connection"] {
                assert_eq!(answer.header(name), None, "{path}: {name}");
            }
        }
        let one = within(path, SOON, conn.any_answer(false)).await.expect("an answer").expect(200);
        let two = edge.ask(Protocol::Http2, "GET", path, &[("origin", ORIGIN)], None).await.expect(200);
        for answer in [one, two] {
            assert_eq!(values(&answer, "access-control-allow-origin"), [ORIGIN], "{path}: {answer:?}");
            assert!(values(&answer, "vary").contains(&"origin"), "{path}: {answer:?}");
            assert_eq!(values(&answer, "x-request-id").len(), 1, "{path}: {answer:?}");
        }
    }
    // A switch of protocols that the client has not requested is an error of the upstream.
    for protocol in PROTOCOLS {
        let answer =
            edge.ask(protocol, "GET", "/s/101", &[("origin", ORIGIN)], None).await.expect_problem(502);
        assert_eq!(answer.json()["code"], "upstream_broken", "{protocol:?}");
        assert_eq!(values(&answer, "access-control-allow-origin"), [ORIGIN]);
    }
    let mut conn = edge.http1().await;
    conn.write(b"GET /s/101 HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\n\r\n")
        .await
        .expect("the peer reads");
    within("502", SOON, conn.answer(false)).await.expect("an answer").expect_problem(502);
    assert!(
        script.heads().iter().all(|head| received(head, "upgrade").is_empty()),
        "the upgrade is not forwarded"
    );
    edge.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http_1_0_clients_get_no_chunks_and_no_interim_answers() {
    let (script, edge) = Edge::with_upstream("").await;
    let key = edge.gateway().key().to_owned();
    let run = json!({ "functionId": HELLO }).to_string();
    let body = format!("content-type: application/json\r\ncontent-length: {}\r\n", run.len());
    // (request line, fields, body, status, whether the connection persists, text in the body)
    for (line, fields, sent, status, is_kept, holds) in [
        ("GET /s/chunked", "connection: keep-alive\r\n", "", 200, false, "hello"),
        ("GET /s/chunked", "", "", 200, false, "hello"),
        ("GET /s/trailers", "connection: keep-alive\r\n", "", 200, false, "hello"),
        ("GET /s/closing", "connection: keep-alive\r\n", "", 200, false, "hello"),
        ("GET /s/length", "connection: keep-alive\r\n", "", 200, true, "hello"),
        ("GET /s/length", "", "", 200, false, "hello"),
        ("GET /s/100", "connection: keep-alive\r\n", "", 200, true, "ok"),
        ("GET /s/103", "", "", 200, false, "ok"),
        ("HEAD /s/chunked", "connection: keep-alive\r\n", "", 200, false, ""),
        ("GET /livez", "connection: keep-alive\r\n", "", 200, true, ""),
        ("GET /livez", "", "", 200, false, ""),
        (
            "POST /run",
            &format!("x-api-key: {key}\r\n{body}expect: 100-continue\r\n"),
            &run,
            200,
            false,
            HELLO,
        ),
        (
            "POST /run",
            &format!("{body}expect: 100-continue\r\nconnection: keep-alive\r\n"),
            &run,
            401,
            true,
            "code",
        ),
        ("POST /s/length", &format!("{body}expect: 100-continue\r\n"), &run, 200, false, "hello"),
        // Without a Host, which HTTP/1.0 does not require.
        ("GET /s/length?nohost", "", "", 502, false, ""),
    ] {
        let label = format!("{line} {fields:?}");
        let mut conn = edge.http1().await;
        let host = if line.contains("nohost") { "" } else { "host: a\r\n" };
        conn.write(format!("{line} HTTP/1.0\r\n{host}{fields}\r\n{sent}").as_bytes())
            .await
            .expect("the peer reads");
        if line.contains("nohost") {
            // The service does not answer this path.
            eventually("a request with a Host", SOON, || async {
                let heads = script.heads();
                let head = heads.iter().find(|head| head.contains("nohost"));
                head.map(|head| assert_eq!(received(head, "host"), [script.addr.to_string()]))
                    .ok_or_else(String::new)
            })
            .await;
            continue;
        }
        let answer =
            within(&label, SOON, conn.any_answer(line.starts_with("HEAD"))).await.expect("an answer");
        assert_eq!(answer.status, status, "{label}: {answer:?}");
        assert_eq!(answer.header("transfer-encoding"), None, "{label}");
        assert!(answer.text().contains(holds), "{label}: {answer:?}");
        assert_eq!(answer.need("connection"), if is_kept { "keep-alive" } else { "close" }, "{label}");
        if is_kept {
            conn.write(b"GET /livez HTTP/1.0\r\nhost: a\r\n\r\n").await.expect("the connection persists");
            within(&label, SOON, conn.any_answer(false)).await.expect("an answer").expect(200);
        }
        assert!(within(&label, SOON, conn.is_closed()).await, "{label}: unexpected data");
    }
    // `Expect` is not forwarded.
    assert!(script.heads().iter().all(|head| received(head, "expect").is_empty()), "{:?}", script.heads());
    edge.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_persist_as_announced() {
    let (_script, edge) = Edge::with_upstream("[auth]\nfailures_burst = 1000\n").await;
    let key = format!("x-api-key: {}\r\n", edge.gateway().key());
    let awaited = "expect: 100-continue\r\ncontent-length: 47\r\n";
    let short = "{\"functionId\":\"no-such-function\",\"inputData\":{}}";
    let length = format!("content-length: {}\r\n", short.len());
    let long = format!("30000\r\n{}\r\n0\r\n\r\n", "x".repeat(0x30000));
    for (line, fields, sent, status) in [
        ("POST /run", awaited.to_owned(), "", 401),
        ("POST /nope", awaited.to_owned(), "", 404),
        ("POST /livez", awaited.to_owned(), "", 405),
        ("GET /livez", awaited.to_owned(), "", 200),
        ("DELETE /functions/none", format!("{key}{awaited}"), "", 404),
        ("POST /run", format!("{key}content-encoding: br\r\n{awaited}"), "", 415),
        ("POST /upload", format!("{key}content-type: text/plain\r\n{awaited}"), "", 415),
        (
            "POST /run",
            format!("{key}{awaited}content-type: text/plain\r\nx-async: 1\r\nx-async: 1\r\n"),
            "",
            400,
        ),
        ("POST /run", format!("{key}expect: 100-continue\r\ncontent-length: 99000000\r\n"), "", 413),
        ("POST /s/early", awaited.to_owned(), "", 200),
        ("POST /run", length.clone(), short, 401),
        ("POST /nope", length.clone(), short, 404),
        ("POST /run", format!("{key}{length}content-type: application/json\r\n"), short, 404),
        ("POST /run", format!("{key}{length}content-encoding: br\r\n"), short, 415),
        // A body that does not arrive, or is longer than the gateway drains.
        ("POST /nope", "content-length: 50\r\n".to_owned(), "ab", 404),
        ("POST /run", "transfer-encoding: chunked\r\n".to_owned(), "5\r\nhello\r\n", 401),
        ("POST /nope", "transfer-encoding: chunked\r\n".to_owned(), &long, 404),
        ("POST /nope", "transfer-encoding: chunked\r\n".to_owned(), "5\r\nhello\r\n0\r\n\r\n", 404),
        ("GET /s/closing", String::new(), "", 200),
        ("GET /s/chunked", String::new(), "", 200),
    ] {
        let label = format!("{line} {fields:?}");
        let mut conn = edge.http1().await;
        conn.write(format!("{line} HTTP/1.1\r\nhost: a\r\n{fields}\r\n{sent}").as_bytes())
            .await
            .expect("the peer reads");
        let answer = within(&label, SOON, conn.answer(false)).await.expect("an answer");
        assert_eq!(answer.status, status, "{label}: {answer:?}");
        match answer.need("connection") {
            "keep-alive" => {
                conn.write(b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("the peer reads");
                within(&label, SOON, conn.answer(false))
                    .await
                    .unwrap_or_else(|e| panic!("{label}: {e}"))
                    .expect(200);
            }
            _ => {
                conn.end().await;
                assert!(within(&label, SOON, conn.is_closed()).await, "{label}: unexpected data");
            }
        }
    }
    edge.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_targets_are_414_and_long_fields_431() {
    let edge = Edge::start(
        String::new(),
        "[http]\nheader_bytes_max = 200000\n[http2]\nheader_list_bytes_max = 200000\n",
    )
    .await;
    let (target, field, huge) = ("x".repeat(70_000), "x".repeat(199_990), "x".repeat(300_000));
    for protocol in PROTOCOLS {
        for (path, value, status, code) in [
            (format!("/livez?{target}"), "1", 414, "target_too_long"),
            (format!("/livez?{huge}"), "1", 414, "target_too_long"),
            (format!("/{huge}"), "1", 414, "target_too_long"),
            ("/livez".to_owned(), field.as_str(), 431, "header_too_large"),
            ("/livez".to_owned(), huge.as_str(), 431, "header_too_large"),
            (format!("/livez?{}", "x".repeat(60_000)), "1", 200, ""),
        ] {
            let before = edge.refusals(code).await;
            let answer = edge.ask(protocol, "GET", &path, &[("x-long", value)], None).await;
            if code.is_empty() {
                answer.expect(status);
                continue;
            }
            assert_eq!(answer.expect_problem(status).json()["code"], code, "{protocol:?} {}", path.len());
            assert!(edge.refusals(code).await > before, "{protocol:?}: not counted");
        }
        // The maximum number of bytes, and one more: the limit is exact, although `h2` allows a longer list.
        if protocol == Protocol::Http2 {
            let mut http2 = edge.http2().await;
            for (path, more, status) in [("/livez", 0, 200), ("/livez", 1, 431), ("/#", 0, 400)] {
                let mut fields =
                    vec![(":method", "GET"), (":scheme", "https"), (":path", path), ("host", NAME)];
                let size = |fields: &[(&str, &str)]| {
                    fields.iter().map(|(n, v)| n.len() + v.len() + 32).sum::<usize>()
                };
                let pad = "x".repeat(200_000 - size(&fields) - 37 + more);
                fields.push(("x-pad", &pad));
                let answer = within(path, SOON, http2.ask(&fields, None)).await.answer();
                assert_eq!(answer.status, status, "{path} {more}");
                assert!(
                    answer.header("x-request-id").is_some(),
                    "{path} {more}: not answered by the gateway"
                );
            }
        }
        let many: Vec<(String, String)> = (0..101).map(|n| (format!("x-{n}"), "1".to_owned())).collect();
        let many: Vec<(&str, &str)> = many.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
        edge.ask(protocol, "GET", "/livez", &many, None).await.expect_problem(431);
    }
    edge.finish().await;
}

fn gzip(text: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(text).expect("memory");
    encoder.finish().expect("memory")
}

fn zlib(text: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(text).expect("memory");
    encoder.finish().expect("memory")
}

/// The beginning of a multipart form with a file.
const FILE: &[u8] = b"--x\r\ncontent-disposition: form-data; name=\"file\"; filename=\"a.zip\"\r\n\r\n";

/// Every route with a body accepts compressed bodies. The size limit applies to the inflated body.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn compressed_bodies_are_inflated_within_limits() {
    let service = Upstream::start().await;
    let edge = Edge::start(upstream("up", service.addr(), ""), "").await;
    let function = edge.gateway().upload("compressed").await;
    let run = json!({ "functionId": HELLO, "inputData": "zipped" }).to_string().into_bytes();
    let beat = json!({ "workerId": "w-1", "status": "healthy" }).to_string().into_bytes();
    let change = json!({ "description": "zipped" }).to_string().into_bytes();
    let form = {
        let mut form =
            b"--x\r\ncontent-disposition: form-data; name=\"file\"; filename=\"a.zip\"\r\n\r\n".to_vec();
        form.extend(printing("zipped"));
        form.extend(b"\r\n--x--\r\n");
        form
    };
    // A thousand times larger when inflated.
    let bomb = gzip(&[FILE, &vec![b' '; 80 << 20]].concat());
    let put = format!("/functions/{function}");
    const JSON: &[(&str, &str)] = &[("content-type", "application/json")];
    const FORM: &[(&str, &str)] = &[
        ("content-type", "multipart/form-data; boundary=x"),
        ("x-function-name", "zipped"),
        ("x-runtime", "python"),
        ("x-memory-mb", "128"),
    ];
    for protocol in PROTOCOLS {
        for (method, path, fields, body) in [
            ("POST", "/run", JSON, &run),
            ("POST", "/worker/heartbeat", JSON, &beat),
            ("PUT", put.as_str(), JSON, &change),
            ("POST", "/upload", FORM, &form),
        ] {
            let label = format!("{protocol:?} {method} {path}");
            let call = async |coding: &str, body: &[u8]| {
                let mut all = vec![("content-encoding", coding)];
                all.extend_from_slice(fields);
                edge.call(protocol, method, path, &all, Some(body)).await
            };
            for (coding, body) in [
                ("gzip", gzip(body)),
                ("x-gzip", gzip(body)),
                ("GZIP", gzip(body)),
                ("deflate", zlib(body)),
                ("identity", body.clone()),
            ] {
                let answer = call(coding, &body).await;
                assert_eq!(answer.status, 200, "{label} {coding}: {}", answer.text());
            }
            for coding in ["br", "zstd", "gzip, gzip", "compress", "x"] {
                let refused = call(coding, body).await.expect_problem(415);
                assert_eq!(refused.json()["code"], "unsupported_content_coding", "{label} {coding}");
                assert_eq!(refused.need("accept-encoding"), "gzip, deflate, identity", "{label} {coding}");
            }
            for (coding, body) in
                [("gzip", body.clone()), ("deflate", gzip(body)), ("gzip", gzip(body)[..30].to_vec())]
            {
                let refused = call(coding, &body).await.expect_problem(400);
                assert_eq!(refused.json()["code"], "body_undecodable", "{label} {coding}");
            }
            assert_eq!(
                call("gzip", &bomb).await.expect_problem(413).json()["code"],
                "body_too_large",
                "{label}"
            );
        }
        // A retry may be compressed or not: it is the same request.
        let keyed = |coding| {
            [("content-type", "application/json"), ("idempotency-key", "k-1"), ("content-encoding", coding)]
        };
        let first = edge.call(protocol, "POST", "/run", &keyed("gzip"), Some(&gzip(&run))).await.expect(200);
        let again = edge.call(protocol, "POST", "/run", &keyed("identity"), Some(&run)).await.expect(200);
        assert_eq!(first.json()["requestId"], again.json()["requestId"], "{protocol:?}");
        // Bodies for upstreams are forwarded unchanged.
        let packed = gzip(&run);
        let passed = edge
            .ask(protocol, "POST", "/up/x", &[("content-encoding", "br")], Some(&packed))
            .await
            .expect(200);
        assert_eq!(passed.json()["bodyBytes"], packed.len());
        // A route without a body does not read one.
        edge.ask(protocol, "GET", "/livez", &[("content-encoding", "br")], None).await.expect(200);
    }
    edge.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_that_are_not_utf_8_are_rejected_by_encoding() {
    let edge = Edge::start(String::new(), "").await;
    let function = edge.gateway().upload("encodings").await;
    let put = format!("/functions/{function}");
    for protocol in PROTOCOLS {
        for (method, path, text) in [
            ("POST", "/run", format!("{{\"functionId\":{HELLO:?},\"inputData\":\"\u{e4}\"}}")),
            ("POST", "/worker/heartbeat", "{\"workerId\":\"w\u{e4}\",\"status\":\"healthy\"}".to_owned()),
            ("PUT", put.as_str(), "{\"description\":\"\u{e4}\"}".to_owned()),
        ] {
            let utf_16 = |to: fn(u16) -> [u8; 2]| text.encode_utf16().flat_map(to).collect::<Vec<u8>>();
            for (body, encoding) in [
                ([&b"\xef\xbb\xbf"[..], text.as_bytes()].concat(), "byte order mark"),
                ([&b"\xff\xfe"[..], &utf_16(u16::to_le_bytes)].concat(), "UTF-16"),
                (utf_16(u16::to_be_bytes), "UTF-16"),
                (text.chars().map(|c| u8::try_from(c).expect("Latin-1")).collect(), "Latin-1"),
            ] {
                let fields = [("content-type", "application/json")];
                let refused =
                    edge.call(protocol, method, path, &fields, Some(&body)).await.expect_problem(400).json();
                let detail = refused["detail"].as_str().expect("a text");
                assert!(detail.contains(encoding), "{protocol:?} {path}: {encoding}: {detail}");
                assert_eq!(refused["code"], "invalid_request");
            }
        }
    }
    edge.finish().await;
}

/// Unusual heads are accepted if they are unambiguous. Unknown codings and versions have their own status.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unusual_but_unambiguous_heads_are_accepted() {
    let (script, edge) = Edge::with_upstream("").await;
    let key = edge.gateway().key().to_owned();
    let run = json!({ "functionId": HELLO }).to_string();
    let chunked = format!(
        "x-api-key: {key}\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n\
         {:x} \t;a=b ; c = \"d\"\r\n{run}\r\n0 ;x\r\n\r\n",
        run.len()
    );
    for (request, status) in [
        ("GET http://example.org:80/livez HTTP/1.1\r\nhost: example.org\r\n\r\n".to_owned(), 200),
        ("GET http://Example.org/livez HTTP/1.1\r\nhost: example.org:80\r\n\r\n".to_owned(), 200),
        ("GET https://example.org:443/livez HTTP/1.1\r\nhost: example.org\r\n\r\n".to_owned(), 200),
        ("GET http://example.org HTTP/1.1\r\nhost: example.org\r\n\r\n".to_owned(), 200),
        ("GET http://example.org?x HTTP/1.1\r\nhost: example.org\r\n\r\n".to_owned(), 200),
        ("GET http://example.org/livez HTTP/1.0\r\n\r\n".to_owned(), 200),
        ("GET http://example.org/s/length HTTP/1.1\r\nhost: example.org:80\r\n\r\n".to_owned(), 200),
        ("OPTIONS http://example.org HTTP/1.1\r\nhost: example.org\r\n\r\n".to_owned(), 404),
        ("GET http://example.org:8080/livez HTTP/1.1\r\nhost: example.org\r\n\r\n".to_owned(), 400),
        ("GET https://example.org:80/livez HTTP/1.1\r\nhost: example.org\r\n\r\n".to_owned(), 400),
        ("GET /livez HTTP/1.2\r\nhost: a\r\n\r\n".to_owned(), 200),
        ("GET /s/length HTTP/1.9\r\nhost: a\r\n\r\n".to_owned(), 200),
        ("GET /livez HTTP/2.0\r\nhost: a\r\n\r\n".to_owned(), 505),
        ("GET /livez HTTP/0.9\r\nhost: a\r\n\r\n".to_owned(), 505),
        ("POST /run HTTP/1.1\r\nhost: a\r\ntransfer-encoding: gzip, chunked\r\n\r\n".to_owned(), 501),
        ("POST /run HTTP/1.1\r\nhost: a\r\ntransfer-encoding: x\r\n\r\n".to_owned(), 501),
        ("POST /run HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked, gzip\r\n\r\n".to_owned(), 400),
        (format!("POST /run HTTP/1.1\r\nhost: a\r\n{chunked}"), 200),
        (format!("POST /s/length HTTP/1.1\r\nhost: a\r\n{chunked}"), 200),
    ] {
        let mut conn = edge.http1().await;
        conn.write(request.as_bytes()).await.expect("the peer reads");
        let answer = within(&request, SOON, conn.answer(false)).await.expect("an answer");
        assert_eq!(answer.status, status, "{request:?}: {}", answer.text());
        if status >= 500 {
            answer.expect_problem(status);
        }
    }
    let passed = script.heads();
    assert!(
        passed.iter().all(|head| head.lines().next().is_some_and(|line| line.ends_with(" HTTP/1.1"))),
        "{passed:?}"
    );
    assert_eq!(received(&passed[0], "host"), ["example.org:80"], "{passed:?}");
    assert!(passed[0].starts_with("GET /s/length HTTP/1.1"), "{passed:?}");
    // Trailers are neither forwarded nor announced.
    for protocol in PROTOCOLS {
        let answer = edge.ask(protocol, "GET", "/s/trailers", &[], None).await.expect(200);
        assert_eq!(
            (answer.text().as_str(), answer.header("trailer"), answer.header("x-sum")),
            ("hello", None, None)
        );
    }
    edge.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn preflight_answers_name_methods_and_fields() {
    let script = ScriptedUpstream::start().await;
    let server = format!("[http]\ncors_origins = [{ORIGIN:?}]\n");
    let own = "cors_methods = [\"GET\", \"PATCH\"]\ncors_headers = [\"x-thing\", \"x-api-key\"]\n";
    let upstreams = upstream("own", script.addr, own) + &upstream("plain", script.addr, "");
    let edge = Edge::start(upstreams, &server).await;
    const METHODS: &str = "GET, HEAD, POST, PUT, DELETE";
    for protocol in PROTOCOLS {
        for (path, methods, fields) in [
            ("/run", METHODS, &["traceparent", "tracestate", "x-api-key", "idempotency-key"][..]),
            ("/plain/x", METHODS, &["traceparent", "tracestate", "x-api-key"]),
            ("/own/x", "GET, PATCH", &["x-thing", "x-api-key"]),
            ("/own", "GET, PATCH", &["x-thing", "x-api-key"]),
        ] {
            let asked = [("origin", ORIGIN), ("access-control-request-method", "POST")];
            let answer = edge.ask(protocol, "OPTIONS", path, &asked, None).await.expect(204);
            assert_eq!(answer.need("access-control-allow-methods"), methods, "{protocol:?} {path}");
            let allowed: Vec<&str> = answer.need("access-control-allow-headers").split(", ").collect();
            assert!(fields.iter().all(|field| allowed.contains(field)), "{protocol:?} {path}: {allowed:?}");
            assert_eq!(
                allowed.contains(&"content-type"),
                !path.starts_with("/own"),
                "{protocol:?} {path}: {allowed:?}"
            );
        }
    }
    assert!(script.heads().is_empty(), "upstreams receive no preflight requests");
    edge.finish().await;
}

/// Fields about the client and the target are forwarded only from trusted proxies.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forwarding_fields_of_untrusted_clients_are_removed() {
    const CLAIMS: [&str; 14] = [
        "x-real-ip",
        "true-client-ip",
        "cf-connecting-ip",
        "x-client-ip",
        "x-forwarded-port",
        "x-forwarded-prefix",
        "x-forwarded-server",
        "x-original-url",
        "x-rewrite-url",
        "proxy",
        "x_forwarded_for",
        "x_api_key",
        "any_name",
        "forwarded",
    ];
    for (trusted, may_pass) in [("[]", false), ("[\"127.0.0.0/8\"]", true)] {
        let script = ScriptedUpstream::start().await;
        let server = format!("[http]\ntrusted_proxies = {trusted}\n");
        let edge =
            Edge::start(upstream("s", script.addr, "add_headers = { x_ours = \"1\" }\n"), &server).await;
        for protocol in PROTOCOLS {
            for name in CLAIMS {
                let fields = [(name, "9.9.9.9"), ("x-forwarded-for", "8.8.8.8"), ("x-other", "7")];
                edge.ask(protocol, "GET", "/s/length", &fields, None).await.expect(200);
                let head = script.heads().pop().expect("a request");
                let is_passed = may_pass && name != "proxy" && !name.contains('_');
                assert_eq!(
                    !received(&head, name).is_empty(),
                    is_passed,
                    "{protocol:?} {name} {trusted}: {head}"
                );
                let chain = if may_pass { "8.8.8.8, 127.0.0.1" } else { "127.0.0.1" };
                assert_eq!(received(&head, "x-forwarded-for"), [chain], "{protocol:?} {name}");
                assert_eq!(
                    (received(&head, "x-other"), received(&head, "x_ours")),
                    (vec!["7".into()], vec!["1".into()])
                );
            }
        }
        edge.finish().await;
    }
}

/// A request that returns to the gateway is rejected. One from other gateways is forwarded.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn request_loops_are_508() {
    let (script, edge) = Edge::with_upstream("").await;
    let loops = upstream("circle", edge.gateway().addr(), "replace_prefix = \"/s\"\n")
        + &upstream("loop", edge.gateway().addr(), "")
        + &upstream("s", script.addr, "");
    edge.secure.platform.put_conf("upstreams.toml", &loops);
    edge.gateway().wait_for_metric(&reloads("upstreams.toml", "applied"), 1.0).await;
    for protocol in PROTOCOLS {
        for path in ["/loop/x", "/circle/length"] {
            let before = edge.refusals("loop_detected").await;
            let answer = edge.ask(protocol, "GET", path, &[], None).await.expect_problem(508);
            assert_eq!(answer.json()["code"], "loop_detected", "{protocol:?} {path}");
            assert_eq!(
                edge.refusals("loop_detected").await,
                before + 1.0,
                "{protocol:?} {path}: not rejected after one round"
            );
        }
        for via in ["1.1 nginx", "1.0 fred, 2 infra-0123456789abcdef (Infra Controller)"] {
            edge.ask(protocol, "GET", "/s/length", &[("via", via)], None).await.expect(200);
            let head = script.heads().pop().expect("a request");
            let [passed] = &received(&head, "via")[..] else { panic!("{head}") };
            let version = if protocol == Protocol::Http1 { "1.1" } else { "2" };
            let (before, ours) = passed.rsplit_once(", ").expect("two hops");
            assert_eq!(before, via, "{protocol:?}");
            assert!(ours.starts_with(&format!("{version} infra-")), "{protocol:?}: {ours}");
        }
    }
    edge.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn repeated_singleton_fields_are_rejected() {
    let (script, edge) = Edge::with_upstream("").await;
    let function = edge.gateway().upload("once").await;
    let (key, put) = (edge.gateway().key().to_owned(), format!("/functions/{function}"));
    let run = json!({ "functionId": HELLO }).to_string().into_bytes();
    for protocol in PROTOCOLS {
        for (name, value) in [
            ("x-api-key", key.as_str()),
            ("idempotency-key", "k"),
            ("content-type", "application/json"),
            ("x-async", "true"),
            ("authorization", "Bearer x"),
        ] {
            for (method, path) in [("POST", "/run"), ("GET", "/livez"), ("POST", "/s/length")] {
                let before = edge.refusals("repeated_field").await;
                let mut fields = vec![(name, value), (name, value)];
                if name != "x-api-key" {
                    fields.push(("x-api-key", key.as_str()));
                }
                let refused =
                    edge.ask(protocol, method, path, &fields, Some(&run)).await.expect_problem(400).json();
                assert_eq!(refused["code"], "repeated_field", "{protocol:?} {name} {path}");
                assert!(refused["detail"].as_str().is_some_and(|text| text.contains(name)), "{refused}");
                assert_eq!(edge.refusals("repeated_field").await, before + 1.0, "{protocol:?} {name} {path}");
            }
        }
        for (method, path, fields) in [
            ("PUT", put.as_str(), &[("if-match", "*"), ("if-match", "\"1\"")][..]),
            ("PUT", put.as_str(), &[("if-match", "*, \"1\"")]),
            ("DELETE", put.as_str(), &[("if-match", "\"1\", *")]),
            ("GET", put.as_str(), &[("if-none-match", "*, \"1\"")]),
        ] {
            let mut fields = fields.to_vec();
            fields.push(("content-type", "application/json"));
            let body = (method == "PUT").then_some(&b"{\"description\":\"x\"}"[..]);
            let refused = edge.call(protocol, method, path, &fields, body).await.expect_problem(400).json();
            assert_eq!(refused["code"], "repeated_field", "{protocol:?} {method} {fields:?}");
        }
        // Of two request ids neither is used.
        let named =
            edge.ask(protocol, "GET", "/livez", &[("x-request-id", "a"), ("x-request-id", "b")], None).await;
        assert!(!["a", "b"].contains(&named.expect(200).need("x-request-id")), "{protocol:?}");
        let named = edge
            .ask(protocol, "GET", "/s/length", &[("x-request-id", "a"), ("x-request-id", "b")], None)
            .await;
        let id = named.expect(200).need("x-request-id").to_owned();
        assert_eq!(received(&script.heads().pop().expect("a request"), "x-request-id"), [id], "{protocol:?}");
        // Other fields may be repeated.
        let several =
            [("prefer", "wait=5"), ("prefer", "respond-async"), ("content-type", "application/json")];
        edge.call(protocol, "POST", "/run", &several, Some(&run)).await.expect(202);
    }
    edge.gateway().get(&put).await.expect(200);
    edge.finish().await;
}

/// Malformed or ambiguous HTTP/2 requests are answered as problems and counted. Their connection persists.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_http2_requests_are_rejected_and_counted() {
    let (script, edge) = Edge::with_upstream("").await;
    let mut http2 = edge.http2().await;
    let good = [(":method", "GET"), (":scheme", "https"), (":authority", NAME), (":path", "/s/length")];
    let other = |name: &'static str, value: Option<&'static str>, more: &[(&'static str, &'static str)]| {
        let mut fields: Vec<(&str, &str)> = Vec::new();
        for (known, is) in good {
            let value = if known == name { value } else { Some(is) };
            fields.extend(value.map(|value| (known, value)));
        }
        fields.extend_from_slice(more);
        fields
    };
    for (fields, status, code) in [
        (other(":path", Some("/s/length#x"), &[]), 400, "malformed_header"),
        (other(":path", Some("/livez#"), &[]), 400, "malformed_header"),
        (other(":path", Some("s/length"), &[]), 400, "malformed_header"),
        (other(":path", Some("https://gateway.test/s/length"), &[]), 400, "malformed_header"),
        (other(":path", Some("/s/le ngth"), &[]), 400, "malformed_header"),
        (other(":path", Some(""), &[]), 400, "malformed_header"),
        (other(":path", None, &[]), 400, "malformed_header"),
        (other("", None, &[("host", "other.test")]), 400, "malformed_header"),
        (other("", None, &[("host", NAME), ("host", NAME)]), 400, "malformed_header"),
        (other("", None, &[("host", "u@gateway.test")]), 400, "malformed_header"),
        (other(":authority", Some("u@gateway.test"), &[]), 400, "malformed_header"),
        (
            other(":authority", Some("u:p@gateway.test"), &[("host", "u:p@gateway.test")]),
            400,
            "malformed_header",
        ),
        (other(":authority", None, &[]), 400, "malformed_header"),
        (other(":authority", None, &[("host", "")]), 400, "malformed_header"),
        (other(":authority", Some(""), &[]), 400, "malformed_header"),
        (other(":authority", Some(""), &[("host", NAME)]), 400, "malformed_header"),
        (vec![good[0], good[1], good[2], good[2], good[3]], 400, "malformed_header"),
        (vec![good[0], good[0], good[1], good[2], good[3]], 400, "malformed_header"),
        (other(":method", None, &[]), 400, "malformed_header"),
        (other(":scheme", None, &[]), 400, "malformed_header"),
        (other(":scheme", Some("ftp"), &[]), 400, "malformed_header"),
        (other("", None, &[("X-Capital", "1")]), 400, "malformed_header"),
        (other("", None, &[("connection", "close")]), 400, "malformed_header"),
        (other("", None, &[("transfer-encoding", "chunked")]), 400, "malformed_header"),
        (other("", None, &[("x", "1"), (":path", "/livez")]), 400, "malformed_header"),
        (other("", None, &[(":unknown", "1")]), 400, "malformed_header"),
        (other("", None, &[("x", "a\r\nx-api-key: b")]), 400, "malformed_header"),
        (other("", None, &[("content-length", "1"), ("content-length", "1")]), 400, "bad_framing"),
        (other("", None, &[("content-length", "-1")]), 400, "bad_framing"),
        (other("", None, &[("expect", "200-maybe")]), 417, "expectation_failed"),
        (vec![(":method", "CONNECT"), (":authority", "gateway.test:443")], 405, "method_not_allowed"),
        (other(":method", Some("CONNECT"), &[]), 405, "method_not_allowed"),
    ] {
        let before = edge.refusals(code).await;
        let answer = http2.ask(&fields, None).await.answer();
        let label = format!("{fields:?}: {answer:?}");
        assert_eq!(answer.status, status, "{label}");
        assert_eq!(answer.header("server"), None, "{label}");
        assert_eq!(answer.expect_problem(status).json()["code"], code, "{label}");
        assert_eq!(edge.refusals(code).await, before + 1.0, "{label}: not counted");
    }
    assert!(script.heads().is_empty(), "{:?}", script.heads());
    // With and without the default port, and with a Host in place of the authority.
    for fields in [
        other("", None, &[("host", "gateway.test:443")]),
        other(":authority", Some("GATEWAY.test:443"), &[("host", NAME)]),
        other(":authority", None, &[("host", "gateway.test:443")]),
        other("", None, &[("x-infra-refused", "1")]),
    ] {
        let answer = http2.ask(&fields, None).await.answer().expect(200);
        assert_eq!(answer.text(), "hello", "{fields:?}");
        let head = script.heads().pop().expect("a request");
        let host = received(&head, "host");
        assert!(host.len() == 1 && host[0].to_lowercase().starts_with(NAME), "{fields:?}: {head}");
        assert!(received(&head, "x-infra-refused").is_empty(), "{head}");
    }
    // `Expect: 100-continue` is answered with 100.
    let run = json!({ "functionId": HELLO }).to_string().into_bytes();
    let key = edge.gateway().key().to_owned();
    for (path, method) in [("/run", "POST"), ("/s/length", "POST")] {
        let mut fields =
            vec![(":method", method), (":scheme", "https"), (":authority", NAME), (":path", path)];
        fields.extend([
            ("x-api-key", key.as_str()),
            ("content-type", "application/json"),
            ("expect", "100-continue"),
        ]);
        let stream = http2.send(&fields, false).await.expect("a stream");
        within("100", SOON, http2.continues(stream)).await.expect("an interim answer");
        http2.data(stream, &run, true).await.expect("the peer reads");
        let answer = within(path, SOON, http2.ended(stream)).await.answer().expect(200);
        assert!(answer.text().contains("hello"), "{path}: {answer:?}");
    }
    // Split cookies are joined for an upstream of HTTP/1.1.
    let crumbs = other("", None, &[("cookie", "a=1"), ("x", "y"), ("cookie", "b=2; c=3"), ("cookie", "d=4")]);
    http2.ask(&crumbs, None).await.answer().expect(200);
    assert_eq!(received(&script.heads().pop().expect("a request"), "cookie"), ["a=1; b=2; c=3; d=4"]);
    edge.finish().await;
}

/// Stalled bodies time out independently, before an answer and after an early one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stalled_bodies_time_out_independently() {
    // Number of stalled bodies. One after the other they would take as many seconds.
    const STALLED: u64 = 60;
    let script = ScriptedUpstream::start().await;
    let upstreams = upstream("s", script.addr, "body_timeout_s = 1\nread_timeout_s = 600\n")
        + &upstream("patient", script.addr, "body_timeout_s = 10\nread_timeout_s = 600\n");
    let edge = Edge::start(upstreams, "[http]\nbody_timeout_s = 1\n").await;
    let of = |path: &'static str| {
        [(":method", "POST"), (":scheme", "https"), (":authority", NAME), (":path", path)]
    };
    // An early answer: the body never ends.
    let mut early_conn = edge.http2().await;
    let early = early_conn.send(&of("/patient/early"), false).await.expect("a stream");
    let answer = within("the answer", SOON, early_conn.ended(early)).await.answer().expect(200);
    assert_eq!(answer.text(), "hello");

    let mut http2 = edge.http2().await;
    let mut stalled = Vec::new();
    let began = Instant::now();
    for _ in 0..STALLED {
        let stream = http2.send(&of("/s/silent"), false).await.expect("a stream");
        http2.data(stream, b"part", false).await.expect("the peer reads");
        stalled.push(stream);
    }
    for stream in stalled {
        let refused = within("the end of a body that stalls", SOON, http2.ended(stream)).await.answer();
        assert_eq!(refused.expect_problem(408).json()["code"], "body_timeout");
    }
    assert!(began.elapsed() < Duration::from_secs(STALLED), "the bodies time out one after the other");
    // The same on a route of the gateway, and over HTTP/1.1.
    let key = edge.gateway().key().to_owned();
    let mut run = of("/run").to_vec();
    run.extend([("x-api-key", key.as_str()), ("content-type", "application/json")]);
    let stream = http2.send(&run, false).await.expect("a stream");
    within("the end", SOON, http2.ended(stream)).await.answer().expect_problem(408);
    let mut conn = edge.http1().await;
    conn.write(b"POST /s/silent HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\npart")
        .await
        .expect("the peer reads");
    within("the end", SOON, conn.answer(false)).await.expect("an answer").expect_problem(408);
    // A body that arrives in time is forwarded.
    let stream = http2.send(&of("/patient/length"), false).await.expect("a stream");
    http2.data(stream, b"one", false).await.expect("the peer reads");
    http2.data(stream, b"two", true).await.expect("the peer reads");
    assert_eq!(http2.ended(stream).await.answer().expect(200).text(), "hello");
    // After an early answer the body times out, too. Then the connection to the upstream is free, and the
    // metrics request is the only one in flight.
    edge.gateway().wait_for_metric("infra_requests_in_flight", 1.0).await;
    drop(early_conn);
    edge.finish().await;
}

/// Browsers must not guess content types. Caches must not keep answers without an ETag.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_answer_has_nosniff_and_no_store() {
    let (_script, edge) = Edge::with_upstream(&format!("[http]\ncors_origins = [{ORIGIN:?}]\n")).await;
    let function = edge.gateway().upload("says").await;
    let put = format!("/functions/{function}");
    let tag = edge.gateway().get(&put).await.expect(200).need("etag").to_owned();
    let run = json!({ "functionId": HELLO }).to_string().into_bytes();
    let json = ("content-type", "application/json");
    for protocol in PROTOCOLS {
        for (method, path, fields, body, status) in [
            ("GET", "/", &[][..], None, 200),
            ("GET", "/livez", &[], None, 200),
            ("HEAD", "/livez", &[], None, 200),
            ("GET", "/health", &[], None, 200),
            ("GET", "/metrics", &[], None, 200),
            ("GET", "/openapi.json", &[], None, 200),
            ("GET", "/functions", &[], None, 200),
            ("GET", put.as_str(), &[], None, 200),
            ("GET", put.as_str(), &[("if-none-match", tag.as_str())], None, 304),
            ("POST", "/run", &[json], Some(&run[..]), 200),
            ("POST", "/run", &[json, ("x-async", "true")], Some(&run[..]), 202),
            ("POST", "/run", &[json], Some(b"{}"), 400),
            ("GET", "/none", &[], None, 404),
            ("GET", "/run", &[], None, 405),
            ("OPTIONS", "/run", &[("origin", ORIGIN), ("access-control-request-method", "POST")], None, 204),
        ] {
            let answer = edge.call(protocol, method, path, fields, body).await.expect(status);
            let label = format!("{protocol:?} {method} {path} {status}");
            assert_eq!(values(&answer, "x-content-type-options"), ["nosniff"], "{label}");
            let kept = if answer.header("etag").is_some() { &[][..] } else { &["no-store"] };
            assert_eq!(values(&answer, "cache-control"), kept, "{label}");
        }
        // Answers of upstreams are unchanged.
        let passed = edge.ask(protocol, "GET", "/s/length", &[], None).await.expect(200);
        assert_eq!(passed.header("cache-control"), None);
    }
    let mut conn = edge.http1().await;
    conn.write(b"GET / HTTP/1.1\r\n\r\n").await.expect("the peer reads");
    let refused =
        within("the rejection", SOON, conn.answer(false)).await.expect("an answer").expect_problem(400);
    assert_eq!(
        (refused.need("x-content-type-options"), refused.need("cache-control")),
        ("nosniff", "no-store")
    );
    edge.finish().await;
}

/// TLS sessions are resumed until `[tls]` or its files change.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_sessions_are_resumed_until_the_certificate_changes() {
    let edge = Edge::start(String::new(), "").await;
    let connector = client(&edge.secure.authority, &["http/1.1"], None);
    let connect = async || {
        let mut stream =
            crate::harness::tls::connect(&connector, edge.secure.addr).await.expect("a handshake");
        stream
            .write_all(b"GET /livez HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
            .await
            .expect("the peer reads");
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text).await;
        assert!(text.starts_with("HTTP/1.1 200"), "{text}");
        let kind = stream.get_ref().1.handshake_kind().expect("the handshake is complete");
        kind == rustls::HandshakeKind::Resumed
    };
    assert!(!connect().await, "the first connection resumes nothing");
    assert!(connect().await);
    edge.secure.platform.put_conf("keys.toml", &key_lines("one", "key-one", &["read"]));
    edge.gateway().wait_for_metric(&reloads("keys.toml", "applied"), 1.0).await;
    assert!(connect().await, "another file has changed");
    let server = edge.secure.platform.conf_file("server.toml");
    let text = std::fs::read_to_string(&server).expect("readable");
    put_file(&server, &format!("[auth]\nfailures_burst = 99\n{text}"));
    edge.gateway().wait_for_metric(&reloads("server.toml", "applied"), 1.0).await;
    assert!(connect().await, "another part of the file has changed");
    edge.secure.authority.issue(NAME).write(&edge.secure.platform.conf_dir());
    edge.gateway().wait_for_metric(&reloads("certificate", "applied"), 1.0).await;
    assert!(!connect().await, "a new certificate ends the sessions");
    edge.finish().await;
}

/// A tunnel ends when the key that opened it is removed or expires.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tunnels_end_when_their_key_is_removed_or_expires() {
    // Keys are checked every 15 s.
    const WITHIN: Duration = Duration::from_secs(60);
    let service = Upstream::start().await;
    let more = "scope = \"read\"\nread_timeout_s = 600\nbody_timeout_s = 1\nbody_bytes_max = 4\n";
    let upstreams = upstream_lines("up", &[service.addr()], more);
    let keys = key_lines("kept", "key-kept", &["read"]);
    let gone = key_lines("gone", "key-gone", &["read"]);
    let until = key_lines("short", "key-short", &["read"]);
    let conf = Conf { upstreams, keys: format!("{keys}{gone}{until}"), ..Conf::default() };
    let platform = Setup::new(Backend::Dev).conf(conf).start().await;
    let open = async |key: &str| {
        let mut conn = Conn::open(platform.gateway.addr()).await.expect("the gateway accepts connections");
        let request = format!(
            "GET /up/socket HTTP/1.1\r\nhost: a\r\nx-api-key: {key}\r\nconnection: upgrade\r\n\
             upgrade: websocket\r\n\r\n"
        );
        conn.write(request.as_bytes()).await.expect("the peer reads");
        within("101", SOON, conn.any_answer(true)).await.expect("an answer").expect(101);
        conn
    };
    let (mut kept, mut gone, mut short) =
        (open("key-kept").await, open("key-gone").await, open("key-short").await);
    let soon = time::OffsetDateTime::now_utc() + Duration::from_secs(3);
    let soon = soon.format(&time::format_description::well_known::Rfc3339).expect("a time");
    let changed = format!("{keys}{until}expires = {soon}\n");
    platform.put_conf("keys.toml", &changed);
    platform.gateway.wait_for_metric(&reloads("keys.toml", "applied"), 1.0).await;
    assert!(
        within("the end of a tunnel whose key is gone", WITHIN, gone.is_closed()).await,
        "unexpected data"
    );
    assert!(
        within("the end of a tunnel whose key has expired", WITHIN, short.is_closed()).await,
        "unexpected data"
    );
    kept.write(b"hello").await.expect("the tunnel stands");
    assert_eq!(within("the echo", SOON, kept.bytes(5)).await.expect("the echo"), b"hello");
    drop(kept);
    platform.finish().await;
}
