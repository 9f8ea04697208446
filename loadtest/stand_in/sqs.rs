//! The queue: takes messages after its latency, and passes them to the worker.

use crate::answer::{Answer, error};
use crate::settings::{happens, wait};
use crate::worker::Job;
use crate::{State, inbox, spawn};
use bytes::Bytes;
use hyper::StatusCode;
use nix::time::{ClockId, clock_gettime};
use serde::Deserialize;
use std::borrow::Cow;
use std::fmt::Write;
use std::rc::Rc;

/// The defaults of AWS.
const ATTRIBUTES: &str = concat!(
    r#"{"Attributes":{"MaximumMessageSize":"1048576","MessageRetentionPeriod":"345600","#,
    r#""ApproximateNumberOfMessages":"0"}}"#,
);

#[derive(Deserialize)]
struct Batch<'a> {
    #[serde(rename = "Entries", borrow)]
    entries: Vec<Entry<'a>>,
}

#[derive(Deserialize)]
struct Entry<'a> {
    #[serde(rename = "Id", borrow)]
    id: Cow<'a, str>,
    #[serde(rename = "MessageBody", borrow)]
    body: Cow<'a, str>,
}

pub async fn call(state: &Rc<State>, operation: &str, body: &Bytes) -> Answer {
    match operation {
        "SendMessageBatch" => send(state, body).await,
        "GetQueueAttributes" => Some((StatusCode::OK, Bytes::from_static(ATTRIBUTES.as_bytes()))),
        _ => match inbox::call(state, operation, body).await {
            Some(answer) => answer,
            None => error(StatusCode::BAD_REQUEST, "InvalidAction"),
        },
    }
}

async fn send(state: &Rc<State>, body: &Bytes) -> Answer {
    let Ok(batch) = serde_json::from_slice::<Batch<'_>>(body) else {
        return error(StatusCode::BAD_REQUEST, "InvalidParameterValue");
    };
    let settings = state.settings.borrow().clone();
    if happens(settings.batch_failure) {
        wait(settings.sqs()).await;
        return error(StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailable");
    }
    let (mut taken, mut failed) = (String::new(), String::new());
    let mut jobs = Vec::with_capacity(batch.entries.len());
    // Writing to a String cannot fail.
    for entry in &batch.entries {
        if happens(settings.entry_failure) {
            let sep = if failed.is_empty() { "" } else { "," };
            let _ =
                write!(failed, r#"{sep}{{"Id":"{}","SenderFault":false,"Code":"InternalError"}}"#, entry.id);
            continue;
        }
        let sep = if taken.is_empty() { "" } else { "," };
        let _ = write!(
            taken,
            r#"{sep}{{"Id":"{0}","MessageId":"{0}","MD5OfMessageBody":"00000000000000000000000000000000"}}"#,
            entry.id
        );
        jobs.extend(Job::of(&entry.body));
    }
    wait(settings.sqs()).await;
    let mut stats = state.stats.borrow_mut();
    stats.messages += jobs.len() as u64;
    stats.last_confirmed_ns = monotonic_ns();
    drop(stats);
    if let Some(inbox) = &state.inbox {
        batch.entries.iter().for_each(|entry| inbox.put(&entry.body));
    } else if settings.worker && state.worker.is_some() {
        spawn(work(Rc::clone(state), jobs));
    }
    let answer = format!(r#"{{"Successful":[{taken}],"Failed":[{failed}]}}"#);
    (!happens(settings.lost_answer)).then(|| (StatusCode::OK, answer.into()))
}

async fn work(state: Rc<State>, jobs: Vec<Job>) {
    let delay = state.settings.borrow().worker_delay();
    wait(delay).await;
    if let Some(worker) = &state.worker {
        worker.answer(&jobs);
    }
}

fn monotonic_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |now| {
        u64::try_from(now.tv_sec()).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec()).unwrap_or(0)
    })
}
