//! The edge to the letter: what clients of HTTP/1.0, HTTP/1.1 and HTTP/2 get, and what services behind the gateway see of
//! them. One table a rule.

use crate::harness::gateway::Conf;
use crate::harness::http::{Answer, Conn};
use crate::harness::http2::Http2;
use crate::harness::keys::key_lines;
use crate::harness::platform::{Backend, HELLO};
use crate::harness::secure::{NAME, Secure};
use crate::harness::tls::{Authority, client};
use crate::harness::upload::printing;
use crate::harness::upstream::Upstream;
use crate::harness::{Gateway, SOON, Setup, eventually, spawn, within};
use flate2::Compression;
use flate2::write::{GzEncoder, ZlibEncoder};
use serde_json::json;
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// Some have tens of MiB to inflate and take apart first, without optimization and on a busy machine.
const ANSWERED_WITHIN: Duration = Duration::from_secs(120);
const ORIGIN: &str = "https://app.example";

/// A service that answers a path with the bytes it is told to, whatever it is asked, and keeps what it was asked.
struct Script {
    addr: SocketAddr,
    heads: Arc<Mutex<Vec<String>>>,
    accepting: JoinHandle<()>,
}

impl Script {
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

    /// Its answers come before the bodies of requests, which are read past.
    async fn answer(mut stream: TcpStream, heads: Arc<Mutex<Vec<String>>>) {
        let mut bytes = Vec::new();
        while let Some(head) = take_through(&mut stream, &mut bytes, b"\r\n\r\n").await {
            let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
            let length =
                seen(&head, "content-length").first().and_then(|length| length.parse().ok()).unwrap_or(0);
            let is_chunked = !seen(&head, "transfer-encoding").is_empty();
            heads.lock().expect("nobody panics with it").push(head);
            let answer = ANSWERS.iter().find(|(known, _)| *known == path);
            let _ = stream.write_all(answer.map_or("", |(_, answer)| answer).as_bytes()).await;
            if path.ends_with("/closing") {
                return;
            }
            if is_chunked {
                take_through(&mut stream, &mut bytes, b"0\r\n\r\n").await;
            }
            while bytes.len() < length && stream.read_buf(&mut bytes).await.is_ok_and(|n| n > 0) {}
            bytes.drain(..length.min(bytes.len()));
        }
    }

    /// Of what it was asked, health checks left out.
    fn heads(&self) -> Vec<String> {
        let heads = self.heads.lock().expect("nobody panics with it");
        heads.iter().filter(|head| !head.starts_with("GET / ")).cloned().collect()
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// What comes up to `end`, and without it. `None`: the other side has left.
async fn take_through(stream: &mut TcpStream, bytes: &mut Vec<u8>, end: &[u8]) -> Option<String> {
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
    format!(
        "[[upstream]]\nname = {name:?}\nprefix = \"/{name}\"\naddresses = [\"{addr}\"]\nscope = \"none\"\nhealth = {{ path = \"/\", every_s = 3600 }}\n{more}"
    )
}

/// How a request comes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Over {
    Http1,
    Http2,
}

const BOTH: [Over; 2] = [Over::Http1, Over::Http2];

/// A gateway with both listeners.
struct Edge {
    secure: Secure,
}

impl Edge {
    async fn start(upstreams: String, server: &str) -> Self {
        let conf = Conf { upstreams, server: server.into(), ..Conf::default() };
        Self { secure: Secure::start_with(conf, "", Authority::new()).await }
    }

    /// With a service that answers under `/s`.
    async fn before_script(server: &str) -> (Script, Self) {
        let script = Script::start().await;
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
        Conn::open(self.gateway().addr()).await.expect("the gateway takes connections")
    }

