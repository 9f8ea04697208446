//! Searches for a shorter run that fails as a run of a seed did: with fewer incidents, kinds of faults,
//! machines and requests. Each step leaves something out, and keeps the shorter plan if it fails too.

use super::faults::{Plan, Profile};
use super::run::{Finished, make};
use std::time::Duration;

/// The most runs of a search: some seconds.
const RUNS_MAX: usize = 120;

/// Returns the report of the shortest run found.
pub fn shorten(seed: u64, plan: Plan, failed: &Finished) -> String {
    let mut search = Search { seed, plan, report: failed.report.clone(), runs: 0 };
    // Halves first, then one by one, as "delta debugging" does (Zeller and Hildebrandt, 2002).
    let mut len = search.plan.incidents.len().div_ceil(2);
    while len > 0 {
        let mut at = 0;
        while at < search.plan.incidents.len() {
            let mut shorter = search.plan.clone();
            shorter.incidents.drain(at..(at + len).min(shorter.incidents.len()));
            if !search.fails(shorter) {
                at += len;
            }
        }
        len = if len == 1 { 0 } else { len.div_ceil(2) };
    }
    for without in FAULTS {
        let mut shorter = search.plan.clone();
        without(&mut shorter.profile);
        search.fails(shorter);
    }
    // Requests after the last incident that is needed.
    while search.plan.profile.requests > 1 {
        let mut shorter = search.plan.clone();
        let profile = &mut shorter.profile;
        let (requests, seconds) = (profile.requests / 2, (profile.seconds / 2).max(1));
        // The same pauses between requests.
        (profile.requests, profile.seconds) = (requests, seconds);
        let end = Duration::from_secs(seconds);
        shorter.incidents.retain(|planned| planned.at < end);
        if !search.fails(shorter) {
            break;
        }
    }
    search.report
}

/// Each leaves one kind of fault out.
const FAULTS: [fn(&mut Profile); 13] = [
    |profile| profile.refused_calls = 0.0,
    |profile| profile.lost_requests = 0.0,
    |profile| profile.lost_answers = 0.0,
    |profile| profile.repeated_calls = 0.0,
    |profile| profile.slow_calls = 0.0,
    |profile| profile.partial_batches = 0.0,
    |profile| profile.lost_publications = 0.0,
    |profile| profile.slow_workers = 0.0,
    |profile| profile.dead_workers = 0.0,
    |profile| profile.broken_results = 0.0,
    |profile| profile.differing_results = false,
    |profile| profile.clocks = 0.0,
    |profile| profile.tight = 0.0,
];

struct Search {
    seed: u64,
    /// The shortest that fails.
    plan: Plan,
    report: String,
    runs: usize,
}

impl Search {
    /// Keeps a plan if its run fails.
    fn fails(&mut self, plan: Plan) -> bool {
        if self.runs == RUNS_MAX {
            return false;
        }
        self.runs += 1;
        let finished = make(self.seed, &plan);
        let fails = !finished.violations.is_empty();
        if fails {
            (self.plan, self.report) = (plan, finished.report);
        }
        fails
    }
}
