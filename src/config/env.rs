//! The environment of `serve`: the old controller's `.env`, unchanged.

use super::ConfigError;
use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// A value that must not reach a log, a metric or an error.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(value: String) -> Self {
        Self(value)
    }

    /// The value itself; the name makes each use stand out in review.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("(secret)")
    }
}

/// What `serve` needs of the environment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Env {
    /// 0: any free port.
    pub port: u16,
    pub region: String,
    pub functions_table: String,
    pub logs_table: String,
    pub queue_url: String,
    pub redis_url: Secret,
    pub api_key: Secret,
    pub bucket: String,
    /// Overrides the default limit of `conf/`: requests a minute per API key.
    pub rate_limit: Option<u32>,
    pub state_dir: PathBuf,
    /// The old names; used where the SDK's own `AWS_ENDPOINT_URL_*` is unset.
    pub sqs_endpoint: Option<String>,
    pub dynamodb_endpoint: Option<String>,
    pub s3_endpoint: Option<String>,
    pub ai_node: AiNode,
    /// What was read otherwise than it may have been meant.
    pub warnings: Vec<String>,
}

/// The node whose models are the catalogue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AiNode {
    /// Without a slash at the end. It may hold a password.
    pub url: Secret,
    pub timeout: Duration,
}

impl AiNode {
    /// Where it is in the platform's own network: the old controller asked there unless told otherwise.
    const URL_DEFAULT: &str = "http://10.0.20.100:11434";
    const TIMEOUT_DEFAULT: Duration = Duration::from_secs(2);

    /// Reads the process environment, for a node that needs nothing else of it and stands in no such network: without
    /// an address there is none. With it, what is to be warned of.
    pub fn from_process() -> Result<(Option<Self>, Vec<String>), ConfigError> {
        let names = ["AI_NODE_URL", "AI_NODE_TIMEOUT"];
        let vars =
            names.iter().filter_map(|name| Some(((*name).to_owned(), std::env::var(name).ok()?))).collect();
        let mut reader = Reader::new(&vars);
        let (url, timeout) = (reader.endpoint("AI_NODE_URL"), reader.ai_node_timeout());
        let Reader { problems, warnings, .. } = reader;
        let ai_node = url.map(|url| Self::new(&url, timeout));
        if problems.is_empty() { Ok((ai_node, warnings)) } else { Err(ConfigError(problems)) }
    }

    fn new(url: &str, timeout: Duration) -> Self {
        Self { url: Secret::new(url.trim_end_matches('/').to_owned()), timeout }
    }
}

/// Why a key cannot be one: it is compared with a header field.
pub fn api_key_problem(key: &str) -> Option<&'static str> {
    let fits = !key.is_empty() && key.bytes().all(|b| (0x21..=0x7e).contains(&b));
    (!fits).then_some("the API key must be visible ASCII without blanks: it is compared with a header field")
}

/// Port of `serve` and `dev` when none is named.
pub const PORT_DEFAULT: u16 = 8080;

impl Env {
    /// Reads the process environment.
    pub fn from_process() -> Result<Self, ConfigError> {
        // Values that are not Unicode cannot be valid here; they read as unset only if nothing needs them.
        Self::parse(
            &std::env::vars_os()
                .filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)))
                .collect(),
        )
    }

    /// All problems at once; the first line names every missing variable.
    pub fn parse(vars: &HashMap<String, String>) -> Result<Self, ConfigError> {
        let mut reader = Reader::new(vars);
        let mut env = Self {
            port: reader.parsed("PORT").unwrap_or(PORT_DEFAULT),
            region: reader.required("AWS_REGION"),
            functions_table: reader.required("TABLE_NAME"),
            logs_table: reader.required("LOGS_TABLE_NAME"),
            queue_url: reader.url("SQS_URL"),
            redis_url: reader.redis(),
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
        // The SDK reads these itself, but would only fail to connect when one is malformed.
        for name in
            ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_SQS", "AWS_ENDPOINT_URL_DYNAMODB", "AWS_ENDPOINT_URL_S3"]
        {
            reader.endpoint(name);
        }
        let Reader { missing, mut problems, warnings, .. } = reader;
        env.warnings = warnings;
        if !missing.is_empty() {
            problems.insert(0, format!("missing environment variables: {}", missing.join(", ")));
        }
        if problems.is_empty() { Ok(env) } else { Err(ConfigError(problems)) }
    }
}

struct Reader<'a> {
    vars: &'a HashMap<String, String>,
    missing: Vec<&'static str>,
    problems: Vec<String>,
    warnings: Vec<String>,
}

impl<'a> Reader<'a> {
    fn new(vars: &'a HashMap<String, String>) -> Self {
        Self { vars, missing: Vec::new(), problems: Vec::new(), warnings: Vec::new() }
    }

