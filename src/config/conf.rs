//! All settings of `conf/`: `server.toml`, `limits.toml`, `keys.toml`, `upstreams.toml` and `worker.toml`.
//!
//! The shipped files are compiled in and are the defaults, so the two cannot differ. An operator's file may
//! omit any key. An unknown key is an error, so that a misspelled key does not go unnoticed.

use super::error::ConfigError;
use super::files::{ConfPart, ConfTexts, TlsTexts};
use super::keys::{KeyConf, key_problems};
use super::upstreams::{UpstreamConf, upstream_problems};
use crate::config::keys::KeysFile;
use crate::config::limits::{BatchConf, CacheConf, Identity, LimitConf, LimitsFile, OverloadConf, WaitsConf};
use crate::config::merge::{collect, merged};
use crate::config::server::{
    AuditConf, AuthConf, CostConf, DeadLetterConf, EventsConf, FleetConf, Http2Conf, HttpConf, ListenConf,
    MemoryConf, MetricsConf, ServerFile, ShutdownConf, StartConf, TlsConf, TracesConf,
};
use crate::config::upstreams::UpstreamsFile;
use crate::config::worker::WorkerConf;
use serde::Serialize;

const SERVER_SHIPPED: &str = include_str!("../../conf/server.toml");
const LIMITS_SHIPPED: &str = include_str!("../../conf/limits.toml");
const KEYS_SHIPPED: &str = include_str!("../../conf/keys.toml");
const UPSTREAMS_SHIPPED: &str = include_str!("../../conf/upstreams.toml");
const WORKER_SHIPPED: &str = include_str!("../../conf/worker.toml");

/// Paths whose routes are the gateway's own, now or in a later version.
const RESERVED_PATHS: [&str; 3] = ["/jobs", "/events", "/console"];

/// All settings of `conf/`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Conf {
    pub listen: ListenConf,
    pub tls: Option<TlsConf>,
    /// The contents of the files that `[tls]` names.
    #[serde(skip)]
    pub tls_texts: Option<TlsTexts>,
    pub http: HttpConf,
    pub http2: Http2Conf,
    pub auth: AuthConf,
    pub start: StartConf,
    pub shutdown: ShutdownConf,
    pub fleet: FleetConf,
    pub dead_letter: DeadLetterConf,
    pub memory: MemoryConf,
    pub audit: AuditConf,
    pub metrics: MetricsConf,
    pub events: EventsConf,
    pub traces: TracesConf,
    pub cost: CostConf,
    // The settings of the other files, `http` and `auth` may change while the process runs.
    #[serde(rename = "key")]
    pub keys: Vec<KeyConf>,
    #[serde(rename = "upstream")]
    pub upstreams: Vec<UpstreamConf>,
    #[serde(rename = "limit")]
    pub limits: Vec<LimitConf>,
    pub waits: WaitsConf,
    pub batch: BatchConf,
    pub cache: CacheConf,
    pub overload: OverloadConf,
    /// `worker.toml`.
    #[serde(flatten)]
    pub worker: WorkerConf,
}

impl Conf {
    /// The shipped settings.
    pub fn shipped() -> Result<Self, ConfigError> {
        Self::of(&ConfTexts::none())
    }

