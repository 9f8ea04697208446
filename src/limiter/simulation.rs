//! A simulated fleet in virtual time. It runs the production lease of each node and the production script of
//! the shared store, over a network that loses, repeats, delays and reorders messages.
//!
//! The tests verify for every window of admissions: admitted ≤ burst + rate × window. There is no tolerance,
//! because all amounts are whole microseconds and steps. A token from a lease is admitted when the node
//! spends it. A token that is spent at once is admitted when the store takes it. The delay of that answer is
//! network time, like the delay between the client and the node, and the limiter does not control it.

use super::lease::{
    AfterAnswer, CallAmounts, IDLE, LeaseThresholds, Micros, RejectionPacing, Spend, TTL, TokenLease, Verdict,
};
use crate::backend::{Grant, LeaseCall};
use crate::model::Quota;
use mlua::{Function, Lua, Table, Value, Variadic};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap};
use std::rc::Rc;
use std::time::Duration;

const SCRIPT: &str = include_str!("../backend/aws/redis/leases.lua");
/// A call without an answer for this long counts as failed.
const DEADLINE: Micros = 1_000_000;
/// The store's clock when the simulation begins: Unix time, in 2026.
const EPOCH: Micros = 1_795_000_000_000_000;
const SECOND: Micros = 1_000_000;

/// The part of Redis that the script uses.
#[derive(Default)]
struct Hash {
    fields: BTreeMap<String, String>,
    expires: Micros,
    now: Micros,
}

impl Hash {
    fn call(&mut self, words: &[String]) -> Vec<String> {
        match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
            ["HGETALL", _] => {
                return self.fields.iter().flat_map(|(k, v)| [k.clone(), v.clone()]).collect();
            }
            ["HSET", _, pairs @ ..] => {
                for pair in pairs.chunks_exact(2) {
                    self.fields.insert(pair[0].into(), pair[1].into());
                }
            }
            ["HDEL", _, gone @ ..] => self.fields.retain(|field, _| !gone.contains(&field.as_str())),
            ["PEXPIRE", _, ms] => self.expires = self.now + ms.parse::<Micros>().unwrap() * 1000,
            other => panic!("the script calls {other:?}"),
        }
        Vec::new()
    }
}

/// The shared store: the script and one bucket.
struct Shared {
    lua: Lua,
    script: Function,
    hash: Rc<RefCell<Hash>>,
}

impl Shared {
    fn new(script: &str) -> Self {
        let (lua, hash) = (Lua::new(), Rc::new(RefCell::new(Hash::default())));
        let redis = lua.create_table().unwrap();
        let state = Rc::clone(&hash);
        let call = lua.create_function(move |_, words: Variadic<String>| Ok(state.borrow_mut().call(&words)));
        redis.set("call", call.unwrap()).unwrap();
        lua.globals().set("redis", redis).unwrap();
        let script = lua.load(script).into_function().unwrap();
        Self { lua, script, hash }
    }

    fn run(&self, now: Micros, call: &LeaseCall) -> Grant {
        {
            let mut hash = self.hash.borrow_mut();
            hash.now = now;
            if now >= hash.expires {
                hash.fields.clear();
            }
        }
        let (rate, cost) = call.quota.drain();
        let numbers = [
            call.seq,
            call.held.into(),
            call.back.into(),
            call.need.into(),
            call.want.into(),
            rate,
            cost,
            call.quota.burst.into(),
            TTL,
            now,
        ];
        let words: Vec<String> = std::iter::once(format!("{:016x}", call.holder))
            .chain(numbers.iter().map(u64::to_string))
            .collect();
        self.lua.globals().set("KEYS", vec!["bucket"]).unwrap();
        self.lua.globals().set("ARGV", words).unwrap();
        let answer: Table = self.script.call(()).unwrap();
        // Redis truncates fractions, so the script must return none.
        let number = |i: i64| match answer.get::<Value>(i).unwrap() {
            Value::Integer(n) => u64::try_from(n).unwrap(),
            Value::Number(n) if n >= 0.0 && n.fract() == 0.0 => n as u64,
            other => panic!("{i} is {other:?}"),
        };
        let tokens = |i| u32::try_from(number(i)).unwrap();
        Grant {
            applied: number(1) == 1,
            amount: tokens(2),
            taken: tokens(3),
            left: tokens(4),
            retry_after: Duration::from_micros(number(5)),
            nodes: tokens(6),
        }
    }
}

