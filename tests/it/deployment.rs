//! The files of `deploy/`: the systemd unit, the image, and the messages that the unit waits for.

use crate::harness::gateway::Conf;
use crate::harness::platform::new_key;
use crate::harness::process::{Scratch, free_port};
use crate::harness::{Gateway, SOON, within};
use nix::sys::signal::Signal;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use tokio::net::UnixDatagram;

/// Exposure by `systemd-analyze security`, in tenths: 0 is no exposure, 100 is none of the settings.
const EXPOSURE_MAX: &str = "--threshold=15";
/// After the drain, a stop answers the clients that still wait, sends what was accepted and writes rows.
const STOP_AFTER_DRAIN_S: i64 = 15;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(file: &str) -> String {
    fs::read_to_string(root().join(file)).unwrap_or_else(|e| panic!("{file}: {e}"))
}

fn run(program: &str, args: &[&str], env: &[(&str, &str)]) -> Output {
    let run = Command::new(program).args(args).envs(env.iter().copied()).output();
    run.unwrap_or_else(|e| panic!("{program} ({e}): run `make test`, which installs what is missing"))
}

fn unit() -> String {
    read("deploy/systemd/infra-controller.service")
}

/// The values of one setting of the unit, in order.
fn settings<'a>(unit: &'a str, name: &str) -> Vec<&'a str> {
    unit.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('=')).collect()
}

fn number(unit: &str, name: &str) -> i64 {
    let [value] = settings(unit, name)[..] else { panic!("{name} is set once") };
    value.parse().unwrap_or_else(|e| panic!("{name}={value}: {e}"))
}

#[test]
fn the_unit_is_valid_and_confined() {
    let dir = Scratch::new("unit");
    // `verify` asks for the program.
    let text = unit().replace("/usr/local/bin/infra-controller", env!("CARGO_BIN_EXE_infra-controller"));
    for name in ["infra-controller.service", "infra-controller@.service"] {
        let file = dir.path().join(name);
        fs::write(&file, &text).expect("the scratch directory is writable");
        let file = file.to_str().expect("the path is UTF-8");
        let verified = run("systemd-analyze", &["verify", file], &[]);
        let said = String::from_utf8_lossy(&verified.stderr);
        assert!(verified.status.success() && said.is_empty(), "{name}: {said}");
        let rated = run("systemd-analyze", &["security", "--offline=true", EXPOSURE_MAX, file], &[]);
        let said = String::from_utf8_lossy(&rated.stdout);
        assert!(rated.status.success(), "{name}: {said}{}", String::from_utf8_lossy(&rated.stderr));
    }
}

/// A sandbox needs namespaces and mounts, so the unit of a worker has fewer settings.
#[test]
fn the_unit_of_a_worker_is_valid_and_fits_the_settings() {
    const WORKER_EXPOSURE_MAX: &str = "--threshold=40";
    /// After the drain, jobs are given back.
    const GIVEN_BACK_WITHIN_S: i64 = 10;
    let dir = Scratch::new("worker-unit");
    let unit = read("deploy/systemd/infra-worker.service");
    let text = unit.replace("/usr/local/bin/infra-controller", env!("CARGO_BIN_EXE_infra-controller"));
    let file = dir.path().join("infra-worker.service");
    fs::write(&file, &text).expect("the scratch directory is writable");
    let file = file.to_str().expect("the path is UTF-8");
    let verified = run("systemd-analyze", &["verify", file], &[]);
    let said = String::from_utf8_lossy(&verified.stderr);
    assert!(verified.status.success() && said.is_empty(), "{said}");
    let rated = run("systemd-analyze", &["security", "--offline=true", WORKER_EXPOSURE_MAX, file], &[]);
    let said = String::from_utf8_lossy(&rated.stdout);
    assert!(rated.status.success(), "{said}{}", String::from_utf8_lossy(&rated.stderr));
    let conf: toml::Table = toml::from_str(&read("conf/worker.toml")).expect("the shipped conf is TOML");
    let drain_s = conf["jobs"]["drain_s"].as_integer().expect("a number");
    assert!(number(&unit, "TimeoutStopSec") >= drain_s + GIVEN_BACK_WITHIN_S);
    assert_eq!(settings(&unit, "RestartPreventExitStatus"), ["78"]);
    assert_eq!(settings(&unit, "Type"), ["notify"]);
    // The sandbox works only without these; see the comments of the unit.
    for name in ["ProtectProc", "ProtectKernelTunables", "ProtectKernelLogs", "RestrictNamespaces"] {
        assert_eq!(settings(&unit, name), [""; 0], "{name}");
    }
}

#[test]
fn the_unit_fits_the_settings() {
    let unit = unit();
    let server: toml::Table = toml::from_str(&read("conf/server.toml")).expect("the shipped conf is TOML");
    let setting = |section: &str, name: &str| server[section][name].as_integer().expect("a number");
    let stop = setting("shutdown", "drain_timeout_s") + setting("shutdown", "lame_duck_ms") / 1000;
    assert!(number(&unit, "TimeoutStopSec") >= stop + STOP_AFTER_DRAIN_S);
    assert!(
        number(&unit, "TimeoutStartSec") >= 2 * setting("start", "deadline_s") + setting("fleet", "lease_s")
    );
    assert!(number(&unit, "LimitNOFILE") > 2 * setting("http", "connections_max"));
    assert_eq!(settings(&unit, "RestartPreventExitStatus"), ["78"]);
    assert_eq!(settings(&unit, "Type"), ["notify"]);
}

