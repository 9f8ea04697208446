//! The result of a run as JSON: the members that the workers of a fleet write, and `startedAt`, `coldStart`,
//! `traceparent` and `data`.

use super::advice::{Advice, RunFigures};
use super::monitor::StopReason;
use super::outputs::StoredOutputs;
use super::run_end::RunEnd;
use crate::backend::ReceivedJob;
use crate::model::{TraceContext, rfc3339_ms};
use bytes::Bytes;
use serde::Serialize;
use serde_json::value::RawValue;

/// Members that are not known are `null`. Traffic is not measured.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct RunResult<'a> {
    request_id: &'a str,
    function_id: &'a str,
    worker_id: &'a str,
    status: &'static str,
    exit_code: Option<i32>,
    stdout: String,
    stderr: String,
    duration_ms: Option<f64>,
    handler_duration_ms: Option<f64>,
    peak_memory_bytes: Option<u64>,
    allocated_memory_mb: Option<u64>,
    optimization_tip: Option<String>,
    estimated_savings: Option<String>,
    recommended_memory_mb: Option<u64>,
    /// Cores that the run used, on average.
    cpu_usage: Option<f64>,
    network_rx: Option<u64>,
    network_tx: Option<u64>,
    disk_read: Option<u64>,
    disk_write: Option<u64>,
    output_files: Option<Vec<String>>,
    #[serde(rename = "llm_token_count")]
    llm_token_count: Option<u64>,
    started_at: Option<String>,
    cold_start: Option<bool>,
    /// The span of the run, or the one that the message names.
    traceparent: Option<String>,
    /// The value of a handler. It stands in `stdout` too, for readers that do not know this member.
    data: Option<Box<RawValue>>,
}

impl<'a> RunResult<'a> {
    /// The result of a run that could not start.
    pub(super) fn failed(
        job: &'a ReceivedJob,
        worker_id: &'a str,
        memory_mb: Option<u64>,
        reason: String,
    ) -> Self {
        Self {
            request_id: &job.request_id,
            function_id: &job.function,
            worker_id,
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
            started_at: None,
            cold_start: None,
            traceparent: None,
            data: None,
        }
    }

    /// The result of a run that has ended.
    pub(super) fn ended(job: &'a ReceivedJob, worker_id: &'a str, memory_mb: u64, run: RunEnd) -> Self {
        let advice = advice(&run, memory_mb);
        let (output_files, llm_token_count) = match run.outputs {
            Some(StoredOutputs { files, llm_tokens, .. }) => (Some(files), Some(llm_tokens)),
            None => (None, None),
        };
        let seconds = run.duration.as_secs_f64();
        let cores = |cpu: std::time::Duration| if seconds > 0.0 { cpu.as_secs_f64() / seconds } else { 0.0 };
        Self {
            status: if run.exit_code == 0 { "SUCCESS" } else { "FAILED" },
            exit_code: Some(run.exit_code),
            stdout: run.stdout,
            // Whole microseconds, because more digits are noise.
            duration_ms: Some(run.duration.as_micros() as f64 / 1000.0),
            handler_duration_ms: run.handler_ms,
            peak_memory_bytes: run.peak_memory_bytes,
            optimization_tip: advice.optimization_tip,
            estimated_savings: advice.estimated_savings,
            recommended_memory_mb: advice.recommended_memory_mb,
            cpu_usage: run.cpu_time.map(cores).map(|cores| (cores * 1000.0).round() / 1000.0),
            output_files,
            llm_token_count,
            started_at: Some(rfc3339_ms(run.started_at)),
            cold_start: Some(run.is_cold),
            data: run.value,
            ..Self::failed(job, worker_id, Some(memory_mb), run.stderr)
        }
    }

    pub(super) fn with_trace(self, context: Option<TraceContext>) -> Self {
        Self { traceparent: context.map(|context| context.to_string()), ..self }
    }

    pub(super) fn to_json(&self) -> Bytes {
        // Text and numbers can always be serialized.
        serde_json::to_vec(self).unwrap_or_default().into()
    }
}

fn advice(run: &RunEnd, memory_mb: u64) -> Advice {
    // What it would have used is not known.
    if run.stopped == Some(StopReason::Time) {
        return Advice::default();
    }
    Advice::of(&RunFigures {
        peak_memory_bytes: run.peak_memory_bytes.unwrap_or(0),
        allocated_mb: memory_mb,
        duration: run.duration,
        cpu_time: run.cpu_time,
        ..RunFigures::default()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::time::Duration;

    fn job() -> ReceivedJob {
        ReceivedJob::sample("r")
    }

    #[test]
    fn a_run_has_its_figures_and_advice() {
        let value = RawValue::from_string(r#"{"b":1.0,"a":[]}"#.to_owned()).unwrap();
        let outputs = StoredOutputs { files: vec!["a.png".to_owned()], llm_tokens: 7, ..Default::default() };
        let run = RunEnd {
            duration: Duration::from_micros(100_500),
            handler_ms: Some(1.5),
            value: Some(value),
            peak_memory_bytes: Some(10 << 20),
            cpu_time: Some(Duration::from_micros(50_250)),
            outputs: Some(outputs),
            ..RunEnd::sample()
        };
        let job = job();
        let text = RunResult::ended(&job, "w", 128, run).to_json();
        assert!(text.ends_with(br#","data":{"b":1.0,"a":[]}}"#), "{text:?}");
        let shown: Value = serde_json::from_slice(&text).unwrap();
        for (member, expected) in [
            ("status", json!("SUCCESS")),
            ("durationMs", json!(100.5)),
            ("handlerDurationMs", json!(1.5)),
            ("cpuUsage", json!(0.5)),
            ("recommendedMemoryMb", json!(32)),
            ("outputFiles", json!(["a.png"])),
            ("llm_token_count", json!(7)),
            ("startedAt", json!("1970-01-01T00:00:00.000Z")),
            ("coldStart", json!(false)),
            ("networkRx", json!(null)),
        ] {
            assert_eq!(shown[member], expected, "{member}");
        }
        assert!(shown["optimizationTip"].as_str().unwrap().contains("Reduce to 32MB"));
    }

    #[test]
    fn a_run_at_its_time_limit_gets_no_advice() {
        let run = |stopped| RunEnd {
            exit_code: 1,
            stopped,
            peak_memory_bytes: Some(120 << 20),
            ..RunEnd::sample()
        };
        let job = job();
        for (stopped, is_advised) in [(Some(StopReason::Time), false), (None, true)] {
            let text = RunResult::ended(&job, "w", 128, run(stopped)).to_json();
            let shown: Value = serde_json::from_slice(&text).unwrap();
            assert_eq!(shown["status"], "FAILED");
            assert_eq!(shown["recommendedMemoryMb"].is_number(), is_advised, "{shown}");
        }
    }
}
