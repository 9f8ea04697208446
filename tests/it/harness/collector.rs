//! A collector of spans (`tests/it/clients/otlp_receiver.py`).

use super::aws::venv;
use super::client;
use super::process::{Process, Scratch, Stream, free_port};
use super::wait::{SOON, eventually};
use serde_json::Value;
use std::time::Duration;

const READY_WITHIN: Duration = Duration::from_secs(60);

pub struct Collector {
    process: Process,
    port: u16,
    _dir: Scratch,
}

impl Collector {
    pub async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// Accepts spans and never answers.
    pub async fn start_hanging() -> Self {
        Self::start_with(&["hang"]).await
    }

    async fn start_with(more: &[&str]) -> Self {
        let (dir, port) = (Scratch::new("collector"), free_port());
        let (script, number) = (client::script("otlp_receiver.py"), port.to_string());
        let args: Vec<&str> = [script.as_str(), number.as_str()].iter().chain(more).copied().collect();
        let process =
            Process::start("otlp_receiver.py", &venv("python"), &args, &super::path_env(), dir.path());
        let process = process.expect("the venv's Python starts");
        process.wait_for_output("collector ready", READY_WITHIN).await;
        Self { process, port, _dir: dir }
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// The spans that have arrived.
    pub fn spans(&self) -> Vec<Value> {
        let lines = self.process.output().lines(Stream::Out);
        lines.iter().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Waits until a trace has at least `count` spans, and returns them.
    pub async fn trace(&self, trace_id: &str, count: usize) -> Vec<Value> {
        eventually(&format!("{count} spans of the trace {trace_id}"), 3 * SOON, || async {
            let all = self.spans();
            let of_trace: Vec<Value> =
                all.iter().filter(|span| span["traceId"] == trace_id).cloned().collect();
            if of_trace.len() >= count { Ok(of_trace) } else { Err(format!("{all:#?}")) }
        })
        .await
    }
}
