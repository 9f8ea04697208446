//! Child processes that cannot outlive the tests.
//!
//! Every child is started through `setpriv --pdeathsig KILL`, so the kernel kills it when its parent ends, however
//! that happens: at the end of `main`, by a panic, by Ctrl-C or by SIGKILL. The kernel ties that to the *thread*
//! that forked, and test threads come and go; so one thread that never ends does all the forking.

use super::wait::poll_blocking;
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

/// Lines of output kept for one process; the oldest go first.
const LINES_MAX: usize = 100_000;

struct Order {
    command: Command,
    reply: SyncSender<std::io::Result<Child>>,
}

fn fork(command: Command) -> std::io::Result<Child> {
    static FORKER: OnceLock<SyncSender<Order>> = OnceLock::new();
    let forker = FORKER.get_or_init(|| {
        let (orders, inbox): (_, Receiver<Order>) = sync_channel(0);
        std::thread::spawn(move || {
            // The sender is a static, so this loop, and with it the thread, ends with the process.
            while let Ok(mut order) = inbox.recv() {
                let _ = order.reply.send(order.command.spawn());
            }
        });
        orders
    });
    let (reply, answer) = sync_channel(1);
    forker.send(Order { command, reply }).expect("the forking thread never ends");
    answer.recv().expect("the forking thread never ends")
}

/// What a process printed, both streams in the order they were read.
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
        let mut lines = self.lines.lock().expect("no holder panics");
        if lines.len() == LINES_MAX {
            lines.pop_front();
        }
        lines.push_back((stream, line));
    }

    pub fn lines(&self, stream: Stream) -> Vec<String> {
        let lines = self.lines.lock().expect("no holder panics");
        lines.iter().filter(|(s, _)| *s == stream).map(|(_, line)| line.clone()).collect()
    }

    /// The last `count` lines of both streams, for a failure's report.
    pub fn tail(&self, count: usize) -> String {
        let lines = self.lines.lock().expect("no holder panics");
        let skipped = lines.len().saturating_sub(count);
        lines.iter().skip(skipped).map(|(_, line)| format!("    {line}\n")).collect()
    }

    pub fn contains(&self, text: &str) -> bool {
        self.lines.lock().expect("no holder panics").iter().any(|(_, line)| line.contains(text))
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
    /// Starts `program` in `dir` with only `env`; what it prints is captured.
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
        let teller = Arc::clone(&ended);
        std::thread::spawn(move || {
            let status = child.wait().expect("our own child can be waited for");
            // The last lines belong to the end. A grandchild may hold the pipe open, so not for ever.
            for _ in 0..2 {
                let _ = read_to_end.recv_timeout(Duration::from_secs(1));
            }
            *teller.0.lock().expect("no holder panics") = Some(status);
            teller.1.notify_all();
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
        let status = self.ended.0.lock().expect("no holder panics");
        // After its end the pid may be somebody else's.
        if status.is_none() {
            let _ = kill(self.pid, signal);
        }
    }

    pub fn exit_status(&self) -> Option<ExitStatus> {
        *self.ended.0.lock().expect("no holder panics")
    }

    /// Blocks until the process has ended; `None`: not in time.
    pub fn wait(&self, deadline: Duration) -> Option<ExitStatus> {
        let end = Instant::now() + deadline;
        let mut status = self.ended.0.lock().expect("no holder panics");
        while status.is_none() {
            let left = end.checked_duration_since(Instant::now())?;
            status = self.ended.1.wait_timeout(status, left).expect("no holder panics").0;
        }
        *status
    }

    /// Kills and reaps.
    pub fn kill(&self) {
        self.signal(Signal::SIGKILL);
        assert!(self.wait(Duration::from_secs(10)).is_some(), "{} does not die of SIGKILL", self.name);
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

/// A directory of one test's own, gone with it (unless the test failed: then the next run removes it).
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

/// This run's directory. The first caller clears away those of runs that have ended.
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

/// A loopback port that nobody listens on now. Another process may take it first: callers try again.
pub fn free_port() -> u16 {
    let probe = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("loopback has a free port");
    probe.local_addr().expect("a bound socket has an address").port()
}

/// Starts a server that must be told its port; again on another one if it ended at once, since a free port
/// may be taken between the question and the bind.
pub fn start_on_free_port(
    name: &str,
    mut start: impl FnMut(u16) -> std::io::Result<Process>,
    is_up: impl Fn(u16) -> bool,
) -> (Process, u16) {
    let mut last = String::new();
    for _ in 0..3 {
        let port = free_port();
        let process = match start(port) {
            Ok(process) => process,
            Err(e) => panic!("cannot start {name} ({e}): run `make test`, which installs what is missing"),
        };
        let up = poll_blocking(Duration::from_secs(60), || {
            if let Some(status) = process.exit_status() {
                return Ok(Err(format!("{name} ended at once, {status}")));
            }
            if is_up(port) { Ok(Ok(())) } else { Err(format!("{name} does not answer")) }
        });
        match up.and_then(|ended| ended) {
            Ok(()) => return (process, port),
            Err(why) => last = format!("{why}:\n{}", process.output().tail(20)),
        }
    }
    panic!("{last}\nIf something is missing: run `make test`, which installs it.");
}

/// The addresses, in the kernel's hexadecimal, on which anybody listens on `port`.
pub fn listening_on(port: u16) -> Vec<String> {
    let ending = format!(":{port:04X}");
    let mut addresses = Vec::new();
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        // tcp6 is missing where IPv6 is switched off.
        let table = std::fs::read_to_string(table).unwrap_or_default();
        for line in table.lines().skip(1) {
            let words: Vec<&str> = line.split_whitespace().collect();
            // sl, local address, remote address, state; 0A is LISTEN
            if let [_, local, _, "0A", ..] = words.as_slice()
                && let Some(address) = local.strip_suffix(&ending)
            {
                addresses.push(address.to_owned());
            }
        }
    }
    addresses
}
