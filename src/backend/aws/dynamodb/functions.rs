//! The function table: reads, lists and updates function items.

use super::function_writes;
use super::item::{self, Item, RawItem, decimal, text};
use crate::backend::aws::dynamodb::function_item::{KEY, function, key_item, listed};
use crate::backend::aws::dynamodb::recommendation;
use crate::backend::aws::error::class;
use crate::backend::aws::json_call::{CredentialCache, JsonClient, RouteRecorder};
use crate::backend::{BackendError, FunctionPage, FunctionStore, FunctionWrite, FunctionWriteOutcome};
use crate::https::HttpsClient;
use crate::model::{Function, FunctionId, NodeId, Recommendation, Sums, UnixMs, now_ms};
use async_trait::async_trait;
use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::error::SdkError;
use aws_sdk_dynamodb::operation::update_item::UpdateItemError;
use aws_sdk_dynamodb::types::AttributeValue;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

const UPDATE: &str = "DynamoDB_20120810.UpdateItem";
const CONDITION_NOT_MET: &str = "ConditionalCheckFailedException";

/// Maximum number of table pages (1 MB each) read for one listing. Items that are not functions are skipped.
/// At the limit the listing ends early, and its `next` continues from there.
const LIST_PAGES_MAX: usize = 10;
/// Minimum number of items per page once some were skipped, to save calls.
const SKIPPED_PAGE_ITEMS: usize = 250;
/// Attribute prefix, followed by a node id: the number of the last sums that the node has added.
const MARK: &str = "posted_";
/// How long such an attribute is kept when its node adds nothing more.
const MARK_KEPT: Duration = Duration::from_secs(7 * 24 * 3600);
/// Maximum number of such attributes removed in one call.
const MARKS_REMOVED_MAX: usize = 50;

pub struct FunctionTable {
    client: Client,
    /// For counter updates: a busy node sends hundreds per second.
    direct: JsonClient,
    table: String,
    /// Holds change records and the code list under hash keys that are not function ids.
    logs_table: String,
}

impl FunctionTable {
    /// Reads an absent function, which shows that the table exists and where it is.
    pub async fn open(
        client: Client,
        https: HttpsClient,
        credentials: Arc<CredentialCache>,
        table: &str,
        logs_table: &str,
    ) -> Result<Self, BackendError> {
        let seen = RouteRecorder::default();
        item::probe(&client, table, KEY, &seen).await?;
        let direct = JsonClient::new(https, credentials, &seen)?;
        Ok(Self { client, direct, table: table.to_owned(), logs_table: logs_table.to_owned() })
    }
}

/// The node that adds sums, and their number; see the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PostNumber {
    pub node: NodeId,
    pub number: u64,
}

/// Where the journal posts the sums of functions.
#[async_trait]
pub trait CounterStore: Send + Sync {
    /// Adds sums to a function, if it exists and has not received these or later sums of the node.
    async fn add_counters(&self, id: &FunctionId, sums: Sums, stamp: PostNumber) -> Result<(), BackendError>;
}

#[async_trait]
impl CounterStore for FunctionTable {
    async fn add_counters(&self, id: &FunctionId, sums: Sums, stamp: PostNumber) -> Result<(), BackendError> {
        // ADD creates absent items. The condition prevents it from recreating a deleted function.
        let body = json!({
            "TableName": self.table,
            "Key": { "functionId": { "S": id.as_str() } },
            "UpdateExpression": "ADD invocations :n, errorCount :e, totalDuration :d, handlerInvocations :h, \
                                 totalHandlerDuration :t, coldStarts :c SET #posted = :number",
            "ConditionExpression": "attribute_exists(functionId) AND \
                                    (attribute_not_exists(#posted) OR #posted < :number)",
            "ExpressionAttributeNames": { "#posted": format!("{MARK}{}", stamp.node) },
            "ExpressionAttributeValues": {
                ":n": { "N": sums.invocations.to_string() },
                ":e": { "N": sums.errors.to_string() },
                ":d": { "N": decimal(sums.duration_ms()) },
                ":h": { "N": sums.handler_invocations.to_string() },
                ":t": { "N": decimal(sums.handler_ms()) },
                ":c": { "N": sums.cold_starts.to_string() },
                ":number": { "N": stamp.number.to_string() },
            },
        });
        // A running transaction on the function rejects the update; the caller retries later.
        match self.direct.call(UPDATE, body.to_string().into_bytes()).await {
            Err(error) if error.code() == Some(CONDITION_NOT_MET) => Ok(()),
            done => done.map(drop).map_err(|error| error.class()),
        }
    }
}

