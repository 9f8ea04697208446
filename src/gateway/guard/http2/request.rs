//! One request over HTTP/2 while its header block is decoded, and the block that replaces it.

use crate::gateway::guard::grammar::Scheme;
use crate::gateway::guard::grammar::TARGET_BYTES_MAX;
use crate::gateway::guard::grammar::is_authority;
use crate::gateway::guard::grammar::is_control;
use crate::gateway::guard::grammar::is_same_authority;
use crate::gateway::guard::grammar::is_target;
use crate::gateway::guard::grammar::is_token;
use crate::gateway::guard::grammar::length;
use crate::gateway::guard::head::HeadLimits;
use crate::gateway::guard::head::HeadRejection;
use crate::gateway::guard::head::Span;
use crate::gateway::guard::hpack::Field;
use crate::gateway::guard::hpack::put_field;
use crate::gateway::guard::hpack::put_index;
use bytes::BytesMut;
use http::header::HeaderMap;
use http::header::HeaderName;

/// The marker field of a rejected request. Clients cannot forge it: it is removed from what they send.
pub const MARK: HeaderName = HeaderName::from_static("x-infra-refused");

/// The most capacity that a buffer keeps for the next request, in bytes.
pub const KEPT_BYTES_MAX: usize = 4096;

/// The overhead of a field in the size of a header list, in bytes (RFC 9113, section 6.5.2).
pub const FIELD_BYTES: usize = 32;

pub const METHOD: HeadRejection = HeadRejection::Malformed("the method");
pub const SCHEME: HeadRejection = HeadRejection::Malformed("the scheme");
pub const TARGET: HeadRejection = HeadRejection::Malformed("the request target");
pub const AUTHORITY: HeadRejection = HeadRejection::Malformed("the authority");
pub const HOST: HeadRejection = HeadRejection::Malformed("the Host, which differs from the authority");
pub const NAME: HeadRejection = HeadRejection::Malformed("the name of a field");
pub const VALUE: HeadRejection = HeadRejection::Malformed("the value of a field");
pub const OF_CONNECTION: HeadRejection =
    HeadRejection::Malformed("a connection-specific field, which HTTP/2 forbids");
pub const PSEUDO: HeadRejection =
    HeadRejection::Malformed("a pseudo-header field that is unknown or out of place");
pub const LENGTH_TWICE: HeadRejection = HeadRejection::Framing("Content-Length is repeated");
pub const LENGTH: HeadRejection = HeadRejection::Framing("Content-Length is not a number");

/// Fields that the response to a rejected request needs. They are read even after the first fault.
pub const OF_ANSWER: [&[u8]; 2] = [b"x-request-id", b"origin"];
/// The methods that a rejected request keeps. Any other becomes GET.
pub const METHODS: [&str; 7] = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"];

/// All reasons to reject a request. The value of the marker field is an index into this list.
pub const REFUSALS: [HeadRejection; 15] = [
    METHOD,
    SCHEME,
    TARGET,
    AUTHORITY,
    HOST,
    NAME,
    VALUE,
    OF_CONNECTION,
    PSEUDO,
    LENGTH_TWICE,
    LENGTH,
    HeadRejection::TargetTooLong,
    HeadRejection::TooLarge,
    HeadRejection::Connect,
    HeadRejection::Expectation,
];

/// The reason why the guard rejected a request over HTTP/2. `None`: it was not rejected.
pub fn refusal_of(fields: &HeaderMap) -> Option<HeadRejection> {
    let place: usize = fields.get(MARK)?.to_str().ok()?.parse().ok()?;
    REFUSALS.get(place).copied()
}

/// Static-table indices of the pseudo-header fields of requests (RFC 7541, appendix A).
pub const AUTHORITY_INDEX: u8 = 1;
pub const METHOD_INDEX: u8 = 2;
pub const PATH_INDEX: u8 = 4;
pub const SCHEME_INDEX: u8 = 6;

/// Writes a pseudo-header field. The static table contains some of them with their value.
pub fn put_pseudo(to: &mut BytesMut, name_index: u8, value: &[u8]) {
    match (name_index, value) {
        (METHOD_INDEX, b"GET") | (PATH_INDEX, b"/") | (SCHEME_INDEX, b"http") => put_index(to, name_index),
        (METHOD_INDEX, b"POST") | (SCHEME_INDEX, b"https") => put_index(to, name_index + 1),
        _ => put_field(to, Field { name: b"", value, name_index }),
    }
}

