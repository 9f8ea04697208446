//! Checks of single values.

use LIMIT_STEPS_MAX;
use crate::config::checks::is_countable;
use crate::model::Quota;
use ipnet::IpNet;
use serde::{Deserialize, Deserializer, Serialize};
use serde::de::DeserializeOwned;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;
use super::checks::within;
use toml::Table;

/// (path, problem) of a value out of its bounds.
pub fn within(path: &str, value: u64, bounds: RangeInclusive<u64>) -> Option<(String, String)> {
    let problem = if value > *bounds.end() {
        format!("must be at most {}", bounds.end())
    } else if value < *bounds.start() {
        format!("must be at least {}", bounds.start())
    } else {
        return None;
    };
    Some((path.to_owned(), problem))
}

/// Redis counts in steps; see limits.lua.
pub(super) fn is_countable(quota: &Quota) -> bool {
    u128::from(quota.drain().1) * u128::from(quota.burst) <= LIMIT_STEPS_MAX
}

/// A full bucket, in the smallest steps that are counted: Lua's numbers are exact up to four times that.
const LIMIT_STEPS_MAX: u128 = 1 << 51;

/// A day, as the longest wait of any kind.
const SECONDS_MAX: u64 = 24 * 3600;

/// Most that a queue or table in memory may be said to hold.
const ENTRIES_MAX: u64 = 1 << 28;
