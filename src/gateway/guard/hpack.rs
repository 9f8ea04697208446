//! HPACK (RFC 7541): decodes the header blocks of HTTP/2 clients, and encodes blocks for the server.
//!
//! Blocks are decoded with the dynamic table that the client fills. They are encoded without it: a field is
//! written as a literal, or refers to the static table. So each block can be decoded alone, and the guard may
//! change or replace blocks without affecting later ones.

use bytes::{BufMut, BytesMut};
use std::collections::VecDeque;
use std::ops::Range;

/// The limit of the dynamic table, in bytes as section 4.1 counts them. It is HTTP/2's initial value; the
/// server never advertises a larger one.
pub const TABLE_BYTES_MAX: usize = 4096;
/// The overhead of an entry besides its name and value, in bytes (section 4.1).
const ENTRY_BYTES: usize = 32;
/// The most bytes after the prefix of an integer. Their 28 bits exceed any length that occurs here.
const INTEGER_BYTES_MAX: usize = 4;

/// The block is malformed. Later blocks cannot be decoded either, since the state of the table is unknown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadBlock;

/// Decodes the blocks of one connection, in the order in which they were sent.
pub struct HpackDecoder {
    /// The newest entry first.
    entries: VecDeque<HeaderEntry>,
    bytes: usize,
    bytes_max: usize,
    name: Vec<u8>,
    value: Vec<u8>,
    name_index: u8,
}

/// An entry of the dynamic table: its name, followed by its value.
struct HeaderEntry {
    text: Box<[u8]>,
    name_len: usize,
    name_index: u8,
}

/// A decoded field.
#[derive(Clone, Copy, Debug)]
pub struct Field<'a> {
    pub name: &'a [u8],
    pub value: &'a [u8],
    /// The index of the name in the static table, if it was sent as an index. 0: unknown.
    pub name_index: u8,
}

impl HeaderEntry {
    fn bytes(&self) -> usize {
        self.text.len() + ENTRY_BYTES
    }
}

impl Default for HpackDecoder {
    fn default() -> Self {
        Self {
            entries: VecDeque::new(),
            bytes: 0,
            bytes_max: TABLE_BYTES_MAX,
            name: Vec::new(),
            value: Vec::new(),
            name_index: 0,
        }
    }
}

impl HpackDecoder {
    /// Decodes a complete block and calls `each` for each field.
    pub fn decode(&mut self, block: &[u8], mut each: impl FnMut(Field<'_>)) -> Result<(), BadBlock> {
        let mut rest = block;
        let mut may_resize = true;
        while let Some(first) = rest.first() {
            match first {
                0x80.. => {
                    each(self.entry(integer(&mut rest, 7)?)?);
                }
                0x40.. => {
                    self.literal(&mut rest, 6)?;
                    each(self.read());
                    self.insert();
                }
                0x20.. if may_resize => {
                    let bytes_max = integer(&mut rest, 5)?;
                    if bytes_max > TABLE_BYTES_MAX {
                        return Err(BadBlock);
                    }
                    self.bytes_max = bytes_max;
                    self.evict(0);
                    continue;
                }
                0x20.. => return Err(BadBlock),
                _ => {
                    self.literal(&mut rest, 4)?;
                    each(self.read());
                }
            }
            may_resize = false;
        }
        Ok(())
    }

    fn entry(&self, index: usize) -> Result<Field<'_>, BadBlock> {
        let place = index.checked_sub(1).ok_or(BadBlock)?;
        if let Some((name, value)) = STATIC_TABLE.get(place) {
            return Ok(Field { name: name.as_bytes(), value: value.as_bytes(), name_index: index as u8 });
        }
        let entry = self.entries.get(place - STATIC_TABLE.len()).ok_or(BadBlock)?;
        let (name, value) = entry.text.split_at(entry.name_len);
        Ok(Field { name, value, name_index: entry.name_index })
    }

    /// The literal field that was decoded last.
    fn read(&self) -> Field<'_> {
        Field { name: &self.name, value: &self.value, name_index: self.name_index }
    }

    /// Decodes a literal field into `self.name` and `self.value`.
    fn literal(&mut self, rest: &mut &[u8], prefix: u32) -> Result<(), BadBlock> {
        let (mut name, mut value) = (std::mem::take(&mut self.name), std::mem::take(&mut self.value));
        name.clear();
        value.clear();
        let index = integer(rest, prefix)?;
        self.name_index = 0;
        if index == 0 {
            string(rest, &mut name)?;
        } else {
            let known = self.entry(index)?;
            name.extend_from_slice(known.name);
            self.name_index = known.name_index;
        }
        string(rest, &mut value)?;
        (self.name, self.value) = (name, value);
        Ok(())
    }

    fn insert(&mut self) {
        let bytes = self.name.len() + self.value.len() + ENTRY_BYTES;
        self.evict(bytes);
        if bytes <= self.bytes_max {
            let text = [&*self.name, &*self.value].concat().into();
            let entry = HeaderEntry { text, name_len: self.name.len(), name_index: self.name_index };
            self.bytes += bytes;
            self.entries.push_front(entry);
        }
    }

    /// Evicts the oldest entries until `bytes` more fit.
    fn evict(&mut self, bytes: usize) {
        while self.bytes + bytes > self.bytes_max {
            let Some(oldest) = self.entries.pop_back() else { return };
            self.bytes -= oldest.bytes();
        }
    }
}

