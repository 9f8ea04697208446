//! What is in the pool of warm processes, and which of them go first.

use super::handler_process::HandlerProcess;
use super::instance::Instance;
use crate::backoff::Backoff;
use crate::config::WarmConf;
use crate::metrics::WarmEnd;
use crate::model::Runtime;
use std::collections::VecDeque;
use std::time::Duration;
use tokio::time::Instant;

/// Most kinds of interpreters that are kept ready. Most functions share one or two.
const KINDS_MAX: usize = 16;
/// What an interpreter that waits counts as, in MiB. It has less.
pub(super) const READY_MB: u64 = 32;
/// The pauses after interpreters that did not start.
const RETRIES: Backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(60));

/// Interpreters of one kind are interchangeable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct WarmKind {
    pub(super) runtime: Runtime,
    /// See [`super::runtime::InstalledRuntime::heap_mb`].
    pub(super) heap_mb: Option<u64>,
}

#[derive(Default)]
pub(super) struct PoolState {
    pub(super) shelves: Vec<Shelf>,
    /// The least recently used one first.
    pub(super) handlers: VecDeque<IdleHandler>,
    /// Processes that serve a run, by [`Runtime`].
    pub(super) busy: [usize; Runtime::ALL.len()],
    /// The worker stops, and keeps no process.
    pub(super) is_closed: bool,
}

/// The interpreters of one kind.
pub(super) struct Shelf {
    pub(super) kind: WarmKind,
    /// The oldest first: it has started for certain.
    pub(super) ready: VecDeque<Instance>,
    pub(super) starting: usize,
    pub(super) used_at: Instant,
    /// Consecutive starts that failed, and when to try again.
    pub(super) failures: u32,
    pub(super) retry_at: Instant,
}

pub(super) struct IdleHandler {
    pub(super) process: HandlerProcess,
    pub(super) runtime: Runtime,
    pub(super) since: Instant,
}

/// What leaves the pool. It is ended when the lock is released.
#[derive(Default)]
pub(super) struct LeavingProcesses {
    pub(super) handlers: Vec<(HandlerProcess, WarmEnd)>,
    pub(super) ready: Vec<(Instance, WarmEnd)>,
}

impl LeavingProcesses {
    pub(super) fn is_empty(&self) -> bool {
        self.handlers.is_empty() && self.ready.is_empty()
    }
}

impl PoolState {
    /// The shelf of a kind. Takes the place of the least recently used one, if there are too many.
    pub(super) fn shelf(&mut self, kind: WarmKind, leaving: &mut LeavingProcesses) -> &mut Shelf {
        let at = self.shelves.iter().position(|shelf| shelf.kind == kind).unwrap_or_else(|| {
            if self.shelves.len() == KINDS_MAX {
                let oldest = self.shelves.iter().enumerate().min_by_key(|(_, shelf)| shelf.used_at);
                let oldest = oldest.map_or(0, |(at, _)| at);
                let shelf = self.shelves.swap_remove(oldest);
                leaving.ready.extend(shelf.ready.into_iter().map(|instance| (instance, WarmEnd::Full)));
            }
            let now = Instant::now();
            let (ready, starting, failures) = (VecDeque::new(), 0, 0);
            self.shelves.push(Shelf { kind, ready, starting, used_at: now, failures, retry_at: now });
            self.shelves.len() - 1
        });
        &mut self.shelves[at]
    }

    pub(super) fn count(&self) -> usize {
        self.handlers.len() + self.shelves.iter().map(|shelf| shelf.ready.len()).sum::<usize>()
    }

    pub(super) fn starting(&self) -> usize {
        self.shelves.iter().map(|shelf| shelf.starting).sum()
    }

    pub(super) fn count_of(&self, function: &str) -> usize {
        self.handlers.iter().filter(|idle| idle.process.version().function() == function).count()
    }

    pub(super) fn remove_oldest_of(&mut self, function: &str) -> Option<IdleHandler> {
        let at = self.handlers.iter().position(|idle| idle.process.version().function() == function)?;
        self.handlers.remove(at)
    }

    /// What the idle processes may use, in MiB.
    pub(super) fn idle_mb(&self) -> u64 {
        let ready = self.shelves.iter().map(|shelf| shelf.ready.len() as u64 * READY_MB).sum::<u64>();
        let handlers = self.handlers.iter().map(|idle| idle.process.version().memory_mb);
        handlers.fold(ready, u64::saturating_add)
    }

    /// Takes out the least recently used processes until the bounds hold. Interpreters go last: they are
    /// small, and serve any function.
    pub(super) fn bound(&mut self, total_max: usize, memory_mb: u64, leaving: &mut LeavingProcesses) {
        loop {
            let reason = if self.idle_mb() > memory_mb {
                WarmEnd::Memory
            } else if self.count() > total_max {
                WarmEnd::Full
            } else {
                return;
            };
            if let Some(idle) = self.handlers.pop_front() {
                leaving.handlers.push((idle.process, reason));
                continue;
            }
            let used = self.shelves.iter_mut().filter(|shelf| !shelf.ready.is_empty());
            let oldest = used.min_by_key(|shelf| shelf.used_at);
            let Some(instance) = oldest.and_then(|shelf| shelf.ready.pop_back()) else { return };
            leaving.ready.push((instance, reason));
        }
    }

    pub(super) fn end_dead(&mut self, leaving: &mut LeavingProcesses) {
        for at in (0..self.handlers.len()).rev() {
            if !self.handlers[at].process.is_quiet()
                && let Some(idle) = self.handlers.remove(at)
            {
                leaving.handlers.push((idle.process, WarmEnd::Failed));
            }
        }
        for shelf in &mut self.shelves {
            for at in (0..shelf.ready.len()).rev() {
                if !shelf.ready[at].is_quiet()
                    && let Some(instance) = shelf.ready.remove(at)
                {
                    leaving.ready.push((instance, WarmEnd::Failed));
                    // If they die while they wait, others would too.
                    shelf.failed();
                }
            }
        }
    }

    pub(super) fn end_old(&mut self, warm: &WarmConf, leaving: &mut LeavingProcesses) {
        let idle_max = Duration::from_secs(warm.idle_s);
        let mut at = 0;
        while let Some(idle) = self.handlers.get(at).filter(|idle| idle.since.elapsed() >= idle_max) {
            if self.count_of(idle.process.version().function()) <= warm.function_min {
                at += 1;
            } else if let Some(idle) = self.handlers.remove(at) {
                leaving.handlers.push((idle.process, WarmEnd::Idle));
            }
        }
        for shelf in &mut self.shelves {
            let is_unused = shelf.used_at.elapsed() >= idle_max;
            let kept = if is_unused { 0 } else { warm.interpreters.min(shelf.ready.len()) };
            let reason = if is_unused { WarmEnd::Idle } else { WarmEnd::Full };
            leaving.ready.extend(shelf.ready.drain(kept..).map(|instance| (instance, reason)));
        }
        self.shelves.retain(|shelf| shelf.starting > 0 || shelf.used_at.elapsed() < idle_max);
    }
}

impl Shelf {
    pub(super) fn failed(&mut self) {
        self.failures = self.failures.saturating_add(1);
        self.retry_at = Instant::now() + RETRIES.pause(self.failures);
    }
}
