//! What functions meet, on both workers: `dev`, and `infra-controller worker` with SQS, Redis and S3.

use crate::harness::platform::{Backend, HELLO};
use crate::harness::upload::{Function, Part, form};
use crate::harness::{Gateway, SOON, Setup, eventually};
use futures_util::future::join_all;
use serde_json::{Value, json};
use std::process::Command;

on_both_workers!(
    functions_give_the_expected_results,
    code_that_cannot_be_used_fails_with_a_reason,
    the_environment_is_the_documented_one,
    processes_of_handlers_stay_until_something_changes,
    the_limits_of_runs_are_enforced,
    files_are_passed_to_the_caller,
    advice_is_applied_by_the_auto_tuner,
);

/// Cases that run at once.
const AT_ONCE: usize = 8;
/// The default of `output.bytes_max`.
const OUTPUT_BYTES_MAX: usize = 1 << 20;
/// The address of the models without AI_ENDPOINT, as the agent before had it.
const MODELS: &str = "http://10.0.20.100:11434";

/// A fleet that needs a sandbox. No function of this suite needs a network.
fn isolated(setup: Setup) -> Setup {
    let setup = setup.worker_setting("sandbox.mode", "required").worker_setting("sandbox.network", "none");
    // The default of `worker`.
    if setup.backend == Backend::Dev { setup.env("AI_ENDPOINT", MODELS) } else { setup }
}

async fn run(gateway: &Gateway, function: &str, input: &Value) -> Value {
    gateway.run(function, input).send().await.expect(200).json()
}

fn stderr(result: &Value) -> &str {
    result["stderr"].as_str().unwrap_or_else(|| panic!("stderr in {result}"))
}

#[derive(Clone)]
struct Case {
    name: &'static str,
    function: Function<'static>,
    input: Value,
    /// Members of the result.
    expected: Value,
    /// Texts in `stderr`; none: it is empty. `None`: not checked.
    said: Option<&'static [&'static str]>,
}

impl Case {
    fn new(name: &'static str, function: Function<'static>, input: Value, expected: Value) -> Self {
        Self { name, function, input, expected, said: Some(&[]) }
    }

    fn says(mut self, said: &'static [&'static str]) -> Self {
        self.said = Some(said);
        self
    }

    fn says_anything(mut self) -> Self {
        self.said = None;
        self
    }

    fn check(&self, result: &Value) {
        for (member, value) in self.expected.as_object().expect("an object") {
            assert_eq!(&result[member], value, "{}, {member}: {result}", self.name);
        }
        let stderr = stderr(result);
        if let Some(said) = self.said {
            assert_eq!(stderr.is_empty(), said.is_empty(), "{}: {stderr}", self.name);
            for text in said {
                assert!(stderr.contains(text), "{}: no {text:?} in {stderr}", self.name);
            }
        }
        // The members of every result; see docs/worker-protocol.md.
        for member in ["requestId", "functionId", "workerId"] {
            assert!(result[member].is_string(), "{}: {member} in {result}", self.name);
        }
        assert!(result["allocatedMemoryMb"] == self.function.memory_mb, "{}: {result}", self.name);
    }
}

fn python(text: &str) -> Function<'_> {
    Function::python(text)
}

fn python_handler(text: &str) -> Function<'_> {
    Function::python_handler(text)
}

fn node(text: &str) -> Function<'_> {
    Function::new("nodejs", "index.js", text, None)
}

fn node_handler(text: &str) -> Function<'_> {
    Function::new("nodejs", "index.js", text, Some("index.handler"))
}

fn printed(stdout: &str) -> Value {
    json!({ "status": "SUCCESS", "exitCode": 0, "stdout": stdout })
}

fn ended(exit_code: i32, stdout: &str) -> Value {
    json!({ "status": "FAILED", "exitCode": exit_code, "stdout": stdout })
}

/// The value of a handler: also the last line of what it has printed.
fn returned(stdout: &str, data: &Value) -> Value {
    json!({ "status": "SUCCESS", "exitCode": 0, "stdout": format!("{stdout}{data}\n"), "data": data })
}

