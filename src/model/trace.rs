//! W3C Trace Context: the identity of a span, as `traceparent` and `tracestate` carry it.
//!
//! Plain data: the rooms that pass a trace on need no type of OpenTelemetry.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::Duration;

/// Longest `tracestate` that is passed on, in bytes. The standard asks for at least this. A longer one is
/// dropped as a whole, because a cut one could end in the middle of a member.
pub const TRACESTATE_BYTES_MAX: usize = 512;
/// Most members of a `tracestate`.
const MEMBERS_MAX: usize = 32;
/// Longest key and longest value of a member, in bytes.
const MEMBER_PART_BYTES_MAX: usize = 256;
/// The flag of a trace that is recorded.
const SAMPLED: u8 = 1;

/// The identity of a span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceContext {
    trace_id: u128,
    span_id: u64,
    flags: u8,
}

impl TraceContext {
    /// Length of a `traceparent`.
    pub const TEXT_BYTES: usize = 55;

    /// Neither id may be 0.
    pub fn new(trace_id: u128, span_id: u64, is_sampled: bool) -> Self {
        Self { trace_id, span_id, flags: u8::from(is_sampled) }
    }

    /// Parses a `traceparent`: `00-<32 hex>-<16 hex>-<2 hex>`, neither id all zeros. Of a higher version the
    /// part that version 00 has is used (W3C Trace Context, section 3.2.4).
    pub fn parse(text: &str) -> Option<Self> {
        let (bytes, rest) = text.as_bytes().split_at_checked(Self::TEXT_BYTES)?;
        let is_at = |at: usize| bytes[at] == b'-';
        let version = hex(&bytes[..2]).filter(|version| *version != 0xff)?;
        let may_follow = rest.is_empty() || version > 0 && rest[0] == b'-';
        if !(is_at(2) && is_at(35) && is_at(52) && may_follow) {
            return None;
        }
        let trace_id = hex(&bytes[3..35])?;
        let span_id = u64::try_from(hex(&bytes[36..52])?).ok()?;
        let flags = u8::try_from(hex(&bytes[53..])?).ok()?;
        (trace_id != 0 && span_id != 0).then_some(Self { trace_id, span_id, flags })
    }

    /// The `traceparent`.
    pub fn text(&self) -> [u8; Self::TEXT_BYTES] {
        let mut text = *b"00-00000000000000000000000000000000-0000000000000000-00";
        write_hex(&mut text[3..35], self.trace_id);
        write_hex(&mut text[36..52], u128::from(self.span_id));
        write_hex(&mut text[53..], u128::from(self.flags));
        text
    }

    /// Another span of the same trace, which is recorded.
    pub fn recorded_child(self, span_id: u64) -> Self {
        Self { span_id, flags: self.flags | SAMPLED, ..self }
    }

    pub fn trace_id(&self) -> u128 {
        self.trace_id
    }

    pub fn span_id(&self) -> u64 {
        self.span_id
    }

    pub fn flags(&self) -> u8 {
        self.flags
    }

    /// Whether the caller records its spans.
    pub fn is_sampled(&self) -> bool {
        self.flags & SAMPLED != 0
    }
}

impl std::fmt::Display for TraceContext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { trace_id, span_id, flags } = self;
        write!(f, "00-{trace_id:032x}-{span_id:016x}-{flags:02x}")
    }
}

/// Lower-case hexadecimal digits. Others are not valid in a `traceparent`.
fn hex(digits: &[u8]) -> Option<u128> {
    digits.iter().try_fold(0, |value: u128, digit| {
        let digit = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        Some(value << 4 | u128::from(digit))
    })
}

fn write_hex(place: &mut [u8], value: u128) {
    for (n, digit) in place.iter_mut().rev().enumerate() {
        *digit = b"0123456789abcdef"[(value >> (4 * n)) as usize & 15];
    }
}

/// The values of all `tracestate` fields of a request as one, if it is valid. The fields are one list (W3C
/// Trace Context, section 3.3).
pub fn tracestate<'a>(fields: impl IntoIterator<Item = &'a str>) -> Option<Cow<'a, str>> {
    let mut whole: Option<Cow<'a, str>> = None;
    for field in fields {
        whole = Some(match whole {
            None => Cow::Borrowed(field),
            // One beyond the bound is dropped below, so this does not grow further.
            Some(before) if before.len() > TRACESTATE_BYTES_MAX => before,
            Some(before) => Cow::Owned(format!("{before},{field}")),
        });
    }
    whole.filter(|text| is_tracestate(text))
}

