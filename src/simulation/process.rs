//! Processes and their machines: started as `boot` starts them, killed at any await, stopped for a while,
//! drained, upgraded, and cut off from their disks.

use super::network::{Link, detach};
use super::ports::{Changes, NoSummaries, SimulatedResults, WorkerList};
use super::queue::{DeadLetterQueue, SqsStandIn};
use super::tables::{ClaimItems, Code, Executions, Functions};
use super::world::{World, set_clock, trace, world};
use crate::ambient;
use crate::ambient::replaced::{DiskStep, ProcessNumber, SYNC_TAKES, Scope};
use crate::audit::SpillDirs;
use crate::backend::aws::simulation::{
    CommandConnection, RedisJournal, RedisLimits, RedisMembership, stored_results,
};
use crate::backend::{
    Backend, BackendError, ChangeEvent, LeaseOutcome, Membership, Predecessor, ResultEvent, SubscriptionState,
};
use crate::config::Conf;
use crate::engine::{self, Engine, EngineParts, RunningEngine};
use crate::lifecycle::{Lifecycle, Phase};
use crate::metrics::Metrics;
use crate::model::{JobId, NodeId, ProcessToken};
use crate::traces::Traces;
use rand::Rng;
use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::Waker;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, timeout};

/// How often a machine looks whether its process runs.
const SUPERVISED_EVERY: Duration = Duration::from_millis(500);
/// As in `boot`.
const LOOK_EVERY: Duration = Duration::from_millis(200);
const PROBE_EVERY: Duration = Duration::from_secs(2);
const CLOSING_MAX: Duration = Duration::from_secs(5);

#[derive(Default)]
pub struct Processes {
    pub all: Vec<Process>,
    pub machines: Vec<Machine>,
    /// The length up to which each file, by inode, is on its disk.
    pub synced: BTreeMap<u64, Synced>,
}

pub struct Process {
    pub node: Option<NodeId>,
    pub machine: usize,
    token: ProcessToken,
    /// The index of its directory on its machine.
    dir: Option<usize>,
    state: ProcessState,
    tasks: Vec<AbortHandle>,
    stopped_tasks: Vec<Waker>,
    pub results: Inbox<ResultEvent>,
    pub changes: Inbox<ChangeEvent>,
    pub live: Option<Arc<LiveNode>>,
    running: Option<RunningEngine>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ProcessState {
    Starts,
    Serves,
    Drains,
    Dead,
}

/// The events of a subscription that the process has not taken yet.
pub struct Inbox<T> {
    pub events: VecDeque<T>,
    pub arrived: Arc<Notify>,
    pub is_subscribed: bool,
}

impl<T> Default for Inbox<T> {
    fn default() -> Self {
        Self { events: VecDeque::new(), arrived: Arc::default(), is_subscribed: false }
    }
}

impl<T> Inbox<T> {
    pub fn push(&mut self, event: T) {
        self.events.push_back(event);
        self.arrived.notify_one();
    }
}

/// What clients use of a process.
pub struct LiveNode {
    pub process: ProcessNumber,
    pub engine: Engine,
    pub lifecycle: Lifecycle,
    pub metrics: Arc<Metrics>,
    pub disk: Option<Arc<SpillDirs>>,
    pub conf: Arc<Conf>,
    /// The jobs that its predecessor left.
    pub restored: i64,
}

#[derive(Default)]
pub struct Machine {
    root: PathBuf,
    dirs: Vec<StateDirectory>,
    /// It runs no process until then.
    down_until: Option<Instant>,
    /// It never runs a process again.
    pub is_gone: bool,
    /// Until then its disk fails at these steps.
    disk_fails: Option<(Instant, DiskStep)>,
    stopped_until: Option<(ProcessNumber, Instant)>,
}

struct StateDirectory {
    node: NodeId,
    path: PathBuf,
    holder: Option<ProcessToken>,
    locked_by: Option<ProcessNumber>,
    used: u64,
}

impl Processes {
    pub fn started(&mut self, process: ProcessNumber, task: AbortHandle) {
        let tasks = &mut self.all[process.0].tasks;
        if tasks.len() > 64 && tasks.len().is_power_of_two() {
            tasks.retain(|task| !task.is_finished());
        }
        tasks.push(task);
    }

