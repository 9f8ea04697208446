//! The head of an HTTP/1.1 request, held against the grammar of RFC 9112 to the byte.
//!
//! A request that two servers read differently is how requests are smuggled. So what RFC 9112 lets a server mend or
//! guess (bare line feeds, folded lines, repeated lengths, a length beside chunks) is refused here, before anybody
//! has read anything into it: what passes has one reading. Pingora's own parser was not enough: it takes a length beside
//! chunks away before anyone sees that it was there.

use memchr::memchr;

/// What a head may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeadLimits {
    /// From the first byte to the empty line.
    pub bytes_max: usize,
    pub fields_max: usize,
}

/// Why a head is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BadHead {
    /// Not as the grammar says; names the part.
    Malformed(&'static str),
    /// Where the body ends could be read in two ways.
    Framing(&'static str),
    TooLarge,
    /// Not HTTP/1.0 or HTTP/1.1.
    Version,
    /// A method that would make a tunnel.
    Connect,
    /// An `Expect` other than `100-continue`.
    Expectation,
}

/// How long the body is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Length {
    /// In bytes; 0 as well where there is none.
    Bytes(u64),
    Chunked,
}

/// A head that may be read on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// With the empty line, in bytes.
    pub len: usize,
    pub body: Length,
    /// The client asks for another protocol (WebSocket).
    pub wants_upgrade: bool,
    /// Where the target stands, from and to.
    pub target: (usize, usize),
}

/// Reads a head as it comes in, line by line: no byte is looked at twice, however slowly they come.
#[derive(Debug, Default)]
pub struct HeadReader {
    /// Where the line begins that is not complete yet.
    line: usize,
    /// Where the end of that line is looked for.
    unread: usize,
    has_blank_line: bool,
    has_request_line: bool,
    is_http_10: bool,
    target: (usize, usize),
    /// The authority of a target in absolute form.
    authority: Option<(usize, usize)>,
    host: Option<(usize, usize)>,
    fields: usize,
    length: Option<u64>,
    is_chunked: bool,
    has_upgrade: bool,
    connection_upgrades: bool,
}

impl HeadReader {
    /// Reads on in `bytes`, which begin with the request and grow from call to call. `None`: the head goes on.
    pub fn read(&mut self, bytes: &[u8], limits: HeadLimits) -> Result<Option<Head>, BadHead> {
        loop {
            let end = match memchr(b'\n', &bytes[self.unread..]) {
                Some(at) => self.unread + at,
                None => {
                    self.unread = bytes.len();
                    let fits = bytes.len() < limits.bytes_max;
                    return if fits { Ok(None) } else { Err(BadHead::TooLarge) };
                }
            };
            if end >= limits.bytes_max {
                return Err(BadHead::TooLarge);
            }
            let (from, to) = (self.line, end.wrapping_sub(1));
            if end == from || bytes[to] != b'\r' {
                return Err(BadHead::Malformed("a line that does not end in CR LF"));
            }
            (self.line, self.unread) = (end + 1, end + 1);
            if !self.has_request_line {
                if from == to && !self.has_blank_line {
                    // Old clients end a body with a line break that is not part of it (RFC 9112, section 2.2).
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
                    return Err(BadHead::TooLarge);
                }
                self.field(bytes, from, to)?;
            }
        }
    }

    fn request_line(&mut self, bytes: &[u8], from: usize, to: usize) -> Result<(), BadHead> {
        const BAD: BadHead = BadHead::Malformed("the request line");
        let line = &bytes[from..to];
        let method = memchr(b' ', line).ok_or(BAD)?;
        let version = line.iter().rposition(|b| *b == b' ').filter(|at| *at > method).ok_or(BAD)?;
        if !is_token(&line[..method]) {
            return Err(BAD);
        }
        self.is_http_10 = match &line[version + 1..] {
            b"HTTP/1.1" => false,
            b"HTTP/1.0" => true,
            other => {
                let is_version = other.starts_with(b"HTTP/") && other.len() == 8;
                return Err(if is_version { BadHead::Version } else { BAD });
            }
        };
        if &line[..method] == b"CONNECT" {
            return Err(BadHead::Connect);
        }
        let target = &line[method + 1..version];
        let is_visible = target.iter().all(|b| *b > b' ' && !matches!(b, 0x7f | b'#'));
        if target.is_empty() || !is_visible || !is_uri(target) || std::str::from_utf8(target).is_err() {
            return Err(BadHead::Malformed("the request target"));
        }
        self.target = (from + method + 1, from + version);
        self.authority = self.authority_of(target, &line[..method])?;
        Ok(())
    }

