//! How long an interpreter takes in the sandbox of the worker: `python3 main.py`, from the start of its
//! process to its end, one after the other. A run that finds no process cannot take less.

use clap::Parser;
use infra_controller::config::{Network, SandboxMode};
use infra_controller::worker::{Enclosed, Sandbox, SandboxSettings, View};
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

const MEMORY_MB: u64 = 128;
const WORK_MB_MAX: u64 = 512;
/// Not those of a worker beside it.
const UID_FIRST: u32 = 1_500_000_000;

#[derive(Parser)]
struct Args {
    /// Directory with main.py.
    #[arg(long)]
    code: PathBuf,
    /// An empty directory.
    #[arg(long)]
    runs_dir: PathBuf,
    #[arg(long, default_value_t = 100)]
    runs: u32,
    /// As `sandbox.network`.
    #[arg(long, default_value = "public")]
    network: String,
    #[arg(long, default_value = "/usr/bin/python3")]
    program: PathBuf,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let network = match args.network.as_str() {
        "none" => Network::None,
        "public" => Network::Public,
        "full" => Network::Full,
        other => anyhow::bail!("{other}: the networks are none, public and full"),
    };
    let settings = SandboxSettings {
        mode: SandboxMode::Required,
        network,
        work_mb_max: WORK_MB_MAX,
        uid_first: UID_FIRST,
        runs_dir: args.runs_dir.clone(),
        hidden_dirs: Vec::new(),
    };
    let sandbox = Sandbox::probe(&settings).await.map_err(anyhow::Error::msg)?;
    let mut took = Vec::new();
    for slot in 1..=args.runs {
        took.push(start(&sandbox, &args, network, slot)?);
    }
    took.sort_unstable();
    let ms = |at: usize| took.get(at).map_or(0.0, |took| took.as_secs_f64() * 1000.0);
    println!("{}", serde_json::json!({ "runs": took.len(), "p50_ms": ms(took.len() / 2), "min_ms": ms(0) }));
    Ok(())
}

fn start(sandbox: &Sandbox, args: &Args, network: Network, slot: u32) -> anyhow::Result<Duration> {
    let program: [OsString; 2] = [args.program.clone().into(), "main.py".into()];
    let view =
        View { slot, function_dir: &args.code, tmp_dir: &args.runs_dir, memory_mb: MEMORY_MB, network };
    let env = [("PAYLOAD", r#"{"name":"Ada"}"#), ("PYTHONUNBUFFERED", "1"), ("REQUEST_ID", "x")];
    let env: BTreeMap<String, String> = env.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    let began = Instant::now();
    let Enclosed { mut command, setup, mut fence } = sandbox.enclose(&view, &program, &env, None)?;
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // SAFETY: it makes system calls only, as it says.
    #[expect(unsafe_code, reason = "the child sets itself up between fork and exec")]
    unsafe {
        command.pre_exec(move || setup.apply())
    };
    let child = command.spawn()?;
    drop(command);
    fence.admit()?;
    let output = child.wait_with_output()?;
    let took = began.elapsed();
    let printed = String::from_utf8_lossy(&output.stdout);
    anyhow::ensure!(printed.contains("Hello, Ada!"), "{printed}{}", String::from_utf8_lossy(&output.stderr));
    Ok(took)
}
