//! A line to Redis that a test can cut: one node loses it, and the others do not.

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
    Passing,
    Silent,
    Cut,
}

pub struct Link {
    addr: SocketAddr,
    state: watch::Sender<State>,
    /// Where new connections lead.
    upstream: Arc<Mutex<SocketAddr>>,
    accepting: JoinHandle<()>,
}

impl Link {
    pub async fn to(redis: &Redis) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("loopback has a free port");
        let addr = listener.local_addr().expect("a bound socket has an address");
        let (state, of_clients) = watch::channel(State::Passing);
        let upstream = Arc::new(Mutex::new(redis.addr()));
        let leads_to = Arc::clone(&upstream);
        let accepting = spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let upstream = *leads_to.lock().expect("no holder panics");
                // Either side may hang up whenever it likes.
                spawn(carry(client, upstream, of_clients.clone()));
            }
        });
        Self { addr, state, upstream, accepting }
    }

    /// New connections lead to another Redis; those that stand stay where they are. As a name does after a
    /// fail-over.
    pub fn lead_to(&self, redis: &Redis) {
        *self.upstream.lock().expect("no holder panics") = redis.addr();
    }

    /// [`Self::url`] for a user of Redis.
    pub fn url_of(&self, user: &str, password: &str) -> String {
        format!("redis://{user}:{password}@{}", self.addr)
    }

    /// As `REDIS_URL` wants it.
    pub fn url(&self) -> String {
        format!("redis://{}", self.addr)
    }

    /// Ends every connection, and every new one at once.
    pub fn cut(&self) {
        self.state.send_replace(State::Cut);
    }

    /// Takes connections and passes nothing on, as a network that loses every packet.
    pub fn silence(&self) {
        self.state.send_replace(State::Silent);
    }

    pub fn restore(&self) {
        self.state.send_replace(State::Passing);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn carry(
    client: TcpStream,
    upstream: SocketAddr,
    mut state: watch::Receiver<State>,
) -> std::io::Result<()> {
    let (from_client, to_client) = client.into_split();
    let (from_redis, to_redis) = TcpStream::connect(upstream).await?.into_split();
    let (there, back) = (state.clone(), state.clone());
    tokio::select! {
        ended = pass(from_client, to_redis, there) => ended,
        ended = pass(from_redis, to_client, back) => ended,
        _ = state.wait_for(|state| *state == State::Cut) => Ok(()),
    }
}

async fn pass(
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
        // A link that is gone passes nothing more.
        if state.wait_for(|state| *state != State::Silent).await.is_err() {
            return Ok(());
        }
        to.write_all(&bytes[..count]).await?;
    }
}
