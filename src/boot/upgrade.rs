//! Hands the listening sockets of a process to its successor, so that an upgrade drops no request.
//!
//! The running process waits on a Unix socket in `STATE_DIR`. Its successor first connects to all backends.
//! Then it asks for the listening sockets, accepts on those that it needs ([`super::sockets`]), and confirms.
//! Only then does the predecessor drain. Both processes share each socket and its queue, so no connection is
//! lost in between. A successor that fails before the confirmation has no effect.
//!
//! Two sockets of one address with SO_REUSEPORT were rejected: closing one of them resets the connections in
//! its queue.
//!
//! Protocol: the predecessor sends one byte ([`HERE`]) with the sockets, the successor replies with one byte
//! ([`SERVING`]). The purpose of a socket is not transmitted, because the successor identifies it by its
//! address. So versions that hand over different sockets stay compatible.

use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, IoSlice, IoSliceMut};
use std::net::TcpListener;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;

/// Deadline for each step of the other side.
const STEP_MAX: Duration = Duration::from_secs(10);
/// Pause after a failed accept.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
/// Most sockets that are handed over: several for each of the two listeners.
pub const SOCKETS_MAX: usize = 8;
/// The byte that carries the sockets, and the confirmation of a successor that serves.
const HERE: &[u8] = b"I";
const SERVING: u8 = b'S';

/// File name of the Unix socket: the configured port stands between these two parts.
const NAME_START: &str = "upgrade-";
const NAME_END: &str = ".sock";

/// The Unix socket on which a process with the configured `port` waits for its successor. Its path may be too
/// long for a Unix socket address, so the socket is addressed through the open directory.
struct HandoverPath {
    dir: File,
    port: u16,
}

impl HandoverPath {
    fn new(dir: &Path, port: u16) -> io::Result<Self> {
        let dir = OpenOptions::new().read(true).custom_flags(nix::libc::O_DIRECTORY).open(dir)?;
        Ok(Self { dir, port })
    }

    fn path(&self) -> PathBuf {
        let dir = self.dir.as_raw_fd();
        format!("/proc/self/fd/{dir}/{NAME_START}{}{NAME_END}", self.port).into()
    }
}

/// Other ports with a Unix socket in `dir`, whose processes run or were killed.
pub fn other_ports(dir: &Path, port: u16) -> Vec<u16> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let port_of = |name: String| name.strip_prefix(NAME_START)?.strip_suffix(NAME_END)?.parse().ok();
    names.filter_map(port_of).filter(|other| *other != port).collect()
}

/// The offer of the sockets to a successor.
pub struct SocketOffer {
    sockets: Vec<OwnedFd>,
    listener: UnixListener,
    place: HandoverPath,
    /// Inode of our Unix socket: a successor replaces the file.
    inode: u64,
}

impl SocketOffer {
    /// Starts to wait for a successor. `port`: the configured port. `sockets`: the listening sockets, at most
    /// [`SOCKETS_MAX`], those of `port` first.
    pub fn offer(dir: &Path, port: u16, sockets: Vec<OwnedFd>) -> io::Result<Self> {
        let place = HandoverPath::new(dir, port)?;
        let path = place.path();
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            // Left by a process that is gone, or in use by our predecessor.
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        std::fs::set_permissions(&path, Permissions::from_mode(0o600))?;
        let inode = std::fs::symlink_metadata(&path)?.ino();
        Ok(Self { sockets, listener, place, inode })
    }

