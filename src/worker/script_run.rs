//! A run in script mode: a program, from its start to its end.

use super::control::{ControlReply, ControlRequest, ControlSocket};
use super::instance::Instance;
use super::monitor::{RunMonitor, RunUsage, StopReason};
use super::output::RunOutput;
use super::run_end::{RunEnd, RunLimits};
use super::runtime::ProcessEnv;
use super::sandbox::Fence;
use crate::model::{UnixMs, now_ms};
use std::io;
use std::pin::pin;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout};

/// How long output is read after the run has ended, in case another process holds the pipe open.
const DRAIN_MAX: Duration = Duration::from_secs(1);
/// How long a process that waits for its job may take to receive it. It needs milliseconds, but may still be
/// starting on a busy machine.
const HAND_OVER_MAX: Duration = Duration::from_secs(10);

/// When a run began, and with what.
#[derive(Clone, Copy, Debug)]
pub(super) struct RunStart {
    pub(super) at: Instant,
    pub(super) unix_ms: UnixMs,
    /// See [`RunEnd::is_cold`].
    pub(super) is_cold: bool,
    /// What the process had used before. `None`: nothing measures it.
    pub(super) cpu_before: Option<Duration>,
}

impl RunStart {
    /// A run that begins now.
    pub(super) fn now(is_cold: bool, cpu_before: Option<Duration>) -> Self {
        Self { at: Instant::now(), unix_ms: now_ms(), is_cold, cpu_before }
    }
}

/// Tells a process that waits for its job to run its program, with this environment. `false`: it did not take
/// the job, which never began.
pub(super) async fn hand_over(instance: &mut Instance, env: &ProcessEnv) -> bool {
    let Some(mut control) = instance.control.take().filter(ControlSocket::is_quiet) else { return false };
    let taken = timeout(HAND_OVER_MAX, async {
        control.send(&ControlRequest::Script { env }).await?;
        control.receive().await
    });
    let Ok(Ok(answer)) = taken.await else { return false };
    matches!(ControlReply::parse(&answer), Ok(ControlReply::Taken))
}

/// Why a run is stopped of which the kernel has killed a process: the others cannot go on as if nothing had
/// happened.
pub(super) fn out_of_memory(fence: Option<&Fence>) -> Option<StopReason> {
    fence.is_some_and(Fence::is_out_of_memory).then_some(StopReason::Memory(None))
}

/// Waits for the end of the program, and kills it if it exceeds a limit. All processes that it has started
/// have ended then, too.
///
/// # Errors
/// If the exit code is not known.
pub(super) async fn to_its_end(
    instance: &mut Instance,
    start: RunStart,
    limits: RunLimits,
    gauge: &RunUsage,
) -> io::Result<RunEnd> {
    let Instance { pipes, process, .. } = instance;
    let (levels, supervisor) = (process.sandbox_levels(), process.child().supervisor());
    let mut monitor = RunMonitor::new(supervisor, levels, limits.memory_mb);
    let mut output = RunOutput::new(limits.output_bytes_max);
    let mut stopped = None;
    let exit = {
        let mut reading = pin!(pipes.read(&mut output));
        let mut is_read = false;
        let mut limit = pin!(sleep(limits.time.saturating_sub(start.at.elapsed())));
        let exit = loop {
            let found = tokio::select! {
                exit = process.child().exit() => break exit?,
                () = &mut reading, if !is_read => {
                    is_read = true;
                    None
                }
                () = &mut limit, if stopped.is_none() => Some(StopReason::Time),
                found = monitor.next(gauge), if stopped.is_none() => found,
            };
            let found = found.or_else(|| out_of_memory(process.fence()).filter(|_| stopped.is_none()));
            if let Some(found) = found {
                stopped = Some(found);
                process.kill();
            }
        };
        if !is_read {
            let _ = timeout(DRAIN_MAX, reading).await;
        }
        exit
    };
    let duration = start.at.elapsed();
    let stopped = stopped.or_else(|| out_of_memory(process.fence()));
    let cpu = process.fence().and_then(Fence::cpu_time).or_else(|| start.is_cold.then_some(exit.cpu_time));
    let mut ended = RunEnd {
        started_at: start.unix_ms,
        is_cold: start.is_cold,
        exit_code: exit.code,
        stdout: String::new(),
        stderr: String::new(),
        duration,
        handler_ms: None,
        value: None,
        peak_memory_bytes: exit.peak_above_ours().max(monitor.peak_bytes()),
        cpu_time: cpu.and_then(|cpu| Some(cpu.saturating_sub(start.cpu_before?))),
        stopped,
        outputs: None,
    };
    ended.set_output(output, limits);
    Ok(ended)
}