/// Decodes an integer with a prefix of `prefix` bits (section 5.1).
fn integer(rest: &mut &[u8], prefix: u32) -> Result<usize, BadBlock> {
    let (first, mut behind) = rest.split_first().ok_or(BadBlock)?;
    let most = (1_usize << prefix) - 1;
    let mut number = usize::from(*first) & most;
    if number == most {
        for shift in 0..INTEGER_BYTES_MAX {
            let (byte, left) = behind.split_first().ok_or(BadBlock)?;
            behind = left;
            number += usize::from(byte & 0x7f) << (7 * shift);
            if byte & 0x80 == 0 {
                *rest = behind;
                return Ok(number);
            }
        }
        return Err(BadBlock);
    }
    *rest = behind;
    Ok(number)
}

/// Decodes a string literal (section 5.2).
fn string(rest: &mut &[u8], to: &mut Vec<u8>) -> Result<(), BadBlock> {
    let is_huffman = rest.first().is_some_and(|first| first & 0x80 != 0);
    let len = integer(rest, 7)?;
    let (text, behind) = rest.split_at_checked(len).ok_or(BadBlock)?;
    *rest = behind;
    if is_huffman {
        return unpack(text, to);
    }
    to.extend_from_slice(text);
    Ok(())
}

/// Decodes a Huffman-encoded string (section 5.2, appendix B).
fn unpack(text: &[u8], to: &mut Vec<u8>) -> Result<(), BadBlock> {
    let (mut bits, mut held) = (0_u64, 0_u32);
    let mut text = text.iter();
    loop {
        while held <= 56
            && let Some(byte) = text.next()
        {
            bits = bits << 8 | u64::from(*byte);
            held += 8;
        }
        let Some((symbol, len)) = next_symbol(bits, held) else {
            // The rest must be padding: less than a byte, all ones, as in the code of the end-of-string
            // symbol.
            let is_padding = held < 8 && bits & ((1 << held) - 1) == (1 << held) - 1;
            return is_padding.then_some(()).ok_or(BadBlock);
        };
        held -= len;
        bits &= (1 << held) - 1;
        // 256 is the end-of-string symbol, which must not occur.
        to.push(u8::try_from(symbol).map_err(|_| BadBlock)?);
    }
}

/// The first symbol and the length of its code in bits. `None`: the bits contain no complete code.
fn next_symbol(bits: u64, held: u32) -> Option<(u16, u32)> {
    CODE.lengths.iter().filter(|_| held > 0).find_map(|length| {
        let past = held.checked_sub(length.bits)?;
        let place = u32::try_from(bits >> past).ok()?.checked_sub(length.first_code)?;
        let symbol = length.symbols.start + place as usize;
        length.symbols.contains(&symbol).then(|| (CODE.symbols[symbol], length.bits))
    })
}

/// The decoding tables of the Huffman code. The code is canonical: codes of one length are in the order of
/// their symbols, so the lengths alone determine it.
struct Code {
    lengths: Vec<CodeLength>,
    /// Sorted by the length of their code, then by value.
    symbols: Vec<u16>,
}

struct CodeLength {
    bits: u32,
    first_code: u32,
    /// The range of `Code::symbols` with codes of this length.
    symbols: Range<usize>,
}

static CODE: std::sync::LazyLock<Code> = std::sync::LazyLock::new(|| {
    let mut code = Code { lengths: Vec::new(), symbols: Vec::with_capacity(CODE_BITS.len()) };
    let mut next = 0_u32;
    for bits in 1..=30_u8 {
        next <<= 1;
        let from = code.symbols.len();
        code.symbols
            .extend((0_u16..).zip(CODE_BITS).filter(|(_, len)| *len == bits).map(|(symbol, _)| symbol));
        let symbols = from..code.symbols.len();
        if !symbols.is_empty() {
            let first_code = next;
            next += u32::try_from(symbols.len()).unwrap_or(u32::MAX);
            code.lengths.push(CodeLength { bits: bits.into(), first_code, symbols });
        }
    }
    code
});

