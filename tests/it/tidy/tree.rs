//! What the checks look at, and how they report.

use super::source::Source;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::OnceLock;

/// Where text of this project stands. Corpora and generated files are left out by [`is_text`].
const DIRECTORIES: [&str; 9] =
    ["src", "tests", "benches", "loadtest", "scripts", "conf", "docs", "deploy", ".ci"];

/// What a check looks at.
pub struct Tree {
    /// By their path from the root, with `/`.
    pub files: BTreeMap<String, String>,
    /// Those below `src/`.
    pub sources: Vec<Source>,
}

impl Tree {
    /// # Panics
    /// If a Rust file cannot be parsed.
    fn new(files: BTreeMap<String, String>) -> Self {
        let rust = files.iter().filter(|(file, _)| file.starts_with("src/") && file.ends_with(".rs"));
        let read = rust.map(|(file, text)| Source::read(file, text).unwrap_or_else(|e| panic!("{e}")));
        Self { sources: read.collect(), files }
    }

    pub fn read(root: &Path) -> Self {
        let mut files = BTreeMap::new();
        for directory in DIRECTORIES {
            add_files(root, &root.join(directory), &mut files);
        }
        for entry in std::fs::read_dir(root).expect("the root of the project").flatten() {
            if entry.path().is_file() {
                add_file(root, &entry.path(), &mut files);
            }
        }
        Self::new(files)
    }

    /// A tree with a fault, for the test of a check.
    pub fn planted(files: &[(&str, &str)]) -> Self {
        Self::new(files.iter().map(|(file, text)| ((*file).to_owned(), (*text).to_owned())).collect())
    }

    pub fn below<'a>(&'a self, place: &'a str) -> impl Iterator<Item = (&'a str, &'a str)> {
        let files = self.files.iter().map(|(file, text)| (file.as_str(), text.as_str()));
        files.filter(move |(file, _)| is_in(file, place))
    }

    pub fn text(&self, file: &str) -> Result<&str, String> {
        self.files.get(file).map(String::as_str).ok_or_else(|| format!("{file} is missing"))
    }
}

fn add_files(root: &Path, directory: &Path, files: &mut BTreeMap<String, String>) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            add_files(root, &path, files);
        } else {
            add_file(root, &path, files);
        }
    }
}

fn add_file(root: &Path, path: &Path, files: &mut BTreeMap<String, String>) {
    let name = path.strip_prefix(root).expect("it is below the root").display().to_string();
    if is_text(&name)
        && let Ok(text) = std::fs::read_to_string(path)
    {
        files.insert(name, text);
    }
}

fn is_text(file: &str) -> bool {
    let is_generated =
        file.starts_with("tests/corpus/") || file.ends_with(".json") || file.ends_with(".lock");
    !is_generated && !file.contains("/node_modules/") && !file.contains("/__pycache__/")
}

/// Whether `file` is `place`, stands below it, or is the face of that folder: `src/api` covers `src/api.rs`.
pub fn is_in(file: &str, place: &str) -> bool {
    file.strip_prefix(place).is_some_and(|rest| rest.is_empty() || rest == ".rs" || rest.starts_with('/'))
}

/// This repository, read once for all checks.
pub fn tree() -> &'static Tree {
    static TREE: OnceLock<Tree> = OnceLock::new();
    TREE.get_or_init(|| Tree::read(Path::new(env!("CARGO_MANIFEST_DIR"))))
}

/// Removes findings that `exceptions` name (subject, reason), and reports the exceptions that nothing needs.
pub fn without_exceptions(found: Vec<(String, String)>, exceptions: &[(&str, &str)]) -> Vec<String> {
    let is_excepted = |subject: &str| exceptions.iter().any(|(excepted, _)| *excepted == subject);
    let unneeded =
        exceptions.iter().filter(|(excepted, _)| found.iter().all(|(subject, _)| subject != excepted));
    let unneeded: Vec<String> =
        unneeded.map(|(subject, _)| format!("{subject}: the exception is not needed")).collect();
    let kept = found.into_iter().filter(|(subject, _)| !is_excepted(subject)).map(|(_, finding)| finding);
    kept.chain(unneeded).collect()
}

/// Names that stand on one side only.
pub fn differences<'a>(
    code: impl IntoIterator<Item = &'a String>,
    document: impl IntoIterator<Item = &'a String>,
    name_of_document: &str,
) -> Vec<String> {
    let code: std::collections::BTreeSet<&String> = code.into_iter().collect();
    let document: std::collections::BTreeSet<&String> = document.into_iter().collect();
    let undocumented =
        code.difference(&document).map(|name| format!("`{name}` is not in {name_of_document}"));
    let unknown =
        document.difference(&code).map(|name| format!("{name_of_document}: `{name}` is not in the code"));
    undocumented.chain(unknown).collect()
}

/// Fails with the whole list, one finding a line.
#[track_caller]
pub fn assert_none(found: &[String], remedy: &str) {
    assert!(found.is_empty(), "{} findings. {remedy}\n  {}\n", found.len(), found.join("\n  "));
}

#[test]
fn exceptions_remove_findings_and_unneeded_ones_are_reported() {
    let found = || vec![("a".to_owned(), "a is long".to_owned()), ("b".to_owned(), "b is long".to_owned())];
    assert_eq!(without_exceptions(found(), &[("a", "whole")]), ["b is long"]);
    let left = without_exceptions(found(), &[("a", "whole"), ("b", "whole"), ("c", "whole")]);
    assert_eq!(left, ["c: the exception is not needed"]);
}

#[test]
fn places_are_folders_with_their_faces() {
    for (file, place, expected) in [
        ("src/api.rs", "src/api", true),
        ("src/api/run.rs", "src/api", true),
        ("src/api/run.rs", "src/api/run.rs", true),
        ("src/apis.rs", "src/api", false),
    ] {
        assert_eq!(is_in(file, place), expected, "{file} in {place}");
    }
}
