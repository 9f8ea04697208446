//! What the worker must know about a language.

use crate::model::Runtime;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Environment variables: from names to values.
pub(in crate::worker) type ProcessEnv = BTreeMap<String, String>;

/// Added to the memory of a run for memory that it requests but never touches, such as the stacks of a
/// thousand threads. In MiB.
const DATA_ALLOWANCE_MB: u64 = 8 * 1024;

/// A language of functions, and the program that runs or builds them.
///
/// In script mode each run is a process, as if it had been started from a shell. In handler mode a process
/// loads a module once, and calls a function of it for each run. A language without [`Language::warm`] has
/// only script mode, and its processes are never started ahead.
pub(in crate::worker) trait Language: Send + Sync {
    fn runtime(&self) -> Runtime;

    /// Names of the program, or absolute paths outside of the usual places. The first that works counts.
    fn programs(&self) -> &'static [&'static str];

    /// How to ask the program about itself.
    fn question(&self) -> Question;

    /// Reads the answer of the program. `None`: it is not the program that it should be.
    fn introduction(&self, answer: &[u8]) -> Option<Introduction>;

    /// Variables that each run has, unless its function sets them.
    fn environment(&self) -> &'static [(&'static str, &'static str)] {
        &[]
    }

    /// Variables that a process only reads when it starts, beside those of the C library. If it was started
    /// without a value, it cannot be given that later. `PREFIX*` stands for all names with this beginning.
    fn start_variables(&self) -> &'static [&'static str] {
        &[]
    }

    /// Exceptions from [`Language::start_variables`], in the same form.
    fn late_variables(&self) -> &'static [&'static str] {
        &[]
    }

    /// Most private memory that a process of a run may request, in MiB, whether it uses it or not. `None`: no
    /// limit, because programs of the language request far more than they use.
    fn request_mb_max(&self, memory_mb: u64) -> Option<u64> {
        Some(memory_mb.saturating_add(DATA_ALLOWANCE_MB))
    }

    /// The size of the heap with which a warm process must be started, in MiB, where that cannot be changed
    /// later. Processes with different sizes are not interchangeable.
    fn heap_mb(&self, _memory_mb: u64) -> Option<u64> {
        None
    }

    /// How a run of the code starts in script mode. `has_file`: whether the code has this file. `dir`: its
    /// directory, as the process will see it, which is its working directory. `program`: the path of the
    /// program, if there is one.
    ///
    /// # Errors
    /// A sentence for the owner of the function.
    fn script(
        &self,
        has_file: &dyn Fn(&str) -> bool,
        dir: &Path,
        program: Option<&Path>,
        memory_mb: u64,
    ) -> Result<ScriptStart, String>;

    /// The arguments of a process that waits for its job. Changes `env`, with which it will be started, so
    /// that it runs the bootstrap program first.
    fn warm(&self, _program: &Path, _memory_mb: u64, _env: &mut ProcessEnv) -> Option<Vec<OsString>> {
        None
    }
}

/// How a program is asked about itself.
pub(in crate::worker) struct Question {
    pub(super) args: &'static [&'static str],
    /// Its standard input.
    pub(super) input: &'static [u8],
}

/// What a program says about itself.
pub(in crate::worker) struct Introduction {
    /// Its own path. The file that was started may be a script of a version manager (pyenv, asdf), which does
    /// not work in the empty environment of a run. `None`: it does not know.
    pub(super) path: Option<PathBuf>,
    pub(super) version: String,
    /// The standard input of a process that waits for its job.
    pub(super) bootstrap: Option<Vec<u8>>,
}

/// How a run starts in script mode.
#[derive(Debug)]
pub(in crate::worker) enum ScriptStart {
    Program {
        argv: Vec<OsString>,
        /// Whether a process that waits for its job can be used instead.
        is_warm: bool,
    },
    /// The code must be built first, once a version.
    Build(Build),
}

/// How code is built: a program to run in a sandbox, in the directory of the code.
///
/// It writes the product to descriptor 3, and exits with 0. So it needs no directory to which both sides can
/// write. Stored as `main` beside the code, the product is the program of later runs. If the build fails,
/// stderr says why. The environment has `TMPDIR`, with room: a build in Go needs about 200 MiB.
#[derive(Debug)]
pub(in crate::worker) struct Build {
    pub(in crate::worker) argv: Vec<OsString>,
}

/// The error if the program of a language is not there.
pub(super) fn missing(runtime: Runtime, program: &str) -> String {
    format!("this worker cannot run {}: it has no {program}, which must be installed", runtime.name())
}
