//! The lease of one identity on one node: a state machine without clock, lock or connection.
//!
//! The shared bucket debits tokens when it leases them. Until the lease expires this node may spend them, so
//! a request that finds a token needs no call. The node's view of the lease is conservative:
//!
//! * A lease ends 1 % earlier here than in the shared store, counted from before the call was sent.
//! * Returned tokens are subtracted before the call is sent. If the call fails they are lost, never doubled.
//! * One call is in flight at a time. Its answer grants a total amount, from which the tokens spent meanwhile
//!   are subtracted.
//!
//! Times are microseconds of a clock that never steps back.

use crate::backend::Grant;
use crate::model::Quota;
use std::collections::VecDeque;
use std::time::Duration;

pub type Micros = u64;

/// How long the shared store keeps a lease.
pub const TTL: Micros = 1_000_000;
/// How long the node uses a lease: clocks may drift by 1 %.
const LIFE: Micros = TTL / 100 * 99;
/// Leases cover the expected demand of this period.
const AHEAD: Micros = 200_000;
/// A lease that was not renewed for this long is returned, unless it is still needed.
pub const IDLE: Micros = 600_000;
/// The pause before the next renewal after one that granted less than half of the tokens requested.
const RENEWAL_PAUSE: Micros = 50_000;
/// A rejection is remembered slightly longer than the store says, so that nodes do not call for each token:
/// until this many tokens per node have accumulated, but at most [`REFUSAL_PAUSE_MAX`] longer.
const GATHERED: u64 = 16;
const REFUSAL_PAUSE_MAX: Micros = 50_000;
/// The minimum number of tokens per lease, so that a new client does not need a call for its third, fifth and
/// ninth request. At most the burst divided by [`LEAST_OF_BURST`]: that little may stay unused for [`IDLE`].
const LEAST: u32 = 32;
const LEAST_OF_BURST: u32 = 64;
/// The tokens that a bucket gains in this time do not justify a separate call. They are leased with the first
/// token and not returned. As a lease lives for [`TTL`], at most one hundredth of the rate is lost.
const NEGLIGIBLE: Micros = TTL / 100;
/// Maximum number of requests that wait for the answer of one call.
pub const WAITERS_MAX: usize = 1024;

/// The immediate answer to a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Spend {
    /// `call`: the lease runs low, and [`TokenLease::begin`] is due. `seq` is the argument for
    /// [`TokenLease::refund`].
    Allowed { remaining: u32, seq: u64, call: bool },
    /// Known from an earlier answer of the store.
    Refused { retry: Micros },
    /// No token is available: wait for a call, or proceed without.
    Empty,
}

/// The answer to a request that has waited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    Allowed {
        remaining: u32,
    },
    Refused {
        retry: Micros,
    },
    /// The shared store did not answer.
    Away,
}

/// The thresholds for calls, in tokens.
#[derive(Clone, Copy, Debug, Default)]
pub struct LeaseThresholds {
    least: u32,
    negligible: u32,
}

impl LeaseThresholds {
    pub fn of(quota: &Quota) -> Self {
        let most = quota.burst / LEAST_OF_BURST;
        let gained = u128::from(quota.rate) * u128::from(NEGLIGIBLE) / quota.period.as_micros().max(1);
        Self { least: LEAST.min(most), negligible: u32::try_from(gained).unwrap_or(u32::MAX).min(most) }
    }
}

/// The numbers of a call, in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallAmounts {
    pub seq: u64,
    pub held: u32,
    pub back: u32,
    pub need: u32,
    pub want: u32,
}

/// What follows after an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AfterAnswer {
    /// Requests are still waiting: [`TokenLease::begin`] is due.
    Call,
    /// Tokens are left; check them after [`IDLE`].
    Watch,
    Rest,
}

/// The pacing of a limit's rejections.
#[derive(Clone, Copy, Debug)]
pub struct RejectionPacing {
    token: Micros,
    /// Half the time in which an empty bucket fills up to one token less than full. Tokens that accumulate
    /// for longer overflow.
    headroom: Micros,
}

impl RejectionPacing {
    pub fn of(quota: &Quota) -> Self {
        let micros = |d: Duration| Micros::try_from(d.as_micros()).unwrap_or(Micros::MAX);
        let token = micros(quota.period / quota.rate.max(1));
        Self { token, headroom: token.saturating_mul(u64::from(quota.burst.saturating_sub(1))) / 2 }
    }

