//! Upstreams: which paths are forwarded, and to which addresses.
//!
//! An upstream is chosen by the prefix of the path. Pingora's load balancer holds its addresses and their
//! health. Host names are resolved periodically, so an upstream may move to other addresses. An upstream
//! whose configuration does not change in a reload keeps its addresses and their health.

use crate::api::is_local;
use crate::config::{Live, UpstreamConf};
use crate::metrics::Metrics;
use async_trait::async_trait;
use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;
use pingora::lb::discovery::ServiceDiscovery;
use pingora::lb::health_check::{HealthCheck, HttpHealthCheck, TcpHealthCheck};
use pingora::lb::selection::RoundRobin;
use pingora::lb::{Backend, Backends, LoadBalancer};
use pingora::upstreams::peer::HttpPeer;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::{MissedTickBehavior, interval, timeout};

/// How often the loop checks whether work is due. The intervals below count these ticks.
const TICK: Duration = Duration::from_secs(1);
/// How often host names are resolved, and how long that may take.
const LOOK_UP_EVERY_S: u64 = 10;
const LOOK_UP_MAX: Duration = Duration::from_secs(3);
/// How often addresses are checked by a TCP or TLS connection, if no HTTP health check is configured.
const CONNECT_EVERY_S: u64 = 5;
/// How long an address may take to answer a health check.
const CHECK_MAX: Duration = Duration::from_secs(2);
/// How long an idle connection to an upstream stays in the pool.
const IDLE_MAX: Duration = Duration::from_secs(55);
/// The most addresses considered to find a healthy one.
const SELECT_MAX: usize = 256;

/// The configured upstreams, longest prefix first. Clones share one list.
#[derive(Clone)]
pub struct Upstreams(Live<Vec<Arc<Upstream>>>);

pub struct Upstream {
    pub conf: UpstreamConf,
    /// Its route pattern in metrics and rate limits.
    pub pattern: Arc<str>,
    addresses: LoadBalancer<RoundRobin>,
    ticks: AtomicU64,
    is_tended: AtomicBool,
}

impl Upstreams {
    pub fn new(conf: &[UpstreamConf]) -> Self {
        let upstreams = Self(Live::new(Vec::new()));
        upstreams.set_conf(conf);
        upstreams
    }

    pub fn set_conf(&self, conf: &[UpstreamConf]) {
        let before = self.0.get();
        let kept = |conf: &UpstreamConf| before.iter().find(|old| old.conf == *conf).map(Arc::clone);
        let made = |conf: &UpstreamConf| kept(conf).unwrap_or_else(|| Arc::new(Upstream::new(conf.clone())));
        let mut all: Vec<_> = conf.iter().map(made).collect();
        // `find` takes the first match, which must be the longest prefix.
        all.sort_by_key(|upstream| std::cmp::Reverse(upstream.conf.prefix.len()));
        drop(before);
        self.0.set(all);
    }

    /// The upstream for a path, by its longest matching prefix.
    ///
    /// Also `None` if a server might normalize the path to one of another upstream, or to a route of the
    /// gateway. That path may require another scope, so forwarding it would bypass the check of the scope.
    pub fn find(&self, path: &str) -> Option<Arc<Upstream>> {
        let all = self.0.get();
        let find = |path: &str| all.iter().find(|upstream| upstream.is_for(path));
        let found = find(path)?;
        let normalized = as_others_read(path)?;
        // Some servers ignore case or a trailing slash.
        let folded = normalized.to_ascii_lowercase();
        let bare = folded.strip_suffix('/').unwrap_or(&folded);
        let by_any_case = || all.iter().find(|upstream| upstream.is_for_folded(&folded));
        let is_same = |other: Option<&Arc<Upstream>>| other.is_some_and(|other| Arc::ptr_eq(other, found));
        let is_ours = is_local(&normalized) || is_local(&folded) || is_local(bare);
        (!is_ours && is_same(find(&normalized)) && is_same(by_any_case())).then(|| Arc::clone(found))
    }

    fn all(&self) -> Vec<Arc<Upstream>> {
        self.0.get().to_vec()
    }
}

impl Upstream {
    fn new(conf: UpstreamConf) -> Self {
        let mut backends = Backends::new(Box::new(Names(conf.addresses.clone())));
        backends.set_health_check(health_check(&conf));
        let pattern = conf.pattern().into();
        let addresses = LoadBalancer::from_backends(backends);
        Self { conf, pattern, addresses, ticks: AtomicU64::new(0), is_tended: AtomicBool::new(false) }
    }

    /// Whether the path is the prefix, or below it.
    fn is_for(&self, path: &str) -> bool {
        path.strip_prefix(self.conf.prefix.as_str())
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }

