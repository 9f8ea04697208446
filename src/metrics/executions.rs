//! Executions, by function.

use super::register::{OTHER, counter_vec, histogram_vec};
use crate::model::{Execution, FunctionId};
use ahash::RandomState;
use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use prometheus::{Histogram, HistogramVec, IntCounter, IntCounterVec, Registry};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// In seconds, from a handler that does nothing to the time limit of a run.
const FUNCTION_BUCKETS: &[f64] =
    &[0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0];

/// The metrics of executions. Their names, labels and label order are fixed.
pub struct FunctionMetrics {
    duration: HistogramVec,
    handler_duration: HistogramVec,
    invocations: IntCounterVec,
    /// The functions with series of their own, and their series for SUCCESS, which nearly every execution
    /// needs. So one look-up suffices. Functions are added in the order of their first execution. Requests
    /// for unknown functions cannot displace them, because only executed functions are added.
    own: DashMap<FunctionId, Successes, RandomState>,
    /// The length of `own`. `DashMap::len` would lock every shard.
    own_len: AtomicUsize,
    own_max: usize,
    /// The series of all other functions.
    other: Successes,
}

impl FunctionMetrics {
    pub fn new(r: &Registry, own_max: usize) -> prometheus::Result<Self> {
        let labels = &["functionId", "status"];
        Ok(Self {
            duration: histogram_vec(
                r,
                "function_duration_seconds",
                "Seconds of a run, as reported.",
                FUNCTION_BUCKETS,
                labels,
            )?,
            handler_duration: histogram_vec(
                r,
                "function_handler_duration_seconds",
                "Seconds in the handler alone.",
                FUNCTION_BUCKETS,
                labels,
            )?,
            invocations: counter_vec(r, "function_invocations_total", "Finished executions.", labels)?,
            own: DashMap::default(),
            own_len: AtomicUsize::new(0),
            own_max,
            other: Successes::default(),
        })
    }

    pub fn observe(&self, row: &Execution) {
        if let Some(own) = self.own.get(&row.function) {
            return self.add(row, row.function.as_str(), &own);
        }
        if self.own_len.load(Ordering::Relaxed) < self.own_max
            && let Entry::Vacant(place) = self.own.entry(row.function.clone())
            && self.own_len.fetch_add(1, Ordering::Relaxed) < self.own_max
        {
            place.insert(Successes::default());
        }
        match self.own.get(&row.function) {
            Some(own) => self.add(row, row.function.as_str(), &own),
            None => self.add(row, OTHER, &self.other),
        }
    }

    fn add(&self, row: &Execution, function: &str, successes: &Successes) {
        let (seconds, handler_seconds) =
            (row.duration_ms / 1000.0, row.handler_duration_ms.map(|ms| ms / 1000.0));
        let labels = &[function, row.status.known().unwrap_or(OTHER)];
        if !row.status.is_success() {
            self.invocations.with_label_values(labels).inc();
            self.duration.with_label_values(labels).observe(seconds);
            handler_seconds.inspect(|s| self.handler_duration.with_label_values(labels).observe(*s));
            return;
        }
        let (invocations, duration) = successes.counted.get_or_init(|| {
            (self.invocations.with_label_values(labels), self.duration.with_label_values(labels))
        });
        invocations.inc();
        duration.observe(seconds);
        if let Some(seconds) = handler_seconds {
            let handler =
                successes.handler_duration.get_or_init(|| self.handler_duration.with_label_values(labels));
            handler.observe(seconds);
        }
    }
}

/// The series of one function with the status SUCCESS. Each series appears with its first value.
#[derive(Default)]
struct Successes {
    counted: OnceLock<(IntCounter, Histogram)>,
    handler_duration: OnceLock<Histogram>,
}
