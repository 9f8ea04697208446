//! The route table: one row per pattern and method. Authorization, body handling and documentation follow it.

use crate::model::Scope;
use http::Method;
use percent_encoding::percent_decode_str;

/// The handler of a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    Index,
    Run,
    Status,
    StatusWithoutId,
    Job,
    Upload,
    Functions,
    Function,
    ChangeFunction,
    DeleteFunction,
    Logs,
    Log,
    FunctionMetrics,
    AutoTuner,
    ApplyAutoTuner,
    Models,
    NodeLogs,
    Events,
    Heartbeat,
    Workers,
    SystemStatus,
    Overview,
    OpenApi,
    Health,
    Livez,
    Readyz,
    Metrics,
}

/// How a route takes the request body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BodyMode {
    Nothing,
    /// The handler receives the whole body.
    Whole,
    /// The handler reads the body in pieces.
    Stream,
}

/// One row of the table.
#[derive(Debug)]
pub struct Route {
    /// Without `/api`. Also the name of the route in metrics and limits.
    pub pattern: &'static str,
    pub method: Method,
    pub endpoint: Endpoint,
    /// `None`: no key is required.
    pub scope: Option<Scope>,
    /// Another scope that is sufficient.
    pub or_scope: Option<Scope>,
    pub takes: BodyMode,
    /// The statuses of the handler; see [`Route::statuses`].
    answers: &'static [u16],
}

impl Route {
    /// Every status of the route: those of its handler, and those of the checks before it. Has duplicates.
    pub fn statuses(&self) -> impl Iterator<Item = u16> {
        let of_key = match self.scope {
            Some(_) => &[401, 403, 429, 503][..],
            // `auth.metrics_need_key` makes it require a key.
            None if self.endpoint == Endpoint::Metrics => &[401, 403, 429],
            None => &[],
        };
        let of_body = if self.takes == BodyMode::Nothing { &[][..] } else { &[400, 408, 413, 415] };
        self.answers.iter().chain(of_key).chain(of_body).copied()
    }
}

const fn get(
    pattern: &'static str,
    endpoint: Endpoint,
    scope: Option<Scope>,
    answers: &'static [u16],
) -> Route {
    let (method, takes) = (Method::GET, BodyMode::Nothing);
    Route { pattern, method, endpoint, scope, or_scope: None, takes, answers }
}

const fn post(
    pattern: &'static str,
    endpoint: Endpoint,
    scope: Scope,
    takes: BodyMode,
    answers: &'static [u16],
) -> Route {
    Route { pattern, method: Method::POST, endpoint, scope: Some(scope), or_scope: None, takes, answers }
}

static TABLE: &[Route] = &[
    post("/run", Endpoint::Run, Scope::Run, BodyMode::Whole, &[200, 202, 404, 422]),
    get("/status/:jobId", Endpoint::Status, Some(Scope::Run), &[200, 400, 404]),
    get("/status", Endpoint::StatusWithoutId, Some(Scope::Run), &[400]),
    Route {
        pattern: "/jobs/:id",
        method: Method::GET,
        endpoint: Endpoint::Job,
        scope: Some(Scope::Read),
        or_scope: Some(Scope::Run),
        takes: BodyMode::Nothing,
        answers: &[200, 400, 404],
    },
    post("/upload", Endpoint::Upload, Scope::Write, BodyMode::Stream, &[200]),
    get("/functions", Endpoint::Functions, Some(Scope::Read), &[200, 400]),
    get("/functions/:id", Endpoint::Function, Some(Scope::Read), &[200, 304, 400, 404]),
    Route {
        pattern: "/functions/:id",
        method: Method::PUT,
        endpoint: Endpoint::ChangeFunction,
        scope: Some(Scope::Write),
        or_scope: None,
        takes: BodyMode::Stream,
        answers: &[200, 404, 412],
    },
    Route {
        pattern: "/functions/:id",
        method: Method::DELETE,
        endpoint: Endpoint::DeleteFunction,
        scope: Some(Scope::Write),
        or_scope: None,
        takes: BodyMode::Nothing,
        answers: &[200, 400, 404, 412],
    },
    get("/functions/:id/logs", Endpoint::Logs, Some(Scope::Read), &[200, 400, 404]),
    get("/functions/:id/logs/:requestId", Endpoint::Log, Some(Scope::Read), &[200, 404]),
    get("/functions/:id/metrics", Endpoint::FunctionMetrics, Some(Scope::Read), &[200, 404]),
    get("/functions/:id/auto-tuner", Endpoint::AutoTuner, Some(Scope::Read), &[200, 404]),
    post(
        "/functions/:id/auto-tuner/apply",
        Endpoint::ApplyAutoTuner,
        Scope::Write,
        BodyMode::Nothing,
        &[200, 400, 404, 409, 412],
    ),
    get("/models", Endpoint::Models, Some(Scope::Read), &[200]),
    get("/logs", Endpoint::NodeLogs, Some(Scope::Read), &[200]),
    get("/events", Endpoint::Events, Some(Scope::Read), &[200, 400]),
    post("/worker/heartbeat", Endpoint::Heartbeat, Scope::Worker, BodyMode::Whole, &[200]),
    get("/workers", Endpoint::Workers, Some(Scope::Read), &[200]),
    get("/worker/status", Endpoint::Workers, Some(Scope::Read), &[200]),
    get("/system/status", Endpoint::SystemStatus, Some(Scope::Read), &[200]),
    get("/system/overview", Endpoint::Overview, Some(Scope::Read), &[200]),
    get("/openapi.json", Endpoint::OpenApi, None, &[200]),
    get("/health", Endpoint::Health, None, &[200, 503]),
    get("/livez", Endpoint::Livez, None, &[200]),
    get("/readyz", Endpoint::Readyz, None, &[200, 503]),
    get("/metrics", Endpoint::Metrics, None, &[200]),
    get("/", Endpoint::Index, None, &[200]),
];

