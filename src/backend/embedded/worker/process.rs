//! One run as a child process: in its own session, with limits, watched to its end.
//!
//! `tokio::process` was rejected: it reaps the child itself, and with that goes what the child used (`wait4`) and
//! the moment in which its group can still be killed by number without hitting a stranger.

use nix::errno::Errno;
use nix::libc;
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{Signal, killpg};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::{Pid, getppid, setsid};
use std::collections::BTreeMap;
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::pin::pin;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::process::{ChildStderr, ChildStdout};
use tokio::time::{sleep, timeout};

/// Most bytes kept of each of stdout and stderr; the rest is read and thrown away, so that no run blocks on it.
const OUTPUT_BYTES_MAX: usize = 1 << 20;
/// Most open files of a run.
const OPEN_FILES_MAX: u64 = 1_024;
/// How long the output of a run that has ended is still read: only a process that left the session can hold it open.
const DRAIN_MAX: Duration = Duration::from_secs(1);
/// Exit code of a run that was stopped at its time limit, as `timeout(1)` gives it.
const TIMED_OUT: i32 = 124;
/// First and longest pause between two looks at a run's memory.
const SAMPLE_MIN: Duration = Duration::from_millis(4);
const SAMPLE_MAX: Duration = Duration::from_millis(250);

/// What to run, and within what.
pub(super) struct Program {
    pub(super) interpreter: PathBuf,
    pub(super) args: Vec<String>,
    pub(super) dir: PathBuf,
    /// The whole environment.
    pub(super) env: BTreeMap<String, String>,
    /// Largest address space, in bytes.
    pub(super) address_space_max: Option<u64>,
    /// Longest run, from start to end.
    pub(super) time_limit: Duration,
}

/// How a run ended.
pub(super) struct Ended {
    /// The program's own; 128 + the signal that killed it; 124 at the time limit.
    pub(super) exit_code: i32,
    pub(super) stdout: String,
    pub(super) stderr: String,
    pub(super) duration: Duration,
    /// Most memory the program itself held; none of its children's.
    pub(super) peak_memory_bytes: Option<u64>,
}

/// Runs the program to its end. Dropping the future kills it and all it started.
///
/// The child dies with the *thread* that started it (`PR_SET_PDEATHSIG`), so this must run on a thread that lives
/// as long as the runtime: a task's, never one of `spawn_blocking`'s, which ends after ten idle seconds.
///
/// # Errors
/// If the program cannot be started, for example because its environment is too large.
pub(super) async fn run(program: &Program) -> io::Result<Ended> {
    let started = Instant::now();
    let mut child = command(program).spawn()?;
    let group =
        Arc::new(Group { leader: Pid::from_raw(child.id().cast_signed()), reaped: Mutex::new(false) });
    let _guard = KillOnDrop(group.clone());
    let waiter = group.clone();
    let mut exit = tokio::task::spawn_blocking(move || waiter.wait());

    let (mut stdout, mut stderr) = (Capture::default(), Capture::default());
    let out = child.stdout.take().map(ChildStdout::from_std).transpose()?;
    let err = child.stderr.take().map(ChildStderr::from_std).transpose()?;
    let mut timed_out = false;
    let mut peak = None;
    let exit = {
        let mut drain = pin!(async { tokio::join!(stdout.fill(out), stderr.fill(err)) });
        let mut drained = false;
        let mut limit = pin!(sleep(program.time_limit));
        let mut pause = SAMPLE_MIN;
        let exit = loop {
            tokio::select! {
                exit = &mut exit => break exit.map_err(io::Error::other)??,
                _ = &mut drain, if !drained => drained = true,
                () = &mut limit, if !timed_out => {
                    timed_out = true;
                    group.kill();
                }
                () = sleep(pause) => {
                    peak = peak_memory_bytes(group.leader).or(peak);
                    pause = (pause * 2).min(SAMPLE_MAX);
                }
            }
        };
        if !drained {
            let _ = timeout(DRAIN_MAX, drain).await;
        }
        exit
    };
    let mut ended = Ended {
        exit_code: exit.code,
        stdout: stdout.text(),
        stderr: stderr.text(),
        duration: started.elapsed(),
        peak_memory_bytes: exit.peak_above_ours().or(peak),
    };
    if timed_out {
        ended.exit_code = TIMED_OUT;
        let limit = program.time_limit.as_millis();
        ended.stderr.push_str(&format!("\n[stopped: the run reached its time limit of {limit} ms]"));
    }
    Ok(ended)
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
    let address_space_max = program.address_space_max;
    // SAFETY: `confine` runs between fork and exec, where only async-signal-safe calls are allowed: it makes
    // system calls and nothing else, and neither allocates nor locks.
    #[expect(unsafe_code, reason = "limits must be set between fork and exec")]
    unsafe {
        command.pre_exec(move || confine(parent, address_space_max))
    };
    command
}

