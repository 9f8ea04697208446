//! Texts: borrowed from JSON, and cut to a length.

use serde::Deserialize;
use std::borrow::Cow;

/// A JSON string that borrows from the input if it has no escapes. Serde always copies into a plain `Cow`.
#[derive(Deserialize)]
pub struct JsonText<'a>(#[serde(borrow)] pub Cow<'a, str>);

/// The longest prefix of at most `bytes_max` bytes that ends on a character boundary.
pub fn cut(text: &str, bytes_max: usize) -> &str {
    if text.len() <= bytes_max {
        return text;
    }
    let mut end = bytes_max;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}
