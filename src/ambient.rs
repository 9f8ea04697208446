//! What code takes from its surroundings without asking a port: the time of day, random numbers, tasks, and
//! threads that may block.
//!
//! One room for all of it, because the simulation of a fleet (`simulation`, test builds only) replaces it: it
//! runs many nodes on one thread, in virtual time, and draws every random number from one seed. A direct use
//! of the clock or of a random number in a room that is simulated would make a run unrepeatable; a wall of
//! `tests/it/tidy` finds it.

use ahash::RandomState;
use rand::RngCore;
use std::time::Duration;
use tokio::task::JoinHandle;

pub mod disk;
#[cfg(test)]
pub mod replaced;

/// The time since the Unix epoch. A clock before 1970 returns zero.
pub fn unix_time() -> Duration {
    #[cfg(test)]
    if let Some(time) = replaced::with(|surroundings| surroundings.unix_time(replaced::current())) {
        return time;
    }
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default()
}

/// The source of random numbers.
#[cfg(not(test))]
pub fn rng() -> impl RngCore {
    rand::rng()
}

/// The source of random numbers.
#[cfg(test)]
pub fn rng() -> impl RngCore {
    replaced::Numbers
}

/// The keys of a hash table whose entries are listed: their order must not differ between runs of a seed.
pub fn hash_keys() -> RandomState {
    #[cfg(test)]
    if replaced::with(|_| ()).is_some() {
        return RandomState::with_seeds(1, 2, 3, 4);
    }
    RandomState::new()
}

/// Starts a task that outlives its caller. Callers bound their number and say why.
#[expect(
    clippy::disallowed_methods,
    reason = "the tasks of a node are started here, so that it can be simulated"
)]
pub fn spawn<T: Send + 'static>(task: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    #[cfg(test)]
    if let Some(scope) = replaced::scope() {
        let running = tokio::spawn(scope.of(task));
        scope.started(running.abort_handle());
        return running;
    }
    tokio::spawn(task)
}

/// Prepares a future for a [`tokio::task::JoinSet`]: it belongs to the node of its caller.
#[cfg(not(test))]
pub fn scoped<F: Future>(task: F) -> F {
    task
}

/// Prepares a future for a [`tokio::task::JoinSet`]: it belongs to the node of its caller.
#[cfg(test)]
pub fn scoped<F: Future>(task: F) -> impl Future<Output = F::Output> {
    replaced::maybe_scoped(task)
}

/// Runs work on a thread that may block.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    #[cfg(test)]
    if let Some(pause) = replaced::with(|surroundings| surroundings.blocking_time()) {
        tokio::time::sleep(pause).await;
        let done = work();
        // The process may end between the effect and its answer.
        tokio::time::sleep(replaced::SYNC_TAKES).await;
        return done;
    }
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        // The task is never cancelled, so it panicked.
        Err(e) => std::panic::resume_unwind(e.into_panic()),
    }
}
