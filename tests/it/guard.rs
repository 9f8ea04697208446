//! Malformed and slow HTTP/1.1 as bytes on a socket. Each gets the documented answer or a clean close, and
//! the next client is served. No part of a malformed message reaches an upstream as a request.

use crate::harness::conf_lines::upstream_lines;
use crate::harness::gateway::Conf;
use crate::harness::http::Conn;
use crate::harness::platform::Backend;
use crate::harness::platform::HELLO;
use crate::harness::upstream::Upstream;
use crate::harness::{Gateway, Platform, SOON, Setup, eventually, within};
use serde_json::json;
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// The expected reaction to some bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Expected {
    /// A problem with this status and code, then the end of the connection.
    Refused(u16, &'static str),
    /// The end of the connection, without an answer.
    Closed,
    /// An answer with this status.
    Answered(u16),
}

use Expected::{Answered, Closed, Refused};

const MALFORMED: Expected = Refused(400, "malformed_header");
const FRAMING: Expected = Refused(400, "bad_framing");
const TOO_LARGE: Expected = Refused(431, "header_too_large");
const TARGET_TOO_LONG: Expected = Refused(414, "target_too_long");
const CODING: Expected = Refused(501, "unsupported_transfer_coding");
const VERSION: Expected = Refused(505, "version_not_supported");
const BODY: Expected = Refused(400, "body_broken");

