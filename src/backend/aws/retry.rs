//! Repeats a step of the start until it succeeds or the deadline has passed.

use crate::backend::BackendError;
use std::future::Future;
use std::time::Duration;
use tokio::time::{Instant, sleep, timeout_at};

/// Pause between two attempts to reach a service that does not answer; it may be starting too.
pub const PAUSE: Duration = Duration::from_millis(200);

/// Repeats `check` until it succeeds, fails permanently, or the deadline passes.
pub async fn within<T, F>(deadline: Instant, mut check: impl FnMut() -> F) -> Result<T, BackendError>
where
    F: Future<Output = Result<T, BackendError>>,
{
    let mut last = no_answer();
    loop {
        match timeout_at(deadline, check()).await {
            Ok(Err(error)) if error.is_transient() => last = error,
            Ok(done) => return done,
            Err(_) => return Err(last),
        }
        if Instant::now() + PAUSE >= deadline {
            return Err(last);
        }
        sleep(PAUSE).await;
    }
}

/// The error of a service that did not answer in time.
pub fn no_answer() -> BackendError {
    BackendError::Unavailable("no answer before the start-up deadline".into())
}
