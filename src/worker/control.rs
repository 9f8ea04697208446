//! Frames on the control socket between the worker and an instance.
//!
//! A frame is the length of its body (4 bytes, big endian), and the body: a JSON object. The worker sends a
//! [`ControlRequest`], and waits for a [`ControlReply`] before it sends the next one. A script gets one
//! request, and sends no reply: the end of the process is the answer.
//!
//! The other side runs code of a function, so nothing that it sends is trusted. The worst that a wrong frame
//! can do is to fail the run of its own function.

use super::runtime::ProcessEnv;
use crate::model::UnixMs;
use bytes::{Buf, Bytes, BytesMut};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;

/// Longest body of a frame, in bytes. `bootstrap.py` and `bootstrap.js` have the same number.
pub(super) const FRAME_BYTES_MAX: usize = 16 << 20;
/// Bytes of the length before the body.
const LENGTH_BYTES: usize = 4;
/// Least room in the buffer for one read, in bytes. Most frames fit.
const READ_BYTES: usize = 8 * 1024;
/// Longest duration that is believed, in milliseconds. The gateway accepts no longer one.
const DURATION_MS_MAX: f64 = 1e10;

/// Why a conversation with an instance has failed. The instance cannot be used any more.
#[derive(Debug, thiserror::Error)]
pub(super) enum ControlError {
    #[error("the process has closed its control socket")]
    Closed,
    #[error("the process has closed its control socket after {read} bytes of a frame of {length} bytes")]
    Torn { read: usize, length: usize },
    #[error("a frame of {length} bytes is longer than the limit of {max} bytes")]
    TooLong { length: u64, max: u64 },
    /// It contains no part of the frame, because that is data of a user.
    #[error("the process has sent a frame that is not a reply (line {line}, column {column})")]
    Malformed { line: usize, column: usize },
    #[error("the control socket failed: {0}")]
    Io(#[from] io::Error),
}

/// What the worker wants of an instance.
#[derive(Serialize)]
#[serde(tag = "do", rename_all = "camelCase")]
pub(super) enum ControlRequest<'a> {
    /// Run the entry file as a program. `env` is its whole environment.
    Script { env: &'a ProcessEnv },
    /// Load the module of a handler. `env` is the whole environment, without the variables of a single run.
    Load { handler: &'a str, env: &'a ProcessEnv },
    /// Call the handler. `env` has the variables that differ from run to run.
    Event { event: &'a RawValue, env: &'a ProcessEnv, context: EventContext<'a> },
}

/// What a handler learns about its run, beside the event.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct EventContext<'a> {
    pub(super) request_id: &'a str,
    pub(super) function_id: &'a str,
    /// When the run is stopped.
    pub(super) deadline_ms: UnixMs,
    pub(super) memory_mb: u64,
    pub(super) model_id: &'a str,
    /// As the instance sees it.
    pub(super) output_dir: &'a str,
}

/// What an instance answers.
#[derive(Debug)]
pub(super) enum ControlReply<'a> {
    /// The program is about to run.
    Taken,
    /// The handler can be called. `ms`: how long its module took to load.
    Loaded { ms: f64 },
    /// The handler cannot be called, and the process exits. `error`: a traceback or a sentence.
    Failed { error: String },
    /// What the handler has returned. `ms`: how long it took.
    Value { value: &'a RawValue, ms: f64 },
    /// The handler has failed. `error`: a traceback or a sentence.
    Error { error: String, ms: f64 },
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
enum ReplyKind {
    Taken,
    Loaded,
    Failed,
    Value,
    Error,
}

/// The members of all replies. A tagged enum of serde was rejected: it copies the value, and changes it.
#[derive(Deserialize)]
struct ReplyMembers<'a> {
    is: ReplyKind,
    /// `None` also for `null`.
    #[serde(borrow)]
    value: Option<&'a RawValue>,
    #[serde(default)]
    error: String,
    #[serde(default)]
    ms: f64,
}

impl<'a> ControlReply<'a> {
    pub(super) fn parse(body: &'a [u8]) -> Result<Self, ControlError> {
        let members: ReplyMembers<'a> = serde_json::from_slice(body)
            .map_err(|e| ControlError::Malformed { line: e.line(), column: e.column() })?;
        let ReplyMembers { is, value, error, ms } = members;
        let ms = ms.clamp(0.0, DURATION_MS_MAX);
        Ok(match is {
            ReplyKind::Taken => Self::Taken,
            ReplyKind::Loaded => Self::Loaded { ms },
            ReplyKind::Failed => Self::Failed { error },
            ReplyKind::Value => Self::Value { value: value.unwrap_or(RawValue::NULL), ms },
            ReplyKind::Error => Self::Error { error, ms },
        })
    }
}

/// The worker's end of a control socket.
pub(super) struct ControlSocket {
    stream: UnixStream,
    /// What was read and not returned yet.
    unread: BytesMut,
}

impl ControlSocket {
    /// Creates a control socket. The second value is the end for the instance, for its descriptor 3. It
    /// blocks, as the bootstrap programs expect, and is closed on exec.
    pub(super) fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let stream = UnixStream::from_std(ours)?;
        Ok((Self { stream, unread: BytesMut::new() }, theirs.into()))
    }

