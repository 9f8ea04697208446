//! What a good code archive is: a zip that unpacks to a bounded size, all of it inside the directory it is unpacked
//! to, with the file its runtime starts with at the top.
//!
//! Sizes and checksums that a zip states are not believed: it is unpacked once to see.

use super::Runtime;
use std::fmt;
use std::io::{self, Read, Seek};
use std::path::{Component, Path, PathBuf};
use zip::ZipArchive;
use zip::read::ZipFile;

/// Most bytes the code of a function may have unpacked.
pub const UNPACKED_BYTES_MAX: u64 = 256 << 20;
/// Most files and directories in a zip.
pub const ENTRIES_MAX: usize = 10_000;

/// Why an archive is no good, as a sentence for the function's owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArchiveProblem(String);

impl ArchiveProblem {
    fn new(why: impl fmt::Display) -> Self {
        Self(format!("The code is not a good zip: {why}."))
    }
}

impl fmt::Display for ArchiveProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One thing in an archive, on its way out of it.
pub enum Entry<'a> {
    Directory,
    /// The contents; reading past the bound of the whole archive fails.
    File(&'a mut dyn Read),
}

/// Checks an archive for `runtime`. Blocks for as long as it takes to unpack.
pub fn check(archive: impl Read + Seek, runtime: Runtime) -> Result<(), ArchiveProblem> {
    let mut entry_file = false;
    walk(archive, |path, entry| {
        if let Entry::File(contents) = entry {
            entry_file |= runtime.entry_files().iter().any(|name| path == Path::new(name));
            io::copy(contents, &mut io::sink())?;
        }
        Ok(())
    })?;
    let wanted = runtime.entry_files().join(" or ");
    entry_file.then_some(()).ok_or_else(|| {
        ArchiveProblem(format!(
            "The code has no {wanted} at the top of the zip, where {} starts.",
            runtime.name()
        ))
    })
}

/// Shows every entry with its path, which is relative and stays inside.
pub fn walk(
    archive: impl Read + Seek,
    mut each: impl FnMut(&Path, Entry<'_>) -> io::Result<()>,
) -> Result<(), ArchiveProblem> {
    let mut zip = ZipArchive::new(archive).map_err(ArchiveProblem::new)?;
    if zip.len() > ENTRIES_MAX {
        return Err(ArchiveProblem::new(format_args!("it has more than {ENTRIES_MAX} entries")));
    }
    let mut room = UNPACKED_BYTES_MAX;
    for index in 0..zip.len() {
        let mut entry = zip.by_index(index).map_err(ArchiveProblem::new)?;
        let path = path_inside(&entry)?;
        if entry.is_dir() {
            each(&path, Entry::Directory).map_err(ArchiveProblem::new)?;
            continue;
        }
        let mut bounded = Bounded { from: &mut entry, room: &mut room };
        each(&path, Entry::File(&mut bounded)).map_err(ArchiveProblem::new)?;
    }
    Ok(())
}

fn path_inside<R: Read>(entry: &ZipFile<'_, R>) -> Result<PathBuf, ArchiveProblem> {
    // A link could lead a later entry, or the run, out of the directory.
    if entry.is_symlink() {
        return Err(ArchiveProblem::new("it holds a link"));
    }
    let name = entry.name().map_err(ArchiveProblem::new)?;
    let path = Path::new(&*name);
    // A backslash is a name's letter here and a separator where the zip may have been made.
    let inside = path.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir))
        && !name.contains('\0')
        && !name.split(['/', '\\']).any(|part| part == "..");
    inside.then(|| path.to_path_buf()).ok_or_else(|| ArchiveProblem::new("an entry leads out of it"))
}

struct Bounded<'a> {
    from: &'a mut dyn Read,
    room: &'a mut u64,
}

impl Read for Bounded<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.from.read(buffer)?;
        *self.room = self
            .room
            .checked_sub(read as u64)
            .ok_or_else(|| io::Error::other(format!("it unpacks to more than {UNPACKED_BYTES_MAX} bytes")))?;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Cursor, Write};
    use zip::ZipWriter;
    use zip::write::SimpleFileOptions;

    fn zipped(files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        for (name, contents) in files {
            zip.start_file(*name, SimpleFileOptions::default()).unwrap();
            zip.write_all(contents).unwrap();
        }
        zip.finish().unwrap().into_inner()
    }

    fn checked(zip: &[u8], runtime: Runtime) -> Result<(), String> {
        check(Cursor::new(zip), runtime).map_err(|problem| problem.to_string())
    }

    #[test]
    fn each_runtime_has_its_entry_files() {
        for runtime in Runtime::ALL {
            for name in runtime.entry_files() {
                assert_eq!(checked(&zipped(&[("lib/x", b"1"), (name, b"2")]), runtime), Ok(()), "{name}");
            }
            let elsewhere = zipped(&[("app/main.py", b""), ("app/index.js", b""), ("app/main", b"")]);
            assert!(checked(&elsewhere, runtime).unwrap_err().contains("at the top"), "{runtime:?}");
        }
    }

    #[test]
    fn what_cannot_be_read_is_no_zip() {
        let good = zipped(&[("main.py", &b"print(1)\n".repeat(100))]);
        let mut bent = good.clone();
        bent[45] ^= 0xff; // within the contents: the checksum no longer fits
        for bad in [&b""[..], b"no zip", &good[..good.len() / 2], &bent] {
            assert!(checked(bad, Runtime::Python).unwrap_err().contains("not a good zip"));
        }
    }

    #[test]
    fn nothing_leads_out() {
        for name in ["../evil", "a/../../evil", "a/../b", "/etc/evil", "..\\evil", "a\\..\\..\\evil"] {
            let zip = zipped(&[("main.py", b"1"), (name, b"2")]);
            let problem = checked(&zip, Runtime::Python);
            assert!(problem.as_ref().is_err_and(|p| p.contains("leads out")), "{name}: {problem:?}");
        }
        let mut zip = ZipWriter::new(Cursor::new(zipped(&[("main.py", b"1")])));
        zip.add_symlink("out", "/etc", SimpleFileOptions::default()).unwrap();
        let zip = zip.finish().unwrap().into_inner();
        assert!(checked(&zip, Runtime::Python).unwrap_err().contains("link"));
    }

    #[test]
    fn the_unpacked_size_is_bounded_whatever_the_zip_says() {
        let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
        let zeros = vec![0_u8; 1 << 20];
        for name in ["main.py", "b"] {
            zip.start_file(name, SimpleFileOptions::default()).unwrap();
            (0..129).for_each(|_| zip.write_all(&zeros).unwrap());
        }
        let zip = zip.finish().unwrap().into_inner();
        assert!(checked(&zip, Runtime::Python).unwrap_err().contains("unpacks to more than"));
    }
}
