//! HTTP clients as processes of their own, each run to its end.

use super::gateway::Gateway;
use super::process::{Process, Stream};
use super::wait::eventually;
use std::path::Path;
use std::time::Duration;

/// Some hundred calls and a few runs, on a busy machine.
const CLIENT_WITHIN: Duration = Duration::from_secs(180);

/// A file of `tests/it/clients`.
pub fn script(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/clients").join(name).display().to_string()
}

/// Where Node.js finds undici.
pub fn node_modules() -> String {
    let modules = Path::new(env!("CARGO_MANIFEST_DIR")).join(".node-test/node_modules");
    assert!(
        modules.join("undici").exists(),
        "{} holds no undici: run `make test`, which installs Node.js and it",
        modules.display()
    );
    modules.display().to_string()
}

/// Where a script finds the gateway, and with which key.
pub fn env(gateway: &Gateway) -> Vec<(String, String)> {
    let mut env = super::path_env();
    env.push(("BASE_URL".into(), format!("http://{}", gateway.addr())));
    env.push(("API_KEY".into(), gateway.key().to_owned()));
    env.push(("PYTHONIOENCODING".into(), "utf-8".into()));
    env
}

/// Runs a client, which must exit with 0, and returns the lines of its standard output.
pub async fn run(
    name: &str,
    program: &Path,
    args: &[&str],
    env: &[(String, String)],
    dir: &Path,
) -> Vec<String> {
    let process = Process::start(name, program, args, env, dir).expect("setpriv (util-linux) is there");
    let ended = || async { process.exit_status().ok_or_else(|| process.output().tail(50)) };
    let status = eventually(&format!("the end of {name}"), CLIENT_WITHIN, ended).await;
    assert!(status.success(), "{name} ends with {status}:\n{}", process.output().tail(100));
    process.output().lines(Stream::Out)
}
