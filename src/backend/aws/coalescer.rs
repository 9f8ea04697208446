//! Joins calls that are made at the same time into batches.
//!
//! A call goes out at once while fewer than `calls_max` batches are on their way. Otherwise it waits, and
//! goes in the next batch, with the others that wait. So batches cost no latency while there is little to do,
//! and they grow with the load. There is no task and no timer: one of the waiting callers sends the batch.
//!
//! If that caller is dropped, the outcome of its batch is unknown, and the others send their items again. So
//! what is sent must be idempotent.

use crate::backend::BackendError;
use parking_lot::Mutex;
use std::collections::VecDeque;
use tokio::sync::oneshot::{self, error::TryRecvError};
use tokio::sync::{AcquireError, Semaphore, SemaphorePermit};

/// Maximum number of items that wait for a batch. When it is reached: [`BackendError::Unavailable`].
const WAITING_MAX: usize = 8_192;
/// How often an item is sent whose batch was abandoned each time.
const SENDS_MAX: u32 = 5;

/// The outcome of one item.
pub type ItemOutcome = Result<(), BackendError>;

/// Bounds of the batches of a [`Coalescer`].
#[derive(Clone, Copy, Debug)]
pub struct BatchBounds {
    /// Batches that may be on their way at the same time.
    pub calls_max: usize,
    /// Items of one batch.
    pub items_max: usize,
    /// Bytes of one batch. A larger item goes alone.
    pub bytes_max: usize,
}

pub struct Coalescer<T> {
    bounds: BatchBounds,
    slots: Semaphore,
    /// In order of arrival. An item whose caller was dropped is sent all the same.
    waiting: Mutex<VecDeque<WaitingItem<T>>>,
}

struct WaitingItem<T> {
    item: T,
    bytes: usize,
    outcome: oneshot::Sender<ItemOutcome>,
}

impl<T: Clone + Send> Coalescer<T> {
    pub fn new(bounds: BatchBounds) -> Self {
        Self { bounds, slots: Semaphore::new(bounds.calls_max), waiting: Mutex::default() }
    }

    /// Sends `item`, of this size, in a batch. Returns its own outcome. `send` is called with a batch, whose
    /// items may all be those of other callers, and returns one outcome for each item, in their order.
    pub async fn call<F>(
        &self,
        item: T,
        bytes: usize,
        send: impl Fn(Vec<T>) -> F + Send + Sync,
    ) -> ItemOutcome
    where
        F: Future<Output = Vec<ItemOutcome>> + Send,
    {
        for _ in 0..SENDS_MAX {
            let (sender, outcome) = oneshot::channel();
            self.enter(WaitingItem { item: item.clone(), bytes, outcome: sender })?;
            if let Some(outcome) = self.outcome_of(outcome, &send).await {
                return outcome;
            }
        }
        Err(BackendError::Unavailable("the batches of a call were abandoned".into()))
    }