    /// Where the authority stands, if the target has one.
    fn authority_of(&self, target: &[u8], method: &[u8]) -> Result<Option<(usize, usize)>, BadHead> {
        if target[0] == b'/' || (target == b"*" && method == b"OPTIONS") {
            return Ok(None);
        }
        const BAD: BadHead = BadHead::Malformed("the request target");
        let scheme = ["http://", "https://"].iter().find(|scheme| starts_with(target, scheme)).ok_or(BAD)?;
        let rest = &target[scheme.len()..];
        let len = rest.iter().position(|b| matches!(b, b'/' | b'?')).unwrap_or(rest.len());
        // A path of its own: without one Pingora and others read different targets.
        if len == 0 || rest.get(len) != Some(&b'/') || rest[..len].contains(&b'@') {
            return Err(BAD);
        }
        let begin = self.target.0 + scheme.len();
        Ok(Some((begin, begin + len)))
    }

    fn field(&mut self, bytes: &[u8], from: usize, to: usize) -> Result<(), BadHead> {
        let line = &bytes[from..to];
        if matches!(line[0], b' ' | b'\t') {
            return Err(BadHead::Malformed("a folded line"));
        }
        let colon = memchr(b':', line).ok_or(BadHead::Malformed("a line without a colon"))?;
        let name = &line[..colon];
        if !is_token(name) {
            return Err(BadHead::Malformed("the name of a field"));
        }
        let value = line[colon + 1..].trim_ascii();
        if line[colon + 1..].iter().any(|b| is_control(*b)) {
            return Err(BadHead::Malformed("the value of a field"));
        }
        // Few names have these lengths, so most fields end here.
        match name.len() {
            4 if name.eq_ignore_ascii_case(b"host") => self.host(bytes, value, from),
            6 if name.eq_ignore_ascii_case(b"expect") => {
                let is_known = value.eq_ignore_ascii_case(b"100-continue");
                is_known.then_some(()).ok_or(BadHead::Expectation)
            }
            7 if name.eq_ignore_ascii_case(b"upgrade") => {
                self.has_upgrade = true;
                Ok(())
            }
            10 if name.eq_ignore_ascii_case(b"connection") => {
                let mut tokens = value.split(|b| *b == b',').map(<[u8]>::trim_ascii);
                self.connection_upgrades |= tokens.any(|token| token.eq_ignore_ascii_case(b"upgrade"));
                Ok(())
            }
            14 if name.eq_ignore_ascii_case(b"content-length") => self.content_length(value),
            17 if name.eq_ignore_ascii_case(b"transfer-encoding") => self.transfer_encoding(value),
            _ => Ok(()),
        }
    }

    fn host(&mut self, bytes: &[u8], value: &[u8], from: usize) -> Result<(), BadHead> {
        const BAD: BadHead = BadHead::Malformed("the Host");
        if self.host.is_some()
            || value.iter().any(|b| matches!(b, b'/' | b'?' | b'#' | b'@' | b' ' | b'\t' | b','))
        {
            return Err(BAD);
        }
        if !value.is_ascii() {
            return Err(BAD);
        }
        let begin = value.as_ptr() as usize - bytes.as_ptr() as usize;
        debug_assert!(begin > from);
        self.host = Some((begin, begin + value.len()));
        Ok(())
    }

