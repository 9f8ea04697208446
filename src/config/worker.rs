//! `worker.toml`: how functions run. Sandbox, capacity, warm processes, code, output, jobs and the listener.

use super::checks::within;
use crate::config::checks::SECONDS_MAX;
use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// The contents of `worker.toml`.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct WorkerConf {
    pub sandbox: SandboxConf,
    pub capacity: CapacityConf,
    pub warm: WarmConf,
    pub code: CodeConf,
    pub output: OutputConf,
    pub jobs: JobsConf,
    pub listener: ListenerConf,
}

/// `[sandbox]`: what a function may see and reach.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct SandboxConf {
    /// `None`: the default of the command, see [`SandboxMode`].
    pub mode: Option<SandboxMode>,
    pub network: Network,
    /// Size of the files of a run, in MiB.
    pub work_mb_max: u64,
    /// The first of the user ids of functions, if the worker runs as root.
    pub uid_first: u32,
}

/// Whether functions need a sandbox.
///
/// The default of `worker` is [`Self::Required`]: it runs code of others on a machine with credentials, and
/// an operator who forgets a package must notice. The default of `dev` is [`Self::IfAvailable`]: it runs code
/// of its user, and has to start on any machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum SandboxMode {
    /// Without a sandbox there is no start.
    Required,
    /// Without a sandbox there is a warning.
    IfAvailable,
    /// Functions run without a sandbox.
    Off,
}

/// What a function reaches over the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Network {
    /// Nothing.
    None,
    /// The internet: no loopback, link-local or private addresses.
    Public,
    /// Whatever the worker reaches.
    Full,
}

impl Network {
    /// Its name in the settings, in logs and in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Public => "public",
            Self::Full => "full",
        }
    }
}

/// `[capacity]`: how much runs at once.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct CapacityConf {
    /// Maximum number of concurrent runs. 0: as many as their memory allows.
    pub runs_max: usize,
    /// Memory of all functions together, in MiB. 0: three quarters of the machine, or of the control group.
    pub memory_mb: u64,
}

/// `[warm]`: processes that wait for a run.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct WarmConf {
    /// Interpreters per runtime that are started ahead, each for one run of a function without a handler.
    pub interpreters: usize,
    /// Number of processes of a function with a handler that stay even when they are idle.
    pub function_min: usize,
    /// Maximum number of idle processes of one function.
    pub function_max: usize,
    /// Maximum number of idle processes of all kinds.
    pub total_max: usize,
    /// Idle time after which a process above `function_min` ends, in seconds.
    pub idle_s: u64,
    /// Number of runs after which a process is replaced.
    pub handler_runs_max: u64,
}

/// `[code]`: the cache of unpacked code.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct CodeConf {
    /// Maximum size of the cache on the disk, in MiB.
    pub cache_mb: u64,
}

/// `[output]`: what is kept of the output of a run.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct OutputConf {
    /// Maximum size of stdout and of stderr, in bytes each.
    pub bytes_max: usize,
    /// Maximum number of files that are uploaded per run.
    pub files_max: usize,
}

/// `[jobs]`: the jobs of this worker in the queue.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct JobsConf {
    /// How long a received job is hidden from other workers, in seconds. Extended while the job is here. 0:
    /// the VisibilityTimeout of the queue.
    pub visibility_s: u64,
    /// Time for runs in progress when the worker stops, in seconds.
    pub drain_s: u64,
}

/// `[listener]`: `/health` and `/metrics` of `worker`.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct ListenerConf {
    /// `::` accepts IPv4 as well.
    pub address: IpAddr,
    /// 0: any free port.
    pub port: u16,
}

/// The sections that apply while the process runs. The others are read at start.
const LIVE: [&str; 4] = ["capacity", "warm", "code", "output"];

/// Upper bound of the numbers of runs and processes. Each has about ten descriptors.
const RUNS_MOST: u64 = 1024;
/// Upper bound of `warm.interpreters` and `warm.function_max`.
const PROCESSES_MOST: u64 = 256;
/// Upper bound of `sandbox.work_mb_max`: 64 GiB.
const WORK_MB_MOST: u64 = 64 << 10;
/// Upper bound of `capacity.memory_mb`: 16 TiB.
const MEMORY_MB_MOST: u64 = 16 << 20;
/// Bounds of `sandbox.uid_first`. The users of the machine are below. All ids of functions must fit above.
const UID_LEAST: u64 = 65_536;
const UID_MOST: u64 = 4_294_000_000;
/// Bounds of `code.cache_mb`: one archive, when it is unpacked, and 1 TiB.
const CACHE_MB_LEAST: u64 = 256;
const CACHE_MB_MOST: u64 = 1 << 20;
/// Bounds of the output of a run, in bytes. The gateway keeps results in memory.
const OUTPUT_BYTES_LEAST: u64 = 1 << 10;
const OUTPUT_BYTES_MOST: u64 = 16 << 20;
/// Upper bound of `output.files_max`. The result lists all files.
const OUTPUT_FILES_MOST: u64 = 1000;
/// Bounds of `jobs.visibility_s`, if it is not 0: three extensions with retries, and the limit of SQS.
const VISIBILITY_S_LEAST: u64 = 30;
const VISIBILITY_S_MOST: u64 = 43_200;

impl WorkerConf {
    /// Whether a section applies while the process runs.
    pub fn is_live(name: &str) -> bool {
        LIVE.contains(&name)
    }

