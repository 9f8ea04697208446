//! Directories that the worker owns and in which functions may have written.
//!
//! `std::fs::remove_dir_all` was rejected. It holds a descriptor per level, so a deep tree uses up all of
//! them, and it stops at a directory whose permissions were removed. Here each directory is moved to the top
//! before it is emptied, so trees of any depth need two descriptors. No link is followed, even if a process
//! changes the tree at the same time.

use crate::ambient;
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, renameat};
use nix::libc;
use nix::sys::stat::{Mode, fstat};
use nix::unistd::{UnlinkatFlags, unlinkat};
use rand::RngCore;
use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Most names of a directory that are in memory at once.
const NAMES_MAX: usize = 1024;
/// The permissions of an owner who may list and change a directory.
const OWNER_ALL: u32 = 0o700;

/// A directory that is deleted on drop, with all that it contains. Deleting blocks.
#[derive(Debug)]
pub(super) struct OwnedDir(PathBuf);

impl OwnedDir {
    /// Creates the directory with exactly this mode, whatever the umask. If the path exists, it is replaced:
    /// an earlier deletion has failed.
    pub(super) fn create(path: PathBuf, mode: u32) -> io::Result<Self> {
        remove(&path)?;
        make(&path, mode)?;
        Ok(Self(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// Renames the directory. `to` does not exist, and is on the same file system.
    pub(super) fn move_to(&mut self, to: PathBuf) -> io::Result<()> {
        fs::rename(&self.0, &to)?;
        self.0 = to;
        Ok(())
    }
}

impl Drop for OwnedDir {
    fn drop(&mut self) {
        if let Err(e) = remove(&self.0) {
            let dir = self.0.display();
            tracing::warn!(%dir, error = %e, "Directory not deleted; the next start deletes it");
        }
    }
}

/// Creates a directory with exactly this mode, whatever the umask.
pub(super) fn make(path: &Path, mode: u32) -> io::Result<()> {
    DirBuilder::new().mode(mode).create(path)?;
    fs::set_permissions(path, Permissions::from_mode(mode))
}

/// Creates a directory if it does not exist, and empties it of the files of an earlier process. Blocks.
pub fn make_empty(path: &Path, mode: u32) -> io::Result<()> {
    fs::create_dir_all(path)?;
    // The operator may have put a link there.
    empty(open(path, 0)?, u64::MAX)?;
    fs::set_permissions(path, Permissions::from_mode(mode))
}

/// Deletes a directory with all that it contains. It is no error if there is none.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match open(path, libc::O_NOFOLLOW) {
        Ok(dir) => empty(dir, u64::MAX)?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    }
    fs::remove_dir(path)
}

fn open(path: &Path, flags: i32) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_PATH | libc::O_DIRECTORY | flags).open(path)
}

/// Opens the directory `name` in `parent`, without following a link. It need not be readable.
pub(super) fn open_in(parent: impl AsFd, name: &OsStr) -> nix::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    openat(parent, name, flags, Mode::empty())
}

/// At most `max` names in a directory, in any order. `dir` may be an `O_PATH` descriptor.
pub(super) fn names_in(dir: impl AsFd, max: usize) -> io::Result<Vec<OsString>> {
    fs::read_dir(path_of(&dir))?.take(max).map(|entry| Ok(entry?.file_name())).collect()
}

/// A path that leads to the same directory as a descriptor, wherever that was moved.
fn path_of(dir: impl AsFd) -> PathBuf {
    format!("/proc/self/fd/{}", dir.as_fd().as_raw_fd()).into()
}

/// Deletes everything in the directory `top`. Blocks.
///
/// # Errors
/// After more than `entries_max` files and directories, so that a process that creates files at the same time
/// cannot keep this from ending.
pub(super) fn empty(top: impl AsFd, entries_max: u64) -> io::Result<()> {
    let mut left = entries_max;
    make_accessible(&top)?;
    loop {
        let names = names_in(&top, NAMES_MAX)?;
        if names.is_empty() {
            return Ok(());
        }
        for name in &names {
            if !remove_file(&top, name, &mut left)? {
                remove_dir(&top, name, &mut left)?;
            }
        }
    }
}