/// (name, bytes, reaction). In the bytes `{P}` is the path, and `{K}` the header field with the key.
const HEADS: &[(&str, &str, Expected)] = &[
    (
        "length and chunks",
        "POST {P} HTTP/1.1\r\nHost: a\r\n{K}Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        FRAMING,
    ),
    (
        "chunks and length",
        "POST {P} HTTP/1.1\r\nHost: a\r\n{K}Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        FRAMING,
    ),
    (
        "two lengths",
        "POST {P} HTTP/1.1\r\nHost: a\r\n{K}Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        FRAMING,
    ),
    (
        "the same length twice",
        "POST {P} HTTP/1.1\r\nHost: a\r\n{K}Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
        FRAMING,
    ),
    ("a list of lengths", "POST {P} HTTP/1.1\r\nHost: a\r\n{K}Content-Length: 5, 5\r\n\r\nhello", FRAMING),
    ("a signed length", "POST {P} HTTP/1.1\r\nHost: a\r\n{K}Content-Length: +5\r\n\r\nhello", FRAMING),
    ("a negative length", "POST {P} HTTP/1.1\r\nHost: a\r\n{K}Content-Length: -1\r\n\r\n", FRAMING),
    ("a hexadecimal length", "POST {P} HTTP/1.1\r\nHost: a\r\n{K}Content-Length: 0x5\r\n\r\nhello", FRAMING),
    (
        "a length with a fraction",
        "POST {P} HTTP/1.1\r\nHost: a\r\n{K}Content-Length: 5.0\r\n\r\nhello",
        FRAMING,
    ),
    (
        "a length that overflows",
        "POST {P} HTTP/1.1\r\nHost: a\r\n{K}Content-Length: 99999999999999999999\r\n\r\n",
        FRAMING,
    ),
    ("an angle in the path", "GET {P}/a<b HTTP/1.1\r\nHost: a\r\n{K}\r\n", MALFORMED),
    ("a backtick in the path", "GET {P}/a`b HTTP/1.1\r\nHost: a\r\n{K}\r\n", MALFORMED),
    ("an angle in the query", "GET {P}?a>b HTTP/1.1\r\nHost: a\r\n{K}\r\n", MALFORMED),
    ("a quote in the query", "GET {P}?a\"b HTTP/1.1\r\nHost: a\r\n{K}\r\n", MALFORMED),
    ("an empty length", "POST {P} HTTP/1.1\r\nHost: a\r\n{K}Content-Length:\r\n\r\n", FRAMING),
    ("another coding", "POST {P} HTTP/1.1\r\nHost: a\r\n{K}Transfer-Encoding: gzip\r\n\r\n", CODING),
    (
        "two codings",
        "POST {P} HTTP/1.1\r\nHost: a\r\n{K}Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        CODING,
    ),
    (
        "chunked, then identity",
        "POST {P} HTTP/1.1\r\nHost: a\r\n{K}Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
        FRAMING,
    ),
    (
        "chunked twice",
        "POST {P} HTTP/1.1\r\nHost: a\r\n{K}Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n\
         0\r\n\r\n",
        FRAMING,
    ),
    (
        "nearly chunked",
        "POST {P} HTTP/1.1\r\nHost: a\r\n{K}Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        CODING,
    ),
    (
        "chunked with a control character",
        "POST {P} HTTP/1.1\r\nHost: a\r\n{K}Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
        MALFORMED,
    ),
    (
        "chunks in HTTP/1.0",
        "POST {P} HTTP/1.0\r\nHost: a\r\n{K}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        FRAMING,
    ),
    (
        "a blank before the colon",
        "POST {P} HTTP/1.1\r\nHost: a\r\n{K}Content-Length : 5\r\n\r\nhello",
        MALFORMED,
    ),
    (
        "a tab before the colon",
        "POST {P} HTTP/1.1\r\nHost: a\r\n{K}Transfer-Encoding\t: chunked\r\n\r\n",
        MALFORMED,
    ),
    ("a folded line", "GET {P} HTTP/1.1\r\nHost: a\r\n{K}X: a\r\n b\r\n\r\n", MALFORMED),
    ("a folded line with a tab", "GET {P} HTTP/1.1\r\nHost: a\r\n{K}X: a\r\n\tb\r\n\r\n", MALFORMED),
    ("a folded first line", "GET {P} HTTP/1.1\r\n Host: a\r\n{K}\r\n", MALFORMED),
    (
        "a folded coding",
        "POST {P} HTTP/1.1\r\nHost: a\r\n{K}Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
        FRAMING,
    ),
    ("bare line feeds", "GET {P} HTTP/1.1\nHost: a\n\n", MALFORMED),
    ("one bare line feed", "GET {P} HTTP/1.1\r\nHost: a\nX: b\r\n\r\n", MALFORMED),
    (
        "a bare line feed in a value",
        "GET {P} HTTP/1.1\r\nHost: a\r\nX: a\nContent-Length: 5\r\n\r\n",
        MALFORMED,
    ),
    ("a bare carriage return", "GET {P} HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n", MALFORMED),
    ("two carriage returns", "GET {P} HTTP/1.1\r\nHost: a\r\r\n\r\n", MALFORMED),
    ("NUL in a value", "GET {P} HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n", MALFORMED),
    ("NUL in a name", "GET {P} HTTP/1.1\r\nHost: a\r\nX\0: a\r\n\r\n", MALFORMED),
    ("NUL in the target", "GET {P}\0 HTTP/1.1\r\nHost: a\r\n\r\n", MALFORMED),
    ("NUL in the method", "G\0T {P} HTTP/1.1\r\nHost: a\r\n\r\n", MALFORMED),
    ("only NULs", "\0\0\0\0\r\n\r\n", MALFORMED),
    ("DEL in a value", "GET {P} HTTP/1.1\r\nHost: a\r\nX: \x7f\r\n\r\n", MALFORMED),
    ("an escape in a value", "GET {P} HTTP/1.1\r\nHost: a\r\nX: \x1b[2J\r\n\r\n", MALFORMED),
    ("a line without a colon", "GET {P} HTTP/1.1\r\nHost: a\r\nhello\r\n\r\n", MALFORMED),
    ("a field without a name", "GET {P} HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n", MALFORMED),
    ("a name with a blank", "GET {P} HTTP/1.1\r\nHost: a\r\nA B: c\r\n\r\n", MALFORMED),
    ("a name with a bracket", "GET {P} HTTP/1.1\r\nHost: a\r\nA(B): c\r\n\r\n", MALFORMED),
    ("no Host", "GET {P} HTTP/1.1\r\n\r\n", MALFORMED),
    ("an empty Host", "GET {P} HTTP/1.1\r\nHost:\r\n\r\n", MALFORMED),
    ("two Hosts", "GET {P} HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", MALFORMED),
    ("the same Host twice", "GET {P} HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", MALFORMED),
    ("a Host with a path", "GET {P} HTTP/1.1\r\nHost: a/b\r\n\r\n", MALFORMED),
    ("a Host with a user", "GET {P} HTTP/1.1\r\nHost: u@a\r\n\r\n", MALFORMED),
    ("a list of Hosts", "GET {P} HTTP/1.1\r\nHost: a, b\r\n\r\n", MALFORMED),
    ("a target of another host", "GET http://b{P} HTTP/1.1\r\nHost: a\r\n\r\n", MALFORMED),
    ("a target with a user", "GET http://u@a{P} HTTP/1.1\r\nHost: a\r\n\r\n", MALFORMED),
    ("a target of another scheme", "GET ftp://a{P} HTTP/1.1\r\nHost: a\r\n\r\n", MALFORMED),
    ("a target of another port", "GET http://a:8080{P} HTTP/1.1\r\nHost: a\r\n\r\n", MALFORMED),
    ("a target without slashes", "GET http:a{P} HTTP/1.1\r\nHost: a\r\n\r\n", MALFORMED),
    ("a target that is none", "GET x HTTP/1.1\r\nHost: a\r\n\r\n", MALFORMED),
    ("a target with a fragment", "GET {P}#x HTTP/1.1\r\nHost: a\r\n\r\n", MALFORMED),
    ("a target with a blank", "GET {P} x HTTP/1.1\r\nHost: a\r\n\r\n", MALFORMED),
    ("a star that is not for OPTIONS", "GET * HTTP/1.1\r\nHost: a\r\n\r\n", MALFORMED),
    ("no target", "GET HTTP/1.1\r\nHost: a\r\n\r\n", MALFORMED),
    ("two blanks", "GET  {P} HTTP/1.1\r\nHost: a\r\n\r\n", MALFORMED),
    ("a blank before the method", " GET {P} HTTP/1.1\r\nHost: a\r\n\r\n", MALFORMED),
    ("a blank after the version", "GET {P} HTTP/1.1 \r\nHost: a\r\n\r\n", MALFORMED),
    ("HTTP/0.9", "GET {P}\r\n\r\n", MALFORMED),
    ("two empty lines first", "\r\n\r\nGET {P} HTTP/1.1\r\nHost: a\r\n\r\n", MALFORMED),
    ("HTTP/0.8", "GET {P} HTTP/0.8\r\nHost: a\r\n\r\n", VERSION),
    ("HTTP/2.0", "GET {P} HTTP/2.0\r\nHost: a\r\n\r\n", VERSION),
    ("the preface of HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", VERSION),
    ("small letters in the version", "GET {P} http/1.1\r\nHost: a\r\n\r\n", MALFORMED),
    ("TLS", "\x16\x03\x01\x02\0\x01\0\x01\x7c\x03\x03\r\n\r\n", MALFORMED),
    ("SSH", "SSH-2.0-OpenSSH_9.9\r\n", MALFORMED),
    ("CONNECT", "CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n", Refused(405, "method_not_allowed")),
    (
        "an unknown expectation",
        "POST {P} HTTP/1.1\r\nHost: a\r\n{K}Expect: 200-maybe\r\nContent-Length: 0\r\n\r\n",
        Refused(417, "expectation_failed"),
    ),
    ("half a head, then the end", "GET {P} HTTP/1.1\r\nHos", Closed),
    ("half a line break, then the end", "GET {P} HTTP/1.1\r\nHost: a\r", Closed),
    ("nothing", "", Closed),
];

