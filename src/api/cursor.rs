//! Cursors of lists. A cursor is opaque to clients and valid for one list with one filter.
//!
//! It consists of the place where the next page starts, and an HMAC-SHA256 over that place and its context.
//! The HMAC key is derived from the master key. So every node of a fleet accepts the cursors of the others,
//! and clients cannot forge one.

use super::call::Call;
use super::problem::ApiError;
use super::reply::Reply;
use crate::config::Secret;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hmac::{Hmac, KeyInit, Mac};
use http::header::{HeaderValue, LINK};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC};
use sha2::Sha256;

type HmacSha256 = Hmac<Sha256>;

/// Binds the derived key to this purpose.
const PURPOSE: &[u8] = b"infra-controller/cursor/1";
/// Length of the truncated HMAC, in bytes. 128 bits cannot be guessed.
const TAG_BYTES: usize = 16;
/// Maximum length of a cursor, in bytes. A longer one is not decoded.
const LEN_MAX: usize = 2048;

/// The characters to escape in a query value: all but the unreserved ones of RFC 3986.
const RESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Creates and verifies cursors.
#[derive(Clone)]
pub struct Cursors {
    /// Keyed, without input. Each tag starts from a clone.
    mac: HmacSha256,
}

impl Cursors {
    /// `api_key` is the master key. Another master key invalidates all cursors.
    pub fn new(api_key: &Secret) -> Self {
        let derived = keyed(api_key.reveal().as_bytes()).chain_update(PURPOSE).finalize().into_bytes();
        Self { mac: keyed(&derived) }
    }

    /// Creates the cursor for the page after `place`. `context` names the list and its filter.
    pub fn seal(&self, context: &[&str], place: &str) -> String {
        let mut bytes = self.tag(context, place).to_vec();
        bytes.extend_from_slice(place.as_bytes());
        URL_SAFE_NO_PAD.encode(bytes)
    }

    /// The place in a cursor.
    ///
    /// # Errors
    /// `BadCursor` if it is malformed, or was created for another context or master key.
    pub fn open(&self, context: &[&str], cursor: &str) -> Result<String, ApiError> {
        self.try_open(context, cursor).ok_or(ApiError::BadCursor)
    }

    fn try_open(&self, context: &[&str], cursor: &str) -> Option<String> {
        let bytes = URL_SAFE_NO_PAD.decode(Some(cursor).filter(|c| c.len() <= LEN_MAX)?).ok()?;
        let (tag, place) = bytes.split_at_checked(TAG_BYTES)?;
        let place = std::str::from_utf8(place).ok()?;
        bool::from(subtle::ConstantTimeEq::ct_eq(tag, &self.tag(context, place)[..]))
            .then(|| place.to_owned())
    }

    fn tag(&self, context: &[&str], place: &str) -> [u8; TAG_BYTES] {
        let mut mac = self.mac.clone();
        for part in context.iter().chain(&[place]) {
            // Lengths are included, so that different parts never produce the same input.
            mac.update(&(part.len() as u64).to_be_bytes());
            mac.update(part.as_bytes());
        }
        let full = mac.finalize().into_bytes();
        std::array::from_fn(|i| full[i])
    }
}

/// Adds the `Link` to the next page: the path of the request with this query, without absent parameters.
pub fn with_next(reply: Reply, call: &Call, query: &[(&str, Option<&str>)]) -> Reply {
    let given = query.iter().filter_map(|(name, value)| Some((name, (*value)?)));
    let query: Vec<String> = given.map(|(name, value)| format!("{name}={}", encoded(value))).collect();
    let link = format!("<{}?{}>; rel=\"next\"", call.uri.path(), query.join("&"));
    match HeaderValue::try_from(link) {
        Ok(link) => reply.with(LINK, link),
        Err(_) => reply, // a path and encoded values are always visible ASCII
    }
}

fn encoded(value: &str) -> impl std::fmt::Display + '_ {
    percent_encoding::utf8_percent_encode(value, RESERVED)
}

fn keyed(key: &[u8]) -> HmacSha256 {
    HmacSha256::new_from_slice(key).expect("HMAC takes keys of any length")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_is_valid_for_its_list_only() {
        let cursors = Cursors::new(&Secret::new("k".into()));
        let cursor = cursors.seal(&["logs", "f", ""], "place");
        assert_eq!(cursors.open(&["logs", "f", ""], &cursor).unwrap(), "place");
        for context in [&["logs", "g", ""][..], &["logs", "f", "x"], &["logs", "f"], &["logsf", "", ""]] {
            assert!(cursors.open(context, &cursor).is_err(), "{context:?}");
        }
        let other = Cursors::new(&Secret::new("K".into()));
        assert!(other.open(&["logs", "f", ""], &cursor).is_err(), "another key");
    }

    #[test]
    fn a_modified_cursor_is_rejected() {
        let cursors = Cursors::new(&Secret::new("k".into()));
        let cursor = cursors.seal(&["x"], "place");
        for at in 0..cursor.len() {
            let mut bent = cursor.clone().into_bytes();
            bent[at] = if bent[at] == b'A' { b'B' } else { b'A' };
            assert!(cursors.open(&["x"], std::str::from_utf8(&bent).unwrap()).is_err(), "{at}");
        }
        for bad in ["", "A", &cursor[1..], &format!("{cursor}A"), &format!("{cursor}="), &"A".repeat(5000)] {
            assert!(cursors.open(&["x"], bad).is_err(), "{bad}");
        }
    }

    /// No input is accepted as a cursor, except one that was created by `seal`.
    #[test]
    fn fuzz_cursors() {
        let cursors = Cursors::new(&Secret::new("k".into()));
        let good = cursors.seal(&["list", "filter"], "place");
        crate::fuzz::run("cursor", |input| {
            let Ok(text) = std::str::from_utf8(input) else { return };
            assert!(
                cursors
                    .try_open(&["list", "filter"], text)
                    .is_none_or(|place| place == "place" && text == good)
            );
            let sealed = cursors.seal(&["list"], text);
            let opened = cursors.try_open(&["list"], &sealed);
            assert_eq!(opened.as_deref(), (sealed.len() <= LEN_MAX).then_some(text));
            assert_eq!(cursors.try_open(&["list", ""], &sealed), None, "a cursor is valid for one list only");
        });
    }
}
