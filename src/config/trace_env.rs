//! The variables of OpenTelemetry: whether and where spans are exported, and which traces are recorded.
//!
//! Names, formats and defaults are those of the OpenTelemetry specification, with one exception: without any
//! of the variables that name an exporter or a collector, nothing is exported. The specification also demands
//! that a value that cannot be used is a warning and not an error, because a platform may set these variables
//! for all of its programs.

use super::env::{Reader, process_variables};
use super::error::ConfigError;
use crate::config::secret::Secret;
use percent_encoding::percent_decode_str;
use std::time::Duration;

/// The whole range of [`TraceSampling::threshold`]: every trace.
pub const SAMPLING_RANGE: u64 = 1 << 63;
/// Upper bound of the queue of spans. A span takes about 2 KiB.
const QUEUE_SPANS_MAX: usize = 65_536;
/// Upper bound of a batch: one request to the collector.
const BATCH_SPANS_MAX: usize = 8_192;
/// Upper bound of times.
const TIME_MAX: Duration = Duration::from_secs(300);
/// The path of traces below the base URL of a collector.
const TRACES_PATH: &str = "/v1/traces";
const ENDPOINT_DEFAULT: &str = "http://localhost:4318";
const PROTOCOL: &str = "http/protobuf";

/// Where and how spans are exported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TraceExport {
    /// The URL for traces. May contain a password.
    pub endpoint: Secret,
    /// Header fields of each request, for example with a token.
    pub headers: Vec<(String, Secret)>,
    /// Deadline of a request to the collector, with its retries.
    pub timeout: Duration,
    /// `None`: the name of the command.
    pub service_name: Option<String>,
    /// Attributes of the process.
    pub resource: Vec<(String, String)>,
    pub sampling: TraceSampling,
    pub queue_spans_max: usize,
    pub batch_spans_max: usize,
    /// Longest time between two exports.
    pub delay: Duration,
    /// Deadline of an export.
    pub export_timeout: Duration,
}

/// Which traces are recorded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceSampling {
    /// A caller decides for its traces.
    pub follows_parent: bool,
    /// Share of the other traces, of [`SAMPLING_RANGE`].
    pub threshold: u64,
}

impl TraceSampling {
    /// The default: the caller decides, and traces that begin here are recorded.
    const DEFAULT: Self = Self { follows_parent: true, threshold: SAMPLING_RANGE };
}

impl TraceExport {
    /// Reads the process environment. Returns warnings, too. `None`: nothing is exported.
    ///
    /// # Errors
    /// Variables that are not UTF-8.
    pub fn from_process() -> Result<(Option<Self>, Vec<String>), ConfigError> {
        let vars = process_variables()?;
        let mut reader = Reader::new(&vars);
        let export = Self::read(&mut reader);
        reader.finish().map(|warnings| (export, warnings))
    }

    fn read(reader: &mut Reader<'_>) -> Option<Self> {
        let is_disabled = reader.optional("OTEL_SDK_DISABLED");
        if is_disabled.is_some_and(|value| value.eq_ignore_ascii_case("true")) {
            return None;
        }
        let endpoint = endpoint(reader);
        match reader.optional("OTEL_TRACES_EXPORTER").as_deref() {
            None if endpoint.is_none() => return None,
            None | Some("otlp") => {}
            Some("none") => return None,
            Some(_) => {
                reader.warnings.push(unusable("OTEL_TRACES_EXPORTER", "otlp or none"));
                return None;
            }
        }
        let protocol = reader
            .optional("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
            .or_else(|| reader.optional("OTEL_EXPORTER_OTLP_PROTOCOL"));
        if protocol.is_some_and(|protocol| protocol != PROTOCOL) {
            reader.warnings.push(unusable("OTEL_EXPORTER_OTLP_PROTOCOL", PROTOCOL));
            return None;
        }
        let endpoint = endpoint.unwrap_or_else(|| format!("{ENDPOINT_DEFAULT}{TRACES_PATH}"));
        let queue_spans_max = count(reader, "OTEL_BSP_MAX_QUEUE_SIZE", 2_048, QUEUE_SPANS_MAX);
        let batch_spans_max = count(reader, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512, BATCH_SPANS_MAX);
        Some(Self {
            endpoint: Secret::new(endpoint),
            headers: headers(reader),
            timeout: timeout(reader),
            service_name: reader.optional("OTEL_SERVICE_NAME"),
            resource: pairs(reader, "OTEL_RESOURCE_ATTRIBUTES"),
            sampling: sampling(reader),
            queue_spans_max,
            batch_spans_max: batch_spans_max.min(queue_spans_max),
            delay: time(reader, "OTEL_BSP_SCHEDULE_DELAY", 5_000),
            export_timeout: time(reader, "OTEL_BSP_EXPORT_TIMEOUT", 30_000),
        })
    }
}

/// The warning for a value that is ignored. The value is not shown: it may be a secret.
fn unusable(name: &str, expected: &str) -> String {
    format!("{name} is ignored, because it must be {expected}")
}

/// The URL of a collector, if one is named.
fn endpoint(reader: &mut Reader<'_>) -> Option<String> {
    let (own, base) = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT");
    let is_url = |url: &String| {
        let rest = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"));
        rest.is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|b| b.is_ascii_graphic()))
    };
    for (name, path) in [(own, ""), (base, TRACES_PATH)] {
        match reader.optional(name) {
            Some(url) if is_url(&url) && path.is_empty() => return Some(url),
            Some(url) if is_url(&url) => return Some(format!("{}{path}", url.trim_end_matches('/'))),
            Some(_) => reader.warnings.push(unusable(name, "a URL with http:// or https://")),
            None => {}
        }
    }
    None
}

