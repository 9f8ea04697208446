//! What a good code archive is: a zip that unpacks to a bounded size, all of it inside the directory it is unpacked
//! to, with the file its runtime starts with at the top.
//!
//! Sizes and checksums that a zip states are not believed: it is unpacked once to see.

use crate::model::Runtime;
use std::cell::Cell;
use std::collections::HashSet;
use std::fmt;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use zip::read::ZipFile;
use zip::{System, ZipArchive};

/// Most bytes the code of a function may have unpacked.
const UNPACKED_BYTES_MAX: u64 = 256 << 20;
/// Most files and directories in a zip.
const ENTRIES_MAX: usize = 10_000;
/// Most bytes that are read of a zip to find its entries: as many as that with long names.
const LIST_BYTES_MAX: u64 = 4 << 20;
/// Longest path of an entry, and longest name in it, in bytes: what Linux takes, with room for where it is unpacked.
const PATH_BYTES_MAX: usize = 2048;
const NAME_BYTES_MAX: usize = 255;

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
    let mut zip = open(archive)?;
    let mut room = UNPACKED_BYTES_MAX;
    let mut paths = Paths::default();
    for index in 0..zip.len() {
        let mut entry = zip.by_index(index).map_err(ArchiveProblem::new)?;
        let (path, is_dir) = path_inside(&entry)?;
        paths.add(&path, is_dir)?;
        if is_dir {
            each(&path, Entry::Directory).map_err(ArchiveProblem::new)?;
            continue;
        }
        let mut bounded = Bounded { from: &mut entry, room: &mut room };
        each(&path, Entry::File(&mut bounded)).map_err(ArchiveProblem::new)?;
    }
    Ok(())
}

/// Opens a zip whose list of entries is of bounded length and names each once.
///
/// The reader keeps one entry of a name and all entries in memory, so neither can be seen from its own list.
fn open<R: Read + Seek>(archive: R) -> Result<ZipArchive<Budgeted<R>>, ArchiveProblem> {
    let budget = Rc::new(Cell::new(LIST_BYTES_MAX));
    let reader = Budgeted { from: archive, budget: Rc::clone(&budget) };
    let zip = ZipArchive::new(reader).map_err(ArchiveProblem::new)?;
    let (known, start) = (zip.len(), zip.central_directory_start());
    budget.set(LIST_BYTES_MAX);
    let mut reader = zip.into_inner();
    let listed = entries_listed(&mut reader, start).map_err(ArchiveProblem::new)?;
    if listed > ENTRIES_MAX {
        return Err(ArchiveProblem::new(format_args!("it has more than {ENTRIES_MAX} entries")));
    }
    if listed != known {
        return Err(ArchiveProblem::new("it holds a name twice"));
    }
    budget.set(LIST_BYTES_MAX);
    let zip = ZipArchive::new(reader).map_err(ArchiveProblem::new)?;
    budget.set(u64::MAX);
    Ok(zip)
}

/// Counts the headers of the central directory (APPNOTE 4.3.12), up to one more than there may be.
fn entries_listed(reader: &mut (impl Read + Seek), start: u64) -> io::Result<usize> {
    const SIGNATURE: [u8; 4] = *b"PK\x01\x02";
    const FIXED_BYTES: usize = 46;
    let mut reader = BufReader::new(reader);
    reader.seek(SeekFrom::Start(start))?;
    for count in 0..=ENTRIES_MAX {
        let mut header = [0; FIXED_BYTES];
        reader.read_exact(&mut header[..4])?;
        if header[..4] != SIGNATURE {
            return Ok(count);
        }
        reader.read_exact(&mut header[4..])?;
        // Lengths of the name, the extra field and the comment.
        let lengths = [28, 30, 32].map(|at| i64::from(u16::from_le_bytes([header[at], header[at + 1]])));
        reader.seek_relative(lengths.iter().sum())?;
    }
    Ok(ENTRIES_MAX + 1)
}

