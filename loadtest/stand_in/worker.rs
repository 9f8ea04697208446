//! The worker: publishes a result and stores a copy, as real workers do, over one connection to Redis.

use crate::spawn;
use bytes::BytesMut;
use serde::Deserialize;
use std::cell::{Cell, RefCell};
use std::io::Write;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Notify;

/// Real workers keep their copies for an hour. Under load that would fill the memory of the machine.
const COPY_KEPT_S: u32 = 60;
/// Most bytes that wait to be written. Results beyond it are dropped and counted.
const WAITING_BYTES_MAX: usize = 64 << 20;
/// The members of a result that are the same for all, to its end.
const RESULT: &str = concat!(
    r#""status":"SUCCESS","exitCode":0,"stdout":"{\"message\": \"Hello, Ada!\"}\n","stderr":"","#,
    r#""durationMs":12.5,"handlerDurationMs":3.25,"peakMemoryBytes":11694080,"allocatedMemoryMb":128,"#,
    r#""optimizationTip":null,"estimatedSavings":null,"recommendedMemoryMb":null,"cpuUsage":null,"#,
    r#""networkRx":null,"networkTx":null,"diskRead":null,"diskWrite":null,"outputFiles":[],"#,
    r#""llm_token_count":null}"#,
);
/// Between two attempts to connect.
const PAUSE: Duration = Duration::from_millis(50);

/// The parts of a message that the worker uses.
pub struct Job {
    request_id: String,
    function_id: String,
}

impl Job {
    pub fn of(message: &str) -> Option<Self> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Message<'a> {
            request_id: &'a str,
            function_id: &'a str,
        }
        let message: Message<'_> = serde_json::from_str(message).ok()?;
        Some(Self { request_id: message.request_id.to_owned(), function_id: message.function_id.to_owned() })
    }
}

pub struct Worker(Rc<Outbox>);

#[derive(Default)]
struct Outbox {
    waiting: RefCell<BytesMut>,
    filled: Notify,
    is_connected: Cell<bool>,
    commands: Cell<u64>,
    published: Cell<u64>,
    unpublished: Cell<u64>,
}

impl Worker {
    /// Fails if Redis does not answer. After a later loss the worker reconnects.
    pub async fn start(address: SocketAddr) -> std::io::Result<Self> {
        let outbox = Rc::new(Outbox::default());
        let connection = TcpStream::connect(address).await?;
        outbox.is_connected.set(true);
        spawn(write_on(Rc::clone(&outbox), address, connection));
        Ok(Self(outbox))
    }

    pub fn answer(&self, jobs: &[Job]) {
        let outbox = &self.0;
        let count = jobs.len() as u64;
        let mut waiting = outbox.waiting.borrow_mut();
        if !outbox.is_connected.get() || waiting.len() > WAITING_BYTES_MAX {
            outbox.unpublished.set(outbox.unpublished.get() + count);
            return;
        }
        let mut result = Vec::with_capacity(640);
        for job in jobs {
            result.clear();
            let Job { request_id, function_id } = job;
            // Writing to memory cannot fail.
            let _ = write!(
                result,
                r#"{{"requestId":"{request_id}","functionId":"{function_id}","workerId":"stand-in",{RESULT}"#
            );
            command(&mut waiting, &[b"PUBLISH", format!("result:{request_id}").as_bytes(), &result]);
            let kept = COPY_KEPT_S.to_string();
            command(
                &mut waiting,
                &[b"SETEX", format!("job:{request_id}").as_bytes(), kept.as_bytes(), &result],
            );
        }
        outbox.commands.set(outbox.commands.get() + 2 * count);
        outbox.published.set(outbox.published.get() + count);
        outbox.filled.notify_one();
    }

    /// Commands sent, results published, results not published.
    pub fn counts(&self) -> (u64, u64, u64) {
        (self.0.commands.get(), self.0.published.get(), self.0.unpublished.get())
    }

    pub fn reset(&self) {
        for counter in [&self.0.commands, &self.0.published, &self.0.unpublished] {
            counter.set(0);
        }
    }
}

fn command(out: &mut BytesMut, parts: &[&[u8]]) {
    out.extend_from_slice(format!("*{}\r\n", parts.len()).as_bytes());
    for part in parts {
        out.extend_from_slice(format!("${}\r\n", part.len()).as_bytes());
        out.extend_from_slice(part);
        out.extend_from_slice(b"\r\n");
    }
}

/// Writes what waits, until the process ends. Reconnects after a loss.
async fn write_on(outbox: Rc<Outbox>, address: SocketAddr, first: TcpStream) {
    let mut connection = Some(first);
    loop {
        if let Some(connection) = connection.take() {
            // It returns when the connection breaks. What waited then is lost, as a publication without a
            // subscriber is.
            let _ = exchange(&outbox, connection).await;
            outbox.is_connected.set(false);
            outbox.waiting.borrow_mut().clear();
        }
        match TcpStream::connect(address).await {
            Ok(new) => {
                outbox.is_connected.set(true);
                connection = Some(new);
            }
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

async fn exchange(outbox: &Outbox, connection: TcpStream) -> std::io::Result<()> {
    connection.set_nodelay(true)?;
    let (mut reader, mut writer) = connection.into_split();
    let mut answers = vec![0; 64 << 10];
    loop {
        tokio::select! {
            () = outbox.filled.notified() => {
                let mut batch = outbox.waiting.borrow_mut().split();
                writer.write_all_buf(&mut batch).await?;
            }
            // The replies of Redis are not used, but Redis stops when they are not read.
            n = reader.read(&mut answers) => if n? == 0 {
                return Ok(());
            },
        }
    }
}
