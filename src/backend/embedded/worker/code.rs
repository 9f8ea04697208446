//! The files of a run: the code from its zip in the local store, unpacked into a private directory.
//!
//! A cache of unpacked code was rejected. Runs would share files, or each run would need a copy, which costs
//! as much as unpacking.

use crate::code_archive;
use crate::code_archive::ArchiveEntry;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// The files of one run: `code` (its working directory), `home` (its HOME and TMPDIR) and `payload.json` (a
/// large input). They are deleted on drop.
pub(super) struct RunDir(PathBuf);

impl RunDir {
    /// Creates the directory `path`, accessible only to the user of the gateway.
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
        // The next start deletes the rest.
        if let Err(e) = fs::remove_dir_all(&self.0) {
            tracing::warn!(error = %e, "Directory of a run not deleted; the next start deletes it");
        }
    }
}

/// Unpacks the zip `from` into the directory `to`. The error is a sentence for the function's owner.
pub(super) fn unpack(from: &Path, to: &Path) -> Result<(), String> {
    let file = File::open(from).map_err(|e| format!("The code of the function cannot be opened: {e}."))?;
    let unpacked = code_archive::walk(file, |path, entry| {
        let path = to.join(path);
        let contents = match entry {
            ArchiveEntry::Directory => return fs::create_dir_all(path),
            ArchiveEntry::File(contents) => contents,
        };
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        io::copy(contents, &mut File::create(path)?).map(drop)
    });
    unpacked.map_err(|problem| problem.to_string())
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
    fn zips_are_unpacked_or_rejected() {
        assert_eq!(
            unpacked(&zipped(&[("main.py", "1"), ("lib/a/b.py", "2"), ("./y", "3"), ("d/", "")])),
            Ok(())
        );
        for (name, zip) in [
            ("no zip", b"no zip at all".to_vec()),
            ("half", zipped(&[("main.py", "1")])[..40].to_vec()),
            ("escape", zipped(&[("../evil", "1")])),
            ("deep escape", zipped(&[("main.py", "1"), ("a/../../evil", "1")])),
            ("a way in and out", zipped(&[("x/../y", "1")])),
            ("absolute", zipped(&[("/tmp-evil-of-the-zip-test", "1")])),
            ("a file as a directory", zipped(&[("a", "1"), ("a/b", "1")])),
        ] {
            assert!(unpacked(&zip).unwrap_err().contains("not a valid zip"), "{name}");
        }
        assert!(!Path::new("/tmp-evil-of-the-zip-test").exists());
        let missing = unpack(Path::new("/nowhere/code.zip"), Path::new("/nowhere")).unwrap_err();
        assert!(missing.contains("cannot be opened"), "{missing}");
    }

    #[test]
    fn links_are_rejected() {
        let mut zip = ZipWriter::new(io::Cursor::new(Vec::new()));
        zip.add_symlink("out", "/etc", SimpleFileOptions::default()).unwrap();
        zip.start_file("out/passwd", SimpleFileOptions::default()).unwrap();
        let zip = zip.finish().unwrap().into_inner();
        assert!(unpacked(&zip).unwrap_err().contains("a link"));
    }

    #[test]
    fn a_zip_bomb_is_rejected() {
        let mut zip = ZipWriter::new(io::Cursor::new(Vec::new()));
        let zeros = vec![0_u8; 1 << 20];
        for name in ["a", "b"] {
            zip.start_file(name, SimpleFileOptions::default()).unwrap();
            (0..129).for_each(|_| zip.write_all(&zeros).unwrap());
        }
        let zip = zip.finish().unwrap().into_inner();
        assert!(unpacked(&zip).unwrap_err().contains("unpacks to more than"));
    }
}
