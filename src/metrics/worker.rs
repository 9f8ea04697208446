//! The worker: runs, warm processes, code, jobs and the sandbox.
//!
//! `dev` has these metrics beside those of the gateway, in one registry (`Metrics::add_worker`). `worker` has
//! no gateway, so [`WorkerProcessMetrics`] holds them alone, with those of the process.
//!
//! No label is a function: a worker meets any number of them. The gateway has series by function.

use super::conf::ConfMetrics;
use super::health::log_lines_dropped;
use super::register::{OTHER, counter, counter_by, counter_vec, gauge, gauge_vec, histogram, histogram_vec};
use super::traces::TraceMetrics;
use crate::model::Runtime;
use prometheus::{
    Encoder, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry, TextEncoder,
};
use std::sync::Arc;
use std::time::Duration;

/// In seconds, from a warm handler that does nothing to the time limit of a run.
const RUN_BUCKETS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0];
/// In seconds, from a process that waits to one that has to load a large program.
const START_BUCKETS: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// In seconds, from a small archive on the disk to one of 50 MiB over a slow network.
const FETCH_BUCKETS: &[f64] = &[0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

/// The metrics of a worker.
pub struct WorkerMetrics {
    pub runs: RunMetrics,
    pub jobs: HeldJobMetrics,
    pub warm: WarmMetrics,
    pub code: CodeMetrics,
    pub heartbeats_failed: IntCounter,
    isolated: IntGauge,
    sandbox: IntGaugeVec,
}

impl WorkerMetrics {
    pub(super) fn new(r: &Registry) -> prometheus::Result<Self> {
        Ok(Self {
            runs: RunMetrics::new(r)?,
            jobs: HeldJobMetrics::new(r)?,
            warm: WarmMetrics::new(r)?,
            code: CodeMetrics::new(r)?,
            heartbeats_failed: counter(
                r,
                "infra_worker_heartbeats_failed_total",
                "Heartbeats that nobody has accepted.",
            )?,
            isolated: gauge(r, "infra_worker_isolated", "1 if functions run in a sandbox, else 0.")?,
            sandbox: gauge_vec(
                r,
                "infra_worker_sandbox_info",
                "1: the kind of the sandbox.",
                &["network", "cgroups"],
            )?,
        })
    }

    /// Sets what is known of the sandbox. Called once, at start.
    pub fn show_sandbox(&self, is_isolated: bool, network: &str, cgroups: &str) {
        self.isolated.set(is_isolated.into());
        self.sandbox.with_label_values(&[network, cgroups]).set(1);
    }

    /// Whether functions run in a sandbox.
    pub fn is_isolated(&self) -> bool {
        self.isolated.get() != 0
    }
}

/// The metrics of runs.
pub struct RunMetrics {
    ended: IntCounterVec,
    seconds: HistogramVec,
    starts: IntCounterVec,
    start_seconds: HistogramVec,
    stopped: IntCounterVec,
    outputs: IntCounterVec,
    pub in_progress: IntGauge,
    /// Memory that the runs in progress have reserved, in bytes.
    pub memory_reserved: IntGauge,
    /// The most that they may reserve, in bytes.
    pub memory_limit: IntGauge,
}

/// Whether a run found a process that was ready for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartKind {
    /// The process was started for this run.
    Cold,
    Warm,
}

/// Why a run was stopped before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunStop {
    /// It exceeded `timeoutMs`.
    Time,
    /// It exceeded `memoryMb`.
    Memory,
    /// It had too many processes and threads.
    Tasks,
    /// The worker stops.
    Drain,
}

