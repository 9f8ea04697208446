//! An operator's file over the shipped one.

use crate::config::files::ConfText;
use crate::config::line::line_at;
use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize};
use serde::de::DeserializeOwned;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;
use toml::Table;

/// From how many characters on a word in an error is not shown: no setting's name is that long.
const SECRET_CHARS_MIN: usize = 30;

fn collect<T>(problems: &mut Vec<String>, read: Result<T, String>) -> Option<T> {
    read.map_err(|problem| problems.push(problem)).ok()
}

/// The operator's file over the shipped one, table by table. Lists (`[[limit]]`) are taken whole: they cannot be
/// merged, so a file without limits has none.
fn merged<T: DeserializeOwned>(shipped: &str, file: &ConfText) -> Result<T, String> {
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

/// Errors quote what stands in the wrong place, which may be a key or its hash.
fn without_secrets(problem: &str) -> String {
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
