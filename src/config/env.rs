//! Environment variables. Names and formats are those of the previous controller's `.env`.

use super::error::ConfigError;
use crate::config::secret::Secret;
use std::collections::HashMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

/// The environment of `serve` and `check`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Env {
    /// `PORT` of the plain listener. 0: any free port.
    pub port: u16,
    /// `AWS_REGION`: region of queue, tables and bucket.
    pub region: String,
    /// `TABLE_NAME`: the function table.
    pub functions_table: String,
    /// `LOGS_TABLE_NAME`: the execution log table.
    pub logs_table: String,
    /// `SQS_URL`: the task queue. The URL of a FIFO queue ends in `.fifo`.
    pub queue_url: String,
    pub redis: RedisAddress,
    /// `INFRA_API_KEY`: the master key.
    pub api_key: Secret,
    /// `BUCKET_NAME`: bucket of the function code.
    pub bucket: String,
    /// `RATE_LIMIT`, in requests per minute. Replaces the numbers of all limits by key.
    pub rate_limit: Option<u32>,
    /// `STATE_DIR`: node state and spilled rows.
    pub state_dir: PathBuf,
    // Older names of endpoints, used where the SDK's own `AWS_ENDPOINT_URL_*` is unset.
    pub sqs_endpoint: Option<String>,
    pub dynamodb_endpoint: Option<String>,
    pub s3_endpoint: Option<String>,
    pub ai_node: AiNode,
    /// Warnings about values that were possibly meant differently.
    pub warnings: Vec<String>,
}

/// The address of Redis.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RedisAddress {
    pub url: Secret,
    /// The variables that it comes from, for messages.
    pub variables: &'static str,
}

/// The node that provides the model catalogue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AiNode {
    /// Without a slash at the end. May contain a password.
    pub url: Secret,
    /// Deadline of a request.
    pub timeout: Duration,
}

impl AiNode {
    /// The address in the platform's own network, which was the default of the previous controller.
    pub(super) const URL_DEFAULT: &str = "http://10.0.20.100:11434";
    const TIMEOUT_DEFAULT: Duration = Duration::from_secs(2);

    /// Reads the process environment of `dev`, which has no default address. Returns the node, if there is
    /// one, and warnings.
    pub fn from_process() -> Result<(Option<Self>, Vec<String>), ConfigError> {
        let names = ["AI_NODE_URL", "AI_NODE_TIMEOUT"];
        let vars =
            names.iter().filter_map(|name| Some(((*name).to_owned(), std::env::var(name).ok()?))).collect();
        let mut reader = Reader::new(&vars);
        let (url, timeout) = (reader.endpoint("AI_NODE_URL"), reader.ai_node_timeout());
        let ai_node = url.map(|url| Self::new(&url, timeout));
        reader.finish().map(|warnings| (ai_node, warnings))
    }

    fn new(url: &str, timeout: Duration) -> Self {
        Self { url: Secret::new(url.trim_end_matches('/').to_owned()), timeout }
    }
}

/// Why a text cannot be an API key.
pub fn api_key_problem(key: &str) -> Option<&'static str> {
    let fits = !key.is_empty() && key.bytes().all(|b| (0x21..=0x7e).contains(&b));
    (!fits).then_some("the API key must be visible ASCII without blanks, as it is sent in a header field")
}

/// Maximum length of an API key, in bytes. A longer one is rejected without a lookup.
pub const API_KEY_BYTES_MAX: usize = 4096;

