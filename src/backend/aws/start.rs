//! Connects to all services at start: the checks run in parallel within one deadline, each with its own
//! error.

use super::dynamodb::claims::ClaimTable;
use super::dynamodb::code_list::CodeListTable;
use super::dynamodb::executions::ExecutionTable;
use super::dynamodb::functions::FunctionTable;
use super::json_call::CredentialCache;
use super::redis::beats::Beats;
use super::redis::changes::RedisChanges;
use super::redis::connection::{self, CommandConnection, RedisUrl};
use super::redis::events::RedisEvents;
use super::redis::journal::RedisJournal;
use super::redis::limits::RedisLimits;
use super::redis::membership::RedisMembership;
use super::redis::probe::{RedisProbe, RedisProblem};
use super::redis::results::RedisResults;
use super::redis::summaries::RedisSummaries;
use super::redis::workers::RedisWorkers;
use super::s3::CodeBucket;
use super::settings::AwsSettings;
use super::sqs::dead_letters::DeadLetterQueue;
use super::sqs::queue::SqsQueue;
use super::{client, error, s3};
use crate::backend::aws::retry::{no_answer, within};
use crate::backend::ports::Backend;
use crate::backend::{BackendError, Membership, StartProblem};
use crate::https;
use crate::model::NodeId;
use aws_config::SdkConfig;
use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::{ProvideCredentials, SharedCredentialsProvider};
use std::sync::Arc;
use tokio::time::{Instant, timeout_at};

/// Connects to all services and checks them. Reports all problems, not only the first.
///
/// # Errors
/// One problem for each service that is missing, denies access or does not answer by the deadline.
/// Without credentials the AWS services are not asked.
pub async fn connect(settings: AwsSettings) -> Result<AwsConnection, Vec<StartProblem>> {
    let deadline = Instant::now() + settings.start_deadline;
    match tokio::join!(connect_aws(&settings, deadline), connect_redis(&settings, deadline)) {
        (Ok(mut aws), Ok((redis, of_redis))) => {
            let commands = Arc::new(CommandConnection::new(redis.clone()));
            let membership =
                Arc::new(RedisMembership::new(Arc::clone(&commands), &settings.logs_table, settings.process));
            let dead_letters = aws.queue.dead_letters(Arc::clone(&commands)).await.unwrap_or_else(|error| {
                aws.warnings.push(format!("the dead-letter queue is not read: {error}"));
                None
            });
            let warnings = std::mem::take(&mut aws.warnings).into_iter().chain(of_redis).collect();
            Ok(AwsConnection { warnings, settings, aws, redis, commands, membership, dead_letters })
        }
        (aws, redis) => {
            let mut problems = aws.err().unwrap_or_default();
            problems.extend(redis.err());
            Err(problems)
        }
    }
}

/// A backend whose services have all answered. It has no node id yet.
pub struct AwsConnection {
    /// Problems that do not prevent the start, for the log.
    pub warnings: Vec<String>,
    settings: AwsSettings,
    aws: Aws,
    redis: redis::Client,
    commands: Arc<CommandConnection>,
    membership: Arc<RedisMembership>,
    dead_letters: Option<DeadLetterQueue>,
}

impl AwsConnection {
    /// The store of the node ids in use.
    pub fn membership(&self) -> &dyn Membership {
        self.membership.as_ref()
    }

    /// Returns the first of `nodes` whose results Redis allows this user to subscribe to.
    ///
    /// # Errors
    /// None of them is allowed.
    pub async fn check_results(&self, nodes: &[NodeId]) -> Result<NodeId, StartProblem> {
        let deadline = Instant::now() + self.settings.start_deadline;
        let what = redis_at(&self.settings.redis_url);
        self.probe(deadline).results(nodes).await.map_err(|unfit| problem(&what, unfit.error, unfit.mend))
    }

    /// Returns a warning if the beats of `node` do not work. The node can run without them.
    pub async fn beats_warning(&self, node: NodeId) -> Option<String> {
        self.probe(Instant::now() + self.settings.start_deadline).beats_warning(node).await
    }

    fn probe(&self, deadline: Instant) -> RedisProbe<'_> {
        RedisProbe::new(&self.redis, &self.commands, &self.settings.functions_table, deadline)
    }

    /// Builds the backend for the node id `node`.
    pub fn backend(self, node: NodeId) -> Backend {
        let Self { settings, aws, redis, commands, membership, dead_letters, .. } = self;
        let beats = Arc::new(Beats::new(Arc::clone(&commands), node, settings.process));
        let (client, of_changes) = (redis.clone(), Arc::clone(&beats));
        let changes = RedisChanges::new(client, Arc::clone(&commands), of_changes, &settings.functions_table);
        let functions = Arc::new(aws.functions);
        Backend {
            queue: Arc::new(aws.queue),
            results: Arc::new(RedisResults::new(redis, Arc::clone(&commands), beats, node)),
            journal: Arc::new(RedisJournal::new(Arc::clone(&commands), functions.clone())),
            dead_letters: dead_letters.map(|queue| Arc::new(queue) as _),
            membership: Some(membership),
            functions,
            executions: Arc::new(aws.executions),
            code: Arc::new(aws.code),
            code_list: Arc::new(aws.code_list),
            claims: Arc::new(aws.claims),
            workers: Arc::new(RedisWorkers::new(Arc::clone(&commands))),
            summaries: Arc::new(RedisSummaries::new(Arc::clone(&commands), &settings.logs_table)),
            changes: Some(Arc::new(changes)),
            events: Some(Arc::new(RedisEvents::new(Arc::clone(&commands), &settings.logs_table))),
            limits: Some(Arc::new(RedisLimits::new(commands))),
        }
    }
}

