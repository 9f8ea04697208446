//! The AWS emulator, shared by all tests of a run, and the queue, tables and bucket of one test in it.

use super::http::{Answer, Conn, Message, Request};
use super::process::{Process, Scratch, start_on_free_port};
use super::upload::zipped;
use super::wait::{SOON, eventually};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use tokio::sync::OnceCell;

pub const REGION: &str = "us-east-1";
/// The emulator accepts any secret. Tests assert that this one is not in the logs.
pub const SECRET_ACCESS_KEY: &str = "emulated-secret-0d1b7c55";

/// A program of the tests' Python environment, which has the packages of `requirements.txt`.
pub fn venv(program: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv-test/bin").join(program);
    assert!(path.exists(), "{} is missing: run `make test`, which makes the test venv", path.display());
    path
}

struct Emulator {
    addr: SocketAddr,
    _process: Process,
    _dir: Scratch,
}

/// Starts with the first test that needs it. A static is never dropped: the emulator ends with this process
/// (see [`super::process`]).
async fn emulator() -> &'static Emulator {
    static EMULATOR: OnceCell<Emulator> = OnceCell::const_new();
    let start = async || {
        let dir = Scratch::new("ministack");
        let start = |port: u16| {
            let mut env = super::path_env();
            let home = dir.path().display().to_string();
            for (name, value) in [
                ("GATEWAY_PORT", port.to_string()),
                ("BIND_HOST", "127.0.0.1".to_owned()),
                ("LOG_LEVEL", "WARNING".to_owned()),
                ("SERVICES", "sqs,dynamodb,s3".to_owned()),
                ("HOME", home.clone()),
                ("TMPDIR", home.clone()),
                // Otherwise the emulator looks for Docker.
                ("DOCKER_HOST", "unix:///nonexistent".to_owned()),
            ] {
                env.push((name.to_owned(), value));
            }
            Process::start("ministack", &venv("ministack"), &[], &env, dir.path())
        };
        let is_up = |port| std::net::TcpStream::connect(("127.0.0.1", port)).is_ok();
        let (process, port) = start_on_free_port("ministack", start, is_up).await;
        Emulator { addr: ([127, 0, 0, 1], port).into(), _process: process, _dir: dir }
    };
    EMULATOR.get_or_init(start).await
}

#[derive(Clone, Copy, Debug)]
pub enum Service {
    Sqs,
    DynamoDb,
}

impl Service {
    fn target_prefix(self) -> &'static str {
        match self {
            Self::Sqs => "AmazonSQS",
            Self::DynamoDb => "DynamoDB_20120810",
        }
    }

    fn signing_name(self) -> &'static str {
        match self {
            Self::Sqs => "sqs",
            Self::DynamoDb => "dynamodb",
        }
    }
}

/// The variable with the `address:port` of another DynamoDB emulator. The tests must pass on any.
const OTHER_DYNAMODB: &str = "INFRA_TEST_DYNAMODB";

/// The code of [`Cloud::put_function`].
const FUNCTION: &[u8] = include_bytes!("../worker/function.py");

/// The queue, tables and bucket of one test.
pub struct Cloud {
    addr: SocketAddr,
    dynamodb: Option<SocketAddr>,
    /// Whether functions of [`Cloud::put_function`] have a handler.
    pub has_handlers: bool,
    pub queue_url: String,
    pub functions_table: String,
    pub logs_table: String,
    pub bucket: String,
}