/// The result of a look-up.
#[derive(Debug)]
pub enum RouteMatch {
    /// A route and its path parameters, percent-decoded.
    Route(&'static Route, Vec<String>),
    /// The path has other methods. `allow` is the value of `Allow`.
    OtherMethod {
        pattern: &'static str,
        allow: String,
    },
    Nothing,
}

/// Finds the route of a path. A prefix `/api` and a slash at the end are ignored. HEAD finds that of GET.
pub fn find(method: &Method, path: &str) -> RouteMatch {
    let (_, path) = split_prefix(path);
    let path = path.strip_suffix('/').unwrap_or(path);
    let wanted = if method == Method::HEAD { &Method::GET } else { method };
    let mut others = Vec::new();
    let mut pattern = "";
    for route in TABLE {
        let Some(params) = params(route.pattern, path) else { continue };
        if route.method == *wanted {
            return RouteMatch::Route(route, params);
        }
        pattern = route.pattern;
        others.push(route.method.as_str());
        if route.method == Method::GET {
            others.push("HEAD");
        }
    }
    if others.is_empty() {
        RouteMatch::Nothing
    } else {
        RouteMatch::OtherMethod { pattern, allow: others.join(", ") }
    }
}

/// Splits off the prefix `/api`. The first part is empty if `path` does not have it.
pub fn split_prefix(path: &str) -> (&'static str, &str) {
    match path.strip_prefix("/api") {
        Some(rest) if rest.is_empty() || rest.starts_with('/') => ("/api", rest),
        _ => ("", path),
    }
}

/// The decoded parameters, if `path` matches `pattern`. An encoded slash is part of its parameter.
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

/// Whether a path is a route of the gateway, with any method.
pub fn is_local(path: &str) -> bool {
    !matches!(find(&Method::GET, path), RouteMatch::Nothing)
}

/// The patterns of routes that require a key. Only these can be limited.
pub fn patterns_with_key() -> impl Iterator<Item = &'static str> {
    all().filter(|route| route.scope.is_some()).map(|route| route.pattern)
}

/// The patterns of all routes.
pub fn patterns() -> impl Iterator<Item = &'static str> + Clone {
    TABLE.iter().map(|route| route.pattern)
}

/// All rows of the documented API.
pub fn all() -> impl Iterator<Item = &'static Route> {
    TABLE.iter().filter(|route| route.endpoint != Endpoint::StatusWithoutId)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_match_routes() {
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
            let RouteMatch::Route(route, found) = find(&method, path) else { panic!("{path}") };
            assert_eq!(
                (route.endpoint, found.as_slice()),
                (endpoint, &params.iter().map(ToString::to_string).collect::<Vec<_>>()[..]),
                "{path}"
            );
        }
    }

    #[test]
    fn other_paths_and_methods_do_not_match() {
        for path in
            ["/runs", "/run/x", "/apirun", "/api/api/run", "//run", "/functions//logs", "/status/%ff", "/RUN"]
        {
            let found = find(&Method::POST, path);
            assert!(matches!(found, RouteMatch::Nothing), "{path}: {found:?}");
        }
        for (method, path, allowed) in [
            (Method::GET, "/run", "POST"),
            (Method::PATCH, "/functions/a", "GET, HEAD, PUT, DELETE"),
            (Method::OPTIONS, "/", "GET, HEAD"),
        ] {
            let RouteMatch::OtherMethod { allow, .. } = find(&method, path) else { panic!("{path}") };
            assert_eq!(allow, allowed);
        }
    }
}
