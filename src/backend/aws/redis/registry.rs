//! Registers members that report at intervals: a hash with the last report of each and a sorted set with the
//! times, both in one slot. All times are those of Redis, so clocks need not agree.
//!
//! One key per member with its own expiry was rejected: listing them would require a scan of all keys.

use super::connection::CommandConnection;
use crate::backend::BackendError;
use crate::model::{UnixMs, millis};
use bytes::Bytes;
use redis::Script;
use std::sync::Arc;
use std::time::Duration;

/// The keys of a registry whose members are gone expire this long after the last of them is removed.
const EXPIRY_SLACK: Duration = Duration::from_secs(60);

/// The members of one kind.
pub struct ReportRegistry {
    commands: Arc<CommandConnection>,
    reports_key: String,
    seen_key: String,
    bounds: RegistryBounds,
    put: Script,
    all: Script,
}

/// The bounds of a registry.
#[derive(Clone, Copy)]
pub struct RegistryBounds {
    /// How long a silent member is listed.
    pub listed: Duration,
    /// How long a silent member is kept, and takes one of the places.
    pub kept: Duration,
    /// Maximum number of members.
    pub members_max: usize,
}

/// Id, report, age in milliseconds, time of the report in Unix milliseconds.
pub type ReportRow = (Bytes, Bytes, u64, UnixMs);

/// What a report has met.
#[derive(Debug, PartialEq, Eq)]
pub enum PutOutcome {
    /// There is no place for the member. Nothing is stored.
    Full,
    /// `before`: the report that was replaced, its age in milliseconds, and its time in Unix milliseconds.
    Stored { before: Option<(Bytes, u64, UnixMs)> },
}

/// 1 if the report was stored; the report before, its age in milliseconds (-1: there was none, or it was not
/// wanted), and its time in Unix milliseconds.
type StoredRow = (u8, Bytes, i64, UnixMs);

impl ReportRegistry {
    /// The keys must be in one slot.
    pub fn new(
        commands: Arc<CommandConnection>,
        reports_key: String,
        seen_key: String,
        bounds: RegistryBounds,
    ) -> Self {
        let put = Script::new(include_str!("registry_put.lua"));
        let all = Script::new(include_str!("registry_all.lua"));
        Self { commands, reports_key, seen_key, bounds, put, all }
    }

    /// Replaces the report of a member. `wants_before`: whether the one that it replaces is returned.
    pub async fn put(&self, id: &str, report: &[u8], wants_before: bool) -> Result<PutOutcome, BackendError> {
        let RegistryBounds { kept, members_max, .. } = self.bounds;
        let mut call = self.put.key(&self.reports_key);
        call.key(&self.seen_key).arg(id).arg(report);
        call.arg(millis(kept)).arg(members_max).arg(millis(kept + EXPIRY_SLACK)).arg(u8::from(wants_before));
        let call = &call;
        let answer: StoredRow =
            self.commands.run(async |mut connection| call.invoke_async(&mut connection).await).await?;
        Ok(put_outcome(answer))
    }

    /// The listed members, sorted by id.
    pub async fn all(&self) -> Result<Vec<ReportRow>, BackendError> {
        let mut call = self.all.key(&self.reports_key);
        call.key(&self.seen_key).arg(millis(self.bounds.listed));
        let call = &call;
        let mut rows: Vec<ReportRow> =
            self.commands.run(async |mut connection| call.invoke_async(&mut connection).await).await?;
        rows.sort_by(|(a, ..), (b, ..)| a.cmp(b));
        Ok(rows)
    }
}

fn put_outcome((is_stored, report, age, at): StoredRow) -> PutOutcome {
    if is_stored == 0 {
        return PutOutcome::Full;
    }
    PutOutcome::Stored { before: u64::try_from(age).ok().map(|age| (report, age, at)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_before_is_known() {
        for (answer, outcome) in [
            ((0, "".into(), -1, 0), PutOutcome::Full),
            ((1, "".into(), -1, 0), PutOutcome::Stored { before: None }),
            ((1, "a".into(), 7, 93), PutOutcome::Stored { before: Some(("a".into(), 7, 93)) }),
        ] {
            assert_eq!(put_outcome(answer), outcome);
        }
    }
}