struct Node {
    lease: TokenLease<Micros>,
    holder: u64,
    seq: u64,
    /// The drift of its clock, in millionths.
    ppm: i64,
    /// The offset of its clock from true time.
    offset: Micros,
    /// The current number of requests per second.
    demand: u64,
    /// All messages from and to it are lost.
    is_cut_off: bool,
}

/// Probabilities of faults, in thousandths.
#[derive(Clone, Copy, Debug, Default)]
struct Faults {
    lost_call: u32,
    lost_answer: u32,
    repeated: u32,
    late: u32,
    client_gone: u32,
    crash: u32,
    cut_off: u32,
    /// The store's clock steps back.
    step_back: u32,
    /// An idle lease is not returned.
    forgotten: u32,
    /// A node requests more tokens than it expects to use. The store must bound the grant.
    greedy: u32,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// `once`: does not schedule another request.
    Request {
        node: usize,
        once: bool,
    },
    Exec {
        node: usize,
        call: usize,
        is_answered: bool,
    },
    Answer {
        node: usize,
        call: usize,
        executed: Micros,
        grant: usize,
    },
    Timeout {
        node: usize,
        call: usize,
    },
    Refund {
        node: usize,
        holder: u64,
        seq: u64,
    },
    Watch {
        node: usize,
        holder: u64,
        seq: u64,
    },
    /// Changes demand, and injects faults of nodes and of the store's clock.
    Turn,
}

struct World {
    rng: StdRng,
    now: Micros,
    back: Micros,
    order: u64,
    events: BinaryHeap<Reverse<(Micros, u64, Event)>>,
    nodes: Vec<Node>,
    shared: Shared,
    quota: Quota,
    pace: RejectionPacing,
    faults: Faults,
    demand_max: u64,
    is_quiet: bool,
    calls: Vec<LeaseCall>,
    grants: Vec<Grant>,
    /// The time at which a call first took effect, by holder and number.
    took_effect: HashMap<(u64, u64), Micros>,
    requests: usize,
    admitted: Vec<Micros>,
    refused: Vec<Micros>,
}

