//! A proxy in front of the AWS emulator that denies calls, delays answers and injects faults.

use super::aws::{Cloud, forward};
use super::http::{Conn, Message};
use super::wait::{pause, spawn};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// After this time the connection with a lost answer is closed.
const ANSWER_LOST: Duration = Duration::from_secs(10);

/// How the proxy handles calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// No proxy.
    PassAll,
    PassAndCount,
    /// Only the operations that the IAM role of the old controller allows.
    OldRole,
    /// `OldRole` without this operation.
    Deny(&'static str),
    /// Forwards all calls, but holds the answers of this operation until [`AwsProxy::release`].
    Hold(&'static str),
    /// Delays the answers of `SendMessageBatch`.
    SlowSends(Duration),
    /// Injects the faults of [`AwsProxy::inject`], none at first. The seed determines which calls fail.
    Fail(u64),
}

/// Percentages of calls that fail.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// `SendMessageBatch` calls that fail.
    pub batches: u64,
    /// Entries of `SendMessageBatch` that fail.
    pub entries: u64,
    /// `SendMessageBatch` calls that succeed, but whose answer is lost.
    pub lost_answers: u64,
    /// DynamoDB calls that are throttled.
    pub throttled: u64,
    /// Items of `BatchWriteItem` that are left unprocessed.
    pub unprocessed: u64,
    /// SQS calls whose connection breaks.
    pub queue_down: u64,
    /// DynamoDB calls whose connection breaks.
    pub tables_down: u64,
}

/// How the writes of a poison row fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Poison {
    ServerError,
    Denied,
    Throttled,
}

const OLD_ROLE: [&str; 9] = [
    "SendMessage",
    "SendMessageBatch", // authorised by SendMessage
    "GetQueueAttributes",
    "GetItem",
    "PutItem",
    "UpdateItem",
    "DeleteItem",
    "Scan",
    "Query",
];

struct Shared {
    upstream: SocketAddr,
    policy: Policy,
    released: watch::Sender<bool>,
    faults: Mutex<(Faults, SmallRng)>,
    /// Writes fail if a row contains the text.
    poisons: Mutex<Vec<(String, Poison)>>,
    /// Calls by operation.
    seen: Mutex<BTreeMap<String, Count>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    pub passed: u32,
    pub denied: u32,
    /// Forwarded; the answer is held.
    pub held: u32,
    /// Failed by [`Faults`].
    pub failed: u32,
}

pub struct AwsProxy {
    addr: SocketAddr,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

impl AwsProxy {
    pub async fn start(cloud: &Cloud, policy: Policy) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("loopback has a free port");
        let addr = listener.local_addr().expect("a bound socket has an address");
        let seen = Mutex::default();
        let seed = if let Policy::Fail(seed) = policy { seed } else { 0 };
        let faults = Mutex::new((Faults::default(), SmallRng::seed_from_u64(seed)));
        let shared = Arc::new(Shared {
            upstream: cloud.addr(),
            policy,
            released: watch::channel(false).0,
            faults,
            poisons: Mutex::default(),
            seen,
        });
        let of_clients = Arc::clone(&shared);
        let accepting = spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let shared = Arc::clone(&of_clients);
                spawn(async move {
                    // Clients may close connections at any time.
                    let _ = shared.serve(Conn::over(stream)).await;
                });
            }
        });
        Self { addr, shared, accepting }
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    pub fn count(&self, operation: &str) -> Count {
        self.shared.seen.lock().expect("the lock is not poisoned").get(operation).copied().unwrap_or_default()
    }

    /// Sets the faults of all calls from now on.
    pub fn inject(&self, faults: Faults) {
        self.shared.faults.lock().expect("the lock is not poisoned").0 = faults;
    }

    /// From now on every write of a row that contains the text fails, alone or in a batch.
    pub fn poison(&self, text: &str, poison: Poison) {
        self.shared.poisons.lock().expect("the lock is not poisoned").push((text.to_owned(), poison));
    }

    /// Releases the held answers, and holds none from now on.
    pub fn release(&self) {
        self.shared.released.send_replace(true);
    }
}

impl Drop for AwsProxy {
    fn drop(&mut self) {
        self.accepting.abort();
        if std::thread::panicking() {
            eprintln!("--- AWS calls through the proxy: {:#?}", self.shared.seen);
        }
    }
}

