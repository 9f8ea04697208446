//! Log lines: one JSON object a line, `level` and `msg` first.
//!
//! `tracing-subscriber`'s own JSON format was rejected: it nests the message under `fields`, and the lines of
//! CONTRACT §8 are read by tools that expect `level` and `msg` at the top. `tracing-appender` was tried and rejected: it
//! makes one system call a line. Here lines gather in a buffer, and one thread writes what has gathered ([`lines`]).

mod lines;

pub use lines::{LinesGuard, finish, lines_dropped};

use crate::model::{Rfc3339Ms, now_ms};
use std::fmt::{self, Write};
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

/// What is logged unless `RUST_LOG` says otherwise. Libraries warn of what we handle and report ourselves, some of
/// them with whole responses; Pingora calls every client that leaves an error.
const FILTER_DEFAULT: &str = "error,infra_controller=info,pingora=off,pingora_core=off,pingora_proxy=off";

/// Starts logging to standard output. Call once; dropping the guard writes what is left.
pub fn start() -> LinesGuard {
    let guard = lines::start();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(FILTER_DEFAULT));
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter);
    let subscriber = subscriber.with_writer(|| lines::Line).event_format(Json).finish();
    if let Err(e) = subscriber.with(filter_fn(shows_no_secret)).try_init() {
        eprintln!("logging was started twice: {e}");
    }
    guard
}

/// Whether lines of the kind may be logged, whatever `RUST_LOG` asks for. In their debug and trace lines
/// libraries show the requests that they carry: header fields with API keys, as text, as numbers, and cut by
/// frames. Nothing finds all of them there, so these levels are for our own lines alone.
fn shows_no_secret(metadata: &Metadata<'_>) -> bool {
    *metadata.level() <= Level::INFO || metadata.target().starts_with("infra_controller")
}

/// The format of a line.
pub struct Json;

impl<S, N> FormatEvent<S, N> for Json
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let level = match *event.metadata().level() {
            Level::ERROR => "ERROR",
            Level::WARN => "WARN",
            Level::INFO => "INFO",
            Level::DEBUG => "DEBUG",
            Level::TRACE => "TRACE",
        };
        out.write_str("{\"level\":\"")?;
        out.write_str(level)?;
        // The message may be any of the fields, so they are gone through twice.
        out.write_str("\",\"msg\":\"")?;
        let mut message = Fields { out: out.by_ref(), wants_message: true, written: Ok(()) };
        event.record(&mut message);
        message.written?;
        out.write_str("\",\"time\":\"")?;
        out.write_str(Rfc3339Ms::of(now_ms()).as_str())?;
        out.write_char('"')?;
        let mut others = Fields { out: out.by_ref(), wants_message: false, written: Ok(()) };
        event.record(&mut others);
        others.written?;
        out.write_str("}\n")
    }
}

/// Writes either the message alone, or `,"name":value` for each other field.
struct Fields<'a> {
    out: Writer<'a>,
    wants_message: bool,
    written: fmt::Result,
}

impl Fields<'_> {
    fn write(&mut self, field: &Field, value: impl FnOnce(&mut Writer<'_>) -> fmt::Result) {
        let name = field.name();
        // Fields that the bridge from the `log` crate adds say where, not what.
        if self.written.is_err() || (name == "message") != self.wants_message || name.starts_with("log.") {
            return;
        }
        self.written = if self.wants_message {
            value(&mut self.out)
        } else {
            write!(self.out, ",\"{name}\":").and_then(|()| value(&mut self.out))
        };
    }

    fn write_text(&mut self, field: &Field, text: fmt::Arguments<'_>) {
        // The quotes of the message stand already.
        let quote = if self.wants_message { "" } else { "\"" };
        self.write(field, |out| {
            out.write_str(quote)?;
            Escaped(out).write_fmt(text)?;
            out.write_str(quote)
        });
    }
}

impl Visit for Fields<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.write_text(field, format_args!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.write_text(field, format_args!("{value}"));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.write(field, |out| write!(out, "{value}"));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.write(field, |out| write!(out, "{value}"));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        // JSON has no other numbers.
        self.write(
            field,
            |out| if value.is_finite() { write!(out, "{value:?}") } else { out.write_str("null") },
        );
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.write(field, |out| write!(out, "{value}"));
    }
}

/// What is written to it stands inside a JSON string.
struct Escaped<'a, 'w>(&'a mut Writer<'w>);

impl Write for Escaped<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut rest = text;
        while let Some(at) = rest.bytes().position(|b| b < 0x20 || b == b'"' || b == b'\\') {
            self.0.write_str(&rest[..at])?;
            match rest.as_bytes()[at] {
                b'"' => self.0.write_str("\\\"")?,
                b'\\' => self.0.write_str("\\\\")?,
                b'\n' => self.0.write_str("\\n")?,
                control => write!(self.0, "\\u{control:04x}")?,
            }
            rest = &rest[at + 1..];
        }
        self.0.write_str(rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn levels_are_in_capitals() {
        let sink = Sink::default();
        let writer = sink.clone();
        let subscriber = tracing_subscriber::fmt().with_max_level(Level::TRACE);
        let subscriber = subscriber.with_writer(move || writer.clone()).event_format(Json).finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::error!("x");
            tracing::warn!("x");
            tracing::info!("x");
            tracing::debug!("x");
            tracing::trace!("x");
        });
        let text = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
        let levels: Vec<&str> = text.lines().map(|line| line.split('"').nth(3).unwrap_or(line)).collect();
        assert_eq!(levels, ["ERROR", "WARN", "INFO", "DEBUG", "TRACE"]);
    }

    #[test]
    fn level_and_msg_come_first() {
        let sink = Sink::default();
        let writer = sink.clone();
        let subscriber =
            tracing_subscriber::fmt().with_writer(move || writer.clone()).event_format(Json).finish();
        tracing::subscriber::with_default(subscriber, || {
            let text = "a\"b\\c\n\u{1}\u{e4}";
            tracing::info!(requestId = text, duration = 1.5, whole = 2.0, n = 3_u64, ok = true, shown = %"x\"", none = f64::NAN, "Execution \"{}\"", 7);
        });
        let line = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
        assert!(
            line.starts_with("{\"level\":\"INFO\",\"msg\":\"Execution \\\"7\\\"\",\"time\":\""),
            "{line}"
        );
        let fields = ",\"requestId\":\"a\\\"b\\\\c\\n\\u0001\u{e4}\",\"duration\":1.5,\"whole\":2.0,\"n\":3,\"ok\":true,\"shown\":\"x\\\"\",\"none\":null}\n";
        assert!(line.ends_with(fields), "{line}");
        serde_json::from_str::<serde_json::Value>(&line).unwrap();
    }
}
