//! Registers members that report at intervals: a hash with the last report of each and a sorted set with the
//! times, both in one slot. All times are those of Redis, so clocks need not agree.
//!
//! One key per member with its own expiry was rejected: listing them would require a scan of all keys.

use super::connection::CommandConnection;
use crate::backend::BackendError;
use crate::model::UnixMs;
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

    /// Replaces the report of a member. Returns `false`, and stores nothing, if there is no place for it.
    pub async fn put(&self, id: &str, report: &[u8]) -> Result<bool, BackendError> {
        let RegistryBounds { kept, members_max, .. } = self.bounds;
        let mut call = self.put.key(&self.reports_key);
        call.key(&self.seen_key).arg(id).arg(report);
        call.arg(ms(kept)).arg(members_max).arg(ms(kept + EXPIRY_SLACK));
        let call = &call;
        self.commands.run(async |mut connection| call.invoke_async(&mut connection).await).await
    }

    /// The listed members, sorted by id.
    pub async fn all(&self) -> Result<Vec<ReportRow>, BackendError> {
        let mut call = self.all.key(&self.reports_key);
        call.key(&self.seen_key).arg(ms(self.bounds.listed));
        let call = &call;
        let mut rows: Vec<ReportRow> =
            self.commands.run(async |mut connection| call.invoke_async(&mut connection).await).await?;
        rows.sort_by(|(a, ..), (b, ..)| a.cmp(b));
        Ok(rows)
    }
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
