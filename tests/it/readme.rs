//! What README.md shows under "Try it": each command as a new user types it, and the answer that stands below it.

use crate::harness::gateway::Gateway;
use crate::harness::platform::new_key;
use crate::harness::process::Scratch;
use crate::harness::{SOON, eventually};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// One block of commands, and the answer that is shown for it.
struct Shown {
    commands: String,
    answer: Option<Value>,
}

/// The fenced blocks of the section, in order.
fn shown(section: &str) -> Vec<Shown> {
    let mut all: Vec<Shown> = Vec::new();
    for block in section.split("\n```").skip(1).step_by(2) {
        let (language, text) = block.split_once('\n').expect("a fence ends its line");
        match language {
            "sh" => all.push(Shown { commands: text.to_owned(), answer: None }),
            "json" => {
                let answer = serde_json::from_str(text).expect("an answer is JSON");
                all.last_mut().expect("commands come first").answer = Some(answer);
            }
            other => panic!("a block in {other:?} that nobody tries"),
        }
    }
    all
}

/// The terminal of a new user.
struct Terminal {
    dir: PathBuf,
    port: u16,
    /// What the user has seen by now, in place of what is shown.
    replaced: Vec<(String, String)>,
}

impl Terminal {
    fn run(&self, shown: &Shown) -> String {
        let mut script = shown.commands.replace("localhost:8080", &format!("localhost:{}", self.port));
        for (from, to) in &self.replaced {
            script = script.replace(from, to);
        }
        let done = Command::new("sh").arg("-ec").arg(&script).current_dir(&self.dir).output();
        let done = done.expect("sh is there");
        let printed = String::from_utf8_lossy(&done.stdout).into_owned();
        assert!(done.status.success(), "{script}\n{printed}{}", String::from_utf8_lossy(&done.stderr));
        printed
    }

    /// The answer, which has every member that is shown.
    fn answer(&self, shown: &Shown) -> Value {
        let printed = self.run(shown);
        let answer: Value = serde_json::from_str(&printed).unwrap_or_else(|e| panic!("{e}: {printed}"));
        for name in shown.answer.iter().filter_map(Value::as_object).flat_map(|object| object.keys()) {
            assert!(answer.get(name).is_some(), "no {name} in {answer}");
        }
        answer
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_else(|| panic!("{value} is no text"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_new_user_types_works() {
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md"));
    let readme = readme.expect("a file of the project");
    let section = readme.split_once("\n## Try it\n").expect("there").1.split("\n## ").next().expect("a part");
    let blocks = shown(section);
    let [make_run, wait, post, status, upload, change, logs] = &blocks[..] else {
        panic!("{} blocks: this test tries each, so it follows them", blocks.len())
    };
    assert_eq!(make_run.commands.trim(), "make run");
    let (dir, key) = (Scratch::new("readme"), new_key());
    fs::create_dir(dir.path().join("dev-data")).expect("writable");
    // As the start before has left it.
    fs::write(dir.path().join("dev-data/api-key"), &key).expect("writable");
    let path = dir.path().to_owned();
    let gateway = Gateway::start_in(dir, &["dev", "--port", "0"], &[], &key, &[]).await;
    let mut terminal = Terminal { dir: path, port: gateway.addr().port(), replaced: Vec::new() };

    let result = terminal.answer(wait);
    assert_eq!((text(&result["status"]), &result["functionId"]), ("SUCCESS", &Value::from("hello")));
    assert!(text(&result["stdout"]).contains("Hello, Ada!"), "{result}");
    let accepted = terminal.answer(post);
    let id = text(&accepted["jobId"]).to_owned();
    terminal.replaced.push(("<the jobId>".into(), id.clone()));
    assert_eq!(terminal.answer(status)["requestId"], *id);

    let uploaded = terminal.answer(upload);
    let sample = text(&upload.answer.as_ref().expect("shown")["functionId"]).to_owned();
    let function = text(&uploaded["functionId"]).to_owned();
    // The shell of the user keeps the variable.
    let keeps = |block: &Shown| Shown { commands: format!("ID={sample}\n{}", block.commands), answer: None };
    terminal.replaced.push((sample.clone(), function.clone()));
    let printed = terminal.run(change);
    for expected in ["Hello, Ada", "HTTP/1.1 200", "etag: ", "\"success\":true"] {
        let there = printed.to_lowercase().contains(&expected.to_lowercase());
        assert!(there, "{expected:?} is not in {printed}");
    }
    assert_eq!(gateway.get(&format!("/functions/{function}")).await.json()["memoryMb"], 512);
    let logged = eventually("the run in the log", SOON, || async {
        let printed = terminal.run(&keeps(logs));
        let rows: Value = serde_json::from_str(&printed).map_err(|e| format!("{e}: {printed}"))?;
        rows.get(0).cloned().ok_or(printed)
    })
    .await;
    for name in logs.answer.as_ref().expect("shown")[0].as_object().expect("a row").keys() {
        assert!(logged.get(name).is_some(), "no {name} in {logged}");
    }
    assert_eq!(logged["message"], "Hello, Ada\n");
    gateway.finish().await;
}
