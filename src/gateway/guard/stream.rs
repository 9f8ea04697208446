//! A stream that hands the server one well-formed message at a time, and no byte beyond it.
//!
//! HTTP/1.1 messages carry their own length. If two readers of a connection disagree on one length, they
//! disagree on everything after it (request smuggling). So this stream alone decides where a message ends.
//! The server receives the bytes of one message, then nothing until the guard starts the next. Early
//! (pipelined) bytes wait here up to a limit, then in the kernel.
//!
//! HTTP/2 connections pass through the same type; their frames are checked by `http2`.

use super::chunks::Chunks;
use super::head::{Head, HeadLimits, HeadReader, HeadRejection, Length};
use super::http2::{ClientFrames, NextFrame, PREFACE, ServerFrameTracker};
use async_trait::async_trait;
use bytes::{Buf, BytesMut};
use pingora::protocols::raw_connect::ProxyDigest;
use pingora::protocols::tls::{SslDigest, TlsRef};
use pingora::protocols::{
    ALPN, GetProxyDigest, GetSocketDigest, GetTimingDigest, Peek, Shutdown, SocketDigest, Ssl, Stream,
    TimingDigest, UniqueID, UniqueIDType,
};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;
use std::{fmt, io};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufWriter, ReadBuf};
use tokio::time::{Instant, Sleep};

/// The size of a new read buffer, and the least free space before it is replaced, in bytes. Most heads need
/// less.
const ROOM_BYTES: usize = 4096;
const ROOM_LEFT_BYTES_MIN: usize = 1024;
/// The most bytes read ahead of the message in service.
const AHEAD_BYTES_MAX: usize = 16 * 1024;
/// How much a client may still send while the connection closes, in bytes and time. The kernel resets a
/// connection that is closed with unread bytes, and the client might lose the response. The largest upload
/// fits.
const LINGER_BYTES_MAX: usize = 64 << 20;
const LINGER_MAX: Duration = Duration::from_secs(2);
/// The beginnings of a response that makes the connection a tunnel, and of any interim response.
const SWITCHING: &[u8] = b"HTTP/1.1 101";
const INTERIM: &[u8] = b"HTTP/1.1 1";

/// The rest of the message in service.
#[derive(Debug)]
enum RemainingMessage {
    Bytes(u64),
    Chunked(Chunks),
    /// After a 101: no further HTTP messages in either direction.
    Tunnel,
    /// HTTP/2 until the end of the connection: the reader of client frames, and the tracker of server frames.
    Http2(Box<ClientFrames>, ServerFrameTracker),
}

impl RemainingMessage {
    fn is_done(&self) -> bool {
        match self {
            Self::Bytes(left) => *left == 0,
            Self::Chunked(chunks) => chunks.is_done(),
            Self::Tunnel | Self::Http2(..) => false,
        }
    }
}

/// Why there is no next message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NextHeadError {
    /// The client has disconnected.
    Closed,
    /// The head was not complete at its deadline.
    Timeout,
    Bad(HeadRejection),
}

/// The size of the write buffer, in bytes. A head and a short body are sent as one packet.
const ANSWER_GATHER_BYTES: usize = 4096;

/// The stream of one connection, below Pingora's HTTP session.
pub struct GuardedStream {
    inner: BufWriter<Stream>,
    /// Received bytes that are not handed on yet.
    ahead: BytesMut,
    /// The client has closed its sending side.
    has_ended: bool,
    rest: RemainingMessage,
    /// The next written bytes may begin a 101.
    wants_upgrade: bool,
    /// The longest time that a write may make no progress.
    write_timeout: Duration,
    stalled: Option<Pin<Box<Sleep>>>,
    end: End,
}

/// The state of closing: the sending side is shut down, and received bytes are discarded up to a limit.
#[derive(Default)]
struct End {
    /// The sending side is shut down.
    is_said: bool,
    /// The client may still be sending, so the close waits for its end.
    is_owed: bool,
    /// Discarded bytes.
    past_bytes: usize,
    until: Option<Pin<Box<Sleep>>>,
}

impl GuardedStream {
    pub fn new(inner: Stream, write_timeout: Duration) -> Self {
        Self {
            inner: BufWriter::with_capacity(ANSWER_GATHER_BYTES, inner),
            ahead: BytesMut::new(),
            has_ended: false,
            rest: RemainingMessage::Bytes(0),
            wants_upgrade: false,
            write_timeout,
            stalled: None,
            end: End::default(),
        }
    }