/// With a `conf/` directory, so that SIGHUP reads settings.
async fn start_notifying(socket: &Path) -> Gateway {
    let (dir, key) = (Scratch::new("notify"), new_key());
    Conf::default().write(&dir.path().join("conf"));
    let env = [
        ("NOTIFY_SOCKET".to_owned(), socket.display().to_string()),
        ("INFRA_API_KEY".to_owned(), key.clone()),
    ];
    Gateway::start_in(dir, &["dev", "--port", "0", "--conf", "conf"], &env, &key, &[]).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_service_manager_is_notified() {
    // The address of a Unix socket has 107 bytes at most, and the scratch directory may have more.
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("notify");
    let socket = UnixDatagram::bind(&path).expect("a socket");
    let next = async || {
        let mut message = [0; 256];
        let read = within("a message to the service manager", SOON, socket.recv(&mut message)).await;
        String::from_utf8_lossy(&message[..read.expect("a message")]).into_owned()
    };
    let gateway = start_notifying(&path).await;
    assert_eq!(next().await, "READY=1\n");
    gateway.signal(Signal::SIGHUP);
    let reloading = next().await;
    let since =
        reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").and_then(|rest| rest.strip_suffix('\n'));
    assert!(since.is_some_and(|usec| usec.parse::<u64>().is_ok()), "{reloading}");
    assert_eq!(next().await, "READY=1\n");
    gateway.signal(Signal::SIGTERM);
    assert_eq!(next().await, "STOPPING=1\n");
    assert_eq!(gateway.wait_for_exit(SOON).await.code(), Some(0));
}

/// A service manager that is gone stops nobody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_service_manager_is_reported() {
    let gateway = start_notifying(Path::new("/nowhere/notify")).await;
    gateway.wait_for_output("The service manager was not notified").await;
    gateway.stop().await;
}

/// The instructions of the Containerfile, each on one line.
fn instructions() -> Vec<String> {
    let text = read("deploy/Containerfile");
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    let whole = lines.join("\n").replace("\\\n", "");
    whole.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect()
}

/// Whether the builder sees the file: the last pattern of `.dockerignore` that matches it, or its folder,
/// decides.
fn is_sent(patterns: &str, file: &str) -> bool {
    let parts: Vec<&str> = file.split('/').collect();
    let matches = |pattern: &str| match pattern.strip_prefix("**/") {
        Some(name) => parts.contains(&name),
        None => pattern == "*" || file == pattern || file.starts_with(&format!("{pattern}/")),
    };
    let patterns = patterns.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    patterns.fold(true, |sent, pattern| match pattern.strip_prefix('!') {
        Some(pattern) => sent || matches(pattern),
        None => sent && !matches(pattern),
    })
}

#[test]
fn the_image_is_made_of_files_that_the_builder_sees() {
    let ignored = read(".dockerignore");
    let mut copied = Vec::new();
    for instruction in instructions() {
        let words: Vec<&str> = instruction.split_whitespace().collect();
        if let ["COPY", sources @ .., _] = &words[..]
            && !sources[0].starts_with("--from=")
        {
            copied.extend(sources.iter().map(|&source| source.to_owned()));
        }
    }
    assert!(copied.len() >= 7, "{copied:?}");
    for source in &copied {
        assert!(root().join(source).exists(), "COPY {source}: there is no such file");
        assert!(is_sent(&ignored, source), "COPY {source}: .dockerignore excludes it");
    }
    // What Cargo.toml names must exist in the image.
    for line in read("Cargo.toml").lines().filter_map(|line| line.strip_prefix("path = ")) {
        let path = line.trim_matches('"');
        assert!(copied.iter().any(|source| path.starts_with(source)), "{path} is not copied");
    }
    for file in
        ["README.md", ".env", "target/release/infra-controller", "dev-data/api-key", "state/x", ".git/config"]
    {
        assert!(!is_sent(&ignored, file), "{file} is sent to the builder");
    }
    for file in ["loadtest/report/report.html", "loadtest/__pycache__/stack.pyc"] {
        assert!(!is_sent(&ignored, file), "{file} is sent to the builder");
    }
}

#[test]
fn the_image_is_built_by_the_same_compiler_and_runs_without_root() {
    let instructions = instructions();
    let value = |name: &str| instructions.iter().filter_map(|line| line.strip_prefix(name)).next_back();
    let toolchain: toml::Table = toml::from_str(&read("rust-toolchain.toml")).expect("TOML");
    let channel = toolchain["toolchain"]["channel"].as_str().expect("a version");
    assert_eq!(value("ARG RUST_VERSION="), Some(channel));
    let user = value("USER ").and_then(|user| user.split(':').next()?.parse::<u32>().ok());
    assert!(user.is_some_and(|user| user > 0), "{user:?}");
    let build = instructions.iter().find(|line| line.contains("cargo build")).expect("a build");
    assert!(build.contains("--release --locked"), "{build}");
    // Exec form: the server is process 1 and receives the signals.
    assert_eq!(value("ENTRYPOINT "), Some(r#"["infra-controller"]"#));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_healthcheck_of_the_image_works() {
    let instructions = instructions();
    let check = instructions.iter().find(|line| line.starts_with("HEALTHCHECK")).expect("a health check");
    let command = check.split_once(" CMD ").expect("a command").1;
    let command: Vec<String> = serde_json::from_str(command).expect("exec form is JSON");
    let args: Vec<&str> = command[1..].iter().map(String::as_str).collect();
    let is_healthy = |port: u16| {
        tokio::task::block_in_place(|| run(&command[0], &args, &[("PORT", &port.to_string())]))
            .status
            .success()
    };
    let key = new_key();
    let env = [("INFRA_API_KEY".to_owned(), key.clone())];
    let gateway = Gateway::start(&["dev", "--port", "0"], &env, &key, &[]).await;
    assert!(is_healthy(gateway.addr().port()));
    assert!(!is_healthy(free_port()));
    gateway.finish().await;
}
