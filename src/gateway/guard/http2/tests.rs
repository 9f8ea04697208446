use super::super::head::HeadRejection;
use super::super::hpack::{Field, put_field};
use super::request::*;
use super::*;
use http::header::HeaderMap;

const LIMITS: HeadLimits = HeadLimits { bytes_max: 1024, fields_max: 8 };

/// The fields of a valid request.
const GOOD: [(&str, &str); 4] =
    [(":method", "POST"), (":scheme", "https"), (":authority", "a.test"), (":path", "/run?x")];

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = BytesMut::new();
    put_frame_head(&mut bytes, payload.len(), kind, flags, stream);
    [&bytes[..], payload].concat()
}

fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = BytesMut::new();
    for (name, value) in fields {
        put_field(&mut block, Field { name: name.as_bytes(), value: value.as_bytes(), name_index: 0 });
    }
    block.to_vec()
}

/// The bytes that the server receives. The same for each way to cut the client's bytes into pieces.
fn handed_on(sent: &[u8]) -> Vec<u8> {
    let mut all = Vec::new();
    for pieces in [sent.len().max(1), 7, 1] {
        let (mut frames, mut received, mut seen) = (ClientFrames::new(LIMITS), BytesMut::new(), Vec::new());
        'all: for piece in sent.chunks(pieces) {
            received.extend_from_slice(piece);
            loop {
                match frames.next(&mut received) {
                    NextFrame::AsIs(bytes) => {
                        seen.extend_from_slice(&received.split_to(bytes));
                        frames.passed(bytes);
                    }
                    NextFrame::Rewritten => seen.extend_from_slice(&frames.rewritten().split()),
                    NextFrame::Incomplete => break,
                    NextFrame::Over => break 'all,
                }
            }
        }
        if pieces == sent.len().max(1) {
            all = seen;
        } else {
            assert_eq!(seen, all, "the result differs in pieces of {pieces}");
        }
    }
    all
}

/// The frames handed on: kind, flags, stream, and the fields of a header block.
fn read(mut bytes: &[u8]) -> Vec<(u8, u8, u32, Vec<String>)> {
    bytes = bytes.strip_prefix(PREFACE).expect("the preface is handed on");
    let mut read = Vec::new();
    while let Some(head) = FrameHead::read(bytes) {
        let payload = &bytes[FRAME_HEAD_BYTES..FRAME_HEAD_BYTES + head.len];
        let mut fields = Vec::new();
        if head.kind == HEADERS {
            let each = |Field { name, value, .. }: Field<'_>| {
                let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
                fields.push(format!("{}: {}", text(name), text(value)));
            };
            HpackDecoder::default().decode(payload, each).expect("no dynamic table");
        }
        read.push((head.kind, head.flags, head.stream, fields));
        bytes = &bytes[FRAME_HEAD_BYTES + head.len..];
    }
    assert!(bytes.is_empty());
    read
}

fn with_preface(frames: &[Vec<u8>]) -> Vec<u8> {
    [PREFACE, &frames.concat()].concat()
}

/// The fields that the server receives of one request, or the reason for its rejection.
fn request(fields: &[(&str, &str)]) -> Result<Vec<String>, HeadRejection> {
    let sent = with_preface(&[frame(HEADERS, END_HEADERS | END_STREAM, 1, &block(fields))]);
    let mut frames = read(&handed_on(&sent));
    assert_eq!(frames.len(), 1);
    let (kind, flags, stream, fields) = frames.remove(0);
    assert_eq!((kind, flags, stream), (HEADERS, END_HEADERS | END_STREAM, 1));
    let marked = fields.iter().find_map(|field| field.strip_prefix("x-infra-refused: ").map(str::to_owned));
    let Some(mark) = marked else { return Ok(fields) };
    let mut map = HeaderMap::new();
    map.insert(MARK, mark.parse().unwrap());
    Err(refusal_of(&map).expect("a known reason"))
}

