//! The commands `serve` and `check`, on the fleet backend.

use super::node_id::{NodeIdChoice, NodeIdError};
use super::plan::{ConnectedBackend, Exit, NodePlan, NodeSettings, SPILL, SPOOL, TracePlan, explain, refuse};
use super::state_dir::StateDir;
use super::{ConfSource, node};
use crate::api;
use crate::backend::{BackendError, StartProblem, aws, make_empty_dir};
use crate::config::{Conf, ConfFiles, ConfTexts, ConfigError, Env, TraceExport, master_key_warning};
use crate::gateway::Pseudonym;
use crate::model::{NodeId, ProcessToken};
use crate::traces::Destination;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Command-line arguments of `serve` and `check`.
pub struct ServeArgs {
    pub conf: Option<PathBuf>,
    pub upgrade: bool,
}

/// Most node ids of `STATE_DIR` whose result channels `check` probes.
const NODES_TRIED_MAX: usize = 16;

/// Runs a node of the fleet.
pub fn serve(args: &ServeArgs) -> Exit {
    match loaded_settings(args) {
        Ok(LoadedSettings { env, source, texts, conf, traces }) => {
            let (port, api_key, ai_node) = (env.port, env.api_key.clone(), Some(env.ai_node.clone()));
            let warnings = own_warnings(&env, &source, &conf);
            let destination = Destination::sqs(&env.queue_url);
            let traces = traces.map(|export| TracePlan { export, destination });
            let start = Duration::from_secs(conf.start.deadline_s);
            let lease = Duration::from_secs(conf.fleet.lease_s);
            let (meet_in, is_upgrade) = (Some(env.state_dir.clone()), args.upgrade);
            let settings = NodeSettings {
                conf,
                source,
                texts,
                port,
                meet_in,
                is_upgrade,
                api_key,
                // One queue, one fleet.
                pseudonym: Pseudonym::of(env.queue_url.as_bytes()),
                ai_node,
                traces,
                worker: None,
                listen_beside: None,
                banner: None,
            };
            let connect = Box::new(move || Box::pin(connect(env, warnings, start, lease)) as _);
            node::run(NodePlan { settings, connect })
        }
        Err(e) => refuse(&e),
    }
}

/// Runs the start-up checks of `serve` and prints their outcome.
pub fn check(args: &ServeArgs) -> Exit {
    let LoadedSettings { env, conf, source, .. } = match loaded_settings(args) {
        Ok(loaded) => loaded,
        Err(e) => return refuse(&e),
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => {
            eprintln!("infra-controller: the runtime cannot be started: {e}");
            return Exit::Internal;
        }
    };
    if let Err(e) = StateDir::probe(&env.state_dir) {
        return explain(&[state_problem(&env, &e)]);
    }
    let start = Duration::from_secs(conf.start.deadline_s);
    match runtime.block_on(checked(&env, start)) {
        Ok((connected, of_channels)) => {
            let own = own_warnings(&env, &source, &conf);
            for warning in own.into_iter().chain(connected.warnings).chain(of_channels) {
                println!("warning: {warning}");
            }
            println!("configuration, credentials, queue, tables and Redis are in order");
            Exit::Ok
        }
        Err(problems) => explain(&problems),
    }
}

/// Runs the checks that `serve` runs before it listens. Also returns a warning if the ACL of Redis denies
/// beats.
async fn checked(
    env: &Env,
    start: Duration,
) -> Result<(aws::AwsConnection, Option<String>), Vec<StartProblem>> {
    let connected = aws::connect(settings(env, ProcessToken(rand::random()), start)).await?;
    // `serve` takes one of these ids or a new one. `check` cannot know which, because it takes no lock.
    let mut nodes = StateDir::used(&env.state_dir).map_err(|e| vec![state_problem(env, &e)])?;
    nodes.truncate(NODES_TRIED_MAX);
    nodes.push(NodeId(rand::random()));
    let node = connected.check_results(&nodes).await.map_err(|problem| vec![problem])?;
    let warning = connected.beats_warning(node).await;
    Ok((connected, warning))
}

/// The settings of `serve` and `check`, from the environment and `conf/`.
struct LoadedSettings {
    env: Env,
    source: ConfSource,
    texts: ConfTexts,
    conf: Conf,
    /// `None`: no spans are exported.
    traces: Option<TraceExport>,
}

