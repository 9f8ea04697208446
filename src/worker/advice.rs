//! Advice to the owner of a function, from the figures of one run: another memory size, and what the run
//! waited for.
//!
//! The rules, the numbers and the texts are those of the agent that the platform had before
//! (`Infra-worker/metrics_collector.py` of FaaS-Platform), so that its dashboard and the auto-tuner get the
//! same advice from both.

use std::time::Duration;

/// A run that used less than this share of its memory has too much.
const LOW_USE: f64 = 0.3;
/// A run that used more than this share of its memory is at risk.
const HIGH_USE: f64 = 0.85;
/// Recommended size of a function that has too much or too little, as a multiple of its peak.
const SIZE_AFTER_LOW_USE: f64 = 2.0;
const SIZE_AFTER_HIGH_USE: f64 = 1.2;
/// Least recommended memory, in MiB: the least that a function can have.
const RECOMMENDED_MB_MIN: u64 = 32;
/// Memory of a function that states none, in MiB.
const ALLOCATED_MB_DEFAULT: u64 = 128;
/// A run above this share of one core computes, and below the other one it waits.
const BUSY_CORE: f64 = 0.8;
const IDLE_CORE: f64 = 0.2;
/// A shorter run, in ms, is not said to wait.
const WAIT_MS_MIN: u128 = 500;
/// Traffic above which a run waits for the network or for the disk, in bytes.
const NETWORK_BYTES_HIGH: u64 = 5 << 20;
const DISK_BYTES_HIGH: u64 = 10 << 20;
/// Estimated price of one MiB for an hour, in USD, and hours of a month.
const USD_PER_MB_HOUR: f64 = 0.00005;
const MONTH_HOURS: f64 = 730.0;

/// What was measured of a run.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RunFigures {
    /// 0: not measured. Then there is no advice.
    pub(super) peak_memory_bytes: u64,
    pub(super) allocated_mb: u64,
    pub(super) duration: Duration,
    /// Of all processes of the run together. `None`: not measured.
    pub(super) cpu_time: Option<Duration>,
    /// Received and sent. 0 if not measured.
    pub(super) network_bytes: u64,
    /// Read and written. 0 if not measured.
    pub(super) disk_bytes: u64,
}

/// The members of a result with these names in camel case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Advice {
    /// In MiB. May exceed the maximum of the runtime, to which the auto-tuner clamps it.
    pub(super) recommended_memory_mb: Option<u64>,
    pub(super) optimization_tip: Option<String>,
    /// USD a month of a function that is always running.
    pub(super) estimated_savings: Option<String>,
}

impl Advice {
    /// Returns no advice if the memory was not measured, or if nothing is worth a change.
    pub(super) fn of(run: &RunFigures) -> Self {
        if run.peak_memory_bytes == 0 {
            return Self::default();
        }
        let allocated_mb = if run.allocated_mb == 0 { ALLOCATED_MB_DEFAULT } else { run.allocated_mb };
        let (recommended_memory_mb, size_tip) = size(run.peak_memory_bytes, allocated_mb);
        let optimization_tip = match (size_tip, bottleneck(run)) {
            (Some(size), Some(bottleneck)) => Some(format!("{size} | {bottleneck}")),
            (Some(size), None) => Some(size),
            (None, Some(bottleneck)) => Some(format!("💡 {bottleneck}")),
            (None, None) => None,
        };
        let saved_mb = recommended_memory_mb.and_then(|mb| allocated_mb.checked_sub(mb)).filter(|mb| *mb > 0);
        let estimated_savings =
            saved_mb.map(|mb| format!("${:.2}/month", mb as f64 * USD_PER_MB_HOUR * MONTH_HOURS));
        Self { recommended_memory_mb, optimization_tip, estimated_savings }
    }
}