/// The request that is being decoded, and its rewritten block. Reused for all requests of a connection.
#[derive(Default)]
pub struct Request {
    pub bad: Option<HeadRejection>,
    /// The size of the header list, as RFC 9113, section 6.5.2 counts it.
    pub list_bytes: usize,
    pub fields: usize,
    /// The values that the spans below refer to.
    pub text: Vec<u8>,
    pub method: Option<Span>,
    pub scheme: Option<Span>,
    pub authority: Option<Span>,
    pub path: Option<Span>,
    pub host: Option<Span>,
    /// The cookie pairs, joined into one field (RFC 9113, section 8.2.3).
    pub cookie: Vec<u8>,
    pub length: Option<Span>,
    /// The client waits for a `100 Continue` before it sends the body.
    pub is_awaited: bool,
    /// All other fields, encoded.
    pub others: BytesMut,
    /// The complete block, encoded by `end`.
    pub block: BytesMut,
}

impl Request {
    pub fn clear(&mut self) {
        let Self { text, cookie, others, block, .. } = self;
        text.clear();
        cookie.clear();
        others.clear();
        block.clear();
        // A rare large request must not keep its memory for the life of the connection.
        text.shrink_to(KEPT_BYTES_MAX);
        cookie.shrink_to(KEPT_BYTES_MAX);
        for buffer in [others, block] {
            if buffer.capacity() > KEPT_BYTES_MAX {
                *buffer = BytesMut::new();
            }
        }
        (self.bad, self.list_bytes, self.fields, self.is_awaited) = (None, 0, 0, false);
        (self.method, self.scheme, self.authority, self.path) = (None, None, None, None);
        (self.host, self.length) = (None, None);
    }

    /// Adds a field. Only the first fault is kept. After it, only fields that the response needs are read.
    pub fn field(&mut self, field: Field<'_>, limits: HeadLimits) {
        self.list_bytes += field.name.len() + field.value.len() + FIELD_BYTES;
        if self.bad.is_none() {
            self.bad = self.take(field, limits).err();
        } else if self.list_bytes <= limits.bytes_max && OF_ANSWER.contains(&field.name) {
            let _ = self.take(field, limits);
        }
    }

    pub fn take(&mut self, field: Field<'_>, limits: HeadLimits) -> Result<(), HeadRejection> {
        let Field { name, value, name_index } = field;
        let is_path = name == b":path";
        if is_path && value.len() > TARGET_BYTES_MAX.min(limits.bytes_max) {
            return Err(HeadRejection::TargetTooLong);
        }
        if self.list_bytes > limits.bytes_max {
            return Err(if is_path { HeadRejection::TargetTooLong } else { HeadRejection::TooLarge });
        }
        if name.first() == Some(&b':') {
            return self.pseudo(name, value);
        }
        let value = value.trim_ascii();
        // All cookie pairs together count as one field.
        self.fields += usize::from(name != b"cookie" || self.cookie.is_empty());
        if self.fields > limits.fields_max {
            return Err(HeadRejection::TooLarge);
        }
        if !is_token(name) || name.iter().any(u8::is_ascii_uppercase) {
            return Err(NAME);
        }
        if value.iter().any(|b| is_control(*b)) {
            return Err(VALUE);
        }
        match name {
            b"connection" | b"keep-alive" | b"proxy-connection" | b"transfer-encoding" | b"upgrade" => {
                return Err(OF_CONNECTION);
            }
            b"te" if !value.eq_ignore_ascii_case(b"trailers") => return Err(OF_CONNECTION),
            b"te" => return Ok(()), // dropped: trailers are not forwarded
            b"host" if self.host.is_some() => return Err(HOST),
            b"host" => {
                self.host = Some(self.keep(value));
                return Ok(());
            }
            b"cookie" => {
                if !self.cookie.is_empty() {
                    self.cookie.extend_from_slice(b"; ");
                }
                self.cookie.extend_from_slice(value);
                return Ok(());
            }
            b"content-length" => {
                if self.length.is_some() {
                    return Err(LENGTH_TWICE);
                }
                length(value).ok_or(LENGTH)?;
                self.length = Some(self.keep(value));
                return Ok(());
            }
            b"expect" if !value.eq_ignore_ascii_case(b"100-continue") => {
                return Err(HeadRejection::Expectation);
            }
            b"expect" => {
                self.is_awaited = true;
                return Ok(());
            }
            _ if name == MARK.as_str().as_bytes() => return Ok(()),
            _ => {}
        }
        put_field(&mut self.others, Field { name, value, name_index });
        Ok(())
    }

