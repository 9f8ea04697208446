//! Where the process stands between start and exit, and how many requests it still owes an answer.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::sync::{Notify, watch};

/// The phases, in order; the process never goes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Connecting to the backends; the port is not bound.
    Starting,
    /// Taking traffic.
    Ready,
    /// Told to stop: `/readyz` says 503, connections close after their answer, runs in flight may finish.
    Draining,
    /// The drain time is over: whoever still waits is answered now.
    Closing,
}

/// The phase and the requests in flight, shared by all who look at them.
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

    /// Moves on to `phase`; moving back is ignored.
    pub fn enter(&self, phase: Phase) {
        self.phase.send_if_modified(|now| {
            let forward = phase > *now;
            if forward {
                *now = phase;
            }
            forward
        });
    }

    /// Resolves once `phase` is reached.
    pub async fn reached(&self, phase: Phase) {
        // The sender lives in `self`, so the channel cannot close under us.
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
            // Listen first: the last request may end between the look and the wait.
            let ended = self.requests.one_ended.notified();
            if self.requests_in_flight() == 0 {
                return;
            }
            ended.await;
        }
    }
}

/// One request in flight.
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
