//! What fits on a page: lines, functions, files and the tests inside them.

use super::graph::Graph;
use super::markdown::Document;
use super::source::code_lines;
use super::tree::{Tree, assert_none, is_in, tree, without_exceptions};
use std::collections::BTreeSet;

const COLUMNS_MAX: usize = 110;
const FUNCTION_LINES_MAX: usize = 70;
/// Without comments, blank lines and tests.
const FILE_LINES_MAX: usize = 400;
/// Longer ones stand in `tests.rs` beside their file.
const TEST_MODULE_LINES_MAX: usize = 200;

/// Where lines are bounded, and in files with which endings; no ending: in all files.
const BOUNDED: [(&str, &[&str]); 11] = [
    ("src", &["rs", "lua", "py", "js"]),
    ("tests", &["rs", "py", "js", "cjs", "toml"]),
    ("benches", &["rs"]),
    ("loadtest", &["rs", "py", "js"]),
    ("scripts", &[]),
    (".ci", &[]),
    ("conf", &[]),
    ("deploy", &[]),
    ("docs", &["md"]),
    ("Makefile", &[]),
    ("", &["md"]),
];

/// Fenced blocks of Markdown that show output, which is as long as it is.
const OUTPUT_FENCES: [&str; 4] = ["", "json", "text", "http"];

/// Files with longer lines, and why.
const LONG_LINES: [(&str, &str); 0] = [];

/// Longer files, and why each stays whole.
const LONG_FILES: [(&str, &str); 2] = [
    ("src/gateway.rs", "the path of a request reads in one piece: each phase of the proxy calls the next"),
    ("src/audit/ledger.rs", "one state machine: every method changes the same sums under the same lock"),
];

fn is_bounded(file: &str) -> bool {
    BOUNDED.iter().any(|(place, endings)| {
        let is_there = if place.is_empty() { !file.contains('/') } else { is_in(file, place) };
        let ending = file.rsplit_once('.').map_or("", |(_, ending)| ending);
        is_there && (endings.is_empty() || endings.contains(&ending))
    })
}

pub fn long_lines(tree: &Tree) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for (file, text) in tree.files.iter().filter(|(file, _)| is_bounded(file)) {
        let mut exempt = BTreeSet::new();
        if file.ends_with(".md") {
            let document = Document::read(text);
            let output = document.blocks.iter().filter(|block| OUTPUT_FENCES.contains(&block.language()));
            exempt.extend(output.flat_map(|block| block.line..block.line + block.text.lines().count() + 2));
            // `[name]: https://…`
            let is_link = |line: &str| line.starts_with('[') && line.contains("]: ");
            exempt.extend(text.lines().enumerate().filter(|(_, line)| is_link(line)).map(|(n, _)| n + 1));
        }
        for (n, line) in text.lines().enumerate() {
            let columns = line.chars().count();
            if columns > COLUMNS_MAX && !exempt.contains(&(n + 1)) {
                found.push((file.clone(), format!("{file}:{}: {columns} columns", n + 1)));
            }
        }
    }
    found
}

pub fn long_functions(tree: &Tree) -> Vec<String> {
    let all = tree.sources.iter().flat_map(|source| source.functions.iter().map(|f| (&source.file, f)));
    let long = all.filter(|(_, (_, _, length))| *length > FUNCTION_LINES_MAX);
    long.map(|(file, (line, name, length))| format!("{file}:{line}: {name} has {length} lines")).collect()
}

pub fn long_files(tree: &Tree) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for file in Graph::new(&tree.sources).files() {
        let lines = code_lines(&tree.files[file]).unwrap_or_else(|e| panic!("{file}: {e}")).len();
        if lines > FILE_LINES_MAX {
            found.push((file.to_owned(), format!("{file} has {lines} lines of code")));
        }
    }
    found
}

pub fn long_test_modules(tree: &Tree) -> Vec<String> {
    let all = tree.sources.iter().flat_map(|source| source.test_modules.iter().map(|m| (&source.file, m)));
    let long = all.filter(|(_, (_, length))| *length > TEST_MODULE_LINES_MAX);
    long.map(|(file, (line, length))| format!("{file}:{line}: {length} lines of tests")).collect()
}

#[test]
fn lines_fit() {
    let found = without_exceptions(long_lines(tree()), &LONG_LINES);
    assert_none(&found, "At most 110 columns.");
}

#[test]
fn functions_fit_on_a_page() {
    assert_none(&long_functions(tree()), "At most 70 lines.");
}

#[test]
fn files_are_short() {
    let found = without_exceptions(long_files(tree()), &LONG_FILES);
    assert_none(&found, "At most 400 lines without comments, blank lines and tests.");
}

#[test]
fn long_tests_stand_beside_their_file() {
    assert_none(&long_test_modules(tree()), "Move them to `tests.rs` in the folder of the file.");
}

#[test]
fn planted_lengths_are_found() {
    let (fits, long) = ("é".repeat(COLUMNS_MAX), "é".repeat(COLUMNS_MAX + 1));
    let readme = format!("{fits}\n[x]: {long}\n```json\n{long}\n```\n```sh\n{long}\n```\n{long}\n");
    let code = |lines: usize| "x();\n".repeat(lines);
    let function = |lines| format!("// why\nfn f() {{\n{}}}\n", code(lines));
    let tests =
        format!("#[cfg(test)]\nmod tests {{\n{}}}\n", "fn t() {}\n".repeat(TEST_MODULE_LINES_MAX - 1));
    let planted = Tree::planted(&[
        ("README.md", &readme),
        ("docs/a.md", &long),
        ("conf/server.toml", &long),
        ("notes.txt", &long),
        ("src/a.rs", &format!("{}{tests}", function(FUNCTION_LINES_MAX - 1))),
        (
            "src/b.rs",
            &format!(
                "{}\n\n#[cfg(test)]\nmod simulation;\n{}",
                function(FUNCTION_LINES_MAX - 2),
                "fn g() {}\n".repeat(FILE_LINES_MAX)
            ),
        ),
        ("src/c.rs", &"fn g() {}\n".repeat(FILE_LINES_MAX)),
        ("src/b/simulation.rs", &"fn g() {}\n".repeat(FILE_LINES_MAX + 1)),
    ]);
    let lines: Vec<String> = long_lines(&planted).into_iter().map(|(_, text)| text).collect();
    assert_eq!(
        lines,
        ["README.md:7", "README.md:9", "conf/server.toml:1", "docs/a.md:1"]
            .map(|at| format!("{at}: 111 columns"))
    );
    assert_eq!(long_functions(&planted), ["src/a.rs:2: f has 71 lines"]);
    assert_eq!(long_test_modules(&planted), ["src/a.rs:74: 201 lines of tests"]);
    let files: Vec<String> = long_files(&planted).into_iter().map(|(_, text)| text).collect();
    assert_eq!(files, ["src/b.rs has 470 lines of code"]);
}
