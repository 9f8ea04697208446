//! A proxy in front of the AWS emulator, for what the emulator cannot do: deny, and be slow to answer.

use super::aws::{Cloud, forward};
use super::http::{Answer, Conn, Message};
use super::wait::spawn;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// What the proxy does with each operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// No proxy at all.
    PassAll,
    PassAndCount,
    /// What the IAM role of the old controller allows, and nothing else.
    OldRole,
    /// `OldRole` without this operation.
    Deny(&'static str),
    /// Passes everything on at once, but keeps back the answers to this operation until [`Proxy::release`].
    Hold(&'static str),
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
    /// Operations seen, and how often each was denied and passed.
    seen: Mutex<BTreeMap<String, Count>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    pub passed: u32,
    pub denied: u32,
    /// Passed on, its answer kept back so far.
    pub held: u32,
}

pub struct Proxy {
    addr: SocketAddr,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
}

impl Proxy {
    pub async fn start(cloud: &Cloud, policy: Policy) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("loopback has a free port");
        let addr = listener.local_addr().expect("a bound socket has an address");
        let seen = Mutex::default();
        let shared =
            Arc::new(Shared { upstream: cloud.addr(), policy, released: watch::channel(false).0, seen });
        let of_clients = Arc::clone(&shared);
        let accepting = spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let shared = Arc::clone(&of_clients);
                spawn(async move {
                    // A client that hangs up in the middle is its own affair.
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
        self.shared.seen.lock().expect("no holder panics").get(operation).copied().unwrap_or_default()
    }

    /// Lets the held answers go, and holds none from now on.
    pub fn release(&self) {
        self.shared.released.send_replace(true);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.accepting.abort();
        if std::thread::panicking() {
            eprintln!("--- AWS operations seen by the proxy: {:#?}", self.shared.seen);
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
            self.note(&operation, |count| count.passed += 1);
            let Answer { mut message, .. } = forward(self.upstream, &request).await?;
            // The body was read whole, whatever framing it came in.
            let framing = ["transfer-encoding", "content-length", "connection"];
            message.headers.retain(|(name, _)| !framing.contains(&name.to_ascii_lowercase().as_str()));
            message.headers.push(("content-length".into(), message.body.len().to_string()));
            if matches!(self.policy, Policy::Hold(held) if held == operation) {
                self.note(&operation, |count| count.held += 1);
                // The sender lives as long as self, so this ends only with a release.
                let _ = self.released.subscribe().wait_for(|released| *released).await;
                self.note(&operation, |count| count.held -= 1);
            }
            client.write(&message.to_bytes()).await?;
        }
        Ok(())
    }

    fn denies(&self, operation: &str) -> bool {
        let old_role = OLD_ROLE.contains(&operation) || operation.starts_with("s3-object-");
        match self.policy {
            Policy::PassAll | Policy::PassAndCount | Policy::Hold(_) => false,
            Policy::OldRole => !old_role,
            Policy::Deny(denied) => !old_role || operation == denied,
        }
    }

    fn note(&self, operation: &str, change: impl FnOnce(&mut Count)) {
        change(self.seen.lock().expect("no holder panics").entry(operation.to_owned()).or_default());
    }
}

/// `SendMessage`, `PutItem`, …; S3 names its operations by method and path: `s3-object-GET`, `s3-bucket-HEAD`.
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

/// As AWS says it: SQS with 403 and the query name of the error beside, DynamoDB with 400.
fn denial(request: &Message) -> Message {
    let is_sqs = request.header("x-amz-target").is_some_and(|t| t.starts_with("AmazonSQS"));
    let status = if is_sqs { "403 Forbidden" } else { "400 Bad Request" };
    let body = br#"{"__type":"com.amazon.coral.service#AccessDeniedException","Message":"User: arn:aws:iam::000000000000:user/old is not authorized to perform this operation"}"#;
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
