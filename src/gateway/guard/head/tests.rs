use super::*;

const LIMITS: HeadLimits = HeadLimits { bytes_max: 1024, fields_max: 8 };

fn read(text: &str) -> Result<Option<Head>, HeadRejection> {
    HeadReader::default().read(text.as_bytes(), LIMITS)
}

fn whole(text: &str) -> Head {
    // Parsing byte by byte gives the same result.
    let mut reader = HeadReader::default();
    for len in 0..text.len() {
        if let Some(head) = reader.read(&text.as_bytes()[..len], LIMITS).unwrap() {
            assert_eq!(head.len, len);
            break;
        }
    }
    read(text).unwrap().expect("a complete head")
}

#[test]
fn valid_heads_are_accepted() {
    let get = whole("GET /livez?x=1 HTTP/1.1\r\nHost: a\r\n\r\nrest");
    let target = "GET ".len();
    let expected = Head {
        len: 36,
        body: Length::Bytes(0),
        wants_upgrade: false,
        target: (target, target + "/livez?x=1".len()),
        unknown_minor: None,
        absolute: None,
    };
    assert_eq!(get, expected);
    assert_eq!(whole("POST /run HTTP/1.1\r\nhost:a\r\nCONTENT-length:  12 \r\n\r\n").body, Length::Bytes(12));
    assert_eq!(
        whole("POST /run HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n").body,
        Length::Chunked
    );
    assert_eq!(whole("GET / HTTP/1.0\r\n\r\n").body, Length::Bytes(0));
    whole("GET http://A:80/x HTTP/1.1\r\nHost: a:80\r\n\r\n");
    whole("\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n");
    whole("GET /\u{e4} HTTP/1.1\r\nHost: a\r\n\r\n");
    whole("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n");
    whole("GET / HTTP/1.1\r\nHost: a\r\nX: \u{e4}\tb\r\nEmpty:\r\n\r\n");
    let upgrade =
        "GET / HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\r\n";
    assert!(whole(upgrade).wants_upgrade);
    assert!(!whole(&upgrade.replace("Upgrade\r\n", "x\r\n")).wants_upgrade);
}

#[test]
fn ambiguous_heads_are_rejected() {
    let post = |fields: &str| format!("POST /run HTTP/1.1\r\nHost: a\r\n{fields}\r\n\r\n");
    for framing in [
        "Content-Length: 1\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 1",
        "Content-Length: 1\r\nContent-Length: 1",
        "Content-Length: 1, 1",
        "Content-Length: +1",
        "Content-Length: -1",
        "Content-Length: 0x1",
        "Content-Length: 1 1",
        "Content-Length:",
        "Content-Length: 1234567890123456789",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
        "Transfer-Encoding: chunked, identity",
        "Transfer-Encoding: chunked, chunked",
        "Transfer-Encoding: gzip,, chunked",
        "Transfer-Encoding:",
    ] {
        assert!(
            matches!(read(&post(framing)), Err(HeadRejection::Framing(_))),
            "{framing:?}: {:?}",
            read(&post(framing))
        );
    }
    for unknown in ["gzip, chunked", "gzip", "identity", "xchunked", "chunked;q=1"] {
        let text = post(&format!("Transfer-Encoding: {unknown}"));
        assert_eq!(read(&text), Err(HeadRejection::TransferCoding), "{unknown}");
    }
    let old = "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n";
    assert!(matches!(read(old), Err(HeadRejection::Framing(_))));
    for fields in [
        "A: b\r\n c",
        "A: b\r\n\tc",
        "A : b",
        " A: b",
        "A",
        ": b",
        "A: b\nB: c",
        "A: b\rB: c",
        "A: \0",
        "A: \u{7f}",
        "A\0: b",
        "Host: a",
        "Content-Length : 1",
        "Transfer-Encoding\t: chunked",
    ] {
        assert!(
            matches!(read(&post(fields)), Err(HeadRejection::Malformed(_))),
            "{fields:?}: {:?}",
            read(&post(fields))
        );
    }
    assert_eq!(read(&post("Expect: 200-maybe")), Err(HeadRejection::Expectation));
}

#[test]
fn malformed_request_lines_are_rejected() {
    for bad in [
        "\r\n",
        "GET",
        "GET /",
        "GET / ",
        " GET / HTTP/1.1",
        "GET  HTTP/1.1",
        "G T / HTTP/1.1",
        "GET / x HTTP/1.1",
        "GET /\t HTTP/1.1",
        "GET /# HTTP/1.1",
        "GET x HTTP/1.1",
        "GET * HTTP/1.1",
        "GET ftp://a/ HTTP/1.1",
        "GET http:/// HTTP/1.1",
        "GET http:a/ HTTP/1.1",
        "GET http://u@a/ HTTP/1.1",
        "GET http://a:8080/ HTTP/1.1",
        "GET https://a:80/ HTTP/1.1",
        "GET http://b/ HTTP/1.1",
        "GET / http/1.1",
        "GET / HTTP/1.1 ",
        "G\0T / HTTP/1.1",
    ] {
        let text = format!("{bad}\r\nHost: a\r\n\r\n");
        assert!(matches!(read(&text), Err(HeadRejection::Malformed(_))), "{bad:?}: {:?}", read(&text));
    }
    for version in ["HTTP/2.0", "HTTP/0.9", "HTTP/1.x"] {
        assert_eq!(read(&format!("PRI * {version}\r\n\r\n")), Err(HeadRejection::Version));
    }
    assert_eq!(read("CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n"), Err(HeadRejection::Connect));
    for host in
        ["", "Host:\r\n", "Host: a\r\nHost: b\r\n", "Host: a/b\r\n", "Host: a, b\r\n", "Host: a@b\r\n"]
    {
        let text = format!("GET / HTTP/1.1\r\n{host}\r\n");
        assert_eq!(read(&text), Err(HeadRejection::Malformed("the Host")), "{host:?}");
    }
}

