//! Which file uses an item of which other file. Re-exports by faces do not count.

use super::source::{Mention, Scope, Source};
use std::collections::{BTreeMap, BTreeSet};

/// The name of the library in the paths of `main.rs`.
const LIBRARY: &str = "infra_controller";

/// From a file, to another, by which items and on which line each is used first.
pub type Edges = BTreeMap<(String, String), BTreeMap<String, usize>>;

/// Guards against imports that lead back to themselves: modules and names that are being looked up.
type Seen = BTreeSet<(Vec<String>, String)>;

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Found {
    Module(Vec<String>),
    /// The file that defines it, and its name.
    Item(String, String),
}

/// The modules that ship, by their paths.
pub struct Graph<'a> {
    scopes: BTreeMap<Vec<String>, (&'a str, &'a Scope)>,
    /// Of a type (file, name): its members, each with the files of the impls that have it.
    members: BTreeMap<(String, String), BTreeMap<String, BTreeSet<String>>>,
}

impl<'a> Graph<'a> {
    pub fn new(sources: &'a [Source]) -> Self {
        let all = || sources.iter().flat_map(|source| source.scopes.iter().map(move |scope| (source, scope)));
        let mut tests: BTreeSet<Vec<String>> = BTreeSet::new();
        for (_, scope) in all() {
            let only_tests = scope.children.iter().filter(|(_, is_test)| *is_test);
            tests.extend(only_tests.map(|(name, _)| [&scope.path[..], std::slice::from_ref(name)].concat()));
        }
        let ships = |scope: &Scope| (0..=scope.path.len()).all(|end| !tests.contains(&scope.path[..end]));
        let shipped = all().filter(|(_, scope)| ships(scope));
        let scopes = shipped.map(|(source, scope)| (scope.path.clone(), (source.file.as_str(), scope)));
        let mut graph = Self { scopes: scopes.collect(), members: BTreeMap::new() };
        let mut members: BTreeMap<_, BTreeMap<String, BTreeSet<String>>> = BTreeMap::new();
        for (file, scope) in graph.scopes() {
            for (of, name) in &scope.members {
                if let Some((Found::Item(at, kind), 0)) = graph.resolve(scope, of) {
                    let files = members.entry((at, kind)).or_default().entry(name.clone()).or_default();
                    files.insert(file.to_owned());
                }
            }
        }
        graph.members = members;
        graph
    }