impl World {
    fn new(seed: u64, nodes: usize, quota: Quota, demand_max: u64, faults: Faults, script: &str) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let node = |rng: &mut StdRng| Node {
            lease: TokenLease::default(),
            holder: rng.random(),
            seq: 0,
            ppm: rng.random_range(-4900..=4900),
            offset: rng.random_range(0..SECOND * 1000),
            demand: demand_max,
            is_cut_off: false,
        };
        let nodes = (0..nodes).map(|_| node(&mut rng)).collect();
        let mut world = Self {
            rng,
            now: SECOND,
            back: 0,
            order: 0,
            events: BinaryHeap::new(),
            nodes,
            shared: Shared::new(script),
            quota,
            pace: RejectionPacing::of(&quota),
            faults,
            demand_max,
            is_quiet: false,
            calls: Vec::new(),
            grants: Vec::new(),
            took_effect: HashMap::new(),
            requests: 0,
            admitted: Vec::new(),
            refused: Vec::new(),
        };
        for node in 0..world.nodes.len() {
            let after = world.rng.random_range(0..100_000);
            world.at(after, Event::Request { node, once: false });
        }
        world
    }

    fn at(&mut self, after: Micros, event: Event) {
        self.order += 1;
        self.events.push(Reverse((self.now + after, self.order, event)));
    }

    fn chance(&mut self, thousandths: u32) -> bool {
        self.rng.random_ratio(thousandths, 1000)
    }

    /// The delay of a message.
    fn delay(&mut self) -> Micros {
        let late = self.faults.late;
        if self.chance(late) {
            self.rng.random_range(0..2 * SECOND)
        } else {
            self.rng.random_range(100..1500)
        }
    }

    fn clock(&self, node: usize) -> Micros {
        let Node { ppm, offset, .. } = self.nodes[node];
        let drift = i128::from(self.now) * i128::from(ppm) / 1_000_000;
        offset + u64::try_from(i128::from(self.now) + drift).unwrap()
    }

    fn run(&mut self, seconds: u64) -> &mut Self {
        let end = self.now + seconds * SECOND;
        while let Some(Reverse((at, _, event))) = self.events.pop() {
            self.now = at;
            if at >= end {
                break;
            }
            self.step(event);
        }
        self.admitted.sort_unstable();
        self
    }

    fn step(&mut self, event: Event) {
        match event {
            Event::Request { node, once } => {
                if once || !self.is_quiet {
                    self.request(node);
                }
                if once {
                    return;
                }
                let gap = 2 * SECOND / self.nodes[node].demand.max(1);
                let gap = self.rng.random_range(0..=gap);
                self.at(gap, Event::Request { node, once: false });
            }
            Event::Exec { node, call, is_answered } => self.execute(node, call, is_answered),
            Event::Answer { node, call, executed, grant } => {
                if self.is_under_way(node, call) {
                    let grant = self.grants[grant];
                    self.settle(node, Some(grant), executed);
                }
            }
            Event::Timeout { node, call } => {
                if self.is_under_way(node, call) {
                    self.settle(node, None, 0);
                }
            }
            Event::Watch { node, holder, seq } => {
                let forgotten = self.faults.forgotten;
                if self.chance(forgotten) {
                    return;
                }
                if self.nodes[node].holder == holder
                    && self.nodes[node].lease.is_idle_since(seq, LeaseThresholds::of(&self.quota))
                {
                    self.send(node);
                }
            }
            Event::Refund { node, holder, seq } => {
                let clock = self.clock(node);
                if self.nodes[node].holder == holder {
                    self.nodes[node].lease.refund(seq, clock);
                }
            }
            Event::Turn => self.turn(),
        }
    }

    /// Alternates between varied demand and silence, in which leases age. After a silence all remaining
    /// tokens are requested at once, which reveals tokens that were granted in excess.
    fn turn(&mut self) {
        let will_be_quiet = !self.is_quiet;
        let after = match will_be_quiet {
            true if self.rng.random() => self.rng.random_range(SECOND * 8 / 10..SECOND),
            true => self.rng.random_range(SECOND / 4..SECOND),
            false => self.rng.random_range(SECOND / 10..SECOND),
        };
        if self.is_quiet {
            let requests = 2 * self.quota.burst as usize / self.nodes.len() + 1;
            let spread_max = if self.rng.random() { 5_000 } else { 60_000 };
            for node in 0..self.nodes.len() {
                let spread = self.rng.random_range(0..spread_max);
                (0..requests).for_each(|_| self.at(spread, Event::Request { node, once: true }));
            }
        }
        self.is_quiet = will_be_quiet;
        self.at(after, Event::Turn);
        for node in 0..self.nodes.len() {
            let demand_max = self.demand_max;
            self.nodes[node].demand =
                [1, demand_max / 4, demand_max, demand_max][self.rng.random_range(0..4)].clamp(1, demand_max);
            let Faults { crash, cut_off, .. } = self.faults;
            self.nodes[node].is_cut_off = self.chance(cut_off);
            if self.chance(crash) {
                // Its state and its waiters are lost; its calls are still in flight.
                self.nodes[node].lease = TokenLease::default();
                self.nodes[node].holder = self.rng.random();
                self.nodes[node].seq = 0;
            }
        }
        let step_back = self.faults.step_back;
        if self.chance(step_back) {
            self.back += self.rng.random_range(0..3 * SECOND);
        }
    }

    fn request(&mut self, node: usize) {
        self.requests += 1;
        let (now, clock) = (self.now, self.clock(node));
        let lease = &mut self.nodes[node].lease;
        match lease.spend(clock) {
            Spend::Allowed { call, seq, .. } => {
                // Sometimes another limit rejects the request.
                if self.rng.random_ratio(self.faults.client_gone, 1000) {
                    let (after, holder) = (self.rng.random_range(0..5000), self.nodes[node].holder);
                    self.at(after, Event::Refund { node, holder, seq });
                } else {
                    self.admitted.push(now);
                }
                if call {
                    self.send(node);
                }
            }
            Spend::Refused { .. } => self.refused.push(now),
            Spend::Empty => {
                if lease.wait(now) == Ok(true) {
                    self.send(node);
                }
            }
        }
    }

    fn send(&mut self, node: usize) {
        let (clock, quota) = (self.clock(node), self.quota);
        let it = &mut self.nodes[node];
        it.seq += 1;
        let Some(ask) = it.lease.begin(clock, it.seq, LeaseThresholds::of(&quota)) else { return };
        let CallAmounts { seq, held, back, need, mut want } = ask;
        if self.rng.random_ratio(self.faults.greedy, 1000) {
            want += quota.burst;
        }
        let (bucket, ttl, holder) = (String::new(), Duration::from_micros(TTL), it.holder);
        self.calls.push(LeaseCall { bucket, quota, holder, seq, held, back, need, want, ttl });
        let call = self.calls.len() - 1;
        let Faults { lost_call, lost_answer, repeated, .. } = self.faults;
        self.at(DEADLINE, Event::Timeout { node, call });
        let is_lost = self.nodes[node].is_cut_off;
        if !is_lost && !self.chance(lost_call) {
            let (delay, is_answered) = (self.delay(), !self.chance(lost_answer));
            self.at(delay, Event::Exec { node, call, is_answered });
        }
        if !is_lost && self.chance(repeated) {
            let (delay, is_answered) = (self.delay(), self.rng.random());
            self.at(delay, Event::Exec { node, call, is_answered });
        }
    }

    fn execute(&mut self, node: usize, call: usize, is_answered: bool) {
        let sent = &self.calls[call];
        let grant = self.shared.run(EPOCH + self.now - self.back, sent);
        let is_granted = grant.applied && grant.amount + grant.taken > 0;
        let number = (sent.holder, sent.seq);
        let executed =
            if is_granted { *self.took_effect.entry(number).or_insert(self.now) } else { self.now };
        self.grants.push(grant);
        if is_answered && !self.nodes[node].is_cut_off {
            let (delay, grant) = (self.delay(), self.grants.len() - 1);
            self.at(delay, Event::Answer { node, call, executed, grant });
        }
    }

    fn is_under_way(&self, node: usize, call: usize) -> bool {
        let (node, call) = (&self.nodes[node], &self.calls[call]);
        node.holder == call.holder && node.lease.seq() == call.seq && node.lease.is_call_under_way()
    }

    fn settle(&mut self, node: usize, grant: Option<Grant>, executed: Micros) {
        let (clock, now, gone) = (self.clock(node), self.now, self.faults.client_gone);
        let mut taken = grant.map_or(0, |grant| grant.taken);
        let Self { rng, admitted, refused, nodes, pace, .. } = self;
        let lease = &mut nodes[node].lease;
        let next = lease.settle(clock, grant.as_ref(), pace, |_, verdict| {
            if rng.random_ratio(gone, 1000) {
                return false;
            }
            match verdict {
                Verdict::Allowed { .. } if taken > 0 => {
                    taken -= 1;
                    admitted.push(executed);
                }
                Verdict::Allowed { .. } => admitted.push(now),
                Verdict::Refused { .. } => refused.push(now),
                Verdict::Away => {}
            }
            true
        });
        let (seq, holder) = (lease.seq(), nodes[node].holder);
        match next {
            AfterAnswer::Call => self.send(node),
            AfterAnswer::Watch => {
                let tick = self.rng.random_range(0..100_000);
                self.at(IDLE + tick, Event::Watch { node, holder, seq });
            }
            AfterAnswer::Rest => {}
        }
    }

    /// Checks every window of the admissions. Returns the time of the first excess as `Err`.
    ///
    /// One bucket with this rate and burst receives all admissions. All windows satisfy burst + rate × window
    /// if and only if it never overflows.
    fn windows(&self) -> Result<(), Micros> {
        let (rate, cost) = self.quota.drain();
        let (mut level, mut last) = (0_u64, 0);
        for at in &self.admitted {
            level = level.saturating_sub((at - last) * rate) + cost;
            if level > cost * u64::from(self.quota.burst) {
                return Err(*at);
            }
            last = *at;
        }
        Ok(())
    }
}

