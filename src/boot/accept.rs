//! Takes connections from a socket that listens, until it is told to stop.
//!
//! Not Pingora's own loop: that one drops what waits in the socket's queue when it stops, turns without a
//! pause when the whole system is out of file descriptors (ENFILE), and knows no way to answer anybody while
//! the process is (EMFILE). Here a few descriptors are held back ([`Spares`]): on one of them a connection is
//! accepted all the same, so that `/livez` still answers and others are told 503. How many connections there
//! may be is fitted to the limit before (`gateway/descriptors.rs`), so this is for limits that are lowered
//! later, and for what else takes descriptors.

use crate::gateway::{Accepted, Guard};
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

/// Descriptors held back.
const SPARES: usize = 4;
/// What is not accepted now waits in the queue of the socket so long.
const SHORT_PAUSE: Duration = Duration::from_millis(20);
/// How often a shortage is looked at, and how long nothing may have failed for it to be over.
const SHORT_LOOK_EVERY: Duration = Duration::from_secs(1);
/// After an error that nobody expects.
const ERROR_PAUSE: Duration = Duration::from_secs(1);
/// How long a connection waits for room in the reserve before it is closed: longer than it takes to make
/// some.
const ROOM_WAIT_MAX: Duration = Duration::from_millis(500);
/// Most connections that are taken from the queue of a socket that closes; more come in only while a
/// successor has it.
const QUEUE_MAX: usize = 4096;

/// The loop of one socket.
pub struct Acceptor {
    pub listener: TcpListener,
    pub guard: Arc<Guard>,
    pub spares: Arc<Spares>,
    pub stopped: watch::Receiver<bool>,
    /// How long connections outlive the listener. Where a successor has taken over, clients have no reason to
    /// fail: the last connections are served for a while, each answer with `Connection: close`.
    pub linger: watch::Receiver<Duration>,
}

impl Acceptor {
    /// Returns when the socket is closed, and connections that wait for a request are told to end.
    pub async fn run(mut self) {
        loop {
            let accepted = tokio::select! {
                biased;
                // A sender that is gone means that the node is gone.
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
                    // It, or the next one, would be closed without a word.
                    let _ = timeout(ROOM_WAIT_MAX, self.guard.has_room()).await;
                }
                Err(e) if is_shortage(&e) => self.relieve(&e).await,
                Err(e) if is_of_one_connection(&e) => {}
                Err(e) => {
                    tracing::error!(error = %e, "Connection Not Accepted");
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

    /// No descriptor is left: one that was held back takes the next connection.
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

    /// Counted before the next one is accepted: else many would be accepted before the first is counted.
    fn serve(&self, stream: TcpStream, client: SocketAddr, accepted: Accepted) {
        let lent = (accepted == Accepted::OnSpare).then(|| Lent(Arc::clone(&self.spares)));
        let Some(place) = self.guard.admit(client.ip(), accepted) else {
            // Before `lent`, which takes the descriptor back.
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

    /// Who is in the queue has been told by the kernel that it is connected; closed with them in it the
    /// socket resets them.
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

/// Those that accept(2) names: the connection was lost before it was accepted.
fn is_of_one_connection(error: &io::Error) -> bool {
    let lost = [Errno::ECONNABORTED, Errno::ECONNRESET, Errno::EINTR, Errno::EPERM, Errno::EPROTO];
    let network = [Errno::EHOSTDOWN, Errno::EHOSTUNREACH, Errno::ENETDOWN, Errno::ENETUNREACH, Errno::ENONET];
    errno(error).is_some_and(|errno| lost.contains(&errno) || network.contains(&errno))
}

fn errno(error: &io::Error) -> Option<Errno> {
    error.raw_os_error().map(Errno::from_raw)
}

/// A descriptor that a connection is on, and that is held back again when that ends.
struct Lent(Arc<Spares>);

impl Drop for Lent {
    fn drop(&mut self) {
        self.0.refill();
    }
}

/// Descriptors that are held back, and whether there are too few; for all sockets of the process.
pub struct Spares {
    held: Mutex<Vec<File>>,
    is_short: AtomicBool,
    failed_last: Mutex<Instant>,
    metrics: Arc<Metrics>,
}

impl Spares {
    pub fn new(metrics: Arc<Metrics>) -> Self {
        let (held, failed_last) = (Mutex::default(), Mutex::new(Instant::now()));
        let spares = Self { held, is_short: AtomicBool::new(false), failed_last, metrics };
        spares.refill();
        spares
    }

    fn is_short(&self) -> bool {
        self.is_short.load(Ordering::Relaxed)
    }

    /// Takes back what was lent. `false`: it is used by others now.
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

    /// Frees one, for the next who needs one. `false`: all are lent.
    fn lend(&self) -> bool {
        self.held.lock().pop().is_some()
    }

    /// A connection could not be accepted. Told once, until it is over.
    fn ran_out(&self, error: &io::Error) {
        self.metrics.edge.accepts_failed.inc();
        *self.failed_last.lock() = Instant::now();
        if !self.is_short.swap(true, Ordering::Relaxed) {
            self.metrics.edge.descriptors_short.set(1);
            tracing::error!(
                error = %error,
                "Connections Not Accepted: No File Descriptor Is Left. Raise The Limit Of Open Files (ulimit -n, \
                 LimitNOFILE= Of systemd), Or Lower http.connections_max; Health Checks Are Still Answered"
            );
        }
    }

    /// Whether the shortage is over.
    fn look(&self) {
        let is_quiet = self.failed_last.lock().elapsed() >= SHORT_LOOK_EVERY;
        let has_one_more = self.refill() && File::open("/dev/null").is_ok();
        if is_quiet && has_one_more && self.is_short.swap(false, Ordering::Relaxed) {
            self.metrics.edge.descriptors_short.set(0);
            tracing::info!("File Descriptors Suffice Again");
        }
    }
}
