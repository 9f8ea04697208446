//! The execution log: rows and counters on their way to the tables, in memory and on the disk.

use super::register::{counter, gauge};
use prometheus::{IntCounter, IntGauge, Registry};

/// The metrics of rows and counters that are being written.
pub struct AuditMetrics {
    pub waiting_rows: IntGauge,
    pub rows: IntCounter,
    /// Rows that wait until the log table is available.
    pub spill: DiskMetrics,
    /// Rows that the log table rejects while it accepts others.
    pub failing: DiskMetrics,
    /// Rows that are kept for the operator.
    pub aside: DiskMetrics,
    pub rows_put_aside: IntCounter,
    /// The bytes of incomplete rows.
    pub spill_torn_bytes: IntCounter,
    pub retries: IntCounter,
    pub rows_refused: IntCounter,
    pub waiting_ends: IntGauge,
    /// Functions with a recommendation that waits are included.
    pub waiting_functions: IntGauge,
}

impl AuditMetrics {
    pub(super) fn new(r: &Registry) -> prometheus::Result<Self> {
        Ok(Self {
            spill: DiskMetrics {
                rows: gauge(r, "infra_audit_spill_rows", "Rows on disk because the log table is away.")?,
                bytes: gauge(r, "infra_audit_spill_bytes", "Size of the spilled rows, in bytes.")?,
                full: gauge(r, "infra_audit_spill_full", "1 while no more rows can be spilled.")?,
                appended: Some(counter(r, "infra_audit_spilled_rows_total", "Rows written to the disk.")?),
                replayed: Some(counter(
                    r,
                    "infra_audit_replayed_rows_total",
                    "Rows moved from the disk to the table.",
                )?),
            },
            failing: DiskMetrics::new(r, "failing", "that fail alone")?,
            aside: DiskMetrics::new(r, "aside", "set aside for the operator")?,
            rows_put_aside: counter(
                r,
                "infra_audit_rows_put_aside_total",
                "Rows that were set aside for the operator.",
            )?,
            spill_torn_bytes: counter(
                r,
                "infra_audit_spill_torn_bytes_total",
                "Bytes on disk that a crash left unreadable.",
            )?,
            waiting_rows: gauge(
                r,
                "infra_audit_waiting_rows",
                "Rows in memory that wait for the log table.",
            )?,
            rows: counter(r, "infra_audit_rows_total", "Rows written to the log table.")?,
            retries: counter(r, "infra_audit_retries_total", "Row writes that failed and are retried.")?,
            rows_refused: counter(
                r,
                "infra_audit_rows_refused_total",
                "Rows that the table rejected as invalid.",
            )?,
            waiting_ends: gauge(
                r,
                "infra_audit_waiting_ends",
                "Jobs with a row that are still in the journal.",
            )?,
            waiting_functions: gauge(
                r,
                "infra_audit_waiting_functions",
                "Functions whose counters wait to be written.",
            )?,
        })
    }
}

/// The metrics of the rows in one directory on the disk.
#[derive(Clone)]
pub struct DiskMetrics {
    pub rows: IntGauge,
    pub bytes: IntGauge,
    /// 1 while no more rows can be stored.
    pub full: IntGauge,
    /// `None`, here and below: the same row may enter and leave the directory several times.
    pub appended: Option<IntCounter>,
    pub replayed: Option<IntCounter>,
}

impl DiskMetrics {
    /// `place` is a part of the names, and `which` completes `rows …` in the help texts.
    fn new(r: &Registry, place: &str, which: &str) -> prometheus::Result<Self> {
        let named = |part: &str, what: String| gauge(r, &format!("infra_audit_{place}_{part}"), &what);
        Ok(Self {
            rows: named("rows", format!("Rows {which}."))?,
            bytes: named("bytes", format!("Size of the rows {which}, in bytes."))?,
            full: named("full", format!("1 while no more rows {which} can be stored."))?,
            appended: None,
            replayed: None,
        })
    }
}
