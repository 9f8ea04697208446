//! The tables: functions are generated, log rows are counted, and every other write succeeds without effect.

use crate::State;
use crate::answer::{Answer, error};
use crate::settings::{happens, wait};
use bytes::Bytes;
use hyper::StatusCode;
use serde::Deserialize;
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::OnceLock;

#[derive(Deserialize)]
struct Get<'a> {
    #[serde(rename = "Key", borrow)]
    key: HashMap<&'a str, Value<'a>>,
}

#[derive(Deserialize)]
struct Value<'a> {
    #[serde(rename = "S", borrow)]
    text: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct Write<'a> {
    #[serde(rename = "RequestItems", borrow)]
    tables: HashMap<&'a str, Vec<&'a RawValue>>,
}

#[derive(Deserialize)]
struct PutRequest<'a> {
    #[serde(rename = "PutRequest", borrow)]
    put: Option<Put<'a>>,
}

#[derive(Deserialize)]
struct Put<'a> {
    #[serde(rename = "Item", borrow)]
    item: Row<'a>,
}

#[derive(Deserialize)]
struct Row<'a> {
    #[serde(rename = "functionId", borrow)]
    function: Value<'a>,
    #[serde(borrow)]
    timestamp: Option<Value<'a>>,
}

pub async fn call(state: &State, operation: &str, body: &Bytes) -> Answer {
    let settings = state.settings.borrow().clone();
    wait(settings.dynamodb()).await;
    if happens(settings.throttle) {
        return error(StatusCode::BAD_REQUEST, "ProvisionedThroughputExceededException");
    }
    let answer = match operation {
        "GetItem" => get(state, body),
        "BatchWriteItem" => write(state, body, settings.unprocessed),
        "PutItem" => put(state, body),
        "Query" | "Scan" => Some(r#"{"Items":[],"Count":0,"ScannedCount":0}"#.to_owned()),
        "UpdateItem" | "DeleteItem" | "TransactWriteItems" => Some("{}".to_owned()),
        _ => return error(StatusCode::BAD_REQUEST, "UnknownOperationException"),
    };
    match answer {
        Some(answer) => Some((StatusCode::OK, answer.into())),
        None => error(StatusCode::BAD_REQUEST, "ValidationException"),
    }
}

fn get(state: &State, body: &[u8]) -> Option<String> {
    let get: Get<'_> = serde_json::from_slice(body).ok()?;
    let id = get.key.get("functionId")?.text.as_ref()?;
    let number = id.strip_prefix("fn-").and_then(|number| number.parse::<u64>().ok());
    let is_row = get.key.contains_key("timestamp");
    if is_row || number.is_none_or(|number| number >= state.functions) {
        return Some("{}".to_owned());
    }
    let handler = state.handler.as_ref().map(|name| format!(r#","handler":{{"S":"{name}"}}"#));
    Some(format!(
        concat!(
            r#"{{"Item":{{"functionId":{{"S":"{0}"}},"name":{{"S":"{0}"}},"description":{{"S":""}},"#,
            r#""runtime":{{"S":"python"}},"memoryMb":{{"N":"128"}},"#,
            r#""s3Key":{{"S":"functions/{0}/code.zip"}},"originalName":{{"S":"code.zip"}},"#,
            r#""uploadedAt":{{"S":"2026-11-22T00:00:00.000Z"}},"envVars":{{"S":"{{}}"}},"#,
            r#""version":{{"N":"1"}}{1}}}}}"#,
        ),
        id,
        handler.unwrap_or_default(),
    ))
}

fn put(state: &State, body: &[u8]) -> Option<String> {
    let put: Put<'_> = serde_json::from_slice(body).ok()?;
    keep(state, &put.item);
    Some("{}".to_owned())
}

fn write(state: &State, body: &[u8], unprocessed: f64) -> Option<String> {
    let write: Write<'_> = serde_json::from_slice(body).ok()?;
    let mut left = String::new();
    for (table, requests) in write.tables {
        let mut of_table = String::new();
        for request in requests {
            if happens(unprocessed) {
                of_table.push_str(if of_table.is_empty() { "" } else { "," });
                of_table.push_str(request.get());
            } else if let Some(put) = serde_json::from_str::<PutRequest<'_>>(request.get()).ok()?.put {
                keep(state, &put.item);
            }
        }
        if !of_table.is_empty() {
            let sep = if left.is_empty() { "" } else { "," };
            left.push_str(&format!("{sep}\"{table}\":[{of_table}]"));
        }
    }
    Some(format!("{{\"UnprocessedItems\":{{{left}}}}}"))
}

fn keep(state: &State, row: &Row<'_>) {
    static HASHES: OnceLock<RandomState> = OnceLock::new();
    let timestamp = row.timestamp.as_ref().and_then(|value| value.text.as_ref());
    let key = (&row.function.text, timestamp);
    state.rows.borrow_mut().insert(HASHES.get_or_init(RandomState::new).hash_one(key));
}
