//! The local worker of `dev` with functions that misbehave.

use crate::harness::gateway::{Gateway, is_pending, put_file};
use crate::harness::leftovers::children;
use crate::harness::platform::{Platform, new_key};
use crate::harness::process::{Process, Scratch};
use crate::harness::{SOON, Setup, eventually, join_all, path_env, platform::Backend, spawn};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::path::Path;

async fn dev() -> Platform {
    Setup::new(Backend::Dev).start().await
}

async fn run(gateway: &Gateway, function: &str, input: &Value) -> Value {
    gateway.run(function, input).send().await.expect(200).json()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn threads_run_and_output_is_kept() {
    let platform = dev().await;
    let gateway = &platform.gateway;
    for (source, status, code, stdout) in [
        (
            "import threading
threads = [threading.Thread(target=threading.Event().wait, args=(0.3,)) for _ in range(32)]
[t.start() for t in threads]; [t.join() for t in threads]
print(len(threads), 'threads')",
            "SUCCESS",
            0,
            "32 threads\n",
        ),
        ("import os; print('step 1 done'); os.kill(os.getpid(), 11)", "FAILED", 139, "step 1 done\n"),
        (
            "import time; print('begun'); x = b'x' * (400 << 20); time.sleep(20); print('ended')",
            "FAILED",
            137,
            "begun\n",
        ),
    ] {
        let function = gateway.upload_python(source).await;
        let result = run(gateway, &function, &json!({})).await;
        assert_eq!(result["status"], status, "{result}");
        assert_eq!((&result["exitCode"], &result["stdout"]), (&json!(code), &json!(stdout)), "{result}");
        assert_eq!(result["allocatedMemoryMb"], 128);
    }
    platform.finish().await;
}

/// The maximum memory of a function, in MiB.
const CALLER_MB: u64 = 10_240;

/// A number of runs with that much memory that does not fit into the machine.
fn callers() -> u64 {
    let info = std::fs::read_to_string("/proc/meminfo").expect("Linux");
    let total = info.lines().find_map(|line| line.strip_prefix("MemTotal:")).expect("the total");
    let kib: u64 = total.trim().trim_end_matches(" kB").parse().expect("a number");
    (kib / 1024 / CALLER_MB + 1).max(2)
}

/// The callers hold all memory that may be reserved when their inner runs arrive. One caller polls for its
/// inner run.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn functions_that_call_functions_complete() {
    let platform = dev().await;
    let gateway = &platform.gateway;
    let caller = "import json, os, time, urllib.request
asked = json.loads(os.environ['PAYLOAD'])
depth, polls = asked['depth'], asked['polls']
def ask(path, body=None):
    headers = {'x-api-key': asked['key'], 'content-type': 'application/json'}
    if polls:
        headers['x-async'] = 'true'
    return json.load(urllib.request.urlopen(urllib.request.Request(asked['url'] + path, body, headers)))
if depth > 0:
    inner = dict(asked, depth=depth - 1)
    inner = ask('/run', json.dumps({'functionId': os.environ['FUNCTION_ID'], 'inputData': inner}).encode())
    while polls and inner['status'] in ('ACCEPTED', 'pending'):
        time.sleep(0.02)
        job = inner['jobId']
        inner = dict(ask('/status/' + job), jobId=job)
    assert inner['status'] == 'SUCCESS', inner
print('depth', depth)";
    let function = gateway.upload_python(caller).await;
    let bigger = gateway.request("PUT", &format!("/functions/{function}"));
    bigger.json(&json!({ "memoryMb": CALLER_MB })).send().await.expect(200);
    let url = format!("http://{}", gateway.addr());
    let runs = (0..callers()).map(|n| {
        let depth = if n == 0 { 2 } else { 1 };
        let input = json!({ "depth": depth, "polls": n == 0, "url": url, "key": gateway.key() });
        let request = gateway.run(&function, &input);
        spawn(async move { (depth, request.send().await.expect(200).json()) })
    });
    for (depth, result) in join_all("the callers", 10 * SOON, runs.collect()).await {
        assert_eq!(result["stdout"], format!("depth {depth}\n"), "{result}");
    }
    platform.finish().await;
}