fn headers(reader: &mut Reader<'_>) -> Vec<(String, Secret)> {
    let (own, all) = ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "OTEL_EXPORTER_OTLP_HEADERS");
    let name = if reader.optional(own).is_some() { own } else { all };
    let is_valid = |(name, value): &(String, String)| {
        let is_token = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
        name.bytes().all(is_token) && value.bytes().all(|b| (0x20..=0x7e).contains(&b))
    };
    let (valid, other): (Vec<_>, Vec<_>) = pairs(reader, name).into_iter().partition(is_valid);
    if !other.is_empty() {
        reader.warnings.push(unusable(name, "a list of header fields (name=value,…); some are left out"));
    }
    valid.into_iter().map(|(name, value)| (name, Secret::new(value))).collect()
}

/// A list `name=value,…`, percent-encoded as in W3C Baggage.
fn pairs(reader: &mut Reader<'_>, variable: &str) -> Vec<(String, String)> {
    let text = reader.optional(variable).unwrap_or_default();
    let decoded = |part: &str| Some(percent_decode_str(part.trim()).decode_utf8().ok()?.into_owned());
    let mut pairs = Vec::new();
    for member in text.split(',').filter(|member| !member.trim().is_empty()) {
        let pair = member.split_once('=').and_then(|(name, value)| Some((decoded(name)?, decoded(value)?)));
        match pair.filter(|(name, _)| !name.is_empty()) {
            Some(pair) => pairs.push(pair),
            // A list that is cut or not escaped is not used at all, as the specification demands.
            None => {
                reader.warnings.push(unusable(variable, "a list name=value,…"));
                return Vec::new();
            }
        }
    }
    pairs
}

fn timeout(reader: &mut Reader<'_>) -> Duration {
    let (own, all) = ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "OTEL_EXPORTER_OTLP_TIMEOUT");
    time(reader, if reader.optional(own).is_some() { own } else { all }, 10_000)
}

/// A time in milliseconds.
fn time(reader: &mut Reader<'_>, name: &str, default_ms: u64) -> Duration {
    let default = Duration::from_millis(default_ms);
    let Some(text) = reader.optional(name) else { return default };
    let time = text.parse().ok().map(Duration::from_millis);
    time.filter(|time| !time.is_zero() && *time <= TIME_MAX).unwrap_or_else(|| {
        reader.warnings.push(unusable(name, &format!("a number from 1 to {} (ms)", TIME_MAX.as_millis())));
        default
    })
}

fn count(reader: &mut Reader<'_>, name: &str, default: usize, max: usize) -> usize {
    let Some(text) = reader.optional(name) else { return default };
    text.parse().ok().filter(|count| (1..=max).contains(count)).unwrap_or_else(|| {
        reader.warnings.push(unusable(name, &format!("a number from 1 to {max}")));
        default
    })
}

fn sampling(reader: &mut Reader<'_>) -> TraceSampling {
    let name = "OTEL_TRACES_SAMPLER";
    let Some(sampler) = reader.optional(name) else { return TraceSampling::DEFAULT };
    let (follows_parent, root) = match sampler.strip_prefix("parentbased_") {
        Some(root) => (true, root),
        None => (false, sampler.as_str()),
    };
    let threshold = match root {
        "always_on" => SAMPLING_RANGE,
        "always_off" => 0,
        "traceidratio" => ratio(reader),
        _ => {
            let samplers = "always_on, always_off or traceidratio, or one of them after parentbased_";
            reader.warnings.push(unusable(name, samplers));
            return TraceSampling::DEFAULT;
        }
    };
    TraceSampling { follows_parent, threshold }
}