    /// Sends a request. If the future is dropped, a part of it may be sent, and the instance cannot be used
    /// any more.
    pub(super) async fn send(&mut self, request: &ControlRequest<'_>) -> Result<(), ControlError> {
        let mut frame = vec![0; LENGTH_BYTES];
        serde_json::to_writer(&mut frame, request).map_err(io::Error::from)?;
        let length = frame.len() - LENGTH_BYTES;
        match u32::try_from(length) {
            Ok(prefix) if length <= FRAME_BYTES_MAX => {
                frame[..LENGTH_BYTES].copy_from_slice(&prefix.to_be_bytes());
            }
            _ => return Err(too_long(length)),
        }
        Ok(self.stream.write_all(&frame).await?)
    }

    /// Receives the body of the next frame; see [`ControlReply::parse`]. Cancel safe.
    ///
    /// # Errors
    /// [`ControlError::Closed`] after the last frame.
    pub(super) async fn receive(&mut self) -> Result<Bytes, ControlError> {
        loop {
            let length = self.announced()?;
            if let Some(length) = length
                && self.unread.len() >= LENGTH_BYTES + length
            {
                self.unread.advance(LENGTH_BYTES);
                return Ok(self.unread.split_to(length).freeze());
            }
            // The buffer grows with what arrives, whatever length was announced.
            self.unread.reserve(READ_BYTES);
            if self.stream.read_buf(&mut self.unread).await? == 0 {
                return Err(match (self.unread.len(), length) {
                    (0, _) => ControlError::Closed,
                    (read, length) => ControlError::Torn {
                        read: read.saturating_sub(LENGTH_BYTES),
                        length: length.unwrap_or(0),
                    },
                });
            }
        }
    }

    /// The length of the next body, in bytes, if that has arrived.
    fn announced(&self) -> Result<Option<usize>, ControlError> {
        let Some(prefix) = self.unread.first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
        match usize::try_from(u32::from_be_bytes(*prefix)) {
            Ok(length) if length <= FRAME_BYTES_MAX => Ok(Some(length)),
            other => Err(too_long(other.unwrap_or(usize::MAX))),
        }
    }

    /// Whether the instance is there, and has sent nothing that was not asked for. To be called before an
    /// event is sent: otherwise a frame that is there already would be its reply.
    pub(super) fn is_quiet(&self) -> bool {
        let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        self.unread.is_empty() && recv(self.stream.as_raw_fd(), &mut [0], flags) == Err(Errno::EAGAIN)
    }

