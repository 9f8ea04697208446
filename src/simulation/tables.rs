//! The tables: executions, claims and functions, with the conditions of their writes.

use super::network::{NoAnswer, call};
use super::world::{Service, World, world};
use crate::ambient::replaced;
use crate::backend::aws::simulation::{CounterStore, PostNumber};
use crate::backend::{
    BackendError, Claim, Claims, CodeList, CodeStore, ExecutionStore, FunctionPage, FunctionStore,
    FunctionWrite, FunctionWriteOutcome, LogPage, LogQuery, StoredClaim,
};
use crate::model::{
    Execution, Function, FunctionId, IdempotencyKey, JobId, NodeId, Recommendation, RetiredCode, Sums, UnixMs,
};
use async_trait::async_trait;
use bytes::Bytes;
use rand::Rng;
use std::collections::BTreeMap;
use std::path::Path;

/// Attempts to claim a key whose existing claim is gone when it is read; as in the log table.
const LOOKS_MAX: u32 = 3;

#[derive(Default)]
pub struct Tables {
    pub executions: BTreeMap<(FunctionId, String), Execution>,
    pub claims: BTreeMap<String, StoredClaim>,
    pub functions: BTreeMap<FunctionId, StoredFunction>,
}

pub struct StoredFunction {
    pub function: Function,
    pub sums: Sums,
    /// The number of the last sums of each node.
    pub posted: BTreeMap<NodeId, u64>,
}

impl World {
    fn put_row(&mut self, row: &Execution) {
        self.note(|| format!("row {} {} written", row.id.request_id(), row.status));
        self.tables.executions.insert(key_of(row), row.clone());
    }

    /// With the condition of `put_first`. Returns whether the row was written.
    fn put_first_row(&mut self, row: &Execution) -> bool {
        let found = self.tables.executions.get(&key_of(row));
        let is_first = found.is_none_or(|found| found.is_lost() && !row.is_lost());
        if is_first {
            self.put_row(row);
        } else {
            self.note(|| format!("row {} {} not the first", row.id.request_id(), row.status));
        }
        is_first
    }
}

fn key_of(row: &Execution) -> (FunctionId, String) {
    (row.function.clone(), row.id.key().into_owned())
}

pub struct Executions;

#[async_trait]
impl ExecutionStore for Executions {
    async fn put(&self, rows: &[Execution]) -> Vec<Result<(), BackendError>> {
        let batch = rows.to_vec();
        let put = call(Service::LogTable, "put rows", move |world| {
            let mut results = Vec::new();
            for row in &batch {
                let probability = world.profile.partial_batches;
                if world.chance(probability) {
                    world.bite("row left unprocessed");
                    results.push(Err(BackendError::Unavailable("unprocessed".into())));
                } else {
                    world.put_row(row);
                    results.push(Ok(()));
                }
            }
            results
        });
        put.await.unwrap_or_else(|e| vec![Err(e.into()); rows.len()])
    }

    async fn put_first(&self, row: &Execution) -> Result<Execution, BackendError> {
        let put = row.clone();
        if call(Service::LogTable, "put first row", move |world| world.put_first_row(&put)).await? {
            return Ok(row.clone());
        }
        let kept = self.get(&row.function, &row.id.request_id()).await?;
        kept.ok_or_else(|| BackendError::Unavailable("the row is gone".into()))
    }

    async fn list(&self, query: &LogQuery) -> Result<LogPage, BackendError> {
        let function = query.function.clone();
        let rows = call(Service::LogTable, "list", move |world| {
            let of = world.tables.executions.range((function.clone(), String::new())..);
            of.take_while(|((id, _), _)| *id == function).map(|(_, row)| row.clone()).collect()
        });
        Ok(LogPage { rows: rows.await?, next: None })
    }

    async fn get(&self, function: &FunctionId, request_id: &str) -> Result<Option<Execution>, BackendError> {
        let Some(id) = JobId::parse(request_id) else { return Ok(None) };
        let key = (function.clone(), crate::model::RowKey::of(id).as_str().to_owned());
        Ok(call(Service::LogTable, "get row", move |world| world.tables.executions.get(&key).cloned())
            .await?)
    }

    async fn probe(&self) -> Result<(), BackendError> {
        Ok(call(Service::LogTable, "probe", |_| ()).await?)
    }
}

