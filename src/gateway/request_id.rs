//! `X-Request-Id`: the client's own if it is 1 to 128 visible ASCII characters, else one of the gateway.

use http::{HeaderMap, HeaderName, HeaderValue};
use uuid::{Builder, Uuid};

pub const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const LEN_MAX: usize = 128;

/// The id as a header value: visible ASCII.
pub struct RequestId(HeaderValue);

impl RequestId {
    /// The client's id, or a generated one if the client's is missing, repeated or malformed.
    pub fn of(fields: &HeaderMap) -> Self {
        let fits = |v: &&HeaderValue| {
            (1..=LEN_MAX).contains(&v.len()) && v.as_bytes().iter().all(|b| (0x21..=0x7e).contains(b))
        };
        let mut presented = fields.get_all(X_REQUEST_ID).iter();
        let only = presented.next().filter(|_| presented.next().is_none());
        only.filter(fits).cloned().map_or_else(Self::ours, Self)
    }

    pub fn ours() -> Self {
        // Not `Uuid::new_v4`, which reads the system's random source for each id: these ids need not be
        // secret.
        let id = Builder::from_random_bytes(rand::random()).into_uuid();
        let mut text = Uuid::encode_buffer();
        let text = id.as_hyphenated().encode_lower(&mut text);
        // The fallback is unreachable: the text is hex digits and hyphens.
        Self(HeaderValue::from_str(text).unwrap_or_else(|_| HeaderValue::from_static("none")))
    }

    pub fn as_str(&self) -> &str {
        self.0.to_str().unwrap_or_default()
    }

    pub fn value(&self) -> &HeaderValue {
        &self.0
    }

    pub fn into_value(self) -> HeaderValue {
        self.0
    }
}

/// For a value that was an id before, and so is not checked again.
impl From<&HeaderValue> for RequestId {
    fn from(id: &HeaderValue) -> Self {
        Self(id.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(presented: &[&[u8]]) -> String {
        let mut fields = HeaderMap::new();
        for value in presented {
            fields.append(X_REQUEST_ID, HeaderValue::from_bytes(value).unwrap());
        }
        RequestId::of(&fields).as_str().to_owned()
    }

    #[test]
    fn only_a_single_valid_id_is_kept() {
        let long = "a".repeat(128);
        for valid in ["a", "~!x", long.as_str()] {
            assert_eq!(of(&[valid.as_bytes()]), valid);
        }
        let too_long = "a".repeat(129);
        for invalid in ["", "a b", "\u{e4}", too_long.as_str()] {
            assert!(Uuid::try_parse(&of(&[invalid.as_bytes()])).is_ok(), "{invalid:?}");
        }
        for several in [&[][..], &[&b"a"[..], b"a"], &[b"a", b"b"]] {
            assert!(Uuid::try_parse(&of(several)).is_ok(), "{several:?}");
        }
    }
}
