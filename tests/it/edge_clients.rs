//! Common HTTP clients against both listeners: curl, requests and httpx (Python), undici (Node.js), and ab,
//! which supports only HTTP/1.0.
//!
//! Each requests `/livez`, runs a function synchronously and asynchronously, is rejected, and reads a chunked
//! answer of an upstream. If the client can, it sends a compressed body, expects `100 Continue`, and reuses
//! its connection.

use crate::harness::aws::venv;
use crate::harness::conf_lines::upstream_lines;
use crate::harness::gateway::Conf;
use crate::harness::http::{Answer, Message};
use crate::harness::platform::HELLO;
use crate::harness::process::Scratch;
use crate::harness::tls::Authority;
use crate::harness::tls_gateway::{NAME, TlsGateway};
use crate::harness::upstream::{Upstream, chunks};
use crate::harness::{SOON, client, path_env};
use serde_json::json;
use std::path::Path;

/// Deadline of curl and ab for one answer, in seconds. It is shorter than that of the whole process.
const ANSWER_WITHIN_S: &str = "120";
/// Requests of ab in flight.
const CONCURRENCY: usize = 2;
/// From this size curl sends `Expect: 100-continue`.
const CURL_EXPECTS_FROM_BYTES: usize = 1024 * 1024 + 1;

/// A gateway with both listeners, an upstream, and the files that clients send and compare.
struct Fixture {
    secure: TlsGateway,
    dir: Scratch,
    _service: Upstream,
}

impl Fixture {
    async fn start() -> Self {
        let service = Upstream::start().await;
        let upstreams = upstream_lines("up", &[service.addr()], "scope = \"read\"\n");
        // A busy client may send the body of a rejected request late. It must not lose its connection.
        let server = format!("[http]\ndrain_body_timeout_ms = {}\n", SOON.as_millis());
        let conf = Conf { server, upstreams, ..Conf::default() };
        let secure = TlsGateway::start_with(conf, "", Authority::new()).await;
        let dir = Scratch::new("client");
        let run = |input: &str| json!({ "functionId": HELLO, "inputData": input }).to_string();
        let short = run("of-the-edge");
        let padding = " ".repeat(CURL_EXPECTS_FROM_BYTES - short.len());
        for (name, contents) in [
            ("roots.pem", secure.authority.pem().into_bytes()),
            ("chunked", chunks().concat()),
            ("run.json", short.clone().into_bytes()),
            ("2k.json", run(&"of-the-edge-".repeat(200)).into_bytes()),
            ("1m.json", (short + &padding).into_bytes()),
        ] {
            std::fs::write(dir.path().join(name), contents).expect("the scratch directory is writable");
        }
        Self { secure, dir, _service: service }
    }

    fn plain(&self) -> String {
        format!("http://{}", self.secure.gateway().addr())
    }

    fn key_field(&self) -> String {
        format!("x-api-key: {}", self.secure.gateway().key())
    }

    /// Runs a script of `tests/it/clients`.
    async fn script(&self, name: &str, program: &Path, more: &[(&str, String)]) {
        let file = |name: &str| self.dir.path().join(name).display().to_string();
        let mut env = client::env(self.secure.gateway());
        let of_tls = [
            ("TLS_URL", format!("https://{}", self.secure.addr)),
            ("TLS_NAME", NAME.to_owned()),
            ("TLS_ROOTS", file("roots.pem")),
            ("CHUNKED_FILE", file("chunked")),
        ];
        env.extend(of_tls.iter().chain(more).map(|(name, value)| ((*name).to_owned(), value.clone())));
        client::run(name, program, &[&client::script(name)], &env, self.dir.path()).await;
    }

    async fn finish(self) {
        self.secure.platform.finish().await;
    }
}

/// With requests and httpx, which also supports HTTP/2.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn python_clients_work_on_both_listeners() {
    let edge = Fixture::start().await;
    edge.script("edge.py", &venv("python"), &[]).await;
    edge.finish().await;
}

/// With undici, which also supports HTTP/2.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn node_clients_work_on_both_listeners() {
    let modules = client::node_modules();
    let edge = Fixture::start().await;
    edge.script("edge.cjs", Path::new("node"), &[("NODE_PATH", modules)]).await;
    edge.finish().await;
}