    /// A request with these fields and no others but those that it must have.
    async fn ask(
        &self,
        over: Over,
        method: &str,
        path: &str,
        fields: &[(&str, &str)],
        body: Option<&[u8]>,
    ) -> Answer {
        match over {
            Over::Http1 => {
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
            Over::Http2 => {
                let mut all =
                    vec![(":method", method), (":scheme", "https"), (":authority", NAME), (":path", path)];
                all.extend_from_slice(fields);
                let mut http2 = self.http2().await;
                within(path, ANSWERED_WITHIN, http2.ask(&all, body)).await.answer()
            }
        }
    }

    /// A request to a route of ours, with the key.
    async fn call(
        &self,
        over: Over,
        method: &str,
        path: &str,
        fields: &[(&str, &str)],
        body: Option<&[u8]>,
    ) -> Answer {
        let mut all = vec![("x-api-key", self.gateway().key())];
        all.extend_from_slice(fields);
        self.ask(over, method, path, &all, body).await
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

/// The values of a field in a head as the service behind the gateway has read it.
fn seen(head: &str, name: &str) -> Vec<String> {
    let lines = head.lines().skip(1).filter_map(|line| line.split_once(':'));
    lines
        .filter(|(known, _)| known.eq_ignore_ascii_case(name))
        .map(|(_, value)| value.trim().to_owned())
        .collect()
}

/// (path, the bytes that answer it)
const ANSWERS: &[(&str, &str)] = &[
    ("/s/100", "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\nvary: accept\r\n\r\nok"),
    (
        "/s/102",
        "HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\nvary: accept\r\n\r\nok",
    ),
    (
        "/s/103",
        "HTTP/1.1 103 Early Hints\r\nlink: </a.css>\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </b.css>\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\nvary: accept\r\n\r\nok",
    ),
    ("/s/101", "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"),
    ("/s/chunked", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"),
    (
        "/s/trailers",
        "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ntrailer: x-sum\r\n\r\n5\r\nhello\r\n0\r\nx-sum: 1\r\n\r\n",
    ),
    ("/s/length", "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"),
    ("/s/closing", "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nhello"),
    ("/s/early", "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello"),
];

/// What a script of another origin may read stands on the answer, and is not spent on what comes before it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn interim_answers() {
    let (script, edge) = Edge::before_script(&format!("[http]\ncors_origins = [{ORIGIN:?}]\n")).await;
    for (path, interim) in
        [("/s/100", &[100][..]), ("/s/102", &[102]), ("/s/103", &[103, 103]), ("/s/length", &[])]
    {
        let mut conn = edge.http1().await;
        let request = format!("GET {path} HTTP/1.1\r\nhost: a\r\norigin: {ORIGIN}\r\n\r\n");
        conn.write(request.as_bytes()).await.expect("it reads");
        for status in interim {
            let answer =
                within(path, SOON, conn.any_answer(false)).await.expect("an interim answer").expect(*status);
            for name in ["access-control-allow-origin", "vary", "x-request-id", "date", "connection"] {
                assert_eq!(answer.header(name), None, "{path}: {name}");
            }
        }
        let one = within(path, SOON, conn.any_answer(false)).await.expect("an answer").expect(200);
        let two = edge.ask(Over::Http2, "GET", path, &[("origin", ORIGIN)], None).await.expect(200);
        for answer in [one, two] {
            assert_eq!(values(&answer, "access-control-allow-origin"), [ORIGIN], "{path}: {answer:?}");
            assert!(values(&answer, "vary").contains(&"origin"), "{path}: {answer:?}");
            assert_eq!(values(&answer, "x-request-id").len(), 1, "{path}: {answer:?}");
        }
    }
    // A switch to another protocol that nobody has asked for is no answer.
    for over in BOTH {
        let answer = edge.ask(over, "GET", "/s/101", &[("origin", ORIGIN)], None).await.expect_problem(502);
        assert_eq!(answer.json()["code"], "upstream_broken", "{over:?}");
        assert_eq!(values(&answer, "access-control-allow-origin"), [ORIGIN]);
    }
    let mut conn = edge.http1().await;
    conn.write(b"GET /s/101 HTTP/1.1\r\nhost: a\r\nupgrade: websocket\r\n\r\n").await.expect("it reads");
    within("502", SOON, conn.answer(false)).await.expect("an answer").expect_problem(502);
    assert!(script.heads().iter().all(|head| seen(head, "upgrade").is_empty()), "nothing is upgraded");
    edge.finish().await;
}

/// A client of HTTP/1.0 is sent nothing that it does not know: no chunks, no interim answers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn http_1_0() {
    let (script, edge) = Edge::before_script("").await;
    let key = edge.gateway().key().to_owned();
    let run = json!({ "functionId": HELLO }).to_string();
    let body = format!("content-type: application/json\r\ncontent-length: {}\r\n", run.len());
    // (request line, fields, body; status; whether the connection goes on; what the body holds)
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
        // Without a Host, which it need not send, or an empty one.
        ("GET /s/length?nohost", "", "", 502, false, ""),
    ] {
        let told = format!("{line} {fields:?}");
        let mut conn = edge.http1().await;
        let host = if line.contains("nohost") { "" } else { "host: a\r\n" };
        conn.write(format!("{line} HTTP/1.0\r\n{host}{fields}\r\n{sent}").as_bytes())
            .await
            .expect("it reads");
        if line.contains("nohost") {
            // The service says nothing to this path.
            eventually("a request with a Host", SOON, || async {
                let heads = script.heads();
                let head = heads.iter().find(|head| head.contains("nohost"));
                head.map(|head| assert_eq!(seen(head, "host"), [script.addr.to_string()]))
                    .ok_or_else(String::new)
            })
            .await;
            continue;
        }
        let answer = within(&told, SOON, conn.any_answer(line.starts_with("HEAD"))).await.expect("an answer");
        assert_eq!(answer.status, status, "{told}: {answer:?}");
        assert_eq!(answer.header("transfer-encoding"), None, "{told}");
        assert!(answer.text().contains(holds), "{told}: {answer:?}");
        assert_eq!(answer.need("connection"), if is_kept { "keep-alive" } else { "close" }, "{told}");
        if is_kept {
            conn.write(b"GET /livez HTTP/1.0\r\nhost: a\r\n\r\n").await.expect("the connection goes on");
            within(&told, SOON, conn.any_answer(false)).await.expect("an answer").expect(200);
        }
        assert!(within(&told, SOON, conn.is_closed()).await, "{told}: something follows");
    }
    // What it says of waiting is not passed on.
    assert!(script.heads().iter().all(|head| seen(head, "expect").is_empty()), "{:?}", script.heads());
    edge.finish().await;
}

/// A connection that is said to go on goes on; one that ends is said to end.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_go_on_if_announced() {
    let (_script, edge) = Edge::before_script("[auth]\nfailures_burst = 1000\n").await;
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
        // A body that does not come, or is longer than anybody waits for.
        ("POST /nope", "content-length: 50\r\n".to_owned(), "ab", 404),
        ("POST /run", "transfer-encoding: chunked\r\n".to_owned(), "5\r\nhello\r\n", 401),
        ("POST /nope", "transfer-encoding: chunked\r\n".to_owned(), &long, 404),
        ("POST /nope", "transfer-encoding: chunked\r\n".to_owned(), "5\r\nhello\r\n0\r\n\r\n", 404),
        ("GET /s/closing", String::new(), "", 200),
        ("GET /s/chunked", String::new(), "", 200),
    ] {
        let told = format!("{line} {fields:?}");
        let mut conn = edge.http1().await;
        conn.write(format!("{line} HTTP/1.1\r\nhost: a\r\n{fields}\r\n{sent}").as_bytes())
            .await
            .expect("it reads");
        let answer = within(&told, SOON, conn.answer(false)).await.expect("an answer");
        assert_eq!(answer.status, status, "{told}: {answer:?}");
        match answer.need("connection") {
            "keep-alive" => {
                conn.write(b"GET /livez HTTP/1.1\r\nhost: a\r\n\r\n").await.expect("it reads");
                within(&told, SOON, conn.answer(false))
                    .await
                    .unwrap_or_else(|e| panic!("{told}: {e}"))
                    .expect(200);
            }
            _ => {
                conn.end().await;
                assert!(within(&told, SOON, conn.is_closed()).await, "{told}: something follows");
            }
        }
    }
    edge.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_targets_and_long_fields() {
    let edge = Edge::start(
        String::new(),
        "[http]\nheader_bytes_max = 200000\n[http2]\nheader_list_bytes_max = 200000\n",
    )
    .await;
    let (target, field, huge) = ("x".repeat(70_000), "x".repeat(199_990), "x".repeat(300_000));
    for over in BOTH {
        for (path, value, status, code) in [
            (format!("/livez?{target}"), "1", 414, "target_too_long"),
            (format!("/livez?{huge}"), "1", 414, "target_too_long"),
            (format!("/{huge}"), "1", 414, "target_too_long"),
            ("/livez".to_owned(), field.as_str(), 431, "header_too_large"),
            ("/livez".to_owned(), huge.as_str(), 431, "header_too_large"),
            (format!("/livez?{}", "x".repeat(60_000)), "1", 200, ""),
        ] {
            let before = edge.refusals(code).await;
            let answer = edge.ask(over, "GET", &path, &[("x-long", value)], None).await;
            if code.is_empty() {
                answer.expect(status);
                continue;
            }
            assert_eq!(answer.expect_problem(status).json()["code"], code, "{over:?} {}", path.len());
            assert!(edge.refusals(code).await > before, "{over:?}: it is counted");
        }
        // As many bytes as may be, also where the server reads a list that is a little longer; and one more.
        if over == Over::Http2 {
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
                assert!(answer.header("x-request-id").is_some(), "{path} {more}: it is ours");
            }
        }
        let many: Vec<(String, String)> = (0..101).map(|n| (format!("x-{n}"), "1".to_owned())).collect();
        let many: Vec<(&str, &str)> = many.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
        edge.ask(over, "GET", "/livez", &many, None).await.expect_problem(431);
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

/// The beginning of a form with a file.
const FILE: &[u8] = b"--x\r\ncontent-disposition: form-data; name=\"file\"; filename=\"a.zip\"\r\n\r\n";

/// Every route with a body takes it compressed, and is no larger for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_that_come_compressed() {
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
    // A thousand times as long as it looks.
    let bomb = gzip(&[FILE, &vec![b' '; 80 << 20]].concat());
    let put = format!("/functions/{function}");
    const JSON: &[(&str, &str)] = &[("content-type", "application/json")];
    const FORM: &[(&str, &str)] = &[
        ("content-type", "multipart/form-data; boundary=x"),
        ("x-function-name", "zipped"),
        ("x-runtime", "python"),
        ("x-memory-mb", "128"),
    ];
    for over in BOTH {
        for (method, path, fields, body) in [
            ("POST", "/run", JSON, &run),
            ("POST", "/worker/heartbeat", JSON, &beat),
            ("PUT", put.as_str(), JSON, &change),
            ("POST", "/upload", FORM, &form),
        ] {
            let told = format!("{over:?} {method} {path}");
            let call = async |coding: &str, body: &[u8]| {
                let mut all = vec![("content-encoding", coding)];
                all.extend_from_slice(fields);
                edge.call(over, method, path, &all, Some(body)).await
            };
            for (coding, body) in [
                ("gzip", gzip(body)),
                ("x-gzip", gzip(body)),
                ("GZIP", gzip(body)),
                ("deflate", zlib(body)),
                ("identity", body.clone()),
            ] {
                let answer = call(coding, &body).await;
                assert_eq!(answer.status, 200, "{told} {coding}: {}", answer.text());
            }
            for coding in ["br", "zstd", "gzip, gzip", "compress", "x"] {
                let refused = call(coding, body).await.expect_problem(415);
                assert_eq!(refused.json()["code"], "unsupported_content_coding", "{told} {coding}");
                assert_eq!(refused.need("accept-encoding"), "gzip, deflate, identity", "{told} {coding}");
            }
            for (coding, body) in
                [("gzip", body.clone()), ("deflate", gzip(body)), ("gzip", gzip(body)[..30].to_vec())]
            {
                let refused = call(coding, &body).await.expect_problem(400);
                assert_eq!(refused.json()["code"], "body_undecodable", "{told} {coding}");
            }
            assert_eq!(
                call("gzip", &bomb).await.expect_problem(413).json()["code"],
                "body_too_large",
                "{told}"
            );
        }
        // Those who come again may compress it or not: it is the same request.
        let keyed = |coding| {
            [("content-type", "application/json"), ("idempotency-key", "k-1"), ("content-encoding", coding)]
        };
        let first = edge.call(over, "POST", "/run", &keyed("gzip"), Some(&gzip(&run))).await.expect(200);
        let again = edge.call(over, "POST", "/run", &keyed("identity"), Some(&run)).await.expect(200);
        assert_eq!(first.json()["requestId"], again.json()["requestId"], "{over:?}");
        // What nobody here reads goes on as it came.
        let packed = gzip(&run);
        let passed =
            edge.ask(over, "POST", "/up/x", &[("content-encoding", "br")], Some(&packed)).await.expect(200);
        assert_eq!(passed.json()["bodyBytes"], packed.len());
        // A route that takes no body does not read what it has.
        edge.ask(over, "GET", "/livez", &[("content-encoding", "br")], None).await.expect(200);
    }
    edge.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_in_other_encodings() {
    let edge = Edge::start(String::new(), "").await;
    let function = edge.gateway().upload("encodings").await;
    let put = format!("/functions/{function}");
    for over in BOTH {
        for (method, path, text) in [
            ("POST", "/run", format!("{{\"functionId\":{HELLO:?},\"inputData\":\"\u{e4}\"}}")),
            ("POST", "/worker/heartbeat", "{\"workerId\":\"w\u{e4}\",\"status\":\"healthy\"}".to_owned()),
            ("PUT", put.as_str(), "{\"description\":\"\u{e4}\"}".to_owned()),
        ] {
            let utf_16 = |to: fn(u16) -> [u8; 2]| text.encode_utf16().flat_map(to).collect::<Vec<u8>>();
            for (body, told) in [
                ([&b"\xef\xbb\xbf"[..], text.as_bytes()].concat(), "byte order mark"),
                ([&b"\xff\xfe"[..], &utf_16(u16::to_le_bytes)].concat(), "UTF-16"),
                (utf_16(u16::to_be_bytes), "UTF-16"),
                (text.chars().map(|c| u8::try_from(c).expect("Latin-1")).collect(), "Latin-1"),
            ] {
                let fields = [("content-type", "application/json")];
                let refused =
                    edge.call(over, method, path, &fields, Some(&body)).await.expect_problem(400).json();
                let detail = refused["detail"].as_str().expect("a text");
                assert!(detail.contains(told), "{over:?} {path}: {told}: {detail}");
                assert_eq!(refused["code"], "invalid_request");
            }
        }
    }
    edge.finish().await;
}

/// Heads that are unusual and have one reading are taken; what is unknown is told by its name.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unusual_heads() {
    let (script, edge) = Edge::before_script("").await;
    let key = edge.gateway().key().to_owned();
    let run = json!({ "functionId": HELLO }).to_string();
    let chunked = format!(
        "x-api-key: {key}\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n{:x} \t;a=b ; c = \"d\"\r\n{run}\r\n0 ;x\r\n\r\n",
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
        conn.write(request.as_bytes()).await.expect("it reads");
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
    assert_eq!(seen(&passed[0], "host"), ["example.org:80"], "{passed:?}");
    assert!(passed[0].starts_with("GET /s/length HTTP/1.1"), "{passed:?}");
    // Trailers are not passed on, and not announced.
    for over in BOTH {
        let answer = edge.ask(over, "GET", "/s/trailers", &[], None).await.expect(200);
        assert_eq!(
            (answer.text().as_str(), answer.header("trailer"), answer.header("x-sum")),
            ("hello", None, None)
        );
    }
    edge.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_scripts_may_send() {
    let script = Script::start().await;
    let server = format!("[http]\ncors_origins = [{ORIGIN:?}]\n");
    let own = "cors_methods = [\"GET\", \"PATCH\"]\ncors_headers = [\"x-thing\", \"x-api-key\"]\n";
    let upstreams = upstream("own", script.addr, own) + &upstream("plain", script.addr, "");
    let edge = Edge::start(upstreams, &server).await;
    const METHODS: &str = "GET, HEAD, POST, PUT, DELETE";
    for over in BOTH {
        for (path, methods, fields) in [
            ("/run", METHODS, &["traceparent", "tracestate", "x-api-key", "idempotency-key"][..]),
            ("/plain/x", METHODS, &["traceparent", "tracestate", "x-api-key"]),
            ("/own/x", "GET, PATCH", &["x-thing", "x-api-key"]),
            ("/own", "GET, PATCH", &["x-thing", "x-api-key"]),
        ] {
            let asked = [("origin", ORIGIN), ("access-control-request-method", "POST")];
            let answer = edge.ask(over, "OPTIONS", path, &asked, None).await.expect(204);
            assert_eq!(answer.need("access-control-allow-methods"), methods, "{over:?} {path}");
            let allowed: Vec<&str> = answer.need("access-control-allow-headers").split(", ").collect();
            assert!(fields.iter().all(|field| allowed.contains(field)), "{over:?} {path}: {allowed:?}");
            assert_eq!(
                allowed.contains(&"content-type"),
                !path.starts_with("/own"),
                "{over:?} {path}: {allowed:?}"
            );
        }
    }
    assert!(script.heads().is_empty(), "nobody behind the gateway is asked");
    edge.finish().await;
}

/// What a stranger says of who it is and what it asks for is not passed on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fields_of_strangers() {
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
        let script = Script::start().await;
        let server = format!("[http]\ntrusted_proxies = {trusted}\n");
        let edge =
            Edge::start(upstream("s", script.addr, "add_headers = { x_ours = \"1\" }\n"), &server).await;
        for over in BOTH {
            for name in CLAIMS {
                let fields = [(name, "9.9.9.9"), ("x-forwarded-for", "8.8.8.8"), ("x-other", "7")];
                edge.ask(over, "GET", "/s/length", &fields, None).await.expect(200);
                let head = script.heads().pop().expect("a request");
                let is_passed = may_pass && name != "proxy" && !name.contains('_');
                assert_eq!(!seen(&head, name).is_empty(), is_passed, "{over:?} {name} {trusted}: {head}");
                let chain = if may_pass { "8.8.8.8, 127.0.0.1" } else { "127.0.0.1" };
                assert_eq!(seen(&head, "x-forwarded-for"), [chain], "{over:?} {name}");
                assert_eq!(
                    (seen(&head, "x-other"), seen(&head, "x_ours")),
                    (vec!["7".into()], vec!["1".into()])
                );
            }
        }
        edge.finish().await;
    }
}

/// A request that comes back goes no further, and one that other gateways have passed on does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn circles() {
    let (script, edge) = Edge::before_script("").await;
    let circle = upstream("circle", edge.gateway().addr(), "replace_prefix = \"/s\"\n")
        + &upstream("loop", edge.gateway().addr(), "")
        + &upstream("s", script.addr, "");
    std::fs::write(edge.secure.platform.conf_file("upstreams.toml"), circle).expect("writable");
    let applied = r#"infra_conf_reloads_total{file="upstreams.toml",result="applied"}"#;
    edge.gateway().wait_for_metric(applied, 1.0).await;
    for over in BOTH {
        for path in ["/loop/x", "/circle/length"] {
            let before = edge.refusals("loop_detected").await;
            let answer = edge.ask(over, "GET", path, &[], None).await.expect_problem(508);
            assert_eq!(answer.json()["code"], "loop_detected", "{over:?} {path}");
            assert_eq!(
                edge.refusals("loop_detected").await,
                before + 1.0,
                "{over:?} {path}: it went round once"
            );
        }
        for via in ["1.1 nginx", "1.0 fred, 2 infra-0123456789abcdef (Infra Controller)"] {
            edge.ask(over, "GET", "/s/length", &[("via", via)], None).await.expect(200);
            let head = script.heads().pop().expect("a request");
            let [passed] = &seen(&head, "via")[..] else { panic!("{head}") };
            let version = if over == Over::Http1 { "1.1" } else { "2" };
            let (before, ours) = passed.rsplit_once(", ").expect("two hops");
            assert_eq!(before, via, "{over:?}");
            assert!(ours.starts_with(&format!("{version} infra-")), "{over:?}: {ours}");
        }
    }
    edge.finish().await;
}