/// Malformed bodies with well-formed heads: (name, bytes, reaction). The connection ends, and no byte after
/// the fault is taken for a request.
const BODIES: &[(&str, &str, Expected)] = &[
    ("a chunk without a size", "\r\nhello\r\n0\r\n\r\n", BODY),
    ("a chunk with a sign", "+5\r\nhello\r\n0\r\n\r\n", BODY),
    ("a chunk with 0x", "0x5\r\nhello\r\n0\r\n\r\n", BODY),
    ("a chunk with a blank", "5 \r\nhello\r\n0\r\n\r\n", BODY),
    ("a chunk with a bare line feed", "5\nhello\r\n0\r\n\r\n", BODY),
    ("a chunk that is longer than its size line", "4\r\nhello\r\n0\r\n\r\n", BODY),
    ("a chunk whose size overflows", "fffffffffffffffff\r\nhello\r\n0\r\n\r\n", BODY),
    ("an extension without end", "5;{LONG}\r\nhello\r\n0\r\n\r\n", BODY),
    ("an extension with a bare line feed", "5;a\nb\r\nhello\r\n0\r\n\r\n", BODY),
    ("a trailer without end", "0\r\nX: {LONG}{LONG}{LONG}{LONG}{LONG}\r\n\r\n", BODY),
    ("a folded trailer", "0\r\nX: a\r\n b\r\n\r\n", BODY),
    ("chunks that break off", "5\r\nhel", Closed),
    ("chunks without their end", "5\r\nhello\r\n", Closed),
];

