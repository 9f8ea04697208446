//! Holds rows on this node's disk in three places:
//!
//! * `waiting`: rows that wait because the log table is unavailable.
//! * `failing`: rows that the table rejects while it accepts others. Each is retried alone every few seconds,
//!   so that none blocks another.
//! * `aside`: rows that the table has rejected for a long time, or as invalid. They are kept for the operator
//!   and not retried.
//!
//! All three are [`Spill`]s. A row that moves from one to another is in both for a moment, never in none.

use super::spill::Spill;
use crate::config::AuditConf;
use crate::metrics::Metrics;
use crate::model::{FunctionId, JobId};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const FAILING: &str = "failing";
const ASIDE: &str = "aside";
/// Size limit of the failing rows, in bytes. When it is reached, more of them stay in memory or among the
/// waiting rows.
const FAILING_BYTES_MAX: u64 = 64 << 20;
/// Size limit of the rows put aside, in bytes. When it is reached, more of them stay among the failing rows.
/// None is dropped.
const ASIDE_BYTES_MAX: u64 = 64 << 20;

pub struct SpillDirs {
    pub(super) waiting: Spill,
    pub(super) failing: Spill,
    pub(super) aside: Spill,
    pub(super) aside_after: Duration,
    /// The directory of the node, the parent of `dir`.
    home: PathBuf,
    /// Rows were abandoned, and their jobs must be looked up again.
    has_lost_rows: AtomicBool,
}

impl SpillDirs {
    /// Opens the rows that an earlier process left in `dir`.
    pub fn open(dir: &Path, conf: &AuditConf, metrics: &Arc<Metrics>) -> io::Result<Self> {
        let of = &metrics.audit;
        let open = |dir: &Path, bytes_max, on_disk| Spill::open(dir, bytes_max, on_disk, Arc::clone(metrics));
        Ok(Self {
            waiting: open(dir, conf.spill_bytes_max, &of.spill)?,
            failing: open(&dir.join(FAILING), FAILING_BYTES_MAX, &of.failing)?,
            aside: open(&dir.join(ASIDE), ASIDE_BYTES_MAX, &of.aside)?,
            aside_after: Duration::from_secs(conf.aside_after_s),
            home: dir.parent().unwrap_or(dir).to_owned(),
            has_lost_rows: AtomicBool::new(false),
        })
    }

    /// The jobs whose rows here are still to be written to the table. Read in the order in which rows move.
    pub(super) fn jobs(&self) -> impl Iterator<Item = (JobId, FunctionId)> {
        [&self.waiting, &self.failing].into_iter().flat_map(Spill::jobs)
    }

    /// The jobs whose late rows were here at start.
    pub(super) fn late(&self) -> impl Iterator<Item = (JobId, FunctionId)> {
        [&self.waiting, &self.failing].into_iter().flat_map(Spill::late)
    }

    /// The jobs that ended as LOST and whose rows were here at start.
    pub(super) fn lost(&self) -> impl Iterator<Item = (JobId, FunctionId)> {
        [&self.waiting, &self.failing].into_iter().flat_map(Spill::lost)
    }

    /// Tests whether a disk that rejected rows accepts them again, and whether rows have vanished from it.
    pub fn probe(&self) {
        let spills = [&self.waiting, &self.failing, &self.aside];
        spills.into_iter().for_each(Spill::probe);
        if self.home.is_dir() {
            let gone: u64 = spills.into_iter().map(Spill::give_up_vanished).sum();
            self.has_lost_rows.fetch_or(gone > 0, Ordering::Relaxed);
        }
    }

    /// Whether rows were abandoned since the last call.
    pub(super) fn take_has_lost_rows(&self) -> bool {
        self.has_lost_rows.swap(false, Ordering::Relaxed)
    }

    /// Whether no row here is still to be written to the table.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.failing.is_empty()
    }
}
