//! The function table (CONTRACT §6).

use super::error::class;
use super::item::{self, Item, float, text, whole};
use crate::backend::{BackendError, CodeList, FunctionPage, FunctionStore, FunctionWrite, Written};
use crate::model::{Counters, Function, FunctionId, Recommendation, RetiredCode, UnixMs};
use async_trait::async_trait;
use aws_sdk_dynamodb::Client;
use aws_sdk_dynamodb::config::Config;
use aws_sdk_dynamodb::config::retry::RetryConfig;
use aws_sdk_dynamodb::error::SdkError;
use aws_sdk_dynamodb::operation::update_item::UpdateItemError;

pub(super) struct FunctionTable {
    client: Client,
    table: String,
    /// Records of changes and the code list stand in the log table, under hash keys that are no function ids.
    logs_table: String,
}

impl FunctionTable {
    pub(super) fn new(client: Client, table: &str, logs_table: &str) -> Self {
        Self { client, table: table.to_owned(), logs_table: logs_table.to_owned() }
    }
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
        Ok(output.item.map(|raw| function(id.clone(), &Item::new(raw))))
    }

    async fn add_counters(&self, id: &FunctionId, sums: Counters) -> Result<(), BackendError> {
        let call = self
            .client
            .update_item()
            .table_name(&self.table)
            .key("functionId", text(id.as_str()))
            .update_expression(
                "ADD invocations :n, totalDuration :d, handlerInvocations :h, totalHandlerDuration :t",
            )
            // ADD creates what is absent: a function deleted meanwhile must not rise from its sums.
            .condition_expression("attribute_exists(functionId)")
            .expression_attribute_values(":n", whole(sums.invocations))
            .expression_attribute_values(":d", float(sums.total_duration_ms))
            .expression_attribute_values(":h", whole(sums.handler_invocations))
            .expression_attribute_values(":t", float(sums.total_handler_duration_ms));
        // Not idempotent: a second try by the SDK after a late answer would add the sums twice.
        let once = Config::builder().retry_config(RetryConfig::disabled());
        match call.customize().config_override(once).send().await {
            Ok(_) => Ok(()),
            Err(SdkError::ServiceError(answer))
                if matches!(answer.err(), UpdateItemError::ConditionalCheckFailedException(_)) =>
            {
                Ok(())
            }
            Err(error) => Err(class(&error)),
        }
    }

    async fn list(&self, _limit: usize, _after: Option<&str>) -> Result<FunctionPage, BackendError> {
        Err(BackendError::Invalid("stub".into()))
    }

    async fn write(&self, _write: &FunctionWrite) -> Result<Written, BackendError> {
        Err(BackendError::Invalid("stub".into()))
    }

    async fn recommend(&self, _id: &FunctionId, _r: &Recommendation) -> Result<(), BackendError> {
        Err(BackendError::Invalid("stub".into()))
    }

    async fn probe(&self) -> Result<(), BackendError> {
        item::probe(&self.client, &self.table, &["functionId"]).await
    }
}

#[async_trait]
impl CodeList for FunctionTable {
    async fn add(&self, _code: &RetiredCode) -> Result<(), BackendError> {
        Err(BackendError::Invalid("stub".into()))
    }

    async fn due(&self, _now: UnixMs, _limit: usize) -> Result<Vec<RetiredCode>, BackendError> {
        Ok(Vec::new())
    }

    async fn remove(&self, _code: &RetiredCode) -> Result<(), BackendError> {
        Err(BackendError::Invalid("stub".into()))
    }
}

fn function(id: FunctionId, item: &Item) -> Function {
    let text = |name| item.text(name).unwrap_or_default();
    let text_or = |name, default: &str| match item.text(name) {
        Some(text) if !text.is_empty() => text,
        _ => default.to_owned(),
    };
    Function {
        name: text("name"),
        description: text("description"),
        runtime: text_or("runtime", Function::RUNTIME_DEFAULT),
        memory_mb: item.whole("memoryMb").filter(|mb| *mb > 0).unwrap_or(Function::MEMORY_MB_DEFAULT),
        s3_key: text("s3Key"),
        original_name: text("originalName"),
        uploaded_at: text("uploadedAt"),
        updated_at: text("updated_at"),
        env_vars: Function::env_vars_or_empty(&item.json("envVars").unwrap_or_default()),
        version: item.whole("version").unwrap_or(0),
        counters: Counters {
            invocations: item.whole("invocations").unwrap_or(0),
            errors: 0,
            total_duration_ms: item.float("totalDuration").unwrap_or(0.0),
            handler_invocations: item.whole("handlerInvocations").unwrap_or(0),
            total_handler_duration_ms: item.float("totalHandlerDuration").unwrap_or(0.0),
        },
        recommendation: None,
        id,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_sdk_dynamodb::types::AttributeValue;
    use std::collections::HashMap;

    fn read(attributes: &[(&str, AttributeValue)]) -> Function {
        let raw: HashMap<_, _> =
            attributes.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        function(FunctionId::parse("f").unwrap(), &Item::new(raw))
    }

    #[test]
    fn an_item_becomes_a_function() {
        let f = read(&[
            ("name", text("n")),
            ("runtime", text("go")),
            ("memoryMb", whole(256)),
            ("s3Key", text("k")),
            ("envVars", text(r#"{"A":"1"}"#)),
            ("version", whole(3)),
            ("invocations", whole(5)),
            ("totalDuration", float(12.5)),
        ]);
        assert_eq!(
            (f.name.as_str(), f.runtime.as_str(), f.memory_mb, f.s3_key.as_str()),
            ("n", "go", 256, "k")
        );
        assert_eq!((f.env_vars.as_str(), f.version), (r#"{"A":"1"}"#, 3));
        assert_eq!((f.counters.invocations, f.counters.total_duration_ms), (5, 12.5));
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
    }
}