fn ratio(reader: &mut Reader<'_>) -> u64 {
    let name = "OTEL_TRACES_SAMPLER_ARG";
    let Some(text) = reader.optional(name) else { return SAMPLING_RANGE };
    let ratio = text.parse().ok().filter(|ratio: &f64| (0.0..=1.0).contains(ratio));
    let ratio = ratio.unwrap_or_else(|| {
        reader.warnings.push(unusable(name, "a number from 0 to 1"));
        1.0
    });
    (ratio * SAMPLING_RANGE as f64) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(vars: &[(&str, &str)]) -> (Option<TraceExport>, Vec<String>) {
        let vars = vars.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let mut reader = Reader::new(&vars);
        let export = TraceExport::read(&mut reader);
        (export, reader.finish().unwrap())
    }

    const TO: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c:4318/");

    #[test]
    fn nothing_is_exported_unless_a_variable_asks_for_it() {
        for (vars, endpoint) in [
            (&[][..], None),
            (&[("OTEL_SERVICE_NAME", "x"), ("OTEL_TRACES_SAMPLER", "always_on")], None),
            (&[TO], Some("http://c:4318/v1/traces")),
            (&[TO, ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "https://t/x/")], Some("https://t/x/")),
            (&[("OTEL_TRACES_EXPORTER", "otlp")], Some("http://localhost:4318/v1/traces")),
            (&[TO, ("OTEL_TRACES_EXPORTER", "none")], None),
            (&[TO, ("OTEL_SDK_DISABLED", "TRUE")], None),
            (&[TO, ("OTEL_SDK_DISABLED", "false")], Some("http://c:4318/v1/traces")),
            (&[TO, ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf")], Some("http://c:4318/v1/traces")),
        ] {
            let (export, warnings) = read(vars);
            assert_eq!(export.as_ref().map(|export| export.endpoint.reveal()), endpoint, "{vars:?}");
            assert!(warnings.is_empty(), "{warnings:?}");
        }
    }

    #[test]
    fn what_cannot_be_used_is_a_warning_without_the_value() {
        for (name, value, is_exported) in [
            ("OTEL_TRACES_EXPORTER", "hunter2", false),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc", false),
            ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "hunter2", true),
            ("OTEL_EXPORTER_OTLP_HEADERS", "hunter2", true),
            ("OTEL_EXPORTER_OTLP_HEADERS", "a b=hunter2", true),
            ("OTEL_RESOURCE_ATTRIBUTES", "a=1,b", true),
            ("OTEL_TRACES_SAMPLER", "sometimes", true),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "0", true),
            ("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "-1", true),
            ("OTEL_BSP_SCHEDULE_DELAY", "5s", true),
            ("OTEL_BSP_EXPORT_TIMEOUT", "99999999", true),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "0", true),
        ] {
            let (export, warnings) = read(&[TO, (name, value)]);
            assert_eq!((export.is_some(), warnings.len()), (is_exported, 1), "{name}: {warnings:?}");
            assert!(warnings[0].starts_with(name) && !warnings[0].contains("hunter2"), "{warnings:?}");
        }
    }

    #[test]
    fn lists_and_numbers_are_read() {
        let (export, _) = read(&[
            TO,
            ("OTEL_EXPORTER_OTLP_HEADERS", "authorization=Basic%20YQ%3D%3D, x-a = 1"),
            ("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=a%2Cb,k=v"),
            ("OTEL_SERVICE_NAME", "gateway"),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "100"),
            ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "250"),
        ]);
        let export = export.unwrap();
        let headers: Vec<_> =
            export.headers.iter().map(|(name, value)| (name.as_str(), value.reveal())).collect();
        assert_eq!(headers, [("authorization", "Basic YQ=="), ("x-a", "1")]);
        let resource = [("deployment.environment.name", "a,b"), ("k", "v")];
        assert_eq!(export.resource, resource.map(|(name, value)| (name.to_owned(), value.to_owned())));
        assert_eq!(export.service_name.as_deref(), Some("gateway"));
        assert_eq!((export.queue_spans_max, export.batch_spans_max), (100, 100));
        let ms = Duration::from_millis;
        assert_eq!((export.timeout, export.delay, export.export_timeout), (ms(250), ms(5000), ms(30_000)));
    }

    #[test]
    fn samplers() {
        for (sampler, argument, follows_parent, threshold) in [
            ("", "", true, SAMPLING_RANGE),
            ("always_on", "", false, SAMPLING_RANGE),
            ("always_off", "", false, 0),
            ("traceidratio", "0.5", false, SAMPLING_RANGE / 2),
            ("parentbased_always_on", "", true, SAMPLING_RANGE),
            ("parentbased_always_off", "", true, 0),
            ("parentbased_traceidratio", "0.25", true, SAMPLING_RANGE / 4),
            ("parentbased_traceidratio", "", true, SAMPLING_RANGE),
            ("parentbased_traceidratio", "0", true, 0),
            ("parentbased_traceidratio", "2", true, SAMPLING_RANGE),
            ("traceidratio", "NaN", false, SAMPLING_RANGE),
        ] {
            let vars = [TO, ("OTEL_TRACES_SAMPLER", sampler), ("OTEL_TRACES_SAMPLER_ARG", argument)];
            let sampling = read(&vars).0.unwrap().sampling;
            assert_eq!(sampling, TraceSampling { follows_parent, threshold }, "{sampler} {argument}");
        }
    }
}
