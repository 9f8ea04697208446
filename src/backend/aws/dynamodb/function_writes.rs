//! Writes a change of a function, and everything that belongs to it, in one transaction over both tables.
//!
//! The idempotency token of the transaction is derived from its contents. So a retry after a lost answer is
//! the same request to DynamoDB, even some minutes later, and gets the first answer. A random token was
//! rejected: the retry would conflict with the first write. DynamoDB remembers a token for ten minutes. After
//! that the condition fails with Conflict, and nothing is written twice either.

use super::code_list;
use super::function_item::{attributes, key_item};
use super::item::{RawItem, text, whole};
use crate::backend::aws::client::RETRIES;
use crate::backend::aws::error::class;
use crate::backend::{BackendError, FunctionWrite, FunctionWriteOutcome};
use crate::model::{ConfigRecord, Function, RetiredCode, rfc3339_ms};
use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::error::{BuildError, SdkError};
use aws_sdk_dynamodb::operation::transact_write_items::TransactWriteItemsError;
use aws_sdk_dynamodb::types::{AttributeValue, CancellationReason, Delete, Put, TransactWriteItem, Update};
use sha2::{Digest, Sha256};
use std::fmt::Write;

/// Maximum number of attempts while another transaction, or a counter update, holds an item. The SDK does not
/// retry that.
const TRIES_MAX: u32 = 5;
/// Length of the token in bytes. DynamoDB accepts at most 36 characters; here 144 bits in hexadecimal.
const TOKEN_BYTES: usize = 18;

pub async fn write(
    client: &Client,
    table: &str,
    logs_table: &str,
    write: &FunctionWrite,
) -> Result<FunctionWriteOutcome, BackendError> {
    if write.before.is_none() && write.after.is_none() {
        return Err(BackendError::Invalid("a change needs a function".into()));
    }
    let items = items(table, logs_table, write)
        .map_err(|_| BackendError::Invalid("the transaction could not be built".into()))?;
    let token = token(table, logs_table, write);
    let mut tried = 0;
    loop {
        tried += 1;
        let call = client.transact_write_items().client_request_token(&token);
        let Err(error) = call.set_transact_items(Some(items.clone())).send().await else {
            return Ok(FunctionWriteOutcome::Done);
        };
        match cancellation(&error) {
            None => return Err(class(&error)),
            Some(Cancellation::Refused) => return Ok(FunctionWriteOutcome::Conflict),
            Some(Cancellation::Busy) if tried < TRIES_MAX => RETRIES.sleep(tried).await,
            Some(Cancellation::Busy) => {
                return Err(BackendError::Unavailable("other writes held the items for too long".into()));
            }
            Some(Cancellation::Fault(code)) => {
                return Err(BackendError::Invalid(format!("the transaction was cancelled: {code}")));
            }
        }
    }
}

/// Why a transaction was cancelled. Nothing was written.
#[derive(Debug, PartialEq, Eq)]
enum Cancellation {
    /// The function has changed since it was read, or the adopted code is no longer on the list.
    Refused,
    /// Another write holds an item, or the table is throttled.
    Busy,
    Fault(String),
}

fn cancellation<R>(error: &SdkError<TransactWriteItemsError, R>) -> Option<Cancellation> {
    match error.as_service_error() {
        Some(TransactWriteItemsError::TransactionCanceledException(cancelled)) => {
            let reasons = cancelled.cancellation_reasons().iter();
            Some(of_codes(&reasons.filter_map(CancellationReason::code).collect::<Vec<_>>()))
        }
        _ => None,
    }
}

/// Combines the codes, one per item and in order. `None` means that the item caused no failure.
fn of_codes(codes: &[&str]) -> Cancellation {
    let mut busy = false;
    let mut fault = None;
    for &code in codes {
        match code {
            "None" => {}
            // Takes precedence: a retry cannot undo another writer's change.
            "ConditionalCheckFailed" => return Cancellation::Refused,
            "TransactionConflict" | "ThrottlingError" | "ProvisionedThroughputExceeded" => busy = true,
            other => fault = Some(other),
        }
    }
    match fault {
        Some(code) => Cancellation::Fault(code.to_owned()),
        None if busy => Cancellation::Busy,
        None => Cancellation::Fault("no reason given".to_owned()),
    }
}

