//! HTTP/2 as frames on a socket, for requests that client libraries would not send.

use super::http::{Answer, Message};
use super::tls::connect;
use loona_hpack::Decoder;
use std::collections::HashMap;
use std::io::{Error, ErrorKind, Result};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

pub const END_STREAM: u8 = 0x1;
pub const END_HEADERS: u8 = 0x4;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RESET: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GO_AWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;

/// The initial flow-control window, in bytes.
const WINDOW: i64 = 65_535;
/// Deadline for an answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);

/// How a stream has ended.
#[derive(Debug)]
pub enum StreamEnd {
    Answered(Answer),
    /// With an error code.
    #[expect(dead_code, reason = "a test that fails prints it")]
    Reset(u32),
    /// The whole connection has ended.
    Closed,
}

impl StreamEnd {
    #[track_caller]
    pub fn answer(self) -> Answer {
        match self {
            Self::Answered(answer) => answer,
            other => panic!("no answer, but {other:?}"),
        }
    }
}

pub struct Http2 {
    stream: TlsStream<TcpStream>,
    decoder: Decoder<'static>,
    next_stream: u32,
    /// Flow-control windows of the connection, and of each stream that has sent data.
    window: i64,
    windows: HashMap<u32, i64>,
    /// Received parts of answers.
    answers: HashMap<u32, PartialAnswer>,
}

#[derive(Default)]
struct PartialAnswer {
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    is_complete: bool,
    reset: Option<u32>,
}

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let len = u32::try_from(payload.len()).expect("a short payload").to_be_bytes();
    [&len[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A header block of literal fields, without references to a table.
pub fn block(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            let mut left = text.len();
            if left < 0x7f {
                block.push(left as u8);
            } else {
                block.push(0x7f);
                left -= 0x7f;
                while left > 0x7f {
                    block.push(left as u8 | 0x80);
                    left >>= 7;
                }
                block.push(left as u8);
            }
            block.extend_from_slice(text.as_bytes());
        }
    }
    block
}

impl Http2 {
    pub async fn open(connector: &TlsConnector, addr: SocketAddr) -> Result<Self> {
        let mut stream = connect(connector, addr).await?;
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await?;
        stream.write_all(&frame(SETTINGS, 0, 0, &[])).await?;
        // More than any answer of a test.
        stream.write_all(&frame(WINDOW_UPDATE, 0, 0, &(1_u32 << 30).to_be_bytes())).await?;
        stream.flush().await?;
        Ok(Self {
            stream,
            decoder: Decoder::new(),
            next_stream: 1,
            window: WINDOW,
            windows: HashMap::new(),
            answers: HashMap::new(),
        })
    }

