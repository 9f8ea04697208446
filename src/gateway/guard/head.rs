//! Parses the head of an HTTP/1.1 request strictly by the grammar of RFC 9112.
//!
//! Request smuggling works if two servers read one request differently. RFC 9112 allows a server to repair
//! some requests: bare line feeds, folded lines, repeated lengths, a length beside chunks. All of these are
//! rejected here, so an accepted head has only one reading. Pingora's parser does not suffice: it silently
//! removes a length beside chunks.

use super::grammar::{
    Scheme, TARGET_BYTES_MAX, has_member, is_authority, is_control, is_same_authority, is_target, is_token,
    length,
};
use bytes::BytesMut;
use memchr::memchr;

/// The limits of a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadLimits {
    /// From the first byte through the empty line.
    pub bytes_max: usize,
    pub fields_max: usize,
}

/// Why a head is rejected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadRejection {
    /// It violates the grammar in the named part.
    Malformed(&'static str),
    /// The end of the body is ambiguous, for the given reason.
    Framing(&'static str),
    /// The transfer coding of the body is not supported.
    TransferCoding,
    TargetTooLong,
    TooLarge,
    /// Not HTTP/1.
    Version,
    /// The method CONNECT, which is not supported.
    Connect,
    /// An `Expect` other than `100-continue`.
    Expectation,
}

/// The length of the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// In bytes. 0 if there is no body.
    Bytes(u64),
    Chunked,
}

/// A valid head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Through the empty line, in bytes.
    pub len: usize,
    pub body: Length,
    /// The client asks to upgrade to another protocol, such as WebSocket.
    pub wants_upgrade: bool,
    /// The position of the target.
    pub target: Span,
    /// The position of the minor version if it is neither 0 nor 1. Such a request is served as HTTP/1.1, the
    /// highest supported minor version (RFC 9110, section 2.5).
    unknown_minor: Option<usize>,
    absolute: Option<Absolute>,
}

/// The positions of the first byte and of the byte after the last one.
pub type Span = (usize, usize);

/// A target in absolute form, which contains the scheme and the host. Clients send it to proxies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Absolute {
    scheme: Scheme,
    authority: Span,
    /// Path and query. Empty if there are none.
    path: Span,
    /// The method is OPTIONS, where an absent path means `*`.
    is_options: bool,
    /// There is no Host field.
    is_alone: bool,
}

impl Head {
    /// Rewrites the message that begins with this head for the server: a supported version, and a target
    /// without scheme and host. A missing Host field is added from the target.
    pub fn as_served(&mut self, mut message: BytesMut) -> BytesMut {
        if let Some(at) = self.unknown_minor.take() {
            message[at] = b'1';
        }
        let Some(absolute) = self.absolute.take() else { return message };
        let (from, to) = self.target;
        let path = &message[absolute.path.0..absolute.path.1];
        let mut served = BytesMut::with_capacity(message.len() + 8);
        served.extend_from_slice(&message[..from]);
        match path.first() {
            None if absolute.is_options => served.extend_from_slice(b"*"),
            None | Some(b'?') => served.extend_from_slice(b"/"),
            Some(_) => {}
        }
        served.extend_from_slice(path);
        self.target = (from, served.len());
        let line = to + memchr(b'\n', &message[to..]).map_or(0, |at| at + 1);
        served.extend_from_slice(&message[to..line]);
        if absolute.is_alone {
            served.extend_from_slice(b"Host: ");
            served.extend_from_slice(&message[absolute.authority.0..absolute.authority.1]);
            served.extend_from_slice(b"\r\n");
        }
        served.extend_from_slice(&message[line..]);
        served
    }
}

/// Parses a head line by line while it is received. A line end is searched for only in new bytes, so slow
/// clients cost no more than fast ones.
#[derive(Debug, Default)]
pub struct HeadReader {
    /// The start of the incomplete line.
    line: usize,
    /// The position from which the end of that line is searched.
    unread: usize,
    has_blank_line: bool,
    has_request_line: bool,
    is_http_10: bool,
    unknown_minor: Option<usize>,
    target: Span,
    absolute: Option<Absolute>,
    host: Option<Span>,
    fields: usize,
    length: Option<u64>,
    is_chunked: bool,
    has_upgrade: bool,
    connection_upgrades: bool,
}

