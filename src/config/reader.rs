//! Reads the small files that configure the process: regular files, with a size limit and a deadline.
//!
//! A file name may refer to anything. A FIFO, a device or a file system that does not answer would block the
//! reader forever. So a separate thread reads, and the caller waits for it until the deadline. A thread that
//! hangs cannot be ended. It is abandoned with its file, and only that file is unreadable until the thread
//! returns.
//!
//! Asynchronous file I/O was rejected: it uses such threads as well, and the start reads files before there
//! is a runtime.

use nix::fcntl::OFlag;
use std::collections::HashMap;
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

/// Largest file that is read, in bytes. 10,000 keys of 800 bytes fit.
pub const FILE_BYTES_MAX: u64 = 8 << 20;
/// Most reads that hang at the same time, and so most threads that are left behind.
pub const HANGING_MAX: usize = 16;
/// The error for a file that keeps changing.
pub const CHANGES: &str = "changes while it is read; write a temporary file, then rename it";
/// Most reads of a file that changes meanwhile.
const TRIES_MAX: usize = 10;

/// The contents of a file. `Ok(None)`: there is no such file.
pub type FileBytes = Result<Option<Vec<u8>>, FileError>;

/// Why a file cannot be used, as text to append to its name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FileError {
    #[error("does not exist, and neither does its directory")]
    NoDirectory,
    #[error("{0}")]
    Unusable(String),
}

impl From<String> for FileError {
    fn from(problem: String) -> Self {
        Self::Unusable(problem)
    }
}

/// Reads files one after the other. Blocks the caller, at most until the deadline.
pub struct FileReader {
    deadline: Duration,
    read: Arc<dyn Fn(&Path) -> FileBytes + Send + Sync>,
    /// Idle between two calls. `None`: the next call starts it.
    worker: Option<ReaderThread>,
    /// The files whose reads have not returned, with the channels of their results.
    hanging: HashMap<PathBuf, Receiver<FileBytes>>,
}

struct ReaderThread {
    paths: SyncSender<PathBuf>,
    results: Receiver<FileBytes>,
    thread: JoinHandle<()>,
}

impl FileReader {
    pub fn new(deadline: Duration) -> Self {
        Self::with(deadline, read_file)
    }

    fn with(deadline: Duration, read: impl Fn(&Path) -> FileBytes + Send + Sync + 'static) -> Self {
        Self { deadline, read: Arc::new(read), worker: None, hanging: HashMap::new() }
    }

    /// Reads a file. Fails immediately while an earlier read of the same file hangs.
    pub fn read(&mut self, path: &Path) -> FileBytes {
        if let Some(result) = self.hanging.get(path) {
            match result.try_recv() {
                Err(TryRecvError::Empty) => return Err(self.hangs()),
                Ok(read) => {
                    self.hanging.remove(path);
                    return read;
                }
                Err(TryRecvError::Disconnected) => drop(self.hanging.remove(path)),
            }
        }
        if self.hanging.len() >= HANGING_MAX {
            self.hanging.retain(|_, result| matches!(result.try_recv(), Err(TryRecvError::Empty)));
        }
        if self.hanging.len() >= HANGING_MAX {
            return Err(format!("is not read: {HANGING_MAX} other files do not answer").into());
        }
        let worker = match self.worker.take() {
            Some(worker) => worker,
            None => {
                ReaderThread::start(Arc::clone(&self.read)).map_err(|e| format!("cannot be read: {e}"))?
            }
        };
        let is_asked = worker.paths.send(path.to_owned()).is_ok();
        match worker.results.recv_timeout(self.deadline) {
            Ok(read) => {
                self.worker = Some(worker);
                read
            }
            Err(RecvTimeoutError::Timeout) if is_asked => {
                self.hanging.insert(path.to_owned(), worker.results);
                Err(self.hangs())
            }
            Err(_) => Err("cannot be read: the reading thread has ended".to_owned().into()),
        }
    }

    fn hangs(&self) -> FileError {
        format!("cannot be read: its file system has not answered for {} ms", self.deadline.as_millis())
            .into()
    }

    /// Ends the reading thread and waits for its end. `false`: it hangs.
    pub fn finish(mut self) -> bool {
        let ended = self.worker.take().is_none_or(|worker| {
            drop(worker.paths);
            worker.thread.join().is_ok()
        });
        ended && self.hanging.is_empty()
    }
}