struct Fixture {
    platform: Platform,
    upstream: Upstream,
    /// Number of requests that the upstream must have received.
    expected: usize,
}

impl Fixture {
    /// No connection times out, however slow the machine is.
    async fn start() -> Self {
        Self::start_with_timeouts(3600).await
    }

    /// `timeout_s`: the header timeout, and the body timeout.
    async fn start_with_timeouts(timeout_s: u64) -> Self {
        let upstream = Upstream::start().await;
        let gone = Upstream::start().await.addr();
        let conf = Conf {
            server: format!(
                "[http]\nheader_timeout_s = {timeout_s}\nbody_timeout_s = {timeout_s}\n\
                 [auth]\nfailures_burst = 1000\n"
            ),
            upstreams: upstream_lines(
                "up",
                &[upstream.addr()],
                "scope = \"read\"\nbody_bytes_max = 100000\n",
            ) + &upstream_lines("gone", &[gone], "scope = \"read\"\n"),
            ..Conf::default()
        };
        let platform = Setup::new(Backend::Dev).conf(conf).start().await;
        Self { platform, upstream, expected: 0 }
    }

    fn gateway(&self) -> &Gateway {
        &self.platform.gateway
    }

    fn bytes(&self, text: &str, path: &str) -> Vec<u8> {
        let long = "x".repeat(1000);
        let key = format!("x-api-key: {}\r\n", self.gateway().key());
        text.replace("{P}", path).replace("{K}", &key).replace("{LONG}", &long).into_bytes()
    }

    async fn open(&self) -> Conn {
        Conn::open(self.gateway().addr()).await.expect("the gateway accepts connections")
    }

    /// Sends the bytes in one piece, or in two split at `cut`, and checks the reaction.
    async fn check(&mut self, what: &str, bytes: &[u8], cut: Option<usize>, expected: Expected) {
        let mut conn = self.open().await;
        let (first, second) = bytes.split_at(cut.unwrap_or(bytes.len()));
        // The gateway may have rejected it already.
        let _ = conn.write(first).await;
        if cut.is_some() {
            tokio::task::yield_now().await;
            let _ = conn.write(second).await;
        }
        if expected == Closed || matches!(expected, Refused(400, "body_broken")) {
            conn.end().await;
        }
        let label = format!("{what}, cut at {cut:?}");
        let answer = within(&label, SOON, conn.answer(false)).await;
        match (expected, answer) {
            (Refused(status, code), Ok(answer)) => {
                assert_eq!(answer.status, status, "{label}: {}", answer.text());
                assert_eq!(answer.need("connection"), "close", "{label}");
                assert_eq!(answer.expect_problem(status).json()["code"], code, "{label}");
                assert!(within(&label, SOON, conn.is_closed()).await, "{label}: something follows");
            }
            (Answered(status), Ok(answer)) => assert_eq!(answer.status, status, "{label}: {}", answer.text()),
            (Closed, Err(e)) => assert_eq!(e.kind(), std::io::ErrorKind::UnexpectedEof, "{label}"),
            (expected, answer) => panic!("{label}: expected {expected:?}, got {answer:?}"),
        }
        self.check_next(&label).await;
    }

    /// Asserts that the next client is served, and that the upstream has received nothing else.
    async fn check_next(&mut self, label: &str) {
        let next = self.gateway().upstream_request("GET", "/up/next").send().await;
        assert_eq!(next.status, 200, "the next after {label}");
        self.expected += 1;
        assert_eq!(self.upstream.requests().len(), self.expected, "{label}: requests to the upstream");
    }

    async fn finish(self) {
        self.platform.finish().await;
    }
}

