//! The code in the documents for authors of functions and of workers, run as it stands there.

use crate::harness::aws::{REGION, credentials_env, venv};
use crate::harness::leftovers::children;
use crate::harness::platform::{Backend, Platform};
use crate::harness::process::{Process, Scratch};
use crate::harness::upload::Function;
use crate::harness::{Gateway, SOON, Setup, eventually, path_env};
use crate::tidy::markdown::Document;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use std::path::Path;

/// The one block of a document in this language that contains `text`.
fn block(document: &str, language: &str, text: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(document);
    let contents = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{document}: {e}"));
    let blocks = Document::read(&contents).blocks.into_iter();
    let mut fit = blocks.filter(|block| block.language() == language && block.text.contains(text));
    let block = fit.next().unwrap_or_else(|| panic!("{document} has no {language} block with {text:?}"));
    assert!(fit.next().is_none(), "{document} has several {language} blocks with {text:?}");
    block.text
}

async fn run(gateway: &Gateway, function: &str, input: &Value) -> Value {
    gateway.run(function, input).send().await.expect(200).json()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn handlers_of_the_documents_run() {
    let platform = Setup::new(Backend::Dev).start().await;
    let gateway = &platform.gateway;
    let ada = json!({ "name": "Ada" });
    let python = block("docs/worker.md", "python", "# main.py");
    let node = block("docs/worker.md", "js", "// index.js");
    let of_api = block("docs/api.md", "python", "def handler(event, context):");
    let hello = json!({ "message": "Hello, Ada!" });
    for (function, expected) in [
        (Function::python_handler(&python), &hello),
        (Function::new("nodejs", "index.js", &node, Some("index.handler")), &hello),
        (Function::python_handler(&of_api), &json!({ "greeting": "Hello, Ada" })),
    ] {
        let result = gateway.create_and_run(&function, &ada).await;
        assert_eq!((&result["status"], &result["data"]), (&json!("SUCCESS"), expected), "{result}");
    }
    // The file that works both ways.
    let both = format!("{python}\n{}", block("docs/worker.md", "python", "__main__"));
    for function in [Function::python(&both), Function::python_handler(&both)] {
        let result = gateway.create_and_run(&function, &ada).await;
        let printed: Value = serde_json::from_str(result["stdout"].as_str().expect("a text")).expect("JSON");
        assert_eq!((&result["status"], &printed), (&json!("SUCCESS"), &hello), "{result}");
    }
    platform.finish().await;
}

/// The worker of docs/worker-protocol.md. A dead worker would be noticed after six minutes there.
fn start_minimal(platform: &Platform, dir: &Scratch) -> Process {
    let code = block("docs/worker-protocol.md", "python", "import boto3, redis");
    assert!(code.contains("VisibilityTimeout=360"), "the replacement below fits no more");
    let file = dir.path().join("worker.py");
    std::fs::write(&file, code.replace("VisibilityTimeout=360", "VisibilityTimeout=3")).expect("writable");
    let fleet = platform.fleet();
    let mut env = path_env();
    env.extend(credentials_env());
    for (name, value) in [
        ("AWS_DEFAULT_REGION", REGION.to_owned()),
        ("AWS_ENDPOINT_URL", format!("http://{}", fleet.cloud.addr())),
        ("SQS_URL", fleet.cloud.queue_url.clone()),
        ("REDIS_URL", fleet.redis.url()),
        ("PYTHONDONTWRITEBYTECODE", "1".to_owned()),
    ] {
        env.push((name.to_owned(), value));
    }
    let args = [file.to_str().expect("the path is UTF-8")];
    Process::start("worker.py", &venv("python"), &args, &env, dir.path()).expect("the venv's Python starts")
}

/// Every row of the table in "Test a worker".
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_worker_of_the_protocol_passes_its_own_table() {
    let mut platform = Setup::serve().no_worker().start().await;
    let dir = Scratch::new("minimal-worker");
    let mut worker = start_minimal(&platform, &dir);

    let prints = "import json, os, sys
asked = json.loads(os.environ['PAYLOAD'])
print(asked, os.environ['GREETING'])
print('err', file=sys.stderr)
sys.exit(asked['code'])";
    let function = Function { env_vars: json!({ "GREETING": "hi" }), ..Function::python(prints) };
    let function = platform.gateway.create(&function).await;
    for (code, status) in [(0, "SUCCESS"), (1, "FAILED")] {
        let result = run(&platform.gateway, &function, &json!({ "code": code })).await;
        let expected = (&json!(status), &json!(code), &json!(format!("{{'code': {code}}} hi\n")));
        assert_eq!((&result["status"], &result["exitCode"], &result["stdout"]), expected, "{result}");
        assert_eq!(result["stderr"], "err\n", "{result}");
    }
    let rows = platform.fleet().cloud.wait_for_rows(&function, 2).await;
    assert!(rows.iter().any(|row| row["status"]["S"] == "FAILED" && row["message"]["S"] == "err\n"));

    let sleeps =
        platform.gateway.upload_python("import time; print('begun', flush=True); time.sleep(600)").await;
    let result = platform.run_limited(&sleeps, 1500, &json!({})).await;
    assert_eq!((&result["status"], &result["exitCode"]), (&json!("FAILED"), &json!(124)), "{result}");
    // Its process was killed with the worker's own tools, so none is left.
    wait_for_children(&worker, 0).await;

    // The worker is killed during a run.
    let hold = platform.hold_of_code().await;
    let id = platform.gateway.run_async(&hold.function, &hold.input("again")).await;
    hold.wait_for_runs(1).await;
    let run_of_dead = children(worker.pid());
    worker.kill();
    for pid in run_of_dead {
        // This worker has no sandbox, so its run goes on.
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    worker = start_minimal(&platform, &dir);
    hold.wait_for_runs(2).await;

    // Redis is stopped during the run.
    platform.fleet().redis.signal(Signal::SIGSTOP);
    hold.release();
    wait_for_children(&worker, 0).await;
    platform.fleet().redis.signal(Signal::SIGCONT);
    platform.gateway.wait_for_health("Redis is back", |status, _| status == 200).await;
    assert_eq!(platform.gateway.result_of(&id).await.json()["status"], "SUCCESS");
    platform.fleet().cloud.wait_for_rows(&hold.function, 1).await;

    platform.fleet_mut().redis.restart().await;
    platform.gateway.wait_for_health("Redis is back", |status, _| status == 200).await;
    let result = run(&platform.gateway, &function, &json!({ "code": 0 })).await;
    assert_eq!(result["status"], "SUCCESS", "it survives a new Redis: {result}");
    worker.kill();
    platform.finish().await;
}

async fn wait_for_children(worker: &Process, count: usize) {
    eventually(&format!("{count} runs of the worker"), SOON, || async {
        let now = children(worker.pid());
        if now.len() == count { Ok(()) } else { Err(format!("{now:?}")) }
    })
    .await;
}