fn failed() -> Value {
    json!({ "status": "FAILED" })
}

fn python_programs() -> Vec<Case> {
    let ada = json!({ "name": "Grüße" });
    let none = json!({});
    let large = json!({ "text": "x".repeat(150_000) });
    vec![
        Case::new(
            "python prints",
            python("import json, os; print(json.loads(os.environ['PAYLOAD'])['name'])"),
            ada,
            printed("Grüße\n"),
        ),
        Case::new(
            "a large input is in a file",
            python(
                "import json, os
text = json.load(open(os.environ['PAYLOAD_FILE']))['text']
print(len(text), 'PAYLOAD' in os.environ)",
            ),
            large,
            printed("150000 False\n"),
        ),
        Case::new(
            "standard input is empty",
            python("import sys; print(repr(sys.stdin.read()))"),
            none.clone(),
            printed("''\n"),
        ),
        Case::new(
            "it is the main program, in the directory of its code",
            python("import os, sys; print(sys.argv, __name__, os.getcwd(), sorted(os.listdir('.')))"),
            none.clone(),
            printed("['main.py'] __main__ /function ['main.py']\n"),
        ),
        Case::new(
            "an exit code",
            python("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"),
            none.clone(),
            ended(3, "out\n"),
        )
        .says(&["err\n"]),
        Case::new("an exception", python("raise ValueError('boom')"), none.clone(), ended(1, "")).says(&[
            "Traceback",
            "main.py",
            "ValueError: boom",
        ]),
        Case::new(
            "a signal",
            python("import os; print('before'); os.kill(os.getpid(), 11)"),
            none.clone(),
            ended(139, "before\n"),
        )
        .says_anything(),
        Case::new(
            "only its own directories are writable",
            python(
                "import os
for path in ('/function/x', '/usr/x', '/etc/x', '/x', '/function/main.py'):
    try:
        open(path, 'a')
        print('wrote', path)
    except OSError:
        pass
for directory in ('/tmp', os.environ['HOME'], os.environ['TMPDIR'], os.environ['OUTPUT_DIR']):
    open(directory + '/y', 'w').write('x')
print('done')",
            ),
            none,
            printed("done\n"),
        ),
    ]
}