/// Encodes a field as a literal without indexing. Its name refers to the static table if `name_index` is
/// known.
pub fn put_field(to: &mut BytesMut, field: Field<'_>) {
    // An index below this value fits into one byte (section 5.1).
    const MOST: u8 = 0xf;
    match field.name_index {
        0 => {
            to.put_u8(0);
            put_string(to, field.name);
        }
        index if index < MOST => to.put_u8(index),
        index => to.put_slice(&[MOST, index - MOST]),
    }
    put_string(to, field.value);
}

/// Encodes an indexed field of the static table.
pub fn put_index(to: &mut BytesMut, index: u8) {
    to.put_u8(0x80 | index);
}

fn put_string(to: &mut BytesMut, text: &[u8]) {
    const MOST: usize = 0x7f;
    if text.len() < MOST {
        to.put_u8(text.len() as u8);
    } else {
        to.put_u8(MOST as u8);
        let mut left = text.len() - MOST;
        while left > 0x7f {
            to.put_u8(left as u8 | 0x80);
            left >>= 7;
        }
        to.put_u8(left as u8);
    }
    to.put_slice(text);
}

/// The code length of each byte and of the end-of-string symbol, in bits (appendix B).
const CODE_BITS: [u8; 257] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, //
    28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28, //
    6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, //
    5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10, //
    13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, //
    7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6, //
    15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, //
    6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28, //
    20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23, //
    24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24, //
    22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, //
    21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23, //
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, //
    19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27, //
    20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, //
    26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26, //
    30,
];

