//! Functions in handler mode, in real sandboxes.

use super::*;
use crate::backend::BackendError;
use async_trait::async_trait;
use parking_lot::Mutex;

/// A handler whose behaviour the event chooses.
const HANDLER: &str = "
import json, os, subprocess, sys, threading, time
print('loaded')
runs = 0
held = []
def late():
    time.sleep(0.05)
    print('late', flush=True)
def handler(event, context):
    global runs
    runs += 1
    print('run', runs)
    do = event.get('do')
    if do == 'fail':
        raise ValueError('no such thing')
    if do == 'fork':
        subprocess.Popen(['sleep', '600'])
    if do == 'late':
        threading.Thread(target=late).start()
    if do == 'sleep':
        time.sleep(600)
    if do == 'wait':
        time.sleep(0.4)
    if do == 'exit':
        print('bye', flush=True)
        os._exit(3)
    if do == 'hold':
        held.append(b'x' * (300 << 20))
    if do == 'large':
        return 'x' * 5000
    if do == 'write':
        with open(os.environ['OUTPUT_DIR'] + '/' + event['name'], 'w') as file:
            file.write('of run %d' % runs)
    if do == 'see':
        names = ['REQUEST_ID', 'JOB_ID', 'MODEL_ID', 'FUNCTION_ID', 'MINE', 'OUTPUT_DIR']
        left = context.remaining_time_ms()
        return {
            'env': [os.environ.get(name) for name in names],
            'payload': 'PAYLOAD' in os.environ,
            'context': [context.request_id, context.function_id, context.memory_mb, 0 < left <= 20_000],
            'files': sorted(os.listdir('/')),
        }
    return {'runs': runs}
";

/// Starts a worker with a sandbox, and [`HANDLER`] as the code of [`call`].
async fn floor(scratch: &Scratch, change: impl FnOnce(&mut Settings)) -> Floor {
    install(scratch, "main.py", HANDLER);
    let floor = Floor::start_with(scratch, |settings| {
        settings.sandboxed();
        change(settings);
    });
    floor.await
}

/// A message for [`HANDLER`].
fn event(event: Value) -> Value {
    with(json!({ "handler": "main.handler", "input": event, "configVersion": 1 }))
}

fn event_with(event_value: Value, changes: Value) -> Value {
    let mut message = event(event_value);
    message.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
    message
}

fn text(result: &Value) -> &str {
    result["stdout"].as_str().unwrap()
}

#[tokio::test]
async fn processes_that_an_event_leaves_end_with_it() {
    let scratch = Scratch::new();
    let floor = floor(&scratch, |_| {}).await;
    floor.succeed(&event(json!({}))).await;
    assert_eq!(floor.succeed(&event(json!({}))).await["coldStart"], false);
    assert_eq!(floor.succeed(&event(json!({ "do": "fork" }))).await["data"], json!({ "runs": 3 }));
    let next = floor.succeed(&event(json!({}))).await;
    assert_eq!((&next["coldStart"], &next["data"]), (&json!(true), &json!({ "runs": 1 })));
    floor.stop().await;
}

#[tokio::test]
async fn a_process_stays_and_keeps_the_output_of_each_run_apart() {
    let scratch = Scratch::new();
    let floor = floor(&scratch, |_| {}).await;
    let first = floor.succeed(&event(json!({ "do": "late" }))).await;
    assert_eq!(text(&first), "loaded\nrun 1\n{\"runs\":1}\n");
    assert_eq!(
        (&first["data"], &first["coldStart"], &first["exitCode"]),
        (&json!({ "runs": 1 }), &json!(true), &json!(0))
    );
    assert!(first["handlerDurationMs"].as_f64().unwrap() >= 0.0);
    assert!(first["peakMemoryBytes"].as_u64().unwrap() > 1 << 20, "{first}");
    // Nothing shows from outside that the thread has printed.
    tokio::time::sleep(Duration::from_millis(300)).await;
    for run in 2..5 {
        let result = floor.succeed(&event(json!({}))).await;
        assert_eq!(text(&result), format!("run {run}\n{{\"runs\":{run}}}\n"), "what came late is of no run");
        assert_eq!((&result["data"], &result["coldStart"]), (&json!({ "runs": run }), &json!(false)));
    }
    assert_eq!(floor.activity.pools().python, 1);
    assert_eq!(floor.metric("infra_worker_starts_total{runtime=\"python\",start=\"warm\"}"), 3.0);
    floor.stop().await;
}

