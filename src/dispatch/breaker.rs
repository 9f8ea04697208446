//! A circuit breaker in front of the queue. After two seconds without a successful send, new jobs are
//! rejected immediately instead of after their send deadline. Probe jobs are admitted at intervals, and
//! waiting jobs are still retried.

use crate::availability::Availability;
use crate::metrics::Metrics;
use std::sync::Arc;
use std::time::Duration;

/// The breaker opens when sends have failed for this long without a success.
const OPENS_AFTER: Duration = Duration::from_secs(2);
/// While it is open, one probe job per interval is admitted.
const PROBE_EVERY: Duration = Duration::from_millis(250);
/// The breaker closes when no send was attempted for this long, because the state of the queue is unknown
/// then. A load balancer that checks `/health` sends no jobs while the queue counts as unavailable, so
/// without this rule no probe would ever be made.
pub const FORGETS_AFTER: Duration = Duration::from_secs(10);

pub struct Breaker {
    queue: Availability,
    metrics: Arc<Metrics>,
}

impl Breaker {
    pub fn new(metrics: Arc<Metrics>) -> Self {
        Self { queue: Availability::new(OPENS_AFTER, PROBE_EVERY), metrics }
    }

    /// Whether a new job may be queued for sending.
    pub fn admits(&self) -> bool {
        self.queue.may_try()
    }

    /// A send put a job on the queue, or the queue rejected a job as invalid.
    pub fn succeeded(&self) {
        if self.queue.succeeded() {
            self.metrics.queue_refuses.set(0);
            tracing::info!("The queue accepts jobs again");
        }
    }

    /// A send put no job on the queue, and its jobs were not the cause.
    pub fn failed(&self) {
        if self.queue.failed() {
            self.metrics.queue_refuses.set(1);
            tracing::error!(
                "The queue accepts no jobs; new jobs are rejected, except four probes per second. Check the \
                 queue and the network"
            );
        }
    }

    /// Whether the breaker is open, so that [`Self::expire`] may have something to do.
    pub fn is_open(&self) -> bool {
        self.queue.is_down()
    }

    /// Closes the breaker if no send was attempted for [`FORGETS_AFTER`].
    pub fn expire(&self) {
        if self.queue.expire(FORGETS_AFTER) {
            self.metrics.queue_refuses.set(0);
            tracing::info!("No send to the queue was attempted for 10 s; new jobs are admitted again");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::advance;

    fn breaker() -> Breaker {
        Breaker::new(Arc::new(Metrics::new(10).unwrap()))
    }

    #[tokio::test(start_paused = true)]
    async fn it_opens_after_a_time_without_success() {
        let breaker = breaker();
        breaker.failed();
        advance(OPENS_AFTER / 2).await;
        breaker.succeeded();
        breaker.failed();
        advance(OPENS_AFTER / 2).await;
        breaker.failed();
        assert!(breaker.admits(), "the time without success is too short");
        advance(OPENS_AFTER / 2).await;
        breaker.failed();
        assert!(!breaker.admits());
        assert_eq!(breaker.metrics.queue_refuses.get(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn while_open_probes_are_admitted_until_one_succeeds() {
        let breaker = breaker();
        breaker.failed();
        advance(OPENS_AFTER).await;
        breaker.failed();
        for _ in 0..3 {
            assert!(!breaker.admits());
            advance(PROBE_EVERY).await;
            assert!(breaker.admits());
            breaker.failed();
        }
        breaker.succeeded();
        assert!(breaker.admits() && breaker.admits());
        assert_eq!(breaker.metrics.queue_refuses.get(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn it_closes_after_a_time_without_attempts() {
        let breaker = breaker();
        breaker.failed();
        advance(OPENS_AFTER).await;
        breaker.failed();
        advance(FORGETS_AFTER / 2).await;
        breaker.expire();
        assert!(breaker.is_open());
        breaker.failed();
        advance(FORGETS_AFTER / 2).await;
        breaker.expire();
        assert!(breaker.is_open(), "there was an attempt");
        advance(FORGETS_AFTER / 2).await;
        breaker.expire();
        assert!(!breaker.is_open() && breaker.admits() && breaker.admits());
        assert_eq!(breaker.metrics.queue_refuses.get(), 0);
        breaker.failed();
        assert!(!breaker.is_open(), "the time until it opens starts again");
    }
}
