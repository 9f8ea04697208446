//! One run as a supervised child process with limits.
//!
//! `tokio::process` was rejected because it reaps the child itself. Then the resource usage (`wait4`) is
//! lost, and a signal to the process id may reach another process that reuses the id.

use super::monitor::{RunMonitor, RunUsage, StopReason};
use super::supervisor;
use super::tree::{self, peak_memory_bytes};
use nix::errno::Errno;
use nix::libc;
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::Pid;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::pin::pin;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{ChildStderr, ChildStdout};
use tokio::time::{sleep, timeout};

/// Most bytes that are kept of stdout, and of stderr. The rest is read and discarded, so that the run never
/// blocks.
const OUTPUT_BYTES_MAX: usize = 1 << 20;
/// Most open files of each process of a run.
const OPEN_FILES_MAX: u64 = 1_024;
/// How long output is read after the run has ended, in case another process holds the pipe open.
const DRAIN_MAX: Duration = Duration::from_secs(1);
/// Exit code of a run that was stopped at its time limit, as with `timeout(1)`.
const TIMED_OUT: i32 = 124;
/// Exit code of a run that was stopped because it used too much, as after SIGKILL.
const KILLED: i32 = 137;
/// Value for `/proc/self/oom_score_adj`. If the machine runs out of memory, the kernel kills a run and not
/// the gateway.
const OOM_SCORE: &[u8] = b"1000";

/// A program to run, with its limits.
pub(super) struct Program {
    pub(super) interpreter: PathBuf,
    pub(super) args: Vec<String>,
    pub(super) dir: PathBuf,
    /// The complete environment.
    pub(super) env: BTreeMap<String, String>,
    /// Most memory of all its processes together, in MiB; see [`tree`].
    pub(super) memory_mb: u64,
    /// Backstop: most private memory that one process may request, in bytes, whether it is used or not.
    pub(super) data_bytes_max: Option<u64>,
    /// Most time from start to end.
    pub(super) time_limit: Duration,
}

/// How a run ended.
pub(super) struct RunEnd {
    /// Exit code of the program, or 128 + the signal that killed it, or 124 at the time limit.
    pub(super) exit_code: i32,
    pub(super) stdout: String,
    pub(super) stderr: String,
    pub(super) duration: Duration,
    /// Highest resident memory, in bytes: of one process, or of all together in one sample, in which a page
    /// that processes share counts once.
    pub(super) peak_memory_bytes: Option<u64>,
}

/// Runs the program to its end. Dropping the future kills it and all processes that it started.
///
/// The run is killed when the *thread* that started it exits (`PR_SET_PDEATHSIG`). So this must run on a
/// thread that lives as long as the runtime: in a task, never in `spawn_blocking`, whose threads exit after
/// ten idle seconds.
///
/// # Errors
/// If the program cannot be started, for example because its environment is too large.
pub(super) async fn run(program: &Program, gauge: &RunUsage) -> io::Result<RunEnd> {
    let started = Instant::now();
    let mut child = command(program).spawn()?;
    let supervised = Arc::new(Supervised {
        supervisor: Pid::from_raw(child.id().cast_signed()),
        reaped: Mutex::new(false),
    });
    let _guard = KillOnDrop(supervised.clone());
    let waiter = supervised.clone();
    let mut exit = tokio::task::spawn_blocking(move || waiter.wait());

    let (mut stdout, mut stderr) = (Capture::default(), Capture::default());
    let out = child.stdout.take().map(ChildStdout::from_std).transpose()?;
    let err = child.stderr.take().map(ChildStderr::from_std).transpose()?;
    let mut watch = RunMonitor::new(supervised.supervisor, program.memory_mb);
    let mut stopped = None;
    let exit = {
        let mut drain = pin!(async { tokio::join!(stdout.fill(out), stderr.fill(err)) });
        let mut drained = false;
        let mut limit = pin!(sleep(program.time_limit));
        let exit = loop {
            let found = tokio::select! {
                exit = &mut exit => break exit.map_err(io::Error::other)??,
                _ = &mut drain, if !drained => {
                    drained = true;
                    None
                }
                () = &mut limit, if stopped.is_none() => Some(StopReason::Time),
                found = watch.next(gauge), if stopped.is_none() => found,
            };
            if let Some(found) = found {
                stopped = Some(found);
                supervised.kill();
            }
        };
        if !drained {
            let _ = timeout(DRAIN_MAX, drain).await;
        }
        exit
    };
    let mut ended = RunEnd {
        exit_code: exit.code,
        stdout: stdout.text(),
        stderr: stderr.text(),
        duration: started.elapsed(),
        peak_memory_bytes: exit.peak_above_ours().max(watch.peak_bytes()),
    };
    if let Some(stopped) = stopped {
        let (code, why) = stopped.explain(program);
        ended.exit_code = code;
        ended.stderr.push_str(&format!("\n[stopped: {why}]"));
    }
    Ok(ended)
}