impl RunMetrics {
    fn new(r: &Registry) -> prometheus::Result<Self> {
        let by_start = &["runtime", "start"];
        let (name, help) = ("infra_worker_runs_total", "Runs that have ended.");
        let ended = counter_vec(r, name, help, &["runtime", "status"])?;
        let (name, help) = ("infra_worker_run_seconds", "Seconds of a run.");
        let seconds = histogram_vec(r, name, help, RUN_BUCKETS, &["runtime"])?;
        let starts = counter_vec(r, "infra_worker_starts_total", "Started runs.", by_start)?;
        let (name, help) = ("infra_worker_start_seconds", "Seconds until the code of a run begins.");
        let start_seconds = histogram_vec(r, name, help, START_BUCKETS, by_start)?;
        let (name, help) = ("infra_worker_runs_stopped_total", "Runs that the worker has stopped.");
        let stopped = counter_by(r, name, help, "reason", &["time", "memory", "tasks", "drain"])?;
        let (name, help) =
            ("infra_worker_output_files_total", "Files that functions wrote for their callers.");
        let outputs = counter_by(r, name, help, "outcome", &["stored", "failed"])?;
        let (name, help) =
            ("infra_worker_memory_reserved_bytes", "Memory that the runs in progress may use.");
        let memory_reserved = gauge(r, name, help)?;
        let memory_limit = gauge(r, "infra_worker_memory_limit_bytes", "Memory that all runs may use.")?;
        let in_progress = gauge(r, "infra_worker_runs_in_progress", "Runs in progress.")?;
        Ok(Self {
            ended,
            seconds,
            starts,
            start_seconds,
            stopped,
            outputs,
            in_progress,
            memory_reserved,
            memory_limit,
        })
    }

    /// Counts a started run. `took`: until its code began.
    pub fn started(&self, runtime: Option<Runtime>, kind: StartKind, took: Duration) {
        let start = match kind {
            StartKind::Cold => "cold",
            StartKind::Warm => "warm",
        };
        let labels = &[label(runtime), start];
        self.starts.with_label_values(labels).inc();
        self.start_seconds.with_label_values(labels).observe(took.as_secs_f64());
    }

    /// Counts a run that has ended. `took`: as in its result.
    pub fn ended(&self, runtime: Option<Runtime>, is_success: bool, took: Duration) {
        let status = if is_success { "SUCCESS" } else { "FAILED" };
        self.ended.with_label_values(&[label(runtime), status]).inc();
        self.seconds.with_label_values(&[label(runtime)]).observe(took.as_secs_f64());
    }

    /// Counts a run that was stopped.
    pub fn stopped(&self, reason: RunStop) {
        let reason = match reason {
            RunStop::Time => "time",
            RunStop::Memory => "memory",
            RunStop::Tasks => "tasks",
            RunStop::Drain => "drain",
        };
        self.stopped.with_label_values(&[reason]).inc();
    }

    /// Counts the files of a run: those that were stored, and those that could not be.
    pub fn output_files(&self, stored: usize, failed: usize) {
        for (outcome, files) in [("stored", stored), ("failed", failed)] {
            if files > 0 {
                self.outputs.with_label_values(&[outcome]).inc_by(files as u64);
            }
        }
    }
}

/// The metrics of the jobs that this worker has taken from the queue.
pub struct HeldJobMetrics {
    /// Those that wait for their start are included.
    pub held: IntGauge,
    given_back: IntCounterVec,
    pub expired: IntCounter,
    pub leases_extended: IntCounter,
    pub lease_failures: IntCounter,
    pub receive_failures: IntCounter,
    pub results_retried: IntCounter,
}

/// Why a job went back to the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GiveBackReason {
    /// The worker stops.
    Drain,
    /// The code could not be fetched.
    Code,
    /// An earlier job of its group went back.
    Group,
}

