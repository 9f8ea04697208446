//! How a run ended, with what was measured.

use super::monitor::StopReason;
use super::output::RunOutput;
use super::outputs::StoredOutputs;
use super::tree;
use crate::metrics::RunStop;
use crate::model::UnixMs;
use serde_json::value::RawValue;
use std::time::Duration;

/// Exit code of a run that was stopped at its time limit, as with `timeout(1)`.
const TIMED_OUT: i32 = 124;
/// Exit code of a run that was stopped because it used too much, as after SIGKILL.
const KILLED: i32 = 137;

/// The limits of a run.
#[derive(Clone, Copy, Debug)]
pub(super) struct RunLimits {
    /// Most memory of all its processes together, in MiB; see [`tree`].
    pub(super) memory_mb: u64,
    /// Most time from start to end.
    pub(super) time: Duration,
    /// Most bytes that are kept of each output stream, and of the value of a handler.
    pub(super) output_bytes_max: usize,
}

/// A run that has ended.
#[derive(Debug)]
pub(super) struct RunEnd {
    /// When its code began, or when its process was started for it.
    pub(super) started_at: UnixMs,
    /// Whether the process was started, or the code was loaded, for this run.
    pub(super) is_cold: bool,
    /// Exit code of the program, or 128 + the signal that killed it, or 124 at the time limit. For a handler:
    /// 0 if it returned a value, and 1 if it failed.
    pub(super) exit_code: i32,
    pub(super) stdout: String,
    pub(super) stderr: String,
    pub(super) duration: Duration,
    /// Of the handler alone, in milliseconds, as its process says.
    pub(super) handler_ms: Option<f64>,
    /// What the handler returned.
    pub(super) value: Option<Box<RawValue>>,
    /// Highest resident memory, in bytes: of one process, or of all together in one sample, in which a page
    /// that processes share counts once. Of a process that stays: since its start.
    pub(super) peak_memory_bytes: Option<u64>,
    /// Of all its processes.
    pub(super) cpu_time: Option<Duration>,
    pub(super) stopped: Option<StopReason>,
    pub(super) outputs: Option<StoredOutputs>,
}

impl RunEnd {
    /// Takes over what the run has printed, and says why it was stopped.
    pub(super) fn set_output(&mut self, output: RunOutput, limits: RunLimits) {
        self.stdout = output.stdout.text();
        self.stderr.insert_str(0, &output.stderr.text());
        if let Some(stopped) = self.stopped {
            let (code, why) = stopped.explain(limits);
            self.exit_code = code;
            self.stderr.push_str(&format!("\n[stopped: {why}]"));
        }
    }

    pub(super) fn set_outputs(&mut self, outputs: StoredOutputs) {
        if let Some(note) = &outputs.note {
            self.stderr.push_str(note);
        }
        self.outputs = Some(outputs);
    }

    pub(super) fn is_success(&self) -> bool {
        self.exit_code == 0
    }

    /// `error.type` of its span. `None`: it has succeeded.
    pub(super) fn error_type(&self) -> Option<&'static str> {
        match self.stopped {
            Some(StopReason::Time) => Some("timeout"),
            Some(StopReason::Memory(_)) => Some("out_of_memory"),
            Some(StopReason::Tasks) => Some("too_many_tasks"),
            None => (!self.is_success()).then_some("exit_code"),
        }
    }
}

impl StopReason {
    /// The exit code, and the reason for the owner of the function.
    fn explain(self, limits: RunLimits) -> (i32, String) {
        let RunLimits { memory_mb, time, .. } = limits;
        match self {
            Self::Time => (TIMED_OUT, format!("the run reached its time limit of {} ms", time.as_millis())),
            Self::Memory(used) => {
                let used = match used {
                    Some(bytes) => format!("{} MiB of memory", bytes >> 20),
                    None => "up its memory".to_owned(),
                };
                let why =
                    format!("the run used {used}, but its function has {memory_mb} MiB; raise `memoryMb`");
                (KILLED, why)
            }
            Self::Tasks => {
                (KILLED, format!("the run had more than {} processes and threads", tree::TASKS_MAX))
            }
        }
    }

    /// For the metrics.
    pub(super) fn kind(self) -> RunStop {
        match self {
            Self::Time => RunStop::Time,
            Self::Memory(_) => RunStop::Memory,
            Self::Tasks => RunStop::Tasks,
        }
    }
}

#[cfg(test)]
impl RunEnd {
    /// The end of a run that did nothing.
    pub(super) fn sample() -> Self {
        Self {
            started_at: 0,
            is_cold: false,
            exit_code: 0,
            stdout: String::new(),
            stderr: String::new(),
            duration: Duration::from_millis(1),
            handler_ms: None,
            value: None,
            peak_memory_bytes: None,
            cpu_time: None,
            stopped: None,
            outputs: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_of_a_stop_is_at_the_end() {
        let limits =
            RunLimits { memory_mb: 64, time: Duration::from_millis(1_500), output_bytes_max: 1 << 20 };
        for (stopped, code, expected) in [
            (None, 0, "an error"),
            (Some(StopReason::Time), 124, "time limit of 1500 ms]"),
            (
                Some(StopReason::Memory(Some(70 << 20))),
                137,
                "used 70 MiB of memory, but its function has 64 MiB",
            ),
            (Some(StopReason::Memory(None)), 137, "used up its memory, but its function has 64 MiB"),
            (Some(StopReason::Tasks), 137, "processes and threads]"),
        ] {
            let mut ended = RunEnd { stopped, stderr: "an error".to_owned(), ..RunEnd::sample() };
            ended.set_output(RunOutput::new(100), limits);
            assert_eq!(ended.exit_code, code);
            assert!(ended.stderr.starts_with("an error") && ended.stderr.contains(expected), "{ended:?}");
        }
    }
}
