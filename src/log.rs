//! Log lines: one JSON object a line, `level` and `msg` first.
//!
//! `tracing-subscriber`'s own JSON format was rejected: it nests the message under `fields`, and the lines of
//! CONTRACT §8 are read by tools that expect `level` and `msg` at the top. Lines go to a background writer with a
//! bounded queue: when the reader of our standard output stalls, lines are dropped and counted, never requests.

use serde_json::{Value, json};
use std::fmt::{self, Write};
use std::io;
use std::sync::OnceLock;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// Most lines that wait for the writer.
const LINES_MAX: usize = 65_536;

/// What is logged unless `RUST_LOG` says otherwise. Libraries warn of what we handle and report ourselves, some of
/// them with whole responses; Pingora calls every client that leaves an error.
const FILTER_DEFAULT: &str = "error,infra_controller=info,pingora=off,pingora_core=off,pingora_proxy=off";

/// Lines dropped so far; the subscriber is one for the process, and so is its counter.
static DROPPED: OnceLock<ErrorCounter> = OnceLock::new();

/// How many lines were dropped because nobody read them.
pub fn lines_dropped() -> usize {
    DROPPED.get().map_or(0, ErrorCounter::dropped_lines)
}

/// Starts logging to standard output. Call once; dropping the guard writes what is left.
pub fn start() -> WorkerGuard {
    let (writer, guard) =
        NonBlockingBuilder::default().buffered_lines_limit(LINES_MAX).lossy(true).finish(io::stdout());
    DROPPED.get_or_init(|| writer.error_counter());
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(FILTER_DEFAULT));
    let started =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer).event_format(Line).try_init();
    if let Err(e) = started {
        eprintln!("logging was started twice: {e}");
    }
    guard
}

struct Line;

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let level = event.metadata().level().as_str().to_ascii_lowercase();
        let time = crate::model::rfc3339_ms(crate::model::now_ms());
        write!(out, "{{\"level\":\"{level}\",\"msg\":{},\"time\":\"{time}\"", json!(fields.message))?;
        writeln!(out, "{}}}", fields.others)
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    /// `,"name":value` for each field.
    others: String,
}

impl Fields {
    fn push(&mut self, field: &Field, value: &Value) {
        // Fields that the bridge from the `log` crate adds say where, not what.
        if !field.name().starts_with("log.") {
            // Writing to a String cannot fail.
            let _ = write!(self.others, ",\"{}\":{value}", field.name());
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let text = format!("{value:?}");
        if field.name() == "message" {
            self.message = text;
        } else {
            self.push(field, &json!(text));
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.message = value.to_owned();
        } else {
            self.push(field, &json!(value));
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.push(field, &json!(value));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.push(field, &json!(value));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.push(field, &json!(value));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.push(field, &json!(value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
    fn level_and_msg_come_first() {
        let sink = Sink::default();
        let writer = sink.clone();
        let subscriber =
            tracing_subscriber::fmt().with_writer(move || writer.clone()).event_format(Line).finish();
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(requestId = "a\"b", duration = 1.5, n = 3_u64, ok = true, shown = %"x", "Execution Success");
        });
        let line = String::from_utf8(sink.0.lock().unwrap().clone()).unwrap();
        assert!(line.starts_with("{\"level\":\"info\",\"msg\":\"Execution Success\",\"time\":\""), "{line}");
        assert!(
            line.ends_with(
                ",\"requestId\":\"a\\\"b\",\"duration\":1.5,\"n\":3,\"ok\":true,\"shown\":\"x\"}\n"
            ),
            "{line}"
        );
        serde_json::from_str::<Value>(&line).unwrap();
    }
}
