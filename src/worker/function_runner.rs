//! Runs the function of a job: fetches its code, finds or starts a process for it, and collects its outputs.

use super::code_cache::{CachedCode, CodeCache};
use super::code_layout::CodeLayout;
use super::code_version::PROGRAM;
use super::control::EventContext;
use super::handler_process::{HandlerEvent, HandlerProcess};
use super::handler_version::HandlerVersion;
use super::instance::Instance;
use super::instance_start::{InstancePlan, InstanceStarter, StartError};
use super::message::{Message, ProcessPaths, RunContext};
use super::monitor::RunUsage;
use super::output::RunOutput;
use super::outputs::{self, CollectedOutputs, OutputLimits, StoredOutputs};
use super::pool::WarmPool;
use super::pool_state::WarmKind;
use super::program_build::ProgramBuilder;
use super::run_end::{RunEnd, RunLimits};
use super::runtime::{InstalledRuntime, ProcessEnv, Runtimes, ScriptStart};
use super::sandbox::{FUNCTION_DIR, Fence};
use super::script_run::{self, RunStart};
use crate::ambient;
use crate::backend::{FetchError, OutputStore, ReceivedJob, WorkerActivity, WorkerPart};
use crate::backoff::Backoff;
use crate::config::{Live, WorkerConf};
use crate::metrics::{StartKind, WorkerMetrics};
use crate::model::{Handler, now_ms};
use futures_util::FutureExt;
use std::fs::File;
use std::io;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// How long code that is away is fetched again, before the run is given up.
pub(super) const FETCH_MAX: Duration = Duration::from_secs(30);
/// The pauses between these attempts.
const FETCH_RETRIES: Backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(5));
/// The output directory, below `/tmp` of the process.
const OUTPUT_DIR: &str = "output";

/// Why a function was not run.
#[derive(Debug)]
pub(super) enum NotRun {
    /// It cannot run. A sentence for its owner.
    Failed(String),
    /// A later attempt, or another worker, may succeed.
    Away(String),
    /// The deadline of the job has passed.
    Expired,
}

impl From<FetchError> for NotRun {
    fn from(e: FetchError) -> Self {
        match e {
            FetchError::Missing(reason) => Self::Failed(reason),
            FetchError::Away(e) => Self::Away(e.to_string()),
        }
    }
}

impl From<StartError> for NotRun {
    fn from(e: StartError) -> Self {
        match e {
            StartError::Function(reason) => Self::Failed(reason),
            StartError::Worker(reason) => Self::Away(reason),
        }
    }
}

/// Runs functions.
pub(super) struct FunctionRunner {
    pub(super) starter: Arc<InstanceStarter>,
    pub(super) runtimes: Arc<Runtimes>,
    pub(super) pool: Arc<WarmPool>,
    pub(super) code: CodeCache,
    pub(super) builder: ProgramBuilder,
    pub(super) outputs: Option<Arc<dyn OutputStore>>,
    pub(super) settings: Live<WorkerConf>,
    pub(super) activity: Arc<WorkerActivity>,
    pub(super) metrics: Arc<WorkerMetrics>,
    pub(super) ai_endpoint: Option<String>,
    /// See [`FETCH_MAX`].
    pub(super) fetch_max: Duration,
}

/// A job whose function runs.
struct RunningJob<'a> {
    job: &'a ReceivedJob,
    message: &'a Message<'a>,
    runtime: &'a InstalledRuntime,
    limits: RunLimits,
    gauge: &'a RunUsage,
    /// When this worker began to work on it.
    began: Instant,
}

/// An interpreter that has the code and the memory of a function.
struct PreparedInstance {
    instance: Instance,
    /// The path of the input, if that is passed in a file.
    input: Option<String>,
    /// CPU time that the interpreter has used.
    cpu_before: Option<Duration>,
}

/// Waits for what takes no CPU time of this run, so that others start meanwhile.
async fn waiting<T>(run: &RunningJob<'_>, work: impl Future<Output = T>) -> T {
    run.gauge.rest();
    let done = work.await;
    run.gauge.work();
    done
}

impl RunningJob<'_> {
    /// Code may have been away for a while.
    fn is_in_time(&self) -> Result<(), NotRun> {
        if self.job.deadline <= now_ms() { Err(NotRun::Expired) } else { Ok(()) }
    }

    fn kind(&self) -> WarmKind {
        let heap_mb = self.runtime.heap_mb(self.message.memory_mb);
        WarmKind { runtime: self.runtime.runtime(), heap_mb }
    }
}

