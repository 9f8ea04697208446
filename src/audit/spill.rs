//! Stores rows on this node's disk while the log table does not accept them.
//!
//! Rows are appended to segments of a few MiB, and replayed from the oldest segment on. A segment whose rows
//! are all in the table is deleted. A row counts as spilled once it is synced to the disk. After a crash some
//! rows are replayed twice. That is harmless, because row writes are idempotent and a job ends once. A job
//! stays in the journal until its row is in the table. Its counters and its `/status` wait until then; the
//! row itself is already safe.
//!
//! All calls block. The flusher makes them on blocking threads.

mod segment;

use super::record::Record;
use crate::ambient::disk;
use crate::metrics::{DiskMetrics, Metrics};
use crate::model::{FunctionId, JobId};
use parking_lot::{Mutex, MutexGuard};
use segment::{ReadRows, Segment};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// A segment that has reached this size is closed, in bytes.
const SEGMENT_BYTES: u64 = 8 << 20;
/// A temporary file that is written to find out whether the disk has room.
const PROBE: &str = "probe";
/// Bytes of it that are written at once.
const PROBE_BLOCK: u64 = 1 << 16;
/// Segments whose files have been missing for this long, while the node's directory exists, are abandoned.
const GONE_AFTER: Duration = Duration::from_secs(10);

pub struct Spill {
    dir: PathBuf,
    bytes_max: u64,
    /// The number of the first segment of this process.
    first_own: u64,
    state: Mutex<SpillState>,
    is_full: AtomicBool,
    /// The gauges of this spill.
    on_disk: DiskMetrics,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct SpillState {
    /// By number, the oldest first.
    segments: BTreeMap<u64, Segment>,
    /// The segment that is appended to.
    open: Option<(u64, File)>,
    /// The number of the next segment. No number is used twice, even if a segment could not be created.
    next_number: u64,
    /// Segment number and offset of the next read.
    read_at: Option<(u64, u64)>,
    /// Size of the rows that were rejected last. The disk counts as usable again when it has room for that
    /// many bytes.
    refused_bytes: u64,
    /// Since when the files of all segments have been missing.
    missing_since: Option<Instant>,
    /// The jobs whose rows are here, except those with late rows.
    jobs: BTreeMap<JobId, FunctionId>,
    /// The jobs whose late rows were here at start.
    late: Vec<(JobId, FunctionId)>,
    /// The jobs that ended as LOST and whose rows were here at start.
    lost: Vec<(JobId, FunctionId)>,
    rows: u64,
}

impl SpillState {
    fn bytes(&self) -> u64 {
        self.segments.values().map(|segment| segment.len).sum()
    }
}

/// Rows to be replayed, and the offset of their end.
pub struct Replay {
    pub(super) records: Vec<Record>,
    segment: u64,
    end: u64,
    /// An earlier process of this node wrote them.
    pub(super) is_inherited: bool,
}

impl Spill {
    /// Opens the rows that an earlier process left in `dir`.
    pub(super) fn open(
        dir: &Path,
        bytes_max: u64,
        on_disk: &DiskMetrics,
        metrics: Arc<Metrics>,
    ) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let mut state = SpillState::default();
        for entry in fs::read_dir(dir)? {
            let name = entry?.file_name();
            let Some(number) = name.to_str().and_then(segment::number) else { continue };
            state.segments.insert(number, Segment::default());
        }
        for (number, segment) in &mut state.segments {
            let path = dir.join(segment::name(*number));
            let found = segment::scan(&path, |record| {
                let (id, function) = (record.id, record.row.function.clone());
                if record.row.is_lost() {
                    state.lost.push((id, function.clone()));
                }
                if record.is_late {
                    state.late.push((id, function));
                } else {
                    state.jobs.insert(id, function);
                }
                state.rows += 1;
            })?;
            if found.torn > 0 {
                metrics.audit.spill_torn_bytes.inc_by(found.torn);
                tracing::error!(
                    segment = number,
                    bytes = found.torn,
                    "Spilled rows are damaged and skipped; their jobs are looked up again"
                );
            }
            *segment = found;
        }
        state.next_number = state.segments.last_key_value().map_or(0, |(number, _)| number + 1);
        let spill = Self {
            dir: dir.to_owned(),
            bytes_max,
            first_own: state.next_number,
            state: Mutex::new(state),
            is_full: AtomicBool::new(false),
            on_disk: on_disk.clone(),
            metrics,
        };
        spill.publish(&spill.state());
        Ok(spill)
    }