/// Minimum length of a master key without a warning, in bytes. Shorter keys can be guessed.
const MASTER_KEY_BYTES_LEAST: usize = 16;
/// Minimum number of different characters without a warning. A random key has more.
const MASTER_KEY_CHARACTERS_LEAST: usize = 5;
/// Keys of examples and copied files, in lower case, with letters and digits only.
const MASTER_KEYS_KNOWN: [&str; 22] = [
    "adminadminadminadmin",
    "changeitchangeit",
    "changemechangeme",
    "changemeinproduction",
    "infracontrollerapikey",
    "infracontrollerkey",
    "mysecretinfraapikey",
    "mysupersecretapikey",
    "passwordpassword",
    "replacewithyourapikey",
    "replacewithyourkey",
    "secretsecretsecret",
    "supersecretapikey",
    "supersecretpassword",
    "thisisasecretkey",
    "thisisnotasecret",
    "yourapikeygoeshere",
    "yourinfraapikey",
    "yourinfraapikeyhere",
    "yoursecretapikey",
    "yoursecretapikeyhere",
    "yoursecretkeyhere",
];
/// Sequences of the alphabet, the digits and the rows of a keyboard. A beginning of one is easy to guess.
const SEQUENCES: [&str; 5] = [
    "0123456789abcdefghijklmnopqrstuvwxyz",
    "1234567890123456789012345678901234567890",
    "abcdefghijklmnopqrstuvwxyz0123456789",
    "qwertyuiopasdfghjklzxcvbnm",
    "1234567890abcdefghijklmnopqrstuvwxyz",
];

/// Why a valid master key is weak.
pub fn master_key_warning(key: &str) -> Option<String> {
    let plain: String =
        key.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_lowercase()).collect();
    let different: std::collections::BTreeSet<char> = plain.chars().collect();
    let problem = if key.len() < MASTER_KEY_BYTES_LEAST {
        format!("has fewer than {MASTER_KEY_BYTES_LEAST} characters")
    } else if MASTER_KEYS_KNOWN.contains(&plain.as_str())
        || different.len() < MASTER_KEY_CHARACTERS_LEAST
        || SEQUENCES.iter().any(|sequence| sequence.starts_with(&plain))
    {
        "is easy to guess".to_owned()
    } else {
        return None;
    };
    Some(format!("INFRA_API_KEY {problem}, and it has every scope. Use a random key: openssl rand -hex 32"))
}

/// The variables that this program reads, in addition to those of the AWS SDK.
const NAMES: [&str; 41] = [
    "AI_ENDPOINT",
    "AI_NODE_TIMEOUT",
    "AI_NODE_URL",
    "BUCKET_NAME",
    "CONTROLLER_URL",
    "DYNAMODB_ENDPOINT",
    "INFRA_API_KEY",
    "LOGS_TABLE_NAME",
    "MAX_OUTPUT_SIZE",
    "OTEL_BSP_EXPORT_TIMEOUT",
    "OTEL_BSP_MAX_EXPORT_BATCH_SIZE",
    "OTEL_BSP_MAX_QUEUE_SIZE",
    "OTEL_BSP_SCHEDULE_DELAY",
    "OTEL_EXPORTER_OTLP_ENDPOINT",
    "OTEL_EXPORTER_OTLP_HEADERS",
    "OTEL_EXPORTER_OTLP_PROTOCOL",
    "OTEL_EXPORTER_OTLP_TIMEOUT",
    "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
    "OTEL_EXPORTER_OTLP_TRACES_HEADERS",
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
    "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT",
    "OTEL_RESOURCE_ATTRIBUTES",
    "OTEL_SDK_DISABLED",
    "OTEL_SERVICE_NAME",
    "OTEL_TRACES_EXPORTER",
    "OTEL_TRACES_SAMPLER",
    "OTEL_TRACES_SAMPLER_ARG",
    "PORT",
    "RATE_LIMIT",
    "REDIS_HOST",
    "REDIS_PORT",
    "REDIS_URL",
    "S3_CODE_BUCKET",
    "S3_ENDPOINT",
    "S3_USER_DATA_BUCKET",
    "SQS_ENDPOINT",
    "SQS_URL",
    "STATE_DIR",
    "TABLE_NAME",
    "RUST_LOG",
    "WORKER_ID",
];

/// Reports variables that this program reads and whose values are not UTF-8. Values are not shown, because
/// some are secrets.
pub fn unreadable_variables(vars: impl Iterator<Item = (OsString, OsString)>) -> Vec<String> {
    let of = |(name, value): (OsString, OsString)| {
        let name = name.into_string().ok()?;
        let is_ours = name.starts_with("AWS_") || NAMES.contains(&name.as_str());
        (is_ours && value.to_str().is_none()).then(|| format!("{name} contains bytes that are not UTF-8"))
    };
    let mut problems: Vec<String> = vars.filter_map(of).collect();
    problems.sort_unstable();
    problems
}

