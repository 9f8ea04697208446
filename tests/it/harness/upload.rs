//! Code archives, and multipart forms.

use super::http::Request;
use super::{Gateway, Platform};
use serde_json::Value;
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

    async fn upload_zip(&self, zip: &[u8]) -> String {
        let parts = [Part::File("code.zip", zip)];
        let answer = form(self.request("POST", "/upload"), &parts).send().await.expect(200).json();
        assert_eq!(answer["success"], true, "{answer}");
        answer["functionId"].as_str().expect("an id").to_owned()
    }

    /// Runs the function. The test worker prints its code.
    pub async fn run_code(&self, function: &str) -> Value {
        self.run(function, &serde_json::json!({ "behave": "code" })).send().await.expect(200).json()
    }
}

impl Platform {
    /// The keys of the stored archives of a function. `serve` only.
    pub async fn stored_code(&self, function: &str) -> Vec<String> {
        self.fleet().cloud.objects(&format!("functions/{function}/")).await
    }
}
