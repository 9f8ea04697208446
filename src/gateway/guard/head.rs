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
mod tests;
