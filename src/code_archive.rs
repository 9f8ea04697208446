//! Validates and unpacks code archives: zips with a bounded unpacked size, without paths outside the target
//! directory, and with an entry file of their runtime at the top level, or the module of their handler.
//!
//! The sizes and checksums that a zip states are not trusted. It is unpacked once to verify them. Uploads and
//! the local worker use the same code, so both accept the same archives.

use crate::model::{Handler, Runtime};
use std::cell::Cell;
use std::collections::HashSet;
use std::fmt;
use std::io::{self, BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use zip::read::ZipFile;
use zip::{System, ZipArchive};

/// Maximum size of the unpacked code, in bytes.
const UNPACKED_BYTES_MAX: u64 = 256 << 20;
/// Maximum number of files and directories in a zip.
const ENTRIES_MAX: usize = 10_000;
/// Maximum number of bytes read to list the entries of a zip: about 400 bytes for each of them.
const LIST_BYTES_MAX: u64 = 4 << 20;
/// Maximum length of the path of an entry, and of one name in it, in bytes. The limits of Linux, with room
/// for the path of the target directory.
const PATH_BYTES_MAX: usize = 2048;
const NAME_BYTES_MAX: usize = 255;

/// Why an archive was rejected, as a sentence for the owner of the function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArchiveProblem(String);

impl ArchiveProblem {
    fn new(why: impl fmt::Display) -> Self {
        Self(format!("The code is not a valid zip: {why}."))
    }
}

impl fmt::Display for ArchiveProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One entry of an archive.
pub enum ArchiveEntry<'a> {
    Directory,
    File {
        /// Reading fails beyond the maximum unpacked size of the whole archive.
        contents: &'a mut dyn Read,
        /// Whether the archive marks it as executable for anybody.
        is_executable: bool,
    },
}

/// Validates an archive for `runtime`. Blocks while the archive is unpacked; nothing is written. With a
/// handler, its module must be there, and no entry file, because that is not run.
///
/// # Errors
/// If the archive is not a valid zip, exceeds a limit, or does not contain the file that runs.
pub fn check(
    archive: impl Read + Seek,
    runtime: Runtime,
    handler: Option<&Handler>,
) -> Result<(), ArchiveProblem> {
    let wanted: Vec<String> = match handler {
        Some(handler) => handler.module_files(runtime),
        None => runtime.entry_files().iter().map(|name| (*name).to_owned()).collect(),
    };
    let mut is_found = false;
    walk(archive, |path, entry| {
        if let ArchiveEntry::File { contents, .. } = entry {
            is_found |= wanted.iter().any(|name| path == Path::new(name));
            io::copy(contents, &mut io::sink())?;
        }
        Ok(())
    })?;
    is_found.then_some(()).ok_or_else(|| {
        let names = wanted.join(" or ");
        ArchiveProblem(match handler {
            Some(_) => format!("The code has no {names}, the module of its handler."),
            None => {
                format!("The code has no {names} at the top of the zip, where {} starts.", runtime.name())
            }
        })
    })
}

/// Calls `each` for every entry, in the order of the zip. Paths are relative and inside the target directory.
/// Blocks.
///
/// # Errors
/// If the archive is not a valid zip or exceeds a limit, or if `each` fails.
pub fn walk(
    archive: impl Read + Seek,
    mut each: impl FnMut(&Path, ArchiveEntry<'_>) -> io::Result<()>,
) -> Result<(), ArchiveProblem> {
    let mut zip = open(archive)?;
    let mut room = UNPACKED_BYTES_MAX;
    let mut paths = Paths::default();
    for index in 0..zip.len() {
        let mut entry = zip.by_index(index).map_err(ArchiveProblem::new)?;
        let (path, is_dir) = path_inside(&entry)?;
        paths.add(&path, is_dir)?;
        if is_dir {
            each(&path, ArchiveEntry::Directory).map_err(ArchiveProblem::new)?;
            continue;
        }
        let is_executable = entry.unix_mode().is_some_and(|mode| mode & 0o111 != 0);
        let mut bounded = EntryReader { from: &mut entry, room: &mut room };
        let file = ArchiveEntry::File { contents: &mut bounded, is_executable };
        each(&path, file).map_err(ArchiveProblem::new)?;
    }
    Ok(())
}

/// Opens a zip whose list of entries has a bounded length and no repeated names.
///
/// The `zip` crate loads the list without a bound, and keeps only one of several entries with the same name.
/// So the bytes that it may read are limited, and the entries are counted separately.
fn open<R: Read + Seek>(archive: R) -> Result<ZipArchive<ListReader<R>>, ArchiveProblem> {
    let budget = Rc::new(Cell::new(LIST_BYTES_MAX));
    let reader = ListReader { from: archive, budget: Rc::clone(&budget) };
    let zip = ZipArchive::new(reader).map_err(ArchiveProblem::new)?;
    let (known, start) = (zip.len(), zip.central_directory_start());
    budget.set(LIST_BYTES_MAX);
    let mut reader = zip.into_inner();
    let listed = entries_listed(&mut reader, start).map_err(ArchiveProblem::new)?;
    if listed > ENTRIES_MAX {
        return Err(ArchiveProblem::new(format_args!("it has more than {ENTRIES_MAX} entries")));
    }
    if listed != known {
        return Err(ArchiveProblem::new("it contains a name twice"));
    }
    budget.set(LIST_BYTES_MAX);
    let zip = ZipArchive::new(reader).map_err(ArchiveProblem::new)?;
    budget.set(u64::MAX);
    Ok(zip)
}

/// Counts the headers of the central directory (APPNOTE 4.3.12), up to one more than [`ENTRIES_MAX`].
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
        // The lengths of the name, the extra field and the comment.
        let lengths = [28, 30, 32].map(|at| i64::from(u16::from_le_bytes([header[at], header[at + 1]])));
        reader.seek_relative(lengths.iter().sum())?;
    }
    Ok(ENTRIES_MAX + 1)
}

