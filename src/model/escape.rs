//! Finds escapes of lone surrogates in JSON strings.
//!
//! JSON's grammar allows them (RFC 8259, section 8.2), but they encode no character, and many JSON parsers
//! reject them.

/// The escape sequence at a backslash in a string of well-formed JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Escape {
    /// An escape of one character, and its length in bytes. A surrogate pair is one escape.
    Whole(usize),
    /// A lone surrogate, [`Self::HALF_LEN`] bytes long. It encodes no character.
    Half,
}

impl Escape {
    pub const HALF_LEN: usize = 6;

    /// The escape at the start of `bytes`, which begin with a backslash.
    pub fn at(bytes: &[u8]) -> Self {
        match hex(bytes) {
            None => Self::Whole(2),
            Some(0xD800..=0xDBFF) => match bytes.get(6..).and_then(hex) {
                Some(0xDC00..=0xDFFF) => Self::Whole(12),
                _ => Self::Half,
            },
            Some(0xDC00..=0xDFFF) => Self::Half,
            Some(_) => Self::Whole(6),
        }
    }
}

/// The value of a `\uXXXX` at the start of `bytes`. `None`: it is another escape.
fn hex(bytes: &[u8]) -> Option<u32> {
    let digits = bytes.strip_prefix(b"\\u")?.get(..4)?;
    u32::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}