/// A fleet with random faults of all kinds.
fn stormy(seed: u64, script: &str) -> World {
    let mut rng = StdRng::seed_from_u64(!seed);
    let burst = match rng.random_range(0..8) {
        0 => rng.random_range(1..=5),
        1..=4 => rng.random_range(5..=50),
        _ => rng.random_range(50..=400),
    };
    // An empty bucket fills in 50 ms to 5 s. The more it gains during a lease, the more faults show.
    let fill_s = 10_f64.powf(rng.random_range(-1.3..0.7));
    let period_s = rng.random_range(1..=10);
    let rate = ((f64::from(burst) / fill_s * period_s as f64) as u32).max(1);
    let quota = Quota { rate, period: Duration::from_secs(period_s), burst };
    let some = |rng: &mut StdRng, max: u32| if rng.random() { rng.random_range(0..=max) } else { 0 };
    let faults = Faults {
        lost_call: some(&mut rng, 200),
        lost_answer: some(&mut rng, 200),
        repeated: some(&mut rng, 300),
        late: some(&mut rng, 300),
        client_gone: some(&mut rng, 100),
        crash: some(&mut rng, 100),
        cut_off: some(&mut rng, 400),
        step_back: some(&mut rng, 10),
        greedy: some(&mut rng, 1000),
        forgotten: if rng.random() { 1000 } else { 0 },
    };
    let nodes = rng.random_range(1..=6);
    // The total demand ranges from below the limit, where many tokens can be leased, to above it.
    let rate_s = f64::from(burst) / fill_s;
    let demand_max = (rate_s / nodes as f64 * rng.random_range(0.1..2.0)) as u64 + 5;
    let demand_max = demand_max.min(1000);
    let mut world = World::new(seed, nodes, quota, demand_max, faults, script);
    world.at(0, Event::Turn);
    world
}

