//! Header fields that may stand once: which of two was meant, nobody can tell.

use http::HeaderMap;

/// Those that this gateway reads, and that services behind it are likely to.
const ONCE: [&str; 8] = [
    "x-api-key",
    "authorization",
    "content-type",
    "idempotency-key",
    "x-async",
    "x-function-name",
    "x-memory-mb",
    "x-runtime",
];

/// One of them that stands more than once.
pub fn repeated(fields: &HeaderMap) -> Option<&'static str> {
    if fields.keys_len() == fields.len() {
        return None; // none does, as of nearly all requests
    }
    ONCE.into_iter().find(|name| fields.get_all(*name).iter().nth(1).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn what_may_stand_once() {
        for (names, expected) in [
            (&["x-api-key", "content-type"][..], None),
            (&["prefer", "prefer", "x-api-key"], None),
            (&["x-api-key", "x-api-key"], Some("x-api-key")),
            (&["prefer", "prefer", "x-async", "x-async"], Some("x-async")),
            (&["authorization", "x", "authorization"], Some("authorization")),
        ] {
            let mut fields = HeaderMap::new();
            for name in names {
                fields.append(*name, HeaderValue::from_static("1"));
            }
            assert_eq!(repeated(&fields), expected, "{names:?}");
        }
    }
}
