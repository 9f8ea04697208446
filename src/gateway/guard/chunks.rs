//! Finds the end of a chunked body (RFC 9112, section 7.1), and rejects malformed chunks.
//!
//! Bare line feeds, signs, stray spaces and sizes that overflow are rejected. Servers differ in how they read
//! them, and a part of the body could then pass for another request (request smuggling).

/// The longest chunk-size line with its extensions, in bytes.
const SIZE_LINE_BYTES_MAX: usize = 256;
/// The longest trailer section, in bytes.
const TRAILER_BYTES_MAX: usize = 4096;
/// The most hexadecimal digits of a chunk size. 15 digits are less than 2^60 bytes and cannot overflow.
const SIZE_DIGITS_MAX: usize = 15;

/// The parser, which takes the body in pieces of any size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunks {
    at: At,
    size: u64,
    /// Counts the digits of the size and the bytes of its line, or the bytes of the trailer section.
    read: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Size,
    /// Spaces or tabs before an extension, which some senders write (RFC 9112, section 7.1.1).
    SizeBlank,
    Extension,
    SizeLf,
    Data,
    DataCr,
    DataLf,
    /// At the start of a line of the trailer section. An empty line ends the body.
    Trailer,
    TrailerLine,
    TrailerLf,
    LastLf,
    End,
}

/// The chunked coding of the body is malformed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadChunk;

impl Default for Chunks {
    fn default() -> Self {
        Self { at: At::Size, size: 0, read: 0 }
    }
}

impl Chunks {
    pub fn is_done(&self) -> bool {
        self.at == At::End
    }

    /// Parses more bytes. The number of bytes that belong to the body: all, unless the body ends within them.
    pub fn advance(&mut self, bytes: &[u8]) -> Result<usize, BadChunk> {
        let mut n = 0;
        while n < bytes.len() && self.at != At::End {
            if self.at == At::Data {
                let len = usize::try_from(self.size).unwrap_or(usize::MAX).min(bytes.len() - n);
                self.size -= len as u64;
                n += len;
                if self.size == 0 {
                    self.at = At::DataCr;
                }
                continue;
            }
            self.step(bytes[n])?;
            n += 1;
        }
        Ok(n)
    }

    fn step(&mut self, byte: u8) -> Result<(), BadChunk> {
        self.at = match (self.at, byte) {
            (At::Size, _) if byte.is_ascii_hexdigit() => {
                let digit = char::from(byte).to_digit(16).ok_or(BadChunk)?;
                self.size = self.size << 4 | u64::from(digit);
                self.count(SIZE_DIGITS_MAX)?;
                At::Size
            }
            (At::Size, b'\r') if self.read > 0 => At::SizeLf,
            (At::Size | At::SizeBlank, b';') if self.read > 0 => At::Extension,
            (At::Size | At::SizeBlank, b' ' | b'\t') if self.read > 0 => {
                self.count(SIZE_LINE_BYTES_MAX)?;
                At::SizeBlank
            }
            (At::Extension, b'\r') => At::SizeLf,
            (At::Extension, b'\t' | 0x20..=0x7e | 0x80..) => {
                self.count(SIZE_LINE_BYTES_MAX)?;
                At::Extension
            }
            (At::SizeLf, b'\n') => {
                self.read = 0;
                if self.size == 0 { At::Trailer } else { At::Data }
            }
            (At::DataCr, b'\r') => At::DataLf,
            (At::DataLf, b'\n') => At::Size,
            (At::Trailer, b'\r') => At::LastLf,
            (At::Trailer, b' ' | b'\t') => return Err(BadChunk), // a folded field
            (At::TrailerLine, b'\r') => At::TrailerLf,
            (At::Trailer | At::TrailerLine, b'\t' | 0x20..=0x7e | 0x80..) => {
                self.count(TRAILER_BYTES_MAX)?;
                At::TrailerLine
            }
            (At::TrailerLf, b'\n') => At::Trailer,
            (At::LastLf, b'\n') => At::End,
            _ => return Err(BadChunk),
        };
        Ok(())
    }

    fn count(&mut self, max: usize) -> Result<(), BadChunk> {
        self.read += 1;
        if self.read > max { Err(BadChunk) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The number of bytes that belong to the body. `None`: the body is incomplete.
    fn read(text: &str) -> Result<Option<usize>, BadChunk> {
        let mut at_once = Chunks::default();
        let all = at_once.advance(text.as_bytes()).map(|n| at_once.is_done().then_some(n));
        // The result does not depend on where the input is cut.
        for cut in 0..=text.len() {
            let mut chunks = Chunks::default();
            let (one, two) = text.as_bytes().split_at(cut);
            let parts = chunks.advance(one).and_then(|n| Ok(n + chunks.advance(two)?));
            assert_eq!(parts.map(|n| chunks.is_done().then_some(n)), all, "{text:?} cut at {cut}");
        }
        all
    }

    #[test]
    fn the_end_of_a_body_is_found() {
        for (body, rest) in [
            ("0\r\n\r\n", "GET"),
            ("3\r\nabc\r\n0\r\n\r\n", ""),
            ("00a;x=\"y\"\r\n0123456789\r\n000\r\n\r\n", "x"),
            ("A\r\n0\r\n\r\n0\r\n\r\n\r\n0\r\n\r\n", "\r\n"),
            ("1 ;x\r\na\r\n1\t ; x = \"y\" ;z\r\nb\r\n0 ;\r\n\r\n", ""),
            ("1\r\na\r\n0\r\nDigest: x\r\nB: c\r\n\r\n", "y"),
        ] {
            assert_eq!(read(&format!("{body}{rest}")), Ok(Some(body.len())), "{body:?}");
            assert_eq!(read(&body[..body.len() - 1]), Ok(None), "{body:?}");
        }
    }

    #[test]
    fn malformed_chunks_are_rejected() {
        for bad in [
            "\r\n",
            "g\r\n",
            "-1\r\n",
            "+1\r\n",
            "0x1\r\n",
            " 1\r\n",
            "1 \r\n",
            "1 1\r\n",
            "1\t\r\n",
            " ;x\r\n",
            "1\n",
            "1\r\r\n",
            "1;\n",
            "1;\0\r\n",
            "1\r\nab\r\n",
            "1\r\na\n",
            "1\r\na0\r\n",
            "0\r\n\n",
            "0\r\n A: b\r\n\r\n",
            "0\r\nA: b\n\r\n",
            "0\r\nA: \0\r\n\r\n",
            "1000000000000000\r\n",
            "ffffffffffffffffff\r\n",
        ] {
            assert_eq!(read(bad), Err(BadChunk), "{bad:?}");
        }
        assert_eq!(read(&format!("1{};\r\n", " ".repeat(300))), Err(BadChunk));
        assert_eq!(read(&format!("1;{}\r\n", "x".repeat(300))), Err(BadChunk));
        assert_eq!(read(&format!("0\r\nA: {}\r\n\r\n", "x".repeat(5000))), Err(BadChunk));
    }

    #[test]
    fn fuzz_chunks() {
        crate::fuzz::run("chunks", |input| {
            let mut at_once = Chunks::default();
            let all = at_once.advance(input);
            let mut chunks = Chunks::default();
            let mut taken = 0;
            for byte in input {
                match chunks.advance(std::slice::from_ref(byte)) {
                    Ok(n) => taken += n,
                    Err(BadChunk) => return assert_eq!(all, Err(BadChunk)),
                }
            }
            assert_eq!((all, at_once), (Ok(taken), chunks));
            assert!(taken == input.len() || chunks.is_done());
        });
    }
}