/// Asserts the result of a run with the input `of-the-edge`.
#[track_caller]
fn expect_result(answer: Answer) {
    let result = answer.expect(200).json();
    let printed = result["stdout"].as_str().unwrap_or_default();
    assert!(result["status"] == "SUCCESS" && printed.contains("of-the-edge"), "{result}");
}

/// Asserts the answer to an asynchronous run.
#[track_caller]
fn expect_accepted(answer: Answer) {
    let answer = answer.expect(202);
    let accepted = answer.json();
    let id = accepted["jobId"].as_str().expect("a job id");
    assert_eq!(accepted["status"], "ACCEPTED");
    assert_eq!(answer.need("location"), format!("/status/{id}"));
}

/// curl with one version of HTTP and one listener.
struct Curl<'a> {
    edge: &'a Fixture,
    version: &'a str,
    base: String,
}

/// The answers to several requests of one curl process, in order.
struct Transfers {
    /// Number of new connections for each request.
    connects: Vec<u32>,
    /// Number of interim answers for each request.
    continues: Vec<usize>,
    answers: Vec<Answer>,
}

/// Shell commands that pass their arguments to curl. The second one pipes a compressed run into curl.
const AS_IT_IS: &str = r#"exec curl "$@""#;
const COMPRESSED: &str = r#"gzip -c run.json | curl "$@""#;

const KEEP_ALIVE: [&str; 2] = ["-H", "connection: keep-alive"];

impl Curl<'_> {
    fn is_http2(&self) -> bool {
        self.version == "--http2"
    }

    fn is_old(&self) -> bool {
        self.version == "--http1.0"
    }

    /// Runs one curl process for all `paths`.
    async fn ask(&self, command: &str, paths: &[&str], args: &[&str]) -> Transfers {
        let resolve = format!("{NAME}:{}:127.0.0.1", self.edge.secure.addr.port());
        let mut all = vec!["-c", command, "curl", "-q", "-sS", "-i", self.version];
        all.extend(["--max-time", ANSWER_WITHIN_S, "--cacert", "roots.pem", "--resolve", &resolve]);
        all.extend(["-w", "%{http_version} %{num_connects}\n"]);
        all.extend_from_slice(args);
        let urls = paths.iter().map(|path| format!("{}{path}", self.base));
        let out: Vec<(String, String)> =
            urls.enumerate().map(|(n, url)| (format!("answer-{n}"), url)).collect();
        for (file, url) in &out {
            all.extend(["-o", file, url]);
        }
        let dir = self.edge.dir.path();
        let lines = client::run("curl", Path::new("sh"), &all, &path_env(), dir).await;
        let mut transfers = Transfers { connects: Vec::new(), continues: Vec::new(), answers: Vec::new() };
        for (line, (file, url)) in lines.iter().zip(&out) {
            let (version, connects) = line.split_once(' ').expect("two words");
            assert_eq!(version == "2", self.is_http2(), "{url} is answered in HTTP/{version}");
            let written = std::fs::read(dir.join(file)).expect("curl has written it");
            let (continues, answer) = read_answer(&written);
            transfers.connects.push(connects.parse().expect("a number"));
            transfers.continues.push(continues);
            transfers.answers.push(answer);
        }
        assert_eq!(transfers.answers.len(), paths.len(), "curl has written {lines:?}");
        transfers
    }

    /// Sends a file by POST to each path.
    async fn post(&self, command: &str, paths: &[&str], file: &str, args: &[&str]) -> Transfers {
        let body = ["-H", "content-type: application/json", "--data-binary", file];
        self.ask(command, paths, &[&body[..], args].concat()).await
    }
}

