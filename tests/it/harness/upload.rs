//! Code archives, and multipart forms.

use super::http::Request;
use super::{Gateway, Platform};
use serde_json::{Value, json};
use std::io::{Cursor, Write};
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

const BOUNDARY: &str = "a-boundary-of-the-tests";

/// A zip archive of these files.
pub fn zipped(files: &[(&str, &[u8])]) -> Vec<u8> {
    zip_with(SimpleFileOptions::default(), files)
}

/// The same without compression.
pub fn stored(files: &[(&str, &[u8])]) -> Vec<u8> {
    zip_with(SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored), files)
}

fn zip_with(options: SimpleFileOptions, files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, contents) in files {
        zip.start_file(*name, options).expect("a zip in memory");
        zip.write_all(contents).expect("a zip in memory");
    }
    zip.finish().expect("a zip in memory").into_inner()
}

/// Python code whose output contains `marker`: the local worker runs it, the test worker prints its source.
pub fn printing(marker: &str) -> Vec<u8> {
    zipped(&[("main.py", format!("print({marker:?})\n").as_bytes())])
}

/// A function to upload.
#[derive(Clone)]
pub struct Function<'a> {
    pub runtime: &'a str,
    /// Path and text.
    pub files: Vec<(&'a str, &'a str)>,
    pub handler: Option<&'a str>,
    pub env_vars: Value,
    pub memory_mb: u64,
}

impl<'a> Function<'a> {
    /// A function of one file. `handler`: `None` for a program.
    pub fn new(runtime: &'a str, file: &'a str, text: &'a str, handler: Option<&'a str>) -> Self {
        Self { runtime, files: vec![(file, text)], handler, env_vars: json!({}), memory_mb: 128 }
    }

    /// `main.py`, as a program.
    pub fn python(text: &'a str) -> Self {
        Self::new("python", "main.py", text, None)
    }

    /// `main.py`, with the handler `main.handler`.
    pub fn python_handler(text: &'a str) -> Self {
        Self::new("python", "main.py", text, Some("main.handler"))
    }

    pub fn zip(&self) -> Vec<u8> {
        let files: Vec<_> = self.files.iter().map(|(name, text)| (*name, text.as_bytes())).collect();
        zipped(&files)
    }
}

/// One part of a form.
pub enum Part<'a> {
    Field(&'a str, &'a str),
    File(&'a str, &'a [u8]),
}

pub fn form(request: Request, parts: &[Part<'_>]) -> Request {
    let mut body = Vec::new();
    for part in parts {
        let (head, contents) = match part {
            Part::Field(name, value) => (format!("name=\"{name}\""), value.as_bytes()),
            Part::File(file_name, contents) => {
                let head =
                    format!("name=\"file\"; filename=\"{file_name}\"\r\nContent-Type: application/zip");
                (head, *contents)
            }
        };
        body.extend_from_slice(
            format!("--{BOUNDARY}\r\nContent-Disposition: form-data; {head}\r\n\r\n").as_bytes(),
        );
        body.extend_from_slice(contents);
        body.extend_from_slice(b"\r\n");
    }
    body.extend_from_slice(format!("--{BOUNDARY}--\r\n").as_bytes());
    request.body(&format!("multipart/form-data; boundary={BOUNDARY}"), body)
}

impl Gateway {
    /// Uploads python code that prints `marker`. Returns the id of the new function.
    pub async fn upload(&self, marker: &str) -> String {
        self.upload_zip(&printing(marker)).await
    }

    /// Uploads python code. Returns the id of the new function.
    pub async fn upload_python(&self, source: &str) -> String {
        self.upload_zip(&zipped(&[("main.py", source.as_bytes())])).await
    }

    /// Uploads a function. Returns its id.
    pub async fn create(&self, function: &Function<'_>) -> String {
        let (zip, env_vars) = (function.zip(), function.env_vars.to_string());
        let parts = [Part::Field("envVars", &env_vars), Part::File("code.zip", &zip)];
        let request = self.request("POST", "/upload").header("x-runtime", function.runtime);
        let request = request.header("x-memory-mb", &function.memory_mb.to_string());
        let request = request.header("x-handler", function.handler.unwrap_or_default());
        let made = form(request, &parts).send().await.expect(200).json();
        made["functionId"].as_str().expect("an id").to_owned()
    }

    /// Uploads a function and runs it once. Returns the result.
    pub async fn create_and_run(&self, function: &Function<'_>, input: &Value) -> Value {
        let id = self.create(function).await;
        self.run(&id, input).send().await.expect(200).json()
    }

    async fn upload_zip(&self, zip: &[u8]) -> String {
        let parts = [Part::File("code.zip", zip)];
        let answer = form(self.request("POST", "/upload"), &parts).send().await.expect(200).json();
        assert_eq!(answer["success"], true, "{answer}");
        answer["functionId"].as_str().expect("an id").to_owned()
    }

    /// Runs the function. The Python worker prints its code.
    pub async fn run_code(&self, function: &str) -> Value {
        self.run(function, &json!({ "behave": "code" })).send().await.expect(200).json()
    }
}

impl Platform {
    /// Replaces the stored archive of a function, behind the back of the gateway. `None`: deletes it.
    pub async fn spoil_code(&self, function: &str, archive: Option<&[u8]>) {
        let shown = self.gateway.get(&format!("/functions/{function}")).await.expect(200).json();
        let key = shown["s3Key"].as_str().expect("a key");
        if self.is_serve() {
            let cloud = &self.fleet().cloud;
            match archive {
                Some(archive) => cloud.put_object(key, archive.to_vec()).await,
                None => cloud.delete_object(key).await,
            }
            return;
        }
        let file = self.data_dir().join("code").join(key);
        std::fs::remove_file(&file).expect("the archive is there");
        if let Some(archive) = archive {
            std::fs::write(file, archive).expect("the directory is writable");
        }
    }

    /// The keys of the stored archives of a function. `serve` only.
    pub async fn stored_code(&self, function: &str) -> Vec<String> {
        self.fleet().cloud.objects(&format!("functions/{function}/")).await
    }
}
