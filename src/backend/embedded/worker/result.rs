//! What the worker leaves of a run: exactly the members of CONTRACT §4.

use super::process::Ended;
use crate::backend::embedded::queue::Queued;
use bytes::Bytes;
use serde::Serialize;

/// `null` is what this worker does not know. It measures a run from outside, so it knows nothing of handlers or
/// traffic, and it gives no advice.
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
    /// A run that never began, and why.
    pub(super) fn failed(job: &Queued, memory_mb: Option<u64>, reason: String) -> Self {
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

    /// A run that came to an end, good or bad.
    pub(super) fn ended(job: &Queued, memory_mb: u64, ended: Ended) -> Self {
        Self {
            status: if ended.exit_code == 0 { "SUCCESS" } else { "FAILED" },
            exit_code: Some(ended.exit_code),
            stdout: ended.stdout,
            // Whole microseconds: more digits would only be noise.
            duration_ms: Some(ended.duration.as_micros() as f64 / 1000.0),
            peak_memory_bytes: ended.peak_memory_bytes,
            ..Self::failed(job, Some(memory_mb), ended.stderr)
        }
    }

    pub(super) fn to_json(&self) -> Bytes {
        // A struct of texts and numbers always has a JSON form.
        serde_json::to_vec(self).unwrap_or_default().into()
    }
}
