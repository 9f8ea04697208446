//! The rules of the house that no compiler knows. All tables stand at the top; what reads them stands below.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Who may name whom. An arrow that is not here is a new one: think before you add it. The layers, from the top:
/// main → boot → gateway → api → dispatch, functions → audit → backend → model; beside them what many use.
const ARROWS: [(&str, &[&str]); 18] = [
    ("lib", &[]),
    ("main", &["boot", "config", "log", "model"]),
    (
        "boot",
        &[
            "gateway",
            "api",
            "limiter",
            "dispatch",
            "functions",
            "catalogue",
            "audit",
            "lifecycle",
            "config",
            "metrics",
            "log",
            "backend",
            "model",
        ],
    ),
    ("gateway", &["api", "limiter", "lifecycle", "config", "metrics", "model"]),
    (
        "api",
        &[
            "limiter",
            "dispatch",
            "functions",
            "catalogue",
            "audit",
            "lifecycle",
            "config",
            "metrics",
            "log",
            "backend",
            "model",
        ],
    ),
    ("limiter", &["config", "metrics", "backend", "model"]),
    ("dispatch", &["audit", "config", "metrics", "backend", "model"]),
    ("functions", &["config", "metrics", "backend", "model"]),
    ("catalogue", &["config", "https"]),
    ("audit", &["config", "metrics", "backend", "model"]),
    ("lifecycle", &[]),
    ("config", &["backend", "model"]),
    ("metrics", &["model"]),
    ("log", &["model"]),
    ("backend", &["https", "model"]),
    ("https", &[]),
    ("fuzz", &[]),
    ("model", &[]),
];

/// (text, where it may stand, why nowhere else)
const WALLS: [(&str, &[&str], &str); 6] = [
    ("aws_", &["src/backend/aws"], "only backend::aws names an AWS type"),
    ("redis::", &["src/backend/aws"], "only backend::aws names a Redis type"),
    ("rusqlite", &["src/backend/embedded"], "only backend::embedded knows SQLite"),
    (
        "pingora",
        &["src/gateway", "src/boot", "src/main.rs", "src/log.rs"],
        "api and below do not know Pingora exists",
    ),
    ("backend::aws", &["src/boot", "src/backend"], "nobody but boot knows which backend runs"),
    ("backend::embedded", &["src/boot", "src/backend"], "nobody but boot knows which backend runs"),
];

/// A function belongs beside its noun, not in a drawer.
const DRAWERS: [&str; 12] = [
    "util", "utils", "helper", "helpers", "common", "misc", "shared", "manager", "service", "factory",
    "stuff", "types",
];

const FUNCTION_LINES_MAX: usize = 70;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Path from the root and text of every Rust file under `dir`.
fn sources(dir: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut dirs: Vec<PathBuf> = vec![root().join(dir)];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir).expect("a directory of the project").flatten() {
            let path = entry.path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                let name = path.strip_prefix(root()).expect("it is below the root").display().to_string();
                found.insert(name, std::fs::read_to_string(&path).expect("a text file"));
            }
        }
    }
    found
}

/// The lines that are not all comment, with their numbers.
fn code(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines()
        .enumerate()
        .map(|(n, line)| (n + 1, line))
        .filter(|(_, line)| !line.trim_start().starts_with("//"))
}

/// Without the unit tests at the end of a file: they may use the embedded backend rather than a mock.
fn shipped(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod tests {").next().unwrap_or(text)
}

/// `src/api/run.rs` and `src/api.rs` belong to `api`.
fn layer_of(file: &str) -> &str {
    let path = file.strip_prefix("src/").unwrap_or(file);
    path.split(['/', '.']).next().unwrap_or_default()
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// The first segments of all paths behind `prefix` (`crate::`), groups in braces opened: of
/// `crate::{a::{b, c}, d}` that is a and d.
fn targets<'a>(text: &'a str, prefix: &str) -> Vec<&'a str> {
    let mut found = Vec::new();
    for (at, _) in text.match_indices(prefix) {
        if text[..at].ends_with(is_name) {
            continue; // the end of a longer name
        }
        let rest = &text[at + prefix.len()..];
        if !rest.starts_with('{') {
            found.extend(rest.split(|c| !is_name(c)).next());
            continue;
        }
        let mut depth = 0;
        let mut is_first = false;
        for (i, c) in rest.char_indices() {
            match c {
                '{' => {
                    depth += 1;
                    is_first = depth == 1;
                }
                '}' if depth == 1 => break,
                '}' => depth -= 1,
                ',' => is_first = depth == 1,
                c if is_first && is_name(c) => {
                    found.extend(rest[i..].split(|c| !is_name(c)).next());
                    is_first = false;
                }
                _ => {}
            }
        }
    }
    found
}

/// All arrows of a file to other layers.
fn arrows<'a>(file: &str, text: &'a str) -> Vec<&'a str> {
    let from = layer_of(file);
    // From a file of the first level `super` is the crate.
    let is_first_level = file.matches('/').count() == 1;
    let up = if is_first_level { "super::" } else { "super::super::" };
    let mut all: Vec<&str> =
        ["crate::", "infra_controller::", up].iter().flat_map(|p| targets(text, p)).collect();
    all.retain(|to| *to != from && ARROWS.iter().any(|(layer, _)| layer == to));
    all
}

