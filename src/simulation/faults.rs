//! Which faults a run has, how often, and when they strike.
//!
//! Each run draws some kinds of faults and leaves the others out ("swarm testing", Groce et al. 2012): a
//! fault that is always there hides what only shows without it.

use super::process::{break_disk, crash, drain, freeze, lose_disk, lose_power, upgrade};
use super::world::{Outage, Service, trace, world};
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
    pub const ALL: [Self; 19] = [
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

    /// Incidents after which what only one process knew is lost.
    fn loses_memory(self) -> bool {
        matches!(
            self,
            Self::Crash | Self::PowerLoss | Self::DiskLoss | Self::MachineGone | Self::Drain | Self::Upgrade
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
        // Documented: a job that only Redis knew is lost when its node and the data of Redis are lost
        // together, and counters that were not acknowledged may be added twice then.
        if profile.has(Incident::RedisEmptied) {
            for incident in Incident::ALL.into_iter().filter(|incident| incident.loses_memory()) {
                profile.incidents &= !incident.bit();
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
    let Planned { incident, machine, lasts, seed, .. } = *planned;
    let rng = &mut StdRng::seed_from_u64(seed);
    trace(|| format!("incident {incident:?} of machine {machine} for {lasts:?}"));
    world(|world| world.bite(name(incident)));
    match incident {
        Incident::Crash => crash(machine, lasts),
        Incident::PowerLoss => lose_power(machine, lasts),
        Incident::DiskLoss => lose_disk(machine, lasts),
        Incident::MachineGone => {
            let others = world(|world| world.processes.machines.iter().filter(|m| !m.is_gone).count());
            if others > 1 {
                world(|world| world.processes.machines[machine].is_gone = true);
                crash(machine, lasts);
            }
        }
        Incident::Freeze => freeze(machine, lasts),
        Incident::Drain => {
            for live in world(|world| world.processes.serving()) {
                if world(|world| world.processes.all[live.process.0].machine == machine) {
                    drain(live.process, conf);
                }
            }
        }
        Incident::Upgrade => upgrade(machine, conf),
        Incident::DiskFull => break_disk(machine, DiskStep::Write, lasts),
        Incident::TornWrite => break_disk(machine, DiskStep::Truncate, lasts),
        Incident::FailedSync => break_disk(machine, DiskStep::Sync, lasts),
        Incident::RedisOutage => outage(Service::Redis, None, lasts),
        Incident::RedisEmptied => world(|world| {
            let keys = world.redis.server.key_names(world.redis_us());
            world.truth.is_emptied_in_adoption |= keys.iter().any(|key| key.starts_with("adopted:"));
            world.redis.server.lose_everything();
            world.redis.snapshots.clear();
            world.truth.is_redis_emptied = true;
            fail_over(world);
        }),
        Incident::RedisRolledBack => world(|world| {
            if let Some((_, old)) = world.redis.snapshots.pop_front() {
                world.redis.server.restore(old);
                world.redis.snapshots.clear();
                world.truth.is_redis_rolled_back = true;
            }
            fail_over(world);
        }),
        Incident::RedisFailOver => world(fail_over),
        Incident::QueueOutage => outage(Service::Queue, None, lasts),
        Incident::LogTableOutage => outage(Service::LogTable, None, lasts),
        Incident::FunctionTableOutage => outage(Service::FunctionTable, None, lasts),
        Incident::Partition => {
            let serving = world(|world| world.processes.serving());
            let process = serving.choose(rng).map(|live| live.process);
            let services = [Service::Redis, Service::Queue, Service::LogTable, Service::FunctionTable];
            let service = *services.choose(rng).expect("a constant");
            if process.is_some() {
                outage(service, process, lasts);
            }
        }
        Incident::ClockStep => {
            let processes = world(|world| world.processes.all.len().max(1));
            let process = ProcessNumber(rng.random_range(0..processes));
            let (offset, of_redis) = (rng.random_range(-1_500_000..1_500_000), rng.random_bool(0.3));
            if of_redis {
                world(|world| world.redis.offset_us = offset);
            } else {
                super::world::set_clock(process, offset, 0);
            }
        }
    }
}

/// Another server answers for Redis: connections and subscriptions break.
fn fail_over(world: &mut super::world::World) {
    world.redis.connections.clear();
    world.break_subscriptions();
}

fn outage(service: Service, process: Option<ProcessNumber>, lasts: Duration) {
    world(|world| {
        let refuses = world.rng.random_bool(0.5);
        world.outages.push(Outage { service, process, refuses, until: Instant::now() + lasts });
        if service == Service::Redis && process.is_none() {
            world.break_subscriptions();
        }
    });
}

fn name(incident: Incident) -> &'static str {
    match incident {
        Incident::Crash => "crash",
        Incident::PowerLoss => "power loss",
        Incident::DiskLoss => "disk lost",
        Incident::MachineGone => "machine gone",
        Incident::Freeze => "freeze",
        Incident::Drain => "drain",
        Incident::Upgrade => "upgrade",
        Incident::DiskFull => "full disk",
        Incident::TornWrite => "tearing disk",
        Incident::FailedSync => "disk that does not sync",
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