pub struct ClaimItems;

impl ClaimItems {
    async fn get(&self, key: &IdempotencyKey) -> Result<Option<StoredClaim>, NoAnswer> {
        let key = key.to_string();
        call(Service::LogTable, "get claim", move |world| world.tables.claims.get(&key).cloned()).await
    }

    /// Changes a claim, if `is_met` holds for what is stored. Returns whether it did.
    async fn update(
        &self,
        what: &'static str,
        key: &IdempotencyKey,
        is_met: impl Fn(Option<&StoredClaim>) -> bool + Send + 'static,
        change: impl Fn(Option<StoredClaim>) -> Option<StoredClaim> + Send + 'static,
    ) -> Result<bool, NoAnswer> {
        let key = key.to_string();
        call(Service::LogTable, what, move |world| {
            let is_met = is_met(world.tables.claims.get(&key));
            world.note(|| format!("{what} {key:.8}: {is_met}"));
            let claims = &mut world.tables.claims;
            if is_met {
                let before = claims.remove(&key);
                if let Some(after) = change(before) {
                    claims.insert(key.clone(), after);
                }
            }
            is_met
        })
        .await
    }
}

#[async_trait]
impl Claims for ClaimItems {
    async fn claim(&self, claim: &Claim) -> Result<Option<StoredClaim>, BackendError> {
        let new = StoredClaim { claim: claim.clone(), attempt: claim.job, is_sent: false, result: None };
        for _ in 0..LOOKS_MAX {
            let new = new.clone();
            let change = move |_| Some(new.clone());
            if self.update("claim", &claim.key, |found| found.is_none(), change).await? {
                return Ok(None);
            }
            if let Some(found) = self.get(&claim.key).await? {
                return Ok(Some(found).filter(|found| found.claim.job != claim.job));
            }
        }
        Err(BackendError::Unavailable("the claim changes too quickly".into()))
    }

    async fn find(&self, key: &IdempotencyKey) -> Result<Option<StoredClaim>, BackendError> {
        Ok(self.get(key).await?)
    }

    async fn try_again(&self, claimed: &StoredClaim, attempt: JobId) -> Result<bool, BackendError> {
        let (job, before) = (claimed.claim.job, claimed.attempt);
        world(|world| {
            let node = replaced::current().and_then(|process| world.processes.all[process.0].node);
            if node != Some(job.node()) {
                world.truth.resent_at(job);
            }
        });
        let is_met = move |found: Option<&StoredClaim>| {
            found.is_some_and(|found| {
                found.claim.job == job
                    && !found.is_sent
                    && (found.attempt == before || found.attempt == attempt)
            })
        };
        let change = move |found: Option<StoredClaim>| found.map(|found| StoredClaim { attempt, ..found });
        Ok(self.update("try again", &claimed.claim.key, is_met, change).await?)
    }

    async fn confirm(&self, claim: &Claim) -> Result<(), BackendError> {
        let job = claim.job;
        let is_met = move |found: Option<&StoredClaim>| found.is_some_and(|found| found.claim.job == job);
        let change = |found: Option<StoredClaim>| found.map(|found| StoredClaim { is_sent: true, ..found });
        self.update("confirm", &claim.key, is_met, change).await?;
        Ok(())
    }

    async fn release(&self, claim: &Claim, attempt: JobId) -> Result<bool, BackendError> {
        let job = claim.job;
        let is_met = move |found: Option<&StoredClaim>| {
            found.is_none_or(|found| found.claim.job == job && !found.is_sent && found.attempt == attempt)
        };
        Ok(self.update("release", &claim.key, is_met, |_| None).await?)
    }

    async fn keep(&self, key: &IdempotencyKey, job: JobId, result: &Bytes) -> Result<(), BackendError> {
        let result = result.clone();
        let is_met = move |found: Option<&StoredClaim>| found.is_some_and(|found| found.claim.job == job);
        let change = move |found: Option<StoredClaim>| {
            found.map(|found| StoredClaim { is_sent: true, result: Some(result.clone()), ..found })
        };
        self.update("keep", key, is_met, change).await?;
        Ok(())
    }
}

pub struct Functions;

