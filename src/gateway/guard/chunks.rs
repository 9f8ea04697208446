//! Chunked bodies (RFC 9112, section 7.1): where they end, and whether they are written as they must be.
//!
//! Bare line feeds, signs, spaces and sizes that overflow are refused: each of them is read by some server in another
//! way, and then one's body is another's request.

/// Longest line of a size with its extensions, in bytes.
const SIZE_LINE_BYTES_MAX: usize = 256;
/// All trailer fields together.
const TRAILER_BYTES_MAX: usize = 4096;
/// Digits of a size: 2^60 bytes.
const SIZE_DIGITS_MAX: usize = 15;

/// Follows a chunked body through its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunks {
    at: At,
    size: u64,
    /// Digits of the size, then bytes of the line or of the trailer.
    read: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Size,
    /// Blanks before an extension, which old senders write (RFC 9112, section 7.1.1).
    SizeBlank,
    Extension,
    SizeLf,
    Data,
    DataCr,
    DataLf,
    /// At the start of a line of the trailer; an empty one ends the body.
    Trailer,
    TrailerLine,
    TrailerLf,
    LastLf,
    End,
}

/// The body is not written as chunks are.
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

    /// Reads on. How many of the bytes belong to the body: all, unless it ends among them.
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
            (At::Trailer, b' ' | b'\t') => return Err(BadChunk), // a folded line
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

    /// How many bytes belong to the body; `None`: it goes on.
    fn read(text: &str) -> Result<Option<usize>, BadChunk> {
        let mut at_once = Chunks::default();
        let all = at_once.advance(text.as_bytes()).map(|n| at_once.is_done().then_some(n));
        // Cut anywhere it is the same.
        for cut in 0..=text.len() {
            let mut chunks = Chunks::default();
            let (one, two) = text.as_bytes().split_at(cut);
            let parts = chunks.advance(one).and_then(|n| Ok(n + chunks.advance(two)?));
            assert_eq!(parts.map(|n| chunks.is_done().then_some(n)), all, "{text:?} cut at {cut}");
        }
        all
    }

    #[test]
    fn bodies_end_where_they_end() {
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
    fn what_others_may_read_otherwise_is_refused() {
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
