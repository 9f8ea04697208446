//! The files that a run leaves in its output directory: copied out of its `/tmp`, then stored for the caller.
//!
//! They are copied first, so that the process can go on or its sandbox can end, and so that nothing changes
//! while a file is stored. The directory belongs to untrusted code, which may change it at the same time. So
//! it is read through descriptors, no link is followed, and a file is checked after it was opened.
//!
//! Keys and names are those of the agent that the platform had before: `outputs/<request id>/<path>`.

use super::owned_dir::{self, OwnedDir};
use crate::ambient;
use crate::backend::{OutputStore, is_request_id};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat};
use nix::libc;
use nix::sys::stat::{Mode, fstatat};
use serde::Deserialize;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// Most directories above a file, below the output directory.
const DEPTH_MAX: usize = 8;
/// Most files and directories that are looked at.
const ENTRIES_MAX: usize = 10_000;
/// Longest path of a file below the output directory, in bytes. A key of S3 has at most 1,024.
const PATH_BYTES_MAX: usize = 800;
/// Deadline for storing all files of a run.
const STORE_MAX: Duration = Duration::from_secs(60);
/// Most files that the note on those left out names, and most characters of each path in it.
const NOTED_MAX: usize = 10;
const NOTED_CHARS_MAX: usize = 200;
/// The file in which the AI client of the platform counts tokens, and how much of it is read, in bytes.
const LLM_USAGE: &str = ".llm_usage_stats.jsonl";
const LLM_USAGE_BYTES_MAX: u64 = 1 << 20;
/// Files of the platform at the top of the output directory. They are not outputs.
const RESERVED: [&str; 2] = [LLM_USAGE, ".faas_runtime_metrics.json"];
const UNREADABLE: &str = "it cannot be read";

/// The bounds of the outputs of one run.
#[derive(Clone, Copy, Debug)]
pub(super) struct OutputLimits {
    /// 0: outputs are not looked at.
    pub(super) files_max: usize,
    /// Of all files together.
    pub(super) bytes_max: u64,
}

/// Copies of the outputs of a run. They are deleted on drop.
#[derive(Default)]
pub(super) struct CollectedOutputs {
    copies: Option<OwnedDir>,
    files: Vec<CopiedOutput>,
    left_out: LeftOut,
    llm_tokens: u64,
}

struct CopiedOutput {
    /// Path below the output directory.
    name: String,
    copy: PathBuf,
}

/// What a result shows of the outputs.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct StoredOutputs {
    /// For `outputFiles`: what the store says of each file. In a fleet, its path below the output directory.
    pub(super) files: Vec<String>,
    /// Number of files that are not among them.
    pub(super) left_out: usize,
    /// For the end of `stderr`: which these are, and why.
    pub(super) note: Option<String>,
    /// What the run has reported, for `llm_token_count`.
    pub(super) llm_tokens: u64,
}

/// Copies the files of `output_dir`, a path below the directory `tmp`, to the new directory `copies`. `tmp`
/// may be an `O_PATH` descriptor. Without an output directory there are no files. Blocks.
pub(super) fn collect(
    tmp: impl AsFd,
    output_dir: &str,
    copies: PathBuf,
    limits: OutputLimits,
) -> CollectedOutputs {
    let collected = CollectedOutputs::default();
    let mut collector = Collector { limits, copies, entries: 0, bytes: 0, has_failed: false, collected };
    if limits.files_max == 0 {
        return collector.collected;
    }
    match open_below(tmp, output_dir) {
        Ok(dir) => collector.visit(&dir, "", 0),
        Err(Errno::ENOENT) => {}
        Err(_) => collector.collected.left_out.add("OUTPUT_DIR", "it is not a directory any more"),
    }
    if collector.entries > ENTRIES_MAX {
        let reason = format!("it has more than {ENTRIES_MAX} files and directories");
        collector.collected.left_out.add("OUTPUT_DIR", &reason);
    }
    collector.collected
}

/// Whether a run has left nothing. Takes some microseconds.
pub(super) fn are_none(tmp: impl AsFd, output_dir: &str) -> bool {
    match open_below(tmp, output_dir) {
        Ok(dir) => owned_dir::names_in(dir, 1).is_ok_and(|names| names.is_empty()),
        Err(e) => e == Errno::ENOENT,
    }
}