#[tokio::test]
async fn a_handler_sees_its_run_and_no_other() {
    let scratch = Scratch::new();
    let floor = floor(&scratch, |_| {}).await;
    for model in ["a", "b"] {
        let changes = json!({ "modelId": model, "envVars": { "MINE": "x", "PAYLOAD": "theirs" } });
        let result = floor.succeed(&event_with(json!({ "do": "see" }), changes)).await;
        let id = &result["requestId"];
        let seen = &result["data"];
        assert_eq!(seen["env"], json!([id, id, model, "f", "x", "/tmp/output"]));
        assert_eq!(seen["context"], json!([id, "f", 128, true]));
        assert_eq!(seen["payload"], false);
        let files = seen["files"].as_array().unwrap();
        assert!(files.contains(&json!("function")) && !files.contains(&json!("root")), "{seen}");
    }
    floor.stop().await;
}

#[tokio::test]
async fn a_process_that_fails_is_replaced() {
    let scratch = Scratch::new();
    let floor = floor(&scratch, |settings| settings.conf.output.bytes_max = 4_096).await;
    floor.succeed(&event(json!({}))).await;
    for (what, code, reason) in [
        ("fail", 1, "ValueError: no such thing\n"),
        ("exit", 3, "the process of the handler ended with exit code 3"),
        ("hold", 137, "its function has 128 MiB"),
        ("sleep", 124, "time limit of 3000 ms"),
        ("large", 1, "a value of 5002 bytes, and the limit is 4096 bytes"),
    ] {
        let result = floor.call(&event_with(json!({ "do": what }), json!({ "timeoutMs": 3_000 }))).await;
        assert_eq!((&result["status"], &result["exitCode"]), (&json!("FAILED"), &json!(code)), "{result}");
        assert!(stderr(&result).contains(reason), "{result}");
        assert!(text(&result).contains("run 2\n") && result["data"].is_null(), "{result}");
        assert_eq!(result["coldStart"], false);
        // Two runs with a new process, for the next round.
        let next = floor.succeed(&event(json!({}))).await;
        assert_eq!(
            (&next["coldStart"], text(&next)),
            (&json!(true), "loaded\nrun 1\n{\"runs\":1}\n"),
            "{what}"
        );
    }
    floor.stop().await;
}

#[tokio::test]
async fn new_code_and_settings_get_a_new_process() {
    let scratch = Scratch::new();
    let floor = floor(&scratch, |_| {}).await;
    install_as(&scratch, "g.zip", &[("main.py", "def handler(event, context):\n    return 'new'")]);
    floor.succeed(&event(json!({}))).await;
    let unrelated = floor.succeed(&event_with(json!({}), json!({ "configVersion": 2 }))).await;
    assert_eq!(unrelated["data"], json!({ "runs": 2 }), "the description has changed");
    let mut version = 2;
    for (changes, data) in [
        (json!({ "envVars": { "A": "1" } }), json!({ "runs": 1 })),
        (json!({ "memoryMb": 256 }), json!({ "runs": 1 })),
        (json!({ "s3Key": "g.zip" }), json!("new")),
    ] {
        version += 1;
        let mut message = event_with(json!({}), changes);
        message["configVersion"] = json!(version);
        let result = floor.succeed(&message).await;
        assert_eq!((&result["data"], &result["coldStart"]), (&data, &json!(true)));
        assert_eq!(floor.activity.pools().python, 1, "the earlier one has ended");
    }
    assert_eq!(floor.metric("infra_worker_warm_ended_total{reason=\"changed\"}"), 3.0);
    floor.stop().await;
}

#[tokio::test]
async fn the_number_of_runs_and_of_idle_processes_is_bounded() {
    let scratch = Scratch::new();
    let floor = floor(&scratch, |settings| {
        (settings.conf.warm.handler_runs_max, settings.conf.warm.function_max) = (2, 2);
    });
    let floor = floor.await;
    for expected in [1, 2, 1] {
        assert_eq!(floor.succeed(&event(json!({}))).await["data"], json!({ "runs": expected }));
    }
    let mut ids = Vec::new();
    for _ in 0..4 {
        ids.push(floor.send(&event(json!({ "do": "wait" }))).await);
    }
    for id in ids {
        assert_eq!(floor.result(id).await["status"], "SUCCESS");
    }
    until(|| floor.activity.runs() == 0).await;
    assert!(floor.activity.pools().python <= 2, "{:?}", floor.activity.pools());
    // A reload applies to what is idle.
    let mut conf = WorkerConf::clone(&floor.settings.get());
    (conf.warm.total_max, conf.warm.function_max) = (0, 0);
    floor.settings.set(conf);
    floor.until_idle(0).await;
    floor.stop().await;
}

