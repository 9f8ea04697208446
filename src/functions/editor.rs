//! Creates, changes and deletes functions.
//!
//! Every change is one conditional write of the backend, together with its change record and its effect on
//! the code list. So a failure at any step never leaves one without the others. The code itself cannot be
//! part of that write:
//!
//! * New code is added to the code list before it is stored, and removed from it by the write that points to
//!   it. If that write never happens, the sweep deletes the code.
//! * Old code is added to the list by the write that no longer points to it. It is deleted when the queue has
//!   expired every job that names it.

use super::FunctionCache;
use crate::backend::{
    Backend, BackendError, CodeList, CodeStore, FunctionStore, FunctionWrite, FunctionWriteOutcome,
};
use crate::backoff::Backoff;
use crate::events::{EventBus, FleetEvent};
use crate::model::{
    ConfigAction, ConfigRecord, Function, FunctionCounters, FunctionId, Handler, RetiredCode, Runtime,
    UnixMs, now_ms, rfc3339_ms,
};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;
use uuid::Uuid;

/// How long new code may wait for the write that points to it.
const ADOPTION_MAX: Duration = Duration::from_secs(3600);
/// How long code is kept beyond the retention of the last job that names it: for jobs received at the last
/// moment, caches of other nodes, and clock differences.
const RETIREMENT_SLACK: Duration = Duration::from_secs(3600);
/// Maximum number of attempts of a change that conflicts with other nodes, and the pause before the second
/// one. The pause grows with each attempt.
const TRIES_MAX: u32 = 8;
const CONFLICTS: Backoff = Backoff::new(Duration::from_millis(20), Duration::from_secs(1));
/// Number of locks that serialize changes on this node.
const TURNS: usize = 64;
/// Maximum number of attempts of a write without an answer. The write is idempotent.
const WRITE_TRIES_MAX: usize = 3;

/// Creates, changes and deletes functions. Cheap to clone.
#[derive(Clone)]
pub struct Editor {
    store: Arc<dyn FunctionStore>,
    code: Arc<dyn CodeStore>,
    list: Arc<dyn CodeList>,
    cache: FunctionCache,
    /// The retention of the queue.
    retention: Duration,
    turns: Arc<Turns>,
    events: EventBus,
}

/// Code that was uploaded and validated.
pub struct NewCode<'a> {
    pub file: &'a Path,
    /// The file name given by the user.
    pub original_name: String,
}

/// The properties of a new function.
pub struct NewFunction<'a> {
    pub name: String,
    pub description: String,
    pub runtime: Runtime,
    pub memory_mb: u64,
    /// `None`: script mode.
    pub handler: Option<Handler>,
    /// A JSON object.
    pub env_vars: String,
    pub code: NewCode<'a>,
}

/// The changes to a function; `None` leaves a property unchanged.
#[derive(Default)]
pub struct FunctionChange {
    pub description: Option<String>,
    pub memory_mb: Option<u64>,
    /// 0 removes the cap.
    pub max_concurrency: Option<u64>,
    /// `Some(None)` removes the handler: script mode.
    pub handler: Option<Option<Handler>>,
}

/// Why a function was not changed. `E` is the error of the caller's own check.
#[derive(Debug)]
pub enum EditError<E> {
    NoSuchFunction,
    Refused(E),
    /// Other writers changed it too often meanwhile.
    Contended,
    /// The part that failed, and its error.
    Backend(&'static str, BackendError),
}

impl Editor {
    pub fn new(backend: &Backend, cache: FunctionCache) -> Self {
        Self {
            store: Arc::clone(&backend.functions),
            code: Arc::clone(&backend.code),
            list: Arc::clone(&backend.code_list),
            cache,
            retention: backend.queue.traits().retention,
            turns: Arc::new(Turns(std::array::from_fn(|_| Mutex::const_new(())))),
            events: EventBus::default(),
        }
    }

    /// Reports changes to `events`.
    pub fn reporting_to(self, events: EventBus) -> Self {
        Self { events, ..self }
    }

