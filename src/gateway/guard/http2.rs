//! Checks what an HTTP/2 client sends, frame by frame, and rewrites its header blocks.
//!
//! As over HTTP/1.1, an ambiguous request is rejected (RFC 9113, section 8). `h2` would silently repair some
//! of them, such as a fragment in the path. To others `h2` or Pingora would send responses of their own, for
//! example if `:authority` is missing or differs from `Host`.
//!
//! A rejected request is replaced by an empty one with a marker field, which the gateway answers with a
//! problem. So its stream ends in order, and the response is counted and measured like any other. Frames
//! other than header blocks pass unchanged.

pub mod request;

use super::head::HeadLimits;
use super::hpack::{HpackDecoder, TABLE_BYTES_MAX};
use bytes::{Buf, BufMut, BytesMut};
use request::Request;
use std::fmt;

/// The connection preface of the client (RFC 9113, section 3.4).
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

const FRAME_HEAD_BYTES: usize = 9;
/// The longest payload of a frame, in bytes. It is HTTP/2's initial value; the server never advertises a
/// larger one.
const PAYLOAD_BYTES_MAX: usize = 16_384;
/// The most frames of one header block.
const BLOCK_FRAMES_MAX: usize = 64;
/// The connection ends if a header block exceeds this multiple of the limit for header lists.
const BLOCK_TIMES_MAX: usize = 4;
/// The limit for frames that wait to be written to the client, in bytes. Further ones are dropped.
const OWED_BYTES_MAX: usize = 4096;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const PUSH_PROMISE: u8 = 5;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

/// The header block of a `100 Continue`: `:status` by its index in the static table, and a literal value.
const CONTINUE: &[u8] = b"\x08\x03100";

/// The next step for the received bytes.
#[derive(Debug, PartialEq, Eq)]
pub enum NextFrame {
    /// Hand on this number of received bytes unchanged.
    AsIs(usize),
    /// Hand on the rewritten bytes, which replace received ones.
    Rewritten,
    /// More bytes must be received first.
    Incomplete,
    /// Nothing more: a connection error. The last rewritten bytes made the server end the connection.
    Over,
}

/// Reads the frames of one client connection.
pub struct ClientFrames {
    limits: HeadLimits,
    /// Bytes of the preface or a frame that are still to be handed on unchanged.
    passing: usize,
    decoder: HpackDecoder,
    block: Option<Block>,
    /// The highest stream id that the client has opened.
    last_stream: u32,
    rewritten: BytesMut,
    /// `100 Continue` frames to be written to the client.
    owed: BytesMut,
    /// The client has reduced its dynamic table below the initial size. The next block sent to it must begin
    /// with a table size update (RFC 7541, section 4.2). Only the server knows which block that is, so none
    /// is inserted here.
    has_small_table: bool,
    request: Request,
    is_broken: bool,
}

/// Tracks the frames that the server writes, to find the places where another frame may be inserted.
#[derive(Debug, Default)]
pub struct ServerFrameTracker {
    head: [u8; FRAME_HEAD_BYTES],
    head_bytes: usize,
    /// Remaining bytes of the payload.
    left: usize,
    /// The header block continues in the next frame. No frame may be inserted before that.
    is_in_block: bool,
}

impl ServerFrameTracker {
    /// Whether a frame may be inserted now.
    pub fn is_between(&self) -> bool {
        self.head_bytes == 0 && self.left == 0 && !self.is_in_block
    }

    /// How many bytes the server may write before `is_between` must be checked again.
    pub fn bytes_to_boundary(&self) -> usize {
        match (self.left, FRAME_HEAD_BYTES - self.head_bytes) {
            (0, of_head) => of_head,
            (of_payload, _) => of_payload,
        }
    }

    pub fn follow(&mut self, bytes: &[u8]) {
        let mut bytes = bytes;
        while !bytes.is_empty() {
            if self.left > 0 {
                let payload = self.left.min(bytes.len());
                self.left -= payload;
                bytes = &bytes[payload..];
                continue;
            }
            let part = (FRAME_HEAD_BYTES - self.head_bytes).min(bytes.len());
            self.head[self.head_bytes..self.head_bytes + part].copy_from_slice(&bytes[..part]);
            self.head_bytes += part;
            bytes = &bytes[part..];
            if let Some(head) = FrameHead::read(&self.head[..self.head_bytes]) {
                (self.left, self.head_bytes) = (head.len, 0);
                if matches!(head.kind, HEADERS | PUSH_PROMISE | CONTINUATION) {
                    self.is_in_block = head.flags & END_HEADERS == 0;
                }
            }
        }
    }
}

