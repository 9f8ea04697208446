//! Strict parsing of the query of a URL. Invalid UTF-8 is an error. [`Query`] rejects repeated parameters,
//! and ignores unknown ones. [`lists`] is for filters: parameters may be repeated, and unknown ones are
//! errors.

use super::problem::ApiError;
use http::Uri;
use percent_encoding::percent_decode_str;
use std::borrow::Cow;

/// The parameters that a handler requested, percent-decoded.
pub struct Query<'a>(Vec<(&'a str, Cow<'a, str>)>);

impl<'a> Query<'a> {
    /// Reads the parameters in `names`.
    ///
    /// # Errors
    /// `Invalid` if one of them is repeated or is not UTF-8.
    pub fn read(uri: &'a Uri, names: &[&str]) -> Result<Self, ApiError> {
        let mut found: Vec<(&str, Cow<'_, str>)> = Vec::new();
        for pair in uri.query().unwrap_or_default().split('&') {
            let (name, raw) = pair.split_once('=').unwrap_or((pair, ""));
            if !names.contains(&name) {
                continue;
            }
            if found.iter().any(|(known, _)| *known == name) {
                return Err(ApiError::invalid(format!("`{name}` occurs twice in the query")));
            }
            let value = percent_decode_str(raw).decode_utf8();
            found.push((name, value.map_err(|_| ApiError::invalid(format!("`{name}` is not UTF-8")))?));
        }
        Ok(Self(found))
    }

    /// A parameter that [`Self::read`] has read.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(known, _)| *known == name).map(|(_, value)| &**value)
    }

    /// The page size, a whole number of at least 1. A larger number than `max`, and no number, mean `max`:
    /// clients of the previous controller, which listed everything, ask for more than a page has.
    pub fn limit(&self, max: usize) -> Result<usize, ApiError> {
        let Some(text) = self.get("limit") else { return Ok(max) };
        let is_number = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
        let limit = is_number.then(|| text.parse().unwrap_or(usize::MAX)); // too large for a usize
        let limit = limit.filter(|limit| *limit > 0).map(|limit| limit.min(max));
        limit.ok_or_else(|| ApiError::invalid("`limit` must be a whole number of at least 1"))
    }
}

/// The values of parameters that may be repeated, and of which each may list several, separated by commas.
///
/// # Errors
/// `Invalid` for another parameter, for more than `values_max` values of one, and for invalid UTF-8.
pub fn lists<const N: usize>(
    uri: &Uri,
    names: [&str; N],
    values_max: usize,
) -> Result<[Vec<String>; N], ApiError> {
    let mut found: [Vec<String>; N] = std::array::from_fn(|_| Vec::new());
    let pairs = uri.query().unwrap_or_default().split('&').filter(|pair| !pair.is_empty());
    for (name, raw) in pairs.map(|pair| pair.split_once('=').unwrap_or((pair, ""))) {
        let Some(place) = names.iter().position(|known| *known == name) else {
            // Without the name: it may be a secret at the wrong place.
            let known = names.map(|name| format!("`{name}`")).join(", ");
            return Err(ApiError::invalid(format!("the parameters of this route are {known}")));
        };
        let value = percent_decode_str(raw).decode_utf8();
        let value = value.map_err(|_| ApiError::invalid(format!("`{name}` is not UTF-8")))?;
        found[place].extend(value.split(',').map(str::to_owned));
        if found[place].len() > values_max {
            return Err(ApiError::invalid(format!("`{name}` has more than {values_max} values")));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries() {
        let uri: Uri = "/x?limit=7&status=A%20B+C&other=%ff&flag".parse().unwrap();
        let query = Query::read(&uri, &["limit", "status", "flag"]).unwrap();
        assert_eq!(
            (query.get("status"), query.get("flag"), query.get("other")),
            (Some("A B+C"), Some(""), None)
        );
        assert_eq!(query.limit(10).unwrap(), 7);
        for (target, limit) in
            [("/x", 10), ("/x?limit=10", 10), ("/x?limit=11", 10), ("/x?limit=99999999999999999999999", 10)]
        {
            let uri: Uri = target.parse().unwrap();
            assert_eq!(Query::read(&uri, &["limit"]).unwrap().limit(10).unwrap(), limit, "{target}");
        }
        for bad in ["/x?limit=%ff", "/x?limit=1&limit=1"] {
            assert!(Query::read(&bad.parse().unwrap(), &["limit"]).is_err(), "{bad}");
        }
        for bad in ["0", "000", "-1", "+1", "", "x", "1.0"] {
            let uri: Uri = format!("/x?limit={bad}").parse().unwrap();
            assert!(Query::read(&uri, &["limit"]).unwrap().limit(10).is_err(), "{bad}");
        }
    }
}
