//! The `sh` blocks of the documents, run as a reader runs them, against a live `dev`.
//!
//! All blocks of a document share one shell, so variables and functions carry over. Each command must exit
//! with 0. Each HTTP answer must be 2xx, unless a comment `# answers 404` before the request names another
//! status. If a `json` block follows, the output must have each of its members.

use crate::harness::gateway::Gateway;
use crate::harness::platform::new_key;
use crate::harness::process::Scratch;
use crate::tidy::markdown::Document;
use serde_json::Value;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

const DOCUMENTS: [&str; 2] = ["README.md", "docs/api.md"];

/// Commands that do not run here, by their first word, and why.
const SKIPPED: [(&str, &str); 1] = [("make", "it builds and starts the program, which runs already")];

/// In the documents `dev` listens here; in the test, on a free port.
const SHOWN_PORT: &str = ":8080";
/// Names the status of the next answer, if that is not 2xx.
const ANSWERS: &str = "# answers ";
/// Longest time that one block may take on a busy machine.
const BLOCK_WITHIN: Duration = Duration::from_secs(120);

/// Precedes the real curl on the path. Appends the expected and the actual status of each answer to a file.
const CURL: &str = r#"#!/bin/sh
expected=$(cat "$SESSION/next" 2>/dev/null || echo 2xx)
rm -f "$SESSION/next"
headers= previous=
for argument; do
    case $previous in -D | --dump-header) headers=$argument ;; esac
    previous=$argument
done
if [ -z "$headers" ]; then
    headers=$SESSION/headers
    set -- --dump-header "$headers" "$@"
fi
: >"$headers"
"$CURL" --max-time 60 "$@"
code=$?
status=$(sed -n 's/^HTTP[^ ]* \([0-9]*\).*/\1/p' "$headers" | tail -n 1)
echo "$expected ${status:-none} $*" >>"$SESSION/answers"
exit $code
"#;

/// One block.
struct Step {
    line: usize,
    commands: String,
    /// Names that the output must have.
    members: Vec<String>,
}

/// The blocks to run, in order. Blocks without a command that runs here are left out.
fn steps(text: &str) -> Vec<Step> {
    let blocks = Document::read(text).blocks;
    let mut steps = Vec::new();
    for (n, block) in blocks.iter().enumerate().filter(|(_, block)| block.language() == "sh") {
        let end = block.line + block.text.lines().count() + 1;
        let shown = blocks.get(n + 1).filter(|next| next.language() == "json" && next.line <= end + 2);
        let members = shown.map(|shown| members(&shown.text)).unwrap_or_default();
        let mut in_skipped = false;
        let runs = |line: &&str| {
            let first = line.split_whitespace().next().unwrap_or_default();
            let is_skipped = in_skipped || SKIPPED.iter().any(|(command, _)| *command == first);
            in_skipped = is_skipped && line.ends_with('\\');
            !is_skipped
        };
        let commands: String = block.text.lines().filter(runs).map(|line| format!("{line}\n")).collect();
        if !commands.trim().is_empty() {
            steps.push(Step { line: block.line, commands, members });
        }
    }
    steps
}

/// The names of an object, or of the first object of a list.
fn members(json: &str) -> Vec<String> {
    let shown: Value = serde_json::from_str(json).unwrap_or_else(|e| panic!("{e}: {json}"));
    let object = shown.as_object().or_else(|| shown.get(0)?.as_object());
    object.map(|object| object.keys().cloned().collect()).unwrap_or_default()
}

/// The shell of a reader.
struct Session {
    shell: Child,
    input: ChildStdin,
    /// A line for each block that has ended well.
    ended: Lines<BufReader<ChildStdout>>,
    /// Holds scripts, outputs and statuses, beside the directory of the reader.
    scratch: Scratch,
    blocks: usize,
}