/// Whether a text is a valid list of members, and short enough.
fn is_tracestate(text: &str) -> bool {
    let members = || text.split(',').map(|member| member.trim_matches([' ', '\t']));
    let named = members().filter(|member| !member.is_empty()).count();
    text.len() <= TRACESTATE_BYTES_MAX
        && (1..=MEMBERS_MAX).contains(&named)
        && members().all(|member| member.is_empty() || is_member(member))
}

fn is_member(member: &str) -> bool {
    let Some((key, value)) = member.split_once('=') else { return false };
    let fits = |part: &str| (1..=MEMBER_PART_BYTES_MAX).contains(&part.len());
    let is_first = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let is_key = |b: u8| is_first(b) || b"_-*/@".contains(&b);
    let is_value = |b: u8| (0x20..=0x7e).contains(&b) && b != b',' && b != b'=';
    fits(key)
        && fits(value)
        && key.bytes().next().is_some_and(is_first)
        && key.bytes().all(is_key)
        && value.bytes().all(is_value)
}

/// The span of a request that is recorded.
#[derive(Clone, Debug)]
pub struct RequestTrace {
    pub context: TraceContext,
    /// `X-Request-Id`.
    pub request_id: Arc<str>,
}

/// The trace of a job, if it is recorded, or if that is decided at its end.
#[derive(Debug, PartialEq, Eq)]
pub struct JobTrace {
    /// The span that the message names: `create` if the job is recorded, else that of the client.
    pub context: TraceContext,
    /// The gateway records the spans of the job.
    pub is_recorded: bool,
    /// The span of the request.
    pub parent: Option<u64>,
    /// The client's `tracestate`.
    pub state: Option<Box<str>>,
    /// When the message was created, since the Unix epoch.
    pub began: Duration,
    /// `X-Request-Id` of the request, for log lines.
    pub request_id: Option<Arc<str>>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traceparents() {
        let good = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        let read = TraceContext::parse(good).unwrap();
        assert!(read.is_sampled() && read.span_id() == 0xb7ad_6b71_6920_3331);
        for same in [good, &good.replace("-01", "-00"), &good.replace("-01", "-ff")] {
            let read = TraceContext::parse(same).unwrap();
            assert_eq!((read.to_string().as_str(), &read.text()[..]), (same, same.as_bytes()));
        }
        let child = TraceContext::parse(&good.replace("-01", "-02")).unwrap().recorded_child(1);
        assert_eq!(child.to_string(), "00-0af7651916cd43dd8448eb211c80319c-0000000000000001-03");
        for later in [good.replace("00-0a", "01-0a"), good.replace("00-0a", "fe-0a") + "-x"] {
            assert_eq!(TraceContext::parse(&later), Some(read), "{later}");
        }
        for bad in [
            "",
            "00",
            &(good.replace("00-0a", "01-0a") + "x"),
            &good.to_uppercase(),
            &good.replace("00-0a", "ff-0a"),
            &good.replace('-', "_"),
            &good.replace("-01", "-0g"),
            &good.replace("-01", "-ä"),
            &format!("{good}-x"),
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        ] {
            assert_eq!(TraceContext::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn tracestates() {
        let long = format!("a={}", "x".repeat(256));
        let (many, members) = ("a=1,".repeat(32), "a=1,".repeat(33));
        for good in ["a=1", "a=1,b@c=\"\\", "a=1, ,\tb-1/*_=2", "1a=x y", &long, &many] {
            assert_eq!(tracestate([good]).as_deref(), Some(good), "{good}");
        }
        let longer = format!("a={}", "x".repeat(257));
        let too_long = [long.as_str(), &long].join(",").replacen("a=", "b=", 1);
        for bad in ["", " , ", "a", "a=", "=1", "A=1", "-a=1", "a=1=2", "a=ä", "a=\n", &longer, &members] {
            assert_eq!(tracestate([bad]), None, "{bad}");
        }
        assert_eq!(tracestate([too_long.as_str()]), None, "{} bytes", too_long.len());
        assert_eq!(tracestate([]), None);
        assert_eq!(tracestate(["a=1", "b=2"]).as_deref(), Some("a=1,b=2"));
        assert_eq!(tracestate([long.as_str(), &long, &long]), None);
    }

    #[test]
    fn fuzz_trace_contexts() {
        crate::fuzz::run("trace_context", |input| {
            let Ok(text) = std::str::from_utf8(input) else { return };
            if let Some(read) = TraceContext::parse(text) {
                assert_eq!(read.to_string()[2..], text[2..TraceContext::TEXT_BYTES]);
            }
            if let Some(state) = tracestate(text.split('\n')) {
                assert!(state.len() <= TRACESTATE_BYTES_MAX && state.is_ascii());
            }
        });
    }
}