    fn content_length(&mut self, value: &[u8]) -> Result<(), BadHead> {
        if self.length.is_some() {
            return Err(BadHead::Framing("Content-Length is there twice"));
        }
        // Digits alone: a sign or a list is what others may read in another way. 18 of them fit any number.
        let is_number = (1..=18).contains(&value.len()) && value.iter().all(u8::is_ascii_digit);
        if !is_number {
            return Err(BadHead::Framing("Content-Length is no number"));
        }
        self.length = Some(value.iter().fold(0, |sum, digit| sum * 10 + u64::from(digit - b'0')));
        Ok(())
    }

    fn transfer_encoding(&mut self, value: &[u8]) -> Result<(), BadHead> {
        if self.is_chunked || !value.eq_ignore_ascii_case(b"chunked") {
            return Err(BadHead::Framing("Transfer-Encoding is not \"chunked\" alone"));
        }
        self.is_chunked = true;
        Ok(())
    }

    fn end(&self, bytes: &[u8]) -> Result<Head, BadHead> {
        let host = self.host.map(|(from, to)| &bytes[from..to]);
        if host.is_none_or(<[u8]>::is_empty) && !self.is_http_10 {
            return Err(BadHead::Malformed("the Host"));
        }
        if let Some((from, to)) = self.authority
            && !host.is_some_and(|host| host.eq_ignore_ascii_case(&bytes[from..to]))
        {
            return Err(BadHead::Malformed("the request target, which names another host"));
        }
        let body = match (self.is_chunked, self.length) {
            (true, Some(_)) => return Err(BadHead::Framing("Content-Length beside Transfer-Encoding")),
            (true, None) if self.is_http_10 => {
                return Err(BadHead::Framing("Transfer-Encoding in HTTP/1.0"));
            }
            (true, None) => Length::Chunked,
            (false, length) => Length::Bytes(length.unwrap_or(0)),
        };
        let wants_upgrade = self.has_upgrade && self.connection_upgrades && !self.is_http_10;
        Ok(Head { len: self.line, body, wants_upgrade, target: self.target })
    }
}

/// Whether a line break, a NUL or another control character stands where none may. A tab may.
fn is_control(byte: u8) -> bool {
    (byte < 0x20 && byte != b'\t') || byte == 0x7f
}

/// Whether `http::Uri` takes the characters: for what it does not take, Pingora has an answer of its own.
fn is_uri(target: &[u8]) -> bool {
    let query = target.iter().position(|b| *b == b'?').unwrap_or(target.len());
    let (path, query) = target.split_at(query);
    !path.iter().any(|b| matches!(b, b'<' | b'>' | b'`'))
        && !query.iter().any(|b| matches!(b, b'"' | b'<' | b'>'))
}

fn starts_with(target: &[u8], scheme: &str) -> bool {
    target.len() > scheme.len() && target[..scheme.len()].eq_ignore_ascii_case(scheme.as_bytes())
}

/// `token` of RFC 9110, section 5.6.2.
fn is_token(name: &[u8]) -> bool {
    !name.is_empty() && name.iter().all(|b| TOKEN[usize::from(*b)])
}

