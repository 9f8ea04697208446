//! Finds the programs of languages on this machine.

use super::language::{Introduction, Language, Question};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

/// Searched before `PATH`. A sandbox contains `/usr`, and the same programs elsewhere do not work in it.
const PLACES: [&str; 2] = ["/usr/local/bin", "/usr/bin"];
/// What of the machine is in a sandbox.
const SEEN_IN_SANDBOX: &str = "/usr";
/// Deadline for a program to describe itself.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// A program that was found and has described itself.
pub(super) struct InstalledProgram {
    pub(super) path: PathBuf,
    pub(super) version: String,
    /// For the standard input of a process that waits for its job.
    pub(super) bootstrap: Option<Vec<u8>>,
}

impl InstalledProgram {
    /// Finds the program of a language. Programs that a sandbox contains go first.
    pub(super) async fn find(language: &dyn Language) -> Option<Self> {
        for path in candidates(language.programs()) {
            if let Some(found) = Self::ask(language, path).await {
                return Some(found);
            }
        }
        None
    }

    /// Starts a program to describe itself. `None`: it does not do so.
    async fn ask(language: &dyn Language, path: PathBuf) -> Option<Self> {
        let Question { args, input } = language.question();
        let mut command = tokio::process::Command::new(&path);
        command.args(args).stdin(Stdio::from(sealed_file(input).ok()?)).kill_on_drop(true);
        if is_in_sandbox(&path) {
            // As it will be run. The others may need variables of their version manager.
            command.env_clear().env("PATH", PLACES.join(":"));
        }
        let output = tokio::time::timeout(ANSWER_MAX, command.output()).await.ok()?.ok()?;
        let answer = output.status.success().then_some(output.stdout)?;
        let Introduction { path: real, version, bootstrap } = language.introduction(&answer)?;
        let path = real.filter(|real| real.is_absolute() && real.is_file()).unwrap_or(path);
        Some(Self { path, version, bootstrap })
    }
}

/// Whether a sandbox contains a program, with links followed.
pub(super) fn is_in_sandbox(path: &Path) -> bool {
    path.canonicalize().is_ok_and(|real| real.starts_with(SEEN_IN_SANDBOX))
}

/// The first executable of this name on the PATH of this process.
pub fn on_path(name: &str) -> Option<PathBuf> {
    dirs_of_path().into_iter().map(|dir| dir.join(name)).find(|path| is_program(path))
}

/// All executables with one of these names or paths, those of [`PLACES`] first.
fn candidates(names: &[&str]) -> Vec<PathBuf> {
    let places: Vec<PathBuf> = PLACES.into_iter().map(PathBuf::from).chain(dirs_of_path()).collect();
    let paths = names.iter().flat_map(|name| places.iter().map(move |dir| dir.join(name)));
    let (mut found, others): (Vec<PathBuf>, Vec<PathBuf>) =
        paths.filter(|path| is_program(path)).partition(|path| is_in_sandbox(path));
    found.extend(others);
    let mut known = Vec::new();
    found.retain(|path| {
        let real = path.canonicalize().ok();
        let is_new = !known.contains(&real);
        known.push(real);
        is_new
    });
    found
}

fn dirs_of_path() -> Vec<PathBuf> {
    let path = std::env::var_os("PATH");
    std::env::split_paths(path.as_deref().unwrap_or(OsStr::new(""))).collect()
}

fn is_program(path: &Path) -> bool {
    let is_executable = |meta: std::fs::Metadata| meta.is_file() && meta.permissions().mode() & 0o111 != 0;
    path.is_absolute() && path.metadata().is_ok_and(is_executable)
}

/// A file in memory with these contents, which nobody can change. Each process that gets it can open it again
/// by the path of its descriptor.
pub(super) fn sealed_file(contents: &[u8]) -> io::Result<File> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let mut file = File::from(memfd_create(c"bootstrap", flags)?);
    file.write_all(contents)?;
    file.rewind()?;
    let seals =
        SealFlag::F_SEAL_SEAL | SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_WRITE;
    fcntl(&file, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
}