/// The recommended memory in MiB, and why.
fn size(peak_bytes: u64, allocated_mb: u64) -> (Option<u64>, Option<String>) {
    let peak_mb = peak_bytes as f64 / f64::from(1 << 20);
    let use_of_memory = peak_mb / allocated_mb as f64;
    // All casts truncate.
    let shown_mb = peak_mb as u64;
    if use_of_memory < LOW_USE {
        let mb = RECOMMENDED_MB_MIN.max((peak_mb * SIZE_AFTER_LOW_USE) as u64);
        let tip = (mb < allocated_mb).then(|| {
            let percent = ((1.0 - mb as f64 / allocated_mb as f64) * 100.0) as u64;
            format!("💡 Resource Waste: Usage ({shown_mb}MB) is low. Reduce to {mb}MB to save {percent}%.")
        });
        return (Some(mb), tip);
    }
    if use_of_memory > HIGH_USE {
        let mb = RECOMMENDED_MB_MIN.max((peak_mb * SIZE_AFTER_HIGH_USE) as u64);
        let percent = (use_of_memory * 100.0) as u64;
        let tip = format!(
            "⚠️ Memory Risk: Usage ({shown_mb}MB) is dangerously high ({percent}%). Increase to {mb}MB."
        );
        return (Some(mb), Some(tip));
    }
    (None, None)
}