/// Where an entry goes, and whether it is a directory.
fn path_inside<R: Read>(entry: &ZipFile<'_, R>) -> Result<(PathBuf, bool), ArchiveProblem> {
    // A link could lead a later entry, or the run, out of the directory; a pipe could hold it up for good.
    let kind = entry.unix_mode().map_or(0, |mode| mode & 0o170_000);
    if ![0, 0o100_000, 0o040_000].contains(&kind) {
        return Err(ArchiveProblem::new("it holds a link, or what is neither file nor directory"));
    }
    let mut name = entry.name().map_err(ArchiveProblem::new)?;
    // A backslash is a letter of a name here, and a separator where the zip may be unpacked later.
    if name.starts_with(['/', '\\'])
        || name.contains('\0')
        || name.split(['/', '\\']).any(|part| part == "..")
        || (has_drives(entry.system()) && name.chars().nth(1) == Some(':'))
    {
        return Err(ArchiveProblem::new("an entry leads out of it"));
    }
    if has_drives(entry.system()) {
        name = name.replace('\\', "/").into();
    }
    let is_dir = name.ends_with('/');
    let mut parts: Vec<&str> = name.split('/').collect();
    if is_dir {
        parts.pop();
    }
    parts.retain(|part| *part != ".");
    let fits = |part: &&str| (1..=NAME_BYTES_MAX).contains(&part.len());
    if name.ends_with("/.") || name.len() > PATH_BYTES_MAX || !parts.iter().all(fits) {
        return Err(ArchiveProblem::new("an entry has a name that no file can have"));
    }
    Ok((parts.iter().collect(), is_dir))
}

/// Whether the file system that an entry comes from has drives (`C:`), and separates names by backslashes.
///
/// APPNOTE 4.4.17 wants slashes, but PowerShell 5 and .NET before 4.6.1 write backslashes. On these systems
/// no name can hold one, so nothing is lost. 11 is MVS in APPNOTE 4.4.2, and NTFS in the zips of Info-ZIP.
fn has_drives(made_on: System) -> bool {
    matches!(made_on, System::Dos | System::Os2 | System::WindowsNTFS | System::MVS | System::VFAT)
}

/// The paths so far: each stands once, and no file is a directory as well.
#[derive(Default)]
struct Paths {
    files: HashSet<PathBuf>,
    directories: HashSet<PathBuf>,
}

impl Paths {
    fn add(&mut self, path: &Path, is_dir: bool) -> Result<(), ArchiveProblem> {
        let above = path.ancestors().skip(usize::from(!is_dir)).map(Path::to_path_buf);
        for directory in above {
            if self.files.contains(&directory) {
                return Err(ArchiveProblem::new("a file is a directory as well"));
            }
            if !self.directories.insert(directory) {
                break; // and so are all above it
            }
        }
        if is_dir {
            return Ok(());
        }
        if self.directories.contains(path) {
            return Err(ArchiveProblem::new("a file is a directory as well"));
        }
        let is_first = self.files.insert(path.to_path_buf());
        is_first.then_some(()).ok_or_else(|| ArchiveProblem::new("it holds a name twice"))
    }
}

/// Reads at most so much, and fails then: what is read while a zip is opened stays in memory.
struct Budgeted<R> {
    from: R,
    budget: Rc<Cell<u64>>,
}

impl<R: Read> Read for Budgeted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.from.read(buffer)?;
        let left = self.budget.get().checked_sub(read as u64);
        self.budget.set(left.ok_or_else(|| io::Error::other("its list of entries is too long"))?);
        Ok(read)
    }
}

