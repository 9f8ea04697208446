//! The ids of nodes, processes and jobs.

use crate::model::UnixMs;
use std::fmt;
use uuid::Uuid;

/// Names one running gateway. Job ids carry it, so that results find their way back.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub u32);

impl NodeId {
    /// From eight lower-case hex digits.
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

/// Tells the processes apart that have, or claim, the same node id: a random number, new with each process.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ProcessToken(pub u64);

impl ProcessToken {
    /// From sixteen lower-case hex digits.
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

/// An RFC 9562 UUID, version 8: 32 bits node, 42 bits Unix milliseconds of acceptance, 48 bits random.
///
/// So the id says which node waits for the job and when it was accepted, without a look-up.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(Uuid);

impl JobId {
    const RANDOM_BITS: u32 = 48;
    const TIME_BITS: u32 = 42;
    /// Bits below the variant: the last 62 of the UUID.
    const LOW_BITS: u32 = 62;

    /// The id of a job accepted by `node` at `at`; of `random` the low 48 bits count.
    pub fn new(node: NodeId, at: UnixMs, random: u64) -> Self {
        let random = u128::from(random) & ((1 << Self::RANDOM_BITS) - 1);
        let time = u128::from(at) & ((1 << Self::TIME_BITS) - 1);
        let payload = (u128::from(node.0) << (Self::TIME_BITS + Self::RANDOM_BITS))
            | (time << Self::RANDOM_BITS)
            | random;
        // 122 bits of ours around the 4 of the version and the 2 of the variant.
        let low = payload & ((1 << Self::LOW_BITS) - 1);
        let middle = (payload >> Self::LOW_BITS) & 0xfff;
        let high = payload >> (Self::LOW_BITS + 12);
        Self(Uuid::from_u128((high << 80) | (0x8 << 76) | (middle << 64) | (0b10 << 62) | low))
    }

    /// `None` if `text` is not an id that some node of this kind made. The digits may be in capitals: RFC
    /// 9562 asks readers to ignore case, and some clients store ids so.
    pub fn parse(text: &str) -> Option<Self> {
        let uuid = Uuid::try_parse(text).ok()?;
        // Not the other forms that `Uuid` reads: braces, `urn:uuid:`, no hyphens.
        let hyphenated = text.len() == Self::TEXT_BYTES;
        let ours = uuid.get_version_num() == 8 && uuid.get_variant() == uuid::Variant::RFC4122;
        (hyphenated && ours).then_some(Self(uuid))
    }

    /// Length of an id as text.
    pub const TEXT_BYTES: usize = 36;

    /// The id as text, written to a place of the caller's.
    pub fn text<'a>(&self, place: &'a mut [u8; Self::TEXT_BYTES]) -> &'a str {
        self.0.as_hyphenated().encode_lower(place)
    }

    /// From the 16 bytes that [`Self::as_bytes`] gave.
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(Uuid::from_bytes(bytes))
    }

    pub fn as_bytes(&self) -> &[u8; 16] {
        self.0.as_bytes()
    }

    /// The node that waits for this job.
    pub fn node(&self) -> NodeId {
        NodeId((self.0.as_u128() >> 96) as u32)
    }

    /// When the job was accepted.
    pub fn accepted_at(&self) -> UnixMs {
        ((self.payload() >> Self::RANDOM_BITS) & ((1 << Self::TIME_BITS) - 1)) as u64
    }

    /// The 80 bits beside the time: node, then random.
    pub(super) fn node_and_random(&self) -> u128 {
        (u128::from(self.node().0) << Self::RANDOM_BITS) | (self.payload() & ((1 << Self::RANDOM_BITS) - 1))
    }

    /// Time and random: the 90 bits below the node.
    fn payload(&self) -> u128 {
        let bits = self.0.as_u128();
        let low = bits & ((1 << Self::LOW_BITS) - 1);
        let middle = (bits >> 64) & 0xfff;
        let high = (bits >> 80) & 0xffff;
        (high << (Self::LOW_BITS + 12)) | (middle << Self::LOW_BITS) | low
    }

    /// A W3C `traceparent` that starts a trace at this job.
    pub(super) fn traceparent(&self) -> [u8; 55] {
        let span = (self.0.as_u128() as u64) | 1; // a span id of zeros is invalid
        let mut text = *b"00-00000000000000000000000000000000-0000000000000000-00";
        self.0.as_simple().encode_lower(&mut text[3..35]);
        for (n, digit) in text[36..52].iter_mut().enumerate() {
            *digit = b"0123456789abcdef"[(span >> (60 - 4 * n)) as usize & 15];
        }
        text
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
