//! Which faults a run has, how often, and when they strike.
//!
//! Each run draws some kinds of faults and leaves the others out ("swarm testing", Groce et al. 2012): a
//! fault that is always there hides what only shows without it.

use super::process::{LiveNode, break_disk, crash, drain, freeze, lose_disk, lose_power, upgrade};
use super::world::{Outage, Service, World, trace, true_ms, world};
use crate::ambient::replaced::{DiskStep, ProcessNumber};
use crate::config::Conf;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, sleep, sleep_until};

/// The interval at which Redis could fail over to a replica: how far it lags.
const SNAPSHOT_EVERY: Duration = Duration::from_millis(250);
const SNAPSHOTS_KEPT: usize = 5;
/// The time after a loss of all data of Redis in which the journals are restored, and the time after the end
/// of a process in which a successor or another node knows its jobs.
const RESTORED_WITHIN: Duration = Duration::from_secs(30);
const TAKEN_OVER_WITHIN: Duration = Duration::from_secs(40);

/// The faults of a run. Probabilities are those of one call or step.
#[derive(Clone, Copy, Debug, Default)]
pub struct Profile {
    pub machines: usize,
    pub requests: usize,
    pub seconds: u64,
    pub is_fifo: bool,
    pub refused_calls: f64,
    pub lost_requests: f64,
    pub lost_answers: f64,
    pub repeated_calls: f64,
    pub slow_calls: f64,
    pub partial_batches: f64,
    pub lost_publications: f64,
    pub slow_workers: f64,
    pub dead_workers: f64,
    pub broken_results: f64,
    pub differing_results: bool,
    /// 1: the clocks of machines and of Redis differ, drift and step.
    pub clocks: f64,
    /// 1: small bounds, so that queues and tables fill up.
    pub tight: f64,
    /// The limit of requests counts each request at Redis.
    pub is_exact: bool,
    /// The kinds of incidents, as bits of [`Incident`], and the mean time between two.
    pub incidents: u32,
    pub every: Duration,
}

/// All kinds of faults, as their effects are counted.
pub const NAMES: [&str; 41] = [
    "call in an outage",
    "call of a caller that has gone on or died",
    "clock step",
    "command of a closed connection",
    "crash",
    "disk full",
    "disk lost",
    "drain",
    "entry of a batch not sent",
    "fail-over of Redis",
    "failed sync",
    "file not removed",
    "job failed by its dead letter",
    "lost answer",
    "lost request",
    "machine gone",
    "message refused by the queue",
    "outage of Redis",
    "outage of the function table",
    "outage of the log table",
    "outage of the queue",
    "partition",
    "power loss",
    "process stopped",
    "process upgraded",
    "publication lost",
    "publication repeated",
    "Redis came back with older data",
    "Redis lost its data",
    "refused call",
    "repeated call",
    "result not stored",
    "row left unprocessed",
    "slow call",
    "slow worker",
    "torn write",
    "unsynced bytes lost",
    "broken result",
    "worker died before its result",
    "worker died before it stored its result",
    "worker died before it deleted its message",
];

/// Something that happens to a machine or a service at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Incident {
    Crash,
    PowerLoss,
    DiskLoss,
    MachineGone,
    Freeze,
    Drain,
    Upgrade,
    DiskFull,
    TornWrite,
    FailedSync,
    FailedRemove,
    RedisOutage,
    RedisEmptied,
    RedisRolledBack,
    RedisFailOver,
    QueueOutage,
    LogTableOutage,
    FunctionTableOutage,
    Partition,
    ClockStep,
}

impl Incident {
    pub const ALL: [Self; 20] = [
        Self::Crash,
        Self::PowerLoss,
        Self::DiskLoss,
        Self::MachineGone,
        Self::Freeze,
        Self::Drain,
        Self::Upgrade,
        Self::DiskFull,
        Self::TornWrite,
        Self::FailedSync,
        Self::FailedRemove,
        Self::RedisOutage,
        Self::RedisEmptied,
        Self::RedisRolledBack,
        Self::RedisFailOver,
        Self::QueueOutage,
        Self::LogTableOutage,
        Self::FunctionTableOutage,
        Self::Partition,
        Self::ClockStep,
    ];

