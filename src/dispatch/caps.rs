//! Caps the jobs in flight per function and per API key.
//!
//! Only holders with a cap are counted, so all others cost nothing. A slot is held from admission until a
//! result is taken or the job is abandoned. Jobs taken over by a restart or an adoption hold no slot, because
//! they were admitted before.

use crate::model::FunctionId;
use ahash::RandomState;
use dashmap::DashMap;
use std::sync::Arc;

/// The function or key whose jobs are counted together.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum CapKey {
    Function(FunctionId),
    /// The name of an API key.
    Key(Arc<str>),
}

/// The number of slots per holder. Has one entry per holder with a job in flight.
#[derive(Clone, Default)]
pub struct ConcurrencyCaps(Arc<DashMap<CapKey, usize, RandomState>>);

/// One job of a holder; Drop returns the slot.
pub struct Permit {
    of: ConcurrencyCaps,
    holder: CapKey,
}

impl ConcurrencyCaps {
    /// Returns `None` if the holder has `max` slots already.
    pub fn take(&self, holder: CapKey, max: usize) -> Option<Permit> {
        let mut count = self.0.entry(holder.clone()).or_default();
        if *count >= max {
            return None;
        }
        *count += 1;
        drop(count);
        Some(Permit { of: self.clone(), holder })
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.of.0.remove_if_mut(&self.holder, |_, count| {
            *count -= 1;
            *count == 0
        });
    }
}

/// There are as many jobs in flight as there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TooManyJobs {
    OfKey { max: usize },
    OfFunction { max: usize },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_counted_by_holder_and_returned() {
        let slots = ConcurrencyCaps::default();
        let function = || CapKey::Function(FunctionId::parse("a").unwrap());
        let key = || CapKey::Key("a".into());
        let (one, two) = (slots.take(function(), 2).unwrap(), slots.take(function(), 2).unwrap());
        assert!(slots.take(function(), 2).is_none());
        let other = slots.take(key(), 1).unwrap();
        drop(one);
        let three = slots.take(function(), 2).unwrap();
        assert!(slots.take(function(), 1).is_none(), "a lowered cap applies immediately");
        drop((two, three, other));
        assert!(slots.0.is_empty());
    }
}