/// What may stand once and stands twice is refused, whatever is asked for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fields_that_may_stand_once() {
    let (script, edge) = Edge::before_script("").await;
    let function = edge.gateway().upload("once").await;
    let (key, put) = (edge.gateway().key().to_owned(), format!("/functions/{function}"));
    let run = json!({ "functionId": HELLO }).to_string().into_bytes();
    for over in BOTH {
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
                    edge.ask(over, method, path, &fields, Some(&run)).await.expect_problem(400).json();
                assert_eq!(refused["code"], "repeated_field", "{over:?} {name} {path}");
                assert!(refused["detail"].as_str().is_some_and(|text| text.contains(name)), "{refused}");
                assert_eq!(edge.refusals("repeated_field").await, before + 1.0, "{over:?} {name} {path}");
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
            let refused = edge.call(over, method, path, &fields, body).await.expect_problem(400).json();
            assert_eq!(refused["code"], "repeated_field", "{over:?} {method} {fields:?}");
        }
        // Of two names for the request neither is the one.
        let named =
            edge.ask(over, "GET", "/livez", &[("x-request-id", "a"), ("x-request-id", "b")], None).await;
        assert!(!["a", "b"].contains(&named.expect(200).need("x-request-id")), "{over:?}");
        let named =
            edge.ask(over, "GET", "/s/length", &[("x-request-id", "a"), ("x-request-id", "b")], None).await;
        let id = named.expect(200).need("x-request-id").to_owned();
        assert_eq!(seen(&script.heads().pop().expect("a request"), "x-request-id"), [id], "{over:?}");
        // What may stand several times may.
        let several =
            [("prefer", "wait=5"), ("prefer", "respond-async"), ("content-type", "application/json")];
        edge.call(over, "POST", "/run", &several, Some(&run)).await.expect(202);
    }
    edge.gateway().get(&put).await.expect(200);
    edge.finish().await;
}

