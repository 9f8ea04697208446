//! Load that wrk cannot make: many functions, many client addresses, a fixed rate, thousands of waiting
//! connections.
//!
//! With `--rate`, requests start on a schedule, and each latency counts from the time at which its request
//! was due. A server that stalls cannot hide this by slowing the client down (coordinated omission).

use clap::Parser;
use std::cell::{Cell, RefCell};
use std::net::{Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

/// A request that is not answered within this time has failed.
const ANSWER_MAX: Duration = Duration::from_secs(60);
const ANSWER_BYTES_MAX: usize = 1 << 20;

#[derive(Clone, Parser)]
struct Args {
    #[arg(long)]
    target: SocketAddr,
    #[arg(long, default_value_t = 256)]
    connections: u64,
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Stop after this many requests, or after `--seconds`.
    #[arg(long, default_value_t = u64::MAX)]
    requests: u64,
    #[arg(long)]
    key: String,
    /// Ask for asynchronous runs.
    #[arg(long = "async")]
    is_async: bool,
    /// Rotate through `fn-0` to `fn-<N-1>`.
    #[arg(long, default_value_t = 1)]
    functions: u64,
    /// Rotate through this many source addresses of 127.0.0.0/8, one for each connection.
    #[arg(long, default_value_t = 1)]
    addresses: u64,
    /// The first function and the first address.
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// After this many requests connect again, from the next address.
    #[arg(long, default_value_t = u64::MAX)]
    requests_per_connection: u64,
    /// Requests a second over all connections. Without it, each connection sends its next request as soon as
    /// it has its answer.
    #[arg(long)]
    rate: Option<f64>,
}

struct Load {
    args: Args,
    /// When the first request was due.
    started: Cell<Instant>,
    asked: Cell<u64>,
    connected: Cell<u64>,
    failed: Cell<u64>,
    took_us: RefCell<Vec<u32>>,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let load = Rc::new(Load {
        args,
        started: Cell::new(Instant::now()),
        asked: Cell::new(0),
        connected: Cell::new(0),
        failed: Cell::new(0),
        took_us: RefCell::default(),
    });
    tokio::task::LocalSet::new().block_on(&runtime, async {
        // All connect before the first request: a request that waits for others to connect is not steady
        // load.
        let mut connections = Vec::new();
        for _ in 0..load.args.connections {
            connections.push(load.connect().await?);
        }
        load.started.set(Instant::now());
        let mut askers = JoinSet::new();
        for connection in connections {
            askers.spawn_local(ask_on(Rc::clone(&load), connection));
        }
        while askers.join_next().await.is_some() {}
        load.report();
        Ok(())
    })
}

/// Sends requests until the time is over.
async fn ask_on(load: Rc<Load>, mut connection: TcpStream) {
    while load.ask_in_turn(&mut connection).await.is_some() {
        match load.connect().await {
            Ok(next) => connection = next,
            Err(_) => load.failed.set(load.failed.get() + 1),
        }
    }
}

impl Load {
    fn is_over(&self) -> bool {
        self.started.get().elapsed() >= Duration::from_secs(self.args.seconds)
            || self.asked.get() >= self.args.requests
    }

    /// Sends the requests of one connection, or those before it breaks. `None`: the time is over.
    async fn ask_in_turn(&self, connection: &mut TcpStream) -> Option<()> {
        for _ in 0..self.args.requests_per_connection {
            let due = self.next().await?;
            match timeout(ANSWER_MAX, self.ask(connection)).await {
                Ok(Ok(status)) if status == if self.args.is_async { 202 } else { 200 } => {
                    let took = u32::try_from(due.elapsed().as_micros()).unwrap_or(u32::MAX);
                    self.took_us.borrow_mut().push(took);
                }
                Ok(Ok(_)) => self.failed.set(self.failed.get() + 1),
                Ok(Err(_)) | Err(_) => {
                    self.failed.set(self.failed.get() + 1);
                    break;
                }
            }
        }
        Some(())
    }

    /// Waits until the next request is due, and returns that time. `None`: there is none.
    async fn next(&self) -> Option<Instant> {
        if self.is_over() {
            return None;
        }
        let number = self.asked.get();
        self.asked.set(number + 1);
        let Some(rate) = self.args.rate else { return Some(Instant::now()) };
        let due = self.started.get() + Duration::from_secs_f64(number as f64 / rate);
        sleep_until(due).await;
        Some(due)
    }

    async fn connect(&self) -> std::io::Result<TcpStream> {
        let number = self.connected.get();
        self.connected.set(number + 1);
        let socket = TcpSocket::new_v4()?;
        if self.args.addresses > 1 {
            let host = u32::try_from(1 + (self.args.first + number) % self.args.addresses).unwrap_or(1);
            let address = Ipv4Addr::from_bits(Ipv4Addr::LOCALHOST.to_bits() + host);
            socket.bind(SocketAddr::from((address, 0)))?;
        }
        let connection = socket.connect(self.args.target).await?;
        connection.set_nodelay(true)?;
        Ok(connection)
    }

    /// One request and the status of its answer.
    async fn ask(&self, connection: &mut TcpStream) -> std::io::Result<u16> {
        let function = (self.args.first + self.asked.get()) % self.args.functions;
        let body = format!(r#"{{"functionId":"fn-{function}","inputData":{{"name":"Ada"}}}}"#);
        let mode = if self.args.is_async { "x-async: true\r\n" } else { "" };
        let request = format!(
            "POST /run HTTP/1.1\r\nhost: gateway\r\nx-api-key: {}\r\ncontent-type: application/json\r\n{mode}\
             content-length: {}\r\n\r\n{body}",
            self.args.key,
            body.len()
        );
        connection.write_all(request.as_bytes()).await?;
        let mut answer = Vec::with_capacity(2048);
        loop {
            if connection.read_buf(&mut answer).await? == 0 || answer.len() > ANSWER_BYTES_MAX {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            if let Some((status, length)) = whole(&answer)?
                && answer.len() >= length
            {
                return Ok(status);
            }
        }
    }

    fn report(&self) {
        let mut took = self.took_us.borrow_mut();
        took.sort_unstable();
        let percentile = |p: f64| {
            let at = ((took.len() as f64 * p) as usize).min(took.len().saturating_sub(1));
            took.get(at).map_or(0.0, |us| f64::from(*us) / 1000.0)
        };
        let seconds = self.started.get().elapsed().as_secs_f64();
        let report = serde_json::json!({
            "requests": took.len(),
            "failed": self.failed.get(),
            "connections": self.connected.get(),
            "seconds": seconds,
            "rps": took.len() as f64 / seconds,
            "p50_ms": percentile(0.50),
            "p99_ms": percentile(0.99),
            "max_ms": percentile(1.0),
        });
        println!("{report}");
    }
}

/// Status and length in bytes of an answer, once its head has arrived.
fn whole(answer: &[u8]) -> std::io::Result<Option<(u16, usize)>> {
    let mut fields = [httparse::EMPTY_HEADER; 32];
    let mut head = httparse::Response::new(&mut fields);
    let invalid = |_| std::io::Error::from(std::io::ErrorKind::InvalidData);
    let httparse::Status::Complete(head_bytes) = head.parse(answer).map_err(invalid)? else {
        return Ok(None);
    };
    let length = head.headers.iter().find(|field| field.name.eq_ignore_ascii_case("content-length"));
    let length = length.and_then(|field| std::str::from_utf8(field.value).ok()?.parse::<usize>().ok());
    Ok(Some((head.code.unwrap_or(0), head_bytes + length.unwrap_or(0))))
}