#[async_trait]
impl FunctionStore for Functions {
    async fn get(&self, id: &FunctionId) -> Result<Option<Function>, BackendError> {
        let id = id.clone();
        let found = call(Service::FunctionTable, "get function", move |world| {
            world.tables.functions.get(&id).map(|stored| stored.function.clone())
        });
        Ok(found.await?)
    }

    async fn list(&self, limit: usize, _: Option<&str>) -> Result<FunctionPage, BackendError> {
        let functions = call(Service::FunctionTable, "list functions", move |world| {
            world.tables.functions.values().take(limit).map(|stored| stored.function.clone()).collect()
        });
        Ok(FunctionPage { functions: functions.await?, next: None })
    }

    async fn write(&self, write: &FunctionWrite) -> Result<FunctionWriteOutcome, BackendError> {
        let write = write.clone();
        Ok(call(Service::FunctionTable, "write function", move |world| world.write_function(&write)).await?)
    }

    async fn recommend(&self, id: &FunctionId, advice: &Recommendation) -> Result<(), BackendError> {
        let (id, advice) = (id.clone(), advice.clone());
        let done = call(Service::FunctionTable, "recommend", move |world| {
            let Some(stored) = world.tables.functions.get_mut(&id) else { return };
            let known = &mut stored.function.recommendation;
            if known.as_ref().is_none_or(|known| known.at <= advice.at) {
                *known = Some(advice.clone());
            }
        });
        Ok(done.await?)
    }

    async fn probe(&self) -> Result<(), BackendError> {
        Ok(call(Service::FunctionTable, "probe", |_| ()).await?)
    }
}

impl World {
    /// A transaction with the token of its write: repeated, it takes effect once.
    fn write_function(&mut self, write: &FunctionWrite) -> FunctionWriteOutcome {
        let id = &write.record.function;
        let stored = self.tables.functions.get_mut(id);
        if let (Some(stored), Some(after)) = (&stored, &write.after)
            && stored.function.version == after.version
            && stored.function.updated_at == after.updated_at
        {
            return FunctionWriteOutcome::Done;
        }
        match (stored, &write.before, &write.after) {
            (Some(stored), Some(before), Some(after))
                if stored.function.version == before.version
                    && stored.function.updated_at == before.updated_at =>
            {
                stored.function = after.clone();
                FunctionWriteOutcome::Done
            }
            _ => FunctionWriteOutcome::Conflict,
        }
    }
}

#[async_trait]
impl CounterStore for Functions {
    async fn add_counters(&self, id: &FunctionId, sums: Sums, stamp: PostNumber) -> Result<(), BackendError> {
        let id = id.clone();
        let added = call(Service::FunctionTable, "add counters", move |world| {
            let Some(stored) = world.tables.functions.get_mut(&id) else { return };
            let last = stored.posted.entry(stamp.node).or_default();
            let is_new = *last < stamp.number;
            if is_new {
                *last = stamp.number;
                stored.sums += sums;
            }
            world.note(|| format!("counters {id} {} {}: {sums:?} {is_new}", stamp.node, stamp.number));
        });
        Ok(added.await?)
    }
}

/// The code of functions and its list. Nothing of it is asserted.
pub struct Code;

#[async_trait]
impl CodeStore for Code {
    async fn put(&self, _: &str, _: &Path) -> Result<(), BackendError> {
        Ok(())
    }

    async fn delete(&self, _: &str) -> Result<(), BackendError> {
        Ok(())
    }
}

#[async_trait]
impl CodeList for Code {
    async fn add(&self, _: &RetiredCode) -> Result<(), BackendError> {
        Ok(())
    }

    async fn due(&self, _: UnixMs, _: usize) -> Result<Vec<RetiredCode>, BackendError> {
        Ok(Vec::new())
    }

    async fn remove(&self, _: &RetiredCode) -> Result<(), BackendError> {
        Ok(())
    }
}

/// The functions of a run.
pub fn create_functions(world: &mut World) {
    for n in 0..world.rng.random_range(1..=4) {
        let function = Function { version: 1, ..Function::sample(&format!("f{n}")) };
        let stored = StoredFunction { function, sums: Sums::default(), posted: BTreeMap::new() };
        world.tables.functions.insert(stored.function.id.clone(), stored);
    }
}
