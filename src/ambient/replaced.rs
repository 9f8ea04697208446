//! The surroundings of a simulation. They are set for one thread, while a simulation runs there.

use rand::RngCore;
use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::task::AbortHandle;

/// How long after its effect work on the disk is answered, and how long a sync takes.
pub const SYNC_TAKES: Duration = Duration::from_millis(1);

/// A simulated process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ProcessNumber(pub usize);

/// A write to a disk, which may fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum DiskStep {
    Create,
    Write,
    Sync,
    Truncate,
    Remove,
}

/// What the simulation provides in place of the operating system.
pub trait Surroundings {
    /// The time of day on the clock of a process; without a process, the true time.
    fn unix_time(&self, process: Option<ProcessNumber>) -> Duration;
    fn next_u64(&self) -> u64;
    /// How long work on the disk takes.
    fn blocking_time(&self) -> Duration;
    /// A process has started a task, which ends with it.
    fn started(&self, process: ProcessNumber, task: AbortHandle);
    /// Whether the process is paused. If so, wakes the task when it continues.
    fn is_stopped(&self, process: ProcessNumber, task: &Waker) -> bool;
    /// The part of a write that is done before it fails, in thousandths. `None`: it does not fail.
    fn disk_fault(&self, process: ProcessNumber, step: DiskStep) -> Option<u64>;
    /// The file with this inode is on the disk up to its length.
    fn synced(&self, inode: u64, len: u64);
}

thread_local! {
    static SURROUNDINGS: RefCell<Option<Rc<dyn Surroundings>>> = const { RefCell::new(None) };
    static CURRENT: Cell<Option<ProcessNumber>> = const { Cell::new(None) };
}

/// Replaces the surroundings of this thread until the guard is dropped.
pub fn replace(surroundings: Rc<dyn Surroundings>) -> Replacement {
    SURROUNDINGS.set(Some(surroundings));
    Replacement
}

pub struct Replacement;

impl Drop for Replacement {
    fn drop(&mut self) {
        SURROUNDINGS.set(None);
    }
}

pub fn with<T>(ask: impl FnOnce(&dyn Surroundings) -> T) -> Option<T> {
    let surroundings = SURROUNDINGS.with_borrow(Clone::clone)?;
    Some(ask(surroundings.as_ref()))
}

pub fn current() -> Option<ProcessNumber> {
    CURRENT.get()
}

/// The process to which new tasks belong. `None`: no simulation runs here, or its driver is running.
pub fn scope() -> Option<Scope> {
    current().map(Scope)
}

#[derive(Clone, Copy)]
pub struct Scope(pub ProcessNumber);

impl Scope {
    /// The future as a part of this process.
    pub fn of<F: Future>(self, task: F) -> Scoped<F> {
        Scoped { process: Some(self.0), task: Box::pin(task) }
    }

    pub fn started(self, task: AbortHandle) {
        let _ = with(|surroundings| surroundings.started(self.0, task));
    }
}

/// The future as a part of the current process, if there is one.
pub fn maybe_scoped<F: Future>(task: F) -> Scoped<F> {
    Scoped { process: current(), task: Box::pin(task) }
}

/// A future that knows its process while it is polled, and is not polled while that is stopped.
pub struct Scoped<F> {
    process: Option<ProcessNumber>,
    task: Pin<Box<F>>,
}

impl<F: Future> Future for Scoped<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let Some(process) = self.process else { return self.task.as_mut().poll(context) };
        if with(|surroundings| surroundings.is_stopped(process, context.waker())) == Some(true) {
            return Poll::Pending;
        }
        let before = CURRENT.replace(Some(process));
        let polled = self.task.as_mut().poll(context);
        CURRENT.set(before);
        polled
    }
}

/// Random numbers of the simulation, or, without one, of the operating system.
pub struct Numbers;

impl RngCore for Numbers {
    fn next_u32(&mut self) -> u32 {
        (self.next_u64() >> 32) as u32
    }

    fn next_u64(&mut self) -> u64 {
        with(|surroundings| surroundings.next_u64()).unwrap_or_else(|| rand::rng().next_u64())
    }

    fn fill_bytes(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next_u64().to_le_bytes()[..chunk.len()]);
        }
    }
}
