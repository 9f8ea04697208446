//! What an operation of AWS answers.

use bytes::Bytes;
use hyper::StatusCode;

/// Status and body. `None`: the answer is lost, and the client waits.
pub type Answer = Option<(StatusCode, Bytes)>;

/// An error in the form that the SDK reads.
pub fn error(status: StatusCode, code: &str) -> Answer {
    Some((status, format!(r#"{{"__type":"{code}","message":"made by the stand-in"}}"#).into()))
}
