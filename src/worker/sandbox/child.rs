//! What a child process does between fork and exec, before it becomes the program.

use super::descriptors::InheritedFds;
use super::view::TASKS_MAX;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Uid, getppid, setgroups, setresgid, setresuid, write};
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io;

/// Where the function directory is for the child of a worker that is root: here every user can reach it. It
/// exists on each system, because bubblewrap needs it too. Only the child sees this.
pub(super) const STAGE_DIR: &CStr = c"/tmp";

/// What a child sets up for itself. It owns descriptors that the child inherits.
///
/// Call [`Self::apply`] in the child after everything else that happens between fork and exec. Drop it in the
/// worker after the spawn, by dropping the command whose `pre_exec` owns it. Otherwise the worker does not
/// notice if the child ends early.
#[derive(Debug, Default)]
pub struct ChildSetup {
    pub(super) inherited: InheritedFds,
    /// Where it joins its control groups.
    pub(super) groups: Vec<File>,
    /// Most bytes of a file that it writes.
    pub(super) file_bytes_max: Option<u64>,
    pub(super) open_files_max: Option<u64>,
    /// `None`: it stays the user that the worker is.
    pub(super) user: Option<ChildUser>,
}

/// The user that a child becomes, if the worker is root.
#[derive(Debug)]
pub(super) struct ChildUser {
    /// User and group id.
    pub(super) id: u32,
    /// The directory that this user finds at [`STAGE_DIR`], although it cannot reach the real path.
    pub(super) stage: Option<CString>,
    /// Whether it is killed when the *thread* that started it ends.
    pub(super) dies_with_parent: bool,
}

impl ChildSetup {
    /// # Errors
    /// Then the program must not start.
    ///
    /// Only async-signal-safe calls are allowed here: this makes system calls, and neither allocates nor
    /// locks.
    pub fn apply(&self) -> io::Result<()> {
        // A bubblewrap that is setuid root would own the namespaces. With this it runs as the user.
        prctl::set_no_new_privs()?;
        for group in &self.groups {
            // `0` is the process that writes.
            write(group, b"0")?;
        }
        if let Some(bytes) = self.file_bytes_max {
            lower(Resource::RLIMIT_FSIZE, bytes)?;
        }
        if let Some(files) = self.open_files_max {
            lower(Resource::RLIMIT_NOFILE, files)?;
        }
        if let Some(user) = &self.user {
            user.become_it()?;
        }
        self.inherited.pass()
    }
}

impl ChildUser {
    fn become_it(&self) -> nix::Result<()> {
        let parent = getppid();
        if let Some(dir) = &self.stage {
            let none: Option<&CStr> = None;
            unshare(CloneFlags::CLONE_NEWNS)?;
            mount(none, c"/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
            mount(Some(dir.as_c_str()), STAGE_DIR, none, MsFlags::MS_BIND, none)?;
        }
        // It counts all processes of the user, so it needs a user of its own, and it does not bind root.
        lower(Resource::RLIMIT_NPROC, TASKS_MAX)?;
        let (user, group) = (Uid::from_raw(self.id), Gid::from_raw(self.id));
        setgroups(&[])?;
        setresgid(group, group, group)?;
        setresuid(user, user, user)?;
        if self.dies_with_parent {
            // The change of the user has removed it.
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            if getppid() != parent {
                return Err(Errno::ESRCH);
            }
        }
        Ok(())
    }
}

/// Sets a limit of this process, and makes it final. A lower one stays.
pub(in crate::worker) fn lower(resource: Resource, to: u64) -> nix::Result<()> {
    let (_, hard) = getrlimit(resource)?;
    let to = to.min(hard);
    setrlimit(resource, to, to)
}
