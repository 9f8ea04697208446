//! docs/configuration.md names every key of `conf/` with its default, and every variable that is read, and no
//! others.

use super::graph::Graph;
use super::markdown::{Document, Table, code_in};
use super::source::{Scope, shipped_tokens};
use super::tree::{Tree, assert_none, differences, is_in, tree};
use proc_macro2::TokenTree;
use std::collections::{BTreeMap, BTreeSet};
use syn::{Attribute, GenericArgument, Item, PathArguments, Type};

const DOCUMENT: &str = "docs/configuration.md";
/// A table of keys has this first column, and is under a heading with the name of the file.
const KEY_COLUMN: &str = "key";
/// In those tables, the value of the shipped file.
const DEFAULT_COLUMN: &str = "default";
/// The shipped files that set values. The others contain only lists, which are empty.
const SHIPPED: [&str; 3] = ["server.toml", "limits.toml", "worker.toml"];
/// A table of variables has this first column, and is under a heading with [`VARIABLE_HEADING`].
const VARIABLE_COLUMN: &str = "variable";
const VARIABLE_HEADING: &str = "environment";

/// The folder of the structs that are read from `conf/`.
const STRUCTS: &str = "src/config";
/// Generic types that wrap the type of a field.
const WRAPPERS: [&str; 4] = ["Option", "Vec", "Box", "Arc"];

/// Texts that look like names of variables but are not, and what they are.
const NOT_SETTINGS: [(&str, &str); 3] =
    [("CONNECT", "a method of HTTP"), ("TRACE", "a method of HTTP"), ("TRACK", "a method of HTTP")];
/// Variables that this code does not name, and who reads them. Those without `*` must be documented.
const READ_BY_LIBRARIES: [(&str, &str); 2] = [("AWS_*", "the AWS SDK"), ("NOTIFY_SOCKET", "sd-notify")];

#[derive(Debug)]
struct Field {
    key: String,
    /// The name of the type, without wrappers.
    of: String,
    is_flat: bool,
}

/// The structs that derive `Deserialize`, by their names.
fn structs(tree: &Tree) -> BTreeMap<String, Vec<Field>> {
    let mut structs = BTreeMap::new();
    for (file, text) in tree.below(STRUCTS).filter(|(file, _)| file.ends_with(".rs")) {
        let items = syn::parse_file(text).unwrap_or_else(|e| panic!("{file}: {e}")).items;
        for item in items {
            if let Item::Struct(item) = item
                && item.attrs.iter().any(|attribute| has_word(attribute, "derive", "Deserialize"))
            {
                let fields = item.fields.iter().filter_map(field).collect();
                structs.insert(item.ident.to_string(), fields);
            }
        }
    }
    structs
}

/// Whether `#[name(…, word, …)]`.
fn has_word(attribute: &Attribute, name: &str, word: &str) -> bool {
    let Ok(list) = attribute.meta.require_list() else { return false };
    let is_word = |token: TokenTree| matches!(token, TokenTree::Ident(ident) if ident == word);
    list.path.is_ident(name) && list.tokens.clone().into_iter().any(is_word)
}

fn field(field: &syn::Field) -> Option<Field> {
    let serde = |word: &str| field.attrs.iter().any(|attribute| has_word(attribute, "serde", word));
    if serde("skip") || serde("skip_deserializing") {
        return None;
    }
    let renamed = field.attrs.iter().find_map(|attribute| {
        let list = attribute.meta.require_list().ok().filter(|list| list.path.is_ident("serde"))?;
        let text = list.tokens.to_string();
        let rest = text.split(',').find_map(|part| part.trim().strip_prefix("rename ="))?;
        Some(rest.trim().trim_matches('"').to_owned())
    });
    let key =
        renamed.or_else(|| Some(field.ident.as_ref()?.to_string().trim_start_matches("r#").to_owned()))?;
    Some(Field { key, of: innermost(&field.ty), is_flat: serde("flatten") })
}

fn innermost(of: &Type) -> String {
    let Type::Path(path) = of else { return String::new() };
    let Some(last) = path.path.segments.last() else { return String::new() };
    if let PathArguments::AngleBracketed(arguments) = &last.arguments
        && WRAPPERS.iter().any(|wrapper| last.ident == wrapper)
        && let Some(GenericArgument::Type(inside)) = arguments.args.first()
    {
        return innermost(inside);
    }
    last.ident.to_string()
}

/// The dotted keys below a struct. A table itself is not a key.
fn add_keys(structs: &BTreeMap<String, Vec<Field>>, of: &str, prefix: &str, keys: &mut BTreeSet<String>) {
    for field in structs.get(of).into_iter().flatten() {
        let key = if field.is_flat { prefix.to_owned() } else { format!("{prefix}{}", field.key) };
        if !structs.contains_key(&field.of) {
            keys.insert(key);
        } else if field.is_flat {
            add_keys(structs, &field.of, prefix, keys);
        } else {
            add_keys(structs, &field.of, &format!("{key}."), keys);
        }
    }
}

