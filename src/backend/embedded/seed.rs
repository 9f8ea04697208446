//! Example functions for a new data directory, so that the first run needs no upload.
//!
//! A directory is seeded once. The database records it, so that examples which the user deletes stay deleted.

use super::code_store;
use super::database::OpenError;
use super::store::put_function;
use crate::model::{Function, FunctionCounters, FunctionId, Handler, now_ms, rfc3339_ms};
use rusqlite::{Connection, OptionalExtension};
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

struct Example {
    id: &'static str,
    description: &'static str,
    runtime: &'static str,
    /// `None`: the entry file runs as a program.
    handler: Option<&'static str>,
    entry: &'static str,
    source: &'static str,
}

const HELLO: Example = Example {
    id: "hello",
    description: "Greets the person named in the input (python)",
    runtime: "python",
    handler: None,
    entry: "main.py",
    source: include_str!("seed/hello/main.py"),
};

const HELLO_HANDLER: Example = Example {
    id: "hello-handler",
    description: "Greets the person named in the input, and stays loaded (python)",
    runtime: "python",
    handler: Some("main.handler"),
    entry: "main.py",
    source: include_str!("seed/hello-handler/main.py"),
};

const HELLO_NODE: Example = Example {
    id: "hello-node",
    description: "Greets the person named in the input (nodejs)",
    runtime: "nodejs",
    handler: None,
    entry: "index.js",
    source: include_str!("seed/hello-node/index.js"),
};

/// Adds the examples to a directory that was not seeded yet. The Node.js example is added only if `has_node`.
pub(super) fn plant(connection: &Connection, code_dir: &Path, has_node: bool) -> Result<(), OpenError> {
    let mark = connection.query_row("SELECT value FROM meta WHERE name = 'seeded'", [], |_| Ok(()));
    if mark.optional()?.is_some() {
        return Ok(());
    }
    let examples = if has_node { &[HELLO, HELLO_HANDLER, HELLO_NODE][..] } else { &[HELLO, HELLO_HANDLER] };
    // Write the code first: a row without code is a function that cannot run.
    for example in examples {
        write_code(example, code_dir)?;
    }
    let tx = connection.unchecked_transaction()?;
    for example in examples {
        if let Some(function) = example.function() {
            put_function(&tx, &function)?;
        }
    }
    tx.execute("INSERT INTO meta (name, value) VALUES ('seeded', 1)", [])?;
    Ok(tx.commit()?)
}

impl Example {
    fn s3_key(&self) -> String {
        format!("functions/{}/code.zip", self.id)
    }

    fn function(&self) -> Option<Function> {
        Some(Function {
            id: FunctionId::parse(self.id)?,
            name: self.id.to_owned(),
            description: self.description.to_owned(),
            runtime: self.runtime.to_owned(),
            memory_mb: Function::MEMORY_MB_DEFAULT,
            max_concurrency: 0,
            handler: self.handler.and_then(Handler::parse),
            s3_key: self.s3_key(),
            original_name: "code.zip".to_owned(),
            uploaded_at: rfc3339_ms(now_ms()),
            updated_at: String::new(),
            env_vars: "{}".to_owned(),
            version: 1,
            counters: FunctionCounters::default(),
            recommendation: None,
        })
    }
}

fn write_code(example: &Example, code_dir: &Path) -> io::Result<()> {
    let path = code_dir.join(example.s3_key());
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let mut zip = ZipWriter::new(File::create(&path)?);
    zip.start_file(example.entry, SimpleFileOptions::default())?;
    zip.write_all(example.source.as_bytes())?;
    zip.finish()?.sync_all()?;
    code_store::sync_names(code_dir, &path)
}