const FLEETS: u64 = 400;

/// The seed of the first fleet, among `fleets` seeds from `from`, that exceeds its limit.
fn exceeding(from: u64, fleets: u64, script: &str) -> Option<u64> {
    (from..from + fleets).find(|seed| stormy(*seed, script).run(12).windows().is_err())
}

#[test]
fn no_window_exceeds_the_limit() {
    assert_eq!(exceeding(0, FLEETS, SCRIPT), None, "the seed");
}

fn quota(rate: u32, burst: u32) -> Quota {
    Quota { rate, period: Duration::from_secs(1), burst }
}

/// Without faults the fleet admits at least 90 % of what the limit allows.
#[test]
fn a_busy_fleet_uses_its_limit() {
    const SECONDS: u64 = 30;
    for (nodes, rate, burst) in [
        (1, 50, 3000),
        (4, 50, 3000),
        (4, 50, 50),
        (6, 10, 5),
        (3, 20, 1),
        (2, 5, 2),
        (4, 1000, 1000),
        (4, 400, 20),
        (1, 300, 30),
    ] {
        let quota = quota(rate, burst);
        let demand = 3 * u64::from(rate).max(100) / nodes as u64;
        let mut world = World::new(1, nodes, quota, demand, Faults::default(), SCRIPT);
        world.run(SECONDS);
        assert_eq!(world.windows(), Ok(()));
        // By then the burst is used up, and the rate applies.
        let counted = world.admitted.iter().filter(|at| **at >= 11 * SECOND).count();
        let through = world.admitted.len();
        let may = u64::from(rate) * SECONDS + u64::from(burst);
        let calls = world.calls.len();
        eprintln!(
            "{nodes} nodes, {rate}/s burst {burst}: {through} of {may} admitted, {counted} after 10 s, \
             {calls} calls for {} requests",
            world.requests
        );
        let may = may.min(world.requests as u64);
        assert!(through as u64 * 10 >= may * 9, "{nodes} nodes, {rate}/s, burst {burst}: {through} of {may}");
    }
}