    pub fn is_stopped(&mut self, process: ProcessNumber, task: &Waker) -> bool {
        let of = &mut self.all[process.0];
        let stopped = self.machines[of.machine].stopped_until;
        let is_stopped = stopped.is_some_and(|(it, until)| it == process && until > Instant::now());
        if is_stopped {
            of.stopped_tasks.push(task.clone());
        }
        is_stopped
    }

    /// The processes that accept requests.
    pub fn serving(&self) -> Vec<Arc<LiveNode>> {
        let serving = self.all.iter().filter(|process| process.state == ProcessState::Serves);
        serving.filter_map(|process| process.live.clone()).collect()
    }

    /// The processes that have not ended.
    pub fn alive(&self) -> impl Iterator<Item = &Process> {
        self.all.iter().filter(|process| process.state != ProcessState::Dead)
    }

    fn of_machine(&self, machine: usize) -> Vec<ProcessNumber> {
        let all = self.all.iter().enumerate();
        let of = all.filter(|(_, p)| p.machine == machine && p.state != ProcessState::Dead);
        of.map(|(n, _)| ProcessNumber(n)).collect()
    }
}

impl World {
    pub fn disk_fault(&mut self, process: ProcessNumber, step: DiskStep) -> Option<u64> {
        let machine = self.processes.all[process.0].machine;
        let (until, fails) = self.processes.machines[machine].disk_fails?;
        if until <= Instant::now() || self.is_healed {
            return None;
        }
        let hits = match fails {
            // A full disk: files cannot grow.
            DiskStep::Write => matches!(step, DiskStep::Write | DiskStep::Create),
            DiskStep::Truncate => matches!(step, DiskStep::Write | DiskStep::Truncate),
            other => step == other,
        };
        hits.then(|| {
            self.bite(match fails {
                DiskStep::Write => "disk full",
                DiskStep::Truncate => "torn write",
                DiskStep::Remove => "file not removed",
                _ => "failed sync",
            });
            self.rng.random_range(0..1000)
        })
    }
}

/// How much of a file outlives a loss of power.
#[derive(Clone, Copy, Default)]
pub struct Synced {
    before: u64,
    len: u64,
    /// When the last sync is done.
    done_at: Option<Instant>,
}

impl Synced {
    /// A sync of the first `len` bytes begins.
    pub fn grow(&mut self, len: u64) {
        *self = Self { before: self.len(), len, done_at: Some(Instant::now() + SYNC_TAKES) };
    }

