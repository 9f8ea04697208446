//! Describes why a data directory cannot be opened, with advice for its owner.
//!
//! The advice never destroys data. A damaged file must be kept, because more may be recovered from it later.

use super::database::{DATABASE_FILE, OpenError, SCHEMA_VERSION};
use crate::backend::{BackendError, StartProblem};
use rusqlite::ErrorCode;
use std::io;
use std::path::Path;

const OTHER_DIR: &str = "choose another directory with --data-dir";

/// The start problem for an error of opening `dir`.
pub fn start_problem(dir: &Path, error: &OpenError) -> StartProblem {
    let (error, mend) = match error {
        OpenError::Locked => (
            BackendError::Unavailable("another process uses it".to_owned()),
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
            format!("To keep that database, {OTHER_DIR}."),
        ),
        OpenError::Corrupt(why) => (
            BackendError::Invalid(format!("{DATABASE_FILE} in it is damaged: {why}")),
            format!(
                "Copy the whole directory first. Then restore a backup, or recover the readable data into a \
                 new file with `.recover` of the sqlite3 shell from sqlite.org \
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
    StartProblem { what: format!("the data directory {}", dir.display()), error, remedy: mend }
}

fn of_io(e: &io::Error) -> (BackendError, String) {
    use io::ErrorKind as Kind;
    match e.kind() {
        Kind::AlreadyExists | Kind::NotADirectory => (
            BackendError::Invalid(format!("it, or a part of its path, is not a directory: {e}")),
            "Name a directory with --data-dir. It is created if it does not exist.".to_owned(),
        ),
        Kind::PermissionDenied => not_writable(&e.to_string()),
        Kind::ReadOnlyFilesystem => (
            BackendError::Denied(e.to_string()),
            format!("Mount the file system read-write, or {OTHER_DIR}."),
        ),
        Kind::StorageFull | Kind::QuotaExceeded => no_room(&e.to_string()),
        Kind::NotFound => (
            BackendError::Invalid(e.to_string()),
            "Name a directory with --data-dir that can be created. A link in its path may be dangling."
                .to_owned(),
        ),
        _ => failing_disk(&e.to_string()),
    }
}

fn of_sqlite(e: &rusqlite::Error) -> (BackendError, String) {
    let text = format!("{DATABASE_FILE} in it: {e}");
    match e.sqlite_error_code() {
        Some(ErrorCode::NotADatabase) => (
            BackendError::Invalid(format!("{DATABASE_FILE} in it is not an SQLite database")),
            format!("Copy it first. Then restore a backup, or {OTHER_DIR}."),
        ),
        Some(ErrorCode::PermissionDenied | ErrorCode::ReadOnly | ErrorCode::CannotOpen) => {
            not_writable(&text)
        }
        Some(ErrorCode::DiskFull) => no_room(&text),
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => (
            BackendError::Unavailable(format!("another program has locked {DATABASE_FILE} in it")),
            "Close that program, for example a sqlite3 shell or a backup, and start again.".to_owned(),
        ),
        _ => failing_disk(&text),
    }
}

fn not_writable(why: &str) -> (BackendError, String) {
    let user = nix::unistd::geteuid();
    (
        BackendError::Denied(format!("this user (uid {user}) cannot read and write it: {why}")),
        format!("Change the owner of the directory and of all files in it (chown), or {OTHER_DIR}."),
    )
}

fn no_room(why: &str) -> (BackendError, String) {
    (
        BackendError::Unavailable(format!("its disk is full: {why}")),
        format!("Free disk space (or raise the quota of the user) and start again, or {OTHER_DIR}."),
    )
}

fn failing_disk(why: &str) -> (BackendError, String) {
    (
        BackendError::Unavailable(why.to_owned()),
        format!("Check the kernel log for disk errors. The disk must be a local one. Else {OTHER_DIR}."),
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

    /// A directory that was in use.
    fn used() -> Scratch {
        let scratch = Scratch::new();
        drop(open(scratch.path(), false).unwrap());
        // Moves all data into the one file.
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

    /// Runs `work` without the permissions of root. That applies to a thread, so it runs on a new one.
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

    /// (name, how to cause it, whether it is transient, a part of the error, a part of the advice)
    type Case = (&'static str, fn(&Scratch), bool, &'static str, &'static str);

    const CASES: [Case; 13] = [
        ("garbage", |s| damage(s, |b| b.fill(b'x')), false, "is not an SQLite database", "Copy it"),
        ("a torn header", |s| damage(s, |b| b[..100].fill(0)), false, "is not an SQLite database", "Copy it"),
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
            "cannot read and write it",
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
            "cannot read and write it",
            "chown",
        ),
    ];

    #[test]
    fn every_problem_of_a_directory_comes_with_its_advice() {
        for (what, spoil, is_transient, reason, advice) in CASES {
            let scratch = used();
            spoil(&scratch);
            let is_fifo = what == "a FIFO";
            let before = if is_fifo { None } else { fs::read(file(&scratch)).ok() };
            let problem = as_nobody_if(what.ends_with("of others"), || open(scratch.path(), false).err());
            let problem = problem.unwrap_or_else(|| panic!("{what}: the directory was opened"));
            assert!(problem.error.to_string().contains(reason), "{what}: {problem:?}");
            assert!(problem.remedy.contains(advice), "{what}: {problem:?}");
            assert_eq!(problem.error.is_transient(), is_transient, "{what}: {problem:?}");
            assert!(is_fifo || fs::read(file(&scratch)).ok() == before, "{what}: the file has changed");
        }
    }

    fn as_nobody_if<T: Send>(is_nobody: bool, work: impl FnOnce() -> T + Send) -> T {
        if is_nobody { as_nobody(work) } else { work() }
    }

    #[test]
    fn transient_errors_are_distinguished() {
        let sqlite = |code| OpenError::from(rusqlite::Error::SqliteFailure(ffi::Error::new(code), None));
        let io = |kind: io::ErrorKind| OpenError::from(io::Error::from(kind));
        for (error, is_transient, advice) in [
            (sqlite(ffi::SQLITE_FULL), true, "Free disk space"),
            (sqlite(ffi::SQLITE_BUSY), true, "Close that program"),
            (sqlite(ffi::SQLITE_IOERR_READ), true, "the kernel log"),
            (sqlite(ffi::SQLITE_READONLY_DIRECTORY), false, "chown"),
            (sqlite(ffi::SQLITE_CANTOPEN), false, "chown"),
            (sqlite(ffi::SQLITE_CORRUPT_VTAB), false, ".recover"),
            (sqlite(ffi::SQLITE_NOTADB), false, "Copy it"),
            (io(io::ErrorKind::StorageFull), true, "Free disk space"),
            (io(io::ErrorKind::QuotaExceeded), true, "Free disk space"),
            (io(io::ErrorKind::ReadOnlyFilesystem), false, "Mount"),
            (io(io::ErrorKind::PermissionDenied), false, "chown"),
            (io(io::ErrorKind::NotADirectory), false, "Name a directory"),
            (io(io::ErrorKind::Other), true, "the kernel log"),
            (OpenError::Locked, true, "Stop the other process"),
        ] {
            let problem = start_problem(Path::new("data"), &error);
            assert_eq!(problem.error.is_transient(), is_transient, "{error:?}: {problem:?}");
            assert!(problem.remedy.contains(advice), "{error:?}: {problem:?}");
        }
    }

    #[test]
    fn a_file_in_place_of_the_directory_is_left_alone() {
        let scratch = Scratch::new();
        let path = scratch.path().join("data");
        fs::write(&path, "mine").unwrap();
        for dir in [path.clone(), path.join("below")] {
            let problem = open(&dir, false).err().unwrap();
            assert!(matches!(problem.error, BackendError::Invalid(_)), "{problem:?}");
            assert!(problem.remedy.contains("Name a directory"), "{problem:?}");
        }
        assert_eq!(fs::read(path).unwrap(), b"mine");
        assert!(Database::open(scratch.path(), |_| Ok(())).is_ok());
    }
}
