//! Lines on their way to standard output.
//!
//! Who logs only appends to a buffer. One thread writes what has gathered, a moment after the first line of
//! it came: one system call and one wake-up for many lines. When nobody reads our standard output the thread
//! waits, the buffer fills, and lines are dropped and counted; requests never wait. Lines that standard
//! output does not take, as it is closed or its disk full, are counted, too.

use nix::errno::Errno;
use std::io::{self, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Most bytes that wait for the writer; a line past them is dropped.
const WAITING_BYTES_MAX: usize = 16 << 20;
/// How long lines gather before they are written.
const LINGER: Duration = Duration::from_millis(5);

static LINES: Lines = Lines::new();

struct Lines {
    waiting: Mutex<Waiting>,
    changed: Condvar,
    dropped: AtomicUsize,
}

struct Waiting {
    bytes: Vec<u8>,
    is_closed: bool,
    /// The writer has written all and is gone.
    is_over: bool,
}

/// Until a standard output that takes nothing now is tried again; the thread alone waits.
const PAUSE: Duration = Duration::from_millis(10);

/// How many lines were lost: nobody read them, or standard output did not take them.
pub fn lines_dropped() -> usize {
    LINES.dropped.load(Ordering::Relaxed)
}

/// Starts the writer.
pub(super) fn start() -> LinesGuard {
    let write = || LINES.write_to(&mut Stdout);
    if std::thread::Builder::new().name("log".to_owned()).spawn(write).is_err() {
        LINES.waiting().is_over = true; // nothing is written
    }
    LinesGuard(())
}

/// Writes what is left, if anybody reads it, and ends the writer.
pub fn finish() {
    LINES.finish(WRITTEN_WITHIN);
}

/// How long the end waits for somebody to read the last lines.
const WRITTEN_WITHIN: Duration = Duration::from_secs(2);

/// Dropping it [`finish`]es.
pub struct LinesGuard(());

impl Drop for LinesGuard {
    fn drop(&mut self) {
        finish();
    }
}

/// Standard output without a buffer: what a failed write leaves in one would be neither written nor counted.
struct Stdout;

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match nix::unistd::write(io::stdout(), bytes) {
                Err(Errno::EINTR) => {}
                // Whoever shares it with us has said that nobody shall wait for it.
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

/// One line; handed over by a single `write`.
pub(super) struct Line;

impl Write for Line {
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
        let waiting = Waiting { bytes: Vec::new(), is_closed: false, is_over: false };
        Self { waiting: Mutex::new(waiting), changed: Condvar::new(), dropped: AtomicUsize::new(0) }
    }

    fn push(&self, line: &[u8]) {
        let mut waiting = self.waiting();
        if waiting.is_over || waiting.bytes.len() + line.len() > WAITING_BYTES_MAX {
            drop(waiting);
            self.dropped.fetch_add(1, Ordering::Relaxed);
            return;
        }
        // The writer sleeps only while there is nothing.
        let is_first = waiting.bytes.is_empty();
        waiting.bytes.extend_from_slice(line);
        drop(waiting);
        if is_first {
            self.changed.notify_all();
        }
    }

    fn finish(&self, within: Duration) {
        let mut waiting = self.waiting();
        waiting.is_closed = true;
        self.changed.notify_all();
        let not_over = |waiting: &mut Waiting| !waiting.is_over;
        drop(self.changed.wait_timeout_while(waiting, within, not_over));
    }

    /// Writes lines as they come, until closed.
    fn write_to(&self, out: &mut dyn Write) {
        let mut bytes = Vec::new();
        while self.gather(&mut bytes) {
            // A closed standard output is no reason to stop; there is nobody to tell.
            let lost = write_lines(out, &bytes);
            self.dropped.fetch_add(lost, Ordering::Relaxed);
        }
        self.waiting().is_over = true;
        self.changed.notify_all();
    }

    /// Waits for lines and swaps them in; `false`: closed and nothing is left.
    fn gather(&self, bytes: &mut Vec<u8>) -> bool {
        bytes.clear();
        let idle = |waiting: &mut Waiting| waiting.bytes.is_empty() && !waiting.is_closed;
        let waiting = self.changed.wait_while(self.waiting(), idle).unwrap_or_else(PoisonError::into_inner);
        let open = |waiting: &mut Waiting| !waiting.is_closed;
        let lingered = self.changed.wait_timeout_while(waiting, LINGER, open);
        let (mut waiting, _) = lingered.unwrap_or_else(PoisonError::into_inner);
        std::mem::swap(&mut waiting.bytes, bytes);
        !bytes.is_empty()
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Writes lines as far as they are taken, and gives the number of those that were not, whole.
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
    fn lines_come_whole_and_in_order_and_the_last_ones_too() {
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
    fn what_nobody_reads_is_dropped_and_counted() {
        let lines = Lines::new();
        let line = vec![b'x'; WAITING_BYTES_MAX / 4];
        for _ in 0..6 {
            lines.push(&line);
        }
        assert_eq!(lines.dropped.load(Ordering::Relaxed), 2);
        assert_eq!(lines.waiting().bytes.len(), WAITING_BYTES_MAX);
    }

    /// Takes so many bytes, three at a time, and then no more.
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
    fn what_is_not_taken_is_counted() {
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