/// The path of an entry, relative to the target directory, and whether the entry is a directory.
fn path_inside<R: Read>(entry: &ZipFile<'_, R>) -> Result<(PathBuf, bool), ArchiveProblem> {
    // A link could redirect a later entry, or the run, outside the directory. Reading a pipe could block
    // forever.
    let kind = entry.unix_mode().map_or(0, |mode| mode & 0o170_000);
    if ![0, 0o100_000, 0o040_000].contains(&kind) {
        return Err(ArchiveProblem::new("it contains a link or another special file"));
    }
    let mut name = entry.name().map_err(ArchiveProblem::new)?;
    // A backslash is part of a name on Linux, and a separator on systems that may unpack the zip later.
    if name.starts_with(['/', '\\'])
        || name.contains('\0')
        || name.split(['/', '\\']).any(|part| part == "..")
        || (has_drives(entry.system()) && name.chars().nth(1) == Some(':'))
    {
        return Err(ArchiveProblem::new("the path of an entry leads outside the archive"));
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
        return Err(ArchiveProblem::new("an entry has an invalid name"));
    }
    Ok((parts.iter().collect(), is_dir))
}

/// Whether the file system that an entry comes from has drives (`C:`) and uses backslashes as separators.
///
/// APPNOTE 4.4.17 requires slashes, but PowerShell 5 and .NET before 4.6.1 write backslashes. On these
/// systems no name can contain a backslash, so the replacement is safe. 11 means MVS in APPNOTE 4.4.2, and
/// NTFS in zips of Info-ZIP.
fn has_drives(made_on: System) -> bool {
    matches!(made_on, System::Dos | System::Os2 | System::WindowsNTFS | System::MVS | System::VFAT)
}

/// The paths seen so far. No path may occur twice, or be both a file and a directory.
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
                return Err(ArchiveProblem::new("a file has the path of a directory"));
            }
            if !self.directories.insert(directory) {
                break; // its ancestors are known too
            }
        }
        if is_dir {
            return Ok(());
        }
        if self.directories.contains(path) {
            return Err(ArchiveProblem::new("a file has the path of a directory"));
        }
        let is_first = self.files.insert(path.to_path_buf());
        is_first.then_some(()).ok_or_else(|| ArchiveProblem::new("it contains a name twice"))
    }
}

/// A reader that fails when its budget is used up. The budget bounds memory, because the `zip` crate keeps
/// what it reads while it opens a zip.
struct ListReader<R> {
    from: R,
    budget: Rc<Cell<u64>>,
}

impl<R: Read> Read for ListReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.from.read(buffer)?;
        let left = self.budget.get().checked_sub(read as u64);
        self.budget.set(left.ok_or_else(|| io::Error::other("its list of entries is too long"))?);
        Ok(read)
    }
}

impl<R: Seek> Seek for ListReader<R> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.from.seek(to)
    }
}

/// A reader of one entry. `room` is what remains of the maximum unpacked size, shared by all entries.
struct EntryReader<'a> {
    from: &'a mut dyn Read,
    room: &'a mut u64,
}

