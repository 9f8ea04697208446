//! What CONTRIBUTING.md names in code exists: files, types, functions and macros.

use super::markdown::code_in;
use super::tree::{Tree, assert_none, tree};
use std::collections::BTreeSet;

const DOCUMENT: &str = "CONTRIBUTING.md";

/// The words of a name of the code, such as `Route::of`, `every_answer` or `on_both_backends!`. `None`: the
/// text is something else, such as a command or a part of a name.
fn words_of_name(text: &str) -> Option<Vec<&str>> {
    let name = text.trim_end_matches('!');
    let is_word =
        |word: &str| word.starts_with(|c: char| c.is_ascii_alphabetic()) && word.chars().all(is_part);
    let is_type = name.starts_with(char::is_uppercase) && name.contains(char::is_lowercase);
    let is_code =
        text.ends_with('!') || name.contains("::") || name.trim_matches('_').contains('_') || is_type;
    let words: Vec<&str> = name.split("::").collect();
    (is_code && words.iter().copied().all(is_word)).then_some(words)
}

fn is_part(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// Whether a file has this path, or this name if it is given without a folder.
fn is_file(tree: &Tree, path: &str) -> bool {
    let has_name = |file: &String| file.rsplit('/').next() == Some(path);
    tree.files.contains_key(path) || (!path.contains('/') && tree.files.keys().any(has_name))
}

pub fn unknown_names(tree: &Tree) -> Result<Vec<String>, String> {
    // The names that the test below plants are in this file.
    let own = file!();
    let rust = tree.files.iter().filter(|(file, _)| file.ends_with(".rs") && !own.ends_with(file.as_str()));
    let known: BTreeSet<&str> = rust.flat_map(|(_, text)| text.split(|c: char| !is_part(c))).collect();
    let mut unknown = Vec::new();
    for text in code_in(tree.text(DOCUMENT)?) {
        let is_there = if text.ends_with(".rs") && !text.contains(' ') {
            is_file(tree, &text)
        } else {
            words_of_name(&text).is_none_or(|words| words.iter().all(|word| known.contains(word)))
        };
        if !is_there {
            unknown.push(format!("{DOCUMENT}: `{text}` does not exist"));
        }
    }
    Ok(unknown)
}

#[test]
fn names_in_the_instructions_exist() {
    let unknown = unknown_names(tree()).unwrap_or_else(|e| panic!("{e}"));
    assert_none(&unknown, "Name what the code has now.");
}

#[test]
fn planted_names_are_unknown() {
    let document = "\
        `src/api.rs`, `lib.rs`, `Route`, `Route::of`, `all_routes!`, `_total`, `infra_`, `make test`, `dev`\n\
        `src/gone.rs`, `gone.rs`, `Gone`, `Route::gone`, `gone_routes`, `gone!`, `cargo test gone.rs`\n";
    let planted = Tree::planted(&[
        (DOCUMENT, document),
        ("src/lib.rs", "mod api;"),
        ("src/api.rs", "struct Route; impl Route { fn of() {} } macro_rules! all_routes { () => {} }"),
    ]);
    let expected = ["src/gone.rs", "gone.rs", "Gone", "Route::gone", "gone_routes", "gone!"];
    assert_eq!(
        unknown_names(&planted).expect("there"),
        expected.map(|name| format!("{DOCUMENT}: `{name}` does not exist"))
    );
}
