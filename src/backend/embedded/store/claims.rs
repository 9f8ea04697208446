//! The claims of idempotency keys: the table `idempotency`.

use crate::backend::embedded::database::Database;
use crate::backend::embedded::database::error::integer;
use crate::backend::{BackendError, CLAIM_TTL, Claim, Claims, StoredClaim};
use crate::model::{BodyHash, FunctionId, IdempotencyKey, JobId, now_ms};
use async_trait::async_trait;
use bytes::Bytes;
use rusqlite::{Connection, OptionalExtension, params};

/// The table `idempotency`.
pub(in crate::backend::embedded) struct SqliteClaims(pub(in crate::backend::embedded) Database);

#[async_trait]
impl Claims for SqliteClaims {
    async fn claim(&self, claim: &Claim) -> Result<Option<StoredClaim>, BackendError> {
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

    async fn find(&self, key: &IdempotencyKey) -> Result<Option<StoredClaim>, BackendError> {
        let key = *key;
        let found = self.0.read(move |c| find(c, &key)).await?;
        Ok(found)
    }

    async fn try_again(&self, claimed: &StoredClaim, attempt: JobId) -> Result<bool, BackendError> {
        let StoredClaim { claim, attempt: before, .. } = claimed;
        let (key, job, before) = (claim.key, claim.job, *before);
        let write = self.0.write(1, move |c| {
            let mut update = c.prepare_cached(
                "UPDATE idempotency SET attempt = ?4
                 WHERE key = ?1 AND job = ?2 AND NOT sent AND COALESCE(attempt, job) = ?3",
            )?;
            let values = params![key.as_bytes(), job.as_bytes(), before.as_bytes(), attempt.as_bytes()];
            Ok(update.execute(values)? == 1)
        });
        Ok(write.await?)
    }

    async fn confirm(&self, claim: &Claim) -> Result<(), BackendError> {
        let (key, job) = (claim.key, claim.job);
        let write = self.0.write(1, move |c| {
            let mut update =
                c.prepare_cached("UPDATE idempotency SET sent = TRUE WHERE key = ?1 AND job = ?2")?;
            update.execute(params![key.as_bytes(), job.as_bytes()]).map(drop)
        });
        Ok(write.await?)
    }

    async fn release(&self, claim: &Claim, attempt: JobId) -> Result<bool, BackendError> {
        let (key, job) = (claim.key, claim.job);
        let write = self.0.write(1, move |c| {
            let mut delete = c.prepare_cached(
                "DELETE FROM idempotency
                 WHERE key = ?1 AND job = ?2 AND NOT sent AND COALESCE(attempt, job) = ?3",
            )?;
            Ok(delete.execute(params![key.as_bytes(), job.as_bytes(), attempt.as_bytes()])? == 1)
        });
        Ok(write.await?)
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

fn insert(connection: &Connection, claim: &Claim) -> rusqlite::Result<()> {
    let mut insert = connection.prepare_cached(
        "INSERT INTO idempotency (key, body, job, function_id, sent, expires_at_ms)
         VALUES (?1, ?2, ?3, ?4, FALSE, ?5)",
    )?;
    let expires_at = now_ms() + CLAIM_TTL.as_secs() * 1000;
    insert.execute(params![
        claim.key.as_bytes(),
        claim.body.0,
        claim.job.as_bytes(),
        claim.function.as_str(),
        integer(expires_at),
    ])?;
    Ok(())
}

fn find(connection: &Connection, key: &IdempotencyKey) -> rusqlite::Result<Option<StoredClaim>> {
    let mut select = connection.prepare_cached(
        "SELECT body, job, function_id, sent, result, attempt FROM idempotency WHERE key = ?1",
    )?;
    let found = select.query_row([key.as_bytes()], |row| {
        let (body, job) = (BodyHash(row.get(0)?), JobId::from_bytes(row.get(1)?));
        let function: String = row.get(2)?;
        let result: Option<Vec<u8>> = row.get(4)?;
        // NULL if an older version has written the claim, or if this is the first attempt.
        let attempt = row.get::<_, Option<[u8; 16]>>(5)?.map_or(job, JobId::from_bytes);
        Ok((body, job, function, row.get(3)?, result, attempt))
    });
    let found = found.optional()?;
    Ok(found.and_then(|(body, job, function, is_sent, result, attempt)| {
        // The table contains valid ids only.
        let claim = Claim { key: *key, body, job, function: FunctionId::parse(&function)? };
        Some(StoredClaim { claim, attempt, is_sent, result: result.map(Bytes::from) })
    }))
}
