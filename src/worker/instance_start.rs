//! Starts instances, in the sandbox of this worker.

use super::code_cache::CachedCode;
use super::code_layout::CodeLayout;
use super::control::ControlSocket;
use super::instance::{Instance, InstancePlace, InstanceProcess};
use super::message::ProcessPaths;
use super::output::{OutputPipes, RunOutput};
use super::runtime::{ProcessEnv, WarmStart};
use super::sandbox::{Enclosed, FUNCTION_DIR, HOME_DIR, OUTPUT_DIR, Sandbox, View};
use super::slot_dir::{SlotDir, SlotDirs};
use super::slot_number::SlotNumbers;
use super::supervised::SupervisedChild;
use crate::ambient;
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;

/// Processes of bubblewrap between the supervisor and the program: the one that waits outside, and process 1
/// inside.
const SANDBOX_LEVELS: u32 = 2;
/// Most that is kept of what a sandbox prints about its failure, in bytes.
const REASON_BYTES_MAX: usize = 1_024;

/// Why an instance did not start.
#[derive(Debug)]
pub(super) enum StartError {
    /// It would not start elsewhere either. A sentence for the owner of the function.
    Function(String),
    /// Something of this worker.
    Worker(String),
}

/// Starts instances.
pub(super) struct InstanceStarter {
    sandbox: Sandbox,
    dirs: SlotDirs,
    numbers: SlotNumbers,
}

/// What an instance runs, and how.
pub(super) struct InstancePlan {
    pub(super) argv: Vec<OsString>,
    /// Its environment, without the variables of a bootstrap program.
    pub(super) env: ProcessEnv,
    /// Its environment with these variables, if it has any.
    pub(super) start_env: Option<ProcessEnv>,
    pub(super) stdin: Stdio,
    /// Whether it gets a control socket.
    pub(super) has_control: bool,
    /// Memory that it may use, in MiB, until [`super::sandbox::Fence::limit`] sets another limit.
    pub(super) memory_mb: u64,
    pub(super) data_bytes_max: Option<u64>,
    /// The code whose directory in the cache is mounted. `None`: the directory of the place.
    pub(super) mounted: Option<CachedCode>,
}

impl InstancePlan {
    /// A program without a control socket.
    pub(super) fn program(argv: Vec<OsString>, env: ProcessEnv, memory_mb: u64) -> Self {
        Self {
            argv,
            env,
            start_env: None,
            stdin: Stdio::null(),
            has_control: false,
            memory_mb,
            data_bytes_max: None,
            mounted: None,
        }
    }

    /// A process that waits for its job.
    pub(super) fn waiting(start: &WarmStart<'_>, env: ProcessEnv, memory_mb: u64) -> io::Result<Self> {
        let plan = Self::program(start.argv.clone(), env, memory_mb);
        Ok(Self { start_env: Some(start.env.clone()), stdin: start.stdin()?, has_control: true, ..plan })
    }
}

impl InstanceStarter {
    /// Empties `runs_dir`, and creates it if it does not exist. Blocks.
    pub(super) fn open(sandbox: Sandbox, runs_dir: PathBuf) -> io::Result<Self> {
        let dirs = SlotDirs::open(runs_dir, !sandbox.status().is_isolated)?;
        Ok(Self { sandbox, dirs, numbers: SlotNumbers::default() })
    }

    /// Whether functions run in a sandbox.
    pub(super) fn is_isolated(&self) -> bool {
        self.sandbox.status().is_isolated
    }

    /// The path of a new directory for copies of outputs.
    pub(super) fn copies_dir(&self) -> PathBuf {
        self.dirs.copies_dir()
    }

    /// Waits until every instance has ended and is cleaned up.
    pub(super) async fn all_ended(&self) {
        self.numbers.all_free().await;
    }

