//! One gateway process: started, watched, stopped.

use super::http::{Answer, Request};
use super::process::{Output, Process, Scratch, Stream};
use super::wait::{SOON, eventually, poll_blocking};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitStatus;
use std::time::Duration;

const START_WITHIN: Duration = Duration::from_secs(30);
/// More than the default drain timeout of 30 s.
const STOP_WITHIN: Duration = Duration::from_secs(40);

/// A `conf/` directory.
#[derive(Clone, Default)]
pub struct Conf {
    pub server: String,
    pub limits: String,
    pub keys: String,
    pub upstreams: String,
    /// (name, text) of others.
    pub files: Vec<(String, String)>,
}

impl Conf {
    pub fn write(&self, dir: &Path) {
        std::fs::create_dir_all(dir).expect("the scratch directory is writable");
        let files = [
            ("server.toml", &self.server),
            ("limits.toml", &self.limits),
            ("keys.toml", &self.keys),
            ("upstreams.toml", &self.upstreams),
        ];
        let others = self.files.iter().map(|(name, text)| (name.as_str(), text));
        for (name, text) in files.into_iter().chain(others) {
            std::fs::write(dir.join(name), text).expect("the scratch directory is writable");
        }
    }
}

/// Runs the program to its end, as a shell would.
pub struct Run {
    pub code: Option<i32>,
    pub stderr: Vec<String>,
    pub output: String,
}

const PROGRAM: &str = env!("CARGO_BIN_EXE_infra-controller");

pub fn start_process(args: &[&str], env: &[(String, String)], dir: &Path) -> Process {
    start_program(Path::new(PROGRAM), args, env, dir)
}

fn start_program(program: &Path, args: &[&str], env: &[(String, String)], dir: &Path) -> Process {
    let mut all = super::path_env();
    all.push(("HOME".into(), dir.display().to_string()));
    all.extend_from_slice(env);
    Process::start("infra-controller", program, args, &all, dir).expect("setpriv (util-linux) is there")
}

/// Starts the program, which must end by itself within `deadline`. `watch` is asked again and again meanwhile.
pub fn run_to_end(
    args: &[&str],
    env: &[(String, String)],
    dir: &Path,
    deadline: Duration,
    mut watch: impl FnMut(),
) -> Run {
    let process = start_process(args, env, dir);
    let ended = poll_blocking(deadline, || {
        watch();
        process.exit_status().ok_or_else(|| process.output().tail(20))
    });
    let status = ended.unwrap_or_else(|output| panic!("{args:?} does not end; it printed:\n{output}"));
    Run {
        code: status.code(),
        stderr: process.output().lines(Stream::Err),
        output: process.output().tail(500),
    }
}

pub struct Gateway {
    process: Process,
    addr: SocketAddr,
    key: String,
    /// What must never stand in its output.
    secrets: Vec<String>,
    _dir: Scratch,
}

impl Gateway {
    /// Starts it and waits until it is ready to take traffic.
    pub async fn start(args: &[&str], env: &[(String, String)], key: &str, secrets: &[&str]) -> Self {
        Self::start_in(Scratch::new("gateway"), args, env, key, secrets).await
    }

    /// [`Self::start`] with a working directory that holds something already (a `.env`).
    pub async fn start_in(
        dir: Scratch,
        args: &[&str],
        env: &[(String, String)],
        key: &str,
        secrets: &[&str],
    ) -> Self {
        let process = start_process(args, env, dir.path());
        Self::ready(process, dir, key, secrets).await
    }

    /// [`Self::start`] with a limit of open files, soft and hard.
    pub async fn start_limited(open_files: u64, args: &[&str], env: &[(String, String)], key: &str) -> Self {
        let dir = Scratch::new("gateway");
        let limit = format!("--nofile={open_files}:{open_files}");
        let args = [&[limit.as_str(), "--", PROGRAM], args].concat();
        let process = start_program(Path::new("prlimit"), &args, env, dir.path());
        Self::ready(process, dir, key, &[]).await
    }

