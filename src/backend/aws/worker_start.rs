//! Connects a worker to the services that it uses: SQS, S3 and Redis. As at the start of a node, the checks
//! run in parallel within one deadline, each with its own error.

use super::redis::connection::{CommandConnection, RedisUrl};
use super::redis::lone_status::RedisLoneStatus;
use super::redis::probe::{RedisProbe, RedisProblem};
use super::redis::publisher::ResultPublisher;
use super::retry::within;
use super::s3::{CodeReader, OutputBucket};
use super::sqs::jobs::{JobQueueAttributes, SqsJobs};
use super::start::{bucket_warning, check_credentials, problem, queue_problem, reach_redis, redis_at};
use super::{client, s3};
use crate::backend::{CodeSource, JobSource, LoneStatusStore, OutputStore, StartProblem};
use crate::model::ProcessToken;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::{Instant, timeout_at};

/// What a worker does on the queue, for the operator who has to allow it.
const QUEUE_ACTIONS: &str = "sqs:ReceiveMessage, sqs:DeleteMessage and sqs:ChangeMessageVisibility";

/// The addresses of the services that a worker uses, and the identity of its process.
#[derive(Clone, Debug)]
pub struct AwsWorkerSettings {
    pub region: String,
    pub queue_url: String,
    /// Bucket of the function code. Checked at start; each job names the bucket of its code.
    pub bucket: String,
    /// Bucket for the files that functions write. `None`: they are not stored.
    pub output_bucket: Option<String>,
    pub redis_url: RedisUrl,
    /// The environment variables from which `redis_url` was built; named in error messages.
    pub redis_variables: &'static str,
    /// The old `SQS_ENDPOINT`. Used only where the SDK's own configuration names no endpoint, like the one
    /// below.
    pub sqs_endpoint: Option<String>,
    pub s3_endpoint: Option<String>,
    pub process: ProcessToken,
    /// How long a received job is hidden. `None`: the VisibilityTimeout of the queue.
    pub lease: Option<Duration>,
    /// Deadline for all checks together; they run in parallel.
    pub start_deadline: Duration,
}

/// The services of a worker, which have all answered.
pub struct WorkerPorts {
    /// Problems that do not prevent the start, for the log.
    pub warnings: Vec<String>,
    pub jobs: Arc<dyn JobSource>,
    pub code: Arc<dyn CodeSource>,
    pub outputs: Option<Arc<dyn OutputStore>>,
    pub lone_status: Arc<dyn LoneStatusStore>,
}

/// Connects to all services and checks them. Reports all problems, not only the first.
///
/// # Errors
/// One problem for each service that is missing, denies access or does not answer by the deadline. A bucket
/// that cannot be read is a warning. Without credentials the AWS services are not asked.
pub async fn connect_worker(settings: AwsWorkerSettings) -> Result<WorkerPorts, Vec<StartProblem>> {
    let deadline = Instant::now() + settings.start_deadline;
    match tokio::join!(connect_aws(&settings, deadline), connect_redis(&settings, deadline)) {
        (Ok(aws), Ok((redis, commands))) => {
            // Not the connection of the status, because waits for replicas delay what follows them.
            let publisher = ResultPublisher::new(CommandConnection::new(redis));
            let lease = settings.lease.unwrap_or(aws.attributes.lease);
            let attributes = JobQueueAttributes { lease, ..aws.attributes };
            let jobs = SqsJobs::new(aws.sqs, &settings.queue_url, attributes, publisher, settings.process);
            let output_bucket = settings.output_bucket.as_deref();
            let outputs = output_bucket.map(|bucket| OutputBucket::new(aws.s3.clone(), bucket));
            Ok(WorkerPorts {
                warnings: aws.warnings,
                jobs: Arc::new(jobs),
                code: Arc::new(CodeReader::new(aws.s3)),
                outputs: outputs.map(|outputs| Arc::new(outputs) as _),
                lone_status: Arc::new(RedisLoneStatus::new(commands)),
            })
        }
        (aws, redis) => {
            let mut problems = aws.err().unwrap_or_default();
            problems.extend(redis.err());
            Err(problems)
        }
    }
}

/// The AWS services of a worker.
struct WorkerAws {
    sqs: aws_sdk_sqs::Client,
    attributes: JobQueueAttributes,
    s3: aws_sdk_s3::Client,
    warnings: Vec<String>,
}

async fn connect_aws(
    settings: &AwsWorkerSettings,
    deadline: Instant,
) -> Result<WorkerAws, Vec<StartProblem>> {
    let config = client::sdk_config(&settings.region).await;
    check_credentials(&config, deadline).await.map_err(|problem| vec![problem])?;
    let sqs = client::sqs(&config, settings.sqs_endpoint.as_deref());
    let s3 = client::s3(&config, settings.s3_endpoint.as_deref());
    let output_bucket = settings.output_bucket.as_deref();
    let (attributes, code, outputs) = tokio::join!(
        within(deadline, || JobQueueAttributes::read(&sqs, &settings.queue_url)),
        // Tried once: a bucket that does not answer is only a warning.
        timeout_at(deadline, s3::probe(&s3, &settings.bucket)),
        timeout_at(deadline, async {
            match output_bucket {
                Some(bucket) => s3::probe(&s3, bucket).await,
                None => Ok(()),
            }
        }),
    );
    let attributes =
        attributes.map_err(|error| vec![queue_problem(&settings.queue_url, error, QUEUE_ACTIONS)])?;
    let mut warnings: Vec<String> = bucket_warning(&settings.bucket, code).into_iter().collect();
    warnings.extend(bucket_warning(output_bucket.unwrap_or_default(), outputs));
    warnings.extend(dead_letter_warning(attributes));
    Ok(WorkerAws { sqs, attributes, s3, warnings })
}

fn dead_letter_warning(attributes: JobQueueAttributes) -> Option<String> {
    let text = "the queue has no RedrivePolicy: a job that kills its worker, or whose code cannot be \
                fetched, is delivered again until its message expires. Give the queue a dead-letter queue";
    (!attributes.has_dead_letter_queue).then(|| text.to_owned())
}

async fn connect_redis(
    settings: &AwsWorkerSettings,
    deadline: Instant,
) -> Result<(redis::Client, CommandConnection), StartProblem> {
    let (client, commands) = reach_redis(&settings.redis_url, settings.redis_variables, deadline).await?;
    // A worker announces no changes of functions.
    let no_table = "";
    let unfit = |unfit: RedisProblem| problem(&redis_at(&settings.redis_url), unfit.error, unfit.mend);
    RedisProbe::new(&client, &commands, no_table, deadline).run_for_worker().await.map_err(unfit)?;
    Ok((client, commands))
}