fn other_programs() -> Vec<Case> {
    let (ada, none) = (json!({ "name": "Grüße" }), json!({}));
    let with = |runtime: &'static str, files: &[(&'static str, &'static str)]| -> Function<'static> {
        Function { files: files.to_vec(), ..Function::new(runtime, "", "", None) }
    };
    let mut cases = vec![
        Case::new(
            "node prints",
            node("console.log(JSON.parse(process.env.PAYLOAD).name)"),
            ada.clone(),
            printed("Grüße\n"),
        ),
        Case::new(
            "an exit code of node",
            node("process.stderr.write('err\\n'); process.exitCode = 4"),
            none.clone(),
            ended(4, ""),
        )
        .says(&["err\n"]),
        Case::new("an exception of node", node("throw new Error('boom')"), none.clone(), ended(1, ""))
            .says(&["index.js", "Error: boom"]),
        Case::new(
            "a module of node",
            with(
                "nodejs",
                &[
                    ("package.json", r#"{"type":"module"}"#),
                    ("index.js", "import { twice } from './lib/twice.js'; console.log(await twice(21));"),
                    ("lib/twice.js", "export const twice = async (n) => 2 * n;"),
                ],
            ),
            none.clone(),
            printed("42\n"),
        ),
        Case::new(
            "a package of python",
            with(
                "python",
                &[
                    ("main.py", "from pkg import twice; print(twice(21), open('pkg/data.txt').read())"),
                    ("pkg/__init__.py", "def twice(n): return 2 * n"),
                    ("pkg/data.txt", "data"),
                ],
            ),
            none.clone(),
            printed("42 data\n"),
        ),
        Case::new(
            "C++ is compiled",
            Function::new(
                "cpp",
                "main.cpp",
                "#include <cstdlib>\n#include <iostream>\n\
                 int main() { std::cout << std::getenv(\"PAYLOAD\") << std::endl; return 5; }\n",
                None,
            ),
            ada.clone(),
            ended(5, "{\"name\":\"Grüße\"}\n"),
        ),
        Case::new(
            "C++ that cannot be compiled",
            Function::new("cpp", "main.cpp", "int main() { return missing; }", None),
            none.clone(),
            failed(),
        )
        .says(&["main.cpp", "missing"]),
    ];
    for runtime in ["cpp", "go"] {
        let program = "#!/bin/sh\nprintf 'native %s' \"$PAYLOAD\"\n";
        let function = Function::new(runtime, "main", program, None);
        cases.push(Case::new("an executable", function, none.clone(), printed("native {}")));
    }
    cases.push(go(ada));
    cases
}

/// Go is compiled where it is installed.
fn go(input: Value) -> Case {
    let source = "package main\n\nimport (\n\t\"fmt\"\n\t\"os\"\n)\n\n\
                  func main() { fmt.Println(os.Getenv(\"PAYLOAD\")) }\n";
    let function = Function::new("go", "main.go", source, None);
    if Command::new("go").arg("version").output().is_ok() {
        return Case::new("Go is compiled", function, input, printed("{\"name\":\"Grüße\"}\n"));
    }
    Case::new("Go is not installed", function, input, failed()).says(&["no go", "install"])
}

fn python_handlers() -> Vec<Case> {
    let none = json!({});
    let in_package = Function {
        files: vec![("pkg/__init__.py", ""), ("pkg/mod.py", "def fn(event, context): return __name__")],
        ..Function::new("python", "", "", Some("pkg.mod.fn"))
    };
    vec![
        Case::new(
            "a handler returns a value",
            python_handler(
                "def handler(event, context):
    print('printed')
    return {'sum': event['a'] + event['b'], 'ä': None}",
            ),
            json!({ "a": 1, "b": 2 }),
            returned("printed\n", &json!({ "sum": 3, "ä": null })),
        ),
        Case::new(
            "an async handler",
            python_handler(
                "import asyncio
async def handler(event, context):
    await asyncio.sleep(0.01)
    return [event, context.function_id != '', context.memory_mb, context.model_id]",
            ),
            json!(0),
            returned("", &json!([0, true, 128, "llama3:8b"])),
        ),
        Case::new(
            "the context",
            python_handler(
                "import os
def handler(event, context):
    left = context.remaining_time_ms()
    return [context.request_id == os.environ['REQUEST_ID'], 0 < left <= 300000, context.output_dir]",
            ),
            none.clone(),
            returned("", &json!([true, true, "/tmp/output"])),
        ),
        Case::new(
            "no value",
            python_handler("def handler(event, context): print('only printed')"),
            none.clone(),
            returned("only printed\n", &Value::Null),
        ),
        Case::new("a handler in a package", in_package, none.clone(), returned("", &json!("pkg.mod"))),
        Case::new(
            "an exception of a handler",
            python_handler("def handler(event, context):\n    print('before')\n    raise ValueError('boom')"),
            none.clone(),
            json!({ "status": "FAILED", "stdout": "before\n" }),
        )
        .says(&["Traceback", "main.py", "ValueError: boom"]),
        Case::new(
            "a value that is not JSON",
            python_handler("def handler(event, context): return {1, 2}"),
            none.clone(),
            failed(),
        )
        .says(&["cannot be written as JSON"]),
        Case::new(
            "sys.exit in a handler",
            python_handler("import sys\ndef handler(event, context): sys.exit(3)"),
            none.clone(),
            failed(),
        )
        .says(&["SystemExit"]),
        Case::new(
            "a module that cannot be loaded",
            python_handler("import no_such_module"),
            none.clone(),
            failed(),
        )
        .says(&["no_such_module"]),
        Case::new("no such handler", python_handler("def other(): pass"), none, failed()).says(&["handler"]),
    ]
}

fn node_handlers() -> Vec<Case> {
    let none = json!({});
    vec![
        Case::new(
            "a handler of node",
            node_handler(
                "exports.handler = (event, context) => {
    console.log('printed');
    return { sum: event.a + event.b, memoryMb: context.memoryMb };
};",
            ),
            json!({ "a": 1, "b": 2 }),
            returned("printed\n", &json!({ "sum": 3, "memoryMb": 128 })),
        ),
        Case::new(
            "an async handler of node",
            node_handler(
                "exports.handler = async (event, context) => {
    await new Promise((resolve) => setTimeout(resolve, 10));
    const left = context.remainingTimeMs();
    return [event, context.requestId === process.env.REQUEST_ID, left > 0 && left <= 300000];
};",
            ),
            json!("ä"),
            returned("", &json!(["ä", true, true])),
        ),
        Case::new(
            "an exported function of a module",
            Function::new(
                "nodejs",
                "app.mjs",
                "export const run = async (event) => event.name;",
                Some("app.run"),
            ),
            json!({ "name": "Ada" }),
            returned("", &json!("Ada")),
        ),
        Case::new(
            "an exception of a handler of node",
            node_handler("exports.handler = async () => { throw new Error('boom'); };"),
            none.clone(),
            failed(),
        )
        .says(&["Error: boom", "index.js"]),
        Case::new(
            "a promise that never settles",
            node_handler("exports.handler = () => new Promise(() => {});"),
            none,
            failed(),
        )
        .says(&["promise"]),
    ]
}

