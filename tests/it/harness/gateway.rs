//! One gateway process: start, requests, metrics, stop.

use super::http::{Answer, Request};
use super::process::{Output, Process, Scratch, Stream};
use super::wait::{SOON, eventually};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitStatus;
use std::time::Duration;

const START_WITHIN: Duration = Duration::from_secs(90);
/// More than the default drain timeout of 30 s.
const STOP_WITHIN: Duration = Duration::from_secs(90);

/// A `conf/` directory.
#[derive(Clone, Default)]
pub struct Conf {
    pub server: String,
    pub limits: String,
    pub keys: String,
    pub upstreams: String,
    /// Other files: (name, text).
    pub files: Vec<(String, String)>,
}

/// Replaces a file atomically: a reader finds the old text or the new one.
pub fn put_file(path: &Path, text: &str) {
    let draft = path.with_extension("draft");
    std::fs::write(&draft, text).expect("the scratch directory is writable");
    std::fs::rename(draft, path).expect("the scratch directory is writable");
}

/// The series that counts how often a configuration file was `applied` or `refused`.
pub fn reloads(file: &str, result: &str) -> String {
    format!("infra_conf_reloads_total{{file={file:?},result={result:?}}}")
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

/// A process that has exited.
pub struct Exited {
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

/// Starts the program through another one; see [`Gateway::start_through`].
pub fn start_through(wrapper: &[&str], args: &[&str], env: &[(String, String)], dir: &Path) -> Process {
    let (program, first) = wrapper.split_first().expect("a program");
    start_program(Path::new(program), &[first, &[PROGRAM], args].concat(), env, dir)
}

/// Starts the program, which must exit within `deadline`.
pub async fn run_to_end(args: &[&str], env: &[(String, String)], dir: &Path, deadline: Duration) -> Exited {
    Exited::of(&start_process(args, env, dir), deadline).await
}

impl Exited {
    /// Waits for the exit of a process.
    pub async fn of(process: &Process, deadline: Duration) -> Self {
        let code = process.wait_for_exit(deadline).await.code();
        let output = process.output();
        Self { code, stderr: output.lines(Stream::Err), output: output.tail(500) }
    }
}

pub struct Gateway {
    process: Process,
    addr: SocketAddr,
    key: String,
    /// Texts that must never be in its output.
    secrets: Vec<String>,
    _dir: Scratch,
}

impl Gateway {
    /// Starts a gateway, and waits until it is ready.
    pub async fn start(args: &[&str], env: &[(String, String)], key: &str, secrets: &[&str]) -> Self {
        Self::start_in(Scratch::new("gateway"), args, env, key, secrets).await
    }

    /// [`Self::start`] in an existing working directory (with a `.env`, for example).
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

    /// [`Self::start`] with a soft and hard limit of open files.
    pub async fn start_limited(open_files: u64, args: &[&str], env: &[(String, String)], key: &str) -> Self {
        let limit = format!("--nofile={open_files}:{open_files}");
        Self::start_through(&["prlimit", &limit, "--"], args, env, key).await
    }

    /// [`Self::start`] through a program that replaces itself by the one which its last arguments name.
    pub async fn start_through(wrapper: &[&str], args: &[&str], env: &[(String, String)], key: &str) -> Self {
        let dir = Scratch::new("gateway");
        let process = start_through(wrapper, args, env, dir.path());
        Self::ready(process, dir, key, &[]).await
    }

    async fn ready(process: Process, dir: Scratch, key: &str, secrets: &[&str]) -> Self {
        let started = || async {
            if let Some(status) = process.exit_status() {
                panic!("the gateway exited at once, {status}:\n{}", process.output().tail(50));
            }
            let lines = process.output().lines(Stream::Out);
            lines.iter().find_map(|line| started_port(line)).ok_or_else(|| process.output().tail(20))
        };
        let port = eventually("the log line with Started", START_WITHIN, started).await;
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

    pub fn pid(&self) -> i32 {
        self.process.pid()
    }

    /// A request without an API key.
    pub fn anonymous(&self, method: &str, target: &str) -> Request {
        Request::new(self.addr, method, target).described()
    }

    pub fn request(&self, method: &str, target: &str) -> Request {
        self.anonymous(method, target).header("x-api-key", &self.key)
    }

    /// A request that an upstream answers. Its answer is not in the OpenAPI document.
    pub fn upstream_request(&self, method: &str, target: &str) -> Request {
        self.upstream_request_with(&self.key, method, target)
    }

    /// [`Self::upstream_request`] with another API key.
    pub fn upstream_request_with(&self, key: &str, method: &str, target: &str) -> Request {
        Request::new(self.addr, method, target).header("x-api-key", key)
    }

    pub async fn get(&self, target: &str) -> Answer {
        self.request("GET", target).send().await
    }

    /// A run of `function`: synchronous, unless a header is added.
    pub fn run(&self, function: &str, input: &Value) -> Request {
        self.request("POST", "/run").json(&json!({ "functionId": function, "inputData": input }))
    }

    /// Starts an asynchronous run, which must be accepted. Returns its job id.
    pub async fn run_async(&self, function: &str, input: &Value) -> String {
        let answer = self.run(function, input).header("x-async", "true").send().await.expect(202);
        let accepted = answer.json();
        assert_eq!(accepted["status"], "ACCEPTED");
        let id = accepted["jobId"].as_str().expect("a job id").to_owned();
        assert_eq!(answer.need("location"), format!("/status/{id}"));
        id
    }

    /// Waits for the result of a job.
    pub async fn result_of(&self, id: &str) -> Answer {
        let done = || async {
            let answer = self.get(&format!("/status/{id}?wait=20")).await.expect(200);
            if is_pending(&answer) { Err(answer.text()) } else { Ok(answer) }
        };
        eventually(&format!("the result of {id}"), 3 * SOON, done).await
    }

    /// The value of a series in `/metrics`. `series` includes the labels. `None`: no such series.
    pub async fn metric(&self, series: &str) -> Option<f64> {
        series_value(&self.anonymous("GET", "/metrics").send().await.expect(200).text(), series)
    }

    pub async fn wait_for_metric(&self, series: &str, expected: f64) {
        let seen = || async {
            let value = self.metric(series).await;
            if value == Some(expected) { Ok(()) } else { Err(format!("{value:?}")) }
        };
        eventually(&format!("{series} {expected}"), SOON, seen).await;
    }

    /// Waits until the series is `least` or more.
    pub async fn wait_for_metric_at_least(&self, series: &str, least: f64) {
        let reached = || async {
            let value = self.metric(series).await;
            if value >= Some(least) { Ok(()) } else { Err(format!("{value:?}")) }
        };
        eventually(&format!("{series} {least} or more"), SOON, reached).await;
    }

    /// Waits until `/health` answers with a status and a body that `is_expected` accepts.
    pub async fn wait_for_health(&self, what: &str, is_expected: impl Fn(u16, &Value) -> bool) -> Value {
        let expected = || async {
            let answer = self.anonymous("GET", "/health").send().await;
            let health = answer.json();
            if is_expected(answer.status, &health) { Ok(health) } else { Err(health.to_string()) }
        };
        eventually(&format!("/health: {what}"), 3 * SOON, expected).await
    }

    /// The log lines that are JSON.
    pub fn log(&self) -> Vec<Value> {
        let lines = self.process.output().lines(Stream::Out);
        lines.iter().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Waits for a text in the output. Log lines are written with a delay.
    pub async fn wait_for_output(&self, text: &str) {
        self.process.wait_for_output(text, SOON).await;
    }

    /// Peak resident memory, in bytes.
    pub fn peak_memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.process.pid()));
        let status = status.expect("the gateway runs");
        let line =
            status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("the line exists on Linux");
        let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
        kib * 1024
    }

    /// Changes the soft limit of open files of the running process.
    pub fn limit_open_files(&self, soft: u64) {
        let pid = self.process.pid().to_string();
        let limit = format!("--nofile={soft}:");
        let status = std::process::Command::new("prlimit").args(["--pid", &pid, &limit]).status();
        assert!(status.expect("prlimit (util-linux) is there").success());
    }

    /// The open file descriptors.
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

    /// Waits for the exit.
    pub async fn wait_for_exit(&self, deadline: Duration) -> ExitStatus {
        self.process.wait_for_exit(deadline).await
    }

    /// Waits until there are no waiters and no jobs in flight.
    pub async fn wait_until_idle(&self) {
        self.wait_for_metric("infra_waiters", 0.0).await;
        self.wait_for_metric("infra_jobs_in_flight", 0.0).await;
    }

    /// Asserts a clean exit: idle, then SIGTERM, then exit code 0.
    pub async fn finish(self) {
        self.wait_until_idle().await;
        self.stop().await;
    }

    /// SIGTERM, then exit code 0, with any number of jobs in flight.
    pub async fn stop(self) {
        self.signal(Signal::SIGTERM);
        let status = self.wait_for_exit(STOP_WITHIN).await;
        assert_eq!(status.code(), Some(0), "after SIGTERM:\n{}", self.process.output().tail(50));
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        let ended = self.process.exit_status().is_some();
        assert!(ended, "a test must stop its gateway: with finish, stop or kill");
        for secret in &self.secrets {
            assert!(!self.process.output().contains(secret), "a secret is in the log");
        }
    }
}

/// The value of a series in a text of `/metrics`.
pub fn series_value(metrics: &str, series: &str) -> Option<f64> {
    let value = metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    value.and_then(|value| value.parse().ok())
}

/// Whether this answer of `/status` reports a pending job.
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