impl Shared {
    async fn serve(&self, mut client: Conn) -> std::io::Result<()> {
        while let Some(request) = client.request().await? {
            let operation = operation_of(&request);
            if self.denies(&operation) {
                self.note(&operation, |count| count.denied += 1);
                client.write(&denial(&request).to_bytes()).await?;
                continue;
            }
            let Some(answer) = self.answer(&operation, &request).await? else { return Ok(()) };
            let mut message = answer;
            // The body is complete, so it gets a length in place of its framing.
            let framing = ["transfer-encoding", "content-length", "connection"];
            message.headers.retain(|(name, _)| !framing.contains(&name.to_ascii_lowercase().as_str()));
            message.headers.push(("content-length".into(), message.body.len().to_string()));
            if matches!(self.policy, Policy::Hold(held) if held == operation) {
                self.note(&operation, |count| count.held += 1);
                // The sender lives as long as `self`, so only a release ends the wait.
                let _ = self.released.subscribe().wait_for(|released| *released).await;
                self.note(&operation, |count| count.held -= 1);
            }
            if let (Policy::SlowSends(late), "SendMessageBatch") = (self.policy, operation.as_str()) {
                pause(late).await;
            }
            client.write(&message.to_bytes()).await?;
        }
        Ok(())
    }

    /// The answer of the emulator, or that of a fault. `None`: the connection breaks.
    async fn answer(&self, operation: &str, request: &Message) -> std::io::Result<Option<Message>> {
        let is_table = request.header("x-amz-target").is_some_and(|t| t.starts_with("DynamoDB"));
        let is_send = operation == "SendMessageBatch";
        let (faults, _) = *self.faults.lock().expect("the lock is not poisoned");
        let down = if is_table { faults.tables_down } else { faults.queue_down };
        if self.happens(down) {
            self.note(operation, |count| count.failed += 1);
            return Ok(None);
        }
        if is_table && self.happens(faults.throttled) {
            self.note(operation, |count| count.failed += 1);
            return Ok(Some(failure("400 Bad Request", "ProvisionedThroughputExceededException")));
        }
        if let Some(poison) = self.poison_in(operation, request) {
            self.note(operation, |count| count.failed += 1);
            return Ok(Some(match poison {
                Poison::ServerError => failure("500 Internal Server Error", "InternalServerError"),
                Poison::Throttled => failure("400 Bad Request", "ThrottlingException"),
                Poison::Denied => denial(request),
            }));
        }
        if is_send && self.happens(faults.batches) {
            self.note(operation, |count| count.failed += 1);
            return Ok(Some(failure("500 Internal Server Error", "InternalFailure")));
        }
        self.note(operation, |count| count.passed += 1);
        let answer = match operation {
            "SendMessageBatch" => self.partly(request, faults.entries, "Entries", "Failed").await?,
            "BatchWriteItem" => {
                self.partly(request, faults.unprocessed, "RequestItems", "UnprocessedItems").await?
            }
            _ => forward(self.upstream, request).await?.message,
        };
        if is_send && self.happens(faults.lost_answers) {
            self.note(operation, |count| count.held += 1);
            // Longer than the client waits.
            let mut released = self.released.subscribe();
            let _ = tokio::time::timeout(ANSWER_LOST, released.wait_for(|released| *released)).await;
            return Ok(None);
        }
        Ok(Some(answer))
    }

    fn poison_in(&self, operation: &str, request: &Message) -> Option<Poison> {
        if !matches!(operation, "BatchWriteItem" | "PutItem") {
            return None;
        }
        let body = String::from_utf8_lossy(&request.body);
        let poisons = self.poisons.lock().expect("the lock is not poisoned");
        poisons.iter().find(|(text, _)| body.contains(text)).map(|(_, poison)| *poison)
    }

