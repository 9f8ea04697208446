//! What a process prints: read as it arrives, and kept up to a bound.
//!
//! A process in handler mode prints into the same pipes in every run. It answers when all that it has printed
//! is in them. So what is there at that moment belongs to the run, and what comes later to none.

use nix::errno::Errno;
use nix::unistd;
use std::io;
use std::os::fd::OwnedFd;
use std::process::{ChildStderr, ChildStdout};
use tokio::net::unix::pipe::Receiver;

/// Bytes of one read.
const CHUNK_BYTES: usize = 8 * 1024;
/// Most reads of a stream before others get their turn.
const READS_MAX: usize = 16;
/// Most bytes that are in a pipe. A process may enlarge its pipes up to this (`fs.pipe-max-size`).
const PIPE_BYTES_MAX: usize = 1 << 20;

/// The pipes of one process.
#[derive(Debug)]
pub(super) struct OutputPipes {
    stdout: OutputPipe,
    stderr: OutputPipe,
}

/// What one run has printed.
#[derive(Debug)]
pub(super) struct RunOutput {
    pub(super) stdout: Capture,
    pub(super) stderr: Capture,
}

impl RunOutput {
    /// `bytes_max`: the most bytes that are kept of each stream. The rest is read and discarded, so that the
    /// run never blocks.
    pub(super) fn new(bytes_max: usize) -> Self {
        Self { stdout: Capture::new(bytes_max), stderr: Capture::new(bytes_max) }
    }
}

impl OutputPipes {
    pub(super) fn new(stdout: Option<ChildStdout>, stderr: Option<ChildStderr>) -> io::Result<Self> {
        let pipe = |end: Option<OwnedFd>| end.map(Receiver::from_owned_fd).transpose().map(OutputPipe);
        Ok(Self { stdout: pipe(stdout.map(OwnedFd::from))?, stderr: pipe(stderr.map(OwnedFd::from))? })
    }

    /// Reads until both streams are closed. Cancel safe.
    pub(super) async fn read(&mut self, to: &mut RunOutput) {
        while self.stdout.is_open() || self.stderr.is_open() {
            tokio::select! {
                () = self.stdout.ready() => self.stdout.take(&mut to.stdout),
                () = self.stderr.ready() => self.stderr.take(&mut to.stderr),
            }
        }
    }

    /// Reads what is in the pipes now.
    pub(super) fn drain(&mut self, to: &mut RunOutput) {
        self.stdout.drain(|chunk| to.stdout.add(chunk));
        self.stderr.drain(|chunk| to.stderr.add(chunk));
    }

    /// Discards what is in the pipes now.
    pub(super) fn discard(&mut self) {
        self.stdout.drain(|_| {});
        self.stderr.drain(|_| {});
    }
}

/// One pipe. `None`: it is closed.
#[derive(Debug)]
struct OutputPipe(Option<Receiver>);

impl OutputPipe {
    fn is_open(&self) -> bool {
        self.0.is_some()
    }

    /// Waits until there is something to read. Never returns if the pipe is closed.
    async fn ready(&self) {
        match &self.0 {
            // The next read finds the same error.
            Some(pipe) => drop(pipe.readable().await),
            None => std::future::pending().await,
        }
    }

    /// Reads what the runtime has announced.
    fn take(&mut self, to: &mut Capture) {
        let mut chunk = [0; CHUNK_BYTES];
        for _ in 0..READS_MAX {
            let Some(pipe) = &self.0 else { return };
            match pipe.try_read(&mut chunk) {
                Ok(read @ 1..) => to.add(&chunk[..read]),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // An error ends the output as well, because no error of a pipe goes away with a retry.
                Ok(_) | Err(_) => self.0 = None,
            }
        }
    }

    /// Reads what is in the pipe now. It asks the kernel, because the runtime may not have noticed yet what
    /// was written just now.
    fn drain(&mut self, mut each: impl FnMut(&[u8])) {
        let mut chunk = [0; CHUNK_BYTES];
        let mut drained = 0;
        while drained < PIPE_BYTES_MAX {
            let Some(pipe) = &self.0 else { return };
            match unistd::read(pipe, &mut chunk) {
                Ok(read @ 1..) => {
                    drained += read;
                    each(&chunk[..read]);
                }
                Err(Errno::EAGAIN) => return,
                Err(Errno::EINTR) => {}
                Ok(_) | Err(_) => self.0 = None,
            }
        }
    }
}

/// The first bytes of a stream.
#[derive(Debug)]
pub(super) struct Capture {
    kept: Vec<u8>,
    bytes: u64,
    bytes_max: usize,
}

