//! Stores the claims of idempotency keys: items `idempotency#<key>` / `request` of the log table. DynamoDB
//! deletes them some time after `expiresAt`; expired items count as absent.

use super::item::{RawItem, text, whole};
use crate::backend::aws::error::class;
use crate::backend::{BackendError, CLAIM_TTL, Claim, Claims, StoredClaim};
use crate::model::{BodyHash, FunctionId, IdempotencyKey, JobId, now_ms};
use async_trait::async_trait;
use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_dynamodb::primitives::Blob;
use aws_sdk_dynamodb::types::AttributeValue;
use bytes::Bytes;
use std::error::Error;

/// The range key of a claim. Rows of functions have times there.
const RANGE_KEY: &str = "request";
/// Attempts to claim a key whose existing claim is gone when it is read.
const LOOKS_MAX: u32 = 3;

pub struct ClaimTable {
    client: Client,
    table: String,
}

impl ClaimTable {
    pub fn new(client: Client, logs_table: &str) -> Self {
        Self { client, table: logs_table.to_owned() }
    }

    async fn get(&self, key: &IdempotencyKey) -> Result<Option<StoredClaim>, BackendError> {
        let call = self.client.get_item().table_name(&self.table).set_key(Some(item_key(key)));
        let output = call.consistent_read(true).send().await.map_err(|e| class(&e))?;
        let Some(item) = output.item else { return Ok(None) };
        let is_live = number(&item, "expiresAt").is_some_and(|at| at > now_ms() / 1000);
        match is_live.then(|| claimed(*key, &item)) {
            None => Ok(None),
            Some(None) => Err(BackendError::Invalid("a claim in the log table has an unknown format".into())),
            Some(claimed) => Ok(claimed),
        }
    }
}

#[async_trait]
impl Claims for ClaimTable {
    async fn claim(&self, claim: &Claim) -> Result<Option<StoredClaim>, BackendError> {
        for _ in 0..LOOKS_MAX {
            let call = self
                .client
                .put_item()
                .table_name(&self.table)
                .set_item(Some(to_item(claim)))
                .condition_expression("attribute_not_exists(functionId) OR expiresAt <= :now")
                .expression_attribute_values(":now", whole(now_ms() / 1000));
            if done(call.send().await)? {
                return Ok(None);
            }
            if let Some(claimed) = self.get(&claim.key).await? {
                // If the claim is for this job, the answer of an earlier call was lost.
                return Ok(Some(claimed).filter(|claimed| claimed.claim.job != claim.job));
            }
        }
        Err(BackendError::Unavailable("the claim changes too quickly to be read".into()))
    }

    async fn find(&self, key: &IdempotencyKey) -> Result<Option<StoredClaim>, BackendError> {
        self.get(key).await
    }

    async fn try_again(&self, claimed: &StoredClaim, attempt: JobId) -> Result<bool, BackendError> {
        let StoredClaim { claim, attempt: before, .. } = claimed;
        // `:ours` matches if the answer of an earlier call was lost. The attribute is absent if an older
        // version wrote the claim.
        let none = if *before == claim.job { " OR attribute_not_exists(attemptId)" } else { "" };
        let condition = format!(
            "requestId = :job AND wasSent = :no AND (attemptId = :before OR attemptId = :ours{none})"
        );
        let call = self
            .client
            .update_item()
            .table_name(&self.table)
            .set_key(Some(item_key(&claim.key)))
            .update_expression("SET attemptId = :ours")
            .condition_expression(condition)
            .expression_attribute_values(":job", text(claim.job.to_string()))
            .expression_attribute_values(":no", AttributeValue::Bool(false))
            .expression_attribute_values(":before", text(before.to_string()))
            .expression_attribute_values(":ours", text(attempt.to_string()));
        done(call.send().await)
    }

