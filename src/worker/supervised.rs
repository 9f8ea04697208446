//! A child process and its supervisor, which ends all that the child starts; see [`supervisor`].
//!
//! `tokio::process` was rejected because it reaps the child itself. Then the resource usage (`wait4`) is
//! lost, and a signal to the process id may reach another process that reuses the id.
//!
//! A descriptor of the process (pidfd) tells when it has ended. A thread that waits was rejected: processes
//! that wait for a job would occupy most of the threads that may block.

use super::sandbox::{ChildSetup, lower};
use super::supervisor;
use super::tree::peak_memory_bytes;
use nix::errno::Errno;
use nix::libc;
use nix::sys::prctl;
use nix::sys::resource::Resource;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{ChildStderr, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;

/// Most open files of each process of a run.
const OPEN_FILES_MAX: u64 = 1_024;
/// Value for `/proc/self/oom_score_adj`. If the machine runs out of memory, the kernel kills a run and not
/// the gateway.
const OOM_SCORE: &[u8] = b"1000";

/// A supervised process. It is killed on drop, but only [`Self::exit`] reaps it.
#[derive(Debug)]
pub(super) struct SupervisedChild {
    supervisor: Pid,
    watch: ExitWatch,
    /// Once the supervisor is reaped, its process id may be reused, so no signal may be sent any more.
    exit: Option<ChildExit>,
}

/// What tells when the supervisor has ended. It does not reap it.
#[derive(Debug)]
enum ExitWatch {
    Descriptor(AsyncFd<OwnedFd>),
    /// Before Linux 5.3.
    Thread(JoinHandle<()>),
}

/// How a supervised process ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct ChildExit {
    /// Exit code of the program, or 128 + the signal that killed it.
    pub(super) code: i32,
    /// CPU time of the program, and of all processes that it has left or waited for.
    pub(super) cpu_time: Duration,
    max_rss_bytes: u64,
}

/// The pipes of a process, in the order stdout, stderr.
type StandardPipes = (Option<ChildStdout>, Option<ChildStderr>);

impl SupervisedChild {
    /// Starts the command, with pipes for stdout and stderr. Blocks until it is executed: some milliseconds.
    ///
    /// The process is killed when the *thread* that starts it exits (`PR_SET_PDEATHSIG`). So this must be
    /// called on a thread that lives as long as the runtime: in a task, never in `spawn_blocking`, whose
    /// threads exit after ten idle seconds.
    ///
    /// `data_bytes_max` is a backstop: the most private memory that one process may request, whether it is
    /// used or not.
    pub(super) fn spawn(
        mut command: Command,
        setup: ChildSetup,
        data_bytes_max: Option<u64>,
    ) -> io::Result<(Self, StandardPipes)> {
        let parent = Pid::this();
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        // SAFETY: all three run between fork and exec, where only async-signal-safe calls are allowed: they
        // make system calls and nothing else, and neither allocate nor lock.
        #[expect(unsafe_code, reason = "limits must be set between fork and exec")]
        unsafe {
            command.pre_exec(move || {
                supervisor::split(parent)?;
                confine(data_bytes_max)?;
                setup.apply()
            })
        };
        let mut child = command.spawn()?;
        // It owns what the child inherits. Our copies would hide that the child has closed its own.
        drop(command);
        let supervisor = Pid::from_raw(child.id().cast_signed());
        let this = Self { supervisor, watch: ExitWatch::new(supervisor), exit: None };
        Ok((this, (child.stdout.take(), child.stderr.take())))
    }

    /// The process whose descendants are the program and all that it starts.
    pub(super) fn supervisor(&self) -> Pid {
        self.supervisor
    }

    /// Asks the supervisor to kill everything.
    pub(super) fn kill(&self) {
        if self.exit.is_none() {
            // This fails only if the supervisor has ended.
            let _ = kill(self.supervisor, Signal::SIGTERM);
        }
    }

    /// Waits until the program and all processes that it has left have ended. Cancel safe.
    pub(super) async fn exit(&mut self) -> io::Result<ChildExit> {
        loop {
            if let Some(exit) = self.exit {
                return Ok(exit);
            }
            let reaped = match &mut self.watch {
                ExitWatch::Descriptor(descriptor) => {
                    let mut ready = descriptor.readable().await?;
                    let reaped = reap(self.supervisor);
                    if matches!(reaped, Ok(None)) {
                        ready.clear_ready();
                    }
                    reaped
                }
                ExitWatch::Thread(thread) => {
                    let _ = thread.await;
                    let reaped = reap(self.supervisor);
                    reaped.and_then(|exit| exit.ok_or_else(|| Errno::ECHILD.into()).map(Some))
                }
            };
            match reaped {
                Ok(exit) => self.exit = exit,
                // There is no such child, so its process id must not be used either.
                Err(e) => {
                    self.exit = Some(ChildExit::UNKNOWN);
                    return Err(e);
                }
            }
        }
    }
}