/// The server receives a target without the host, a Host field, and a supported version.
#[test]
fn messages_are_rewritten_for_the_server() {
    for (sent, served) in [
        ("GET /a?b HTTP/1.1\r\nHost: a\r\n\r\nbody", "GET /a?b HTTP/1.1\r\nHost: a\r\n\r\nbody"),
        ("GET /a HTTP/1.7\r\nHost: a\r\n\r\n", "GET /a HTTP/1.1\r\nHost: a\r\n\r\n"),
        ("GET http://A:80/a?b HTTP/1.1\r\nHost: a\r\n\r\n", "GET /a?b HTTP/1.1\r\nHost: a\r\n\r\n"),
        ("GET http://a/ HTTP/1.1\r\nHost: a:80\r\n\r\nx", "GET / HTTP/1.1\r\nHost: a:80\r\n\r\nx"),
        ("GET https://a:443 HTTP/1.9\r\nHost: a\r\n\r\n", "GET / HTTP/1.1\r\nHost: a\r\n\r\n"),
        ("GET HTTP://a?b HTTP/1.1\r\nHost: a\r\n\r\n", "GET /?b HTTP/1.1\r\nHost: a\r\n\r\n"),
        ("OPTIONS http://a HTTP/1.1\r\nHost: a\r\n\r\n", "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n"),
        ("OPTIONS http://a/ HTTP/1.1\r\nHost: a\r\n\r\n", "OPTIONS / HTTP/1.1\r\nHost: a\r\n\r\n"),
        ("GET http://a/x HTTP/1.0\r\n\r\n", "GET /x HTTP/1.0\r\nHost: a\r\n\r\n"),
        ("\r\nGET http://a/x HTTP/1.0\r\nA: b\r\n\r\n", "\r\nGET /x HTTP/1.0\r\nHost: a\r\nA: b\r\n\r\n"),
    ] {
        let mut head = whole(sent);
        let message = head.as_served(sent.as_bytes().into());
        assert_eq!(String::from_utf8_lossy(&message), served, "{sent:?}");
        let target = &message[head.target.0..head.target.1];
        assert_eq!(target, served.trim_start().split(' ').nth(1).unwrap().as_bytes(), "{sent:?}");
    }
}

#[test]
fn large_heads_are_rejected_before_they_are_complete() {
    let long = format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "x".repeat(2000));
    assert_eq!(read(&long), Err(HeadRejection::TargetTooLong));
    assert_eq!(read(&long[..1024]), Err(HeadRejection::TargetTooLong));
    assert_eq!(read(&long[..1023]), Ok(None));
    assert_eq!(read(&"X".repeat(1024)), Err(HeadRejection::TooLarge));
    let field = format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}", "x".repeat(2000));
    assert_eq!(read(&field), Err(HeadRejection::TooLarge));
    let wide = HeadLimits { bytes_max: 1 << 20, fields_max: 8 };
    let target = format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "x".repeat(TARGET_BYTES_MAX));
    assert_eq!(HeadReader::default().read(target.as_bytes(), wide), Err(HeadRejection::TargetTooLong));
    let many = format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "A: b\r\n".repeat(7));
    assert!(read(&many).unwrap().is_some());
    assert_eq!(read(&many.replacen("A: b", "A: b\r\nA: b", 1)), Err(HeadRejection::TooLarge));
    assert_eq!(read("GET / HTTP/1.1\n"), Err(HeadRejection::Malformed("a line that does not end in CR LF")));
}

/// The result does not depend on how the head is cut, and another parser reads accepted heads in the same
/// way.
#[test]
fn fuzz_request_heads() {
    crate::fuzz::run("request_head", |input| {
        let at_once = HeadReader::default().read(input, LIMITS);
        let mut reader = HeadReader::default();
        let piecemeal = (0..=input.len()).find_map(|len| reader.read(&input[..len], LIMITS).transpose());
        match (at_once, piecemeal) {
            (Ok(None), None) => {}
            (Ok(Some(head)), Some(Ok(same))) => {
                assert_eq!(head, same);
                let text = &input[..head.len];
                assert!(text.ends_with(b"\r\n\r\n") && !text.contains(&0));
                let mut served_head = head;
                let served = served_head.as_served(text.into());
                let mut fields = [httparse::EMPTY_HEADER; 16];
                let mut request = httparse::Request::new(&mut fields);
                let parsed = request.parse(&served).expect("httparse accepts it");
                assert_eq!(parsed, httparse::Status::Complete(served.len()));
                let (from, to) = served_head.target;
                assert_eq!(request.path.map(str::as_bytes), Some(&served[from..to]));
                assert!(matches!(served[from], b'/' | b'*'), "not in absolute form");
                let named = |name: &str| {
                    let of =
                        request.headers.iter().filter(move |field| field.name.eq_ignore_ascii_case(name));
                    of.map(|field| field.value).collect::<Vec<_>>()
                };
                let (lengths, codings) = (named("content-length"), named("transfer-encoding"));
                match head.body {
                    Length::Chunked => assert!(codings.len() == 1 && lengths.is_empty()),
                    Length::Bytes(bytes) => {
                        assert!(codings.is_empty() && lengths.len() <= 1);
                        let declared =
                            lengths.first().map(|length| std::str::from_utf8(length).unwrap().trim());
                        assert_eq!(declared.map_or(0, |length| length.parse().unwrap()), bytes);
                    }
                }
            }
            // The errors may differ: one for the size, the other for the first fault.
            (Err(_), Some(Err(_))) => {}
            other => panic!("{other:?}"),
        }
    });
}
