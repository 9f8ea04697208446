//! The runtimes of this machine: what runs the functions of a language, and how.
//!
//! A runtime is one file: [`python`], [`nodejs`], and [`native`] for the compiled ones. It implements
//! [`Language`], and has a row in [`LANGUAGES`]. One whose processes can be started ahead of their job also
//! has a bootstrap program in its own language, which talks to the worker; see [`super::control`].

mod language;
mod native;
mod nodejs;
mod program;
mod python;
#[cfg(test)]
mod tests;

pub(super) use language::{Build, ProcessEnv, ScriptStart};
pub use program::on_path;

use crate::model::Runtime;
use futures_util::future::join_all;
use language::{Language, missing};
use program::{InstalledProgram, is_in_sandbox, sealed_file};
use std::ffi::OsString;
use std::io;
use std::path::Path;

/// All languages.
static LANGUAGES: [&dyn Language; 4] = [&python::Python, &nodejs::Nodejs, &native::CPP, &native::GO];
/// Variables that the C library and the dynamic linker read when a program starts; see
/// [`Language::start_variables`].
const LIBC_VARIABLES: [&str; 8] =
    ["LD_*", "GLIBC_TUNABLES", "MALLOC_*", "GCONV_PATH", "LOCPATH", "LANG", "LC_*", "NLSPATH"];

/// The runtimes of this machine.
pub(super) struct Runtimes(Vec<InstalledRuntime>);

impl Runtimes {
    /// Finds the programs of all languages. Takes as long as the slowest of them needs to start.
    pub(super) async fn find() -> Self {
        Self(join_all(LANGUAGES.into_iter().map(InstalledRuntime::find)).await)
    }

    /// The runtime with this name. The error is a sentence for the owner of the function.
    pub(super) fn get(&self, name: &str) -> Result<&InstalledRuntime, String> {
        self.0.iter().find(|runtime| runtime.runtime().name() == name).ok_or_else(|| {
            let known: Vec<&str> = self.0.iter().map(|runtime| runtime.runtime().name()).collect();
            format!("this worker has no runtime {name:?}, only {}", known.join(", "))
        })
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &InstalledRuntime> {
        self.0.iter()
    }
}

/// A language, and its program on this machine.
pub(super) struct InstalledRuntime {
    language: &'static dyn Language,
    program: Option<InstalledProgram>,
}

/// How a process is started that waits for its job.
pub(super) struct WarmStart<'a> {
    pub(super) argv: Vec<OsString>,
    /// The whole environment.
    pub(super) env: ProcessEnv,
    /// The contents of its standard input, which it replaces by `/dev/null` before code of the function runs.
    pub(super) stdin: &'a [u8],
}

impl WarmStart<'_> {
    /// A file for this process alone. Process 1 of its sandbox keeps it open, and a function that runs as the
    /// user of the worker can change its mode, though not its contents.
    pub(super) fn stdin(&self) -> io::Result<std::process::Stdio> {
        Ok(sealed_file(self.stdin)?.into())
    }
}

impl InstalledRuntime {
    async fn find(language: &'static dyn Language) -> Self {
        Self { language, program: InstalledProgram::find(language).await }
    }

    pub(super) fn runtime(&self) -> Runtime {
        self.language.runtime()
    }

    /// The path of the interpreter or compiler. `None`: it is not installed.
    pub(super) fn program(&self) -> Option<&Path> {
        self.program.as_ref().map(|program| &*program.path)
    }

    /// The version of the interpreter or compiler.
    pub(super) fn version(&self) -> Option<&str> {
        self.program.as_ref().map(|program| &*program.version)
    }

    /// Whether the program works in a sandbox.
    pub(super) fn is_in_sandbox(&self) -> bool {
        self.program().is_some_and(is_in_sandbox)
    }

    /// Variables that each run has, unless its function sets them.
    pub(super) fn environment(&self) -> &'static [(&'static str, &'static str)] {
        self.language.environment()
    }

    /// Most private memory that a process of a run may request, in bytes, whether it uses it or not.
    pub(super) fn request_bytes_max(&self, memory_mb: u64) -> Option<u64> {
        Some(self.language.request_mb_max(memory_mb)?.saturating_mul(1 << 20))
    }

    /// Warm processes with different values are not interchangeable; see [`Language::heap_mb`].
    pub(super) fn heap_mb(&self, memory_mb: u64) -> Option<u64> {
        self.language.heap_mb(memory_mb)
    }

    /// How a run of the code starts in script mode; see [`Language::script`].
    pub(super) fn script(
        &self,
        has_file: &dyn Fn(&str) -> bool,
        dir: &Path,
        memory_mb: u64,
    ) -> Result<ScriptStart, String> {
        self.language.script(has_file, dir, self.program(), memory_mb)
    }

    /// How a process is started that waits for its job, with the environment `env`. Its working directory is
    /// that of the code, which may still be empty, and its descriptor 3 is a control socket.
    ///
    /// # Errors
    /// A sentence for the owner of a function with a handler: there can be no such process.
    pub(super) fn warm(&self, memory_mb: u64, mut env: ProcessEnv) -> Result<WarmStart<'_>, String> {
        let runtime = self.runtime();
        if !runtime.has_handlers() {
            return Err(format!("functions in {} cannot have a handler", runtime.name()));
        }
        let program = self.program.as_ref();
        let start = program.and_then(|program| {
            let argv = self.language.warm(&program.path, memory_mb, &mut env)?;
            Some((argv, program.bootstrap.as_deref()?))
        });
        let Some((argv, stdin)) = start else {
            return Err(missing(runtime, self.language.programs()[0]));
        };
        Ok(WarmStart { argv, env, stdin })
    }

    /// The name of a variable that a process would have read at its start, and whose value then was not the
    /// wanted one. `None`: a process that was started with the environment `started` can be given the
    /// environment `wanted`.
    pub(super) fn fixed_at_start<'a>(
        &self,
        started: &'a ProcessEnv,
        wanted: &'a ProcessEnv,
    ) -> Option<&'a str> {
        let is_different = |name: &&String| started.get(*name) != wanted.get(*name);
        let mut names = wanted.keys().chain(started.keys()).filter(is_different);
        names.find(|name| self.reads_at_start(name)).map(String::as_str)
    }

    fn reads_at_start(&self, name: &str) -> bool {
        let is_own = is_listed(self.language.start_variables(), name);
        is_listed(&LIBC_VARIABLES, name) || is_own && !is_listed(self.language.late_variables(), name)
    }
}

fn is_listed(list: &[&str], name: &str) -> bool {
    list.iter().any(|listed| match listed.strip_suffix('*') {
        Some(beginning) => name.starts_with(beginning),
        None => name == *listed,
    })
}
