//! What no client should send, as bytes on a socket. Each has the documented answer or a clean end; whoever connects next is served;
//! and nothing of it reaches a service behind the gateway, or does once if it is a request after all.

use crate::harness::gateway::Conf;
use crate::harness::http::Conn;
use crate::harness::platform::Backend;
use crate::harness::platform::HELLO;
use crate::harness::upstream::Upstream;
use crate::harness::{Gateway, Platform, SOON, Setup, eventually, within};
use serde_json::json;
use std::time::Duration;
use tokio::time::Instant;

/// What is to come of some bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Then {
    /// This status and this code, and the end of the connection.
    Refused(u16, &'static str),
    /// No answer, but the end of the connection.
    Closed,
    /// This status.
    Answered(u16),
}

use Then::{Answered, Closed, Refused};

const MALFORMED: Then = Refused(400, "malformed_header");
const FRAMING: Then = Refused(400, "bad_framing");
const TOO_LARGE: Then = Refused(431, "header_too_large");
const TARGET_TOO_LONG: Then = Refused(414, "target_too_long");
const CODING: Then = Refused(501, "unsupported_transfer_coding");
const VERSION: Then = Refused(505, "version_not_supported");
const BODY: Then = Refused(400, "body_broken");

/// (what, the bytes; `{P}` stands for the path, `{K}` for the key, what then)
const HEADS: &[(&str, &str, Then)] = &[
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
        "POST {P} HTTP/1.1\r\nHost: a\r\n{K}Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
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

/// Bodies whose heads are well-formed. What the gateway answers to the part before the fault does not count: the
/// connection ends, and no byte of the rest is taken for a request.
const BODIES: &[(&str, &str, Then)] = &[
    ("a chunk without a size", "\r\nhello\r\n0\r\n\r\n", BODY),
    ("a chunk with a sign", "+5\r\nhello\r\n0\r\n\r\n", BODY),
    ("a chunk with 0x", "0x5\r\nhello\r\n0\r\n\r\n", BODY),
    ("a chunk with a blank", "5 \r\nhello\r\n0\r\n\r\n", BODY),
    ("a chunk with a bare line feed", "5\nhello\r\n0\r\n\r\n", BODY),
    ("a chunk that is longer than it says", "4\r\nhello\r\n0\r\n\r\n", BODY),
    ("a chunk whose size overflows", "fffffffffffffffff\r\nhello\r\n0\r\n\r\n", BODY),
    ("an extension without end", "5;{LONG}\r\nhello\r\n0\r\n\r\n", BODY),
    ("an extension with a bare line feed", "5;a\nb\r\nhello\r\n0\r\n\r\n", BODY),
    ("a trailer without end", "0\r\nX: {LONG}{LONG}{LONG}{LONG}{LONG}\r\n\r\n", BODY),
    ("a folded trailer", "0\r\nX: a\r\n b\r\n\r\n", BODY),
    ("chunks that break off", "5\r\nhel", Closed),
    ("chunks without their end", "5\r\nhello\r\n", Closed),
];

struct Bench {
    platform: Platform,
    upstream: Upstream,
    /// Requests that the upstream should have seen.
    expected: usize,
}

impl Bench {
    async fn start(backend: Backend) -> Self {
        let upstream = Upstream::start().await;
        let gone = Upstream::start().await.addr();
        let conf = Conf {
            server: "[http]\nheader_timeout_s = 3\nbody_timeout_s = 3\n[auth]\nfailures_burst = 1000\n"
                .into(),
            upstreams: format!(
                "[[upstream]]\nname = \"up\"\nprefix = \"/up\"\naddresses = [\"{}\"]\nscope = \"read\"\nbody_bytes_max = 100000\n\
                 [[upstream]]\nname = \"gone\"\nprefix = \"/gone\"\naddresses = [\"{gone}\"]\nscope = \"read\"\n",
                upstream.addr()
            ),
            ..Conf::default()
        };
        let platform = Setup::new(backend).conf(conf).start().await;
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
        Conn::open(self.gateway().addr()).await.expect("the gateway takes connections")
    }

    /// Sends it in one piece, or in two, and says no more; then looks at what comes.
    async fn try_out(&mut self, what: &str, bytes: &[u8], cut: Option<usize>, then: Then) {
        let mut conn = self.open().await;
        let (first, second) = bytes.split_at(cut.unwrap_or(bytes.len()));
        // It may have been refused already.
        let _ = conn.write(first).await;
        if cut.is_some() {
            tokio::task::yield_now().await;
            let _ = conn.write(second).await;
        }
        if then == Closed || matches!(then, Refused(400, "body_broken")) {
            conn.end().await;
        }
        let told = format!("{what}, cut at {cut:?}");
        let answer = within(&told, SOON, conn.answer(false)).await;
        match (then, answer) {
            (Refused(status, code), Ok(answer)) => {
                assert_eq!(answer.status, status, "{told}: {}", answer.text());
                assert_eq!(answer.need("connection"), "close", "{told}");
                assert_eq!(answer.expect_problem(status).json()["code"], code, "{told}");
                assert!(within(&told, SOON, conn.is_closed()).await, "{told}: something follows");
            }
            (Answered(status), Ok(answer)) => assert_eq!(answer.status, status, "{told}: {}", answer.text()),
            (Closed, Err(e)) => assert_eq!(e.kind(), std::io::ErrorKind::UnexpectedEof, "{told}"),
            (then, answer) => panic!("{told} is to come to {then:?}, and comes to {answer:?}"),
        }
        self.next_is_served(&told).await;
    }

    async fn next_is_served(&mut self, told: &str) {
        let next = self.gateway().beyond("GET", "/up/next").send().await;
        assert_eq!(next.status, 200, "the next after {told}");
        self.expected += 1;
        assert_eq!(self.upstream.requests().len(), self.expected, "{told}: seen by the upstream");
    }

    async fn finish(self) {
        self.platform.finish().await;
    }
}

/// Each on a route of ours and on one that is passed on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_heads_are_refused() {
    let mut bench = Bench::start(Backend::Dev).await;
    for (what, text, then) in HEADS {
        for path in ["/run", "/up/x"] {
            let bytes = bench.bytes(text, path);
            bench.try_out(what, &bytes, None, *then).await;
        }
    }
    bench.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_heads_are_refused_wherever_they_are_cut() {
    let mut bench = Bench::start(Backend::Dev).await;
    for what in ["length and chunks", "a folded line", "NUL in a name", "bare line feeds", "two Hosts"] {
        let (_, text, then) = HEADS.iter().find(|(name, ..)| *name == what).expect("it is in the table");
        let bytes = bench.bytes(text, "/up/x");
        for cut in 0..bytes.len() {
            bench.try_out(what, &bytes, Some(cut), *then).await;
        }
    }
    // A good one, too.
    let good = bench.bytes("\r\nGET /livez HTTP/1.1\r\nHost: a\r\nX: \u{e4}\r\n\r\n", "");
    for cut in 0..good.len() {
        bench.try_out("a good head", &good, Some(cut), Answered(200)).await;
    }
    bench.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn huge_heads_are_refused_before_they_are_whole() {
    let mut bench = Bench::start(Backend::Dev).await;
    let long = "x".repeat(40_000);
    for (what, text, then) in [
        ("a long target", format!("GET /{long} HTTP/1.1\r\nHost: a\r\n\r\n"), TARGET_TOO_LONG),
        ("a target without end", format!("GET /{long}"), TARGET_TOO_LONG),
        ("a long value", format!("GET / HTTP/1.1\r\nHost: a\r\nX: {long}\r\n\r\n"), TOO_LARGE),
        ("a long name", format!("GET / HTTP/1.1\r\nHost: a\r\n{long}: x\r\n\r\n"), TOO_LARGE),
        ("a long method", format!("{long} / HTTP/1.1\r\nHost: a\r\n\r\n"), TOO_LARGE),
        ("many fields", format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "A: b\r\n".repeat(101)), TOO_LARGE),
        ("a line without end", long.clone(), TOO_LARGE),
    ] {
        bench.try_out(what, text.as_bytes(), None, then).await;
    }
    let most = format!("GET /livez HTTP/1.1\r\nHost: a\r\n{}\r\n", "A: b\r\n".repeat(99));
    bench.try_out("as many fields as may be", most.as_bytes(), None, Answered(200)).await;
    bench.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_bodies_end_the_connection_and_run_nothing() {
    let mut bench = Bench::start(Backend::Dev).await;
    for (what, body, then) in BODIES {
        // What follows would delete the function, if it were taken for a request.
        let head = "POST {P} HTTP/1.1\r\nHost: a\r\n{K}Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n";
        let smuggled = format!("DELETE /functions/{HELLO} HTTP/1.1\r\nHost: a\r\n{{K}}\r\n");
        let follows = if *then == Closed { "" } else { &smuggled };
        let bytes = bench.bytes(&format!("{head}{body}{follows}"), "/run");
        let then = if *then == Closed { BODY } else { *then };
        bench.try_out(what, &bytes, None, then).await;
    }
    let short =
        bench.bytes("POST /run HTTP/1.1\r\nHost: a\r\n{K}Content-Length: 100\r\n\r\n{\"functionId\":", "");
    bench.try_out("a body shorter than its length", &short, None, BODY).await;
    bench.gateway().run(HELLO, &json!(1)).send().await.expect(200);
    assert_eq!(bench.upstream.requests().len(), bench.expected);
    bench.finish().await;
}

/// The upstream sees a request at most once, whatever becomes of its body.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_bodies_reach_an_upstream_once_at_most() {
    let mut bench = Bench::start(Backend::Dev).await;
    for (what, body, _) in BODIES {
        let head = "POST {P} HTTP/1.1\r\nHost: a\r\n{K}Transfer-Encoding: chunked\r\n\r\n";
        let bytes = bench.bytes(&format!("{head}{body}"), "/up/bad");
        let mut conn = bench.open().await;
        let _ = conn.write(&bytes).await;
        conn.end().await;
        if let Ok(answer) = within(what, SOON, conn.answer(false)).await {
            answer.expect_problem(400);
        }
        let bad = |m: &crate::harness::http::Message| m.start.contains("/up/bad");
        let seen = bench.upstream.requests().iter().filter(|message| bad(message)).count();
        assert_eq!(seen, 0, "{what}: the upstream was given a whole request");
        bench.next_is_served(what).await;
    }
    bench.finish().await;
}

/// Slow ones are told so, and do not hold others up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_too_slowly_is_refused() {
    let bench = Bench::start(Backend::Dev).await;
    let head = bench.bytes("GET /livez HTTP/1.1\r\nHost: a\r\nX: ", "");
    let body = bench.bytes("POST /run HTTP/1.1\r\nHost: a\r\n{K}Content-Length: 1000\r\n\r\n", "");
    for (what, begin, code) in [("a head", head, "header_timeout"), ("a body", body, "body_timeout")] {
        // Before the gateway can begin to count.
        let begun = Instant::now();
        let mut conn = bench.open().await;
        conn.write(&begin).await.expect("the gateway reads");
        // A byte now and then, which no timeout of a single read would mind.
        while begun.elapsed() < Duration::from_secs(6) && conn.write(b"x").await.is_ok() {
            bench.gateway().get("/livez").await.expect(200);
            if tokio::time::timeout(Duration::from_millis(300), conn.is_closed()).await.is_ok() {
                break;
            }
        }
        let answer = within(what, SOON, conn.answer(false)).await.expect("it is told why");
        assert_eq!(answer.expect_problem(408).json()["code"], code);
        assert!(begun.elapsed() >= Duration::from_secs(3), "{what} has its time");
        assert!(within(what, SOON, conn.is_closed()).await);
    }
    // One that says nothing is closed, too.
    let mut silent = bench.open().await;
    assert!(within("the end of a silent connection", SOON, silent.is_closed()).await);
    bench.finish().await;
}

