//! Detects JSON texts that are not encoded in UTF-8, which RFC 8259, section 8.1 requires.
//!
//! A parser reports such a text as a syntax error in its first bytes, which does not help the client. The
//! check runs only after parsing has failed, so valid requests do not pay for it.

/// Describes what is wrong with the encoding of a text that could not be parsed, as a clause for the client.
/// Returns `None` if the encoding is not at fault.
pub fn encoding_problem(text: &[u8]) -> Option<&'static str> {
    match text {
        [0xef, 0xbb, 0xbf, ..] => Some("it begins with a byte order mark (BOM), which JSON does not allow"),
        [0xfe, 0xff, ..] | [0xff, 0xfe, ..] | [0, _, ..] | [_, 0, ..] => {
            Some("it is encoded in UTF-16 or UTF-32, but JSON must be UTF-8")
        }
        _ if std::str::from_utf8(text).is_err() => {
            Some("it is not UTF-8, which JSON requires; it may be Latin-1 (ISO 8859-1)")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_encodings_are_named() {
        let json = "{\"a\":1}";
        let utf_16 = |to: fn(u16) -> [u8; 2]| json.encode_utf16().flat_map(to).collect::<Vec<u8>>();
        for (text, told) in [
            (json.as_bytes().to_vec(), None),
            ("{\"\u{e4}\":1}".into(), None),
            ([&b"\xef\xbb\xbf"[..], json.as_bytes()].concat(), Some("byte order mark")),
            ([&b"\xff\xfe"[..], &utf_16(u16::to_le_bytes)].concat(), Some("UTF-16")),
            ([&b"\xfe\xff"[..], &utf_16(u16::to_be_bytes)].concat(), Some("UTF-16")),
            (utf_16(u16::to_le_bytes), Some("UTF-16")),
            (utf_16(u16::to_be_bytes), Some("UTF-16")),
            (json.bytes().flat_map(|b| [0, 0, 0, b]).collect(), Some("UTF-32")),
            (b"{\"\xe4\":1}".to_vec(), Some("Latin-1")),
        ] {
            let problem = encoding_problem(&text);
            assert_eq!(problem.is_some(), told.is_some(), "{text:?}");
            assert!(problem.is_none_or(|problem| problem.contains(told.unwrap())), "{problem:?}");
        }
    }
}
