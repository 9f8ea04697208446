//! A function as an item of its table.

use crate::backend::aws::dynamodb::item::{Item, RawItem, text, whole};
use crate::backend::aws::dynamodb::recommendation;
use crate::model::{Function, FunctionCounters, FunctionId, Handler};
use aws_sdk_dynamodb::types::AttributeValue;

pub const KEY: &[&str] = &["functionId"];

pub fn key_item(id: &str) -> RawItem {
    RawItem::from([("functionId".to_owned(), text(id))])
}

/// Returns `None` if the key of the item is not a function id.
pub fn listed(raw: RawItem) -> Option<Function> {
    let item = Item::new(raw);
    let id = FunctionId::parse(&item.text("functionId")?)?;
    Some(function(id, &item))
}

pub fn function(id: FunctionId, item: &Item) -> Function {
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
        max_concurrency: item.whole("maxConcurrency").unwrap_or(0),
        // Absent or empty: script mode.
        handler: item.text("handler").and_then(|handler| Handler::parse(&handler)),
        s3_key: text("s3Key"),
        original_name: text("originalName"),
        uploaded_at: text("uploadedAt"),
        updated_at: text("updated_at"),
        env_vars: Function::env_vars_or_empty(&item.json("envVars").unwrap_or_default()),
        version: item.whole("version").unwrap_or(0),
        counters: FunctionCounters {
            invocations: item.whole("invocations").unwrap_or(0),
            errors: item.whole("errorCount").unwrap_or(0),
            total_duration_ms: item.float("totalDuration").unwrap_or(0.0),
            handler_invocations: item.whole("handlerInvocations").unwrap_or(0),
            total_handler_duration_ms: item.float("totalHandlerDuration").unwrap_or(0.0),
            cold_starts: item.whole("coldStarts").unwrap_or(0),
        },
        recommendation: recommendation::of(item),
        id,
    }
}

/// The attributes that a change of the function writes, without the key. [`function`] reads them.
pub fn attributes(f: &Function) -> Vec<(&'static str, AttributeValue)> {
    vec![
        ("name", text(f.name.as_str())),
        ("description", text(f.description.as_str())),
        ("runtime", text(f.runtime.as_str())),
        ("memoryMb", whole(f.memory_mb)),
        ("maxConcurrency", whole(f.max_concurrency)),
        ("handler", text(f.handler.as_ref().map_or("", Handler::as_str))),
        ("s3Key", text(f.s3_key.as_str())),
        ("originalName", text(f.original_name.as_str())),
        ("uploadedAt", text(f.uploaded_at.as_str())),
        ("updated_at", text(f.updated_at.as_str())),
        ("envVars", text(f.env_vars.as_str())),
        ("version", whole(f.version)),
    ]
}