/// At most four operations, no two of them on the same item, which DynamoDB would reject.
fn items(table: &str, logs_table: &str, write: &FunctionWrite) -> Result<Vec<TransactWriteItem>, BuildError> {
    let FunctionWrite { before, after, record, retire, adopt } = write;
    debug_assert!(
        retire.is_none()
            || retire.as_ref().map(|code| &code.s3_key) != adopt.as_ref().map(|code| &code.s3_key),
        "code is retired or adopted, not both"
    );
    let item = TransactWriteItem::builder;
    let mut items = Vec::with_capacity(4);
    items.extend(match (before, after) {
        (None, Some(after)) => Some(item().put(create(table, after)?).build()),
        (Some(before), Some(after)) => Some(item().update(update(table, before, after)?).build()),
        (Some(before), None) => Some(item().delete(delete(table, before)?).build()),
        (None, None) => None,
    });
    items.push(item().put(put(logs_table, record_item(record))?).build());
    if let Some(code) = retire {
        items.push(item().put(put(logs_table, code_list::to_item(code))?).build());
    }
    if let Some(code) = adopt {
        items.push(item().delete(adoption(logs_table, code)?).build());
    }
    Ok(items)
}

fn put(table: &str, item: RawItem) -> Result<Put, BuildError> {
    Put::builder().table_name(table).set_item(Some(item)).build()
}

fn create(table: &str, after: &Function) -> Result<Put, BuildError> {
    let mut item = key_item(after.id.as_str());
    // A function that was never changed has no such attributes, as in the old controller. `handler` is absent
    // in script mode.
    let is_kept = |(name, value): &(&str, AttributeValue)| match *name {
        "updated_at" | "handler" => *value != text(""),
        "maxConcurrency" => *value != whole(0),
        _ => true,
    };
    item.extend(attributes(after).into_iter().filter(is_kept).map(|(name, value)| (name.to_owned(), value)));
    Put::builder()
        .table_name(table)
        .set_item(Some(item))
        .condition_expression("attribute_not_exists(functionId)")
        .build()
}

/// Sets only the attributes that differ. Counters and recommendation change independently, and an old item
/// may hold values that this program would not write.
fn update(table: &str, before: &Function, after: &Function) -> Result<Update, BuildError> {
    let was = attributes(before);
    let set = attributes(after).into_iter().filter(|new| is_stamp(new.0) || !was.contains(new));
    let mut update = Update::builder().table_name(table).set_key(Some(key_item(before.id.as_str())));
    let mut parts = Vec::new();
    for (name, value) in set {
        parts.push(format!("#{name} = :{name}"));
        // Placeholders for all names, because some are reserved words.
        update = update
            .expression_attribute_names(format!("#{name}"), name)
            .expression_attribute_values(format!(":{name}"), value);
    }
    for (placeholder, value) in stamp_values(before) {
        update = update.expression_attribute_values(placeholder, value);
    }
    update
        .update_expression(format!("SET {}", parts.join(", ")))
        .condition_expression(unchanged(before))
        .build()
}

fn delete(table: &str, before: &Function) -> Result<Delete, BuildError> {
    let mut delete = Delete::builder()
        .table_name(table)
        .set_key(Some(key_item(before.id.as_str())))
        .condition_expression(unchanged(before))
        .expression_attribute_names("#version", "version")
        .expression_attribute_names("#updated_at", "updated_at");
    for (placeholder, value) in stamp_values(before) {
        delete = delete.expression_attribute_values(placeholder, value);
    }
    delete.build()
}

