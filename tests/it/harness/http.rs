//! HTTP/1.1 as bytes on a socket. Client libraries hide what the tests must send and see.
//!
//! Clients and the proxy in front of the AWS emulator use the same reader.

use super::description;
use serde_json::Value;
use std::io::{Error, ErrorKind, Result};
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Deadline for one answer: longer than the longest long poll.
const ANSWER_WITHIN: Duration = Duration::from_secs(90);
const HEAD_BYTES_MAX: usize = 64 * 1024;
const BODY_BYTES_MAX: usize = 64 * 1024 * 1024;

/// The head and body of a request or a response.
#[derive(Clone, Debug)]
pub struct Message {
    /// The request line or the status line.
    pub start: String,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Message {
    /// Parses a head without the empty line at its end.
    pub fn of_head(head: &str) -> Result<Self> {
        let mut lines = head.split("\r\n");
        let start = lines.next().unwrap_or_default().to_owned();
        let headers = lines
            .map(|line| line.split_once(':').ok_or_else(|| bad(format!("no header: {line}"))))
            .map(|pair| pair.map(|(name, value)| (name.to_owned(), value.trim().to_owned())))
            .collect::<Result<_>>()?;
        Ok(Self { start, headers, body: Vec::new() })
    }

    /// The status of an answer.
    pub fn status(&self) -> Result<u16> {
        let status = self.start.split(' ').nth(1).and_then(|s| s.parse().ok());
        status.ok_or_else(|| bad(format!("no status line: {}", self.start)))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = format!("{}\r\n", self.start).into_bytes();
        for (name, value) in &self.headers {
            bytes.extend_from_slice(format!("{name}: {value}\r\n").as_bytes());
        }
        bytes.extend_from_slice(b"\r\n");
        bytes.extend_from_slice(&self.body);
        bytes
    }
}

/// A connection with a read buffer.
pub struct Conn {
    stream: TcpStream,
    unread: Vec<u8>,
}

impl Conn {
    pub async fn open(addr: SocketAddr) -> Result<Self> {
        Ok(Self::over(TcpStream::connect(addr).await?))
    }

    pub fn over(stream: TcpStream) -> Self {
        let _ = stream.set_nodelay(true);
        Self { stream, unread: Vec::new() }
    }

    pub async fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.stream.write_all(bytes).await
    }

    /// The local port.
    pub fn port(&self) -> u16 {
        self.stream.local_addr().expect("a connected socket has an address").port()
    }

    /// The next `length` bytes.
    pub async fn bytes(&mut self, length: usize) -> Result<Vec<u8>> {
        self.take(length).await
    }

    /// Closes the sending side.
    pub async fn end(&mut self) {
        // The peer may have closed it already.
        let _ = self.stream.shutdown().await;
    }

    /// The stream, and what was read from it but not consumed.
    pub fn into_parts(self) -> (TcpStream, Vec<u8>) {
        (self.stream, self.unread)
    }

    /// The next final answer. `to_head`: the answer to a HEAD request, which has no body.
    pub async fn answer(&mut self, to_head: bool) -> Result<Answer> {
        loop {
            let answer = self.any_answer(to_head).await?;
            if answer.status >= 200 {
                return Ok(answer);
            }
        }
    }

    /// The next answer, interim answers (`100 Continue`) included.
    pub async fn any_answer(&mut self, to_head: bool) -> Result<Answer> {
        let read = async {
            let mut message = self.head().await?;
            let status = message.status()?;
            if !to_head && status >= 200 && status != 204 && status != 304 {
                message.body = self.body(&message, true).await?;
            }
            Ok(Answer { status, message })
        };
        match tokio::time::timeout(ANSWER_WITHIN, read).await {
            Ok(answer) => answer,
            Err(_) => Err(Error::new(ErrorKind::TimedOut, "no answer")),
        }
    }

    /// The next request; `None`: the client has closed the connection.
    pub async fn request(&mut self) -> Result<Option<Message>> {
        if self.unread.is_empty() && !self.fill().await? {
            return Ok(None);
        }
        let mut message = self.head().await?;
        message.body = self.body(&message, false).await?;
        Ok(Some(message))
    }

    /// Waits for data or the end of the connection. `true`: the peer has closed it, and no data is left.
    pub async fn is_closed(&mut self) -> bool {
        self.unread.is_empty() && !self.fill().await.unwrap_or(false)
    }

    async fn head(&mut self) -> Result<Message> {
        let end = loop {
            if let Some(end) = self.unread.windows(4).position(|w| w == b"\r\n\r\n") {
                break end;
            }
            if self.unread.len() > HEAD_BYTES_MAX {
                return Err(bad("the head is too long".into()));
            }
            self.fill_or_fail().await?;
        };
        let head: Vec<u8> = self.unread.drain(..end + 4).take(end).collect();
        let head = String::from_utf8(head).map_err(|_| bad("the head is not UTF-8".into()))?;
        Message::of_head(&head)
    }

    async fn body(&mut self, message: &Message, until_close: bool) -> Result<Vec<u8>> {
        if message.header("transfer-encoding").is_some_and(|v| v.eq_ignore_ascii_case("chunked")) {
            return self.chunks().await;
        }
        match message.header("content-length") {
            Some(length) => {
                let length = length.parse().map_err(|_| bad(format!("content-length {length}")))?;
                self.take(length).await
            }
            None if until_close => {
                while self.fill().await? {}
                Ok(std::mem::take(&mut self.unread))
            }
            None => Ok(Vec::new()),
        }
    }

