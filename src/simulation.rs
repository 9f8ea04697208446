//! A fleet simulated in virtual time, from a seed.
//!
//! A run is some machines with the product's own code (`engine`) over simulated ports: a queue, tables, Redis
//! with its Lua scripts as they are, disks, clocks, workers and clients. One thread runs all of it. Time
//! jumps from event to event, and every choice comes from the seed, so a run is repeated by its seed alone.
//! While faults happen, and after they are over, the run is checked against what really happened ([`truth`]).
//!
//! In reading order: [`world`] holds everything outside the processes; [`network`] carries calls, and loses
//! them; [`queue`], [`tables`] and [`ports`] are the services; [`process`] starts and ends processes;
//! [`workers`] and [`clients`] keep them busy; [`faults`] strikes; [`checks`] says what must hold; [`run`]
//! makes one run; [`shorten`] looks for a smaller run that fails too, and [`report`] explains it.

#![cfg(feature = "aws")]

mod checks;
mod clients;
mod faults;
mod network;
mod ports;
mod process;
mod queue;
mod report;
mod run;
mod shorten;
mod tables;
mod truth;
mod workers;
mod world;

use run::{Finished, run};
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Runs of `make test`: some seconds.
const RUNS_IN_TESTS: u64 = 20;
/// From this number of runs on, every kind of fault must have taken effect.
const RUNS_WITH_ALL_FAULTS: u64 = 10_000;

#[test]
fn a_fleet_keeps_its_promises_through_faults() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let (seed, runs) = (number("SIM_SEED").unwrap_or(1), number("SIM_RUNS").unwrap_or(RUNS_IN_TESTS));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let next = AtomicU64::new(seed);
    let bites = faults::NAMES.into_iter().map(|name| (name, 0)).collect();
    let totals = Mutex::new(Totals { bites, ..Totals::default() });
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let of = next.fetch_add(1, Ordering::Relaxed);
                    if of >= seed + runs || totals.lock().unwrap().is_failed() {
                        return;
                    }
                    let finished = run(of);
                    totals.lock().unwrap().add(of, finished);
                }
            });
        }
    });
    let totals = totals.into_inner().unwrap();
    totals.print();
    assert!(totals.failed.is_empty(), "seeds that failed: {:?}", totals.failed.keys());
    let never: Vec<_> = totals.bites.iter().filter(|(_, n)| **n == 0).map(|(fault, _)| fault).collect();
    assert!(totals.runs < RUNS_WITH_ALL_FAULTS || never.is_empty(), "faults without effect: {never:?}");
}

#[test]
fn a_seed_gives_the_same_run_to_the_byte() {
    for seed in [7, 8, 9] {
        let [one, two] = [run(seed), run(seed)];
        let mut both = one.trace.all().zip(two.trace.all()).enumerate();
        let differs = both.find(|(_, (one, two))| one != two);
        assert_eq!(differs, None, "seed {seed}");
        assert_eq!(one.trace.all().count(), two.trace.all().count(), "seed {seed}");
    }
}

/// The outcome of many runs.
#[derive(Default)]
struct Totals {
    runs: u64,
    jobs: u64,
    bites: BTreeMap<&'static str, u64>,
    failed: BTreeMap<u64, Vec<String>>,
}

impl Totals {
    /// The first failures explain themselves. More of them only cost time.
    fn is_failed(&self) -> bool {
        const FAILURES_MAX: usize = 3;
        self.failed.len() >= FAILURES_MAX
    }

    fn add(&mut self, seed: u64, finished: Finished) {
        self.runs += 1;
        self.jobs += finished.jobs;
        for (fault, n) in finished.bites {
            *self.bites.entry(fault).or_default() += n;
        }
        if !finished.violations.is_empty() {
            println!("{}", finished.report);
            self.failed.insert(seed, finished.violations);
        }
    }

    fn print(&self) {
        if let Some((seed, _)) = self.failed.first_key_value() {
            println!("first failure: seed {seed}");
        }
        println!("{} runs, {} jobs, faults that took effect:", self.runs, self.jobs);
        for (fault, n) in &self.bites {
            println!("{n:>10}  {fault}");
        }
    }
}