/// The static table (appendix A).
const STATIC_TABLE: [(&str, &str); 61] = [
    (":authority", ""),
    (":method", "GET"),
    (":method", "POST"),
    (":path", "/"),
    (":path", "/index.html"),
    (":scheme", "http"),
    (":scheme", "https"),
    (":status", "200"),
    (":status", "204"),
    (":status", "206"),
    (":status", "304"),
    (":status", "400"),
    (":status", "404"),
    (":status", "500"),
    ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"),
    ("accept-language", ""),
    ("accept-ranges", ""),
    ("accept", ""),
    ("access-control-allow-origin", ""),
    ("age", ""),
    ("allow", ""),
    ("authorization", ""),
    ("cache-control", ""),
    ("content-disposition", ""),
    ("content-encoding", ""),
    ("content-language", ""),
    ("content-length", ""),
    ("content-location", ""),
    ("content-range", ""),
    ("content-type", ""),
    ("cookie", ""),
    ("date", ""),
    ("etag", ""),
    ("expect", ""),
    ("expires", ""),
    ("from", ""),
    ("host", ""),
    ("if-match", ""),
    ("if-modified-since", ""),
    ("if-none-match", ""),
    ("if-range", ""),
    ("if-unmodified-since", ""),
    ("last-modified", ""),
    ("link", ""),
    ("location", ""),
    ("max-forwards", ""),
    ("proxy-authenticate", ""),
    ("proxy-authorization", ""),
    ("range", ""),
    ("referer", ""),
    ("refresh", ""),
    ("retry-after", ""),
    ("server", ""),
    ("set-cookie", ""),
    ("strict-transport-security", ""),
    ("transfer-encoding", ""),
    ("user-agent", ""),
    ("vary", ""),
    ("via", ""),
    ("www-authenticate", ""),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(text: &str) -> Vec<u8> {
        let digits: Vec<u32> = text.chars().filter_map(|c| c.to_digit(16)).collect();
        digits.chunks(2).map(|pair| (pair[0] << 4 | pair[1]) as u8).collect()
    }

    fn decode(decoder: &mut HpackDecoder, block: &[u8]) -> Result<Vec<String>, BadBlock> {
        let mut fields = Vec::new();
        decoder.decode(block, |Field { name, value, .. }| {
            fields.push(format!("{}: {}", String::from_utf8_lossy(name), String::from_utf8_lossy(value)));
        })?;
        Ok(fields)
    }

    /// The examples of appendix C.3 and C.4 (with Huffman coding), and the table size after each.
    #[test]
    fn examples_of_the_rfc_are_decoded() {
        let expected = [
            &[":method: GET", ":scheme: http", ":path: /", ":authority: www.example.com"][..],
            &[
                ":method: GET",
                ":scheme: http",
                ":path: /",
                ":authority: www.example.com",
                "cache-control: no-cache",
            ],
            &[
                ":method: GET",
                ":scheme: https",
                ":path: /index.html",
                ":authority: www.example.com",
                "custom-key: custom-value",
            ],
        ];
        for blocks in [
            [
                "8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
                "8286 84be 5808 6e6f 2d63 6163 6865",
                "8287 85bf 400a 6375 7374 6f6d 2d6b 6579 0c63 7573 746f 6d2d 7661 6c75 65",
            ],
            [
                "8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff",
                "8286 84be 5886 a8eb 1064 9cbf",
                "8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf",
            ],
        ] {
            let mut decoder = HpackDecoder::default();
            for (block, (expected, bytes)) in blocks.iter().zip(expected.iter().zip([57, 110, 164])) {
                assert_eq!(decode(&mut decoder, &hex(block)).unwrap(), *expected);
                assert_eq!(decoder.bytes, bytes);
            }
        }
    }

    #[test]
    fn old_entries_are_evicted_and_the_table_can_shrink() {
        let mut decoder = HpackDecoder::default();
        let field = |n: u8| [&[0x40, 1, b'a' + n, 0x7f, 0x81, 0x0e][..], &[b'x'; 1920][..]].concat();
        assert_eq!(field(0)[3..6], [0x7f, 0x81, 0x0e], "127 + 1 + 14 * 128 bytes");
        for n in 0..3 {
            decode(&mut decoder, &field(n)).unwrap();
        }
        assert_eq!(decoder.entries.len(), 2);
        assert!(decode(&mut decoder, &[0x80 | 62]).unwrap()[0].starts_with("c: x"));
        assert!(decode(&mut decoder, &[0x80 | 63]).unwrap()[0].starts_with("b: x"));
        assert_eq!(decode(&mut decoder, &[0x80 | 64]), Err(BadBlock));
        // An entry larger than the table empties it (section 4.4).
        let large = [&[0x40, 1, b'l', 0x7f, 0x81, 0x1f][..], &[b'x'; 4096][..]].concat();
        decode(&mut decoder, &large).unwrap();
        assert_eq!((decoder.entries.len(), decoder.bytes), (0, 0));
        decode(&mut decoder, &field(0)).unwrap();
        assert_eq!(decode(&mut decoder, &[0x20, 0x82]).unwrap(), [":method: GET"]);
        assert_eq!((decoder.entries.len(), decoder.bytes_max), (0, 0));
    }

    #[test]
    fn malformed_blocks_are_rejected() {
        for bad in [
            "80",
            "be",
            "ff80 8080 8001",
            "ffff ffff ff0f",
            "40",
            "4001",
            "4001 61",
            "4001 6105 62",
            "0f",
            "7f",
            "3fe2 1f",
            "8220",
            // Huffman code: a whole byte of padding, padding that is not all ones, the end-of-string symbol.
            "0081 ff00",
            "0082 1fff 00",
            "0081 1800",
            "0084 ffff ffff 00",
        ] {
            assert_eq!(decode(&mut HpackDecoder::default(), &hex(bad)), Err(BadBlock), "{bad}");
        }
        assert_eq!(decode(&mut HpackDecoder::default(), &hex("3fe1 1f82")).unwrap(), [":method: GET"]);
    }

    #[test]
    fn encoded_fields_are_decoded_unchanged() {
        for len in [0, 1, 126, 127, 128, 254, 255, 256, 16_000, 70_000] {
            let value = "v".repeat(len);
            let mut block = BytesMut::new();
            for (name, name_index) in [(":path", 4), ("accept-charset", 15), ("via", 60), ("x-name", 0)] {
                put_field(&mut block, Field { name: name.as_bytes(), value: value.as_bytes(), name_index });
            }
            put_index(&mut block, 7);
            let read = decode(&mut HpackDecoder::default(), &block).unwrap();
            let expected =
                [":path", "accept-charset", "via", "x-name"].map(|name| format!("{name}: {value}"));
            assert_eq!(read, [&expected[..], &[":scheme: https".to_owned()]].concat(), "{len}");
        }
    }

    #[test]
    fn the_huffman_code_is_complete() {
        let used: u64 = CODE_BITS.iter().map(|bits| 1 << (30 - bits)).sum();
        assert_eq!(used, 1 << 30);
        let mut text = Vec::new();
        unpack(&[0b1111_1111, 0b1100_0111], &mut text).unwrap();
        assert_eq!(text, [0], "thirteen bits, then three bits of padding");
    }

    /// No input makes the decoder panic, and the table keeps its limit.
    #[test]
    fn fuzz_header_blocks() {
        crate::fuzz::run("header_block", |input| {
            let mut decoder = HpackDecoder::default();
            for block in input.split(|b| *b == b'\n') {
                let mut bytes = 0;
                let read = decoder.decode(block, |field| bytes += field.name.len() + field.value.len());
                assert!(decoder.bytes <= TABLE_BYTES_MAX);
                assert_eq!(decoder.bytes, decoder.entries.iter().map(HeaderEntry::bytes).sum::<usize>());
                assert!(bytes <= block.len() * TABLE_BYTES_MAX);
                if read.is_err() {
                    break;
                }
            }
        });
    }
}