/// Requests of HTTP/2 that are none, or have two readings: each is answered as a problem, and counted; its connection
/// goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_requests_of_http2() {
    let (script, edge) = Edge::before_script("").await;
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
        let told = format!("{fields:?}: {answer:?}");
        assert_eq!(answer.status, status, "{told}");
        assert_eq!(answer.header("server"), None, "{told}");
        assert_eq!(answer.expect_problem(status).json()["code"], code, "{told}");
        assert_eq!(edge.refusals(code).await, before + 1.0, "{told}: it is counted");
    }
    assert!(script.heads().is_empty(), "{:?}", script.heads());
    // The same port, written or not; a Host in the place of the authority.
    for fields in [
        other("", None, &[("host", "gateway.test:443")]),
        other(":authority", Some("GATEWAY.test:443"), &[("host", NAME)]),
        other(":authority", None, &[("host", "gateway.test:443")]),
        other("", None, &[("x-infra-refused", "1")]),
    ] {
        let answer = http2.ask(&fields, None).await.answer().expect(200);
        assert_eq!(answer.text(), "hello", "{fields:?}");
        let head = script.heads().pop().expect("a request");
        let host = seen(&head, "host");
        assert!(host.len() == 1 && host[0].to_lowercase().starts_with(NAME), "{fields:?}: {head}");
        assert!(seen(&head, "x-infra-refused").is_empty(), "{head}");
    }
    // Who waits to be told to send a body is told so.
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
        http2.data(stream, &run, true).await.expect("it reads");
        let answer = within(path, SOON, http2.ended(stream)).await.answer().expect(200);
        assert!(answer.text().contains("hello"), "{path}: {answer:?}");
    }
    // Crumbs of cookies are one field to a service that speaks HTTP/1.1.
    let crumbs = other("", None, &[("cookie", "a=1"), ("x", "y"), ("cookie", "b=2; c=3"), ("cookie", "d=4")]);
    http2.ask(&crumbs, None).await.answer().expect(200);
    assert_eq!(seen(&script.heads().pop().expect("a request"), "cookie"), ["a=1; b=2; c=3; d=4"]);
    edge.finish().await;
}

