//! The environment of `worker`: what it shares with the gateway, and the names of the Python agent before it.
//!
//! The agent had no default for most of them, and neither has this worker: a worker that takes jobs from a
//! wrong queue, or reports to a wrong gateway, does harm.

use super::env::{AiNode, Reader, RedisAddress, process_variables};
use super::error::ConfigError;
use super::worker::output_bytes_problem;
use crate::config::secret::Secret;
use std::collections::HashMap;
use std::path::PathBuf;

/// The environment of `worker`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerEnv {
    /// `AWS_REGION`: region of queue and buckets.
    pub region: String,
    /// `SQS_URL`: the task queue. The URL of a FIFO queue ends in `.fifo`.
    pub queue_url: String,
    pub redis: RedisAddress,
    /// `BUCKET_NAME`, or `S3_CODE_BUCKET` of the agent: the code of functions whose message names no bucket.
    pub bucket: String,
    /// `S3_USER_DATA_BUCKET`: files that functions write for their callers. `None`: they are not uploaded.
    pub output_bucket: Option<String>,
    /// `CONTROLLER_URL`: where heartbeats go. `None`: the status goes to Redis.
    pub controller: Option<ControllerAddress>,
    /// `WORKER_ID`: the name of this worker. `None`: that of the machine.
    pub worker_id: Option<String>,
    /// `STATE_DIR`: directory of the runs in progress and of the code cache.
    pub state_dir: PathBuf,
    pub run: RunEnv,
    // Older names of endpoints, used where the SDK's own `AWS_ENDPOINT_URL_*` is unset.
    pub sqs_endpoint: Option<String>,
    pub s3_endpoint: Option<String>,
    /// Warnings about values that were possibly meant differently.
    pub warnings: Vec<String>,
}

/// The gateway that receives heartbeats.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControllerAddress {
    /// May contain a password.
    pub url: Secret,
    /// `INFRA_API_KEY`: a key with the scope `worker`.
    pub api_key: Secret,
}

/// What the environment says about runs, in `worker` and in `dev`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RunEnv {
    /// `AI_ENDPOINT`: address of the models, passed to functions under the same name.
    pub ai_endpoint: Option<String>,
    /// `MAX_OUTPUT_SIZE`: replaces `output.bytes_max`.
    pub output_bytes_max: Option<usize>,
}

impl RunEnv {
    /// Reads the process environment of `dev`, which has no default address of models.
    ///
    /// # Errors
    /// Each malformed variable.
    pub fn from_process() -> Result<Self, ConfigError> {
        let vars = process_variables()?;
        let mut reader = Reader::new(&vars);
        let run = Self::read(&mut reader);
        reader.finish().map(|_| run)
    }

    fn read(reader: &mut Reader<'_>) -> Self {
        let output_bytes_max = reader.parsed("MAX_OUTPUT_SIZE");
        if let Some(problem) = output_bytes_max.and_then(output_bytes_problem) {
            reader.problems.push(format!("MAX_OUTPUT_SIZE {problem}"));
        }
        Self { ai_endpoint: reader.endpoint("AI_ENDPOINT"), output_bytes_max }
    }
}

/// Longest name of a worker that the gateway accepts in a heartbeat.
const WORKER_ID_BYTES_MAX: usize = 128;

impl WorkerEnv {
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
            region: reader.region(),
            queue_url: reader.url("SQS_URL"),
            redis: reader.redis(),
            bucket: bucket(&mut reader),
            output_bucket: reader.optional("S3_USER_DATA_BUCKET"),
            controller: controller(&mut reader),
            worker_id: worker_id(&mut reader),
            state_dir: reader.optional("STATE_DIR").unwrap_or_else(|| "./state".into()).into(),
            run: RunEnv::read(&mut reader),
            sqs_endpoint: reader.endpoint("SQS_ENDPOINT"),
            s3_endpoint: reader.endpoint("S3_ENDPOINT"),
            warnings: Vec::new(),
        };
        // The default of the agent, which functions that ask a model rely on.
        env.run.ai_endpoint.get_or_insert_with(|| AiNode::URL_DEFAULT.to_owned());
        // The SDK reads these itself, but reports a malformed one only as a failed connection.
        for name in ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_SQS", "AWS_ENDPOINT_URL_S3"] {
            reader.endpoint(name);
        }
        env.warnings = reader.finish()?;
        Ok(env)
    }
}

fn bucket(reader: &mut Reader<'_>) -> String {
    let named = reader.optional("BUCKET_NAME").or_else(|| reader.optional("S3_CODE_BUCKET"));
    named.unwrap_or_else(|| {
        reader.missing.push("BUCKET_NAME (or S3_CODE_BUCKET)");
        String::new()
    })
}

/// A key is needed only for heartbeats.
fn controller(reader: &mut Reader<'_>) -> Option<ControllerAddress> {
    let url = reader.endpoint("CONTROLLER_URL")?;
    Some(ControllerAddress { url: Secret::new(url), api_key: reader.api_key() })
}