    fn bit(self) -> u32 {
        1 << (self as u32)
    }

    /// Whether the incident ends a process, or separates it from the stores for a while.
    fn loses_touch(self) -> bool {
        matches!(
            self,
            Self::Crash
                | Self::PowerLoss
                | Self::DiskLoss
                | Self::MachineGone
                | Self::Drain
                | Self::Upgrade
                | Self::Freeze
                | Self::Partition
        )
    }
}

/// An incident of a run.
#[derive(Clone, Debug)]
pub struct Planned {
    pub at: Duration,
    pub incident: Incident,
    pub machine: usize,
    pub lasts: Duration,
    /// For the choices that only some incidents have.
    seed: u64,
}

/// Everything about a run that is chosen before it begins. A shorter plan is a smaller run of the same seed.
#[derive(Clone, Debug)]
pub struct Plan {
    pub profile: Profile,
    pub incidents: Vec<Planned>,
}

impl Plan {
    /// The plan of a seed.
    pub fn of(seed: u64) -> Self {
        let profile = Profile::of(seed);
        let rng = &mut StdRng::seed_from_u64(seed ^ 0x5C_4ED);
        let kinds: Vec<Incident> = profile.kinds().into_iter().collect();
        let mean_ms = profile.every.as_millis() as u64;
        let (mut at, mut incidents) = (Duration::ZERO, Vec::new());
        while let Some(incident) = kinds.choose(rng) {
            at += Duration::from_millis(rng.random_range(1..2 * mean_ms));
            if at >= Duration::from_secs(profile.seconds) {
                break;
            }
            let lasts_ms = match rng.random_range(0..3) {
                0 => rng.random_range(100..2_000),
                1 => rng.random_range(2_000..12_000),
                _ => rng.random_range(10_000..40_000),
            };
            incidents.push(Planned {
                at,
                incident: *incident,
                machine: rng.random_range(0..profile.machines),
                lasts: Duration::from_millis(lasts_ms),
                seed: rng.random(),
            });
        }
        // Documented: a job that only Redis knew is lost when its node and the data of Redis are lost
        // together. Then also, and if another node adopts the jobs of a node at that time, counters may be
        // off.
        let of = |incident| incidents.iter().filter(move |planned: &&Planned| planned.incident == incident);
        let losses: Vec<Duration> = of(Incident::RedisEmptied).map(|planned| planned.at).collect();
        let outages: Vec<(Duration, Duration)> =
            of(Incident::RedisOutage).map(|planned| (planned.at, planned.at + planned.lasts)).collect();
        // Nothing is restored or taken over while Redis does not answer.
        let after = |at: Duration, time: Duration| {
            outages.iter().fold(at.saturating_add(time), |end, (from, to)| {
                if *from < end && *to > at { end.saturating_add(*to - at.max(*from)) } else { end }
            })
        };
        // While the table of a node is full, it takes no jobs of others over.
        let taken_over = if profile.tight > 0.0 { Duration::MAX } else { TAKEN_OVER_WITHIN };
        let is_together = |planned: &Planned| {
            let end = after(planned.at + planned.lasts, taken_over);
            losses.iter().any(|loss| planned.at < after(*loss, RESTORED_WITHIN) && end > *loss)
        };
        incidents.retain(|planned| !(planned.incident.loses_touch() && is_together(planned)));
        Self { profile, incidents }
    }
}

