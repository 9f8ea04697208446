//! A process in handler mode: it has loaded a module once, and serves one event after the other.

use super::control::{ControlError, ControlReply, ControlRequest, EventContext};
use super::handler_version::HandlerVersion;
use super::instance::Instance;
use super::message::ProcessPaths;
use super::monitor::{RunMonitor, RunUsage, StopReason};
use super::output::RunOutput;
use super::run_end::{RunEnd, RunLimits};
use super::runtime::ProcessEnv;
use super::sandbox::Fence;
use super::script_run::{RunStart, out_of_memory};
use bytes::Bytes;
use serde_json::value::RawValue;
use std::fs::File;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// Least time between two samples at the end of a run. A sample costs as much as a short run.
const SAMPLE_EVERY: Duration = Duration::from_millis(250);
/// How long a reading of the CPU time is used as that of now.
const CPU_TIME_KEPT: Duration = Duration::from_millis(5);
/// How long the end of a process that failed is waited for.
const END_MAX: Duration = Duration::from_secs(10);
/// How long a process that has closed its control socket may take to end by itself.
const EXIT_MAX: Duration = Duration::from_secs(5);

/// A process in handler mode. On drop it is killed.
pub(super) struct HandlerProcess {
    instance: Instance,
    version: Arc<HandlerVersion>,
    monitor: RunMonitor,
    /// The `/tmp` of the process.
    tmp: File,
    /// Runs so far.
    runs: u64,
    sampled_at: Option<Instant>,
    /// The last reading of the CPU time.
    cpu_time: Option<(Instant, Duration)>,
    /// The number of processes after the handler was loaded. `None`: it is not loaded.
    processes: Option<usize>,
    /// Whether it can serve another event.
    is_usable: bool,
}

/// One call of a handler.
pub(super) struct HandlerEvent<'a> {
    pub(super) event: &'a RawValue,
    /// The variables that differ from run to run.
    pub(super) env: &'a ProcessEnv,
    pub(super) context: EventContext<'a>,
}

/// Why a request got no answer.
enum Interruption {
    Stopped(StopReason),
    Broken(ControlError),
}

/// What became of an event, before the measurements.
struct EventOutcome {
    exit_code: i32,
    value: Option<Box<RawValue>>,
    handler_ms: Option<f64>,
    /// For `stderr`.
    error: String,
    stopped: Option<StopReason>,
}

impl EventOutcome {
    fn failed(error: String, handler_ms: Option<f64>) -> Self {
        Self { exit_code: 1, value: None, handler_ms, error, stopped: None }
    }

    fn stopped(reason: StopReason) -> Self {
        Self { stopped: Some(reason), ..Self::failed(String::new(), None) }
    }
}

impl HandlerProcess {
    /// Takes over a process that waits for its job.
    ///
    /// # Errors
    /// If it was never admitted to its sandbox, or its files cannot be opened.
    pub(super) fn new(mut instance: Instance, version: Arc<HandlerVersion>) -> io::Result<Self> {
        let tmp = instance.process.tmp_dir()?;
        let (levels, supervisor) = (instance.process.sandbox_levels(), instance.process.child().supervisor());
        let monitor = RunMonitor::new(supervisor, levels, version.memory_mb);
        Ok(Self {
            instance,
            version,
            monitor,
            tmp,
            runs: 0,
            sampled_at: None,
            cpu_time: None,
            processes: None,
            is_usable: true,
        })
    }

    pub(super) fn version(&self) -> &HandlerVersion {
        &self.version
    }

    pub(super) fn runs(&self) -> u64 {
        self.runs
    }

    pub(super) fn is_usable(&self) -> bool {
        self.is_usable
    }

    /// Whether it waits for an event. `false`: it has ended, or has sent something that nobody asked for.
    pub(super) fn is_quiet(&self) -> bool {
        self.instance.is_quiet() && out_of_memory(self.instance.process.fence()).is_none()
    }

    async fn count_processes(&self) -> Option<usize> {
        match self.instance.process.fence().and_then(Fence::processes) {
            Some(count) => Some(count),
            // Without control groups.
            None => self.monitor.count_processes().await,
        }
    }

    /// Whether the run has left processes behind. They would go on without a limit.
    async fn has_leftovers(&self) -> bool {
        self.processes.zip(self.count_processes().await).is_some_and(|(loaded, now)| now > loaded)
    }

    /// The `/tmp` of the process, opened with `O_PATH`.
    pub(super) fn tmp(&self) -> &File {
        &self.tmp
    }

    /// The files of the process, as it sees them.
    pub(super) fn paths(&self) -> Arc<ProcessPaths> {
        self.instance.process.paths()
    }

