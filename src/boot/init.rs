//! `dev` as process 1 of a container.
//!
//! Orphaned processes become children of process 1, which must reap them. A server must not do that itself,
//! because `waitpid(-1)` would also reap the children that its own modules wait for. So process 1 starts the
//! program again as a child, reaps, and forwards signals.

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Signals that process 1 forwards to the server.
const PASSED_ON: [Signal; 6] =
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGUSR1, Signal::SIGUSR2];

/// In process 1, runs the program as a child and returns its exit code when it has ended. In any other
/// process, returns `None` immediately. Must be called before the first thread starts.
///
/// # Errors
/// If the child cannot be started.
pub fn run_beneath_init() -> Option<std::io::Result<u8>> {
    if std::process::id() == 1 {
        return Some(run_child());
    }
    // This process may be that child, which inherits the mask. The call fails only for an invalid mask.
    let _ = signals().thread_unblock();
    None
}

/// Signals that process 1 waits for.
fn signals() -> SigSet {
    let mut signals = SigSet::from_iter(PASSED_ON);
    signals.add(Signal::SIGCHLD);
    signals
}

fn run_child() -> std::io::Result<u8> {
    // Block before the child starts, so that no signal is missed: the kernel drops signals that process 1
    // neither handles nor blocks. The child inherits the mask, and unblocks them.
    let signals = signals();
    signals.thread_block()?;
    let mut arguments = std::env::args_os();
    let mut command = Command::new("/proc/self/exe");
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    // A separate process group: Ctrl-C reaches process 1, which forwards it. It must not arrive twice.
    let child = command.args(arguments).process_group(0).spawn()?;
    let server = Pid::from_raw(child.id().cast_signed());
    loop {
        match signals.wait() {
            Ok(Signal::SIGCHLD) => {
                if let Some(code) = reap(server) {
                    return Ok(code);
                }
            }
            // This fails only if the server has ended, and then SIGCHLD follows.
            Ok(signal) => {
                let _ = kill(server, signal);
            }
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Reaps all children that have ended. Returns the exit code of the server if it is one of them.
fn reap(server: Pid) -> Option<u8> {
    loop {
        let code = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) if pid == server => code,
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == server => 128 + signal as i32,
            Ok(WaitStatus::StillAlive) => return None,
            // No child is left, so the server has ended as well, by a signal that nix does not know.
            Err(Errno::ECHILD) => i32::from(u8::MAX),
            // EINVAL: a child was reaped that such a signal has ended.
            Ok(_) | Err(_) => continue,
        };
        return Some(u8::try_from(code).unwrap_or(u8::MAX));
    }
}