async fn functions_give_the_expected_results(setup: Setup) {
    let platform = isolated(setup).start().await;
    let gateway = &platform.gateway;
    let cases = [python_programs(), other_programs(), python_handlers(), node_handlers()].concat();
    for some in cases.chunks(AT_ONCE) {
        let runs = some.iter().map(|case| gateway.create_and_run(&case.function, &case.input));
        for (case, result) in some.iter().zip(join_all(runs).await) {
            case.check(&result);
        }
    }
    platform.finish().await;
}

async fn code_that_cannot_be_used_fails_with_a_reason(setup: Setup) {
    let platform = isolated(setup).start().await;
    let gateway = &platform.gateway;
    for archive in [Some(&b"no zip"[..]), None] {
        let id = gateway.upload("x").await;
        platform.spoil_code(&id, archive).await;
        let result = run(gateway, &id, &json!({})).await;
        assert_eq!((&result["status"], &result["stdout"]), (&json!("FAILED"), &json!("")), "{result}");
        assert!(stderr(&result).contains(' '), "a sentence: {result}");
    }
    // A handler can change without the code.
    let handler = Function::new("python", "app.py", "def run(event, context): return 1", Some("app.run"));
    let id = gateway.create(&handler).await;
    for (name, said) in [("absent.run", "absent"), ("", "main.py"), ("app.run", "")] {
        let put = gateway.request("PUT", &format!("/functions/{id}")).json(&json!({ "handler": name }));
        put.send().await.expect(200);
        let result = run(gateway, &id, &json!({})).await;
        let expected = if said.is_empty() { "SUCCESS" } else { "FAILED" };
        assert_eq!(result["status"], expected, "{name:?}: {result}");
        assert!(stderr(&result).contains(said), "{name:?}: {result}");
    }
    platform.finish().await;
}

/// Variables that no function can set, and those that programs and interpreters set themselves.
const FIXED: [&str; 9] = [
    "REQUEST_ID",
    "JOB_ID",
    "FUNCTION_ID",
    "MEMORY_MB",
    "MODEL_ID",
    "LLM_MODEL",
    "AI_ENDPOINT",
    "OUTPUT_DIR",
    "PAYLOAD",
];
const INCIDENTAL: [&str; 6] = ["PATH", "HOME", "PYTHONUNBUFFERED", "LC_CTYPE", "PWD", "SHLVL"];