    pub fn pseudo(&mut self, name: &[u8], value: &[u8]) -> Result<(), HeadRejection> {
        if self.fields > 0 {
            return Err(PSEUDO);
        }
        let kept = self.keep(value);
        let (place, repeated) = match name {
            b":method" => (&mut self.method, METHOD),
            b":scheme" => (&mut self.scheme, SCHEME),
            b":authority" => (&mut self.authority, AUTHORITY),
            b":path" => (&mut self.path, TARGET),
            _ => return Err(PSEUDO),
        };
        if place.replace(kept).is_some() { Err(repeated) } else { Ok(()) }
    }

    pub fn keep(&mut self, value: &[u8]) -> Span {
        let from = self.text.len();
        self.text.extend_from_slice(value);
        (from, self.text.len())
    }

    /// Validates the request and encodes its block, after the last field.
    pub fn end(&mut self) {
        let bad = self.bad.or_else(|| self.check().err());
        if let Some(bad) = bad {
            return self.end_refused(bad);
        }
        let block = &mut self.block;
        let text = |span| part(&self.text, span).unwrap_or_default();
        put_pseudo(block, METHOD_INDEX, text(self.method));
        put_pseudo(block, SCHEME_INDEX, text(self.scheme));
        // Without `:authority`, `Host` takes its place.
        put_pseudo(block, AUTHORITY_INDEX, text(self.authority.or(self.host)));
        put_pseudo(block, PATH_INDEX, text(self.path));
        block.extend_from_slice(&self.others);
        if self.length.is_some() {
            put_field(block, Field { name: b"content-length", value: text(self.length), name_index: 28 });
        }
        if !self.cookie.is_empty() {
            put_field(block, Field { name: b"cookie", value: &self.cookie, name_index: 32 });
        }
    }

    /// Encodes a rejected request. Keeps the decoded fields for the response, unless the header is too large.
    pub fn end_refused(&mut self, bad: HeadRejection) {
        self.is_awaited = false;
        let method = self.value(self.method).unwrap_or_default();
        let method = METHODS.into_iter().find(|known| known.as_bytes() == method).unwrap_or("GET");
        let place = REFUSALS.iter().position(|known| *known == bad).unwrap_or_default();
        let block = &mut self.block;
        put_pseudo(block, METHOD_INDEX, method.as_bytes());
        put_pseudo(block, SCHEME_INDEX, b"https");
        put_pseudo(block, AUTHORITY_INDEX, b"refused.invalid");
        put_pseudo(block, PATH_INDEX, b"/");
        let value = place.to_string();
        put_field(block, Field { name: MARK.as_str().as_bytes(), value: value.as_bytes(), name_index: 0 });
        if !matches!(bad, HeadRejection::TooLarge | HeadRejection::TargetTooLong) {
            block.extend_from_slice(&self.others);
        }
    }

    pub fn value(&self, span: Option<Span>) -> Option<&[u8]> {
        part(&self.text, span)
    }

    pub fn check(&self) -> Result<(), HeadRejection> {
        let method = self.value(self.method).filter(|method| is_token(method)).ok_or(METHOD)?;
        if method == b"CONNECT" {
            return Err(HeadRejection::Connect);
        }
        let scheme = self.value(self.scheme).and_then(Scheme::parse).ok_or(SCHEME)?;
        let path = self.value(self.path).filter(|path| is_target(path)).ok_or(TARGET)?;
        if path[0] != b'/' && !(path == b"*" && method == b"OPTIONS") {
            return Err(TARGET);
        }
        let (authority, host) = (self.value(self.authority), self.value(self.host));
        let name = authority.or(host).filter(|name| is_authority(name)).ok_or(AUTHORITY)?;
        let is_same = host.is_none_or(|host| is_same_authority(scheme, host, name));
        is_same.then_some(()).ok_or(HOST)
    }
}

pub fn part(text: &[u8], span: Option<Span>) -> Option<&[u8]> {
    span.map(|(from, to)| &text[from..to])
}