    /// Returns (path, problem) of each value out of bounds.
    pub(super) fn problems(&self) -> Vec<(String, String)> {
        let warm = &self.warm;
        let is_min_above_max = warm.function_min > warm.function_max;
        let min_above_max = is_min_above_max
            .then(|| ("warm.function_min".to_owned(), "must be at most warm.function_max".to_owned()));
        let visibility = match self.jobs.visibility_s {
            0 => None,
            s => within("jobs.visibility_s", s, VISIBILITY_S_LEAST..=VISIBILITY_S_MOST),
        };
        [
            within("sandbox.work_mb_max", self.sandbox.work_mb_max, 1..=WORK_MB_MOST),
            within("sandbox.uid_first", self.sandbox.uid_first.into(), UID_LEAST..=UID_MOST),
            within("capacity.runs_max", self.capacity.runs_max as u64, 0..=RUNS_MOST),
            within("capacity.memory_mb", self.capacity.memory_mb, 0..=MEMORY_MB_MOST),
            within("warm.interpreters", warm.interpreters as u64, 0..=PROCESSES_MOST),
            within("warm.function_max", warm.function_max as u64, 0..=PROCESSES_MOST),
            min_above_max,
            within("warm.total_max", warm.total_max as u64, 0..=RUNS_MOST),
            within("warm.idle_s", warm.idle_s, 1..=SECONDS_MAX),
            within("warm.handler_runs_max", warm.handler_runs_max, 1..=u64::MAX),
            within("code.cache_mb", self.code.cache_mb, CACHE_MB_LEAST..=CACHE_MB_MOST),
            output_bytes_problem(self.output.bytes_max)
                .map(|problem| ("output.bytes_max".to_owned(), problem)),
            within("output.files_max", self.output.files_max as u64, 0..=OUTPUT_FILES_MOST),
            visibility,
            within("jobs.drain_s", self.jobs.drain_s, 0..=SECONDS_MAX),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

/// Why a size cannot be `output.bytes_max`. The bounds of `MAX_OUTPUT_SIZE` are the same.
pub(super) fn output_bytes_problem(bytes: usize) -> Option<String> {
    let bounds = OUTPUT_BYTES_LEAST..=OUTPUT_BYTES_MOST;
    within("", bytes as u64, bounds).map(|(_, problem)| problem)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::files::{ConfText, ConfTexts};
    use crate::config::{Conf, ConfigError};

    fn load(text: &str) -> Result<WorkerConf, ConfigError> {
        let worker = ConfText { name: "worker.toml".into(), text: Ok(Some(text.into())) };
        Conf::of(&ConfTexts { worker, ..ConfTexts::none() }).map(|conf| conf.worker)
    }

    #[test]
    fn the_shipped_file_leaves_the_mode_to_the_command() {
        let shipped = Conf::shipped().unwrap().worker;
        assert_eq!((shipped.sandbox.mode, shipped.sandbox.network), (None, Network::Public));
        assert_eq!(load("").unwrap(), shipped);
    }

    #[test]
    fn values_are_read_or_rejected_with_their_line() {
        for (text, told) in [
            ("[sandbox]\nmode = \"required\"\nnetwork = \"none\"", ""),
            ("[sandbox]\nmode = \"if-available\"\nnetwork = \"full\"", ""),
            ("[sandbox]\nmode = \"off\"", ""),
            ("[warm]\nfunction_min = 9\nfunction_max = 9", ""),
            ("[warm]\ninterpreters = 0\nfunction_max = 0\ntotal_max = 0", ""),
            ("[sandbox]\nmode = \"IfAvailable\"", "worker.toml:2: sandbox.mode unknown variant"),
            ("[sandbox]\nmode = false", "worker.toml:2: sandbox.mode "),
            ("\n[sandbox]\nnetwork = \"private\"", "worker.toml:3: sandbox.network unknown variant"),
            ("[sandbox]\nuid_first = 1000", "worker.toml:2: sandbox.uid_first must be at least 65536"),
            ("[sandbox]\nwork_mb_max = 0", "worker.toml:2: sandbox.work_mb_max must be at least 1"),
            ("[capacity]\nruns_max = 1025", "worker.toml:2: capacity.runs_max must be at most 1024"),
            (
                "[warm]\nfunction_min = 9",
                "worker.toml:2: warm.function_min must be at most warm.function_max",
            ),
            ("[warm]\nidle_s = 0", "worker.toml:2: warm.idle_s must be at least 1"),
            ("[warm]\nhandler_runs_max = 0", "worker.toml:2: warm.handler_runs_max must be at least 1"),
            ("[code]\ncache_mb = 255", "worker.toml:2: code.cache_mb must be at least 256"),
            ("[output]\nbytes_max = 1023", "worker.toml:2: output.bytes_max must be at least 1024"),
            ("[jobs]\nvisibility_s = 43201", "worker.toml:2: jobs.visibility_s must be at most 43200"),
            ("[jobs]\nvisibility_s = 29", "worker.toml:2: jobs.visibility_s must be at least 30"),
            ("[jobs]\nvisibility_s = 30", ""),
            ("[listener]\nport = 65536", "worker.toml:2: listener.port invalid value"),
            ("[listener]\naddress = \"localhost\"", "worker.toml:2: listener.address "),
            ("[runs]", "worker.toml:1: runs unknown field `runs`"),
        ] {
            let problems = load(text).map_or_else(|e| e.to_string(), |_| String::new());
            assert!(
                problems.starts_with(told) && problems.is_empty() == told.is_empty(),
                "{text}: {problems}"
            );
        }
    }

    #[test]
    fn live_sections_exist() {
        let conf = toml::Table::try_from(Conf::shipped().unwrap().worker).unwrap();
        assert!(LIVE.iter().all(|section| conf.contains_key(*section)), "{conf:?}");
    }

    #[test]
    fn names_are_those_of_the_settings() {
        for network in [Network::None, Network::Public, Network::Full] {
            assert_eq!(toml::Value::try_from(network).unwrap().as_str(), Some(network.name()));
        }
    }
}
