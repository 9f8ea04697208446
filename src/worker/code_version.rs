//! The unpacked code of one version of a function.
//!
//! It is a directory with the directory `code` in it: the files of the archive, without write permissions,
//! and the program that was compiled from them, if any. Runs use these very files, by hard links or by a
//! mount.

use super::owned_dir::{self, OwnedDir};
use crate::ambient;
use crate::backend::{BackendError, FetchError};
use crate::code_archive::{self, ArchiveEntry};
use nix::libc;
use rand::RngCore;
use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, BufReader, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::OnceCell;

/// Name of the archive in the directory in which it is unpacked.
pub(super) const ARCHIVE: &str = "code.zip";
/// Name of the executable of a compiled language, at the top of the code. It is executable in any case,
/// because not every tool that makes zips stores permissions.
pub(super) const PROGRAM: &str = "main";
/// Name of the directory with the code.
const CODE: &str = "code";
const DIRECTORY_MODE: u32 = 0o755;
const FILE_MODE: u32 = 0o444;
const EXECUTABLE_MODE: u32 = 0o555;
/// Most bytes of a compiled program.
pub(super) const PROGRAM_BYTES_MAX: u64 = 128 << 20;
/// Allocation unit of common file systems, in bytes. A file takes whole units, and about one for its inode
/// and its name.
const BLOCK_BYTES: u64 = 4096;

/// A file of the code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct CodeFile {
    /// Relative to the directory of the code.
    pub(super) path: PathBuf,
    pub(super) is_executable: bool,
}

/// Why an archive was not unpacked.
#[derive(Debug)]
pub(super) enum UnpackError {
    /// A sentence for the owner of the function.
    Archive(String),
    /// The disk of this worker.
    Disk(io::Error),
}

/// The code on the disk. It is deleted on drop, which blocks.
#[derive(Debug)]
pub(super) struct CodeVersion {
    dir: OwnedDir,
    code: PathBuf,
    /// In the order of their paths.
    files: Vec<CodeFile>,
    /// Parents before the directories in them.
    directories: BTreeSet<PathBuf>,
    bytes: AtomicU64,
    /// When it was last used, on the clock of the cache.
    pub(super) used_at: AtomicU64,
    /// The outcome of the compilation. The error is a sentence for the owner of the function.
    program: OnceCell<Result<(), String>>,
}

impl CodeVersion {
    /// Unpacks the archive in `draft`, and moves the result to `to`. Blocks.
    pub(super) fn unpack(mut draft: OwnedDir, to: PathBuf) -> Result<Self, UnpackError> {
        let archive = draft.path().join(ARCHIVE);
        let code = draft.path().join(CODE);
        owned_dir::make(&code, DIRECTORY_MODE).map_err(UnpackError::Disk)?;
        let file = File::open(&archive).map_err(UnpackError::Disk)?;
        let mut unpacked = unpack(file, &code)?;
        unpacked.files.sort_by(|a, b| a.path.cmp(&b.path));
        let moved = fs::remove_file(&archive)
            .and_then(|()| fs::set_permissions(draft.path(), Permissions::from_mode(DIRECTORY_MODE)))
            .and_then(|()| draft.move_to(to));
        moved.map_err(UnpackError::Disk)?;
        Ok(Self {
            code: draft.path().join(CODE),
            dir: draft,
            files: unpacked.files,
            directories: unpacked.directories,
            bytes: AtomicU64::new(unpacked.bytes),
            used_at: AtomicU64::new(0),
            program: OnceCell::new(),
        })
    }

    pub(super) fn code(&self) -> &Path {
        &self.code
    }

    /// The files of the archive, in the order of their paths.
    pub(super) fn files(&self) -> &[CodeFile] {
        &self.files
    }

    /// Size on the disk, in bytes, in whole blocks.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Makes the code appear in the empty directory `to`: by hard links, or by copies if that is wanted, or
    /// where a file system has no links, is another one, or allows no more links of a file. Blocks.
    ///
    /// # Errors
    /// Names the directory. Some of the files may be there.
    pub(super) fn link_into(&self, to: &Path, as_copies: bool) -> io::Result<()> {
        let named = |e: io::Error| io::Error::new(e.kind(), format!("{}: {e}", to.display()));
        for directory in &self.directories {
            owned_dir::make(&to.join(directory), DIRECTORY_MODE).map_err(named)?;
        }
        let is_compiled = self.program.get().is_some_and(Result::is_ok);
        let program = is_compiled.then(|| Path::new(PROGRAM));
        for path in self.files.iter().map(|file| file.path.as_path()).chain(program) {
            let (from, to) = (self.code.join(path), to.join(path));
            let linked = if as_copies { fs::copy(from, to).map(drop) } else { link(&from, &to) };
            linked.map_err(named)?;
        }
        Ok(())
    }