    /// Forwards a batch without some of its entries, and reports these as failed.
    async fn partly(
        &self,
        request: &Message,
        percent: u64,
        parts: &str,
        left: &str,
    ) -> std::io::Result<Message> {
        if percent == 0 {
            return Ok(forward(self.upstream, request).await?.message);
        }
        let mut body: Value = serde_json::from_slice(&request.body)?;
        let mut given_up = json!({});
        let mut kept = 0;
        // Messages are a list. Rows are a list under the name of their table.
        let lists: Vec<(String, &mut Value)> = match &mut body[parts] {
            Value::Object(tables) => tables.iter_mut().map(|(name, list)| (name.clone(), list)).collect(),
            list => vec![(String::new(), list)],
        };
        for (name, list) in lists {
            let (gone, stay): (Vec<_>, Vec<_>) =
                list.as_array().into_iter().flatten().cloned().partition(|_| self.happens(percent));
            kept += stay.len();
            *list = stay.into();
            if !gone.is_empty() {
                given_up[name] = gone.into();
            }
        }
        let mut answer = if kept == 0 {
            // The emulator rejects an empty batch, as AWS does.
            success(json!({ "Successful": [] }))
        } else {
            let mut request = request.clone();
            request.body = body.to_string().into_bytes();
            request.headers.retain(|(name, _)| !name.eq_ignore_ascii_case("content-length"));
            request.headers.push(("content-length".into(), request.body.len().to_string()));
            forward(self.upstream, &request).await?.message
        };
        let mut reported: Value = serde_json::from_slice(&answer.body)?;
        reported[left] = match given_up.get("") {
            Some(entries) => {
                let failed = |entry: &Value| {
                    json!({ "Id": entry["Id"], "SenderFault": false, "Code": "InternalError",
                        "Message": "by the test" })
                };
                entries.as_array().into_iter().flatten().map(failed).collect()
            }
            None => given_up,
        };
        answer.body = reported.to_string().into_bytes();
        Ok(answer)
    }

    fn happens(&self, percent: u64) -> bool {
        percent > 0 && self.faults.lock().expect("the lock is not poisoned").1.random_range(0..100) < percent
    }

    fn denies(&self, operation: &str) -> bool {
        let old_role = OLD_ROLE.contains(&operation) || operation.starts_with("s3-object-");
        match self.policy {
            Policy::PassAll
            | Policy::PassAndCount
            | Policy::Hold(_)
            | Policy::SlowSends(_)
            | Policy::Fail(_) => false,
            Policy::OldRole => !old_role,
            Policy::Deny(denied) => !old_role || operation == denied,
        }
    }

    fn note(&self, operation: &str, change: impl FnOnce(&mut Count)) {
        change(self.seen.lock().expect("the lock is not poisoned").entry(operation.to_owned()).or_default());
    }
}

fn failure(status: &str, code: &str) -> Message {
    let mut message =
        success(json!({ "__type": format!("com.amazon.coral.service#{code}"), "message": "by the test" }));
    message.start = format!("HTTP/1.1 {status}");
    message
}

fn success(body: Value) -> Message {
    let headers = vec![("content-type".to_owned(), "application/x-amz-json-1.0".to_owned())];
    Message { start: "HTTP/1.1 200 OK".to_owned(), headers, body: body.to_string().into_bytes() }
}

/// `SendMessage`, `PutItem`, …; for S3 from method and path: `s3-object-GET`, `s3-bucket-HEAD`.
fn operation_of(request: &Message) -> String {
    if let Some((_, operation)) = request.header("x-amz-target").and_then(|t| t.split_once('.')) {
        return operation.to_owned();
    }
    let mut words = request.start.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = path.split('?').next().unwrap_or_default().trim_matches('/');
    let kind = if path.contains('/') { "object" } else { "bucket" };
    format!("s3-{kind}-{method}")
}

/// The error of AWS: SQS answers 403 with the query name of the error, DynamoDB 400.
fn denial(request: &Message) -> Message {
    let is_sqs = request.header("x-amz-target").is_some_and(|t| t.starts_with("AmazonSQS"));
    let status = if is_sqs { "403 Forbidden" } else { "400 Bad Request" };
    let body = br#"{"__type":"com.amazon.coral.service#AccessDeniedException",
        "Message":"User: arn:aws:iam::000000000000:user/old is not authorized to perform this operation"}"#;
    let mut headers = vec![
        ("content-type".to_owned(), "application/x-amz-json-1.0".to_owned()),
        ("content-length".to_owned(), body.len().to_string()),
        ("x-amzn-requestid".to_owned(), "denied-by-the-test".to_owned()),
    ];
    if is_sqs {
        headers.push(("x-amzn-query-error".to_owned(), "AccessDenied;Sender".to_owned()));
    }
    Message { start: format!("HTTP/1.1 {status}"), headers, body: body.to_vec() }
}