impl Cloud {
    /// `queue_attributes` are added to the defaults.
    pub async fn start(queue_attributes: &[(&str, &str)]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let n = COUNT.fetch_add(1, Ordering::Relaxed);
        let addr = emulator().await.addr;
        let other = std::env::var(OTHER_DYNAMODB).ok();
        let mut cloud = Self {
            addr,
            has_handlers: false,
            dynamodb: other.map(|addr| addr.parse().expect("address:port of another DynamoDB emulator")),
            queue_url: String::new(),
            functions_table: format!("InfraFunctions-{n}"),
            logs_table: format!("InfraExecutionLogs-{n}"),
            bucket: format!("infra-code-{n}"),
        };
        let mut attributes = json!({ "MessageRetentionPeriod": "3600" });
        for (name, value) in queue_attributes {
            attributes[name] = Value::from(*value);
        }
        let suffix = if attributes["FifoQueue"] == "true" { ".fifo" } else { "" };
        let queue = json!({ "QueueName": format!("infra-tasks-{n}{suffix}"), "Attributes": attributes });
        let made = cloud.call(Service::Sqs, "CreateQueue", &queue).await;
        cloud.queue_url = made["QueueUrl"].as_str().expect("a queue URL").to_owned();
        cloud.create_table(&cloud.functions_table, &["functionId"]).await;
        cloud.create_table(&cloud.logs_table, &["functionId", "timestamp"]).await;
        let bucket = Request::new(addr, "PUT", &format!("/{}", cloud.bucket));
        bucket
            .header("authorization", &credential("s3"))
            .header("content-length", "0")
            .send()
            .await
            .expect(200);
        cloud
    }

    /// Gives the queue a dead-letter queue.
    pub async fn add_dead_letter_queue(&self) {
        let name = format!("{}-dead", self.queue_url.rsplit('/').next().expect("a URL ends with a name"));
        self.call(Service::Sqs, "CreateQueue", &json!({ "QueueName": name })).await;
        let target = format!("arn:aws:sqs:{REGION}:000000000000:{name}");
        let policy = json!({ "deadLetterTargetArn": target, "maxReceiveCount": 2 }).to_string();
        let set = json!({ "QueueUrl": self.queue_url, "Attributes": { "RedrivePolicy": policy } });
        self.call(Service::Sqs, "SetQueueAttributes", &set).await;
    }

    /// The dead-letter queue.
    pub fn dead_letters_url(&self) -> String {
        format!("{}-dead", self.queue_url)
    }

    /// Number of messages in a queue, in-flight messages included.
    pub async fn messages(&self, queue_url: &str) -> u64 {
        let names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"];
        let ask = json!({ "QueueUrl": queue_url, "AttributeNames": names });
        let answer = self.call(Service::Sqs, "GetQueueAttributes", &ask).await;
        let count = |name: &str| answer["Attributes"][name].as_str().and_then(|n| n.parse::<u64>().ok());
        names.iter().map(|name| count(name).expect("a number")).sum()
    }

