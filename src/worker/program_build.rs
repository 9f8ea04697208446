//! Builds the program of a function in a compiled language, in a sandbox, once a version.

use super::code_cache::CachedCode;
use super::code_layout::CodeLayout;
use super::code_version::{PROGRAM, PROGRAM_BYTES_MAX};
use super::control::ControlError;
use super::instance_start::{InstancePlan, InstanceStarter, StartError};
use super::message::base_environment;
use super::monitor::RunUsage;
use super::run_end::{RunEnd, RunLimits};
use super::runtime::{Build, InstalledRuntime};
use super::script_run::{self, RunStart};
use crate::backend::{BackendError, FetchError};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, Semaphore};

/// Builds at a time. They do not count towards the memory of runs.
const BUILDS_MAX: usize = 1;
/// The limits of a build.
/// Exit codes from here on are not those of a compiler: time limit, signals.
const KILLED_MIN: i32 = 124;
const LIMITS: RunLimits =
    RunLimits { memory_mb: 1_024, time: Duration::from_secs(120), output_bytes_max: 64 << 10 };

/// Builds programs.
pub(super) struct ProgramBuilder {
    starter: Arc<InstanceStarter>,
    turns: Semaphore,
}

impl ProgramBuilder {
    pub(super) fn new(starter: Arc<InstanceStarter>) -> Self {
        Self { starter, turns: Semaphore::new(BUILDS_MAX) }
    }

    /// Builds the program of the code, unless that was done.
    ///
    /// # Errors
    /// [`FetchError::Missing`] with the output of the compiler, if the code is wrong. That is kept with the
    /// code.
    pub(super) async fn build(
        &self,
        code: &CachedCode,
        build: Build,
        runtime: &InstalledRuntime,
    ) -> Result<(), FetchError> {
        code.compiled(|to| self.compile(code.clone(), build, runtime, to)).await
    }

    /// `to`: the directory for the program.
    async fn compile(
        &self,
        code: CachedCode,
        build: Build,
        runtime: &InstalledRuntime,
        to: PathBuf,
    ) -> Result<(), FetchError> {
        // Never closed.
        let _turn = self.turns.acquire().await;
        let away = |text: String| FetchError::Away(BackendError::Unavailable(text));
        let disk = |e: io::Error| away(format!("the program could not be stored: {e}"));
        let refused = |e: StartError| match e {
            StartError::Function(reason) => FetchError::Missing(reason),
            StartError::Worker(reason) => away(reason),
        };
        let layout = CodeLayout { code, input: None, as_copies: !self.starter.is_isolated() };
        let mounted = layout.is_mounted().then(|| layout.code.clone());
        let (place, _) = self.starter.place(Some(layout)).await.map_err(refused)?;
        let env = base_environment(&place.paths, runtime.environment());
        let plan = InstancePlan::program(build.argv, env, LIMITS.memory_mb);
        let start = RunStart::now(true, None);
        let plan = InstancePlan { has_control: true, mounted, ..plan };
        let mut instance = self.starter.start(place, plan).await.map_err(refused)?;
        let control = instance.control.take().ok_or_else(|| away("there is no control socket".to_owned()))?;
        let mut program = tokio::fs::File::create(to.join(PROGRAM)).await.map_err(disk)?;
        let gauge = RunUsage::new(Arc::new(Notify::new()));
        let (received, ended) = tokio::join!(
            control.receive_file(&mut program, PROGRAM_BYTES_MAX),
            script_run::to_its_end(&mut instance, start, LIMITS, &gauge),
        );
        let ended = ended.map_err(|e| away(format!("the exit code of the compiler is not known: {e}")))?;
        let RunEnd { exit_code, stderr, stopped, .. } = ended;
        if stopped.is_some() || exit_code >= KILLED_MIN {
            // That may be due to this machine, so it must not be kept as a property of the code.
            return Err(away(format!(
                "the compiler did not finish (exit code {exit_code})\n{}",
                stderr.trim()
            )));
        }
        let why = match received {
            Ok(_) if exit_code == 0 => return Ok(()),
            Err(e) if exit_code == 0 || matches!(e, ControlError::TooLong { .. }) => format!(" {e}"),
            _ => format!("\n{}", stderr.trim()),
        };
        Err(FetchError::Missing(format!("the program could not be compiled:{why}")))
    }
}
