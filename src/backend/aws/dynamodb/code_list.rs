//! The list of code to be deleted: items of the log table with the hash key `sweep#code`, the S3 key as range
//! key, `ownerId` (S, the function id) and `due` (N, Unix ms). They have no TTL: an entry stays until its
//! code is deleted.
//!
//! Every S3 key fits, because both kinds of key may be 1024 bytes long. All entries share one hash key, so
//! that one query returns what is due. A few writes per change of code are far below the limit of one
//! partition.

use super::item::{Item, RawItem, text, whole};
use crate::backend::aws::error::class;
use crate::backend::{BackendError, CodeList};
use crate::model::{FunctionId, RetiredCode, UnixMs};
use async_trait::async_trait;
use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::error::SdkError;
use aws_sdk_dynamodb::operation::delete_item::DeleteItemError;

/// Not a function id, so no executions are stored under it.
const HASH_KEY: &str = "sweep#code";
/// Maximum number of pages (1 MB, some thousand entries each) read in one call.
const DUE_PAGES_MAX: usize = 20;

pub struct CodeListTable {
    client: Client,
    table: String,
}

impl CodeListTable {
    pub fn new(client: Client, logs_table: &str) -> Self {
        Self { client, table: logs_table.to_owned() }
    }
}

#[async_trait]
impl CodeList for CodeListTable {
    async fn add(&self, code: &RetiredCode) -> Result<(), BackendError> {
        let call = self.client.put_item().table_name(&self.table).set_item(Some(to_item(code)));
        call.send().await.map(drop).map_err(|e| class(&e))
    }

    async fn due(&self, now: UnixMs, limit: usize) -> Result<Vec<RetiredCode>, BackendError> {
        let mut found = Vec::new();
        let mut after = None;
        for _ in 0..DUE_PAGES_MAX {
            let call = self
                .client
                .query()
                .table_name(&self.table)
                .consistent_read(true)
                .key_condition_expression("functionId = :hash")
                .filter_expression("#due <= :now")
                .expression_attribute_names("#due", "due")
                .expression_attribute_values(":hash", text(HASH_KEY))
                .expression_attribute_values(":now", whole(now))
                .set_exclusive_start_key(after);
            let output = call.send().await.map_err(|e| class(&e))?;
            found.extend(output.items.unwrap_or_default().into_iter().filter_map(from_item));
            after = output.last_evaluated_key;
            if found.len() >= limit || after.is_none() {
                break;
            }
        }
        found.truncate(limit);
        Ok(found)
    }

    async fn remove(&self, code: &RetiredCode) -> Result<(), BackendError> {
        let call = self
            .client
            .delete_item()
            .table_name(&self.table)
            .set_key(Some(key_item(&code.s3_key)))
            .condition_expression("#due = :due")
            .expression_attribute_names("#due", "due")
            .expression_attribute_values(":due", whole(code.due));
        match call.send().await {
            Err(SdkError::ServiceError(answer))
                if matches!(answer.err(), DeleteItemError::ConditionalCheckFailedException(_)) =>
            {
                Ok(())
            }
            done => done.map(drop).map_err(|e| class(&e)),
        }
    }
}

pub fn key_item(s3_key: &str) -> RawItem {
    RawItem::from([("functionId".to_owned(), text(HASH_KEY)), ("timestamp".to_owned(), text(s3_key))])
}

pub fn to_item(code: &RetiredCode) -> RawItem {
    let mut item = key_item(&code.s3_key);
    item.insert("ownerId".to_owned(), text(code.function.as_str()));
    item.insert("due".to_owned(), whole(code.due));
    item
}

/// Returns `None` if this program did not write the item.
fn from_item(raw: RawItem) -> Option<RetiredCode> {
    let item = Item::new(raw);
    let function = FunctionId::parse(&item.text("ownerId")?)?;
    Some(RetiredCode { s3_key: item.text("timestamp")?, function, due: item.whole("due")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_survives_a_round_trip() {
        let function = FunctionId::parse("f").unwrap();
        let code = RetiredCode { s3_key: "functions/f/a.zip".into(), function, due: 1_795_305_600_123 };
        assert_eq!(from_item(to_item(&code)), Some(code.clone()));
        for missing in ["ownerId", "due"] {
            let mut item = to_item(&code);
            item.remove(missing);
            assert_eq!(from_item(item), None, "{missing}");
        }
        let mut foreign = to_item(&code);
        foreign.insert("ownerId".into(), text("a/b"));
        assert_eq!(from_item(foreign), None);
        assert_eq!(FunctionId::parse(HASH_KEY), None);
    }
}