/// A valid request with one value replaced or removed, and further fields appended.
fn changed(
    name: &str,
    value: Option<&'static str>,
    more: &[(&'static str, &'static str)],
) -> Vec<(String, String)> {
    let mut fields = Vec::new();
    for (known, good) in GOOD {
        let value = if known == name { value } else { Some(good) };
        fields.extend(value.map(|value| (known.to_owned(), value.to_owned())));
    }
    fields.extend(more.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
    fields
}

fn outcome(fields: &[(String, String)]) -> Result<Vec<String>, HeadRejection> {
    let fields: Vec<(&str, &str)> = fields.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
    request(&fields)
}

#[test]
fn valid_requests_are_handed_on() {
    let expected = [":method: POST", ":scheme: https", ":authority: a.test", ":path: /run?x"];
    assert_eq!(request(&GOOD).unwrap(), expected);
    for (more, then) in [
        (&[("x-a", "1"), ("x-a", " 2 ")][..], &["x-a: 1", "x-a: 2"][..]),
        (&[("host", "A.test:443"), ("te", "Trailers")], &[]),
        (&[("cookie", "a=1"), ("x-b", "2"), ("cookie", "c=3; d=4")], &["x-b: 2", "cookie: a=1; c=3; d=4"]),
        (&[("content-length", "12"), ("expect", "100-Continue")], &["content-length: 12"]),
        (&[("x-infra-refused", "3"), ("x-c", "")], &["x-c: "]),
    ] {
        let read = outcome(&changed("", None, more)).unwrap();
        assert_eq!(read[4..], *then, "{more:?}");
    }
    // `Host` replaces a missing `:authority`.
    let read = outcome(&changed(":authority", None, &[("host", "b.test:8443")])).unwrap();
    assert_eq!(read[2..], [":authority: b.test:8443", ":path: /run?x"]);
    let star = [(":method", "OPTIONS"), (":scheme", "https"), (":authority", "a"), (":path", "*")];
    assert_eq!(request(&star).unwrap()[3], ":path: *");
}

/// (field to replace, its value, further fields; the reason for the rejection)
type BadRequest =
    (&'static str, Option<&'static str>, &'static [(&'static str, &'static str)], HeadRejection);

const BAD_REQUESTS: &[BadRequest] = &[
    (":method", None, &[], METHOD),
    (":method", Some(""), &[], METHOD),
    (":method", Some("G T"), &[], METHOD),
    (":method", Some("CONNECT"), &[], HeadRejection::Connect),
    (":scheme", None, &[], SCHEME),
    (":scheme", Some("ftp"), &[], SCHEME),
    (":path", None, &[], TARGET),
    (":path", Some(""), &[], TARGET),
    (":path", Some("run"), &[], TARGET),
    (":path", Some("*"), &[], TARGET),
    (":path", Some("/run#x"), &[], TARGET),
    (":path", Some("/#"), &[], TARGET),
    (":path", Some("/a b"), &[], TARGET),
    (":path", Some("/run "), &[], TARGET),
    (":path", Some("/a\r\nX: y"), &[], TARGET),
    (":path", Some("https://b.test/run"), &[], TARGET),
    (":authority", None, &[], AUTHORITY),
    (":authority", None, &[("host", "")], AUTHORITY),
    (":authority", None, &[("host", "u@a.test")], AUTHORITY),
    (":authority", Some(""), &[], AUTHORITY),
    (":authority", Some(""), &[("host", "a.test")], AUTHORITY),
    (":authority", Some("u@a.test"), &[], AUTHORITY),
    (":authority", Some("u:p@a.test"), &[("host", "u:p@a.test")], AUTHORITY),
    (":authority", Some("a.test/x"), &[], AUTHORITY),
    (":authority", Some("a test"), &[], AUTHORITY),
    (":authority", Some("a:b:c"), &[], AUTHORITY),
    (":authority", Some("a:99999"), &[], AUTHORITY),
    ("", None, &[("host", "b.test")], HOST),
    ("", None, &[("host", "a.test:80")], HOST),
    ("", None, &[("host", "a.test"), ("host", "a.test")], HOST),
    ("", None, &[("X-Capital", "1")], NAME),
    ("", None, &[("", "1")], NAME),
    ("", None, &[("a b", "1")], NAME),
    ("", None, &[("x", "a\nb")], VALUE),
    ("", None, &[("x", "a\0b")], VALUE),
    ("", None, &[("connection", "close")], OF_CONNECTION),
    ("", None, &[("transfer-encoding", "chunked")], OF_CONNECTION),
    ("", None, &[("upgrade", "websocket")], OF_CONNECTION),
    ("", None, &[("te", "gzip")], OF_CONNECTION),
    ("", None, &[(":protocol", "websocket")], PSEUDO),
    ("", None, &[(":status", "200")], PSEUDO),
    ("", None, &[("x", "1"), (":path", "/")], PSEUDO),
    ("", None, &[(":method", "POST")], METHOD),
    ("", None, &[(":authority", "a.test")], AUTHORITY),
    ("", None, &[(":path", "/run?x")], TARGET),
    ("", None, &[("content-length", "1"), ("content-length", "1")], LENGTH_TWICE),
    ("", None, &[("content-length", "+1")], LENGTH),
    ("", None, &[("content-length", "1, 1")], LENGTH),
    ("", None, &[("expect", "200-maybe")], HeadRejection::Expectation),
    ("", None, &[("x", "1"); 9], HeadRejection::TooLarge),
];

#[test]
fn malformed_requests_are_marked() {
    for (name, value, more, expected) in BAD_REQUESTS {
        assert_eq!(outcome(&changed(name, *value, more)), Err(*expected), "{name:?} {value:?} {more:?}");
    }
    let long: &'static str = "x".repeat(1000).leak();
    assert_eq!(outcome(&changed("", None, &[("x", long)])), Err(HeadRejection::TooLarge));
    assert_eq!(outcome(&changed(":path", Some(long), &[])), Err(HeadRejection::TargetTooLong));
    let head = [(":method", "HEAD"), (":scheme", "https"), (":path", "/")];
    let sent = with_preface(&[frame(HEADERS, END_HEADERS, 1, &block(&head))]);
    let read = read(&handed_on(&sent));
    assert_eq!((read[0].1, read[0].3[0].as_str()), (END_HEADERS, ":method: HEAD"), "a body may follow");
    // Fields after the fault are kept if the response needs them, such as the client's request id.
    let more = [("connection", "x"), ("x-b", "1"), ("x-request-id", "mine")];
    let put = [&[(":method", "PUT")], &GOOD[1..], &more].concat();
    let sent = with_preface(&[frame(HEADERS, END_HEADERS, 1, &block(&put))]);
    let fields = self::read(&handed_on(&sent)).remove(0).3;
    assert_eq!(
        (fields[0].as_str(), fields[5..].join(" ")),
        (":method: PUT", "x-request-id: mine".to_owned())
    );
    // Many cookie pairs count as one field.
    let crumbs = [&GOOD[..], &[("cookie", "a=1"); 20]].concat();
    assert!(request(&crumbs).is_ok());
}

/// Other frames pass unchanged, fragments of a block are joined, and rejected requests update the dynamic
/// table.
#[test]
fn frames_pass_and_blocks_are_rewritten() {
    let good = block(&GOOD);
    let padded = [&[3, 0, 0, 0, 0, 9][..], &good, &[0; 3]].concat();
    // Adds `x-t: v` to the dynamic table, then refers to it by its index.
    let indexed = [&good[..], &[0x40, 3], b"x-t", &[1], b"v"].concat();
    let again = [&good[..], &[0x80 | 62]].concat();
    let bad = [&[0x40, 3], &b"x-t"[..], &[1], b"v", &[0x82]].concat();
    let sent = with_preface(&[
        frame(4, 0, 0, &[]),
        frame(HEADERS, PADDED | PRIORITY, 1, &padded),
        frame(CONTINUATION, 0, 1, &[]),
        frame(CONTINUATION, END_HEADERS, 1, &[0x40, 1, b'y', 1, b'z']),
        frame(0, 0, 1, b"body"),
        frame(HEADERS, END_HEADERS | END_STREAM, 1, &block(&[("x-sum", "1")])),
        frame(HEADERS, END_HEADERS | END_STREAM, 3, &bad),
        frame(HEADERS, END_HEADERS | END_STREAM, 5, &again),
        frame(HEADERS, END_HEADERS | END_STREAM, 7, &indexed),
        frame(8, 0, 0, &[0, 0, 0, 1]),
    ]);
    let read = read(&handed_on(&sent));
    let kinds: Vec<_> = read.iter().map(|(kind, flags, stream, _)| (*kind, *flags, *stream)).collect();
    let whole = END_HEADERS | END_STREAM;
    assert_eq!(
        kinds,
        [
            (4, 0, 0),
            (1, END_HEADERS, 1),
            (0, 0, 1),
            (0, END_STREAM, 1),
            (1, whole, 3),
            (1, whole, 5),
            (1, whole, 7),
            (8, 0, 0)
        ]
    );
    assert_eq!(read[1].3[4..], ["y: z"]);
    assert!(read[4].3[4].starts_with(MARK.as_str()), "{:?}", read[4].3);
    assert_eq!(read[5].3[4..], ["x-t: v"]);
}

/// A client that expects a `100 Continue` gets one if its request is valid.
#[test]
fn expectations_are_answered_with_100_continue() {
    let awaited = [&GOOD[..], &[("expect", "100-continue")]].concat();
    let continued = frame(HEADERS, END_HEADERS, 1, CONTINUE);
    for (fields, flags, expected) in [
        (&awaited[..], END_HEADERS, &continued[..]),
        (&awaited, END_HEADERS | END_STREAM, b""),
        (&GOOD, END_HEADERS, b""),
        (&awaited[1..], END_HEADERS, b""),
    ] {
        let sent = with_preface(&[frame(HEADERS, flags, 1, &block(fields))]);
        let (mut frames, mut received) = (ClientFrames::new(LIMITS), BytesMut::from(&sent[..]));
        assert_eq!(frames.next(&mut received), NextFrame::AsIs(PREFACE.len()));
        received.advance(PREFACE.len());
        frames.passed(PREFACE.len());
        assert_eq!(frames.next(&mut received), NextFrame::Rewritten);
        assert_eq!(frames.owed()[..], *expected, "{fields:?}");
    }
    // After a smaller table size the next block must confirm it, and only the server can do that.
    for (size, is_sent) in [(4095_u32, false), (0, false), (4096, true), (65_536, true)] {
        let settings = [&[0, 3, 0, 0, 0, 9, 0, 1][..], &size.to_be_bytes()].concat();
        let sent =
            [frame(SETTINGS, 0, 0, &settings), frame(HEADERS, END_HEADERS, 1, &block(&awaited))].concat();
        let (mut frames, mut received) = (ClientFrames::new(LIMITS), BytesMut::from(&sent[..]));
        frames.passed(PREFACE.len());
        while let NextFrame::AsIs(bytes) = frames.next(&mut received) {
            received.advance(bytes);
            frames.passed(bytes);
        }
        assert_eq!(frames.owed().is_empty(), !is_sent, "{size}");
    }
}

/// The ends of frames are found for each way to cut the server's writes into pieces.
#[test]
fn ends_of_written_frames_are_tracked() {
    let frames = [
        frame(4, 0, 0, &[]),
        frame(HEADERS, END_HEADERS, 1, &[7; 300]),
        frame(HEADERS, 0, 3, &[7; 30]),
        frame(CONTINUATION, 0, 3, &[7; 30]),
        frame(CONTINUATION, END_HEADERS, 3, &[]),
        frame(0, 1, 1, &[0; 20_000]),
    ];
    // No frame may be inserted between the fragments of a block.
    let ends: Vec<usize> = [1, 2, 5, 6].map(|n| frames[..n].concat().len()).into();
    let all = frames.concat();
    for cut in [1, 5, 9, 10, 309, 400] {
        let (mut written, mut bytes) = (ServerFrameTracker::default(), 0);
        for part in all.chunks(cut) {
            written.follow(part);
            bytes += part.len();
            assert_eq!(written.is_between(), ends.contains(&bytes), "{bytes} in pieces of {cut}");
            let next = bytes + written.bytes_to_boundary();
            assert!(ends.iter().all(|end| *end <= bytes || *end >= next), "{bytes}: {next}");
        }
    }
}

#[test]
fn connection_errors_end_the_connection() {
    let good = block(&GOOD);
    let many = vec![frame(CONTINUATION, 0, 1, &[]); BLOCK_FRAMES_MAX];
    let large: Vec<_> = (0..9).map(|_| frame(CONTINUATION, 0, 1, &[0; 500])).collect();
    for (what, frames) in [
        ("a malformed block", vec![frame(HEADERS, END_HEADERS, 1, &[0x80])]),
        ("an unknown table entry", vec![frame(HEADERS, END_HEADERS, 1, &[0xff, 0])]),
        ("another frame within a block", vec![frame(HEADERS, 0, 1, &good), frame(0, 0, 1, b"x")]),
        ("a block within a block", vec![frame(HEADERS, 0, 1, &good), frame(HEADERS, END_HEADERS, 3, &good)]),
        (
            "a continuation of another stream",
            vec![frame(HEADERS, 0, 1, &good), frame(CONTINUATION, END_HEADERS, 3, &[])],
        ),
        ("a continuation without a block", vec![frame(CONTINUATION, END_HEADERS, 1, &good)]),
        ("padding longer than the payload", vec![frame(HEADERS, END_HEADERS | PADDED, 1, &[9, 0])]),
        ("a truncated priority", vec![frame(HEADERS, END_HEADERS | PRIORITY, 1, &[0, 0])]),
        ("too many frames", [vec![frame(HEADERS, 0, 1, &good)], many].concat()),
        ("a block too long", [vec![frame(HEADERS, 0, 1, &good)], large].concat()),
    ] {
        let seen = handed_on(&with_preface(&[frames, vec![frame(6, 0, 0, &[0; 8])]].concat()));
        assert_eq!(seen[PREFACE.len()..], frame(HEADERS, END_HEADERS, 0, &[]), "{what}");
    }
}

/// The server receives only the head of a frame that is too long, and reports a frame size error.
#[test]
fn frames_that_are_too_long_end_the_connection() {
    let long = frame(HEADERS, END_HEADERS, 1, &vec![0; PAYLOAD_BYTES_MAX + 1]);
    let seen = handed_on(&with_preface(&[long.clone(), frame(6, 0, 0, &[0; 8])]));
    assert_eq!(seen[PREFACE.len()..], long[..FRAME_HEAD_BYTES]);
}

/// For any input, the blocks handed on can be decoded without a dynamic table.
#[test]
fn fuzz_http2_clients() {
    crate::fuzz::run("http2_client", |input| {
        let seen = handed_on(&[PREFACE, input].concat());
        let mut rest = &seen[PREFACE.len()..];
        while let Some(head) = FrameHead::read(rest) {
            let Some(payload) = rest.get(FRAME_HEAD_BYTES..FRAME_HEAD_BYTES + head.len) else { return };
            if matches!(head.kind, HEADERS | CONTINUATION) {
                HpackDecoder::default().decode(payload, |_| {}).expect("no dynamic table");
            }
            rest = &rest[FRAME_HEAD_BYTES + head.len..];
        }
    });
}
