//! The phase of the process between start and exit, and the number of requests in flight.
//!
//! Shutdown needs both: each phase starts the next steps, and the exit waits for the last request.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::{Notify, watch};

/// The phases, in order. The process never returns to an earlier one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Connects to the backends; the port is not bound.
    Starting,
    /// Serves requests.
    Ready,
    /// Shutting down: `/readyz` returns 503, connections close after their response, runs in flight may
    /// finish.
    Draining,
    /// The drain time is over: clients that still wait for a result get a response now.
    Closing,
}

/// The phase and the count of requests in flight. Clones share both.
#[derive(Clone)]
pub struct Lifecycle {
    phase: watch::Sender<Phase>,
    requests: Arc<Requests>,
}

#[derive(Default)]
struct Requests {
    in_flight: AtomicUsize,
    one_ended: Notify,
}

impl Default for Lifecycle {
    fn default() -> Self {
        Self { phase: watch::Sender::new(Phase::Starting), requests: Arc::default() }
    }
}

impl Lifecycle {
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Advances to `phase`. Ignored if the process is already there or beyond.
    pub fn enter(&self, phase: Phase) {
        self.phase.send_if_modified(|now| {
            let forward = phase > *now;
            if forward {
                *now = phase;
            }
            forward
        });
    }

    /// Resolves once `phase` or a later one is reached.
    pub async fn reached(&self, phase: Phase) {
        // Cannot fail: `self` holds the sender, so the channel stays open.
        let _ = self.phase.subscribe().wait_for(|now| *now >= phase).await;
    }

    /// Counts a request until the guard is dropped.
    pub fn request(&self) -> RequestGuard {
        self.requests.in_flight.fetch_add(1, Ordering::Relaxed);
        RequestGuard(Arc::clone(&self.requests))
    }

    pub fn requests_in_flight(&self) -> usize {
        self.requests.in_flight.load(Ordering::Relaxed)
    }

    /// Resolves once no request is in flight.
    pub async fn idle(&self) {
        loop {
            // Registered before the check: the last request may end between the check and the wait.
            let ended = self.requests.one_ended.notified();
            if self.requests_in_flight() == 0 {
                return;
            }
            ended.await;
        }
    }
}

/// Counts one request as in flight until it is dropped.
pub struct RequestGuard(Arc<Requests>);

impl Drop for RequestGuard {
    fn drop(&mut self) {
        if self.0.in_flight.fetch_sub(1, Ordering::Relaxed) == 1 {
            self.0.one_ended.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn phases_only_go_forward() {
        let lifecycle = Lifecycle::default();
        lifecycle.enter(Phase::Draining);
        lifecycle.enter(Phase::Ready);
        assert_eq!(lifecycle.phase(), Phase::Draining);
        lifecycle.reached(Phase::Ready).await;
    }

    #[tokio::test]
    async fn idle_waits_for_the_last_request() {
        let lifecycle = Lifecycle::default();
        lifecycle.idle().await;
        let (one, two) = (lifecycle.request(), lifecycle.request());
        let idle = lifecycle.idle();
        tokio::pin!(idle);
        assert!(futures_util::poll!(&mut idle).is_pending());
        drop(one);
        assert!(futures_util::poll!(&mut idle).is_pending());
        drop(two);
        idle.await;
    }
}
