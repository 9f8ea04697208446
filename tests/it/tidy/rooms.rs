//! The dependencies between the rooms of `src/`, and inside them: none leads up, and none is part of a cycle.
//!
//! A room is a top-level folder with its face, or a top-level file. A file uses another file if its code
//! outside tests uses an item that the other one defines. The faces that the name passes through do not
//! matter. A call of a method names no type, so it counts only where the type is known: on `self`.

use super::graph::{Edges, Graph, circles, is_below};
use super::tree::{Tree, assert_none, tree};
use std::collections::{BTreeMap, BTreeSet};

/// Each room, from the top, and the rooms below it that it uses. An arrow that is not here is a new
/// dependency: think before you add it. An arrow that nothing uses is a finding.
pub const ARROWS: [(&str, &str); 29] = [
    ("lib", ""),
    ("main", "boot config log model"),
    (
        "boot",
        "engine gateway api worker fleet overview functions limiter catalogue audit lifecycle log traces \
         config metrics backend ambient model",
    ),
    (
        "engine",
        "runs fleet dispatch functions limiter events audit lifecycle traces config metrics node_lease \
         backend ambient model",
    ),
    ("fleet", "dispatch events audit config metrics node_lease backend ambient model"),
    ("gateway", "api limiter lifecycle log traces config metrics model"),
    (
        "api",
        "overview runs dispatch functions limiter catalogue events audit lifecycle log config metrics \
         backend code_archive model",
    ),
    ("worker", "log traces config metrics backend backoff code_archive https ambient model"),
    ("catalogue", "config https"),
    ("overview", "dispatch limiter lifecycle metrics node_lease backend model"),
    (
        "runs",
        "dispatch functions limiter audit lifecycle traces config metrics backend backoff ambient model",
    ),
    (
        "dispatch",
        "events audit log traces config metrics node_lease backend availability backoff ambient model",
    ),
    ("functions", "events config metrics backend backoff ambient model"),
    ("lifecycle", ""),
    ("limiter", "config metrics backend availability ambient model"),
    ("events", "config metrics backend model"),
    ("audit", "config metrics node_lease backend availability backoff ambient model"),
    ("log", "model"),
    ("traces", "config metrics https ambient model"),
    ("node_lease", ""),
    ("backend", "availability backoff https model"),
    ("config", "model"),
    ("metrics", "model"),
    ("availability", ""),
    ("backoff", "ambient"),
    ("code_archive", "model"),
    ("https", ""),
    ("model", "ambient"),
    ("ambient", ""),
];

/// Uses between two files that may be part of a circle or lead to a face: from, to, why.
pub const EXCEPTED: [(&str, &str, &str); 0] = [];

fn room(file: &str) -> &str {
    file.trim_start_matches("src/").split(['/', '.']).next().unwrap_or_default()
}

fn witness(from: &str, to: &str, items: &BTreeMap<String, usize>) -> String {
    let items: Vec<String> = items.iter().map(|(item, line)| format!("{item} (line {line})")).collect();
    format!("{from} → {to}: {}", items.join(", "))
}

/// Each circle, with all its edges.
pub fn circles_of_files(edges: &Edges) -> Vec<String> {
    let mut found = Vec::new();
    for circle in circles(edges.keys().cloned()) {
        let inside = edges.iter().filter(|((from, to), _)| circle.contains(from) && circle.contains(to));
        let shown: Vec<String> = inside.map(|((from, to), items)| witness(from, to, items)).collect();
        found.push(format!("circle of {} files\n    {}", circle.len(), shown.join("\n    ")));
    }
    found
}

/// Uses of the face of a folder by the files in it.
pub fn up_arrows(edges: &Edges) -> Vec<String> {
    let up = edges.iter().filter(|((from, to), _)| is_below(from, to));
    up.map(|((from, to), items)| witness(from, to, items)).collect()
}