/// Starts `dev` with its data in `dir`, and without a sandbox: a function reaches the gateway.
async fn start_in(dir: &Scratch, key: &str) -> Gateway {
    let [data, conf] = ["data", "conf"].map(|name| dir.path().join(name).display().to_string());
    std::fs::create_dir_all(&conf).expect("the directory is writable");
    put_file(&Path::new(&conf).join("worker.toml"), "sandbox.mode = \"off\"\n");
    let env = [("INFRA_API_KEY".to_owned(), key.to_owned())];
    Gateway::start(&["dev", "--port", "0", "--data-dir", &data, "--conf", &conf], &env, key, &[]).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_kills_the_gateway_fails_after_three_starts() {
    let (dir, key) = (Scratch::new("poisoned"), new_key());
    let gateway = start_in(&dir, &key).await;
    // The test names the process when it is ready.
    let source = "import json, os, time
data = json.loads(os.environ['PAYLOAD'])['data']
with open(data + '/starts', 'a') as starts:
    starts.write('start\\n')
while not os.path.exists(data + '/gateway'):
    time.sleep(0.01)
gateway = int(open(data + '/gateway').read())
os.remove(data + '/gateway')
os.kill(gateway, 9)
time.sleep(600)";
    let function = gateway.upload_python(source).await;
    let data = dir.path().join("data");
    let id = gateway.run_async(&function, &json!({ "data": data })).await;
    let mut gateway = gateway;
    for _ in 0..3 {
        put_file(&data.join("gateway"), &gateway.pid().to_string());
        assert_eq!(gateway.wait_for_exit(4 * SOON).await.code(), None, "it was killed");
        drop(gateway);
        gateway = start_in(&dir, &key).await;
    }
    let result = gateway.result_of(&id).await;
    assert!(!is_pending(&result));
    let result = result.json();
    assert_eq!(result["status"], "FAILED", "{result}");
    let stderr = result["stderr"].as_str().expect("a text");
    assert!(stderr.contains("was started 3 times"), "{result}");
    let starts = std::fs::read_to_string(data.join("starts")).expect("it was started");
    assert_eq!(starts.lines().count(), 3);
    // Other functions run again.
    assert_eq!(run(&gateway, "hello", &json!({ "name": "Ada" })).await["status"], "SUCCESS");
    gateway.finish().await;
}

/// The arguments of `unshare` that create a PID namespace on this machine, if it is permitted.
fn namespace() -> Option<&'static [&'static str]> {
    const WAYS: [&[&str]; 2] = [
        &["--pid", "--fork", "--mount-proc"],
        &["--user", "--map-root-user", "--pid", "--fork", "--mount-proc"],
    ];
    let works = |way: &&&[&str]| {
        let tried = std::process::Command::new("unshare").args(**way).arg("true").status();
        tried.is_ok_and(|status| status.success())
    };
    WAYS.iter().find(works).copied()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn process_1_reaps_orphans_and_forwards_signals() {
    // Not skipped: a skipped test would go unnoticed.
    let way = namespace().expect("`unshare --pid` is permitted: run this as root, or with user namespaces");
    let dir = Scratch::new("container");
    let data = dir.path().join("data");
    let program = Path::new(env!("CARGO_BIN_EXE_infra-controller")).to_str().expect("the path is UTF-8");
    let mut args = way.to_vec();
    args.extend(["--kill-child", "--", program, "dev", "--port", "0"]);
    args.extend(["--data-dir", data.to_str().expect("the path is UTF-8")]);
    let unshare = Process::start("unshare", Path::new("unshare"), &args, &path_env(), dir.path());
    let unshare = unshare.expect("setpriv (util-linux) is there");
    unshare.wait_for_output(" Started\"", 2 * SOON).await;
    let [init] = children(unshare.pid())[..] else { panic!("unshare has one child") };
    // A trial of the sandbox may have left an orphan.
    let server = eventually("process 1 with the server alone", SOON, || async {
        let seen = children(init);
        if seen.len() == 1 { Ok(seen) } else { Err(format!("{seen:?}")) }
    })
    .await;

    // Its parent exits at once, so it becomes a child of process 1. It runs until the test has seen it.
    let go = dir.path().join("go");
    let script = "(while [ ! -e \"$1\" ]; do sleep 0.05; done) & exit 0";
    let orphan = std::process::Command::new("nsenter")
        .args(["--target", &init.to_string(), "--pid", "--mount", "sh", "-c", script, "sh"])
        .arg(&go)
        .status();
    assert!(orphan.expect("nsenter (util-linux) is there").success());
    let adopted = || async {
        let seen = children(init);
        if seen.len() == 2 { Ok(()) } else { Err(format!("{seen:?}")) }
    };
    eventually("the orphan", SOON, adopted).await;
    std::fs::write(&go, "").expect("the directory is writable");
    // A process that is not reaped would stay in the list.
    let reaped = || async {
        let seen = children(init);
        if seen == server { Ok(()) } else { Err(format!("{seen:?}")) }
    };
    eventually("the end of the orphan", SOON, reaped).await;

    kill(Pid::from_raw(init), Signal::SIGTERM).expect("it runs");
    let status = unshare.wait_for_exit(2 * SOON).await;
    assert_eq!(status.code(), Some(0), "{}", unshare.output().tail(20));
}
