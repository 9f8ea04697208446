//! `Via` (RFC 9110, section 7.6.3): the gateways that have forwarded a request.
//!
//! It detects loops: a request that already names this fleet is rejected.

use crate::api::ApiError;
use http::header::{HeaderMap, HeaderValue, VIA};
use http::{HeaderName, Version};
use sha2::{Digest, Sha256};

/// The name of a gateway in `Via`: the same on all nodes of a fleet, and different for each fleet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pseudonym(String);

impl Pseudonym {
    /// The pseudonym of the fleet that `common` identifies uniquely. `common` is hashed, so upstreams do not
    /// see it. It must not be a secret: a guess can be verified against the hash.
    pub fn of(common: &[u8]) -> Self {
        let hash = Sha256::digest(common);
        let short = u64::from_be_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|n: usize| hash[n]));
        Self(format!("infra-{short:016x}"))
    }

    /// The `Via` field of a forwarded request: the received entries, and this gateway.
    pub fn via(&self, fields: &HeaderMap, received: Version) -> Option<(HeaderName, HeaderValue)> {
        let version = match received {
            Version::HTTP_10 => "1.0",
            Version::HTTP_2 => "2",
            _ => "1.1",
        };
        let mut all = Vec::new();
        for before in fields.get_all(VIA) {
            all.extend_from_slice(before.as_bytes());
            all.extend_from_slice(b", ");
        }
        all.extend_from_slice(format!("{version} {}", self.0).as_bytes());
        Some((VIA, HeaderValue::from_bytes(&all).ok()?))
    }
}

/// Detects a forwarding loop.
///
/// # Errors
/// This fleet has already forwarded the request.
pub fn check(fields: &HeaderMap, pseudonym: &Pseudonym) -> Result<(), ApiError> {
    let is_ours = |hop: &[u8]| {
        let received_by =
            hop.trim_ascii().split(u8::is_ascii_whitespace).filter(|part| !part.is_empty()).nth(1);
        received_by.is_some_and(|name| name.eq_ignore_ascii_case(pseudonym.0.as_bytes()))
    };
    let mut hops = fields.get_all(VIA).iter().flat_map(|value| value.as_bytes().split(|b| *b == b','));
    if hops.any(is_ours) { Err(ApiError::LoopDetected) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(vias: &[&str]) -> HeaderMap {
        let mut fields = HeaderMap::new();
        for via in vias {
            fields.append(VIA, HeaderValue::from_str(via).unwrap());
        }
        fields
    }

    #[test]
    fn the_gateway_is_appended_to_via() {
        let ours = Pseudonym::of(b"a queue");
        for (before, version, expected) in [
            (&[][..], Version::HTTP_11, format!("1.1 {}", ours.0)),
            (&["1.0 fred, 1.1 p (nginx)"], Version::HTTP_2, format!("1.0 fred, 1.1 p (nginx), 2 {}", ours.0)),
            (&["1.0 a", "1.1 b"], Version::HTTP_10, format!("1.0 a, 1.1 b, 1.0 {}", ours.0)),
        ] {
            let (_, value) = ours.via(&fields(before), version).unwrap();
            assert_eq!(value, expected.as_str());
        }
    }

    #[test]
    fn a_loop_through_the_same_fleet_is_detected() {
        let (ours, other) = (Pseudonym::of(b"a queue"), Pseudonym::of(b"another queue"));
        assert_ne!(ours, other);
        for (vias, is_loop) in [
            (&[][..], false),
            (&["1.1 nginx"], false),
            (&[&*format!("1.1 {}", other.0)], false),
            (&[&*format!("1.1 {}x", ours.0)], false),
            (&[&*format!("1.1 other ({})", ours.0)], false),
            (&[&*format!("1.1 {}", ours.0)], true),
            (&[&*format!("1.1 a,2\t{} (x), 1.1 b", ours.0.to_uppercase())], true),
            (&["1.1 a", &*format!("1.1 {}", ours.0)], true),
        ] {
            assert_eq!(check(&fields(vias), &ours).is_err(), is_loop, "{vias:?}");
        }
    }
}
