//! The local worker: takes jobs off the queue in order of arrival and runs them as child processes.
//!
//! It is no sandbox. A run has limits of time and memory, a private directory and an empty environment, but it has
//! the gateway's user and network: `dev` is for code one would run by hand. A process that leaves its session
//! escapes the limits of its run.

mod code;
mod message;
mod process;
mod result;

use super::code_store;
use super::queue::{Queue, Queued};
use super::results::LocalResults;
use super::workers::Activity;
use crate::backend::BackendError;
use crate::model::now_ms;
use code::RunDir;
use message::Message;
use process::Program;
use result::RunResult;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Most runs at once, however many cores there are.
const RUNS_MAX: usize = 64;
/// How often the queue is looked at unasked: for a job whose sender left before its commit, and after an error.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Added to a python run's memory for what takes addresses and no memory: shared libraries, thread stacks, arenas.
const ADDRESS_SPACE_ALLOWANCE_MB: u64 = 256;
/// Longest wait for an interpreter to say where it is.
const INTERPRETER_ANSWER_MAX: Duration = Duration::from_secs(10);

/// The worker of one directory. [`Worker::run`] is its loop.
pub struct Worker {
    runner: Runner,
    activity: Arc<Activity>,
    runs_at_once: usize,
}

/// What each run needs.
struct Runner {
    queue: Queue,
    results: Arc<LocalResults>,
    code_dir: PathBuf,
    runs_dir: PathBuf,
    python: Option<PathBuf>,
    node: Option<PathBuf>,
}

impl Worker {
    pub(super) fn new(
        queue: Queue,
        results: Arc<LocalResults>,
        activity: Arc<Activity>,
        code_dir: PathBuf,
        runs_dir: PathBuf,
    ) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let (python, node) = (on_path("python3"), on_path("node"));
        let runner = Runner { queue, results, code_dir, runs_dir, python, node };
        Self { runner, activity, runs_at_once: cores.min(RUNS_MAX) }
    }

    /// Runs jobs, one per core at once, until `stop` turns true or its sender is gone. Runs that have not ended by
    /// then are killed; their jobs are still on the queue and run again at the next start.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) {
        let runner = &mut self.runner;
        runner.python = real_path(runner.python.take(), ["-c", "import sys; print(sys.executable)"]).await;
        runner.node = real_path(runner.node.take(), ["-p", "process.execPath"]).await;
        let runner = Arc::new(self.runner);
        let active = self.activity.begin();
        let mut runs = JoinSet::new();
        let mut last = 0;
        loop {
            let free = self.runs_at_once - runs.len();
            if free > 0 {
                for job in runner.take(last, free).await {
                    last = job.seq;
                    runs.spawn(runner.clone().settle(job));
                }
            }
            active.show_runs(runs.len());
            let free = self.runs_at_once > runs.len();
            tokio::select! {
                _ = stop.wait_for(|stop| *stop) => break,
                Some(ended) = runs.join_next() => if let Err(e) = ended {
                    // Its job stays on the queue, and is tried again at the next start.
                    tracing::error!(error = %e, "Run Broke Off");
                },
                () = runner.queue.arrived.notified(), if free => {}
                () = tokio::time::sleep(LOOK_EVERY), if free => {}
            }
        }
        // Dropping a run kills its processes.
        runs.shutdown().await;
    }
}

impl Runner {
    async fn take(&self, last: i64, limit: usize) -> Vec<Queued> {
        self.queue.after(last, limit).await.unwrap_or_else(|e| {
            tracing::warn!(error = %e, "Queue Not Read");
            Vec::new()
        })
    }

    /// Runs a job and takes it off the queue. Tries until that is written: in this process no one else will.
    async fn settle(self: Arc<Self>, job: Queued) {
        if job.deadline <= now_ms() {
            tracing::warn!(job = %job.id, function = job.function, "Job Past Its Deadline Dropped");
            until_written(|| self.queue.remove(job.seq)).await;
            return;
        }
        let result = self.execute(&job).await.to_json();
        until_written(|| self.results.finish(job.seq, job.id, result.clone())).await;
    }