    async fn create_table(&self, name: &str, key: &[&str]) {
        let schema = key.iter().zip(["HASH", "RANGE"]);
        let schema: Vec<_> = schema.map(|(n, k)| json!({ "AttributeName": n, "KeyType": k })).collect();
        let types: Vec<_> = key.iter().map(|n| json!({ "AttributeName": n, "AttributeType": "S" })).collect();
        let table = json!({
            "TableName": name, "KeySchema": schema, "AttributeDefinitions": types,
            "BillingMode": "PAY_PER_REQUEST",
        });
        self.call(Service::DynamoDb, "CreateTable", &table).await;
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Calls an AWS operation, which must succeed.
    pub async fn call(&self, service: Service, operation: &str, input: &Value) -> Value {
        let answer = self.request(service, operation, input).send().await;
        assert_eq!(answer.status, 200, "{operation} {input}: {}", answer.text());
        answer.json()
    }

    pub fn request(&self, service: Service, operation: &str, input: &Value) -> Request {
        let addr = match service {
            Service::DynamoDb => self.dynamodb.unwrap_or(self.addr),
            Service::Sqs => self.addr,
        };
        Request::new(addr, "POST", "/")
            .header("authorization", &credential(service.signing_name()))
            .header("x-amz-date", "20260101T000000Z")
            .header("x-amz-target", &format!("{}.{operation}", service.target_prefix()))
            .body("application/x-amz-json-1.0", input.to_string())
    }

    /// An item of the function table as the old controller writes it, and its code (`worker/function.py`).
    pub async fn put_function(&self, id: &str) {
        self.put_object(&format!("functions/{id}.zip"), zipped(&[("main.py", FUNCTION)])).await;
        let mut item = json!({
            "functionId": { "S": id }, "name": { "S": format!("the {id}") }, "description": { "S": "a test" },
            "s3Key": { "S": format!("functions/{id}.zip") }, "originalName": { "S": "code.zip" },
            "runtime": { "S": "python" }, "memoryMb": { "N": "256" },
            "uploadedAt": { "S": "2026-01-02T03:04:05.678Z" }, "envVars": { "S": r#"{"GREETING":"hi"}"# },
        });
        if self.has_handlers {
            item["handler"] = json!({ "S": "main.handler" });
        }
        self.put_item(&self.functions_table, item).await;
    }

    pub async fn put_item(&self, table: &str, item: Value) {
        self.call(Service::DynamoDb, "PutItem", &json!({ "TableName": table, "Item": item })).await;
    }

    pub async fn function_item(&self, id: &str) -> Value {
        let get = json!({
            "TableName": self.functions_table, "Key": { "functionId": { "S": id } }, "ConsistentRead": true,
        });
        self.call(Service::DynamoDb, "GetItem", &get).await["Item"].take()
    }

    /// All DynamoDB items of a function's log, oldest first.
    pub async fn log_rows(&self, function: &str) -> Vec<Value> {
        let mut rows = Vec::new();
        let mut start = Value::Null;
        loop {
            let mut query = json!({
                "TableName": self.logs_table, "ConsistentRead": true,
                "KeyConditionExpression": "functionId = :f",
                "ExpressionAttributeValues": { ":f": { "S": function } },
            });
            if !start.is_null() {
                query["ExclusiveStartKey"] = start;
            }
            let mut page = self.call(Service::DynamoDb, "Query", &query).await;
            rows.extend(page["Items"].as_array().into_iter().flatten().cloned());
            start = page["LastEvaluatedKey"].take();
            if start.is_null() {
                return rows;
            }
        }
    }

    /// Number of claimed idempotency keys.
    pub async fn claims(&self) -> usize {
        self.claim_items().await.len()
    }

    /// The DynamoDB items of claimed idempotency keys.
    pub async fn claim_items(&self) -> Vec<Value> {
        let scan = json!({ "TableName": self.logs_table, "ConsistentRead": true });
        let items = self.call(Service::DynamoDb, "Scan", &scan).await["Items"].take();
        let is_claim =
            |item: &&Value| item["functionId"]["S"].as_str().is_some_and(|id| id.starts_with("idempotency#"));
        items.as_array().into_iter().flatten().filter(is_claim).cloned().collect()
    }

    /// [`Self::log_rows`] when there are `count`.
    pub async fn wait_for_rows(&self, function: &str, count: usize) -> Vec<Value> {
        let rows = || async {
            let rows = self.log_rows(function).await;
            if rows.len() == count { Ok(rows) } else { Err(format!("{} rows", rows.len())) }
        };
        eventually(&format!("{count} rows of {function}"), 3 * SOON, rows).await
    }

    /// Waits until the item of the function has `count` invocations.
    pub async fn wait_for_invocations(&self, function: &str, count: usize) {
        let counted = || async {
            let item = self.function_item(function).await;
            let is_counted = item["invocations"]["N"] == count.to_string().as_str();
            if is_counted { Ok(()) } else { Err(item.to_string()) }
        };
        eventually(&format!("{count} invocations of {function}"), 3 * SOON, counted).await;
    }

    /// The keys in the bucket that begin with `prefix`, sorted.
    pub async fn objects(&self, prefix: &str) -> Vec<String> {
        let list = Request::new(self.addr, "GET", &format!("/{}?list-type=2&prefix={prefix}", self.bucket));
        let answer = list.header("authorization", &credential("s3")).send().await.expect(200).text();
        let keys = answer.split("<Key>").skip(1);
        let mut keys: Vec<String> =
            keys.filter_map(|rest| rest.split("</Key>").next()).map(str::to_owned).collect();
        keys.sort();
        keys
    }

    fn object_request(&self, method: &str, key: &str) -> Request {
        let target = format!("/{}/{key}", self.bucket);
        Request::new(self.addr, method, &target).header("authorization", &credential("s3"))
    }

    pub async fn put_object(&self, key: &str, contents: Vec<u8>) {
        let put = self.object_request("PUT", key).body("application/octet-stream", contents);
        put.send().await.expect(200);
    }

    /// The contents of an object, which must exist.
    pub async fn object(&self, key: &str) -> Vec<u8> {
        self.object_request("GET", key).send().await.expect(200).body().to_vec()
    }

    pub async fn delete_object(&self, key: &str) {
        self.object_request("DELETE", key).send().await.expect(204);
    }

    /// Puts a message on the queue, as a gateway does.
    pub async fn send_message(&self, body: &str) {
        let send = json!({ "QueueUrl": self.queue_url, "MessageBody": body });
        self.call(Service::Sqs, "SendMessage", &send).await;
    }

    /// Receives one message from the queue and deletes it, as a worker does: (attributes, body).
    pub async fn receive(&self) -> (Value, String) {
        let ask = json!({
            "QueueUrl": self.queue_url, "MaxNumberOfMessages": 1, "WaitTimeSeconds": 1,
            "AttributeNames": ["All"],
        });
        let receive = || async {
            let mut answer = self.call(Service::Sqs, "ReceiveMessage", &ask).await;
            match answer["Messages"][0].take() {
                Value::Null => Err("the queue is empty".to_owned()),
                message => Ok(message),
            }
        };
        let mut message = eventually("a message on the queue", SOON, receive).await;
        let delete = json!({ "QueueUrl": self.queue_url, "ReceiptHandle": message["ReceiptHandle"] });
        self.call(Service::Sqs, "DeleteMessage", &delete).await;
        (message["Attributes"].take(), message["Body"].as_str().unwrap_or_default().to_owned())
    }

    /// The environment of a gateway that uses these resources through `endpoint` (the emulator, or a proxy).
    pub fn env(&self, endpoint: SocketAddr) -> Vec<(String, String)> {
        let mut env = credentials_env();
        for (name, value) in [
            ("AWS_ENDPOINT_URL", format!("http://{endpoint}")),
            ("TABLE_NAME", self.functions_table.clone()),
            ("LOGS_TABLE_NAME", self.logs_table.clone()),
            ("SQS_URL", self.queue_url.clone()),
            ("BUCKET_NAME", self.bucket.clone()),
        ] {
            env.push((name.to_owned(), value));
        }
        if let Some(addr) = self.dynamodb {
            env.push(("AWS_ENDPOINT_URL_DYNAMODB".to_owned(), format!("http://{addr}")));
        }
        env
    }
}

pub fn credentials_env() -> Vec<(String, String)> {
    let pairs = [
        ("AWS_REGION", REGION),
        ("AWS_ACCESS_KEY_ID", "emulated"),
        ("AWS_SECRET_ACCESS_KEY", SECRET_ACCESS_KEY),
        // No credentials from the network of the machine.
        ("AWS_EC2_METADATA_DISABLED", "true"),
    ];
    pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).into()
}

/// The emulator does not verify signatures, but reads the service from them.
fn credential(service: &str) -> String {
    let scope = format!("emulated/20260101/{REGION}/{service}/aws4_request");
    format!("AWS4-HMAC-SHA256 Credential={scope}, SignedHeaders=host, Signature=0")
}

/// Forwards a request to `addr` and reads the answer.
pub async fn forward(addr: SocketAddr, request: &Message) -> std::io::Result<Answer> {
    let mut conn = Conn::open(addr).await?;
    conn.write(&request.to_bytes()).await?;
    conn.answer(request.start.starts_with("HEAD ")).await
}
