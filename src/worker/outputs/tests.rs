//! Tests of the outputs with hostile directories, and a store in memory.

use super::*;
use crate::backend::BackendError;
use async_trait::async_trait;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;
use tempfile::TempDir;

const LIMITS: OutputLimits = OutputLimits { files_max: 100, bytes_max: 1 << 20 };
const JOB: &str = "0f0e0d0c-0000-8000-8000-000000000001";

/// The `/tmp` of a run with an empty output directory, and a place for the copies.
struct RunTmp(TempDir);

impl RunTmp {
    fn new() -> Self {
        let run = Self(tempfile::tempdir().unwrap());
        fs::create_dir_all(run.path("")).unwrap();
        run
    }

    /// A path in the output directory.
    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join("tmp/output").join(name)
    }

    fn write(&self, name: &str, contents: impl AsRef<[u8]>) {
        fs::create_dir_all(self.path(name).parent().unwrap()).unwrap();
        fs::write(self.path(name), contents).unwrap();
    }

    fn tmp(&self) -> File {
        let flags = libc::O_PATH | libc::O_DIRECTORY;
        OpenOptions::new().read(true).custom_flags(flags).open(self.0.path().join("tmp")).unwrap()
    }

    fn collect(&self, limits: OutputLimits) -> CollectedOutputs {
        collect(self.tmp(), "output", self.0.path().join("copies"), limits)
    }

    async fn stored(&self, limits: OutputLimits) -> (StoredOutputs, MemoryStore) {
        let store = MemoryStore::default();
        let outputs = self.collect(limits).store(&store, JOB).await;
        assert!(!self.0.path().join("copies").exists(), "the copies are left");
        (outputs, store)
    }
}

/// A store in memory, which fails for some keys.
#[derive(Default)]
struct MemoryStore {
    files: Mutex<BTreeMap<String, Vec<u8>>>,
    failing: Option<&'static str>,
    hanging: Option<&'static str>,
}

#[async_trait]
impl OutputStore for MemoryStore {
    async fn store(&self, key: &str, file: &Path) -> Result<String, BackendError> {
        if self.failing.is_some_and(|part| key.contains(part)) {
            return Err(BackendError::Denied("no".into()));
        }
        if self.hanging.is_some_and(|part| key.contains(part)) {
            std::future::pending::<()>().await;
        }
        self.files.lock().insert(key.to_owned(), fs::read(file).unwrap());
        Ok(format!("shown:{}", key.splitn(3, '/').last().unwrap()))
    }
}

/// The paths of the stored files.
fn names(outputs: &StoredOutputs) -> Vec<&str> {
    outputs.files.iter().map(|shown| shown.strip_prefix("shown:").unwrap()).collect()
}

#[tokio::test]
async fn files_are_stored_under_their_paths() {
    let run = RunTmp::new();
    run.write("result.txt", "text");
    run.write("images/v1/ü 1.png", b"\x00\xff\x07");
    run.write("empty", "");
    run.write(".hidden", "x");
    fs::create_dir(run.path("nothing")).unwrap();
    let (outputs, store) = run.stored(LIMITS).await;
    assert_eq!(names(&outputs), [".hidden", "empty", "images/v1/ü 1.png", "result.txt"]);
    assert_eq!((outputs.note, outputs.llm_tokens), (None, 0));
    let stored = store.files.lock();
    assert_eq!(stored[&format!("outputs/{JOB}/images/v1/ü 1.png")], b"\x00\xff\x07");
    assert_eq!((stored.len(), stored[&format!("outputs/{JOB}/result.txt")].as_slice()), (4, &b"text"[..]));
    clear(run.tmp(), "output").unwrap();
    assert_eq!(fs::read_dir(run.path("")).unwrap().count(), 0);
}

#[tokio::test]
async fn links_and_special_files_are_left_out() {
    let run = RunTmp::new();
    let secret = run.0.path().join("secret");
    fs::create_dir(&secret).unwrap();
    fs::write(secret.join("key"), "secret").unwrap();
    run.write("good", "x");
    symlink(secret.join("key"), run.path("link")).unwrap();
    symlink(&secret, run.path("linked directory")).unwrap();
    fs::hard_link(secret.join("key"), run.path("hard")).unwrap();
    nix::unistd::mkfifo(&run.path("pipe"), Mode::S_IRWXU).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(run.path("socket")).unwrap();
    fs::write(run.path("").join(OsStr::from_bytes(b"\xff")), "x").unwrap();
    run.write("a\nb", "x");
    let (outputs, store) = run.stored(LIMITS).await;
    assert_eq!((names(&outputs), store.files.lock().len()), (vec!["good"], 1));
    let note = outputs.note.unwrap();
    for told in [
        "\"link\": it is a link",
        "\"linked directory\": it is a link",
        "\"hard\": it has several hard links",
        "\"pipe\": it is not a regular file",
        "\"socket\": it cannot be read",
        "\"\u{FFFD}\": its name is not UTF-8",
        "\"a\\nb\": its name is not UTF-8, or has control characters",
    ] {
        assert!(note.contains(told), "{told} is not in {note}");
    }
    assert!(note.starts_with("\n[not in outputFiles: ") && note.ends_with(']'), "{note}");
    clear(run.tmp(), "output").unwrap();
    assert_eq!(fs::read_to_string(secret.join("key")).unwrap(), "secret");
}

