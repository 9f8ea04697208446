//! Child processes that cannot outlive the tests.
//!
//! Every child is started through `setpriv --pdeathsig KILL`. So the kernel kills it when its parent ends: at
//! the end of `main`, on a panic, on Ctrl-C or on SIGKILL. For the kernel the parent is the *thread* that
//! forked, and test threads are short-lived. So one thread that never ends does all forks.

use super::wait::{SOON, eventually};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::time::{Duration, Instant};

/// Maximum number of output lines kept for one process. The oldest are evicted first.
const LINES_MAX: usize = 100_000;
/// Deadline for the last output of a process that has exited.
const OUTPUT_WITHIN: Duration = Duration::from_secs(10);
/// Deadline for a server to listen.
const LISTENS_WITHIN: Duration = Duration::from_secs(60);

struct ForkRequest {
    command: Command,
    reply: SyncSender<std::io::Result<Child>>,
}

fn fork(command: Command) -> std::io::Result<Child> {
    static FORKER: OnceLock<SyncSender<ForkRequest>> = OnceLock::new();
    let forker = FORKER.get_or_init(|| {
        let (requests, inbox): (_, Receiver<ForkRequest>) = sync_channel(0);
        std::thread::spawn(move || {
            // The sender is a static, so this loop ends only with the process.
            while let Ok(mut request) = inbox.recv() {
                let _ = request.reply.send(request.command.spawn());
            }
        });
        requests
    });
    let (reply, answer) = sync_channel(1);
    forker.send(ForkRequest { command, reply }).expect("the forking thread never ends");
    answer.recv().expect("the forking thread never ends")
}

/// The output of a process: the lines of both streams in the order in which they were read.
#[derive(Default)]
pub struct Output {
    lines: Mutex<VecDeque<(Stream, String)>>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stream {
    Out,
    Err,
}

impl Output {
    fn push(&self, stream: Stream, line: String) {
        let mut lines = self.lines.lock().expect("the lock is not poisoned");
        if lines.len() == LINES_MAX {
            lines.pop_front();
        }
        lines.push_back((stream, line));
    }

    pub fn lines(&self, stream: Stream) -> Vec<String> {
        let lines = self.lines.lock().expect("the lock is not poisoned");
        lines.iter().filter(|(s, _)| *s == stream).map(|(_, line)| line.clone()).collect()
    }

    /// The last `count` lines of both streams.
    pub fn tail(&self, count: usize) -> String {
        let lines = self.lines.lock().expect("the lock is not poisoned");
        let skipped = lines.len().saturating_sub(count);
        lines.iter().skip(skipped).map(|(_, line)| format!("    {line}\n")).collect()
    }

    pub fn contains(&self, text: &str) -> bool {
        self.lines.lock().expect("the lock is not poisoned").iter().any(|(_, line)| line.contains(text))
    }
}

type Ended = Arc<(Mutex<Option<ExitStatus>>, Condvar)>;

pub struct Process {
    name: String,
    pid: Pid,
    output: Arc<Output>,
    ended: Ended,
}

impl Process {
    /// Starts `program` in `dir` with no environment but `env`, and captures its output.
    pub fn start(
        name: &str,
        program: &Path,
        args: &[&str],
        env: &[(String, String)],
        dir: &Path,
    ) -> std::io::Result<Self> {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(program).args(args);
        command.env_clear().envs(env.iter().map(|(k, v)| (k, v))).current_dir(dir);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = fork(command)?;
        let output = Arc::new(Output::default());
        let (done, read_to_end) = sync_channel(2);
        read_lines(child.stdout.take(), Stream::Out, &output, done.clone());
        read_lines(child.stderr.take(), Stream::Err, &output, done);
        let pid = Pid::from_raw(i32::try_from(child.id()).expect("a pid fits"));
        let ended: Ended = Arc::default();
        let notifier = Arc::clone(&ended);
        std::thread::spawn(move || {
            let status = child.wait().expect("a child process can be waited for");
            // First both pipes are read to their end, for the last lines. The wait has a deadline, because a
            // grandchild may keep a pipe open.
            let end = Instant::now() + OUTPUT_WITHIN;
            for _ in 0..2 {
                let _ = read_to_end.recv_timeout(end.saturating_duration_since(Instant::now()));
            }
            *notifier.0.lock().expect("the lock is not poisoned") = Some(status);
            notifier.1.notify_all();
        });
        Ok(Self { name: name.to_owned(), pid, output, ended })
    }

    pub fn pid(&self) -> i32 {
        self.pid.as_raw()
    }

    pub fn output(&self) -> &Output {
        &self.output
    }

    pub fn signal(&self, signal: Signal) {
        let status = self.ended.0.lock().expect("the lock is not poisoned");
        // After the exit the pid may belong to another process.
        if status.is_none() {
            let _ = kill(self.pid, signal);
        }
    }

    pub fn exit_status(&self) -> Option<ExitStatus> {
        *self.ended.0.lock().expect("the lock is not poisoned")
    }

