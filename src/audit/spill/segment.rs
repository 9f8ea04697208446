//! The file format of a spill segment: a header, then for each row its length, its CRC-32 and the row as
//! JSON.

use crate::audit::{KeyedResult, Record};
use crate::model::{
    Execution, FunctionId, IdempotencyKey, JobId, NodeId, Recommendation, RowId, RowLife, Status, UnixMs,
};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use std::fs::File;
use std::io::{self, BufReader, Read as _, Seek, SeekFrom};
use std::path::Path;
use tokio::time::Instant;

/// The header of a segment: file type and format version.
pub const HEAD: &[u8] = b"icspill1";
/// File name under which the last segment with a torn tail is kept.
pub const TORN: &str = "torn";
/// Length and checksum, in bytes.
const FRAME: usize = 8;
/// Maximum length of a row, in bytes. The largest possible row is about 4 MB: its message with every
/// character escaped, and the largest stored result as a JSON array of numbers.
const RECORD_BYTES_MAX: usize = 8 << 20;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Bytes that hold the header and whole rows.
    pub len: u64,
    /// Bytes after them that do not form a whole row.
    pub torn: u64,
}

/// Rows of a segment, and the offset of their end.
pub struct ReadRows {
    pub records: Vec<Record>,
    pub end: u64,
}

pub fn name(number: u64) -> String {
    format!("{number:016}.rows")
}

/// The number in a file name.
pub fn number(name: &str) -> Option<u64> {
    name.strip_suffix(".rows").filter(|digits| digits.len() == 16)?.parse().ok()
}

/// The JSON form of a row.
#[derive(Serialize, Deserialize)]
struct RowJson<'a> {
    id: Cow<'a, str>,
    function: Cow<'a, str>,
    status: Cow<'a, str>,
    duration_ms: f64,
    handler_duration_ms: Option<f64>,
    memory_mb: u64,
    message: Cow<'a, str>,
    completed_at: Option<UnixMs>,
    expires_at_s: Option<u64>,
    advice: Option<StoredRecommendation>,
    kept: Option<(String, Vec<u8>)>,
    /// The members from here on are absent in segments of earlier versions.
    #[serde(default)]
    is_late: bool,
    #[serde(default)]
    is_shared: bool,
    #[serde(default)]
    cold_start: Option<bool>,
    #[serde(default)]
    life: StoredLife<'a>,
}

/// The JSON form of what a row tells of the life of its job. A row on the disk is not written yet.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct StoredLife<'a> {
    sent_at: Option<UnixMs>,
    confirmed_at: Option<UnixMs>,
    started_at: Option<UnixMs>,
    worker_id: Option<Cow<'a, str>>,
    ended_by: Option<Cow<'a, str>>,
    key_name: Option<Cow<'a, str>>,
    config_version: Option<u64>,
    allocated_mb: Option<u64>,
    trace_id: Option<Cow<'a, str>>,
    exit_code: Option<i64>,
}

impl<'a> StoredLife<'a> {
    fn of(life: &'a RowLife) -> Self {
        Self {
            sent_at: life.sent_at,
            confirmed_at: life.confirmed_at(),
            started_at: life.started_at,
            worker_id: life.worker_id.as_deref().map(Cow::Borrowed),
            ended_by: life.ended_by.map(|node| node.to_string().into()),
            key_name: life.key_name.as_deref().map(Cow::Borrowed),
            config_version: life.config_version,
            allocated_mb: life.allocated_mb,
            trace_id: life.trace_id.as_deref().map(Cow::Borrowed),
            exit_code: life.exit_code,
        }
    }

    fn into_life(self) -> RowLife {
        RowLife {
            sent_at: self.sent_at,
            confirmed_at: self.confirmed_at,
            started_at: self.started_at,
            written_at: None,
            worker_id: self.worker_id.map(|id| id.into_owned().into()),
            ended_by: self.ended_by.as_deref().and_then(NodeId::parse),
            key_name: self.key_name.as_deref().map(Into::into),
            config_version: self.config_version,
            allocated_mb: self.allocated_mb,
            trace_id: self.trace_id.as_deref().map(Into::into),
            exit_code: self.exit_code,
            progress: None,
        }
    }
}

#[derive(Serialize, Deserialize)]
struct StoredRecommendation {
    memory_mb: Option<u64>,
    tip: Option<String>,
    savings: Option<String>,
}

impl<'a> RowJson<'a> {
    fn of(record: &'a Record) -> Self {
        let row = &record.row;
        let advice = record.recommendation.as_ref().map(|r| StoredRecommendation {
            memory_mb: r.memory_mb,
            tip: r.tip.clone(),
            savings: r.savings.clone(),
        });
        Self {
            id: record.id.to_string().into(),
            function: row.function.as_str().into(),
            status: row.status.as_str().into(),
            duration_ms: row.duration_ms,
            handler_duration_ms: row.handler_duration_ms,
            memory_mb: row.memory_mb,
            message: row.message.as_str().into(),
            completed_at: row.completed_at,
            expires_at_s: row.expires_at_s,
            advice,
            kept: record.kept.as_ref().map(|kept| (kept.key.to_string(), kept.result.to_vec())),
            is_late: record.is_late,
            is_shared: record.is_shared,
            cold_start: row.cold_start,
            life: StoredLife::of(&row.life),
        }
    }