/// On a route of the gateway, and on one of an upstream.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_heads_are_rejected() {
    let mut fixture = Fixture::start().await;
    for (what, text, expected) in HEADS {
        for path in ["/run", "/up/x"] {
            let bytes = fixture.bytes(text, path);
            fixture.check(what, &bytes, None, *expected).await;
        }
    }
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_heads_are_rejected_at_any_split() {
    let mut fixture = Fixture::start().await;
    for what in ["length and chunks", "a folded line", "NUL in a name", "bare line feeds", "two Hosts"] {
        let (_, text, expected) = HEADS.iter().find(|(name, ..)| *name == what).expect("it is in the table");
        let bytes = fixture.bytes(text, "/up/x");
        for cut in 0..bytes.len() {
            fixture.check(what, &bytes, Some(cut), *expected).await;
        }
    }
    // A well-formed head, too.
    let good = fixture.bytes("\r\nGET /livez HTTP/1.1\r\nHost: a\r\nX: \u{e4}\r\n\r\n", "");
    for cut in 0..good.len() {
        fixture.check("a well-formed head", &good, Some(cut), Answered(200)).await;
    }
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn oversized_heads_are_rejected_before_they_are_complete() {
    let mut fixture = Fixture::start().await;
    let long = "x".repeat(40_000);
    for (what, text, expected) in [
        ("a long target", format!("GET /{long} HTTP/1.1\r\nHost: a\r\n\r\n"), TARGET_TOO_LONG),
        ("a target without end", format!("GET /{long}"), TARGET_TOO_LONG),
        ("a long value", format!("GET / HTTP/1.1\r\nHost: a\r\nX: {long}\r\n\r\n"), TOO_LARGE),
        ("a long name", format!("GET / HTTP/1.1\r\nHost: a\r\n{long}: x\r\n\r\n"), TOO_LARGE),
        ("a long method", format!("{long} / HTTP/1.1\r\nHost: a\r\n\r\n"), TOO_LARGE),
        ("many fields", format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "A: b\r\n".repeat(101)), TOO_LARGE),
        ("a line without end", long.clone(), TOO_LARGE),
    ] {
        fixture.check(what, text.as_bytes(), None, expected).await;
    }
    let most = format!("GET /livez HTTP/1.1\r\nHost: a\r\n{}\r\n", "A: b\r\n".repeat(99));
    fixture.check("the maximum number of fields", most.as_bytes(), None, Answered(200)).await;
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_bodies_end_the_connection_and_run_nothing() {
    let mut fixture = Fixture::start().await;
    for (what, body, expected) in BODIES {
        // The bytes after the body would delete the function, if they were taken for a request.
        let head = "POST {P} HTTP/1.1\r\nHost: a\r\n{K}Content-Type: application/json\r\n\
                    Transfer-Encoding: chunked\r\n\r\n";
        let smuggled = format!("DELETE /functions/{HELLO} HTTP/1.1\r\nHost: a\r\n{{K}}\r\n");
        let follows = if *expected == Closed { "" } else { &smuggled };
        let bytes = fixture.bytes(&format!("{head}{body}{follows}"), "/run");
        let expected = if *expected == Closed { BODY } else { *expected };
        fixture.check(what, &bytes, None, expected).await;
    }
    let short =
        fixture.bytes("POST /run HTTP/1.1\r\nHost: a\r\n{K}Content-Length: 100\r\n\r\n{\"functionId\":", "");
    fixture.check("a body shorter than its length", &short, None, BODY).await;
    fixture.gateway().run(HELLO, &json!(1)).send().await.expect(200);
    assert_eq!(fixture.upstream.requests().len(), fixture.expected);
    fixture.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_bodies_never_reach_an_upstream_as_a_whole() {
    let mut fixture = Fixture::start().await;
    for (what, body, _) in BODIES {
        let head = "POST {P} HTTP/1.1\r\nHost: a\r\n{K}Transfer-Encoding: chunked\r\n\r\n";
        let bytes = fixture.bytes(&format!("{head}{body}"), "/up/bad");
        let mut conn = fixture.open().await;
        let _ = conn.write(&bytes).await;
        conn.end().await;
        if let Ok(answer) = within(what, SOON, conn.answer(false)).await {
            answer.expect_problem(400);
        }
        let bad = |m: &crate::harness::http::Message| m.start.contains("/up/bad");
        let seen = fixture.upstream.requests().iter().filter(|message| bad(message)).count();
        assert_eq!(seen, 0, "{what}: the upstream has received a complete request");
        fixture.check_next(what).await;
    }
    fixture.finish().await;
}

/// Slow clients are answered 408, and do not block others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_heads_and_bodies_time_out() {
    const TIMEOUT_S: u64 = 3;
    let fixture = Fixture::start_with_timeouts(TIMEOUT_S).await;
    let head = fixture.bytes("GET /livez HTTP/1.1\r\nHost: a\r\nX: ", "");
    let body = fixture.bytes("POST /run HTTP/1.1\r\nHost: a\r\n{K}Content-Length: 1000\r\n\r\n", "");
    for (what, begin, code) in [("a head", head, "header_timeout"), ("a body", body, "body_timeout")] {
        // Before the gateway starts its timer.
        let begun = Instant::now();
        let mut conn = fixture.open().await;
        conn.write(&begin).await.expect("the gateway reads");
        // One byte at a time, until there is an answer. A timeout of single reads would never fire.
        let has_answer =
            async |conn: &mut Conn| timeout(Duration::from_millis(300), conn.is_closed()).await.is_ok();
        while conn.write(b"x").await.is_ok() && !has_answer(&mut conn).await {
            assert!(begun.elapsed() < SOON, "{what} has no deadline");
            fixture.gateway().get("/livez").await.expect(200);
        }
        let answer = within(what, SOON, conn.answer(false)).await.expect("an answer with the reason");
        assert_eq!(answer.expect_problem(408).json()["code"], code);
        assert!(begun.elapsed() >= Duration::from_secs(TIMEOUT_S), "{what} timed out early");
        assert!(within(what, SOON, conn.is_closed()).await);
    }
    // An idle connection is closed, too.
    let mut idle = fixture.open().await;
    assert!(within("the end of an idle connection", SOON, idle.is_closed()).await);
    fixture.finish().await;
}

/// How long the gateway reads on after a rejection.
const LINGERS: Duration = Duration::from_secs(2);

/// A rejected client reads the reason, even if it still has much to send.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_is_still_sending_reads_its_rejection() {
    let fixture = Fixture::start().await;
    let part = vec![b'x'; 64 << 10];
    let chunk = [format!("{:x}\r\n", part.len()).as_bytes(), &part, b"\r\n"].concat();
    for (path, key, status) in [
        ("/run", true, 413),
        ("/run", false, 401),
        ("/up/x", false, 401),
        ("/up/x", true, 413),
        ("/gone/x", true, 503),
        ("/nothing", true, 404),
    ] {
        let key = if key { "{K}" } else { "" };
        for (framing, part) in [("Content-Length: 4194304", &part), ("Transfer-Encoding: chunked", &chunk)] {
            let label = format!("{path} {status}, {framing}");
            let head = format!("POST {path} HTTP/1.1\r\nHost: a\r\n{key}{framing}\r\n\r\n");
            eventually(&label, SOON, || async {
                let begun = Instant::now();
                let mut conn = fixture.open().await;
                let refused = async {
                    conn.write(&fixture.bytes(&head, "")).await?;
                    // Many clients stop at the first failed write, and some systems discard what they have
                    // received.
                    for _ in 0..64 {
                        conn.write(part).await?;
                    }
                    conn.answer(false).await
                };
                match refused.await {
                    Ok(answer) => drop(answer.expect_problem(status)),
                    // On a busy machine a client may need longer than the gateway lingers.
                    Err(e) if begun.elapsed() >= LINGERS => return Err(e.to_string()),
                    Err(e) => panic!("{label}: closed after {:?}: {e}", begun.elapsed()),
                }
                Ok(())
            })
            .await;
        }
    }
    fixture.finish().await;
}

