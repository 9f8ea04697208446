//! The function cache and code archives.

use super::register::{counter, gauge};
use prometheus::{IntCounter, IntGauge, Registry};

/// The metrics of the function cache.
pub struct CacheMetrics {
    pub hits: IntCounter,
    /// Reads that replaced an entry. A failed read counts unless the cached function was used instead.
    pub loads: IntCounter,
    pub stale: IntCounter,
    /// Announcements of changed functions, those of this node included.
    pub changes: IntCounter,
    pub changes_heard: IntGauge,
}

impl CacheMetrics {
    pub(super) fn new(r: &Registry) -> prometheus::Result<Self> {
        Ok(Self {
            hits: counter(r, "infra_function_cache_hits_total", "Lookups answered by the cache.")?,
            loads: counter(
                r,
                "infra_function_cache_loads_total",
                "Reads of the function table whose outcome was used.",
            )?,
            stale: counter(
                r,
                "infra_function_cache_stale_total",
                "Failed reads; the cached function was used.",
            )?,
            changes: counter(
                r,
                "infra_function_changes_total",
                "Change announcements received, own ones included.",
            )?,
            changes_heard: gauge(
                r,
                "infra_function_changes_heard",
                "1 while change announcements are received.",
            )?,
        })
    }
}

pub fn code_deleted(r: &Registry) -> prometheus::Result<IntCounter> {
    counter(r, "infra_code_deleted_total", "Unused code archives that were deleted.")
}