    /// An empty variable is an unset one, as in the old controller.
    fn optional(&self, name: &str) -> Option<String> {
        self.vars.get(name).map(|v| v.trim()).filter(|v| !v.is_empty()).map(str::to_owned)
    }

    fn required(&mut self, name: &'static str) -> String {
        self.optional(name).unwrap_or_else(|| {
            self.missing.push(name);
            String::new()
        })
    }

    fn parsed<T: std::str::FromStr>(&mut self, name: &'static str) -> Option<T> {
        let text = self.optional(name)?;
        let value = text.parse().ok();
        if value.is_none() {
            self.problems.push(format!("{name} is {text:?}, which is not a number in range"));
        }
        value
    }

    /// A number as the old controller read it: by its leading digits, so `100/min` is 100. What follows them is warned
    /// of. Numbers that the old controller did not read, ports among them, are [`Self::parsed`].
    fn leading_digits<T: std::str::FromStr>(&mut self, name: &'static str) -> Option<T> {
        let text = self.optional(name)?;
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let Ok(value) = text[..digits].parse() else { return self.parsed(name) };
        if digits < text.len() {
            let (read, unit) =
                (&text[..digits], if name == "RATE_LIMIT" { "requests a minute" } else { "ms" });
            let warning =
                format!("{name} is {text:?} and is read as {read} ({unit}): set it to a number alone");
            self.warnings.push(warning);
        }
        Some(value)
    }

    fn url(&mut self, name: &'static str) -> String {
        self.required(name);
        self.endpoint(name).unwrap_or_default()
    }

    fn endpoint(&mut self, name: &'static str) -> Option<String> {
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

    fn redis(&mut self) -> Secret {
        if let Some(url) = self.optional("REDIS_URL") {
            if !url.starts_with("redis://") && !url.starts_with("rediss://") {
                self.problems.push("REDIS_URL must start with redis:// or rediss://".to_owned());
            }
            return Secret::new(url);
        }
        let port: u16 = self.parsed("REDIS_PORT").unwrap_or(6379);
        let Some(host) = self.optional("REDIS_HOST") else {
            self.missing.push("REDIS_HOST (or REDIS_URL)");
            return Secret::new(String::new());
        };
        // A bare IPv6 address needs brackets in a URL.
        let host = if host.contains(':') && !host.starts_with('[') { format!("[{host}]") } else { host };
        Secret::new(format!("redis://{host}:{port}"))
    }

    fn api_key(&mut self) -> Secret {
        let key = self.required("INFRA_API_KEY");
        if let Some(problem) = api_key_problem(&key).filter(|_| !key.is_empty()) {
            self.problems.push(format!("INFRA_API_KEY: {problem}"));
        }
        Secret::new(key)
    }

    fn rate_limit(&mut self) -> Option<u32> {
        let rate = self.leading_digits("RATE_LIMIT")?;
        if rate == 0 {
            self.problems.push("RATE_LIMIT is 0, which would refuse every request".to_owned());
        }
        Some(rate)
    }
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
    fn the_old_environment_works() {
        let env = parse(&[]).unwrap();
        assert_eq!((env.port, env.redis_url.reveal()), (8080, "redis://cache:6379"));
        assert_eq!(env.state_dir, PathBuf::from("./state"));
        let env = parse(&[("REDIS_URL", "rediss://u:p@h:1"), ("PORT", "0"), ("RATE_LIMIT", "5")]).unwrap();
        assert_eq!((env.redis_url.reveal(), env.port, env.rate_limit), ("rediss://u:p@h:1", 0, Some(5)));
        assert_eq!(parse(&[("REDIS_HOST", "::1")]).unwrap().redis_url.reveal(), "redis://[::1]:6379");
    }

    #[test]
    fn numbers_are_read_by_their_leading_digits_and_a_rest_is_warned_of() {
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
    fn the_ai_node_is_where_the_old_controller_asked() {
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
    fn all_missing_names_stand_in_one_line() {
        let error = Env::parse(&HashMap::new()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "missing environment variables: AWS_REGION, TABLE_NAME, LOGS_TABLE_NAME, SQS_URL, \
             REDIS_HOST (or REDIS_URL), INFRA_API_KEY, BUCKET_NAME"
        );
    }

    #[test]
    fn malformed_values_are_told_without_secrets() {
        for (name, value) in [
            ("PORT", "http"),
            ("PORT", "70000"),
            ("RATE_LIMIT", "-1"),
            ("RATE_LIMIT", "0"),
            ("SQS_URL", "queue"),
            ("AWS_ENDPOINT_URL", "localhost:4566"),
            ("SQS_ENDPOINT", "localhost"),
            ("REDIS_URL", "http://hunter2@h"),
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