/// The keys of each file of `conf/`. A struct that no other one holds is a file: `ServerFile` is
/// `server.toml`.
fn keys_of_code(tree: &Tree) -> BTreeMap<String, BTreeSet<String>> {
    let structs = structs(tree);
    let held: BTreeSet<&String> = structs.values().flatten().map(|field| &field.of).collect();
    let mut files = BTreeMap::new();
    for name in structs.keys().filter(|name| !held.contains(name)) {
        let stem = name.trim_end_matches("File").trim_end_matches("Conf").to_lowercase();
        let keys = files.entry(format!("{stem}.toml")).or_default();
        add_keys(&structs, name, "", keys);
    }
    files
}

/// The tables under a heading with `heading` that begin with `column`.
fn tables<'a>(document: &'a Document, heading: &str, column: &str) -> Vec<&'a Table> {
    let is_under = |text: &String| text.to_lowercase().contains(heading);
    let tables = document.tables.iter().filter(|table| {
        table.under.iter().any(is_under)
            && table.header.first().is_some_and(|first| first.to_lowercase() == column)
    });
    tables.collect()
}

/// The code in the first column of those tables.
fn listed(document: &Document, heading: &str, column: &str) -> BTreeSet<String> {
    let tables = tables(document, heading, column);
    tables.into_iter().flat_map(|table| &table.rows).flat_map(|row| code_in(&row[0])).collect()
}

/// The value of a dotted key. `None`: the file does not set it, or it is in a list of tables.
fn value_of<'a>(shipped: &'a toml::Table, key: &str) -> Option<&'a toml::Value> {
    let mut parts = key.split('.');
    let first = shipped.get(parts.next()?)?;
    parts.try_fold(first, |value, part| value.get(part))
}

/// Documented defaults that are not the values of the shipped files.
pub fn wrong_defaults(tree: &Tree) -> Result<Vec<String>, String> {
    let document = Document::read(tree.text(DOCUMENT)?);
    let mut wrong = Vec::new();
    for file in SHIPPED {
        let text = tree.text(&format!("conf/{file}"))?;
        let shipped: toml::Table = toml::from_str(text).map_err(|e| format!("conf/{file}: {e}"))?;
        for table in tables(&document, file, KEY_COLUMN) {
            let column = table.header.iter().position(|name| name.to_lowercase() == DEFAULT_COLUMN);
            for row in &table.rows {
                let default =
                    column.and_then(|column| row.get(column)).map_or("", |cell| cell.trim_matches('`'));
                for key in code_in(&row[0]) {
                    let value = value_of(&shipped, &key).map(ToString::to_string);
                    if let Some(value) = value.filter(|value| value != default) {
                        wrong.push(format!("{DOCUMENT}: `{key}` is {value} in conf/{file}, not {default}"));
                    }
                }
            }
        }
    }
    Ok(wrong)
}

pub fn wrong_keys(tree: &Tree) -> Result<Vec<String>, String> {
    let document = Document::read(tree.text(DOCUMENT)?);
    let of_code = keys_of_code(tree);
    let files = tree.below("conf").filter_map(|(file, _)| Some(file.split_once('/')?.1.to_owned()));
    let files: BTreeSet<String> = files.filter(|file| file.ends_with(".toml")).collect();
    let mut wrong: Vec<String> = of_code
        .keys()
        .filter(|file| !files.contains(*file))
        .map(|file| format!("a struct of {STRUCTS} is read from {file}, which is not in conf/"))
        .collect();
    for file in &files {
        let no_keys = BTreeSet::new();
        let keys = of_code.get(file).unwrap_or(&no_keys);
        let place = format!("{DOCUMENT} under {file}");
        wrong.extend(differences(keys, &listed(&document, file, KEY_COLUMN), &place));
    }
    Ok(wrong)
}

/// Texts like `TABLE_NAME` in the files of the settings and in those that read the environment.
fn variables_of_code(tree: &Tree) -> BTreeSet<String> {
    let reads = |scope: &Scope| {
        scope.mentions.iter().any(|mention| match &mention.path[..] {
            [.., module, function] => module == "env" && function.starts_with("var"),
            _ => false,
        })
    };
    let graph = Graph::new(&tree.sources);
    let files = graph.scopes().filter(|(file, scope)| reads(scope) || is_in(file, STRUCTS));
    let files: BTreeSet<&str> = files.map(|(file, _)| file).collect();
    let tokens = files.into_iter().flat_map(|file| shipped_tokens(&tree.files[file]).unwrap_or_default());
    let texts = tokens.map(|token| token.to_string()).filter(|token| token.starts_with('"'));
    texts.map(|text| text.trim_matches('"').to_owned()).filter(|text| is_variable(text)).collect()
}