/// Who is refused with much still to send reads why.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_is_read_by_one_who_is_still_sending() {
    let bench = Bench::start(Backend::Dev).await;
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
            let told = format!("{path} {status}, {framing}");
            let head = format!("POST {path} HTTP/1.1\r\nHost: a\r\n{key}{framing}\r\n\r\n");
            let mut conn = bench.open().await;
            conn.write(&bench.bytes(&head, "")).await.expect("the gateway reads");
            // Many clients stop at the first write that fails, and some systems then forget what was to be read.
            for _ in 0..64 {
                conn.write(part).await.unwrap_or_else(|e| panic!("{told}: cut off while it sends: {e}"));
            }
            let answer = within(&told, SOON, conn.answer(false)).await.expect("it is told why");
            answer.expect_problem(status);
        }
    }
    bench.finish().await;
}

/// Who takes nothing of its answers is not waited for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_not_read_is_let_go() {
    let conf = Conf { server: "[http]\nwrite_timeout_s = 1\n".into(), ..Conf::default() };
    let platform = Setup::new(Backend::Dev).conf(conf).start().await;
    let gateway = &platform.gateway;
    let mut conn = Conn::open(gateway.addr()).await.expect("the gateway takes connections");
    // More than the kernel keeps on both sides.
    let many = gateway.anonymous("GET", "/openapi.json").to_bytes().repeat(500);
    conn.write(&many).await.expect("the gateway reads");
    let others = || async {
        let open = gateway.metric("infra_connections").await.unwrap_or_default();
        if open <= 1.0 { Ok(()) } else { Err(open.to_string()) }
    };
    assert!(others().await.is_err(), "it is served for now");
    eventually("the end of the connection", SOON, others).await;
    drop(conn);
    platform.finish().await;
}