    /// Ends a process that is not needed any more. It has a moment to do so by itself.
    pub(super) fn dismiss(self) {
        self.instance.dismiss();
    }

    /// CPU time so far. `None`: nothing measures it.
    pub(super) fn cpu_time(&mut self) -> Option<Duration> {
        if let Some((at, cpu)) = self.cpu_time
            && at.elapsed() < CPU_TIME_KEPT
        {
            return Some(cpu);
        }
        self.read_cpu_time()
    }

    fn read_cpu_time(&mut self) -> Option<Duration> {
        let cpu = self.instance.process.fence().and_then(Fence::cpu_time)?;
        self.cpu_time = Some((Instant::now(), cpu));
        Some(cpu)
    }

    /// Loads the handler, as the first part of a run that also calls it.
    ///
    /// # Errors
    /// How the run ended, because the handler cannot be called.
    pub(super) async fn load(
        &mut self,
        env: &ProcessEnv,
        start: RunStart,
        limits: RunLimits,
        gauge: &RunUsage,
        output: &mut RunOutput,
    ) -> Result<(), Box<RunEnd>> {
        let version = Arc::clone(&self.version);
        let request = ControlRequest::Load { handler: &version.handler, env };
        let answer = self.exchange(&request, start, limits, gauge, output).await;
        let outcome = match answer.as_ref().map(|frame| ControlReply::parse(frame)) {
            Ok(Ok(ControlReply::Loaded { ms })) => {
                tracing::debug!(function = version.function(), ms, "Handler loaded");
                self.processes = self.count_processes().await;
                return Ok(());
            }
            Ok(Ok(ControlReply::Failed { error })) => {
                self.is_usable = false;
                EventOutcome::failed(cut(error, limits), None)
            }
            Ok(parsed) => self.broken(&unexpected(parsed.err()), output).await,
            Err(Interruption::Stopped(reason)) => self.stopped(*reason, output).await,
            Err(Interruption::Broken(error)) => self.broken(error, output).await,
        };
        let output = std::mem::replace(output, RunOutput::new(0));
        Err(Box::new(self.ended(outcome, start, limits, gauge, output).await))
    }

    /// Calls the handler. `output`: what it has printed when it was loaded, if that was in this run.
    pub(super) async fn call(
        &mut self,
        event: HandlerEvent<'_>,
        start: RunStart,
        limits: RunLimits,
        gauge: &RunUsage,
        mut output: RunOutput,
    ) -> RunEnd {
        self.runs += 1;
        self.monitor.begin_handler_run();
        if !start.is_cold {
            // What earlier runs have printed since they ended.
            self.instance.pipes.discard();
        }
        let HandlerEvent { event, env, context } = event;
        let request = ControlRequest::Event { event, env, context };
        let answer = self.exchange(&request, start, limits, gauge, &mut output).await;
        let outcome = match answer.as_ref().map(|frame| ControlReply::parse(frame)) {
            Ok(Ok(ControlReply::Value { value, ms })) => returned(value, ms, limits),
            Ok(Ok(ControlReply::Error { error, ms })) => EventOutcome::failed(cut(error, limits), Some(ms)),
            Ok(parsed) => self.broken(&unexpected(parsed.err()), &mut output).await,
            Err(Interruption::Stopped(reason)) => self.stopped(*reason, &mut output).await,
            Err(Interruption::Broken(error)) => self.broken(error, &mut output).await,
        };
        // A handler that has failed may have left its module in any state.
        self.is_usable &= outcome.exit_code == 0;
        self.ended(outcome, start, limits, gauge, output).await
    }

    /// Sends a request, and waits for the answer. Kills the process if it exceeds a limit.
    async fn exchange(
        &mut self,
        request: &ControlRequest<'_>,
        start: RunStart,
        limits: RunLimits,
        gauge: &RunUsage,
        output: &mut RunOutput,
    ) -> Result<Bytes, Interruption> {
        let Instance { control, pipes, process, .. } = &mut self.instance;
        let Some(control) = control else { return Err(Interruption::Broken(ControlError::Closed)) };
        let answer = {
            let mut conversation = pin!(async {
                control.send(request).await?;
                control.receive().await
            });
            let mut reading = pin!(pipes.read(output));
            let mut is_read = false;
            let mut limit = pin!(sleep(limits.time.saturating_sub(start.at.elapsed())));
            loop {
                let found = tokio::select! {
                    biased;
                    answer = &mut conversation => break answer,
                    () = &mut reading, if !is_read => {
                        is_read = true;
                        None
                    }
                    () = &mut limit => Some(StopReason::Time),
                    found = self.monitor.next(gauge) => found,
                };
                if let Some(found) = found.or_else(|| out_of_memory(process.fence())) {
                    process.kill();
                    return Err(Interruption::Stopped(found));
                }
            }
        };
        // The process has flushed its output before it answered.
        pipes.drain(output);
        answer.map_err(Interruption::Broken)
    }

