//! Merges an operator's file into the shipped one.

use crate::config::files::ConfText;
use crate::config::line::line_at;
use serde::de::DeserializeOwned;
use toml::Table;

/// Words of at least this many characters are hidden in errors. No name of a setting is this long.
pub const SECRET_CHARS_MIN: usize = 30;

/// Moves an error to `problems`.
pub fn collect<T>(problems: &mut Vec<String>, read: Result<T, String>) -> Option<T> {
    read.map_err(|problem| problems.push(problem)).ok()
}

/// Merges the operator's file into the shipped one, table by table, and parses the result. The lists
/// `[[limit]]`, `[[key]]` and `[[upstream]]` are not merged: a file without entries has an empty list.
///
/// # Errors
/// The problem, with the file and the line.
pub fn merged<T: DeserializeOwned>(shipped: &str, file: &ConfText) -> Result<T, String> {
    let mut all: Table = shipped.parse().map_err(|e| format!("shipped configuration: {e}"))?;
    let is_there = file.text.as_ref().is_ok_and(Option::is_some);
    let text = file.text.as_ref().map_err(Clone::clone)?.as_deref().unwrap_or_default();
    let own: Table = text.parse().map_err(|e: toml::de::Error| {
        let line = line_at(text, e.span().map_or(0, |span| span.start));
        format!("{}:{line}: {}", file.name, without_secrets(e.message()))
    })?;
    if is_there {
        for list in ["limit", "key", "upstream"] {
            all.remove(list);
        }
    }
    for (key, value) in own {
        match (all.get_mut(&key), value) {
            (Some(toml::Value::Table(base)), toml::Value::Table(over)) => base.extend(over),
            (_, value) => {
                all.insert(key, value);
            }
        }
    }
    serde_path_to_error::deserialize(all).map_err(|e| {
        let path = e.path().to_string();
        without_secrets(&file.problem(&path, e.into_inner().message()))
    })
}

/// Hides long words. Errors of the parser quote invalid values, which may be an API key or its hash.
pub fn without_secrets(problem: &str) -> String {
    let is_of_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '+' | '=');
    let mut told = String::with_capacity(problem.len());
    let mut rest = problem;
    while let Some(start) = rest.find(is_of_word) {
        let (before, from) = rest.split_at(start);
        let (word, after) = from.split_at(from.find(|c| !is_of_word(c)).unwrap_or(from.len()));
        told.push_str(before);
        told.push_str(if word.len() < SECRET_CHARS_MIN { word } else { "…" });
        rest = after;
    }
    told + rest
}