impl Session {
    async fn start(dir: &Path, curl: &Path) -> Self {
        let scratch = Scratch::new("session");
        let bin = scratch.path().join("bin");
        fs::create_dir(&bin).expect("writable");
        fs::write(bin.join("curl"), CURL).expect("writable");
        fs::set_permissions(bin.join("curl"), fs::Permissions::from_mode(0o755)).expect("ours");
        let path = format!("{}:{}", bin.display(), std::env::var("PATH").unwrap_or_default());
        let mut command = Command::new("sh");
        command.arg("-eu").current_dir(dir).env_clear().env("PATH", path).env("HOME", dir);
        command.env("CURL", curl).env("SESSION", scratch.path());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        let mut shell = command.spawn().expect("sh is there");
        let input = shell.stdin.take().expect("piped");
        let ended = BufReader::new(shell.stdout.take().expect("piped")).lines();
        Self { shell, input, ended, scratch, blocks: 0 }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// Runs a block. What was wrong with it, if anything was.
    async fn run(&mut self, step: &Step) -> Result<(), String> {
        self.blocks += 1;
        let (script, output) = (self.file(&format!("{}.sh", self.blocks)), self.file("output"));
        let next = self.file("next");
        let line = |line: &str| match line.trim().strip_prefix(ANSWERS) {
            Some(status) => format!("echo {status} >'{}'\n", next.display()),
            None => format!("{line}\n"),
        };
        fs::write(&script, step.commands.lines().map(line).collect::<String>()).expect("writable");
        let (script, output_name) = (script.display(), output.display());
        let order = format!(". '{script}' </dev/null >'{output_name}' 2>&1; echo ended\n");
        // A shell that failed earlier has exited, which the end of its output shows.
        let _ = self.input.write_all(order.as_bytes()).await;
        let ended = tokio::time::timeout(BLOCK_WITHIN, self.ended.next_line()).await;
        let output = fs::read_to_string(output).unwrap_or_default();
        let problem = |what: String| format!("{what}\n{}\nThe output is:\n{output}", step.commands);
        match ended {
            Err(_) => return Err(problem(format!("does not end within {BLOCK_WITHIN:?}"))),
            Ok(Ok(Some(_))) => {}
            Ok(_) => return Err(problem("a command fails".to_owned())),
        }
        let answers = fs::read_to_string(self.file("answers")).unwrap_or_default();
        let _ = fs::remove_file(self.file("answers"));
        for answer in answers.lines() {
            let mut words = answer.split(' ');
            let (expected, status) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
            let is_one_of = |all: &str| all.split('/').any(|one| one == status);
            let fits = if expected == "2xx" { status.starts_with('2') } else { is_one_of(expected) };
            if !fits {
                return Err(problem(format!("the answer is {status}, not {expected}: {answer}")));
            }
        }
        if next.exists() {
            return Err(problem(format!("no request follows {ANSWERS:?}")));
        }
        match step.members.iter().find(|name| !output.contains(&format!("\"{name}\":"))) {
            Some(name) => Err(problem(format!("the output has no member {name:?}"))),
            None => Ok(()),
        }
    }

    async fn end(mut self) {
        drop(self.input);
        let _ = self.shell.wait().await;
    }
}

fn document(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    fs::read_to_string(path).unwrap_or_else(|e| panic!("{name}: {e}"))
}

async fn run_all(name: &str, text: &str) {
    let (dir, key) = (Scratch::new("documents"), new_key());
    fs::create_dir(dir.path().join("dev-data")).expect("writable");
    // As an earlier start has left it.
    fs::write(dir.path().join("dev-data/api-key"), &key).expect("writable");
    let path = dir.path().to_owned();
    let gateway = Gateway::start_in(dir, &["dev", "--port", "0"], &[], &key, &[]).await;
    let text = text.replace(SHOWN_PORT, &format!(":{}", gateway.addr().port()));
    let curl = on_path("curl");
    let mut session = Session::start(&path, &curl).await;
    let steps = steps(&text);
    assert!(!steps.is_empty(), "{name} has no block to run");
    for step in &steps {
        if let Err(problem) = session.run(step).await {
            panic!("{name}:{}: {problem}", step.line);
        }
    }
    session.end().await;
    gateway.finish().await;
}

fn on_path(program: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let all = std::env::split_paths(&path).map(|dir| dir.join(program));
    all.into_iter().find(|file| file.is_file()).unwrap_or_else(|| panic!("{program} is not installed"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn readme_runs() {
    run_all(DOCUMENTS[0], &document(DOCUMENTS[0])).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn description_of_the_interface_runs() {
    run_all(DOCUMENTS[1], &document(DOCUMENTS[1])).await;
}

#[test]
fn every_skipped_command_is_in_a_document() {
    for (command, _) in SKIPPED {
        let mut blocks = DOCUMENTS.iter().flat_map(|name| Document::read(&document(name)).blocks);
        let begins = |line: &str| line.split_whitespace().next() == Some(command);
        assert!(blocks.any(|block| block.text.lines().any(begins)), "{command} need not be skipped");
    }
}

#[tokio::test]
async fn planted_faults_are_found() {
    let dir = Scratch::new("documents");
    // Answers with the status that its last argument names.
    let curl = dir.path().join("curl");
    let text = "#!/bin/sh\nfor last; do :; done\necho \"HTTP/1.1 $last Reason\" >\"$4\"\necho '{\"a\":1}'\n";
    fs::write(&curl, text).expect("writable");
    fs::set_permissions(&curl, fs::Permissions::from_mode(0o755)).expect("ours");
    for (blocks, expected) in [
        (&["X=200", "curl $X\n# answers 404\ncurl 404\ncurl 204"][..], None),
        (&["curl 404"], Some("the answer is 404, not 2xx")),
        (&["# answers 404\ncurl 200"], Some("the answer is 200, not 404")),
        (&["# answers 200/409\ncurl 409", "# answers 200/409\ncurl 200"], None),
        (&["# answers 200/409\ncurl 404"], Some("the answer is 404, not 200/409")),
        (&["X=$(curl 500 | cat)"], Some("the answer is 500, not 2xx")),
        (&["curl 200\n# answers 404"], Some("no request follows")),
        (&["curl --dump-header kept 404"], Some("the answer is 404, not 2xx")),
        (&["curl --dump-header kept 200\ntest -s kept"], None),
        (&["false\ntrue"], Some("a command fails")),
        (&["echo $UNSET"], Some("a command fails")),
        (&["make run\nmake \\\n  fuzz"], None),
    ] {
        let text: String = blocks.iter().map(|block| format!("```sh\n{block}\n```\n\n")).collect();
        let found = first_problem(&text, &dir, &curl).await.unwrap_or_default();
        let fits = expected.map_or(found.is_empty(), |expected| found.starts_with(expected));
        assert!(fits, "{blocks:?} should give {expected:?}, not {found}");
    }
    let shown = |json: &str| format!("```sh\ncurl 200\n```\n\n```json\n{json}\n```\n");
    assert_eq!(first_problem(&shown(r#"{"a":2}"#), &dir, &curl).await, None);
    let found = first_problem(&shown(r#"[{"a":2,"b":3}]"#), &dir, &curl).await.unwrap_or_default();
    assert!(found.starts_with("the output has no member \"b\""), "{found}");
}

async fn first_problem(text: &str, dir: &Scratch, curl: &Path) -> Option<String> {
    let mut session = Session::start(dir.path(), curl).await;
    for step in steps(text) {
        if let Err(problem) = session.run(&step).await {
            return Some(problem);
        }
    }
    session.end().await;
    None
}
