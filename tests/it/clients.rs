//! The old controller's clients, each in its own language and with its own HTTP library, against either
//! backend. They are written from the contract, and read the shapes, words and types of every answer.

use crate::harness::aws::venv;
use crate::harness::process::Scratch;
use crate::harness::upload::printing;
use crate::harness::{Platform, Setup, client};
use base64::Engine;
use std::path::Path;

over_both!(in_python, in_node);

/// urllib, as the workers' agent uses it.
async fn in_python(setup: Setup) {
    let platform = setup.start().await;
    speak(&platform, "agent.py", &venv("python"), &[]).await;
    platform.finish().await;
}

/// undici with ten requests under way on a connection, as the BFF uses it.
async fn in_node(setup: Setup) {
    let modules = client::node_modules();
    let platform = setup.start().await;
    speak(&platform, "bff.cjs", Path::new("node"), &[("NODE_PATH", modules)]).await;
    platform.finish().await;
}

/// Runs a client of `tests/it/clients`, which must exit with 0.
async fn speak(platform: &Platform, name: &str, program: &Path, more: &[(&str, String)]) {
    let dir = Scratch::new("client");
    let mut env = client::env(&platform.gateway);
    env.push(("IS_LONE".into(), u8::from(!platform.is_serve()).to_string()));
    let code = base64::engine::general_purpose::STANDARD.encode(printing("of the BFF"));
    env.push(("CODE_BASE64".into(), code));
    env.extend(more.iter().map(|(name, value)| ((*name).to_owned(), value.clone())));
    client::run(name, program, &[&client::script(name)], &env, dir.path()).await;
}
