//! `/functions/:id/auto-tuner`: shows the memory size that workers recommend, and applies it.

use super::call::{Call, function_id};
use super::functions::{changed, read, tagged};
use super::precondition;
use super::problem::ApiError;
use super::reply::Reply;
use crate::audit::{Event, RecentEvents};
use crate::backend::FunctionStore;
use crate::functions::{Editor, FunctionChange};
use crate::model::{ConfigAction, Function, Recommendation, Runtime, now_ms, rfc3339_ms};
use http::StatusCode;
use serde_json::{Value, json};
use std::sync::Arc;

/// The handlers of the auto-tuner.
pub struct AutoTuner {
    store: Arc<dyn FunctionStore>,
    editor: Editor,
    tail: RecentEvents,
}

impl AutoTuner {
    pub fn new(store: Arc<dyn FunctionStore>, editor: Editor, tail: RecentEvents) -> Self {
        Self { store, editor, tail }
    }

    /// The newest recommendation. Its members are `null` where there is none.
    pub async fn get(&self, call: &Call) -> Result<Reply, ApiError> {
        let f = read(&*self.store, &function_id(call)?).await?;
        let r = f.recommendation.as_ref();
        let savings = r.and_then(|r| serde_json::from_str::<Value>(r.savings.as_deref()?).ok());
        let body = json!({
            "functionId": f.id.as_str(),
            "memoryMb": f.memory_mb,
            "recommendedMemoryMb": r.and_then(|r| r.memory_mb),
            "optimizationTip": r.and_then(|r| r.tip.as_deref()),
            "estimatedSavings": savings,
            "requestId": r.map(|r| &r.request_id),
            "recommendedAt": r.map(|r| rfc3339_ms(r.at)),
        });
        Ok(tagged(Reply::value(StatusCode::OK, &body), &f))
    }

    /// Sets the recommended memory size.
    ///
    /// # Errors
    /// `NoRecommendation`, and `PreconditionFailed` for another `ETag`.
    pub async fn apply(&self, call: &Call) -> Result<Reply, ApiError> {
        let id = function_id(call)?;
        let f = read(&*self.store, &id).await?;
        precondition::check(&call.headers, &f.tag())?;
        if recommended(&f)? == f.memory_mb {
            // A repeated request writes neither the function nor a change record.
            return Ok(changed(&f));
        }
        let decide = |f: &Function| {
            precondition::check(&call.headers, &f.tag())?;
            Ok(FunctionChange { memory_mb: Some(recommended(f)?), ..FunctionChange::default() })
        };
        let done = self.editor.change(call.key_name(), &id, ConfigAction::Apply, None, decide).await;
        let function = done.map_err(ApiError::from)?;
        self.tail.note(now_ms(), || Event::Updated(id));
        Ok(changed(&function))
    }
}

/// The recommended memory size in MiB, clamped to the bounds of the runtime.
fn recommended(f: &Function) -> Result<u64, ApiError> {
    let memory_mb = f.recommendation.as_ref().and_then(|r: &Recommendation| r.memory_mb);
    let bounds = Runtime::memory_mb_bounds(&f.runtime);
    memory_mb.map(|mb| mb.clamp(*bounds.start(), *bounds.end())).ok_or(ApiError::NoRecommendation)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recommendation_is_clamped() {
        for (runtime, given, applied) in [
            ("python", 1, 32),
            ("python", 40, 40),
            ("python", 99_999, 10_240),
            ("go", 2_000, 1_024),
            ("go", 32, 32),
        ] {
            let recommendation = Recommendation { memory_mb: Some(given), ..Recommendation::default() };
            let f = Function {
                runtime: runtime.into(),
                recommendation: Some(recommendation),
                ..Function::sample("f")
            };
            assert_eq!(recommended(&f).unwrap(), applied, "{runtime} {given}");
        }
        assert!(recommended(&Function::sample("f")).is_err());
    }
}
