//! The code of the functions, as files under their keys.
//!
//! A stored file is durable before the call returns, because the row that refers to it will be durable as
//! well.

use crate::backend::{BackendError, CodeSource, CodeStore, FetchError};
use async_trait::async_trait;
use parking_lot::Mutex;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

/// Clones share one store.
#[derive(Clone)]
pub(super) struct LocalCode {
    dir: PathBuf,
    /// Serializes changes. Otherwise `delete` could remove a directory that `put` has just created.
    turn: Arc<Mutex<()>>,
}

impl LocalCode {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir, turn: Arc::new(Mutex::new(())) }
    }

    /// Runs `change` with the path of a key, one change at a time, on a blocking thread. Once started, it is
    /// completed even if this future is dropped.
    async fn change(
        &self,
        s3_key: &str,
        change: impl FnOnce(&Path, &Path) -> io::Result<()> + Send + 'static,
    ) -> Result<(), BackendError> {
        let outside = || BackendError::Invalid("the key of the code is outside the store".into());
        let path = locate(&self.dir, s3_key).ok_or_else(outside)?;
        let store = self.clone();
        let changed = tokio::task::spawn_blocking(move || {
            let _turn = store.turn.lock();
            change(&store.dir, &path)
        });
        match changed.await {
            Ok(changed) => changed.map_err(|e| BackendError::Unavailable(format!("the code store: {e}"))),
            Err(_) => Err(BackendError::Unavailable("a change of the code store panicked".into())),
        }
    }
}

/// Path of the code of `s3_key`. `None`: the key is outside the store.
pub(super) fn locate(store: &Path, s3_key: &str) -> Option<PathBuf> {
    let inside = Path::new(s3_key).components().all(|part| matches!(part, Component::Normal(_)));
    (inside && !s3_key.is_empty()).then(|| store.join(s3_key))
}

/// Makes the directory entries of `path` durable, and those of the directories above it up to the store.
pub(super) fn sync_names(store: &Path, path: &Path) -> io::Result<()> {
    // A new file is durable only if every directory above it is. The store itself may be new as well.
    let inside = path.ancestors().skip(1).take_while(|dir| dir.starts_with(store));
    inside.chain(store.parent()).try_for_each(|dir| File::open(dir)?.sync_all())
}

fn put(store: &Path, path: &Path, file: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    // Sync the contents before the rename, so that after a crash no name refers to a partial file.
    File::open(file)?.sync_all()?;
    match fs::rename(file, path) {
        Err(e) if e.kind() == io::ErrorKind::CrossesDevices => copy(file, path)?,
        renamed => renamed?,
    }
    sync_names(store, path)
}

/// Copies to a temporary file beside the target and renames it, so that no partial file is ever visible.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let draft = draft(to);
    fs::copy(from, &draft)?;
    File::open(&draft)?.sync_all()?;
    fs::rename(&draft, to)
}

/// Path of the temporary file of a copy. It depends on the key only, so that deleting the key also deletes a
/// temporary file that a crash has left.
fn draft(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".part");
    name.into()
}

