//! Decompresses request bodies (`Content-Encoding`, RFC 9110, section 8.4).
//!
//! The size of the output is bounded during decompression, so that a small body cannot fill the memory.

use crate::api::ApiError;
use bytes::{Buf, Bytes};
use flate2::write::{MultiGzDecoder, ZlibDecoder};
use http::HeaderMap;
use http::header::CONTENT_ENCODING;
use std::io::{self, Write};

/// A body that is decompressed piece by piece.
pub struct BodyDecoder {
    decoder: ContentDecoder,
    bytes_max: usize,
    /// Received bytes that are not decompressed yet.
    come: Bytes,
}

enum ContentDecoder {
    Gzip(MultiGzDecoder<BoundedOutput>),
    /// The coding `deflate` of HTTP: the zlib format (RFC 1950), not raw DEFLATE.
    Deflate(ZlibDecoder<BoundedOutput>),
}

/// The output of a decoder: the bytes not taken yet, and how many more may follow.
struct BoundedOutput {
    bytes: Vec<u8>,
    left: usize,
    is_full: bool,
}

impl Write for BoundedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > self.left {
            self.is_full = true;
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.left -= bytes.len();
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl BodyDecoder {
    /// For a body of at most `bytes_max` bytes once decompressed. `None`: the body is not compressed.
    ///
    /// # Errors
    /// The coding is not supported, or there are several.
    pub fn of(fields: &HeaderMap, bytes_max: usize) -> Result<Option<Self>, ApiError> {
        let mut named = fields.get_all(CONTENT_ENCODING).iter();
        let Some(coding) = named.next() else { return Ok(None) };
        if named.next().is_some() {
            return Err(ApiError::ContentCodingUnknown);
        }
        let room = BoundedOutput { bytes: Vec::new(), left: bytes_max, is_full: false };
        let coding = coding.as_bytes().trim_ascii();
        let decoder = match coding {
            b"" => return Ok(None),
            _ if coding.eq_ignore_ascii_case(b"identity") => return Ok(None),
            _ if coding.eq_ignore_ascii_case(b"gzip") || coding.eq_ignore_ascii_case(b"x-gzip") => {
                ContentDecoder::Gzip(MultiGzDecoder::new(room))
            }
            _ if coding.eq_ignore_ascii_case(b"deflate") => ContentDecoder::Deflate(ZlibDecoder::new(room)),
            _ => return Err(ApiError::ContentCodingUnknown),
        };
        Ok(Some(Self { decoder, bytes_max, come: Bytes::new() }))
    }

    /// Adds the next received piece. `next` must have returned `None` for the one before.
    pub fn feed(&mut self, piece: Bytes) {
        self.come = piece;
    }

    /// The next decompressed part of the received bytes, a few tens of KiB at most. `None`: more input is
    /// needed.
    ///
    /// # Errors
    /// The body is too large, or not valid in its coding.
    pub fn next(&mut self) -> Result<Option<Bytes>, ApiError> {
        while !self.come.is_empty() {
            let written = match &mut self.decoder {
                ContentDecoder::Gzip(decoder) => decoder.write(&self.come),
                ContentDecoder::Deflate(decoder) => decoder.write(&self.come),
            };
            // A decoder accepts no bytes after the end of the compressed data. Such bytes are an error.
            let written =
                written.and_then(|n| if n > 0 { Ok(n) } else { Err(io::ErrorKind::InvalidData.into()) });
            let consumed = *written.as_ref().unwrap_or(&0);
            let clear = self.taken(written.map(|_| ()))?;
            self.come.advance(consumed);
            if !clear.is_empty() {
                return Ok(Some(clear));
            }
        }
        let flushed = match &mut self.decoder {
            ContentDecoder::Gzip(decoder) => decoder.flush(),
            ContentDecoder::Deflate(decoder) => decoder.flush(),
        };
        Ok(Some(self.taken(flushed)?).filter(|clear| !clear.is_empty()))
    }

    /// Ends the body, and returns its last decompressed part.
    ///
    /// # Errors
    /// The body is too large, or its compressed data are incomplete.
    pub fn end(&mut self) -> Result<Bytes, ApiError> {
        let ended = match &mut self.decoder {
            ContentDecoder::Gzip(decoder) => decoder.try_finish(),
            ContentDecoder::Deflate(decoder) => decoder.try_finish(),
        };
        self.taken(ended)
    }

    fn taken(&mut self, written: io::Result<()>) -> Result<Bytes, ApiError> {
        let room = match &mut self.decoder {
            ContentDecoder::Gzip(decoder) => decoder.get_mut(),
            ContentDecoder::Deflate(decoder) => decoder.get_mut(),
        };
        let (is_full, bytes) = (room.is_full, std::mem::take(&mut room.bytes));
        match written {
            _ if is_full => Err(ApiError::BodyTooLarge { bytes_max: self.bytes_max }),
            Err(_) => Err(ApiError::BodyUndecodable),
            Ok(()) => Ok(bytes.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flate2::Compression;
    use flate2::write::{GzEncoder, ZlibEncoder};
    use http::HeaderValue;

    fn gzip(text: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    fn zlib(text: &[u8]) -> Vec<u8> {
        let mut encoder = ZlibEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(text).unwrap();
        encoder.finish().unwrap()
    }

    /// The decompressed body, or the problem code. The same for each way to cut the body into pieces.
    fn inflate(
        codings: &[&'static str],
        body: &[u8],
        bytes_max: usize,
    ) -> Result<Option<Vec<u8>>, &'static str> {
        let mut outcomes = Vec::new();
        for piece in [1, 7, body.len().max(1)] {
            let mut fields = HeaderMap::new();
            for coding in codings {
                fields.append(CONTENT_ENCODING, HeaderValue::from_static(coding));
            }
            let outcome = BodyDecoder::of(&fields, bytes_max).and_then(|inflating| {
                let Some(mut inflating) = inflating else { return Ok(None) };
                let mut text = Vec::new();
                for piece in body.chunks(piece) {
                    inflating.feed(Bytes::copy_from_slice(piece));
                    while let Some(clear) = inflating.next()? {
                        assert!(clear.len() <= 64 << 10, "a part of {} bytes", clear.len());
                        text.extend_from_slice(&clear);
                    }
                }
                text.extend_from_slice(&inflating.end()?);
                Ok(Some(text))
            });
            outcomes.push(outcome.map_err(|e| e.code()));
        }
        assert!(outcomes.iter().all(|outcome| *outcome == outcomes[0]), "{outcomes:?}");
        outcomes.remove(0)
    }

    #[test]
    fn known_codings_are_inflated() {
        let text = b"{\"functionId\":\"hello\"}".repeat(50);
        let (gzipped, zlibbed) = (gzip(&text), zlib(&text));
        for (coding, body) in
            [("gzip", &gzipped), ("GZip", &gzipped), ("x-gzip", &gzipped), ("deflate", &zlibbed)]
        {
            assert_eq!(inflate(&[coding], body, text.len()), Ok(Some(text.clone())), "{coding}");
            assert_eq!(inflate(&[coding], body, text.len() - 1), Err("body_too_large"), "{coding}");
        }
        assert_eq!(inflate(&["gzip"], &[gzip(b"a"), gzip(b"b")].concat(), 2), Ok(Some(b"ab".to_vec())));
        assert_eq!(inflate(&["gzip"], &gzip(b""), 0), Ok(Some(Vec::new())));
        for none in [&[][..], &["identity"], &["Identity"], &[""]] {
            assert_eq!(inflate(none, b"{}", 9), Ok(None), "{none:?}");
        }
    }

    #[test]
    fn unknown_codings_and_malformed_bodies_are_rejected() {
        for unknown in [&["br"][..], &["zstd"], &["gzip, gzip"], &["gzip", "identity"], &["compress"], &["*"]]
        {
            assert_eq!(inflate(unknown, b"{}", 9), Err("unsupported_content_coding"), "{unknown:?}");
        }
        let (gzipped, zlibbed) = (gzip(b"hello"), zlib(b"hello"));
        let mut corrupt = gzipped.clone();
        let checksum = corrupt.len() - 6;
        corrupt[checksum] ^= 1;
        for (what, coding, body) in [
            ("plain text", "gzip", &b"{\"functionId\":\"hello\"}"[..]),
            ("plain text", "deflate", b"{\"functionId\":\"hello\"}"),
            ("an empty body", "gzip", b""),
            ("an empty body", "deflate", b""),
            ("a truncated body", "gzip", &gzipped[..gzipped.len() / 2]),
            ("no checksum", "gzip", &gzipped[..gzipped.len() - 4]),
            ("a truncated body", "deflate", &zlibbed[..zlibbed.len() / 2]),
            ("a wrong checksum", "gzip", &corrupt),
            ("the other coding", "gzip", &zlibbed),
            ("the other coding", "deflate", &gzipped),
            ("trailing bytes", "gzip", &[&gzipped[..], b"more"].concat()),
            ("trailing bytes", "deflate", &[&zlibbed[..], b"more"].concat()),
        ] {
            assert_eq!(inflate(&[coding], body, 1 << 20), Err("body_undecodable"), "{what} as {coding}");
        }
    }

    /// A decompression bomb: 64 MiB from less than 100 kB.
    #[test]
    fn a_bomb_is_stopped_at_the_bound() {
        let bomb = gzip(&vec![0; 64 << 20]);
        assert!(bomb.len() < 100_000);
        let mut fields = HeaderMap::new();
        fields.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        let mut inflating = BodyDecoder::of(&fields, 1 << 20).unwrap().unwrap();
        inflating.feed(bomb.into());
        let mut bytes = 0;
        let refused = loop {
            match inflating.next() {
                Ok(clear) => bytes += clear.expect("more output").len(),
                Err(e) => break e,
            }
        };
        assert_eq!(refused.code(), "body_too_large");
        assert!((900 << 10..=1 << 20).contains(&bytes), "{bytes}");
    }
}