    /// Merges the files into the shipped ones, and checks the result.
    ///
    /// # Errors
    /// Every problem, with file, line and reason.
    pub fn of(texts: &ConfTexts) -> Result<Self, ConfigError> {
        let mut problems = Vec::new();
        let server = collect(&mut problems, merged::<ServerFile>(SERVER_SHIPPED, &texts.server));
        let limits = collect(&mut problems, merged::<LimitsFile>(LIMITS_SHIPPED, &texts.limits));
        let keys = collect(&mut problems, merged::<KeysFile>(KEYS_SHIPPED, &texts.keys));
        let upstreams = collect(&mut problems, merged::<UpstreamsFile>(UPSTREAMS_SHIPPED, &texts.upstreams));
        let worker = collect(&mut problems, merged::<WorkerConf>(WORKER_SHIPPED, &texts.worker));
        let (Some(s), Some(l), Some(k), Some(u), Some(worker)) = (server, limits, keys, upstreams, worker)
        else {
            // A missing directory is reported by every file.
            problems.dedup();
            return Err(ConfigError(problems));
        };
        let tls_parts = [ConfPart::Certificate, ConfPart::ClientCa];
        let unreadable: Vec<String> = tls_parts.iter().flat_map(|part| texts.problems(*part)).collect();
        let (server_problems, limits_problems) = (s.problems(), l.problems());
        let conf = Self {
            listen: s.listen,
            tls: s.tls,
            tls_texts: texts.tls(),
            http: s.http,
            http2: s.http2,
            auth: s.auth,
            start: s.start,
            shutdown: s.shutdown,
            fleet: s.fleet,
            dead_letter: s.dead_letter,
            memory: s.memory,
            audit: s.audit,
            metrics: s.metrics,
            events: s.events,
            traces: s.traces,
            cost: s.cost,
            keys: k.key,
            upstreams: u.upstream,
            limits: l.limit,
            waits: l.waits,
            batch: l.batch,
            cache: l.cache,
            overload: l.overload,
            worker,
        };
        let problems: Vec<String> = [
            (&texts.server, server_problems),
            (&texts.limits, limits_problems),
            (&texts.keys, key_problems(&conf.keys)),
            (&texts.upstreams, upstream_problems(&conf.upstreams)),
            (&texts.worker, conf.worker.problems()),
        ]
        .into_iter()
        .flat_map(|(file, problems)| {
            problems.into_iter().map(|(path, problem)| file.problem(&path, &problem))
        })
        .chain(unreadable)
        .collect();
        if problems.is_empty() { Ok(conf) } else { Err(ConfigError(problems)) }
    }

