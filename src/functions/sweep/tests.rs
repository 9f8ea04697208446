use super::super::{EditError, Editor, FunctionChange, NewCode, NewFunction};
use super::*;
use crate::backend::{Backend, FunctionPage, FunctionWrite, FunctionWriteOutcome, embedded};
use crate::model::{ConfigAction, Function, FunctionId, Recommendation, Runtime};
use async_trait::async_trait;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// A backend whose nth step fails: before it is done, or afterwards, as if its answer were lost.
struct Faulty {
    backend: Backend,
    steps: AtomicUsize,
    fails: usize,
    is_done: bool,
}

impl Faulty {
    async fn step<T>(&self, step: impl Future<Output = Result<T, BackendError>>) -> Result<T, BackendError> {
        let fails = self.steps.fetch_add(1, Ordering::Relaxed) == self.fails;
        let lost = BackendError::Invalid("a step of the test".into());
        if fails && !self.is_done {
            return Err(lost);
        }
        let done = step.await;
        if fails { Err(lost) } else { done }
    }
}

#[async_trait]
impl FunctionStore for Faulty {
    async fn get(&self, id: &FunctionId) -> Result<Option<Function>, BackendError> {
        self.backend.functions.get(id).await
    }

    async fn list(&self, _: usize, _: Option<&str>) -> Result<FunctionPage, BackendError> {
        Ok(FunctionPage::default())
    }

    async fn write(&self, write: &FunctionWrite) -> Result<FunctionWriteOutcome, BackendError> {
        self.step(self.backend.functions.write(write)).await
    }

    async fn recommend(&self, _: &FunctionId, _: &Recommendation) -> Result<(), BackendError> {
        Ok(())
    }

    async fn probe(&self) -> Result<(), BackendError> {
        Ok(())
    }
}

#[async_trait]
impl CodeList for Faulty {
    async fn add(&self, code: &RetiredCode) -> Result<(), BackendError> {
        self.step(self.backend.code_list.add(code)).await
    }

    async fn due(&self, now: UnixMs, limit: usize) -> Result<Vec<RetiredCode>, BackendError> {
        self.backend.code_list.due(now, limit).await
    }

    async fn remove(&self, code: &RetiredCode) -> Result<(), BackendError> {
        self.step(self.backend.code_list.remove(code)).await
    }
}

#[async_trait]
impl CodeStore for Faulty {
    async fn put(&self, s3_key: &str, file: &Path) -> Result<(), BackendError> {
        self.step(self.backend.code.put(s3_key, file)).await
    }

    async fn delete(&self, s3_key: &str) -> Result<(), BackendError> {
        self.step(self.backend.code.delete(s3_key)).await
    }
}

struct Scene {
    dir: tempfile::TempDir,
    backend: Backend,
    /// A time after the retention of the queue and the slack.
    past_all: UnixMs,
}