impl Read for EntryReader<'_> {
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
        check(Cursor::new(zip), runtime, None).map_err(|problem| problem.to_string())
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
    fn a_handler_needs_its_module_and_no_entry_file() {
        let handler = Handler::parse("a.b.run");
        let check = |name, runtime| check(Cursor::new(zipped(&[(name, b"1")])), runtime, handler.as_ref());
        assert_eq!(check("a/b.py", Runtime::Python), Ok(()));
        assert_eq!(check("a/b/__init__.py", Runtime::Python), Ok(()));
        assert_eq!(check("a/b.mjs", Runtime::Nodejs), Ok(()));
        for name in ["main.py", "b.py", "a/b.js", "a/b/run.py", "a.b.py"] {
            let problem = check(name, Runtime::Python).unwrap_err().to_string();
            assert!(problem.contains("no a/b.py or a/b/__init__.py"), "{name}: {problem}");
        }
    }

    #[test]
    fn damaged_zips_are_rejected() {
        let good = zipped(&[("main.py", &b"print(1)\n".repeat(100))]);
        let mut bent = good.clone();
        bent[45] ^= 0xff; // inside the contents, so that the checksum does not match
        for bad in [&b""[..], b"no zip", &good[..good.len() / 2], &bent] {
            assert!(checked(bad, Runtime::Python).unwrap_err().contains("not a valid zip"));
        }
    }

    #[test]
    fn paths_outside_the_archive_are_rejected() {
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

    /// A zip whose headers name this system (the upper byte of "version made by").
    fn made_on(system: u8, files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut zip = zipped(files);
        let headers: Vec<usize> =
            (0..zip.len() - 4).filter(|at| zip[*at..].starts_with(b"PK\x01\x02")).collect();
        assert_eq!(headers.len(), files.len());
        for at in headers {
            zip[at + 5] = system;
            // The upper half of the attributes is a Unix mode only in zips made on Unix.
            zip[at + 38..at + 42].fill(0);
        }
        zip
    }

    #[test]
    fn a_backslash_is_a_separator_on_systems_with_drives() {
        let files: &[(&str, &[u8])] =
            &[("lib\\", b""), ("lib\\a.py", b"1"), ("lib\\b\\c.py", b"22"), (".\\main.py", b"333")];
        for system in 0..=19 {
            let mut seen = Vec::new();
            walk(Cursor::new(made_on(system, files)), |path, entry| {
                let bytes = match entry {
                    ArchiveEntry::Directory => None,
                    ArchiveEntry::File { contents, .. } => Some(io::copy(contents, &mut io::sink())?),
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
    fn a_backslash_does_not_bypass_the_checks() {
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
                ("a\\\\b", "an invalid name"),
                ("a\\.", "an invalid name"),
                ("main.py\\x", "path of a directory"),
                (".\\main.py", "a name twice"),
            ] {
                let zip = made_on(system, &[("main.py", b"1"), (name, b"2")]);
                let problem = checked(&zip, Runtime::Python).unwrap_err();
                assert!(problem.contains(told), "system {system}, {name}: {problem}");
            }
        }
        // On other systems a colon is an ordinary character.
        assert_eq!(checked(&made_on(3, &[("main.py", b"1"), ("C:x", b"2")]), Runtime::Python), Ok(()));
    }

    /// A zip in which a name is replaced, in its local headers and its central directory, by one of the same
    /// length.
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
    fn repeated_names_are_rejected() {
        let twice = renamed(&[("main.py", b"1"), ("aaaa", b"2"), ("bbbb", b"3")], "bbbb", "aaaa");
        assert!(checked(&twice, Runtime::Python).unwrap_err().contains("a name twice"));
        for (name, told) in [
            ("./main.py", "a name twice"),
            ("main.py/x", "path of a directory"),
            ("main.py/.", "an invalid name"),
            ("a//b", "an invalid name"),
            (&"n".repeat(256), "an invalid name"),
        ] {
            let zip = zipped(&[("main.py", b"1"), (name, b"2")]);
            let problem = checked(&zip, Runtime::Python).unwrap_err();
            assert!(problem.contains(told), "{name}: {problem}");
        }
        let late = zipped(&[("lib/a", b"1"), ("lib", b"2"), ("main.py", b"3")]);
        assert!(checked(&late, Runtime::Python).unwrap_err().contains("path of a directory"));
        assert_eq!(
            checked(&zipped(&[("./main.py", b"1"), ("lib/a", b"2"), ("lib/b", b"3")]), Runtime::Python),
            Ok(())
        );
    }

    #[test]
    fn the_list_of_entries_is_bounded_before_it_is_loaded() {
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
    fn the_unpacked_size_is_bounded_by_the_contents() {
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
