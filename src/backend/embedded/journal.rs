//! The journal of jobs in flight, as a table. An id begins with its node id, so the jobs of a node are one
//! range.

use super::database::error::integer;
use super::database::{Database, unsigned};
use super::store::add_counters;
use crate::backend::{
    Addition, BackendError, EndOutcome, EndedJob, GIVEN_UP_KEPT, GIVEN_UP_MAX, Journal, JournalEntry,
};
use crate::model::{FunctionId, IdempotencyKey, Job, JobId, NodeId, Sums, now_ms};
use async_trait::async_trait;
use rusqlite::{Connection, OptionalExtension, params};
use std::collections::BTreeMap;

/// The table `inflight`.
pub(super) struct SqliteJournal(pub(super) Database);

#[async_trait]
impl Journal for SqliteJournal {
    async fn enter(&self, jobs: &[Job]) -> Result<(), BackendError> {
        let entry = |job: &Job| (job.id, job.function.clone(), job.deadline, job.idempotency_key.clone());
        let entries: Vec<_> = jobs.iter().map(entry).collect();
        // Before a job is accepted, the queue writes it to the same file, and flushes that.
        let write = self.0.write_ordered(entries.len(), move |c| {
            let mut insert = c.prepare_cached(
                "INSERT OR REPLACE INTO inflight (id, function_id, deadline_ms, idempotency_key)
                 VALUES (?1, ?2, ?3, ?4)",
            )?;
            for (id, function, deadline, key) in &entries {
                let key = key.as_ref().map(|key| key.as_bytes());
                insert.execute(params![id.as_bytes(), function.as_str(), integer(*deadline), key])?;
            }
            Ok(())
        });
        Ok(write.await?)
    }

    async fn leave(&self, ids: &[JobId]) -> Result<(), BackendError> {
        let ids = ids.to_vec();
        let write = self.0.write(ids.len(), move |c| {
            let mut delete = c.prepare_cached("DELETE FROM inflight WHERE id = ?1")?;
            for id in &ids {
                delete.execute([id.as_bytes()])?;
            }
            Ok(())
        });
        Ok(write.await?)
    }

    /// Adds the counters of the jobs in the same transaction, because the functions are in the same file.
    async fn end(&self, _: NodeId, ended: &[EndedJob]) -> Result<EndOutcome, BackendError> {
        let ended = ended.to_vec();
        let write = self.0.write(2 * ended.len(), move |c| {
            let mut sums: BTreeMap<FunctionId, Sums> = BTreeMap::new();
            let mut added = Vec::with_capacity(ended.len());
            for EndedJob { id, function, adds, is_lost, .. } in ended {
                let addition = if delete(c, "DELETE FROM inflight WHERE id = ?1", id)? {
                    if is_lost {
                        remember(c, id, &function)?;
                    }
                    Addition::Whole
                } else if !is_lost && delete(c, "DELETE FROM given_up WHERE id = ?1", id)? {
                    Addition::Difference
                } else {
                    Addition::Nothing
                };
                *sums.entry(function).or_default() += addition.of(adds);
                added.push(addition);
            }
            sums.into_iter().try_for_each(|(function, sums)| add_counters(c, &function, sums))?;
            Ok(EndOutcome::Each(added))
        });
        Ok(write.await?)
    }

    async fn given_up(&self, node: NodeId) -> Result<Vec<(JobId, FunctionId)>, BackendError> {
        let (first, last) = (key(node, 0), key(node, u8::MAX));
        let read = self.0.read(move |c| {
            let mut select =
                c.prepare_cached("SELECT id, function_id FROM given_up WHERE id BETWEEN ?1 AND ?2")?;
            let rows = select.query_map([first, last], |row| {
                let function: String = row.get(1)?;
                Ok((JobId::from_bytes(row.get(0)?), function))
            })?;
            rows.collect::<rusqlite::Result<Vec<_>>>()
        });
        let all = read.await?.into_iter();
        Ok(all.filter_map(|(id, function)| Some((id, FunctionId::parse(&function)?))).collect())
    }

