//! Parser of `./.env`, compatible with that of the old controller.
//!
//! The crate `dotenvy` was rejected: it expands `$NAME` in values and rejects unquoted blanks. A password
//! that has worked so far could change, or prevent the start. The rules:
//!
//! * An assignment is `NAME=value` or `NAME: value`, with an optional `export` before it. Other lines are
//!   ignored.
//! * A value may be in single, double or back quotes, and then may span lines.
//! * `\n` and `\r` are expanded in double quotes only.
//! * `#` starts a comment outside quotes.
//! * The last assignment of a name wins.
//! * Lines end with LF, CR LF or CR. A byte order mark at the start is skipped.

use super::reader::{BYTE_ORDER_MARK, FileReader, is_utf16, text};
use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

/// Deadline for reading the file.
const READ_MAX: Duration = Duration::from_secs(5);

/// Reads the variables of the file; none if the file does not exist. The thread that reads has ended on
/// return.
///
/// # Errors
/// Why the file cannot be used, as text to append to its name.
pub fn read(path: &Path) -> Result<HashMap<String, String>, String> {
    let mut reader = FileReader::new(READ_MAX);
    let bytes = reader.read(path).map_err(|e| e.to_string())?.unwrap_or_default();
    if !reader.finish() {
        return Err("cannot be read: the reading thread does not end".to_owned());
    }
    match text(bytes.clone()) {
        Ok(text) => Ok(parse(&text)),
        Err(e) if bytes.contains(&0) || is_utf16(&bytes) => Err(e.to_string()),
        // The old controller replaced invalid UTF-8 in the same way.
        Err(_) => Ok(parse(&String::from_utf8_lossy(&bytes))),
    }
}

/// Parses the variables of `text`.
pub fn parse(text: &str) -> HashMap<String, String> {
    let text = text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text);
    let text = text.replace("\r\n", "\n").replace('\r', "\n");
    let mut vars = HashMap::new();
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let Some((name, value)) = assignment(rest) else {
            rest = after_line(rest);
            continue;
        };
        let (value, after) = quoted(value).unwrap_or_else(|| (bare(value), value));
        vars.insert(name.to_owned(), value);
        rest = after_line(after);
    }
    vars
}

/// The text after the first line of `text`.
fn after_line(text: &str) -> &str {
    text.split_once('\n').map_or("", |(_, after)| after)
}

fn first_line(text: &str) -> &str {
    text.split('\n').next().unwrap_or_default()
}

/// If the first line of `text` is an assignment, its name and the rest of the text from the value on.
fn assignment(text: &str) -> Option<(&str, &str)> {
    let blank = [' ', '\t', '\r'];
    let line = text.trim_start_matches(blank);
    let line = line
        .strip_prefix("export")
        .filter(|l| l.starts_with(blank))
        .unwrap_or(line)
        .trim_start_matches(blank);
    let is_name = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    let name_len = line.find(|c| !is_name(c)).filter(|&len| len > 0)?;
    let (name, after) = line.split_at(name_len);
    let value = match after.trim_start_matches([' ', '\t']).strip_prefix('=') {
        Some(value) => value,
        None => after.strip_prefix(':').filter(|v| v.starts_with(blank))?,
    };
    Some((name, value.trim_start_matches(blank)))
}

/// The quoted value, and the text after it. `None`: there are no quotes, they do not close, or other text
/// than a comment follows them.
fn quoted(value: &str) -> Option<(String, &str)> {
    let quote = value.chars().next().filter(|c| "'\"`".contains(*c))?;
    let mut escaped = false;
    let end = value[1..].find(|c| {
        let closes = c == quote && !escaped;
        escaped = c == '\\' && !escaped;
        closes
    })?;
    let (inner, after) = (&value[1..=end], &value[end + 2..]);
    let behind = first_line(after).trim();
    if !behind.is_empty() && !behind.starts_with('#') {
        return None;
    }
    let inner = if quote == '"' { inner.replace("\\n", "\n").replace("\\r", "\r") } else { inner.to_owned() };
    Some((inner, after))
}

