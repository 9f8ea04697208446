//! Explains a run that failed: its seed, what happened, and the life of the jobs concerned.

use super::faults::{Plan, Profile};
use super::world::World;
use std::fmt::Write;

/// Violations and lines that a report shows.
const VIOLATIONS_MAX: usize = 10;
const LINES_MAX: usize = 120;

pub fn of(seed: u64, plan: &Plan, world: &World, violations: &[String]) -> String {
    let mut text = String::new();
    let out = &mut text;
    let _ = writeln!(out, "=== seed {seed}: {} violations", violations.len());
    let _ = writeln!(out, "repeat: make sim SEED={seed} RUNS=1 (SIM_TRACE=1 prints everything)");
    let _ = writeln!(out, "{:?}", Profile { incidents: 0, ..plan.profile });
    for planned in &plan.incidents {
        let _ = writeln!(out, "incident: {planned:?}");
    }
    for violation in violations.iter().take(VIOLATIONS_MAX) {
        let _ = writeln!(out, "  {violation}");
    }
    let names = subjects(violations);
    let _ = writeln!(out, "--- the incidents, and the life of {names:?}");
    let shown: Vec<String> = names.into_iter().chain(["incident".into(), "faults are over".into()]).collect();
    let lines: Vec<&str> = world.trace.about(&shown).collect();
    for line in lines.iter().take(LINES_MAX) {
        let _ = writeln!(out, "{line}");
    }
    if lines.len() > LINES_MAX {
        let _ = writeln!(out, "… {} more lines", lines.len() - LINES_MAX);
    }
    if std::env::var_os("SIM_TRACE").is_some() {
        let _ = writeln!(out, "--- everything");
        for line in world.trace.all() {
            let _ = writeln!(out, "{line}");
        }
    }
    text
}

/// The jobs and requests that the first violations name.
fn subjects(violations: &[String]) -> Vec<String> {
    let mut names = Vec::new();
    for violation in violations.iter().take(3) {
        let words: Vec<&str> = violation.split(|c: char| !c.is_ascii_alphanumeric() && c != '-').collect();
        for (n, word) in words.iter().enumerate() {
            if word.len() == 36 && word.contains('-') {
                names.push((*word).to_owned());
            } else if *word == "request"
                && let Some(number) = words.get(n + 1)
            {
                names.push(format!("request {number} "));
            }
        }
    }
    names.sort();
    names.dedup();
    names
}