/// The edges without those in `excepted`, and the exceptions that nothing needs.
pub fn without_excepted(mut edges: Edges, excepted: &[(&str, &str, &str)]) -> (Edges, Vec<String>) {
    let all = circles(edges.keys().cloned());
    let mut unneeded = Vec::new();
    for (from, to, _) in excepted {
        let in_circle = all.iter().any(|circle| circle.contains(*from) && circle.contains(*to));
        let found = edges.remove(&((*from).to_owned(), (*to).to_owned()));
        if found.is_none() || !(in_circle || is_below(from, to)) {
            unneeded.push(format!("{from} → {to}: the exception is not needed"));
        }
    }
    (edges, unneeded)
}

/// The rows of the table that the code has now, from the top.
pub fn table_of(edges: &Edges, files: &BTreeSet<&str>) -> Vec<String> {
    let mut rooms: BTreeMap<&str, BTreeSet<&str>> =
        files.iter().map(|file| (room(file), BTreeSet::new())).collect();
    for (from, to) in edges.keys().map(|(from, to)| (room(from), room(to))).filter(|(from, to)| from != to) {
        rooms.entry(from).or_default().insert(to);
    }
    let mut rows = Vec::new();
    while !rooms.is_empty() {
        let is_used = |room: &str| rooms.values().any(|to| to.contains(room));
        let free: Vec<&str> = rooms.keys().copied().filter(|room| !is_used(room)).collect();
        // In a circle no room is free.
        let next = if free.is_empty() { rooms.keys().copied().collect() } else { free };
        for room in next {
            let to: Vec<&str> = rooms.remove(room).into_iter().flatten().collect();
            rows.push(format!("({room:?}, {:?}),", to.join(" ")));
        }
    }
    rows
}

/// Arrows that are not in the table, rows for rooms that do not exist, and arrows that nothing uses.
pub fn wrong_arrows(edges: &Edges, files: &BTreeSet<&str>, table: &[(&str, &str)]) -> Vec<String> {
    let mut unused: BTreeSet<(&str, &str)> =
        table.iter().flat_map(|(from, to)| to.split_whitespace().map(move |to| (*from, to))).collect();
    let allowed = unused.clone();
    let rooms: BTreeSet<&str> = files.iter().map(|file| room(file)).collect();
    let listed: BTreeSet<&str> = table.iter().map(|(room, _)| *room).collect();
    let mut wrong: Vec<String> =
        rooms.difference(&listed).map(|room| format!("{room} has no place in the table")).collect();
    wrong.extend(listed.difference(&rooms).map(|room| format!("{room} is in the table, not in src")));
    for ((from, to), items) in edges {
        let arrow = (room(from), room(to));
        unused.remove(&arrow);
        if arrow.0 != arrow.1 && !allowed.contains(&arrow) {
            wrong.push(format!("new arrow {} → {}: {}", arrow.0, arrow.1, witness(from, to, items)));
        }
    }
    wrong.extend(unused.into_iter().map(|(from, to)| format!("nothing uses the arrow {from} → {to}")));
    wrong
}

#[test]
fn files_are_in_no_circle() {
    let (edges, unneeded) = without_excepted(Graph::new(&tree().sources).edges(), &EXCEPTED);
    let found: Vec<String> = circles_of_files(&edges).into_iter().chain(unneeded).collect();
    assert_none(&found, "Move what both sides need to a file that both use.");
}

#[test]
fn no_file_uses_the_face_of_its_folder() {
    let (edges, _) = without_excepted(Graph::new(&tree().sources).edges(), &EXCEPTED);
    assert_none(&up_arrows(&edges), "A face is a map and a facade: move the item to a file of the folder.");
}

#[test]
fn arrows_between_rooms_are_those_of_the_table() {
    let graph = Graph::new(&tree().sources);
    let edges = graph.edges();
    let found = wrong_arrows(&edges, &graph.files(), &ARROWS);
    let rows = table_of(&edges, &graph.files()).join("\n    ");
    assert_none(&found, &format!("The table is ARROWS. The code has these rows:\n    {rows}\n"));
}

#[test]
fn arrows_of_the_table_only_lead_down() {
    for (n, (from, to)) in ARROWS.iter().enumerate() {
        for to in to.split_whitespace() {
            let below = ARROWS.iter().position(|(room, _)| *room == to);
            assert!(below.is_some_and(|below| below > n), "{from} → {to} leads up");
        }
    }
}

