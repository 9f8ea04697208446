//! The result of a run as JSON, with exactly the members that the workers of a fleet write.

use super::process::RunEnd;
use crate::backend::embedded::queue::QueuedJob;
use bytes::Bytes;
use serde::Serialize;

/// Members that this worker does not know are `null`. It measures a run from outside, so it knows neither
/// handler times nor traffic, and it makes no recommendations.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RunResult {
    request_id: String,
    function_id: String,
    worker_id: &'static str,
    status: &'static str,
    exit_code: Option<i32>,
    stdout: String,
    stderr: String,
    duration_ms: Option<f64>,
    handler_duration_ms: Option<f64>,
    peak_memory_bytes: Option<u64>,
    allocated_memory_mb: Option<u64>,
    optimization_tip: Option<&'static str>,
    estimated_savings: Option<&'static str>,
    recommended_memory_mb: Option<u64>,
    cpu_usage: Option<f64>,
    network_rx: Option<u64>,
    network_tx: Option<u64>,
    disk_read: Option<u64>,
    disk_write: Option<u64>,
    output_files: Option<Vec<String>>,
    #[serde(rename = "llm_token_count")]
    llm_token_count: Option<u64>,
}

impl RunResult {
    /// The result of a run that could not start.
    pub(super) fn failed(job: &QueuedJob, memory_mb: Option<u64>, reason: String) -> Self {
        Self {
            request_id: job.id.to_string(),
            function_id: job.function.clone(),
            worker_id: "local",
            status: "FAILED",
            exit_code: None,
            stdout: String::new(),
            stderr: reason,
            duration_ms: None,
            handler_duration_ms: None,
            peak_memory_bytes: None,
            allocated_memory_mb: memory_mb,
            optimization_tip: None,
            estimated_savings: None,
            recommended_memory_mb: None,
            cpu_usage: None,
            network_rx: None,
            network_tx: None,
            disk_read: None,
            disk_write: None,
            output_files: None,
            llm_token_count: None,
        }
    }

    /// The result of a run that has ended.
    pub(super) fn ended(job: &QueuedJob, memory_mb: u64, ended: RunEnd) -> Self {
        Self {
            status: if ended.exit_code == 0 { "SUCCESS" } else { "FAILED" },
            exit_code: Some(ended.exit_code),
            stdout: ended.stdout,
            // Whole microseconds, because more digits are noise.
            duration_ms: Some(ended.duration.as_micros() as f64 / 1000.0),
            peak_memory_bytes: ended.peak_memory_bytes,
            ..Self::failed(job, Some(memory_mb), ended.stderr)
        }
    }

    pub(super) fn to_json(&self) -> Bytes {
        // Text and numbers can always be serialized.
        serde_json::to_vec(self).unwrap_or_default().into()
    }
}
