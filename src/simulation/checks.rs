//! What must hold. Some of it is checked while a run goes on (see `clients`), the rest here, when the faults
//! are over and everything has come to rest.

use super::process::LiveNode;
use super::run::{EXACT_BURST, EXACT_RATE, JOB_DEADLINE_S};
use super::tables::Tables;
use super::truth::{Produced, RequestKind};
use super::world::{World, world};
use crate::audit::WRITES_MAX;
use crate::backend::aws::simulation::Reply;
use crate::backend::{BATCH_JOBS_MAX, ROWS_MAX};
use crate::model::{Execution, FunctionId, JobId, NodeId, RowKey, Sums};
use std::collections::{BTreeMap, BTreeSet};

/// How long after its acceptance a job ends as LOST.
const JOB_DEADLINE_MS: u64 = JOB_DEADLINE_S * 1000;
/// How far the clocks of a node and of the world may be apart, with the time of one look-up.
const CLOCKS_DIFFER_MS: u64 = 6_000;
/// How long before a loss of data a job may have been sent again that two nodes still have, and how long
/// after it, that the journal does not have yet.
const RESENT_BEFORE_MS: u64 = JOB_DEADLINE_MS + 20_000;
const RESENT_AFTER_MS: u64 = 30_000;

/// What keeps a run from being at rest; empty if it is.
pub fn unrest() -> Vec<String> {
    world(|world| {
        let mut unrest = Vec::new();
        let mut is_not = |what: String, is_at_rest: bool| {
            if !is_at_rest {
                unrest.push(what);
            }
        };
        is_not(format!("{} messages", world.queue.messages.len()), world.queue.messages.is_empty());
        is_not(format!("{} dead letters", world.queue.dead.len()), world.queue.dead.is_empty());
        for process in world.processes.alive() {
            let Some(live) = &process.live else {
                is_not("a process that starts".into(), false);
                continue;
            };
            let of = |what: &str| format!("p{}: {what}", live.process.0);
            let metrics = &live.metrics;
            let jobs = live.engine.dispatcher.shown_jobs();
            is_not(of(&format!("jobs in flight: {jobs:?}")), metrics.jobs.in_flight.get() == 0);
            is_not(of("rows"), metrics.audit.waiting_rows.get() == 0);
            is_not(of("ended jobs"), metrics.audit.waiting_ends.get() == 0);
            is_not(of("functions"), metrics.audit.waiting_functions.get() == 0);
            is_not(of("jobs to be sent"), metrics.queue_waiting.get() == 0);
            is_not(of("rows on disk"), live.disk.as_ref().is_none_or(|disk| disk.is_empty()));
            is_not(of("waiters"), metrics.waiters.get() == 0);
        }
        // Documented: a Redis with older data looks intact, so nobody restores or clears it.
        let is_rolled_back = world.truth.is_redis_rolled_back;
        let now = world.redis_us();
        for key in world.redis.server.key_names(now).into_iter().filter(|_| !is_rolled_back) {
            let is_pending = |part: &str| key.starts_with(part);
            if ["inflight:", "unposted:", "posting:{"].into_iter().any(is_pending) {
                let contents = world.redis.server.run(now, &vec![b"HGETALL".to_vec(), key.clone().into()]);
                let fields = texts(contents);
                let is_posted = key.starts_with("posting:{") && world.tables.have_posted(&key, &fields);
                is_not(format!("{key} {}", fields.join(" ")), is_posted);
            }
        }
        unrest
    })
}

fn texts(reply: Reply) -> Vec<String> {
    let Reply::Array(items) = reply else { panic!("HGETALL answers {reply:?}") };
    let text = |item| match item {
        Reply::Bulk(text) => String::from_utf8_lossy(&text).into_owned(),
        other => panic!("a field is {other:?}"),
    };
    items.into_iter().map(text).collect()
}

impl Tables {
    /// Whether the functions have all sums that stay in `posting:{node}`. Their removal may have failed; they
    /// are removed with the next sums of their function.
    fn have_posted(&self, key: &str, fields: &[String]) -> bool {
        let node = key.trim_start_matches("posting:{").trim_end_matches('}');
        let node = NodeId::parse(node).expect("the key names a node");
        fields.chunks_exact(2).all(|field| {
            let function = FunctionId::parse(&field[0]).and_then(|id| self.functions.get(&id));
            let number = field[1].split(':').next().and_then(|number| number.parse::<u64>().ok());
            let last = function.and_then(|function| function.posted.get(&node));
            last.zip(number).is_some_and(|(last, number)| *last >= number)
        })
    }
}

/// Checks a run that is at rest.
pub fn check() {
    world(|world| {
        let mut violations = Vec::new();
        rows(world, &mut violations);
        lives(world, &mut violations);
        counters(world, &mut violations);
        requests(world, &mut violations);
        processes(world, &mut violations);
        windows(world, &mut violations);
        world.truth.violations.append(&mut violations);
    });
}

