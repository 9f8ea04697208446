//! The messages that wait for a worker of ours: it receives them as from SQS. Those that it has received are
//! forgotten, so none is delivered twice.

use crate::State;
use crate::answer::{Answer, error};
use crate::settings::wait;
use bytes::Bytes;
use hyper::StatusCode;
use serde::Deserialize;
use serde_json::json;
use std::borrow::Cow;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout_at};

/// Most messages that wait. Further ones are dropped, and the gateway counts their jobs as lost.
const MESSAGES_MAX: usize = 1_000_000;

#[derive(Default)]
pub struct Inbox {
    messages: RefCell<VecDeque<String>>,
    arrived: Notify,
    received: Cell<u64>,
}

#[derive(Deserialize)]
struct Receive {
    #[serde(rename = "MaxNumberOfMessages", default = "one")]
    max: usize,
    #[serde(rename = "WaitTimeSeconds", default)]
    wait_s: u64,
}

fn one() -> usize {
    1
}

#[derive(Deserialize)]
struct Entries<'a> {
    #[serde(rename = "Entries", borrow)]
    entries: Vec<EntryId<'a>>,
}

#[derive(Deserialize)]
struct EntryId<'a> {
    #[serde(rename = "Id", borrow)]
    id: Cow<'a, str>,
}

impl Inbox {
    pub fn put(&self, message: &str) {
        let mut messages = self.messages.borrow_mut();
        if messages.len() < MESSAGES_MAX {
            messages.push_back(message.to_owned());
            self.arrived.notify_one();
        }
    }

    /// The first messages, once there is one.
    async fn take(&self, max: usize, until: Instant) -> Vec<String> {
        loop {
            let arrived = self.arrived.notified();
            let taken: Vec<String> = {
                let mut messages = self.messages.borrow_mut();
                let count = messages.len().min(max);
                messages.drain(..count).collect()
            };
            if !taken.is_empty() || timeout_at(until, arrived).await.is_err() {
                return taken;
            }
        }
    }

    async fn receive(&self, body: &Bytes) -> Answer {
        let Ok(receive) = serde_json::from_slice::<Receive>(body) else {
            return error(StatusCode::BAD_REQUEST, "InvalidParameterValue");
        };
        let until = Instant::now() + Duration::from_secs(receive.wait_s);
        let messages = self.take(receive.max, until).await.into_iter().map(|body| {
            let number = self.received.get() + 1;
            self.received.set(number);
            json!({
                "MessageId": number.to_string(), "ReceiptHandle": number.to_string(), "Body": body,
                "MD5OfBody": "00000000000000000000000000000000",
                "Attributes": { "ApproximateReceiveCount": "1" },
            })
        });
        let messages: Vec<serde_json::Value> = messages.collect();
        Some((StatusCode::OK, json!({ "Messages": messages }).to_string().into()))
    }
}

/// The calls of a worker. `None`: it is another operation.
pub async fn call(state: &State, operation: &str, body: &Bytes) -> Option<Answer> {
    let inbox = state.inbox.as_ref()?;
    let latency = state.settings.borrow().sqs();
    wait(latency).await;
    match operation {
        "ReceiveMessage" => Some(inbox.receive(body).await),
        "DeleteMessageBatch" | "ChangeMessageVisibilityBatch" => {
            let Ok(batch) = serde_json::from_slice::<Entries<'_>>(body) else {
                return Some(error(StatusCode::BAD_REQUEST, "InvalidParameterValue"));
            };
            let done: Vec<_> = batch.entries.iter().map(|entry| json!({ "Id": entry.id })).collect();
            Some(Some((StatusCode::OK, json!({ "Successful": done, "Failed": [] }).to_string().into())))
        }
        "DeleteMessage" | "ChangeMessageVisibility" => {
            Some(Some((StatusCode::OK, Bytes::from_static(b"{}"))))
        }
        _ => None,
    }
}
