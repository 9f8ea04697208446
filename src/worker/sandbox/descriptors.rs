//! Descriptors that a child process inherits.

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::Instant;

/// Number of the control socket in the program.
pub(super) const CONTROL: RawFd = 3;
/// Number of descriptors that are marked one by one, if the kernel (before 5.11) cannot mark all at once.
const DESCRIPTORS_MAX: RawFd = 65_536;

/// The descriptors that a child inherits besides stdin, stdout and stderr. Here they are closed on drop.
///
/// In this process all are close-on-exec, because another thread may start a program at any time. The mark is
/// removed in the child only.
#[derive(Debug, Default)]
pub(super) struct InheritedFds {
    fds: Vec<OwnedFd>,
    control: Option<OwnedFd>,
}

impl InheritedFds {
    /// Adds a descriptor. Returns its number in the child, which is never [`CONTROL`].
    pub(super) fn add(&mut self, fd: OwnedFd) -> io::Result<RawFd> {
        let fd = elsewhere(fd)?;
        let number = fd.as_raw_fd();
        self.fds.push(fd);
        Ok(number)
    }

    /// Adds a file in memory. Each child needs one of its own, because a reader moves its offset.
    pub(super) fn add_file(&mut self, contents: &[u8]) -> io::Result<RawFd> {
        let mut file = File::from(memfd_create(c"sandbox", MFdFlags::MFD_CLOEXEC)?);
        file.write_all(contents)?;
        file.rewind()?;
        self.add(file.into())
    }

    /// Sets the descriptor that becomes number [`CONTROL`] in the child.
    pub(super) fn set_control(&mut self, fd: OwnedFd) -> io::Result<()> {
        self.control = Some(elsewhere(fd)?);
        Ok(())
    }

    /// Leaves the child these descriptors and the first three. It closes all others when it starts its
    /// program. Called between fork and exec, so this makes system calls only.
    #[expect(unsafe_code, reason = "nix has no dup2 to a descriptor that nobody owns")]
    pub(super) fn pass(&self) -> io::Result<()> {
        close_all_on_exec();
        for fd in &self.fds {
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
        }
        if let Some(control) = &self.control {
            // SAFETY: nothing in the child uses the descriptor that is replaced: see `Reserved`.
            if unsafe { libc::dup2(control.as_raw_fd(), CONTROL) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }
}

/// The descriptor, or a copy of it if its number is [`CONTROL`].
fn elsewhere(fd: OwnedFd) -> io::Result<OwnedFd> {
    if fd.as_raw_fd() == CONTROL { fd.try_clone() } else { Ok(fd) }
}

#[expect(unsafe_code, reason = "the descriptors belong to other parts of the worker")]
fn close_all_on_exec() {
    let first = CONTROL.unsigned_abs();
    // SAFETY: marks close nothing before exec, and this copy of the process starts no other program.
    unsafe {
        if libc::syscall(libc::SYS_close_range, first, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) != 0 {
            for fd in CONTROL..DESCRIPTORS_MAX {
                libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC);
            }
        }
    }
}

/// Keeps the number [`CONTROL`] in use in this process. Otherwise the pipe over which std reports a failed
/// exec could have it, and the child would replace that pipe.
#[derive(Debug)]
pub(super) struct Reserved {
    _file: File,
}

impl Reserved {
    /// The new file has the lowest free number. If that is not [`CONTROL`], another part of this process has
    /// it, such as the runtime, which keeps it.
    pub(super) fn new() -> io::Result<Self> {
        File::open("/dev/null").map(|file| Self { _file: file })
    }
}

/// Blocks until there is something to read, or the other end is closed.
pub(super) fn wait_readable(fd: impl AsFd, deadline: Instant) -> io::Result<()> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        // Rounded up, so that the last round does not spin.
        let timeout = PollTimeout::try_from(left.as_millis() + 1).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(1..) => return Ok(()),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

/// Blocks for about a millisecond. For threads that may block.
pub(super) fn pause() {
    // An interrupted pause is shorter, and that is fine.
    let _ = poll(&mut [], PollTimeout::from(1_u8));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;
    use std::time::Duration;

    #[test]
    fn a_file_is_read_from_its_start_and_is_not_the_control_socket() {
        let mut inherited = InheritedFds::default();
        for contents in [&b""[..], b"text", &[7; 100_000]] {
            let number = inherited.add_file(contents).unwrap();
            assert_ne!(number, CONTROL);
            let mut read = Vec::new();
            File::from(inherited.fds.last().unwrap().try_clone().unwrap()).read_to_end(&mut read).unwrap();
            assert_eq!(read, contents);
            let flags = fcntl(inherited.fds.last().unwrap(), FcntlArg::F_GETFD).unwrap();
            assert_eq!(flags, libc::FD_CLOEXEC, "another thread may start a program now");
        }
    }

    #[test]
    fn waiting_ends_with_data_with_the_last_writer_and_with_the_deadline() {
        let (reader, mut writer) = io::pipe().unwrap();
        let soon = || Instant::now() + Duration::from_millis(20);
        assert_eq!(wait_readable(&reader, soon()).unwrap_err().kind(), io::ErrorKind::TimedOut);
        writer.write_all(b"1").unwrap();
        wait_readable(&reader, Instant::now() + Duration::from_secs(10)).unwrap();
        let (reader, writer) = io::pipe().unwrap();
        drop(writer);
        wait_readable(&reader, Instant::now() + Duration::from_secs(10)).unwrap();
    }
}