impl fmt::Debug for ClientFrames {
    /// Omits the data, which may contain a key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Frames").field("last_stream", &self.last_stream).finish_non_exhaustive()
    }
}

/// An incomplete header block.
struct Block {
    stream: u32,
    ends_stream: bool,
    frames: usize,
    bytes: Vec<u8>,
}

struct FrameHead {
    len: usize,
    kind: u8,
    flags: u8,
    stream: u32,
}

impl FrameHead {
    fn read(mut bytes: &[u8]) -> Option<Self> {
        if bytes.len() < FRAME_HEAD_BYTES {
            return None;
        }
        let len = bytes.get_uint(3) as usize;
        let (kind, flags) = (bytes.get_u8(), bytes.get_u8());
        Some(Self { len, kind, flags, stream: bytes.get_u32() & 0x7fff_ffff })
    }
}

/// Whether a client's SETTINGS reduce the dynamic table below its initial size (RFC 9113, section 6.5.2).
fn asks_for_small_table(settings: &[u8]) -> bool {
    const HEADER_TABLE_SIZE: u16 = 1;
    settings.chunks_exact(6).any(|mut setting| {
        setting.get_u16() == HEADER_TABLE_SIZE && (setting.get_u32() as usize) < TABLE_BYTES_MAX
    })
}

fn put_frame_head(to: &mut BytesMut, len: usize, kind: u8, flags: u8, stream: u32) {
    to.put_uint(len as u64, 3);
    to.put_u8(kind);
    to.put_u8(flags);
    to.put_u32(stream);
}

impl ClientFrames {
    /// For a connection whose next bytes are the preface.
    pub fn new(limits: HeadLimits) -> Self {
        Self {
            limits,
            passing: PREFACE.len(),
            decoder: HpackDecoder::default(),
            block: None,
            last_stream: 0,
            rewritten: BytesMut::new(),
            owed: BytesMut::new(),
            has_small_table: false,
            request: Request::default(),
            is_broken: false,
        }
    }

    /// Processes the received bytes. Consumes the frames that it rewrites; the caller consumes what it hands
    /// on unchanged, and reports that with `passed`.
    pub fn next(&mut self, come: &mut BytesMut) -> NextFrame {
        loop {
            if !self.rewritten.is_empty() {
                return NextFrame::Rewritten;
            }
            if self.is_broken {
                return NextFrame::Over;
            }
            if self.passing > 0 {
                return match self.passing.min(come.len()) {
                    0 => NextFrame::Incomplete,
                    bytes => NextFrame::AsIs(bytes),
                };
            }
            let Some(head) = FrameHead::read(come) else { return NextFrame::Incomplete };
            let continues = self.block.is_some();
            if !matches!(head.kind, HEADERS | CONTINUATION) {
                if continues {
                    self.give_up(); // another frame within a header block
                    continue;
                }
                if head.kind == SETTINGS && head.len <= PAYLOAD_BYTES_MAX {
                    let Some(settings) = come.get(FRAME_HEAD_BYTES..FRAME_HEAD_BYTES + head.len) else {
                        return NextFrame::Incomplete;
                    };
                    self.has_small_table |= asks_for_small_table(settings);
                }
                self.passing = FRAME_HEAD_BYTES + head.len;
                continue;
            }
            if head.len > PAYLOAD_BYTES_MAX {
                // The frame head is enough for the server to report a frame size error.
                self.rewritten.put_slice(&come[..FRAME_HEAD_BYTES]);
                self.is_broken = true;
                continue;
            }
            if (head.kind == CONTINUATION) != continues {
                self.give_up();
                continue;
            }
            if come.len() < FRAME_HEAD_BYTES + head.len {
                return NextFrame::Incomplete;
            }
            let end = FRAME_HEAD_BYTES + head.len;
            if self.fragment(&head, &come[FRAME_HEAD_BYTES..end]).is_none() {
                self.give_up();
            }
            come.advance(end);
        }
    }

