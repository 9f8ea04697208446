//! Reads and writes DynamoDB items. Writing is exact; reading is lenient, because items of the old controller
//! vary.

use crate::backend::BackendError;
use crate::backend::aws::error::class;
use crate::backend::aws::json_call::RouteRecorder;
use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::types::AttributeValue;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, HashMap};

/// An item in the form of the SDK.
pub type RawItem = HashMap<String, AttributeValue>;

/// A hash key that no item has, because it is not a function id. Reading it shows whether a table exists, and
/// even the narrowest role allows it.
const ABSENT_KEY: &str = "#probe";

/// Reads an absent key with the key attributes `key`. Fails if the table is missing, inaccessible, or has
/// other keys.
pub async fn probe(
    client: &Client,
    table: &str,
    key: &[&str],
    seen: &RouteRecorder,
) -> Result<(), BackendError> {
    let key: RawItem = key.iter().map(|name| ((*name).to_owned(), text(ABSENT_KEY))).collect();
    let call = client.get_item().table_name(table).set_key(Some(key)).customize();
    call.interceptor(seen.clone()).send().await.map_err(|e| class(&e))?;
    Ok(())
}

pub fn text(value: impl Into<String>) -> AttributeValue {
    AttributeValue::S(value.into())
}

pub fn whole(value: u64) -> AttributeValue {
    AttributeValue::N(value.to_string())
}

/// Formats a number for DynamoDB: no NaN, no infinity, at most 38 digits, whole numbers without a fraction.
pub fn decimal(value: f64) -> String {
    /// From here on a double has no fraction and is written with an exponent.
    const PLAIN_MAX: f64 = 1e15;
    /// DynamoDB's range ends near 1e126 and 1e-130; sums need room below that.
    const MAX: f64 = 1e100;
    const MIN: f64 = 1e-9;
    match value {
        v if !v.is_finite() || v.abs() < MIN => "0".to_owned(),
        v if v.abs() < PLAIN_MAX => v.to_string(),
        v => format!("{:e}", v.clamp(-MAX, MAX)),
    }
}

/// The attributes of an item, of any type.
pub struct Item(RawItem);

impl Item {
    pub fn new(raw: RawItem) -> Self {
        Self(raw)
    }

    /// The text of a string or number attribute; `None` for other types or if it is absent.
    pub fn text(&self, name: &str) -> Option<String> {
        match self.0.get(name)? {
            AttributeValue::S(text) | AttributeValue::N(text) => Some(text.clone()),
            _ => None,
        }
    }

    pub fn flag(&self, name: &str) -> Option<bool> {
        self.0.get(name)?.as_bool().ok().copied()
    }

    /// A finite number, even if it is stored as a string.
    pub fn float(&self, name: &str) -> Option<f64> {
        let number = match self.0.get(name)? {
            AttributeValue::N(text) | AttributeValue::S(text) => text.trim().parse::<f64>().ok()?,
            _ => return None,
        };
        number.is_finite().then_some(number)
    }

    /// A non-negative whole number; a fraction is rounded.
    pub fn whole(&self, name: &str) -> Option<u64> {
        // The cast saturates, and a double is exact up to 2^53.
        self.float(name).filter(|n| *n >= 0.0).map(|n| n.round() as u64)
    }

    /// JSON text: a string attribute unchanged, or a map converted.
    pub fn json(&self, name: &str) -> Option<String> {
        match self.0.get(name)? {
            AttributeValue::S(text) => Some(text.clone()),
            map @ AttributeValue::M(_) => Some(to_json(map).to_string()),
            _ => None,
        }
    }
}

/// Converts a value to JSON. Sets and bytes become null. Items nest at most 32 levels.
fn to_json(value: &AttributeValue) -> Value {
    match value {
        AttributeValue::S(text) => Value::from(text.as_str()),
        AttributeValue::N(number) => serde_json::from_str(number).unwrap_or(Value::Null),
        AttributeValue::Bool(flag) => Value::from(*flag),
        AttributeValue::L(list) => Value::Array(list.iter().map(to_json).collect()),
        // Sorted, because a map has no order and its text must be stable.
        AttributeValue::M(map) => {
            let sorted: BTreeMap<_, _> = map.iter().collect();
            Value::Object(sorted.into_iter().map(|(k, v)| (k.clone(), to_json(v))).collect::<Map<_, _>>())
        }
        _ => Value::Null,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn floats_are_formatted_for_dynamodb() {
        for (value, written) in [
            (0.0, "0"),
            (12.0, "12"),
            (12.5, "12.5"),
            (0.1 + 0.2, "0.30000000000000004"),
            (1e21, "1e21"),
            (f64::MAX, "1e100"),
            (f64::MIN_POSITIVE, "0"),
            (f64::NAN, "0"),
            (f64::INFINITY, "0"),
        ] {
            assert_eq!(decimal(value), written, "{value}");
        }
    }

    #[test]
    fn unexpected_attribute_types_are_converted_or_ignored() {
        let map = HashMap::from([("A".to_owned(), text("1")), ("B".to_owned(), whole(2))]);
        let item = Item::new(HashMap::from([
            ("s".to_owned(), text(" 7.6 ")),
            ("n".to_owned(), AttributeValue::N("-3".into())),
            ("m".to_owned(), AttributeValue::M(map)),
            ("null".to_owned(), AttributeValue::Null(true)),
        ]));
        assert_eq!((item.float("s"), item.whole("s")), (Some(7.6), Some(8)));
        assert_eq!((item.float("n"), item.whole("n")), (Some(-3.0), None));
        assert_eq!(item.json("m").as_deref(), Some(r#"{"A":"1","B":2}"#));
        assert_eq!(item.text("n").as_deref(), Some("-3"));
        for absent in ["null", "none"] {
            assert_eq!((item.text(absent), item.float(absent), item.json(absent)), (None, None, None));
        }
    }
}