    fn pause(&self, nodes: u32) -> Micros {
        let gathered = self.token.saturating_mul(u64::from(nodes) * GATHERED);
        gathered.min(REFUSAL_PAUSE_MAX).min(self.headroom)
    }
}

/// The lease state. A `W` is a request that waits for an answer.
#[derive(Debug)]
pub struct TokenLease<W> {
    tokens: u32,
    expires: Micros,
    /// Tokens after the last answer.
    size: u32,
    /// Tokens left in the shared bucket at the last answer.
    left: u32,
    /// No call is made for a rejected request before `silent_until`. The response names `retry_at` as the
    /// time to retry.
    silent_until: Micros,
    retry_at: Micros,
    renew_from: Micros,
    demand: Demand,
    /// The number of the last call.
    seq: u64,
    call: OpenCall,
    waiters: VecDeque<W>,
}

#[derive(Debug)]
enum OpenCall {
    None,
    Due,
    Sent(SentCall),
}

#[derive(Debug)]
struct SentCall {
    at: Micros,
    /// Tokens spent since the call was sent.
    spent: u32,
    /// Tokens requested in total.
    wished: u32,
}

impl<W> Default for TokenLease<W> {
    fn default() -> Self {
        Self {
            tokens: 0,
            expires: 0,
            size: 0,
            left: 0,
            silent_until: 0,
            retry_at: 0,
            renew_from: 0,
            demand: Demand::default(),
            seq: 0,
            call: OpenCall::None,
            waiters: VecDeque::new(),
        }
    }
}

impl<W> TokenLease<W> {
    /// Takes a token for one request.
    pub fn spend(&mut self, now: Micros) -> Spend {
        self.demand.count(now);
        if self.tokens > 0 && now < self.expires {
            self.tokens -= 1;
            if let OpenCall::Sent(sent) = &mut self.call {
                sent.spent += 1;
            }
            let call = self.is_low(now);
            if call {
                self.call = OpenCall::Due;
            }
            return Spend::Allowed { remaining: self.remaining(), seq: self.seq, call };
        }
        if now < self.silent_until {
            return Spend::Refused { retry: self.retry_at.saturating_sub(now) };
        }
        Spend::Empty
    }

    fn is_low(&self, now: Micros) -> bool {
        matches!(self.call, OpenCall::None)
            && now >= self.renew_from
            && (self.tokens <= self.size / 4 || now + AHEAD >= self.expires)
            && self.demand.ahead() > 0
    }

    /// Returns a spent token, if it is still leased. After the next call the shared store counts it as spent.
    pub fn refund(&mut self, seq: u64, now: Micros) {
        if self.seq == seq && now < self.expires {
            self.tokens += 1;
            if let OpenCall::Sent(sent) = &mut self.call {
                sent.spent = sent.spent.saturating_sub(1);
            }
        }
    }

    /// Registers a waiting request. `Ok(true)`: [`Self::begin`] is due. `Err`: too many requests wait
    /// already.
    pub fn wait(&mut self, waiter: W) -> Result<bool, W> {
        if self.waiters.len() >= WAITERS_MAX {
            return Err(waiter);
        }
        self.waiters.push_back(waiter);
        Ok(self.probe())
    }

    /// Makes a call due without a waiting request. Returns `false` if one is due or in flight.
    pub fn probe(&mut self) -> bool {
        let idle = matches!(self.call, OpenCall::None);
        if idle {
            self.call = OpenCall::Due;
        }
        idle
    }

    /// Whether a lease not renewed since call `seq` should be returned. If so, [`Self::begin`] is due.
    pub fn is_idle_since(&mut self, seq: u64, worth: LeaseThresholds) -> bool {
        self.seq == seq && self.tokens > worth.negligible && self.probe()
    }

    /// Returns the call that is due, to be sent now with the number `seq`. Even a call that requests nothing
    /// renews the held tokens and shows whether the store answers.
    pub fn begin(&mut self, now: Micros, seq: u64, worth: LeaseThresholds) -> Option<CallAmounts> {
        if !matches!(self.call, OpenCall::Due) {
            return None;
        }
        self.demand.roll(now);
        let wished = match self.demand.ahead() {
            0 if self.waiters.is_empty() => 0,
            0 => worth.negligible.min(worth.least),
            requests => requests.max(worth.least),
        };
        let held = if now < self.expires { self.tokens.min(wished) } else { 0 };
        let need = u32::try_from(self.waiters.len()).unwrap_or(u32::MAX);
        let ask = CallAmounts { seq, held, back: self.tokens - held, need, want: wished - held };
        self.seq = seq;
        self.tokens = held;
        self.call = OpenCall::Sent(SentCall { at: now, spent: 0, wished });
        Some(ask)
    }

