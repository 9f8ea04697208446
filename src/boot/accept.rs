//! Accepts connections from a listening socket until it is stopped.
//!
//! Pingora's own loop was rejected. It drops the connections in the socket's queue when it stops. It spins
//! without a pause while the system is out of file descriptors (ENFILE), and it cannot answer any client
//! while the process is (EMFILE).
//!
//! Here a few descriptors are reserved ([`ReservedDescriptors`]). One of them accepts a connection even then,
//! so that `/livez` still answers and other clients get 503. The maximum number of connections is fitted to
//! the limit beforehand (`gateway/descriptors.rs`). So the reserve is for limits that are lowered later, and
//! for descriptors that are used elsewhere.

use crate::gateway::{Accepted, Gateway, ListenerApp};
use crate::metrics::Metrics;
use futures_util::FutureExt;
use nix::errno::Errno;
use parking_lot::Mutex;
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

/// Number of reserved descriptors.
const SPARES: usize = 4;
/// Pause when no descriptor is left. Connections wait in the queue of the socket.
const SHORT_PAUSE: Duration = Duration::from_millis(20);
/// Interval between checks of a shortage, and the time without a failure after which it is over.
const SHORT_LOOK_EVERY: Duration = Duration::from_secs(1);
/// Pause after an unexpected error.
const ERROR_PAUSE: Duration = Duration::from_secs(1);
/// Longest pause between two connections while not even the reserve has room. It is longer than an eviction
/// takes.
const ROOM_WAIT_MAX: Duration = Duration::from_millis(500);
/// Most connections that are accepted from the queue of a socket that closes. Connections arrive meanwhile
/// only if a successor shares the socket.
const QUEUE_MAX: usize = 4096;

/// The accept loop of one socket.
pub struct Acceptor {
    pub listener: TcpListener,
    pub guard: Arc<ListenerApp<Gateway>>,
    pub spares: Arc<ReservedDescriptors>,
    pub stopped: watch::Receiver<bool>,
    /// How long connections outlive the listener. After a handover, the last connections are served for a
    /// while, each response with `Connection: close`, so that no client fails.
    pub linger: watch::Receiver<Duration>,
}

impl Acceptor {
    /// Returns when the socket is closed and idle connections have been asked to close.
    pub async fn run(mut self) {
        loop {
            let accepted = tokio::select! {
                biased;
                // A dropped sender means that the node is gone.
                _ = self.stopped.wait_for(|stopped| *stopped) => break,
                accepted = self.listener.accept() => accepted,
                () = sleep(SHORT_LOOK_EVERY), if self.spares.is_short() => {
                    self.spares.look();
                    continue;
                }
            };
            match accepted {
                Ok((stream, client)) => {
                    if self.spares.is_short() {
                        self.spares.look();
                    }
                    self.serve(stream, client, Accepted::Usually);
                    // Without room, the next connection would be closed without a response.
                    let _ = timeout(ROOM_WAIT_MAX, self.guard.has_room()).await;
                }
                Err(e) if is_shortage(&e) => self.relieve(&e).await,
                Err(e) if is_of_one_connection(&e) => {}
                Err(e) => {
                    tracing::error!(error = %e, "Connection not accepted; retrying in 1 s");
                    sleep(ERROR_PAUSE).await;
                }
            }
        }
        self.empty_queue();
        let Self { listener, guard, linger, .. } = self;
        drop(listener);
        let linger = *linger.borrow();
        sleep(linger).await;
        guard.close().await;
    }

    /// No descriptor is left: a reserved one accepts the next connection.
    async fn relieve(&self, error: &io::Error) {
        self.spares.ran_out(error);
        if self.spares.lend() {
            if let Some(Ok((stream, client))) = self.listener.accept().now_or_never() {
                return self.serve(stream, client, Accepted::OnSpare);
            }
            self.spares.refill();
        } else {
            self.guard.evict();
        }
        sleep(SHORT_PAUSE).await;
    }

