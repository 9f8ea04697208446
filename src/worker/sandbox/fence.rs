//! What surrounds one instance from outside: its control group, its network, and its files.

use super::cgroup::RunCgroup;
use super::process_info::SandboxProcess;
use super::uplink::{Uplink, UplinkProcess};
use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Write};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Deadline for all that happens before a program may start. It takes some milliseconds, or ten with the
/// network `public`; the rest is for a busy machine.
const ADMISSION_MAX: Duration = Duration::from_secs(10);

/// What surrounds one instance. It must live as long as the processes of the instance. Dropping it ends the
/// network, and kills the processes that are left in the control group.
#[derive(Debug)]
pub struct Fence {
    // They are dropped in this order: the last process of the group, then the group, then the rest.
    pub(super) uplink: Option<UplinkProcess>,
    pub(super) group: Option<RunCgroup>,
    /// The program starts when this is written to, but also when it is closed. So it stays open if something
    /// fails.
    pub(super) release: Option<PipeWriter>,
    /// `None`: without a sandbox, and after the admission.
    pub(super) admission: Option<Admission>,
    pub(super) tmp: TmpDir,
}

/// What is left to do when bubblewrap has started.
#[derive(Debug)]
pub(super) struct Admission {
    pub(super) info: PipeReader,
    /// Whether the limit of processes is set from outside.
    pub(super) limits_tasks: bool,
    pub(super) network: Option<PublicNetwork>,
}

/// How an instance gets the network `public`.
#[derive(Debug)]
pub(super) struct PublicNetwork {
    pub(super) uplink: Arc<Uplink>,
    pub(super) resolvers: Vec<Ipv4Addr>,
    pub(super) user: Option<u32>,
}

/// The directory that the program has as `/tmp`.
#[derive(Debug)]
pub(super) enum TmpDir {
    /// Without a sandbox.
    OnHost(PathBuf),
    /// Not admitted yet.
    Unknown,
    InSandbox(OwnedFd),
}

impl Fence {
    /// Lets the program start: waits for its sandbox, sets the limits, and connects the network. Call it once
    /// after the spawn, when the command is dropped. Blocks for some milliseconds.
    ///
    /// # Errors
    /// Then the program is killed and never runs. The standard error of the child may have the reason.
    pub fn admit(&mut self) -> io::Result<()> {
        let Some(mut admission) = self.admission.take() else { return Ok(()) };
        let deadline = Instant::now() + ADMISSION_MAX;
        let process = SandboxProcess::find(&mut admission.info, deadline)?;
        let admitted = self.prepare(&process, admission, deadline);
        if admitted.is_err() {
            process.kill();
        }
        admitted
    }

    fn prepare(
        &mut self,
        process: &SandboxProcess,
        admission: Admission,
        deadline: Instant,
    ) -> io::Result<()> {
        self.tmp = TmpDir::InSandbox(process.wait_for_tmp(deadline)?);
        if admission.limits_tasks {
            process.limit_tasks()?;
        }
        if let Some(PublicNetwork { uplink, resolvers, user }) = admission.network {
            let groups = self.entrances()?;
            self.uplink = Some(uplink.connect(process, &resolvers, groups, user, deadline)?);
        }
        match self.release.take() {
            Some(mut release) => release.write_all(b"1"),
            None => Ok(()),
        }
    }

    fn entrances(&self) -> io::Result<Vec<File>> {
        self.group.as_ref().map_or(Ok(Vec::new()), RunCgroup::entrances)
    }

    /// Sets the memory of the instance, in MiB, when it gets a job. Without control groups this does nothing.
    pub fn limit(&self, memory_mb: u64) -> io::Result<()> {
        self.group.as_ref().map_or(Ok(()), |group| group.limit(memory_mb))
    }

    /// Whether the kernel has killed a process of the instance for its memory. Takes some microseconds.
    pub fn is_out_of_memory(&self) -> bool {
        self.group.as_ref().and_then(RunCgroup::oom_kills).is_some_and(|kills| kills > 0)
    }

    /// The number of processes of the instance, with those of its sandbox. Takes some microseconds. `None`:
    /// nothing counts them.
    pub fn processes(&self) -> Option<usize> {
        self.group.as_ref()?.processes()
    }

    /// The CPU time of the instance since its start. Takes some microseconds. `None`: nothing measures it.
    pub fn cpu_time(&self) -> Option<Duration> {
        self.group.as_ref()?.cpu_time()
    }

    /// The `/tmp` of the program, opened with `O_PATH`. Its files can be read until this and the fence are
    /// dropped, also when the program has ended. The program may have put links and devices into it: follow
    /// none (`RESOLVE_NO_SYMLINKS`), and read regular files only.
    ///
    /// # Errors
    /// Before [`Self::admit`].
    pub fn tmp_dir(&self) -> io::Result<File> {
        use std::os::unix::fs::OpenOptionsExt;
        match &self.tmp {
            TmpDir::InSandbox(dir) => Ok(dir.try_clone()?.into()),
            TmpDir::Unknown => Err(io::Error::other("the sandbox is not set up yet")),
            TmpDir::OnHost(dir) => {
                let flags = nix::libc::O_PATH | nix::libc::O_DIRECTORY | nix::libc::O_NOFOLLOW;
                File::options().read(true).custom_flags(flags).open(dir)
            }
        }
    }
}