/// A client that one central bucket would admit waits at most for the duration of a lease.
#[test]
fn small_limits_do_not_starve_a_client() {
    let mut refusals = 0;
    for seed in 0..100 {
        let mut rng = StdRng::seed_from_u64(seed);
        let burst = rng.random_range(1..=5);
        let quota = Quota { rate: rng.random_range(1..=20), period: Duration::from_secs(10), burst };
        let nodes = rng.random_range(1..=4);
        let mut world = World::new(seed, nodes, quota, rng.random_range(1..=10), Faults::default(), SCRIPT);
        world.run(60);
        refusals += world.refused.len();
        let (rate, cost) = quota.drain();
        let (capacity, mut level, mut last) = (cost * u64::from(burst), 0, 0);
        // The time since which the central bucket has a token.
        let (mut free, mut admitted) = (SECOND, world.admitted.iter().peekable());
        for refused in &world.refused {
            while let Some(at) = admitted.next_if(|at| *at <= refused) {
                level = u64::saturating_sub(level, (at - last) * rate) + cost;
                last = *at;
                if level + cost > capacity {
                    free = free.max(last + (level + cost - capacity).div_ceil(rate));
                }
            }
            let waited = refused.saturating_sub(free);
            assert!(waited <= TTL, "seed {seed}: rejected at {refused}, although free since {free}");
        }
    }
    assert!(refusals > 10_000, "{refusals} rejections are too few");
}

/// Bounds the calls per request, so that a regression fails.
#[test]
fn a_request_costs_a_fraction_of_a_call() {
    for (what, quota, most) in [
        ("3,000 per minute", Quota { rate: 3000, period: Duration::from_secs(60), burst: 3000 }, 0.1),
        ("far above the demand", quota(100_000, 100_000), 0.03),
    ] {
        let mut world = World::new(1, 4, quota, 250, Faults::default(), SCRIPT);
        world.run(120);
        let calls = world.calls.len() as f64 / world.requests as f64;
        eprintln!("{what}: {calls:.4}");
        assert!(calls <= most, "{what}: {calls} calls per request");
    }
}

/// Validates the simulation: it detects each of these defects of the script.
#[test]
fn a_broken_script_exceeds_the_limit() {
    // Each seed is the first whose fleet shows the defect.
    for (seed, what, right, wrong) in [
        (
            14,
            "the debt drains below the live leases",
            "math.max(live * cost, debt - (till - at) * rate)",
            "math.max(0, debt - (till - at) * rate)",
        ),
        (1702, "the debt does not drain at the expiry of a lease", "  drain(lease.expiry)\n", ""),
        (
            23,
            "the tokens of an expired lease return to the bucket",
            "  live = live - lease.amount\n",
            "  live = live - lease.amount debt = debt - lease.amount * cost\n",
        ),
        (512, "a late call takes effect", "if mine and seq < mine.seq then return answer(0, 0, 0) end", ""),
        (
            7,
            "the amounts that a holder reports are not bounded",
            "held = math.min(held, had)\nback = math.min(back, had - held)",
            "",
        ),
        (8, "a lease ends early", "at + ttl, seq", "at + ttl * 0.9, seq"),
        (7, "the key expires before the debt has drained", "ttl + debt / rate", "ttl"),
        (1702, "the key expires with a lease", "ttl + debt / rate", "math.max(ttl, debt / rate)"),
    ] {
        let broken = SCRIPT.replacen(right, wrong, 1);
        assert_ne!(broken, SCRIPT, "{what}: the script has changed");
        assert_ne!(exceeding(seed, FLEETS, &broken), None, "{what}");
    }
}