    /// Serves a connection in a task. It is counted here, because the task may start only after many more
    /// were accepted.
    fn serve(&self, stream: TcpStream, client: SocketAddr, accepted: Accepted) {
        let lent = (accepted == Accepted::OnSpare).then(|| DescriptorGuard(Arc::clone(&self.spares)));
        let Some(place) = self.guard.admit(client.ip(), accepted) else {
            // Close it before `lent` is dropped, which reserves the descriptor again.
            return drop(stream);
        };
        let (guard, stopped) = (Arc::clone(&self.guard), self.stopped.clone());
        #[expect(
            clippy::disallowed_methods,
            reason = "a connection ends with its client, or when the guard is closed, or with the process"
        )]
        tokio::spawn(async move {
            guard.serve(stream, client, place, &stopped).await;
            drop(lent);
        });
    }

    /// Accepts what is in the queue. The kernel has completed these connections, and would reset them when
    /// the socket closes.
    fn empty_queue(&self) {
        for _ in 0..QUEUE_MAX {
            match self.listener.accept().now_or_never() {
                Some(Ok((stream, client))) => self.serve(stream, client, Accepted::Usually),
                _ => return,
            }
        }
    }
}

fn is_shortage(error: &io::Error) -> bool {
    matches!(errno(error), Some(Errno::EMFILE | Errno::ENFILE | Errno::ENOBUFS | Errno::ENOMEM))
}

/// The errors that accept(2) names for a connection that was lost before it was accepted.
fn is_of_one_connection(error: &io::Error) -> bool {
    let lost = [Errno::ECONNABORTED, Errno::ECONNRESET, Errno::EINTR, Errno::EPERM, Errno::EPROTO];
    let network = [Errno::EHOSTDOWN, Errno::EHOSTUNREACH, Errno::ENETDOWN, Errno::ENETUNREACH, Errno::ENONET];
    errno(error).is_some_and(|errno| lost.contains(&errno) || network.contains(&errno))
}

fn errno(error: &io::Error) -> Option<Errno> {
    error.raw_os_error().map(Errno::from_raw)
}

/// A reserved descriptor in use by a connection. It is reserved again when the connection ends.
struct DescriptorGuard(Arc<ReservedDescriptors>);

impl Drop for DescriptorGuard {
    fn drop(&mut self) {
        self.0.refill();
    }
}

/// The reserved descriptors of the process, and whether there is a shortage. Shared by all sockets.
pub struct ReservedDescriptors {
    held: Mutex<Vec<File>>,
    is_short: AtomicBool,
    failed_last: Mutex<Instant>,
    metrics: Arc<Metrics>,
}

impl ReservedDescriptors {
    pub fn new(metrics: Arc<Metrics>) -> Self {
        let (held, failed_last) = (Mutex::default(), Mutex::new(Instant::now()));
        let spares = Self { held, is_short: AtomicBool::new(false), failed_last, metrics };
        spares.refill();
        spares
    }

    fn is_short(&self) -> bool {
        self.is_short.load(Ordering::Relaxed)
    }

    /// Reserves descriptors up to [`SPARES`]. `false`: none is left to reserve.
    fn refill(&self) -> bool {
        let mut held = self.held.lock();
        while held.len() < SPARES {
            match File::open("/dev/null") {
                Ok(file) => held.push(file),
                Err(_) => return false,
            }
        }
        true
    }

    /// Frees a reserved descriptor for the next accept. `false`: all of them are in use.
    fn lend(&self) -> bool {
        self.held.lock().pop().is_some()
    }

    /// A connection could not be accepted. Logged once for each shortage.
    fn ran_out(&self, error: &io::Error) {
        self.metrics.edge.accepts_failed.inc();
        *self.failed_last.lock() = Instant::now();
        if !self.is_short.swap(true, Ordering::Relaxed) {
            self.metrics.edge.descriptors_short.set(1);
            tracing::error!(
                error = %error,
                "Connections not accepted: no file descriptor is left. Raise the limit of open files (ulimit \
                 -n, or LimitNOFILE= of systemd), or lower http.connections_max. Health checks are answered"
            );
        }
    }

    /// Ends the shortage if nothing has failed lately and descriptors are available.
    fn look(&self) {
        let is_quiet = self.failed_last.lock().elapsed() >= SHORT_LOOK_EVERY;
        let has_one_more = self.refill() && File::open("/dev/null").is_ok();
        if is_quiet && has_one_more && self.is_short.swap(false, Ordering::Relaxed) {
            self.metrics.edge.descriptors_short.set(0);
            tracing::info!("File descriptors are available again");
        }
    }
}
