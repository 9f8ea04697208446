//! The first process inside of a sandbox, as the worker sees it.

use super::descriptors::{pause, wait_readable};
use super::view::TASKS_MAX;
use nix::fcntl::{OFlag, openat};
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::sys::stat::{Mode, fstat};
use nix::unistd::Pid;
use serde::Deserialize;
use std::ffi::CStr;
use std::fs;
use std::io::{self, PipeReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::time::Instant;

/// Most bytes that bubblewrap writes about a sandbox.
const INFO_BYTES_MAX: usize = 4_096;

/// The first process inside of a sandbox: process 1 of its PID namespace.
#[derive(Debug)]
pub(super) struct SandboxProcess {
    pub(super) pid: i32,
    /// Its directory in `/proc`. Once the process has ended, nothing is found in it, even if its id is
    /// reused.
    proc_dir: OwnedFd,
}

/// What bubblewrap writes to `--info-fd`.
#[derive(Deserialize)]
struct SandboxInfo {
    #[serde(rename = "child-pid")]
    pid: i32,
}

impl SandboxProcess {
    /// Blocks until bubblewrap has created the process.
    ///
    /// # Errors
    /// If bubblewrap ends before that. Its standard error has the reason.
    pub(super) fn find(info: &mut PipeReader, deadline: Instant) -> io::Result<Self> {
        let mut text = Vec::new();
        let mut chunk = [0; 1_024];
        while !text.contains(&b'}') {
            wait_readable(&*info, deadline)?;
            let read = info.read(&mut chunk)?;
            if read == 0 || text.len() > INFO_BYTES_MAX {
                return Err(io::Error::other("bubblewrap ended before the sandbox was set up"));
            }
            text.extend_from_slice(&chunk[..read]);
        }
        let pid = serde_json::from_slice::<SandboxInfo>(&text)?.pid;
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let proc_dir = nix::fcntl::open(format!("/proc/{pid}").as_str(), flags, Mode::empty())?;
        Ok(Self { pid, proc_dir })
    }

    /// One of its namespaces, such as `ns/net`.
    pub(super) fn namespace(&self, name: &CStr) -> io::Result<OwnedFd> {
        Ok(openat(&self.proc_dir, name, OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty())?)
    }

    /// Blocks until its root is the sandbox, with all mounts. Returns its `/tmp`, which stays readable when
    /// the process has ended.
    ///
    /// Before, its root is that of the host, and then a directory of bubblewrap.
    pub(super) fn wait_for_tmp(&self, deadline: Instant) -> io::Result<OwnedFd> {
        let host = fs::metadata("/")?.dev();
        loop {
            // The namespaces of a process that is being set up may not be open to its own user yet.
            if let Ok(root) = open_dir(&self.proc_dir, c"root")
                && fstat(&root)?.st_dev != host
                && open_dir(&root, c"function").is_ok()
            {
                return Ok(open_dir(&root, c"tmp")?);
            }
            if !self.is_alive() {
                return Err(io::Error::other("bubblewrap ended while it set up the sandbox"));
            }
            if Instant::now() >= deadline {
                return Err(io::ErrorKind::TimedOut.into());
            }
            pause();
        }
    }

    fn is_alive(&self) -> bool {
        openat(&self.proc_dir, c"stat", OFlag::O_RDONLY | OFlag::O_CLOEXEC, Mode::empty()).is_ok()
    }

    /// Bounds its processes and threads, and those that it starts.
    ///
    /// From Linux 5.14 the limit counts within the user namespace. Before, it counts all processes of the
    /// user: see [`counts_in_namespaces`].
    #[expect(unsafe_code, reason = "nix has no limits of other processes")]
    pub(super) fn limit_tasks(&self) -> io::Result<()> {
        let limit = libc::rlimit { rlim_cur: TASKS_MAX, rlim_max: TASKS_MAX };
        let (resource, old) = (libc::RLIMIT_NPROC, std::ptr::null_mut());
        // SAFETY: the limit is a live value, and the old one is not asked for.
        let done = unsafe { libc::prlimit(self.pid, resource, &raw const limit, old) };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    /// Kills the sandbox, if it lives.
    pub(super) fn kill(&self) {
        if self.is_alive() {
            let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
        }
    }
}

fn open_dir(dir: &OwnedFd, name: &CStr) -> nix::Result<OwnedFd> {
    openat(dir, name, OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
}

/// Whether the kernel counts processes in each user namespace: from Linux 5.14. `release`: as `uname -r`.
pub(super) fn counts_in_namespaces(release: &str) -> bool {
    let mut numbers = release.split(['.', '-']).map(|number| number.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (5, 14)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::time::Duration;

    #[test]
    fn the_process_is_found_or_bubblewrap_has_ended() {
        let us = std::process::id();
        let written = [
            (format!("{{\n    \"child-pid\": {us},\n    \"net-namespace\": 4026532184\n}}\n"), true),
            ("{\n    \"child-pid\": ".to_owned(), false),
            (String::new(), false),
            ("{}".to_owned(), false),
            ("x".repeat(3 * INFO_BYTES_MAX), false),
        ];
        for (text, is_found) in written {
            let (mut reader, mut writer) = io::pipe().unwrap();
            writer.write_all(text.as_bytes()).unwrap();
            drop(writer);
            let found = SandboxProcess::find(&mut reader, Instant::now() + Duration::from_secs(10));
            assert_eq!(found.as_ref().is_ok_and(SandboxProcess::is_alive), is_found, "{text}: {found:?}");
        }
    }

    #[test]
    fn a_process_that_has_ended_is_not_another_one() {
        let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
        let (mut reader, mut writer) = io::pipe().unwrap();
        write!(writer, "{{\"child-pid\": {}}}", child.id()).unwrap();
        let process = SandboxProcess::find(&mut reader, Instant::now() + Duration::from_secs(10)).unwrap();
        assert!(process.is_alive());
        process.kill();
        child.wait().unwrap();
        assert!(!process.is_alive() && process.namespace(c"ns/net").is_err());
    }

    #[test]
    fn releases_are_compared() {
        for (release, expected) in [
            ("6.18.44-fc-v782", true),
            ("5.14.0-427.el9.x86_64", true),
            ("5.13.19", false),
            ("5.4", false),
            ("4.18.0-553", false),
            ("7", true),
            ("", false),
        ] {
            assert_eq!(counts_in_namespaces(release), expected, "{release}");
        }
    }
}