impl HeadReader {
    /// Continues in `bytes`, which start with the request and grow from call to call. `None`: the head is
    /// incomplete.
    pub fn read(&mut self, bytes: &[u8], limits: HeadLimits) -> Result<Option<Head>, HeadRejection> {
        loop {
            let end = match memchr(b'\n', &bytes[self.unread..]) {
                Some(at) => self.unread + at,
                None => {
                    self.unread = bytes.len();
                    let fits = bytes.len() < limits.bytes_max;
                    return if fits { Ok(None) } else { Err(self.too_large(bytes)) };
                }
            };
            if end >= limits.bytes_max {
                return Err(self.too_large(bytes));
            }
            let (from, to) = (self.line, end.wrapping_sub(1));
            if end == from || bytes[to] != b'\r' {
                return Err(HeadRejection::Malformed("a line that does not end in CR LF"));
            }
            (self.line, self.unread) = (end + 1, end + 1);
            if !self.has_request_line {
                if from == to && !self.has_blank_line {
                    // Some old clients send an extra line break after a body (RFC 9112, section 2.2).
                    self.has_blank_line = true;
                    continue;
                }
                self.request_line(bytes, from, to)?;
                self.has_request_line = true;
            } else if from == to {
                return self.end(bytes).map(Some);
            } else {
                self.fields += 1;
                if self.fields > limits.fields_max {
                    return Err(HeadRejection::TooLarge);
                }
                self.field(bytes, from, to)?;
            }
        }
    }

    /// The error for the part that exceeds the limit.
    fn too_large(&self, bytes: &[u8]) -> HeadRejection {
        let is_in_target = !self.has_request_line && memchr(b' ', &bytes[self.line..]).is_some();
        if is_in_target { HeadRejection::TargetTooLong } else { HeadRejection::TooLarge }
    }

    fn request_line(&mut self, bytes: &[u8], from: usize, to: usize) -> Result<(), HeadRejection> {
        const BAD: HeadRejection = HeadRejection::Malformed("the request line");
        let line = &bytes[from..to];
        let method = memchr(b' ', line).ok_or(BAD)?;
        let version = line.iter().rposition(|b| *b == b' ').filter(|at| *at > method).ok_or(BAD)?;
        if !is_token(&line[..method]) {
            return Err(BAD);
        }
        match &line[version + 1..] {
            b"HTTP/1.1" => {}
            b"HTTP/1.0" => self.is_http_10 = true,
            [b'H', b'T', b'T', b'P', b'/', b'1', b'.', minor] if minor.is_ascii_digit() => {
                self.unknown_minor = Some(to - 1);
            }
            other => {
                let is_version = other.starts_with(b"HTTP/") && other.len() == 8;
                return Err(if is_version { HeadRejection::Version } else { BAD });
            }
        }
        if &line[..method] == b"CONNECT" {
            return Err(HeadRejection::Connect);
        }
        let target = &line[method + 1..version];
        if target.len() > TARGET_BYTES_MAX {
            return Err(HeadRejection::TargetTooLong);
        }
        if !is_target(target) {
            return Err(HeadRejection::Malformed("the request target"));
        }
        self.target = (from + method + 1, from + version);
        self.absolute = self.absolute_form(target, &line[..method])?;
        Ok(())
    }

    /// The parts of a target in absolute form. `None`: it has another form.
    fn absolute_form(&self, target: &[u8], method: &[u8]) -> Result<Option<Absolute>, HeadRejection> {
        let is_options = method == b"OPTIONS";
        if target[0] == b'/' || (target == b"*" && is_options) {
            return Ok(None);
        }
        const BAD: HeadRejection = HeadRejection::Malformed("the request target");
        let colon = memchr(b':', target).ok_or(BAD)?;
        let scheme = Scheme::parse(&target[..colon]).ok_or(BAD)?;
        let rest = target[colon..].strip_prefix(b"://").ok_or(BAD)?;
        let len = rest.iter().position(|b| matches!(b, b'/' | b'?')).unwrap_or(rest.len());
        if !is_authority(&rest[..len]) {
            return Err(BAD);
        }
        let begin = self.target.1 - rest.len();
        let (authority, path) = ((begin, begin + len), (begin + len, self.target.1));
        Ok(Some(Absolute { scheme, authority, path, is_options, is_alone: false }))
    }

