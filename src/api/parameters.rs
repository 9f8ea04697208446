//! Parses parameters of header fields (`; name="value"`): RFC 9110 section 5.6.6, and deviations that clients
//! send.
//!
//! The parsers of `multer` and `mime` were rejected. The first knows names in lower case only, and no
//! `filename*`. The second rejects an unquoted boundary that contains `=`, as JavaMail sends it.

use percent_encoding::percent_decode;
use std::borrow::Cow;

/// The value of a parameter. `name` is in lower case; the field may have any case. A valid extended form
/// (`name*`, RFC 8187) has precedence. Of several values the first counts.
pub fn parameter(field: &[u8], name: &str) -> Option<String> {
    let mut plain = None;
    let mut extended = None;
    each(field, |found, value| {
        let Ok(found) = std::str::from_utf8(found) else { return };
        if found.eq_ignore_ascii_case(name) {
            plain.get_or_insert_with(|| text(&value));
        } else if extended.is_none()
            && found.strip_suffix('*').is_some_and(|found| found.eq_ignore_ascii_case(name))
        {
            extended = decoded(&value);
        }
    });
    extended.or(plain)
}

/// Calls `show` with name and value of each parameter after the field's own value.
fn each<'a>(field: &'a [u8], mut show: impl FnMut(&'a [u8], Cow<'a, [u8]>)) {
    let mut rest = after(field, b';');
    while !rest.is_empty() {
        let end = rest.iter().position(|b| [b'=', b';'].contains(b)).unwrap_or(rest.len());
        let name = rest[..end].trim_ascii();
        if rest.get(end) != Some(&b'=') {
            // A name without a value, or nothing.
            rest = rest.get(end + 1..).unwrap_or_default();
            continue;
        }
        let value = rest[end + 1..].trim_ascii_start();
        if let Some(quoted) = value.strip_prefix(b"\"") {
            let (value, behind) = unquoted(quoted);
            show(name, value.into());
            rest = after(behind, b';');
        } else {
            let end = value.iter().position(|b| *b == b';').unwrap_or(value.len());
            show(name, value[..end].trim_ascii().into());
            rest = value.get(end + 1..).unwrap_or_default();
        }
    }
}

/// The bytes after the first `separator`; none without one.
fn after(bytes: &[u8], separator: u8) -> &[u8] {
    let at = bytes.iter().position(|b| *b == separator);
    at.and_then(|at| bytes.get(at + 1..)).unwrap_or_default()
}

/// Parses a quoted string from after its opening quote. Returns its value and the bytes after it. A backslash
/// escapes only a quote or a backslash, because browsers send Windows paths without escapes.
fn unquoted(quoted: &[u8]) -> (Vec<u8>, &[u8]) {
    let mut value = Vec::new();
    let mut bytes = quoted.iter().enumerate().peekable();
    while let Some((at, byte)) = bytes.next() {
        match byte {
            b'"' => return (value, &quoted[at + 1..]),
            b'\\' => {
                let escaped = bytes.next_if(|(_, next)| [b'"', b'\\'].contains(next));
                value.push(escaped.map_or(b'\\', |(_, next)| *next));
            }
            other => value.push(*other),
        }
    }
    // Without a closing quote everything is the value.
    (value, &[])
}

/// Decodes UTF-8, as RFC 7578 requires, and anything else as ISO 8859-1.
fn text(value: &[u8]) -> String {
    std::str::from_utf8(value).map_or_else(|_| latin_1(value), str::to_owned)
}

fn latin_1(value: &[u8]) -> String {
    value.iter().map(|byte| char::from(*byte)).collect()
}