/// Reads the environment and `conf/`. The error lists the problems of both.
fn loaded_settings(args: &ServeArgs) -> Result<LoadedSettings, ConfigError> {
    let env = Env::from_process();
    let a_minute = env.as_ref().ok().and_then(|env| env.rate_limit);
    let master_key_bytes = env.as_ref().map_or(0, |env| env.api_key.reveal().len());
    let (dir, files) = (args.conf.clone(), ConfFiles::Gateway);
    let source = ConfSource { dir, files, a_minute, listen: None, master_key_bytes, output_bytes_max: None };
    match (env, source.load()) {
        (Ok(mut env), Ok((texts, conf))) => {
            let (traces, warnings) = TraceExport::from_process()?;
            env.warnings.extend(warnings);
            Ok(LoadedSettings { env, source, texts, conf, traces })
        }
        (Err(e), Ok(_)) | (Ok(_), Err(e)) => Err(e),
        (Err(ConfigError(mut one)), Err(ConfigError(two))) => {
            one.extend(two);
            Err(ConfigError(one))
        }
    }
}

/// Problems of the environment and of `conf/` that do not prevent the start.
fn own_warnings(env: &Env, source: &ConfSource, conf: &Conf) -> Vec<String> {
    let of_key = master_key_warning(env.api_key.reveal());
    let shadowed = conf.shadowed_upstreams(api::patterns());
    env.warnings.iter().cloned().chain(of_key).chain(source.warnings()).chain(shadowed).collect()
}

async fn connect(
    env: Env,
    warnings: Vec<String>,
    start: Duration,
    lease: Duration,
) -> Result<ConnectedBackend, Vec<StartProblem>> {
    let process = ProcessToken(rand::random());
    // Before any call to a backend, because a problem here needs the operator in any case.
    StateDir::probe(&env.state_dir).map_err(|e| vec![state_problem(&env, &e)])?;
    let connected = aws::connect(settings(&env, process, start)).await?;
    tracing::info!("Global Redis Connected Successfully");
    let deadline = Instant::now() + start;
    let (root, membership) = (&env.state_dir, connected.membership());
    let choice = NodeIdChoice { root, membership, process, lease, deadline };
    let state = choice.take().await.map_err(|e| vec![node_id_problem(&env, e)])?;
    // Needs the node id: the ACL of Redis may allow the result channels of some nodes only.
    connected.check_results(&[state.node]).await.map_err(|problem| vec![problem])?;
    let spool_dir = make_empty_dir(state.path().join(SPOOL)).map_err(|e| vec![state_problem(&env, &e)])?;
    Ok(ConnectedBackend {
        node: state.node,
        warnings: warnings.into_iter().chain(connected.warnings.clone()).collect(),
        backend: connected.backend(state.node),
        bucket: env.bucket,
        spool_dir,
        spill_dir: Some(state.path().join(SPILL)),
        extra_loop: None,
        claim: Some(Arc::new(state)),
    })
}

fn settings(env: &Env, process: ProcessToken, start_deadline: Duration) -> aws::AwsSettings {
    aws::AwsSettings {
        region: env.region.clone(),
        functions_table: env.functions_table.clone(),
        logs_table: env.logs_table.clone(),
        queue_url: env.queue_url.clone(),
        bucket: env.bucket.clone(),
        redis_url: aws::RedisUrl::new(env.redis.url.reveal()),
        redis_variables: env.redis.variables,
        sqs_endpoint: env.sqs_endpoint.clone(),
        dynamodb_endpoint: env.dynamodb_endpoint.clone(),
        s3_endpoint: env.s3_endpoint.clone(),
        process,
        start_deadline,
    }
}

fn node_id_problem(env: &Env, error: NodeIdError) -> StartProblem {
    match error {
        NodeIdError::Directory(e) => state_problem(env, &e),
        NodeIdError::Store(error) => StartProblem {
            what: "the lease of this node's id in Redis".to_owned(),
            error,
            remedy: "Start Redis, and allow its user the keys nodes:* and scripts (EVAL, EVALSHA)."
                .to_owned(),
        },
    }
}

fn state_problem(env: &Env, error: &std::io::Error) -> StartProblem {
    StartProblem {
        what: format!("the state directory {}", env.state_dir.display()),
        error: BackendError::Invalid(error.to_string()),
        remedy: "Make it writable, or set STATE_DIR.".to_owned(),
    }
}