    /// Waits for an outcome, and sends batches until it is there. `None`: the batch was abandoned.
    async fn outcome_of<F>(
        &self,
        mut outcome: oneshot::Receiver<ItemOutcome>,
        send: &(impl Fn(Vec<T>) -> F + Send + Sync),
    ) -> Option<ItemOutcome>
    where
        F: Future<Output = Vec<ItemOutcome>> + Send,
    {
        let slot: Result<SemaphorePermit<'_>, AcquireError> = tokio::select! {
            biased;
            known = &mut outcome => return known.ok(),
            slot = self.slots.acquire() => slot,
        };
        // The semaphore is never closed.
        let slot = slot.ok()?;
        loop {
            match outcome.try_recv() {
                Ok(known) => return Some(known),
                Err(TryRecvError::Closed) => return None,
                Err(TryRecvError::Empty) => {}
            }
            let (items, senders) = self.take();
            if items.is_empty() {
                // Another caller has just taken the item.
                break;
            }
            for (sender, known) in senders.into_iter().zip(send(items).await) {
                // The caller may be gone.
                let _ = sender.send(known);
            }
        }
        drop(slot);
        outcome.await.ok()
    }

    fn enter(&self, item: WaitingItem<T>) -> Result<(), BackendError> {
        let mut waiting = self.waiting.lock();
        if waiting.len() >= WAITING_MAX {
            return Err(BackendError::Unavailable("too many calls wait for a batch".into()));
        }
        waiting.push_back(item);
        Ok(())
    }

    /// Takes the next batch. It is empty if nothing waits.
    fn take(&self) -> (Vec<T>, Vec<oneshot::Sender<ItemOutcome>>) {
        let mut waiting = self.waiting.lock();
        let (mut items, mut senders, mut sum) = (Vec::new(), Vec::new(), 0_usize);
        while items.len() < self.bounds.items_max
            && let Some(next) = waiting.front()
            && (items.is_empty() || sum.saturating_add(next.bytes) <= self.bounds.bytes_max)
            && let Some(next) = waiting.pop_front()
        {
            sum = sum.saturating_add(next.bytes);
            items.push(next.item);
            senders.push(next.outcome);
        }
        (items, senders)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::future::join_all;
    use std::future::pending;
    use std::time::Duration;
    use tokio::time::timeout;

    const BOUNDS: BatchBounds = BatchBounds { calls_max: 1, items_max: 3, bytes_max: 100 };

    /// Records each batch. Odd numbers fail.
    async fn recorded(batches: &Mutex<Vec<Vec<u64>>>, batch: Vec<u64>) -> Vec<ItemOutcome> {
        tokio::task::yield_now().await;
        let of = |n: &u64| match n % 2 {
            0 => Ok(()),
            _ => Err(BackendError::Unavailable(n.to_string())),
        };
        let outcomes = batch.iter().map(of).collect();
        batches.lock().push(batch);
        outcomes
    }

    #[tokio::test]
    async fn calls_made_together_share_batches_and_keep_their_outcomes() {
        // (bytes of each item, batches)
        for (bytes, expected) in [
            (1, vec![vec![0], vec![1, 2, 3], vec![4, 5, 6]]),
            (50, vec![vec![0], vec![1, 2], vec![3, 4], vec![5, 6]]),
            (1000, (0..7).map(|n| vec![n]).collect()),
        ] {
            let (coalescer, batches) = (Coalescer::new(BOUNDS), Mutex::default());
            let mut calls = Vec::new();
            for n in 0..7 {
                calls.push(coalescer.call(n, bytes, |batch| recorded(&batches, batch)));
            }
            for (n, outcome) in (0_u64..).zip(join_all(calls).await) {
                let failed = BackendError::Unavailable(n.to_string());
                assert_eq!(outcome, if n % 2 == 0 { Ok(()) } else { Err(failed) });
            }
            assert_eq!(*batches.lock(), expected, "{bytes}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_items_of_an_abandoned_batch_are_sent_again() {
        const SHORT: Duration = Duration::from_millis(1);
        let coalescer = Coalescer::new(BOUNDS);
        let stuck = |_: Vec<u64>| pending::<Vec<ItemOutcome>>();
        let batches = Mutex::default();
        let mut first = Box::pin(coalescer.call(0, 0, stuck));
        assert!(timeout(SHORT, &mut first).await.is_err(), "it sends a batch of its own");
        let mut second = Box::pin(coalescer.call(2, 0, stuck));
        assert!(timeout(SHORT, &mut second).await.is_err(), "it waits");
        let mut third = Box::pin(coalescer.call(4, 0, |batch| recorded(&batches, batch)));
        assert!(timeout(SHORT, &mut third).await.is_err(), "it waits");
        drop(first);
        assert!(timeout(SHORT, &mut second).await.is_err(), "it sends a batch of two");
        drop(second);
        assert_eq!(third.await, Ok(()));
        assert_eq!(*batches.lock(), [[4]]);
    }

    #[tokio::test]
    async fn waiting_items_are_bounded() {
        let coalescer = Coalescer::new(BOUNDS);
        for item in 0..WAITING_MAX {
            let (outcome, _) = oneshot::channel();
            assert_eq!(coalescer.enter(WaitingItem { item, bytes: 0, outcome }), Ok(()));
        }
        let refused = coalescer.call(0, 0, async |_| Vec::new()).await;
        assert!(matches!(refused, Err(BackendError::Unavailable(_))), "{refused:?}");
    }
}