/// A body that does not come holds nobody up: neither before an answer nor after an early one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_that_stall() {
    let script = Script::start().await;
    let upstreams = upstream("s", script.addr, "body_timeout_s = 1\nread_timeout_s = 600\n");
    let edge = Edge::start(upstreams, "[http]\nbody_timeout_s = 1\n").await;
    let of = |path: &'static str| {
        [(":method", "POST"), (":scheme", "https"), (":authority", NAME), (":path", path)]
    };
    let mut http2 = edge.http2().await;
    let mut stalled = Vec::new();
    for _ in 0..40 {
        let stream = http2.send(&of("/s/silent"), false).await.expect("a stream");
        http2.data(stream, b"part", false).await.expect("it reads");
        stalled.push(stream);
    }
    let began = Instant::now();
    for stream in stalled {
        let refused = within("the end of a body that stalls", SOON, http2.ended(stream)).await.answer();
        assert_eq!(refused.expect_problem(408).json()["code"], "body_timeout");
    }
    assert!(began.elapsed() < SOON, "none waited for the others");
    // After an early answer the stream ends as well: the service's connection is free.
    let stream = http2.send(&of("/s/early"), false).await.expect("a stream");
    let answer = within("the answer", SOON, http2.ended(stream)).await.answer().expect(200);
    assert_eq!(answer.text(), "hello");
    let metric = "infra_requests_in_flight";
    eventually("no request in flight but the one that asks", SOON, || async {
        let count = edge.gateway().metric(metric).await;
        if count == Some(1.0) { Ok(()) } else { Err(format!("{count:?}")) }
    })
    .await;
    // So it is on a route of ours, and over HTTP/1.1.
    let key = edge.gateway().key().to_owned();
    let mut run = of("/run").to_vec();
    run.extend([("x-api-key", key.as_str()), ("content-type", "application/json")]);
    let stream = http2.send(&run, false).await.expect("a stream");
    within("the end", SOON, http2.ended(stream)).await.answer().expect_problem(408);
    let mut conn = edge.http1().await;
    conn.write(b"POST /s/silent HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\npart")
        .await
        .expect("it reads");
    within("the end", SOON, conn.answer(false)).await.expect("an answer").expect_problem(408);
    // A body that comes in time is passed on.
    let stream = http2.send(&of("/s/length"), false).await.expect("a stream");
    http2.data(stream, b"one", false).await.expect("it reads");
    http2.data(stream, b"two", true).await.expect("it reads");
    assert_eq!(http2.ended(stream).await.answer().expect(200).text(), "hello");
    edge.finish().await;
}

