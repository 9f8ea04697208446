//! A function's code: a zip in the local store, unpacked into a private directory for each run.
//!
//! A cache of unpacked code was rejected: runs would then see each other's files, or each would need a copy, which
//! costs what unpacking costs.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Component, Path, PathBuf};
use zip::ZipArchive;

/// Most bytes the code of a function may have unpacked.
const UNPACKED_BYTES_MAX: u64 = 256 << 20;
/// Most files and directories in a zip.
const ENTRIES_MAX: usize = 10_000;

/// The files of one run: `code` (where it starts), `home` (its own place for more) and `payload.json`. Dropping it
/// deletes them.
pub(super) struct RunDir(PathBuf);

impl RunDir {
    /// Makes the directory `path`, which only we may enter.
    pub(super) fn create(path: PathBuf) -> io::Result<Self> {
        DirBuilder::new().mode(0o700).create(&path)?;
        let dir = Self(path);
        fs::create_dir(dir.code())?;
        fs::create_dir(dir.home())?;
        Ok(dir)
    }

    pub(super) fn code(&self) -> PathBuf {
        self.0.join("code")
    }

    pub(super) fn home(&self) -> PathBuf {
        self.0.join("home")
    }

    pub(super) fn payload(&self) -> PathBuf {
        self.0.join("payload.json")
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        // What is left, a later start sweeps away.
        if let Err(e) = fs::remove_dir_all(&self.0) {
            tracing::warn!(error = %e, "Run Directory Not Deleted");
        }
    }
}

/// Where the code of `s3_key` lies; `None` if the key would lead out of the store.
pub(super) fn locate(store: &Path, s3_key: &str) -> Option<PathBuf> {
    let inside = Path::new(s3_key).components().all(|part| matches!(part, Component::Normal(_)));
    (inside && !s3_key.is_empty()).then(|| store.join(s3_key))
}

/// Unpacks the zip `from` into the directory `to`. The error is a sentence for the function's owner.
pub(super) fn unpack(from: &Path, to: &Path) -> Result<(), String> {
    let file = File::open(from).map_err(|e| format!("the code of the function cannot be opened: {e}"))?;
    let bad = |e: &dyn std::fmt::Display| format!("the code of the function is not a good zip: {e}");
    let mut zip = ZipArchive::new(file).map_err(|e| bad(&e))?;
    if zip.len() > ENTRIES_MAX {
        return Err(bad(&format_args!("it has more than {ENTRIES_MAX} entries")));
    }
    let mut room = UNPACKED_BYTES_MAX;
    for index in 0..zip.len() {
        let mut entry = zip.by_index(index).map_err(|e| bad(&e))?;
        let Some(path) = entry.enclosed_name() else {
            return Err(bad(&"an entry leads out of it"));
        };
        // A link could lead a later entry, or the run, out of the directory.
        if entry.is_symlink() {
            return Err(bad(&"it holds a link"));
        }
        let path = to.join(path);
        if entry.is_dir() {
            fs::create_dir_all(&path).map_err(|e| bad(&e))?;
            continue;
        }
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).map_err(|e| bad(&e))?;
        }
        let mut file = File::create(&path).map_err(|e| bad(&e))?;
        // The sizes a zip states are not believed: what comes out is counted, and one byte more gives it away.
        let written = io::copy(&mut entry.by_ref().take(room + 1), &mut file).map_err(|e| bad(&e))?;
        if written > room {
            return Err(bad(&format_args!("it unpacks to more than {UNPACKED_BYTES_MAX} bytes")));
        }
        room -= written;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::embedded::scratch::{Scratch, zipped};
    use std::io::Write;
    use zip::ZipWriter;
    use zip::write::SimpleFileOptions;

    fn unpacked(zip: &[u8]) -> Result<(), String> {
        let scratch = Scratch::new();
        let from = scratch.path().join("code.zip");
        fs::write(&from, zip).unwrap();
        let to = scratch.path().join("a/b");
        fs::create_dir_all(&to).unwrap();
        let outcome = unpack(&from, &to);
        let outside = fs::read_dir(scratch.path().join("a")).unwrap().count();
        assert_eq!(outside, 1, "something was written beside the directory");
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 2);
        outcome
    }

    #[test]
    fn good_and_bad_zips() {
        assert_eq!(unpacked(&zipped(&[("main.py", "1"), ("lib/a/b.py", "2"), ("x/../y", "3")])), Ok(()));
        for (name, zip) in [
            ("no zip", b"no zip at all".to_vec()),
            ("half", zipped(&[("main.py", "1")])[..40].to_vec()),
            ("escape", zipped(&[("../evil", "1")])),
            ("deep escape", zipped(&[("main.py", "1"), ("a/../../evil", "1")])),
            ("a file as a directory", zipped(&[("a", "1"), ("a/b", "1")])),
        ] {
            assert!(unpacked(&zip).unwrap_err().contains("not a good zip"), "{name}");
        }
        let missing = unpack(Path::new("/nowhere/code.zip"), Path::new("/nowhere")).unwrap_err();
        assert!(missing.contains("cannot be opened"), "{missing}");
    }

    #[test]
    fn absolute_names_stay_inside_or_are_refused() {
        let _ = unpacked(&zipped(&[("/tmp-evil-of-the-zip-test", "1")]));
        assert!(!Path::new("/tmp-evil-of-the-zip-test").exists());
    }

    #[test]
    fn links_are_refused() {
        let mut zip = ZipWriter::new(io::Cursor::new(Vec::new()));
        zip.add_symlink("out", "/etc", SimpleFileOptions::default()).unwrap();
        zip.start_file("out/passwd", SimpleFileOptions::default()).unwrap();
        let zip = zip.finish().unwrap().into_inner();
        assert!(unpacked(&zip).unwrap_err().contains("a link"));
    }

    #[test]
    fn a_bomb_is_refused() {
        let mut zip = ZipWriter::new(io::Cursor::new(Vec::new()));
        let zeros = vec![0_u8; 1 << 20];
        for name in ["a", "b"] {
            zip.start_file(name, SimpleFileOptions::default()).unwrap();
            (0..129).for_each(|_| zip.write_all(&zeros).unwrap());
        }
        let zip = zip.finish().unwrap().into_inner();
        assert!(unpacked(&zip).unwrap_err().contains("unpacks to more than"));
    }

    #[test]
    fn keys_stay_in_the_store() {
        let store = Path::new("/store");
        assert_eq!(locate(store, "functions/f/code.zip"), Some("/store/functions/f/code.zip".into()));
        for bad in ["", "/etc/passwd", "../x", "a/../../x", "."] {
            assert_eq!(locate(store, bad), None, "{bad}");
        }
    }
}
