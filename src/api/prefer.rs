//! Parses the `Prefer` header field (RFC 7240). Only `respond-async` and `wait` are used.

use http::header::HeaderValue;

/// The preferences of a client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Prefer {
    pub respond_async: bool,
    /// Longest wait, in seconds.
    pub wait_s: Option<u64>,
}

impl Prefer {
    /// Ignores unknown and malformed preferences, as the RFC requires. The first valid `wait` counts.
    pub fn of(fields: &[HeaderValue]) -> Self {
        let mut prefer = Self::default();
        for preference in fields.iter().filter_map(|f| f.to_str().ok()).flat_map(|f| f.split(',')) {
            // Parameters of a preference follow a semicolon. None is used here.
            let preference = preference.split(';').next().unwrap_or_default();
            let (name, value) = preference.split_once('=').unwrap_or((preference, ""));
            match name.trim().to_ascii_lowercase().as_str() {
                "respond-async" => prefer.respond_async = true,
                "wait" => prefer.wait_s = prefer.wait_s.or(value.trim().trim_matches('"').parse().ok()),
                _ => {}
            }
        }
        prefer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn preferences() {
        for (fields, respond_async, wait_s) in [
            (vec![], false, None),
            (vec!["respond-async"], true, None),
            (vec!["Respond-Async, WAIT=10"], true, Some(10)),
            (vec!["foo; wait=1", "wait = \"5\";x=y, wait=9"], false, Some(5)),
            (vec!["wait=-1", "wait=x", "wait"], false, None),
        ] {
            let values: Vec<_> = fields.iter().map(|f| HeaderValue::from_static(f)).collect();
            assert_eq!(Prefer::of(&values), Prefer { respond_async, wait_s }, "{fields:?}");
        }
    }
}