    /// Switches to HTTP/2 and waits for the preface. `false`: it did not arrive within `within`.
    pub async fn open_http2(&mut self, limits: HeadLimits, within: Duration) -> bool {
        self.rest =
            RemainingMessage::Http2(Box::new(ClientFrames::new(limits)), ServerFrameTracker::default());
        let begun = async {
            while self.ahead.len() < PREFACE.len() {
                if !matches!(self.read_ahead().await, Ok(n) if n > 0) {
                    return false;
                }
            }
            true
        };
        tokio::time::timeout(within, begun).await.unwrap_or(false)
    }

    /// Whether the last message has been handed on completely.
    pub fn is_between_messages(&self) -> bool {
        self.rest.is_done()
    }

    /// Whether bytes of the next message have been received.
    pub fn has_more(&self) -> bool {
        !self.ahead.is_empty()
    }

    /// Waits for the first byte of the next message. `false`: the client has disconnected.
    pub async fn begins(&mut self) -> bool {
        self.has_more() || matches!(self.read_ahead().await, Ok(n) if n > 0)
    }

    /// Reads the next head. Returns it with its bytes and those of its body that have been received.
    ///
    /// The head must be complete at `deadline`, which is called only if it has not been received completely
    /// yet.
    pub async fn next_message(
        &mut self,
        limits: HeadLimits,
        deadline: impl FnOnce() -> Instant,
    ) -> Result<(Head, BytesMut), NextHeadError> {
        let mut reader = HeadReader::default();
        let mut head = match reader.read(&self.ahead, limits).map_err(NextHeadError::Bad)? {
            Some(head) => head,
            None => match tokio::time::timeout_at(deadline(), self.rest_of_head(reader, limits)).await {
                Ok(read) => read?,
                Err(_) => return Err(NextHeadError::Timeout),
            },
        };
        self.wants_upgrade = head.wants_upgrade;
        let mut len = head.len;
        self.rest = match head.body {
            Length::Bytes(bytes) => {
                let here = usize::try_from(bytes).unwrap_or(usize::MAX).min(self.ahead.len() - head.len);
                len += here;
                RemainingMessage::Bytes(bytes - here as u64)
            }
            Length::Chunked => RemainingMessage::Chunked(Chunks::default()),
        };
        let message = head.as_served(self.ahead.split_to(len));
        Ok((head, message))
    }

    async fn rest_of_head(
        &mut self,
        mut reader: HeadReader,
        limits: HeadLimits,
    ) -> Result<Head, NextHeadError> {
        loop {
            if !matches!(self.read_ahead().await, Ok(n) if n > 0) {
                return Err(NextHeadError::Closed);
            }
            if let Some(head) = reader.read(&self.ahead, limits).map_err(NextHeadError::Bad)? {
                return Ok(head);
            }
        }
    }

    async fn read_ahead(&mut self) -> io::Result<usize> {
        self.make_room();
        let n = self.inner.read_buf(&mut self.ahead).await?;
        self.has_ended |= n == 0;
        Ok(n)
    }

    /// Reserves space if little is left. Usually the free space behind the current message suffices: a new
    /// buffer for each message would be cold memory.
    fn make_room(&mut self) {
        if self.ahead.capacity() - self.ahead.len() < ROOM_LEFT_BYTES_MIN {
            self.ahead.reserve(ROOM_BYTES);
        }
    }