impl HeldJobMetrics {
    fn new(r: &Registry) -> prometheus::Result<Self> {
        let (name, help) = ("infra_worker_jobs_given_back_total", "Jobs that went back to the queue.");
        let given_back = counter_by(r, name, help, "reason", &["drain", "code", "group"])?;
        let (name, help) = ("infra_worker_results_retried_total", "Failed attempts to hand a result on.");
        let results_retried = counter(r, name, help)?;
        Ok(Self {
            held: gauge(r, "infra_worker_jobs_held", "Jobs that this worker has received and not finished.")?,
            given_back,
            expired: counter(r, "infra_worker_jobs_expired_total", "Jobs dropped after their deadline.")?,
            leases_extended: counter(
                r,
                "infra_worker_leases_extended_total",
                "Jobs kept hidden for longer.",
            )?,
            lease_failures: counter(
                r,
                "infra_worker_lease_failures_total",
                "Failed calls to extend leases.",
            )?,
            receive_failures: counter(r, "infra_worker_receive_failures_total", "Failed calls for jobs.")?,
            results_retried,
        })
    }

    /// Counts jobs that went back to the queue.
    pub fn gave_back(&self, jobs: usize, reason: GiveBackReason) {
        let reason = match reason {
            GiveBackReason::Drain => "drain",
            GiveBackReason::Code => "code",
            GiveBackReason::Group => "group",
        };
        self.given_back.with_label_values(&[reason]).inc_by(jobs as u64);
    }
}

/// The metrics of warm processes.
pub struct WarmMetrics {
    processes: IntGaugeVec,
    ended: IntCounterVec,
}

/// Why a warm process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WarmEnd {
    /// It was idle for `warm.idle_s`.
    Idle,
    /// `warm.function_max` or `warm.total_max` was reached.
    Full,
    /// Its memory was needed for a run.
    Memory,
    /// It has served `warm.handler_runs_max` runs.
    Runs,
    /// Its function has new code or settings.
    Changed,
    /// The handler or the process failed.
    Failed,
}

impl WarmMetrics {
    fn new(r: &Registry) -> prometheus::Result<Self> {
        let (name, help) = ("infra_worker_warm_processes", "Processes that serve runs or wait for them.");
        let processes = gauge_vec(r, name, help, &["runtime", "state"])?;
        let (name, help) = ("infra_worker_warm_ended_total", "Warm processes that have ended.");
        let reasons = &["idle", "full", "memory", "runs", "changed", "failed"];
        let ended = counter_by(r, name, help, "reason", reasons)?;
        Ok(Self { processes, ended })
    }

    /// Sets the numbers of idle and of busy processes of a runtime.
    pub fn show(&self, runtime: Runtime, idle: usize, busy: usize) {
        for (state, number) in [("idle", idle), ("busy", busy)] {
            let number = i64::try_from(number).unwrap_or(i64::MAX);
            self.processes.with_label_values(&[runtime.name(), state]).set(number);
        }
    }

    /// Counts a warm process that has ended.
    pub fn ended(&self, reason: WarmEnd) {
        let reason = match reason {
            WarmEnd::Idle => "idle",
            WarmEnd::Full => "full",
            WarmEnd::Memory => "memory",
            WarmEnd::Runs => "runs",
            WarmEnd::Changed => "changed",
            WarmEnd::Failed => "failed",
        };
        self.ended.with_label_values(&[reason]).inc();
    }
}

/// The metrics of the code cache.
pub struct CodeMetrics {
    pub bytes: IntGauge,
    pub versions: IntGauge,
    lookups: IntCounterVec,
    pub evicted: IntCounter,
    /// In seconds, unpacking included.
    pub fetch_seconds: Histogram,
}

impl CodeMetrics {
    fn new(r: &Registry) -> prometheus::Result<Self> {
        let (name, help) = ("infra_worker_code_lookups_total", "Lookups in the code cache.");
        let lookups = counter_by(r, name, help, "outcome", &["hit", "miss"])?;
        let (name, help) = ("infra_worker_code_fetch_seconds", "Seconds to fetch and unpack code.");
        let fetch_seconds = histogram(r, name, help, FETCH_BUCKETS)?;
        Ok(Self {
            bytes: gauge(r, "infra_worker_code_cache_bytes", "Size of the unpacked code on the disk.")?,
            versions: gauge(r, "infra_worker_code_cache_versions", "Versions of code on the disk.")?,
            lookups,
            evicted: counter(r, "infra_worker_code_evicted_total", "Versions of code deleted to make room.")?,
            fetch_seconds,
        })
    }