    /// Compiles the code once. `compile` gets an empty directory, in which it writes the file [`PROGRAM`].
    /// Concurrent callers share one compilation. [`FetchError::Missing`] is shared by later callers too,
    /// because the same code fails again; [`FetchError::Away`] is not. `grown` gets the size of the program,
    /// in bytes.
    pub(super) async fn compiled<F>(
        &self,
        compile: impl FnOnce(PathBuf) -> F,
        grown: impl FnOnce(u64),
    ) -> Result<(), FetchError>
    where
        F: Future<Output = Result<(), FetchError>>,
    {
        let compile = move || async move {
            match self.compile(compile).await {
                Ok(bytes) => {
                    grown(bytes);
                    Ok(Ok(()))
                }
                Err(FetchError::Missing(reason)) => Ok(Err(reason)),
                Err(away) => Err(away),
            }
        };
        self.program.get_or_try_init(compile).await?.clone().map_err(FetchError::Missing)
    }

    async fn compile<F>(&self, compile: impl FnOnce(PathBuf) -> F) -> Result<u64, FetchError>
    where
        F: Future<Output = Result<(), FetchError>>,
    {
        // A new one for each attempt: a thread of a cancelled one may still use its own.
        let attempt = self.dir.path().join(format!("build-{:016x}", ambient::rng().next_u64()));
        let broken = |e: io::Error| disk_away(self.dir.path(), &e);
        let made = ambient::blocking(move || -> io::Result<_> {
            let attempt = OwnedDir::create(attempt, 0o711)?;
            let out = attempt.path().join("out");
            owned_dir::make(&out, 0o700)?;
            Ok((attempt, out))
        });
        let (attempt, out) = made.await.map_err(broken)?;
        compile(out.clone()).await?;
        let code = self.code.clone();
        let added = ambient::blocking(move || add_program(&attempt, &out.join(PROGRAM), &code)).await;
        let bytes = added.map_err(|e| match e {
            UnpackError::Archive(reason) => FetchError::Missing(reason),
            UnpackError::Disk(e) => broken(e),
        })?;
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        Ok(bytes)
    }
}

/// A failure of the disk of this worker: the job stays on the queue, for another worker.
pub(super) fn disk_away(dir: &Path, e: &io::Error) -> FetchError {
    let dir = dir.display();
    let text = match e.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            format!("the disk of the code cache in {dir} is full: {e}")
        }
        _ => format!("the code cache in {dir} cannot be written: {e}"),
    };
    BackendError::Unavailable(text).into()
}

/// What an archive contained.
#[derive(Default)]
struct Unpacked {
    files: Vec<CodeFile>,
    directories: BTreeSet<PathBuf>,
    bytes: u64,
    buffer: Vec<u8>,
}

/// Unpacks an archive into the directory `code`.
fn unpack(archive: File, code: &Path) -> Result<Unpacked, UnpackError> {
    let mut unpacked = Unpacked { buffer: vec![0; 64 << 10], ..Unpacked::default() };
    // An error of the disk is not one of the archive, but passes through its reader.
    let mut failed = None;
    let walked = code_archive::walk(BufReader::new(archive), |path, entry| {
        unpacked.add(code, path, entry).map_err(|e| match e {
            UnpackError::Archive(reason) => io::Error::other(reason),
            UnpackError::Disk(e) => {
                failed = Some(e);
                io::ErrorKind::Other.into()
            }
        })
    });
    match (failed, walked) {
        (Some(e), _) => Err(UnpackError::Disk(e)),
        (None, Err(problem)) => Err(UnpackError::Archive(problem.to_string())),
        (None, Ok(())) => Ok(unpacked),
    }
}

