//! Rows that are written together, and what became of them.

use crate::audit::record::{KeyedResult, Record};
use crate::backend::BackendError;
use crate::metrics::Metrics;
use crate::model::{Execution, JobId, NodeId, Recommendation};
use std::collections::BTreeSet;
use tokio::time::Instant;

/// Where a row comes from.
#[derive(Clone, Copy)]
pub struct RowOrigin {
    pub is_late: bool,
    pub is_shared: bool,
    pub since: Instant,
    counted: usize,
}

/// Rows that are written together, with their recommendations.
#[derive(Default)]
pub struct Batch {
    pub(super) ids: Vec<JobId>,
    pub(super) rows: Vec<Execution>,
    pub(super) recommendations: Vec<Option<Recommendation>>,
    pub kept: Vec<Option<Box<KeyedResult>>>,
    pub origins: Vec<RowOrigin>,
    /// Size of the rows as counted when they were queued.
    pub(super) bytes: usize,
}

impl Batch {
    pub fn of(records: impl ExactSizeIterator<Item = Record>) -> Self {
        let n = records.len();
        let (ids, rows) = (Vec::with_capacity(n), Vec::with_capacity(n));
        let (recommendations, kept) = (Vec::with_capacity(n), Vec::with_capacity(n));
        let mut batch = Self { ids, rows, recommendations, kept, origins: Vec::with_capacity(n), bytes: 0 };
        for record in records {
            batch.push(record);
        }
        batch
    }

    pub fn push(&mut self, record: Record) {
        self.bytes += record.counted;
        self.ids.push(record.id);
        self.rows.push(record.row);
        self.recommendations.push(record.recommendation);
        self.kept.push(record.kept);
        let Record { is_late, is_shared, since, counted, .. } = record;
        self.origins.push(RowOrigin { is_late, is_shared, since, counted });
    }

    pub fn append(&mut self, mut other: Self) {
        if self.ids.is_empty() {
            *self = other;
            return;
        }
        self.bytes += other.bytes;
        self.ids.append(&mut other.ids);
        self.rows.append(&mut other.rows);
        self.recommendations.append(&mut other.recommendations);
        self.kept.append(&mut other.kept);
        self.origins.append(&mut other.origins);
    }

    pub fn into_records(self) -> impl Iterator<Item = Record> {
        let records = self.ids.into_iter().zip(self.rows).zip(self.recommendations).zip(self.kept);
        records.zip(self.origins).map(|((((id, row), recommendation), kept), origin)| Record {
            id,
            row,
            recommendation,
            kept,
            is_late: origin.is_late,
            is_shared: origin.is_shared,
            since: origin.since,
            counted: origin.counted,
        })
    }

    /// Moves repeated ids to a second batch: the table accepts each key once per call.
    pub fn split_repeats(self) -> (Self, Self) {
        let is_repeat = |n: usize| self.ids[..n].contains(&self.ids[n]);
        if !(0..self.ids.len()).any(is_repeat) {
            return (self, Self::default());
        }
        let (mut first, mut repeats) = (Self::default(), Self::default());
        for record in self.into_records() {
            if first.ids.contains(&record.id) { repeats.push(record) } else { first.push(record) }
        }
        (first, repeats)
    }

    /// Replaces a row by the one that the table has. If they differ, the result of this row does not count.
    pub fn keep(&mut self, n: usize, row: Execution) {
        if row.status != self.rows[n].status || row.message != self.rows[n].message {
            self.kept[n] = None;
        }
        self.rows[n] = row;
    }

    /// The jobs whose rows these are, without late results: the LOST row of such a job may still be on its
    /// way.
    pub fn ended(&self) -> Vec<JobId> {
        let rows = self.ids.iter().zip(&self.origins);
        rows.filter(|(_, origin)| !origin.is_late).map(|(id, _)| *id).collect()
    }

    /// Moves the rows of late results of these nodes to a second batch.
    pub fn split_late(self, nodes: &BTreeSet<NodeId>) -> (Self, Self) {
        let (mut others, mut late) = (Self::default(), Self::default());
        for record in self.into_records() {
            let is_of_them = record.is_late && nodes.contains(&record.id.node());
            if is_of_them { late.push(record) } else { others.push(record) }
        }
        (others, late)
    }

    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Groups the rows by the result of their write.
    pub fn split(self, results: Vec<Result<(), BackendError>>, metrics: &Metrics) -> CallOutcome {
        if results.iter().all(Result::is_ok) {
            metrics.audit.rows.inc_by(results.len() as u64);
            return CallOutcome { written: self, ..CallOutcome::default() };
        }
        let mut put = CallOutcome::default();
        for (record, result) in self.into_records().zip(results) {
            match result {
                Ok(()) => {
                    metrics.audit.rows.inc();
                    put.written.push(record);
                }
                Err(BackendError::Invalid(e)) => {
                    metrics.audit.rows_refused.inc();
                    tracing::error!(
                        requestId = %record.id,
                        functionId = %record.row.function,
                        error = e,
                        "Row Refused: the log table rejects it as invalid"
                    );
                    put.refused.push(record);
                }
                Err(e) => {
                    put.failure = Some(e);
                    put.failed.push(record);
                }
            }
        }
        put
    }
}

/// The outcome of a call for a batch.
#[derive(Default)]
pub struct CallOutcome {
    pub written: Batch,
    /// Rejected as invalid; never retried.
    pub refused: Vec<Record>,
    /// Rows to be retried, and the last error.
    pub failed: Batch,
    pub failure: Option<BackendError>,
    /// Not tried: the fleet could not be told of them before. That says nothing about the table or a row.
    pub untried: Batch,
}

impl CallOutcome {
    pub fn append(&mut self, other: Self) {
        self.written.append(other.written);
        self.refused.extend(other.refused);
        self.failed.append(other.failed);
        self.untried.append(other.untried);
        self.failure = self.failure.take().or(other.failure);
    }
}

/// Where the rows of a batch are now.
#[derive(Default)]
pub struct WriteOutcome {
    /// In the table, or put aside.
    pub(super) written: Batch,
    /// On this node's disk.
    pub(super) spilled: Batch,
}

pub fn batch_of(records: impl Iterator<Item = Record>) -> Batch {
    let mut batch = Batch::default();
    records.for_each(|record| batch.push(record));
    batch
}