    /// Applies the answer to the call in flight. `None` means that there is no answer, and that the call may
    /// have taken effect. `tell` passes the verdict to a waiter and returns whether the waiter still exists.
    pub fn settle(
        &mut self,
        now: Micros,
        grant: Option<&Grant>,
        pace: &RejectionPacing,
        mut tell: impl FnMut(W, Verdict) -> bool,
    ) -> AfterAnswer {
        let sent = match std::mem::replace(&mut self.call, OpenCall::None) {
            OpenCall::Sent(sent) => Some(sent),
            OpenCall::None | OpenCall::Due => None,
        };
        let (Some(sent), Some(grant)) = (sent, grant.filter(|grant| grant.applied)) else {
            for waiter in self.waiters.drain(..) {
                tell(waiter, Verdict::Away);
            }
            return self.next();
        };
        self.tokens = grant.amount.saturating_sub(sent.spent);
        self.size = self.tokens;
        self.expires = sent.at + LIFE;
        self.left = grant.left;
        self.renew_from = if self.tokens < sent.wished / 2 { now + RENEWAL_PAUSE } else { now };
        let retry = Micros::try_from(grant.retry_after.as_micros()).unwrap_or(Micros::MAX);
        let mut taken = grant.taken;
        while let Some(waiter) = self.waiters.pop_front() {
            let remaining = self.remaining();
            if taken > 0 {
                // If a client has left, its token goes to the next one.
                taken -= u32::from(tell(waiter, Verdict::Allowed { remaining }));
            } else if self.tokens > 0 && now < self.expires {
                let remaining = remaining - 1;
                self.tokens -= u32::from(tell(waiter, Verdict::Allowed { remaining }));
            } else if grant.left == 0 {
                tell(waiter, Verdict::Refused { retry });
            } else {
                self.waiters.push_front(waiter);
                self.call = OpenCall::Due;
                return AfterAnswer::Call;
            }
        }
        if self.tokens == 0 && grant.left == 0 {
            self.retry_at = now.saturating_add(retry);
            self.silent_until = self.retry_at.saturating_add(pace.pause(grant.nodes));
        }
        self.next()
    }

    fn next(&self) -> AfterAnswer {
        if self.tokens > 0 { AfterAnswer::Watch } else { AfterAnswer::Rest }
    }

    /// The number of the last call.
    pub fn seq(&self) -> u64 {
        self.seq
    }

    #[cfg(test)]
    pub fn is_call_under_way(&self) -> bool {
        matches!(self.call, OpenCall::Sent(_))
    }

    /// Requests that would be admitted immediately, as far as is known.
    fn remaining(&self) -> u32 {
        self.tokens.saturating_add(self.left)
    }

    /// Whether the lease can be dropped without losing anything.
    pub fn is_spent(&self, now: Micros) -> bool {
        matches!(self.call, OpenCall::None)
            && (self.tokens == 0 || now >= self.expires)
            && now >= self.silent_until
            && self.demand.is_over(now)
    }
}

/// Requests in the current and in the previous period of [`AHEAD`].
#[derive(Debug, Default)]
struct Demand {
    stretch: u64,
    before: u32,
    now: u32,
}

impl Demand {
    fn count(&mut self, now: Micros) {
        self.roll(now);
        self.now = self.now.saturating_add(1);
    }

    fn roll(&mut self, now: Micros) {
        let stretch = now / AHEAD;
        if stretch != self.stretch {
            self.before = if stretch == self.stretch + 1 { self.now } else { 0 };
            (self.stretch, self.now) = (stretch, 0);
        }
    }

    /// Requests expected in the next period. A single request predicts no other: tokens leased for it would
    /// probably stay unused.
    fn ahead(&self) -> u32 {
        match self.before.max(self.now) {
            1 => 0,
            requests => requests,
        }
    }

