//! A name means one thing in the whole crate, and a module is named for what it holds.

use super::graph::Graph;
use super::tree::{Tree, assert_none, tree, without_exceptions};
use std::collections::BTreeMap;
use std::path::Path;

/// Types with the same name in several places, and why: the same concept seen from two backends.
const SAME_CONCEPT: [(&str, &str); 0] = [];

/// Module names that do not describe their contents. A function belongs in the module of its noun.
const CATCH_ALLS: [&str; 12] = [
    "util", "utils", "helper", "helpers", "common", "misc", "shared", "manager", "service", "factory",
    "stuff", "types",
];

pub fn types_named_twice(tree: &Tree) -> Vec<(String, String)> {
    let mut places: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (file, scope) in Graph::new(&tree.sources).scopes() {
        for item in scope.items.iter().filter(|item| item.is_type) {
            places.entry(&item.name).or_default().push(format!("{file}:{}", item.line));
        }
    }
    let twice = places.into_iter().filter(|(_, places)| places.len() > 1);
    twice.map(|(name, places)| (name.to_owned(), format!("{name}: {}", places.join(", ")))).collect()
}

pub fn catch_alls(tree: &Tree) -> Vec<String> {
    let is_catch_all = |file: &&String| {
        let stem = Path::new(file).file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        file.ends_with(".rs") && CATCH_ALLS.contains(&stem)
    };
    tree.files.keys().filter(is_catch_all).cloned().collect()
}

#[test]
fn no_type_name_is_used_twice() {
    let found = without_exceptions(types_named_twice(tree()), &SAME_CONCEPT);
    assert_none(&found, "Name each for its own concept.");
}

#[test]
fn no_module_is_a_catch_all() {
    assert_none(&catch_alls(tree()), "Put these functions beside their nouns.");
}

#[test]
fn planted_names_are_found() {
    let planted = Tree::planted(&[
        (
            "src/lib.rs",
            "mod a; mod b; #[cfg(test)] mod c; mod helpers; struct Once; fn f() { struct Local; }",
        ),
        ("src/a.rs", "pub struct Entry; mod inner { type Local = u8; } fn once() {} impl super::Entry {}"),
        ("src/b.rs", "enum Entry {}\n#[cfg(test)] mod tests { struct Once; }"),
        ("src/c.rs", "struct Once;"),
        ("src/helpers.rs", ""),
    ]);
    let found: Vec<String> = types_named_twice(&planted).into_iter().map(|(_, text)| text).collect();
    assert_eq!(found, ["Entry: src/a.rs:1, src/b.rs:1", "Local: src/lib.rs:1, src/a.rs:1"]);
    assert_eq!(catch_alls(&planted), ["src/helpers.rs"]);
}