/// The simulation also detects a node that spends expired tokens.
#[test]
fn a_clock_that_drifts_too_much_exceeds_the_limit() {
    let slow = |seed: &u64| {
        let mut world = stormy(*seed, SCRIPT);
        world.nodes.iter_mut().for_each(|node| node.ppm = -200_000);
        world.run(12).windows().is_err()
    };
    assert!((0..FLEETS).any(|seed| slow(&seed)));
}

fn call(holder: u64, seq: u64, quota: Quota, [held, back, need, want]: [u32; 4]) -> LeaseCall {
    let ttl = Duration::from_micros(TTL);
    LeaseCall { bucket: String::new(), quota, holder, seq, held, back, need, want, ttl }
}

#[test]
fn a_lease_that_cannot_grow_is_renewed() {
    let (shared, quota) = (Shared::new(SCRIPT), quota(10, 20));
    assert_eq!(shared.run(EPOCH, &call(1, 1, quota, [0, 0, 0, 10])).amount, 10);
    assert_eq!(shared.run(EPOCH, &call(2, 1, quota, [0, 0, 10, 0])).taken, 10);
    let renewed = shared.run(EPOCH + 50_000, &call(1, 2, quota, [10, 0, 0, 10]));
    assert_eq!((renewed.amount, renewed.left), (10, 0));
    // 1.04 s after the first call, which is more than the duration of a lease, the first node still holds its
    // ten tokens.
    assert_eq!(shared.run(EPOCH + 1_040_000, &call(2, 2, quota, [0, 0, 20, 0])).taken, 10);
}

#[test]
fn repeated_and_late_calls_change_nothing() {
    let (shared, quota) = (Shared::new(SCRIPT), quota(1, 20));
    let first = call(1, 1, quota, [0, 0, 2, 6]);
    let grant = shared.run(EPOCH, &first);
    assert_eq!((grant.amount, grant.taken, grant.left), (6, 2, 12));
    assert_eq!(shared.run(EPOCH + 1000, &first), grant);
    let returned = shared.run(EPOCH + 2000, &call(1, 2, quota, [0, 6, 0, 0]));
    assert_eq!((returned.amount, returned.left), (0, 18));
    assert!(!shared.run(EPOCH + 3000, &first).applied);
    assert_eq!(shared.run(EPOCH + 4000, &call(2, 1, quota, [0, 0, 99, 0])).taken, 18);
}

#[test]
fn a_changed_limit_keeps_the_debt() {
    for (burst, taken, retry_us) in [(20, 14, 1), (8, 2, 1), (4, 0, 100_000)] {
        let shared = Shared::new(SCRIPT);
        assert_eq!(shared.run(EPOCH, &call(1, 1, quota(1, 10), [0, 0, 5, 0])).taken, 5);
        // The debt is five tokens and one step of rounding. The rest of the new burst is free.
        let grant = shared.run(EPOCH, &call(2, 1, quota(10, burst), [0, 0, 99, 0]));
        assert_eq!((grant.taken, grant.retry_after.as_micros()), (taken, retry_us), "{burst}");
    }
}

#[test]
fn large_numbers_stay_exact() {
    // The largest bucket that the configuration accepts: 2^51 steps.
    let quota = Quota { rate: 1, period: Duration::from_secs(86_400), burst: 26_062 };
    let (shared, (_, cost)) = (Shared::new(SCRIPT), quota.drain());
    for n in 1..=26_062_u32 {
        if n < 26_000 && n > 10 {
            continue;
        }
        let need = if n == 26_000 { 26_000 - 10 } else { 1 };
        let grant = shared.run(EPOCH + u64::from(n), &call(1, 0, quota, [0, 0, need, 0]));
        assert_eq!((grant.taken, grant.left), (need, 26_062 - n), "{n}");
    }
    let refused = shared.run(EPOCH + 26_063, &call(1, 0, quota, [0, 0, 1, 0]));
    assert_eq!((refused.taken, refused.retry_after), (0, Duration::from_micros(cost - 26_062)));
}