    /// Counts a lookup in the cache.
    pub fn looked_up(&self, is_hit: bool) {
        self.lookups.with_label_values(&[if is_hit { "hit" } else { "miss" }]).inc();
    }
}

/// A job may name a runtime that this worker does not know.
fn label(runtime: Option<Runtime>) -> &'static str {
    runtime.map_or(OTHER, Runtime::name)
}

/// All metrics of a process that is a worker only.
pub struct WorkerProcessMetrics {
    registry: Registry,
    pub worker: Arc<WorkerMetrics>,
    pub conf: ConfMetrics,
    pub traces: TraceMetrics,
    /// Set when the metrics are read.
    pub log_lines_dropped: IntGauge,
}

impl WorkerProcessMetrics {
    /// Registers all metrics.
    ///
    /// # Errors
    /// If two metrics have the same name, or a name is invalid.
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let r = &registry;
        let (worker, conf) = (Arc::new(WorkerMetrics::new(r)?), ConfMetrics::new(r)?);
        let (traces, log_lines_dropped) = (TraceMetrics::new(r)?, log_lines_dropped(r)?);
        #[cfg(target_os = "linux")]
        registry.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))?;
        Ok(Self { registry, worker, conf, traces, log_lines_dropped })
    }

    /// All metrics in the Prometheus text format.
    pub fn text(&self) -> Vec<u8> {
        let mut text = Vec::new();
        // As in `Metrics::text`, this cannot fail.
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut text);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_bounded() {
        let metrics = WorkerProcessMetrics::new().unwrap();
        let WorkerMetrics { runs, jobs, warm, code, .. } = &*metrics.worker;
        let ms = Duration::from_millis;
        for runtime in Runtime::ALL.into_iter().map(Some).chain([None]) {
            runs.started(runtime, StartKind::Warm, ms(1));
            runs.ended(runtime, true, ms(2));
        }
        runs.started(None, StartKind::Cold, ms(40));
        runs.ended(None, false, ms(3000));
        runs.stopped(RunStop::Memory);
        runs.output_files(2, 0);
        jobs.gave_back(3, GiveBackReason::Drain);
        warm.show(Runtime::Python, 2, 1);
        warm.ended(WarmEnd::Idle);
        code.looked_up(false);
        assert!(!metrics.worker.is_isolated());
        metrics.worker.show_sandbox(true, "public", "v2");
        assert!(metrics.worker.is_isolated());
        let text = String::from_utf8(metrics.text()).unwrap();
        for line in [
            "infra_worker_runs_total{runtime=\"other\",status=\"FAILED\"} 1",
            "infra_worker_runs_total{runtime=\"python\",status=\"SUCCESS\"} 1",
            "infra_worker_run_seconds_count{runtime=\"other\"} 2",
            "infra_worker_starts_total{runtime=\"other\",start=\"cold\"} 1",
            "infra_worker_start_seconds_count{runtime=\"go\",start=\"warm\"} 1",
            "infra_worker_runs_stopped_total{reason=\"memory\"} 1",
            "infra_worker_output_files_total{outcome=\"stored\"} 2",
            "infra_worker_output_files_total{outcome=\"failed\"} 0",
            "infra_worker_jobs_given_back_total{reason=\"drain\"} 3",
            "infra_worker_warm_processes{runtime=\"python\",state=\"idle\"} 2",
            "infra_worker_warm_ended_total{reason=\"idle\"} 1",
            "infra_worker_code_lookups_total{outcome=\"miss\"} 1",
            "infra_worker_isolated 1",
            "infra_worker_sandbox_info{cgroups=\"v2\",network=\"public\"} 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        assert!(!text.contains("runtime=\"go\",status=\"FAILED\""), "it appears with its first value");
    }
}
