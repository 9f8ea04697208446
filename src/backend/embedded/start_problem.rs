//! Why a data directory cannot be used, and what its owner can do about it.
//!
//! Advice never costs data: whatever is damaged is to be kept as it is, since more may be read from it later.

use super::database::{DATABASE_FILE, OpenError, SCHEMA_VERSION};
use crate::backend::{BackendError, StartProblem};
use rusqlite::ErrorCode;
use std::io;
use std::path::Path;

const OTHER_DIR: &str = "give this process another directory with --data-dir";

/// What keeps a process from working in `dir`.
pub fn start_problem(dir: &Path, error: &OpenError) -> StartProblem {
    let (error, mend) = match error {
        OpenError::Locked => (
            BackendError::Unavailable("another process works in it".to_owned()),
            format!("Stop the other process, or {OTHER_DIR}."),
        ),
        OpenError::Newer(version) => (
            BackendError::Invalid(format!(
                "a later version of this program wrote it (schema {version}, this one knows {SCHEMA_VERSION})"
            )),
            format!("Start that version, or {OTHER_DIR}."),
        ),
        OpenError::Foreign(why) => (
            BackendError::Invalid(format!("{DATABASE_FILE} in it is a database of another program: {why}")),
            format!("To leave that one as it is, {OTHER_DIR}."),
        ),
        OpenError::Corrupt(why) => (
            BackendError::Invalid(format!("{DATABASE_FILE} in it is damaged: {why}")),
            format!(
                "Keep a copy of the whole directory first. Then put a backup in its place, or a new file into which \
                 `.recover` of the sqlite3 shell from sqlite.org has saved what can be read \
                 (https://sqlite.org/recovery.html), or {OTHER_DIR}."
            ),
        ),
        OpenError::NotAFile(name, kind) => (
            BackendError::Invalid(format!("{name} in it is {kind}, not a regular file")),
            format!("Move it to another place, or {OTHER_DIR}."),
        ),
        OpenError::Io(e) => of_io(e),
        OpenError::Sqlite(e) => of_sqlite(e),
    };
    StartProblem { what: format!("the data directory {}", dir.display()), error, mend }
}

fn of_io(e: &io::Error) -> (BackendError, String) {
    use io::ErrorKind as Kind;
    match e.kind() {
        Kind::AlreadyExists | Kind::NotADirectory => (
            BackendError::Invalid(format!("it, or a part of its path, is a file and no directory: {e}")),
            "Name a directory with --data-dir; it is made if it does not exist.".to_owned(),
        ),
        Kind::PermissionDenied => not_writable(&e.to_string()),
        Kind::ReadOnlyFilesystem => (
            BackendError::Denied(e.to_string()),
            format!("Mount the file system so that it can be written, or {OTHER_DIR}."),
        ),
        Kind::StorageFull | Kind::QuotaExceeded => no_room(&e.to_string()),
        Kind::NotFound => (
            BackendError::Invalid(e.to_string()),
            "Name a directory with --data-dir that can be made; a link in its path may lead nowhere."
                .to_owned(),
        ),
        _ => failing_disk(&e.to_string()),
    }
}

fn of_sqlite(e: &rusqlite::Error) -> (BackendError, String) {
    let text = format!("{DATABASE_FILE} in it: {e}");
    match e.sqlite_error_code() {
        Some(ErrorCode::NotADatabase) => (
            BackendError::Invalid(format!("{DATABASE_FILE} in it is no SQLite database")),
            format!("Keep a copy of it. Then put a backup in its place, or {OTHER_DIR}."),
        ),
        Some(ErrorCode::PermissionDenied | ErrorCode::ReadOnly | ErrorCode::CannotOpen) => {
            not_writable(&text)
        }
        Some(ErrorCode::DiskFull) => no_room(&text),
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => (
            BackendError::Unavailable(format!("another program holds {DATABASE_FILE} in it locked")),
            "Close that program, such as a sqlite3 shell or a backup, and start again.".to_owned(),
        ),
        _ => failing_disk(&text),
    }
}

fn not_writable(why: &str) -> (BackendError, String) {
    let user = nix::unistd::geteuid();
    (
        BackendError::Denied(format!("it may not be read and written by this user (uid {user}): {why}")),
        format!("Give the user the directory and all files in it (chown), or {OTHER_DIR}."),
    )
}