#[tokio::test]
async fn the_outputs_are_bounded() {
    let run = RunTmp::new();
    for n in 0..30 {
        run.write(&format!("{n:02}"), vec![b'x'; 1000]);
    }
    let few = OutputLimits { files_max: 3, ..LIMITS };
    let (outputs, _) = run.stored(few).await;
    assert_eq!((names(&outputs), outputs.left_out), (vec!["00", "01", "02"], 27));
    let note = outputs.note.unwrap();
    assert!(
        note.contains("\"03\": there are more than 3 files") && note.ends_with("; and 17 more]"),
        "{note}"
    );
    let (outputs, _) = run.stored(OutputLimits { bytes_max: 2_500, ..LIMITS }).await;
    assert_eq!(names(&outputs), ["00", "01"]);
    assert!(outputs.note.unwrap().contains("\"02\": the files have more than 2500 bytes"));
    let (outputs, _) = run.stored(OutputLimits { files_max: 0, ..LIMITS }).await;
    assert_eq!(outputs, StoredOutputs::default());

    let run = RunTmp::new();
    // A file with a hole takes no space, but its copy would.
    File::create(run.path("huge")).unwrap().set_len(1 << 40).unwrap();
    let deep = (0..DEPTH_MAX).map(|n| format!("{n}/")).collect::<String>();
    run.write(&format!("{deep}file"), "x");
    run.write(&format!("{deep}too/file"), "x");
    let long = format!("{0}/{0}/{0}/{0}", "n".repeat(PATH_BYTES_MAX / 4));
    run.write(&long, "x");
    let (outputs, _) = run.stored(LIMITS).await;
    assert_eq!(names(&outputs), [format!("{deep}file")]);
    let note = outputs.note.unwrap();
    for told in ["\"huge\": the files have more", "too\": it is below 8 directories", "more than 800 bytes"] {
        assert!(note.contains(told), "{told} is not in {note}");
    }
    assert!(note.len() < 1_000, "{note}");
}

#[tokio::test]
async fn too_many_entries_end_the_walk() {
    let run = RunTmp::new();
    for n in 0..=ENTRIES_MAX {
        symlink("x", run.path(&format!("{n:05}"))).unwrap();
    }
    run.write("99999", "never reached");
    let (outputs, _) = run.stored(LIMITS).await;
    assert!(outputs.note.unwrap().ends_with("; and 9991 more]"));
    assert!(clear(run.tmp(), "output").is_err(), "the process is replaced");
}

#[tokio::test]
async fn an_output_directory_may_be_absent_but_nothing_else() {
    let run = RunTmp::new();
    fs::remove_dir(run.path("")).unwrap();
    assert_eq!(run.stored(LIMITS).await.0, StoredOutputs::default());
    clear(run.tmp(), "output").unwrap();
    let elsewhere = run.0.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    fs::write(elsewhere.join("kept"), "x").unwrap();
    symlink(&elsewhere, run.0.path().join("tmp/output")).unwrap();
    let outputs = run.stored(LIMITS).await.0;
    assert!(outputs.files.is_empty());
    assert!(outputs.note.unwrap().contains("OUTPUT_DIR\": it is not a directory"));
    assert!(clear(run.tmp(), "output").is_err());
    assert!(elsewhere.join("kept").exists());
    // A link on the way is not followed either.
    let below = collect(run.tmp(), "output/kept", run.0.path().join("copies"), LIMITS);
    assert!(below.files.is_empty() && below.left_out.note().is_some());
}

#[tokio::test]
async fn an_output_directory_of_a_run_has_a_longer_path() {
    let run = RunTmp::new();
    run.write("7/file", "x");
    let collected = collect(run.tmp(), "output/7", run.0.path().join("copies"), LIMITS);
    let copy = &collected.files[0].copy;
    assert_eq!(
        (collected.files[0].name.as_str(), fs::read_to_string(copy).unwrap()),
        ("file", "x".to_owned())
    );
    assert_eq!(fs::metadata(copy.parent().unwrap()).unwrap().permissions().mode() & 0o777, 0o700);
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_stored_is_left_out() {
    let run = RunTmp::new();
    for name in ["a", "b", "c", "d"] {
        run.write(name, name);
    }
    for (failing, hanging, expected) in
        [(Some("/b"), None, vec!["a", "c", "d"]), (None, Some("/c"), vec!["a", "b"])]
    {
        let store = MemoryStore { failing, hanging, ..MemoryStore::default() };
        let outputs = run.collect(LIMITS).store(&store, JOB).await;
        assert_eq!(names(&outputs)[..expected.len()], expected);
        assert!(outputs.note.unwrap().contains("it could not be stored"));
    }
    for id in ["", "..", "a/b", "a b", &*"x".repeat(129)] {
        let outputs = run.collect(LIMITS).store(&MemoryStore::default(), id).await;
        assert!(outputs.files.is_empty(), "{id}");
        assert!(outputs.note.unwrap().contains("the id of the job"), "{id}");
    }
}

#[tokio::test]
async fn files_of_the_platform_are_read_and_not_listed() {
    let run = RunTmp::new();
    let usage = [r#"{"prompt_eval_count": 10, "eval_count": 5}"#, "", r#"{"eval_count": 2}"#, "broken", "{}"];
    run.write(LLM_USAGE, usage.join("\n"));
    run.write(".faas_runtime_metrics.json", "{\"handlerDurationNs\": 1}");
    run.write("deep/.llm_usage_stats.jsonl", "an output");
    let (outputs, _) = run.stored(LIMITS).await;
    assert_eq!((names(&outputs), outputs.llm_tokens), (vec!["deep/.llm_usage_stats.jsonl"], 17));
    assert_eq!(outputs.note, None);
}
