//! HTTP clients in separate processes.

use super::gateway::Gateway;
use super::process::{Process, Stream};
use std::path::Path;
use std::time::Duration;

/// Deadline for several hundred requests.
const CLIENT_WITHIN: Duration = Duration::from_secs(180);

/// The path of a file in `tests/it/clients`.
pub fn script(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/clients").join(name).display().to_string()
}

/// The directory where Node.js finds undici.
pub fn node_modules() -> String {
    let modules = Path::new(env!("CARGO_MANIFEST_DIR")).join(".node-test/node_modules");
    assert!(
        modules.join("undici").exists(),
        "{} holds no undici: run `make test`, which installs Node.js and it",
        modules.display()
    );
    modules.display().to_string()
}

/// The environment with the address and the key of the gateway.
pub fn env(gateway: &Gateway) -> Vec<(String, String)> {
    let mut env = super::path_env();
    env.push(("BASE_URL".into(), format!("http://{}", gateway.addr())));
    env.push(("API_KEY".into(), gateway.key().to_owned()));
    env.push(("PYTHONIOENCODING".into(), "utf-8".into()));
    env
}

/// Runs a client, which must exit with 0. Returns the lines of its standard output.
pub async fn run(
    name: &str,
    program: &Path,
    args: &[&str],
    env: &[(String, String)],
    dir: &Path,
) -> Vec<String> {
    let process = Process::start(name, program, args, env, dir).expect("setpriv (util-linux) is there");
    let status = process.wait_for_exit(CLIENT_WITHIN).await;
    assert!(status.success(), "{name} ends with {status}:\n{}", process.output().tail(100));
    process.output().lines(Stream::Out)
}
