//! A directory for files that do not outlive the process, such as uploads and runs in progress.

use std::io;
use std::path::PathBuf;

/// Creates the directory `path`, and empties it of the files of an earlier process.
pub fn make_empty_dir(path: PathBuf) -> io::Result<PathBuf> {
    match std::fs::remove_dir_all(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    std::fs::create_dir_all(&path)?;
    Ok(path)
}