/// The connection of a client that reads no answers is closed after the write timeout.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_read_is_disconnected() {
    const WRITE_TIMEOUT_S: u64 = 1;
    // No other timeout can end the connection.
    let server = format!(
        "[http]\nwrite_timeout_s = {WRITE_TIMEOUT_S}\nheader_timeout_s = 3600\nbody_timeout_s = 3600\n\
         keepalive_s = 3600\n"
    );
    let platform = Setup::new(Backend::Dev).conf(Conf { server, ..Conf::default() }).start().await;
    let gateway = &platform.gateway;
    let mut conn = Conn::open(gateway.addr()).await.expect("the gateway accepts connections");
    // Before the gateway starts its timer.
    let begun = Instant::now();
    // More answers than the buffers of both sockets hold.
    let many = gateway.anonymous("GET", "/openapi.json").to_bytes().repeat(500);
    conn.write(&many).await.expect("the gateway reads");
    // The connection of the metrics request is the only one left.
    gateway.wait_for_metric("infra_connections", 1.0).await;
    assert!(begun.elapsed() >= Duration::from_secs(WRITE_TIMEOUT_S), "closed after {:?}", begun.elapsed());
    assert_eq!(conn.bytes(12).await.expect("it was served before"), b"HTTP/1.1 200");
    platform.finish().await;
}