struct Aws {
    queue: SqsQueue,
    functions: FunctionTable,
    executions: ExecutionTable,
    code_list: CodeListTable,
    claims: ClaimTable,
    code: CodeBucket,
    warnings: Vec<String>,
}

async fn connect_aws(settings: &AwsSettings, deadline: Instant) -> Result<Aws, Vec<StartProblem>> {
    let config = client::sdk_config(&settings.region).await;
    let provider = check_credentials(&config, deadline).await.map_err(|problem| vec![problem])?;
    let credentials = Arc::new(CredentialCache::new(provider));
    let https = || https::client(client::CONNECT_TIMEOUT).map_err(|e| BackendError::Invalid(e.to_string()));

    let sqs = client::sqs(&config, settings.sqs_endpoint.as_deref());
    let dynamodb = client::dynamodb(&config, settings.dynamodb_endpoint.as_deref());
    let s3 = client::s3(&config, settings.s3_endpoint.as_deref());
    let code_list = CodeListTable::new(dynamodb.clone(), &settings.logs_table);
    let claims = ClaimTable::new(dynamodb.clone(), &settings.logs_table);
    let (queue, functions, executions, bucket) = tokio::join!(
        within(deadline, async || {
            SqsQueue::open(sqs.clone(), https()?, Arc::clone(&credentials), &settings.queue_url).await
        }),
        within(deadline, async || {
            let (table, logs_table) = (&settings.functions_table, &settings.logs_table);
            FunctionTable::open(dynamodb.clone(), https()?, Arc::clone(&credentials), table, logs_table).await
        }),
        within(deadline, async || {
            let table = &settings.logs_table;
            ExecutionTable::open(dynamodb.clone(), https()?, Arc::clone(&credentials), table).await
        }),
        // Tried once: a bucket that does not answer is only a warning.
        timeout_at(deadline, s3::probe(&s3, &settings.bucket)),
    );
    let mut problems = Vec::new();
    let queue_amiss = |error| queue_problem(&settings.queue_url, error, "sqs:SendMessage");
    let queue = queue.map_err(|error| problems.push(queue_amiss(error))).ok();
    let table_amiss = |what, table, keys| move |error| table_problem(what, table, keys, error);
    let functions_amiss =
        table_amiss("the function table", &settings.functions_table, "hash key functionId (S)");
    let keys = "hash key functionId (S) and range key timestamp (S)";
    let executions_amiss = table_amiss("the log table", &settings.logs_table, keys);
    let functions = functions.map_err(|error| problems.push(functions_amiss(error))).ok();
    let executions = executions.map_err(|error| problems.push(executions_amiss(error))).ok();
    match (queue, functions, executions) {
        (Some(queue), Some(functions), Some(executions)) if problems.is_empty() => {
            let warnings = bucket_warning(&settings.bucket, bucket).into_iter().collect();
            let code = CodeBucket::new(s3, &settings.bucket);
            Ok(Aws { queue, functions, executions, code_list, claims, code, warnings })
        }
        _ => Err(problems),
    }
}

pub(super) async fn check_credentials(
    config: &SdkConfig,
    deadline: Instant,
) -> Result<SharedCredentialsProvider, StartProblem> {
    let found = match config.credentials_provider() {
        None => Err(BackendError::Missing("the AWS credential chain is empty".into())),
        // Tried once: the providers in the chain have their own retries.
        Some(provider) => match timeout_at(deadline, provider.provide_credentials()).await {
            Ok(Ok(_)) => Ok(provider),
            // A role that may not be assumed, or a session that has expired: retries do not help.
            Ok(Err(CredentialsError::ProviderError(_))) => {
                Err(BackendError::Denied("a provider in the AWS credential chain was denied access".into()))
            }
            Ok(Err(error)) => Err(error::credentials_class(&error)),
            Err(_) => Err(no_answer()),
        },
    };
    found.map_err(|error| {
        let mend = match &error {
            BackendError::Invalid(_) => {
                "Copy them again without line breaks or quotes (the AWS_* variables or the profile)."
            }
            _ => {
                "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, \
                 or give the machine or container a role."
            }
        };
        problem("the AWS credentials", error, mend)
    })
}