/// No browser reads an answer as anything else than it is, and nobody keeps one that has no tag.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_every_answer_says() {
    let (_script, edge) = Edge::before_script(&format!("[http]\ncors_origins = [{ORIGIN:?}]\n")).await;
    let function = edge.gateway().upload("says").await;
    let put = format!("/functions/{function}");
    let tag = edge.gateway().get(&put).await.expect(200).need("etag").to_owned();
    let run = json!({ "functionId": HELLO }).to_string().into_bytes();
    let json = ("content-type", "application/json");
    for over in BOTH {
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
            let answer = edge.call(over, method, path, fields, body).await.expect(status);
            let told = format!("{over:?} {method} {path} {status}");
            assert_eq!(values(&answer, "x-content-type-options"), ["nosniff"], "{told}");
            let kept = if answer.header("etag").is_some() { &[][..] } else { &["no-store"] };
            assert_eq!(values(&answer, "cache-control"), kept, "{told}");
        }
        // What others answer is theirs.
        let passed = edge.ask(over, "GET", "/s/length", &[], None).await.expect(200);
        assert_eq!(passed.header("cache-control"), None);
    }
    let mut conn = edge.http1().await;
    conn.write(b"GET / HTTP/1.1\r\n\r\n").await.expect("it reads");
    let refused =
        within("the refusal", SOON, conn.answer(false)).await.expect("an answer").expect_problem(400);
    assert_eq!(
        (refused.need("x-content-type-options"), refused.need("cache-control")),
        ("nosniff", "no-store")
    );
    edge.finish().await;
}

