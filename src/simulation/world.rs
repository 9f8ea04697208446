//! The world outside the processes: clocks, stores, the queue, and what is known to be true.
//!
//! One per thread, because a run is one thread. Code of the simulation reaches it by [`world`]; code of the
//! product reaches only its ports and its surroundings ([`crate::ambient`]).

use super::faults::Profile;
use super::process::Processes;
use super::queue::Queue;
use super::tables::Tables;
use super::truth::Truth;
use crate::ambient::replaced::{DiskStep, ProcessNumber, Surroundings};
use crate::backend::aws::simulation::{Keyspace, SimulatedRedis};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::task::Waker;
use std::time::Duration;
use tokio::task::AbortHandle;
use tokio::time::Instant;

/// The time of day at which every run begins, in microseconds since the Unix epoch: in 2026.
const EPOCH_US: u64 = 1_795_000_000_000_000;
/// Lines of the trace that are kept for a report.
const LINES_KEPT: usize = 400_000;

thread_local! {
    static WORLD: RefCell<Option<World>> = const { RefCell::new(None) };
    static CLOCKS: RefCell<Option<Clocks>> = const { RefCell::new(None) };
}

/// Everything outside the processes.
pub struct World {
    pub rng: StdRng,
    pub profile: Profile,
    pub redis: RedisState,
    pub tables: Tables,
    pub queue: Queue,
    pub processes: Processes,
    pub truth: Truth,
    pub outages: Vec<Outage>,
    /// How often each kind of fault has taken effect.
    pub bites: BTreeMap<&'static str, u64>,
    pub trace: Trace,
    /// Faults are over: from here on everything must come to rest.
    pub is_healed: bool,
}

/// The Redis server that answers now, and what a fail-over may bring back.
pub struct RedisState {
    pub server: SimulatedRedis,
    /// The open connections, and how many there ever were.
    pub connections: BTreeSet<u64>,
    connected: u64,
    /// Former states, the newest last, each with its time in microseconds.
    pub snapshots: VecDeque<(u64, Keyspace)>,
    /// The offset of its clock, in microseconds, and its drift, in millionths.
    pub offset_us: i64,
    pub ppm: i64,
}

impl RedisState {
    pub fn connect(&mut self) -> u64 {
        self.connected += 1;
        self.connections.insert(self.connected);
        self.connected
    }
}

/// A service of the outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Service {
    Redis,
    Queue,
    LogTable,
    FunctionTable,
}

/// A time in which a service does not answer some or all processes.
#[derive(Clone, Copy, Debug)]
pub struct Outage {
    pub service: Service,
    /// `None`: all processes.
    pub process: Option<ProcessNumber>,
    /// Calls are refused at once; otherwise they vanish.
    pub refuses: bool,
    pub until: Instant,
}

/// What has happened, in order.
#[derive(Default)]
pub struct Trace {
    lines: VecDeque<String>,
}

impl Trace {
    fn add(&mut self, line: String) {
        if self.lines.len() == LINES_KEPT {
            self.lines.pop_front();
        }
        self.lines.push_back(line);
    }

    /// The lines that contain one of the texts.
    pub fn about<'a>(&'a self, texts: &'a [String]) -> impl Iterator<Item = &'a str> {
        let lines = self.lines.iter().map(String::as_str);
        lines.filter(move |line| texts.iter().any(|text| line.contains(text.as_str())))
    }

    pub fn all(&self) -> impl Iterator<Item = &str> {
        self.lines.iter().map(String::as_str)
    }
}

impl World {
    pub fn new(seed: u64, profile: Profile) -> Self {
        let mut rng = StdRng::seed_from_u64(seed ^ 0x5EED);
        let ppm = if profile.clocks > 0.0 { rng.random_range(-4000..=4000) } else { 0 };
        Self {
            rng,
            redis: RedisState {
                server: SimulatedRedis::new(),
                connections: BTreeSet::new(),
                connected: 0,
                snapshots: VecDeque::new(),
                offset_us: 0,
                ppm,
            },
            tables: Tables::default(),
            queue: Queue::new(&profile),
            processes: Processes::default(),
            truth: Truth::default(),
            outages: Vec::new(),
            bites: BTreeMap::new(),
            trace: Trace::default(),
            is_healed: false,
            profile,
        }
    }

    /// Adds a line to the trace.
    pub fn note(&mut self, line: impl FnOnce() -> String) {
        let at = elapsed_us() / 1000;
        self.trace.add(format!("{at:>8} {}", line()));
    }

    /// A fault has taken effect.
    pub fn bite(&mut self, fault: &'static str) {
        debug_assert!(super::faults::NAMES.contains(&fault), "{fault}");
        *self.bites.entry(fault).or_default() += 1;
    }