/// Whether the attribute identifies a state of the function. The version alone does not, because the old
/// controller changes functions without incrementing it.
fn is_stamp(name: &str) -> bool {
    matches!(name, "version" | "updated_at")
}

/// The condition that the function exists and is unchanged since it was read.
fn unchanged(before: &Function) -> String {
    let is = |name: &str, is_absent: bool| match is_absent {
        // Absent, null and empty are all read as empty.
        true => format!(
            "(attribute_not_exists(#{name}) OR attribute_type(#{name}, :null) OR #{name} = :was_{name})"
        ),
        false => format!("#{name} = :was_{name}"),
    };
    let (version, updated_at) =
        (is("version", before.version == 0), is("updated_at", before.updated_at.is_empty()));
    format!("attribute_exists(functionId) AND {version} AND {updated_at}")
}

fn stamp_values(before: &Function) -> Vec<(&'static str, AttributeValue)> {
    let mut values =
        vec![(":was_version", whole(before.version)), (":was_updated_at", text(before.updated_at.as_str()))];
    // DynamoDB rejects values that no expression uses.
    if before.version == 0 || before.updated_at.is_empty() {
        values.push((":null", text("NULL")));
    }
    values
}

/// Removes the entry from the code list. It must be there unchanged: without it the code may have been swept.
fn adoption(logs_table: &str, code: &RetiredCode) -> Result<Delete, BuildError> {
    Delete::builder()
        .table_name(logs_table)
        .set_key(Some(code_list::key_item(&code.s3_key)))
        .condition_expression("#due = :due")
        .expression_attribute_names("#due", "due")
        .expression_attribute_values(":due", whole(code.due))
        .build()
}

