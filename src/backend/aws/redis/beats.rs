//! Beats: messages of this process to itself. They prove that its subscriptions receive what is published.
//!
//! After a failover a subscription can stay on the old primary as long as that server answers, PINGs
//! included, while all others publish on the new primary. So a beat is published on the command connection,
//! like results and changes, and every subscription of the process must receive it. There is at most one
//! PUBLISH per [`BEAT_EVERY`], independent of the number of subscriptions: the first subscription that finds
//! it due publishes it.
//!
//! The channel lies outside `result:*`, because an old controller stores everything it receives there. If the
//! ACL of the user denies the channel, beats are off. They are retried at intervals.

use super::connection::CommandConnection;
use crate::backend::BackendError;
use crate::model::{NodeId, ProcessToken};
use futures_util::future::{BoxFuture, FutureExt};
use parking_lot::{Mutex, MutexGuard};
use redis::cmd;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Minimum interval between two beats of a process.
pub const BEAT_EVERY: Duration = Duration::from_secs(1);
/// A beat that was published less than this ago may still be in flight.
const FRESH: Duration = Duration::from_millis(500);
/// Interval at which denied beats are retried.
const DENIED_PAUSE: Duration = Duration::from_secs(60);

pub struct Beats {
    commands: Arc<CommandConnection>,
    channel: String,
    process: ProcessToken,
    state: Mutex<BeatState>,
}

#[derive(Default)]
struct BeatState {
    /// The number of the last beat that was begun, and its time.
    begun: u64,
    begun_at: Option<Instant>,
    /// The last beat that Redis has accepted, its time, and the one before it.
    published: u64,
    published_at: Option<Instant>,
    published_before: u64,
    /// When beats that are off are retried.
    denied_until: Option<Instant>,
}

pub fn channel_of(node: NodeId) -> String {
    format!("beat:{node}")
}

impl Beats {
    pub fn new(commands: Arc<CommandConnection>, node: NodeId, process: ProcessToken) -> Self {
        Self { commands, channel: channel_of(node), process, state: Mutex::default() }
    }

    pub fn channel(&self) -> &str {
        &self.channel
    }

    /// The number of a beat of this process. `None` for other messages, and for beats of another process with
    /// the same node id.
    pub fn number(&self, payload: &[u8]) -> Option<u64> {
        let (process, number) = std::str::from_utf8(payload).ok()?.split_once(':')?;
        (ProcessToken::parse(process)? == self.process).then(|| number.parse().ok())?
    }

    /// The last beat that was begun. A subscription that begins now must receive the later ones.
    pub fn begun(&self) -> u64 {
        self.state().begun
    }

    /// The last beat that a subscription must have received by now.
    pub fn expected(&self) -> u64 {
        let state = self.state();
        let is_fresh = state.published_at.is_some_and(|at| at.elapsed() < FRESH);
        if is_fresh { state.published_before } else { state.published }
    }

    /// Returns a future that publishes the next beat, if it is due.
    pub fn publish_due(self: &Arc<Self>) -> Option<BoxFuture<'static, ()>> {
        let number = {
            let mut state = self.state();
            let is_early = state.begun_at.is_some_and(|at| at.elapsed() < BEAT_EVERY);
            if is_early || state.denied_until.is_some_and(|until| Instant::now() < until) {
                return None;
            }
            state.begun += 1;
            state.begun_at = Some(Instant::now());
            state.begun
        };
        let beats = Arc::clone(self);
        Some(async move { beats.publish(number).await }.boxed())
    }

    async fn publish(&self, number: u64) {
        let beat = format!("{}:{number}", self.process);
        match self.commands.query::<u64>(cmd("PUBLISH").arg(&self.channel).arg(beat)).await {
            Ok(_) => self.published(number),
            Err(BackendError::Denied(error)) => self.denied(&error),
            // Says nothing about the subscriptions. Callers of other commands report the failure.
            Err(_) => {}
        }
    }

    fn published(&self, number: u64) {
        let mut state = self.state();
        // Two may be in flight and end in any order.
        if number > state.published {
            state.published_before = state.published;
            (state.published, state.published_at) = (number, Some(Instant::now()));
        }
    }

    /// The ACL denies the channel. Logged once, until it is allowed again.
    pub fn denied(&self, error: &str) {
        let was_off = self.state().denied_until.replace(Instant::now() + DENIED_PAUSE).is_some();
        if !was_off {
            tracing::warn!(
                channel = self.channel,
                error,
                "Beats are off: the ACL of Redis denies the channel, so a subscription that stays on an old \
                 primary is not detected. Allow the user the channels beat:*"
            );
        }
    }

    pub fn are_off(&self) -> bool {
        self.state().denied_until.is_some()
    }

    /// Whether it is time to retry beats that are off.
    pub fn are_due_again(&self) -> bool {
        self.state().denied_until.is_some_and(|until| Instant::now() >= until)
    }

    /// A beat has arrived, so beats are allowed.
    pub fn arrived(&self) {
        if self.state().denied_until.take().is_some() {
            tracing::info!(channel = self.channel, "Beats are on again");
        }
    }

    fn state(&self) -> MutexGuard<'_, BeatState> {
        self.state.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::aws::redis::connection::{RedisUrl, client};

    fn beats() -> Arc<Beats> {
        let commands = CommandConnection::new(client(&RedisUrl::new("redis://127.0.0.1:1")).unwrap());
        Arc::new(Beats::new(Arc::new(commands), NodeId(0xab), ProcessToken(7)))
    }

    #[test]
    fn beats_of_other_processes_are_ignored() {
        let beats = beats();
        assert_eq!(beats.channel(), "beat:000000ab");
        assert_eq!(beats.number(b"0000000000000007:12"), Some(12));
        for other in
            [&b"0000000000000008:12"[..], b"12", b"0000000000000007:", b"0000000000000007:x", b"\xff:1"]
        {
            assert_eq!(beats.number(other), None, "{other:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn at_most_one_beat_is_published_per_interval() {
        let beats = beats();
        let ask = || beats.publish_due().is_some();
        assert_eq!([ask(), ask(), ask()], [true, false, false]);
        tokio::time::advance(BEAT_EVERY).await;
        assert_eq!([ask(), ask()], [true, false]);
        assert_eq!((beats.begun(), beats.expected()), (2, 0), "Redis accepted none");
    }

    #[tokio::test(start_paused = true)]
    async fn a_beat_is_expected_only_after_a_delay() {
        let beats = beats();
        beats.published(1);
        assert_eq!(beats.expected(), 0);
        tokio::time::advance(FRESH).await;
        assert_eq!(beats.expected(), 1);
        beats.published(3);
        beats.published(2);
        assert_eq!(beats.expected(), 1, "the third may be in flight");
        tokio::time::advance(FRESH).await;
        assert_eq!(beats.expected(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn denied_beats_are_retried_at_intervals() {
        let beats = beats();
        beats.denied("NOPERM");
        tokio::time::advance(DENIED_PAUSE - Duration::from_secs(1)).await;
        assert!(beats.are_off() && !beats.are_due_again() && beats.publish_due().is_none());
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(beats.are_off() && beats.are_due_again() && beats.publish_due().is_some());
        beats.arrived();
        assert!(!beats.are_off());
    }
}