/// Default port of `serve` and `dev`.
pub const PORT_DEFAULT: u16 = 8080;

impl Env {
    /// Reads the process environment.
    ///
    /// # Errors
    /// As [`Self::parse`], and variables that are not UTF-8.
    pub fn from_process() -> Result<Self, ConfigError> {
        Self::parse(&process_variables()?)
    }

    /// Reads the variables.
    ///
    /// # Errors
    /// All problems. The first line names every missing variable.
    pub fn parse(vars: &HashMap<String, String>) -> Result<Self, ConfigError> {
        let mut reader = Reader::new(vars);
        let mut env = Self {
            port: reader.parsed("PORT").unwrap_or(PORT_DEFAULT),
            region: reader.region(),
            functions_table: reader.required("TABLE_NAME"),
            logs_table: reader.required("LOGS_TABLE_NAME"),
            queue_url: reader.url("SQS_URL"),
            redis: reader.redis(),
            api_key: reader.api_key(),
            bucket: reader.required("BUCKET_NAME"),
            rate_limit: reader.rate_limit(),
            state_dir: reader.optional("STATE_DIR").unwrap_or_else(|| "./state".into()).into(),
            sqs_endpoint: reader.endpoint("SQS_ENDPOINT"),
            dynamodb_endpoint: reader.endpoint("DYNAMODB_ENDPOINT"),
            s3_endpoint: reader.endpoint("S3_ENDPOINT"),
            ai_node: reader.ai_node(),
            warnings: Vec::new(),
        };
        // The SDK reads these itself, but reports a malformed one only as a failed connection.
        for name in
            ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_SQS", "AWS_ENDPOINT_URL_DYNAMODB", "AWS_ENDPOINT_URL_S3"]
        {
            reader.endpoint(name);
        }
        env.warnings = reader.finish()?;
        Ok(env)
    }
}

/// The variables of this process. Those of other programs are left out if they are not UTF-8.
///
/// # Errors
/// Variables of this program that are not UTF-8.
pub(super) fn process_variables() -> Result<HashMap<String, String>, ConfigError> {
    let problems = unreadable_variables(std::env::vars_os());
    if !problems.is_empty() {
        return Err(ConfigError(problems));
    }
    let readable =
        |(name, value): (OsString, OsString)| Some((name.into_string().ok()?, value.into_string().ok()?));
    Ok(std::env::vars_os().filter_map(readable).collect())
}

/// Reads variables, and collects their problems and warnings.
pub(super) struct Reader<'a> {
    vars: &'a HashMap<String, String>,
    pub(super) missing: Vec<&'static str>,
    pub(super) problems: Vec<String>,
    pub(super) warnings: Vec<String>,
}

impl<'a> Reader<'a> {
    pub(super) fn new(vars: &'a HashMap<String, String>) -> Self {
        Self { vars, missing: Vec::new(), problems: Vec::new(), warnings: Vec::new() }
    }

    /// Returns the warnings.
    ///
    /// # Errors
    /// All problems. The first line names every missing variable.
    pub(super) fn finish(self) -> Result<Vec<String>, ConfigError> {
        let Self { missing, mut problems, warnings, .. } = self;
        if !missing.is_empty() {
            problems.insert(0, format!("missing environment variables: {}", missing.join(", ")));
        }
        if problems.is_empty() { Ok(warnings) } else { Err(ConfigError(problems)) }
    }

    /// The value without blanks around it. An empty variable counts as unset, as in the previous controller.
    pub(super) fn optional(&self, name: &str) -> Option<String> {
        self.vars.get(name).map(|v| v.trim()).filter(|v| !v.is_empty()).map(str::to_owned)
    }

    fn required(&mut self, name: &'static str) -> String {
        self.optional(name).unwrap_or_else(|| {
            self.missing.push(name);
            String::new()
        })
    }

