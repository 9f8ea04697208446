//! Requests that are carried out once: `Idempotency-Key` (draft-ietf-httpapi-idempotency-key-header).
//!
//! A request claims its key for its job before the job is sent. Who comes later with the key and the same body finds
//! that job, wherever it is: its result with the claim, its result or the job itself in flight on any node, or its
//! row. If it is nowhere, then its send has not begun, or its node died before it: the claim is taken over once a send
//! can no longer be under way. So the job is enqueued once, whatever breaks off in between.

use super::{ApiError, CallHeaders};
use crate::backend::{Backend, BackendError, Claim, Claimed, Claims, ExecutionStore};
use crate::config::{BatchConf, Live};
use crate::dispatch::{Dispatcher, JobState, PendingJob, SubmitError};
use crate::metrics::Metrics;
use crate::model::{Execution, JobId, Outcome, now_ms};
use std::sync::Arc;
use std::time::Duration;

/// Longest key, in bytes.
const KEY_BYTES_MAX: usize = 255;
/// How often a claim is looked at whose job is not to be found.
pub const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Beyond its deadline: how long a send may still be under way, and how far the clocks of nodes may differ.
const SEND_MARGIN: Duration = Duration::from_secs(5);

/// What is known of the job of a request that came before.
pub enum Known {
    Result(Outcome),
    Pending(Option<PendingJob>),
    /// It has ended, and its result is no longer kept.
    Ended(Box<Execution>),
}

/// Whose turn it is.
pub enum Turn {
    /// The request is the first of its key.
    First,
    /// It came before.
    Again(Box<Claimed>, Known),
    /// This job has the key, is nowhere, and cannot be on its way any more.
    Abandoned(JobId),
    /// Its job is nowhere, and may be on its way. To be asked again after [`LOOK_EVERY`].
    NotYet,
}

pub struct Once {
    claims: Arc<dyn Claims>,
    executions: Arc<dyn ExecutionStore>,
    dispatcher: Dispatcher,
    batch: Live<BatchConf>,
    metrics: Arc<Metrics>,
}

impl Once {
    pub fn new(
        backend: &Backend,
        dispatcher: Dispatcher,
        batch: Live<BatchConf>,
        metrics: Arc<Metrics>,
    ) -> Self {
        let (claims, executions) = (Arc::clone(&backend.claims), Arc::clone(&backend.executions));
        Self { claims, executions, dispatcher, batch, metrics }
    }

    /// Claims the key, or finds the job that has it. `waited`: for how long it was neither.
    pub async fn turn(&self, claim: &Claim, waited: Duration) -> Result<Turn, ApiError> {
        let away = |e| ApiError::backend("the log table", &e);
        let Some(before) = self.claims.claim(claim).await.map_err(away)? else {
            self.count("new");
            return Ok(Turn::First);
        };
        if before.claim.body != claim.body {
            self.count("reused");
            return Err(ApiError::KeyReused);
        }
        if let Some(known) = self.known(&before).await.map_err(away)? {
            self.count("repeated");
            return Ok(Turn::Again(Box::new(before), known));
        }
        let age = Duration::from_millis(now_ms().saturating_sub(before.claim.job.accepted_at()));
        let abandoned_after = Duration::from_millis(self.batch.get().send_deadline_ms) + SEND_MARGIN;
        if age > abandoned_after {
            return Ok(Turn::Abandoned(before.claim.job));
        }
        if waited > 2 * abandoned_after {
            // By the clocks of the nodes it is younger than it can be.
            return Err(ApiError::BackendAway);
        }
        Ok(Turn::NotYet)
    }

    /// Claims the key in place of a job that was abandoned. `false`: another request was faster.
    pub async fn take_over(&self, claim: &Claim, abandoned: JobId) -> Result<bool, ApiError> {
        let taken = self.claims.take_over(claim, abandoned).await;
        let taken = taken.map_err(|e| ApiError::backend("the log table", &e))?;
        if taken {
            self.count("taken_over");
        }
        Ok(taken)
    }

    /// `None`: the job is nowhere.
    async fn known(&self, before: &Claimed) -> Result<Option<Known>, BackendError> {
        if let Some(result) = &before.result {
            return Ok(Some(Known::Result(Outcome::new(result.clone()))));
        }
        let Claim { job, function, .. } = &before.claim;
        match self.dispatcher.state(*job).await? {
            JobState::Done(outcome) => return Ok(Some(Known::Result(outcome))),
            JobState::Pending(pending) => return Ok(Some(Known::Pending(pending))),
            JobState::Unknown => {}
        }
        let row = self.executions.get(function, &job.to_string()).await?;
        let ended = row.map(|row| Known::Ended(Box::new(row)));
        // It was sent, and only the memory of it is gone: it must not be sent again.
        Ok(ended.or(before.is_sent.then_some(Known::Pending(None))))
    }

    /// Notes what became of the first request. Where that fails the job itself tells.
    pub async fn note<T>(&self, claim: &Claim, result: &Result<T, ApiError>) {
        let noted = match result {
            Ok(_) => self.claims.confirm(claim).await,
            // The job may be on the queue.
            Err(ApiError::Submit(SubmitError::Unknown)) => return,
            Err(_) => self.claims.release(claim).await,
        };
        if let Err(e) = noted {
            tracing::warn!(requestId = %claim.job, error = %e, "Idempotency Key Not Updated");
        }
    }

    fn count(&self, outcome: &str) {
        self.metrics.idempotency.with_label_values(&[outcome]).inc();
    }
}

/// The key that the client sent. The draft wants a string of structured fields (`"…"`); what many send is taken as well:
/// the text as it stands.
pub fn key_of(headers: &CallHeaders) -> Result<Option<&str>, ApiError> {
    let Some(value) = &headers.idempotency_key else { return Ok(None) };
    let text = value.to_str().unwrap_or_default().trim();
    let key = text.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(text);
    let is_visible = key.bytes().all(|b| b.is_ascii_graphic() && b != b'"');
    if key.is_empty() || key.len() > KEY_BYTES_MAX || !is_visible {
        let detail = format!("Idempotency-Key must be 1 to {KEY_BYTES_MAX} visible ASCII characters");
        return Err(ApiError::invalid(detail));
    }
    Ok(Some(key))
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::header::HeaderValue;

    #[test]
    fn keys_are_strings_or_bare() {
        let key = |text: &str| {
            let idempotency_key = Some(HeaderValue::from_bytes(text.as_bytes()).unwrap());
            let headers = CallHeaders { idempotency_key, ..CallHeaders::default() };
            key_of(&headers).map(|key| key.map(str::to_owned)).ok().flatten()
        };
        let long = "x".repeat(KEY_BYTES_MAX);
        for (sent, read) in
            [("abc", "abc"), ("\"abc\"", "abc"), (" 8e03978e-40d5 ", "8e03978e-40d5"), (&long, &long)]
        {
            assert_eq!(key(sent).as_deref(), Some(read), "{sent}");
        }
        for bad in ["", "\"\"", "a b", "\"a", "ä", &format!("{long}x")] {
            assert_eq!(key(bad), None, "{bad}");
        }
        assert!(matches!(key_of(&CallHeaders::default()), Ok(None)));
    }
}
