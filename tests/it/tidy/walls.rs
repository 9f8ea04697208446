//! Crates and modules that only some rooms may use.

use super::graph::Graph;
use super::tree::{Tree, assert_none, is_in, tree};

/// A crate, or all whose names begin so (`*`); where it may be used; why nowhere else.
const CRATES: [(&str, &[&str], &str); 6] = [
    ("aws_*", &["src/backend/aws"], "only backend::aws names an AWS type"),
    ("redis", &["src/backend/aws"], "only backend::aws names a Redis type"),
    ("rusqlite", &["src/backend/embedded"], "only backend::embedded names a SQLite type"),
    ("opentelemetry*", &["src/traces"], "the other rooms see model::TraceContext and crate::traces"),
    (
        "pingora*",
        &["src/gateway", "src/boot", "src/main.rs", "src/log.rs"],
        "api and the rooms below it do not use Pingora",
    ),
    (
        "http",
        &[
            "src/gateway",
            "src/api",
            "src/backend/aws/json_call",
            "src/catalogue.rs",
            "src/https.rs",
            "src/config/upstreams.rs",
            "src/worker/heartbeat.rs",
            "src/worker/listener.rs",
        ],
        "rooms below api do not depend on HTTP",
    ),
];

/// A part of this crate; who may use it; why nobody else.
const PARTS: [(&str, &[&str], &str); 2] = [
    ("src/backend/aws", &["src/boot", "src/backend/aws"], "only boot knows which backend runs"),
    ("src/backend/embedded", &["src/boot", "src/backend/embedded"], "only boot knows which backend runs"),
];

/// Rooms that the simulation of a fleet runs on one thread in virtual time, all choices from a seed, and a
/// file in them that it does not run.
const NOT_SIMULATED: &str = "src/limiter/local.rs";
const SIMULATED: [&str; 10] = [
    "src/audit",
    "src/availability.rs",
    "src/backoff.rs",
    "src/dispatch",
    "src/engine.rs",
    "src/fleet",
    "src/functions",
    "src/limiter",
    "src/node_lease.rs",
    "src/runs",
];
/// What would make a run of it unrepeatable; `crate::ambient` has it instead.
const SURROUNDINGS: [&[&str]; 6] = [
    &["std", "time", "Instant"],
    &["std", "time", "SystemTime"],
    &["std", "thread"],
    &["rand", "rng"],
    &["rand", "random"],
    &["tokio", "task", "spawn_blocking"],
];

fn is_named(name: &str, listed: &str) -> bool {
    listed.strip_suffix('*').map_or(name == listed, |beginning| name.starts_with(beginning))
}

/// Uses of crates and modules by files that may not use them.
pub fn breaches(tree: &Tree) -> Vec<String> {
    let graph = Graph::new(&tree.sources);
    let mut wrong = Vec::new();
    for (file, scope) in graph.scopes() {
        let imports = scope.uses.iter().map(|import| (&import.path, import.line));
        let paths = scope.mentions.iter().filter(|mention| mention.path.len() > 1);
        for (path, line) in imports.chain(paths.map(|mention| (&mention.path, mention.line))) {
            let wall = CRATES.iter().find(|(listed, _, _)| is_named(&path[0], listed));
            if let Some((_, allowed, why)) = wall
                && !allowed.iter().any(|place| is_in(file, place))
                && !graph.is_local(scope, &path[..1])
            {
                wrong.push(format!("{file}:{line}: {} ({why})", path.join("::")));
            }
            let is_simulated = SIMULATED.iter().any(|place| is_in(file, place)) && file != NOT_SIMULATED;
            if is_simulated
                && SURROUNDINGS
                    .iter()
                    .any(|of| path.iter().map(String::as_str).take(of.len()).eq(of.iter().copied()))
            {
                wrong.push(format!("{file}:{line}: {} (the simulation replaces ambient)", path.join("::")));
            }
        }
    }
    for ((from, to), items) in graph.edges() {
        for (part, allowed, why) in PARTS {
            if is_in(&to, part) && !allowed.iter().any(|place| is_in(&from, place)) {
                let items: Vec<String> = items.into_keys().collect();
                wrong.push(format!("{from}: {} of {to} ({why})", items.join(", ")));
                break;
            }
        }
    }
    wrong
}

#[test]
fn walls_hold() {
    assert_none(&breaches(tree()), "The tables are CRATES, PARTS and SURROUNDINGS.");
}

#[test]
fn planted_breaches_are_found() {
    let lib = ("src/lib.rs", "mod api; mod backend; mod limiter; mod model;");
    let backends = [
        ("src/backend.rs", "pub mod aws; pub mod embedded; mod ports;"),
        ("src/backend/aws.rs", "pub struct Aws;"),
        ("src/backend/embedded.rs", "pub struct Embedded;"),
    ];
    for (file, text, is_wrong) in [
        ("src/limiter.rs", "use http::HeaderValue;", true),
        ("src/limiter.rs", "use http;", true),
        ("src/limiter.rs", "fn f() { http::StatusCode::OK; }", true),
        ("src/limiter.rs", "fn f() { warn!(x = http::StatusCode::OK); }", true),
        ("src/limiter.rs", "mod http { pub struct A; } use http::A;", false),
        ("src/limiter.rs", "#[cfg(test)] mod tests { use http::HeaderValue; }", false),
        ("src/api.rs", "use http::HeaderValue;", false),
        ("src/api.rs", "use pingora_core::Error;", true),
        ("src/api.rs", "use aws_sdk_sqs::Client;", true),
        ("src/api.rs", "use crate::backend::aws::Aws;", true),
        ("src/boot.rs", "use crate::backend::aws::Aws;", false),
        ("src/backend/aws.rs", "use redis::Client;", false),
        ("src/backend/aws.rs", "use crate::backend::embedded::Embedded;", true),
        ("src/backend/embedded.rs", "use super::aws::Aws;", true),
        ("src/backend/ports.rs", "use super::aws::Aws;", true),
        ("src/limiter.rs", "use std::time::{Duration, SystemTime};", true),
        ("src/limiter.rs", "fn f() { rand::random::<u8>(); }", true),
        ("src/limiter.rs", "use std::time::Duration;", false),
        ("src/api.rs", "use std::time::SystemTime;", false),
    ] {
        let found = breaches(&Tree::planted(&[lib, backends[0], backends[1], backends[2], (file, text)]));
        assert_eq!(!found.is_empty(), is_wrong, "{file}: {text}: {found:?}");
    }
}