/// Each job that was ever on the queue, and each that a client was given, has one truthful row.
fn rows(world: &mut World, violations: &mut Vec<String>) {
    let truth = &world.truth;
    let mut by_id: BTreeMap<JobId, &Execution> = BTreeMap::new();
    for row in world.tables.executions.values() {
        let id = JobId::parse(&row.id.request_id()).expect("every row is that of a job");
        if by_id.insert(id, row).is_some() {
            violations.push(format!("job {id} has two rows"));
        }
    }
    let live: BTreeSet<NodeId> = world.processes.alive().filter_map(|process| process.node).collect();
    let lost_jobs_allowed = truth.is_redis_rolled_back;
    for (id, number) in truth.accepted.iter().chain(&truth.on_queue) {
        let request = &truth.requests[*number as usize];
        let Some(row) = by_id.get(id) else {
            if !lost_jobs_allowed {
                violations.push(format!("job {id} of request {number} has no row"));
            }
            continue;
        };
        if row.function != request.function || row.id.key() != RowKey::of(*id).as_str() {
            violations.push(format!("the row of {id} is not that of its function"));
        }
        if row.is_lost() {
            // Documented: the node that ended a job as LOST looks for its late result, or the node of the job
            // does. But a result that was stored before the deadline is found in any case.
            let has_node = live.contains(&id.node());
            let on_time = id.accepted_at() + JOB_DEADLINE_MS - CLOCKS_DIFFER_MS;
            // What Redis has lost is found by nobody, and it may have forgotten which jobs are LOST.
            let is_kept = truth.redis_lost_at.is_none_or(|at| id.accepted_at() > at + CLOCKS_DIFFER_MS);
            let must_be_found = |produced: &&Produced| {
                let is_found_late = has_node && truth.redis_lost_at.is_none();
                produced.is_stored && is_kept && (is_found_late || produced.at < on_time)
            };
            if let Some(produced) = truth.results.get(id).into_iter().flatten().find(must_be_found) {
                violations.push(format!(
                    "job {id} of request {number} is LOST, and its result was stored at {}",
                    produced.at
                ));
            }
        } else if !truth.explains(*id, row) {
            violations.push(format!("the row of {id} shows {} that nobody reported", row.status));
        }
    }
    for (id, row) in by_id.iter().filter(|(id, _)| !truth.on_queue.contains_key(id)) {
        if !row.is_lost() {
            violations.push(format!("job {id} was never on the queue and has the row {}", row.status));
        }
        let request = truth.attempted.get(id).map(|number| (*number, &truth.requests[*number as usize]));
        if let Some((number, request)) = request
            && request.is_denied
            // Its process ended, or its node was adopted, before the job had left the journal. The process
            // that ended the job did not know that it was denied.
            && !row.message.starts_with("unconfirmed")
        {
            violations.push(format!("request {number} was denied, and its job {id} has a row"));
        }
    }
}

/// The life in each row is in order, and complete where one process knows all of it. The steps are counted by
/// a monotonic clock, so this holds although the clocks of nodes drift and step. The times of workers are by
/// other clocks.
fn lives(world: &World, violations: &mut Vec<String>) {
    let truth = &world.truth;
    for row in world.tables.executions.values() {
        let id = JobId::parse(&row.id.request_id()).expect("every row is that of a job");
        let life = &row.life;
        let steps = [Some(id.accepted_at()), life.sent_at, life.confirmed_at];
        if !steps.iter().flatten().is_sorted() {
            violations.push(format!("the steps of {id} are not in order: {steps:?}"));
        }
        let ended = [row.completed_at, life.written_at];
        if ended.contains(&None) || ended[0] > ended[1] {
            violations
                .push(format!("the row of {id} was written at {:?}, heard at {:?}", ended[1], ended[0]));
        }
        // A job with a key may be sent again by a process that does not know its first send.
        let request = truth.attempted.get(&id).map(|number| &truth.requests[*number as usize]);
        let has_one_process =
            life.config_version.is_some() && request.is_some_and(|request| request.key.is_none());
        if has_one_process && !row.is_lost() && life.sent_at.is_none() {
            violations.push(format!("the row of {id} does not tell when it was sent"));
        }
        if life.ended_by == Some(id.node()) {
            violations.push(format!("the row of {id} names its own node as the adopter"));
        }
    }
}