impl Capture {
    fn new(bytes_max: usize) -> Self {
        Self { kept: Vec::new(), bytes: 0, bytes_max }
    }

    fn add(&mut self, chunk: &[u8]) {
        self.bytes += chunk.len() as u64;
        let room = self.bytes_max.saturating_sub(self.kept.len());
        self.kept.extend_from_slice(&chunk[..chunk.len().min(room)]);
    }

    /// Adds a line of the worker. It begins at the start of a line.
    pub(super) fn add_line(&mut self, line: &str) {
        if self.kept.last().is_some_and(|last| *last != b'\n') {
            self.add(b"\n");
        }
        self.add(line.as_bytes());
        self.add(b"\n");
    }

    pub(super) fn text(mut self) -> String {
        let is_cut = self.bytes > self.kept.len() as u64;
        if let (true, Err(e)) = (is_cut, std::str::from_utf8(&self.kept))
            && e.error_len().is_none()
        {
            // The cut is inside a character.
            self.kept.truncate(e.valid_up_to());
        }
        let text = String::from_utf8(self.kept);
        let mut text = text.unwrap_or_else(|e| String::from_utf8_lossy(e.as_bytes()).into_owned());
        if is_cut {
            text.push_str(&format!("\n[cut: the whole output has {} bytes]", self.bytes));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{PipeWriter, Write};
    use std::time::Duration;

    fn pipes(bytes_max: usize) -> (OutputPipes, RunOutput, PipeWriter, PipeWriter) {
        let (stdout, out) = io::pipe().unwrap();
        let (stderr, err) = io::pipe().unwrap();
        let receiver = |end: io::PipeReader| OutputPipe(Some(Receiver::from_owned_fd(end.into()).unwrap()));
        let pipes = OutputPipes { stdout: receiver(stdout), stderr: receiver(stderr) };
        (pipes, RunOutput::new(bytes_max), out, err)
    }

    #[tokio::test]
    async fn both_streams_are_read_to_their_ends() {
        let (mut pipes, mut output, mut out, mut err) = pipes(1 << 20);
        let writer = std::thread::spawn(move || {
            err.write_all(b"error").unwrap();
            drop(err);
            // More than a pipe holds.
            out.write_all(&[b'x'; 300_000]).unwrap();
        });
        tokio::time::timeout(Duration::from_secs(30), pipes.read(&mut output)).await.unwrap();
        writer.join().unwrap();
        assert_eq!((output.stdout.text().len(), output.stderr.text().as_str()), (300_000, "error"));
    }

    #[tokio::test]
    async fn what_was_just_written_is_drained_and_what_is_late_is_discarded() {
        let (mut pipes, mut output, mut out, mut err) = pipes(1 << 20);
        for _ in 0..3 {
            out.write_all(b"a").unwrap();
            err.write_all(&[b'e'; 20_000]).unwrap();
            pipes.drain(&mut output);
            out.write_all(b"late").unwrap();
            pipes.discard();
        }
        drop(out);
        pipes.drain(&mut output);
        assert!(!pipes.stdout.is_open() && pipes.stderr.is_open());
        assert_eq!((output.stdout.text().as_str(), output.stderr.text().len()), ("aaa", 60_000));
    }

    #[test]
    fn output_is_cut_between_characters() {
        for (bytes_max, chunks, expected) in [
            (10, &[&b"abc"[..], b"def"][..], "abcdef"),
            (3, &[b"abc"], "abc"),
            (3, &[b"ab", b"cdef"], "abc\n[cut: the whole output has 6 bytes]"),
            (3, &["aää".as_bytes()], "aä\n[cut: the whole output has 5 bytes]"),
            (4, &["aää".as_bytes()], "aä\n[cut: the whole output has 5 bytes]"),
            (9, &[b"a\xff\xfeb"], "a\u{fffd}\u{fffd}b"),
            (3, &[b"a\xffbc"], "a\u{fffd}b\n[cut: the whole output has 4 bytes]"),
            // Half a character at the end of the output itself.
            (9, &[b"a\xc3"], "a\u{fffd}"),
        ] {
            let mut capture = Capture::new(bytes_max);
            chunks.iter().for_each(|chunk| capture.add(chunk));
            assert_eq!(capture.text(), expected);
        }
    }

    #[test]
    fn a_line_of_the_worker_stands_alone() {
        for (before, expected) in [("", "{}\n"), ("x", "x\n{}\n"), ("x\n", "x\n{}\n")] {
            let mut capture = Capture::new(100);
            capture.add(before.as_bytes());
            capture.add_line("{}");
            assert_eq!(capture.text(), expected);
        }
    }
}
