//! The local worker: runs the jobs of the queue as child processes, in order of arrival.
//!
//! It is not a sandbox. A run has limits of time and memory, a private directory and an empty environment.
//! But it has the user and the network of the gateway: `dev` is for code that one would run by hand.

mod code;
mod message;
mod monitor;
mod process;
mod result;
mod room;
mod supervisor;
mod tree;

use super::code_store;
use super::queue::{Queue, QueuedJob};
use super::results::LocalResults;
use super::workers::Activity;
use crate::backend::BackendError;
use crate::model::now_ms;
use code::RunDir;
use message::Message;
use monitor::RunUsage;
use process::Program;
use result::RunResult;
use room::{AdmissionQueue, RUNS_MAX};
use std::collections::{HashMap, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tokio::task::{self, JoinSet};

/// Most jobs that are read from the table in advance. Each may have 1 MiB.
const TAKEN_MAX: usize = 32;
/// Most jobs in memory that wait for their last start (see [`STARTS_MAX`]).
const LAST_CHANCES_MAX: usize = 64;
/// Starts without a recorded end after which a job fails, because it may be the cause that the gateway dies.
const STARTS_MAX: u32 = 3;
/// Interval between polls of the queue without a notification. They find jobs whose sender left before the
/// commit, and retry after an error.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Added to the memory of a Python run for memory that it requests but never touches, such as the stacks of a
/// thousand threads. In MiB.
const DATA_ALLOWANCE_MB: u64 = 8 * 1024;
/// Deadline for an interpreter to print its path.
const INTERPRETER_ANSWER_MAX: Duration = Duration::from_secs(10);

/// The local worker of one data directory. [`LocalWorker::run`] is its loop.
pub struct LocalWorker {
    runner: Runner,
    activity: Arc<Activity>,
    /// Memory that all runs together may reserve, in MiB.
    memory_mb: u64,
    /// See [`room::STALL`] and [`room::PASSING_MAX`].
    stall: Duration,
    passing_max: Duration,
    busy_max: usize,
}

/// The parts that all runs share.
struct Runner {
    queue: Queue,
    results: Arc<LocalResults>,
    code_dir: PathBuf,
    runs_dir: PathBuf,
    python: Option<PathBuf>,
    node: Option<PathBuf>,
}

impl LocalWorker {
    pub(super) fn new(
        queue: Queue,
        results: Arc<LocalResults>,
        activity: Arc<Activity>,
        code_dir: PathBuf,
        runs_dir: PathBuf,
    ) -> Self {
        let (python, node) = (on_path("python3"), on_path("node"));
        let runner = Runner { queue, results, code_dir, runs_dir, python, node };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let busy_max = cores.saturating_mul(room::BUSY_A_CORE_MAX);
        let (memory_mb, stall, passing_max) = (room::memory_mb(), room::STALL, room::PASSING_MAX);
        Self { runner, activity, memory_mb, stall, passing_max, busy_max }
    }

    /// Runs jobs, as many at once as their memory allows, until `stop` turns true or its sender is gone. Runs
    /// in progress are then killed. Their jobs stay on the queue and run again after the next start.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) {
        if !tree::lists_children(Path::new("/proc")) {
            tracing::warn!(
                "Memory of runs is not bounded: /proc lists no children. Use a kernel with \
                 CONFIG_PROC_CHILDREN"
            );
        }
        let runner = &mut self.runner;
        runner.python = real_path(runner.python.take(), ["-c", "import sys; print(sys.executable)"]).await;
        runner.node = real_path(runner.node.take(), ["-p", "process.execPath"]).await;
        let runner = Arc::new(self.runner);
        let active = self.activity.begin();
        let line = AdmissionQueue::new(self.stall, self.passing_max);
        let mut schedule = RunScheduler::new(runner.clone(), self.memory_mb, line, self.busy_max);
        loop {
            schedule.fill().await;
            active.show_runs(schedule.runs.len());
            tokio::select! {
                _ = stop.wait_for(|stop| *stop) => break,
                Some(ended) = schedule.runs.join_next_with_id() => schedule.ended(ended),
                () = runner.queue.arrived.notified() => {}
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
        }
        schedule.stop().await;
    }
}

/// The running jobs, and the jobs that wait for their start.
struct RunScheduler {
    runner: Arc<Runner>,
    memory_mb: u64,
    /// While this many runs are busy, another one starts only once per [`LOOK_EVERY`].
    busy_max: usize,
    runs: JoinSet<()>,
    held: HashMap<task::Id, RunReservation>,
    /// Number of the last job that was read from the table.
    last: i64,
    /// Jobs that were read from the table, in order of arrival.
    taken: VecDeque<WaitingJob>,
    /// Jobs whose next start is the last one. They run one at a time, so that it is clear which of them kills
    /// the gateway. Otherwise, jobs that run beside it would fail with it.
    last_chances: VecDeque<WaitingJob>,
    line: AdmissionQueue,
}

/// A job that waits for its start.
struct WaitingJob {
    job: QueuedJob,
    /// Memory of its function in MiB. Parsed once, because a message may be long.
    memory_mb: u64,
}

/// The resources of a run in progress.
struct RunReservation {
    seq: i64,
    memory_mb: u64,
    /// Number of earlier starts of the job.
    starts: u32,
    gauge: Arc<RunUsage>,
}

impl RunScheduler {
    fn new(runner: Arc<Runner>, memory_mb: u64, line: AdmissionQueue, busy_max: usize) -> Self {
        Self {
            runner,
            memory_mb,
            busy_max,
            runs: JoinSet::new(),
            held: HashMap::new(),
            last: 0,
            taken: VecDeque::new(),
            last_chances: VecDeque::new(),
            line,
        }
    }

    /// Starts all jobs that may start now.
    async fn fill(&mut self) {
        let last_chance = self.start_last_chance();
        let first = self.start_taken(last_chance).await;
        self.line.set_first(first);
        if let Some(seq) = self.line.stalled() {
            self.start_beyond(seq);
        }
    }

    /// Starts a job for the last time, unless another last start is running. Returns the number of a job that
    /// waits for memory.
    fn start_last_chance(&mut self) -> Option<i64> {
        let is_one_running = self.held.values().any(|held| held.starts == STARTS_MAX - 1);
        if is_one_running {
            return None;
        }
        let waiting = self.last_chances.front()?;
        if !self.has_memory(waiting.memory_mb) {
            return Some(waiting.job.seq);
        }
        if self.has_slot()
            && let Some(waiting) = self.last_chances.pop_front()
        {
            self.start(waiting);
        }
        None
    }

    /// Starts the jobs that fit, in order of arrival. Returns the number of the first job that waits for
    /// memory. `first`: the number of a job that waits for memory before its last start.
    async fn start_taken(&mut self, mut first: Option<i64>) -> Option<i64> {
        let mut at = 0;
        loop {
            if at == self.taken.len() && !self.take_more().await {
                return first;
            }
            let WaitingJob { job, memory_mb } = &self.taken[at];
            let (seq, memory_mb) = (job.seq, *memory_mb);
            let is_last_chance = job.starts == STARTS_MAX - 1;
            if is_last_chance && self.last_chances.len() == LAST_CHANCES_MAX {
                return first;
            }
            if !is_last_chance && !self.has_memory(memory_mb) {
                first = first.into_iter().chain([seq]).min();
                // Set it now, because the next jobs of this loop may pass it.
                self.line.set_first(first);
                at += 1;
                continue;
            }
            let may_pass = first.is_none_or(|first| self.line.may_pass(first));
            let may_leave = is_last_chance || may_pass && self.has_slot();
            if !may_leave {
                return first;
            }
            let Some(waiting) = self.taken.remove(at) else { return first };
            if is_last_chance {
                self.last_chances.push_back(waiting);
                self.start_last_chance();
            } else {
                self.start(waiting);
            }
        }
    }

    /// Reads more jobs from the table. `false`: there are none, or there is no room for them.
    async fn take_more(&mut self) -> bool {
        let room = TAKEN_MAX - self.taken.len();
        if room == 0 {
            return false;
        }
        let more = self.runner.take(self.last, room).await;
        self.last = more.last().map_or(self.last, |job| job.seq);
        let is_more = !more.is_empty();
        self.taken.extend(more.into_iter().map(|job| {
            let memory_mb = Message::memory_mb_of(&job.message);
            WaitingJob { job, memory_mb }
        }));
        is_more
    }

    /// Starts the stalled job with number `seq`, if the memory in use leaves room. Otherwise it waits until a
    /// run ends, which happens at its time limit at the latest.
    fn start_beyond(&mut self, seq: i64) {
        let used_mb = self.used_mb();
        if used_mb >= self.memory_mb || !self.has_slot() {
            return;
        }
        let waiting = match self.taken.iter().position(|waiting| waiting.job.seq == seq) {
            Some(at) => self.taken.remove(at),
            None => self.last_chances.pop_front_if(|waiting| waiting.job.seq == seq),
        };
        if let Some(waiting) = waiting {
            let (promised_mb, job) = (self.promised_mb(), &waiting.job);
            tracing::info!(
                job = %job.id, function = job.function, promised_mb, used_mb,
                "Job started beyond the reserved memory, because the memory in use leaves room"
            );
            self.start(waiting);
        }
    }

    /// Whether the memory can be reserved. A single run may always start, however much its function has.
    fn has_memory(&self, memory_mb: u64) -> bool {
        let promised = self.promised_mb();
        promised == 0 || promised.saturating_add(memory_mb) <= self.memory_mb
    }

    /// Whether one more run may start, and not too many runs are busy. If too many are busy, one still starts
    /// once per [`LOOK_EVERY`], because the busy runs may poll for its result.
    fn has_slot(&self) -> bool {
        let busy = self.held.values().filter(|held| held.gauge.is_busy()).count();
        self.runs.len() < RUNS_MAX && (busy < self.busy_max || self.line.is_quiet_for(LOOK_EVERY))
    }

    fn promised_mb(&self) -> u64 {
        self.held.values().fold(0, |sum, held| sum.saturating_add(held.memory_mb))
    }

    /// Memory in use by all runs, in MiB. A run that was not measured yet counts with all its reserved
    /// memory.
    fn used_mb(&self) -> u64 {
        let used =
            |held: &RunReservation| held.gauge.memory_bytes().map_or(held.memory_mb, |bytes| bytes >> 20);
        self.held.values().fold(0, |sum, held| sum.saturating_add(used(held)))
    }

    fn start(&mut self, WaitingJob { job, memory_mb }: WaitingJob) {
        self.line.started();
        let gauge = Arc::new(RunUsage::new(Arc::clone(&self.runner.queue.arrived)));
        let held = RunReservation { seq: job.seq, memory_mb, starts: job.starts, gauge: Arc::clone(&gauge) };
        let run = self.runs.spawn(self.runner.clone().settle(job, gauge));
        self.held.insert(run.id(), held);
    }

    fn ended(&mut self, ended: Result<(task::Id, ()), task::JoinError>) {
        let id = match ended {
            Ok((id, ())) => id,
            Err(e) => {
                // Its job stays on the queue, and runs again after the next start of the gateway.
                tracing::error!(error = %e, "Run panicked; its job runs again after the next start");
                e.id()
            }
        };
        self.held.remove(&id);
    }

    /// Kills all runs. Their jobs are not the cause, so these starts do not count.
    async fn stop(&mut self) {
        // Dropping a run kills its processes.
        self.runs.shutdown().await;
        let starts = self.held.drain().map(|(_, held)| (held.seq, held.starts)).collect();
        if let Err(e) = self.runner.queue.set_starts(starts).await {
            tracing::warn!(error = %e, "Starts of jobs not corrected; stopped runs count as starts");
        }
    }
}

impl Runner {
    async fn take(&self, last: i64, limit: usize) -> Vec<QueuedJob> {
        self.queue.after(last, limit).await.unwrap_or_else(|e| {
            tracing::warn!(error = %e, "Queue not read; retrying in 1 s");
            Vec::new()
        })
    }

    /// Runs a job and removes it from the queue. Retries until that is written, because nothing else would.
    async fn settle(self: Arc<Self>, job: QueuedJob, gauge: Arc<RunUsage>) {
        if job.deadline <= now_ms() {
            tracing::warn!(job = %job.id, function = job.function, "Job dropped: its deadline has passed");
            until_written(|| self.queue.remove(job.seq)).await;
            return;
        }
        let result = match has_ended_us(&job) {
            Some(reason) => {
                RunResult::failed(&job, Message::parse(&job.message).ok().map(|m| m.memory_mb), reason)
            }
            None => {
                // Write it before the start: a job that kills the gateway leaves no time afterwards.
                let counted = || self.queue.set_starts(vec![(job.seq, job.starts + 1)]);
                until_written(counted).await;
                self.execute(&job, &gauge).await
            }
        };
        let result = result.to_json();
        until_written(|| self.results.finish(job.seq, job.id, result.clone())).await;
    }

    async fn execute(&self, job: &QueuedJob, gauge: &RunUsage) -> RunResult {
        let message = match Message::parse(&job.message) {
            Ok(message) => message,
            Err(reason) => return RunResult::failed(job, None, reason),
        };
        let failed = |reason| RunResult::failed(job, Some(message.memory_mb), reason);
        let (interpreter, args, data_bytes_max) = match self.interpreter(&message) {
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
        let (dir_of_code, memory_mb) = (dir.code(), message.memory_mb);
        let program =
            Program { interpreter, args, dir: dir_of_code, env, memory_mb, data_bytes_max, time_limit };
        let result = match process::run(&program, gauge).await {
            Ok(ended) => RunResult::ended(job, message.memory_mb, ended),
            Err(e) => failed(format!("the program could not be started: {e}")),
        };
        // Deleting may take long. If it fails, the next start deletes the directory.
        let _ = tokio::task::spawn_blocking(move || drop(dir)).await;
        result
    }

    /// The interpreter for a message, its arguments, and the limit of the memory that it may request, in
    /// bytes. Node.js requests far more than it uses and fails under such a limit, so it gets a heap limit
    /// instead.
    fn interpreter(&self, message: &Message<'_>) -> Result<(PathBuf, Vec<String>, Option<u64>), String> {
        let (found, name, args, data_mb) = match message.runtime.as_str() {
            "python" => {
                let data_mb = message.memory_mb.saturating_add(DATA_ALLOWANCE_MB);
                (&self.python, "python3", vec!["main.py".to_owned()], Some(data_mb))
            }
            "nodejs" => {
                let heap = format!("--max-old-space-size={}", message.memory_mb);
                (&self.node, "node", vec![heap, "index.js".to_owned()], None)
            }
            other => return Err(format!("the local worker runs python and nodejs, not {other}")),
        };
        let Some(path) = found else { return Err(format!("there is no {name} on the PATH of the gateway")) };
        Ok((path.clone(), args, data_mb.map(|mb| mb.saturating_mul(1 << 20))))
    }

    /// Creates the directory of a run: unpacks the code, and writes the input if it is passed in a file.
    async fn lay_out(&self, job: &QueuedJob, message: &Message<'_>) -> Result<RunDir, String> {
        let zip = code_store::locate(&self.code_dir, &message.s3_key)
            .ok_or("the key of the function's code is outside the store")?;
        let path = self.runs_dir.join(job.id.to_string());
        let input = message.input_by_file().then(|| message.input.get().to_owned());
        // The thread owns the directory, because it still unpacks into it if this future is dropped.
        let laid_out = tokio::task::spawn_blocking(move || {
            let broken = |e: std::io::Error| format!("the directory of the run could not be created: {e}");
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

/// The error of a job that was started too often. `None`: it may start.
fn has_ended_us(job: &QueuedJob) -> Option<String> {
    let reason = || {
        format!(
            "the run was started {STARTS_MAX} times, and each time the gateway was killed before the run \
             ended; the function may be the cause"
        )
    };
    (job.starts >= STARTS_MAX).then(reason)
}

/// Repeats a write until it succeeds. Logs the first error only.
async fn until_written<F: Future<Output = Result<(), BackendError>>>(write: impl Fn() -> F) {
    let mut is_logged = false;
    while let Err(e) = write().await {
        if !std::mem::replace(&mut is_logged, true) {
            tracing::warn!(error = %e, "State of a job not written; retrying every second");
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// The first executable of this name on the PATH of the gateway.
pub(super) fn on_path(name: &str) -> Option<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let runs = |path: &Path| {
        fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|path| path.is_absolute() && runs(path))
}

/// Asks an interpreter for its own path. The file on PATH may be a script of a version manager (pyenv, asdf),
/// which does not work in the empty environment of a run. Without an answer, returns `path` unchanged.
async fn real_path(path: Option<PathBuf>, question: [&str; 2]) -> Option<PathBuf> {
    let path = path?;
    let mut command = tokio::process::Command::new(&path);
    command.args(question).stdin(std::process::Stdio::null()).kill_on_drop(true);
    let answer = tokio::time::timeout(INTERPRETER_ANSWER_MAX, command.output()).await;
    let printed = answer.ok().and_then(Result::ok).and_then(|output| String::from_utf8(output.stdout).ok());
    let real =
        printed.map(|text| PathBuf::from(text.trim())).filter(|real| real.is_absolute() && real.is_file());
    Some(real.unwrap_or(path))
}

#[cfg(test)]
mod tests;