/// Sessions of TLS are resumed as long as `[tls]` and its files stay, whatever else changes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_outlive_other_changes() {
    let edge = Edge::start(String::new(), "").await;
    let connector = client(&edge.secure.authority, &["http/1.1"], None);
    let connect = async || {
        let mut stream =
            crate::harness::tls::connect(&connector, edge.secure.addr).await.expect("a handshake");
        stream
            .write_all(b"GET /livez HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
            .await
            .expect("it reads");
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text).await;
        assert!(text.starts_with("HTTP/1.1 200"), "{text}");
        let kind = stream.get_ref().1.handshake_kind().expect("it has shaken hands");
        kind == rustls::HandshakeKind::Resumed
    };
    assert!(!connect().await, "there is nothing to resume yet");
    assert!(connect().await);
    let applied = |file: &str| format!("infra_conf_reloads_total{{file={file:?},result=\"applied\"}}");
    std::fs::write(edge.secure.platform.conf_file("keys.toml"), key_lines("one", "key-one", &["read"]))
        .expect("writable");
    edge.gateway().wait_for_metric(&applied("keys.toml"), 1.0).await;
    assert!(connect().await, "another file has changed");
    let server = edge.secure.platform.conf_file("server.toml");
    let text = std::fs::read_to_string(&server).expect("readable");
    std::fs::write(&server, format!("[auth]\nfailures_burst = 99\n{text}")).expect("writable");
    edge.gateway().wait_for_metric(&applied("server.toml"), 1.0).await;
    assert!(connect().await, "another part of the file has changed");
    edge.secure.authority.issue(NAME).write(&edge.secure.platform.conf_dir());
    edge.gateway().wait_for_metric(&applied("certificate"), 1.0).await;
    assert!(!connect().await, "with another certificate it is another server");
    edge.finish().await;
}