/// Parses the output of `curl -i`: the number of interim answers, and the final answer.
fn read_answer(mut written: &[u8]) -> (usize, Answer) {
    let mut interim = 0;
    loop {
        let end = written.windows(4).position(|w| w == b"\r\n\r\n").expect("a whole head");
        let head = std::str::from_utf8(&written[..end]).expect("a head is ASCII");
        let mut message = Message::of_head(head).expect("a head");
        written = &written[end + 4..];
        let status = message.status().expect("a status line");
        if status >= 200 {
            message.body = written.to_vec();
            return (interim, Answer { status, message });
        }
        interim += 1;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn curl_works_on_both_listeners() {
    let edge = Fixture::start().await;
    let secure = format!("https://{NAME}:{}", edge.secure.addr.port());
    for (version, base) in [
        ("--http1.0", edge.plain()),
        ("--http1.1", edge.plain()),
        ("--http1.1", secure.clone()),
        ("--http2", secure),
    ] {
        println!("curl {version} {base}");
        speak(&Curl { edge: &edge, version, base }).await;
    }
    edge.finish().await;
}

async fn speak(curl: &Curl<'_>) {
    let key = curl.edge.key_field();
    let with_key = ["-H", key.as_str()];
    let and = |more: &[&'static str]| -> Vec<&str> { [&with_key[..], more].concat() };
    // HTTP/1.0 keeps a connection only on request.
    let kept: &[u32] = if curl.is_old() { &[1, 1, 1] } else { &[1, 0, 0] };
    expect_alive(curl, &[], kept).await;
    if curl.is_old() {
        expect_alive(curl, &KEEP_ALIVE, &[1, 0, 0]).await;
    }

    let ran = curl.post(AS_IT_IS, &["/run"; 2], "@run.json", &with_key).await;
    assert_eq!(ran.connects, kept[..2]);
    ran.answers.into_iter().for_each(expect_result);
    let accepted = curl.post(AS_IT_IS, &["/run"; 2], "@run.json", &and(&["-H", "x-async: true"])).await;
    assert_eq!(accepted.connects, kept[..2]);
    accepted.answers.into_iter().for_each(expect_accepted);
    let refused = curl.post(AS_IT_IS, &["/run"; 2], "@run.json", &[]).await;
    assert_eq!(refused.connects, kept[..2]);
    for answer in refused.answers {
        answer.expect_problem(401);
    }

    // By default curl sends the body after one second without an interim answer. Over HTTP/1.1 it must get
    // one, also on a busy machine.
    let is_sure = curl.version == "--http1.1";
    let patience: &[&str] = if is_sure { &["--expect100-timeout", ANSWER_WITHIN_S] } else { &[] };
    let waits = and(&["-H", "expect: 100-continue"]);
    for (file, args) in [("@2k.json", &waits), ("@1m.json", &with_key.to_vec())] {
        let ran = curl.post(AS_IT_IS, &["/run"], file, &[patience, args].concat()).await;
        if is_sure {
            assert_eq!(ran.continues, [1], "{file}");
        }
        ran.answers.into_iter().for_each(expect_result);
    }

    let chunked = curl.ask(AS_IT_IS, &["/up/chunked"; 2], &with_key).await;
    assert_eq!(chunked.connects, kept[..2]);
    let mut answers = chunked.answers;
    if curl.is_old() {
        // A body without a length ends with the connection, even if the client requests keep-alive.
        answers.extend(curl.ask(AS_IT_IS, &["/up/chunked"; 2], &and(&KEEP_ALIVE)).await.answers);
    }
    for answer in answers {
        expect_chunked(&answer.expect(200), curl.is_old());
    }

    let field = "content-encoding: gzip";
    let packed = curl.post(COMPRESSED, &["/run"], "@-", &and(&["-H", field])).await;
    packed.answers.into_iter().for_each(expect_result);
    let packed = curl.post(COMPRESSED, &["/run"], "@-", &and(&["-H", field, "-H", "x-async: true"])).await;
    packed.answers.into_iter().for_each(expect_accepted);
}

async fn expect_alive(curl: &Curl<'_>, args: &[&str], connects: &[u32]) {
    let alive = curl.ask(AS_IT_IS, &["/livez"; 3], args).await;
    assert_eq!(alive.connects, connects, "{args:?}");
    for answer in alive.answers {
        assert_eq!(answer.expect(200).json(), json!({ "status": "OK" }));
    }
}

/// Asserts the complete answer of the upstream. HTTP/1.0 clients get no `Transfer-Encoding` (RFC 9112,
/// section 6.1).
#[track_caller]
fn expect_chunked(answer: &Answer, is_old: bool) {
    let whole = chunks().concat();
    let lengths = (answer.body().len(), whole.len());
    assert!(answer.body() == whole, "{lengths:?} {:?}", answer.message.headers);
    if is_old {
        assert_eq!(answer.header("transfer-encoding"), None, "{:?}", answer.message.headers);
    }
}

struct Ab<'a> {
    edge: &'a Fixture,
    /// Whether it requests persistent connections.
    keeps: bool,
}

struct Report {
    lines: Vec<String>,
}

impl Ab<'_> {
    /// Sends `requests` requests. None may fail.
    async fn ask(&self, requests: usize, url: &str, args: &[&str]) -> Report {
        let (n, c) = (requests.to_string(), CONCURRENCY.to_string());
        let mut all = vec!["-q", "-v", "2", "-s", ANSWER_WITHIN_S, "-n", &n, "-c", &c];
        if self.keeps {
            all.push("-k");
        }
        all.extend_from_slice(args);
        all.push(url);
        let dir = self.edge.dir.path();
        let lines = client::run("ab", Path::new("ab"), &all, &path_env(), dir).await;
        let report = Report { lines };
        let counts = (report.number("Complete requests"), report.number("Failed requests"));
        assert_eq!(counts, (Some(requests), Some(0)), "{url} {args:?}: {}", report.summary());
        report
    }

    /// Sends a file by POST.
    async fn post(&self, requests: usize, file: &str, args: &[&str]) -> Report {
        let url = format!("{}/run", self.edge.plain());
        let body = ["-T", "application/json", "-p", file];
        self.ask(requests, &url, &[&body[..], args].concat()).await
    }
}

impl Report {
    fn number(&self, name: &str) -> Option<usize> {
        let rest = self.lines.iter().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        rest.split_whitespace().next()?.parse().ok()
    }

    /// The output below the answers.
    fn summary(&self) -> String {
        let begin = self.lines.iter().position(|line| line.starts_with("Server Software")).unwrap_or(0);
        self.lines[begin..].join("\n")
    }

    /// The answers. ab prints the first read of each: a small answer is complete, because the gateway sends
    /// it at once.
    fn answers(&self) -> Vec<Answer> {
        let text = self.lines.join("\n");
        let answers = text.split("LOG: header received:\n").skip(1).map(|read| {
            let (head, rest) = read.split_once("\r\n\r\n").expect("a whole head");
            let mut message = Message::of_head(head).expect("a head");
            message.body = rest.lines().next().unwrap_or_default().as_bytes().to_vec();
            Answer { status: message.status().expect("a status line"), message }
        });
        answers.collect()
    }
}

/// ab reads a body up to its `Content-Length` or the end of the connection. It does not decode chunks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ab_works_with_and_without_keep_alive() {
    let edge = Fixture::start().await;
    client::run("gzip", Path::new("gzip"), &["-k", "run.json"], &path_env(), edge.dir.path()).await;
    let key = edge.key_field();
    for keeps in [false, true] {
        let ab = Ab { edge: &edge, keeps };
        for base in [edge.plain(), format!("https://{}", edge.secure.addr)] {
            let alive = ab.ask(100, &format!("{base}/livez"), &[]).await;
            assert_eq!(alive.number("HTML transferred"), Some(100 * r#"{"status":"OK"}"#.len()));
            // Newer versions of ab do not count the last request of a connection.
            let kept = alive.number("Keep-Alive requests");
            assert_eq!(kept.is_some_and(|kept| kept >= 100 - CONCURRENCY), keeps, "{kept:?}");
        }

        // Results differ in length.
        let ran = ab.post(8, "run.json", &["-l", "-H", &key]).await.answers();
        assert_eq!(ran.len(), 8);
        ran.into_iter().for_each(expect_result);
        let accepted = ab.post(8, "run.json", &["-H", &key, "-H", "x-async: true"]).await.answers();
        assert_eq!(accepted.len(), 8);
        accepted.into_iter().for_each(expect_accepted);
        let refused = ab.post(8, "run.json", &[]).await;
        assert_eq!(refused.number("Non-2xx responses"), Some(8));
        for answer in refused.answers() {
            answer.expect_problem(401);
        }

        let chunked = ab.ask(20, &format!("{}/up/chunked", edge.plain()), &["-H", &key]).await;
        let whole = chunks().concat().len();
        assert_eq!(chunked.number("HTML transferred"), Some(20 * whole), "{}", chunked.summary());
        for answer in chunked.answers() {
            assert_eq!(answer.header("transfer-encoding"), None, "{:?}", answer.message.headers);
        }

        let packed = ab.post(4, "run.json.gz", &["-l", "-H", &key, "-H", "content-encoding: gzip"]).await;
        packed.answers().into_iter().for_each(expect_result);
    }
    edge.finish().await;
}
