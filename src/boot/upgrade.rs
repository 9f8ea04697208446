//! How a process hands its listening socket to its successor, so that a restart drops no request.
//!
//! The running process waits at a Unix socket in `STATE_DIR`. Its successor, once it is connected to everything, asks
//! there for the listening socket, begins to accept on it, and says so; only then the first one drains. Both share
//! one socket and one queue of connections, so none is lost in between. (Two sockets with SO_REUSEPORT were rejected:
//! what waits in the queue of one that closes is reset.) A successor that fails before that is as if it had never been.

use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, IoSlice, IoSliceMut};
use std::net::TcpListener;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;

/// How long the other side may take for a step.
const STEP_MAX: Duration = Duration::from_secs(10);
/// Most sockets that are handed over.
const SOCKETS_MAX: usize = 2;
/// What goes with the sockets, and what a successor says when it serves.
const HERE: &[u8] = b"I";
const SERVING: u8 = b'S';

/// Where a process that listens on `port` waits for its successor. The path may be longer than an address of a Unix
/// socket, so it is named by its open directory.
struct Place {
    dir: File,
    port: u16,
}

impl Place {
    fn new(dir: &Path, port: u16) -> io::Result<Self> {
        let dir = OpenOptions::new().read(true).custom_flags(nix::libc::O_DIRECTORY).open(dir)?;
        Ok(Self { dir, port })
    }

    fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}/upgrade-{}.sock", self.dir.as_raw_fd(), self.port).into()
    }
}

/// Waits for a successor.
pub struct Heritage {
    sockets: Vec<OwnedFd>,
    listener: UnixListener,
}

impl Heritage {
    /// `port`: as it is configured; `sockets`: those that listen, at most [`SOCKETS_MAX`], that of `port` first.
    pub fn offer(dir: &Path, port: u16, sockets: Vec<OwnedFd>) -> io::Result<Self> {
        let place = Place::new(dir, port)?;
        let path = place.path();
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            // Left by a process that is gone, or by the one whose successor this is.
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        std::fs::set_permissions(&path, Permissions::from_mode(0o600))?;
        Ok(Self { sockets, listener })
    }

    /// Resolves when a successor serves.
    pub async fn taken(self) {
        loop {
            let handed = match self.listener.accept().await {
                Ok((stream, _)) => self.hand_to(stream).await,
                Err(e) => Err(e),
            };
            match handed {
                Ok(()) => return,
                Err(e) => tracing::warn!(error = %e, "Successor Failed"),
            }
        }
    }

    async fn hand_to(&self, mut stream: UnixStream) -> io::Result<()> {
        is_own(&stream)?;
        let fds: Vec<RawFd> = self.sockets.iter().map(AsRawFd::as_raw_fd).collect();
        let send = || {
            let rights = [ControlMessage::ScmRights(&fds)];
            let sent =
                sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(HERE)], &rights, MsgFlags::empty(), None);
            sent.map_err(io::Error::from)
        };
        stepped(stream.async_io(Interest::WRITABLE, send)).await?;
        match stepped(stream.read_u8()).await? {
            SERVING => Ok(()),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// The one who inherits; tells the other when it serves.
pub struct Heir(UnixStream);

impl Heir {
    pub async fn serves(mut self) -> io::Result<()> {
        self.0.write_u8(SERVING).await
    }
}

/// Asks the process that listens on `port` for its sockets, that of `port` first. `None`: there is no such process.
pub async fn inherit(dir: &Path, port: u16) -> io::Result<Option<(Vec<TcpListener>, Heir)>> {
    let place = Place::new(dir, port)?;
    let stream = match stepped(UnixStream::connect(place.path())).await {
        Ok(stream) => stream,
        // Nobody has ever waited there, or does any more.
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        Err(e) => return Err(e),
    };
    is_own(&stream)?;
    let receive = || received(stream.as_raw_fd());
    let sockets = stepped(stream.async_io(Interest::READABLE, receive)).await?;
    Ok(Some((sockets.into_iter().map(TcpListener::from).collect(), Heir(stream))))
}

fn received(stream: RawFd) -> io::Result<Vec<OwnedFd>> {
    let mut byte = [0];
    let mut into = [IoSliceMut::new(&mut byte)];
    let mut space = cmsg_space!([RawFd; SOCKETS_MAX]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(stream, &mut into, Some(&mut space), flags)?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control
            && !fds.is_empty()
        {
            #[expect(
                unsafe_code,
                reason = "the kernel has just given us the descriptors, and nix hands them on bare"
            )]
            // SAFETY: they are open, and nobody else knows of them.
            return Ok(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect());
        }
    }
    Err(io::ErrorKind::UnexpectedEof.into())
}

/// Only processes of the same user hand sockets to each other.
fn is_own(stream: &UnixStream) -> io::Result<()> {
    let is_own = stream.peer_cred()?.uid() == nix::unistd::geteuid().as_raw();
    if is_own { Ok(()) } else { Err(io::ErrorKind::PermissionDenied.into()) }
}

async fn stepped<T>(step: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    timeout(STEP_MAX, step).await.unwrap_or(Err(io::ErrorKind::TimedOut.into()))
}