    /// The jobs whose rows are here, except jobs that have left the journal as LOST.
    pub(super) fn jobs(&self) -> Vec<(JobId, FunctionId)> {
        self.state().jobs.iter().map(|(id, function)| (*id, function.clone())).collect()
    }

    /// The jobs whose late rows were here at start.
    pub(super) fn late(&self) -> Vec<(JobId, FunctionId)> {
        self.state().late.clone()
    }

    /// The jobs that ended as LOST and whose rows were here at start.
    pub(super) fn lost(&self) -> Vec<(JobId, FunctionId)> {
        self.state().lost.clone()
    }

    pub(super) fn rows(&self) -> u64 {
        self.state().rows
    }

    pub(super) fn is_empty(&self) -> bool {
        self.state().segments.is_empty()
    }

    /// Appends rows and syncs them. On an error none of them counts as spilled.
    pub(super) fn append(&self, records: &[Record]) -> io::Result<()> {
        if records.is_empty() {
            return Ok(());
        }
        let appended = self.try_append(records, self.bytes_max);
        self.note(&appended);
        appended
    }

    /// Tests whether a disk that rejected rows accepts rows again. Needed because no further row may arrive
    /// that would show it.
    pub fn probe(&self) {
        if self.is_full.load(Ordering::Relaxed) {
            let probed = self.try_probe();
            if probed.is_ok() {
                self.note(&probed);
            }
        }
    }

    /// Abandons segments whose files have vanished, because a directory was removed or another disk is
    /// mounted. Call it only while the directory of the node exists; otherwise the files may come back with
    /// it. Returns the number of abandoned rows.
    pub(super) fn give_up_vanished(&self) -> u64 {
        let mut state = self.state();
        let is_missing = |number: &u64| !self.path(*number).exists();
        // Segments that exist are replayed first. The jobs of the missing ones are known only when no other
        // segment is left.
        if state.segments.is_empty() || !state.segments.keys().all(is_missing) {
            state.missing_since = None;
            return 0;
        }
        let since = *state.missing_since.get_or_insert_with(Instant::now);
        if since.elapsed() < GONE_AFTER {
            return 0;
        }
        let rows = state.rows;
        let next_number = state.next_number;
        *state = SpillState { next_number, ..SpillState::default() };
        self.publish(&state);
        tracing::error!(
            dir = %self.dir.display(),
            rows,
            "Spilled rows are gone: their files have vanished. Their jobs are looked up again. If the files \
             come back, restart the node"
        );
        rows
    }