    pub async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).await?;
        self.stream.flush().await
    }

    /// Opens a stream with these fields, valid or not.
    pub async fn send(&mut self, fields: &[(&str, &str)], ends_stream: bool) -> Result<u32> {
        let stream = self.next_stream;
        self.next_stream += 2;
        let mut bytes = Vec::new();
        let block = block(fields);
        let mut parts = block.chunks(16_384).peekable();
        let (mut kind, mut flags) = (HEADERS, if ends_stream { END_STREAM } else { 0 });
        while let Some(part) = parts.next() {
            flags |= if parts.peek().is_none() { END_HEADERS } else { 0 };
            bytes.extend(frame(kind, flags, stream, part));
            (kind, flags) = (9, 0);
        }
        self.write(&bytes).await?;
        Ok(stream)
    }

    /// Sends a part of a body within the flow-control windows. Stops if the stream ends first.
    pub async fn data(&mut self, stream: u32, data: &[u8], ends_stream: bool) -> Result<()> {
        let mut left = data;
        loop {
            let window = self.window.min(*self.windows.entry(stream).or_insert(WINDOW));
            let bytes = left.len().min(usize::try_from(window).unwrap_or_default()).min(16_384);
            let (part, rest) = left.split_at(bytes);
            if bytes > 0 || left.is_empty() {
                let is_last = rest.is_empty();
                self.write(&frame(DATA, u8::from(ends_stream && is_last), stream, part)).await?;
                let sent = i64::try_from(bytes).expect("a short part");
                self.window -= sent;
                *self.windows.entry(stream).or_insert(WINDOW) -= sent;
                left = rest;
                if is_last {
                    return Ok(());
                }
                continue;
            }
            let partial = self.answers.entry(stream).or_default();
            if partial.is_complete || partial.reset.is_some() {
                return Ok(());
            }
            self.read().await?;
        }
    }

    /// Sends a request, and reads its answer.
    pub async fn ask(&mut self, fields: &[(&str, &str)], body: Option<&[u8]>) -> StreamEnd {
        let Ok(stream) = self.send(fields, body.is_none()).await else { return StreamEnd::Closed };
        if let Some(body) = body {
            let _ = self.data(stream, body, true).await;
        }
        self.ended(stream).await
    }

    /// Waits for the end of a stream.
    pub async fn ended(&mut self, stream: u32) -> StreamEnd {
        let read = async {
            loop {
                let partial = self.answers.entry(stream).or_default();
                if partial.is_complete || partial.reset.is_some() {
                    break;
                }
                if self.read().await.is_err() {
                    return StreamEnd::Closed;
                }
            }
            let PartialAnswer { headers, body, is_complete, reset } =
                self.answers.remove(&stream).unwrap_or_default();
            let status = headers.iter().find(|(name, _)| name == ":status");
            let status = status.and_then(|(_, status)| status.parse().ok());
            let answer = status.map(|status| Answer {
                status,
                message: Message { start: format!("HTTP/2 {status}"), headers, body },
            });
            match (reset, answer) {
                (_, Some(answer)) if is_complete => StreamEnd::Answered(answer),
                (Some(code), _) => StreamEnd::Reset(code),
                _ => StreamEnd::Closed,
            }
        };
        tokio::time::timeout(ANSWER_WITHIN, read)
            .await
            .unwrap_or_else(|_| panic!("stream {stream} does not end"))
    }

    /// Waits for `100 Continue`.
    pub async fn continues(&mut self, stream: u32) -> Result<()> {
        loop {
            let partial = self.answers.entry(stream).or_default();
            if partial.headers.first().is_some_and(|(_, status)| status == "100") {
                partial.headers.clear();
                return Ok(());
            }
            self.read().await?;
        }
    }

    /// Reads one frame.
    async fn read(&mut self) -> Result<()> {
        let mut head = [0; 9];
        self.stream.read_exact(&mut head).await?;
        let len = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let (kind, flags) = (head[3], head[4]);
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        let mut payload = vec![0; len];
        self.stream.read_exact(&mut payload).await?;
        let partial = self.answers.entry(stream).or_default();
        match kind {
            HEADERS => {
                assert!(flags & END_HEADERS != 0, "answers have short heads");
                let fields = self.decoder.decode(&payload).map_err(|e| Error::other(e.to_string()))?;
                let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
                partial.headers.extend(fields.into_iter().map(|(name, value)| (text(name), text(value))));
                partial.is_complete |= flags & END_STREAM != 0;
            }
            DATA => {
                partial.body.extend_from_slice(&payload);
                partial.is_complete |= flags & END_STREAM != 0;
                let window = u32::try_from(len).unwrap_or_default();
                if window > 0 && flags & END_STREAM == 0 {
                    self.write(&frame(WINDOW_UPDATE, 0, stream, &window.to_be_bytes())).await?;
                }
            }
            WINDOW_UPDATE => {
                let more = i64::from(u32::from_be_bytes(payload[..4].try_into().expect("an increment")));
                match stream {
                    0 => self.window += more,
                    _ => *self.windows.entry(stream).or_insert(WINDOW) += more,
                }
            }
            RESET => partial.reset = Some(u32::from_be_bytes(payload[..4].try_into().expect("a code"))),
            SETTINGS if flags & 1 == 0 => self.write(&frame(SETTINGS, 1, 0, &[])).await?,
            PING if flags & 1 == 0 => self.write(&frame(PING, 1, 0, &payload)).await?,
            GO_AWAY => return Err(ErrorKind::ConnectionAborted.into()),
            _ => {}
        }
        Ok(())
    }
}
