//! The recommendation of a worker for the memory of a function. It is stored with the function, for the
//! auto-tuner.

use super::time::UnixMs;
use super::{JobId, ResultFields};

/// The recommendation of one execution. A function keeps the newest one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Recommendation {
    /// In MiB, at least 1.
    pub memory_mb: Option<u64>,
    /// At most [`Self::TIP_BYTES_MAX`] bytes.
    pub tip: Option<String>,
    /// A JSON string or number, as JSON text of the worker.
    pub savings: Option<String>,
    /// The request id of that execution.
    pub request_id: String,
    /// When that execution was accepted.
    pub at: UnixMs,
}

impl Recommendation {
    /// Maximum length of a tip, in bytes; the rest is cut off.
    pub const TIP_BYTES_MAX: usize = 1024;

    /// Returns `None` if the result has no recommendation.
    pub fn of(id: JobId, fields: &ResultFields<'_>) -> Option<Self> {
        // A float to integer cast saturates.
        let memory_mb = fields.recommended_memory_mb.map(|mb| mb.round() as u64).filter(|mb| *mb > 0);
        let tip = fields.optimization_tip.as_deref().filter(|tip| !tip.is_empty());
        let tip = tip.map(|tip| super::text::cut(tip, Self::TIP_BYTES_MAX).to_owned());
        let savings = fields.estimated_savings.map(str::to_owned);
        let advises = memory_mb.is_some() || tip.is_some() || savings.is_some();
        advises.then(|| Self { memory_mb, tip, savings, request_id: id.to_string(), at: id.accepted_at() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{NodeId, Outcome};

    fn of(result: &str) -> Option<Recommendation> {
        let outcome = Outcome::new(result.to_owned().into());
        Recommendation::of(JobId::new(NodeId(1), 7, 9), &outcome.fields())
    }

    #[test]
    fn recommendations_are_parsed_leniently() {
        let full =
            of(r#"{"recommendedMemoryMb":256.4,"optimizationTip":"less","estimatedSavings":"30%"}"#).unwrap();
        assert_eq!((full.memory_mb, full.tip.as_deref()), (Some(256), Some("less")));
        assert_eq!((full.savings.as_deref(), full.at), (Some("\"30%\""), 7));
        let number = of(r#"{"estimatedSavings": 12.5 ,"recommendedMemoryMb":"x"}"#).unwrap();
        assert_eq!((number.memory_mb, number.savings.as_deref()), (None, Some("12.5")));
        for none in [
            "{}",
            "x",
            r#"{"recommendedMemoryMb":null,"optimizationTip":"","estimatedSavings":null}"#,
            r#"{"recommendedMemoryMb":-1,"optimizationTip":[],"estimatedSavings":{}}"#,
            r#"{"recommendedMemoryMb":1e300}"#,
        ] {
            assert_eq!(of(none), None, "{none}");
        }
        let long = of(&format!("{{\"optimizationTip\":\"{}\"}}", "ä".repeat(1000))).unwrap();
        assert_eq!(long.tip.map(|tip| tip.len()), Some(1024));
    }
}
