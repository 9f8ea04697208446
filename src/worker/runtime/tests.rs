//! Tests with the interpreters and compilers of this machine. Those that are not installed are left out.

use super::super::control::{ControlError, ControlReply, ControlRequest, ControlSocket, EventContext};
use super::*;
use nix::libc;
use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;
use tempfile::TempDir;
use tokio::sync::OnceCell;

/// Deadline for an answer that must come.
const DEADLINE: Duration = Duration::from_secs(30);

async fn in_time<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.expect("the process did not answer in time")
}

fn write(dir: &Path, files: Pairs<'_>) {
    for (name, text) in files {
        let path = dir.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
}

/// The environment of a run, as the worker makes it.
fn variables(runtime: &InstalledRuntime, more: Pairs<'_>) -> ProcessEnv {
    let common = [("PATH", "/usr/local/bin:/usr/bin:/bin"), ("HOME", "/tmp"), ("TMPDIR", "/tmp")];
    let all = common.iter().chain(runtime.environment()).chain(more);
    all.map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn command(argv: &[OsString], env: &ProcessEnv, dir: &Path) -> Command {
    let mut command = Command::new(&argv[0]);
    command.args(&argv[1..]).env_clear().envs(env).current_dir(dir);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Starts a process with a control socket as descriptor 3.
#[expect(unsafe_code, reason = "std passes no descriptors but 0, 1 and 2")]
fn spawn(mut command: Command, theirs: &OwnedFd) -> Child {
    let socket = theirs.as_raw_fd();
    // SAFETY: both calls are async-signal-safe.
    unsafe {
        command.pre_exec(move || {
            let done = if socket == 3 { libc::fcntl(3, libc::F_SETFD, 0) } else { libc::dup2(socket, 3) };
            if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
        });
    }
    command.spawn().unwrap()
}

/// A process that waits for its job, in a directory of its own.
struct Warm {
    child: Child,
    control: ControlSocket,
    dir: TempDir,
}

impl Warm {
    fn start(runtime: &InstalledRuntime, env: ProcessEnv) -> Self {
        let dir = TempDir::new().unwrap();
        let (control, theirs) = ControlSocket::pair().unwrap();
        let start = runtime.warm(128, env).unwrap();
        let mut command = command(&start.argv, &start.env, dir.path());
        command.stdin(start.stdin().unwrap());
        Self { child: spawn(command, &theirs), control, dir }
    }

    /// Loads a handler. The error is that of the process.
    async fn load(&mut self, handler: &str, env: &ProcessEnv) -> Result<(), String> {
        in_time(self.control.send(&ControlRequest::Load { handler, env })).await.unwrap();
        let frame = in_time(self.control.receive()).await.unwrap();
        match ControlReply::parse(&frame).unwrap() {
            ControlReply::Loaded { .. } => Ok(()),
            ControlReply::Failed { error } => Err(error),
            other => panic!("{other:?}"),
        }
    }

    /// Calls the handler. Returns its value, or `error: ` and the error.
    async fn call(&mut self, event: &str) -> String {
        assert!(self.control.is_quiet());
        let env = BTreeMap::from([("REQUEST_ID".to_owned(), format!("id of {event}"))]);
        let context = EventContext {
            request_id: "r",
            function_id: "f",
            deadline_ms: crate::model::now_ms() + 60_000,
            memory_mb: 128,
            model_id: "m",
            output_dir: "/tmp/output",
        };
        let event = serde_json::from_str(event).unwrap();
        in_time(self.control.send(&ControlRequest::Event { event, env: &env, context })).await.unwrap();
        let frame = match in_time(self.control.receive()).await {
            Ok(frame) => frame,
            Err(ControlError::Closed) => return "closed".to_owned(),
            Err(e) => panic!("{e}"),
        };
        match ControlReply::parse(&frame).unwrap() {
            ControlReply::Value { value, .. } => value.get().to_owned(),
            ControlReply::Error { error, .. } => format!("error: {error}"),
            other => panic!("{other:?}"),
        }
    }

    /// Closes the control socket and waits for the end of the process.
    fn end(self) -> (Option<i32>, String, String) {
        drop(self.control);
        shown(self.child.wait_with_output().unwrap())
    }
}

fn shown(output: Output) -> (Option<i32>, String, String) {
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

async fn runtimes() -> &'static Runtimes {
    static RUNTIMES: OnceCell<Runtimes> = OnceCell::const_new();
    RUNTIMES.get_or_init(Runtimes::find).await
}

async fn installed(name: &str) -> Option<&'static InstalledRuntime> {
    runtimes().await.get(name).ok().filter(|runtime| runtime.program().is_some())
}

/// Names or paths, and what belongs to them.
type Pairs<'a> = &'a [(&'a str, &'a str)];

/// Runs each script twice, in a warm process and in a new one. All that they print must be equal.
async fn compare(name: &str, cases: &[(&str, Pairs<'_>, Pairs<'_>, i32)]) {
    let Some(runtime) = installed(name).await else { return };
    for (what, files, env, code) in cases {
        let mut warm = Warm::start(runtime, variables(runtime, &[]));
        let dir = warm.dir.path().to_owned();
        write(&dir, files);
        let env = variables(runtime, env);
        assert_eq!(runtime.fixed_at_start(&variables(runtime, &[]), &env), None, "{what}");
        in_time(warm.control.send(&ControlRequest::Script { env: &env })).await.unwrap();
        let answer = in_time(warm.control.receive()).await.unwrap();
        assert!(matches!(ControlReply::parse(&answer), Ok(ControlReply::Taken)), "{what}");
        let Warm { child, control, dir: _kept } = warm;
        let found = shown(child.wait_with_output().unwrap());
        drop(control);
        let start = runtime.script(&|name| dir.join(name).exists(), &dir, 128).unwrap();
        let ScriptStart::Program { argv, is_warm: true } = start else { panic!("{what}: {start:?}") };
        let expected = shown(command(&argv, &env, &dir).output().unwrap());
        assert_eq!(found, expected, "{what}");
        assert_eq!(found.0, (*code >= 0).then_some(*code), "{what}: {found:?}");
    }
}

#[tokio::test]
async fn a_python_script_cannot_tell_that_its_process_was_warm() {
    let look = "
import inspect, os, sys, traceback
print(sys.argv, sys.orig_argv if hasattr(sys, 'orig_argv') else '', sys.path, sys.flags, sys.stdin.read())
print(__name__, __file__, __spec__, __loader__.path, sorted(globals()), sorted(os.environ.items()))
print(os.getcwd(), os.listdir('/proc/self/fd'), os.readlink('/proc/self/fd/0'))
print('sitecustomize' in sys.modules)
print(inspect.stack()[0].function, len(inspect.stack()), open('/proc/self/cmdline').read().split('\\0'))
traceback.print_stack()
";
    let processes = "
import multiprocessing, os
def square(x): return x * x
if __name__ == '__main__':
    for method in ['fork', 'spawn']:
        with multiprocessing.get_context(method).Pool(2) as pool:
            print(pool.map(square, [1, 2, 3]))
";
    let error = "
def f():
    raise ValueError('x')
try:
    f()
except ValueError as e:
    raise KeyError from e
";
    let exit = "import atexit, sys, threading\natexit.register(print, 'bye')\n\
                threading.Thread(target=print, args=['thread']).start()\nsys.exit('text')";
    let zone = [("TZ", "Asia/Tokyo"), ("A", "é")];
    compare(
        "python",
        &[
            ("what it sees", &[("main.py", look)], &zone, 0),
            ("an error", &[("main.py", error)], &[], 1),
            ("no syntax", &[("main.py", "x = (")], &[], 1),
            ("no file", &[], &[], 2),
            ("its end", &[("main.py", exit)], &[], 1),
            ("a number", &[("main.py", "import sys; sys.exit(3)")], &[], 3),
            ("a signal", &[("main.py", "import os; print(1); os.kill(os.getpid(), 9)")], &[], -1),
            ("processes", &[("main.py", processes)], &[], 0),
            ("time zone", &[("main.py", "import time; print(time.tzname, time.timezone)")], &zone, 0),
            (
                "modules of its own",
                &[("main.py", "import enum, json; print(json.A)"), ("json.py", "A = 1")],
                &[],
                0,
            ),
        ],
    )
    .await;
}

#[tokio::test]
async fn a_node_script_cannot_tell_that_its_process_was_warm() {
    let look = "
console.log(process.argv, process.argv0, __filename, require.main === module, module.id, module.parent);
console.log(Object.keys(require.cache), process.env, process.cwd(), process.execArgv);
console.log(Object.getOwnPropertyNames(globalThis).join());
console.log(require('fs').readFileSync(0, 'utf8'), require('fs').readlinkSync('/proc/self/fd/0'), typeof fs);
console.log(new Date(0).getHours(), require('v8').getHeapStatistics().heap_size_limit, new Error('x').stack);
";
    let module = "import { a } from './a.js'; console.log(a, import.meta.url, typeof require);
await null; throw new Error('x');";
    let worker = "
const { Worker } = require('worker_threads');
const code = 'console.log(process.argv, process.env.A)';
new Worker(code, { eval: true }).on('exit', (code) => { process.exitCode = 5; console.log(code); });
";
    let zone = [("TZ", "Asia/Tokyo"), ("A", "é"), ("NODE_ENV", "production")];
    let is_module = ("package.json", "{\"type\":\"module\"}");
    compare(
        "nodejs",
        &[
            ("what it sees", &[("index.js", look)], &zone, 0),
            ("an error", &[("index.js", "const f = () => { throw new TypeError('x') }; f()")], &[], 1),
            ("no syntax", &[("index.js", "let x = (")], &[], 1),
            ("no file", &[], &[], 1),
            ("a rejection", &[("index.js", "Promise.reject(new Error('x'))")], &[], 1),
            ("a number", &[("index.js", "process.on('exit', console.log); process.exit(4)")], &[], 4),
            ("a signal", &[("index.js", "process.kill(process.pid, 'SIGKILL')")], &[], -1),
            ("an ES module", &[("index.js", module), ("a.js", "export const a = 1"), is_module], &[], 1),
            ("a worker thread", &[("index.js", worker)], &zone, 5),
        ],
    )
    .await;
}

/// Loads a handler and calls it. `calls`: events, and what their answers begin with. `output`: all that the
/// process has printed to stdout.
async fn serve(name: &str, files: Pairs<'_>, handler: &str, calls: Pairs<'_>, output: &str) {
    let Some(runtime) = installed(name).await else { return };
    let env = variables(runtime, &[("A", "é")]);
    let mut warm = Warm::start(runtime, variables(runtime, &[]));
    write(warm.dir.path(), files);
    let loaded = warm.load(handler, &env).await;
    assert_eq!(loaded, Ok(()), "{handler}");
    for (event, expected) in calls {
        let found = warm.call(event).await;
        assert!(found.starts_with(expected), "{handler} {event}: {found}\n{expected}");
        assert!(!found.contains("bootstrap") && !found.contains("/proc/self/fd"), "{found}");
    }
    let (code, stdout, stderr) = warm.end();
    assert_eq!((code, &*stdout, &*stderr), (Some(0), output, ""), "{handler}");
}

#[tokio::test]
async fn a_python_handler_is_called_for_each_event() {
    let main = "
import atexit, asyncio, json, os, subprocess, sys
print('loaded', __name__, os.environ['A'], sys.path[0] == os.getcwd())
atexit.register(print, 'bye')
calls = 0
def handler(event, context):
    global calls
    calls += 1
    print(calls)
    return [event, os.environ['REQUEST_ID'], context.request_id, context['memory_mb'], context.function_name,
            0 < context.remaining_time_ms() <= 60000, sys.stdin.read()]
async def wait(event, context):
    await asyncio.sleep(0)
    if event: raise ValueError('é')
    return await asyncio.sleep(0, 'waited')
def other(event, context):
    if event == 'fork':
        pid = os.fork()
        if pid: os.waitpid(pid, 0)
        return 'parent' if pid else 'child'
    if event == 'descriptors':
        os.closerange(3, 1000)
        return subprocess.run(['ls', '/proc/self/fd'], stdout=-1, text=True, close_fds=False).stdout.split()
    return eval(event)
";
    let files =
        [("main.py", main), ("lib/__init__.py", ""), ("lib/tasks.py", "from main import other as run")];
    let calls = [
        (r#"{"a": "é"}"#, r#"[{"a":"é"},"id of {\"a\": \"é\"}","r",128,"f",true,""]"#),
        ("null", r#"[null,"id of null","r",128,"f",true,""]"#),
    ];
    serve("python", &files, "main.handler", &calls, "loaded main é True\n1\n2\nbye\n").await;
    let traceback = "error: Traceback (most recent call last):\n  File \"";
    let calls = [("false", "\"waited\""), ("true", traceback), ("false", "\"waited\"")];
    serve("python", &files, "main.wait", &calls, "loaded main é True\nbye\n").await;
    let calls = [
        ("\"fork\"", "\"parent\""),
        ("\"descriptors\"", r#"["0","1","2","3"]"#),
        (r#""sys.exit('text')""#, traceback),
        (
            r#""float('nan')""#,
            "error: the handler returned a value that cannot be written as JSON: Out of range",
        ),
        (
            r#""b''""#,
            "error: the handler returned a value that cannot be written as JSON: Object of type bytes",
        ),
        (r#""'\\ud800'""#, "\"\\ud800\""),
        (
            r#""'é' * 9000000""#,
            "error: the handler returned a value that cannot be written as JSON: it has 18000002",
        ),
        (r#""len('é' * 9000000)""#, "9000000"),
    ];
    let printed = "loaded main é True\nbye\nbye\n";
    serve("python", &files, "lib.tasks.run", &calls, printed).await;
}

#[tokio::test]
async fn a_node_handler_is_called_for_each_event() {
    let index = "
console.log('loaded', process.env.A, require.main === module);
process.on('exit', () => console.log('bye'));
let calls = 0;
exports.handler = (event, context) => {
    console.log(++calls);
    const time = context.remainingTimeMs();
    const id = process.env.REQUEST_ID;
    return [event, id, context.requestId, context.memoryLimitInMB, time > 0 && time <= 60000];
};
exports.wait = async (event) => {
    await new Promise((resolve) => setTimeout(resolve, 1));
    if (event === 'never') await new Promise(() => {});
    return eval(event);
};
";
    let calls = [
        (r#"{"a": "é"}"#, r#"[{"a":"é"},"id of {\"a\": \"é\"}","r",128,true]"#),
        ("null", r#"[null,"id of null","r",128,true]"#),
    ];
    serve("nodejs", &[("index.js", index)], "index.handler", &calls, "loaded é false\n1\n2\nbye\n").await;
    let unwritable = "error: the handler returned a value that cannot be written as JSON: ";
    let calls = [
        ("\"1 + 1\"", "2"),
        ("\"undefined\"", "null"),
        ("\"x.y\"", "error: ReferenceError: x is not defined\n    at eval ("),
        ("\"throw 5\"", "error: Uncaught 5"),
        ("\"10n\"", &format!("{unwritable}Do not know how to serialize a BigInt")),
        ("\"const a = {}; a.a = a\"", &format!("{unwritable}Converting circular structure")),
        ("\"'é'.repeat(9e6)\"", &format!("{unwritable}it has 18000")),
        ("\"'é'.repeat(9e6).length\"", "9000000"),
        ("\"never\"", "error: the promise of the handler was never settled"),
        ("\"'after'\"", "\"after\""),
    ];
    serve("nodejs", &[("index.js", index)], "index.wait", &calls, "loaded é false\nbye\n").await;
    let is_module = ("package.json", "{\"type\":\"module\"}");
    for (files, handler) in [
        (&[("index.js", "module.exports = () => 1")][..], "index.handler"),
        (&[("index.js", "export const handler = async () => 1; await null"), is_module], "index.handler"),
        (&[("index.js", "export default () => 1"), is_module], "index.default"),
        (&[("lib/a.cjs", "exports.run = () => 1"), is_module], "lib.a.run"),
        (&[("lib/a.mjs", "export default { run: () => 1 }")], "lib.a.run"),
    ] {
        serve("nodejs", files, handler, &[("{}", "1")], "").await;
    }
}

#[tokio::test]
async fn a_handler_that_cannot_be_loaded_is_explained() {
    for (name, file, text, handler, expected) in [
        (
            "python",
            "main.py",
            "def run(e, c): pass\nfrom os import getcwd",
            "main.handler",
            "its functions are: run",
        ),
        ("python", "main.py", "handler = 1", "main.handler", "handler is not a function in main"),
        (
            "python",
            "main.py",
            "",
            "lib.tasks.run",
            "the code has neither lib/tasks.py nor lib/tasks/__init__.py",
        ),
        ("python", "main.py", "import missing", "main.handler", "No module named 'missing'"),
        ("python", "main.py", "import sys; sys.exit(3)", "main.handler", "SystemExit: 3"),
        ("python", "main.py", "x = (", "main.handler", "SyntaxError"),
        ("nodejs", "index.js", "exports.run = () => 1", "index.handler", "their functions are: run"),
        (
            "nodejs",
            "index.js",
            "exports.handler = 1",
            "index.handler",
            "handler is not a function in the exports",
        ),
        ("nodejs", "index.js", "", "lib.a.run", "the code has none of lib/a.js, lib/a.cjs, lib/a.mjs"),
        ("nodejs", "index.js", "require('./missing')", "index.handler", "Cannot find module './missing'"),
        ("nodejs", "index.js", "process.exit(0)", "index.handler", "called process.exit with exit code 0"),
        ("nodejs", "index.mjs", "await new Promise(() => {})", "index.handler", "never loaded"),
    ] {
        let Some(runtime) = installed(name).await else { continue };
        let env = variables(runtime, &[]);
        let mut warm = Warm::start(runtime, env.clone());
        write(warm.dir.path(), &[(file, text)]);
        let error = warm.load(handler, &env).await.unwrap_err();
        assert!(error.contains(expected), "{text}: {error}");
        assert!(!error.contains("bootstrap") && !error.contains("/proc/self/fd"), "{error}");
    }
}

#[tokio::test]
async fn a_process_that_ends_during_an_event_is_noticed() {
    for (name, file, text, handler, expected) in [
        ("python", "main.py", "import os\ndef run(e, c): os._exit(3)", "main.run", "closed"),
        (
            "nodejs",
            "index.js",
            "exports.run = () => process.exit(3)",
            "index.run",
            "error: the function called",
        ),
        ("nodejs", "index.js", "exports.run = () => process.reallyExit(3)", "index.run", "closed"),
    ] {
        let Some(runtime) = installed(name).await else { continue };
        let env = variables(runtime, &[]);
        let mut warm = Warm::start(runtime, env.clone());
        write(warm.dir.path(), &[(file, text)]);
        warm.load(handler, &env).await.unwrap();
        let answer = warm.call("1").await;
        assert!(answer.starts_with(expected), "{text}: {answer}");
        assert_eq!(warm.end().0, Some(3), "{text}");
    }
}

#[tokio::test]
async fn a_warm_process_that_is_not_needed_ends_quietly() {
    for name in ["python", "nodejs"] {
        let Some(runtime) = installed(name).await else { continue };
        let warm = Warm::start(runtime, variables(runtime, &[]));
        assert_eq!(warm.end(), (Some(0), String::new(), String::new()), "{name}");
    }
}

#[tokio::test]
async fn variables_that_are_read_at_the_start_are_known() {
    let runtimes = runtimes().await;
    assert_eq!(runtimes.iter().count(), Runtime::ALL.len());
    for (name, variable, is_fixed) in [
        ("python", "PYTHONHASHSEED", true),
        ("python", "LC_ALL", true),
        ("python", "LD_PRELOAD", true),
        ("python", "HOME", true),
        ("python", "NODE_OPTIONS", false),
        ("python", "TZ", false),
        ("python", "LANGUAGE", false),
        ("nodejs", "NODE_OPTIONS", true),
        ("nodejs", "NODE_EXTRA_CA_CERTS", true),
        ("nodejs", "NODE_ENV", false),
        ("nodejs", "HOME", false),
        ("nodejs", "PATH", false),
    ] {
        let runtime = runtimes.get(name).unwrap();
        let (without, with) =
            (variables(runtime, &[(variable, "1")]), variables(runtime, &[(variable, "2")]));
        let expected = is_fixed.then_some(variable);
        assert_eq!(runtime.fixed_at_start(&without, &with), expected, "{name}");
        assert_eq!(runtime.fixed_at_start(&with, &with), None);
        let absent: ProcessEnv = with.clone().into_iter().filter(|(name, _)| name != variable).collect();
        assert_eq!(runtime.fixed_at_start(&with, &absent), expected, "{name}");
    }
    let unknown = runtimes.get("ruby").map(|_| ()).unwrap_err();
    assert_eq!(unknown, "this worker has no runtime \"ruby\", only python, nodejs, cpp, go");
    let no_handler = runtimes.get("go").unwrap().warm(128, ProcessEnv::new()).map(|_| ()).unwrap_err();
    assert_eq!(no_handler, "functions in go cannot have a handler");
}

/// A process can be started with such variables, so that a handler may have them too.
#[tokio::test]
async fn a_warm_process_may_have_variables_of_its_function() {
    for (name, variable, files, handler) in [
        (
            "python",
            ("PYTHONPATH", "/tmp:lib"),
            &[("main.py", "import b\ndef run(e, c): return b.B"), ("lib/b.py", "B = 1")][..],
            "main.run",
        ),
        (
            "nodejs",
            ("NODE_OPTIONS", "--require ./b.js"),
            &[("index.js", "exports.run = () => B"), ("b.js", "globalThis.B = 1")],
            "index.run",
        ),
    ] {
        let Some(runtime) = installed(name).await else { continue };
        let env = variables(runtime, &[variable]);
        let mut warm = Warm::start(runtime, env.clone());
        write(warm.dir.path(), files);
        warm.load(handler, &env).await.unwrap();
        assert_eq!(warm.call("{}").await, "1", "{name}");
    }
}

#[tokio::test]
async fn native_code_is_run_or_built() {
    let runtimes = runtimes().await;
    let dir = Path::new("/function");
    for (name, files, expected) in [
        ("cpp", &["main", "main.cpp"][..], "/function/main"),
        ("go", &["main"], "/function/main"),
        ("cpp", &["main.go"], "neither a program `main` nor main.cpp"),
    ] {
        let start = runtimes.get(name).unwrap().script(&|file| files.contains(&file), dir, 128);
        assert!(format!("{start:?}").contains(expected), "{start:?}");
    }
    let bare = InstalledRuntime { language: &native::GO, program: None };
    let error = bare.script(&|file| file == "main.go", dir, 128).unwrap_err();
    assert!(error.contains("this worker has no go: install it"), "{error}");
    let error = InstalledRuntime { language: &nodejs::Nodejs, program: None }.script(&|_| true, dir, 128);
    assert_eq!(error.unwrap_err(), "this worker cannot run nodejs: it has no node, which must be installed");
}

#[tokio::test]
async fn a_build_sends_its_product() {
    let hello = [
        ("cpp", "main.cpp", "#include <cstdio>\nint main() { puts(\"built\"); }", "int main() { return x; }"),
        (
            "go",
            "main.go",
            "package main\nfunc main() { println(\"built\") }",
            "package main\nfunc main() { x }",
        ),
    ];
    for (name, source, good, bad) in hello {
        let Some(runtime) = installed(name).await else { continue };
        for (text, is_good) in [(good, true), (bad, false)] {
            let dir = TempDir::new().unwrap();
            write(dir.path(), &[(source, text)]);
            let start = runtime.script(&|file| file == source, dir.path(), 128).unwrap();
            let ScriptStart::Build(build) = start else { panic!("{start:?}") };
            let (control, theirs) = ControlSocket::pair().unwrap();
            let env = variables(runtime, &[("TMPDIR", &*dir.path().to_string_lossy())]);
            let child = spawn(command(&build.argv, &env, dir.path()), &theirs);
            drop(theirs);
            let mut product = Vec::new();
            in_time(control.receive_file(&mut product, 64 << 20)).await.unwrap();
            let (code, _, stderr) = shown(child.wait_with_output().unwrap());
            assert_eq!((code == Some(0), product.is_empty()), (is_good, !is_good), "{stderr}");
            assert!(is_good || stderr.contains(source), "{stderr}");
            if is_good {
                let main = dir.path().join("main-of-test");
                fs::write(&main, product).unwrap();
                let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
                fs::set_permissions(&main, mode).unwrap();
                let (code, stdout, stderr) = shown(Command::new(&main).output().unwrap());
                assert_eq!((code, stdout + &stderr), (Some(0), "built\n".to_owned()));
            }
        }
    }
}