    async fn execute(&self, job: &Queued) -> RunResult {
        let message = match Message::parse(&job.message) {
            Ok(message) => message,
            Err(reason) => return RunResult::failed(job, None, reason),
        };
        let failed = |reason| RunResult::failed(job, Some(message.memory_mb), reason);
        let (interpreter, args, address_space_max) = match self.interpreter(&message) {
            Ok(interpreter) => interpreter,
            Err(reason) => return failed(reason),
        };
        let dir = match self.lay_out(job, &message).await {
            Ok(dir) => dir,
            Err(reason) => return failed(reason),
        };
        let (home, input) = (dir.home(), dir.payload());
        let env =
            message.environment(job.id, &job.function, &home.to_string_lossy(), &input.to_string_lossy());
        let env = match env {
            Ok(env) => env,
            Err(reason) => return failed(reason),
        };
        let time_limit = Duration::from_millis(message.timeout_ms);
        let program = Program { interpreter, args, dir: dir.code(), env, address_space_max, time_limit };
        let result = match process::run(&program).await {
            Ok(ended) => RunResult::ended(job, message.memory_mb, ended),
            Err(e) => failed(format!("the program could not be started: {e}")),
        };
        // Deleting may take long; if it breaks off, the next start sweeps.
        let _ = tokio::task::spawn_blocking(move || drop(dir)).await;
        result
    }

    /// The interpreter of a message's runtime, its arguments, and the limit of its address space. Node maps far
    /// more than it uses and dies under such a limit, so its own heap limit has to do.
    fn interpreter(&self, message: &Message<'_>) -> Result<(PathBuf, Vec<String>, Option<u64>), String> {
        let (found, name, args, address_space_mb) = match message.runtime.as_str() {
            "python" => {
                let address_space_mb = message.memory_mb.saturating_add(ADDRESS_SPACE_ALLOWANCE_MB);
                (&self.python, "python3", vec!["main.py".to_owned()], Some(address_space_mb))
            }
            "nodejs" => {
                let heap = format!("--max-old-space-size={}", message.memory_mb);
                (&self.node, "node", vec![heap, "index.js".to_owned()], None)
            }
            other => return Err(format!("the local worker runs python and nodejs, not {other}")),
        };
        let Some(path) = found else { return Err(format!("there is no {name} on the PATH of the gateway")) };
        Ok((path.clone(), args, address_space_mb.map(|mb| mb.saturating_mul(1 << 20))))
    }

    /// Unpacks the code, and writes the input beside it if it goes by a file.
    async fn lay_out(&self, job: &Queued, message: &Message<'_>) -> Result<RunDir, String> {
        let zip = code_store::locate(&self.code_dir, &message.s3_key)
            .ok_or("the key of the function's code leads out of the store")?;
        let path = self.runs_dir.join(job.id.to_string());
        let input = message.input_by_file().then(|| message.input.get().to_owned());
        // The directory goes along: if this run is dropped, the thread still unpacks into it.
        let laid_out = tokio::task::spawn_blocking(move || {
            let broken = |e: std::io::Error| format!("the directory of the run could not be made: {e}");
            let dir = RunDir::create(path).map_err(broken)?;
            code::unpack(&zip, &dir.code())?;
            if let Some(input) = input {
                fs::write(dir.payload(), input).map_err(broken)?;
            }
            Ok(dir)
        });
        laid_out.await.unwrap_or_else(|_| Err("the code of the function could not be unpacked".into()))
    }
}

async fn until_written<F: Future<Output = Result<(), BackendError>>>(write: impl Fn() -> F) {
    let mut told = false;
    while let Err(e) = write().await {
        if !std::mem::replace(&mut told, true) {
            tracing::warn!(error = %e, "End Of Job Not Written");
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// The first program of that name on our own PATH.
pub(super) fn on_path(name: &str) -> Option<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let runs = |path: &Path| {
        fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|path| path.is_absolute() && runs(path))
}

/// Where an interpreter itself says it is. What stands on PATH may be a version switcher's script (pyenv, asdf),
/// which finds nothing in the empty environment of a run. Without an answer the path stays what it was.
async fn real_path(path: Option<PathBuf>, question: [&str; 2]) -> Option<PathBuf> {
    let path = path?;
    let mut command = tokio::process::Command::new(&path);
    command.args(question).stdin(std::process::Stdio::null()).kill_on_drop(true);
    let answer = tokio::time::timeout(INTERPRETER_ANSWER_MAX, command.output()).await;
    let said = answer.ok().and_then(Result::ok).and_then(|output| String::from_utf8(output.stdout).ok());
    let real =
        said.map(|text| PathBuf::from(text.trim())).filter(|real| real.is_absolute() && real.is_file());
    Some(real.unwrap_or(path))
}

#[cfg(test)]
mod tests;