    /// The caller has consumed this number of the bytes that `next` reported as `AsIs`.
    pub fn passed(&mut self, bytes: usize) {
        self.passing -= bytes;
    }

    /// The rewritten bytes, which the caller consumes.
    pub fn rewritten(&mut self) -> &mut BytesMut {
        &mut self.rewritten
    }

    /// Bytes to insert between two frames of the server, which the caller consumes.
    pub fn owed(&mut self) -> &mut BytesMut {
        &mut self.owed
    }

    /// Makes the server end the connection: a header block on stream 0 is a connection error.
    fn give_up(&mut self) {
        put_frame_head(&mut self.rewritten, 0, HEADERS, END_HEADERS, 0);
        self.is_broken = true;
    }

    /// Processes one frame of a header block. `None`: a connection error.
    fn fragment(&mut self, head: &FrameHead, payload: &[u8]) -> Option<()> {
        let mut payload = payload;
        let mut block = match self.block.take() {
            Some(block) if block.stream == head.stream => block,
            Some(_) => return None,
            None => {
                let padding =
                    if head.flags & PADDED == 0 { 0 } else { usize::from(payload.try_get_u8().ok()?) };
                if head.flags & PRIORITY != 0 {
                    payload = payload.get(5..)?;
                }
                payload = payload.get(..payload.len().checked_sub(padding)?)?;
                let ends_stream = head.flags & END_STREAM != 0;
                Block { stream: head.stream, ends_stream, frames: 0, bytes: Vec::new() }
            }
        };
        block.frames += 1;
        // A list that is too large is still decoded, up to this bound. So the request gets a response, and
        // the dynamic table stays in step with the client's.
        let bytes_max = BLOCK_TIMES_MAX * self.limits.bytes_max;
        if block.frames > BLOCK_FRAMES_MAX || block.bytes.len() + payload.len() > bytes_max {
            return None;
        }
        let is_last = head.flags & END_HEADERS != 0;
        if is_last && block.bytes.is_empty() {
            return self.header_block(block.stream, block.ends_stream, payload);
        }
        block.bytes.extend_from_slice(payload);
        if is_last {
            return self.header_block(block.stream, block.ends_stream, &block.bytes);
        }
        self.block = Some(block);
        Some(())
    }

    fn header_block(&mut self, stream: u32, ends_stream: bool, block: &[u8]) -> Option<()> {
        let (request, limits) = (&mut self.request, self.limits);
        request.clear();
        if stream <= self.last_stream {
            // A trailer section is dropped, as over HTTP/1.1: Pingora does not forward trailers.
            self.decoder.decode(block, |_| {}).ok()?;
            let kind = if ends_stream { DATA } else { HEADERS };
            let flags = if ends_stream { END_STREAM } else { END_HEADERS };
            put_frame_head(&mut self.rewritten, 0, kind, flags, stream);
            return Some(());
        }
        self.last_stream = stream;
        self.decoder.decode(block, |field| request.field(field, limits)).ok()?;
        request.end();
        let may_be_told = !self.has_small_table && self.owed.len() < OWED_BYTES_MAX;
        if request.is_awaited && !ends_stream && may_be_told {
            // Pingora sends no `100 Continue` over HTTP/2, so the client would wait until its own timeout.
            // The request may still be rejected later. The body sent until then is bounded by the
            // flow-control window.
            put_frame_head(&mut self.owed, CONTINUE.len(), HEADERS, END_HEADERS, stream);
            self.owed.put_slice(CONTINUE);
        }
        self.write(stream, ends_stream);
        Some(())
    }

    /// Writes the rewritten block of the request as HEADERS and CONTINUATION frames.
    fn write(&mut self, stream: u32, ends_stream: bool) {
        let block = &self.request.block;
        let mut fragments = block.chunks(PAYLOAD_BYTES_MAX).peekable();
        let (mut kind, mut flags) = (HEADERS, if ends_stream { END_STREAM } else { 0 });
        loop {
            let fragment = fragments.next().unwrap_or_default();
            let is_last = fragments.peek().is_none();
            flags |= if is_last { END_HEADERS } else { 0 };
            put_frame_head(&mut self.rewritten, fragment.len(), kind, flags, stream);
            self.rewritten.put_slice(fragment);
            if is_last {
                return;
            }
            (kind, flags) = (CONTINUATION, 0);
        }
    }
}

#[cfg(test)]
mod tests;