static TOKEN: [bool; 256] = {
    let mut table = [false; 256];
    let mut b = 0;
    while b < 256 {
        let byte = b as u8;
        table[b] = byte.is_ascii_alphanumeric()
            || matches!(
                byte,
                b'!' | b'#'
                    | b'$'
                    | b'%'
                    | b'&'
                    | b'\''
                    | b'*'
                    | b'+'
                    | b'-'
                    | b'.'
                    | b'^'
                    | b'_'
                    | b'`'
                    | b'|'
                    | b'~'
            );
        b += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: HeadLimits = HeadLimits { bytes_max: 1024, fields_max: 8 };

    fn read(text: &str) -> Result<Option<Head>, BadHead> {
        HeadReader::default().read(text.as_bytes(), LIMITS)
    }

    fn whole(text: &str) -> Head {
        // Byte by byte it is the same as at once.
        let mut reader = HeadReader::default();
        for len in 0..text.len() {
            if let Some(head) = reader.read(&text.as_bytes()[..len], LIMITS).unwrap() {
                assert_eq!(head.len, len);
                break;
            }
        }
        read(text).unwrap().expect("it is whole")
    }

    #[test]
    fn good_heads() {
        let get = whole("GET /livez?x=1 HTTP/1.1\r\nHost: a\r\n\r\nrest");
        let target = "GET ".len();
        let expected = Head {
            len: 36,
            body: Length::Bytes(0),
            wants_upgrade: false,
            target: (target, target + "/livez?x=1".len()),
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
    fn what_could_be_read_in_two_ways_is_refused() {
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
            "Transfer-Encoding: gzip, chunked",
            "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked",
            "Transfer-Encoding: identity",
            "Transfer-Encoding: xchunked",
            "Transfer-Encoding:",
        ] {
            assert!(
                matches!(read(&post(framing)), Err(BadHead::Framing(_))),
                "{framing:?}: {:?}",
                read(&post(framing))
            );
        }
        let old = "POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n";
        assert!(matches!(read(old), Err(BadHead::Framing(_))));
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
                matches!(read(&post(fields)), Err(BadHead::Malformed(_))),
                "{fields:?}: {:?}",
                read(&post(fields))
            );
        }
        assert_eq!(read(&post("Expect: 200-maybe")), Err(BadHead::Expectation));
    }

    #[test]
    fn request_lines() {
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
            "GET http://a HTTP/1.1",
            "GET http://u@a/ HTTP/1.1",
            "GET http://b/ HTTP/1.1",
            "GET / http/1.1",
            "GET / HTTP/1.1 ",
            "G\0T / HTTP/1.1",
        ] {
            let text = format!("{bad}\r\nHost: a\r\n\r\n");
            assert!(matches!(read(&text), Err(BadHead::Malformed(_))), "{bad:?}: {:?}", read(&text));
        }
        for version in ["HTTP/2.0", "HTTP/1.2", "HTTP/0.9", "HTTP/1.x"] {
            assert_eq!(read(&format!("PRI * {version}\r\n\r\n")), Err(BadHead::Version));
        }
        assert_eq!(read("CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n"), Err(BadHead::Connect));
        for host in
            ["", "Host:\r\n", "Host: a\r\nHost: b\r\n", "Host: a/b\r\n", "Host: a, b\r\n", "Host: a@b\r\n"]
        {
            let text = format!("GET / HTTP/1.1\r\n{host}\r\n");
            assert_eq!(read(&text), Err(BadHead::Malformed("the Host")), "{host:?}");
        }
    }

    #[test]
    fn what_is_too_large_is_refused_before_it_is_whole() {
        let long = format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "x".repeat(2000));
        assert_eq!(read(&long), Err(BadHead::TooLarge));
        assert_eq!(read(&long[..1024]), Err(BadHead::TooLarge));
        assert_eq!(read(&long[..1023]), Ok(None));
        let many = format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "A: b\r\n".repeat(7));
        assert!(read(&many).unwrap().is_some());
        assert_eq!(read(&many.replacen("A: b", "A: b\r\nA: b", 1)), Err(BadHead::TooLarge));
        assert_eq!(read("GET / HTTP/1.1\n"), Err(BadHead::Malformed("a line that does not end in CR LF")));
    }

    /// However a head is cut it comes to the same; and what passes is read by another parser in the same way.
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
                    let mut fields = [httparse::EMPTY_HEADER; 16];
                    let mut request = httparse::Request::new(&mut fields);
                    let parsed = request.parse(input).expect("another parser takes it");
                    assert_eq!(parsed, httparse::Status::Complete(head.len));
                    assert_eq!(request.path.map(str::as_bytes), Some(&input[head.target.0..head.target.1]));
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
                            let said =
                                lengths.first().map(|length| std::str::from_utf8(length).unwrap().trim());
                            assert_eq!(said.map_or(0, |length| length.parse().unwrap()), bytes);
                        }
                    }
                }
                // In one piece it is refused for its size, in pieces for its first fault, or the other way round.
                (Err(_), Some(Err(_))) => {}
                other => panic!("{other:?}"),
            }
        });
    }
}
