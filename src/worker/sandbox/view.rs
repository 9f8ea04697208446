//! What the settings ask for, and what one instance may see and use.

use crate::config::{Network, SandboxMode};
use std::path::{Path, PathBuf};

/// Most processes and threads of one instance.
pub const TASKS_MAX: u64 = 1_024;
/// Where a program in a sandbox finds its code, which is its working directory.
pub const FUNCTION_DIR: &str = "/function";
/// Its home directory there.
pub const HOME_DIR: &str = "/tmp/home";
/// Where it leaves files there.
pub const OUTPUT_DIR: &str = "/tmp/output";

/// What the settings ask for.
#[derive(Clone, Debug)]
pub struct SandboxSettings {
    pub mode: SandboxMode,
    pub network: Network,
    /// Size of `/tmp`, and most bytes of one file, in MiB.
    pub work_mb_max: u64,
    /// User id of slot 0, if the worker runs as root. Slot `n` has this id plus `n`.
    pub uid_first: u32,
    /// The directory in which the directories of all slots are. It exists.
    pub runs_dir: PathBuf,
    /// Directories that no function may see, even if they are below one that all see.
    pub hidden_dirs: Vec<PathBuf>,
}

/// What one instance may see and use.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// Unique among the instances that live.
    pub slot: u32,
    /// Host directory that the program sees as `/function`. Files that are added later appear there.
    pub function_dir: &'a Path,
    /// Host directory that stands for `/tmp` if there is no sandbox. It is not used otherwise.
    pub tmp_dir: &'a Path,
    /// Memory at the start, in MiB; see [`super::Fence::limit`].
    pub memory_mb: u64,
    pub network: Network,
}
