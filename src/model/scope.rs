//! The scopes of API keys. Each route requires at most one.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A right of an API key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Run functions and read their results.
    Run,
    /// Read functions, logs, workers and models.
    Read,
    /// Upload, change and delete functions.
    Write,
    /// Send the heartbeats of a worker.
    Worker,
    /// Read the metrics, if `auth.metrics_need_key` is set.
    Metrics,
    /// All of the above.
    Admin,
}

impl Scope {
    pub const ALL: [Self; 6] = [Self::Run, Self::Read, Self::Write, Self::Worker, Self::Metrics, Self::Admin];

    pub fn name(self) -> &'static str {
        match self {
            Self::Run => "run",
            Self::Read => "read",
            Self::Write => "write",
            Self::Worker => "worker",
            Self::Metrics => "metrics",
            Self::Admin => "admin",
        }
    }

    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|scope| scope.name() == name)
    }
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