/// Clients beyond the cap are rejected. Health checks and metrics are answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_are_capped_except_for_health_checks() {
    let conf = Conf { server: "[http]\nconnections_max = 20\n".into(), ..Conf::default() };
    let platform = Setup::new(Backend::Dev).conf(conf).start().await;
    let gateway = &platform.gateway;
    let mut held = Vec::new();
    for _ in 0..20 {
        let mut conn = Conn::open(gateway.addr()).await.expect("the gateway accepts connections");
        conn.write(&gateway.anonymous("GET", "/livez").to_bytes()).await.expect("the gateway reads");
        conn.answer(false).await.expect("an answer").expect(200);
        held.push(conn);
    }
    for _ in 0..3 {
        let mut conn = Conn::open(gateway.addr()).await.expect("the gateway accepts connections");
        conn.write(&gateway.run(HELLO, &json!(1)).to_bytes()).await.expect("the gateway reads");
        let refused = within("the rejection", SOON, conn.answer(false)).await.expect("an answer");
        assert_eq!(refused.expect_problem(503).json()["code"], "too_many_connections");
        for target in ["/health", "/livez", "/readyz", "/metrics"] {
            gateway.anonymous("GET", target).send().await.expect(200);
        }
    }
    drop(held);
    eventually("a free connection", SOON, || async {
        let answer = gateway.run(HELLO, &json!(1)).header("x-async", "true").send().await;
        if answer.status == 202 { Ok(()) } else { Err(answer.text()) }
    })
    .await;
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_of_one_address_are_capped() {
    let server = "[http]\nconnections_per_address_max = 3\n";
    let conf = Conf { server: server.into(), ..Conf::default() };
    let platform = Setup::new(Backend::Dev).conf(conf).start().await;
    let gateway = &platform.gateway;
    eventually("no connections of the harness", SOON, || async {
        let mut held = Vec::new();
        for _ in 0..3 {
            let mut conn = Conn::open(gateway.addr()).await.map_err(|e| e.to_string())?;
            conn.write(&gateway.request("GET", "/functions").to_bytes()).await.map_err(|e| e.to_string())?;
            let answer = conn.answer(false).await.map_err(|e| e.to_string())?;
            if answer.status != 200 {
                return Err(answer.text());
            }
            held.push(conn);
        }
        let refused = gateway.request("GET", "/functions").try_send().await.map_err(|e| e.to_string())?;
        assert_eq!(refused.status, 503);
        Ok(())
    })
    .await;
    // Trusted proxies are exempt: they carry the requests of many clients.
    std::fs::write(
        platform.conf_file("server.toml"),
        format!("{server}trusted_proxies = [\"127.0.0.0/8\"]\n"),
    )
    .expect("writable");
    eventually("no cap for the proxy", SOON, || async {
        let conns = futures_util::future::join_all((0..10).map(|_| Conn::open(gateway.addr()))).await;
        let mut open = 0;
        for conn in conns {
            let Ok(mut conn) = conn else { continue };
            let _ = conn.write(&gateway.request("GET", "/functions").to_bytes()).await;
            open += usize::from(conn.answer(false).await.is_ok_and(|answer| answer.status == 200));
        }
        if open == 10 { Ok(()) } else { Err(open.to_string()) }
    })
    .await;
    platform.finish().await;
}