/// A path that begins with `crate`, `self` or `super` and leads nowhere shows that the graph misses edges.
#[test]
fn every_path_of_the_crate_is_resolved() {
    let graph = Graph::new(&tree().sources);
    let mut lost = Vec::new();
    for (file, scope) in graph.scopes() {
        let imports = scope.uses.iter().map(|import| (&import.path, import.line));
        let mentions = scope.mentions.iter().filter(|mention| !mention.is_method && mention.path.len() > 1);
        for (path, line) in imports.chain(mentions.map(|mention| (&mention.path, mention.line))) {
            let is_ours = ["crate", "self", "super", "infra_controller"].contains(&path[0].as_str());
            if is_ours && !graph.is_local(scope, path) {
                lost.push(format!("{file}:{line}: {}", path.join("::")));
            }
        }
    }
    assert_none(&lost, "The graph does not know where these lead.");
}

#[test]
fn planted_arrows_are_found() {
    let edges = |files: &[(&str, &str)]| Graph::new(&Tree::planted(files).sources).edges();
    let pairs = |edges: &Edges| -> Vec<String> {
        edges.iter().map(|((from, to), items)| witness(from, to, items).replace("src/", "")).collect()
    };
    // Through a face, a rename and a glob; in a type, a macro and a text of serde; a method; not in tests.
    let lib = ("src/lib.rs", "mod a; mod b;");
    let face = ("src/a.rs", "mod c; pub mod d; pub use c::C as E; pub use d::*;");
    let c = ("src/a/c.rs", "pub struct C; #[cfg(test)] mod tests { use crate::b::B; }");
    let d = ("src/a/d.rs", "pub fn d() {} pub const D: u8 = 1; pub struct S;");
    for (text, expected) in [
        ("use crate::a::E;", "b.rs → a/c.rs: C (line 1)"),
        ("use super::a::d::d as e;", "b.rs → a/d.rs: d (line 1)"),
        ("fn f() -> crate::a::d::S { loop {} }", "b.rs → a/d.rs: S (line 1)"),
        ("use crate::a::*; fn f() { D; }", "b.rs → a/d.rs: D (line 1)"),
        ("use crate::a; fn f() { warn!(x = a::D); }", "b.rs → a/d.rs: D (line 1)"),
        ("struct B { #[serde(with = \"crate::a::d::d\")] x: u8 }", "b.rs → a/d.rs: d (line 1)"),
    ] {
        assert_eq!(pairs(&edges(&[lib, face, c, d, ("src/b.rs", text)])), [expected], "{text}");
    }
    let split = "use super::S; impl S { pub fn m(&self) {} }";
    let caller = "mod n; pub struct S; impl S { fn k(&self) { self.m() } }";
    let found = edges(&[lib, ("src/b.rs", caller), ("src/b/n.rs", split)]);
    assert_eq!(pairs(&found), ["b.rs → b/n.rs: S::m (line 1)", "b/n.rs → b.rs: S (line 1)"]);
    assert_eq!((circles_of_files(&found).len(), up_arrows(&found).len()), (1, 1));
    let excepted =
        [("src/b/n.rs", "src/b.rs", "one type in two files"), ("src/b.rs", "src/c.rs", "no such use")];
    let (left, unneeded) = without_excepted(found, &excepted);
    assert_eq!((circles_of_files(&left).len(), up_arrows(&left).len()), (0, 0));
    assert_eq!(unneeded, ["src/b.rs → src/c.rs: the exception is not needed"]);
    let main = ("src/main.rs", "use infra_controller::b::B; fn main() {}");
    let found = edges(&[lib, main, ("src/b.rs", "pub struct B;"), c]);
    assert_eq!(table_of(&found, &BTreeSet::new()), ["(\"main\", \"b\"),"]);
    assert_eq!(
        wrong_arrows(
            &found,
            &["src/main.rs", "src/b.rs", "src/c.rs"].into(),
            &[("main", "a"), ("b", ""), ("gone", "")]
        ),
        [
            "c has no place in the table",
            "gone is in the table, not in src",
            "new arrow main → b: src/main.rs → src/b.rs: B (line 1)",
            "nothing uses the arrow main → a",
        ]
    );
}