/// Deletes an entry of `dir` that is not a directory. Returns `false` if it is one.
fn remove_file(dir: impl AsFd, name: &OsStr, left: &mut u64) -> io::Result<bool> {
    *left = left.checked_sub(1).ok_or_else(|| io::Error::other("the directory has too many entries"))?;
    match unlinkat(dir, name, UnlinkatFlags::NoRemoveDir) {
        Ok(()) | Err(Errno::ENOENT) => Ok(true),
        Err(Errno::EISDIR) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Deletes the directory `name` of `top`. The directories in it are moved to `top`.
fn remove_dir(top: impl AsFd, name: &OsStr, left: &mut u64) -> io::Result<()> {
    let dir = open_in(&top, name)?;
    make_accessible(&dir)?;
    loop {
        let names = names_in(&dir, NAMES_MAX)?;
        if names.is_empty() {
            break;
        }
        for below in &names {
            if !remove_file(&dir, below, left)? {
                // Only those who may write in a directory can move it.
                make_accessible(open_in(&dir, below)?)?;
                let place = format!("moved-{:016x}", ambient::rng().next_u64());
                renameat(&dir, below.as_os_str(), &top, place.as_str())?;
            }
        }
    }
    Ok(unlinkat(&top, name, UnlinkatFlags::RemoveDir)?)
}

/// Lets the owner of a directory list and change it. `chmod` of a descriptor fails for `O_PATH`, and `chmod`
/// of a name follows links.
fn make_accessible(dir: impl AsFd) -> io::Result<()> {
    let mode = fstat(&dir)?.st_mode;
    if mode & OWNER_ALL == OWNER_ALL {
        return Ok(());
    }
    fs::set_permissions(path_of(&dir), Permissions::from_mode(OWNER_ALL))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn clear(path: &Path) -> io::Result<()> {
        empty(open(path, libc::O_NOFOLLOW)?, u64::MAX)
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn a_directory_is_replaced_moved_and_deleted() {
        let scratch = tempfile::tempdir().unwrap();
        let (first, second) = (scratch.path().join("first"), scratch.path().join("second"));
        fs::create_dir(&first).unwrap();
        fs::write(first.join("left"), "over").unwrap();
        let mut dir = OwnedDir::create(first.clone(), 0o777).unwrap();
        assert_eq!((mode(&first), fs::read_dir(&first).unwrap().count()), (0o777, 0));
        dir.move_to(second.clone()).unwrap();
        assert!(!first.exists() && dir.path() == second);
        fs::write(second.join("file"), "x").unwrap();
        drop(dir);
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0);
        remove(&first).unwrap();
    }

    #[test]
    fn hostile_trees_are_deleted_and_nothing_else() {
        let scratch = tempfile::tempdir().unwrap();
        let outside = scratch.path().join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("kept"), "x").unwrap();
        let top = scratch.path().join("top");
        make(&top, 0o755).unwrap();
        symlink(&outside, top.join("link")).unwrap();
        symlink("nowhere", top.join("broken")).unwrap();
        nix::unistd::mkfifo(&top.join("pipe"), Mode::S_IRWXU).unwrap();
        for n in 0..NAMES_MAX + 10 {
            fs::write(top.join(format!("file-{n}")), "").unwrap();
        }
        for dir in ["closed", "closed/in", "other", "other/in"] {
            fs::create_dir(top.join(dir)).unwrap();
            fs::write(top.join(dir).join("file"), "").unwrap();
            symlink(&outside, top.join(dir).join("link")).unwrap();
        }
        for (dir, mode) in [("closed/in", 0o111), ("other/in", 0o000), ("closed", 0o000), ("other", 0o500)] {
            fs::set_permissions(top.join(dir), Permissions::from_mode(mode)).unwrap();
        }
        clear(&top).unwrap();
        assert_eq!(fs::read_dir(&top).unwrap().count(), 0);
        assert_eq!(fs::read_to_string(outside.join("kept")).unwrap(), "x");
        // A link in place of the directory is not followed.
        fs::remove_dir(&top).unwrap();
        symlink(&outside, &top).unwrap();
        assert!(clear(&top).is_err() && remove(&top).is_err());
        assert!(outside.join("kept").exists());
    }

    #[test]
    fn a_tree_deeper_than_any_path_is_deleted() {
        let scratch = tempfile::tempdir().unwrap();
        let top = scratch.path().join("top");
        fs::create_dir(&top).unwrap();
        let (tree, above) = (top.join("tree"), top.join("above"));
        fs::create_dir(&tree).unwrap();
        for _ in 0..3_000 {
            fs::create_dir(&above).unwrap();
            fs::rename(&tree, above.join("a-name-of-some-length")).unwrap();
            fs::rename(&above, &tree).unwrap();
        }
        remove(&top).unwrap();
        assert!(!top.exists());
    }

    #[test]
    fn a_bound_of_entries_ends_it() {
        let scratch = tempfile::tempdir().unwrap();
        for name in ["a", "b", "c"] {
            fs::create_dir(scratch.path().join(name)).unwrap();
        }
        let top = || open(scratch.path(), 0).unwrap();
        assert!(empty(top(), 2).unwrap_err().to_string().contains("too many"));
        empty(top(), 3).unwrap();
    }

    #[test]
    fn a_start_empties_a_directory_and_sets_its_mode() {
        let scratch = tempfile::tempdir().unwrap();
        let (dir, link) = (scratch.path().join("a/b"), scratch.path().join("link"));
        make_empty(&dir, 0o711).unwrap();
        fs::write(dir.join("left"), "over").unwrap();
        symlink(&dir, &link).unwrap();
        make_empty(&link, 0o711).unwrap();
        assert_eq!((mode(&dir), fs::read_dir(&dir).unwrap().count()), (0o711, 0));
    }
}
