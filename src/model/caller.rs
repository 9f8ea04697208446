//! The caller of a request: the name and the rights of an API key.
//!
//! Handlers receive this instead of the key, so that no log or record can reveal the key.

use super::{FunctionId, Scope};
use std::sync::Arc;

/// The rights of an accepted API key, without the key itself.
#[derive(Debug)]
pub struct Caller {
    /// Identifies the key in rate limits, logs and change records.
    pub name: Arc<str>,
    pub scopes: Vec<Scope>,
    /// The functions that it may run. `None`: all functions.
    pub functions: Option<AllowedFunctions>,
    /// Maximum number of jobs in flight on this node; 0: no cap. `None`: `overload.jobs_per_key_max` applies.
    pub jobs_max: Option<usize>,
}

/// The functions that a key may run: an allow-list of ids and prefixes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct AllowedFunctions {
    /// Sorted, for the binary search.
    names: Vec<String>,
    /// Prefixes of ids.
    beginnings: Vec<String>,
}

impl Caller {
    /// Whether the key has this scope, or [`Scope::Admin`], which includes every scope.
    pub fn may(&self, scope: Scope) -> bool {
        self.scopes.iter().any(|has| *has == scope || *has == Scope::Admin)
    }

    pub fn may_run(&self, function: &FunctionId) -> bool {
        self.functions.as_ref().is_none_or(|functions| functions.contain(function.as_str()))
    }
}

impl AllowedFunctions {
    /// Creates the list from function ids. One that ends in `*` is a prefix.
    pub fn new(names: &[String]) -> Self {
        let beginnings = names.iter().filter_map(|name| name.strip_suffix('*')).map(str::to_owned).collect();
        let mut names: Vec<_> = names.iter().filter(|name| !name.ends_with('*')).cloned().collect();
        names.sort_unstable();
        Self { names, beginnings }
    }

    fn contain(&self, function: &str) -> bool {
        self.names.binary_search_by(|name| name.as_str().cmp(function)).is_ok()
            || self.beginnings.iter().any(|beginning| function.starts_with(beginning.as_str()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_are_allowed_by_id_or_prefix() {
        let functions = AllowedFunctions::new(&["b".into(), "team-*".into(), "a".into()]);
        for (function, may) in [
            ("a", true),
            ("b", true),
            ("c", false),
            ("team-x", true),
            ("team-", true),
            ("team", false),
            ("ab", false),
        ] {
            assert_eq!(functions.contain(function), may, "{function}");
        }
        assert!(AllowedFunctions::new(&["*".into()]).contain("x"));
    }

    #[test]
    fn admin_includes_every_scope() {
        let caller = |scopes: &[Scope]| Caller {
            name: "a".into(),
            scopes: scopes.to_vec(),
            functions: None,
            jobs_max: None,
        };
        assert!(Scope::ALL.iter().all(|scope| caller(&[Scope::Admin]).may(*scope)));
        let allowed =
            Scope::ALL.iter().filter(|scope| caller(&[Scope::Run, Scope::Read]).may(**scope)).count();
        assert_eq!(allowed, 2);
    }
}
