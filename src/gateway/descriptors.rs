//! How many connections the limit of open files (RLIMIT_NOFILE) has room for.
//!
//! Without a descriptor no connection can be accepted, not even one that asks `/livez`, and no backend be
//! called. So the caps on connections are fitted to the limit, at start and with each change of the settings.

use crate::config::{Conf, HttpConf};
use nix::sys::resource::{Resource, getrlimit};

/// Kept for what opens later and is no connection of a client: connections to backends (each send and each
/// write of rows has one), uploads, the spill, files of `conf/`.
const OTHERS_MAX: usize = 160;
/// Connections beyond the cap that are let in all the same, to be answered: health and metrics as always,
/// others 503.
const RESERVE_MAX: usize = 128;
/// The least of it, however low the limit is.
const RESERVE_MIN: usize = 2;

/// What the process has of descriptors.
#[derive(Clone, Copy, Debug)]
pub struct Descriptors {
    limit: usize,
    /// When the settings were made for the first time: the backends are connected then, and nothing listens.
    open: usize,
}

/// The caps on connections that are in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    pub connections_max: usize,
    /// Beyond those.
    pub reserve: usize,
}

impl Descriptors {
    pub fn of_process() -> Self {
        // The directory is one itself.
        let open = std::fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count().saturating_sub(1));
        Self { limit: limit(), open }
    }

    /// The caps for these settings.
    pub fn fit(self, conf: &Conf) -> Room {
        let now = Self { limit: limit(), ..self };
        now.room(&conf.http, descriptors_of_one(conf))
    }

    /// Says so where the settings ask for more than there is, and what to do.
    pub fn report(self, conf: &Conf, room: Room) {
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
            "Fewer Connections Than http.connections_max: The Limit Of Open Files Is Too Low. Raise Its Hard Limit \
             (ulimit -Hn, LimitNOFILE= Of systemd, --ulimit nofile= Of A Container), Or Lower http.connections_max"
        );
    }

    /// `each`: descriptors of one connection.
    fn room(self, http: &HttpConf, each: usize) -> Room {
        let left = self.limit.saturating_sub(self.open);
        // They go first where there is little: a connection that is accepted and cannot be served helps
        // nobody.
        let others = OTHERS_MAX.min(left / 2);
        let reserve = RESERVE_MAX.min(left / 4).max(RESERVE_MIN);
        let fit = (left.saturating_sub(others + reserve) / each).max(1);
        Room { connections_max: http.connections_max.min(fit), reserve }
    }
}

/// A request that is passed on has a connection to its upstream, too.
fn descriptors_of_one(conf: &Conf) -> usize {
    if conf.upstreams.is_empty() { 1 } else { 2 }
}

/// The soft limit, which was raised as far as it may be.
fn limit() -> usize {
    let (soft, _) = getrlimit(Resource::RLIMIT_NOFILE).unwrap_or((u64::MAX, u64::MAX));
    usize::try_from(soft).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_caps_fit_into_the_limit() {
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