    /// Draws whether a fault of this probability happens now. None does after the faults are over.
    pub fn chance(&mut self, probability: f64) -> bool {
        !self.is_healed && probability > 0.0 && self.rng.random_bool(probability.min(1.0))
    }

    /// The outage in which a call of `process` to `service` falls now.
    pub fn outage(&mut self, service: Service, process: Option<ProcessNumber>) -> Option<Outage> {
        let now = Instant::now();
        self.outages.retain(|outage| outage.until > now);
        let hits = |outage: &&Outage| {
            outage.service == service && (outage.process.is_none() || outage.process == process)
        };
        self.outages.iter().find(hits).copied()
    }

    /// The time on the clock of Redis, in microseconds since the Unix epoch.
    pub fn redis_us(&self) -> u64 {
        shifted(elapsed_us(), self.redis.offset_us, self.redis.ppm)
    }
}

/// Installs a world on this thread. Returns the surroundings of its processes.
pub fn install(seed: u64, profile: Profile) -> Ambience {
    let began = Instant::now();
    CLOCKS.set(Some(Clocks { began, of_processes: Vec::new() }));
    WORLD.set(Some(World::new(seed, profile)));
    Ambience { rng: RefCell::new(StdRng::seed_from_u64(seed)) }
}

/// Removes the world of this thread.
pub fn take() -> Option<World> {
    WORLD.take()
}

/// Calls `ask` with the world. It must not await, or call code that reaches the world.
pub fn world<T>(ask: impl FnOnce(&mut World) -> T) -> T {
    WORLD.with_borrow_mut(|world| ask(world.as_mut().expect("a simulation runs on this thread")))
}

/// Adds a line to the trace, with the true time in milliseconds.
pub fn trace(line: impl FnOnce() -> String) {
    let line = line();
    world(|world| world.note(|| line));
}

/// The true time since the run began, in microseconds.
pub fn elapsed_us() -> u64 {
    let began = CLOCKS.with_borrow(|clocks| clocks.as_ref().map(|clocks| clocks.began));
    began.map_or(0, |began| u64::try_from(began.elapsed().as_micros()).unwrap_or(0))
}

/// The true time, in milliseconds since the Unix epoch.
pub fn true_ms() -> u64 {
    (EPOCH_US + elapsed_us()) / 1000
}

fn shifted(elapsed_us: u64, offset_us: i64, ppm: i64) -> u64 {
    let elapsed = i128::from(elapsed_us);
    let shown = i128::from(EPOCH_US) + elapsed + elapsed * i128::from(ppm) / 1_000_000;
    u64::try_from(shown + i128::from(offset_us)).unwrap_or(0)
}

struct Clocks {
    began: Instant,
    /// Offset in microseconds and drift in millionths, by process.
    of_processes: Vec<(i64, i64)>,
}

/// Sets the clock of a process.
pub fn set_clock(process: ProcessNumber, offset_us: i64, ppm: i64) {
    CLOCKS.with_borrow_mut(|clocks| {
        let clocks = &mut clocks.as_mut().expect("a simulation runs on this thread").of_processes;
        if clocks.len() <= process.0 {
            clocks.resize(process.0 + 1, (0, 0));
        }
        clocks[process.0] = (offset_us, ppm);
    });
}

/// The surroundings of simulated processes.
pub struct Ambience {
    rng: RefCell<StdRng>,
}

impl Surroundings for Ambience {
    fn unix_time(&self, process: Option<ProcessNumber>) -> Duration {
        let clock = CLOCKS.with_borrow(|clocks| {
            let of = process.and_then(|process| clocks.as_ref()?.of_processes.get(process.0).copied());
            of.unwrap_or((0, 0))
        });
        Duration::from_micros(shifted(elapsed_us(), clock.0, clock.1))
    }

    fn next_u64(&self) -> u64 {
        self.rng.borrow_mut().next_u64()
    }

    fn blocking_time(&self) -> Duration {
        Duration::from_millis(self.rng.borrow_mut().random_range(1..10))
    }

    fn started(&self, process: ProcessNumber, task: AbortHandle) {
        world(|world| world.processes.started(process, task));
    }

    fn is_stopped(&self, process: ProcessNumber, task: &Waker) -> bool {
        world(|world| world.processes.is_stopped(process, task))
    }

    fn disk_fault(&self, process: ProcessNumber, step: DiskStep) -> Option<u64> {
        world(|world| world.disk_fault(process, step))
    }

    fn synced(&self, inode: u64, len: u64) {
        world(|world| world.processes.synced.entry(inode).or_default().grow(len));
    }
}