    fn into_record(self) -> Option<Record> {
        let id = JobId::parse(&self.id)?;
        let recommendation = self.advice.map(|advice| Recommendation {
            memory_mb: advice.memory_mb,
            tip: advice.tip,
            savings: advice.savings,
            request_id: id.to_string(),
            at: id.accepted_at(),
        });
        let kept = match self.kept {
            Some((key, result)) => {
                Some(Box::new(KeyedResult { key: IdempotencyKey::parse(&key)?, result: result.into() }))
            }
            None => None,
        };
        let row = Execution {
            function: FunctionId::parse(&self.function)?,
            id: RowId::Job(id),
            status: Status::new(&self.status),
            duration_ms: self.duration_ms,
            handler_duration_ms: self.handler_duration_ms,
            cold_start: self.cold_start,
            memory_mb: self.memory_mb,
            message: self.message.into_owned(),
            completed_at: self.completed_at,
            expires_at_s: self.expires_at_s,
            life: self.life.into_life(),
        };
        Some(Record {
            id,
            row,
            recommendation,
            kept,
            is_late: self.is_late,
            is_shared: self.is_shared,
            since: Instant::now(),
            counted: 0,
        })
    }
}

/// Appends a row to `bytes` in the format of a segment.
pub fn put(bytes: &mut Vec<u8>, record: &Record) -> io::Result<()> {
    let text = serde_json::to_vec(&RowJson::of(record))?;
    let len = u32::try_from(text.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    bytes.extend_from_slice(&len.to_le_bytes());
    bytes.extend_from_slice(&crc32fast::hash(&text).to_le_bytes());
    bytes.extend_from_slice(&text);
    Ok(())
}

/// Reads a segment and calls `row` for each whole row.
pub fn scan(path: &Path, mut row: impl FnMut(&Record)) -> io::Result<Segment> {
    let all = path.metadata()?.len();
    let mut rows = Rows::open(path, 0)?;
    let mut len = 0;
    let mut head = [0; HEAD.len()];
    if rows.0.read_exact(&mut head).is_ok() && head == HEAD {
        len = HEAD.len() as u64;
        while let Some((record, bytes)) = rows.next()? {
            len += bytes;
            row(&record);
        }
    }
    Ok(Segment { len, torn: all - len })
}

/// Returns up to `max` rows between the offsets `from` and `to`.
pub fn read(path: &Path, from: u64, to: u64, max: usize) -> io::Result<ReadRows> {
    let mut rows = Rows::open(path, from)?;
    let (mut records, mut end) = (Vec::new(), from);
    while records.len() < max && end < to {
        let Some((record, bytes)) = rows.next()? else { break };
        end += bytes;
        records.push(record);
    }
    Ok(ReadRows { records, end })
}

struct Rows(BufReader<File>);

impl Rows {
    fn open(path: &Path, from: u64) -> io::Result<Self> {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(from))?;
        Ok(Self(BufReader::new(file)))
    }

    /// The next whole row with its length in the file; `None` at the end of the file or if the next row is
    /// damaged.
    fn next(&mut self) -> io::Result<Option<(Record, u64)>> {
        let mut frame = [0; FRAME];
        if !self.fill(&mut frame)? {
            return Ok(None);
        }
        let number = |at: usize| u32::from_le_bytes([frame[at], frame[at + 1], frame[at + 2], frame[at + 3]]);
        let (len, crc) = (number(0) as usize, number(4));
        if len > RECORD_BYTES_MAX {
            return Ok(None);
        }
        let mut text = vec![0; len];
        if !self.fill(&mut text)? || crc32fast::hash(&text) != crc {
            return Ok(None);
        }
        let record = serde_json::from_slice::<RowJson<'_>>(&text).ok().and_then(RowJson::into_record);
        Ok(record.map(|record| (record, (FRAME + len) as u64)))
    }

    /// `false`: the file ends first.
    fn fill(&mut self, bytes: &mut [u8]) -> io::Result<bool> {
        match self.0.read_exact(bytes) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
            Err(e) => Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Scans a file with arbitrary content and checks that reading returns the rows that the scan reported.
    #[test]
    fn fuzz_spill_segments() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.rows");
        crate::fuzz::run("spill_segment", |input| {
            std::fs::write(&path, input).unwrap();
            let mut scanned = Vec::new();
            let segment =
                scan(&path, |record| scanned.push((record.id, record.row.function.clone()))).unwrap();
            assert_eq!(segment.len + segment.torn, input.len() as u64);
            if segment.len == 0 {
                return assert!(scanned.is_empty());
            }
            let read = read(&path, HEAD.len() as u64, segment.len, usize::MAX).unwrap();
            let records = read.records.iter().map(|record| (record.id, record.row.function.clone()));
            assert_eq!((records.collect::<Vec<_>>(), read.end), (scanned, segment.len));
            // Writing these rows again yields a segment with the same rows.
            let mut bytes = HEAD.to_vec();
            read.records.iter().for_each(|record| put(&mut bytes, record).unwrap());
            std::fs::write(&path, &bytes).unwrap();
            let again = super::read(&path, HEAD.len() as u64, bytes.len() as u64, usize::MAX).unwrap();
            assert_eq!((again.records.len(), again.end), (read.records.len(), bytes.len() as u64));
        });
    }
}
