//! How a process hands its listening sockets to its successor, so that a restart drops no request.
//!
//! The running process waits at a Unix socket in `STATE_DIR`. Its successor, once it is connected to everything, asks
//! there for the listening sockets, begins to accept on those that it wants ([`super::sockets`]), and says so; only
//! then the first one drains. Both share a socket and its queue of connections, so none is lost in between. (Two sockets
//! of one address with SO_REUSEPORT were rejected: what waits in the queue of one that closes is reset.) A successor that
//! fails before that is as if it had never been.
//!
//! On the wire: one byte ([`HERE`]) with the sockets one way, one byte ([`SERVING`]) the other way. What a
//! socket is for is not said: the successor knows it by its address. So processes that hand over other
//! sockets understand each other.

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

/// How long the other side may take for a step.
const STEP_MAX: Duration = Duration::from_secs(10);
/// After a successor that could not be let in.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
/// Most sockets that are handed over: for each of the two listeners an address that is made of several.
pub const SOCKETS_MAX: usize = 8;
/// What goes with the sockets, and what a successor says when it serves.
const HERE: &[u8] = b"I";
const SERVING: u8 = b'S';

/// The names of the places where processes wait: this and the port as it is configured.
const NAME_START: &str = "upgrade-";
const NAME_END: &str = ".sock";

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
        let dir = self.dir.as_raw_fd();
        format!("/proc/self/fd/{dir}/{NAME_START}{}{NAME_END}", self.port).into()
    }
}

/// The other ports whose processes wait under `dir`, or waited there when they were killed.
pub fn other_ports(dir: &Path, port: u16) -> Vec<u16> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let port_of = |name: String| name.strip_prefix(NAME_START)?.strip_suffix(NAME_END)?.parse().ok();
    names.filter_map(port_of).filter(|other| *other != port).collect()
}

/// Waits for a successor.
pub struct Heritage {
    sockets: Vec<OwnedFd>,
    listener: UnixListener,
    place: Place,
    /// The file of our place: a successor puts its own there.
    inode: u64,
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
        let inode = std::fs::symlink_metadata(&path)?.ino();
        Ok(Self { sockets, listener, place, inode })
    }

    /// Resolves when a successor serves.
    pub async fn taken(self) {
        loop {
            let handed = match self.listener.accept().await {
                Ok((stream, _)) => self.hand_to(stream).await,
                Err(e) => {
                    // Without file descriptors it fails again at once.
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    Err(e)
                }
            };
            match handed {
                Ok(()) => return,
                Err(e) => tracing::warn!(error = %e, "Successor Failed, This Process Goes On"),
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

impl Drop for Heritage {
    /// A place where nobody waits would look like a process that goes on.
    fn drop(&mut self) {
        let path = self.place.path();
        if std::fs::symlink_metadata(&path).is_ok_and(|there| there.ino() == self.inode) {
            let _ = std::fs::remove_file(path);
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
    // Truncated it is an error: a socket that nobody has would lose what waits in its queue.
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

    /// What the first version that hands sockets over says: two of them at most, that of `PORT` first, and
    /// one byte each way.
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
            let (sockets, heir) = inherit(dir.path(), PORT).await.unwrap().expect("somebody waits");
            heir.serves().await.unwrap();
            sockets
        };
        let (said, sockets) = tokio::join!(predecessor, successor);
        assert_eq!(said, b'S');
        let found: Vec<_> = sockets.iter().map(|socket| socket.local_addr().unwrap()).collect();
        assert_eq!(found, addresses);
    }

    #[tokio::test]
    async fn as_many_as_may_be_are_handed_over_and_the_place_goes_with_its_process() {
        let dir = tempfile::tempdir().unwrap();
        let (sockets, addresses): (Vec<_>, Vec<_>) = (0..SOCKETS_MAX).map(|_| socket()).unzip();
        let heritage = Heritage::offer(dir.path(), PORT, sockets).unwrap();
        assert_eq!((other_ports(dir.path(), 80), other_ports(dir.path(), PORT)), (vec![PORT], vec![]));
        let (sockets, of_successor) = {
            let taken = tokio::join!(heritage.taken(), async {
                let (sockets, heir) = inherit(dir.path(), PORT).await.unwrap().unwrap();
                let of_successor = Heritage::offer(dir.path(), PORT, vec![]).unwrap();
                heir.serves().await.unwrap();
                (sockets, of_successor)
            });
            taken.1
        };
        let found: Vec<_> = sockets.iter().map(|socket| socket.local_addr().unwrap()).collect();
        assert_eq!(found, addresses);
        assert_eq!(other_ports(dir.path(), 80), [PORT], "the successor's place stays");
        drop(of_successor);
        assert!(other_ports(dir.path(), 80).is_empty());
    }
}
