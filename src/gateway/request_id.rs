//! `X-Request-Id`: the client's own if it is fit to be shown, else ours.

use http::HeaderValue;
use uuid::Uuid;

const LEN_MAX: usize = 128;

pub struct RequestId(String);

impl RequestId {
    pub fn of(presented: Option<&HeaderValue>) -> Self {
        let fits = |v: &&HeaderValue| {
            (1..=LEN_MAX).contains(&v.len()) && v.as_bytes().iter().all(|b| (0x21..=0x7e).contains(b))
        };
        let own = presented.filter(fits).and_then(|v| v.to_str().ok()).map(str::to_owned);
        Self(own.unwrap_or_else(|| Uuid::new_v4().to_string()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
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