#[tokio::test]
async fn idle_processes_give_their_memory_to_runs() {
    let scratch = Scratch::new();
    install_as(&scratch, "script.zip", &[("main.py", "print('done')")]);
    let floor = floor(&scratch, |settings| {
        settings.memory_mb = Some(300);
        settings.outputs = Some(Arc::new(SlowStore));
    });
    let floor = floor.await;
    floor.succeed(&event(json!({}))).await;
    let script = |memory_mb| with(json!({ "s3Key": "script.zip", "memoryMb": memory_mb }));
    floor.succeed(&script(128)).await;
    assert_eq!(floor.activity.pools().python, 1, "both fit");
    floor.succeed(&script(256)).await;
    assert_eq!(floor.activity.pools().python, 0);
    assert_eq!(floor.metric("infra_worker_warm_ended_total{reason=\"memory\"}"), 1.0);
    // Its own process is not in the way of a run, even while its outputs are stored.
    let large = || event_with(json!({ "do": "write", "name": "a" }), json!({ "memoryMb": 256 }));
    floor.succeed(&large()).await;
    assert_eq!(floor.succeed(&large()).await["coldStart"], false);
    floor.stop().await;
}

#[tokio::test]
async fn an_idle_process_ends() {
    let scratch = Scratch::new();
    let floor = floor(&scratch, |settings| {
        (settings.conf.warm.idle_s, settings.conf.warm.function_min) = (1, 1);
    });
    let floor = floor.await;
    let both = [
        floor.send(&event(json!({ "do": "wait" }))).await,
        floor.send(&event(json!({ "do": "wait" }))).await,
    ];
    for id in both {
        floor.result(id).await;
    }
    // One is kept.
    floor.until_idle(1).await;
    let mut conf = WorkerConf::clone(&floor.settings.get());
    conf.warm.function_min = 0;
    floor.settings.set(conf);
    floor.until_idle(0).await;
    floor.stop().await;
}

/// Takes longer than the interval at which idle processes are looked at.
struct SlowStore;

#[async_trait]
impl OutputStore for SlowStore {
    async fn store(&self, key: &str, _file: &Path) -> Result<String, BackendError> {
        tokio::time::sleep(Duration::from_millis(1_500)).await;
        Ok(key.to_owned())
    }
}

/// Keeps what it is given.
#[derive(Default)]
struct StoredFiles(Mutex<Vec<(String, String)>>);

#[async_trait]
impl OutputStore for StoredFiles {
    async fn store(&self, key: &str, file: &Path) -> Result<String, BackendError> {
        self.0.lock().push((key.to_owned(), fs::read_to_string(file).unwrap()));
        Ok(key.splitn(3, '/').nth(2).unwrap().to_owned())
    }
}

#[tokio::test]
async fn outputs_are_those_of_one_run() {
    let scratch = Scratch::new();
    let stored = Arc::new(StoredFiles::default());
    let store: Arc<dyn OutputStore> = stored.clone();
    let floor = floor(&scratch, |settings| settings.outputs = Some(store)).await;
    for (name, expected) in [(Some("a"), json!(["a"])), (None, json!([])), (Some("b"), json!(["b"]))] {
        let what = name.map_or("", |_| "write");
        let result = floor.succeed(&event(json!({ "do": what, "name": name }))).await;
        assert_eq!(result["outputFiles"], expected, "{result}");
        assert_eq!(result["llm_token_count"], 0);
    }
    let script = "import os\nos.mkdir(os.environ['OUTPUT_DIR'] + '/d')\n\
                  open(os.environ['OUTPUT_DIR'] + '/d/c', 'w').write('text')";
    install_as(&scratch, "script.zip", &[("main.py", script)]);
    let result = floor.succeed(&with(json!({ "s3Key": "script.zip" }))).await;
    assert_eq!(result["outputFiles"], json!(["d/c"]));
    let key = format!("outputs/{}/d/c", result["requestId"].as_str().unwrap());
    let files = stored.0.lock().clone();
    let texts: Vec<&str> = files.iter().map(|(_, text)| text.as_str()).collect();
    assert_eq!((texts, &files[2].0), (vec!["of run 1", "of run 3", "text"], &key));
    floor.stop().await;
}

#[tokio::test]
async fn a_handler_in_nodejs_stays_too() {
    if on_path("node").is_none() {
        return;
    }
    let scratch = Scratch::new();
    let source = "let runs = 0;
exports.handler = async (event, context) => {
  console.log('run');
  await new Promise((resolve) => setTimeout(resolve, 5));
  return { runs: ++runs, id: context.requestId, echo: event };
};";
    install(&scratch, "index.js", source);
    let floor = Floor::start_with(&scratch, Settings::sandboxed).await;
    for run in 1..4 {
        let changes = json!({ "runtime": "nodejs", "handler": "index.handler", "input": [1.5, "ä"] });
        let result = floor.succeed(&with(changes)).await;
        let expected = json!({ "runs": run, "id": result["requestId"], "echo": [1.5, "ä"] });
        assert_eq!((&result["data"], &result["coldStart"]), (&expected, &json!(run == 1)));
        assert_eq!(text(&result).lines().next(), Some("run"));
    }
    floor.stop().await;
}
