//! The ids of nodes, processes and jobs.
//!
//! A job id contains the node that tracks the job and the acceptance time. So both are known without a
//! look-up: a node subscribes to the prefix of its own ids, and any node can compute the key of a row.

use super::time::UnixMs;
use super::trace::TraceContext;
use std::fmt;
use uuid::Uuid;

/// The id of one gateway node. It is part of each job id, so that results reach the node that waits for them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u32);

impl NodeId {
    /// Parses eight lower-case hexadecimal digits.
    pub fn parse(text: &str) -> Option<Self> {
        let ours = text.len() == 8 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        ours.then(|| u32::from_str_radix(text, 16).ok().map(Self))?
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A random number that identifies one process. It distinguishes processes that use the same node id.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ProcessToken(pub u64);

impl ProcessToken {
    /// Parses sixteen lower-case hexadecimal digits.
    pub fn parse(text: &str) -> Option<Self> {
        let ours = text.len() == 16 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        ours.then(|| u64::from_str_radix(text, 16).ok().map(Self))?
    }
}

impl fmt::Display for ProcessToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for ProcessToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// An RFC 9562 UUID, version 8: 32 bits of node id, 42 bits of acceptance time in Unix milliseconds, 48
/// random bits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(Uuid);

impl JobId {
    const RANDOM_BITS: u32 = 48;
    const TIME_BITS: u32 = 42;
    /// The bits after the variant field.
    const LOW_BITS: u32 = 62;

    /// The id of a job that `node` accepted at `at`. Only the low 48 bits of `random` and the low 42 bits of
    /// `at` are used.
    pub fn new(node: NodeId, at: UnixMs, random: u64) -> Self {
        let random = u128::from(random) & ((1 << Self::RANDOM_BITS) - 1);
        let time = u128::from(at) & ((1 << Self::TIME_BITS) - 1);
        let payload = (u128::from(node.0) << (Self::TIME_BITS + Self::RANDOM_BITS))
            | (time << Self::RANDOM_BITS)
            | random;
        // The 122 bits are placed around the 4 bits of the version and the 2 bits of the variant.
        let low = payload & ((1 << Self::LOW_BITS) - 1);
        let middle = (payload >> Self::LOW_BITS) & 0xfff;
        let high = payload >> (Self::LOW_BITS + 12);
        Self(Uuid::from_u128((high << 80) | (0x8 << 76) | (middle << 64) | (0b10 << 62) | low))
    }

    /// Returns `None` if `text` is not a UUID of version 8. Upper-case digits are accepted, as RFC 9562
    /// requires, because some clients store ids in upper case.
    pub fn parse(text: &str) -> Option<Self> {
        let uuid = Uuid::try_parse(text).ok()?;
        // Rejects the other forms that `Uuid` parses: braces, `urn:uuid:`, no hyphens.
        let hyphenated = text.len() == Self::TEXT_BYTES;
        let ours = uuid.get_version_num() == 8 && uuid.get_variant() == uuid::Variant::RFC4122;
        (hyphenated && ours).then_some(Self(uuid))
    }

    /// Length of an id as text, in bytes.
    pub const TEXT_BYTES: usize = 36;

    /// Writes the id as text to `place`, without an allocation.
    pub fn text<'a>(&self, place: &'a mut [u8; Self::TEXT_BYTES]) -> &'a str {
        self.0.as_hyphenated().encode_lower(place)
    }

    /// The reverse of [`Self::as_bytes`].
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(Uuid::from_bytes(bytes))
    }

    pub fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }

    /// The node that accepted the job.
    pub fn node(&self) -> NodeId {
        NodeId((self.0.as_u128() >> 96) as u32)
    }

    /// When the job was accepted.
    pub fn accepted_at(&self) -> UnixMs {
        ((self.payload() >> Self::RANDOM_BITS) & ((1 << Self::TIME_BITS) - 1)) as u64
    }

    /// The 80 bits apart from the time: node id, then random bits.
    pub(super) fn node_and_random(&self) -> u128 {
        (u128::from(self.node().0) << Self::RANDOM_BITS) | (self.payload() & ((1 << Self::RANDOM_BITS) - 1))
    }

    /// The time and the random bits: the 90 bits after the node id.
    fn payload(&self) -> u128 {
        let bits = self.0.as_u128();
        let low = bits & ((1 << Self::LOW_BITS) - 1);
        let middle = (bits >> 64) & 0xfff;
        let high = (bits >> 80) & 0xffff;
        (high << (Self::LOW_BITS + 12)) | (middle << Self::LOW_BITS) | low
    }

    /// A span that starts a new trace, which is not recorded. The trace id is the job id.
    pub fn trace(&self) -> TraceContext {
        // A span id of zeros is invalid.
        TraceContext::new(self.0.as_u128(), (self.0.as_u128() as u64) | 1, false)
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: UnixMs = 1_795_305_600_123;

    #[test]
    fn a_process_token_survives_a_round_trip() {
        for token in [0, 0xab, u64::MAX] {
            assert_eq!(ProcessToken::parse(&ProcessToken(token).to_string()), Some(ProcessToken(token)));
        }
        for bad in ["", "00000000000000a", "00000000000000aG", "00000000000000AB", "+0000000000000ab"] {
            assert_eq!(ProcessToken::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn an_id_contains_node_and_time() {
        for (node, at, random) in
            [(0, 0, 0), (u32::MAX, (1 << 42) - 1, u64::MAX), (0xdead_beef, AT, 0x1234_5678_9abc)]
        {
            let id = JobId::new(NodeId(node), at, random);
            assert_eq!((id.node(), id.accepted_at()), (NodeId(node), at));
            let text = id.to_string();
            assert!(text.starts_with(&format!("{node:08x}-")), "{text}");
            assert_eq!(text.as_bytes()[14], b'8', "version of {text}");
            assert!(b"89ab".contains(&text.as_bytes()[19]), "variant of {text}");
            assert_eq!(JobId::parse(&text), Some(id));
            assert_eq!(JobId::parse(&text.to_ascii_uppercase()), Some(id), "in upper case");
            assert_eq!(
                id.node_and_random(),
                (u128::from(node) << 48) | u128::from(random & 0xffff_ffff_ffff)
            );
        }
        for bad in [
            "",
            "x",
            "67e55044-10b1-426f-9247-bb680e5fe0c8",
            "{deadbeef-9c2a-8f00-8000-123456789abc}",
            "urn:uuid:deadbeef-9c2a-8f00-8000-123456789abc",
            "deadbeef9c2a8f008000123456789abc",
        ] {
            assert_eq!(JobId::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn fuzz_job_ids() {
        crate::fuzz::run("job_id", |input| {
            let Ok(text) = std::str::from_utf8(input) else { return };
            if let Some(id) = JobId::parse(text) {
                assert_eq!(id.to_string(), text.to_ascii_lowercase());
                assert_eq!(JobId::parse(&id.to_string()), Some(id));
                assert!(id.accepted_at() < 1 << 42);
            }
            if let Some(node) = NodeId::parse(text) {
                assert_eq!(NodeId::parse(&node.to_string()), Some(node));
            }
        });
    }
}
