//! The last second, minute and hour of this node.

use super::counts::WindowCounts;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;

/// Maximum number of periods of a ring: of seconds, and of minutes.
const PERIODS_MAX: usize = 60;
const MINUTE_MS: u64 = 60_000;
const HOUR_MS: u64 = 3_600_000;

/// The three windows. Each ends now. They are shorter while the process is younger.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeWindows {
    #[serde(rename = "1s")]
    pub second: WindowCounts,
    #[serde(rename = "1m")]
    pub minute: WindowCounts,
    #[serde(rename = "1h")]
    pub hour: WindowCounts,
}

/// Collects seconds. It holds 60 seconds and 60 minutes, about half a megabyte.
#[derive(Default)]
pub struct WindowRings {
    last: WindowCounts,
    seconds: PeriodRing,
    /// The minute in progress.
    minute: WindowCounts,
    minutes: PeriodRing,
    /// The sum of `minutes`.
    minutes_sum: WindowCounts,
}

impl WindowRings {
    /// Adds the second that has just ended. It may be longer than a second, if the process had to wait.
    pub fn close_second(&mut self, second: WindowCounts) {
        self.minute.add(&second);
        self.last = second.clone();
        self.seconds.push(second, MINUTE_MS);
        if self.minute.ms >= MINUTE_MS {
            self.minutes.push(std::mem::take(&mut self.minute), HOUR_MS);
            self.minutes_sum = self.minutes.sum();
        }
    }

    pub fn windows(&self) -> NodeWindows {
        let mut hour = self.minutes_sum.clone();
        hour.add(&self.minute);
        NodeWindows { second: self.last.clone(), minute: self.seconds.sum(), hour }
    }
}

/// The last periods, at most [`PERIODS_MAX`].
#[derive(Default)]
struct PeriodRing {
    periods: VecDeque<WindowCounts>,
    /// The sum of their lengths.
    ms: u64,
}

impl PeriodRing {
    /// Adds a period. Removes the oldest ones that are not needed to cover `ms_max`.
    fn push(&mut self, period: WindowCounts, ms_max: u64) {
        self.ms += period.ms;
        self.periods.push_back(period);
        while let Some(oldest) = self.periods.front().map(|oldest| oldest.ms)
            && (self.periods.len() > PERIODS_MAX || self.ms - oldest >= ms_max)
        {
            self.periods.pop_front();
            self.ms -= oldest;
        }
    }

    fn sum(&self) -> WindowCounts {
        let mut sum = WindowCounts::default();
        self.periods.iter().for_each(|period| sum.add(period));
        sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::LoadRecorder;
    use std::time::Duration;

    fn second(ms: u64, accepted: u64) -> WindowCounts {
        let load = LoadRecorder::default();
        (0..accepted).for_each(|_| load.request(200, Duration::from_millis(accepted)));
        WindowCounts { ms, accepted, request_times: load.take().requests, ..WindowCounts::default() }
    }

    /// Accepted jobs of the three windows, and the milliseconds that they cover.
    fn shown(rings: &WindowRings) -> [(u64, u64); 3] {
        let NodeWindows { second, minute, hour } = rings.windows();
        for window in [&second, &minute, &hour] {
            assert_eq!(window.request_times.count(), window.accepted);
        }
        [second, minute, hour].map(|window| (window.accepted, window.ms))
    }

    #[test]
    fn windows_roll_over() {
        let mut rings = WindowRings::default();
        assert_eq!(shown(&rings), [(0, 0); 3]);
        rings.close_second(second(1_000, 7));
        assert_eq!(shown(&rings), [(7, 1_000); 3]);
        for _ in 1..60 {
            rings.close_second(second(1_000, 1));
        }
        assert_eq!(shown(&rings), [(1, 1_000), (66, 60_000), (66, 60_000)]);
        rings.close_second(second(1_000, 1));
        assert_eq!(shown(&rings), [(1, 1_000), (60, 60_000), (67, 61_000)]);
        for _ in 61..3_600 {
            rings.close_second(second(1_000, 1));
        }
        assert_eq!(shown(&rings), [(1, 1_000), (60, 60_000), (3_606, 3_600_000)]);
        // The oldest minute, which has the first second, leaves when another one is complete.
        for _ in 0..60 {
            rings.close_second(second(1_000, 1));
        }
        assert_eq!(shown(&rings), [(1, 1_000), (60, 60_000), (3_600, 3_600_000)]);
    }

    #[test]
    fn an_idle_node_forgets_what_it_did() {
        let mut rings = WindowRings::default();
        rings.close_second(second(1_000, 9));
        for _ in 0..60 {
            rings.close_second(second(1_000, 0));
        }
        assert_eq!(shown(&rings), [(0, 1_000), (0, 60_000), (9, 61_000)]);
        for _ in 0..3_600 {
            rings.close_second(second(1_000, 0));
        }
        let idle = shown(&rings).map(|(accepted, _)| accepted);
        assert_eq!(idle, [0, 0, 0]);
    }

    #[test]
    fn windows_are_bounded_in_time_if_seconds_are_long() {
        let mut rings = WindowRings::default();
        for _ in 0..3_600 {
            rings.close_second(second(2_500, 1));
        }
        let [_, (_, minute_ms), (_, hour_ms)] = shown(&rings);
        assert_eq!(minute_ms, MINUTE_MS);
        assert!((HOUR_MS..HOUR_MS + 2 * MINUTE_MS).contains(&hour_ms), "{hour_ms}");
        // A pause of the process.
        rings.close_second(second(10 * HOUR_MS, 1));
        assert_eq!(shown(&rings), [(1, 10 * HOUR_MS); 3]);
    }
}
