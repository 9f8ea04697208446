//! Builds the command of an instance.

use super::bubblewrap::{self, HostRoot, SandboxPlan};
use super::cgroup::{Cgroups, RunCgroup};
use super::child::{ChildSetup, ChildUser, STAGE_DIR};
use super::descriptors::{InheritedFds, Reserved};
use super::fence::{Admission, Fence, PublicNetwork, TmpDir};
use super::seccomp::SyscallFilters;
use super::uplink::{self, Uplink};
use super::view::{FUNCTION_DIR, View};
use crate::config::Network;
use std::collections::BTreeMap;
use std::ffi::{CString, OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

/// A command to spawn, and what must live as long as its process.
///
/// Between fork and exec call `setup.apply()` as the last step. Then spawn, drop the command, and call
/// [`Fence::admit`] before the program gets anything to do.
pub struct Enclosed {
    /// Standard input, output and error are left to the caller.
    pub command: Command,
    pub setup: ChildSetup,
    pub fence: Fence,
}

/// As which user the programs of a worker run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RunAs {
    /// Each slot has a user of its own. For a worker that is root.
    SlotUser {
        uid_first: u32,
        /// Whether the function directory is bound to where its user can reach it. Otherwise all users must
        /// be able to reach it where it is.
        is_staged: bool,
    },
    /// The user of the worker. `limits_tasks`: whether a limit of processes counts those of a sandbox only.
    WorkerUser { limits_tasks: bool },
}

/// How bubblewrap is run here.
#[derive(Debug)]
pub(super) struct Isolation {
    pub(super) bwrap: PathBuf,
    pub(super) run_as: RunAs,
    pub(super) host: HostRoot,
    pub(super) filters: SyscallFilters,
    /// `None`: the network `public` does not work here.
    pub(super) uplink: Option<Arc<Uplink>>,
}

/// Builds the commands of instances.
#[derive(Debug)]
pub(super) struct Launcher {
    /// `None`: without a sandbox.
    pub(super) isolation: Option<Isolation>,
    pub(super) cgroups: Option<Arc<Cgroups>>,
    /// Size of `/tmp`, and most bytes of a file.
    pub(super) work_bytes_max: u64,
    pub(super) _reserved: Reserved,
}

impl Launcher {
    pub(super) fn enclose(
        &self,
        view: &View<'_>,
        program: &[OsString],
        env: &BTreeMap<String, String>,
        control: Option<OwnedFd>,
    ) -> io::Result<Enclosed> {
        let (path, args) = program.split_first().ok_or_else(|| invalid("there is no program"))?;
        let group = self.cgroups.as_ref().map(|cgroups| cgroups.create(view.memory_mb)).transpose()?;
        let groups = group.as_ref().map_or(Ok(Vec::new()), RunCgroup::entrances)?;
        let mut inherited = InheritedFds::default();
        if let Some(control) = control {
            inherited.set_control(control)?;
        }
        let Some(isolation) = &self.isolation else {
            let mut command = Command::new(path);
            command.args(args).env_clear().envs(env).current_dir(view.function_dir);
            let tmp = TmpDir::OnHost(view.tmp_dir.to_owned());
            let fence = Fence { group, admission: None, tmp, uplink: None, release: None };
            return Ok(Enclosed { command, setup: self.setup(inherited, groups, None), fence });
        };
        let user = isolation.run_as.user(view.slot)?;
        let (info, info_of_child) = io::pipe()?;
        let (block_of_child, release) = io::pipe()?;
        let ends = (inherited.add(info_of_child.into())?, inherited.add(block_of_child.into())?);
        let network = isolation.public_network(view.network, user)?;
        let plan = isolation.plan(view, Path::new(path), env, network.as_ref(), ends, self.work_bytes_max)?;
        let arguments = bubblewrap::arguments(&isolation.host, &plan, &mut inherited)?;
        let arguments = inherited.add_file(&arguments)?;
        let mut command = Command::new(&isolation.bwrap);
        command.arg("--args").arg(arguments.to_string()).arg("--").arg(path).args(args).env_clear();
        // It exists, whatever the directory of the worker is for the user of the slot.
        command.current_dir("/");
        let limits_tasks = matches!(isolation.run_as, RunAs::WorkerUser { limits_tasks: true });
        let admission = Some(Admission { info, limits_tasks, network });
        let fence = Fence { group, admission, tmp: TmpDir::Unknown, uplink: None, release: Some(release) };
        let user = user.map(|id| isolation.run_as.child_user(id, view.function_dir)).transpose()?;
        Ok(Enclosed { command, setup: self.setup(inherited, groups, user), fence })
    }