impl ReaderThread {
    /// Starts the thread. It ends when its worker is dropped, or else when its current read returns.
    fn start(read: Arc<dyn Fn(&Path) -> FileBytes + Send + Sync>) -> io::Result<Self> {
        let (paths, asked) = sync_channel::<PathBuf>(1);
        let (answer, results) = sync_channel(1);
        let run = move || {
            while let Ok(path) = asked.recv() {
                if answer.send(read(&path)).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("conf-reader".into()).spawn(run)?;
        Ok(Self { paths, results, thread })
    }
}

/// Decodes UTF-8, and removes the byte order mark that some editors write.
///
/// # Errors
/// Why it is not UTF-8 text, as text to append to the name of the file.
pub fn text(bytes: Vec<u8>) -> Result<String, FileError> {
    let line_at = |offset: usize| 1 + bytes.iter().take(offset).filter(|b| **b == b'\n').count();
    if is_utf16(&bytes) {
        return Err("is UTF-16; save it as UTF-8".to_owned().into());
    }
    // A crash of the machine may leave blocks of NUL bytes where data was not written yet.
    if let Some(offset) = bytes.iter().position(|b| *b == 0) {
        let line = line_at(offset);
        return Err(format!("contains a NUL byte in line {line}: it is binary, damaged or incomplete").into());
    }
    if let Err(e) = std::str::from_utf8(&bytes) {
        return Err(format!("is not UTF-8 in line {}; save it as UTF-8", line_at(e.valid_up_to())).into());
    }
    let text = String::from_utf8(bytes).unwrap_or_default();
    Ok(text.strip_prefix(BYTE_ORDER_MARK).map(str::to_owned).unwrap_or(text))
}

/// Marks the encoding at the start of a text. Not a part of the text.
pub const BYTE_ORDER_MARK: char = '\u{feff}';

/// Whether the bytes begin with the byte order mark of UTF-16, or with two ASCII characters in UTF-16, as
/// some programs write it without the mark.
pub fn is_utf16(bytes: &[u8]) -> bool {
    match bytes {
        [0xff, 0xfe, ..] | [0xfe, 0xff, ..] => true,
        [a, b, c, d, ..] => {
            (*a != 0 && *b == 0 && *c != 0 && *d == 0) || (*a == 0 && *b != 0 && *c == 0 && *d != 0)
        }
        _ => false,
    }
}

fn read_file(path: &Path) -> FileBytes {
    read_unchanged(path, || {})
}

/// `meanwhile`: called after the contents are read, so that tests can change the file.
fn read_unchanged(path: &Path, meanwhile: impl Fn()) -> FileBytes {
    for _ in 0..TRIES_MAX {
        if let Some(read) = read_once(path, &meanwhile) {
            return read;
        }
    }
    Err(FileError::Unusable(CHANGES.to_owned()))
}

/// `None`: the file has changed during the read.
fn read_once(path: &Path, meanwhile: impl Fn()) -> Option<FileBytes> {
    let read = || {
        // Check before the open, because opening a device may have side effects.
        check(&fs::metadata(path)?)?;
        // The name may refer to a FIFO by now, and then the open must not wait for a writer.
        let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
        let mut file = File::options().read(true).custom_flags(flags.bits()).open(path)?;
        let before = file.metadata()?;
        check(&before)?;
        let mut bytes = Vec::new();
        (&mut file).take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > FILE_BYTES_MAX {
            return Err(ReadProblem(too_large()));
        }
        meanwhile();
        let after = file.metadata()?;
        Ok((version(&before) == version(&after)).then_some(bytes))
    };
    match read() {
        Ok(bytes) => bytes.map(|bytes| Ok(Some(bytes))),
        Err(ReadProblem(problem)) if problem.is_empty() => Some(absent(path)),
        Err(ReadProblem(problem)) => Some(Err(FileError::Unusable(problem))),
    }
}

/// A problem as text. Empty: there is no such file.
struct ReadProblem(String);

impl From<io::Error> for ReadProblem {
    fn from(e: io::Error) -> Self {
        Self(match e.kind() {
            io::ErrorKind::NotFound => String::new(),
            io::ErrorKind::PermissionDenied => {
                format!(
                    "is not readable by this user (uid {}); change its permissions",
                    nix::unistd::geteuid()
                )
            }
            _ => format!("cannot be read: {e}"),
        })
    }
}

fn check(metadata: &Metadata) -> Result<(), ReadProblem> {
    let kind = metadata.file_type();
    let is = if kind.is_file() {
        if metadata.len() > FILE_BYTES_MAX {
            return Err(ReadProblem(too_large()));
        }
        return Ok(());
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "a device"
    };
    Err(ReadProblem(format!("is {is}; it must be a regular file, or a symbolic link to one")))
}

fn too_large() -> String {
    format!("is larger than {} MiB", FILE_BYTES_MAX >> 20)
}

fn version(metadata: &Metadata) -> (u64, i64, i64) {
    (metadata.len(), metadata.mtime(), metadata.mtime_nsec())
}

/// Distinguishes a missing file from a dangling link. A dangling link is a mistake, and must not put the
/// defaults in force.
fn absent(path: &Path) -> FileBytes {
    match fs::read_link(path) {
        Ok(target) => Err(format!("is a symbolic link to {}, which does not exist", target.display()).into()),
        Err(_) if path.parent().is_none_or(|dir| dir.as_os_str().is_empty() || dir.is_dir()) => Ok(None),
        Err(_) => Err(FileError::NoDirectory),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use parking_lot::Mutex;
    use std::io::Write;
    use std::os::unix::fs::symlink;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Instant;

    /// Longer than any read takes on a busy machine.
    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn only_regular_files_up_to_the_size_limit_are_read() {
        let scratch = tempfile::tempdir().unwrap();
        let at = |name: &str| scratch.path().join(name);
        fs::write(at("file"), "text").unwrap();
        fs::write(at("empty"), "").unwrap();
        fs::create_dir(at("directory")).unwrap();
        nix::unistd::mkfifo(&at("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        let full = File::create(at("full")).unwrap();
        full.set_len(FILE_BYTES_MAX).unwrap();
        File::create(at("huge")).unwrap().set_len(1 << 40).unwrap();
        File::create(at("large")).unwrap().set_len(FILE_BYTES_MAX + 1).unwrap();
        for (name, target) in [
            ("to-file", "file"),
            // Kubernetes mounts a ConfigMap in this way.
            ("to-link", "to-file"),
            ("to-fifo", "fifo"),
            ("to-zero", "/dev/zero"),
            ("to-nothing", "gone"),
            ("to-itself", "to-itself"),
        ] {
            symlink(target, at(name)).unwrap();
        }
        let mut reader = FileReader::new(LONG);
        for (name, expected) in [
            ("file", Ok(Some(4))),
            ("empty", Ok(Some(0))),
            ("to-file", Ok(Some(4))),
            ("to-link", Ok(Some(4))),
            ("full", Ok(Some(FILE_BYTES_MAX as usize))),
            ("gone", Ok(None)),
            ("no-directory/file", Err("does not exist, and neither does its directory")),
            ("directory", Err("is a directory")),
            ("fifo", Err("is a FIFO")),
            ("to-fifo", Err("is a FIFO")),
            ("socket", Err("is a socket")),
            ("to-zero", Err("is a device")),
            ("huge", Err("is larger than 8 MiB")),
            ("large", Err("is larger than 8 MiB")),
            ("to-nothing", Err("is a symbolic link to gone, which does not exist")),
            ("to-itself", Err("cannot be read: Too many levels of symbolic links")),
            ("file/file", Err("cannot be read: Not a directory")),
            // A regular file by its type, but without an end.
            ("/proc/self/mem", Err("cannot be read")),
        ] {
            let read = reader.read(&at(name)).map(|bytes| bytes.map(|bytes| bytes.len()));
            match expected {
                Ok(bytes) => assert_eq!(read, Ok(bytes), "{name}"),
                Err(problem) => {
                    assert!(
                        read.as_ref().is_err_and(|e| e.to_string().starts_with(problem)),
                        "{name}: {read:?}"
                    );
                }
            }
        }
        assert!(reader.finish());
        let denied = ReadProblem::from(io::Error::from(io::ErrorKind::PermissionDenied)).0;
        assert!(denied.starts_with("is not readable by this user"), "{denied}");
    }

    #[test]
    fn the_error_for_invalid_text_names_the_line() {
        for (bytes, expected) in [
            (&b"a = 1\n"[..], Ok("a = 1\n".to_owned())),
            ("\u{fc}".as_bytes(), Ok("\u{fc}".to_owned())),
            (b"", Ok(String::new())),
            (b"a\nb\xff", Err("is not UTF-8 in line 2")),
            (b"a\n\nb\0c", Err("contains a NUL byte in line 3")),
            (b"\xff\xfea\0", Err("is UTF-16")),
        ] {
            let read = text(bytes.to_vec());
            match expected {
                Ok(expected) => assert_eq!(read, Ok(expected)),
                Err(problem) => {
                    assert!(read.as_ref().is_err_and(|e| e.to_string().starts_with(problem)), "{read:?}");
                }
            }
        }
    }

    #[test]
    fn a_file_that_changes_while_it_is_read_is_read_again() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("file");
        fs::write(&path, "half").unwrap();
        // A writer that appends during the first reads, and then one that changes the file in place.
        let changes = AtomicUsize::new(0);
        for (writes, expected) in [(0, Ok(Some(b"half".to_vec()))), (3, Ok(Some(b"half...".to_vec())))] {
            changes.store(writes, Ordering::Relaxed);
            let append = || {
                if changes.load(Ordering::Relaxed) > 0 {
                    changes.fetch_sub(1, Ordering::Relaxed);
                    File::options().append(true).open(&path).unwrap().write_all(b".").unwrap();
                }
            };
            assert_eq!(read_unchanged(&path, append), expected);
        }
        let touch = || {
            let file = File::options().write(true).open(&path).unwrap();
            file.set_modified(fs::metadata(&path).unwrap().modified().unwrap() + LONG).unwrap();
        };
        assert!(read_unchanged(&path, touch).is_err_and(|e| e.to_string() == CHANGES));
    }

    /// A read that hangs does not delay other files, is not repeated, and makes its file readable again when
    /// it returns.
    #[test]
    fn a_read_that_hangs_costs_one_thread_and_its_own_file() {
        let (go, gate) = sync_channel::<()>(0);
        let (gate, started) = (Mutex::new(gate), Arc::new(AtomicUsize::new(0)));
        let count = Arc::clone(&started);
        let mut reader = FileReader::with(Duration::from_millis(20), move |path| {
            if path.starts_with("hangs") {
                count.fetch_add(1, Ordering::SeqCst);
                let _ = gate.lock().recv();
            }
            Ok(Some(path.as_os_str().as_encoded_bytes().to_vec()))
        });
        let hangs = |read: FileBytes| read.is_err_and(|e| e.to_string().contains("has not answered"));
        // A busy machine may take longer than the deadline for any read, but not forever.
        let until = |reader: &mut FileReader, path: &str| {
            let end = Instant::now() + LONG;
            while reader.read(Path::new(path)) != Ok(Some(path.as_bytes().to_vec())) {
                assert!(Instant::now() < end, "{path} was not read in time");
                std::thread::yield_now();
            }
        };
        for _ in 0..3 {
            assert!(hangs(reader.read(Path::new("hangs/a"))));
            until(&mut reader, "file");
        }
        assert_eq!(started.load(Ordering::SeqCst), 1, "it is not read again while it hangs");
        for n in 0..2 * HANGING_MAX {
            assert!(reader.read(Path::new(&format!("hangs/{n}"))).is_err());
        }
        let full = reader.read(Path::new("file")).unwrap_err().to_string();
        assert!(full.contains("other files do not answer"), "{full}");
        assert!(reader.hanging.len() <= HANGING_MAX, "{}", reader.hanging.len());
        drop(go);
        until(&mut reader, "hangs/a");
        until(&mut reader, "file");
        until(&mut reader, "hangs/b");
        let (_held, gate) = sync_channel::<()>(0);
        let gate = Mutex::new(gate);
        let mut reader = FileReader::with(Duration::ZERO, move |_| {
            let _ = gate.lock().recv();
            Ok(None)
        });
        assert!(hangs(reader.read(Path::new("file"))));
        assert!(!reader.finish(), "its thread still runs");
    }
}