    /// Closes the connection. A client that is still sending gets some time to finish and to read the
    /// response.
    pub async fn close(mut self: Box<Self>) {
        Shutdown::shutdown(&mut *self).await;
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.end.is_said {
            ready!(Pin::new(&mut self.inner).poll_shutdown(cx))?;
            self.end.is_said = true;
            self.end.is_owed = !self.rest.is_done() || !self.ahead.is_empty();
        }
        while !self.has_ended && self.end.past_bytes < LINGER_BYTES_MAX {
            self.ahead.clear();
            match self.poll_ahead(cx)? {
                Poll::Ready(()) => {
                    self.end.is_owed = true;
                    self.end.past_bytes += self.ahead.len();
                }
                Poll::Pending if self.end.is_owed => return Poll::Pending,
                Poll::Pending => break,
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Between messages: hands on nothing, and reports only the end of the connection.
    fn poll_end(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            if self.has_ended {
                // A client that closed its sending side after a pipelined request waits for both responses.
                return if self.ahead.is_empty() { Poll::Ready(Ok(())) } else { Poll::Pending };
            }
            if self.ahead.len() >= AHEAD_BYTES_MAX {
                return Poll::Pending; // the next message resumes reading
            }
            ready!(self.poll_ahead(cx))?;
        }
    }

    fn poll_ahead(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.make_room();
        let inner = &mut self.inner;
        let read = std::pin::pin!(inner.read_buf(&mut self.ahead));
        // The future may be dropped: while it is pending it has read nothing.
        self.has_ended |= ready!(read.poll(cx))? == 0;
        Poll::Ready(Ok(()))
    }

    /// Hands on the bytes in `ahead` that belong to the current message.
    fn take_ahead(&mut self, buf: &mut ReadBuf<'_>) -> io::Result<()> {
        let len = self.ahead.len().min(buf.remaining());
        let len = match &mut self.rest {
            RemainingMessage::Bytes(left) => {
                let len = usize::try_from(*left).unwrap_or(usize::MAX).min(len);
                *left -= len as u64;
                len
            }
            RemainingMessage::Chunked(chunks) => chunks.advance(&self.ahead[..len]).map_err(|_| {
                io::Error::new(io::ErrorKind::InvalidData, "the chunked coding of the body is malformed")
            })?,
            RemainingMessage::Tunnel | RemainingMessage::Http2(..) => len,
        };
        buf.put_slice(&self.ahead[..len]);
        self.ahead.advance(len);
        Ok(())
    }

    /// Hands on the received frames. Waits for more only if there are none.
    fn poll_frames(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        while buf.remaining() > 0 {
            let RemainingMessage::Http2(frames, _) = &mut self.rest else { break };
            match frames.next(&mut self.ahead) {
                NextFrame::AsIs(bytes) => {
                    let bytes = bytes.min(buf.remaining());
                    buf.put_slice(&self.ahead[..bytes]);
                    self.ahead.advance(bytes);
                    frames.passed(bytes);
                }
                NextFrame::Rewritten => {
                    // Written before the server sees the request, since its response must follow the
                    // `100 Continue`.
                    if self.poll_owed(cx)?.is_ready() {
                        let _ = Pin::new(&mut self.inner).poll_flush(cx)?;
                    }
                    let RemainingMessage::Http2(frames, _) = &mut self.rest else { break };
                    let rewritten = frames.rewritten();
                    let bytes = rewritten.len().min(buf.remaining());
                    buf.put_slice(&rewritten[..bytes]);
                    rewritten.advance(bytes);
                }
                NextFrame::Over => break,
                NextFrame::Incomplete if self.has_ended || buf.filled().len() > before => break,
                NextFrame::Incomplete => ready!(self.poll_ahead(cx))?,
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Inserts the pending frames for the client, unless the server is within a frame or a header block.
    fn poll_owed(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let RemainingMessage::Http2(frames, written) = &mut self.rest else { return Poll::Ready(Ok(())) };
        while !frames.owed().is_empty() && written.is_between() {
            let sent = ready!(Pin::new(&mut self.inner).poll_write(cx, frames.owed()))?;
            frames.owed().advance(sent);
        }
        Poll::Ready(Ok(()))
    }

    /// Writes bytes of the server, at most up to the end of a frame if a frame must be inserted.
    fn poll_write_frames(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_owed(cx))?;
        let RemainingMessage::Http2(frames, written) = &mut self.rest else { return Poll::Ready(Ok(0)) };
        let may_write = if frames.owed().is_empty() { bytes.len() } else { written.bytes_to_boundary() };
        let bytes = &bytes[..bytes.len().min(may_write)];
        let sent = ready!(Pin::new(&mut self.inner).poll_write(cx, bytes))?;
        written.follow(&bytes[..sent]);
        Poll::Ready(Ok(sent))
    }

    /// Looks for a 101 in the head of a response, which Pingora writes in one piece. After an interim
    /// response another head follows.
    fn note_answer(&mut self, head: &[u8]) {
        if head.starts_with(SWITCHING) {
            self.rest = RemainingMessage::Tunnel;
        }
        self.wants_upgrade = head.starts_with(INTERIM) && !head.starts_with(SWITCHING);
    }

    /// Makes a write fail that has made no progress for `write_timeout`.
    fn unless_stalled<T>(
        &mut self,
        polled: Poll<io::Result<T>>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<T>> {
        if polled.is_ready() {
            self.stalled = None;
            return polled;
        }
        let timeout = self.write_timeout;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(tokio::time::sleep(timeout)));
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for GuardedStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.rest.is_done() {
            return this.poll_end(cx);
        }
        if matches!(this.rest, RemainingMessage::Http2(..)) {
            return this.poll_frames(cx, buf);
        }
        if this.ahead.is_empty() {
            match &mut this.rest {
                RemainingMessage::Tunnel | RemainingMessage::Http2(..) => {
                    return Pin::new(&mut this.inner).poll_read(cx, buf);
                }
                // The rest of the body belongs to the message, so it is read directly, without this buffer.
                RemainingMessage::Bytes(left) => {
                    let before = buf.filled().len();
                    ready!(Pin::new(&mut (&mut this.inner).take(*left)).poll_read(cx, buf))?;
                    *left -= (buf.filled().len() - before) as u64;
                    return Poll::Ready(Ok(()));
                }
                RemainingMessage::Chunked(_) => ready!(this.poll_ahead(cx))?,
            }
        }
        Poll::Ready(this.take_ahead(buf))
    }
}

impl AsyncWrite for GuardedStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.wants_upgrade {
            this.note_answer(buf);
        }
        let polled = if matches!(this.rest, RemainingMessage::Http2(..)) {
            this.poll_write_frames(cx, buf)
        } else {
            Pin::new(&mut this.inner).poll_write(cx, buf)
        };
        this.unless_stalled(polled, cx)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let polled = match this.poll_owed(cx) {
            Poll::Ready(Ok(())) => Pin::new(&mut this.inner).poll_flush(cx),
            other => other,
        };
        this.unless_stalled(polled, cx)
    }

    /// Ready when a client that may still be sending has closed its side, or after `LINGER_MAX`.
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let polled = this.poll_close(cx);
        if polled.is_ready() {
            return polled;
        }
        let until = this.end.until.get_or_insert_with(|| Box::pin(tokio::time::sleep(LINGER_MAX)));
        until.as_mut().poll(cx).map(Ok)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if matches!(this.rest, RemainingMessage::Http2(..)) {
            let first = bufs.iter().find(|buf| !buf.is_empty());
            return Pin::new(this).poll_write(cx, first.map_or(&[], |buf| &buf[..]));
        }
        let polled = Pin::new(&mut this.inner).poll_write_vectored(cx, bufs);
        this.unless_stalled(polled, cx)
    }

    fn is_write_vectored(&self) -> bool {
        // HTTP/2 writes must be cut at frame boundaries, and TLS gains nothing from vectored writes.
        self.inner.is_write_vectored() && !matches!(self.rest, RemainingMessage::Http2(..))
    }
}

#[async_trait]
impl Shutdown for GuardedStream {
    async fn shutdown(&mut self) {
        let _ = AsyncWriteExt::shutdown(self).await;
    }
}

impl fmt::Debug for GuardedStream {
    /// Omits the data, which may contain a key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuardedStream").field("rest", &self.rest).finish_non_exhaustive()
    }
}

