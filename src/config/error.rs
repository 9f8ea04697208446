//! The error of an invalid configuration.

/// All problems of a configuration, one line each. `serve` and `check` exit with 78.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct ConfigError(pub Vec<String>);