/// Beyond the cap there is an answer, and whoever looks after the process is served.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_have_a_cap() {
    let conf = Conf { server: "[http]\nconnections_max = 20\n".into(), ..Conf::default() };
    let platform = Setup::new(Backend::Dev).conf(conf).start().await;
    let gateway = &platform.gateway;
    let mut held = Vec::new();
    for _ in 0..20 {
        let mut conn = Conn::open(gateway.addr()).await.expect("the gateway takes connections");
        conn.write(&gateway.anonymous("GET", "/livez").to_bytes()).await.expect("the gateway reads");
        conn.answer(false).await.expect("an answer").expect(200);
        held.push(conn);
    }
    for _ in 0..3 {
        let mut conn = Conn::open(gateway.addr()).await.expect("the gateway takes connections");
        conn.write(&gateway.run(HELLO, &json!(1)).to_bytes()).await.expect("the gateway reads");
        let refused = within("the refusal", SOON, conn.answer(false)).await.expect("an answer");
        assert_eq!(refused.expect_problem(503).json()["code"], "too_many_connections");
        for target in ["/health", "/livez", "/readyz", "/metrics"] {
            gateway.anonymous("GET", target).send().await.expect(200);
        }
    }
    drop(held);
    eventually("room", SOON, || async {
        let answer = gateway.run(HELLO, &json!(1)).header("x-async", "true").send().await;
        if answer.status == 202 { Ok(()) } else { Err(answer.text()) }
    })
    .await;
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_address_may_have_a_cap_of_its_own() {
    let server = "[http]\nconnections_per_address_max = 3\n";
    let conf = Conf { server: server.into(), ..Conf::default() };
    let platform = Setup::new(Backend::Dev).conf(conf).start().await;
    let gateway = &platform.gateway;
    eventually("the harness has let go", SOON, || async {
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
    // The proxies that are trusted carry everybody's requests.
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