    async fn confirm(&self, claim: &Claim) -> Result<(), BackendError> {
        let call = self
            .client
            .update_item()
            .table_name(&self.table)
            .set_key(Some(item_key(&claim.key)))
            .update_expression("SET wasSent = :yes")
            .condition_expression("requestId = :job")
            .expression_attribute_values(":yes", AttributeValue::Bool(true))
            .expression_attribute_values(":job", text(claim.job.to_string()));
        done(call.send().await).map(drop)
    }

    async fn release(&self, claim: &Claim, attempt: JobId) -> Result<bool, BackendError> {
        let call = self
            .client
            .delete_item()
            .table_name(&self.table)
            .set_key(Some(item_key(&claim.key)))
            // Absent if an earlier call has released the claim and its answer was lost.
            .condition_expression(
                "attribute_not_exists(functionId) OR \
                 (requestId = :job AND wasSent = :no AND attemptId = :attempt)",
            )
            .expression_attribute_values(":no", AttributeValue::Bool(false))
            .expression_attribute_values(":job", text(claim.job.to_string()))
            .expression_attribute_values(":attempt", text(attempt.to_string()));
        done(call.send().await)
    }

    async fn keep(&self, key: &IdempotencyKey, job: JobId, result: &Bytes) -> Result<(), BackendError> {
        let call = self
            .client
            .update_item()
            .table_name(&self.table)
            .set_key(Some(item_key(key)))
            .update_expression("SET keptResult = :result, wasSent = :yes")
            .condition_expression("requestId = :job")
            .expression_attribute_values(":result", AttributeValue::B(Blob::new(result.to_vec())))
            .expression_attribute_values(":yes", AttributeValue::Bool(true))
            .expression_attribute_values(":job", text(job.to_string()));
        done(call.send().await).map(drop)
    }
}

/// Returns `false` if the condition failed.
fn done<T, E: ProvideErrorMetadata + Error + 'static>(
    result: Result<T, SdkError<E>>,
) -> Result<bool, BackendError> {
    match result {
        Ok(_) => Ok(true),
        Err(error) if error.code() == Some("ConditionalCheckFailedException") => Ok(false),
        Err(error) => Err(class(&error)),
    }
}

fn item_key(key: &IdempotencyKey) -> RawItem {
    RawItem::from([
        ("functionId".to_owned(), text(format!("idempotency#{key}"))),
        ("timestamp".to_owned(), text(RANGE_KEY)),
    ])
}

fn to_item(claim: &Claim) -> RawItem {
    let mut item = item_key(&claim.key);
    item.extend([
        ("bodyHash".to_owned(), AttributeValue::B(Blob::new(claim.body.0))),
        ("requestId".to_owned(), text(claim.job.to_string())),
        ("ofFunction".to_owned(), text(claim.function.as_str())),
        ("attemptId".to_owned(), text(claim.job.to_string())),
        ("wasSent".to_owned(), AttributeValue::Bool(false)),
        ("expiresAt".to_owned(), whole(now_ms() / 1000 + CLAIM_TTL.as_secs())),
    ]);
    item
}

fn number(item: &RawItem, name: &str) -> Option<u64> {
    item.get(name)?.as_n().ok()?.parse().ok()
}

fn claimed(key: IdempotencyKey, item: &RawItem) -> Option<StoredClaim> {
    let text = |name: &str| item.get(name)?.as_s().ok();
    let body = BodyHash(item.get("bodyHash")?.as_b().ok()?.as_ref().try_into().ok()?);
    let (job, function) = (JobId::parse(text("requestId")?)?, FunctionId::parse(text("ofFunction")?)?);
    let attempt = text("attemptId").map_or(Some(job), |attempt| JobId::parse(attempt))?;
    let result = item.get("keptResult").and_then(|kept| kept.as_b().ok());
    Some(StoredClaim {
        claim: Claim { key, body, job, function },
        attempt,
        is_sent: *item.get("wasSent")?.as_bool().ok()?,
        result: result.map(|kept| Bytes::copy_from_slice(kept.as_ref())),
    })
}