impl Unpacked {
    fn add(&mut self, code: &Path, path: &Path, entry: ArchiveEntry<'_>) -> Result<(), UnpackError> {
        let (contents, is_executable) = match entry {
            ArchiveEntry::Directory => return self.add_directory(code, path),
            ArchiveEntry::File { contents, is_executable } => (contents, is_executable),
        };
        if path.as_os_str().is_empty() {
            return Err(UnpackError::Archive("an entry has an invalid name".into()));
        }
        if let Some(parent) = path.parent() {
            self.add_directory(code, parent)?;
        }
        let is_executable = is_executable || path == Path::new(PROGRAM);
        let to = OpenOptions::new().write(true).create_new(true).mode(0o600).open(code.join(path));
        let mut to = to.map_err(not_created)?;
        let bytes = self.write(contents, &mut to)?;
        let mode = if is_executable { EXECUTABLE_MODE } else { FILE_MODE };
        to.set_permissions(Permissions::from_mode(mode)).map_err(UnpackError::Disk)?;
        self.bytes += bytes_on_disk(bytes);
        self.files.push(CodeFile { path: path.to_owned(), is_executable });
        Ok(())
    }

    /// Creates a directory and those above it.
    fn add_directory(&mut self, code: &Path, path: &Path) -> Result<(), UnpackError> {
        let is_new = |dir: &&Path| !dir.as_os_str().is_empty() && !self.directories.contains(*dir);
        let missing: Vec<&Path> = path.ancestors().take_while(is_new).collect();
        for directory in missing.into_iter().rev() {
            owned_dir::make(&code.join(directory), DIRECTORY_MODE).map_err(not_created)?;
            self.directories.insert(directory.to_owned());
            self.bytes += bytes_on_disk(0);
        }
        Ok(())
    }

