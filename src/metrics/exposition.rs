//! Compression of the text of `/metrics`, for clients that accept it, as Prometheus does.
//!
//! A node with a thousand functions has megabytes of text, in which most lines differ in a few characters.

use flate2::Compression;
use flate2::write::GzEncoder;
use std::io::{self, Write};

/// The lowest one. A higher one saves little of such lines, and costs a multiple of the time.
const LEVEL: u32 = 1;
/// The share of the text that the output is expected to have, so that its buffer seldom grows.
const EXPECTED_SHARE: usize = 10;

/// Whether a client accepts the content coding gzip (RFC 9110, section 12.5.3). `fields`: the values of its
/// fields `Accept-Encoding`.
///
/// gzip that is named has precedence over `*`. A weight of 0 means "not acceptable". So does one that is
/// malformed: identity is always right. Whether the client prefers identity to gzip is not considered.
pub fn accepts_gzip(fields: impl IntoIterator<Item = impl AsRef<[u8]>>) -> bool {
    let (mut named, mut any) = (None, None);
    for field in fields {
        for member in field.as_ref().split(|byte| *byte == b',') {
            let mut parts = member.split(|byte| *byte == b';').map(<[u8]>::trim_ascii);
            let coding = parts.next().unwrap_or_default();
            let is_gzip = coding.eq_ignore_ascii_case(b"gzip") || coding.eq_ignore_ascii_case(b"x-gzip");
            if is_gzip || coding == b"*" {
                let accepted = parts.next().is_none_or(is_positive_weight) && parts.next().is_none();
                let place = if is_gzip { &mut named } else { &mut any };
                // If it is repeated, the first one counts.
                place.get_or_insert(accepted);
            }
        }
    }
    named.or(any).unwrap_or(false)
}

/// Whether this is `q=` and a weight above 0: `1`, `0.5` or `0.001`, with three decimals at most.
fn is_positive_weight(parameter: &[u8]) -> bool {
    let [b'q' | b'Q', b'=', whole, decimals @ ..] = parameter else { return false };
    let digits = match decimals {
        [] => &[][..],
        [b'.', digits @ ..] if digits.len() <= 3 => digits,
        _ => return false,
    };
    match whole {
        b'1' => digits.iter().all(|digit| *digit == b'0'),
        b'0' => digits.iter().all(u8::is_ascii_digit) && digits.iter().any(|digit| *digit != b'0'),
        _ => false,
    }
}

/// Compresses a text.
///
/// # Errors
/// None is known: the output is memory.
pub fn gzip(text: &[u8]) -> io::Result<Vec<u8>> {
    let output = Vec::with_capacity(text.len() / EXPECTED_SHARE);
    let mut encoder = GzEncoder::new(output, Compression::new(LEVEL));
    encoder.write_all(text)?;
    encoder.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::read::GzDecoder;
    use std::io::Read;

    #[test]
    fn weights_and_wildcards_are_read() {
        for (fields, expected) in [
            (&[][..], false),
            (&[""], false),
            (&["gzip"], true),
            (&["GZIP"], true),
            (&["x-gzip"], true),
            (&["identity"], false),
            (&["deflate, br , zstd"], false),
            (&["deflate, gzip;q=1.0, *;q=0.5"], true),
            (&["br", "gzip"], true),
            (&["gzip;q=0"], false),
            (&["gzip;q=0.000"], false),
            (&["gzip;q=0.001"], true),
            (&["gzip ; Q=0.5"], true),
            (&["gzip;q=1.000"], true),
            (&["gzip;q=1.001"], false),
            (&["gzip;q=2"], false),
            (&["gzip;q=0.0001"], false),
            (&["gzip;q=.5"], false),
            (&["gzip;q="], false),
            (&["gzip;q"], false),
            (&["gzip;q=0.x"], false),
            (&["gzip;level=9"], false),
            (&["gzip;q=1;x=1"], false),
            (&["*"], true),
            (&["*;q=0"], false),
            (&["*, gzip;q=0"], false),
            (&["*;q=0, gzip"], true),
            (&["gzip, gzip;q=0"], true),
            (&["gzipped"], false),
            (&[";q=1"], false),
        ] {
            assert_eq!(accepts_gzip(fields), expected, "{fields:?}");
        }
    }

    #[test]
    fn a_text_comes_back_and_is_much_smaller() {
        let line = |n: usize| format!("function_invocations_total{{functionId=\"f-{n}\"}} {}\n", n * 37);
        let text: String = (0..1000).map(line).collect();
        let packed = gzip(text.as_bytes()).unwrap();
        assert!(packed.len() * 4 < text.len(), "{} of {}", packed.len(), text.len());
        let mut unpacked = String::new();
        GzDecoder::new(&packed[..]).read_to_string(&mut unpacked).unwrap();
        assert_eq!(unpacked, text);
        assert!(!gzip(b"").unwrap().is_empty(), "the header and the checksum of gzip");
    }
}
