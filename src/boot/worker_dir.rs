//! The directory of a worker on the local disk: the first of `worker-0`, `worker-1`, … in `STATE_DIR` that no
//! running worker has locked.
//!
//! It outlives no process: jobs are on the queue, and code is in its bucket. So a worker empties what its
//! predecessor has left. The kernel ends the lock with the process, and the functions end with it as well.

use super::state_dir::lock_in;
use crate::worker;
use nix::fcntl::Flock;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// Most workers that share a `STATE_DIR`.
const WORKERS_MAX: usize = 64;
/// Subdirectory beside the lock, and its own subdirectories.
const WORK: &str = "work";
const RUNS: &str = "runs";
const CODE: &str = "code";
/// Functions pass through it to their own directories, and cannot list it.
const MODE: u32 = 0o711;

/// A locked directory. The lock is released on drop.
pub struct WorkerDir {
    /// The number of this worker on the machine.
    pub number: usize,
    /// Directory of the runs in progress. An absolute path, because functions run in other directories.
    pub runs: PathBuf,
    /// Path for the code cache. It does not exist yet.
    pub code: PathBuf,
    _lock: Flock<File>,
}

impl WorkerDir {
    /// Takes a free directory, and empties it. Creates `root`.
    pub fn take(root: &Path) -> io::Result<Self> {
        fs::create_dir_all(root)?;
        let root = root.canonicalize()?;
        for number in 0..WORKERS_MAX {
            let dir = root.join(format!("worker-{number}"));
            fs::create_dir_all(&dir)?;
            let Some(lock) = lock_in(&dir)? else { continue };
            let work = dir.join(WORK);
            worker::make_empty(&work, MODE)?;
            let (runs, code) = (work.join(RUNS), work.join(CODE));
            worker::make_empty(&runs, MODE)?;
            return Ok(Self { number, runs, code, _lock: lock });
        }
        Err(io::Error::other(format!("{WORKERS_MAX} workers use it already")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_worker_gets_an_empty_directory_of_its_own() {
        let root = tempfile::tempdir().unwrap();
        let state = root.path().join("state");
        let first = WorkerDir::take(&state).unwrap();
        let second = WorkerDir::take(&state).unwrap();
        assert_eq!((first.number, second.number), (0, 1));
        assert_ne!(first.runs, second.runs);
        assert!(first.runs.is_absolute());
        fs::create_dir_all(first.runs.join("left")).unwrap();
        fs::write(first.runs.join("left/behind"), "").unwrap();
        fs::create_dir(&first.code).unwrap();
        drop(first);
        let next = WorkerDir::take(&state).unwrap();
        assert_eq!((next.number, fs::read_dir(&next.runs).unwrap().count()), (0, 0));
        assert!(!next.code.exists());
    }
}
