//! Evaluates `If-Match` and `If-None-Match` (RFC 9110, section 13).

use super::call::CallHeaders;
use super::problem::ApiError;
use http::header::HeaderValue;

/// Whether `If-None-Match` names the tag of the function. A GET is then answered 304.
pub fn is_unchanged(headers: &CallHeaders, tag: &str) -> Result<bool, ApiError> {
    alone("If-None-Match", &headers.if_none_match)?;
    // Weak comparison: `W/` is ignored.
    Ok(tags(&headers.if_none_match).any(|given| given == "*" || given.trim_start_matches("W/") == tag))
}

/// Checks the preconditions of a change against the tag of the function.
///
/// # Errors
/// `PreconditionFailed`, and `MixedWildcard` if a field combines `*` with tags.
pub fn check(headers: &CallHeaders, tag: &str) -> Result<(), ApiError> {
    alone("If-Match", &headers.if_match)?;
    // Strong comparison: a weak tag never matches.
    let matches =
        headers.if_match.is_empty() || tags(&headers.if_match).any(|given| given == "*" || given == tag);
    let fits = matches && !is_unchanged(headers, tag)?;
    fits.then_some(()).ok_or(ApiError::PreconditionFailed)
}

/// Rejects `*` beside other tags. `*` matches any tag, so the combination must be a mistake.
fn alone(name: &'static str, fields: &[HeaderValue]) -> Result<(), ApiError> {
    let is_mixed = tags(fields).any(|tag| tag == "*") && tags(fields).nth(1).is_some();
    if is_mixed { Err(ApiError::MixedWildcard(name)) } else { Ok(()) }
}

/// The listed tags. No tag of this server contains a comma, so a comma always separates two.
fn tags(fields: &[HeaderValue]) -> impl Iterator<Item = &str> {
    fields.iter().filter_map(|field| field.to_str().ok()).flat_map(|field| field.split(',')).map(str::trim)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(if_match: &[&'static str], if_none_match: &[&'static str]) -> CallHeaders {
        let values = |fields: &[&'static str]| fields.iter().map(|f| HeaderValue::from_static(f)).collect();
        CallHeaders {
            if_match: values(if_match),
            if_none_match: values(if_none_match),
            ..CallHeaders::default()
        }
    }

    #[test]
    fn preconditions() {
        let tag = "\"3-abc\"";
        for (if_match, goes) in [
            (&[][..], true),
            (&["\"3-abc\""], true),
            (&["*"], true),
            (&["\"1\", \"3-abc\""], true),
            (&["\"1\"", "\"3-abc\""], true),
            (&["W/\"3-abc\""], false),
            (&["\"3\""], false),
            (&["3-abc"], false),
            (&[""], false),
        ] {
            assert_eq!(check(&headers(if_match, &[]), tag).is_ok(), goes, "{if_match:?}");
        }
        for (if_none_match, unchanged) in [
            (&[][..], false),
            (&["\"3-abc\""], true),
            (&["W/\"3-abc\""], true),
            (&["\"1\",W/\"3-abc\""], true),
            (&["*"], true),
            (&["\"1\""], false),
        ] {
            let headers = headers(&[], if_none_match);
            assert_eq!(is_unchanged(&headers, tag).unwrap(), unchanged, "{if_none_match:?}");
            assert_eq!(check(&headers, tag).is_ok(), !unchanged, "{if_none_match:?}");
        }
        for mixed in [&["*, \"3-abc\""][..], &["\"1\"", "*"], &["*", "*"]] {
            for headers in [headers(mixed, &[]), headers(&[], mixed)] {
                let code = check(&headers, tag).unwrap_err().code();
                assert_eq!(code, "repeated_field", "{mixed:?}");
            }
        }
    }
}