async fn the_environment_is_the_documented_one(setup: Setup) {
    let platform = isolated(setup).start().await;
    let gateway = &platform.gateway;
    let mut env_vars = json!({ "MINE": "ä=1", "NUMBER": 5, "FLAG": true, "TMPDIR": "/tmp/mine" });
    for name in FIXED.iter().chain(&["PAYLOAD_FILE"]) {
        env_vars[name] = json!("of the function");
    }
    let show = "import json, os; print(json.dumps(dict(os.environ)))";
    let show_node = "console.log(JSON.stringify(process.env))";
    let handler = "import os\ndef handler(event, context): return dict(os.environ)";
    let handler_node = "exports.handler = () => ({ ...process.env });";
    for function in [python(show), node(show_node), python_handler(handler), node_handler(handler_node)] {
        let function = Function { env_vars: env_vars.clone(), memory_mb: 256, ..function };
        let id = gateway.create(&function).await;
        let request = json!({ "functionId": id, "inputData": [1], "modelId": "model-a" });
        let request = gateway.request("POST", "/run").json(&request);
        // The second run may find a process.
        for _ in 0..2 {
            let result = request.send().await.expect(200).json();
            assert_eq!(result["status"], "SUCCESS", "{result}");
            let text = result["stdout"].as_str().expect("a text");
            let env: Value = serde_json::from_str(text).unwrap_or_else(|e| panic!("{e}: {text}"));
            let job = &result["requestId"];
            let payload = if function.handler.is_some() { Value::Null } else { json!("[1]") };
            for (name, value) in [
                ("REQUEST_ID", job.clone()),
                ("JOB_ID", job.clone()),
                ("FUNCTION_ID", json!(id)),
                ("MEMORY_MB", json!("256")),
                ("MODEL_ID", json!("model-a")),
                ("LLM_MODEL", json!("model-a")),
                ("AI_ENDPOINT", json!(MODELS)),
                ("OUTPUT_DIR", json!("/tmp/output")),
                ("PAYLOAD", payload),
                ("PAYLOAD_FILE", Value::Null),
                ("MINE", json!("ä=1")),
                ("NUMBER", json!("5")),
                ("FLAG", json!("true")),
                ("TMPDIR", json!("/tmp/mine")),
            ] {
                assert_eq!(env[name], value, "{name} of {function:?}: {env}", function = function.handler);
            }
            assert!(env["PATH"].as_str().is_some_and(|path| path.contains("/usr/bin")), "{env}");
            let known = |name: &str| {
                let is_set = ["MINE", "NUMBER", "FLAG", "TMPDIR"].contains(&name);
                is_set || FIXED.contains(&name) || INCIDENTAL.contains(&name)
            };
            let names = env.as_object().expect("an object").keys();
            let unknown: Vec<&String> = names.filter(|name| !known(name)).collect();
            assert!(unknown.is_empty(), "{unknown:?}");
        }
    }
    platform.finish().await;
}

/// Counts the events of its process, and misbehaves on request.
const COUNTING: [(&str, &str); 2] = [
    (
        "python",
        "import os
calls = 0
def handler(event, context):
    global calls
    calls += 1
    print('event', event)
    if event == 'raise':
        raise ValueError('boom')
    if event == 'exit':
        os._exit(9)
    if event == 'kill':
        os.kill(os.getpid(), 9)
    if event == 'close':
        os.closerange(0, 4096)
    return [calls, os.environ.get('GREETING')]",
    ),
    (
        "nodejs",
        "let calls = 0;
exports.handler = async (event) => {
    calls += 1;
    console.log('event', event);
    if (event === 'raise') throw new Error('boom');
    if (event === 'exit') process.exit(9);
    if (event === 'kill' || event === 'close') process.kill(process.pid, 'SIGKILL');
    return [calls, process.env.GREETING ?? null];
};",
    ),
];

fn counting<'a>(runtime: &str, text: &'a str) -> Function<'a> {
    if runtime == "python" { python_handler(text) } else { node_handler(text) }
}