impl Scene {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let backend = embedded::open(dir.path(), false).unwrap().backend;
        Self { dir, backend, past_all: now_ms() + 400 * 24 * 3600 * 1000 }
    }

    /// The backend with a fault at step `fails`.
    fn faulty(&self, fails: usize, is_done: bool) -> Backend {
        let faulty =
            Arc::new(Faulty { backend: self.backend.clone(), steps: AtomicUsize::new(0), fails, is_done });
        Backend { functions: faulty.clone(), code: faulty.clone(), code_list: faulty, ..self.backend.clone() }
    }

    fn file(&self) -> PathBuf {
        let path = self.dir.path().join("upload");
        std::fs::write(&path, "code").unwrap();
        path
    }

    fn editor(&self, backend: &Backend) -> Editor {
        let conf = crate::config::Conf::shipped().unwrap().cache;
        let metrics = Arc::new(Metrics::new(1).unwrap());
        Editor::new(backend, super::super::new(&conf, backend, String::new(), &metrics).0)
    }

    async fn create(&self, backend: &Backend) -> Result<Function, EditError<()>> {
        let file = self.file();
        let new = NewFunction {
            name: "f".into(),
            description: String::new(),
            runtime: Runtime::Python,
            memory_mb: 128,
            handler: None,
            env_vars: "{}".into(),
            code: NewCode { file: &file, original_name: "code.zip".into() },
        };
        self.editor(backend).create("tester", new).await
    }

    async fn replace(&self, backend: &Backend, id: &FunctionId) -> Result<Function, EditError<()>> {
        let file = self.file();
        let code = NewCode { file: &file, original_name: "new.zip".into() };
        let decide = |_: &Function| Ok(FunctionChange::default());
        self.editor(backend).change("tester", id, ConfigAction::Update, Some(code), decide).await
    }

    async fn delete(&self, backend: &Backend, id: &FunctionId) -> Result<(), EditError<()>> {
        self.editor(backend).delete("tester", id, |_| Ok(())).await
    }

    async fn sweep(&self, backend: &Backend, now: UnixMs) -> Result<(), BackendError> {
        Sweeper::new(backend, Arc::new(Metrics::new(1).unwrap())).sweep(now).await
    }

    /// The keys of all stored code.
    fn stored(&self) -> BTreeSet<String> {
        let root = self.dir.path().join("code");
        let mut keys = BTreeSet::new();
        for function in std::fs::read_dir(root.join("functions")).unwrap() {
            let function = function.unwrap();
            for file in std::fs::read_dir(function.path()).unwrap() {
                let file = file.unwrap().path();
                keys.insert(file.strip_prefix(&root).unwrap().to_str().unwrap().to_owned());
            }
        }
        keys
    }

    /// The keys that functions point to.
    async fn pointed_to(&self) -> BTreeSet<String> {
        let all = self.backend.functions.list(1000, None).await.unwrap().functions;
        all.into_iter().map(|f| f.s3_key).collect()
    }

    /// Asserts that every function has code and, after a sweep, that no other code is stored and the list
    /// is empty.
    async fn check(&self, when: &str) {
        assert!(self.pointed_to().await.is_subset(&self.stored()), "{when}: lost code");
        self.sweep(&self.backend, self.past_all).await.unwrap();
        assert_eq!(self.pointed_to().await, self.stored(), "{when}: orphaned or lost code");
        assert_eq!(self.backend.code_list.due(u64::MAX, 10).await, Ok(vec![]), "{when}");
    }
}

#[tokio::test]
async fn a_failure_at_any_step_leaves_no_orphan_and_loses_no_code() {
    for is_done in [false, true] {
        for fails in 0..6 {
            let when = format!("step {fails}, done: {is_done}");
            let scene = Scene::new();
            let faulty = scene.faulty(fails, is_done);
            let _ = scene.create(&faulty).await;
            scene.check(&format!("create, {when}")).await;

            let id = scene.create(&scene.backend).await.unwrap().id;
            let _ = scene.replace(&scene.faulty(fails, is_done), &id).await;
            scene.check(&format!("replace, {when}")).await;

            let _ = scene.delete(&scene.faulty(fails, is_done), &id).await;
            let _ = scene.sweep(&scene.faulty(fails, is_done), scene.past_all).await;
            scene.check(&format!("delete, {when}")).await;
        }
    }
}

#[tokio::test]
async fn an_entry_that_cannot_be_deleted_does_not_block_others() {
    let scene = Scene::new();
    let function = scene.create(&scene.backend).await.unwrap();
    // A key that leads out of the store is rejected.
    let bad = RetiredCode { s3_key: "../evil".into(), function: function.id.clone(), due: 0 };
    scene.backend.code_list.add(&bad).await.unwrap();
    scene.delete(&scene.backend, &function.id).await.unwrap();
    scene.sweep(&scene.backend, scene.past_all).await.unwrap();
    assert!(!scene.stored().contains(&function.s3_key));
    assert_eq!(scene.backend.code_list.due(u64::MAX, 10).await, Ok(vec![bad]));
}

#[tokio::test]
async fn old_code_is_kept_while_a_job_may_name_it() {
    let scene = Scene::new();
    let first = scene.create(&scene.backend).await.unwrap();
    let second = scene.replace(&scene.backend, &first.id).await.unwrap();
    assert_ne!(first.s3_key, second.s3_key);
    scene.delete(&scene.backend, &first.id).await.unwrap();
    let retention = scene.backend.queue.traits().retention.as_millis() as u64;
    scene.sweep(&scene.backend, now_ms() + retention).await.unwrap();
    let kept = scene.stored();
    assert!(kept.contains(&first.s3_key) && kept.contains(&second.s3_key), "{kept:?}");
    scene.check("after the retention").await;
    assert!(!scene.stored().contains(&second.s3_key));
}
