//! The rules and alerts of `deploy/prometheus` and the dashboards of `deploy/grafana`: they are valid, each
//! alert has its tests and its runbook section, and each expression returns data from a live fleet.

use crate::harness::aws::venv;
use crate::harness::conf_lines::{limit_lines, upstream_lines};
use crate::harness::gateway::Conf;
use crate::harness::platform::HELLO;
use crate::harness::process::{Process, Scratch, start_on_free_port};
use crate::harness::tls::Authority;
use crate::harness::tls_gateway::NAME;
use crate::harness::upload::Function;
use crate::harness::upstream::Upstream;
use crate::harness::wait::pause;
use crate::harness::{Gateway, Setup, client, path_env};
use serde_json::json;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The script that reads rules and dashboards.
const SCRIPT: &str = "dashboards.py";
/// The runs of all tests of alerts take a few seconds.
const PROMTOOL_WITHIN: Duration = Duration::from_secs(120);
/// Pause between two rounds of the light load.
const LOAD_EVERY: Duration = Duration::from_millis(500);

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The `.yml` files in a folder of `deploy/prometheus`, in order.
fn yaml_files(folder: &str) -> Vec<String> {
    let place = root().join("deploy/prometheus").join(folder);
    let entries = std::fs::read_dir(&place).unwrap_or_else(|e| panic!("{}: {e}", place.display()));
    let paths = entries.map(|entry| entry.expect("a readable folder").path());
    let is_yaml = |path: &PathBuf| path.extension().is_some_and(|ending| ending == "yml");
    let mut files: Vec<String> = paths.filter(is_yaml).map(|path| path.display().to_string()).collect();
    files.sort();
    assert!(!files.is_empty(), "{} is empty", place.display());
    files
}

async fn promtool(command: &str, files: &[String]) {
    let dir = Scratch::new("promtool");
    let mut args: Vec<&str> = command.split(' ').collect();
    args.extend(files.iter().map(String::as_str));
    let process = Process::start("promtool", Path::new("promtool"), &args, &path_env(), dir.path());
    let process = process.expect("setpriv (util-linux) is there");
    let status = process.wait_for_exit(PROMTOOL_WITHIN).await;
    assert!(status.success(), "promtool {command} ends with {status}:\n{}", process.output().tail(200));
}

#[tokio::test]
async fn rules_are_valid_and_each_alert_fires_in_its_test() {
    let config = root().join("deploy/prometheus/prometheus.yml").display().to_string();
    promtool("check config", &[config]).await;
    promtool("check rules", &yaml_files("rules")).await;
    promtool("test rules", &yaml_files("tests")).await;
}

#[tokio::test]
async fn dashboards_rules_and_documents_fit_together() {
    run_script("check", &[]).await;
}

async fn run_script(command: &str, more: &[&str]) {
    let (dir, root) = (Scratch::new("dashboards"), root().display().to_string());
    let script = client::script(SCRIPT);
    let mut args = vec![script.as_str(), command, &root];
    args.extend(more);
    client::run(SCRIPT, &venv("python"), &args, &path_env(), dir.path()).await;
}

/// A Prometheus with the rules that ship. It scrapes and evaluates every second.
struct Prometheus {
    url: String,
    _process: Process,
    _dir: Scratch,
}

impl Prometheus {
    async fn start(node: SocketAddr, worker: SocketAddr) -> Self {
        let dir = Scratch::new("prometheus");
        // JSON is YAML.
        let config = json!({
            "global": { "scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s" },
            "rule_files": yaml_files("rules"),
            "scrape_configs": [
                { "job_name": "infra-controller", "static_configs": [{ "targets": [node] }] },
                { "job_name": "infra-worker", "static_configs": [{ "targets": [worker] }] },
            ],
        });
        let file = dir.path().join("prometheus.yml");
        std::fs::write(&file, config.to_string()).expect("the scratch directory is writable");
        let start = |port: u16| {
            let args = [
                format!("--config.file={}", file.display()),
                format!("--storage.tsdb.path={}", dir.path().join("data").display()),
                format!("--web.listen-address=127.0.0.1:{port}"),
            ];
            let args: Vec<&str> = args.iter().map(String::as_str).collect();
            Process::start("prometheus", Path::new("prometheus"), &args, &path_env(), dir.path())
        };
        let is_up = |port| std::net::TcpStream::connect(("127.0.0.1", port)).is_ok();
        let (process, port) = start_on_free_port("prometheus", start, is_up).await;
        Self { url: format!("http://127.0.0.1:{port}"), _process: process, _dir: dir }
    }
}

/// A limit that is reached, an upstream and a TLS listener.
fn conf(service: &Upstream) -> Conf {
    let one_an_hour = "rate = 1\nperiod_s = 3600\nburst = 1\non_redis_loss = \"local\"\n";
    let identity = Authority::new().issue(NAME);
    Conf {
        server: "[tls]\nport = 0\naddress = \"127.0.0.1\"\ncertificate = \"certificate.pem\"\n\
                 key = \"key.pem\"\n"
            .to_owned(),
        limits: limit_lines("reads", "key", "/functions/:id", one_an_hour),
        upstreams: upstream_lines("ai", &[service.addr()], "scope = \"none\"\n"),
        files: vec![
            ("certificate.pem".to_owned(), identity.certificate),
            ("key.pem".to_owned(), identity.key),
        ],
        ..Conf::default()
    }
}

/// A run that succeeds, one that is repeated, one that fails, a rejected and a forwarded request, and one for
/// `/health`. The function that fails is a new one, so that the worker fetches code in every round.
async fn light_load(gateway: &Gateway) {
    let failing = gateway.create(&Function::python("raise SystemExit(3)")).await;
    gateway.run(HELLO, &json!(1)).send().await;
    gateway.run(HELLO, &json!(2)).header("idempotency-key", "one-of-the-dashboards").send().await;
    gateway.run(&failing, &json!(3)).send().await;
    gateway.get(&format!("/functions/{HELLO}")).await;
    gateway.upstream_request("GET", "/ai/x").send().await;
    gateway.anonymous("GET", "/health").send().await;
    pause(LOAD_EVERY).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_expression_returns_data() {
    let service = Upstream::start().await;
    let platform = Setup::serve().own_worker().dead_letters().conf(conf(&service)).start().await;
    let gateway = &platform.gateway;
    let worker = platform.own_worker().expect("our own worker").addr().await;
    let prometheus = Prometheus::start(gateway.addr(), worker).await;
    let load = async {
        loop {
            light_load(gateway).await;
        }
    };
    let arguments = [prometheus.url.as_str()];
    tokio::select! {
        () = run_script("query", &arguments) => {}
        () = load => unreachable!("it never ends"),
    }
    platform.finish().await;
}
