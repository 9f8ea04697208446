//! Rows on this node's disk, in three places:
//!
//! * `waiting`: the log table is away, and they wait for it.
//! * `failing`: the table takes other rows and not these. Each is tried alone every few seconds, so that none stands behind
//!   another.
//! * `aside`: the table has not taken them for long, or has refused them for good. They are kept for the operator, and
//!   nothing is done with them any more.
//!
//! All are [`Spill`]s. What one of them moves to another is in both for a moment, and never in none.

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
/// Bytes of rows that fail. Full: more of them stay where they are, in memory or among those that wait.
const FAILING_BYTES_MAX: u64 = 64 << 20;
/// Bytes of rows that were put aside. Full: more of them stay among those that fail, so that none is ever dropped.
const ASIDE_BYTES_MAX: u64 = 64 << 20;

pub struct RowDisk {
    pub(super) waiting: Spill,
    pub(super) failing: Spill,
    pub(super) aside: Spill,
    pub(super) aside_after: Duration,
    /// The directory of the node, which `dir` stands in.
    home: PathBuf,
    /// Rows were given up, and their jobs are to be looked up again.
    has_lost_rows: AtomicBool,
}

impl RowDisk {
    /// Opens what an earlier life has left in `dir`.
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

    /// The jobs whose rows are to come into the table from here. In the order in which rows move.
    pub(super) fn jobs(&self) -> impl Iterator<Item = (JobId, FunctionId)> {
        [&self.waiting, &self.failing].into_iter().flat_map(Spill::jobs)
    }

    /// Those whose late rows were here at the start.
    pub(super) fn late(&self) -> impl Iterator<Item = (JobId, FunctionId)> {
        [&self.waiting, &self.failing].into_iter().flat_map(Spill::late)
    }

    /// Finds out whether a disk that took no rows takes some again, and whether rows have vanished from it.
    pub fn probe(&self) {
        let spills = [&self.waiting, &self.failing, &self.aside];
        spills.into_iter().for_each(Spill::probe);
        if self.home.is_dir() {
            let gone: u64 = spills.into_iter().map(Spill::give_up_vanished).sum();
            self.has_lost_rows.fetch_or(gone > 0, Ordering::Relaxed);
        }
    }

    /// Whether rows were given up since the last call.
    pub(super) fn take_has_lost_rows(&self) -> bool {
        self.has_lost_rows.swap(false, Ordering::Relaxed)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.failing.is_empty()
    }
}
