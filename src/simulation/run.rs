//! One run: faults and load, then silence, then the checks.

use super::checks;
use super::clients;
use super::faults::{self, Plan, Profile};
use super::process::start_machines;
use super::report;
use super::shorten::shorten;
use super::tables::create_functions;
use super::workers;
use super::world::{self, Trace, install, trace, world};
use crate::ambient::replaced;
use crate::config::{Conf, Identity, LimitConf, LimitMode, OnRedisLoss};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, Once};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// The time within which everything comes to rest after the last fault, in virtual time.
const RESTS_WITHIN: Duration = Duration::from_secs(900);
/// Interval of looks at it.
const LOOK_EVERY: Duration = Duration::from_secs(3);
/// At rest for this long, so that the last look-ups of late results are made.
const RESTS_FOR: Duration = Duration::from_secs(130);

/// How long after its acceptance a job ends as LOST, in seconds.
pub const JOB_DEADLINE_S: u64 = 25;

/// The exact limit: requests a minute, and how many of them at once.
pub const EXACT_RATE: u32 = 180;
pub const EXACT_BURST: u32 = 20;

/// The outcome of a run.
pub struct Finished {
    pub jobs: u64,
    pub bites: BTreeMap<&'static str, u64>,
    pub violations: Vec<String>,
    pub report: String,
    pub trace: Trace,
}

impl Profile {
    /// The settings of all processes.
    fn conf(&self) -> Conf {
        let mut conf = Conf::shipped().expect("the shipped settings are valid");
        conf.waits.job_deadline_s = Some(JOB_DEADLINE_S);
        conf.waits.sync_default_s = 10;
        conf.dead_letter.every_s = 5;
        conf.dead_letter.consume = true;
        conf.shutdown.drain_timeout_s = 5;
        let (mode, rate, burst) = if self.is_exact {
            (LimitMode::Exact, EXACT_RATE, EXACT_BURST)
        } else {
            (LimitMode::Leased, 600, 60)
        };
        conf.limits = vec![LimitConf {
            name: "simulated".into(),
            identity: Identity::Key,
            mode,
            routes: vec!["/run".into()],
            rate,
            period_s: 60,
            burst,
            // `local` counts by the real clock.
            on_redis_loss: OnRedisLoss::Closed,
        }];
        if self.tight > 0.0 {
            conf.memory.jobs_in_flight_max = 12;
            conf.memory.audit_rows_max = 4;
            conf.batch.queue_jobs_max = 6;
            conf.batch.sends_max = 2;
            conf.audit.spill_bytes_max = 4096;
        }
        conf
    }
}

thread_local! {
    /// Panics of tasks on this thread, which tokio would keep to itself.
    static PANICS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

fn note_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.with_borrow_mut(|panics| panics.push(info.to_string()));
            before(info);
        }));
    });
}

/// Makes the run of a seed. If it fails, the report explains the shortest run that was found to fail too.
pub fn run(seed: u64) -> Finished {
    let plan = Plan::of(seed);
    let mut finished = make(seed, &plan);
    let is_short = std::env::var("SIM_SHORTEN").is_ok_and(|text| text == "0");
    if !finished.violations.is_empty() && !is_short {
        finished.report = shorten(seed, plan, &finished);
    }
    finished
}

/// Makes the run of a plan.
pub fn make(seed: u64, plan: &Plan) -> Finished {
    note_panics();
    PANICS.take();
    let directory = Directory::new();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    let profile = plan.profile;
    let (surroundings, guard) = runtime.block_on(async {
        let surroundings = Rc::new(install(seed, profile));
        (Rc::clone(&surroundings), replaced::replace(surroundings))
    });
    runtime.block_on(go(plan, directory.0.clone()));
    // The tasks go first: what they drop may reach the world.
    drop(runtime);
    let mut ended = world::take().expect("the world of this run");
    drop((guard, surroundings));
    let panics = PANICS.take();
    ended.truth.violations.extend(panics.into_iter().map(|panic| format!("a task panicked: {panic}")));
    let violations = std::mem::take(&mut ended.truth.violations);
    let report = match violations.is_empty() {
        true => String::new(),
        false => report::of(seed, plan, &ended, &violations),
    };
    Finished {
        jobs: ended.truth.on_queue.len() as u64,
        bites: ended.bites,
        violations,
        report,
        trace: ended.trace,
    }
}

async fn go(plan: &Plan, root: PathBuf) {
    let Plan { profile, incidents } = plan.clone();
    let conf = Arc::new(profile.conf());
    world(create_functions);
    workers::start();
    start_machines(&root, profile.machines, &conf);
    let began = Instant::now();
    let end = began + Duration::from_secs(profile.seconds);
    clients::start(end, profile.requests);
    let snapshots = async {
        if profile.has(faults::Incident::RedisRolledBack) {
            faults::take_snapshots(end).await;
        }
    };
    tokio::join!(
        faults::strike(began, incidents, Arc::clone(&conf)),
        snapshots,
        sleep(Duration::from_secs(profile.seconds))
    );
    world(|world| {
        world.is_healed = true;
        world.outages.clear();
    });
    trace(|| "faults are over".to_owned());
    let healed = Instant::now();
    let mut at_rest_since = None;
    loop {
        let unrest = checks::unrest();
        if unrest.is_empty() {
            if at_rest_since.get_or_insert_with(Instant::now).elapsed() >= RESTS_FOR {
                break;
            }
        } else {
            at_rest_since = None;
            if healed.elapsed() > RESTS_WITHIN {
                let unrest = format!("not at rest after {RESTS_WITHIN:?}: {unrest:?}");
                world(|world| world.truth.violated(unrest));
                break;
            }
        }
        sleep(LOOK_EVERY).await;
    }
    checks::check();
}

/// The directory of a run, in memory where that is possible.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Self {
        let memory = PathBuf::from("/dev/shm");
        let root = if memory.is_dir() { memory } else { std::env::temp_dir() };
        let directory = tempfile::Builder::new().prefix("infra-sim-").tempdir_in(root).expect("a directory");
        Self(directory.keep())
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
