//! Header fields that may occur only once, and members of lists.
//!
//! If a single-valued field is repeated, the gateway and a service behind it might use different values. So
//! the request is rejected.

use super::guard::has_member;
use http::HeaderMap;
use http::header::CONNECTION;

/// Single-valued fields that this gateway reads, or that services behind it are likely to read.
const ONCE: [&str; 9] = [
    "x-api-key",
    "authorization",
    "content-type",
    "idempotency-key",
    "x-async",
    "x-function-name",
    "x-handler",
    "x-memory-mb",
    "x-runtime",
];

/// The first of these fields that is repeated.
pub fn repeated(fields: &HeaderMap) -> Option<&'static str> {
    if fields.keys_len() == fields.len() {
        return None; // no field at all is repeated, as in nearly all requests
    }
    ONCE.into_iter().find(|name| fields.get_all(*name).iter().nth(1).is_some())
}

/// Whether `Connection` names the option.
pub fn connection_names(fields: &HeaderMap, option: &[u8]) -> bool {
    fields.get_all(CONNECTION).iter().any(|value| has_member(value.as_bytes(), option))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn repeated_single_valued_fields_are_found() {
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