    /// Upstreams of which routes of the gateway take a part. `routes`: the patterns of those.
    pub fn shadowed_upstreams(&self, routes: impl Iterator<Item = &'static str> + Clone) -> Vec<String> {
        let is_below = |path: &str, prefix: &str| {
            path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        let warning = |upstream: &UpstreamConf| {
            let prefix = upstream.prefix.strip_prefix("/api").filter(|rest| rest.starts_with('/'));
            let prefix = prefix.unwrap_or(&upstream.prefix);
            let reserved = RESERVED_PATHS.into_iter().find(|path| is_below(prefix, path));
            let route = routes.clone().find(|route| is_below(route, prefix)).or(reserved)?;
            Some(format!(
                "upstream {}: {route} and what the gateway serves below it do not reach {}; choose another \
                 prefix",
                upstream.name, upstream.prefix,
            ))
        };
        self.upstreams.iter().filter_map(warning).collect()
    }

    /// Whether a limit names an upstream.
    pub(super) fn limits_upstreams(&self) -> bool {
        let patterns: Vec<_> = self.upstreams.iter().map(UpstreamConf::pattern).collect();
        self.limits.iter().flat_map(|limit| &limit.routes).any(|route| patterns.contains(route))
    }

    /// Checks that limits and upstreams take effect. A limit must name a route that requires a key
    /// (`is_route`) or an upstream. A limit by key needs an upstream that requires a key. An upstream must
    /// not have the path of a route of the gateway (`is_local`).
    ///
    /// # Errors
    /// Every limit and upstream that would have no effect.
    pub fn check_routes(
        &self,
        texts: &ConfTexts,
        is_local: impl Fn(&str) -> bool,
        is_route: impl Fn(&str) -> bool,
    ) -> Result<(), ConfigError> {
        let mut problems = Vec::new();
        for (n, limit) in self.limits.iter().enumerate() {
            let counts =
                |upstream: &UpstreamConf| upstream.scope.is_some() || limit.identity != Identity::Key;
            let counted: Vec<_> =
                self.upstreams.iter().filter(|up| counts(up)).map(UpstreamConf::pattern).collect();
            let is_unknown = |route: &&String| !is_route(route) && !counted.contains(*route);
            for route in limit.routes.iter().filter(is_unknown) {
                let problem = format!("(limit {}): no route {route:?} requires a key", limit.name);
                problems.push(texts.limits.problem(&format!("limit[{n}].routes"), &problem));
            }
        }
        for (n, upstream) in
            self.upstreams.iter().enumerate().filter(|(_, upstream)| is_local(&upstream.prefix))
        {
            let problem = format!("{:?} is a route of the gateway", upstream.prefix);
            problems.push(texts.upstreams.problem(&format!("upstream[{n}].prefix"), &problem));
        }
        if problems.is_empty() { Ok(()) } else { Err(ConfigError(problems)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::LimitMode;
    use crate::config::files::ConfText;
    use crate::model::Quota;
    use std::time::Duration;

    fn load(server: &str, limits: &str) -> Result<Conf, ConfigError> {
        let file = |name: &str, text: &str| ConfText { name: name.into(), text: Ok(Some(text.into())) };
        let (server, limits) = (file("server.toml", server), file("limits.toml", limits));
        Conf::of(&ConfTexts { server, limits, ..ConfTexts::none() })
    }

    #[test]
    fn the_shipped_files_have_the_documented_values() {
        let conf = Conf::shipped().unwrap();
        let [limit] = conf.limits.as_slice() else { panic!("one limit") };
        assert_eq!(limit.quota(), Quota { rate: 3000, period: Duration::from_secs(60), burst: 3000 });
        assert_eq!(
            (limit.identity, limit.routes.as_slice()),
            (Identity::Key, &["/run".into(), "/upload".into()][..])
        );
        assert_eq!((conf.waits.sync_default_s, conf.waits.status_max_s), (290, 60));
    }

    #[test]
    fn upstreams_that_routes_shadow_are_reported() {
        let routes = ["/functions", "/functions/:id", "/worker/heartbeat", "/events"];
        for (prefix, route) in [
            ("/web", None),
            ("/eventsource", None),
            ("/worker", Some("/worker/heartbeat")),
            ("/worker/files", None),
            ("/events/archive", Some("/events")),
            ("/api/jobs", Some("/jobs")),
            ("/console", Some("/console")),
        ] {
            let text = format!(
                "[[upstream]]\nname = \"u\"\nprefix = {prefix:?}\nscope = \"none\"\naddresses = [\"a:1\"]"
            );
            let upstreams = ConfText { name: "upstreams.toml".into(), text: Ok(Some(text)) };
            let conf = Conf::of(&ConfTexts { upstreams, ..ConfTexts::none() }).unwrap();
            let found = conf.shadowed_upstreams(routes.into_iter());
            assert_eq!(found.len(), usize::from(route.is_some()), "{prefix}: {found:?}");
            assert!(found.iter().zip(route).all(|(text, route)| text.contains(&format!(": {route} "))));
        }
    }

    #[test]
    fn a_file_may_contain_only_its_changes() {
        let conf = load("[shutdown]\ndrain_timeout_s = 2", "[waits]\nsync_max_s = 5").unwrap();
        assert_eq!((conf.shutdown.drain_timeout_s, conf.shutdown.lame_duck_ms), (2, 0));
        assert_eq!((conf.waits.sync_max_s, conf.waits.sync_default_s), (5, 290));
        assert_eq!(conf.limits, [], "limits are not merged");
    }

    const LIMIT: &str = "[[limit]]\nname = \"a\"\nidentity = \"key\"\nroutes = [\"/run\"]\nrate = 1\n\
                         period_s = 1\nburst = 1\non_redis_loss = \"local\"\n";

    fn limit(name: &str, identity: &str, route: &str, burst: u32) -> String {
        format!(
            "[[limit]]\nname = {name:?}\nidentity = {identity:?}\nroutes = [{route:?}]\nrate = 1\n\
             period_s = 86400\nburst = {burst}\non_redis_loss = \"local\"\n"
        )
    }

    #[test]
    fn limits_are_leased_by_default() {
        let exact = limit("b", "function", "/run", 1) + "mode = \"exact\"\n";
        let conf = load("", &(limit("a", "global", "/upload", 1) + &exact)).unwrap();
        let read: Vec<_> = conf.limits.iter().map(|limit| (limit.identity, limit.mode)).collect();
        assert_eq!(read, [(Identity::Global, LimitMode::Leased), (Identity::Function, LimitMode::Exact)]);
    }

    #[test]
    fn problems_are_reported_with_their_line() {
        let in_second = |from: &str, to: &str| format!("{LIMIT}{}", LIMIT.replace(from, to));
        for (server, limits, told) in [
            ("\n[listen]\nport = 1", String::new(), "server.toml:3: listen.port unknown field `port`"),
            ("[listen]\naddress = \"x\"", String::new(), "server.toml:2: listen.address "),
            ("\n\nx", String::new(), "server.toml:3: "),
            (
                "[http]\nkeepalive_s = 1\ncors_origins = [\"a.example\"]",
                String::new(),
                "server.toml:3: http.cors_origins \"a.example\" has no scheme",
            ),
            ("[nothing]", String::new(), "server.toml:1: nothing unknown field `nothing`"),
            (
                "[memory]\naudit_rows_max = 0",
                String::new(),
                "server.toml:2: memory.audit_rows_max must be at least 1",
            ),
            ("", "[batch]\n\nsends_max = 0".into(), "limits.toml:3: batch.sends_max must be at least 1"),
            ("", "[batch]\nlinger_ms = \"x\"".into(), "limits.toml:2: batch.linger_ms invalid type"),
            (
                "",
                "[batch]\nqueue_jobs_max = 9999999".into(),
                "limits.toml:2: batch.queue_jobs_max must be at most",
            ),
            ("", in_second("rate = 1", "rate = 0"), "limits.toml:13: limit[1].rate must be at least 1"),
            ("", in_second("rate = 1\n", ""), "limits.toml:9: limit[1] missing field `rate`"),
            ("", in_second("\"a\"", "\"a b\""), "limits.toml:10: limit[1].name must be"),
            ("", in_second("\"key\"", "\"user\""), "limits.toml:11: limit[1].identity unknown variant"),
            ("", limit("a b", "ip", "/run", 1), "limits.toml:2: limit[0].name must be 1 to 64"),
            (
                "",
                limit("a", "function", "/upload", 1),
                "limits.toml:4: limit[0].routes must be only \"/run\"",
            ),
            ("", limit("a", "ip", "/run", u32::MAX), "limits.toml:7: limit[0].burst is too large"),
            ("", LIMIT.replace("[\"/run\"]", "[]"), "limits.toml:4: limit[0].routes must list at least one"),
            (
                "",
                "[waits]\njob_deadline_s = 7".into(),
                "limits.toml:2: waits.job_deadline_s must be at least 8",
            ),
            (
                "",
                "[waits]\nsync_max_s = 86401".into(),
                "limits.toml:2: waits.sync_max_s must be at most 86400",
            ),
            (
                "[memory]\naudit_bytes_max = 1",
                String::new(),
                "server.toml:2: memory.audit_bytes_max must be at least",
            ),
            (
                "",
                [limit("a", "ip", "/run", 1), limit("a", "key", "/run", 1)].concat(),
                "limits.toml:10: limit[1].name is already used by another limit",
            ),
        ] {
            let error = load(server, &limits).expect_err(told).to_string();
            assert!(error.starts_with(told), "{error:?} is not {told:?}");
        }
        let both = load("x", "y").unwrap_err();
        assert_eq!(both.0.len(), 2, "{both}");
        let limits = ConfText { name: "limits.toml".into(), text: Ok(Some(LIMIT.into())) };
        let texts = ConfTexts { limits, ..ConfTexts::none() };
        let error = Conf::of(&texts).unwrap().check_routes(&texts, |_| false, |_| false).unwrap_err();
        assert_eq!(error.0, ["limits.toml:4: limit[0].routes (limit a): no route \"/run\" requires a key"]);
    }

    /// Any text makes valid settings, or is rejected with problems that name its file.
    #[test]
    fn fuzz_conf_files() {
        crate::fuzz::run("conf", |input| {
            let Ok(text) = std::str::from_utf8(input) else { return };
            for n in 0..5 {
                let mut texts = ConfTexts::none();
                let file = match n {
                    0 => &mut texts.server,
                    1 => &mut texts.limits,
                    2 => &mut texts.keys,
                    3 => &mut texts.upstreams,
                    _ => &mut texts.worker,
                };
                file.text = Ok(Some(text.to_owned()));
                let name = file.name.clone();
                match Conf::of(&texts) {
                    Ok(conf) => {
                        assert!(conf.limits.iter().all(LimitConf::is_countable));
                        assert!(conf.http.connections_max > 0 && conf.batch.sends_max > 0);
                        assert!(ConfPart::ALL.iter().all(|part| texts.lost_since(*part, &texts).is_none()));
                    }
                    Err(ConfigError(problems)) => {
                        assert!(problems.iter().all(|problem| problem.starts_with(&name)), "{problems:?}");
                        assert!(!problems.is_empty());
                    }
                }
            }
        });
    }
}