    pub async fn create<E>(&self, by: &str, new: NewFunction<'_>) -> Result<Function, EditError<E>> {
        let id = Uuid::new_v4().to_string();
        let id = FunctionId::parse(&id).ok_or(EditError::Contended)?; // a UUID is always an id
        let code = self.store_code(&id, &new.code).await?;
        let now = now_ms();
        let function = Function {
            id,
            name: new.name,
            description: new.description,
            runtime: new.runtime.name().to_owned(),
            memory_mb: new.memory_mb,
            max_concurrency: 0,
            handler: new.handler,
            s3_key: code.s3_key.clone(),
            original_name: new.code.original_name,
            uploaded_at: rfc3339_ms(now),
            updated_at: String::new(),
            env_vars: new.env_vars,
            version: 1,
            counters: FunctionCounters::default(),
            recommendation: None,
        };
        let write = self.write(ConfigAction::Create, by, now, None, Some(&function), Some(code)).await?;
        (write == FunctionWriteOutcome::Done).then_some(function).ok_or(EditError::Contended)
    }

    /// Changes a function according to `decide`, which sees its current state and may reject the change.
    /// `code` replaces its code.
    pub async fn change<E>(
        &self,
        by: &str,
        id: &FunctionId,
        action: ConfigAction,
        code: Option<NewCode<'_>>,
        decide: impl Fn(&Function) -> Result<FunctionChange, E> + Send + Sync,
    ) -> Result<Function, EditError<E>> {
        let stored = match &code {
            Some(code) => {
                // Checked before the code is stored. The slow upload is done before the lock is taken.
                decide(&self.read(id).await?).map_err(EditError::Refused)?;
                Some(self.store_code(id, code).await?)
            }
            None => None,
        };
        let new_code = stored.as_ref().zip(code.as_ref());
        let _turn = self.turns.of(id).lock().await;
        for tried in 0..TRIES_MAX {
            if tried > 0 {
                CONFLICTS.sleep(tried).await;
            }
            let before = self.read(id).await?;
            let change = decide(&before).map_err(EditError::Refused)?;
            let now = now_ms();
            let after = changed(&before, change, new_code, now);
            let adopt = stored.clone();
            if self.write(action, by, now, Some(&before), Some(&after), adopt).await?
                == FunctionWriteOutcome::Done
            {
                return Ok(after);
            }
        }
        Err(EditError::Contended)
    }

    /// Deletes a function unless `check` rejects it. Jobs that are already queued still run.
    pub async fn delete<E>(
        &self,
        by: &str,
        id: &FunctionId,
        check: impl Fn(&Function) -> Result<(), E> + Send + Sync,
    ) -> Result<(), EditError<E>> {
        let _turn = self.turns.of(id).lock().await;
        for tried in 0..TRIES_MAX {
            if tried > 0 {
                CONFLICTS.sleep(tried).await;
            }
            let before = self.read(id).await?;
            check(&before).map_err(EditError::Refused)?;
            if self.write(ConfigAction::Delete, by, now_ms(), Some(&before), None, None).await?
                == FunctionWriteOutcome::Done
            {
                return Ok(());
            }
        }
        Err(EditError::Contended)
    }

    /// Reads the table and not the cache, which may be stale.
    async fn read<E>(&self, id: &FunctionId) -> Result<Function, EditError<E>> {
        let found = self.store.get(id).await.map_err(|e| EditError::Backend("the function table", e))?;
        found.ok_or(EditError::NoSuchFunction)
    }

    async fn store_code<E>(&self, id: &FunctionId, code: &NewCode<'_>) -> Result<RetiredCode, EditError<E>> {
        // Each upload gets its own key, because queued jobs name the code they were queued with.
        let s3_key = format!("functions/{id}/{}.zip", Uuid::new_v4());
        let entry = RetiredCode { s3_key, function: id.clone(), due: later(now_ms(), ADOPTION_MAX) };
        // On the list first: after any failure from here on, the code is swept or pointed to.
        self.list.add(&entry).await.map_err(|e| EditError::Backend("the code list", e))?;
        self.code.put(&entry.s3_key, code.file).await.map_err(|e| EditError::Backend("the code store", e))?;
        Ok(entry)
    }