    /// As `is_for`, but ignores case. `path` must be in lower case.
    fn is_for_folded(&self, path: &str) -> bool {
        path.strip_prefix(self.conf.prefix.to_ascii_lowercase().as_str())
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    }

    /// The path and query to send to the upstream: the prefix is replaced, if so configured.
    pub fn path(&self, path_and_query: &str) -> String {
        let Some(replaced) = &self.conf.replace_prefix else { return path_and_query.to_owned() };
        let rest = path_and_query.strip_prefix(self.conf.prefix.as_str()).unwrap_or(path_and_query);
        let slash = if rest.starts_with('/') || !replaced.is_empty() { "" } else { "/" };
        format!("{replaced}{slash}{rest}")
    }

    /// The next healthy address, in round-robin order. `None`: no address is healthy.
    pub async fn peer(&self) -> Option<HttpPeer> {
        if self.addresses.backends().get_backend().is_empty() {
            // Configured a moment ago: the loop has not resolved its names yet.
            self.look_up().await;
        }
        let backend = self.addresses.select(b"", SELECT_MAX)?;
        let conf = &self.conf;
        let (has_tls, name) = (conf.tls.is_some(), conf.tls.as_ref().map(|tls| tls.name.clone()));
        let mut peer = HttpPeer::new(backend.addr, has_tls, name.unwrap_or_default());
        let connect = Duration::from_millis(conf.connect_timeout_ms);
        peer.options.connection_timeout = Some(connect);
        peer.options.total_connection_timeout = Some(connect);
        peer.options.read_timeout = Some(Duration::from_secs(conf.read_timeout_s));
        peer.options.write_timeout = Some(Duration::from_secs(conf.read_timeout_s));
        peer.options.idle_timeout = Some(IDLE_MAX);
        Some(peer)
    }

    async fn look_up(&self) {
        if !matches!(timeout(LOOK_UP_MAX, self.addresses.update()).await, Ok(Ok(()))) {
            tracing::warn!(
                upstream = self.conf.name,
                "Upstream names not resolved; known addresses stay in use. Check `addresses` and DNS"
            );
        }
    }

    async fn tend(&self, metrics: &Metrics) {
        let tick = self.ticks.fetch_add(1, Ordering::Relaxed);
        if tick.is_multiple_of(LOOK_UP_EVERY_S) {
            self.look_up().await;
        }
        let every = self.conf.health.as_ref().map_or(CONNECT_EVERY_S, |health| health.every_s);
        if tick.is_multiple_of(every) {
            let backends = self.addresses.backends();
            // Each check has its own timeout. This one bounds everything around it.
            let _ = timeout(2 * CHECK_MAX, backends.run_health_check(true)).await;
            let healthy = backends.get_backend().iter().filter(|backend| backends.ready(backend)).count();
            let healthy = i64::try_from(healthy).unwrap_or(i64::MAX);
            metrics.edge.upstream_healthy.with_label_values(&[self.conf.name.as_str()]).set(healthy);
        }
    }
}

/// The path as servers that normalize may read it: decoded, and without the parameters of segments (`;v=1`).
///
/// `None` if servers disagree on the path. That is so if a segment
/// - is `.` or `..`,
/// - is empty and not the last (some servers merge slashes),
/// - contains an encoded slash, backslash, NUL or percent sign (some servers decode twice).
fn as_others_read(path: &str) -> Option<String> {
    let mut segments = path.strip_prefix('/')?.split('/').peekable();
    let mut normalized = String::with_capacity(path.len());
    while let Some(segment) = segments.next() {
        let decoded = percent_encoding::percent_decode_str(segment).decode_utf8_lossy();
        if decoded.contains(['/', '\\', '%', '\0']) {
            return None;
        }
        let name = decoded.split(';').next().unwrap_or_default();
        if matches!(name, "." | "..") || (name.is_empty() && segments.peek().is_some()) {
            return None;
        }
        normalized.push('/');
        normalized.push_str(name);
    }
    Some(normalized)
}

fn health_check(conf: &UpstreamConf) -> Box<dyn HealthCheck + Send + Sync> {
    let name = conf.tls.as_ref().map(|tls| tls.name.as_str());
    let Some(health) = &conf.health else {
        let mut check = name.map_or_else(TcpHealthCheck::new, TcpHealthCheck::new_tls);
        check.peer_template.options.connection_timeout = Some(CHECK_MAX);
        check.peer_template.options.total_connection_timeout = Some(CHECK_MAX);
        return check;
    };
    let host = conf.host.as_deref().or(name).unwrap_or("localhost");
    let mut check = HttpHealthCheck::new(name.unwrap_or(host), name.is_some());
    let _ = check.req.insert_header(http::header::HOST, host);
    if let Ok(uri) = health.path.parse() {
        check.req.set_uri(uri);
    }
    check.peer_template.options.connection_timeout = Some(CHECK_MAX);
    check.peer_template.options.total_connection_timeout = Some(CHECK_MAX);
    check.peer_template.options.read_timeout = Some(CHECK_MAX);
    check.consecutive_failure = 2;
    Box::new(check)
}