/// Who has opened a tunnel and may not any more is shut out of it, within a minute.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tunnels_end_with_their_keys() {
    const WITHIN: Duration = Duration::from_secs(60);
    let service = Upstream::start().await;
    let upstreams = format!(
        "[[upstream]]\nname = \"up\"\nprefix = \"/up\"\naddresses = [\"{}\"]\nscope = \"read\"\nread_timeout_s = 600\nbody_timeout_s = 1\nbody_bytes_max = 4\n",
        service.addr()
    );
    let keys = key_lines("kept", "key-kept", &["read"]);
    let gone = key_lines("gone", "key-gone", &["read"]);
    let until = key_lines("short", "key-short", &["read"]);
    let conf = Conf { upstreams, keys: format!("{keys}{gone}{until}"), ..Conf::default() };
    let platform = Setup::new(Backend::Dev).conf(conf).start().await;
    let open = async |key: &str| {
        let mut conn = Conn::open(platform.gateway.addr()).await.expect("the gateway takes connections");
        let request = format!(
            "GET /up/socket HTTP/1.1\r\nhost: a\r\nx-api-key: {key}\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n"
        );
        conn.write(request.as_bytes()).await.expect("it reads");
        within("101", SOON, conn.any_answer(true)).await.expect("an answer").expect(101);
        conn
    };
    let (mut kept, mut gone, mut short) =
        (open("key-kept").await, open("key-gone").await, open("key-short").await);
    let soon = time::OffsetDateTime::now_utc() + Duration::from_secs(3);
    let soon = soon.format(&time::format_description::well_known::Rfc3339).expect("a time");
    let changed = format!("{keys}{until}expires = {soon}\n");
    std::fs::write(platform.conf_file("keys.toml"), changed).expect("writable");
    let applied = r#"infra_conf_reloads_total{file="keys.toml",result="applied"}"#;
    platform.gateway.wait_for_metric(applied, 1.0).await;
    assert!(
        within("the end of a tunnel whose key is gone", WITHIN, gone.is_closed()).await,
        "something came"
    );
    assert!(
        within("the end of a tunnel whose key has expired", WITHIN, short.is_closed()).await,
        "something came"
    );
    kept.write(b"hello").await.expect("the tunnel stands");
    assert_eq!(within("the echo", SOON, kept.bytes(5)).await.expect("the echo"), b"hello");
    drop(kept);
    platform.finish().await;
}
