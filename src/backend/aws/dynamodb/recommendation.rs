//! Stores a recommendation in attributes of its function's item: `recommendedMemoryMb` (N), `optimizationTip`
//! (S), `estimatedSavings` (S, JSON text), `recommendedBy` (S, the request id), `recommendedAt` (N, Unix ms).
//! The old controller ignores them and does not remove them.

use super::item::{Item, text, whole};
use crate::model::Recommendation;
use aws_sdk_dynamodb::types::AttributeValue;
use serde_json::Value;

const MEMORY_MB: &str = "recommendedMemoryMb";
const TIP: &str = "optimizationTip";
const SAVINGS: &str = "estimatedSavings";
const BY: &str = "recommendedBy";
const AT: &str = "recommendedAt";

/// UpdateItem creates absent items; the condition prevents it from recreating a deleted function. Results
/// arrive out of order, so an older recommendation must not replace a newer one.
pub const CONDITION: &str = "attribute_exists(functionId) AND \
    (attribute_not_exists(recommendedAt) OR recommendedAt < :recommendedAt)";

/// The attributes that hold `advice`. None of the names is a reserved word, so expressions use them directly.
pub fn values(advice: &Recommendation) -> Vec<(&'static str, AttributeValue)> {
    let mut values = vec![(BY, text(advice.request_id.as_str())), (AT, whole(advice.at))];
    values.extend(advice.memory_mb.map(|mb| (MEMORY_MB, whole(mb))));
    values.extend(advice.tip.as_deref().map(|tip| (TIP, text(tip))));
    values.extend(advice.savings.as_deref().map(|savings| (SAVINGS, text(savings))));
    values
}

/// Sets each attribute to the placeholder of the same name, and removes attributes that only an older
/// recommendation had.
pub fn update_expression(advice: &Recommendation) -> String {
    let values = values(advice);
    let set: Vec<_> = values.iter().map(|(name, _)| format!("{name} = :{name}")).collect();
    let is_absent = |name: &&str| values.iter().all(|(set, _)| set != name);
    let absent: Vec<_> = [MEMORY_MB, TIP, SAVINGS].into_iter().filter(is_absent).collect();
    let remove = if absent.is_empty() { String::new() } else { format!(" REMOVE {}", absent.join(", ")) };
    format!("SET {}{remove}", set.join(", "))
}

/// Returns `None` if the item holds no recommendation, or if a part of it has an unknown format.
pub fn of(item: &Item) -> Option<Recommendation> {
    let memory_mb = match item.text(MEMORY_MB) {
        Some(_) => Some(item.whole(MEMORY_MB).filter(|mb| *mb > 0)?),
        None => None,
    };
    let (tip, savings) = (item.text(TIP), item.text(SAVINGS));
    if savings.as_deref().is_some_and(|savings| !is_text_or_number(savings)) {
        return None;
    }
    let advises = memory_mb.is_some() || tip.is_some() || savings.is_some();
    let (request_id, at) = (item.text(BY)?, item.whole(AT)?);
    advises.then_some(Recommendation { memory_mb, tip, savings, request_id, at })
}

/// Whether the text is a JSON string or number. It is copied into responses as JSON.
fn is_text_or_number(json: &str) -> bool {
    matches!(serde_json::from_str(json), Ok(Value::String(_) | Value::Number(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn advice() -> Recommendation {
        Recommendation {
            memory_mb: Some(256),
            tip: Some("less".into()),
            savings: Some("\"30%\"".into()),
            request_id: "r".into(),
            at: 1_795_305_600_123,
        }
    }

    fn item(attributes: Vec<(&'static str, AttributeValue)>) -> Item {
        Item::new(attributes.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
    }

    #[test]
    fn a_recommendation_survives_a_round_trip() {
        for advice in [
            advice(),
            Recommendation { memory_mb: None, savings: Some("12.5".into()), ..advice() },
            Recommendation { tip: None, savings: None, ..advice() },
        ] {
            assert_eq!(of(&item(values(&advice))), Some(advice));
        }
    }

    #[test]
    fn a_malformed_recommendation_is_ignored() {
        for (name, value) in [
            (MEMORY_MB, text("much")),
            (MEMORY_MB, whole(0)),
            (SAVINGS, text("30%")),
            (SAVINGS, text("{}")),
            (AT, text("yesterday")),
            (BY, AttributeValue::Bool(true)),
        ] {
            let mut attributes = values(&advice());
            attributes.retain(|(other, _)| *other != name);
            attributes.push((name, value.clone()));
            assert_eq!(of(&item(attributes)), None, "{name} {value:?}");
        }
        assert_eq!(of(&item(vec![(BY, text("r")), (AT, whole(1))])), None);
        assert_eq!(of(&item(vec![])), None);
    }

    #[test]
    fn attributes_that_a_newer_recommendation_lacks_are_removed() {
        let bare = Recommendation { tip: None, savings: None, ..advice() };
        assert_eq!(
            update_expression(&bare),
            "SET recommendedBy = :recommendedBy, recommendedAt = :recommendedAt, \
             recommendedMemoryMb = :recommendedMemoryMb REMOVE optimizationTip, estimatedSavings"
        );
        assert!(!update_expression(&advice()).contains("REMOVE"));
    }
}
