//! The sandbox of a process that runs functions: `worker` and `dev`. Probed at start, and reported.

use crate::backend::{BackendError, StartProblem};
use crate::config::{SandboxConf, SandboxMode};
use crate::metrics::WorkerMetrics;
use crate::worker::{CgroupKind, SLOTS_MAX, Sandbox, SandboxReport, SandboxSettings, SandboxStatus};
use std::path::{Path, PathBuf};

/// Finds out which sandbox this machine can make. `default`: the mode of this command, if `conf` names none.
/// `runs_dir`: the directory of the runs in progress. It exists. `number`: of this worker among those of the
/// machine. `conf_dir`: where its settings are, if not in the working directory.
///
/// # Errors
/// There is none, and functions must not run without one.
pub async fn probed(
    conf: &SandboxConf,
    default: SandboxMode,
    (runs_dir, number): (&Path, u32),
    conf_dir: Option<&Path>,
) -> Result<Sandbox, StartProblem> {
    let settings = SandboxSettings {
        mode: conf.mode.unwrap_or(default),
        network: conf.network,
        work_mb_max: conf.work_mb_max,
        // Workers of one machine have different users.
        uid_first: conf.uid_first.saturating_add(number.saturating_mul(SLOTS_MAX)),
        runs_dir: runs_dir.to_owned(),
        hidden_dirs: hidden_dirs(runs_dir, conf_dir),
    };
    Sandbox::probe(&settings).await.map_err(|problem| StartProblem {
        what: "the sandbox of functions".to_owned(),
        error: BackendError::Invalid(problem.trim_end_matches('.').to_owned()),
        remedy: "To run functions without it, set sandbox.mode = \"if-available\" in worker.toml.".to_owned(),
    })
}

/// The directories with the secrets and the data of this process.
fn hidden_dirs(runs_dir: &Path, conf_dir: Option<&Path>) -> Vec<PathBuf> {
    let own = [std::env::current_dir().ok(), std::env::home_dir(), runs_dir.parent().map(Path::to_owned)];
    own.into_iter().chain([conf_dir.map(Path::to_owned)]).flatten().collect()
}

/// Reports the sandbox in the log and in the metrics, and returns what `/health` shows. Without a sandbox,
/// standard error says so as well: nobody should find that out from a log afterwards.
pub fn report(status: &SandboxStatus, metrics: &WorkerMetrics) -> SandboxReport {
    let report = SandboxReport {
        is_isolated: status.is_isolated,
        why_not: status.why_not.clone(),
        network: status.network.name(),
        cgroups: match status.cgroups {
            CgroupKind::V2 => "v2",
            CgroupKind::V1 => "v1",
            CgroupKind::None => "none",
        },
    };
    let SandboxReport { network, cgroups, .. } = report;
    metrics.show_sandbox(report.is_isolated, network, cgroups);
    for note in &status.notes {
        tracing::warn!(note, "The sandbox of functions lacks something that it could have");
    }
    if report.is_isolated {
        tracing::info!(network, cgroups, ownUid = status.has_own_users, "Functions run in a sandbox");
    } else {
        let why = status.why_not.as_deref().unwrap_or("it is turned off");
        tracing::warn!(
            why,
            "Functions run WITHOUT a sandbox: they can read and change what this user can. Run only code \
             that you trust"
        );
        eprintln!(
            "infra-controller: functions run WITHOUT a sandbox ({}). Run only code that you trust.",
            why.trim_end_matches('.')
        );
    }
    report
}