    async fn contains(&self, id: JobId) -> Result<bool, BackendError> {
        let read = self.0.read(move |c| {
            let mut select = c.prepare_cached("SELECT 1 FROM inflight WHERE id = ?1")?;
            select.query_row([id.as_bytes()], |_| Ok(())).optional()
        });
        Ok(read.await?.is_some())
    }

    async fn entry(&self, id: JobId) -> Result<Option<JournalEntry>, BackendError> {
        Ok(self.between(*id.as_bytes(), *id.as_bytes()).await?.pop())
    }

    async fn entries(&self, node: NodeId) -> Result<Vec<JournalEntry>, BackendError> {
        self.between(key(node, 0), key(node, u8::MAX)).await
    }
}

impl SqliteJournal {
    /// The entries whose ids are between these bounds, inclusive.
    async fn between(&self, first: [u8; 16], last: [u8; 16]) -> Result<Vec<JournalEntry>, BackendError> {
        let read = self.0.read(move |c| {
            let mut select = c.prepare_cached(
                "SELECT id, function_id, deadline_ms, idempotency_key FROM inflight
                 WHERE id BETWEEN ?1 AND ?2",
            )?;
            let rows = select.query_map([first, last], |row| {
                let function: String = row.get(1)?;
                let key: Option<[u8; 32]> = row.get(3)?;
                Ok((JobId::from_bytes(row.get(0)?), function, unsigned(row.get(2)?), key))
            })?;
            rows.collect::<rusqlite::Result<Vec<_>>>()
        });
        let entries = read.await?.into_iter().map(|(id, function, deadline, key)| {
            let idempotency_key = key.map(|key| Box::new(IdempotencyKey::from_bytes(key)));
            // The table contains valid ids only.
            let function = FunctionId::parse(&function)?;
            Some(JournalEntry { id, function, deadline, idempotency_key })
        });
        Ok(entries.flatten().collect())
    }
}

/// Deletes the row of a job. `false`: there was none.
fn delete(connection: &Connection, statement: &str, id: JobId) -> rusqlite::Result<bool> {
    Ok(connection.prepare_cached(statement)?.execute([id.as_bytes()])? == 1)
}

/// Records a job that was given up, and deletes old records.
fn remember(connection: &Connection, id: JobId, function: &FunctionId) -> rusqlite::Result<()> {
    let now = now_ms();
    let kept_ms = GIVEN_UP_KEPT.as_secs() * 1000;
    let mut forget = connection.prepare_cached("DELETE FROM given_up WHERE at_ms < ?1")?;
    forget.execute([integer(now.saturating_sub(kept_ms))])?;
    let mut insert = connection.prepare_cached(
        "INSERT OR REPLACE INTO given_up (id, function_id, at_ms)
         SELECT ?1, ?2, ?3 WHERE (SELECT COUNT(*) FROM given_up) < ?4",
    )?;
    insert.execute(params![id.as_bytes(), function.as_str(), integer(now), integer(GIVEN_UP_MAX as u64)])?;
    Ok(())
}

