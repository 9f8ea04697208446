//! The old controller's clients, each in its own language and with its own HTTP library, against either
//! backend. They are written from the contract, and read the shapes, words and types of every answer.

use crate::harness::aws::venv;
use crate::harness::process::{Process, Scratch};
use crate::harness::upload::printing;
use crate::harness::{Platform, Setup, eventually, path_env};
use base64::Engine;
use std::path::{Path, PathBuf};
use std::time::Duration;

over_both!(in_python, in_node);

/// Some hundred calls and a few runs, on a busy machine.
const CLIENT_WITHIN: Duration = Duration::from_secs(180);

/// urllib, as the workers' agent uses it.
async fn in_python(setup: Setup) {
    let platform = setup.start().await;
    let script = script("agent.py");
    speak(&platform, "agent.py", &venv("python"), &[&script]).await;
    platform.finish().await;
}

/// undici with ten requests under way on a connection, as the BFF uses it.
async fn in_node(setup: Setup) {
    let modules = Path::new(env!("CARGO_MANIFEST_DIR")).join(".node-test/node_modules");
    assert!(
        modules.join("undici").exists(),
        "{} holds no undici: run `make test`, which installs Node.js and it",
        modules.display()
    );
    let platform = setup.start().await;
    let script = script("bff.cjs");
    speak(&platform, "bff.cjs", Path::new("node"), &[&script]).await;
    platform.finish().await;
}

fn script(name: &str) -> String {
    let path: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/clients").join(name);
    path.display().to_string()
}

/// Runs a client to its end, which must be a good one.
async fn speak(platform: &Platform, name: &str, program: &Path, args: &[&str]) {
    let gateway = &platform.gateway;
    let dir = Scratch::new("client");
    let modules = Path::new(env!("CARGO_MANIFEST_DIR")).join(".node-test/node_modules");
    let mut env = path_env();
    env.push(("BASE_URL".into(), format!("http://{}", gateway.addr())));
    env.push(("API_KEY".into(), gateway.key().to_owned()));
    env.push(("IS_LONE".into(), u8::from(!platform.is_serve()).to_string()));
    let code = base64::engine::general_purpose::STANDARD.encode(printing("of the BFF"));
    env.push(("CODE_BASE64".into(), code));
    env.push(("NODE_PATH".into(), modules.display().to_string()));
    env.push(("PYTHONIOENCODING".into(), "utf-8".into()));
    let process =
        Process::start(name, program, args, &env, dir.path()).expect("setpriv (util-linux) is there");
    let ended = || async { process.exit_status().ok_or_else(|| process.output().tail(50)) };
    let status = eventually(&format!("the end of {name}"), CLIENT_WITHIN, ended).await;
    assert!(status.success(), "{name} ends with {status}:\n{}", process.output().tail(100));
}