fn is_variable(text: &str) -> bool {
    let is_capital = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_';
    text.len() > 2
        && text.starts_with(|c: char| c.is_ascii_uppercase())
        && text.chars().all(is_capital)
        && !text.ends_with('_')
}

pub fn wrong_variables(tree: &Tree) -> Result<Vec<String>, String> {
    let mut of_code = variables_of_code(tree);
    let unneeded = NOT_SETTINGS.iter().filter(|(text, _)| !of_code.remove(*text));
    let unneeded: Vec<String> =
        unneeded.map(|(text, _)| format!("{text}: the exception is not needed")).collect();
    let mut documented = listed(&Document::read(tree.text(DOCUMENT)?), VARIABLE_HEADING, VARIABLE_COLUMN);
    let is_of_library = |name: &String| {
        READ_BY_LIBRARIES.iter().any(|(listed, _)| match listed.strip_suffix('*') {
            Some(beginning) => name.starts_with(beginning),
            None => name == listed,
        })
    };
    let exact = READ_BY_LIBRARIES.iter().filter(|(name, _)| !name.ends_with('*'));
    let undocumented: Vec<String> = exact
        .filter(|(name, _)| !documented.contains(*name))
        .map(|(name, reader)| format!("`{name}`, which {reader} reads, is not in {DOCUMENT}"))
        .collect();
    documented.retain(|name| of_code.contains(name) || !is_of_library(name));
    Ok([differences(&of_code, &documented, DOCUMENT), unneeded, undocumented].concat())
}

#[test]
fn keys_of_conf_are_documented() {
    let wrong = wrong_keys(tree()).unwrap_or_else(|e| panic!("{e}"));
    assert_none(&wrong, "Tables under a heading with the file's name, with the first column `key`.");
}

#[test]
fn defaults_are_those_of_the_shipped_files() {
    let wrong = wrong_defaults(tree()).unwrap_or_else(|e| panic!("{e}"));
    assert_none(&wrong, "Write the value as in the file, in the column `default`.");
}

#[test]
fn variables_are_documented() {
    let wrong = wrong_variables(tree()).unwrap_or_else(|e| panic!("{e}"));
    assert_none(&wrong, "Tables under a heading with \"Environment\", with the first column `variable`.");
}

#[test]
fn planted_differences_are_found() {
    let conf = r#"
        #[derive(Deserialize)]
        struct LimitsFile { #[serde(default)] limit: Vec<LimitConf>, batch: BatchConf }
        #[derive(Clone, serde::Deserialize)]
        struct BatchConf { sends_max: u8, #[serde(skip)] made: u8, #[serde(rename = "x")] y: Option<u8> }
        #[derive(Deserialize)]
        struct LimitConf { rate: u32, #[serde(flatten)] more: More }
        #[derive(Deserialize)]
        struct More { burst: u32 }
        #[derive(Serialize)]
        struct All { no_key: u8 }
    "#;
    let env = r#"
        fn f() { std::env::var("TABLE_NAME"); ["CONNECT", "TRACE", "TRACK", "AWS_"]; }
        #[cfg(test)]
        mod tests { const A: &str = "NOT_READ"; }
    "#;
    let document = "\
        ## `limits.toml`\n\n\
        | key | type | default |\n|---|---|---|\n| `limit.rate` | | required |\n\
        | `batch.sends_max` | | 65 |\n| `batch.linger` | | `\"1 s\"` |\n| `batch.old` | | 1 |\n\n\
        | value | meaning |\n|---|---|\n| `local` | |\n\n\
        ## Environment\n\n\
        | variable |\n|---|\n| `GONE`, `AWS_PROFILE` |\n";
    let planted = Tree::planted(&[
        ("conf/server.toml", ""),
        ("conf/worker.toml", ""),
        ("conf/limits.toml", "[[limit]]\nrate = 1\n[batch]\nsends_max = 64\nlinger = \"1 s\"\n"),
        ("src/config/limits.rs", conf),
        ("src/boot.rs", env),
        (DOCUMENT, document),
    ]);
    let place = "docs/configuration.md under limits.toml";
    assert_eq!(
        wrong_keys(&planted).expect("there"),
        [
            format!("`batch.x` is not in {place}"),
            format!("`limit.burst` is not in {place}"),
            format!("{place}: `batch.linger` is not in the code"),
            format!("{place}: `batch.old` is not in the code"),
        ]
    );
    assert_eq!(
        wrong_defaults(&planted).expect("there"),
        [format!("{DOCUMENT}: `batch.sends_max` is 64 in conf/limits.toml, not 65")]
    );
    assert_eq!(
        wrong_variables(&planted).expect("there"),
        [
            format!("`TABLE_NAME` is not in {DOCUMENT}"),
            format!("{DOCUMENT}: `GONE` is not in the code"),
            format!("`NOTIFY_SOCKET`, which sd-notify reads, is not in {DOCUMENT}"),
        ]
    );
}
