//! Fits the connection limits to the limit of open files (RLIMIT_NOFILE).
//!
//! Without a free descriptor the process can neither accept a connection, not even one for `/livez`, nor call
//! a backend. So the connection limits are reduced to what the process can open, at start and at each reload.

use crate::config::{Conf, HttpConf};
use nix::sys::resource::{Resource, getrlimit};

/// The most descriptors reserved for everything but client connections: connections to backends (one for each
/// send and each write of rows), uploads, the spill, files of `conf/`.
const OTHERS_MAX: usize = 160;
/// The most connections accepted beyond the limit, to send a response: health checks and metrics are served,
/// other requests get a 503.
const RESERVE_MAX: usize = 128;
/// The least size of that reserve, however low the limit of open files is.
const RESERVE_MIN: usize = 2;

/// The file descriptors of the process.
#[derive(Clone, Copy, Debug)]
pub struct Descriptors {
    limit: usize,
    /// Open at start, when the backends are connected and nothing listens yet.
    open: usize,
}

/// The connection limits in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ConnectionLimits {
    pub connections_max: usize,
    /// Further connections that are accepted only to be answered.
    pub reserve: usize,
}

impl Descriptors {
    pub fn of_process() -> Self {
        // Minus the descriptor of the directory itself.
        let open = std::fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count().saturating_sub(1));
        Self { limit: limit(), open }
    }

    /// The limits for these settings and the current limit of open files.
    pub fn fit(self, conf: &Conf) -> ConnectionLimits {
        let now = Self { limit: limit(), ..self };
        now.room(&conf.http, descriptors_of_one(conf))
    }

    /// Warns if the settings allow more connections than the process can open.
    pub fn report(self, conf: &Conf, room: ConnectionLimits) {
        let configured = conf.http.connections_max;
        if room.connections_max >= configured {
            return;
        }
        let needed = configured.saturating_mul(descriptors_of_one(conf));
        tracing::warn!(
            configured,
            in_force = room.connections_max,
            reserve = room.reserve,
            open_files_max = limit(),
            open_files_needed = needed.saturating_add(self.open + OTHERS_MAX + RESERVE_MAX),
            "The limit of open files allows fewer connections than http.connections_max. Raise the hard \
             limit (ulimit -Hn, LimitNOFILE= of systemd, --ulimit nofile= of a container) or lower \
             http.connections_max"
        );
    }

    /// The limits. `each`: descriptors that one connection needs.
    fn room(self, http: &HttpConf, each: usize) -> ConnectionLimits {
        let left = self.limit.saturating_sub(self.open);
        // Reserved before connections: one that is accepted but cannot be served is of no use.
        let others = OTHERS_MAX.min(left / 2);
        let reserve = RESERVE_MAX.min(left / 4).max(RESERVE_MIN);
        let fit = (left.saturating_sub(others + reserve) / each).max(1);
        ConnectionLimits { connections_max: http.connections_max.min(fit), reserve }
    }
}

/// Descriptors that one connection needs: a forwarded request also has a connection to its upstream.
fn descriptors_of_one(conf: &Conf) -> usize {
    if conf.upstreams.is_empty() { 1 } else { 2 }
}

/// The soft limit, which was raised to the hard limit at start.
fn limit() -> usize {
    let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((u64::MAX, u64::MAX));
    usize::try_from(soft).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connection_limits_fit_the_limit_of_open_files() {
        let mut http = Conf::shipped().unwrap().http;
        http.connections_max = 10_000;
        for (limit, open, each, expected) in [
            (usize::MAX, 30, 1, (10_000, 128)),
            (20_000, 30, 1, (10_000, 128)),
            (20_000, 30, 2, (9_841, 128)),
            (10_000, 30, 1, (9_682, 128)),
            (1_024, 30, 1, (706, 128)),
            (64, 30, 1, (9, 8)),
            (48, 30, 1, (5, 4)),
            (32, 30, 1, (1, 2)),
            (20, 30, 1, (1, 2)),
        ] {
            let room = Descriptors { limit, open }.room(&http, each);
            assert_eq!((room.connections_max, room.reserve), expected, "{limit}, {open}, {each}");
        }
        http.connections_max = 5;
        assert_eq!(Descriptors { limit: 64, open: 30 }.room(&http, 1).connections_max, 5);
    }
}