    /// Creates a place, with code if there is any. Returns the path of the file with the input too, as the
    /// process will see it.
    pub(super) async fn place(
        self: &Arc<Self>,
        layout: Option<CodeLayout>,
    ) -> Result<(InstancePlace, Option<String>), StartError> {
        let number = self.numbers.take();
        let number = number.ok_or_else(|| StartError::Worker("too many processes end at once".to_owned()))?;
        let starter = Arc::clone(self);
        let made = ambient::blocking(move || -> io::Result<_> {
            let dir = starter.dirs.create(number.get())?;
            let input = layout.map_or(Ok(None), |layout| layout.fill(&dir.function()))?;
            let sandbox_levels = if starter.is_isolated() { SANDBOX_LEVELS } else { 0 };
            let paths = Arc::new(starter.paths(&dir));
            Ok((InstancePlace { dir, number, sandbox_levels, paths }, input))
        });
        let (place, input) = made.await.map_err(|e| StartError::Worker(e.to_string()))?;
        let input = input.map(|name| format!("{}/{name}", place.paths.function));
        Ok((place, input))
    }

    fn paths(&self, dir: &SlotDir) -> ProcessPaths {
        if self.is_isolated() {
            let path = |path: &str| path.to_owned();
            return ProcessPaths {
                function: path(FUNCTION_DIR),
                home: path(HOME_DIR),
                tmp: path("/tmp"),
                output: path(OUTPUT_DIR),
            };
        }
        let path = |path: PathBuf| path.to_string_lossy().into_owned();
        ProcessPaths {
            function: path(dir.function()),
            home: path(dir.home()),
            tmp: path(dir.tmp()),
            output: path(dir.output()),
        }
    }

    /// Starts an instance. Call it in a task; see [`SupervisedChild::spawn`].
    pub(super) async fn start(
        self: &Arc<Self>,
        place: InstancePlace,
        plan: InstancePlan,
    ) -> Result<Instance, StartError> {
        let worker = |e: io::Error| StartError::Worker(e.to_string());
        let InstancePlan { argv, env, start_env, stdin, has_control, memory_mb, data_bytes_max, mounted } =
            plan;
        let (control, theirs) = control_socket(has_control).map_err(worker)?;
        let starter = Arc::clone(self);
        // It creates control groups and files.
        let enclosed = ambient::blocking(move || {
            let (function_dir, tmp_dir) = (place.dir.function(), place.dir.tmp());
            let view = View {
                slot: place.number.get(),
                function_dir: mounted.as_ref().map_or(&*function_dir, CachedCode::dir),
                tmp_dir: &tmp_dir,
                memory_mb,
                network: starter.sandbox.status().network,
            };
            let enclosed = starter.sandbox.enclose(&view, &argv, start_env.as_ref().unwrap_or(&env), theirs);
            (enclosed, place, mounted, env)
        });
        let (enclosed, place, mounted, env) = enclosed.await;
        let Enclosed { mut command, setup, fence } = enclosed.map_err(|e| self.error(e))?;
        command.stdin(stdin);
        let (child, (stdout, stderr)) =
            SupervisedChild::spawn(command, setup, data_bytes_max).map_err(|e| self.error(e))?;
        let mut process = InstanceProcess::new(child, fence, place, mounted);
        let mut pipes = OutputPipes::new(stdout, stderr).map_err(worker)?;
        if let Err(e) = process.admit().await {
            let mut output = RunOutput::new(REASON_BYTES_MAX);
            pipes.drain(&mut output);
            let reason = output.stderr.text();
            return Err(StartError::Worker(format!("no sandbox: {e}; {}", reason.trim())));
        }
        Ok(Instance { control, pipes, process, env })
    }

    fn error(&self, e: io::Error) -> StartError {
        use io::ErrorKind::{ArgumentListTooLong, InvalidInput, NotFound, PermissionDenied};
        // In a sandbox, the program that is started is bubblewrap.
        let is_of_function = match e.kind() {
            InvalidInput => true,
            ArgumentListTooLong | NotFound | PermissionDenied => !self.is_isolated(),
            _ => !self.is_isolated() && e.raw_os_error() == Some(nix::libc::ENOEXEC),
        };
        if is_of_function {
            return StartError::Function(format!("the program could not be started: {e}"));
        }
        StartError::Worker(format!("the program could not be started: {e}"))
    }
}

/// The two ends of a control socket, if there is one.
fn control_socket(is_wanted: bool) -> io::Result<(Option<ControlSocket>, Option<OwnedFd>)> {
    if !is_wanted {
        return Ok((None, None));
    }
    let (ours, theirs) = ControlSocket::pair()?;
    Ok((Some(ours), Some(theirs)))
}