/// Resolves the configured `host:port` names.
struct Names(Vec<String>);

#[async_trait]
impl ServiceDiscovery for Names {
    async fn discover(&self) -> pingora::Result<(BTreeSet<Backend>, HashMap<u64, bool>)> {
        let found = join_all(self.0.iter().map(|name| tokio::net::lookup_host(name.as_str()))).await;
        let found = found.into_iter().flatten().flatten();
        let backends: BTreeSet<_> = found.filter_map(|at| Backend::new(&at.to_string()).ok()).collect();
        if backends.is_empty() {
            // An error makes the load balancer keep the known addresses.
            return pingora::Error::e_explain(pingora::ErrorType::ConnectError, "no address was resolved");
        }
        Ok((backends, HashMap::new()))
    }
}

/// The background loop that resolves names and checks the health of addresses.
pub struct HealthLoop {
    pub upstreams: Upstreams,
    pub metrics: Arc<Metrics>,
}

impl HealthLoop {
    pub async fn run(self) {
        let metrics = &self.metrics;
        let tend = |upstream: Arc<Upstream>| async move {
            upstream.tend(metrics).await;
            upstream.is_tended.store(false, Ordering::Relaxed);
        };
        // Concurrent, so that an upstream that hangs delays no other.
        let mut tending = FuturesUnordered::new();
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tick.tick() => {
                    let all = self.upstreams.all().into_iter();
                    let is_due = |upstream: &Arc<Upstream>| !upstream.is_tended.swap(true, Ordering::Relaxed);
                    tending.extend(all.filter(is_due).map(tend));
                }
                Some(()) = tending.next() => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conf(prefix: &str, replace: Option<&str>) -> UpstreamConf {
        let text =
            format!("name = \"a\"\nprefix = {prefix:?}\naddresses = [\"127.0.0.1:1\"]\nscope = \"none\"\n");
        let mut conf: UpstreamConf = toml::from_str(&text).unwrap();
        conf.replace_prefix = replace.map(str::to_owned);
        conf
    }

    #[tokio::test]
    async fn longest_prefix_wins_and_ambiguous_paths_are_rejected() {
        let upstreams = Upstreams::new(&[conf("/a", None), conf("/a/b", None), conf("/worker", None)]);
        for (path, prefix) in [
            ("/a", Some("/a")),
            ("/a/", Some("/a")),
            ("/a/bc", Some("/a")),
            ("/a/b", Some("/a/b")),
            ("/a/b/c", Some("/a/b")),
            ("/ab", None),
            ("/", None),
            ("/a/../x", None),
            ("/a/%2e%2E/x", None),
            ("/a/.", None),
            ("/a/b%2fc", None),
            ("/a/b%5cc", None),
            ("/a/%252e", None),
            ("/a/..b/c.d%20e", Some("/a")),
            ("/a/%63;x", Some("/a")),
            ("/a/%ff", Some("/a")),
            // Other servers may read these as `/a/b`.
            ("/a/%62", None),
            ("/a/%62/c", None),
            ("/a//b", None),
            ("/a/b;x", None),
            ("/a/x/..;/b", None),
            ("/a/;/b", None),
            ("/a/b//", None),
            ("/a/B/c", None),
            // Other servers may read these as a route of the gateway.
            ("/worker/other", Some("/worker")),
            ("/worker/%73tatus", None),
            ("/worker/status;x", None),
            ("/worker/status/", None),
            ("/worker/Status", None),
        ] {
            assert_eq!(
                upstreams.find(path).map(|found| found.conf.prefix.clone()).as_deref(),
                prefix,
                "{path}"
            );
        }
    }

    #[test]
    fn prefixes_are_replaced() {
        for (replace, path, expected) in [
            (None, "/a/x?y", "/a/x?y"),
            (Some(""), "/a/x?y", "/x?y"),
            (Some(""), "/a", "/"),
            (Some(""), "/a?y", "/?y"),
            (Some("/v1"), "/a", "/v1"),
            (Some("/v1"), "/a/x", "/v1/x"),
            (Some("/v1"), "/a?y", "/v1?y"),
        ] {
            assert_eq!(Upstream::new(conf("/a", replace)).path(path), expected, "{replace:?} {path}");
        }
    }
}