/// Decodes an extended value such as `UTF-8'en'%e2%82%ac`. `None` if it is malformed, or in a character set
/// other than UTF-8 and ISO 8859-1.
fn decoded(value: &[u8]) -> Option<String> {
    let mut parts = value.splitn(3, |byte| *byte == b'\'');
    let (charset, _language, encoded) = (parts.next()?, parts.next()?, parts.next()?);
    let bytes: Cow<'_, [u8]> = percent_decode(encoded).into();
    match () {
        () if charset.eq_ignore_ascii_case(b"utf-8") => String::from_utf8(bytes.into_owned()).ok(),
        () if charset.eq_ignore_ascii_case(b"iso-8859-1") => Some(latin_1(&bytes)),
        () => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_in_the_forms_that_clients_send() {
        let cases: [(&[u8], Option<&str>); 31] = [
            (b"form-data; filename=a.zip", Some("a.zip")),
            (b"form-data; filename=\"a.zip\"", Some("a.zip")),
            (b"form-data;filename=a.zip;name=file", Some("a.zip")),
            (b"form-data ; FileName = \"a.zip\" ; name=file", Some("a.zip")),
            (b"form-data; FILENAME=a.zip", Some("a.zip")),
            (b"form-data; filename=a b.zip", Some("a b.zip")),
            (b"form-data; filename=\"a=b;c.zip\"; name=\"file\"", Some("a=b;c.zip")),
            (b"form-data; name=\"x; filename=no\"; filename=a", Some("a")),
            (b"form-data; name=\"x\\\"; filename=no\"; filename=a", Some("a")),
            (b"form-data; filename=a=b", Some("a=b")),
            (b"form-data; filename=\"a\\\"b\\\\c.zip\"", Some("a\"b\\c.zip")),
            (b"form-data; filename=\"C:\\dir\\a.zip\"", Some("C:\\dir\\a.zip")),
            ("form-data; filename=\"grüße.zip\"".as_bytes(), Some("grüße.zip")),
            ("form-data; filename=grüße.zip".as_bytes(), Some("grüße.zip")),
            (b"form-data; filename=\"gr\xfc\xdfe.zip\"", Some("grüße.zip")),
            (b"form-data; filename*=UTF-8''gr%C3%BC%C3%9Fe.zip", Some("grüße.zip")),
            (b"form-data; FileName*=utf-8'de'gr%c3%bc%c3%9fe.zip", Some("grüße.zip")),
            (b"form-data; filename*=\"utf-8''gr%C3%BC.zip\"", Some("grü.zip")),
            (b"form-data; filename*=iso-8859-1''gr%FC%DFe.zip", Some("grüße.zip")),
            (b"form-data; filename=\"a.zip\"; filename*=UTF-8''b.zip", Some("b.zip")),
            (b"form-data; filename*=UTF-8''b.zip; filename=\"a.zip\"", Some("b.zip")),
            (b"form-data; filename*=UTF-8''%ff; filename=a.zip", Some("a.zip")),
            (b"form-data; filename*=koi8-r''%ff; filename=a.zip", Some("a.zip")),
            (b"form-data; filename*=b.zip; filename=a.zip", Some("a.zip")),
            (b"form-data; filename=a; filename=b", Some("a")),
            (b"form-data; ; flag; filename=a; ", Some("a")),
            (b"form-data; filename=\"a.zip", Some("a.zip")),
            (b"form-data; filename=", Some("")),
            (b"form-data; filename=\"\"", Some("")),
            (b"form-data; name=\"filename\"; xfilename=b", None),
            (b"filename=a", None),
        ];
        for (field, expected) in cases {
            let found = parameter(field, "filename");
            assert_eq!(found.as_deref(), expected, "{}", String::from_utf8_lossy(field));
        }
    }

    #[test]
    fn boundaries() {
        for (field, expected) in [
            ("multipart/form-data; boundary=X", Some("X")),
            ("multipart/form-data; charset=utf-8; Boundary=\"X; y=z\"", Some("X; y=z")),
            ("multipart/form-data; boundary=----=_Part_1_2.3", Some("----=_Part_1_2.3")),
            ("multipart/form-data", None),
        ] {
            assert_eq!(parameter(field.as_bytes(), "boundary").as_deref(), expected, "{field}");
        }
    }
}