impl<R: Seek> Seek for Budgeted<R> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.from.seek(to)
    }
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

    /// A zip that says it was made on the system of this number (the upper byte of "version made by").
    fn made_on(system: u8, files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut zip = zipped(files);
        let headers: Vec<usize> =
            (0..zip.len() - 4).filter(|at| zip[*at..].starts_with(b"PK\x01\x02")).collect();
        assert_eq!(headers.len(), files.len());
        for at in headers {
            zip[at + 5] = system;
            // The upper half of the attributes is a Unix mode only where Unix made the zip.
            zip[at + 38..at + 42].fill(0);
        }
        zip
    }

    #[test]
    fn a_backslash_separates_where_the_system_has_drives() {
        let files: &[(&str, &[u8])] =
            &[("lib\\", b""), ("lib\\a.py", b"1"), ("lib\\b\\c.py", b"22"), (".\\main.py", b"333")];
        for system in 0..=19 {
            let mut seen = Vec::new();
            walk(Cursor::new(made_on(system, files)), |path, entry| {
                let bytes = match entry {
                    Entry::Directory => None,
                    Entry::File(contents) => Some(io::copy(contents, &mut io::sink())?),
                };
                seen.push((path.to_str().unwrap().to_owned(), bytes));
                Ok(())
            })
            .unwrap();
            let expected = match system {
                0 | 6 | 10 | 11 | 14 => {
                    [("lib", None), ("lib/a.py", Some(1)), ("lib/b/c.py", Some(2)), ("main.py", Some(3))]
                }
                _ => [
                    ("lib\\", Some(0)),
                    ("lib\\a.py", Some(1)),
                    ("lib\\b\\c.py", Some(2)),
                    (".\\main.py", Some(3)),
                ],
            };
            assert_eq!(seen, expected.map(|(path, bytes)| (path.to_owned(), bytes)), "system {system}");
        }
    }

    #[test]
    fn a_backslash_hides_nothing() {
        for system in [0, 6, 10, 11, 14] {
            for (name, told) in [
                ("..\\evil", "leads out"),
                ("a\\..\\..\\evil", "leads out"),
                ("a/..\\evil", "leads out"),
                ("\\evil", "leads out"),
                ("\\\\server\\share\\evil", "leads out"),
                ("C:\\evil", "leads out"),
                ("c:/evil", "leads out"),
                ("C:evil", "leads out"),
                ("a\\\\b", "no file can have"),
                ("a\\.", "no file can have"),
                ("main.py\\x", "a directory as well"),
                (".\\main.py", "a name twice"),
            ] {
                let zip = made_on(system, &[("main.py", b"1"), (name, b"2")]);
                let problem = checked(&zip, Runtime::Python).unwrap_err();
                assert!(problem.contains(told), "system {system}, {name}: {problem}");
            }
        }
        // Elsewhere a colon is a letter like others.
        assert_eq!(checked(&made_on(3, &[("main.py", b"1"), ("C:x", b"2")]), Runtime::Python), Ok(()));
    }

    /// A zip whose names are replaced, in both its lists, by others of the same length.
    fn renamed(files: &[(&str, &[u8])], from: &str, to: &str) -> Vec<u8> {
        let mut zip = zipped(files);
        let (from, to) = (from.as_bytes(), to.as_bytes());
        assert_eq!(from.len(), to.len());
        for at in 0..zip.len() - from.len() {
            if &zip[at..at + from.len()] == from {
                zip[at..at + from.len()].copy_from_slice(to);
            }
        }
        zip
    }

    #[test]
    fn each_name_stands_once() {
        let twice = renamed(&[("main.py", b"1"), ("aaaa", b"2"), ("bbbb", b"3")], "bbbb", "aaaa");
        assert!(checked(&twice, Runtime::Python).unwrap_err().contains("a name twice"));
        for (name, told) in [
            ("./main.py", "a name twice"),
            ("main.py/x", "a directory as well"),
            ("main.py/.", "no file can have"),
            ("a//b", "no file can have"),
            (&"n".repeat(256), "no file can have"),
        ] {
            let zip = zipped(&[("main.py", b"1"), (name, b"2")]);
            let problem = checked(&zip, Runtime::Python).unwrap_err();
            assert!(problem.contains(told), "{name}: {problem}");
        }
        let late = zipped(&[("lib/a", b"1"), ("lib", b"2"), ("main.py", b"3")]);
        assert!(checked(&late, Runtime::Python).unwrap_err().contains("a directory as well"));
        assert_eq!(
            checked(&zipped(&[("./main.py", b"1"), ("lib/a", b"2"), ("lib/b", b"3")]), Runtime::Python),
            Ok(())
        );
    }

    #[test]
    fn the_list_of_entries_is_bounded_before_it_is_in_memory() {
        let names: Vec<String> = (0..=ENTRIES_MAX).map(|n| format!("{n:06}")).collect();
        let mut files: Vec<(&str, &[u8])> = names.iter().map(|name| (name.as_str(), &b""[..])).collect();
        assert!(checked(&zipped(&files), Runtime::Python).unwrap_err().contains("more than 10000"));
        files.truncate(ENTRIES_MAX - 1);
        files.push(("main.py", b"1"));
        assert_eq!(checked(&zipped(&files), Runtime::Python), Ok(()));
        let long: Vec<String> = (0..60_000).map(|n| format!("{n:060}")).collect();
        let files: Vec<(&str, &[u8])> = long.iter().map(|name| (name.as_str(), &b""[..])).collect();
        assert!(checked(&zipped(&files), Runtime::Python).unwrap_err().contains("too long"));
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