impl Drop for SupervisedChild {
    fn drop(&mut self) {
        self.kill();
    }
}

impl ExitWatch {
    fn new(pid: Pid) -> Self {
        match watched_descriptor(pid) {
            Ok(descriptor) => Self::Descriptor(descriptor),
            Err(_) => Self::Thread(tokio::task::spawn_blocking(move || {
                let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
                while waitid(Id::Pid(pid), look) == Err(Errno::EINTR) {}
            })),
        }
    }
}

/// Opens a descriptor that is readable once the process has ended. It is closed on exec.
fn watched_descriptor(pid: Pid) -> io::Result<AsyncFd<OwnedFd>> {
    #[expect(unsafe_code, reason = "nix has no pidfd_open, and tokio has no safe way to watch a descriptor")]
    // SAFETY: the call takes two numbers. What it returns is a new descriptor, which nobody else owns, and
    // which stays open as long as it is watched.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0);
        let fd = RawFd::try_from(fd).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)?;
        let descriptor = OwnedFd::from_raw_fd(fd);
        Ok(AsyncFd::register_with_interest(descriptor, Interest::READABLE)?)
    }
}

/// Sets the limits in the child. The number of processes is not limited here, because `RLIMIT_NPROC` counts
/// all processes of the user, including the gateway. Nor is the address space, because the stack of a thread
/// takes 8 MiB of it without using memory.
fn confine(data_bytes_max: Option<u64>) -> io::Result<()> {
    prctl::set_no_new_privs()?;
    prefer_for_oom();
    // With 0 the kernel would still start a program of `core_pattern`, as root. With 1 it does not.
    lower(Resource::RLIMIT_CORE, 1)?;
    lower(Resource::RLIMIT_NOFILE, OPEN_FILES_MAX)?;
    if let Some(bytes) = data_bytes_max {
        lower(Resource::RLIMIT_DATA, bytes)?;
    }
    Ok(())
}

/// Makes the kernel prefer the run when it runs out of memory. Best effort.
#[expect(unsafe_code, reason = "the files of std allocate their paths")]
fn prefer_for_oom() {
    // SAFETY: the path is NUL-terminated, and the length is that of the score.
    unsafe {
        let file = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        if file >= 0 {
            libc::write(file, OOM_SCORE.as_ptr().cast(), OOM_SCORE.len());
            libc::close(file);
        }
    }
}