/// Called in the child. A limit on processes is left out: it counts all of a user's, ours among them.
fn confine(parent: Pid, address_space_max: Option<u64>) -> io::Result<()> {
    // A session of its own: one group to kill, and no terminal whose ^C would reach the run.
    setsid()?;
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    // The parent may have died before the call above, and then no signal will come.
    if getppid() != parent {
        return Err(Errno::ESRCH.into());
    }
    prctl::set_no_new_privs()?;
    lower(Resource::RLIMIT_CORE, 0)?;
    lower(Resource::RLIMIT_NOFILE, OPEN_FILES_MAX)?;
    if let Some(bytes) = address_space_max {
        lower(Resource::RLIMIT_AS, bytes)?;
    }
    Ok(())
}

fn lower(resource: Resource, to: u64) -> nix::Result<()> {
    let (_, hard) = getrlimit(resource)?;
    let to = to.min(hard);
    setrlimit(resource, to, to)
}

/// All processes of a run, by the number of its first.
struct Group {
    leader: Pid,
    /// Once the leader is reaped its number may become a stranger's: no signal may be sent then.
    reaped: Mutex<bool>,
}

struct KillOnDrop(Arc<Group>);

impl Drop for KillOnDrop {
    fn drop(&mut self) {
        self.0.kill();
    }
}

impl Group {
    fn kill(&self) {
        let reaped = self.reaped.lock().unwrap_or_else(PoisonError::into_inner);
        if !*reaped {
            // It fails only if nobody is left.
            let _ = killpg(self.leader, Signal::SIGKILL);
        }
    }

    /// Blocks until the leader has ended, then kills what it left behind.
    fn wait(&self) -> io::Result<Exit> {
        // First look without reaping, so that nothing is locked while the program runs.
        let look = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        while waitid(Id::Pid(self.leader), look) == Err(Errno::EINTR) {}
        let mut reaped = self.reaped.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = killpg(self.leader, Signal::SIGKILL);
        let (status, usage) = wait4(self.leader)?;
        *reaped = true;
        let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(-1);
        // Linux counts in KiB.
        Ok(Exit { code, max_rss_bytes: u64::try_from(usage.ru_maxrss).unwrap_or(0) * 1024 })
    }
}

#[expect(unsafe_code, reason = "no safe wrapper of wait4 tells the memory that was used")]
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

struct Exit {
    code: i32,
    max_rss_bytes: u64,
}

impl Exit {
    /// Linux passes the peak of the forking process on through exec, so what `wait4` says is the child's own peak
    /// only where it is more than ours ever was. Below that the samples have to do.
    fn peak_above_ours(&self) -> Option<u64> {
        let ours = peak_memory_bytes(Pid::this())?;
        (self.max_rss_bytes > ours).then_some(self.max_rss_bytes)
    }
}

/// The most memory a process has held so far, in bytes.
fn peak_memory_bytes(pid: Pid) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
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
        // An error is an end too: a pipe gives none that a second try would mend.
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
            // The cut went through a character.
            kept = &kept[..e.valid_up_to()];
        }
        let mut text = String::from_utf8_lossy(kept).into_owned();
        if cut {
            text.push_str(&format!("\n[cut: the whole output has {} bytes]", self.bytes));
        }
        text
    }
}