    /// Waits for the end of a process that was stopped, so that nothing of the run is left.
    async fn stopped(&mut self, reason: StopReason, output: &mut RunOutput) -> EventOutcome {
        self.end(END_MAX, output).await;
        EventOutcome::stopped(reason)
    }

    /// The outcome if the process has ended, or does not behave.
    async fn broken(&mut self, error: &ControlError, output: &mut RunOutput) -> EventOutcome {
        // A process that has ended also makes a request fail that is being sent.
        let has_ended =
            matches!(error, ControlError::Closed | ControlError::Torn { .. } | ControlError::Io(_));
        let exited = if has_ended { self.end(EXIT_MAX, output).await } else { None };
        if exited.is_none() {
            self.instance.process.kill();
            self.end(END_MAX, output).await;
        }
        if let Some(reason) = out_of_memory(self.instance.process.fence()) {
            return EventOutcome::stopped(reason);
        }
        let Some(code) = exited else {
            return EventOutcome::failed(format!("the process of the handler cannot be used: {error}"), None);
        };
        let error = format!("the process of the handler ended with exit code {code} before it had answered");
        EventOutcome { exit_code: if code == 0 { 1 } else { code }, ..EventOutcome::failed(error, None) }
    }

    /// Waits for the end of the process, and reads the rest of its output. Returns its exit code.
    async fn end(&mut self, time: Duration, output: &mut RunOutput) -> Option<i32> {
        self.is_usable = false;
        let Instance { pipes, process, .. } = &mut self.instance;
        let waiting = async { tokio::join!(process.child().exit(), pipes.read(output)) };
        match timeout(time, waiting).await {
            Ok((exit, ())) => exit.ok().map(|exit| exit.code),
            Err(_) => None,
        }
    }

    async fn ended(
        &mut self,
        outcome: EventOutcome,
        start: RunStart,
        limits: RunLimits,
        gauge: &RunUsage,
        mut output: RunOutput,
    ) -> RunEnd {
        let duration = start.at.elapsed();
        let EventOutcome { exit_code, value, handler_ms, error, stopped } = outcome;
        if let Some(value) = &value {
            output.stdout.add_line(value.get());
        }
        let cpu = self.read_cpu_time();
        let has_answered = handler_ms.is_some();
        if has_answered && self.sampled_at.is_none_or(|at| at.elapsed() >= SAMPLE_EVERY) {
            self.sampled_at = Some(Instant::now());
            // This run is over. But the next one would begin with too much memory.
            self.is_usable &= self.monitor.sample(gauge).await.is_none();
        }
        self.is_usable &= out_of_memory(self.instance.process.fence()).is_none();
        self.is_usable = self.is_usable && !self.has_leftovers().await;
        let mut ended = RunEnd {
            started_at: start.unix_ms,
            is_cold: start.is_cold,
            exit_code,
            stdout: String::new(),
            stderr: error,
            duration,
            handler_ms,
            value,
            peak_memory_bytes: self.monitor.peak_bytes(),
            cpu_time: cpu.and_then(|cpu| Some(cpu.saturating_sub(start.cpu_before?))),
            stopped,
            outputs: None,
        };
        ended.set_output(output, limits);
        ended
    }
}

/// The outcome of a handler that has returned a value.
fn returned(value: &RawValue, ms: f64, limits: RunLimits) -> EventOutcome {
    let (bytes, max) = (value.get().len(), limits.output_bytes_max);
    if bytes > max {
        let error = format!("the handler returned a value of {bytes} bytes, and the limit is {max} bytes");
        return EventOutcome::failed(error, Some(ms));
    }
    let (value, error) = (Some(value.to_owned()), String::new());
    EventOutcome { exit_code: 0, value, handler_ms: Some(ms), error, stopped: None }
}

/// The text of an error, which is as long as the function wants.
fn cut(mut error: String, limits: RunLimits) -> String {
    error.truncate(error.floor_char_boundary(limits.output_bytes_max));
    error
}

/// An answer that does not fit the request.
fn unexpected(malformed: Option<ControlError>) -> ControlError {
    malformed.unwrap_or(ControlError::Malformed { line: 1, column: 1 })
}
