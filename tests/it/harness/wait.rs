//! Waiting, always with an end. Tests never sleep: they say what they wait for and how long it may take.

use std::future::Future;
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;

/// How long something may take that should happen at once, on a machine that is busy with other tests.
pub const SOON: Duration = Duration::from_secs(20);

const POLL_EVERY: Duration = Duration::from_millis(20);

/// Asks `probe` until it answers; panics with its last reason when the time is up.
pub async fn eventually<T, F, Fut>(what: &str, deadline: Duration, mut probe: F) -> T
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T, String>>,
{
    let end = Instant::now() + deadline;
    loop {
        let why = match probe().await {
            Ok(value) => return value,
            Err(why) => why,
        };
        assert!(Instant::now() < end, "not within {deadline:?}: {what}; last seen: {why}");
        tokio::time::sleep(POLL_EVERY).await;
    }
}

/// [`eventually`] for start-up code outside a runtime. `Err` holds the last reason.
pub fn poll_blocking<T>(
    deadline: Duration,
    mut probe: impl FnMut() -> Result<T, String>,
) -> Result<T, String> {
    let end = Instant::now() + deadline;
    loop {
        match probe() {
            Ok(value) => return Ok(value),
            Err(why) if Instant::now() >= end => return Err(why),
            Err(_) => pause(),
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "the one place that polls outside a runtime")]
fn pause() {
    std::thread::sleep(POLL_EVERY);
}

/// The future's value; panics when it takes longer than `deadline`.
pub async fn within<T>(what: &str, deadline: Duration, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(deadline, future).await {
        Ok(value) => value,
        Err(_) => panic!("not within {deadline:?}: {what}"),
    }
}

/// A client or a proxy of its own beside the test.
#[expect(clippy::disallowed_methods, reason = "tests play many clients at once; the rule is for services")]
pub fn spawn<F>(future: F) -> JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    tokio::spawn(future)
}

/// All the values, in order; panics as the first task that panicked did.
pub async fn join_all<T>(what: &str, deadline: Duration, tasks: Vec<JoinHandle<T>>) -> Vec<T> {
    let joined = async {
        let mut values = Vec::with_capacity(tasks.len());
        for task in tasks {
            match task.await {
                Ok(value) => values.push(value),
                Err(e) if e.is_panic() => std::panic::resume_unwind(e.into_panic()),
                Err(e) => panic!("a task of {what} was cancelled: {e}"),
            }
        }
        values
    };
    within(what, deadline, joined).await
}