    fn is_over(&self, now: Micros) -> bool {
        now / AHEAD > self.stretch + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const START: Micros = 7_000_000;

    fn grant(amount: u32, taken: u32, left: u32) -> Grant {
        Grant { applied: true, amount, taken, left, retry_after: Duration::from_millis(300), nodes: 1 }
    }

    fn pace() -> RejectionPacing {
        RejectionPacing::of(&Quota { rate: 10, period: Duration::from_secs(1), burst: 1 })
    }

    /// A lease of `amount` tokens, whose call was sent at [`START`] and answered half a second later.
    fn leased(amount: u32) -> TokenLease<()> {
        let mut lease = TokenLease::default();
        assert_eq!(lease.wait(()), Ok(true));
        let ask = CallAmounts { seq: 1, held: 0, back: 0, need: 1, want: 0 };
        assert_eq!(lease.begin(START, 1, LeaseThresholds::default()), Some(ask));
        let next = lease.settle(START + TTL / 2, Some(&grant(amount, 1, 9)), &pace(), |(), verdict| {
            verdict == Verdict::Allowed { remaining: amount + 9 }
        });
        assert_eq!(next, AfterAnswer::Watch);
        lease
    }

    fn spendable(lease: &mut TokenLease<()>, now: Micros) -> usize {
        std::iter::repeat_with(|| lease.spend(now))
            .take_while(|spend| matches!(spend, Spend::Allowed { .. }))
            .count()
    }

    #[test]
    fn it_ends_early_counted_from_before_the_call() {
        for (at, tokens) in [(START + TTL / 100 * 99 - 1, 3), (START + TTL / 100 * 99, 0)] {
            assert_eq!(spendable(&mut leased(3), at), tokens, "{at}");
        }
    }

    #[test]
    fn tokens_spent_during_a_call_are_subtracted_from_its_answer() {
        let (mut lease, now) = (leased(3), START + TTL / 2);
        assert_eq!(lease.spend(now), Spend::Allowed { remaining: 11, seq: 1, call: false });
        lease.demand = Demand { stretch: now / AHEAD, before: 3, now: 0 };
        assert!(lease.probe());
        assert_eq!(
            lease.begin(now, 2, LeaseThresholds::default()),
            Some(CallAmounts { seq: 2, held: 2, back: 0, need: 0, want: 1 })
        );
        lease.spend(now);
        lease.settle(now, Some(&grant(5, 0, 0)), &pace(), |(), _| true);
        assert_eq!(spendable(&mut lease, now), 4);
    }

    #[test]
    fn returned_tokens_are_not_spent_even_if_the_call_fails() {
        let (mut lease, now) = (leased(3), START + TTL / 2);
        let worth = LeaseThresholds { least: 0, negligible: 2 };
        assert!(
            !lease.is_idle_since(0, worth)
                && !lease.is_idle_since(1, LeaseThresholds { negligible: 3, ..worth })
        );
        assert!(lease.is_idle_since(1, worth));
        assert_eq!(
            lease.begin(now, 2, LeaseThresholds::default()),
            Some(CallAmounts { seq: 2, held: 0, back: 3, need: 0, want: 0 })
        );
        assert_eq!(spendable(&mut lease, now), 0);
        assert_eq!(lease.settle(now, None, &pace(), |(), _| true), AfterAnswer::Rest);
        assert_eq!(spendable(&mut lease, now), 0);
    }

    #[test]
    fn a_token_is_refunded_only_while_the_store_counts_it_as_leased() {
        let now = START + TTL / 2;
        let (mut kept, mut called) = (leased(1), leased(1));
        for lease in [&mut kept, &mut called] {
            assert_eq!(spendable(lease, now), 1);
        }
        kept.refund(1, now);
        assert_eq!(spendable(&mut kept, now), 1);
        kept.refund(1, START + TTL);
        assert_eq!((kept.tokens, called.probe()), (0, true));
        assert!(called.begin(now, 2, LeaseThresholds::default()).is_some());
        called.refund(1, now);
        assert_eq!(spendable(&mut called, now), 0);
    }

    #[test]
    fn rejections_are_remembered_and_waiters_are_bounded() {
        let (mut lease, now) = (TokenLease::default(), START + TTL);
        for n in 0..WAITERS_MAX {
            assert_eq!(lease.wait(()), Ok(n == 0));
        }
        assert_eq!(lease.wait(()), Err(()));
        assert!(lease.begin(now, 2, LeaseThresholds::default()).is_some());
        let mut refused = 0;
        lease.settle(now, Some(&grant(0, 1, 0)), &pace(), |(), verdict| {
            refused += usize::from(verdict == Verdict::Refused { retry: 300_000 });
            true
        });
        assert_eq!(refused, WAITERS_MAX - 1);
        assert_eq!(lease.spend(now + 100_000), Spend::Refused { retry: 200_000 });
        assert_eq!(lease.spend(now + 300_000), Spend::Empty);
    }
}