/// The item of a change record. Its hash key in the log table is not a function id.
fn record_item(record: &ConfigRecord) -> RawItem {
    let attributes = [
        ("functionId", text(format!("config#{}", record.function))),
        ("timestamp", text(record.key.as_str())),
        ("action", text(record.action.as_str())),
        ("by", text(record.by.as_str())),
        ("before", text(record.before.as_str())),
        ("after", text(record.after.as_str())),
        ("changedAt", text(rfc3339_ms(record.at))),
        ("expiresAt", whole(record.expires_at_s)),
    ];
    attributes.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// The idempotency token: equal for equal writes. DynamoDB rejects a token that is reused with a different
/// request, so the token covers everything in the request. It covers the table names too, because all
/// gateways of an account share the tokens.
fn token(table: &str, logs_table: &str, write: &FunctionWrite) -> String {
    let FunctionWrite { before, after, record, retire, adopt } = write;
    let mut hash = Sha256::new();
    let mut feed = |item: Option<Vec<(String, AttributeValue)>>| {
        let mut item = item.unwrap_or_default();
        item.sort_by(|(a, _), (b, _)| a.cmp(b)); // maps have no order
        hash.update((item.len() as u64).to_be_bytes());
        for (name, value) in item {
            let (AttributeValue::S(value) | AttributeValue::N(value)) = value else { continue };
            for part in [name, value] {
                hash.update((part.len() as u64).to_be_bytes());
                hash.update(part);
            }
        }
    };
    feed(Some(vec![(table.to_owned(), text(logs_table))]));
    for function in [before, after] {
        feed(function.as_ref().map(|function| {
            let key = key_item(function.id.as_str()).into_iter();
            key.chain(attributes(function).into_iter().map(|(name, value)| (name.to_owned(), value)))
                .collect()
        }));
    }
    feed(Some(record_item(record).into_iter().collect()));
    for code in [retire, adopt] {
        feed(code.as_ref().map(|code| code_list::to_item(code).into_iter().collect()));
    }
    hash.finalize().iter().take(TOKEN_BYTES).fold(String::new(), |mut token, byte| {
        let _ = write!(token, "{byte:02x}");
        token
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ConfigAction, Handler};

    fn after(before: &Function) -> Function {
        Function {
            memory_mb: 512,
            description: String::new(),
            version: before.version + 1,
            updated_at: "2026-11-22T00:00:00.000Z".into(),
            ..before.clone()
        }
    }

    fn change(before: Option<Function>, after: Option<Function>) -> FunctionWrite {
        let action = ConfigAction::Update;
        let record = ConfigRecord::new(action, "master", 7, before.as_ref(), after.as_ref()).unwrap();
        FunctionWrite { before, after, record, retire: None, adopt: None }
    }

    fn code(s3_key: &str, due: u64) -> RetiredCode {
        RetiredCode { s3_key: s3_key.into(), function: Function::sample("f").id, due }
    }

    #[test]
    fn an_update_sets_only_attributes_that_differ() {
        let before = Function::sample("f");
        let update = update("t", &before, &after(&before)).unwrap();
        assert_eq!(
            update.update_expression(),
            "SET #description = :description, #memoryMb = :memoryMb, #updated_at = :updated_at, \
             #version = :version"
        );
        let values = update.expression_attribute_values().unwrap();
        assert_eq!((&values[":version"], &values[":was_version"]), (&whole(2), &whole(1)));
        assert_eq!((&values[":memoryMb"], &values[":description"]), (&whole(512), &text("")));
        let condition = update.condition_expression().unwrap();
        // DynamoDB rejects names and values that are defined but unused, or used but undefined.
        let all = format!("{} {condition} ", update.update_expression());
        let used = |sign| {
            let mut found: Vec<_> = all
                .split(|c: char| !(c.is_ascii_alphanumeric() || "_#:".contains(c)))
                .filter(|word| word.starts_with(sign))
                .collect();
            found.sort_unstable();
            found.dedup();
            found
        };
        let mut defined: Vec<_> = values.keys().map(String::as_str).collect();
        defined.sort_unstable();
        assert_eq!(used(':'), defined);
        let mut names: Vec<_> = update.expression_attribute_names().unwrap().keys().collect();
        names.sort_unstable();
        assert_eq!(used('#'), names);
    }

    #[test]
    fn a_handler_is_set_replaced_and_cleared() {
        let handler = |text: &str| Function { handler: Handler::parse(text), ..Function::sample("f") };
        for (before, after, written) in [
            ("", "main.handler", Some("main.handler")),
            ("main.handler", "pkg.mod.fn", Some("pkg.mod.fn")),
            ("main.handler", "", Some("")),
            ("main.handler", "main.handler", None),
            ("", "", None),
        ] {
            let update = update("t", &handler(before), &handler(after)).unwrap();
            let found = update.expression_attribute_values().unwrap().get(":handler").cloned();
            assert_eq!(found, written.map(text), "{before:?} to {after:?}");
        }
        let created = |f: &Function| create("t", f).unwrap().item().get("handler").cloned();
        assert_eq!(created(&handler("main.handler")), Some(text("main.handler")));
        assert_eq!(created(&handler("")), None);
    }

    #[test]
    fn conditions_match_items_of_the_old_controller() {
        let changed = Function { updated_at: "x".into(), ..Function::sample("f") };
        assert_eq!(
            unchanged(&changed),
            "attribute_exists(functionId) AND #version = :was_version AND #updated_at = :was_updated_at"
        );
        assert_eq!(stamp_values(&changed).len(), 2);
        let old = Function { version: 0, ..Function::sample("f") };
        for name in ["version", "updated_at"] {
            let either = format!("(attribute_not_exists(#{name}) OR ");
            assert!(unchanged(&old).contains(&either), "{name}");
        }
        assert_eq!(stamp_values(&old)[2], (":null", text("NULL")));
    }

    #[test]
    fn each_kind_of_change_is_one_operation_beside_its_record() {
        let before = Function::sample("f");
        let kinds = |write: &FunctionWrite| -> Vec<char> {
            let kind = |item: &TransactWriteItem| match (item.put(), item.update(), item.delete()) {
                (Some(_), None, None) => 'P',
                (None, Some(_), None) => 'U',
                (None, None, Some(_)) => 'D',
                _ => '?',
            };
            items("t", "l", write).unwrap().iter().map(kind).collect()
        };
        assert_eq!(kinds(&change(None, Some(before.clone()))), ['P', 'P']);
        assert_eq!(kinds(&change(Some(before.clone()), None)), ['D', 'P']);
        let mut all = change(Some(before.clone()), Some(after(&before)));
        all.retire = Some(code("a", 1));
        all.adopt = Some(code("b", 1));
        assert_eq!(kinds(&all), ['U', 'P', 'P', 'D']);
    }

    #[test]
    fn a_new_item_has_the_expected_attributes() {
        let f = Function { env_vars: r#"{"A":"1"}"#.into(), ..Function::sample("f") };
        let item = create("t", &f).unwrap().item().clone();
        assert_eq!((&item["envVars"], &item["memoryMb"]), (&text(r#"{"A":"1"}"#), &whole(256)));
        assert_eq!((&item["functionId"], &item["version"]), (&text("f"), &whole(1)));
        for absent in ["updated_at", "maxConcurrency", "handler", "invocations", "recommendedAt"] {
            assert!(!item.contains_key(absent), "{absent}");
        }
        let record = record_item(&change(None, Some(f)).record);
        assert_eq!((&record["functionId"], &record["before"]), (&text("config#f"), &text("null")));
        assert_eq!(record["changedAt"], text("1970-01-01T00:00:00.007Z"));
        assert_eq!(record["expiresAt"], whole(400 * 24 * 3600));
    }

    #[test]
    fn equal_writes_and_only_those_share_a_token() {
        let before = Function::sample("f");
        let write = change(Some(before.clone()), Some(after(&before)));
        let token = |write: &FunctionWrite| super::token("t", "l", write);
        assert_eq!((token(&write).len(), token(&write.clone())), (36, token(&write)));
        let mut others = vec![
            change(None, write.after.clone()),
            change(Some(before.clone()), None),
            change(Some(before.clone()), Some(Function { memory_mb: 1, ..after(&before) })),
            change(
                Some(before.clone()),
                Some(Function { handler: Handler::parse("main.handler"), ..after(&before) }),
            ),
            change(Some(Function { version: 7, ..before.clone() }), write.after.clone()),
        ];
        for (retire, adopt) in [(Some("a"), None), (None, Some("a"))] {
            let listed = |key: Option<&str>| key.map(|key| code(key, 1));
            others.push(FunctionWrite { retire: listed(retire), adopt: listed(adopt), ..write.clone() });
        }
        others.push(FunctionWrite { retire: Some(code("a", 2)), ..write.clone() });
        let mut by_other = write.clone();
        by_other.record.by = "ci".into();
        others.push(by_other);
        let mut tokens: Vec<_> = others.iter().map(token).collect();
        tokens.extend([token(&write), super::token("t2", "l", &write), super::token("t", "l2", &write)]);
        tokens.sort();
        tokens.dedup();
        assert_eq!(tokens.len(), others.len() + 3);
        // Counters are not written, so they are not part of the token.
        let mut counted = write.clone();
        counted.before.as_mut().unwrap().counters.invocations = 5;
        assert_eq!(token(&counted), token(&write));
    }

    #[test]
    fn cancellation_codes_are_classified() {
        use Cancellation::*;
        for (codes, reason) in [
            (&["ConditionalCheckFailed", "None"][..], Refused),
            (&["TransactionConflict", "None", "ConditionalCheckFailed"], Refused),
            (&["None", "TransactionConflict"], Busy),
            (&["ThrottlingError"], Busy),
            (&["ProvisionedThroughputExceeded", "None"], Busy),
            (&["TransactionConflict", "ValidationError"], Fault("ValidationError".into())),
            (&[], Fault("no reason given".into())),
        ] {
            assert_eq!(of_codes(codes), reason, "{codes:?}");
        }
    }
}
