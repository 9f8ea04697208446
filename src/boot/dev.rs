//! The `dev` command: the whole platform in one process, with the embedded backend and a local worker.

use super::plan::{
    BackendLoop, ConnectedBackend, Exit, NodePlan, NodeSettings, SPOOL, TracePlan, explain, refuse,
};
use super::{ConfSource, isolation, node};
use crate::backend::embedded::{self, LocalWork};
use crate::backend::{BackendError, StartProblem, make_empty_dir};
use crate::config::{
    AiNode, ConfFiles, ConfigError, FileReader, Live, RunEnv, SandboxMode, Secret, TraceExport, WorkerConf,
    api_key_problem, master_key_warning, rate_limit_from_process, text, unreadable_variables,
};
use crate::gateway::Pseudonym;
use crate::traces::Destination;
use crate::worker::{Worker, WorkerParts, on_path};
use std::fs;
use std::io::{self, IsTerminal, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

const KEY_FILE: &str = "api-key";
const KEY_READ_MAX: Duration = Duration::from_secs(5);
/// Subdirectory of the data directory for unpacked code.
const CODE_CACHE: &str = "code-cache";

/// Command-line arguments of `dev`.
pub struct DevArgs {
    pub port: u16,
    pub data_dir: PathBuf,
    /// `None`: the loopback addresses only, because `dev` is for one developer, whose key allows to run code.
    pub listen: Option<IpAddr>,
    pub conf: Option<PathBuf>,
}

pub fn dev(args: DevArgs) -> Exit {
    // Listen on both families: `localhost` is 127.0.0.1 or ::1, depending on the client.
    let listen_beside = args.listen.is_none().then_some(Ipv6Addr::LOCALHOST);
    let listen = args.listen.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    let unreadable = unreadable_variables(std::env::vars_os());
    if !unreadable.is_empty() {
        return refuse(&ConfigError(unreadable));
    }
    let (a_minute, mut warnings) = match rate_limit_from_process() {
        Ok(read) => read,
        Err(problem) => return refuse(&problem),
    };
    let run = match RunEnv::from_process() {
        Ok(run) => run,
        Err(problem) => return refuse(&problem),
    };
    let RunEnv { ai_endpoint, output_bytes_max } = run;
    let (dir, files, listen) = (args.conf, ConfFiles::All, Some(listen));
    let mut source = ConfSource { dir, files, a_minute, listen, master_key_bytes: 0, output_bytes_max };
    let (texts, conf) = match source.load() {
        Ok(loaded) => loaded,
        Err(e) => return refuse(&e),
    };
    let (api_key, shown) = match api_key(&args.data_dir) {
        Ok(key) => key,
        Err(problem) => return explain(&[problem]),
    };
    if let Some(problem) = api_key_problem(api_key.reveal()) {
        return refuse(&ConfigError(vec![problem.to_owned()]));
    }
    // The length is not known before: a key is created only after the settings were found valid.
    source.master_key_bytes = api_key.reveal().len();
    if let Err(problem) = source.check_master_key(&texts, &conf) {
        return refuse(&problem);
    }
    warnings.extend(master_key_warning(api_key.reveal()));
    warnings.extend(source.warnings());
    let (ai_node, traces) = match addresses(&mut warnings) {
        Ok(addresses) => addresses,
        Err(problem) => return refuse(&problem),
    };
    let banner = format!(
        "\nInfra Controller is ready: {{url}}\n  API key: {shown}\n  data:    {}\n  stop:    Ctrl-C\n",
        args.data_dir.display(),
    );
    let worker = Live::new(conf.worker.clone());
    let of_worker = DevWorker { conf_dir: source.dir.clone(), settings: worker.clone(), ai_endpoint };
    let connect = Box::new(move || Box::pin(open(args.data_dir, of_worker, warnings)) as _);
    let settings = NodeSettings {
        conf,
        source,
        texts,
        port: args.port,
        // No handover: the data directory belongs to one process.
        meet_in: None,
        is_upgrade: false,
        api_key,
        pseudonym: Pseudonym::of(&rand::random::<[u8; 16]>()),
        ai_node,
        traces,
        worker: Some(worker),
        listen_beside,
        banner: Some(banner),
    };
    node::run(NodePlan { settings, connect })
}

/// The model catalogue and the collector of spans, if the environment names them.
fn addresses(warnings: &mut Vec<String>) -> Result<(Option<AiNode>, Option<TracePlan>), ConfigError> {
    let (ai_node, of_ai_node) = AiNode::from_process()?;
    let (export, of_traces) = TraceExport::from_process()?;
    warnings.extend(of_ai_node.into_iter().chain(of_traces));
    Ok((ai_node, export.map(|export| TracePlan { export, destination: Destination::embedded() })))
}

/// What the worker of this process needs beside its jobs.
struct DevWorker {
    conf_dir: Option<PathBuf>,
    settings: Live<WorkerConf>,
    ai_endpoint: Option<String>,
}

async fn open(
    dir: PathBuf,
    of_worker: DevWorker,
    warnings: Vec<String>,
) -> Result<ConnectedBackend, Vec<StartProblem>> {
    let DevWorker { conf_dir, settings, ai_endpoint } = of_worker;
    let opened = embedded::open(&dir, on_path("node").is_some()).map_err(|problem| vec![problem])?;
    let spool_dir = make_empty_dir(dir.join(SPOOL)).map_err(|e| vec![embedded::dir_problem(&dir, e)])?;
    let LocalWork { jobs, code, activity, runs_dir } = opened.work;
    let conf = settings.get().sandbox.clone();
    let sandbox =
        isolation::probed(&conf, SandboxMode::IfAvailable, (&runs_dir, 0), conf_dir.as_deref()).await;
    let sandbox = sandbox.map_err(|problem| vec![problem])?;
    // Runs end with the process: their jobs are on its disk, and run again after the next start.
    let (worker_id, drain) = ("local".to_owned(), Duration::ZERO);
    let run: BackendLoop = Box::new(move |stop, metrics, traces| {
        isolation::report(sandbox.status(), &metrics);
        let (code_dir, outputs) = (runs_dir.with_file_name(CODE_CACHE), None);
        let parts = WorkerParts {
            jobs,
            code,
            outputs,
            sandbox,
            activity,
            settings,
            runs_dir,
            code_dir,
            worker_id,
            ai_endpoint,
            traces,
            metrics,
            drain,
        };
        Box::pin(Worker::new(parts).run(stop))
    });
    Ok(ConnectedBackend {
        node: opened.node,
        backend: opened.backend,
        bucket: embedded::BUCKET.to_owned(),
        spool_dir,
        spill_dir: None,
        extra_loop: Some(run),
        claim: None,
        warnings,
    })
}

/// Returns the key from the environment, or else from the data directory, where the first start creates it.
/// Also returns what the banner shows for it.
fn api_key(dir: &Path) -> Result<(Secret, String), StartProblem> {
    if let Some(key) =
        std::env::var("INFRA_API_KEY").ok().map(|key| key.trim().to_owned()).filter(|key| !key.is_empty())
    {
        return Ok((Secret::new(key), "from INFRA_API_KEY".to_owned()));
    }
    kept_key(dir)
}

fn kept_key(dir: &Path) -> Result<(Secret, String), StartProblem> {
    let of_dir = |e| embedded::dir_problem(dir, e);
    fs::create_dir_all(dir).map_err(of_dir)?;
    let path = dir.join(KEY_FILE);
    let read = FileReader::new(KEY_READ_MAX).read(&path).and_then(|bytes| bytes.map(text).transpose());
    let kept = read.map_err(|e| StartProblem {
        what: format!("the API key in {}", path.display()),
        error: BackendError::Invalid(e.to_string()),
        remedy: "Make it a file that this user can read, or move it away to get a new key, or set \
               INFRA_API_KEY."
            .to_owned(),
    })?;
    let kept = kept.unwrap_or_default().trim().to_owned();
    let key = if kept.is_empty() { make_key(&path).map_err(of_dir)? } else { kept };
    // Show the key on a terminal only. Other outputs are stored, and others may read them.
    let shown = if io::stderr().is_terminal() {
        format!("{key} (in {})", path.display())
    } else {
        format!("in {}", path.display())
    };
    Ok((Secret::new(key), shown))
}

/// Creates a key. It is written to a temporary file and renamed, so that a crash never leaves an empty key.
fn make_key(path: &Path) -> io::Result<String> {
    let key = format!("{:032x}", rand::random::<u128>());
    let draft = path.with_extension("new");
    let mut file = fs::File::options().create(true).truncate(true).write(true).mode(0o600).open(&draft)?;
    file.write_all(key.as_bytes())?;
    file.sync_all()?;
    fs::rename(draft, path)?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_created_once_and_never_empty() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(KEY_FILE), "\n").unwrap();
        let (first, _) = kept_key(dir.path()).unwrap();
        assert_eq!(first.reveal().len(), 32);
        assert_eq!(kept_key(dir.path()).unwrap().0, first);
    }
}
