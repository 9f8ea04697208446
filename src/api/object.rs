//! Strict parsing of JSON objects that clients send. Errors name the invalid member.

use super::problem::ApiError;
use crate::model::encoding_problem;
use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, Error};
use serde_json::Number;

/// Parses an object. `wanted` describes the valid values of a member, such as `a string`.
///
/// # Errors
/// `Invalid` with the member or the position, and without any value.
pub fn parse<T: DeserializeOwned>(
    body: &[u8],
    wanted: impl Fn(&str) -> Option<&'static str>,
) -> Result<T, ApiError> {
    let unreadable = |problem: String| {
        ApiError::invalid(match encoding_problem(body) {
            Some(problem) => format!("the body is not JSON: {problem}"),
            None => problem,
        })
    };
    // A derived `Deserialize` of a struct would accept an array as well.
    if body.trim_ascii_start().first() != Some(&b'{') {
        return Err(unreadable("the body must be a JSON object".to_owned()));
    }
    let mut reader = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut reader).map_err(|e| {
        let path = e.path().to_string();
        let member = path.split(['.', '[']).next().unwrap_or_default();
        unreadable(match wanted(member) {
            Some(wanted) => format!("`{member}` must be {wanted}"),
            None => e.inner().to_string(),
        })
    })?;
    reader.end().map_err(|e| unreadable(e.to_string()))?;
    Ok(value)
}

/// Parses a whole number of at least 0, or null. In JSON `256.0` is the same number as `256`.
pub fn whole<'de, D: Deserializer<'de>>(d: D) -> Result<Option<u64>, D::Error> {
    let Some(number) = Option::<Number>::deserialize(d)? else { return Ok(None) };
    // A whole `f64` below 2^53 is exact as an integer.
    let is_whole = |n: &f64| n.fract() == 0.0 && (0.0..9e15).contains(n);
    let whole = number.as_u64().or_else(|| number.as_f64().filter(is_whole).map(|n| n as u64));
    whole.map(Some).ok_or_else(|| D::Error::custom("not a whole number"))
}
