//! Escapes in JSON strings, as far as they can be halves of a character.

/// What stands at a backslash in a string of well-formed JSON.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Escape {
    /// So many bytes that stand for something; a surrogate pair counts as one.
    Whole(usize),
    /// Half a surrogate pair, six bytes that stand for nothing.
    Half,
}

impl Escape {
    pub const HALF_LEN: usize = 6;

    /// The escape that `bytes` starts with.
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

/// The value of a `\uXXXX` that `bytes` starts with.
fn hex(bytes: &[u8]) -> Option<u32> {
    let digits = bytes.strip_prefix(b"\\u")?.get(..4)?;
    u32::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}