fn worker_id(reader: &mut Reader<'_>) -> Option<String> {
    let id = reader.optional("WORKER_ID")?;
    if id.len() > WORKER_ID_BYTES_MAX || !id.bytes().all(|b| b.is_ascii_graphic()) {
        let form =
            format!("must have at most {WORKER_ID_BYTES_MAX} visible ASCII characters, without blanks");
        reader.problems.push(format!("WORKER_ID {form}"));
    }
    Some(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the start script of the agent writes it.
    const OLD: &[(&str, &str)] = &[
        ("AWS_REGION", "ap-northeast-2"),
        ("SQS_URL", "https://sqs.ap-northeast-2.amazonaws.com/1/q"),
        ("S3_CODE_BUCKET", "code"),
        ("S3_USER_DATA_BUCKET", "data"),
        ("TABLE_NAME", "InfraFunctions"),
        ("REDIS_HOST", "cache"),
        ("REDIS_PORT", "6379"),
        ("DOCKER_WORK_DIR_ROOT", "/home/ec2-user/faas_workspace"),
        ("WARM_POOL_PYTHON_SIZE", "8"),
        ("INFRA_API_KEY", "key"),
        ("AI_ENDPOINT", "http://10.0.20.100:11434"),
        ("CONTROLLER_URL", "http://10.0.1.5:8080"),
    ];

    fn parse(changes: &[(&str, &str)]) -> Result<WorkerEnv, ConfigError> {
        let vars = OLD.iter().chain(changes).map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        WorkerEnv::parse(&vars)
    }

    #[test]
    fn the_environment_of_the_agent_works() {
        let env = parse(&[]).unwrap();
        assert_eq!((env.bucket.as_str(), env.output_bucket.as_deref()), ("code", Some("data")));
        assert_eq!((env.redis.url.reveal(), env.worker_id), ("redis://cache:6379", None));
        let controller = env.controller.unwrap();
        assert_eq!((controller.url.reveal(), controller.api_key.reveal()), ("http://10.0.1.5:8080", "key"));
        assert_eq!(env.state_dir, PathBuf::from("./state"));
        let run = RunEnv { ai_endpoint: Some("http://10.0.20.100:11434".into()), output_bytes_max: None };
        assert_eq!((env.run, env.warnings), (run, vec![]));
    }

    #[test]
    fn names_of_the_gateway_win() {
        let env =
            parse(&[("BUCKET_NAME", "ours"), ("MAX_OUTPUT_SIZE", " 2048 "), ("WORKER_ID", "w-1")]).unwrap();
        assert_eq!((env.bucket.as_str(), env.worker_id.as_deref()), ("ours", Some("w-1")));
        assert_eq!(env.run.output_bytes_max, Some(2048));
        let env = parse(&[("AI_ENDPOINT", ""), ("S3_USER_DATA_BUCKET", " ")]).unwrap();
        assert_eq!(env.run.ai_endpoint.as_deref(), Some(AiNode::URL_DEFAULT));
        assert_eq!(env.output_bucket, None);
    }

    #[test]
    fn a_key_is_needed_only_for_heartbeats() {
        let env = parse(&[("CONTROLLER_URL", ""), ("INFRA_API_KEY", "")]).unwrap();
        assert_eq!(env.controller, None);
        let error = parse(&[("INFRA_API_KEY", "")]).unwrap_err();
        assert_eq!(error.to_string(), "missing environment variables: INFRA_API_KEY");
    }

    #[test]
    fn all_missing_variables_are_in_one_line() {
        let error = WorkerEnv::parse(&HashMap::new()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "missing environment variables: AWS_REGION, SQS_URL, REDIS_HOST (or REDIS_URL), \
             BUCKET_NAME (or S3_CODE_BUCKET)"
        );
    }

    #[test]
    fn errors_name_their_variable_and_never_contain_secrets() {
        let long = "x".repeat(WORKER_ID_BYTES_MAX + 1);
        for (name, value) in [
            ("CONTROLLER_URL", "hunter2:8080"),
            ("INFRA_API_KEY", "hunter2 ü"),
            ("MAX_OUTPUT_SIZE", "1 MB"),
            ("MAX_OUTPUT_SIZE", "-1"),
            ("MAX_OUTPUT_SIZE", "0"),
            ("MAX_OUTPUT_SIZE", "99999999999"),
            ("AI_ENDPOINT", "10.0.20.100"),
            ("WORKER_ID", "two words"),
            ("WORKER_ID", &long),
            ("AWS_ENDPOINT_URL_S3", "localhost:4566"),
        ] {
            let error = parse(&[(name, value)]).expect_err(name).to_string();
            assert!(error.starts_with(name) && !error.contains("hunter2"), "{error}");
        }
    }
}
