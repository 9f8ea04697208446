//! Waiting, always for an event and always with a deadline.
//!
//! A test states what it waits for and how long that may take on a machine that is busy with other work. No
//! deadline is below 10 s. To show that something does *not* happen, a test waits for a later event and looks
//! then.

use std::future::Future;
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;

/// Deadline for what takes less than a second on an idle machine.
pub const SOON: Duration = Duration::from_secs(30);

const POLL_EVERY: Duration = Duration::from_millis(20);

/// Calls `probe` until it returns a value. Panics with its last reason when `deadline` has passed.
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
        pause(POLL_EVERY).await;
    }
}

/// The value of `future`. Panics when it takes longer than `deadline`.
pub async fn within<T>(what: &str, deadline: Duration, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(deadline, future).await {
        Ok(value) => value,
        Err(_) => panic!("not within {deadline:?}: {what}"),
    }
}

/// Sets the pace of a client, or the length of a fault. Its end proves nothing: a test waits for events with
/// [`eventually`].
pub async fn pause(duration: Duration) {
    tokio::time::sleep(duration).await;
}

/// A client or a proxy that runs beside the test.
#[expect(clippy::disallowed_methods, reason = "tests play many clients at once; the rule is for services")]
pub fn spawn<F>(future: F) -> JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    tokio::spawn(future)
}

/// The values of all tasks, in order. The first panic of a task is propagated.
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