    /// Resolves when a successor has confirmed that it serves.
    pub async fn taken(self) {
        loop {
            let handed = match self.listener.accept().await {
                Ok((stream, _)) => self.hand_to(stream).await,
                Err(e) => {
                    // Without file descriptors, accept would fail again immediately.
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    Err(e)
                }
            };
            match handed {
                Ok(()) => return,
                Err(e) => tracing::warn!(error = %e, "Successor failed; this process keeps serving"),
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

impl Drop for SocketOffer {
    /// Removes the Unix socket, unless a successor has replaced it. Otherwise it looks like a running
    /// process.
    fn drop(&mut self) {
        let path = self.place.path();
        if std::fs::symlink_metadata(&path).is_ok_and(|there| there.ino() == self.inode) {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// The successor's side of a handover, which must still be confirmed.
pub struct Handover(UnixStream);

impl Handover {
    /// Confirms to the predecessor that this process serves.
    pub async fn serves(mut self) -> io::Result<()> {
        self.0.write_u8(SERVING).await
    }
}

/// Asks the process on `port` for its listening sockets, those of `port` first. `None`: there is no such
/// process.
pub async fn inherit(dir: &Path, port: u16) -> io::Result<Option<(Vec<TcpListener>, Handover)>> {
    let place = HandoverPath::new(dir, port)?;
    let stream = match stepped(UnixStream::connect(place.path())).await {
        Ok(stream) => stream,
        // No process has ever waited there, or the process has ended.
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        Err(e) => return Err(e),
    };
    is_own(&stream)?;
    let receive = || received(stream.as_raw_fd());
    let sockets = stepped(stream.async_io(Interest::READABLE, receive)).await?;
    Ok(Some((sockets.into_iter().map(TcpListener::from).collect(), Handover(stream))))
}

fn received(stream: RawFd) -> io::Result<Vec<OwnedFd>> {
    let mut byte = [0];
    let mut into = [IoSliceMut::new(&mut byte)];
    let mut space = cmsg_space!([RawFd; SOCKETS_MAX]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(stream, &mut into, Some(&mut space), flags)?;
    // A truncated message is an error: the connections in the queue of a lost socket would be lost as well.
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control
            && !fds.is_empty()
        {
            #[expect(
                unsafe_code,
                reason = "the kernel has just passed these descriptors, and nix returns them unowned"
            )]
            // SAFETY: they are open, and nothing else owns them.
            return Ok(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect());
        }
    }
    Err(io::ErrorKind::UnexpectedEof.into())
}

/// Rejects peers of other users.
fn is_own(stream: &UnixStream) -> io::Result<()> {
    let is_own = stream.peer_cred()?.uid() == nix::unistd::geteuid().as_raw();
    if is_own { Ok(()) } else { Err(io::ErrorKind::PermissionDenied.into()) }
}

/// Bounds a step by [`STEP_MAX`].
async fn stepped<T>(step: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    timeout(STEP_MAX, step).await.unwrap_or(Err(io::ErrorKind::TimedOut.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::os::unix::net::UnixListener as StdListener;

    const PORT: u16 = 8080;

    fn socket() -> (OwnedFd, std::net::SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        (listener.into(), address)
    }

    /// The protocol of the first version with a handover: at most two sockets, that of `PORT` first, and one
    /// byte in each direction.
    #[tokio::test]
    async fn a_predecessor_of_the_first_version_hands_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("upgrade-8080.sock");
        let listener = StdListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let listener = UnixListener::from_std(listener).unwrap();
        let (sockets, addresses): (Vec<_>, Vec<_>) = [socket(), socket()].into_iter().unzip();
        let predecessor = async {
            let mut stream = listener.accept().await.unwrap().0;
            let fds: Vec<RawFd> = sockets.iter().map(AsRawFd::as_raw_fd).collect();
            let rights = [ControlMessage::ScmRights(&fds)];
            let flags = MsgFlags::empty();
            sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(b"I")], &rights, flags, None).unwrap();
            stream.read_u8().await.unwrap()
        };
        let successor = async {
            let (sockets, heir) = inherit(dir.path(), PORT).await.unwrap().expect("the predecessor waits");
            heir.serves().await.unwrap();
            sockets
        };
        let (confirmation, sockets) = tokio::join!(predecessor, successor);
        assert_eq!(confirmation, b'S');
        let found: Vec<_> = sockets.iter().map(|socket| socket.local_addr().unwrap()).collect();
        assert_eq!(found, addresses);
    }

    #[tokio::test]
    async fn the_most_sockets_are_handed_over_and_the_unix_socket_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (sockets, addresses): (Vec<_>, Vec<_>) = (0..SOCKETS_MAX).map(|_| socket()).unzip();
        let heritage = SocketOffer::offer(dir.path(), PORT, sockets).unwrap();
        assert_eq!((other_ports(dir.path(), 80), other_ports(dir.path(), PORT)), (vec![PORT], vec![]));
        let (sockets, of_successor) = {
            let taken = tokio::join!(heritage.taken(), async {
                let (sockets, heir) = inherit(dir.path(), PORT).await.unwrap().unwrap();
                let of_successor = SocketOffer::offer(dir.path(), PORT, vec![]).unwrap();
                heir.serves().await.unwrap();
                (sockets, of_successor)
            });
            taken.1
        };
        let found: Vec<_> = sockets.iter().map(|socket| socket.local_addr().unwrap()).collect();
        assert_eq!(found, addresses);
        assert_eq!(other_ports(dir.path(), 80), [PORT], "the Unix socket of the successor stays");
        drop(of_successor);
        assert!(other_ports(dir.path(), 80).is_empty());
    }
}