    /// The region. It is part of host names and signatures, so its characters are checked.
    pub(super) fn region(&mut self) -> String {
        let region = self.required("AWS_REGION");
        if !region.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
            self.problems
                .push(format!("AWS_REGION is {region:?}, which is not a region; set one such as eu-west-1"));
        }
        region
    }

    pub(super) fn parsed<T: std::str::FromStr>(&mut self, name: &'static str) -> Option<T> {
        let text = self.optional(name)?;
        let value = text.parse().ok();
        if value.is_none() {
            self.problems.push(format!("{name} is {text:?}, which is not a number in range"));
        }
        value
    }

    /// Reads a number by its leading digits, as the previous controller did: `100/min` is 100. Other
    /// characters cause a warning. Numbers that it did not read this way, such as ports, use
    /// [`Self::parsed`].
    fn leading_digits<T: std::str::FromStr>(&mut self, name: &'static str) -> Option<T> {
        let text = self.optional(name)?;
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let Ok(value) = text[..digits].parse() else { return self.parsed(name) };
        if digits < text.len() {
            let (read, unit) =
                (&text[..digits], if name == "RATE_LIMIT" { "requests a minute" } else { "ms" });
            let warning =
                format!("{name} is {text:?} and is read as {read} ({unit}); set it to a plain number");
            self.warnings.push(warning);
        }
        Some(value)
    }

    pub(super) fn url(&mut self, name: &'static str) -> String {
        self.required(name);
        self.endpoint(name).unwrap_or_default()
    }

    pub(super) fn endpoint(&mut self, name: &'static str) -> Option<String> {
        let url = self.optional(name)?;
        if !url.starts_with("http://") && !url.starts_with("https://") {
            self.problems.push(format!("{name} is not a URL: it must start with http:// or https://"));
        }
        Some(url)
    }

    fn ai_node(&mut self) -> AiNode {
        let url = self.endpoint("AI_NODE_URL");
        AiNode::new(url.as_deref().unwrap_or(AiNode::URL_DEFAULT), self.ai_node_timeout())
    }

    fn ai_node_timeout(&mut self) -> Duration {
        let timeout_ms = self.leading_digits("AI_NODE_TIMEOUT");
        timeout_ms.map_or(AiNode::TIMEOUT_DEFAULT, Duration::from_millis)
    }

    pub(super) fn redis(&mut self) -> RedisAddress {
        if let Some(url) = self.optional("REDIS_URL") {
            if let Some(problem) = redis_url_problem(&url) {
                self.problems.push(format!("REDIS_URL {problem}"));
            }
            return RedisAddress { url: Secret::new(url), variables: "REDIS_URL" };
        }
        let (link_host, port) = self.redis_port();
        let (variables, host) = match (self.optional("REDIS_HOST"), link_host) {
            (Some(host), _) if self.optional("REDIS_PORT").is_none() => ("REDIS_HOST", host),
            (Some(host), _) => ("REDIS_HOST and REDIS_PORT", host),
            (None, Some(host)) => ("REDIS_PORT", host),
            (None, None) => {
                self.missing.push("REDIS_HOST (or REDIS_URL)");
                return RedisAddress { url: Secret::new(String::new()), variables: "REDIS_HOST" };
            }
        };
        if !is_host(&host) {
            self.problems.push(format!("{variables}: not a host name or address; set a URL in REDIS_URL"));
        }
        // A bare IPv6 address needs brackets in a URL.
        let host = if host.contains(':') && !host.starts_with('[') { format!("[{host}]") } else { host };
        RedisAddress { url: Secret::new(format!("redis://{host}:{port}")), variables }
    }

    /// Reads `REDIS_PORT`: a number, or `tcp://host:port`, which Kubernetes and Docker set for a service
    /// named `redis`.
    fn redis_port(&mut self) -> (Option<String>, u16) {
        const DEFAULT: u16 = 6379;
        let Some(text) = self.optional("REDIS_PORT") else { return (None, DEFAULT) };
        let (host, port) = match text.strip_prefix("tcp://") {
            Some(link) => link.rsplit_once(':').map_or((None, ""), |(host, port)| (Some(host), port)),
            None => (None, text.as_str()),
        };
        match port.parse() {
            Ok(port) => (host.map(str::to_owned), port),
            // The value is not shown: it may be a URL with a password.
            Err(_) => {
                self.problems.push("REDIS_PORT must be a port number, or tcp://host:port".to_owned());
                (host.map(str::to_owned), DEFAULT)
            }
        }
    }

    pub(super) fn api_key(&mut self) -> Secret {
        let key = self.required("INFRA_API_KEY");
        if let Some(problem) = api_key_problem(&key).filter(|_| !key.is_empty()) {
            self.problems.push(format!("INFRA_API_KEY: {problem}"));
        }
        Secret::new(key)
    }

    fn rate_limit(&mut self) -> Option<u32> {
        let rate = self.leading_digits("RATE_LIMIT")?;
        if rate == 0 {
            self.problems.push("RATE_LIMIT is 0, which would reject every request".to_owned());
        }
        Some(rate)
    }
}

