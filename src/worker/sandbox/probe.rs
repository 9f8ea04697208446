//! Finds out by trial runs what works on this machine.

use super::bubblewrap::HostRoot;
use super::cgroup::Cgroups;
use super::cgroup_tree::{CgroupKind, CgroupTree};
use super::descriptors::Reserved;
use super::launcher::{Enclosed, Isolation, Launcher, RunAs};
use super::obstacles::{self, NO_BWRAP};
use super::process_info::counts_in_namespaces;
use super::seccomp::SyscallFilters;
use super::uplink::Uplink;
use super::view::{SandboxSettings, View};
use crate::config::{Network, SandboxMode};
use nix::unistd::geteuid;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

/// The program of a trial. It exists wherever there is a shell.
const TRIAL_PROGRAM: &str = "/bin/true";
const TRIAL_MEMORY_MB: u64 = 64;
/// Deadline of a trial. It takes 10 ms; the rest is for a busy machine.
const TRIAL_MAX: Duration = Duration::from_secs(30);
/// Where programs of the system are. PATH is not asked: whoever sets it must not replace the sandbox.
const PROGRAM_DIRS: [&str; 5] = ["/usr/bin", "/bin", "/usr/local/bin", "/usr/sbin", "/sbin"];

/// For a worker that is root and whose functions cannot have other users.
const ROOT_NOTE: &str = "functions have the user id of root, without privileges, and only control groups \
                         bound the number of their processes";

/// What was found on this machine.
#[derive(Clone, Debug)]
pub struct SandboxStatus {
    /// Whether functions run in a sandbox.
    pub is_isolated: bool,
    /// Why they do not, although the settings ask for one. A sentence with what to do.
    pub why_not: Option<String>,
    /// What functions reach: less than in the settings if that does not work here, and everything without a
    /// sandbox.
    pub network: Network,
    pub cgroups: CgroupKind,
    /// Whether each slot has a user id of its own.
    pub has_own_users: bool,
    /// What else is missing. Sentences with what to do.
    pub notes: Vec<String>,
}

/// # Errors
/// With [`SandboxMode::Required`]: what is missing, and what to install or set.
pub(super) async fn probe(settings: &SandboxSettings) -> Result<(Launcher, SandboxStatus), String> {
    let mut notes = Vec::new();
    let cgroups = find_cgroups().inspect_err(|why| notes.push(why.clone())).ok();
    let kind = cgroups
        .as_ref()
        .map_or(CgroupKind::None, |cgroups| if cgroups.is_v2() { CgroupKind::V2 } else { CgroupKind::V1 });
    let reserved = Reserved::new().map_err(|e| format!("/dev/null cannot be opened: {e}"))?;
    let work_bytes_max = settings.work_mb_max.saturating_mul(1 << 20);
    let mut launcher = Launcher { isolation: None, cgroups, work_bytes_max, _reserved: reserved };
    let mut status = SandboxStatus {
        is_isolated: false,
        why_not: None,
        network: Network::Full,
        cgroups: kind,
        has_own_users: false,
        notes,
    };
    if settings.mode == SandboxMode::Off {
        return Ok((launcher, status));
    }
    match isolate(&mut launcher, settings).await {
        Ok(note) => status.notes.extend(note),
        Err(why) if settings.mode == SandboxMode::Required => return Err(why),
        Err(why) => {
            status.why_not = Some(why);
            return Ok((launcher, status));
        }
    }
    status.is_isolated = true;
    status.network = settings.network;
    if settings.network == Network::Public
        && let Err(why) = connect(&mut launcher, settings).await
    {
        if settings.mode == SandboxMode::Required {
            return Err(why);
        }
        status.network = Network::None;
        status.notes.push(format!("functions have no network: {why}"));
    }
    let run_as = launcher.isolation.as_ref().map(|isolation| isolation.run_as);
    status.has_own_users = matches!(run_as, Some(RunAs::SlotUser { .. }));
    Ok((launcher, status))
}

fn find_cgroups() -> Result<Arc<Cgroups>, String> {
    let cgroups = Cgroups::new(CgroupTree::find()?).map_err(|e| format!("no control groups: {e}"))?;
    Ok(Arc::new(cgroups))
}

/// Finds the strictest way of isolation that works, and sets it. If none works, resets it. Returns a note if
/// stricter ways exist.
async fn isolate(launcher: &mut Launcher, settings: &SandboxSettings) -> Result<Option<String>, String> {
    let bwrap = program("bwrap").ok_or(NO_BWRAP)?;
    let is_root = geteuid().is_root();
    let mut problem = TrialProblem::default();
    for run_as in ways(is_root, settings.uid_first) {
        launcher.isolation = Some(Isolation {
            bwrap: bwrap.clone(),
            run_as,
            host: HostRoot::find(&settings.hidden_dirs),
            filters: SyscallFilters::compile(launcher.cgroups.is_some())?,
            uplink: None,
        });
        match run_trial(launcher, settings, Network::None).await {
            Ok(()) => {
                let is_root_inside = is_root && matches!(run_as, RunAs::WorkerUser { .. });
                let why = || obstacles::explain(&problem.said, &problem.failed);
                return Ok(is_root_inside.then(|| format!("{ROOT_NOTE}. For other users, {}", why())));
            }
            // The last way asks least of the machine, so what it lacks matters.
            Err(found) => problem = found,
        }
    }
    launcher.isolation = None;
    Err(obstacles::explain(&problem.said, &problem.failed))
}