#[test]
fn arrows_only_go_down() {
    let mut wrong = Vec::new();
    for (file, text) in sources("src") {
        let without_comments: String = code(shipped(&text)).map(|(_, line)| format!("{line}\n")).collect();
        let layer = layer_of(&file);
        let Some((_, allowed)) = ARROWS.iter().find(|(from, _)| *from == layer) else {
            wrong.push(format!("{file}: `{layer}` has no place in the table of layers"));
            continue;
        };
        for to in arrows(&file, &without_comments) {
            if !allowed.contains(&to) {
                wrong.push(format!("{file}: {layer} → {to} is a new arrow"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}\nThe table is ARROWS in {}.", file!());
}

#[test]
fn the_table_itself_has_no_circle() {
    for (n, (from, to)) in ARROWS.iter().enumerate() {
        for to in *to {
            let below = ARROWS.iter().position(|(layer, _)| layer == to);
            let is_beside = ["config", "metrics", "log", "lifecycle"].contains(to);
            assert!(below.is_some_and(|below| below > n || is_beside), "{from} → {to} goes up");
        }
    }
}

#[test]
fn walls_hold() {
    let mut wrong = Vec::new();
    for (file, text) in sources("src") {
        for (word, allowed, why) in WALLS {
            if allowed.iter().any(|place| file.starts_with(place)) {
                continue;
            }
            let names = |line: &str| line.match_indices(word).any(|(at, _)| !line[..at].ends_with(is_name));
            wrong.extend(
                code(shipped(&text))
                    .filter(|(_, line)| names(line))
                    .map(|(n, line)| format!("{file}:{n}: {} ({why})", line.trim())),
            );
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn no_drawers() {
    let stem = |file: &String| Path::new(file).file_stem().is_some_and(|s| DRAWERS.iter().any(|d| s == *d));
    let all = sources("src").into_keys().chain(sources("tests").into_keys());
    let wrong: Vec<String> = all.filter(stem).collect();
    assert!(wrong.is_empty(), "put these functions beside their nouns: {wrong:?}");
}

/// (line, name, length) of each function. Formatted code closes a function at the indentation it began with.
fn functions(text: &str) -> Vec<(usize, String, usize)> {
    let lines: Vec<&str> = text.lines().collect();
    let mut found = Vec::new();
    for (n, line) in lines.iter().enumerate() {
        let indent = &line[..line.len() - line.trim_start().len()];
        let words: Vec<&str> = line.split_whitespace().take_while(|word| !word.starts_with("//")).collect();
        let Some(at) = words.iter().position(|word| *word == "fn") else { continue };
        let before = ["pub", "const", "async", "unsafe", "extern", "default"];
        if !words[..at].iter().all(|word| before.contains(word) || word.starts_with("pub(")) {
            continue;
        }
        let name = words.get(at + 1).and_then(|word| word.split(|c| !is_name(c)).next()).unwrap_or_default();
        let close = format!("{indent}}}");
        let is_end = |line: &&str| {
            **line == close
                || (line.starts_with(indent) && line.ends_with(';') && !line[indent.len()..].starts_with(' '))
        };
        let is_one_line = line.ends_with('}') || line.ends_with(';');
        let length = if is_one_line { 1 } else { lines[n..].iter().position(is_end).map_or(1, |l| l + 1) };
        found.push((n + 1, name.to_owned(), length));
    }
    found
}

#[test]
fn functions_fit_on_a_page() {
    let mut wrong = Vec::new();
    for (file, text) in sources("src") {
        for (line, name, length) in functions(&text) {
            if length > FUNCTION_LINES_MAX {
                wrong.push(format!("{file}:{line}: {name} has {length} lines"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}\nat most {FUNCTION_LINES_MAX}");
}

#[test]
fn the_readers_of_this_file_can_read() {
    let text = "use crate::{a::{b, c}, d, e::F};\nuse crate::g;\nlet x = crate::h::i(); my_crate::j";
    assert_eq!(targets(text, "crate::"), ["a", "d", "e", "g", "h"]);
    assert_eq!(arrows("src/model.rs", "use super::backend; use crate::model::x;"), ["backend"]);
    assert_eq!(arrows("src/api/run.rs", "use super::backend; use super::super::audit;"), ["audit"]);
    assert_eq!((layer_of("src/api/run.rs"), layer_of("src/api.rs")), ("api", "api"));

    let text = "impl A {\n    pub(crate) async fn long(\n        a: u8,\n    ) {\n        a;\n    }\n\n    fn short() {}\n}\n\
                trait B {\n    fn declared(\n        &self,\n    ) -> u8;\n}\n// fn not_code() {\nlet fnord = 1;\n";
    let seen: Vec<(String, usize)> =
        functions(text).into_iter().map(|(_, name, length)| (name, length)).collect();
    assert_eq!(seen, [("long".into(), 5), ("short".into(), 1), ("declared".into(), 3)]);
}
