//! The route table. One row a pattern and method; everything else about a route follows from it.

use http::Method;
use percent_encoding::percent_decode_str;

/// Which handler answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    Index,
    Run,
    Status,
    StatusWithoutId,
    Function,
    Logs,
    Log,
    Health,
    Livez,
    Readyz,
    Metrics,
}

/// What a key must be allowed to do. So far there is one key, and it may do everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    Run,
    Read,
}

/// One row of the table.
#[derive(Debug)]
pub struct Route {
    /// The label of the metrics, and what limits name.
    pub pattern: &'static str,
    pub method: Method,
    pub endpoint: Endpoint,
    /// `None`: no key is asked for.
    pub scope: Option<Scope>,
    /// Whether the handler reads a body.
    pub takes_body: bool,
}

const fn get(pattern: &'static str, endpoint: Endpoint, scope: Option<Scope>) -> Route {
    Route { pattern, method: Method::GET, endpoint, scope, takes_body: false }
}

static TABLE: &[Route] = &[
    Route {
        pattern: "/run",
        method: Method::POST,
        endpoint: Endpoint::Run,
        scope: Some(Scope::Run),
        takes_body: true,
    },
    get("/status/:jobId", Endpoint::Status, Some(Scope::Run)),
    get("/status", Endpoint::StatusWithoutId, Some(Scope::Run)),
    get("/functions/:id", Endpoint::Function, Some(Scope::Read)),
    get("/functions/:id/logs", Endpoint::Logs, Some(Scope::Read)),
    get("/functions/:id/logs/:requestId", Endpoint::Log, Some(Scope::Read)),
    get("/health", Endpoint::Health, None),
    get("/livez", Endpoint::Livez, None),
    get("/readyz", Endpoint::Readyz, None),
    get("/metrics", Endpoint::Metrics, None),
    get("/", Endpoint::Index, None),
];

/// What a path and method lead to.
#[derive(Debug)]
pub enum Found {
    Route(&'static Route, Vec<String>),
    /// The path is known; these methods work there, as the value of `Allow`.
    OtherMethod {
        pattern: &'static str,
        allow: String,
    },
    Nothing,
}

/// Finds the route of a path, with or without the prefix `/api` and a slash at the end.
pub fn find(method: &Method, path: &str) -> Found {
    let path = match path.strip_prefix("/api") {
        Some(rest) if rest.is_empty() || rest.starts_with('/') => rest,
        _ => path,
    };
    let path = path.strip_suffix('/').unwrap_or(path);
    let wanted = if method == Method::HEAD { &Method::GET } else { method };
    let mut others = Vec::new();
    let mut pattern = "";
    for route in TABLE {
        let Some(params) = params(route.pattern, path) else { continue };
        if route.method == *wanted {
            return Found::Route(route, params);
        }
        pattern = route.pattern;
        others.push(route.method.as_str());
        if route.method == Method::GET {
            others.push("HEAD");
        }
    }
    if others.is_empty() { Found::Nothing } else { Found::OtherMethod { pattern, allow: others.join(", ") } }
}

/// The decoded parameters if `path` is of `pattern`. A slash that was encoded stays part of its parameter.
fn params(pattern: &str, path: &str) -> Option<Vec<String>> {
    let mut params = Vec::new();
    let mut given = path.split('/');
    for part in pattern.trim_end_matches('/').split('/') {
        let segment = given.next()?;
        if part.starts_with(':') {
            let decoded = percent_decode_str(segment).decode_utf8().ok()?;
            if decoded.is_empty() {
                return None;
            }
            params.push(decoded.into_owned());
        } else if part != segment {
            return None;
        }
    }
    given.next().is_none().then_some(params)
}

/// The patterns that limits may name.
pub fn patterns() -> impl Iterator<Item = &'static str> {
    all().map(|route| route.pattern)
}

/// All rows, for the description of the service.
pub fn all() -> impl Iterator<Item = &'static Route> {
    TABLE.iter().filter(|route| route.endpoint != Endpoint::StatusWithoutId)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_lead_to_routes() {
        use Endpoint::{Function, Health, Index, Log, Logs, Run, Status, StatusWithoutId};
        for (method, path, endpoint, params) in [
            ("GET", "/", Index, vec![]),
            ("GET", "/api", Index, vec![]),
            ("GET", "/api/", Index, vec![]),
            ("POST", "/run", Run, vec![]),
            ("POST", "/api/run/", Run, vec![]),
            ("GET", "/status/a", Status, vec!["a"]),
            ("GET", "/status/", StatusWithoutId, vec![]),
            ("HEAD", "/api/health", Health, vec![]),
            ("GET", "/functions/a%20b%2Fc", Function, vec!["a b/c"]),
            ("GET", "/functions/a/logs", Logs, vec!["a"]),
            ("GET", "/functions/a/logs/r", Log, vec!["a", "r"]),
        ] {
            let method = Method::from_bytes(method.as_bytes()).unwrap();
            let Found::Route(route, found) = find(&method, path) else { panic!("{path}") };
            assert_eq!(
                (route.endpoint, found.as_slice()),
                (endpoint, &params.iter().map(ToString::to_string).collect::<Vec<_>>()[..]),
                "{path}"
            );
        }
    }

    #[test]
    fn other_paths_and_methods_do_not() {
        for path in
            ["/runs", "/run/x", "/apirun", "/api/api/run", "//run", "/functions//logs", "/status/%ff", "/RUN"]
        {
            let found = find(&Method::POST, path);
            assert!(matches!(found, Found::Nothing), "{path}: {found:?}");
        }
        for (method, path, allowed) in [
            (Method::GET, "/run", "POST"),
            (Method::DELETE, "/functions/a", "GET, HEAD"),
            (Method::OPTIONS, "/", "GET, HEAD"),
        ] {
            let Found::OtherMethod { allow, .. } = find(&method, path) else { panic!("{path}") };
            assert_eq!(allow, allowed);
        }
    }
}
