//! `GET /status/:jobId`: the result or the state of a job, with a long poll.

use super::call::Call;
use super::prefer::Prefer;
use super::problem::ApiError;
use super::query::Query;
use super::reply::Reply;
use crate::config::{Live, WaitsConf};
use crate::dispatch::{Dispatcher, JobState};
use crate::lifecycle::{Lifecycle, Phase};
use crate::model::JobId;
use http::StatusCode;
use std::time::Duration;
use uuid::Uuid;

/// The handler of job states.
pub struct StatusRoute {
    dispatcher: Dispatcher,
    lifecycle: Lifecycle,
    waits: Live<WaitsConf>,
}

impl StatusRoute {
    pub fn new(waits: Live<WaitsConf>, dispatcher: Dispatcher, lifecycle: Lifecycle) -> Self {
        Self { dispatcher, lifecycle, waits }
    }

    /// The result of a job, or `pending` when the wait ends first.
    ///
    /// # Errors
    /// `NoSuchJob` if it is unknown or its result has expired.
    pub async fn get(&self, call: &Call) -> Result<Reply, ApiError> {
        let wait = self.wait(call)?;
        let raw = call.params.first().map_or("", String::as_str);
        let Some(id) = JobId::parse(raw) else { return self.foreign(raw).await };
        let state = self.dispatcher.state(id).await.map_err(|e| ApiError::backend("the result store", &e))?;
        let pending = match state {
            JobState::Done(outcome) => return Ok(Reply::json(StatusCode::OK, outcome.body())),
            JobState::Unknown => return Err(ApiError::NoSuchJob),
            JobState::Pending(pending) => pending,
        };
        let still_pending = || still_pending(pending.is_unconfirmed);
        let (Some(mut place), false) = (pending.place, wait.is_zero()) else { return Ok(still_pending()) };
        tokio::select! {
            biased;
            outcome = place.outcome() => {
                Ok(outcome.map_or_else(still_pending, |outcome| Reply::json(StatusCode::OK, outcome.body())))
            }
            () = tokio::time::sleep(wait) => Ok(still_pending()),
            () = self.lifecycle.reached(Phase::Closing) => Ok(still_pending()),
        }
    }

    /// A job that the previous controller accepted. Only its stored result can be found.
    async fn foreign(&self, raw: &str) -> Result<Reply, ApiError> {
        // The previous controller stored ids in lower case. Clients may have changed the case.
        let id = Uuid::try_parse(raw).map_err(|_| ApiError::NoSuchJob)?.hyphenated().to_string();
        let found = self.dispatcher.foreign_result(&id).await;
        let found = found.map_err(|e| ApiError::backend("the result store", &e))?;
        found.map(|outcome| Reply::json(StatusCode::OK, outcome.body())).ok_or(ApiError::NoSuchJob)
    }

    /// The length of the long poll. `?wait=` has precedence over `Prefer: wait=`. A longer wait than
    /// `waits.status_max_s` is reduced to it.
    fn wait(&self, call: &Call) -> Result<Duration, ApiError> {
        let query = Query::read(&call.uri, &["wait"])?;
        let seconds = match query.get("wait") {
            Some(text) if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) => {
                text.parse().unwrap_or(u64::MAX) // too large for a u64
            }
            Some(_) => return Err(ApiError::invalid("`wait` must be a whole number of seconds")),
            None => Prefer::of(&call.headers.prefer).wait_s.unwrap_or(0),
        };
        Ok(Duration::from_secs(seconds).min(Duration::from_secs(self.waits.get().status_max_s)))
    }
}

/// `confirmed` is present only if it is unknown whether the queue has the job.
fn still_pending(is_unconfirmed: bool) -> Reply {
    let body = if is_unconfirmed {
        r#"{"status":"pending","message":"The job has not finished yet.","confirmed":false}"#
    } else {
        r#"{"status":"pending","message":"The job has not finished yet."}"#
    };
    Reply::json(StatusCode::OK, body)
}