    /// Copies everything to `to`, until the process closes the socket: a build sends its product so; see
    /// [`super::runtime::Build`]. Returns the number of bytes.
    ///
    /// # Errors
    /// [`ControlError::TooLong`] if there are more than `bytes_max`. Then `to` has a part of them.
    pub(super) async fn receive_file(
        self,
        to: &mut (impl AsyncWrite + Unpin),
        bytes_max: u64,
    ) -> Result<u64, ControlError> {
        let copied = tokio::io::copy(&mut self.stream.take(bytes_max.saturating_add(1)), to).await?;
        to.flush().await?;
        if copied > bytes_max {
            return Err(ControlError::TooLong { length: copied, max: bytes_max });
        }
        Ok(copied)
    }
}

fn too_long(length: usize) -> ControlError {
    ControlError::TooLong { length: length as u64, max: FRAME_BYTES_MAX as u64 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream as StdUnixStream;

    fn pair() -> (ControlSocket, StdUnixStream) {
        let (ours, theirs) = ControlSocket::pair().unwrap();
        (ours, theirs.into())
    }

    fn framed(body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len()).unwrap();
        [&length.to_be_bytes(), body].concat()
    }

    #[tokio::test]
    async fn an_event_keeps_its_input_byte_for_byte() {
        let (mut ours, mut theirs) = pair();
        let env = ProcessEnv::from([("REQUEST_ID".to_owned(), "r".to_owned())]);
        let input = r#"{ "b":1.0, "a" :[1e2,"\u00e9é"],"a":null }"#;
        let context = EventContext {
            request_id: "r",
            function_id: "f",
            deadline_ms: 5,
            memory_mb: 128,
            model_id: "m",
            output_dir: "/tmp/output",
        };
        let event = serde_json::from_str(input).unwrap();
        ours.send(&ControlRequest::Event { event, env: &env, context }).await.unwrap();
        ours.send(&ControlRequest::Load { handler: "main.handler", env: &env }).await.unwrap();
        ours.send(&ControlRequest::Script { env: &env }).await.unwrap();
        drop(ours);
        let mut sent = Vec::new();
        theirs.read_to_end(&mut sent).unwrap();
        let event = format!(
            r#"{{"do":"event","event":{input},"env":{{"REQUEST_ID":"r"}},"context":{{"requestId":"r",{}}}}}"#,
            r#""functionId":"f","deadlineMs":5,"memoryMb":128,"modelId":"m","outputDir":"/tmp/output""#,
        );
        let load = r#"{"do":"load","handler":"main.handler","env":{"REQUEST_ID":"r"}}"#;
        let script = r#"{"do":"script","env":{"REQUEST_ID":"r"}}"#;
        let expected = [event.as_bytes(), load.as_bytes(), script.as_bytes()].map(framed).concat();
        assert_eq!(String::from_utf8_lossy(&sent), String::from_utf8_lossy(&expected));
    }

    #[tokio::test]
    async fn replies_arrive_whole_and_in_order() {
        let (mut ours, mut theirs) = pair();
        let value = json!({ "text": "é".repeat(50_000) }).to_string();
        let bodies = [
            r#"{"is":"loaded","ms":1.5}"#.to_owned(),
            format!(r#"{{"is":"value","value":{value},"ms":2}}"#),
            r#"{"is":"value","value":null}"#.to_owned(),
            r#"{"is":"error","error":"é\n","ms":-1}"#.to_owned(),
            r#"{"is":"failed","error":"x","more":[1]}"#.to_owned(),
            r#"{"is":"taken"}"#.to_owned(),
        ];
        let frames: Vec<u8> = bodies.iter().flat_map(|body| framed(body.as_bytes())).collect();
        let writer = std::thread::spawn(move || {
            for chunk in frames.chunks(777) {
                theirs.write_all(chunk).unwrap();
            }
        });
        let mut shown = Vec::new();
        for body in &bodies {
            let frame = ours.receive().await.unwrap();
            assert_eq!(frame, body.as_bytes());
            shown.push(match ControlReply::parse(&frame).unwrap() {
                ControlReply::Taken => "taken".to_owned(),
                ControlReply::Loaded { ms } => format!("loaded {ms}"),
                ControlReply::Failed { error } => format!("failed {error}"),
                ControlReply::Value { value, ms } => format!("value {} {ms}", value.get().len()),
                ControlReply::Error { error, ms } => format!("error {error:?} {ms}"),
            });
        }
        writer.join().unwrap();
        let long = format!("value {} 2", value.len());
        assert_eq!(shown, ["loaded 1.5", &long, "value 4 0", "error \"é\\n\" 0", "failed x", "taken"]);
        assert!(matches!(ours.receive().await, Err(ControlError::Closed)));
    }

    #[tokio::test]
    async fn wrong_frames_are_errors() {
        let huge = u32::try_from(FRAME_BYTES_MAX + 1).unwrap().to_be_bytes();
        for (sent, expected) in [
            (&b""[..], "has closed its control socket"),
            (&[0, 0], "after 0 bytes of a frame of 0 bytes"),
            (&[0, 0, 0, 9, b'{'], "after 1 bytes of a frame of 9 bytes"),
            (&huge[..], "a frame of 16777217 bytes is longer than the limit of 16777216 bytes"),
            (b"GET / HTTP/1.1\r\n", "is longer than"),
        ] {
            let (mut ours, mut theirs) = pair();
            theirs.write_all(sent).unwrap();
            drop(theirs);
            let error = ours.receive().await.unwrap_err().to_string();
            assert!(error.contains(expected), "{sent:?}: {error}");
        }
        for body in [
            &b""[..],
            b"null",
            b"{}",
            b"[]",
            br#"{"is":"other"}"#,
            br#"{"is":"value","value":NaN}"#,
            br#"{"is":"value","value":1}x"#,
            br#"{"is":"value","value":"secret","ms":"1"}"#,
            b"{\"is\":\"error\",\"error\":\"\xff\"}",
            b"{\"is\":\"value\",\"value\":\"\xff\"}",
        ] {
            let error = ControlReply::parse(body).unwrap_err().to_string();
            assert!(error.contains("is not a reply"), "{error}");
            assert!(!error.contains("secret"), "{error}");
        }
    }

    #[tokio::test]
    async fn a_long_request_is_not_sent() {
        let (mut ours, mut theirs) = pair();
        let env = ProcessEnv::from([("A".to_owned(), "x".repeat(FRAME_BYTES_MAX))]);
        let refused = ours.send(&ControlRequest::Script { env: &env }).await.unwrap_err();
        assert!(matches!(refused, ControlError::TooLong { .. }), "{refused}");
        drop(ours);
        assert_eq!(theirs.read(&mut [0; 8]).unwrap(), 0);
    }

    #[tokio::test]
    async fn a_frame_that_was_not_asked_for_is_noticed() {
        let (mut ours, mut theirs) = pair();
        assert!(ours.is_quiet());
        theirs.write_all(&framed(b"{}")).unwrap();
        assert!(!ours.is_quiet());
        theirs.write_all(&framed(b"{}")).unwrap();
        ours.receive().await.unwrap();
        assert!(!ours.is_quiet());
        ours.receive().await.unwrap();
        assert!(ours.is_quiet());
        drop(theirs);
        assert!(!ours.is_quiet());
    }

    #[tokio::test]
    async fn a_product_is_received_up_to_its_bound() {
        for (bytes, expected) in [(0, Some(0)), (100_000, Some(100_000)), (100_001, None)] {
            let (ours, mut theirs) = pair();
            let writer = std::thread::spawn(move || theirs.write_all(&vec![7; bytes]));
            let mut product = Vec::new();
            let received = ours.receive_file(&mut product, 100_000).await;
            assert_eq!(received.ok(), expected);
            assert!(expected.is_none_or(|expected| product == vec![7; usize::try_from(expected).unwrap()]));
            let _ = writer.join();
        }
    }
}