    pub fn files(&self) -> BTreeSet<&'a str> {
        self.scopes().map(|(file, _)| file).collect()
    }

    /// Each with its file.
    pub fn scopes(&self) -> impl Iterator<Item = (&'a str, &'a Scope)> {
        self.scopes.values().copied()
    }

    /// Whether a path leads into this crate.
    pub fn is_local(&self, scope: &Scope, path: &[String]) -> bool {
        self.resolve(scope, path).is_some()
    }

    pub fn edges(&self) -> Edges {
        let mut edges = Edges::new();
        for (file, scope) in self.scopes() {
            let mut add = |to: String, item: String, line: usize| {
                if to != file {
                    edges.entry((file.to_owned(), to)).or_default().entry(item).or_insert(line);
                }
            };
            for import in &scope.uses {
                // What a face re-exports of its own folder is the map of the folder, not a use.
                if let Some((Found::Item(to, item), _)) = self.resolve(scope, &import.path)
                    && !(import.is_exported && is_below(&to, file))
                {
                    add(to, item, import.line);
                }
            }
            for mention in &scope.mentions {
                for (to, item) in self.targets(file, scope, mention) {
                    add(to, item, mention.line);
                }
            }
        }
        edges
    }

    /// The files and items that a path uses: the item, and its member if that stands in another file.
    fn targets(&self, file: &str, scope: &Scope, mention: &Mention) -> Vec<(String, String)> {
        let end = mention.path.len() - usize::from(mention.is_method);
        let Some((Found::Item(at, item), left)) = self.resolve(scope, &mention.path[..end]) else {
            return Vec::new();
        };
        let of = (at, item);
        let member = mention.path.get(end - left);
        let files = member.and_then(|member| self.members.get(&of)?.get(member));
        let others = files.filter(|files| !files.contains(file)).into_iter().flatten();
        let named = |to: &String| (to.clone(), format!("{}::{}", of.1, member.map_or("", |name| name)));
        let mut found: Vec<(String, String)> = others.map(named).collect();
        if !mention.is_method {
            found.push(of);
        }
        found
    }

    /// What a path leads to, and how many of its segments are left: variants and members.
    fn resolve(&self, from: &Scope, path: &[String]) -> Option<(Found, usize)> {
        self.walk(&from.path, path, &mut Seen::new())
    }

    fn walk(&self, from: &[String], path: &[String], seen: &mut Seen) -> Option<(Found, usize)> {
        let in_main = from.first().is_some_and(|first| first == "main");
        let (mut at, mut rest) = match path.first()?.as_str() {
            "crate" if in_main => (vec!["main".to_owned()], &path[1..]),
            "crate" | LIBRARY => (Vec::new(), &path[1..]),
            "self" => (from.to_vec(), &path[1..]),
            _ => (from.to_vec(), path),
        };
        while rest.first().is_some_and(|first| first == "super") {
            at.pop()?;
            rest = &rest[1..];
        }
        while let Some((name, left)) = rest.split_first() {
            let found = self.look_up(&at, name, seen);
            let is_module = |found: &&Found| matches!(found, Found::Module(_));
            // A module and a function may share a name: the segments that follow show which is meant.
            let module = found.iter().find(is_module);
            let item = found.iter().find(|found| !is_module(found));
            match if left.is_empty() { item.or(module) } else { module.or(item) }? {
                Found::Module(path) => at.clone_from(path),
                item => return Some((item.clone(), left.len())),
            }
            rest = left;
        }
        Some((Found::Module(at), 0))
    }

    fn look_up(&self, at: &[String], name: &str, seen: &mut Seen) -> Vec<Found> {
        let key = (at.to_vec(), name.to_owned());
        let Some((file, scope)) = self.scopes.get(at).filter(|_| seen.insert(key.clone())) else {
            return Vec::new();
        };
        let mut found = Vec::new();
        if scope.items.iter().any(|item| item.name == name) {
            found.push(Found::Item((*file).to_owned(), name.to_owned()));
        }
        let child = [at, &[name.to_owned()]].concat();
        if self.scopes.contains_key(&child) {
            found.push(Found::Module(child));
        }
        let named = scope.uses.iter().filter(|import| import.name.as_deref() == Some(name));
        found.extend(named.filter_map(|import| Some(self.walk(at, &import.path, seen)?.0)));
        if found.is_empty() {
            for glob in scope.uses.iter().filter(|import| import.name.is_none()) {
                if let Some((Found::Module(module), _)) = self.walk(at, &glob.path, seen) {
                    found.extend(self.look_up(&module, name, seen));
                }
            }
        }
        seen.remove(&key);
        found
    }
}

/// Whether `file` stands in the folder whose face is `face`: `src/api/run.rs` is below `src/api.rs`.
pub fn is_below(file: &str, face: &str) -> bool {
    let folder = face.strip_suffix(".rs").unwrap_or(face);
    face == "src/lib.rs" || file.strip_prefix(folder).is_some_and(|rest| rest.starts_with('/'))
}

/// The groups of nodes that lead to each other.
pub fn circles(edges: impl IntoIterator<Item = (String, String)>) -> Vec<BTreeSet<String>> {
    let mut next: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (from, to) in edges {
        next.entry(from).or_default().insert(to);
    }
    let mut reached: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for from in next.keys() {
        let all = reached.entry(from).or_default();
        let mut open = vec![from.as_str()];
        while let Some(node) = open.pop() {
            let after = next.get(node).into_iter().flatten();
            open.extend(after.map(String::as_str).filter(|to| all.insert(*to)));
        }
    }
    let leads_back = |from: &str, to: &str| reached.get(from).is_some_and(|all| all.contains(to));
    let mut circles: BTreeSet<BTreeSet<String>> = BTreeSet::new();
    for (node, all) in &reached {
        let circle: BTreeSet<String> =
            all.iter().filter(|other| leads_back(other, node)).map(|other| (*other).to_owned()).collect();
        if circle.len() > 1 {
            circles.insert(circle);
        }
    }
    circles.into_iter().collect()
}