impl Profile {
    /// The profile of a seed.
    pub fn of(seed: u64) -> Self {
        let rng = &mut StdRng::seed_from_u64(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let mut rate = |most: f64| if rng.random_bool(0.4) { rng.random_range(0.0..most) } else { 0.0 };
        let mut profile = Self {
            refused_calls: rate(0.2),
            lost_requests: rate(0.1),
            lost_answers: rate(0.15),
            repeated_calls: rate(0.1),
            slow_calls: rate(0.1),
            partial_batches: rate(0.3),
            lost_publications: rate(0.5),
            slow_workers: rate(0.2),
            dead_workers: rate(0.2),
            broken_results: rate(0.1),
            ..Self::default()
        };
        profile.machines = rng.random_range(1..=4);
        profile.requests = rng.random_range(50..=230);
        profile.seconds = rng.random_range(20..=90);
        profile.is_fifo = rng.random_bool(0.2);
        profile.differing_results = rng.random_bool(0.2);
        profile.clocks = if rng.random_bool(0.3) { 1.0 } else { 0.0 };
        profile.tight = if rng.random_bool(0.2) { 1.0 } else { 0.0 };
        for incident in Incident::ALL {
            if rng.random_bool(0.25) {
                profile.incidents |= incident.bit();
            }
        }
        profile.is_exact = rng.random_bool(0.25);
        profile.every = Duration::from_millis(rng.random_range(1_000..15_000));
        profile
    }

    pub fn has(&self, incident: Incident) -> bool {
        self.incidents & incident.bit() != 0
    }

    /// The incidents of the run.
    pub fn kinds(&self) -> BTreeSet<Incident> {
        Incident::ALL.into_iter().filter(|incident| self.has(*incident)).collect()
    }
}

/// Lets the incidents of a plan happen.
pub async fn strike(began: Instant, incidents: Vec<Planned>, conf: Arc<Conf>) {
    for planned in incidents {
        sleep_until(began + planned.at).await;
        happen(&planned, &conf);
    }
}

fn happen(planned: &Planned, conf: &Arc<Conf>) {
    let Planned { incident, machine, lasts, .. } = *planned;
    trace(|| format!("incident {incident:?} of machine {machine} for {lasts:?}"));
    if takes_effect(planned, conf) {
        world(|world| world.bite(name(incident)));
    }
}

/// Lets an incident happen. Returns whether it has an effect that is to be counted now.
fn takes_effect(planned: &Planned, conf: &Arc<Conf>) -> bool {
    let Planned { incident, machine, lasts, seed, .. } = *planned;
    let rng = &mut StdRng::seed_from_u64(seed);
    match incident {
        Incident::Crash => crash(machine, lasts),
        Incident::PowerLoss => lose_power(machine, lasts),
        Incident::DiskLoss => lose_disk(machine, lasts),
        Incident::MachineGone => {
            let left = world(|world| world.processes.machines.iter().filter(|m| !m.is_gone).count());
            left > 1 && {
                world(|world| world.processes.machines[machine].is_gone = true);
                crash(machine, lasts)
            }
        }
        Incident::Drain => {
            let of_machine =
                |live: &Arc<LiveNode>| world(|world| world.processes.all[live.process.0].machine == machine);
            let serving = world(|world| world.processes.serving());
            let drained = serving.iter().filter(|live| of_machine(live) && drain(live.process, conf)).count();
            drained > 0
        }
        // These count their effects, which come later or never.
        Incident::Freeze => {
            freeze(machine, lasts);
            false
        }
        Incident::Upgrade => {
            upgrade(machine, conf);
            false
        }
        Incident::DiskFull | Incident::TornWrite | Incident::FailedSync | Incident::FailedRemove => {
            let fails = match incident {
                Incident::DiskFull => DiskStep::Write,
                Incident::TornWrite => DiskStep::Truncate,
                Incident::FailedSync => DiskStep::Sync,
                _ => DiskStep::Remove,
            };
            break_disk(machine, fails, lasts);
            false
        }
        Incident::RedisOutage => outage(Service::Redis, None, lasts),
        Incident::RedisEmptied => world(empty_redis),
        Incident::RedisRolledBack => world(roll_redis_back),
        Incident::RedisFailOver => world(fail_over),
        Incident::QueueOutage => outage(Service::Queue, None, lasts),
        Incident::LogTableOutage => outage(Service::LogTable, None, lasts),
        Incident::FunctionTableOutage => outage(Service::FunctionTable, None, lasts),
        Incident::Partition => {
            let serving = world(|world| world.processes.serving());
            let process = serving.choose(rng).map(|live| live.process);
            let services = [Service::Redis, Service::Queue, Service::LogTable, Service::FunctionTable];
            let service = *services.choose(rng).expect("a constant");
            process.is_some() && outage(service, process, lasts)
        }
        Incident::ClockStep => {
            let (offset, of_redis) = (rng.random_range(-1_500_000..1_500_000), rng.random_bool(0.3));
            let serving = world(|world| world.processes.serving());
            match serving.choose(rng).filter(|_| !of_redis) {
                Some(live) => super::world::set_clock(live.process, offset, 0),
                None => world(|world| world.redis.offset_us = offset),
            }
            true
        }
    }
}

/// Redis comes back without its data.
fn empty_redis(world: &mut World) -> bool {
    let keys = world.redis.server.key_names(world.redis_us());
    world.truth.is_emptied_in_adoption |= keys.iter().any(|key| key.starts_with("adopted:"));
    world.redis.server.lose_everything();
    world.redis.snapshots.clear();
    world.truth.redis_emptied_at.push(true_ms());
    world.truth.redis_lost_at = Some(true_ms());
    fail_over(world)
}

/// A replica that lags takes over, or a snapshot is read: by a quarter of a second, or by more than one.
fn roll_redis_back(world: &mut World) -> bool {
    let older = world.redis.snapshots.len();
    if older == 0 {
        return false;
    }
    let at = world.rng.random_range(0..older);
    let (_, old) = world.redis.snapshots.remove(at).expect("it is one of them");
    world.redis.server.restore(old);
    world.redis.snapshots.clear();
    world.truth.is_redis_rolled_back = true;
    world.truth.redis_lost_at = Some(true_ms());
    fail_over(world)
}

/// Another server answers for Redis: connections and subscriptions break.
fn fail_over(world: &mut World) -> bool {
    world.redis.connections.clear();
    world.break_subscriptions();
    true
}

fn outage(service: Service, process: Option<ProcessNumber>, lasts: Duration) -> bool {
    world(|world| {
        let refuses = world.rng.random_bool(0.5);
        world.outages.push(Outage { service, process, refuses, until: Instant::now() + lasts });
        if service == Service::Redis && process.is_none() {
            world.break_subscriptions();
        }
        true
    })
}

/// The name of an incident that takes effect at once.
fn name(incident: Incident) -> &'static str {
    match incident {
        Incident::Crash => "crash",
        Incident::PowerLoss => "power loss",
        Incident::DiskLoss => "disk lost",
        Incident::MachineGone => "machine gone",
        Incident::Freeze => "process stopped",
        Incident::Drain => "drain",
        Incident::Upgrade => "process upgraded",
        Incident::DiskFull => "disk full",
        Incident::TornWrite => "torn write",
        Incident::FailedSync => "failed sync",
        Incident::FailedRemove => "file not removed",
        Incident::RedisOutage => "outage of Redis",
        Incident::RedisEmptied => "Redis lost its data",
        Incident::RedisRolledBack => "Redis came back with older data",
        Incident::RedisFailOver => "fail-over of Redis",
        Incident::QueueOutage => "outage of the queue",
        Incident::LogTableOutage => "outage of the log table",
        Incident::FunctionTableOutage => "outage of the function table",
        Incident::Partition => "partition",
        Incident::ClockStep => "clock step",
    }
}

/// Keeps former states of Redis, if the run may fall back to one.
pub async fn take_snapshots(end: Instant) {
    while Instant::now() < end {
        sleep(SNAPSHOT_EVERY).await;
        world(|world| {
            let now = super::world::elapsed_us();
            let snapshot = world.redis.server.snapshot();
            world.redis.snapshots.push_back((now, snapshot));
            if world.redis.snapshots.len() > SNAPSHOTS_KEPT {
                world.redis.snapshots.pop_front();
            }
        });
    }
}
