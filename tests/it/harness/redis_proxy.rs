//! A TCP proxy in front of Redis: it can cut off one node while the others stay connected.

use super::redis::Redis;
use super::wait::spawn;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Forwarding,
    BlackHole,
    Cut,
}

pub struct RedisProxy {
    addr: SocketAddr,
    state: watch::Sender<State>,
    /// The server for new connections.
    upstream: Arc<Mutex<SocketAddr>>,
    accepting: JoinHandle<()>,
}

impl RedisProxy {
    pub async fn to(redis: &Redis) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("loopback has a free port");
        let addr = listener.local_addr().expect("a bound socket has an address");
        let (state, of_clients) = watch::channel(State::Forwarding);
        let upstream = Arc::new(Mutex::new(redis.addr()));
        let current = Arc::clone(&upstream);
        let accepting = spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let upstream = *current.lock().expect("the lock is not poisoned");
                // Either side may close its connection at any time.
                spawn(forward(client, upstream, of_clients.clone()));
            }
        });
        Self { addr, state, upstream, accepting }
    }

    /// Redirects new connections to another server, as a DNS name does after a failover. Open connections
    /// stay.
    pub fn redirect_to(&self, redis: &Redis) {
        *self.upstream.lock().expect("the lock is not poisoned") = redis.addr();
    }

    /// [`Self::url`] with a user and a password.
    pub fn url_of(&self, user: &str, password: &str) -> String {
        format!("redis://{user}:{password}@{}", self.addr)
    }

    /// The value of `REDIS_URL`.
    pub fn url(&self) -> String {
        format!("redis://{}", self.addr)
    }

    /// Closes every connection, new ones included.
    pub fn cut(&self) {
        self.state.send_replace(State::Cut);
    }

    /// Accepts connections and forwards nothing, as a network that loses every packet.
    pub fn black_hole(&self) {
        self.state.send_replace(State::BlackHole);
    }

    pub fn restore(&self) {
        self.state.send_replace(State::Forwarding);
    }
}

impl Drop for RedisProxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn forward(
    client: TcpStream,
    upstream: SocketAddr,
    mut state: watch::Receiver<State>,
) -> std::io::Result<()> {
    let (from_client, to_client) = client.into_split();
    let (from_redis, to_redis) = TcpStream::connect(upstream).await?.into_split();
    let (there, back) = (state.clone(), state.clone());
    tokio::select! {
        ended = copy(from_client, to_redis, there) => ended,
        ended = copy(from_redis, to_client, back) => ended,
        _ = state.wait_for(|state| *state == State::Cut) => Ok(()),
    }
}

async fn copy(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut state: watch::Receiver<State>,
) -> std::io::Result<()> {
    let mut bytes = vec![0; 16 << 10];
    loop {
        let count = from.read(&mut bytes).await?;
        if count == 0 {
            return Ok(());
        }
        // The proxy was dropped.
        if state.wait_for(|state| *state != State::BlackHole).await.is_err() {
            return Ok(());
        }
        to.write_all(&bytes[..count]).await?;
    }
}
