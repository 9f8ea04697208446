//! What a key may be allowed to do.

use serde::{Deserialize, Serialize};
use std::fmt;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Scope {
    /// Run functions, and ask for the results.
    Run,
    /// Look at functions, logs, workers and models.
    Read,
    /// Upload, change and delete functions.
    Write,
    /// Report as a worker.
    Worker,
    /// Read the metrics, where they ask for a key.
    Metrics,
    /// Everything.
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
