//! Clients of the old controller, in their own languages and with their own HTTP libraries. They are written
//! from the contract, and check shapes, words and types of every answer.

use crate::harness::aws::venv;
use crate::harness::process::Scratch;
use crate::harness::upload::printing;
use crate::harness::{Platform, Setup, client};
use base64::Engine;
use std::path::Path;

on_both_backends!(python_clients_get_the_documented_answers, node_clients_get_the_documented_answers);

/// With urllib, as in the agent of the workers.
async fn python_clients_get_the_documented_answers(setup: Setup) {
    let platform = setup.start().await;
    run_client(&platform, "python_client.py", &venv("python"), &[]).await;
    platform.finish().await;
}

/// With undici and ten pipelined requests, as in the backend of the dashboard.
async fn node_clients_get_the_documented_answers(setup: Setup) {
    let modules = client::node_modules();
    let platform = setup.start().await;
    run_client(&platform, "node_client.cjs", Path::new("node"), &[("NODE_PATH", modules)]).await;
    platform.finish().await;
}

/// Runs a client of `tests/it/clients`, which must exit with 0.
async fn run_client(platform: &Platform, name: &str, program: &Path, more: &[(&str, String)]) {
    let dir = Scratch::new("client");
    let mut env = client::env(&platform.gateway);
    env.push(("HAS_LOCAL_WORKER".into(), u8::from(platform.runs_code()).to_string()));
    let code = base64::engine::general_purpose::STANDARD.encode(printing("of the client"));
    env.push(("CODE_BASE64".into(), code));
    env.extend(more.iter().map(|(name, value)| ((*name).to_owned(), value.clone())));
    client::run(name, program, &[&client::script(name)], &env, dir.path()).await;
}