/// What limited the run.
fn bottleneck(run: &RunFigures) -> Option<&'static str> {
    let duration_ms = run.duration.as_millis();
    let cpu_ms = run.cpu_time?.as_micros() as f64 / 1000.0;
    let cores = if duration_ms == 0 { 0.0 } else { cpu_ms / duration_ms as f64 };
    if cores > BUSY_CORE {
        return Some("🚀 CPU Bound: High computation load. Increasing memory (CPU) may improve speed.");
    }
    if cores >= IDLE_CORE || duration_ms <= WAIT_MS_MIN {
        return None;
    }
    Some(if run.network_bytes > NETWORK_BYTES_HIGH {
        "🐢 I/O Bound: High network traffic detected. Consider async processing."
    } else if run.disk_bytes > DISK_BYTES_HIGH {
        "💾 I/O Bound: High disk I/O detected. Check file operations."
    } else {
        "🐢 I/O Bound: Low CPU but slow execution. Waiting on external latency?"
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{JobId, NodeId, Outcome, Recommendation};

    const MIB: u64 = 1 << 20;
    const CPU: &str = "🚀 CPU Bound: High computation load. Increasing memory (CPU) may improve speed.";
    const WAITS: &str = "🐢 I/O Bound: Low CPU but slow execution. Waiting on external latency?";

    fn figures(peak_memory_bytes: u64, allocated_mb: u64, duration_ms: u64, cpu_us: u64) -> RunFigures {
        RunFigures {
            peak_memory_bytes,
            allocated_mb,
            duration: Duration::from_millis(duration_ms),
            cpu_time: Some(Duration::from_micros(cpu_us)),
            ..RunFigures::default()
        }
    }

    fn low(used_mb: u64, mb: u64, percent: u64) -> String {
        format!("💡 Resource Waste: Usage ({used_mb}MB) is low. Reduce to {mb}MB to save {percent}%.")
    }

    fn high(used_mb: u64, percent: u64, mb: u64) -> String {
        format!("⚠️ Memory Risk: Usage ({used_mb}MB) is dangerously high ({percent}%). Increase to {mb}MB.")
    }

    /// The outputs were made by running the earlier agent, except where the row says so.
    #[test]
    fn memory_advice_is_that_of_the_earlier_agent() {
        let none = (None, None, None);
        for (peak_bytes, allocated_mb, expected) in [
            (0, 128, none.clone()),
            (20 * MIB, 128, (Some(40), Some(low(20, 40, 68)), Some("$3.21/month"))),
            (10 * MIB, 128, (Some(32), Some(low(10, 32, 75)), Some("$3.50/month"))),
            (MIB, 137, (Some(32), Some(low(1, 32, 76)), Some("$3.83/month"))),
            (MIB, 2048, (Some(32), Some(low(1, 32, 98)), Some("$73.58/month"))),
            // 9.125 USD exactly: rounded to even.
            (25 * MIB, 300, (Some(50), Some(low(25, 50, 83)), Some("$9.12/month"))),
            (25 * MIB, 500, (Some(50), Some(low(25, 50, 90)), Some("$16.43/month"))),
            (1000 * MIB, 10_240, (Some(2000), Some(low(1000, 2000, 80)), Some("$300.76/month"))),
            // The floor: a number without a reason.
            (9 * MIB, 32, (Some(32), None, None)),
            (9 * MIB, 40, (Some(32), Some(low(9, 32, 19)), Some("$0.29/month"))),
            (30 * MIB - 1, 100, (Some(59), Some(low(29, 59, 41)), Some("$1.50/month"))),
            (30 * MIB, 100, none.clone()),
            (64 * MIB, 128, none.clone()),
            (85 * MIB, 100, none.clone()),
            (85 * MIB + 1, 100, (Some(102), Some(high(85, 85, 102)), None)),
            (120 * MIB, 128, (Some(144), Some(high(120, 93, 144)), None)),
            (140 * MIB, 128, (Some(168), Some(high(140, 109, 168)), None)),
            (28 * MIB, 32, (Some(33), Some(high(28, 87, 33)), None)),
            // A rounded increase of nothing.
            (34 * MIB + MIB / 10, 40, (Some(40), Some(high(34, 85, 40)), None)),
            // No memory stated.
            (20 * MIB, 0, (Some(40), Some(low(20, 40, 68)), Some("$3.21/month"))),
            // The earlier agent recommended 24, which no function can have.
            (20 * MIB, 20, (Some(32), Some(high(20, 100, 32)), None)),
        ] {
            let advice = Advice::of(&figures(peak_bytes, allocated_mb, 100, 50_000));
            let savings = advice.estimated_savings.as_deref();
            let given = (advice.recommended_memory_mb, advice.optimization_tip, savings);
            assert_eq!(given, expected, "{peak_bytes} of {allocated_mb}");
        }
    }

    /// The outputs were made by running the earlier agent, except where the row says so.
    #[test]
    fn advice_on_time_is_that_of_the_earlier_agent() {
        let network = "🐢 I/O Bound: High network traffic detected. Consider async processing.";
        let disk = "💾 I/O Bound: High disk I/O detected. Check file operations.";
        for (duration_ms, cpu_us, network_bytes, disk_bytes, expected) in [
            (100, 90_000, 0, 0, Some(CPU)),
            (100, 80_000, 0, 0, None),
            (1000, 1_900_000, 0, 0, Some(CPU)),
            (501, 50_000, 0, 0, Some(WAITS)),
            (500, 50_000, 0, 0, None),
            (1000, 200_000, 0, 0, None),
            (1000, 50_000, 5 * MIB + 1, 99 * MIB, Some(network)),
            (1000, 50_000, 5 * MIB, 10 * MIB + 1, Some(disk)),
            (1000, 50_000, 0, 10 * MIB, Some(WAITS)),
            (0, 100_000, 0, 0, None),
        ] {
            let run = RunFigures { network_bytes, disk_bytes, ..figures(64 * MIB, 128, duration_ms, cpu_us) };
            let advice = Advice::of(&run);
            let expected = expected.map(|tip| format!("💡 {tip}"));
            assert_eq!(advice, Advice { optimization_tip: expected, ..Advice::default() }, "{run:?}");
        }
        // The earlier agent took a time that it could not measure for 0, and said that the run waits.
        let run = RunFigures { cpu_time: None, ..figures(64 * MIB, 128, 1000, 0) };
        assert_eq!(Advice::of(&run), Advice::default());
    }

    #[test]
    fn both_tips_are_joined() {
        let busy = Advice::of(&figures(20 * MIB, 128, 1000, 950_000));
        assert_eq!(busy.optimization_tip, Some(format!("{} | {CPU}", low(20, 40, 68))));
        let waits = Advice::of(&figures(120 * MIB, 128, 2000, 100_000));
        assert_eq!(waits.optimization_tip, Some(format!("{} | {WAITS}", high(120, 93, 144))));
    }

    #[test]
    fn the_gateway_reads_the_advice() {
        let advice = Advice::of(&figures(20 * MIB, 128, 1000, 950_000));
        let result = serde_json::json!({
            "recommendedMemoryMb": advice.recommended_memory_mb,
            "optimizationTip": advice.optimization_tip,
            "estimatedSavings": advice.estimated_savings,
        });
        let outcome = Outcome::new(result.to_string().into());
        let read = Recommendation::of(JobId::new(NodeId(1), 7, 9), &outcome.fields()).unwrap();
        assert_eq!((read.memory_mb, read.tip), (Some(40), advice.optimization_tip));
        assert_eq!(read.savings.as_deref(), Some("\"$3.21/month\""));
    }
}