    /// Waits for the exit. Panics with the last output when `deadline` has passed.
    pub async fn wait_for_exit(&self, deadline: Duration) -> ExitStatus {
        let exited = || async { self.exit_status().ok_or_else(|| self.output.tail(50)) };
        eventually(&format!("the exit of {}", self.name), deadline, exited).await
    }

    /// Waits until the process has printed a line that contains `text`.
    pub async fn wait_for_output(&self, text: &str, deadline: Duration) {
        let printed =
            || async { self.output.contains(text).then_some(()).ok_or_else(|| self.output.tail(20)) };
        eventually(&format!("{text:?} in the output of {}", self.name), deadline, printed).await;
    }

    /// Sends SIGKILL, and blocks until the process is reaped.
    pub fn kill(&self) {
        self.signal(Signal::SIGKILL);
        let status = self.ended.0.lock().expect("the lock is not poisoned");
        let ended = self.ended.1.wait_timeout_while(status, SOON, |status| status.is_none());
        assert!(
            ended.expect("the lock is not poisoned").0.is_some(),
            "{} does not exit on SIGKILL",
            self.name
        );
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.signal(Signal::SIGKILL);
        if std::thread::panicking() {
            eprintln!("--- last output of {} (pid {}):\n{}", self.name, self.pid, self.output.tail(80));
        }
    }
}

fn read_lines(
    stream: Option<impl Read + Send + 'static>,
    kind: Stream,
    output: &Arc<Output>,
    done: SyncSender<()>,
) {
    let stream = stream.expect("the stream is piped");
    let output = Arc::clone(output);
    std::thread::spawn(move || {
        for line in BufReader::new(stream).split(b'\n') {
            let Ok(line) = line else { break };
            output.push(kind, String::from_utf8_lossy(&line).into_owned());
        }
        let _ = done.send(());
    });
}

/// A temporary directory. It is deleted on drop, or by the next run if the test failed.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new(name: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = scratch_root().join(format!("{count}-{name}"));
        std::fs::create_dir_all(&dir).expect("the target directory is writable");
        Self(dir)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

/// The directory of this run. The first call deletes those of earlier runs.
fn scratch_root() -> &'static Path {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    ROOT.get_or_init(|| {
        let all = Path::new(env!("CARGO_TARGET_TMPDIR"));
        for entry in std::fs::read_dir(all).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let pid = name.to_str().and_then(|n| n.strip_prefix("it-"));
            if pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
                let _ = std::fs::remove_dir_all(entry.path());
            }
        }
        all.join(format!("it-{}", std::process::id()))
    })
}

/// A loopback port without a listener. Another process may bind it first; then the caller tries again.
pub fn free_port() -> u16 {
    let probe = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("loopback has a free port");
    probe.local_addr().expect("a bound socket has an address").port()
}

/// Starts a server on a free port and waits until it listens. Another process may bind the port first. Then
/// the server exits at once, and is started again on another port.
pub async fn start_on_free_port(
    name: &str,
    mut start: impl FnMut(u16) -> std::io::Result<Process>,
    is_up: impl Fn(u16) -> bool,
) -> (Process, u16) {
    let mut last = String::new();
    for _ in 0..3 {
        let port = free_port();
        let process = match start(port) {
            Ok(process) => process,
            Err(e) => panic!("cannot start {name} ({e}): run `make test`, which installs it"),
        };
        let is_listening = eventually(name, LISTENS_WITHIN, || async {
            match (is_up(port), process.exit_status()) {
                (_, Some(_)) => Ok(false),
                (true, None) => Ok(true),
                (false, None) => Err(process.output().tail(20)),
            }
        })
        .await;
        if is_listening {
            return (process, port);
        }
        last = format!("{name} exited at once:\n{}", process.output().tail(20));
    }
    panic!("{last}\nIf a program is missing: run `make test`, which installs it.");
}

/// The addresses with a listener on `port`, in the hexadecimal form of the kernel.
pub fn listening_on(port: u16) -> Vec<String> {
    let ending = format!(":{port:04X}");
    let listening = sockets("0A");
    listening.iter().filter_map(|(local, _)| Some(local.strip_suffix(&ending)?.to_owned())).collect()
}

/// Whether the server's socket for the client at `client_port` is still in the state ESTABLISHED.
pub fn is_connected(port: u16, client_port: u16) -> bool {
    let (local_end, remote_end) = (format!(":{port:04X}"), format!(":{client_port:04X}"));
    sockets("01").iter().any(|(local, remote)| local.ends_with(&local_end) && remote.ends_with(&remote_end))
}

/// The local and remote addresses of all TCP sockets in a state, in the hexadecimal form of the kernel.
fn sockets(state: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        // tcp6 is missing where IPv6 is switched off.
        let table = std::fs::read_to_string(table).unwrap_or_default();
        for line in table.lines().skip(1) {
            let words: Vec<&str> = line.split_whitespace().collect();
            if let [_, local, remote, its_state, ..] = words.as_slice()
                && *its_state == state
            {
                found.push(((*local).to_owned(), (*remote).to_owned()));
            }
        }
    }
    found
}