    fn field(&mut self, bytes: &[u8], from: usize, to: usize) -> Result<(), HeadRejection> {
        let line = &bytes[from..to];
        if matches!(line[0], b' ' | b'\t') {
            return Err(HeadRejection::Malformed("a folded line"));
        }
        let colon = memchr(b':', line).ok_or(HeadRejection::Malformed("a line without a colon"))?;
        let name = &line[..colon];
        if !is_token(name) {
            return Err(HeadRejection::Malformed("the name of a field"));
        }
        let value = line[colon + 1..].trim_ascii();
        if line[colon + 1..].iter().any(|b| is_control(*b)) {
            return Err(HeadRejection::Malformed("the value of a field"));
        }
        // Compared by length first: few other names have these lengths.
        match name.len() {
            4 if name.eq_ignore_ascii_case(b"host") => self.host(bytes, value, from),
            6 if name.eq_ignore_ascii_case(b"expect") => {
                let is_known = value.eq_ignore_ascii_case(b"100-continue");
                is_known.then_some(()).ok_or(HeadRejection::Expectation)
            }
            7 if name.eq_ignore_ascii_case(b"upgrade") => {
                self.has_upgrade = true;
                Ok(())
            }
            10 if name.eq_ignore_ascii_case(b"connection") => {
                self.connection_upgrades |= has_member(value, b"upgrade");
                Ok(())
            }
            14 if name.eq_ignore_ascii_case(b"content-length") => self.content_length(value),
            17 if name.eq_ignore_ascii_case(b"transfer-encoding") => self.transfer_encoding(value),
            _ => Ok(()),
        }
    }

    fn host(&mut self, bytes: &[u8], value: &[u8], from: usize) -> Result<(), HeadRejection> {
        const BAD: HeadRejection = HeadRejection::Malformed("the Host");
        if self.host.is_some() || !(value.is_empty() || is_authority(value)) {
            return Err(BAD);
        }
        let begin = value.as_ptr() as usize - bytes.as_ptr() as usize;
        debug_assert!(begin > from);
        self.host = Some((begin, begin + value.len()));
        Ok(())
    }

    fn content_length(&mut self, value: &[u8]) -> Result<(), HeadRejection> {
        if self.length.is_some() {
            return Err(HeadRejection::Framing("Content-Length is repeated"));
        }
        self.length = Some(length(value).ok_or(HeadRejection::Framing("Content-Length is not a number"))?);
        Ok(())
    }

    fn transfer_encoding(&mut self, value: &[u8]) -> Result<(), HeadRejection> {
        if self.is_http_10 {
            return Err(HeadRejection::Framing("Transfer-Encoding in HTTP/1.0"));
        }
        if self.is_chunked {
            return Err(HeadRejection::Framing("Transfer-Encoding is repeated"));
        }
        if !value.eq_ignore_ascii_case(b"chunked") {
            return Err(bad_codings(value));
        }
        self.is_chunked = true;
        Ok(())
    }

    fn end(&self, bytes: &[u8]) -> Result<Head, HeadRejection> {
        let host = self.host.map(|(from, to)| &bytes[from..to]);
        if host.is_none_or(<[u8]>::is_empty) && !self.is_http_10 {
            return Err(HeadRejection::Malformed("the Host"));
        }
        let absolute = self.absolute.map(|absolute| Absolute { is_alone: host.is_none(), ..absolute });
        if let (Some(Absolute { scheme, authority, .. }), Some(host)) = (absolute, host)
            && !is_same_authority(scheme, host, &bytes[authority.0..authority.1])
        {
            return Err(HeadRejection::Malformed("the request target, whose host differs from Host"));
        }
        let body = match (self.is_chunked, self.length) {
            (true, Some(_)) => {
                return Err(HeadRejection::Framing("both Content-Length and Transfer-Encoding"));
            }
            (true, None) => Length::Chunked,
            (false, length) => Length::Bytes(length.unwrap_or(0)),
        };
        let wants_upgrade = self.has_upgrade && self.connection_upgrades && !self.is_http_10;
        let (target, unknown_minor) = (self.target, self.unknown_minor);
        Ok(Head { len: self.line, body, wants_upgrade, target, unknown_minor, absolute })
    }
}

/// The error for transfer codings other than `chunked` alone.
///
/// If `chunked` is repeated or not the last one, or a coding is empty, the end of the body is ambiguous.
/// Otherwise the codings are not supported.
fn bad_codings(value: &[u8]) -> HeadRejection {
    let mut codings = value.split(|b| *b == b',').map(<[u8]>::trim_ascii).peekable();
    while let Some(coding) = codings.next() {
        let is_chunked = coding.eq_ignore_ascii_case(b"chunked");
        if coding.is_empty() || (is_chunked && codings.peek().is_some()) {
            return HeadRejection::Framing("Transfer-Encoding has an empty coding, or one after \"chunked\"");
        }
    }
    HeadRejection::TransferCoding
}

#[cfg(test)]
mod tests {
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
        assert_eq!(
            whole("POST /run HTTP/1.1\r\nhost:a\r\nCONTENT-length:  12 \r\n\r\n").body,
            Length::Bytes(12)
        );
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
        assert_eq!(
            read("GET / HTTP/1.1\n"),
            Err(HeadRejection::Malformed("a line that does not end in CR LF"))
        );
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
}