impl FunctionTable {
    /// Removes the attributes of nodes that have posted nothing for a long time. Without this the item would
    /// grow with each node that ever ran. After a failure the next read tries again.
    async fn forget_marks(&self, id: &FunctionId, marks: Vec<(String, String)>) {
        if marks.is_empty() {
            return;
        }
        let mut call = self.client.update_item().table_name(&self.table).key("functionId", text(id.as_str()));
        let (mut removed, mut unchanged) = (Vec::new(), Vec::new());
        for (n, (name, number)) in marks.into_iter().enumerate() {
            call = call.expression_attribute_names(format!("#m{n}"), name);
            call = call.expression_attribute_values(format!(":m{n}"), AttributeValue::N(number));
            removed.push(format!("#m{n}"));
            unchanged.push(format!("#m{n} = :m{n}"));
        }
        let call = call.update_expression(format!("REMOVE {}", removed.join(", ")));
        let call = call.condition_expression(unchanged.join(" AND "));
        if let Err(e) = call.send().await {
            tracing::debug!(functionId = %id, error = %class(&e), "Old posted_ attributes not removed");
        }
    }
}

/// Names and values of attributes that are too old for any post of their node to be in flight. Their numbers
/// begin with the time in microseconds.
fn old_marks(raw: &RawItem, now: UnixMs) -> Vec<(String, String)> {
    let before = now.saturating_sub(u64::try_from(MARK_KEPT.as_millis()).unwrap_or(u64::MAX)) * 1000;
    let old = raw.iter().filter_map(|(name, value)| {
        let number = value.as_n().ok().filter(|_| name.starts_with(MARK))?;
        (number.parse::<u64>().ok()? < before).then(|| (name.clone(), number.clone()))
    });
    old.take(MARKS_REMOVED_MAX).collect()
}

#[async_trait]
impl FunctionStore for FunctionTable {
    async fn get(&self, id: &FunctionId) -> Result<Option<Function>, BackendError> {
        let call = self
            .client
            .get_item()
            .table_name(&self.table)
            .key("functionId", text(id.as_str()))
            .consistent_read(true);
        let output = call.send().await.map_err(|e| class(&e))?;
        let Some(raw) = output.item else { return Ok(None) };
        self.forget_marks(id, old_marks(&raw, now_ms())).await;
        Ok(Some(function(id.clone(), &Item::new(raw))))
    }

    async fn list(&self, limit: usize, after: Option<&str>) -> Result<FunctionPage, BackendError> {
        let mut functions: Vec<Function> = Vec::new();
        let mut after = after.map(key_item);
        let mut skipped = false;
        for _ in 0..LIST_PAGES_MAX {
            // Reads one function more than requested, to find out whether there is a next page.
            let wanted = limit.saturating_add(1) - functions.len();
            let items = if skipped { wanted.max(SKIPPED_PAGE_ITEMS) } else { wanted };
            let call = self
                .client
                .scan()
                .table_name(&self.table)
                .consistent_read(true)
                .limit(i32::try_from(items).unwrap_or(i32::MAX))
                .set_exclusive_start_key(after);
            let output = call.send().await.map_err(|e| class(&e))?;
            let raws = output.items.unwrap_or_default();
            let (read, before) = (raws.len(), functions.len());
            functions.extend(raws.into_iter().filter_map(listed));
            skipped |= functions.len() - before < read;
            after = output.last_evaluated_key;
            if functions.len() > limit || after.is_none() {
                break;
            }
        }
        let next = if functions.len() > limit {
            functions.truncate(limit);
            functions.last().map(|function| function.id.to_string())
        } else {
            after.and_then(|key| Item::new(key).text("functionId"))
        };
        Ok(FunctionPage { functions, next })
    }

    async fn write(&self, write: &FunctionWrite) -> Result<FunctionWriteOutcome, BackendError> {
        function_writes::write(&self.client, &self.table, &self.logs_table, write).await
    }

