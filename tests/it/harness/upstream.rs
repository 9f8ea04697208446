//! A service behind the gateway. It echoes and counts requests.

use super::http::{Conn, Message};
use super::wait::spawn;
use serde_json::json;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

#[derive(Default)]
struct Seen {
    requests: Mutex<Vec<Message>>,
    health_checks: AtomicUsize,
    is_unhealthy: AtomicBool,
}

pub struct Upstream {
    addr: SocketAddr,
    seen: Arc<Seen>,
    accepting: JoinHandle<()>,
}

impl Upstream {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let addr = listener.local_addr().expect("it is bound");
        let seen = Arc::new(Seen::default());
        let of_loop = Arc::clone(&seen);
        let accepting = spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let seen = Arc::clone(&of_loop);
                spawn(async move { serve(stream, &seen).await });
            }
        });
        Self { addr, seen, accepting }
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The received requests, without health checks.
    pub fn requests(&self) -> Vec<Message> {
        self.seen.requests.lock().expect("the lock is not poisoned").clone()
    }

    pub fn health_checks(&self) -> usize {
        self.seen.health_checks.load(Ordering::Relaxed)
    }

    /// Answers health checks with 500 from now on.
    pub fn fail_health_checks(&self) {
        self.seen.is_unhealthy.store(true, Ordering::Relaxed);
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn serve(stream: TcpStream, seen: &Seen) {
    let mut conn = Conn::over(stream);
    while let Ok(Some(request)) = conn.request().await {
        let path = request.start.split(' ').nth(1).unwrap_or_default().to_owned();
        if path == "/healthz" {
            seen.health_checks.fetch_add(1, Ordering::Relaxed);
            let status = if seen.is_unhealthy.load(Ordering::Relaxed) { "500 Unhealthy" } else { "200 OK" };
            let _ = conn.write(format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n").as_bytes()).await;
            continue;
        }
        seen.requests.lock().expect("the lock is not poisoned").push(request.clone());
        if request.header("upgrade").is_some() {
            return echo(conn).await;
        }
        if path.ends_with("/hang") {
            std::future::pending::<()>().await;
        }
        if path.ends_with("/break") {
            let _ = conn.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf").await;
            return;
        }
        let written = if path.ends_with("/chunked") {
            answer_in_chunks(&mut conn).await
        } else {
            conn.write(&answer_to(&request).await).await
        };
        if written.is_err() {
            return;
        }
    }
}

/// The chunks of the body of `/chunked`. One is larger than any buffer on the way.
pub fn chunks() -> [Vec<u8>; 3] {
    [vec![b'a'; 10], vec![b'b'; 100_000], vec![b'c'; 1000]]
}

async fn answer_in_chunks(conn: &mut Conn) -> std::io::Result<()> {
    let head = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ntransfer-encoding: chunked\r\n\r\n";
    conn.write(head).await?;
    for chunk in chunks() {
        let size = format!("{:x}\r\n", chunk.len());
        conn.write(&[size.as_bytes(), &chunk, b"\r\n"].concat()).await?;
    }
    conn.write(b"0\r\n\r\n").await
}

async fn answer_to(request: &Message) -> Vec<u8> {
    let headers: Vec<_> = request.headers.iter().map(|(name, value)| json!([name, value])).collect();
    let body =
        json!({ "start": request.start, "headers": headers, "bodyBytes": request.body.len() }).to_string();
    let head = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nx-upstream: yes\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    [head.into_bytes(), body.into_bytes()].concat()
}

/// Switches protocols and echoes bytes, without the key and the frames of WebSocket.
async fn echo(conn: Conn) {
    let (mut stream, unread) = conn.into_parts();
    let switched = b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n";
    let _ = stream.write_all(switched).await;
    let _ = stream.write_all(&unread).await;
    let mut bytes = [0; 1024];
    while let Ok(n) = stream.read(&mut bytes).await {
        if n == 0 || stream.write_all(&bytes[..n]).await.is_err() {
            return;
        }
    }
}
