//! `GET /status/:jobId`: the result of a job, or that it still runs; with a long poll.

use super::prefer::Prefer;
use super::query::Query;
use super::problem::ApiError;
use super::call::Call;
use super::reply::Reply;
use crate::config::{Live, WaitsConf};
use crate::dispatch::{Dispatcher, JobState};
use crate::lifecycle::{Lifecycle, Phase};
use crate::model::JobId;
use http::StatusCode;
use std::time::Duration;
use uuid::Uuid;

pub struct Status {
    dispatcher: Dispatcher,
    lifecycle: Lifecycle,
    waits: Live<WaitsConf>,
}

impl Status {
    pub fn new(waits: Live<WaitsConf>, dispatcher: Dispatcher, lifecycle: Lifecycle) -> Self {
        Self { dispatcher, lifecycle, waits }
    }

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

    /// A job that an old controller accepted: only its stored result can be known.
    async fn foreign(&self, raw: &str) -> Result<Reply, ApiError> {
        // It was stored as the old controller printed it; clients may have changed its case.
        let id = Uuid::try_parse(raw).map_err(|_| ApiError::NoSuchJob)?.hyphenated().to_string();
        let found = self.dispatcher.foreign_result(&id).await;
        let found = found.map_err(|e| ApiError::backend("the result store", &e))?;
        found.map(|outcome| Reply::json(StatusCode::OK, outcome.body())).ok_or(ApiError::NoSuchJob)
    }

    /// `?wait=` goes before `Prefer: wait=`. What is longer than the longest wait is cut to it.
    fn wait(&self, call: &Call) -> Result<Duration, ApiError> {
        let query = Query::read(&call.uri, &["wait"])?;
        let seconds = match query.get("wait") {
            Some(text) if !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit()) => {
                text.parse().unwrap_or(u64::MAX) // more digits than a number has
            }
            Some(_) => return Err(ApiError::invalid("`wait` must be a whole number of seconds")),
            None => Prefer::of(&call.headers.prefer).wait_s.unwrap_or(0),
        };
        Ok(Duration::from_secs(seconds).min(Duration::from_secs(self.waits.get().status_max_s)))
    }
}

/// The member `confirmed` stands there only where it says something: nobody can know whether the queue has the job.
fn still_pending(is_unconfirmed: bool) -> Reply {
    let body = if is_unconfirmed {
        r#"{"status":"pending","message":"The job has not finished yet.","confirmed":false}"#
    } else {
        r#"{"status":"pending","message":"The job has not finished yet."}"#
    };
    Reply::json(StatusCode::OK, body)
}