    /// Copies the contents of an entry. Returns their length.
    fn write(&mut self, contents: &mut dyn Read, to: &mut File) -> Result<u64, UnpackError> {
        let mut bytes = 0;
        loop {
            match contents.read(&mut self.buffer) {
                Ok(0) => return Ok(bytes),
                Ok(read) => {
                    to.write_all(&self.buffer[..read]).map_err(UnpackError::Disk)?;
                    bytes += read as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(UnpackError::Archive(e.to_string())),
            }
        }
    }
}

/// A name that this file system does not take, such as one that differs from another in case only, will not
/// be taken by a second attempt.
fn not_created(e: io::Error) -> UnpackError {
    use io::ErrorKind::{AlreadyExists, InvalidFilename, InvalidInput, IsADirectory, NotADirectory};
    match e.kind() {
        AlreadyExists | InvalidFilename | InvalidInput | IsADirectory | NotADirectory => {
            UnpackError::Archive(format!("an entry cannot be created: {e}"))
        }
        _ => UnpackError::Disk(e),
    }
}

fn bytes_on_disk(len: u64) -> u64 {
    (len.div_ceil(BLOCK_BYTES) + 1) * BLOCK_BYTES
}

/// Links a file of the code, or copies it with its permissions.
fn link(from: &Path, to: &Path) -> io::Result<()> {
    use io::ErrorKind::{CrossesDevices, PermissionDenied, TooManyLinks, Unsupported};
    match fs::hard_link(from, to) {
        // Some file systems without links report EPERM.
        Err(e) if [CrossesDevices, PermissionDenied, TooManyLinks, Unsupported].contains(&e.kind()) => {
            fs::copy(from, to).map(drop)
        }
        linked => linked,
    }
}

/// Copies the compiled program to the code. It is copied, because its owner may be another user, who could
/// change it. Returns its size on the disk.
fn add_program(attempt: &OwnedDir, made: &Path, code: &Path) -> Result<u64, UnpackError> {
    // A link would lead to a file of the worker, and a pipe would block.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY;
    let no_program = || UnpackError::Archive("The compiler made no program.".into());
    let from = OpenOptions::new().read(true).custom_flags(flags).open(made).map_err(|_| no_program())?;
    let metadata = from.metadata().map_err(UnpackError::Disk)?;
    if !metadata.is_file() {
        return Err(no_program());
    }
    if metadata.len() > PROGRAM_BYTES_MAX {
        let reason = format!("The compiled program has more than {PROGRAM_BYTES_MAX} bytes.");
        return Err(UnpackError::Archive(reason));
    }
    let draft = attempt.path().join(PROGRAM);
    let copied = File::create_new(&draft).and_then(|mut to| {
        io::copy(&mut from.take(metadata.len()), &mut to)?;
        to.set_permissions(Permissions::from_mode(EXECUTABLE_MODE))
    });
    copied.map_err(UnpackError::Disk)?;
    fs::rename(&draft, code.join(PROGRAM)).map_err(|e| match e.kind() {
        io::ErrorKind::IsADirectory => UnpackError::Archive(format!(
            "The code has a directory `{PROGRAM}` at the top of the zip, where the compiled program is put."
        )),
        _ => UnpackError::Disk(e),
    })?;
    Ok(bytes_on_disk(metadata.len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::embedded::scratch::zipped;
    use std::os::unix::fs::MetadataExt;
    use zip::ZipWriter;
    use zip::write::SimpleFileOptions;

    fn unpacked(scratch: &Path, zip: &[u8]) -> Result<CodeVersion, UnpackError> {
        let draft = OwnedDir::create(scratch.join("draft"), 0o700).unwrap();
        fs::write(draft.path().join(ARCHIVE), zip).unwrap();
        CodeVersion::unpack(draft, scratch.join("version"))
    }

    /// A zip whose files have these permissions.
    fn zipped_with(files: &[(&str, u32)]) -> Vec<u8> {
        let mut zip = ZipWriter::new(io::Cursor::new(Vec::new()));
        for (name, mode) in files {
            let options = SimpleFileOptions::default().unix_permissions(*mode);
            if name.ends_with('/') {
                zip.add_directory(*name, options).unwrap();
            } else {
                zip.start_file(*name, options).unwrap();
                zip.write_all(name.as_bytes()).unwrap();
            }
        }
        zip.finish().unwrap().into_inner()
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o7777
    }

    #[test]
    fn files_are_read_only_and_executable_where_the_archive_says_so() {
        let scratch = tempfile::tempdir().unwrap();
        let zip = zipped_with(&[
            ("main.py", 0o666),
            ("tools/deep/run", 0o711),
            ("tools/text", 0o600),
            ("main", 0o644),
            ("deep/main", 0o644),
            ("empty/", 0o755),
        ]);
        let version = unpacked(scratch.path(), &zip).unwrap();
        let expected = [
            ("deep/main", false),
            ("main", true),
            ("main.py", false),
            ("tools/deep/run", true),
            ("tools/text", false),
        ];
        let file = |(path, is_executable): (&str, bool)| CodeFile { path: path.into(), is_executable };
        assert_eq!(version.files(), expected.map(file));
        for CodeFile { path, is_executable } in version.files() {
            let path = version.code().join(path);
            assert_eq!(mode(&path), if *is_executable { 0o555 } else { 0o444 }, "{}", path.display());
            assert!(path.ends_with(fs::read_to_string(&path).unwrap()));
        }
        for directory in ["", "deep", "empty", "tools", "tools/deep"] {
            assert_eq!(mode(&version.code().join(directory)), 0o755, "{directory}");
        }
        // Two blocks for each of the five files, and one for each of the four directories.
        assert_eq!(version.bytes(), (5 * 2 + 4) * 4096);
        let names = || fs::read_dir(scratch.path()).unwrap().count();
        assert_eq!((names(), fs::read_dir(scratch.path().join("version")).unwrap().count()), (1, 1));
        drop(version);
        assert_eq!(names(), 0);
    }

    #[test]
    fn bad_archives_are_rejected_and_leave_nothing() {
        let scratch = tempfile::tempdir().unwrap();
        let place = scratch.path().join("place");
        fs::create_dir(&place).unwrap();
        let mut link = ZipWriter::new(io::Cursor::new(Vec::new()));
        link.add_symlink("out", "/etc", SimpleFileOptions::default()).unwrap();
        let link = link.finish().unwrap().into_inner();
        for (name, zip) in [
            ("no zip", b"no zip at all".to_vec()),
            ("half", zipped(&[("main.py", "1")])[..40].to_vec()),
            ("escape", zipped(&[("main.py", "1"), ("../evil", "1")])),
            ("absolute", zipped(&[("/tmp-evil-of-the-zip-test", "1")])),
            ("a file as a directory", zipped(&[("a", "1"), ("a/b", "1")])),
            ("no name", zipped(&[(".", "1")])),
            ("a link", link),
        ] {
            let UnpackError::Archive(reason) = unpacked(&place, &zip).unwrap_err() else { panic!("{name}") };
            assert!(reason.contains("not a valid zip"), "{name}: {reason}");
            assert_eq!(fs::read_dir(&place).unwrap().count(), 0, "{name}");
        }
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1);
        assert!(!Path::new("/tmp-evil-of-the-zip-test").exists());
    }

    #[test]
    fn a_full_disk_is_not_an_error_of_the_archive() {
        let mut unpacked = Unpacked { buffer: vec![0; 16], ..Unpacked::default() };
        let mut full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let Err(UnpackError::Disk(e)) = unpacked.write(&mut &b"text"[..], &mut full) else { panic!() };
        let FetchError::Away(away) = disk_away(Path::new("/the/cache"), &e) else { panic!() };
        assert!(away.to_string().contains("/the/cache is full"), "{away}");
        let mut null = OpenOptions::new().write(true).open("/dev/null").unwrap();
        assert_eq!(unpacked.write(&mut &b"a text of 22 bytes ..."[..], &mut null).unwrap(), 22);
        let mut broken = io::BufReader::new(File::open("/").unwrap());
        assert!(matches!(unpacked.write(&mut broken, &mut null), Err(UnpackError::Archive(_))));
        assert!(matches!(not_created(io::ErrorKind::StorageFull.into()), UnpackError::Disk(_)));
        assert!(matches!(not_created(io::ErrorKind::AlreadyExists.into()), UnpackError::Archive(_)));
    }

    #[test]
    fn code_is_linked_or_copied() {
        let scratch = tempfile::tempdir().unwrap();
        let zip = zipped_with(&[("main.py", 0o644), ("a/b/run", 0o755), ("empty/", 0o755)]);
        let version = unpacked(scratch.path(), &zip).unwrap();
        let inode = |path: PathBuf| fs::metadata(path).map(|meta| (meta.dev(), meta.ino())).unwrap();
        for slot in ["one", "two"] {
            let slot = scratch.path().join(slot);
            fs::create_dir(&slot).unwrap();
            version.link_into(&slot, false).unwrap();
            for file in version.files() {
                assert_eq!(inode(slot.join(&file.path)), inode(version.code().join(&file.path)));
            }
            assert!(slot.join("empty").is_dir());
            let twice = version.link_into(&slot, false).unwrap_err();
            assert!(twice.to_string().contains(slot.to_str().unwrap()), "{twice}");
            fs::remove_dir_all(&slot).unwrap();
            fs::create_dir(&slot).unwrap();
            version.link_into(&slot, true).unwrap();
            assert_ne!(inode(slot.join("main.py")), inode(version.code().join("main.py")));
            fs::remove_dir_all(&slot).unwrap();
        }
        assert_eq!(fs::metadata(version.code().join("main.py")).unwrap().nlink(), 1);
        let far = tempfile::tempdir_in("/dev/shm").unwrap();
        version.link_into(far.path(), false).unwrap();
        for (path, expected) in [("main.py", 0o444), ("a/b/run", 0o555)] {
            assert_eq!(mode(&far.path().join(path)), expected, "{path}");
            assert_eq!(fs::read_to_string(far.path().join(path)).unwrap(), path);
        }
    }

    #[test]
    fn only_a_regular_file_becomes_the_program() {
        let scratch = tempfile::tempdir().unwrap();
        let version = unpacked(scratch.path(), &zipped(&[("main.go", "1")])).unwrap();
        let attempt = || OwnedDir::create(scratch.path().join("attempt"), 0o711).unwrap();
        let made = scratch.path().join("made");
        let reason = |made: &Path| match add_program(&attempt(), made, version.code()) {
            Err(UnpackError::Archive(reason)) => reason,
            other => panic!("{other:?}"),
        };
        assert!(reason(&made).contains("made no program"));
        std::os::unix::fs::symlink("/bin/true", &made).unwrap();
        assert!(reason(&made).contains("made no program"));
        assert!(reason(Path::new("/")).contains("made no program"));
        fs::remove_file(&made).unwrap();
        fs::write(&made, vec![7_u8; 5000]).unwrap();
        assert_eq!(add_program(&attempt(), &made, version.code()).unwrap(), 3 * 4096);
        assert_eq!(mode(&version.code().join(PROGRAM)), 0o555);
        let other = scratch.path().join("other");
        fs::create_dir_all(other.join(PROGRAM)).unwrap();
        let UnpackError::Archive(reason) = add_program(&attempt(), &made, &other).unwrap_err() else {
            panic!()
        };
        assert!(reason.contains("a directory `main`"), "{reason}");
    }
}
