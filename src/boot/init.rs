//! `dev` as the first process of a container.
//!
//! The kernel gives every process that has lost its parent to process 1, which must reap it. A server must
//! not do that itself: `waitpid(-1)` would take the children that its own parts wait for. So process 1 starts
//! the program once more, reaps, and passes signals on.

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// What asks a server for something.
const PASSED_ON: [Signal; 6] =
    [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP, Signal::SIGQUIT, Signal::SIGUSR1, Signal::SIGUSR2];

/// In process 1: runs the program as a child and returns its exit code when it has ended. In any other:
/// `None`, at once. Must be called before the first thread is started.
///
/// # Errors
/// If the child cannot be started.
pub fn run_beneath_init() -> Option<std::io::Result<u8>> {
    if std::process::id() == 1 {
        return Some(run_child());
    }
    // It may be that child, which has the mask of its parent. It fails only for a mask that is none.
    let _ = signals().thread_unblock();
    None
}

/// Those that process 1 waits for.
fn signals() -> SigSet {
    let mut signals = SigSet::from_iter(PASSED_ON);
    signals.add(Signal::SIGCHLD);
    signals
}

fn run_child() -> std::io::Result<u8> {
    // Before the child is there, so that no signal is missed. The kernel drops what process 1 neither handles
    // nor blocks. The child inherits that, and undoes it.
    let signals = signals();
    signals.thread_block()?;
    let mut arguments = std::env::args_os();
    let mut command = Command::new("/proc/self/exe");
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    // A group of its own: a terminal's ^C reaches process 1, and must not reach the server twice.
    let child = command.args(arguments).process_group(0).spawn()?;
    let server = Pid::from_raw(child.id().cast_signed());
    loop {
        match signals.wait() {
            Ok(Signal::SIGCHLD) => {
                if let Some(code) = reap(server) {
                    return Ok(code);
                }
            }
            // It fails only if the server has ended, and then SIGCHLD comes.
            Ok(signal) => {
                let _ = kill(server, signal);
            }
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Reaps all that have ended; the exit code of the server if it is one of them.
fn reap(server: Pid) -> Option<u8> {
    loop {
        let code = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) if pid == server => code,
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == server => 128 + signal as i32,
            Ok(WaitStatus::StillAlive) => return None,
            // Nobody is left, so the server has ended, too, by a signal that nix has no name for.
            Err(Errno::ECHILD) => i32::from(u8::MAX),
            // EINVAL: reaped, and ended by such a signal.
            Ok(_) | Err(_) => continue,
        };
        return Some(u8::try_from(code).unwrap_or(u8::MAX));
    }
}