impl StopReason {
    /// The exit code, and the reason for the owner of the function.
    fn explain(&self, program: &Program) -> (i32, String) {
        match self {
            Self::Time => {
                let limit = program.time_limit.as_millis();
                (TIMED_OUT, format!("the run reached its time limit of {limit} ms"))
            }
            Self::Memory(bytes) => {
                let (used, limit) = (bytes >> 20, program.memory_mb);
                let why = format!(
                    "the run used {used} MiB of memory, but its function has {limit} MiB; raise `memoryMb`"
                );
                (KILLED, why)
            }
            Self::Tasks => {
                (KILLED, format!("the run had more than {} processes and threads", tree::TASKS_MAX))
            }
        }
    }
}

fn command(program: &Program) -> Command {
    let mut command = Command::new(&program.interpreter);
    command
        .args(&program.args)
        .current_dir(&program.dir)
        .env_clear()
        .envs(&program.env)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let parent = Pid::this();
    let data_bytes_max = program.data_bytes_max;
    // SAFETY: both run between fork and exec, where only async-signal-safe calls are allowed: they make
    // system calls and nothing else, and neither allocate nor lock.
    #[expect(unsafe_code, reason = "limits must be set between fork and exec")]
    unsafe {
        command.pre_exec(move || {
            supervisor::split(parent)?;
            confine(data_bytes_max)
        })
    };
    command
}

/// Sets the limits in the child. The number of processes is not limited here, because `RLIMIT_NPROC` counts
/// all processes of the user, including the gateway. Nor is the address space, because the stack of a thread
/// takes 8 MiB of it without using memory.
fn confine(data_bytes_max: Option<u64>) -> io::Result<()> {
    prctl::set_no_new_privs()?;
    prefer_for_oom();
    lower(Resource::RLIMIT_CORE, 0)?;
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

fn lower(resource: Resource, to: u64) -> nix::Result<()> {
    let (_, hard) = getrlimit(resource)?;
    let to = to.min(hard);
    setrlimit(resource, to, to)
}

/// A run, identified by its supervisor process.
struct Supervised {
    supervisor: Pid,
    /// Once the supervisor is reaped, its process id may be reused, so no signal may be sent any more.
    reaped: Mutex<bool>,
}

struct KillOnDrop(Arc<Supervised>);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        self.0.kill();
    }
}

impl Supervised {
    /// Asks the supervisor to kill everything.
    fn kill(&self) {
        let reaped = self.reaped.lock();
        if !*reaped {
            // This fails only if the supervisor has ended.
            let _ = kill(self.supervisor, Signal::SIGTERM);
        }
    }

    /// Blocks until the run and all processes that it has left have ended.
    fn wait(&self) -> io::Result<ChildExit> {
        // First wait without reaping, so that the lock is not held while the program runs.
        let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        while waitid(Id::Pid(self.supervisor), look) == Err(Errno::EINTR) {}
        let mut reaped = self.reaped.lock();
        let waited = wait4(self.supervisor);
        // An error means that there is no such child, so its process id must not be used either.
        *reaped = true;
        let (status, usage) = waited?;
        let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(-1);
        // Linux reports KiB.
        Ok(ChildExit { code, max_rss_bytes: u64::try_from(usage.ru_maxrss).unwrap_or(0) * 1024 })
    }
}

#[expect(unsafe_code, reason = "no safe wrapper of wait4 returns the resource usage")]
fn wait4(pid: Pid) -> io::Result<(ExitStatus, libc::rusage)> {
    let mut status = 0;
    // SAFETY: `rusage` is a C struct of integers, for which zeros are a value.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    loop {
        // SAFETY: both pointers are to live values of the types that wait4 writes.
        let waited = unsafe { libc::wait4(pid.as_raw(), &raw mut status, 0, &raw mut usage) };
        if waited == pid.as_raw() {
            return Ok((ExitStatus::from_raw(status), usage));
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

struct ChildExit {
    code: i32,
    max_rss_bytes: u64,
}

impl ChildExit {
    /// Peak memory of the supervisor and of the children that it reaped, if it is above the peak of this
    /// process. The supervisor is a fork of this process, and Linux keeps the peak across fork and exec. So a
    /// lower value may not be that of the run, and only the samples count.
    fn peak_above_ours(&self) -> Option<u64> {
        let ours = peak_memory_bytes(Pid::this())?;
        (self.max_rss_bytes > ours).then_some(self.max_rss_bytes)
    }
}

#[derive(Default)]
struct Capture {
    kept: Vec<u8>,
    bytes: u64,
}

impl Capture {
    async fn fill(&mut self, from: Option<impl AsyncRead + Unpin>) {
        let Some(mut from) = from else { return };
        let mut chunk = vec![0; 16 * 1024];
        // An error ends the output as well, because no error of a pipe goes away with a retry.
        while let Ok(read @ 1..) = from.read(&mut chunk).await {
            self.bytes += read as u64;
            let room = OUTPUT_BYTES_MAX - self.kept.len();
            self.kept.extend_from_slice(&chunk[..read.min(room)]);
        }
    }

    fn text(self) -> String {
        let cut = self.bytes > self.kept.len() as u64;
        let mut kept = &self.kept[..];
        if let (true, Err(e)) = (cut, std::str::from_utf8(kept))
            && e.error_len().is_none()
        {
            // The cut is inside a character.
            kept = &kept[..e.valid_up_to()];
        }
        let mut text = String::from_utf8_lossy(kept).into_owned();
        if cut {
            text.push_str(&format!("\n[cut: the whole output has {} bytes]", self.bytes));
        }
        text
    }
}
