//! Node.js 18 or later.
//!
//! A process that waits for its job is started as a run would be, as `node index.js`. But before that,
//! Node.js loads the modules that `--require` names: here bootstrap.js, the standard input of the process. It
//! waits for the job. For a script it then steps aside, and Node.js goes on to index.js by itself. So
//! `require.main`, ES modules, stacks, exit codes and unhandled rejections are those of Node.js.
//!
//! `--preserve-symlinks` makes `--require` accept the path of a descriptor. It has no effect on the code of a
//! function, because archives with links are rejected. The options are in the environment and not in the
//! arguments, so `process.execArgv` does not show them.
//!
//! Rejected: `node -e`, which must imitate the start of the main program; `--import` with a `data:` URL,
//! which sends each main program through the loader of ES modules.

use super::language::{Introduction, Language, ProcessEnv, Question, ScriptStart, missing};
use crate::model::Runtime;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

const PROGRAM: &str = "node";
/// The files that can be the main program. A process that waits for its job takes the first.
const ENTRIES: [&str; 3] = ["index.js", "index.mjs", "index.cjs"];
/// The standard input, as a module. A worker thread loads it too, when it is `/dev/null`.
const PRELOAD: &str = "--preserve-symlinks --require /proc/self/fd/0";

pub(super) struct Nodejs;

/// The heap limit. Without one, the heap of a run would grow far beyond its memory before anything is
/// collected. Node.js cannot change it after its start.
fn heap_option(memory_mb: u64) -> String {
    format!("--max-old-space-size={memory_mb}")
}

impl Language for Nodejs {
    fn runtime(&self) -> Runtime {
        Runtime::Nodejs
    }

    fn programs(&self) -> &'static [&'static str] {
        &[PROGRAM]
    }

    fn question(&self) -> Question {
        Question { args: &["-p", r"process.execPath + '\n' + process.versions.node"], input: b"" }
    }

    fn introduction(&self, answer: &[u8]) -> Option<Introduction> {
        let (path, version) = str::from_utf8(answer).ok()?.trim_end().split_once('\n')?;
        Some(Introduction {
            path: Some(PathBuf::from(path)),
            version: version.to_owned(),
            bootstrap: Some(include_bytes!("bootstrap.js").to_vec()),
        })
    }

    fn start_variables(&self) -> &'static [&'static str] {
        &["NODE_*", "OPENSSL_*", "SSL_*", "UV_*"]
    }

    fn late_variables(&self) -> &'static [&'static str] {
        // Libraries read them, or Node.js does when it needs them.
        &["NODE_ENV", "NODE_CONFIG*", "NODE_APP_INSTANCE", "NODE_TLS_REJECT_UNAUTHORIZED"]
    }

    fn request_mb_max(&self, _memory_mb: u64) -> Option<u64> {
        None
    }

    fn heap_mb(&self, memory_mb: u64) -> Option<u64> {
        Some(memory_mb)
    }

    fn script(
        &self,
        has_file: &dyn Fn(&str) -> bool,
        _dir: &Path,
        program: Option<&Path>,
        memory_mb: u64,
    ) -> Result<ScriptStart, String> {
        let program = program.ok_or_else(|| missing(self.runtime(), PROGRAM))?;
        // Without any, Node.js says that there is no index.js.
        let entry = ENTRIES.into_iter().find(|entry| has_file(entry)).unwrap_or(ENTRIES[0]);
        let argv = vec![program.into(), heap_option(memory_mb).into(), entry.into()];
        Ok(ScriptStart::Program { argv, is_warm: entry == ENTRIES[0] })
    }

    fn warm(&self, program: &Path, memory_mb: u64, env: &mut ProcessEnv) -> Option<Vec<OsString>> {
        let of_function = env.get("NODE_OPTIONS").map_or("", String::as_str);
        // The heap limit comes last, because the last one counts. Modules of the function come after ours.
        let options = format!("{PRELOAD} {of_function} {}", heap_option(memory_mb));
        env.insert("NODE_OPTIONS".to_owned(), options);
        Some(vec![program.into(), ENTRIES[0].into()])
    }
}
