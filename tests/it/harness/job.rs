//! Job ids and row keys by the documented format. They are implemented again here, so that tests do not
//! depend on the code under test.

/// The current time, in Unix milliseconds.
pub fn now_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("it is past 1970");
    u64::try_from(since.as_millis()).expect("milliseconds fit")
}

/// The parts of a job id, an RFC 9562 UUID of version 8.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdParts {
    pub node: u32,
    /// Unix milliseconds of acceptance.
    pub accepted_ms: u64,
    /// 48 bits.
    pub random: u64,
}

impl IdParts {
    /// Panics if `id` is not a job id in its canonical form.
    pub fn of(id: &str) -> Self {
        let groups: Vec<&str> = id.split('-').collect();
        assert_eq!(groups.iter().map(|g| g.len()).collect::<Vec<_>>(), [8, 4, 4, 4, 12], "{id}");
        assert!(id.bytes().all(|b| b == b'-' || b.is_ascii_digit() || (b'a'..=b'f').contains(&b)), "{id}");
        let hex = u128::from_str_radix(&groups.concat(), 16).expect("checked above");
        assert_eq!((hex >> 76) & 0xf, 8, "the version of {id}");
        assert_eq!((hex >> 62) & 0b11, 0b10, "the variant of {id}");
        // custom_a: 48 bits, custom_b: 12, custom_c: 62; together node 32, time 42, random 48.
        let custom = ((hex >> 80) << 74) | (((hex >> 64) & 0xfff) << 62) | (hex & ((1 << 62) - 1));
        let low = |bits: u128, count: u32| u64::try_from(bits & ((1 << count) - 1)).expect("fits");
        let node = u32::try_from(custom >> 90).expect("122 bits in all");
        Self { node, accepted_ms: low(custom >> 48, 42), random: low(custom, 48) }
    }

    /// The range key of the row of the job.
    pub fn row_key(self) -> String {
        let rest = (u128::from(self.node) << 48) | u128::from(self.random);
        format!("{}{rest:025}Z", self.timestamp().trim_end_matches('Z'))
    }

    /// The visible part of the key: RFC 3339 UTC with milliseconds.
    pub fn timestamp(self) -> String {
        let (days, ms) = (self.accepted_ms / 86_400_000, self.accepted_ms % 86_400_000);
        let (year, month, day) = date_of(days);
        let (h, m, s) = (ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60);
        format!("{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}.{:03}Z", ms % 1000)
    }
}

/// Days since 1970 to a Gregorian date, by Howard Hinnant's `civil_from_days`.
fn date_of(days: u64) -> (u64, u64, u64) {
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

#[test]
fn ids_match_a_hand_built_example() {
    // The bits of the fields side by side, then version and variant at their positions.
    let parts = IdParts { node: 0xdead_beef, accepted_ms: 1_795_305_600_123, random: 0x1234_5678_9abc };
    assert_eq!(parts.timestamp(), "2026-11-22T00:00:00.123Z");
    assert_eq!(parts.row_key().len(), "2026-11-22T00:00:00.1230123456789012345678901234Z".len());
    let custom = (0xdead_beef_u128 << 90) | (1_795_305_600_123_u128 << 48) | 0x1234_5678_9abc;
    let uuid = ((custom >> 74) << 80) | (8 << 76) | (((custom >> 62) & 0xfff) << 64) | (0b10 << 62);
    let hex = format!("{:032x}", uuid | (custom & ((1 << 62) - 1)));
    let id = format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]);
    assert_eq!(IdParts::of(&id), parts);
    assert!(id.starts_with("deadbeef-"), "{id}");
}
