//! `X-Request-Id`: the client's own if it is fit to be shown, else ours.

use http::HeaderValue;
use uuid::{Builder, Uuid};

const LEN_MAX: usize = 128;

/// Visible ASCII, ready to go out again.
pub struct RequestId(HeaderValue);

impl RequestId {
    pub fn of(presented: Option<&HeaderValue>) -> Self {
        let fits = |v: &&HeaderValue| {
            (1..=LEN_MAX).contains(&v.len()) && v.as_bytes().iter().all(|b| (0x21..=0x7e).contains(b))
        };
        Self(presented.filter(fits).cloned().unwrap_or_else(Self::ours))
    }

    fn ours() -> HeaderValue {
        // Not `Uuid::new_v4`: it asks the system for each id, and these ids guard nothing.
        let id = Builder::from_random_bytes(rand::random()).into_uuid();
        let mut text = Uuid::encode_buffer();
        let text = id.as_hyphenated().encode_lower(&mut text);
        HeaderValue::from_str(text).unwrap_or_else(|_| HeaderValue::from_static("none")) // it is hex and hyphens
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fit_id_is_kept() {
        let long = "a".repeat(128);
        for fit in ["a", "~!x", long.as_str()] {
            assert_eq!(RequestId::of(Some(&HeaderValue::from_str(fit).unwrap())).as_str(), fit);
        }
        let too_long = "a".repeat(129);
        for unfit in ["", "a b", "\u{e4}", too_long.as_str()] {
            let ours = RequestId::of(Some(&HeaderValue::from_bytes(unfit.as_bytes()).unwrap()));
            assert!(Uuid::try_parse(ours.as_str()).is_ok(), "{unfit:?}");
        }
    }
}