fn bare(value: &str) -> String {
    first_line(value).split('#').next().unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_parsed() {
        for (text, name, value) in [
            ("A=b", "A", "b"),
            ("  export A = b c  # note\n", "A", "b c"),
            ("A: b", "A", "b"),
            ("A=", "A", ""),
            ("A=pa$$word${X}", "A", "pa$$word${X}"),
            ("A='x # y' # z", "A", "x # y"),
            ("A=\"x\\ny\"", "A", "x\ny"),
            ("A='x\\ny'", "A", "x\\ny"),
            ("A=`it's \"so\"`", "A", "it's \"so\""),
            ("A=\"one\ntwo\"\nB=c", "A", "one\ntwo"),
            ("A=\"one\ntwo\"\nB=c", "B", "c"),
            ("A=\"open\nB=c", "A", "\"open"),
            ("A=\"open\nB=c", "B", "c"),
            ("A=\"x\"y", "A", "\"x\"y"),
            ("A=1\nA=2", "A", "2"),
            ("# A=0\n\njunk\n= x\nA=1\r\nB=2\r\n", "A", "1"),
            ("# A=0\n\njunk\n= x\nA=1\r\nB=2\r\n", "B", "2"),
            ("A=1\rB=2\r", "A", "1"),
            ("A=1\rB=2\r", "B", "2"),
            ("# x\rexport B: 2 # y\r\rC='3'", "B", "2"),
            ("# x\rexport B: 2 # y\r\rC='3'", "C", "3"),
            ("A=\"one\r\ntwo\"\r\nB=c", "A", "one\ntwo"),
            ("\u{feff}A=1\nB=2", "A", "1"),
            ("\u{feff}export A=1\r\nB=2", "A", "1"),
            ("A=https://h/p?q=1&r", "A", "https://h/p?q=1&r"),
            ("A=\u{fc}'\"", "A", "\u{fc}'\""),
        ] {
            assert_eq!(parse(text).get(name).map(String::as_str), Some(value), "{text:?}");
        }
        for text in ["", "\n", "=", "A", "A b", ": x", "A:b", "export", "#A=1"] {
            assert!(parse(text).is_empty(), "{text:?}: {:?}", parse(text));
        }
    }

    #[test]
    fn encodings_are_read_or_rejected() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(".env");
        let wide = |text: &str, mark: &[u8], bytes: fn(u16) -> [u8; 2]| {
            [mark, &text.encode_utf16().flat_map(bytes).collect::<Vec<u8>>()].concat()
        };
        let le: fn(u16) -> [u8; 2] = u16::to_le_bytes;
        let be: fn(u16) -> [u8; 2] = u16::to_be_bytes;
        for (bytes, expected) in [
            (b"\xef\xbb\xbfA=1\n".to_vec(), Ok("1")),
            // The old controller replaced invalid UTF-8 in the same way.
            (b"A=1\nB=\xff\n".to_vec(), Ok("1")),
            (b"\xef\xbb\xbfA=1\nB=\xff\n".to_vec(), Ok("1")),
            (wide("A=1\n", b"\xff\xfe", le), Err("is UTF-16; save it as UTF-8")),
            (wide("A=1\n", b"\xfe\xff", be), Err("is UTF-16; save it as UTF-8")),
            (wide("A=1\n", b"", le), Err("is UTF-16; save it as UTF-8")),
            (wide("A=1\n", b"", be), Err("is UTF-16; save it as UTF-8")),
            (wide("\u{4e00}\u{4e01}", b"\xff\xfe", le), Err("is UTF-16; save it as UTF-8")),
            (b"A=1\n\0".to_vec(), Err("contains a NUL byte in line 2: it is binary, damaged or incomplete")),
        ] {
            std::fs::write(&path, &bytes).unwrap();
            let read = read(&path).map(|vars| vars.get("A").cloned().unwrap_or_default());
            assert_eq!(read, expected.map(str::to_owned).map_err(str::to_owned), "{bytes:?}");
        }
    }
}
