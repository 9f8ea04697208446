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
use crate::metrics::{DiskMetrics, Metrics};
use crate::model::{FunctionId, JobId};
use segment::{ReadRows, Segment};
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Read as _, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A segment that has reached this size is closed, in bytes.
const SEGMENT_BYTES: u64 = 8 << 20;
/// A temporary file that is written to find out whether the disk has room.
const PROBE: &str = "probe";
/// Segments whose files have been missing for this long, while the node's directory exists, are abandoned.
const GONE_AFTER: Duration = Duration::from_secs(10);

pub struct Spill {
    dir: PathBuf,
    bytes_max: u64,
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
    jobs: HashMap<JobId, FunctionId>,
    /// The jobs whose late rows were here at start.
    late: Vec<(JobId, FunctionId)>,
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
            let found = segment::scan(&path, |id, function, is_late| {
                if is_late {
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
        let mut file = File::create(&path)?;
        let written = io::copy(&mut io::repeat(0).take(bytes), &mut file).and_then(|_| file.sync_data());
        fs::remove_file(&path)?;
        written
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
        let written = file.write_all(&text).and_then(|()| file.sync_data());
        let segment = state.segments.entry(number).or_default();
        if let Err(e) = written {
            // Removes the partial write, so that a disk that stays full is not filled with fragments. If that
            // fails the segment has a torn tail, and the next rows go to a new segment.
            if file.set_len(segment.len).is_ok() {
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
        let mut file = File::options().create_new(true).append(true).open(self.path(number))?;
        // Syncs the directory too, so that the file entry survives a loss of power.
        let synced = || File::open(&self.dir)?.sync_all();
        if let Err(e) = file.write_all(segment::HEAD).and_then(|()| synced()) {
            // If the removal fails the next start finds an empty segment.
            let _ = fs::remove_file(self.path(number));
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
                return Ok(Some(Replay { records, segment: number, end }));
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
            fs::remove_file(&path)
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
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Replay {
    pub(super) fn place(&self) -> (u64, u64) {
        (self.segment, self.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Execution, NodeId};

    pub(super) fn record(n: u64) -> Record {
        let id = JobId::new(NodeId(1), 1000, n);
        let mut row = Execution::lost(id, FunctionId::parse("f").unwrap(), false);
        row.message = format!("row {n} ä\u{0}\"");
        Record { id, row, recommendation: None, kept: None, is_late: false }
    }

    fn open(dir: &Path, bytes_max: u64) -> Spill {
        let metrics = Arc::new(Metrics::new(10).unwrap());
        Spill::open(dir, bytes_max, &metrics.audit.spill, Arc::clone(&metrics)).unwrap()
    }

    fn replay_all(spill: &Spill) -> Vec<JobId> {
        let mut ids = Vec::new();
        while let Some(replay) = spill.next(7).unwrap() {
            let (segment, end) = replay.place();
            let some: Vec<JobId> = replay.records.iter().map(|record| record.id).collect();
            spill.replayed(segment, end, some.len(), &some).unwrap();
            ids.extend(some);
        }
        ids
    }

    #[test]
    fn rows_are_replayed_in_order_also_after_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let records: Vec<Record> = (0..50).map(record).collect();
        let spill = open(dir.path(), 1 << 20);
        for records in records.chunks(9) {
            spill.append(records).unwrap();
        }
        // The process ends when half of them are replayed: the next one starts at the head of the segment.
        let first = spill.next(25).unwrap().unwrap();
        let (segment, end) = first.place();
        spill.replayed(segment, end, 0, &[]).unwrap();
        drop(spill);
        let spill = open(dir.path(), 1 << 20);
        assert_eq!((spill.metrics.audit.spill.rows.get(), spill.jobs().len()), (50, 50));
        spill.append(&[record(50)]).unwrap();
        let expected: Vec<JobId> = (0..=50).map(|n| record(n).id).collect();
        assert_eq!(replay_all(&spill), expected);
        assert!(spill.is_empty());
        assert_eq!((spill.metrics.audit.spill.rows.get(), spill.metrics.audit.spill.bytes.get()), (0, 0));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn rows_whose_files_have_vanished_are_abandoned_after_a_delay() {
        let dir = tempfile::tempdir().unwrap();
        let spill = open(&dir.path().join("spool"), 1 << 20);
        spill.append(&[record(1), record(2)]).unwrap();
        let long_ago = |spill: &Spill| {
            let since = &mut spill.state().missing_since;
            *since = since.map(|at| at.checked_sub(GONE_AFTER).unwrap());
        };
        assert_eq!(spill.give_up_vanished(), 0, "the files exist");
        let away = dir.path().join("away");
        fs::rename(&spill.dir, &away).unwrap();
        assert_eq!(spill.give_up_vanished(), 0, "the files may come back");
        fs::rename(&away, &spill.dir).unwrap();
        assert_eq!(spill.give_up_vanished(), 0, "the files are back");
        long_ago(&spill);
        fs::remove_dir_all(&spill.dir).unwrap();
        assert_eq!(spill.give_up_vanished(), 0, "the files have just vanished");
        long_ago(&spill);
        assert_eq!((spill.give_up_vanished(), spill.rows(), spill.jobs()), (2, 0, Vec::new()));
        assert!(spill.next(1).unwrap().is_none());
        // A file that comes back later is not overwritten.
        spill.append(&[record(3)]).unwrap();
        assert_eq!(replay_all(&spill), [record(3).id]);
    }

    #[test]
    fn the_size_limit_holds_and_replay_makes_room() {
        let dir = tempfile::tempdir().unwrap();
        let spill = open(dir.path(), 2000);
        let mut fit = 0;
        while spill.append(&[record(fit)]).is_ok() {
            fit += 1;
        }
        assert!(fit > 2, "{fit}");
        assert_eq!(spill.metrics.audit.spill.full.get(), 1);
        assert_eq!(replay_all(&spill).len() as u64, fit);
        spill.append(&[record(fit)]).unwrap();
        assert_eq!(spill.metrics.audit.spill.full.get(), 0);
    }

    /// No further row arrives that would show that there is room again.
    #[test]
    fn a_probe_finds_that_there_is_room_again() {
        let dir = tempfile::tempdir().unwrap();
        let spill_dir = dir.path().join("node").join("spill");
        let spill = open(&spill_dir, 2000);
        let is_full = || spill.metrics.audit.spill.full.get() == 1;
        let mut fit = 0;
        while spill.append(&[record(fit)]).is_ok() {
            fit += 1;
        }
        spill.probe();
        assert!(is_full(), "the size limit is still reached");
        replay_all(&spill);
        spill.probe();
        assert!(!is_full());
        assert_eq!(fs::read_dir(&spill_dir).unwrap().count(), 0, "the probe file is removed");

        fs::remove_dir_all(dir.path().join("node")).unwrap();
        assert!(spill.append(&[record(0)]).is_err());
        spill.probe();
        assert!(is_full(), "the parent directory is missing too");
        fs::create_dir(dir.path().join("node")).unwrap();
        spill.probe();
        assert!(!is_full() && spill_dir.is_dir());
    }

    /// Otherwise rows written to a deleted file would count as safe.
    #[test]
    fn rows_are_never_written_to_a_vanished_directory() {
        let dir = tempfile::tempdir().unwrap();
        let (there, away) = (dir.path().join("spill"), dir.path().join("away"));
        let spill = open(&there, 1 << 20);
        spill.append(&[record(0)]).unwrap();
        fs::rename(&there, &away).unwrap();
        spill.append(&[record(1)]).unwrap();
        assert_eq!(fs::read_dir(&there).unwrap().count(), 1, "the row is in a new directory");
        assert_eq!(
            spill.next(7).unwrap().unwrap().records[0].id,
            record(1).id,
            "the missing segment does not block the next one"
        );
        fs::rename(away.join(segment::name(0)), there.join(segment::name(0))).unwrap();
        assert_eq!(replay_all(&spill), [0, 1].map(|n| record(n).id));
        assert!(spill.is_empty());
    }

    #[test]
    fn unreadable_rows_are_counted_and_their_segment_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let spill = open(dir.path(), 1 << 20);
        spill.append(&(0..3).map(record).collect::<Vec<_>>()).unwrap();
        let path = dir.path().join(segment::name(0));
        let mut bytes = fs::read(&path).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(&path, &bytes).unwrap();
        assert_eq!(replay_all(&spill), [0, 1].map(|n| record(n).id));
        assert!(spill.metrics.audit.spill_torn_bytes.get() > 0);
        assert_eq!(fs::read(dir.path().join(segment::TORN)).unwrap(), bytes);
    }

    /// Writes to `/dev/full` fail as on a full disk.
    #[test]
    fn a_full_disk_leaves_no_fragments_and_is_used_again() {
        let dir = tempfile::tempdir().unwrap();
        let spill = open(dir.path(), 1 << 20);
        std::os::unix::fs::symlink("/dev/full", dir.path().join(segment::name(1))).unwrap();
        spill.append(&[record(0)]).unwrap();
        let full = File::options().append(true).open("/dev/full").unwrap();
        spill.state().open = Some((0, full));
        // First the rows do not fit, then the next segment cannot be created.
        for _ in 0..2 {
            assert!(spill.append(&[record(1)]).is_err());
        }
        assert_eq!(spill.metrics.audit.spill.full.get(), 1);
        spill.append(&[record(2)]).unwrap();
        assert_eq!(spill.metrics.audit.spill.full.get(), 0);
        assert_eq!(replay_all(&spill), [0, 2].map(|n| record(n).id));
    }

    #[test]
    fn a_torn_tail_loses_only_the_last_row() {
        let dir = tempfile::tempdir().unwrap();
        let spill = open(dir.path(), 1 << 20);
        let records: Vec<Record> = (0..3).map(record).collect();
        spill.append(&records).unwrap();
        drop(spill);
        let path = dir.path().join(segment::name(0));
        let whole = fs::read(&path).unwrap();
        let mut two = Vec::from(segment::HEAD);
        records[..2].iter().for_each(|record| segment::put(&mut two, record).unwrap());
        for cut in two.len() + 1..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let spill = open(dir.path(), 1 << 20);
            assert_eq!(spill.metrics.audit.spill_torn_bytes.get(), (cut - two.len()) as u64);
            // Later rows go to the next segment.
            spill.append(&[record(9)]).unwrap();
            assert_eq!(replay_all(&spill), [0, 1, 9].map(|n| record(n).id), "cut at {cut}");
            assert!(spill.is_empty());
        }
    }

    #[test]
    fn no_flipped_bit_yields_a_different_row() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(segment::name(0));
        let records: Vec<Record> = (0..3).map(record).collect();
        let mut whole = Vec::from(segment::HEAD);
        records.iter().for_each(|record| segment::put(&mut whole, record).unwrap());
        for at in 0..whole.len() {
            let mut bent = whole.clone();
            bent[at] ^= 1 << (at % 8);
            fs::write(&path, &bent).unwrap();
            let spill = open(dir.path(), 1 << 20);
            while let Some(replay) = spill.next(7).unwrap() {
                for read in &replay.records {
                    assert!(
                        records.iter().any(|r| r.id == read.id && r.row == read.row),
                        "bit flipped in byte {at}"
                    );
                }
                let (segment, end) = replay.place();
                spill.replayed(segment, end, 0, &[]).unwrap();
            }
        }
    }
}