pub(super) fn redis_at(url: &RedisUrl) -> String {
    format!("Redis at {url}")
}

/// Returns the client, and a warning about problems that do not prevent the start.
async fn connect_redis(
    settings: &AwsSettings,
    deadline: Instant,
) -> Result<(redis::Client, Option<String>), StartProblem> {
    let (client, commands) = reach_redis(&settings.redis_url, settings.redis_variables, deadline).await?;
    let probe = RedisProbe::new(&client, &commands, &settings.functions_table, deadline);
    let unfit = |unfit: RedisProblem| problem(&redis_at(&settings.redis_url), unfit.error, unfit.mend);
    let warning = probe.run().await.map_err(unfit)?;
    Ok((client, warning))
}

/// Connects to Redis. `variables`: those from which the URL was built.
pub(super) async fn reach_redis(
    url: &RedisUrl,
    variables: &str,
    deadline: Instant,
) -> Result<(redis::Client, CommandConnection), StartProblem> {
    let out_of_reach =
        |error: BackendError| problem(&redis_at(url), error.clone(), &redis_mend(variables, &error));
    let client = connection::client(url).map_err(out_of_reach)?;
    let commands = CommandConnection::new(client.clone());
    within(deadline, || commands.ping()).await.map_err(out_of_reach)?;
    Ok((client, commands))
}

/// The remedy for a Redis that cannot be reached. Names the variables that were set.
fn redis_mend(variables: &str, error: &BackendError) -> String {
    const FORM: &str = "redis://[user:password@]host[:port][/db]";
    match (error, variables) {
        (BackendError::Denied(_), "REDIS_URL") => "Put the right user and password into REDIS_URL; \
             write / as %2F, # as %23, ? as %3F, @ as %40 and % as %25 in them."
            .to_owned(),
        (BackendError::Denied(_), _) => {
            format!("Put user and password into REDIS_URL ({FORM}), which takes the place of {variables}.")
        }
        (BackendError::Invalid(_), "REDIS_URL") => format!(
            "Write REDIS_URL as {FORM}, or rediss:// for TLS; \
             percent-encode special characters in the password (/ as %2F)."
        ),
        (BackendError::Invalid(_), _) => format!("Correct {variables}."),
        _ => format!("Start Redis, or correct {variables}."),
    }
}

/// `actions`: what this process needs on the queue beside sqs:GetQueueAttributes.
pub(super) fn queue_problem(url: &str, error: BackendError, actions: &str) -> StartProblem {
    let allow =
        format!("Allow sqs:GetQueueAttributes and {actions} on the queue, and check the credentials.");
    let mend = match &error {
        BackendError::Missing(_) => "Create the queue, or correct SQS_URL and AWS_REGION.",
        BackendError::Denied(_) => &allow,
        BackendError::Invalid(_) => "Correct SQS_URL: it is the whole URL of the queue.",
        BackendError::Unavailable(_) => {
            "Check the network, AWS_REGION and AWS_ENDPOINT_URL_SQS (or SQS_ENDPOINT)."
        }
    };
    problem(&format!("the queue {}", without_login(url)), error, mend)
}

fn table_problem(what: &str, table: &str, keys: &str, error: BackendError) -> StartProblem {
    let mend = match &error {
        BackendError::Missing(_) => {
            format!("Create the table with {keys}, or correct TABLE_NAME, LOGS_TABLE_NAME and AWS_REGION.")
        }
        BackendError::Denied(_) => {
            "Allow dynamodb:GetItem, PutItem, UpdateItem, DeleteItem, Query and Scan on the table, \
             and check the credentials."
                .to_owned()
        }
        BackendError::Invalid(_) => format!("Use a table with {keys}."),
        BackendError::Unavailable(_) => {
            "Check the network, AWS_REGION and AWS_ENDPOINT_URL_DYNAMODB (or DYNAMODB_ENDPOINT).".to_owned()
        }
    };
    problem(&format!("{what} {table}"), error, &mend)
}

pub(super) fn bucket_warning(
    bucket: &str,
    probed: Result<Result<(), BackendError>, tokio::time::error::Elapsed>,
) -> Option<String> {
    let text = match probed {
        Ok(Ok(())) => return None,
        Ok(Err(error)) => error.to_string(),
        Err(_) => no_answer().to_string(),
    };
    Some(format!("the bucket {bucket} cannot be used: {text}"))
}

/// The URL without the user and password between `//` and the last `@`.
fn without_login(url: &str) -> String {
    match url.split_once("//").and_then(|(scheme, rest)| Some((scheme, rest.rsplit_once('@')?.1))) {
        Some((scheme, rest)) => format!("{scheme}//{rest}"),
        None => url.to_owned(),
    }
}

pub(super) fn problem(what: &str, error: BackendError, mend: &str) -> StartProblem {
    StartProblem { what: what.to_owned(), error, remedy: mend.to_owned() }
}