    fn setup(&self, inherited: InheritedFds, groups: Vec<File>, user: Option<ChildUser>) -> ChildSetup {
        let file_bytes_max = Some(self.work_bytes_max);
        ChildSetup { inherited, groups, file_bytes_max, open_files_max: None, user }
    }
}

impl RunAs {
    /// The user id of a slot, if it has one of its own.
    fn user(self, slot: u32) -> io::Result<Option<u32>> {
        match self {
            Self::WorkerUser { .. } => Ok(None),
            Self::SlotUser { uid_first, .. } => {
                // The last id is the one that changes nothing.
                let id = uid_first.checked_add(slot).filter(|id| *id != 0 && *id != u32::MAX);
                id.map(Some).ok_or_else(|| invalid("there are no user ids left; lower uid_first"))
            }
        }
    }

    fn child_user(self, id: u32, function_dir: &Path) -> io::Result<ChildUser> {
        let stage = self.is_staged().then(|| CString::new(function_dir.as_os_str().as_bytes()));
        Ok(ChildUser { id, stage: stage.transpose()?, dies_with_parent: true })
    }

    fn is_staged(self) -> bool {
        matches!(self, Self::SlotUser { is_staged: true, .. })
    }
}

impl Isolation {
    fn public_network(&self, network: Network, user: Option<u32>) -> io::Result<Option<PublicNetwork>> {
        match (network, &self.uplink) {
            (Network::None | Network::Full, _) => Ok(None),
            (Network::Public, Some(uplink)) => {
                Ok(Some(PublicNetwork { uplink: Arc::clone(uplink), resolvers: uplink::resolvers(), user }))
            }
            (Network::Public, None) => Err(invalid("the network `public` does not work on this machine")),
        }
    }

    /// `ends`: the descriptors of `--info-fd` and `--block-fd`.
    fn plan<'a>(
        &'a self,
        view: &View<'a>,
        program: &Path,
        env: &'a BTreeMap<String, String>,
        network: Option<&'a PublicNetwork>,
        (info, block): (i32, i32),
        tmp_bytes: u64,
    ) -> io::Result<SandboxPlan<'a>> {
        // A compiled function is a program of its own code.
        if !program.starts_with(FUNCTION_DIR) && !self.host.shows(program) {
            let program = program.display();
            return Err(invalid(&format!("{program} is not in the sandbox, which shows /usr only")));
        }
        let stage = Path::new(OsStr::from_bytes(STAGE_DIR.to_bytes()));
        Ok(SandboxPlan {
            function_dir: if self.run_as.is_staged() { stage } else { view.function_dir },
            network: view.network,
            resolvers: network.map_or(&[][..], |network| &network.resolvers[..]),
            tmp_bytes,
            filters: self.filters.programs(),
            env,
            info,
            block,
        })
    }
}

fn invalid(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_has_a_user_unless_the_worker_is_not_root() {
        let slots = |uid_first| RunAs::SlotUser { uid_first, is_staged: true };
        for (run_as, slot, expected) in [
            (slots(100_000), 0, Ok(Some(100_000))),
            (slots(100_000), 7, Ok(Some(100_007))),
            (slots(0), 0, Err(())),
            (slots(u32::MAX - 1), 1, Err(())),
            (slots(u32::MAX - 1), 2, Err(())),
            (RunAs::WorkerUser { limits_tasks: true }, 7, Ok(None)),
        ] {
            assert_eq!(run_as.user(slot).map_err(drop), expected, "{run_as:?}, {slot}");
        }
    }

    #[test]
    fn without_isolation_a_program_runs_as_it_is() {
        let launcher = Launcher {
            isolation: None,
            cgroups: None,
            work_bytes_max: 1 << 20,
            _reserved: Reserved::new().unwrap(),
        };
        let scratch = tempfile::tempdir().unwrap();
        let view = View {
            slot: 0,
            function_dir: scratch.path(),
            tmp_dir: scratch.path(),
            memory_mb: 64,
            network: Network::Full,
        };
        let env = BTreeMap::from([("A".to_owned(), "b".to_owned())]);
        let enclosed = launcher.enclose(&view, &["/bin/sh".into(), "-c".into()], &env, None).unwrap();
        let Enclosed { command, mut fence, .. } = enclosed;
        assert_eq!(command.get_program(), "/bin/sh");
        assert_eq!(command.get_current_dir(), Some(scratch.path()));
        assert_eq!(command.get_envs().count(), 1);
        fence.admit().unwrap();
        fence.limit(32).unwrap();
        assert!(fence.cpu_time().is_none() && !fence.is_out_of_memory() && fence.tmp_dir().is_ok());
        assert!(launcher.enclose(&view, &[], &env, None).is_err());
    }
}
