use super::*;
use crate::model::{Execution, NodeId, RowLife};

pub(super) fn record(n: u64) -> Record {
    let id = JobId::new(NodeId(1), 1000, n);
    let mut row = Execution::lost(id, FunctionId::parse("f").unwrap(), false);
    row.message = format!("row {n} ä\u{0}\"");
    Record {
        id,
        row,
        recommendation: None,
        kept: None,
        is_late: false,
        is_shared: false,
        since: tokio::time::Instant::now(),
        counted: 0,
    }
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
fn a_row_keeps_how_it_is_to_be_written() {
    let dir = tempfile::tempdir().unwrap();
    let spill = open(dir.path(), 1 << 20);
    let kinds = [(false, false), (true, false), (false, true), (true, true)];
    let records: Vec<Record> = kinds
        .iter()
        .zip(0..)
        .map(|(&(is_late, is_shared), n)| Record { is_late, is_shared, ..record(n) })
        .collect();
    spill.append(&records).unwrap();
    let replay = spill.next(10).unwrap().unwrap();
    let read: Vec<_> = replay.records.iter().map(|record| (record.is_late, record.is_shared)).collect();
    assert_eq!(read, kinds);
}

#[test]
fn a_row_keeps_the_life_of_its_job() {
    let dir = tempfile::tempdir().unwrap();
    let spill = open(dir.path(), 1 << 20);
    let life = RowLife { written_at: None, ..RowLife::sample() };
    let mut with_life = record(1);
    with_life.row.life = life.clone();
    spill.append(&[with_life, record(2)]).unwrap();
    let replay = spill.next(10).unwrap().unwrap();
    let read: Vec<_> = replay.records.iter().map(|record| record.row.life.clone()).collect();
    assert_eq!(read, [life, RowLife::default()]);
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
