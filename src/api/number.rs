//! Numbers as the old controller wrote them: whole ones without a fraction.

use http::StatusCode;
use serde_json::{Map, Value, json};
use std::borrow::Cow;
use std::sync::Arc;
use uuid::Uuid;

/// Whole numbers without a fraction, as the old controller showed them.
pub fn number(value: f64) -> Value {
    // Every whole f64 below 2^53 is exact as an integer.
    if value.fract() == 0.0 && value.abs() < 9e15 { json!(value as i64) } else { json!(value) }
}