    async fn recommend(&self, id: &FunctionId, advice: &Recommendation) -> Result<(), BackendError> {
        let mut call = self
            .client
            .update_item()
            .table_name(&self.table)
            .set_key(Some(key_item(id.as_str())))
            .update_expression(recommendation::update_expression(advice))
            .condition_expression(recommendation::CONDITION);
        for (name, value) in recommendation::values(advice) {
            call = call.expression_attribute_values(format!(":{name}"), value);
        }
        match call.send().await {
            Err(SdkError::ServiceError(answer)) if is_refused(answer.err()) => Ok(()),
            done => done.map(drop).map_err(|e| class(&e)),
        }
    }

    async fn probe(&self) -> Result<(), BackendError> {
        item::probe(&self.client, &self.table, KEY, &RouteRecorder::default()).await
    }
}

/// Whether the condition of an update failed.
fn is_refused(error: &UpdateItemError) -> bool {
    matches!(error, UpdateItemError::ConditionalCheckFailedException(_))
}

#[cfg(test)]
mod tests {
    use super::super::function_item::attributes;
    use super::super::item::whole;
    use super::*;
    use crate::model::Handler;

    #[test]
    fn only_old_marks_are_removed() {
        let now = 2_000_000_000_000;
        let number = |at: u64| AttributeValue::N((at * 1000).to_string());
        let raw = RawItem::from([
            ("posted_00000001".to_owned(), number(now - 8 * 24 * 3_600_000)),
            ("posted_00000002".to_owned(), number(now - 6 * 24 * 3_600_000)),
            ("invocations".to_owned(), number(1)),
            ("posted_x".to_owned(), text("1")),
        ]);
        let names: Vec<String> = old_marks(&raw, now).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["posted_00000001"]);
    }
    use std::collections::HashMap;

    fn read(attributes: &[(&str, AttributeValue)]) -> Function {
        let raw: HashMap<_, _> =
            attributes.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        function(FunctionId::parse("f").unwrap(), &Item::new(raw))
    }

    #[test]
    fn an_item_is_parsed_into_a_function() {
        let f = read(&[
            ("name", text("n")),
            ("runtime", text("go")),
            ("memoryMb", whole(256)),
            ("s3Key", text("k")),
            ("envVars", text(r#"{"A":"1"}"#)),
            ("version", whole(3)),
            ("invocations", whole(5)),
            ("errorCount", whole(2)),
            ("totalDuration", AttributeValue::N(decimal(12.5))),
        ]);
        assert_eq!(
            (f.name.as_str(), f.runtime.as_str(), f.memory_mb, f.s3_key.as_str()),
            ("n", "go", 256, "k")
        );
        assert_eq!((f.env_vars.as_str(), f.version), (r#"{"A":"1"}"#, 3));
        let sums = f.counters;
        assert_eq!((sums.invocations, sums.errors, sums.total_duration_ms), (5, 2, 12.5));
    }

    #[test]
    fn an_item_whose_key_is_no_function_id_is_not_listed() {
        assert_eq!(listed(key_item("f")).map(|f| f.id.to_string()).as_deref(), Some("f"));
        for odd in ["", "config#f", "a/b"] {
            assert_eq!(listed(key_item(odd)), None, "{odd:?}");
        }
        assert_eq!(listed(RawItem::new()), None);
    }

    #[test]
    fn a_function_is_read_as_it_was_written() {
        let f = Function { updated_at: "x".into(), env_vars: r#"{"A":"1"}"#.into(), ..Function::sample("f") };
        assert_eq!(read(&attributes(&f)), f);
        let with_handler = Function { handler: Handler::parse("pkg.mod.fn"), ..f };
        assert_eq!(read(&attributes(&with_handler)), with_handler);
    }

    #[test]
    fn an_old_item_has_the_defaults() {
        let map = HashMap::from([("A".to_owned(), text("1"))]);
        let odd = read(&[
            ("runtime", text("")),
            ("memoryMb", text("512")),
            ("envVars", AttributeValue::M(map)),
            ("name", AttributeValue::Null(true)),
        ]);
        assert_eq!((odd.runtime.as_str(), odd.memory_mb, odd.name.as_str()), ("python", 512, ""));
        assert_eq!(odd.env_vars, r#"{"A":"1"}"#);
        let bare = read(&[("memoryMb", whole(0)), ("envVars", text("oops"))]);
        assert_eq!((bare.memory_mb, bare.version, bare.env_vars.as_str()), (128, 0, "{}"));
        assert_eq!(bare.handler, None, "script mode");
        for none in [text(""), text("main"), AttributeValue::Null(true)] {
            assert_eq!(read(&[("handler", none.clone())]).handler, None, "{none:?}");
        }
    }
}