    fn len(&self) -> u64 {
        if self.done_at.is_none_or(|at| at <= Instant::now()) { self.len } else { self.before }
    }
}

/// Creates machines, which start a process each and restart it when it ends.
pub fn start_machines(root: &Path, machines: usize, conf: &Arc<Conf>) {
    for machine in 0..machines {
        world(|world| {
            let root = root.join(format!("machine-{machine}"));
            world.processes.machines.push(Machine { root, ..Machine::default() });
        });
        let conf = Arc::clone(conf);
        detach(async move {
            loop {
                let starts = world(|world| {
                    let of = &world.processes.machines[machine];
                    let is_up = !of.is_gone && of.down_until.is_none_or(|until| until <= Instant::now());
                    is_up && world.processes.of_machine(machine).is_empty()
                });
                if starts {
                    start(machine, &conf);
                }
                sleep(SUPERVISED_EVERY).await;
            }
        });
    }
}

/// Starts a process on a machine.
pub fn start(machine: usize, conf: &Arc<Conf>) -> ProcessNumber {
    let process = world(|world| {
        let process = Process {
            node: None,
            machine,
            token: ProcessToken(world.rng.random()),
            dir: None,
            state: ProcessState::Starts,
            tasks: Vec::new(),
            stopped_tasks: Vec::new(),
            results: Inbox::default(),
            changes: Inbox::default(),
            live: None,
            running: None,
        };
        world.processes.all.push(process);
        ProcessNumber(world.processes.all.len() - 1)
    });
    let (offset_us, ppm) = world(|world| {
        let clocks = world.profile.clocks;
        if clocks == 0.0 {
            return (0, 0);
        }
        (world.rng.random_range(-1_000_000..1_000_000), world.rng.random_range(-200..200))
    });
    set_clock(process, offset_us, ppm);
    trace(|| format!("p{} starts on machine {machine}", process.0));
    let conf = Arc::clone(conf);
    spawn_in(process, async move {
        if let Err(e) = serve(process, machine, conf).await {
            trace(|| format!("p{} did not start: {e}", process.0));
            // Not in this task: it is one of those that end.
            detach(async move { end(process) });
        }
    });
    process
}

/// Starts a task of a process, outside the code of the product.
pub fn spawn_in(process: ProcessNumber, task: impl Future<Output = ()> + Send + 'static) -> AbortHandle {
    #[expect(clippy::disallowed_methods, reason = "a simulated process ends its tasks when it ends")]
    let task = tokio::spawn(Scope(process).of(task)).abort_handle();
    world(|world| world.processes.started(process, task.clone()));
    task
}

async fn serve(process: ProcessNumber, machine: usize, conf: Arc<Conf>) -> Result<(), String> {
    let token = world(|world| world.processes.all[process.0].token);
    let commands = Arc::new(CommandConnection::simulated(Arc::new(Link)));
    let membership = Arc::new(RedisMembership::new(Arc::clone(&commands), "logs", token));
    let lease = Duration::from_secs(conf.fleet.lease_s);
    let (node, dir) = choose(process, machine, membership.as_ref(), token, lease).await?;
    trace(|| format!("p{} is node {node}", process.0));
    let is_fifo = world(|world| world.queue.is_fifo);
    let backend = Backend {
        queue: Arc::new(SqsStandIn(is_fifo)),
        results: Arc::new(SimulatedResults::new(process, stored_results(Arc::clone(&commands), node, token))),
        journal: Arc::new(RedisJournal::new(Arc::clone(&commands), Arc::new(Functions))),
        claims: Arc::new(ClaimItems),
        dead_letters: Some(Arc::new(DeadLetterQueue)),
        membership: Some(membership),
        functions: Arc::new(Functions),
        executions: Arc::new(Executions),
        code: Arc::new(Code),
        code_list: Arc::new(Code),
        workers: Arc::new(WorkerList),
        summaries: Arc::new(NoSummaries),
        changes: Some(Arc::new(Changes(process))),
        events: None,
        limits: Some(Arc::new(RedisLimits::new(commands))),
    };
    let lifecycle = Lifecycle::default();
    let metrics = Arc::new(Metrics::new(4).map_err(|e| e.to_string())?);
    let parts = EngineParts {
        node,
        conf: &conf,
        backend: &backend,
        bucket: "code".into(),
        spill_dir: Some(&dir.join("spill")),
        lifecycle: &lifecycle,
        traces: Traces::default(),
        metrics: Arc::clone(&metrics),
    };
    let (engine, mut loops) = engine::new(parts).map_err(|e| e.to_string())?;
    let restored = loops.adopter.begin().await.map_err(|e| e.to_string())?;
    trace(|| format!("p{} serves as {node}, {restored} jobs restored", process.0));
    let restored = i64::try_from(restored).unwrap_or(i64::MAX);
    let disk = loops.disk.clone();
    if let Some(rows) = disk.clone() {
        #[expect(clippy::disallowed_methods, reason = "one for each process, as in boot")]
        ambient::spawn(async move {
            loop {
                sleep(PROBE_EVERY).await;
                let rows = Arc::clone(&rows);
                ambient::blocking(move || rows.probe()).await;
            }
        });
    }
    let running = loops.start();
    lifecycle.enter(Phase::Ready);
    world(|world| {
        let of = &mut world.processes.all[process.0];
        of.running = Some(running);
        of.live = Some(Arc::new(LiveNode { process, engine, lifecycle, metrics, disk, conf, restored }));
        of.state = ProcessState::Serves;
    });
    Ok(())
}

/// Chooses the node id as `boot` does: that of the last directory whose lock and lease are free, or a new
/// one.
async fn choose(
    process: ProcessNumber,
    machine: usize,
    membership: &dyn Membership,
    token: ProcessToken,
    lease: Duration,
) -> Result<(NodeId, PathBuf), String> {
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut order: Vec<usize> = world(|world| {
        let dirs = &world.processes.machines[machine].dirs;
        let mut order: Vec<usize> = (0..dirs.len()).filter(|n| dirs[*n].locked_by.is_none()).collect();
        order.sort_by_key(|n| std::cmp::Reverse(dirs[*n].used));
        order
    });
    loop {
        let dir = match order.is_empty() {
            false => order.remove(0),
            true => world(|world| {
                let node = NodeId(world.rng.random());
                let machine = &mut world.processes.machines[machine];
                let path = machine.root.join(node.to_string());
                machine.dirs.push(StateDirectory { node, path, holder: None, locked_by: None, used: 0 });
                machine.dirs.len() - 1
            }),
        };
        let locked = world(|world| {
            let number = world.processes.all.len() as u64;
            let dir = &mut world.processes.machines[machine].dirs[dir];
            if dir.locked_by.is_some() {
                return None;
            }
            (dir.locked_by, dir.used) = (Some(process), number);
            Some((dir.node, dir.path.clone(), dir.holder))
        });
        let Some((node, path, holder)) = locked else { continue };
        std::fs::create_dir_all(&path).map_err(|e| e.to_string())?;
        world(|world| world.processes.all[process.0].dir = Some(dir));
        let predecessor = holder.map_or(Predecessor::Nobody, Predecessor::Process);
        if take(membership, node, lease, predecessor, deadline).await? {
            world(|world| {
                world.processes.machines[machine].dirs[dir].holder = Some(token);
                world.processes.all[process.0].node = Some(node);
            });
            return Ok((node, path));
        }
        world(|world| world.processes.machines[machine].dirs[dir].locked_by = None);
    }
}

async fn take(
    membership: &dyn Membership,
    node: NodeId,
    lease: Duration,
    predecessor: Predecessor,
    deadline: Instant,
) -> Result<bool, String> {
    let mut first = None;
    loop {
        match membership.take(node, lease, predecessor).await {
            Ok(LeaseOutcome::Yes) => return Ok(true),
            Ok(LeaseOutcome::No(held)) => {
                let first = *first.get_or_insert(held.until);
                if first != held.until || Instant::now() >= deadline {
                    return Ok(false);
                }
            }
            Err(BackendError::Unavailable(_)) if Instant::now() < deadline => {}
            Err(e) => return Err(e.to_string()),
        }
        sleep(LOOK_EVERY).await;
    }
}

/// Ends a process at once, wherever its tasks are.
pub fn end(process: ProcessNumber) {
    let (tasks, live, running) = world(|world| {
        let of = &mut world.processes.all[process.0];
        if of.state == ProcessState::Dead {
            return (Vec::new(), None, None);
        }
        of.state = ProcessState::Dead;
        if let Some(dir) = of.dir {
            let dir = &mut world.processes.machines[of.machine].dirs[dir];
            if dir.locked_by == Some(process) {
                dir.locked_by = None;
            }
        }
        of.stopped_tasks.clear();
        (std::mem::take(&mut of.tasks), of.live.take(), of.running.take())
    });
    if !tasks.is_empty() {
        trace(|| format!("p{} ends", process.0));
    }
    tasks.iter().for_each(AbortHandle::abort);
    // Outside the borrow, because what is dropped may reach the world.
    drop((live, running));
}

/// Ends the processes of a machine, which stays down for a while. Returns whether there were any.
pub fn crash(machine: usize, down: Duration) -> bool {
    let processes = world(|world| world.processes.of_machine(machine));
    let has_any = !processes.is_empty();
    processes.into_iter().for_each(end);
    world(|world| {
        let of = &mut world.processes.machines[machine];
        of.down_until = Some(Instant::now() + down);
        of.stopped_until = None;
    });
    has_any
}

/// Like [`crash`]; what was not synced may be lost.
pub fn lose_power(machine: usize, down: Duration) -> bool {
    let has_ended = crash(machine, down);
    let root = world(|world| world.processes.machines[machine].root.clone());
    for path in files_below(&root) {
        use std::os::unix::fs::MetadataExt;
        let Ok(metadata) = path.metadata() else { continue };
        let torn = world(|world| {
            let synced = world.processes.synced.get(&metadata.ino()).map_or(0, Synced::len);
            (synced < metadata.len()).then(|| {
                world.bite("unsynced bytes lost");
                world.rng.random_range(synced..=metadata.len())
            })
        });
        if let Some(len) = torn {
            let file = std::fs::File::options().write(true).open(&path).expect("a file of the run");
            file.set_len(len).expect("a file of the run can be cut");
        }
    }
    has_ended
}

/// Like [`crash`], and its disk is empty when it comes back.
pub fn lose_disk(machine: usize, down: Duration) -> bool {
    let has_ended = crash(machine, down);
    let root = world(|world| {
        let of = &mut world.processes.machines[machine];
        of.dirs.clear();
        of.root.clone()
    });
    let _ = std::fs::remove_dir_all(root);
    has_ended
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut entries: Vec<PathBuf> =
        std::fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    entries.sort();
    for path in entries {
        if path.is_dir() { files.extend(files_below(&path)) } else { files.push(path) }
    }
    files
}

/// Stops the process of a machine for a while, as a debugger or a frozen virtual machine does.
pub fn freeze(machine: usize, pause: Duration) {
    let Some(process) = world(|world| world.processes.of_machine(machine).first().copied()) else { return };
    trace(|| format!("p{} is stopped for {pause:?}", process.0));
    world(|world| {
        world.bite("process stopped");
        world.processes.machines[machine].stopped_until = Some((process, Instant::now() + pause));
    });
    detach(async move {
        sleep(pause + Duration::from_millis(1)).await;
        let tasks = world(|world| std::mem::take(&mut world.processes.all[process.0].stopped_tasks));
        tasks.into_iter().for_each(Waker::wake);
    });
}

/// Makes the disk of a machine fail for a while.
pub fn break_disk(machine: usize, fails: DiskStep, lasts: Duration) {
    world(|world| world.processes.machines[machine].disk_fails = Some((Instant::now() + lasts, fails)));
}

/// Stops a process in the order of `boot`. It ends by itself. Returns `false` if it does not serve.
pub fn drain(process: ProcessNumber, conf: &Arc<Conf>) -> bool {
    let drains = world(|world| {
        let of = &mut world.processes.all[process.0];
        if of.state != ProcessState::Serves {
            return None;
        }
        of.state = ProcessState::Drains;
        Some((of.live.clone()?, of.running.take()?))
    });
    let Some((live, mut running)) = drains else { return false };
    trace(|| format!("p{} drains", process.0));
    let drain = Duration::from_secs(conf.shutdown.drain_timeout_s);
    spawn_in(process, async move {
        live.lifecycle.enter(Phase::Draining);
        let _ = timeout(drain, live.lifecycle.idle()).await;
        live.lifecycle.enter(Phase::Closing);
        let _ = timeout(CLOSING_MAX, live.lifecycle.idle()).await;
        running.stop().await;
        drop(live);
        detach(async move { end(process) });
    });
    true
}

/// Replaces the process of a machine by a new one, which starts beside it.
pub fn upgrade(machine: usize, conf: &Arc<Conf>) {
    let Some(old) = world(|world| world.processes.of_machine(machine).first().copied()) else { return };
    let new = start(machine, conf);
    let conf = Arc::clone(conf);
    detach(async move {
        loop {
            let (serves, has_ended) = world(|world| {
                let state = world.processes.all[new.0].state;
                (state == ProcessState::Serves, state == ProcessState::Dead)
            });
            if serves {
                if drain(old, &conf) {
                    world(|world| world.bite("process upgraded"));
                }
                return;
            }
            if has_ended {
                return;
            }
            sleep(LOOK_EVERY).await;
        }
    });
}

impl World {
    /// Hands a publication to the subscribed processes.
    pub fn publish(&mut self, channel: &str, payload: Vec<u8>) {
        if let Some(id) = channel.strip_prefix("result:").and_then(JobId::parse) {
            let (loses, repeats) = (self.profile.lost_publications, self.profile.repeated_calls);
            for n in 0..self.processes.all.len() {
                let is_of = self.processes.all[n].node == Some(id.node())
                    && self.processes.all[n].results.is_subscribed
                    && self.processes.all[n].state != ProcessState::Dead;
                if !is_of || self.chance(loses) {
                    continue;
                }
                let event = ResultEvent::Published { id, payload: payload.clone().into() };
                let inbox = &mut self.processes.all[n].results;
                inbox.push(event.clone());
                if self.chance(repeats) {
                    self.bite("publication repeated");
                    self.processes.all[n].results.push(event);
                }
            }
        } else if let Some(id) = channel.strip_prefix("changed:") {
            for process in &mut self.processes.all {
                if process.changes.is_subscribed && process.state != ProcessState::Dead {
                    process.changes.push(ChangeEvent::Changed(id.to_owned()));
                }
            }
        }
    }

    /// Breaks all subscriptions: their server is gone.
    pub fn break_subscriptions(&mut self) {
        for process in &mut self.processes.all {
            if std::mem::take(&mut process.results.is_subscribed) {
                process.results.push(ResultEvent::Subscription(SubscriptionState::Disconnected));
            }
            if std::mem::take(&mut process.changes.is_subscribed) {
                process.changes.push(ChangeEvent::Subscription(SubscriptionState::Disconnected));
            }
        }
    }
}