impl FunctionRunner {
    /// Runs the function of a job.
    pub(super) async fn run(
        &self,
        job: &ReceivedJob,
        message: &Message<'_>,
        gauge: &RunUsage,
    ) -> Result<RunEnd, NotRun> {
        let began = Instant::now();
        let runtime = self.runtimes.get(&message.runtime).map_err(NotRun::Failed)?;
        let limits = RunLimits {
            memory_mb: message.memory_mb,
            time: Duration::from_millis(message.timeout_ms),
            output_bytes_max: self.settings.get().output.bytes_max,
        };
        let run = RunningJob { job, message, runtime, limits, gauge, began };
        let _busy = self.pool.busy(runtime.runtime());
        match message.handler() {
            Some(handler) => self.call_handler(&run, handler).await,
            None => self.run_script(&run).await,
        }
    }

    /// Counts the start of the code of a run.
    fn started(&self, run: &RunningJob<'_>, kind: StartKind) {
        self.metrics.runs.started(Some(run.runtime.runtime()), kind, run.began.elapsed());
    }

    fn context<'a>(&'a self, run: &RunningJob<'a>, paths: &'a ProcessPaths) -> RunContext<'a> {
        let (request_id, function) = (&*run.job.request_id, &*run.job.function);
        RunContext { request_id, function, ai_endpoint: self.ai_endpoint.as_deref(), paths }
    }

    /// Fetches the code, and tries again for a while if it is away.
    async fn fetch(&self, run: &RunningJob<'_>) -> Result<CachedCode, NotRun> {
        let Message { s3_bucket, s3_key, .. } = run.message;
        let mut attempt = 0;
        loop {
            let fetched = self.code.get(s3_bucket, s3_key).await;
            let is_away = matches!(fetched, Err(FetchError::Away(_)));
            self.activity.note(WorkerPart::Code, !is_away);
            let error = match fetched {
                Err(FetchError::Away(e)) if run.began.elapsed() < self.fetch_max => e,
                done => return Ok(done?),
            };
            attempt += 1;
            if attempt == 1 {
                let (job, function) = (&run.job.request_id, &run.job.function);
                tracing::warn!(job, function, %error, "Code of a function not fetched; retrying");
            }
            FETCH_RETRIES.sleep(attempt).await;
        }
    }

    async fn layout(&self, run: &RunningJob<'_>, has_input: bool) -> Result<CodeLayout, NotRun> {
        let mut fetching = pin!(self.fetch(run));
        // In most cases the cache has it.
        let code = match fetching.as_mut().now_or_never() {
            Some(code) => code?,
            None => waiting(run, fetching).await?,
        };
        let input = (has_input && run.message.input_by_file()).then(|| run.message.input.get().to_owned());
        Ok(CodeLayout { code, input, as_copies: !self.starter.is_isolated() })
    }

    async fn run_script(&self, run: &RunningJob<'_>) -> Result<RunEnd, NotRun> {
        let layout = self.layout(run, true).await?;
        let memory_mb = run.limits.memory_mb;
        let mut is_built = false;
        let is_warm = loop {
            let has_file = |name: &str| layout.code.file(name).is_some() || is_built && name == PROGRAM;
            let script = run.runtime.script(&has_file, Path::new(FUNCTION_DIR), memory_mb);
            match script.map_err(NotRun::Failed)? {
                ScriptStart::Program { is_warm, .. } => break is_warm,
                ScriptStart::Build(build) => {
                    waiting(run, self.builder.build(&layout.code, build, run.runtime)).await?;
                }
            }
            is_built = true;
        };
        run.is_in_time()?;
        let warm = if is_warm && !layout.is_mounted() { self.warm_script(run, &layout).await? } else { None };
        let (mut instance, start) = match warm {
            Some(found) => found,
            None => self.cold_script(run, layout, is_built).await?,
        };
        let ended = script_run::to_its_end(&mut instance, start, run.limits, run.gauge).await;
        let mut ended = ended.map_err(|e| NotRun::Away(format!("the exit code is not known: {e}")))?;
        let collected = match (&self.outputs, instance.process.tmp_dir()) {
            (Some(_), Ok(tmp)) => self.collect(&tmp, false).await.0,
            _ => None,
        };
        drop(instance);
        self.store(run, collected, &mut ended).await;
        Ok(ended)
    }

    /// Gives the job to an interpreter that waits. `None`: none of them can run it.
    async fn warm_script(
        &self,
        run: &RunningJob<'_>,
        layout: &CodeLayout,
    ) -> Result<Option<(Instance, RunStart)>, NotRun> {
        while let Some(prepared) = self.prepared(run, layout).await? {
            let PreparedInstance { mut instance, input, cpu_before } = prepared;
            let paths = instance.process.paths();
            let env = self.script_environment(run, &paths, input.as_deref())?;
            let start = RunStart::now(false, cpu_before);
            if script_run::hand_over(&mut instance, &env).await {
                self.started(run, StartKind::Warm);
                return Ok(Some((instance, start)));
            }
        }
        Ok(None)
    }

    fn script_environment(
        &self,
        run: &RunningJob<'_>,
        paths: &ProcessPaths,
        input: Option<&str>,
    ) -> Result<ProcessEnv, NotRun> {
        let context = self.context(run, paths);
        run.message.environment(context, run.runtime.environment(), input).map_err(NotRun::Failed)
    }

    /// Takes an interpreter that waits, and gives it the code and the memory of the function. `None`: none of
    /// them can serve it.
    async fn prepared(
        &self,
        run: &RunningJob<'_>,
        layout: &CodeLayout,
    ) -> Result<Option<PreparedInstance>, NotRun> {
        if run.runtime.program().is_none() {
            return Ok(None);
        }
        let Some(instance) = self.pool.take_ready(run.kind()) else { return Ok(None) };
        let paths = instance.process.paths();
        let context = self.context(run, &paths);
        let env = run.message.handler_environment(context, run.runtime.environment());
        let is_suitable =
            env.as_ref().is_ok_and(|env| run.runtime.fixed_at_start(&instance.env, env).is_none());
        if !is_suitable {
            self.pool.return_ready(run.kind(), instance);
            return env.map(|_| None).map_err(NotRun::Failed);
        }
        self.pool.make_room();
        let (layout, memory_mb) = (layout.clone(), run.limits.memory_mb);
        let (instance, filled, cpu_before) = ambient::blocking(move || {
            let mut instance = instance;
            instance.process.hold(layout.code.clone());
            let fence = instance.process.fence();
            let limited = fence.map_or(Ok(()), |fence| fence.limit(memory_mb));
            let filled = limited.and_then(|()| layout.fill(&instance.process.function_dir()));
            let cpu = fence.and_then(Fence::cpu_time);
            (instance, filled, cpu)
        })
        .await;
        // A process that is started for the run may have more luck, or a reason.
        let Ok(input) = filled else { return Ok(None) };
        let input = input.map(|name| format!("{}/{name}", paths.function));
        Ok(Some(PreparedInstance { instance, input, cpu_before }))
    }

    async fn cold_script(
        &self,
        run: &RunningJob<'_>,
        layout: CodeLayout,
        is_built: bool,
    ) -> Result<(Instance, RunStart), NotRun> {
        self.pool.make_room();
        let memory_mb = run.limits.memory_mb;
        let mounted = layout.is_mounted().then(|| layout.code.clone());
        let (place, input) = self.starter.place(Some(layout.clone())).await?;
        let code = layout.code.clone();
        let env = self.script_environment(run, &place.paths, input.as_deref())?;
        let has_file = |name: &str| layout.code.file(name).is_some() || is_built && name == PROGRAM;
        let script = run.runtime.script(&has_file, Path::new(&place.paths.function), memory_mb);
        let ScriptStart::Program { argv, .. } = script.map_err(NotRun::Failed)? else {
            return Err(NotRun::Failed("the program of the function was not built".to_owned()));
        };
        let plan = InstancePlan::program(argv, env, memory_mb);
        let data_bytes_max = run.runtime.request_bytes_max(memory_mb);
        let start = RunStart::now(true, Some(Duration::ZERO));
        let plan = InstancePlan { data_bytes_max, mounted, ..plan };
        let mut instance = self.starter.start(place, plan).await?;
        instance.process.hold(code);
        self.started(run, StartKind::Cold);
        Ok((instance, start))
    }

    async fn call_handler(&self, run: &RunningJob<'_>, handler: &str) -> Result<RunEnd, NotRun> {
        if Handler::parse(handler).is_none() {
            return Err(NotRun::Failed(format!("{handler:?} is not a valid handler")));
        }
        let runtime = run.runtime.runtime();
        if !runtime.has_handlers() {
            return Err(NotRun::Failed(format!("functions in {} cannot have a handler", runtime.name())));
        }
        if let Some(mut process) = self.pool.take_handler(&run.job.function, handler, run.message) {
            self.pool.make_room();
            let start = RunStart::now(false, process.cpu_time());
            self.started(run, StartKind::Warm);
            return Ok(self.call(run, process, start, RunOutput::new(run.limits.output_bytes_max)).await);
        }
        let (mut process, env, start) = self.cold_handler(run, handler).await?;
        self.started(run, StartKind::Cold);
        let mut output = RunOutput::new(run.limits.output_bytes_max);
        match process.load(&env, start, run.limits, run.gauge, &mut output).await {
            Ok(()) => Ok(self.call(run, process, start, output).await),
            Err(ended) => {
                self.pool.discard(process);
                Ok(*ended)
            }
        }
    }

    /// A process that can load the handler, with the environment to load it with.
    async fn cold_handler(
        &self,
        run: &RunningJob<'_>,
        handler: &str,
    ) -> Result<(HandlerProcess, ProcessEnv, RunStart), NotRun> {
        self.pool.make_room();
        let layout = self.layout(run, false).await?;
        run.is_in_time()?;
        let begins = |cpu| RunStart::now(true, cpu);
        let ready = if layout.is_mounted() { None } else { self.prepared(run, &layout).await? };
        let (instance, start) = match ready {
            Some(PreparedInstance { instance, cpu_before, .. }) => (instance, begins(cpu_before)),
            None => {
                let start = begins(Some(Duration::ZERO));
                (self.handler_instance(run, layout).await?, start)
            }
        };
        let paths = instance.process.paths();
        let env = run.message.handler_environment(self.context(run, &paths), run.runtime.environment());
        let version = HandlerVersion::of(&run.job.function, handler, run.message);
        let process = HandlerProcess::new(instance, Arc::new(version));
        let process = process.map_err(|e| NotRun::Away(format!("the files of the process: {e}")))?;
        Ok((process, env.map_err(NotRun::Failed)?, start))
    }

    /// Starts a process for the handler alone, with the environment of the function from its start.
    async fn handler_instance(&self, run: &RunningJob<'_>, layout: CodeLayout) -> Result<Instance, NotRun> {
        let memory_mb = run.limits.memory_mb;
        let mounted = layout.is_mounted().then(|| layout.code.clone());
        let code = layout.code.clone();
        let (place, _) = self.starter.place(Some(layout)).await?;
        let context = self.context(run, &place.paths);
        let env = run.message.handler_environment(context, run.runtime.environment());
        let env = env.map_err(NotRun::Failed)?;
        let start = run.runtime.warm(memory_mb, env.clone()).map_err(NotRun::Failed)?;
        let plan = InstancePlan::waiting(&start, env, memory_mb);
        let plan = plan.map_err(|e| NotRun::Away(e.to_string()))?;
        let data_bytes_max = run.runtime.request_bytes_max(memory_mb);
        let plan = InstancePlan { data_bytes_max, mounted, ..plan };
        let mut instance = self.starter.start(place, plan).await?;
        instance.process.hold(code);
        Ok(instance)
    }

    async fn call(
        &self,
        run: &RunningJob<'_>,
        mut process: HandlerProcess,
        start: RunStart,
        output: RunOutput,
    ) -> RunEnd {
        let paths = process.paths();
        let env = run.message.event_environment(self.context(run, &paths));
        let context = EventContext {
            request_id: &run.job.request_id,
            function_id: &run.job.function,
            deadline_ms: start.unix_ms.saturating_add(run.message.timeout_ms),
            memory_mb: run.message.memory_mb,
            model_id: &run.message.model_id,
            output_dir: &paths.output,
        };
        let event = HandlerEvent { event: run.message.input, env: &env, context };
        let mut ended = process.call(event, start, run.limits, run.gauge, output).await;
        let (collected, is_clear) = self.collect(process.tmp(), process.is_usable()).await;
        if is_clear {
            self.pool.keep(run.runtime.runtime(), process);
        } else {
            self.pool.discard(process);
        }
        self.store(run, collected, &mut ended).await;
        ended
    }

    /// Copies what a run has left in its output directory, if there is a store for it. `clears`: empties the
    /// directory for the next run of the same process. Returns `false` too, if that failed.
    async fn collect(&self, tmp: &File, clears: bool) -> (Option<CollectedOutputs>, bool) {
        let files_max = self.outputs.as_ref().map_or(0, |_| self.settings.get().output.files_max);
        if outputs::are_none(tmp, OUTPUT_DIR) {
            return ((files_max > 0).then(CollectedOutputs::default), true);
        }
        let Ok(tmp) = tmp.try_clone() else { return (None, false) };
        let limits = OutputLimits { files_max, bytes_max: self.settings.get().sandbox.work_mb_max << 20 };
        let copies = self.starter.copies_dir();
        ambient::blocking(move || {
            let collected = (files_max > 0).then(|| outputs::collect(&tmp, OUTPUT_DIR, copies, limits));
            let cleared: io::Result<()> = if clears { outputs::clear(&tmp, OUTPUT_DIR) } else { Ok(()) };
            (collected, cleared.is_ok())
        })
        .await
    }

    /// Stores outputs, and shows them in the result.
    async fn store(&self, run: &RunningJob<'_>, collected: Option<CollectedOutputs>, ended: &mut RunEnd) {
        // The process waits or has ended. What follows only waits, too.
        run.gauge.rest();
        let (Some(collected), Some(store)) = (collected, &self.outputs) else { return };
        let stored: StoredOutputs = collected.store(&**store, &run.job.request_id).await;
        self.metrics.runs.output_files(stored.files.len(), stored.left_out);
        ended.set_outputs(stored);
    }
}