    async fn write<E>(
        &self,
        action: ConfigAction,
        by: &str,
        now: UnixMs,
        before: Option<&Function>,
        after: Option<&Function>,
        adopt: Option<RetiredCode>,
    ) -> Result<FunctionWriteOutcome, EditError<E>> {
        let Some(record) = ConfigRecord::new(action, by, now, before, after) else {
            return Ok(FunctionWriteOutcome::Conflict); // neither before nor after: nothing to write
        };
        // Too late: the sweep may delete the code at any moment.
        if adopt.as_ref().is_some_and(|code| code.due < later(now, ADOPTION_MAX / 2)) {
            return Err(EditError::Contended);
        }
        let id = record.function.clone();
        let is_left =
            |f: &&Function| after.is_none_or(|after| after.s3_key != f.s3_key) && !f.s3_key.is_empty();
        let retire = before.filter(is_left).map(|f| RetiredCode {
            s3_key: f.s3_key.clone(),
            function: f.id.clone(),
            due: later(now, self.retention + RETIREMENT_SLACK),
        });
        let write = FunctionWrite { before: before.cloned(), after: after.cloned(), record, retire, adopt };
        let written = self.write_for_sure(&write).await;
        // After a failure too: the write may have taken effect, or may still do so.
        match &written {
            Err(error) if error.is_transient() => self.cache.may_change(&id).await,
            _ => self.cache.changed(&id).await,
        }
        if written == Ok(FunctionWriteOutcome::Done) {
            self.events.report(|| match after {
                Some(after) => FleetEvent::FunctionChanged { function: id, version: after.version },
                None => FleetEvent::FunctionDeleted { function: id },
            });
        }
        written.map_err(|e| EditError::Backend("the function table", e))
    }

    /// A missing answer says nothing about the write, so it is sent again. It takes effect only once.
    async fn write_for_sure(&self, write: &FunctionWrite) -> Result<FunctionWriteOutcome, BackendError> {
        let mut tried = 1;
        loop {
            match self.store.write(write).await {
                Err(e) if e.is_transient() && tried < WRITE_TRIES_MAX => tried += 1,
                done => return done,
            }
        }
    }
}

/// Returns the function with the change applied.
fn changed(
    before: &Function,
    change: FunctionChange,
    code: Option<(&RetiredCode, &NewCode<'_>)>,
    now: UnixMs,
) -> Function {
    let mut after = Function { updated_at: rfc3339_ms(now), version: before.version + 1, ..before.clone() };
    if let Some(description) = change.description {
        after.description = description;
    }
    if let Some(memory_mb) = change.memory_mb {
        after.memory_mb = memory_mb;
    }
    if let Some(max) = change.max_concurrency {
        after.max_concurrency = max;
    }
    if let Some(handler) = change.handler {
        after.handler = handler;
    }
    if let Some((stored, code)) = code {
        after.s3_key.clone_from(&stored.s3_key);
        after.original_name.clone_from(&code.original_name);
    }
    after
}

/// Serializes changes of one function on this node, so that they do not conflict repeatedly. Functions share
/// the locks; each is held briefly.
struct Turns([Mutex<()>; TURNS]);

impl Turns {
    fn of(&self, id: &FunctionId) -> &Mutex<()> {
        let mut hasher = DefaultHasher::new();
        id.hash(&mut hasher);
        // The remainder fits in any integer type.
        &self.0[(hasher.finish() % TURNS as u64) as usize]
    }
}

fn later(at: UnixMs, by: Duration) -> UnixMs {
    at.saturating_add(u64::try_from(by.as_millis()).unwrap_or(u64::MAX))
}