fn no_room(why: &str) -> (BackendError, String) {
    (
        BackendError::Unavailable(format!("its disk has no room: {why}")),
        format!("Free some room (or raise the quota of the user) and start again, or {OTHER_DIR}."),
    )
}

fn failing_disk(why: &str) -> (BackendError, String) {
    (
        BackendError::Unavailable(why.to_owned()),
        format!(
            "See the log of the kernel for errors of the disk, which must be a local one; or {OTHER_DIR}."
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::embedded::database::Database;
    use crate::backend::embedded::open;
    use crate::backend::embedded::scratch::Scratch;
    use rusqlite::{Connection, ffi};
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    /// What is left of a directory that was in use.
    fn used() -> Scratch {
        let scratch = Scratch::new();
        drop(open(scratch.path()).unwrap());
        // All of it in the one file.
        let file = Connection::open(scratch.path().join(DATABASE_FILE)).unwrap();
        file.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
        drop(file);
        scratch
    }

    fn file(scratch: &Scratch) -> std::path::PathBuf {
        scratch.path().join(DATABASE_FILE)
    }

    /// Overwrites a part of the file.
    fn damage(scratch: &Scratch, part: impl Fn(&mut Vec<u8>)) {
        let mut bytes = fs::read(file(scratch)).unwrap();
        part(&mut bytes);
        fs::write(file(scratch), bytes).unwrap();
    }

    fn replace(scratch: &Scratch, by: impl Fn(&Path)) {
        fs::remove_file(file(scratch)).unwrap();
        by(&file(scratch));
    }

    /// A user who may not write what others own. Only the thread changes, so it must be one of its own.
    fn as_nobody<T: Send>(work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let run = || {
                if nix::unistd::geteuid().is_root() {
                    nix::unistd::setfsuid(nix::unistd::Uid::from_raw(65_534));
                }
                work()
            };
            scope.spawn(run).join().unwrap()
        })
    }

    /// (what is wrong, how it comes about, whether it may pass, what is said, what is advised)
    type Case = (&'static str, fn(&Scratch), bool, &'static str, &'static str);

    const CASES: [Case; 13] = [
        ("garbage", |s| damage(s, |b| b.fill(b'x')), false, "is no SQLite database", "Keep a copy"),
        ("a torn header", |s| damage(s, |b| b[..100].fill(0)), false, "is no SQLite database", "Keep a copy"),
        ("half of it", |s| damage(s, |b| b.truncate(b.len() / 2)), false, "is damaged", ".recover"),
        ("a page that is lost", |s| damage(s, |b| b[4096..8192].fill(0)), false, "is damaged", ".recover"),
        (
            "the last page is lost",
            |s| damage(s, |b| b.iter_mut().rev().take(4096).for_each(|b| *b = 0xff)),
            false,
            "is damaged",
            ".recover",
        ),
        (
            "another program's",
            |s| {
                replace(s, |path| {
                    Connection::open(path).unwrap().execute_batch("CREATE TABLE cookies (x)").unwrap();
                });
            },
            false,
            "of another program",
            "--data-dir",
        ),
        (
            "tables that are missing",
            |s| Connection::open(file(s)).unwrap().execute_batch("DROP TABLE meta").unwrap(),
            false,
            "of another program",
            "--data-dir",
        ),
        (
            "a later version's",
            |s| Connection::open(file(s)).unwrap().pragma_update(None, "user_version", 99).unwrap(),
            false,
            "schema 99, this one knows",
            "Start that version",
        ),
        (
            "a directory",
            |s| replace(s, |path| fs::create_dir(path).unwrap()),
            false,
            "is a directory",
            "Move it",
        ),
        (
            "a FIFO",
            |s| replace(s, |path| nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap()),
            false,
            "is a FIFO",
            "Move it",
        ),
        (
            "a lock that is a FIFO",
            |s| {
                fs::remove_file(s.path().join("lock")).unwrap();
                nix::unistd::mkfifo(&s.path().join("lock"), nix::sys::stat::Mode::S_IRWXU).unwrap();
            },
            false,
            "lock in it is a FIFO",
            "Move it",
        ),
        (
            "a directory of others",
            |s| fs::set_permissions(s.path(), fs::Permissions::from_mode(0o555)).unwrap(),
            false,
            "may not be read and written by this user",
            "chown",
        ),
        (
            "a file of others",
            |s| {
                fs::set_permissions(s.path(), fs::Permissions::from_mode(0o777)).unwrap();
                for name in ["lock", "runs", "code"] {
                    fs::set_permissions(s.path().join(name), fs::Permissions::from_mode(0o777)).unwrap();
                }
                fs::set_permissions(file(s), fs::Permissions::from_mode(0o444)).unwrap();
            },
            false,
            "may not be read and written by this user",
            "chown",
        ),
    ];

    #[test]
    fn what_is_wrong_with_a_directory_is_told_with_advice_that_fits() {
        for (what, spoil, is_transient, told, advised) in CASES {
            let scratch = used();
            spoil(&scratch);
            let is_fifo = what == "a FIFO";
            let before = if is_fifo { None } else { fs::read(file(&scratch)).ok() };
            let problem = as_nobody_if(what.ends_with("of others"), || open(scratch.path()).err());
            let problem = problem.unwrap_or_else(|| panic!("{what}: it starts"));
            assert!(problem.error.to_string().contains(told), "{what}: {problem:?}");
            assert!(problem.mend.contains(advised), "{what}: {problem:?}");
            assert_eq!(problem.error.is_transient(), is_transient, "{what}: {problem:?}");
            assert!(is_fifo || fs::read(file(&scratch)).ok() == before, "{what}: the file has changed");
        }
    }

    fn as_nobody_if<T: Send>(is_nobody: bool, work: impl FnOnce() -> T + Send) -> T {
        if is_nobody { as_nobody(work) } else { work() }
    }

    #[test]
    fn what_may_pass_is_told_apart() {
        let sqlite = |code| OpenError::from(rusqlite::Error::SqliteFailure(ffi::Error::new(code), None));
        let io = |kind: io::ErrorKind| OpenError::from(io::Error::from(kind));
        for (error, is_transient, advised) in [
            (sqlite(ffi::SQLITE_FULL), true, "Free some room"),
            (sqlite(ffi::SQLITE_BUSY), true, "Close that program"),
            (sqlite(ffi::SQLITE_IOERR_READ), true, "the log of the kernel"),
            (sqlite(ffi::SQLITE_READONLY_DIRECTORY), false, "chown"),
            (sqlite(ffi::SQLITE_CANTOPEN), false, "chown"),
            (sqlite(ffi::SQLITE_CORRUPT_VTAB), false, ".recover"),
            (sqlite(ffi::SQLITE_NOTADB), false, "Keep a copy"),
            (io(io::ErrorKind::StorageFull), true, "Free some room"),
            (io(io::ErrorKind::QuotaExceeded), true, "Free some room"),
            (io(io::ErrorKind::ReadOnlyFilesystem), false, "Mount"),
            (io(io::ErrorKind::PermissionDenied), false, "chown"),
            (io(io::ErrorKind::NotADirectory), false, "Name a directory"),
            (io(io::ErrorKind::Other), true, "the log of the kernel"),
            (OpenError::Locked, true, "Stop the other process"),
        ] {
            let problem = start_problem(Path::new("data"), &error);
            assert_eq!(problem.error.is_transient(), is_transient, "{error:?}: {problem:?}");
            assert!(problem.mend.contains(advised), "{error:?}: {problem:?}");
        }
    }

    #[test]
    fn a_directory_that_is_a_file() {
        let scratch = Scratch::new();
        let path = scratch.path().join("data");
        fs::write(&path, "mine").unwrap();
        for dir in [path.clone(), path.join("below")] {
            let problem = open(&dir).err().unwrap();
            assert!(matches!(problem.error, BackendError::Invalid(_)), "{problem:?}");
            assert!(problem.mend.contains("Name a directory"), "{problem:?}");
        }
        assert_eq!(fs::read(path).unwrap(), b"mine");
        assert!(Database::open(scratch.path(), |_| Ok(())).is_ok());
    }
}
