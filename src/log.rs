//! Log lines: one JSON object per line, with `level` and `msg` first.
//!
//! The JSON format of `tracing-subscriber` was rejected: it nests the message under `fields`, but existing
//! tools expect `level` and `msg` at the top level. `tracing-appender` was rejected because it makes one
//! system call per line. Here lines are buffered, and one thread writes them in batches ([`lines`]).

mod context;
mod lines;

pub use context::{LogContext, within_trace};
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

/// The default filter, if `RUST_LOG` is not set. Libraries warn of errors that this program handles and logs
/// itself, some of them with whole responses. Pingora logs every client that disconnects as an error.
const FILTER_DEFAULT: &str = "error,infra_controller=info,pingora=off,pingora_core=off,pingora_proxy=off";

/// Starts logging to standard output. Must be called once. Dropping the guard writes the remaining lines.
pub fn start() -> LinesGuard {
    let guard = lines::start();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(FILTER_DEFAULT));
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter);
    let subscriber = subscriber.with_writer(|| lines::LogLine).event_format(Json).finish();
    if let Err(e) = subscriber.with(filter_fn(shows_no_secret)).try_init() {
        eprintln!("infra-controller: logging was started twice: {e}");
    }
    guard
}

/// Whether an event may be logged at all, whatever `RUST_LOG` says. Debug and trace events of libraries
/// contain requests with API keys: as text, as numbers, or split across frames. No filter can redact all of
/// these forms, so only this program may log at these levels.
fn shows_no_secret(metadata: &Metadata<'_>) -> bool {
    *metadata.level() <= Level::INFO || metadata.target().starts_with("infra_controller")
}

/// Formats an event as one JSON line.
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
        // The message can be at any position among the fields, so they are visited twice.
        out.write_str("\",\"msg\":\"")?;
        let mut message = LogFields { out: out.by_ref(), wants_message: true, written: Ok(()) };
        event.record(&mut message);
        message.written?;
        out.write_str("\",\"time\":\"")?;
        out.write_str(Rfc3339Ms::of(now_ms()).as_str())?;
        out.write_char('"')?;
        let mut others = LogFields { out: out.by_ref(), wants_message: false, written: Ok(()) };
        event.record(&mut others);
        others.written?;
        context::write_fields(&mut out)?;
        out.write_str("}\n")
    }
}

/// Writes either the message alone, or `,"name":value` for each other field.
struct LogFields<'a> {
    out: Writer<'a>,
    wants_message: bool,
    written: fmt::Result,
}

impl LogFields<'_> {
    fn write(&mut self, field: &Field, value: impl FnOnce(&mut Writer<'_>) -> fmt::Result) {
        let name = field.name();
        // The bridge from the `log` crate adds fields with the source location, which are left out.
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
        // The quotes around the message are written by the caller.
        let quote = if self.wants_message { "" } else { "\"" };
        self.write(field, |out| {
            out.write_str(quote)?;
            Escaped(out).write_fmt(text)?;
            out.write_str(quote)
        });
    }
}

impl Visit for LogFields<'_> {
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
        // JSON has no NaN and no infinity.
        self.write(
            field,
            |out| if value.is_finite() { write!(out, "{value:?}") } else { out.write_str("null") },
        );
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.write(field, |out| write!(out, "{value}"));
    }
}

/// Escapes text for the inside of a JSON string.
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
    use parking_lot::Mutex;
    use std::io;
    use std::sync::Arc;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Sink {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn levels_are_upper_case() {
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
        let text = String::from_utf8(sink.0.lock().clone()).unwrap();
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
            tracing::info!(
                requestId = text, duration = 1.5, whole = 2.0, n = 3_u64, ok = true, shown = %"x\"",
                none = f64::NAN, "Execution \"{}\"", 7
            );
        });
        let line = String::from_utf8(sink.0.lock().clone()).unwrap();
        assert!(
            line.starts_with("{\"level\":\"INFO\",\"msg\":\"Execution \\\"7\\\"\",\"time\":\""),
            "{line}"
        );
        let fields = ",\"requestId\":\"a\\\"b\\\\c\\n\\u0001\u{e4}\",\"duration\":1.5,\"whole\":2.0,\
                      \"n\":3,\"ok\":true,\"shown\":\"x\\\"\",\"none\":null}\n";
        assert!(line.ends_with(fields), "{line}");
        serde_json::from_str::<serde_json::Value>(&line).unwrap();
    }
}
