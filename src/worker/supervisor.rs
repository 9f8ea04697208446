//! A process between the worker and a run, which makes sure that no process of the run is left behind.
//!
//! It is the reaper of everything that the run starts (`PR_SET_CHILD_SUBREAPER`). A process that leaves the
//! session of the run, or loses its parent, becomes its child. When the run ends, when the worker sends
//! SIGTERM, or when the worker dies, it kills its children until none are left. Then it exits with the exit
//! code of the run.
//!
//! It is a fork of the worker that makes system calls and nothing else. A separate program was rejected: the
//! fork needs no second start, and no file that could be missing. The memory of the worker is unmapped in it:
//! otherwise it would keep a copy of each page that the worker changes later.

use nix::errno::Errno;
use nix::libc;
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal, kill, killpg};
use nix::unistd::{ForkResult, Pid, fork, getpid, getppid, setsid};
use std::ptr::null;

/// Pause between two rounds of killing.
static ROUND: libc::timespec = libc::timespec { tv_sec: 0, tv_nsec: 1_000_000 };
/// Most rounds, which take at least 30 s. A process that is alive after that hangs in the kernel and cannot
/// be killed. The job must not wait for it, so process 1 inherits it.
const ROUNDS_MAX: u32 = 30_000;
/// Exit code of a run that could not be killed: the same as that of a killed one.
const KILLED: libc::c_int = 128 + libc::SIGKILL;
/// Number of descriptors that are closed one by one, if the kernel (before 5.9) cannot close all at once.
const DESCRIPTORS_MAX: libc::c_int = 65_536;

/// Splits the calling process, which is a child of `worker` between fork and exec. The caller becomes the
/// supervisor and never returns. Its child returns and becomes the run.
///
/// Only async-signal-safe calls are allowed here, so this code does not allocate, lock or panic. POSIX has
/// removed `fork` from the list of such calls, because it takes locks of the C library. Here these locks are
/// free: the `fork` that created this process took all of them, and released them in the child. `_Fork`,
/// which takes no locks, was rejected because glibc has it only since 2.34.
pub(super) fn split(worker: Pid) -> nix::Result<()> {
    // Ctrl-C in a terminal must reach the worker only, which decides what happens to its runs.
    setsid()?;
    prctl::set_child_subreaper(true)?;
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGCHLD);
    signals.add(Signal::SIGTERM);
    signals.thread_block()?;
    prctl::set_pdeathsig(Signal::SIGTERM)?;
    // The worker may have died before the call above, and then no signal arrives.
    if getppid() != worker {
        return Err(Errno::ESRCH);
    }
    let supervisor = getpid();
    #[expect(unsafe_code, reason = "the run must be a child of the supervisor")]
    // SAFETY: this process has one thread, both sides make system calls only, and no lock of the C library is
    // held.
    match unsafe { fork()? } {
        ForkResult::Parent { child } => supervise(child, &signals),
        ForkResult::Child => {
            signals.thread_unblock()?;
            // A separate session, so that the run can be killed as one group.
            setsid()?;
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            if getppid() == supervisor { Ok(()) } else { Err(Errno::ESRCH) }
        }
    }
}

fn supervise(run: Pid, signals: &SigSet) -> ! {
    let _ = prctl::set_name(c"run-supervisor");
    // They include the sockets and the lock of the worker, the pipes of the run, and the pipe that reports to
    // the worker that the program was started.
    close_all();
    give_memory_back();
    let mut code = None;
    let mut ending = false;
    let mut rounds = 0;
    loop {
        match reap(run, &mut code) {
            Reaped::NobodyLeft => exit(code.unwrap_or(libc::EXIT_FAILURE)),
            Reaped::SomeLeft => {}
        }
        ending |= code.is_some();
        if ending {
            let listed = kill_children(run, code.is_none());
            // Without a list of children, there is nothing more to kill or to wait for after the run.
            if rounds == ROUNDS_MAX || listed == Listed::No && code.is_some() {
                exit(code.unwrap_or(KILLED));
            }
            rounds += 1;
        }
        ending |= wait_for(signals, ending) == Some(Signal::SIGTERM as libc::c_int);
    }
}

enum Reaped {
    NobodyLeft,
    SomeLeft,
}

/// Reaps all children that have ended, and stores the exit code of `run`.
fn reap(run: Pid, code: &mut Option<libc::c_int>) -> Reaped {
    loop {
        let mut status = 0;
        #[expect(unsafe_code, reason = "nix's waitpid reaps, then fails on signals it has no name for")]
        // SAFETY: the status is a live value.
        let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
        if pid == 0 {
            return Reaped::SomeLeft;
        }
        // The only possible error is ECHILD, because WNOHANG is never interrupted.
        if pid < 0 {
            return Reaped::NobodyLeft;
        }
        if pid == run.as_raw() {
            let is_exit = libc::WIFEXITED(status);
            *code = Some(if is_exit { libc::WEXITSTATUS(status) } else { 128 + libc::WTERMSIG(status) });
        }
    }
}

/// Whether the kernel lists children (CONFIG_PROC_CHILDREN) and `/proc` is mounted.
#[derive(PartialEq, Eq)]
enum Listed {
    Yes,
    No,
}