/// The users that programs may run as, the best first.
fn ways(is_root: bool, uid_first: u32) -> Vec<RunAs> {
    let slot_user = |is_staged| RunAs::SlotUser { uid_first, is_staged };
    // A limit of processes does not bind root.
    let worker_user = |limits_tasks| RunAs::WorkerUser { limits_tasks };
    if is_root {
        return vec![slot_user(true), slot_user(false), worker_user(false)];
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    vec![worker_user(counts_in_namespaces(&release))]
}

/// Finds out whether the network `public` works, and sets it.
async fn connect(launcher: &mut Launcher, settings: &SandboxSettings) -> Result<(), String> {
    let uplink = Arc::new(Uplink::find(program("slirp4netns"))?);
    let Some(isolation) = &mut launcher.isolation else { return Ok(()) };
    isolation.uplink = Some(uplink);
    let tried = run_trial(launcher, settings, Network::Public).await;
    tried.map_err(|TrialProblem { said, failed }| {
        if let Some(isolation) = &mut launcher.isolation {
            isolation.uplink = None;
        }
        obstacles::explain_network(&said, &failed)
    })
}

#[derive(Debug, Default)]
struct TrialProblem {
    /// Standard error of bubblewrap.
    said: String,
    /// What the worker noticed.
    failed: String,
}

/// Runs a program that does nothing.
async fn run_trial(
    launcher: &Launcher,
    settings: &SandboxSettings,
    network: Network,
) -> Result<(), TrialProblem> {
    let failed = |e: io::Error| TrialProblem { said: String::new(), failed: e.to_string() };
    let dir = settings.runs_dir.as_path();
    let view = View { slot: 0, function_dir: dir, tmp_dir: dir, memory_mb: TRIAL_MEMORY_MB, network };
    let enclosed = launcher.enclose(&view, &[TRIAL_PROGRAM.into()], &BTreeMap::new(), None);
    let Enclosed { mut command, setup, mut fence } = enclosed.map_err(failed)?;
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    // SAFETY: it makes system calls only, as it says.
    #[expect(unsafe_code, reason = "descriptors are passed, and the user changed, between fork and exec")]
    unsafe {
        command.pre_exec(move || setup.apply())
    };
    let mut command = tokio::process::Command::from(command);
    let mut child = command.kill_on_drop(true).spawn().map_err(failed)?;
    drop(command);
    let admission = tokio::task::spawn_blocking(move || {
        let admitted = fence.admit();
        (fence, admitted)
    });
    let (_fence, admitted) = admission.await.map_err(|e| failed(io::Error::other(e)))?;
    if admitted.is_err() {
        let _ = child.start_kill();
    }
    let ended = tokio::time::timeout(TRIAL_MAX, child.wait_with_output()).await;
    let output = match ended {
        Ok(output) => output.map_err(failed)?,
        Err(_) => return Err(failed(io::ErrorKind::TimedOut.into())),
    };
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    match admitted {
        Err(e) => Err(TrialProblem { said, failed: e.to_string() }),
        Ok(()) if !output.status.success() => {
            Err(TrialProblem { said, failed: format!("a trial run ended with {}", output.status) })
        }
        Ok(()) => Ok(()),
    }
}

/// A program of the system.
fn program(name: &str) -> Option<PathBuf> {
    PROGRAM_DIRS.iter().map(|dir| Path::new(dir).join(name)).find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_way_is_tried_first() {
        let (root, other) = (ways(true, 100_000), ways(false, 100_000));
        assert_eq!(root[0], RunAs::SlotUser { uid_first: 100_000, is_staged: true });
        assert_eq!(root.last(), Some(&RunAs::WorkerUser { limits_tasks: false }));
        assert!(matches!(other[..], [RunAs::WorkerUser { .. }]), "{other:?}");
    }

    #[tokio::test]
    async fn without_a_sandbox_nothing_is_tried() {
        let scratch = tempfile::tempdir().unwrap();
        let settings = SandboxSettings {
            mode: SandboxMode::Off,
            network: Network::Public,
            work_mb_max: 1,
            uid_first: 100_000,
            runs_dir: scratch.path().to_owned(),
            hidden_dirs: Vec::new(),
        };
        let (launcher, status) = probe(&settings).await.unwrap();
        assert!(launcher.isolation.is_none() && !status.is_isolated && status.why_not.is_none());
        assert_eq!(status.network, Network::Full);
    }
}