/// Empties the output directory, so that the files of this run are not those of the next one. Blocks.
///
/// # Errors
/// If something else is in its place, or if it holds too much. The process is then not used again.
pub(super) fn clear(tmp: impl AsFd, output_dir: &str) -> io::Result<()> {
    match open_below(tmp, output_dir) {
        Ok(dir) => owned_dir::empty(dir, ENTRIES_MAX as u64),
        Err(Errno::ENOENT) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

impl CollectedOutputs {
    /// Stores the files. A file that is not stored is left out: the run has ended, and its result does not
    /// wait for the store to recover.
    pub(super) async fn store(self, store: &dyn OutputStore, request_id: &str) -> StoredOutputs {
        let Self { copies, files, mut left_out, llm_tokens } = self;
        let deadline = Instant::now() + STORE_MAX;
        let has_key = is_request_id(request_id);
        let mut stored = Vec::new();
        let mut failures = 0;
        for CopiedOutput { name, copy } in files {
            if !has_key {
                left_out.add(&name, "the id of the job cannot be part of a key");
                continue;
            }
            let key = format!("outputs/{request_id}/{name}");
            let error = match timeout_at(deadline, store.store(&key, &copy)).await {
                Ok(Ok(shown)) => {
                    stored.push(shown);
                    continue;
                }
                Ok(Err(e)) => e.to_string(),
                Err(_) => "no answer before the deadline".to_owned(),
            };
            failures += 1;
            if failures == 1 {
                tracing::warn!(job = request_id, %error, "Output of a run not stored; its result says so");
            }
            left_out.add(&name, "it could not be stored");
        }
        if let Some(copies) = copies {
            ambient::blocking(move || drop(copies)).await;
        }
        let note = left_out.note();
        StoredOutputs { files: stored, left_out: left_out.noted.len() + left_out.more, note, llm_tokens }
    }
}

/// Files that are not among the outputs, and why.
#[derive(Default)]
struct LeftOut {
    noted: Vec<String>,
    more: usize,
}

impl LeftOut {
    fn add(&mut self, path: &str, reason: &str) {
        if self.noted.len() == NOTED_MAX {
            self.more += 1;
            return;
        }
        let path: String = path.chars().take(NOTED_CHARS_MAX).collect();
        // Quoted, because a name may contain anything.
        self.noted.push(format!("{path:?}: {reason}"));
    }

    fn note(&self) -> Option<String> {
        let more = match self.more {
            0 => String::new(),
            more => format!("; and {more} more"),
        };
        (!self.noted.is_empty()).then(|| format!("\n[not in outputFiles: {}{more}]", self.noted.join("; ")))
    }
}

/// One walk through an output directory.
struct Collector {
    limits: OutputLimits,
    copies: PathBuf,
    /// Number of entries that were found.
    entries: usize,
    /// Size of the copies.
    bytes: u64,
    /// A copy failed, which the log says once.
    has_failed: bool,
    collected: CollectedOutputs,
}

impl Collector {
    /// `prefix`: the path of the directory, with a slash at its end unless it is the output directory itself.
    fn visit(&mut self, dir: &OwnedFd, prefix: &str, depth: usize) {
        let room = ENTRIES_MAX.saturating_sub(self.entries);
        let Ok(mut names) = owned_dir::names_in(dir, room + 1) else {
            self.collected.left_out.add(if depth == 0 { "OUTPUT_DIR" } else { prefix }, UNREADABLE);
            return;
        };
        // Which files are left out does not depend on the file system.
        names.sort();
        for name in &names {
            self.entries += 1;
            if self.entries > ENTRIES_MAX {
                return;
            }
            let path = format!("{prefix}{}", name.to_string_lossy());
            if let Err(reason) = self.visit_entry(dir, name, &path, depth) {
                self.collected.left_out.add(&path, &reason);
            }
        }
    }

    fn visit_entry(&mut self, dir: &OwnedFd, name: &OsStr, path: &str, depth: usize) -> Result<(), String> {
        let Some(text) = name.to_str().filter(|name| !name.contains(is_unprintable)) else {
            return Err("its name is not UTF-8, or has control characters".to_owned());
        };
        if depth == 0 && RESERVED.contains(&text) {
            if text == LLM_USAGE {
                self.collected.llm_tokens = llm_tokens(dir);
            }
            return Ok(());
        }
        if path.len() > PATH_BYTES_MAX {
            return Err(format!("its path has more than {PATH_BYTES_MAX} bytes"));
        }
        let stat = fstatat(dir, name, AtFlags::AT_SYMLINK_NOFOLLOW).map_err(|_| UNREADABLE)?;
        match stat.st_mode & libc::S_IFMT {
            libc::S_IFDIR if depth == DEPTH_MAX => Err(format!("it is below {DEPTH_MAX} directories")),
            libc::S_IFDIR => {
                let below = owned_dir::open_in(dir, name).map_err(|_| UNREADABLE)?;
                self.visit(&below, &format!("{path}/"), depth + 1);
                Ok(())
            }
            libc::S_IFLNK => Err("it is a link".to_owned()),
            _ => self.copy(dir, name, path),
        }
    }

    fn copy(&mut self, dir: &OwnedFd, name: &OsStr, path: &str) -> Result<(), String> {
        let number = self.collected.files.len();
        let OutputLimits { files_max, bytes_max } = self.limits;
        if number == files_max {
            return Err(format!("there are more than {files_max} files"));
        }
        let (file, len) = open_file(dir, name)?;
        if len > bytes_max - self.bytes {
            return Err(format!("the files have more than {bytes_max} bytes"));
        }
        let copied = self.copies().and_then(|copies| {
            let copy = copies.join(number.to_string());
            // A file that grows meanwhile is cut.
            let bytes = io::copy(&mut file.take(len), &mut File::create(&copy)?)?;
            Ok((copy, bytes))
        });
        let (copy, bytes) = copied.map_err(|e| {
            if !self.has_failed {
                tracing::warn!(dir = %self.copies.display(), error = %e, "Outputs of a run not copied");
            }
            self.has_failed = true;
            "the worker could not copy it"
        })?;
        self.bytes += bytes;
        self.collected.files.push(CopiedOutput { name: path.to_owned(), copy });
        Ok(())
    }

    /// The directory for the copies. Most runs need none.
    fn copies(&mut self) -> io::Result<PathBuf> {
        if self.collected.copies.is_none() {
            self.collected.copies = Some(OwnedDir::create(self.copies.clone(), 0o700)?);
        }
        Ok(self.copies.clone())
    }
}

/// Opens the directory `path` below `tmp`. No part of the path is a link.
fn open_below(tmp: impl AsFd, path: &str) -> nix::Result<OwnedFd> {
    let (first, rest) = path.split_once('/').unwrap_or((path, ""));
    let mut dir = owned_dir::open_in(tmp, OsStr::new(first))?;
    for part in rest.split('/').filter(|part| !part.is_empty()) {
        dir = owned_dir::open_in(&dir, OsStr::new(part))?;
    }
    Ok(dir)
}

/// Opens a regular file. Returns its length too.
fn open_file(dir: impl AsFd, name: &OsStr) -> Result<(File, u64), &'static str> {
    // Opening a pipe would block, and opening a terminal could change that of the worker.
    let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let file = openat(dir, name, flags, Mode::empty()).map_err(|_| UNREADABLE)?;
    let file = File::from(file);
    let metadata = file.metadata().map_err(|_| UNREADABLE)?;
    if !metadata.is_file() {
        return Err("it is not a regular file");
    }
    // Without a sandbox, another name of it may be a file that the function may not read.
    if metadata.nlink() > 1 {
        return Err("it has several hard links");
    }
    Ok((file, metadata.len()))
}

fn is_unprintable(c: char) -> bool {
    // XML, in which S3 lists keys, has no way to write the last two.
    c.is_control() || matches!(c, '\u{FFFE}' | '\u{FFFF}')
}

/// The sum of the tokens in the file of the AI client: one JSON object per call and line. Lines after a
/// broken one are not counted.
fn llm_tokens(dir: impl AsFd) -> u64 {
    #[derive(Deserialize)]
    struct LlmUsage {
        #[serde(default)]
        prompt_eval_count: u64,
        #[serde(default)]
        eval_count: u64,
    }
    let Ok((file, _)) = open_file(dir, OsStr::new(LLM_USAGE)) else { return 0 };
    let mut text = Vec::new();
    if file.take(LLM_USAGE_BYTES_MAX).read_to_end(&mut text).is_err() {
        return 0;
    }
    let text = String::from_utf8_lossy(&text);
    let lines = text.lines().filter(|line| !line.trim().is_empty());
    let usages = lines.map_while(|line| serde_json::from_str::<LlmUsage>(line).ok());
    usages.fold(0_u64, |sum, usage| {
        sum.saturating_add(usage.prompt_eval_count).saturating_add(usage.eval_count)
    })
}

#[cfg(test)]
mod tests;
