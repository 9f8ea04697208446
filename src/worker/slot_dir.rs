//! The directories of the places in which functions run, on the host.
//!
//! ```text
//! <root>/<slot>/function   code: the worker's, only read by functions; /function in a sandbox
//! <root>/<slot>/tmp        without a sandbox: work directory of the function, with `home` and `output`
//! <root>/copies-<random>   copies of outputs, until they are stored
//! ```
//!
//! A directory is for one process, and is deleted after it. A sandbox has its own `/tmp` in memory.

use super::owned_dir::{self, OwnedDir};
use crate::ambient;
use rand::RngCore;
use std::io;
use std::path::PathBuf;

/// May be passed through and not listed.
const PASSAGE_MODE: u32 = 0o711;
/// In a sandbox, the function is another user.
const FUNCTION_MODE: u32 = 0o755;
const TMP_MODE: u32 = 0o700;

/// Where the slot directories of a worker are.
pub(super) struct SlotDirs {
    root: PathBuf,
    has_tmp: bool,
}

/// The directory of one slot. It is deleted on drop, which blocks.
pub(super) struct SlotDir(OwnedDir);

impl SlotDirs {
    /// Creates `root`, and deletes what an earlier process has left in it. `has_tmp`: functions run without a
    /// sandbox. Blocks.
    pub(super) fn open(root: PathBuf, has_tmp: bool) -> io::Result<Self> {
        owned_dir::make_empty(&root, PASSAGE_MODE).map_err(|e| {
            io::Error::new(e.kind(), format!("the directory of runs {}: {e}", root.display()))
        })?;
        Ok(Self { root, has_tmp })
    }

    /// The path of a new directory for copies of outputs.
    pub(super) fn copies_dir(&self) -> PathBuf {
        self.root.join(format!("copies-{:016x}", ambient::rng().next_u64()))
    }

    /// Creates the directory of a slot that is not in use. Blocks.
    pub(super) fn create(&self, slot: u32) -> io::Result<SlotDir> {
        let slot = SlotDir(OwnedDir::create(self.root.join(slot.to_string()), PASSAGE_MODE)?);
        owned_dir::make(&slot.function(), FUNCTION_MODE)?;
        if self.has_tmp {
            for dir in [slot.tmp(), slot.home(), slot.output()] {
                owned_dir::make(&dir, TMP_MODE)?;
            }
        }
        Ok(slot)
    }
}

impl SlotDir {
    /// The directory for the code of the function.
    pub(super) fn function(&self) -> PathBuf {
        self.0.path().join("function")
    }

    /// The work directory of the function, without a sandbox.
    pub(super) fn tmp(&self) -> PathBuf {
        self.0.path().join("tmp")
    }

    pub(super) fn home(&self) -> PathBuf {
        self.tmp().join("home")
    }

    pub(super) fn output(&self) -> PathBuf {
        self.tmp().join("output")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;
    use std::path::Path;

    fn mode(path: impl AsRef<Path>) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    fn count(path: impl AsRef<Path>) -> usize {
        fs::read_dir(path).unwrap().count()
    }

    #[test]
    fn a_start_deletes_what_is_left_and_a_drop_the_slot() {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path().join("runs");
        fs::create_dir_all(root.join("3/tmp/deep")).unwrap();
        fs::write(root.join("3/tmp/deep/file"), "x").unwrap();
        let slots = SlotDirs::open(root.clone(), false).unwrap();
        assert_eq!((count(&root), mode(&root)), (0, 0o711));
        let slot = slots.create(3).unwrap();
        assert_eq!((mode(root.join("3")), mode(slot.function())), (0o711, 0o755));
        assert_eq!(count(root.join("3")), 1);
        // A deletion that failed: the next slot of this number is empty too.
        fs::write(slot.function().join("left"), "x").unwrap();
        let next = slots.create(3).unwrap();
        assert_eq!(count(next.function()), 0);
        drop((slot, next));
        assert_eq!(count(&root), 0);
        assert_ne!(slots.copies_dir(), slots.copies_dir());
    }

    #[test]
    fn a_work_directory_is_deleted_whatever_the_function_did() {
        let scratch = tempfile::tempdir().unwrap();
        let outside = scratch.path().join("outside");
        fs::write(&outside, "kept").unwrap();
        let slots = SlotDirs::open(scratch.path().join("runs"), true).unwrap();
        let slot = slots.create(0).unwrap();
        assert_eq!([slot.tmp(), slot.home(), slot.output()].map(mode), [0o700; 3]);
        fs::write(slot.output().join("file"), "x").unwrap();
        fs::remove_dir(slot.home()).unwrap();
        std::os::unix::fs::symlink(&outside, slot.home()).unwrap();
        fs::create_dir(slot.tmp().join("closed")).unwrap();
        fs::write(slot.tmp().join("closed/file"), "x").unwrap();
        fs::set_permissions(slot.tmp().join("closed"), fs::Permissions::from_mode(0o0)).unwrap();
        drop(slot);
        assert_eq!(count(scratch.path().join("runs")), 0);
        assert_eq!(fs::read_to_string(&outside).unwrap(), "kept");
    }
}
