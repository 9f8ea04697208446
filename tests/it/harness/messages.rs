//! Queue messages that a gateway does not write: with another time limit, deadline or environment.

use super::platform::{HELLO, Platform};
use super::redis::Reply;
use super::wait::{SOON, eventually};
use rusqlite::{Connection, params};
use serde_json::{Value, json};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// How long SQLite waits for a lock.
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);
/// Milliseconds since 1970, in the year 2100: nobody waits for longer.
const NO_DEADLINE_MS: i64 = 4_102_444_800_000;

impl Platform {
    /// The message of a run of `function` with the changes. Its id is that of no other job.
    pub async fn message(&self, function: &str, changes: Value) -> Value {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let shown = self.gateway.get(&format!("/functions/{function}")).await.expect(200).json();
        // An id of this node, which knows the id without having accepted the job.
        let id = self.gateway.run_async(HELLO, &json!({})).await;
        let id = format!("{}{:012x}", &id[..24], COUNT.fetch_add(1, Ordering::Relaxed));
        let bucket = if self.is_serve() { self.fleet().cloud.bucket.as_str() } else { "local" };
        let mut message = json!({
            "requestId": id, "functionId": function, "runtime": shown["runtime"],
            "memoryMb": shown["memoryMb"], "s3Bucket": bucket, "s3Key": shown["s3Key"], "timeoutMs": 300_000,
            "input": {}, "modelId": "llama3:8b", "envVars": {}, "configVersion": shown["version"],
        });
        if shown["handler"].is_string() {
            message["handler"] = shown["handler"].clone();
        }
        for (name, value) in changes.as_object().expect("an object") {
            message[name] = value.clone();
        }
        message
    }

    /// Puts a message on the queue: of SQS, or of the database, which the worker of `dev` reads each second.
    pub async fn send_message(&self, message: &Value) {
        let text = message.to_string();
        if self.is_serve() {
            return self.fleet().cloud.send_message(&text).await;
        }
        let id = message["requestId"].as_str().expect("an id").replace('-', "");
        let id = u128::from_str_radix(&id, 16).expect("a UUID").to_be_bytes();
        let function = message["functionId"].as_str().expect("an id");
        let deadline = message["deadlineMs"].as_i64().unwrap_or(NO_DEADLINE_MS);
        let database = Connection::open(self.data_dir().join("infra.sqlite")).expect("it exists");
        database.busy_timeout(BUSY_TIMEOUT).expect("SQLite accepts it");
        let insert = "INSERT INTO jobs (id, function_id, deadline_ms, message) VALUES (?1, ?2, ?3, ?4)";
        let row = params![&id[..], function, deadline, text.as_bytes()];
        database.execute(insert, row).expect("the table of the queue");
    }

    /// [`Self::send_message`], and the result of the run.
    pub async fn run_message(&self, message: &Value) -> Value {
        self.send_message(message).await;
        let id = message["requestId"].as_str().expect("an id");
        eventually(&format!("the result of {message}"), 6 * SOON, || async {
            if self.is_serve() {
                let key = format!("job:{id}");
                return match self.fleet().redis.command(&[b"GET", key.as_bytes()]).await {
                    Reply::Bulk(result) => Ok(serde_json::from_slice(&result).expect("JSON")),
                    other => Err(format!("{other:?}")),
                };
            }
            let answer = self.gateway.get(&format!("/status/{id}")).await;
            let result: Value = serde_json::from_slice(answer.body()).unwrap_or_default();
            let is_there = answer.status == 200 && result["status"] != "pending";
            if is_there { Ok(result) } else { Err(answer.text()) }
        })
        .await
    }

    /// The run of a function with a time limit.
    pub async fn run_limited(&self, function: &str, timeout_ms: u64, input: &Value) -> Value {
        let changes = json!({ "timeoutMs": timeout_ms, "input": input });
        self.run_message(&self.message(function, changes).await).await
    }
}