fn delete(store: &Path, path: &Path) -> io::Result<()> {
    for file in [path, &draft(path)] {
        match fs::remove_file(file) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            removed => removed?,
        }
    }
    let Some(parent) = path.parent() else { return Ok(()) };
    // Of `functions/<id>/<file>`, the directory `<id>` is removed with its last file; `functions` stays.
    let is_function = parent.strip_prefix(store).is_ok_and(|inside| inside.components().count() == 2);
    let is_removed = is_function && fs::remove_dir(parent).is_ok();
    let touched = if is_removed { parent.parent() } else { Some(parent) };
    // Otherwise a crash could restore a file that no list contains any more.
    match touched.map(|dir| File::open(dir)?.sync_all()) {
        Some(Err(e)) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

#[async_trait]
impl CodeStore for LocalCode {
    async fn put(&self, s3_key: &str, file: &Path) -> Result<(), BackendError> {
        let file = file.to_owned();
        self.change(s3_key, move |store, path| put(store, path, &file)).await
    }

    async fn delete(&self, s3_key: &str) -> Result<(), BackendError> {
        self.change(s3_key, delete).await
    }
}

#[async_trait]
impl CodeSource for LocalCode {
    async fn fetch(&self, _bucket: &str, s3_key: &str, to: &Path) -> Result<(), FetchError> {
        let outside = "the key of the function's code is outside the store";
        let from = locate(&self.dir, s3_key).ok_or_else(|| FetchError::Missing(outside.to_owned()))?;
        let to = to.to_owned();
        let fetched = tokio::task::spawn_blocking(move || {
            // A name for the same file, where the file system can do that.
            fs::hard_link(&from, &to).or_else(|_| fs::copy(&from, &to).map(drop))
        });
        match fetched.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(e)) if e.kind() == io::ErrorKind::NotFound => {
                Err(FetchError::Missing(format!("The code of the function cannot be opened: {e}.")))
            }
            Ok(Err(e)) => Err(BackendError::Unavailable(format!("the code store: {e}")).into()),
            Err(_) => Err(BackendError::Unavailable("a fetch of code panicked".into()).into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::embedded::scratch::{Scratch, in_time};
    use std::os::unix::fs::MetadataExt;

    const KEY: &str = "functions/f/1.zip";

    fn store(scratch: &Scratch) -> LocalCode {
        LocalCode::new(scratch.path().join("code"))
    }

    fn upload(scratch: &Scratch, text: &str) -> PathBuf {
        let path = scratch.path().join("upload");
        fs::write(&path, text).unwrap();
        path
    }

    fn stored(scratch: &Scratch, key: &str) -> Option<String> {
        fs::read_to_string(scratch.path().join("code").join(key)).ok()
    }

    #[tokio::test]
    async fn files_are_moved_in_and_deleted() {
        let scratch = Scratch::new();
        let store = store(&scratch);
        for text in ["one", "another under the same key"] {
            let file = upload(&scratch, text);
            assert_eq!(store.put(KEY, &file).await, Ok(()));
            assert!(!file.exists(), "it is moved, not copied");
            assert_eq!(stored(&scratch, KEY).as_deref(), Some(text));
        }
        let absent = store.put(KEY, &scratch.path().join("absent")).await;
        assert!(absent.is_err_and(|e| e.is_transient()));

        store.put("functions/f/2.zip", &upload(&scratch, "2")).await.unwrap();
        let functions = scratch.path().join("code/functions");
        for (key, is_empty_then) in [(KEY, false), (KEY, false), ("functions/f/2.zip", true), (KEY, true)] {
            assert_eq!(store.delete(key).await, Ok(()), "{key}");
            assert_eq!(stored(&scratch, key), None);
            assert_eq!(!functions.join("f").exists(), is_empty_then, "{key}");
        }
        assert!(functions.exists());
        store.put("top.zip", &upload(&scratch, "3")).await.unwrap();
        assert_eq!(store.delete("top.zip").await, Ok(()));
        assert!(scratch.path().join("code").exists());
    }

    #[tokio::test]
    async fn keys_outside_the_store_are_rejected() {
        let scratch = Scratch::new();
        let store = store(&scratch);
        let file = upload(&scratch, "evil");
        let victim = scratch.path().join("victim");
        fs::write(&victim, "untouched").unwrap();
        for key in ["", ".", "../victim", "functions/../../victim", victim.to_str().unwrap()] {
            assert!(matches!(store.put(key, &file).await, Err(BackendError::Invalid(_))), "{key}");
            assert!(matches!(store.delete(key).await, Err(BackendError::Invalid(_))), "{key}");
        }
        assert_eq!(fs::read_to_string(&victim).unwrap(), "untouched");
        assert!(file.exists());
    }

    #[tokio::test]
    async fn a_file_of_another_file_system_is_copied() {
        let scratch = Scratch::new();
        let store = store(&scratch);
        let shared_memory = Path::new("/dev/shm");
        let device = |path: &Path| fs::metadata(path).map(|meta| meta.dev()).ok();
        if device(shared_memory).is_none_or(|dev| Some(dev) == device(scratch.path())) {
            return; // the machine has one file system only
        }
        let file = tempfile::NamedTempFile::new_in(shared_memory).unwrap();
        fs::write(&file, "far").unwrap();
        assert_eq!(store.put(KEY, file.path()).await, Ok(()));
        assert_eq!(stored(&scratch, KEY).as_deref(), Some("far"));
    }

    #[test]
    fn a_copy_replaces_one_that_a_crash_interrupted() {
        let scratch = Scratch::new();
        let (from, to) = (upload(&scratch, "whole"), scratch.path().join("place"));
        fs::write(draft(&to), "half, but longer").unwrap();
        copy(&from, &to).unwrap();
        assert_eq!(fs::read_to_string(&to).unwrap(), "whole");
        assert!(!draft(&to).exists());
    }

    #[tokio::test]
    async fn deleting_removes_an_unfinished_copy() {
        let scratch = Scratch::new();
        let store = store(&scratch);
        let path = locate(&store.dir, KEY).unwrap();
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(draft(&path), "half").unwrap();
        assert_eq!(store.delete(KEY).await, Ok(()));
        assert!(!path.parent().unwrap().exists());
    }

    #[tokio::test]
    async fn a_directory_is_not_removed_under_a_new_file() {
        let scratch = Scratch::new();
        let store = store(&scratch);
        for n in 0..50 {
            let (old, new) = (format!("functions/f/{n}.zip"), format!("functions/f/{}.zip", n + 1));
            let file = upload(&scratch, "new");
            let both = async { tokio::join!(store.put(&new, &file), store.delete(&old)) };
            assert_eq!(in_time(both).await, (Ok(()), Ok(())));
            assert_eq!(stored(&scratch, &new).as_deref(), Some("new"));
        }
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
