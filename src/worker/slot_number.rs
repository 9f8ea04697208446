//! The numbers of the places in which instances run. They make the user ids and directories of instances that
//! live at the same time different.

use parking_lot::Mutex;
use std::collections::BTreeSet;
use std::sync::Arc;
use tokio::sync::Notify;

/// Most instances that live at the same time: runs, processes that wait for one, and those that end.
pub const SLOTS_MAX: u32 = 4_096;

/// Hands out numbers. Clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct SlotNumbers(Arc<UsedSlots>);

#[derive(Debug, Default)]
struct UsedSlots {
    numbers: Mutex<BTreeSet<u32>>,
    freed: Notify,
}

/// A number in use. It is freed on drop.
#[derive(Debug)]
pub(super) struct SlotNumber {
    number: u32,
    used: Arc<UsedSlots>,
}

impl SlotNumbers {
    /// The lowest free number. `None`: all are in use.
    pub(super) fn take(&self) -> Option<SlotNumber> {
        let mut numbers = self.0.numbers.lock();
        let number = (0..SLOTS_MAX).find(|number| !numbers.contains(number))?;
        numbers.insert(number);
        Some(SlotNumber { number, used: Arc::clone(&self.0) })
    }

    /// Waits until no number is in use. For one caller at a time.
    pub(super) async fn all_free(&self) {
        while !self.0.numbers.lock().is_empty() {
            self.0.freed.notified().await;
        }
    }
}

impl SlotNumber {
    pub(super) fn get(&self) -> u32 {
        self.number
    }
}

impl Drop for SlotNumber {
    fn drop(&mut self) {
        self.used.numbers.lock().remove(&self.number);
        // It is kept until the next wait.
        self.used.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_lowest_free_number_is_used() {
        let numbers = SlotNumbers::default();
        let taken: Vec<SlotNumber> = (0..3).filter_map(|_| numbers.take()).collect();
        assert_eq!(taken.iter().map(SlotNumber::get).collect::<Vec<_>>(), [0, 1, 2]);
        let mut taken = taken.into_iter();
        drop(taken.next());
        assert_eq!(numbers.take().map(|slot| slot.get()), Some(0));
        let wait = numbers.all_free();
        tokio::pin!(wait);
        assert!(futures_util::poll!(&mut wait).is_pending());
        drop(taken);
        wait.await;
    }

    #[test]
    fn numbers_are_bounded() {
        let numbers = SlotNumbers::default();
        let taken: Vec<SlotNumber> = (0..SLOTS_MAX).filter_map(|_| numbers.take()).collect();
        assert_eq!(taken.len(), SLOTS_MAX as usize);
        assert!(numbers.take().is_none());
        drop(taken);
        assert!(numbers.take().is_some());
    }
}
