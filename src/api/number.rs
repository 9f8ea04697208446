//! JSON numbers in the form of the previous controller.

use serde_json::{Value, json};

/// Writes whole numbers without a fraction (`12`, not `12.0`), as clients expect.
pub fn number(value: f64) -> Value {
    // Every whole `f64` below 2^53 is exact as an integer.
    if value.fract() == 0.0 && value.abs() < 9e15 { json!(value as i64) } else { json!(value) }
}
