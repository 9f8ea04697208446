//! Caps on jobs in flight, by function and by key.
//!
//! Only what has a cap is counted, so the rest costs nothing. A slot is held from admission until a result is taken or the job is
//! given up. Jobs that a restart or an adoption brings along hold none: they were admitted before.

use crate::model::FunctionId;
use ahash::RandomState;
use dashmap::DashMap;
use std::sync::Arc;

/// Whose jobs are counted together.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Holder {
    Function(FunctionId),
    /// The name of a key.
    Key(Arc<str>),
}

/// Those who hold slots, and how many: as many entries as there are holders with a job in flight.
#[derive(Clone, Default)]
pub struct Slots(Arc<DashMap<Holder, usize, RandomState>>);

/// A place among the jobs of its holder; free again when dropped.
pub struct Slot {
    of: Slots,
    holder: Holder,
}

impl Slots {
    /// `None`: the holder has `max` already.
    pub fn take(&self, holder: Holder, max: usize) -> Option<Slot> {
        let mut count = self.0.entry(holder.clone()).or_default();
        if *count >= max {
            return None;
        }
        *count += 1;
        drop(count);
        Some(Slot { of: self.clone(), holder })
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.of.0.remove_if_mut(&self.holder, |_, count| {
            *count -= 1;
            *count == 0
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_counted_by_holder_and_given_back() {
        let slots = Slots::default();
        let function = || Holder::Function(FunctionId::parse("a").unwrap());
        let key = || Holder::Key("a".into());
        let (one, two) = (slots.take(function(), 2).unwrap(), slots.take(function(), 2).unwrap());
        assert!(slots.take(function(), 2).is_none());
        let other = slots.take(key(), 1).unwrap();
        drop(one);
        let three = slots.take(function(), 2).unwrap();
        assert!(slots.take(function(), 1).is_none(), "a cap that was lowered counts at once");
        drop((two, three, other));
        assert!(slots.0.is_empty());
    }
}