/// Kills every child. The children of these become children of this process, and are killed in the next
/// round.
fn kill_children(run: Pid, is_run_alive: bool) -> Listed {
    if is_run_alive {
        // Also the process group, in case the kernel does not list children. Its id is not reused while `run`
        // exists.
        let _ = killpg(run, Signal::SIGKILL);
        let _ = kill(run, Signal::SIGKILL);
    }
    #[expect(unsafe_code, reason = "the files of std allocate their paths")]
    // SAFETY: the path is NUL-terminated, and the length is that of the buffer.
    unsafe {
        let list = libc::open(c"/proc/thread-self/children".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC);
        if list < 0 {
            return Listed::No;
        }
        let mut buffer = [0_u8; 1024];
        let mut pid: libc::pid_t = 0;
        loop {
            let read = libc::read(list, buffer.as_mut_ptr().cast(), buffer.len());
            let Ok(read @ 1..) = usize::try_from(read) else { break };
            for byte in buffer.iter().take(read) {
                if byte.is_ascii_digit() {
                    pid = pid.wrapping_mul(10).wrapping_add(libc::pid_t::from(byte - b'0'));
                } else if pid > 0 {
                    // It is our child, because its id is not reused until it is reaped.
                    libc::kill(pid, libc::SIGKILL);
                    pid = 0;
                }
            }
        }
        libc::close(list);
    }
    Listed::Yes
}

/// Waits for the next blocked signal. With `for_a_round`, returns `None` if none arrives within a round.
fn wait_for(signals: &SigSet, for_a_round: bool) -> Option<libc::c_int> {
    let timeout = if for_a_round { &raw const ROUND } else { null() };
    #[expect(unsafe_code, reason = "nix has no sigtimedwait")]
    // SAFETY: the set and the time are live values, and no information is asked for.
    let signal = unsafe { libc::sigtimedwait(signals.as_ref(), std::ptr::null_mut(), timeout) };
    (signal > 0).then_some(signal)
}

#[expect(unsafe_code, reason = "all descriptors must be closed, whatever owns them in the worker")]
fn close_all() {
    // SAFETY: this copy of the process uses none of them from here on.
    unsafe {
        if libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0) != 0 {
            for descriptor in 0..DESCRIPTORS_MAX {
                libc::close(descriptor);
            }
        }
    }
}

/// One line of `/proc/self/maps`, as far as it was read.
#[derive(Clone, Copy, Default)]
struct Mapping {
    start: usize,
    end: usize,
    /// Of `rwxp`: whether it is writable, and private.
    is_writable: bool,
    is_private: bool,
    /// Whether it is a file: its inode is not 0.
    is_file: bool,
}

/// Unmaps all memory that this process does not need: everything writable but the stack, the variables of
/// this thread, and those of the programs.
#[expect(unsafe_code, reason = "no owner of this memory runs in this process")]
fn give_memory_back() {
    // SAFETY: `mapping` is private memory, and neither the stack nor the variables of this thread. Those of
    // the program and its libraries are files, or follow a file directly (`.bss`). So it holds only the heap
    // and the stacks of threads that this process does not have. Nothing after the call refers to them.
    unsafe {
        let mut buffer = [0_u8; 4096];
        let needed = [buffer.as_ptr().addr(), libc::__errno_location().addr()];
        let maps = libc::open(c"/proc/self/maps".as_ptr(), libc::O_RDONLY | libc::O_CLOEXEC);
        if maps < 0 {
            return;
        }
        let (mut before, mut mapping, mut field) = (Mapping::default(), Mapping::default(), 0_u32);
        loop {
            let read = libc::read(maps, buffer.as_mut_ptr().cast(), buffer.len());
            let Ok(read @ 1..) = usize::try_from(read) else { break };
            for byte in buffer.iter().take(read) {
                let digit = (*byte as char).to_digit(16).unwrap_or(0) as usize;
                match (field, *byte) {
                    (_, b'\n') => {
                        let Mapping { start, end, is_writable, is_private, is_file } = mapping;
                        let is_bss = before.is_file && before.end == start;
                        let is_needed = needed.iter().any(|address| (start..end).contains(address));
                        if is_writable && is_private && !is_file && !is_bss && !is_needed {
                            libc::munmap(start as *mut libc::c_void, end.wrapping_sub(start));
                        }
                        (before, mapping, field) = (mapping, Mapping::default(), 0);
                    }
                    (0, b'-') => field = 1,
                    (0, _) => mapping.start = mapping.start << 4 | digit,
                    (1..=4, b' ') => field += 1,
                    (1, _) => mapping.end = mapping.end << 4 | digit,
                    (2, b'w') => mapping.is_writable = true,
                    (2, b'p') => mapping.is_private = true,
                    // After the offset and the device.
                    (5, b'1'..=b'9') => mapping.is_file = true,
                    (5, b' ') => field = 6,
                    _ => {}
                }
            }
        }
        libc::close(maps);
    }
}

#[expect(unsafe_code, reason = "std's exit would run the exit handlers of the worker")]
fn exit(code: libc::c_int) -> ! {
    // SAFETY: it ends this process, and touches nothing.
    unsafe { libc::_exit(code) }
}