    async fn ready(process: Process, dir: Scratch, key: &str, secrets: &[&str]) -> Self {
        let started = || async {
            if let Some(status) = process.exit_status() {
                panic!("the gateway ended at once, {status}:\n{}", process.output().tail(50));
            }
            let lines = process.output().lines(Stream::Out);
            lines.iter().find_map(|line| started_port(line)).ok_or_else(|| process.output().tail(20))
        };
        let port = eventually("the line that says Started", START_WITHIN, started).await;
        let addr = SocketAddr::from(([127, 0, 0, 1], port));
        let mut secrets: Vec<String> = secrets.iter().map(|&s| s.to_owned()).collect();
        secrets.push(key.to_owned());
        let gateway = Self { process, addr, key: key.to_owned(), secrets, _dir: dir };
        let ready = || async {
            match Request::new(addr, "GET", "/readyz").described().try_send().await {
                Ok(answer) if answer.status == 200 => Ok(()),
                other => Err(format!("{other:?}")),
            }
        };
        eventually("/readyz", SOON, ready).await;
        gateway
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    pub fn key(&self) -> &str {
        &self.key
    }

    pub fn output(&self) -> &Output {
        self.process.output()
    }

    /// A request without the key.
    pub fn anonymous(&self, method: &str, target: &str) -> Request {
        Request::new(self.addr, method, target).described()
    }

    pub fn request(&self, method: &str, target: &str) -> Request {
        self.anonymous(method, target).header("x-api-key", &self.key)
    }

    /// A request that a service behind the gateway answers: nothing describes it.
    pub fn beyond(&self, method: &str, target: &str) -> Request {
        Request::new(self.addr, method, target).header("x-api-key", &self.key)
    }

    pub async fn get(&self, target: &str) -> Answer {
        self.request("GET", target).send().await
    }

    /// A run of `function`; synchronous unless a header is added.
    pub fn run(&self, function: &str, input: &Value) -> Request {
        self.request("POST", "/run").json(&json!({ "functionId": function, "inputData": input }))
    }

    /// An asynchronous run, accepted: its job id.
    pub async fn run_async(&self, function: &str, input: &Value) -> String {
        let answer = self.run(function, input).header("x-async", "true").send().await.expect(202);
        let accepted = answer.json();
        assert_eq!(accepted["status"], "ACCEPTED");
        let id = accepted["jobId"].as_str().expect("a job id").to_owned();
        assert_eq!(answer.need("location"), format!("/status/{id}"));
        id
    }

    /// The result of a job, waited for.
    pub async fn result_of(&self, id: &str) -> Answer {
        let done = || async {
            let answer = self.get(&format!("/status/{id}?wait=20")).await.expect(200);
            if is_pending(&answer) { Err(answer.text()) } else { Ok(answer) }
        };
        eventually(&format!("the result of {id}"), 3 * SOON, done).await
    }

    /// The value of one series of `/metrics`, with its labels as they stand there; `None`: no such series.
    pub async fn metric(&self, series: &str) -> Option<f64> {
        let metrics = self.anonymous("GET", "/metrics").send().await.expect(200).text();
        let value = metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value.and_then(|value| value.parse().ok())
    }

    pub async fn wait_for_metric(&self, series: &str, expected: f64) {
        let seen = || async {
            let value = self.metric(series).await;
            if value == Some(expected) { Ok(()) } else { Err(format!("{value:?}")) }
        };
        eventually(&format!("{series} {expected}"), SOON, seen).await;
    }

    /// The lines of the log as JSON, those that are.
    pub fn log(&self) -> Vec<Value> {
        let lines = self.process.output().lines(Stream::Out);
        lines.iter().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Waits until the text stands in the output: lines come a moment after what they tell of.
    pub async fn until_printed(&self, text: &str) {
        let printed =
            || async { self.output().contains(text).then_some(()).ok_or_else(|| self.output().tail(20)) };
        eventually(text, SOON, printed).await;
    }

    /// The most memory it has taken so far, in bytes.
    pub fn peak_memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.pid()));
        let status = status.expect("the gateway runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("Linux tells");
        let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
        kib * 1024
    }

    /// Changes its limit of open files while it runs; the hard one stays.
    pub fn limit_open_files(&self, soft: u64) {
        let pid = self.process.pid().to_string();
        let limit = format!("--nofile={soft}:");
        let status = std::process::Command::new("prlimit").args(["--pid", &pid, &limit]).status();
        assert!(status.expect("prlimit (util-linux) is there").success());
    }

    /// The file descriptors that it has open.
    pub fn open_files(&self) -> Vec<u64> {
        let entries =
            std::fs::read_dir(format!("/proc/{}/fd", self.process.pid())).expect("the gateway runs");
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
    }

    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    pub fn kill(self) {
        self.process.kill();
    }

    /// Waits for the end after a signal; other tasks go on.
    pub async fn ended(&self, deadline: Duration) -> ExitStatus {
        let ended = || async { self.process.exit_status().ok_or_else(|| self.process.output().tail(20)) };
        eventually("the end of the gateway", deadline, ended).await
    }

    /// Asserts that nothing waits and nothing is in flight.
    pub async fn idle(&self) {
        self.wait_for_metric("infra_waiters", 0.0).await;
        self.wait_for_metric("infra_jobs_in_flight", 0.0).await;
    }

    /// Asserts a clean end: idle, then SIGTERM, then exit code 0.
    pub async fn finish(self) {
        self.idle().await;
        self.stop().await;
    }

    /// SIGTERM, then exit code 0, whatever is in flight.
    pub async fn stop(self) {
        self.signal(Signal::SIGTERM);
        let status = self.ended(STOP_WITHIN).await;
        assert_eq!(status.code(), Some(0), "after SIGTERM:\n{}", self.process.output().tail(50));
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        let ended = self.process.exit_status().is_some();
        assert!(ended, "a test ends its gateway: with finish, stop or kill");
        for secret in &self.secrets {
            assert!(!self.process.output().contains(secret), "a secret stands in the log");
        }
    }
}

/// Whether `/status` says that the job still runs.
pub fn is_pending(answer: &Answer) -> bool {
    let body: Value = serde_json::from_slice(answer.body()).unwrap_or_default();
    body["status"] == "pending" && body["message"].is_string()
}

fn started_port(line: &str) -> Option<u16> {
    let line: Value = serde_json::from_str(line).ok()?;
    let msg = line["msg"].as_str()?;
    let is_it = msg.starts_with("Infra Controller v") && msg.ends_with(" Started");
    is_it.then(|| u16::try_from(line["port"].as_u64().expect("the port is a number")).expect("the port fits"))
}