/// An id of `node` whose other bytes are all `rest`: a bound of the node's range.
fn key(node: NodeId, rest: u8) -> [u8; 16] {
    let mut key = [rest; 16];
    key[..4].copy_from_slice(&node.0.to_be_bytes());
    key
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::FunctionStore;
    use crate::backend::embedded::scratch::{Scratch, job, job_of};
    use crate::backend::embedded::store::{SqliteFunctions, put_function};
    use crate::model::{Function, FunctionCounters};

    #[tokio::test]
    async fn the_journal_survives_a_restart_and_separates_nodes() {
        let scratch = Scratch::new();
        let ours: Vec<Job> = (0..5).map(|n| job_of(NodeId(7), n, "{}")).collect();
        let others = [job_of(NodeId(6), u64::MAX, "{}"), job_of(NodeId(8), 0, "{}")];
        let journal = SqliteJournal(scratch.database());
        journal.enter(&ours).await.unwrap();
        journal.enter(&others).await.unwrap();
        journal.leave(&[ours[1].id, job(99, "{}").id]).await.unwrap();
        drop(journal);

        let journal = SqliteJournal(scratch.database());
        let entry = |job: &Job| JournalEntry {
            id: job.id,
            function: job.function.clone(),
            deadline: job.deadline,
            idempotency_key: job.idempotency_key.clone(),
        };
        let expected: Vec<_> = [0, 2, 3, 4].map(|n: usize| entry(&ours[n])).into();
        assert_eq!(journal.entries(NodeId(7)).await.unwrap(), expected);
        assert_eq!(journal.entries(NodeId(6)).await.unwrap(), [entry(&others[0])]);
        assert_eq!(journal.entries(NodeId(9)).await.unwrap(), []);
        assert_eq!(journal.contains(ours[0].id).await, Ok(true));
        assert_eq!(journal.contains(ours[1].id).await, Ok(false));
    }

    #[tokio::test]
    async fn a_job_is_counted_once_however_often_it_ends() {
        let scratch = Scratch::new();
        let functions = SqliteFunctions(scratch.database());
        let there = Function::sample("f");
        let made = there.clone();
        assert_eq!(functions.0.write(1, move |c| put_function(c, &made)).await.ok(), Some(true));
        let journal = SqliteJournal(functions.0.clone());
        let jobs: Vec<Job> = (0..3).map(|n| job_of(NodeId(7), n, "{}")).collect();
        journal.enter(&jobs[..2]).await.unwrap();
        let adds = Sums { invocations: 1, duration_us: 1500, ..Sums::default() };
        let ended = |job: &Job, function: &str| EndedJob {
            id: job.id,
            function: FunctionId::parse(function).unwrap(),
            adds,
            is_lost: false,
            is_shared: false,
        };
        // The third job was never journaled. The function of the second one does not exist.
        let all = [ended(&jobs[0], "f"), ended(&jobs[0], "f"), ended(&jobs[1], "gone"), ended(&jobs[2], "f")];
        let (whole, nothing) = (Addition::Whole, Addition::Nothing);
        for added in [[whole, nothing, whole, nothing], [nothing; 4]] {
            assert_eq!(journal.end(NodeId(7), &all).await, Ok(EndOutcome::Each(added.into())));
        }
        let counters = functions.get(&there.id).await.unwrap().unwrap().counters;
        let expected =
            FunctionCounters { invocations: 1, total_duration_ms: 1.5, ..FunctionCounters::default() };
        assert_eq!(counters, expected);
        assert_eq!(journal.entries(NodeId(7)).await, Ok(Vec::new()));
    }

    #[tokio::test]
    async fn a_late_result_corrects_the_counters_of_its_lost_job() {
        let scratch = Scratch::new();
        let functions = SqliteFunctions(scratch.database());
        let there = Function::sample("f");
        let made = there.clone();
        assert_eq!(functions.0.write(1, move |c| put_function(c, &made)).await.ok(), Some(true));
        let journal = SqliteJournal(functions.0.clone());
        let jobs: Vec<Job> = (0..2).map(|n| job_of(NodeId(7), n, "{}")).collect();
        journal.enter(&jobs).await.unwrap();
        let ended = |job: &Job, adds: Sums, is_lost| EndedJob {
            id: job.id,
            function: there.id.clone(),
            adds,
            is_lost,
            is_shared: false,
        };
        let lost = Sums { invocations: 1, errors: 1, ..Sums::default() };
        let real = Sums { invocations: 1, duration_us: 2000, ..Sums::default() };
        for _ in 0..2 {
            journal
                .end(NodeId(7), &[ended(&jobs[0], lost, true), ended(&jobs[1], lost, true)])
                .await
                .unwrap();
        }
        assert_eq!(journal.given_up(NodeId(7)).await.unwrap().len(), 2);
        for _ in 0..2 {
            journal
                .end(NodeId(7), &[ended(&jobs[1], real, false), ended(&jobs[1], lost, true)])
                .await
                .unwrap();
        }
        assert_eq!(journal.given_up(NodeId(7)).await, Ok(vec![(jobs[0].id, there.id.clone())]));
        let counters = functions.get(&there.id).await.unwrap().unwrap().counters;
        let expected = FunctionCounters {
            invocations: 2,
            errors: 1,
            total_duration_ms: 2.0,
            ..FunctionCounters::default()
        };
        assert_eq!(counters, expected);
    }
}
