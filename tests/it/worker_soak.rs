//! Many runs on `dev`: memory, descriptors, mounts, processes and directories end where they began.
//!
//! It is short in `make test`. `make soak-worker` sets `SOAK_RUNS`.

use crate::harness::gateway::Conf;
use crate::harness::http::{Conn, Request};
use crate::harness::leftovers::Leftovers;
use crate::harness::platform::Backend;
use crate::harness::upload::Function;
use crate::harness::{Gateway, Platform, SOON, Setup, eventually, join_all, spawn};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// The variable with the number of runs.
const RUNS: &str = "SOAK_RUNS";
const RUNS_DEFAULT: usize = 600;
/// Clients, each with one run at a time.
const CLIENTS: usize = 16;
/// Each event with such a number ends its process, or is a program instead.
const FAILS_EACH: usize = 97;
const PROGRAM_EACH: usize = 53;
/// Deadline for each thousand of runs, on a busy machine with a debug build.
const THOUSAND_WITHIN: Duration = Duration::from_secs(120);
/// Runs after which a process is replaced, so that this happens here, too.
const HANDLER_RUNS_MAX: usize = 500;

/// What may be more at the end. The allocator keeps some memory, SQLite its cache, and a pool grows with its
/// use.
const MEMORY_MB: u64 = 64;
const DESCRIPTORS: usize = 64;
const PROCESSES: usize = 2 * CLIENTS;

#[derive(Debug)]
struct Footprint {
    memory_mb: u64,
    descriptors: usize,
    left: Leftovers,
}

impl Footprint {
    fn of(platform: &Platform) -> Self {
        let pid = platform.gateway.pid();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("Linux");
        let kib: u64 = line.trim().trim_end_matches(" kB").parse().expect("a number");
        Self {
            memory_mb: kib / 1024,
            descriptors: platform.gateway.open_files().len(),
            left: Leftovers::of(pid, &platform.data_dir().join("runs")),
        }
    }

    fn is_about(&self, before: &Self) -> bool {
        let (now, then) = (&self.left, &before.left);
        self.memory_mb <= before.memory_mb + MEMORY_MB
            && self.descriptors <= before.descriptors + DESCRIPTORS
            && now.mounts == 0
            && [(now.children, then.children), (now.groups, then.groups), (now.slots, then.slots)]
                .iter()
                .all(|(now, then)| *now <= then + PROCESSES)
    }
}

const HANDLER: &str = "calls = 0
def handler(event, context):
    global calls
    calls += 1
    print('event', event)
    return [event, calls, 1 // (event % 97)]";
const PROGRAM: &str = "import os; print('program', os.environ['PAYLOAD'])";

/// Sends runs with the numbers from `next` on, up to `end`.
async fn client(
    (addr, key): (SocketAddr, String),
    functions: [String; 2],
    next: Arc<AtomicUsize>,
    end: usize,
) {
    let mut conn = Conn::open(addr).await.expect("the gateway accepts connections");
    loop {
        let n = next.fetch_add(1, Ordering::Relaxed);
        if n >= end {
            return;
        }
        let is_program = n.is_multiple_of(PROGRAM_EACH);
        let body = json!({ "functionId": functions[usize::from(is_program)], "inputData": n });
        let run = Request::new(addr, "POST", "/run").header("x-api-key", &key).json(&body);
        conn.write(&run.to_bytes()).await.expect("the connection is kept");
        let result = conn.answer(false).await.expect("an answer").expect(200).json();
        check(n, is_program, &result);
    }
}

fn check(n: usize, is_program: bool, result: &Value) {
    if is_program {
        assert_eq!(result["stdout"], format!("program {n}\n"), "{result}");
        return;
    }
    let Some(quotient) = 1_usize.checked_div(n % FAILS_EACH) else {
        assert_eq!(
            (&result["status"], &result["stdout"]),
            (&json!("FAILED"), &json!(format!("event {n}\n")))
        );
        return;
    };
    let calls = result["data"][1].as_u64().unwrap_or_else(|| panic!("no number of calls: {result}"));
    assert!(calls >= 1 && calls <= HANDLER_RUNS_MAX as u64, "{result}");
    let data = json!([n, calls, quotient]);
    let stdout = format!("event {n}\n{data}\n");
    assert_eq!((&result["data"], &result["stdout"]), (&data, &json!(stdout)), "{result}");
}

async fn send(gateway: &Gateway, functions: &[String; 2], from: usize, to: usize) {
    let next = Arc::new(AtomicUsize::new(from));
    let at = (gateway.addr(), gateway.key().to_owned());
    let clients = (0..CLIENTS).map(|_| spawn(client(at.clone(), functions.clone(), Arc::clone(&next), to)));
    let thousands = u32::try_from((to - from) / 1000 + 1).expect("it fits");
    join_all("the runs", THOUSAND_WITHIN * thousands, clients.collect()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_runs_leave_nothing() {
    let runs = std::env::var(RUNS).map_or(RUNS_DEFAULT, |n| n.parse().expect("SOAK_RUNS is a number"));
    let platform = Setup::new(Backend::Dev)
        .conf(Conf { limits: "limit = []\n".into(), ..Conf::default() })
        .worker_setting("sandbox.mode", "required")
        .worker_setting("sandbox.network", "none")
        .worker_setting("warm.handler_runs_max", HANDLER_RUNS_MAX)
        .start()
        .await;
    let gateway = &platform.gateway;
    let functions = [
        gateway.create(&Function::python_handler(HANDLER)).await,
        gateway.create(&Function::python(PROGRAM)).await,
    ];
    // The first part fills caches and pools.
    let warm = runs / 5;
    send(gateway, &functions, 1, warm).await;
    gateway.wait_until_idle().await;
    let before = Footprint::of(&platform);
    send(gateway, &functions, warm, runs).await;
    gateway.wait_until_idle().await;
    let after = eventually("a footprint as before", 3 * SOON, || async {
        let now = Footprint::of(&platform);
        if now.is_about(&before) { Ok(now) } else { Err(format!("{now:?}, before {before:?}")) }
    })
    .await;
    println!("{runs} runs: {before:?} before, {after:?} after");
    platform.finish().await;
}