/// Reaps the process if it has ended. Never blocks.
fn reap(pid: Pid) -> io::Result<Option<ChildExit>> {
    let mut status = 0;
    #[expect(unsafe_code, reason = "no safe wrapper of wait4 returns the resource usage")]
    // SAFETY: `rusage` is a C struct of integers, for which zeros are a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    loop {
        #[expect(unsafe_code, reason = "no safe wrapper of wait4 returns the resource usage")]
        // SAFETY: both pointers are to live values of the types that wait4 writes.
        let waited = unsafe { libc::wait4(pid.as_raw(), &raw mut status, libc::WNOHANG, &raw mut usage) };
        if waited == 0 {
            return Ok(None);
        }
        if waited == pid.as_raw() {
            return Ok(Some(ChildExit::of(ExitStatus::from_raw(status), &usage)));
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

impl ChildExit {
    const UNKNOWN: Self = Self { code: -1, cpu_time: Duration::ZERO, max_rss_bytes: 0 };

    fn of(status: ExitStatus, usage: &libc::rusage) -> Self {
        let time = |time: libc::timeval| {
            let seconds = Duration::from_secs(u64::try_from(time.tv_sec).unwrap_or(0));
            seconds + Duration::from_micros(u64::try_from(time.tv_usec).unwrap_or(0))
        };
        Self {
            code: status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(-1),
            cpu_time: time(usage.ru_utime) + time(usage.ru_stime),
            // Linux reports KiB.
            max_rss_bytes: u64::try_from(usage.ru_maxrss).unwrap_or(0) * 1024,
        }
    }

    /// Peak memory of the supervisor and of the children that it reaped, if it is above the peak of this
    /// process. The supervisor is a fork of this process, and Linux keeps the peak across fork and exec. So a
    /// lower value may not be that of the run, and only the samples count.
    pub(super) fn peak_above_ours(&self) -> Option<u64> {
        let ours = peak_memory_bytes(Pid::this())?;
        (self.max_rss_bytes > ours).then_some(self.max_rss_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::super::sandbox::{Fence, Sandbox, SandboxSettings, View};
    use super::*;
    use crate::config::{Network, SandboxMode};
    use std::collections::BTreeMap;
    use std::ffi::OsString;
    use std::io::Read;
    use std::path::Path;

    /// Starts a shell script without a sandbox.
    async fn start(dir: &Path, script: &str) -> (SupervisedChild, StandardPipes, Fence) {
        let settings = SandboxSettings {
            mode: SandboxMode::Off,
            network: Network::Full,
            work_mb_max: 16,
            uid_first: 100_000,
            runs_dir: dir.to_owned(),
            hidden_dirs: Vec::new(),
        };
        let sandbox = Sandbox::probe(&settings).await.unwrap();
        let view = View { slot: 0, function_dir: dir, tmp_dir: dir, memory_mb: 64, network: Network::Full };
        let program = ["/bin/sh", "-c", script].map(OsString::from);
        let enclosed = sandbox.enclose(&view, &program, &BTreeMap::new(), None).unwrap();
        let (child, pipes) = SupervisedChild::spawn(enclosed.command, enclosed.setup, None).unwrap();
        (child, pipes, enclosed.fence)
    }

    async fn exit_code(child: &mut SupervisedChild) -> i32 {
        let exit = tokio::time::timeout(Duration::from_secs(30), child.exit());
        exit.await.expect("it ends in time").unwrap().code
    }

    #[tokio::test]
    async fn the_exit_of_a_program_is_reported_again_and_again() {
        let scratch = tempfile::tempdir().unwrap();
        for (script, code) in [("exit 3", 3), ("kill -9 $$", 137), ("sleep 600 & echo left", 0)] {
            let (mut child, (stdout, _stderr), _fence) = start(scratch.path(), script).await;
            assert_eq!(exit_code(&mut child).await, code, "{script}");
            assert_eq!(exit_code(&mut child).await, code, "{script}");
            // The process that it left has ended as well: otherwise this would not end.
            let mut text = String::new();
            stdout.unwrap().read_to_string(&mut text).unwrap();
            assert_eq!(!text.is_empty(), code == 0, "{script}");
            assert!(reap(child.supervisor()).is_err(), "it is reaped");
            child.kill();
        }
    }

    #[tokio::test]
    async fn a_program_is_killed_with_all_that_it_has_started() {
        let scratch = tempfile::tempdir().unwrap();
        let script = "setsid sleep 600 & sleep 600";
        let (mut child, (stdout, _stderr), _fence) = start(scratch.path(), script).await;
        assert!(tokio::time::timeout(Duration::from_millis(20), child.exit()).await.is_err());
        child.kill();
        assert_eq!(exit_code(&mut child).await, 137);
        assert_eq!(stdout.unwrap().read(&mut [0]).unwrap(), 0, "nobody holds the pipe");
    }

    /// Otherwise it would keep a copy of each page that the worker changes later.
    #[tokio::test]
    async fn a_supervisor_has_no_memory_of_the_worker() {
        let scratch = tempfile::tempdir().unwrap();
        let mut hot = vec![1_u8; 64 << 20];
        let (mut child, (stdout, _stderr), _fence) = start(scratch.path(), "echo; sleep 600").await;
        stdout.unwrap().read_exact(&mut [0]).unwrap();
        let rollup = format!("/proc/{}/smaps_rollup", child.supervisor());
        let own_mb = || {
            let rollup = std::fs::read_to_string(&rollup).unwrap();
            let line = rollup.lines().find_map(|line| line.strip_prefix("Private_Dirty:")).unwrap();
            line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() >> 10
        };
        // It does so beside the start of the program.
        let end = std::time::Instant::now() + Duration::from_secs(20);
        loop {
            hot.iter_mut().step_by(4096).for_each(|byte| *byte = byte.wrapping_add(1));
            match own_mb() {
                0..8 => break,
                more => assert!(std::time::Instant::now() < end, "{more} MiB"),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        child.kill();
        assert_eq!(exit_code(&mut child).await, 137);
    }

    #[tokio::test]
    async fn without_a_descriptor_a_thread_waits() {
        let scratch = tempfile::tempdir().unwrap();
        let (mut child, _pipes, _fence) = start(scratch.path(), "exit 5").await;
        let supervisor = child.supervisor();
        child.watch = ExitWatch::Thread(tokio::task::spawn_blocking(move || {
            let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
            waitid(Id::Pid(supervisor), look).unwrap();
        }));
        assert_eq!(exit_code(&mut child).await, 5);
    }
}