/// Why a text is not a URL of Redis. The text is not shown: it may contain the password.
fn redis_url_problem(url: &str) -> Option<&'static str> {
    let is_redis = url.starts_with("redis://") || url.starts_with("rediss://");
    let rest = url.split_once("://").map(|(_, rest)| rest).filter(|_| is_redis);
    let Some(rest) = rest else { return Some("must start with redis:// or rediss://") };
    // The text before the last @ is meant as user and password. Each of these characters would end it early.
    let login = rest.rsplit_once('@').map_or("", |(login, _)| login);
    login.contains(['/', '?', '#']).then_some(
        "contains / ? or # in the user or password; percent-encode them: / is %2F, ? is %3F, # is %23, \
         @ is %40, % is %25",
    )
}

/// Whether a text has the form of a host name or an address.
fn is_host(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    let address = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let address = address.split_once('%').map_or(address, |(address, _)| address);
    address.parse::<std::net::Ipv6Addr>().is_ok() || (!text.is_empty() && text.bytes().all(plain))
}

/// Reads `RATE_LIMIT` from the process environment, for `dev`. Returns it with warnings.
pub fn rate_limit_from_process() -> Result<(Option<u32>, Vec<String>), ConfigError> {
    let name = "RATE_LIMIT";
    let vars = std::env::var(name).ok().map(|value| (name.to_owned(), value)).into_iter().collect();
    let mut reader = Reader::new(&vars);
    let rate = reader.rate_limit();
    reader.finish().map(|warnings| (rate, warnings))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &[(&str, &str)] = &[
        ("AWS_REGION", "eu-west-1"),
        ("TABLE_NAME", "InfraFunctions"),
        ("LOGS_TABLE_NAME", "InfraExecutionLogs"),
        ("SQS_URL", "https://sqs.eu-west-1.amazonaws.com/1/q"),
        ("REDIS_HOST", "cache"),
        ("INFRA_API_KEY", "key"),
        ("BUCKET_NAME", "code"),
    ];

    fn parse(changes: &[(&str, &str)]) -> Result<Env, ConfigError> {
        let vars = OLD.iter().chain(changes).map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Env::parse(&vars)
    }

    #[test]
    fn values_that_are_not_utf_8_are_reported_and_not_shown() {
        use std::os::unix::ffi::OsStringExt;
        let bad = || OsString::from_vec(b"ab\xff".to_vec());
        let vars = [
            ("INFRA_API_KEY", bad()),
            ("AWS_ACCESS_KEY_ID", bad()),
            ("TABLE_NAME", "ok".into()),
            ("OF_ANOTHER_PROGRAM", bad()),
        ];
        let problems = unreadable_variables(vars.into_iter().map(|(name, value)| (name.into(), value)));
        let expected =
            ["AWS_ACCESS_KEY_ID", "INFRA_API_KEY"].map(|n| format!("{n} contains bytes that are not UTF-8"));
        assert_eq!(problems, expected);
    }

    #[test]
    fn the_environment_of_the_previous_controller_works() {
        let env = parse(&[]).unwrap();
        assert_eq!((env.port, env.redis.url.reveal()), (8080, "redis://cache:6379"));
        assert_eq!(env.state_dir, PathBuf::from("./state"));
        let env = parse(&[("REDIS_URL", "rediss://u:p@h:1"), ("PORT", "0"), ("RATE_LIMIT", "5")]).unwrap();
        assert_eq!((env.redis.url.reveal(), env.port, env.rate_limit), ("rediss://u:p@h:1", 0, Some(5)));
    }

    #[test]
    fn addresses_of_redis() {
        for (vars, url, variables) in [
            (&[("REDIS_HOST", "::1")][..], "redis://[::1]:6379", "REDIS_HOST"),
            (&[("REDIS_HOST", "[fe80::1%eth0]")], "redis://[fe80::1%eth0]:6379", "REDIS_HOST"),
            (&[("REDIS_HOST", "h"), ("REDIS_PORT", "1")], "redis://h:1", "REDIS_HOST and REDIS_PORT"),
            // The link of a service, as Kubernetes and Docker set it.
            (&[("REDIS_HOST", ""), ("REDIS_PORT", "tcp://10.0.0.1:7")], "redis://10.0.0.1:7", "REDIS_PORT"),
            (&[("REDIS_PORT", "tcp://10.0.0.1:7")], "redis://cache:7", "REDIS_HOST and REDIS_PORT"),
            (&[("REDIS_HOST", ""), ("REDIS_PORT", "tcp://[::1]:7")], "redis://[::1]:7", "REDIS_PORT"),
            (&[("REDIS_PORT", "x"), ("REDIS_URL", "redis://u:p%2F@@h\n")], "redis://u:p%2F@@h", "REDIS_URL"),
            (&[("REDIS_URL", "rediss://h/0?protocol=resp3")], "rediss://h/0?protocol=resp3", "REDIS_URL"),
        ] {
            let env = parse(vars).unwrap_or_else(|e| panic!("{vars:?}: {e}"));
            assert_eq!((env.redis.url.reveal(), env.redis.variables), (url, variables), "{vars:?}");
        }
    }

    #[test]
    fn no_part_of_a_password_is_shown() {
        for (name, value, hint) in [
            ("REDIS_URL", "redis://u:hunter/2@h:1", "%2F"),
            ("REDIS_URL", "redis://u:hunter#2@h:1", "%23"),
            ("REDIS_URL", "redis://u:hunter?2@h:1", "%3F"),
            ("REDIS_URL", "redis://u:1/hunter@h:1", "%2F"),
            ("REDIS_URL", "rediss://hunter/2:x@h", "%2F"),
            ("REDIS_URL", "redis://u:hunter@2/x@h", "%40"),
            ("REDIS_URL", "hunter://u:2@h", "redis://"),
            ("REDIS_URL", "u:hunter@h:1", "redis://"),
            ("REDIS_HOST", "redis://:hunter@h:1", "REDIS_URL"),
            ("REDIS_HOST", ":hunter@h", "REDIS_URL"),
            ("REDIS_HOST", "h/hunter", "REDIS_URL"),
            ("REDIS_PORT", "redis://:hunter@h:1", "tcp://host:port"),
            ("REDIS_PORT", "tcp://h:hunter", "tcp://host:port"),
            ("REDIS_PORT", "tcp://hunter", "tcp://host:port"),
            ("REDIS_PORT", "tcp://", "tcp://host:port"),
        ] {
            let error = parse(&[(name, value)]).expect_err(value).to_string();
            assert!(error.starts_with(name), "{value}: {error}");
            assert!(error.contains(hint) && !error.contains("hunter"), "{value}: {error}");
        }
    }

    #[test]
    fn weak_master_keys_cause_a_warning() {
        for (key, words) in [
            ("q9", Some("fewer than 16")),
            ("masterkey", Some("fewer than 16")),
            ("fifteen-letters", Some("fewer than 16")),
            ("your-secret-api-key", Some("easy to guess")),
            ("YOUR_INFRA_API_KEY", Some("easy to guess")),
            ("change-me-change-me", Some("easy to guess")),
            ("aaaaaaaaaaaaaaaaaaaaaaaa", Some("easy to guess")),
            ("0123456789abcdef", Some("easy to guess")),
            ("1234567890-1234567890", Some("easy to guess")),
            ("------------------", Some("easy to guess")),
            ("test-key-77-0001-7f3c2b", None),
            ("6b1f0c7a9de24b53", None),
        ] {
            let warning = master_key_warning(key);
            assert_eq!(warning.is_some(), words.is_some(), "{key}: {warning:?}");
            let warning = warning.unwrap_or_default();
            assert!(warning.contains(words.unwrap_or_default()) && !warning.contains(key), "{warning}");
        }
    }

    #[test]
    fn numbers_with_other_characters_cause_a_warning() {
        for (name, value, read, is_warned) in [
            ("RATE_LIMIT", "100", 100, false),
            ("RATE_LIMIT", "100/min", 100, true),
            ("RATE_LIMIT", " 3000 per minute ", 3000, true),
            ("RATE_LIMIT", "1e3", 1, true),
            ("RATE_LIMIT", "50.5", 50, true),
            ("RATE_LIMIT", "+7", 7, false),
            ("AI_NODE_TIMEOUT", "2000ms", 2000, true),
            ("AI_NODE_TIMEOUT", "1500", 1500, false),
        ] {
            let env = parse(&[(name, value)]).unwrap_or_else(|e| panic!("{name}={value}: {e}"));
            let found = if name == "RATE_LIMIT" {
                env.rate_limit.map(u128::from)
            } else {
                Some(env.ai_node.timeout.as_millis())
            };
            assert_eq!(found, Some(read), "{name}={value}");
            let warned = env.warnings.iter().filter(|warning| {
                warning.contains(name)
                    && warning.contains(value.trim())
                    && warning.contains(&read.to_string())
            });
            assert_eq!((warned.count(), env.warnings.len()), (is_warned.into(), is_warned.into()), "{value}");
        }
    }

    #[test]
    fn the_ai_node_has_the_previous_default() {
        for (vars, url, timeout_ms) in [
            (&[][..], "http://10.0.20.100:11434", 2000),
            (&[("AI_NODE_URL", "")], "http://10.0.20.100:11434", 2000),
            (
                &[("AI_NODE_URL", "http://127.0.0.1:1/"), ("AI_NODE_TIMEOUT", "300")],
                "http://127.0.0.1:1",
                300,
            ),
        ] {
            let node = parse(vars).unwrap().ai_node;
            assert_eq!((node.url.reveal(), node.timeout), (url, Duration::from_millis(timeout_ms)));
        }
    }

    #[test]
    fn all_missing_variables_are_in_one_line() {
        let error = Env::parse(&HashMap::new()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "missing environment variables: AWS_REGION, TABLE_NAME, LOGS_TABLE_NAME, SQS_URL, \
             REDIS_HOST (or REDIS_URL), INFRA_API_KEY, BUCKET_NAME"
        );
    }

    #[test]
    fn errors_never_contain_secrets() {
        for (name, value) in [
            ("PORT", "http"),
            ("PORT", "70000"),
            ("RATE_LIMIT", "-1"),
            ("RATE_LIMIT", "0"),
            ("SQS_URL", "queue"),
            ("AWS_ENDPOINT_URL", "localhost:4566"),
            ("SQS_ENDPOINT", "localhost"),
            ("REDIS_URL", "http://hunter2@h"),
            ("REDIS_URL", "redis://:hunter2/x@h"),
            ("REDIS_PORT", "x"),
            ("AI_NODE_URL", "hunter2"),
            ("AI_NODE_TIMEOUT", "soon"),
            ("AI_NODE_TIMEOUT", "-5"),
            ("RATE_LIMIT", "99999999999/min"),
            ("RATE_LIMIT", "0/min"),
            ("RATE_LIMIT", "/100"),
            ("INFRA_API_KEY", "hunter2 ü"),
        ] {
            let error = parse(&[(name, value)]).expect_err(name).to_string();
            assert!(error.contains(name), "{error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
        assert_eq!(format!("{:?}", Secret::new("hunter2".into())), "(secret)");
    }
}