/// The data of a run that succeeds. What it prints is kept apart from that of other runs.
async fn data(gateway: &Gateway, function: &str, input: &str) -> (Value, Value) {
    let result = run(gateway, function, &json!(input)).await;
    assert_eq!(result["status"], "SUCCESS", "{result}");
    assert_eq!(result["stdout"], format!("event {input}\n{}\n", result["data"]), "{result}");
    assert!(result["handlerDurationMs"].is_number(), "{result}");
    (result["data"].clone(), result["coldStart"].clone())
}

async fn processes_of_handlers_stay_until_something_changes(setup: Setup) {
    let mut platform = isolated(setup).start().await;
    for (runtime, text) in COUNTING {
        let gateway = &platform.gateway;
        let id = gateway.create(&counting(runtime, text)).await;
        let first = data(gateway, &id, "first").await;
        assert_eq!(first, (json!([1, null]), json!(true)), "{runtime}");
        for calls in 2..5 {
            assert_eq!(data(gateway, &id, "next").await, (json!([calls, null]), json!(false)), "{runtime}");
        }
        // It is replaced when it has failed, however it did.
        for fault in ["raise", "exit", "kill", "close"] {
            let result = run(gateway, &id, &json!(fault)).await;
            assert_eq!(result["status"], "FAILED", "{runtime}, {fault}: {result}");
            assert_eq!(data(gateway, &id, "after").await.0, json!([1, null]), "{runtime}, {fault}");
        }
        // Another environment, as after a change of the function.
        let version = gateway.get(&format!("/functions/{id}")).await.expect(200).json()["version"].as_u64();
        let changes = json!({ "envVars": { "GREETING": "hello" }, "input": "changed",
            "configVersion": version.expect("a number") + 1 });
        let changed = platform.run_message(&platform.message(&id, changes).await).await;
        assert_eq!(changed["data"], json!([1, "hello"]), "{runtime}: {changed}");
        let (after, _) = data(gateway, &id, "after").await;
        assert_eq!(after[1], Value::Null, "{runtime}: the environment of another version");
        // More memory, then other code.
        let put = || gateway.request("PUT", &format!("/functions/{id}"));
        put().json(&json!({ "memoryMb": 256 })).send().await.expect(200);
        assert_eq!(data(gateway, &id, "after").await.0, json!([1, null]), "{runtime}");
        let other = text.replace("[calls,", "['other code',");
        let zip = counting(runtime, &other).zip();
        form(put(), &[Part::File("code.zip", &zip)]).send().await.expect(200);
        assert_eq!(data(gateway, &id, "after").await.0, json!(["other code", null]), "{runtime}");
    }
    // A process serves a number of events, and ends when it is idle for some time.
    platform.change_worker("warm.handler_runs_max", 3).await;
    let id = platform.gateway.create(&counting(COUNTING[0].0, COUNTING[0].1)).await;
    for calls in [1, 2, 3, 1] {
        assert_eq!(data(&platform.gateway, &id, "next").await.0, json!([calls, null]));
    }
    platform.change_worker("warm.idle_s", 1).await;
    platform.wait_for_worker_metric_at_least("infra_worker_warm_ended_total{reason=\"idle\"}", 1.0).await;
    eventually("the end of the idle process", SOON, || async {
        // Interpreters that serve any function end too.
        let idle = r#"infra_worker_warm_processes{runtime="python",state="idle"}"#;
        match platform.worker_metric(idle).await {
            Some(0.0) => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    assert_eq!(data(&platform.gateway, &id, "next").await.0, json!([1, null]));
    platform.finish().await;
}

async fn the_limits_of_runs_are_enforced(setup: Setup) {
    let platform = isolated(setup).start().await;
    let gateway = &platform.gateway;
    let grow = "print('begun'); x = b'x' * (400 << 20); time.sleep(30)";
    let by_event = |text: &str| {
        format!(
            "import time
def handler(event, context):
    if event == 'misbehave':
        {text}
    return 'well'"
        )
    };
    let (grow_program, grow_handler) = (format!("import time; {grow}"), by_event(grow));
    let sleep = "print('begun'); time.sleep(600)";
    let (sleep_program, sleep_handler) = (format!("import time; {sleep}"), by_event(sleep));
    let grow_node = "console.log('begun'); const x = Buffer.alloc(400 << 20, 1); setTimeout(() => x, 30000)";

    // Memory.
    let functions =
        [Function::python(&grow_program), Function::python_handler(&grow_handler), node(grow_node)];
    for function in functions {
        let id = gateway.create(&function).await;
        let result = run(gateway, &id, &json!("misbehave")).await;
        assert_eq!((&result["status"], &result["exitCode"]), (&json!("FAILED"), &json!(137)), "{result}");
        assert_eq!(result["stdout"], "begun\n", "{result}");
        assert!(stderr(&result).contains("128"), "the reason names the limit: {result}");
        if function.handler.is_some() {
            assert_eq!(run(gateway, &id, &json!(0)).await["data"], "well");
        }
    }
    // Time.
    for function in [Function::python(&sleep_program), Function::python_handler(&sleep_handler)] {
        let id = gateway.create(&function).await;
        let result = platform.run_limited(&id, 1500, &json!("misbehave")).await;
        assert_eq!((&result["status"], &result["exitCode"]), (&json!("FAILED"), &json!(124)), "{result}");
        assert_eq!(result["stdout"], "begun\n", "{result}");
        assert!(stderr(&result).contains("1500"), "the reason names the limit: {result}");
        if function.handler.is_some() {
            assert_eq!(run(gateway, &id, &json!(0)).await["data"], "well");
        }
    }
    for reason in ["memory", "time"] {
        let series = format!("infra_worker_runs_stopped_total{{reason=\"{reason}\"}}");
        assert!(platform.worker_metric(&series).await >= Some(2.0), "{reason}");
    }
    // Output. A full pipe stops nobody.
    let loud = "import sys; print('x' * (3 << 20)); print('y' * (3 << 20), file=sys.stderr); sys.exit(7)";
    let result = gateway.create_and_run(&python(loud), &json!({})).await;
    assert_eq!(result["exitCode"], 7);
    for (stream, byte) in [("stdout", "x"), ("stderr", "y")] {
        let text = result[stream].as_str().expect("a text");
        let expected = OUTPUT_BYTES_MAX..OUTPUT_BYTES_MAX + 256;
        assert!(expected.contains(&text.len()), "{stream}: {} bytes", text.len());
        assert!(text.starts_with(&byte.repeat(OUTPUT_BYTES_MAX)), "{stream}");
    }
    // The deadline of the job has passed, so it does not run.
    let late = json!({ "deadline": "2020-01-01T00:00:00Z", "deadlineMs": 1 });
    platform.send_message(&platform.message(HELLO, late).await).await;
    platform.wait_for_worker_metric_at_least("infra_worker_jobs_expired_total", 1.0).await;
    platform.finish().await;
}

/// Leaves files in its output directory, and shows what an earlier event has left there.
const WRITING: &str = "import os
out = os.environ['OUTPUT_DIR']
def handler(event, context):
    found = sorted(os.listdir(context.output_dir))
    os.makedirs(out + '/sub', exist_ok=True)
    open(out + '/a.txt', 'w').write('a of ' + event)
    open(out + '/sub/b.bin', 'wb').write(bytes(range(256)))
    os.symlink('/etc/passwd', out + '/link')
    return found
if __name__ == '__main__':
    class Context:
        output_dir = out
    print(handler('program', Context))";

async fn files_are_passed_to_the_caller(setup: Setup) {
    let mut platform = isolated(setup).start().await;
    let gateway = &platform.gateway;
    let handler = gateway.create(&python_handler(WRITING)).await;
    let program = gateway.create(&python(WRITING)).await;
    for (id, input) in [(&handler, "one"), (&handler, "two"), (&program, "program")] {
        let result = run(gateway, id, &json!(input)).await;
        assert_eq!((&result["status"], &result["stdout"]), (&json!("SUCCESS"), &json!("[]\n")), "{result}");
        if !platform.is_serve() {
            // `dev` has no bucket for them.
            assert!(result["outputFiles"].is_null() || result["outputFiles"] == json!([]), "{result}");
            continue;
        }
        let mut files: Vec<&str> = result["outputFiles"]
            .as_array()
            .unwrap_or_else(|| panic!("outputFiles in {result}"))
            .iter()
            .filter_map(Value::as_str)
            .collect();
        files.sort_unstable();
        assert_eq!(files, ["a.txt", "sub/b.bin"], "{result}");
        assert!(stderr(&result).contains("link"), "what is left out is named: {result}");
        let cloud = &platform.fleet().cloud;
        let prefix = format!("outputs/{}/", result["requestId"].as_str().expect("an id"));
        let stored = cloud.objects(&prefix).await;
        assert_eq!(stored, [format!("{prefix}a.txt"), format!("{prefix}sub/b.bin")]);
        assert_eq!(cloud.object(&stored[0]).await, format!("a of {input}").into_bytes());
        assert_eq!(cloud.object(&stored[1]).await, (0..=255).collect::<Vec<u8>>());
    }
    platform.change_worker("output.files_max", 1).await;
    let result = run(&platform.gateway, &handler, &json!("one file")).await;
    assert_eq!(result["status"], "SUCCESS", "{result}");
    if platform.is_serve() {
        assert_eq!(result["outputFiles"].as_array().map(Vec::len), Some(1), "{result}");
        assert!(stderr(&result).contains("not in outputFiles"), "{result}");
    }
    platform.finish().await;
}

async fn advice_is_applied_by_the_auto_tuner(setup: Setup) {
    let platform = isolated(setup).start().await;
    let gateway = &platform.gateway;
    let function = Function {
        memory_mb: 512,
        ..python_handler(
            "import time
def handler(event, context):
    x = b'x' * (20 << 20)
    time.sleep(0.5)
    return len(x)",
        )
    };
    let id = gateway.create(&function).await;
    let result = run(gateway, &id, &json!({})).await;
    assert_eq!((&result["status"], &result["data"]), (&json!("SUCCESS"), &json!(20 << 20)), "{result}");
    // Much less than it has, so less is recommended.
    let recommended = result["recommendedMemoryMb"].as_u64().unwrap_or_else(|| panic!("no advice: {result}"));
    assert!((32..512).contains(&recommended), "{result}");
    for (member, text) in [("optimizationTip", "Resource Waste"), ("estimatedSavings", "/month")] {
        assert!(result[member].as_str().is_some_and(|advice| advice.contains(text)), "{member} of {result}");
    }
    let peak = result["peakMemoryBytes"].as_u64().expect("a number");
    assert!((20 << 20..256 << 20).contains(&peak), "{result}");
    assert!(result["cpuUsage"].is_number() && result["coldStart"].is_boolean(), "{result}");
    let started = result["startedAt"].as_str().expect("a time");
    assert!(started.starts_with("20") && started.ends_with('Z') && started.contains('T'), "{result}");

    eventually("the recommendation", SOON, || async {
        let tuner = gateway.get(&format!("/functions/{id}/auto-tuner")).await.expect(200).json();
        let is_there = tuner["recommendedMemoryMb"] == recommended
            && tuner["optimizationTip"] == result["optimizationTip"]
            && tuner["estimatedSavings"] == result["estimatedSavings"];
        if is_there { Ok(()) } else { Err(tuner.to_string()) }
    })
    .await;
    let apply = gateway.request("POST", &format!("/functions/{id}/auto-tuner/apply"));
    apply.send().await.expect(200);
    let tuned = run(gateway, &id, &json!({})).await;
    assert_eq!((&tuned["status"], &tuned["allocatedMemoryMb"]), (&json!("SUCCESS"), &json!(recommended)));

    // Our own worker says which starts were cold.
    eventually("the sums of two runs", SOON, || async {
        let metrics = gateway.get(&format!("/functions/{id}/metrics")).await.expect(200).json();
        let is_counted = metrics["executions"] == 2 && metrics["coldStarts"].as_u64().is_some_and(|n| n <= 2);
        if is_counted { Ok(()) } else { Err(metrics.to_string()) }
    })
    .await;
    platform.finish().await;
}
