//! The buffer and the thread between log calls and standard output.
//!
//! A log call only appends to a buffer. One thread writes the buffer shortly after its first line arrived, so
//! many lines share one system call and one wake-up. If standard output blocks, the thread waits, the buffer
//! fills, and further lines are dropped and counted; requests never wait. Lines that cannot be written,
//! because standard output is closed or its disk is full, are counted as well.

use nix::errno::Errno;
use parking_lot::{Condvar, Mutex};
use std::io::{self, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Most bytes in the buffer. A line that does not fit is dropped.
const WAITING_BYTES_MAX: usize = 16 << 20;
/// How long lines are buffered before they are written.
const LINGER: Duration = Duration::from_millis(5);

static LINES: Lines = Lines::new();

struct Lines {
    waiting: Mutex<LineBuffer>,
    changed: Condvar,
    dropped: AtomicUsize,
}

struct LineBuffer {
    bytes: Vec<u8>,
    is_closed: bool,
    /// The writer has written everything and has ended.
    is_over: bool,
}

/// Pause before a retry when standard output would block. Only the writer waits.
const PAUSE: Duration = Duration::from_millis(10);

/// Number of lines that were dropped, because the buffer was full or standard output failed.
pub fn lines_dropped() -> usize {
    LINES.dropped.load(Ordering::Relaxed)
}

/// Starts the writer.
pub(super) fn start() -> LinesGuard {
    let write = || LINES.write_to(&mut Stdout);
    if std::thread::Builder::new().name("log".to_owned()).spawn(write).is_err() {
        LINES.waiting.lock().is_over = true; // every line is dropped and counted
    }
    LinesGuard(())
}

/// Writes the buffered lines and ends the writer. Gives up after [`WRITTEN_WITHIN`].
pub fn finish() {
    LINES.finish(WRITTEN_WITHIN);
}

/// Deadline for writing the last lines.
const WRITTEN_WITHIN: Duration = Duration::from_secs(2);

/// Calls [`finish`] when dropped.
pub struct LinesGuard(());

impl Drop for LinesGuard {
    fn drop(&mut self) {
        finish();
    }
}

/// Standard output without a buffer. Bytes that a failed write leaves in a buffer would not be counted.
struct Stdout;

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match nix::unistd::write(io::stdout(), bytes) {
                Err(Errno::EINTR) => {}
                // Another process that shares the file has made it non-blocking.
                Err(Errno::EAGAIN) => {
                    #[expect(clippy::disallowed_methods, reason = "the thread of the log has no runtime")]
                    std::thread::sleep(PAUSE);
                }
                written => return Ok(written?),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Receives one line in a single `write`.
pub(super) struct LogLine;

impl Write for LogLine {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        LINES.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Lines {
    const fn new() -> Self {
        let waiting = LineBuffer { bytes: Vec::new(), is_closed: false, is_over: false };
        Self { waiting: Mutex::new(waiting), changed: Condvar::new(), dropped: AtomicUsize::new(0) }
    }

    fn push(&self, line: &[u8]) {
        let mut waiting = self.waiting.lock();
        if waiting.is_over || waiting.bytes.len() + line.len() > WAITING_BYTES_MAX {
            drop(waiting);
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        // The writer sleeps only while the buffer is empty.
        let is_first = waiting.bytes.is_empty();
        waiting.bytes.extend_from_slice(line);
        drop(waiting);
        if is_first {
            self.changed.notify_all();
        }
    }

    fn finish(&self, within: Duration) {
        let mut waiting = self.waiting.lock();
        waiting.is_closed = true;
        self.changed.notify_all();
        self.changed.wait_while_for(&mut waiting, |waiting| !waiting.is_over, within);
    }

    /// Writes lines as they arrive, until the buffer is closed.
    fn write_to(&self, out: &mut dyn Write) {
        let mut bytes = Vec::new();
        while self.gather(&mut bytes) {
            // A write error does not end the writer, because standard output may work again.
            let lost = write_lines(out, &bytes);
            self.dropped.fetch_add(lost, Ordering::Relaxed);
        }
        self.waiting.lock().is_over = true;
        self.changed.notify_all();
    }

    /// Waits for lines and swaps them into `bytes`. `false`: the buffer is closed and empty.
    fn gather(&self, bytes: &mut Vec<u8>) -> bool {
        bytes.clear();
        let mut waiting = self.waiting.lock();
        let idle = |waiting: &mut LineBuffer| waiting.bytes.is_empty() && !waiting.is_closed;
        self.changed.wait_while(&mut waiting, idle);
        self.changed.wait_while_for(&mut waiting, |waiting| !waiting.is_closed, LINGER);
        std::mem::swap(&mut waiting.bytes, bytes);
        !bytes.is_empty()
    }
}

/// Writes as many lines as `out` accepts, and returns the number of lines that were not written completely.
fn write_lines(out: &mut dyn Write, lines: &[u8]) -> usize {
    let mut rest = lines;
    while !rest.is_empty() {
        match out.write(rest) {
            Ok(0) | Err(_) => break,
            Ok(written) => rest = rest.get(written..).unwrap_or_default(),
        }
    }
    memchr::memchr_iter(b'\n', rest).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_written_completely_and_in_order_including_the_last() {
        let lines = Lines::new();
        let mut out = Vec::new();
        std::thread::scope(|scope| {
            scope.spawn(|| lines.write_to(&mut out));
            for n in 0..1000 {
                lines.push(format!("{n}\n").as_bytes());
            }
            lines.finish(WRITTEN_WITHIN);
        });
        let expected: String = (0..1000).map(|n| format!("{n}\n")).collect();
        assert_eq!(String::from_utf8(out).unwrap(), expected);
        assert_eq!(lines.dropped.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn lines_beyond_the_buffer_are_dropped_and_counted() {
        let lines = Lines::new();
        let line = vec![b'x'; WAITING_BYTES_MAX / 4];
        for _ in 0..6 {
            lines.push(&line);
        }
        assert_eq!(lines.dropped.load(Ordering::Relaxed), 2);
        assert_eq!(lines.waiting.lock().bytes.len(), WAITING_BYTES_MAX);
    }

    /// Accepts this many bytes, three at a time, and then fails.
    struct Takes(usize);

    impl Write for Takes {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let taken = bytes.len().min(self.0).min(3);
            self.0 -= taken;
            if taken == 0 { Err(io::ErrorKind::BrokenPipe.into()) } else { Ok(taken) }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn lines_that_cannot_be_written_are_counted() {
        for (taken, lost) in [(0, 4), (3, 4), (4, 3), (5, 3), (16, 0)] {
            assert_eq!(write_lines(&mut Takes(taken), b"one\ntwo\n666\n777\n"), lost, "{taken} bytes");
        }
        let lines = Lines::new();
        std::thread::scope(|scope| {
            scope.spawn(|| lines.write_to(&mut Takes(8)));
            for n in 0..1000 {
                lines.push(format!("{n:03}\n").as_bytes());
            }
            lines.finish(WRITTEN_WITHIN);
        });
        lines.push(b"after the end\n");
        assert_eq!(lines.dropped.load(Ordering::Relaxed), 999);
    }
}
