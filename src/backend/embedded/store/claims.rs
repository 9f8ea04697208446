//! The requests that are carried out once: the table `idempotency`.

use crate::backend::embedded::database::{Database, integer};
use crate::backend::{BackendError, CLAIMED, Claim, Claimed, Claims};
use crate::model::{BodyHash, FunctionId, IdempotencyKey, JobId, now_ms};
use async_trait::async_trait;
use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension, params};

/// The table `idempotency`.
pub(in crate::backend::embedded) struct LocalClaims(pub(in crate::backend::embedded) Database);

#[async_trait]
impl Claims for LocalClaims {
    async fn claim(&self, claim: &Claim) -> Result<Option<Claimed>, BackendError> {
        let claim = claim.clone();
        let write = self.0.write(1, move |c| {
            let mut forget =
                c.prepare_cached("DELETE FROM idempotency WHERE key = ?1 AND expires_at_ms <= ?2")?;
            forget.execute(params![claim.key.as_bytes(), integer(now_ms())])?;
            let found = find(c, &claim.key)?;
            if found.is_none() {
                insert(c, &claim)?;
            }
            Ok(found)
        });
        Ok(write.await?)
    }

    async fn take_over(&self, claim: &Claim, instead_of: JobId) -> Result<bool, BackendError> {
        let claim = claim.clone();
        let write = self.0.write(1, move |c| {
            let mut delete =
                c.prepare_cached("DELETE FROM idempotency WHERE key = ?1 AND job = ?2 AND NOT sent")?;
            let is_free = delete.execute(params![claim.key.as_bytes(), instead_of.as_bytes()])? == 1;
            if is_free {
                insert(c, &claim)?;
            }
            Ok(is_free)
        });
        Ok(write.await?)
    }

    async fn confirm(&self, claim: &Claim) -> Result<(), BackendError> {
        self.change("UPDATE idempotency SET sent = TRUE WHERE key = ?1 AND job = ?2", claim).await
    }

    async fn release(&self, claim: &Claim) -> Result<(), BackendError> {
        self.change("DELETE FROM idempotency WHERE key = ?1 AND job = ?2 AND NOT sent", claim).await
    }

    async fn keep(&self, key: &IdempotencyKey, job: JobId, result: &Bytes) -> Result<(), BackendError> {
        let (key, result) = (*key, result.clone());
        let write = self.0.write(1, move |c| {
            let mut update = c.prepare_cached(
                "UPDATE idempotency SET result = ?3, sent = TRUE WHERE key = ?1 AND job = ?2",
            )?;
            update.execute(params![key.as_bytes(), job.as_bytes(), &result[..]]).map(drop)
        });
        Ok(write.await?)
    }
}

impl LocalClaims {
    async fn change(&self, statement: &'static str, claim: &Claim) -> Result<(), BackendError> {
        let (key, job) = (claim.key, claim.job);
        let write = self.0.write(1, move |c| {
            c.prepare_cached(statement)?.execute(params![key.as_bytes(), job.as_bytes()]).map(drop)
        });
        Ok(write.await?)
    }
}

fn insert(connection: &Connection, claim: &Claim) -> rusqlite::Result<()> {
    let mut insert = connection.prepare_cached(
        "INSERT INTO idempotency (key, body, job, function_id, sent, expires_at_ms)
         VALUES (?1, ?2, ?3, ?4, FALSE, ?5)",
    )?;
    let expires_at = now_ms() + CLAIMED.as_secs() * 1000;
    insert.execute(params![
        claim.key.as_bytes(),
        claim.body.0,
        claim.job.as_bytes(),
        claim.function.as_str(),
        integer(expires_at),
    ])?;
    Ok(())
}

fn find(connection: &Connection, key: &IdempotencyKey) -> rusqlite::Result<Option<Claimed>> {
    let mut select = connection
        .prepare_cached("SELECT body, job, function_id, sent, result FROM idempotency WHERE key = ?1")?;
    let found = select.query_row([key.as_bytes()], |row| {
        let (body, job) = (BodyHash(row.get(0)?), JobId::from_bytes(row.get(1)?));
        let function: String = row.get(2)?;
        let result: Option<Vec<u8>> = row.get(4)?;
        Ok((body, job, function, row.get(3)?, result))
    });
    let found = found.optional()?;
    Ok(found.and_then(|(body, job, function, is_sent, result)| {
        // Only valid ids are ever entered.
        let claim = Claim { key: *key, body, job, function: FunctionId::parse(&function)? };
        Some(Claimed { claim, is_sent, result: result.map(Bytes::from) })
    }))
}