    fn try_probe(&self) -> io::Result<()> {
        let bytes = {
            let state = self.state();
            // Rows larger than the limit never fit, so their size must not keep the spill closed.
            let bytes = state.refused_bytes.min(self.bytes_max);
            self.check_bound(&state, bytes, self.bytes_max)?;
            bytes
        };
        self.make_dir()?;
        let path = self.dir.join(PROBE);
        let written = write_zeros(&path, bytes);
        match disk::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => written,
        }
    }

    fn note(&self, done: &io::Result<()>) {
        let is_full = done.is_err();
        if self.is_full.swap(is_full, Ordering::Relaxed) != is_full {
            match done {
                Ok(()) => tracing::info!(dir = %self.dir.display(), "The disk accepts spilled rows again"),
                Err(e) => tracing::error!(
                    dir = %self.dir.display(),
                    error = %e,
                    "Rows cannot be spilled and stay in memory; check the disk"
                ),
            }
        }
        self.on_disk.full.set(is_full.into());
    }

    fn check_bound(&self, state: &SpillState, bytes: u64, bytes_max: u64) -> io::Result<()> {
        if state.bytes() + bytes > bytes_max {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "the size limit of the spill is reached"));
        }
        Ok(())
    }

    /// Creates the directory again if it has vanished. Does not create its parents: if they are missing, a
    /// disk may not be mounted.
    fn make_dir(&self) -> io::Result<()> {
        match fs::create_dir(&self.dir) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(e),
            _ => Ok(()),
        }
    }

    /// Whether rows appended to this file can be found again after a restart.
    fn is_in_place(&self, number: u64, file: &File) -> bool {
        self.path(number).exists() && file.metadata().is_ok_and(|file| file.nlink() > 0)
    }

    /// Appends rows that were read from this spill, before [`Self::replayed`] removes the originals. The size
    /// limit does not apply, because the rows are here twice only for a moment.
    pub(super) fn put_back(&self, records: &[Record]) -> io::Result<()> {
        if records.is_empty() { Ok(()) } else { self.try_append(records, u64::MAX) }
    }

    fn try_append(&self, records: &[Record], bytes_max: u64) -> io::Result<()> {
        let mut text = Vec::new();
        let mut jobs = Vec::new();
        for record in records {
            segment::put(&mut text, record)?;
            if !record.is_late {
                jobs.push((record.id, record.row.function.clone()));
            }
        }
        let mut state = self.state();
        state.refused_bytes = text.len() as u64;
        self.check_bound(&state, text.len() as u64, bytes_max)?;
        let (number, mut file) = match state.open.take().filter(|(n, file)| self.is_in_place(*n, file)) {
            Some(open) => open,
            None => self.begin_segment(&mut state)?,
        };
        let written = disk::write_all(&mut file, &text).and_then(|()| disk::sync_data(&file));
        let segment = state.segments.entry(number).or_default();
        if let Err(e) = written {
            // Removes the partial write, so that a disk that stays full is not filled with fragments. If that
            // fails the segment has a torn tail, and the next rows go to a new segment.
            if disk::set_len(&file, segment.len).is_ok() {
                state.open = Some((number, file));
            }
            return Err(e);
        }
        segment.len += text.len() as u64;
        if segment.len < SEGMENT_BYTES {
            state.open = Some((number, file));
        }
        state.rows += records.len() as u64;
        if let Some(counter) = &self.on_disk.appended {
            counter.inc_by(records.len() as u64);
        }
        state.jobs.extend(jobs);
        self.publish(&state);
        Ok(())
    }

    fn begin_segment(&self, state: &mut SpillState) -> io::Result<(u64, File)> {
        let number = state.next_number;
        state.next_number += 1;
        self.make_dir()?;
        let mut file = disk::create_new(&self.path(number))?;
        // Syncs the directory too, so that the file entry survives a loss of power.
        let synced = || File::open(&self.dir)?.sync_all();
        if let Err(e) = disk::write_all(&mut file, segment::HEAD).and_then(|()| synced()) {
            // If the removal fails the next start finds an empty segment.
            let _ = disk::remove_file(&self.path(number));
            return Err(e);
        }
        state.segments.insert(number, Segment { len: segment::HEAD.len() as u64, torn: 0 });
        Ok((number, file))
    }

    /// Returns the next rows to be replayed, at most `max`. Returns the same rows until [`Self::replayed`] is
    /// called.
    pub(super) fn next(&self, max: usize) -> io::Result<Option<Replay>> {
        loop {
            let (number, len, from) = {
                let mut state = self.state();
                let Some(oldest) = state.segments.first_key_value().map(|(number, _)| *number) else {
                    return Ok(None);
                };
                // A missing file may come back with its disk. It must not block the segments that exist.
                let number = state.segments.keys().copied().find(|number| self.path(*number).exists());
                let number = number.unwrap_or(oldest);
                // A segment that is being replayed is not appended to.
                state.open.take_if(|(open, _)| *open == number);
                let len = state.segments.get(&number).map_or(0, |segment| segment.len);
                let read_at = state.read_at.filter(|(of, _)| *of == number).map_or(0, |(_, at)| at);
                (number, len, read_at.max(segment::HEAD.len() as u64))
            };
            let ReadRows { records, end } = segment::read(&self.path(number), from, len, max)?;
            if !records.is_empty() {
                let is_inherited = number < self.first_own;
                return Ok(Some(Replay { records, segment: number, end, is_inherited }));
            }
            if end < len {
                self.tear(number, len - end);
            }
            self.end_segment(number)?;
        }
    }

    /// All rows of the segment up to `end` are stored elsewhere: `rows` rows. The jobs in `ids` have no row
    /// here any more.
    pub(super) fn replayed(&self, segment: u64, end: u64, rows: usize, ids: &[JobId]) -> io::Result<()> {
        let is_done = {
            let mut state = self.state();
            state.read_at = Some((segment, end));
            state.rows = state.rows.saturating_sub(rows as u64);
            for id in ids {
                state.jobs.remove(id);
            }
            if let Some(counter) = &self.on_disk.replayed {
                counter.inc_by(rows as u64);
            }
            self.publish(&state);
            state.segments.get(&segment).is_none_or(|segment| end >= segment.len)
        };
        if is_done { self.end_segment(segment) } else { Ok(()) }
    }

    /// Reports that the end of a segment is unreadable, although it was readable when it was opened or
    /// written.
    fn tear(&self, number: u64, bytes: u64) {
        self.metrics.audit.spill_torn_bytes.inc_by(bytes);
        tracing::error!(
            segment = number,
            bytes,
            "Spilled rows became unreadable and are skipped; restart the node to look up their jobs again"
        );
        if let Some(segment) = self.state().segments.get_mut(&number) {
            segment.torn += bytes;
        }
    }

    /// Deletes a segment whose rows are all in the table. A segment with a torn tail is renamed and kept for
    /// inspection.
    fn end_segment(&self, number: u64) -> io::Result<()> {
        let path = self.path(number);
        let mut state = self.state();
        let Some(segment) = state.segments.remove(&number) else { return Ok(()) };
        state.read_at = None;
        let ended = if segment.torn > 0 {
            fs::rename(&path, self.dir.join(segment::TORN))
        } else {
            disk::remove_file(&path)
        };
        if state.segments.is_empty() {
            state.rows = 0;
            state.jobs.clear();
        }
        self.publish(&state);
        ended
    }

    fn path(&self, number: u64) -> PathBuf {
        self.dir.join(segment::name(number))
    }

    fn publish(&self, state: &SpillState) {
        let gauge = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        self.on_disk.rows.set(gauge(state.rows));
        self.on_disk.bytes.set(gauge(state.bytes()));
    }

    fn state(&self) -> MutexGuard<'_, SpillState> {
        self.state.lock()
    }
}

/// Writes and syncs a new file of this size.
fn write_zeros(path: &Path, bytes: u64) -> io::Result<()> {
    let block = vec![0; usize::try_from(bytes.min(PROBE_BLOCK)).unwrap_or_default()];
    let mut file = File::create(path)?;
    let mut left = bytes;
    while left > 0 {
        let now = usize::try_from(left).map_or(block.len(), |left| left.min(block.len()));
        disk::write_all(&mut file, &block[..now])?;
        left -= now as u64;
    }
    disk::sync_data(&file)
}

impl Replay {
    pub(super) fn place(&self) -> (u64, u64) {
        (self.segment, self.end)
    }
}

#[cfg(test)]
mod tests;