impl UniqueID for GuardedStream {
    fn id(&self) -> UniqueIDType {
        self.inner.get_ref().id()
    }
}

impl Ssl for GuardedStream {
    fn get_ssl(&self) -> Option<&TlsRef> {
        self.inner.get_ref().get_ssl()
    }

    fn get_ssl_digest(&self) -> Option<Arc<SslDigest>> {
        self.inner.get_ref().get_ssl_digest()
    }

    fn selected_alpn_proto(&self) -> Option<ALPN> {
        self.inner.get_ref().selected_alpn_proto()
    }
}

impl GetTimingDigest for GuardedStream {
    fn get_timing_digest(&self) -> Vec<Option<TimingDigest>> {
        self.inner.get_ref().get_timing_digest()
    }

    fn get_read_pending_time(&self) -> Duration {
        self.inner.get_ref().get_read_pending_time()
    }

    fn get_write_pending_time(&self) -> Duration {
        self.inner.get_ref().get_write_pending_time()
    }
}

impl GetProxyDigest for GuardedStream {
    fn get_proxy_digest(&self) -> Option<Arc<ProxyDigest>> {
        self.inner.get_ref().get_proxy_digest()
    }
}

impl GetSocketDigest for GuardedStream {
    fn get_socket_digest(&self) -> Option<Arc<SocketDigest>> {
        self.inner.get_ref().get_socket_digest()
    }
}

impl Peek for GuardedStream {}