/// The counters of each function are the sums of its rows.
fn counters(world: &mut World, violations: &mut Vec<String>) {
    if world.truth.is_redis_rolled_back {
        return;
    }
    let mut expected: BTreeMap<&FunctionId, Sums> = BTreeMap::new();
    for row in world.tables.executions.values() {
        *expected.entry(&row.function).or_default() += Sums::of(row);
    }
    let truth = &world.truth;
    // Documented: if Redis loses its data, a job that two nodes have may be counted twice or never, because
    // another one has sent it again, and Redis has forgotten which of them has ended it. The same holds for
    // what an adopter has just ended.
    let is_excepted = |id: &FunctionId| {
        let function =
            |job| truth.attempted.get(job).map(|number| &truth.requests[*number as usize].function);
        truth.is_emptied_in_adoption
            || truth.redis_emptied_at.iter().any(|emptied| {
                let around = emptied.saturating_sub(RESENT_BEFORE_MS)..emptied + RESENT_AFTER_MS;
                truth.resent.iter().any(|(job, at)| around.contains(at) && function(job) == Some(id))
            })
    };
    for (id, stored) in world.tables.functions.iter().filter(|(id, _)| !is_excepted(id)) {
        let expected = expected.get(id).copied().unwrap_or_default();
        if stored.sums != expected {
            violations.push(format!("function {id} counts {:?}, its rows are {expected:?}", stored.sums));
        }
    }
}

/// One job for each key, and none for a request that was told so.
fn requests(world: &mut World, violations: &mut Vec<String>) {
    let mut jobs: BTreeMap<u64, BTreeSet<JobId>> = BTreeMap::new();
    for (id, number) in &world.truth.on_queue {
        jobs.entry(*number).or_default().insert(*id);
    }
    for (number, request) in world.truth.requests.iter().enumerate() {
        let of = jobs.remove(&(number as u64)).unwrap_or_default();
        if request.key.is_some() && (of.len() > 1 || request.ids.len() > 1) {
            violations.push(format!("request {number} with a key has the jobs {of:?} and {:?}", request.ids));
        }
        if request.is_denied && !of.is_empty() {
            violations.push(format!("request {number} was denied, and {of:?} is on the queue"));
        }
        if request.kind == RequestKind::RefusedByQueue && !of.is_empty() {
            violations.push(format!("request {number} is on a queue that refuses it"));
        }
    }
}

/// What a process holds is within its bounds. Checked after each answer.
pub fn bounds(live: &LiveNode) {
    let conf = &live.conf;
    let in_call = (conf.batch.sends_max * BATCH_JOBS_MAX) as i64;
    let in_write = ((WRITES_MAX + 1) * ROWS_MAX) as i64;
    let spill_max = usize::try_from(conf.audit.spill_bytes_max).unwrap_or(usize::MAX);
    let of = |what, value: i64, max: usize, beyond: i64| (what, value, max as i64 + beyond);
    let all = [
        // The jobs of its predecessor may come on top.
        of(
            "jobs in flight",
            live.metrics.jobs.in_flight.get(),
            conf.memory.jobs_in_flight_max,
            live.restored,
        ),
        of("jobs to be sent", live.metrics.queue_waiting.get(), conf.batch.queue_jobs_max, in_call),
        of("bytes on the disk", live.metrics.audit.spill.bytes.get(), spill_max, 0),
        of("rows", live.metrics.audit.waiting_rows.get(), conf.memory.audit_rows_max, in_write),
    ];
    for (what, value, max) in all.into_iter().filter(|(_, value, max)| value > max) {
        let process = live.process.0;
        world(|world| world.truth.violated(format!("p{process} has {value} {what}, more than {max}")));
    }
}

/// No window of time had more requests than the exact limit allows.
fn windows(world: &mut World, violations: &mut Vec<String>) {
    let has_bitten = |fault| world.bites.contains_key(fault);
    // Documented: a Redis without its data, or with another time, grants anew. A stopped process uses grants
    // late.
    let is_excepted =
        ["Redis lost its data", "Redis came back with older data", "clock step", "process stopped"]
            .into_iter()
            .any(has_bitten);
    if !world.profile.is_exact || is_excepted {
        return;
    }
    // From the grant until the answer arrives, and for the drift of the clock of Redis.
    let late_us = if world.profile.slow_calls > 0.0 { 3_100_000 } else { 100_000 };
    let passed = &mut world.truth.passed;
    passed.sort_unstable();
    for (n, first) in passed.iter().enumerate() {
        for (requests, last) in (1..).zip(&passed[n..]) {
            let allowed =
                f64::from(EXACT_BURST) + f64::from(EXACT_RATE) * (last - first + late_us) as f64 / 59e6;
            if f64::from(requests) > allowed + 1.0 {
                let us = last - first;
                violations.push(format!("{requests} requests passed within {us} µs, {allowed:.1} may"));
                return;
            }
        }
    }
}

/// The books of each process agree.
fn processes(world: &mut World, violations: &mut Vec<String>) {
    for live in world.processes.serving() {
        let unaccounted = live.metrics.jobs.unaccounted.get();
        if unaccounted != 0 {
            violations.push(format!("p{} has {unaccounted} unaccounted jobs", live.process.0));
        }
    }
}
