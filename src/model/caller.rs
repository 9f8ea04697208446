//! Who calls: what an API key stands for.

use super::{FunctionId, Scope};
use std::sync::Arc;

/// A key that is let in; it stands nowhere itself.
#[derive(Debug)]
pub struct Caller {
    /// Stands for the key in limits, logs and records.
    pub name: Arc<str>,
    pub scopes: Vec<Scope>,
    /// `None`: it may run all.
    pub functions: Option<AllowedFunctions>,
    /// Most jobs in flight on this node; 0: no cap.
    pub jobs_max: Option<usize>,
}

/// The functions that a key may run.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct AllowedFunctions {
    /// Sorted.
    names: Vec<String>,
    beginnings: Vec<String>,
}

impl Caller {
    pub fn may(&self, scope: Scope) -> bool {
        self.scopes.iter().any(|has| *has == scope || *has == Scope::Admin)
    }

    pub fn may_run(&self, function: &FunctionId) -> bool {
        self.functions.as_ref().is_none_or(|functions| functions.contain(function.as_str()))
    }
}

impl AllowedFunctions {
    /// Of names; one that ends in `*` stands for all that begin so.
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
    fn names_and_beginnings() {
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
    fn admin_is_every_scope() {
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