    async fn chunks(&mut self) -> Result<Vec<u8>> {
        let mut body = Vec::new();
        loop {
            let end = loop {
                if let Some(end) = self.unread.windows(2).position(|w| w == b"\r\n") {
                    break end;
                }
                self.fill_or_fail().await?;
            };
            let line = self.take(end + 2).await?;
            let size = std::str::from_utf8(&line[..end]).ok().and_then(|s| s.split(';').next());
            let size = size.and_then(|s| usize::from_str_radix(s.trim(), 16).ok());
            let size = size.ok_or_else(|| bad("a chunk without a size".into()))?;
            let chunk = self.take(size + 2).await?;
            body.extend_from_slice(&chunk[..size]);
            if size == 0 {
                return Ok(body);
            }
        }
    }

    async fn take(&mut self, length: usize) -> Result<Vec<u8>> {
        if length > BODY_BYTES_MAX {
            return Err(bad(format!("a body of {length} bytes")));
        }
        while self.unread.len() < length {
            self.fill_or_fail().await?;
        }
        Ok(self.unread.drain(..length).collect())
    }

    async fn fill_or_fail(&mut self) -> Result<()> {
        if self.fill().await? { Ok(()) } else { Err(ErrorKind::UnexpectedEof.into()) }
    }

    async fn fill(&mut self) -> Result<bool> {
        Ok(self.stream.read_buf(&mut self.unread).await? > 0)
    }
}

fn bad(what: String) -> Error {
    Error::new(ErrorKind::InvalidData, what)
}

/// A response.
#[derive(Clone, Debug)]
pub struct Answer {
    pub status: u16,
    pub message: Message,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.message.header(name)
    }

    /// The value of a header, which must be present.
    pub fn need(&self, name: &str) -> &str {
        self.header(name).unwrap_or_else(|| panic!("no header {name} in {self:#?}"))
    }

    pub fn body(&self) -> &[u8] {
        &self.message.body
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(self.body()).into_owned()
    }

    /// The body, which must be JSON.
    pub fn json(&self) -> Value {
        serde_json::from_slice(self.body())
            .unwrap_or_else(|e| panic!("{} is no JSON ({e}): {}", self.status, self.text()))
    }

    /// Asserts the status. Returns the answer.
    #[track_caller]
    pub fn expect(self, status: u16) -> Self {
        assert_eq!(self.status, status, "{}\n{:?}", self.text(), self.message.headers);
        self
    }

    /// Asserts that this is a problem (RFC 9457) with all members of the contract.
    #[track_caller]
    pub fn expect_problem(self, status: u16) -> Self {
        let answer = self.expect(status);
        let mime = answer.need("content-type").to_owned();
        assert!(mime.starts_with("application/problem+json"), "{mime}");
        let problem = answer.json();
        assert_eq!(problem["status"], status, "{problem}");
        for member in ["type", "title", "detail", "requestId", "code", "error"] {
            let text = problem[member].as_str();
            assert!(text.is_some_and(|t| !t.is_empty()), "{member} in {problem}");
        }
        assert_eq!(problem["error"], problem["detail"], "old clients read `error`");
        assert_eq!(problem["requestId"], answer.need("x-request-id"));
        let code = problem["code"].as_str().unwrap_or_default();
        let is_code = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
        assert!(code.chars().all(is_code), "`code` is machine-readable: {code}");
        answer
    }
}

/// A request builder.
#[derive(Clone)]
pub struct Request {
    addr: SocketAddr,
    method: String,
    message: Message,
    /// Whether the answer is validated against the OpenAPI document.
    is_described: bool,
}

impl Request {
    pub fn new(addr: SocketAddr, method: &str, target: &str) -> Self {
        let start = format!("{method} {target} HTTP/1.1");
        let message = Message { start, headers: vec![("host".into(), addr.to_string())], body: Vec::new() };
        Self { addr, method: method.to_owned(), message, is_described: false }
    }

    /// Validates the answer against the OpenAPI document.
    pub fn described(mut self) -> Self {
        self.is_described = true;
        self
    }

    pub fn header(mut self, name: &str, value: &str) -> Self {
        self.message.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    pub fn body(mut self, mime: &str, body: impl Into<Vec<u8>>) -> Self {
        self.message.body = body.into();
        let length = self.message.body.len().to_string();
        self.header("content-type", mime).header("content-length", &length)
    }

    pub fn json(self, value: &Value) -> Self {
        self.body("application/json", value.to_string())
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    pub fn method(&self) -> &str {
        &self.method
    }

    /// The same request to another server.
    pub fn to(mut self, addr: SocketAddr) -> Self {
        self.addr = addr;
        self
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        self.message.to_bytes()
    }

    /// Sends the request on a new connection, and reads the answer.
    pub async fn try_send(&self) -> Result<Answer> {
        let mut conn = Conn::open(self.addr).await?;
        // A server may reject a request before it has read the body. The answer counts, not the broken pipe.
        let _ = conn.write(&self.to_bytes()).await;
        let answer = conn.answer(self.method == "HEAD").await?;
        self.check(&answer);
        Ok(answer)
    }

    /// Validates an answer that was read from a [`Conn`]. [`Self::send`] calls it.
    #[track_caller]
    pub fn check(&self, answer: &Answer) {
        if self.is_described {
            let target = self.message.start.split(' ').nth(1).unwrap_or_default();
            description::check(&self.method, target, answer);
        }
    }

    pub async fn send(&self) -> Answer {
        let answer = self.try_send().await;
        answer.unwrap_or_else(|e| panic!("{} to {}: {e}", self.message.start, self.addr))
    }
}
