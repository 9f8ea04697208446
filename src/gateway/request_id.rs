//! `X-Request-Id`: the client's own if it is fit to be shown, else ours.

use http::{HeaderMap, HeaderName, HeaderValue};
use uuid::{Builder, Uuid};

pub const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const LEN_MAX: usize = 128;

/// Visible ASCII, ready to go out again.
pub struct RequestId(HeaderValue);

impl RequestId {
    /// Two are as good as none.
    pub fn of(fields: &HeaderMap) -> Self {
        let fits = |v: &&HeaderValue| {
            (1..=LEN_MAX).contains(&v.len()) && v.as_bytes().iter().all(|b| (0x21..=0x7e).contains(b))
        };
        let mut presented = fields.get_all(X_REQUEST_ID).iter();
        let only = presented.next().filter(|_| presented.next().is_none());
        only.filter(fits).cloned().map_or_else(Self::ours, Self)
    }

    pub fn ours() -> Self {
        // Not `Uuid::new_v4`: it asks the system for each id, and these ids guard nothing.
        let id = Builder::from_random_bytes(rand::random()).into_uuid();
        let mut text = Uuid::encode_buffer();
        let text = id.as_hyphenated().encode_lower(&mut text);
        Self(HeaderValue::from_str(text).unwrap_or_else(|_| HeaderValue::from_static("none"))) // it is hex and hyphens
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

/// One that was told apart before.
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
    fn a_fit_id_is_kept() {
        let long = "a".repeat(128);
        for fit in ["a", "~!x", long.as_str()] {
            assert_eq!(of(&[fit.as_bytes()]), fit);
        }
        let too_long = "a".repeat(129);
        for unfit in ["", "a b", "\u{e4}", too_long.as_str()] {
            assert!(Uuid::try_parse(&of(&[unfit.as_bytes()])).is_ok(), "{unfit:?}");
        }
        for several in [&[][..], &[&b"a"[..], b"a"], &[b"a", b"b"]] {
            assert!(Uuid::try_parse(&of(several)).is_ok(), "{several:?}");
        }
    }
}
