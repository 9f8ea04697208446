//! The syntax that HTTP/1.1 and HTTP/2 share: tokens, values, targets and authorities (RFC 9110, RFC 3986).

/// The longest target that `http::Uri` accepts, in bytes.
pub const TARGET_BYTES_MAX: usize = 65_534;

/// The scheme of a target, which determines the default port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    Http,
    Https,
}

impl Scheme {
    pub fn parse(text: &[u8]) -> Option<Self> {
        match text {
            _ if text.eq_ignore_ascii_case(b"http") => Some(Self::Http),
            _ if text.eq_ignore_ascii_case(b"https") => Some(Self::Https),
            _ => None,
        }
    }

    fn default_port(self) -> &'static [u8] {
        match self {
            Self::Http => b"80",
            Self::Https => b"443",
        }
    }
}

/// `token` of RFC 9110, section 5.6.2.
pub fn is_token(name: &[u8]) -> bool {
    !name.is_empty() && name.iter().all(|b| TOKEN[usize::from(*b)])
}

/// Whether a list field (RFC 9110, section 5.6.1) has a member. Ignores case.
pub fn has_member(list: &[u8], member: &[u8]) -> bool {
    list.split(|b| *b == b',').any(|one| one.trim_ascii().eq_ignore_ascii_case(member))
}

/// Whether the byte is a control character, such as CR, LF or NUL, that field values must not contain. Tab is
/// allowed.
pub fn is_control(byte: u8) -> bool {
    (byte < 0x20 && byte != b'\t') || byte == 0x7f
}

/// Whether a target has only valid characters that `http::Uri` accepts.
///
/// Pingora would answer others with a response of its own, and would silently drop a fragment.
pub fn is_target(target: &[u8]) -> bool {
    let query = target.iter().position(|b| *b == b'?').unwrap_or(target.len());
    let (path, query) = target.split_at(query);
    let is_visible = |b: &u8| *b > b' ' && !matches!(b, 0x7f | b'#');
    !target.is_empty()
        && target.iter().all(is_visible)
        && !path.iter().any(|b| matches!(b, b'<' | b'>' | b'`'))
        && !query.iter().any(|b| matches!(b, b'"' | b'<' | b'>'))
        && std::str::from_utf8(target).is_ok()
}

/// Whether the text is a host with an optional port and no user information (RFC 3986, section 3.2).
pub fn is_authority(text: &[u8]) -> bool {
    let (host, port) = match text.iter().rposition(|b| *b == b':') {
        Some(colon) if text.last() != Some(&b']') => (&text[..colon], &text[colon + 1..]),
        _ => (text, &b""[..]),
    };
    let port = std::str::from_utf8(port).unwrap_or("x");
    let is_port =
        port.is_empty() || (port.bytes().all(|b| b.is_ascii_digit()) && port.parse::<u16>().is_ok());
    is_port && is_host(host)
}

/// A name, an IPv4 address, or an IPv6 address in brackets.
fn is_host(host: &[u8]) -> bool {
    if let Some(literal) = host.strip_prefix(b"[").and_then(|rest| rest.strip_suffix(b"]")) {
        return !literal.is_empty()
            && literal.iter().all(|b| b.is_ascii_hexdigit() || matches!(b, b':' | b'.'));
    }
    let is_valid = |b: &u8| b.is_ascii_alphanumeric() || b"-._~!$&'()*+;=".contains(b);
    !host.is_empty() && host.iter().all(is_valid)
}

/// Parses a `Content-Length` of 1 to 18 digits, which fit into a `u64`.
///
/// Signs and lists are rejected, since servers differ in how they read them.
pub fn length(value: &[u8]) -> Option<u64> {
    let is_number = (1..=18).contains(&value.len()) && value.iter().all(u8::is_ascii_digit);
    is_number.then(|| value.iter().fold(0, |sum, digit| sum * 10 + u64::from(digit - b'0')))
}

/// Whether both are the same host and port. Ignores case. No port means the default port of the scheme.
pub fn is_same_authority(scheme: Scheme, one: &[u8], other: &[u8]) -> bool {
    let bare = |authority: &'_ [u8]| -> usize {
        let without_port = authority.strip_suffix(scheme.default_port()).unwrap_or(authority);
        without_port.strip_suffix(b":").map_or(authority.len(), <[u8]>::len)
    };
    one[..bare(one)].eq_ignore_ascii_case(&other[..bare(other)])
}

static TOKEN: [bool; 256] = {
    let mut table = [false; 256];
    let mut b = 0;
    while b < 256 {
        let byte = b as u8;
        table[b] = byte.is_ascii_alphanumeric()
            || matches!(
                byte,
                b'!' | b'#'
                    | b'$'
                    | b'%'
                    | b'&'
                    | b'\''
                    | b'*'
                    | b'+'
                    | b'-'
                    | b'.'
                    | b'^'
                    | b'_'
                    | b'`'
                    | b'|'
                    | b'~'
            );
        b += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_port_may_be_omitted() {
        for (scheme, one, other, is_same) in [
            (Scheme::Http, "a", "A", true),
            (Scheme::Http, "a:80", "a", true),
            (Scheme::Http, "a:", "a:80", true),
            (Scheme::Http, "[::1]:80", "[::1]", true),
            (Scheme::Https, "a:443", "a", true),
            (Scheme::Https, "a:80", "a", false),
            (Scheme::Http, "a:443", "a", false),
            (Scheme::Http, "a:8080", "a", false),
            (Scheme::Http, "a80", "a", false),
            (Scheme::Http, "a.", "a", false),
            (Scheme::Http, "b", "a", false),
        ] {
            for (one, other) in [(one, other), (other, one)] {
                let same = is_same_authority(scheme, one.as_bytes(), other.as_bytes());
                assert_eq!(same, is_same, "{scheme:?} {one} {other}");
            }
        }
    }

    #[test]
    fn targets_and_authorities_are_validated() {
        for good in ["/", "*", "/a?b=c&d", "/\u{e4}", "/a|b", "/a\"b", "/?`"] {
            assert!(is_target(good.as_bytes()), "{good}");
        }
        for bad in ["", "/ ", "/#", "/a#b", "/<", "/?>", "/?\"", "/`", "/\t", "/\u{7f}"] {
            assert!(!is_target(bad.as_bytes()), "{bad:?}");
        }
        assert!(!is_target(b"/\xff"), "not UTF-8");
        for (authority, is_good) in [
            ("a", true),
            ("a:80", true),
            ("a:", true),
            ("a:65535", true),
            ("[::1]:80", true),
            ("[::1]", true),
            ("a_b.c-d~", true),
            ("", false),
            (":80", false),
            ("a:65536", false),
            ("a:+1", false),
            ("a:x", false),
            ("a:b:c", false),
            ("a:1:2", false),
            ("[::1", false),
            ("::1]", false),
            ("[]", false),
            ("[::1]x", false),
            ("a\"b", false),
            ("a%41", false),
            ("u@a", false),
            ("a/b", false),
            ("a, b", false),
            ("a,b", false),
            ("a\\b", false),
            ("\u{e4}", false),
            ("a#", false),
        ] {
            assert_eq!(is_authority(authority.as_bytes()), is_good, "{authority:?}");
        }
    }
}
