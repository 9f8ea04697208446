//! Checks at start what `serve` requires of Redis beyond a PING: writes, scripts, PUBLISH, subscriptions, and
//! no eviction of keys. A worker requires less; see [`RedisProbe::run_for_worker`].
//!
//! Each step is one that a node performs later, with names of the same kind. So a missing permission or a
//! replica stops the start instead of failing the first job.

use super::changes::channel_of;
use super::connection::{COMMAND_DEADLINE, CONNECT_DEADLINE, CommandConnection, class};
use super::journal::INFLIGHT;
use super::results::{channel, pattern_of, stored_key};
use crate::backend::BackendError;
use crate::model::NodeId;
use parking_lot::Mutex;
use redis::aio::PubSub;
use redis::{Client, FromRedisValue, RedisError, Script, cmd};
use std::future::Future;
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// Expiry of the probe's key, in case the probe is interrupted.
const KEPT_MS: u64 = 10_000;
/// The id of no job. No node waits for its result.
const NO_JOB: &str = "worker-probe";
/// A payload that nodes ignore, because it is too long for an id.
const NO_ANNOUNCEMENT: [u8; 256] = [b'-'; 256];

/// Why this Redis cannot be used, and the remedy.
pub struct RedisProblem {
    pub error: BackendError,
    pub mend: &'static str,
}

const RIGHTS: &str = "Allow its user the keys and channels of this program: \
     ACL SETUSER <user> ~* &* +@all -@dangerous +info. A user without all channels (&*) needs \
     &result:<node>* for each node, because Redis compares patterns as text.";

/// (Redis error code, whether only an operator can fix it, meaning, remedy)
const CODES: [(&str, bool, &str, &str); 8] = [
    (
        "READONLY",
        true,
        "it is a replica, which rejects writes",
        "Name the primary (of ElastiCache: the primary endpoint).",
    ),
    ("NOPERM", true, "its user lacks permissions", RIGHTS),
    (
        "MISCONF",
        false,
        "it rejects writes because it cannot save to its disk",
        "Fix the cause that its log names, or set stop-writes-on-bgsave-error no.",
    ),
    ("OOM", false, "its memory is full", "Raise its maxmemory, or remove keys."),
    (
        "NOREPLICAS",
        false,
        "it rejects writes because it has too few replicas",
        "Start the replicas, or lower min-replicas-to-write.",
    ),
    ("LOADING", false, "it is still loading its data", "Wait until it has started."),
    ("MASTERDOWN", true, "it is a replica without its primary", "Name the primary."),
    (
        "MOVED",
        true,
        "it is a node of a cluster",
        "Use a Redis with cluster mode disabled: the commands go to one server.",
    ),
];

pub struct RedisProbe<'a> {
    client: &'a Client,
    commands: &'a CommandConnection,
    functions_table: &'a str,
    deadline: Instant,
    /// The code of the last error answer.
    code: Mutex<String>,
}

impl<'a> RedisProbe<'a> {
    pub fn new(
        client: &'a Client,
        commands: &'a CommandConnection,
        functions_table: &'a str,
        deadline: Instant,
    ) -> Self {
        Self { client, commands, functions_table, deadline, code: Mutex::default() }
    }

    /// Runs all steps that need no node id. Returns a warning about problems that do not prevent the start.
    pub async fn run(&self) -> Result<Option<String>, RedisProblem> {
        self.step("write", || self.write()).await?;
        self.step("subscribe to changes, and publish changes,", || self.changes()).await?;
        self.eviction_warning().await
    }

    /// Runs the step of a worker.
    pub async fn run_for_worker(&self) -> Result<(), RedisProblem> {
        self.step("publish and store results", || self.result()).await
    }

    /// Returns the first of `nodes` that may subscribe to the results of its jobs, as [`RedisResults`] does.
    ///
    /// Redis compares a pattern with the allowed patterns as text, unless its user has all channels. So the
    /// answer for one node id does not hold for another.
    ///
    /// [`RedisResults`]: super::results::RedisResults
    pub async fn results(&self, nodes: &[NodeId]) -> Result<NodeId, RedisProblem> {
        self.step("subscribe to results", || self.first_that_hears(nodes)).await
    }

    async fn step<T, F>(&self, what: &str, step: impl FnMut() -> F) -> Result<T, RedisProblem>
    where
        F: Future<Output = Result<T, BackendError>>,
    {
        self.forget();
        // During a failover one server may reject what another accepts a moment later, so rejections are
        // retried until the deadline too.
        crate::backend::aws::retry::within(self.deadline, step).await.map_err(|error| self.unfit(what, error))
    }

    fn unfit(&self, what: &str, error: BackendError) -> RedisProblem {
        let code = self.code.lock().clone();
        let Some((_, is_lasting, meaning, mend)) = CODES.iter().find(|(known, ..)| *known == code) else {
            let mend = "See the log of Redis.";
            return RedisProblem { error: in_step(what, &error), mend };
        };
        let text = format!("this node cannot {what} there: {meaning} ({code})");
        let error = match (is_lasting, code.as_str()) {
            (true, "NOPERM") => BackendError::Denied(text),
            (true, _) => BackendError::Invalid(text),
            (false, _) => BackendError::Unavailable(text),
        };
        RedisProblem { error, mend }
    }

    fn note(&self, error: &RedisError) {
        let code = error.code().unwrap_or_default();
        code.clone_into(&mut self.code.lock());
    }

    async fn query<T: FromRedisValue>(&self, command: &redis::Cmd) -> Result<T, BackendError> {
        self.commands
            .run(async |mut connection| {
                command.query_async(&mut connection).await.inspect_err(|error| self.note(error))
            })
            .await
    }

    /// Writes a key with the prefix of the journals. No node has this id.
    async fn write(&self) -> Result<(), BackendError> {
        let key = format!("{INFLIGHT}:{{check}}");
        self.query::<()>(cmd("SET").arg(&key).arg(1).arg("PX").arg(KEPT_MS)).await?;
        let script = Script::new("return redis.call('DEL', KEYS[1])");
        let script = &script;
        let key = key.as_str();
        self.commands
            .run(async |mut connection| {
                let deleted = script.prepare_invoke().key(key).invoke_async::<i64>(&mut connection).await;
                deleted.map(drop).inspect_err(|error| self.note(error))
            })
            .await
    }

    async fn result(&self) -> Result<(), BackendError> {
        self.query::<()>(cmd("PUBLISH").arg(channel(NO_JOB)).arg("")).await?;
        self.query::<()>(cmd("SETEX").arg(stored_key(NO_JOB)).arg(KEPT_MS / 1000).arg("")).await
    }

    async fn first_that_hears(&self, nodes: &[NodeId]) -> Result<NodeId, BackendError> {
        let mut subscriber = self.subscriber().await?;
        let mut denied = BackendError::Invalid("there is no node id".into());
        for node in nodes {
            match self.answered(subscriber.psubscribe(pattern_of(*node))).await {
                Ok(()) => return Ok(*node),
                Err(error @ BackendError::Denied(_)) => denied = error,
                Err(error) => return Err(error),
            }
        }
        Err(denied)
    }

    async fn changes(&self) -> Result<(), BackendError> {
        let changes = channel_of(self.functions_table);
        let mut subscriber = self.subscriber().await?;
        self.answered(subscriber.subscribe(&changes)).await?;
        self.query::<i64>(cmd("PUBLISH").arg(&changes).arg(&NO_ANNOUNCEMENT[..])).await.map(drop)
    }

    /// A user created for an earlier version may lack these channels. The node works without them.
    pub async fn beats_warning(&self, node: NodeId) -> Option<String> {
        let channel = super::beats::channel_of(node);
        let tried = async {
            let mut subscriber = self.subscriber().await?;
            self.answered(subscriber.subscribe(&channel)).await?;
            self.query::<i64>(cmd("PUBLISH").arg(&channel).arg("")).await
        };
        let error = tried.await.err()?;
        Some(format!(
            "Redis rejects this node's beats ({error}), so a subscription that stays on an old primary \
             after a failover is not detected. Allow its user the channels beat:*"
        ))
    }

    /// Whether Redis evicts keys when its memory is full: the journals of jobs in flight are stored nowhere
    /// else.
    async fn eviction_warning(&self) -> Result<Option<String>, RedisProblem> {
        let Ok(info) = self.query::<String>(cmd("INFO").arg("memory")).await else {
            return Ok(Some(
                "Redis does not report whether it evicts keys (INFO memory is denied). Make sure that its \
                 maxmemory-policy is noeviction"
                    .to_owned(),
            ));
        };
        eviction(&info)
    }

    async fn subscriber(&self) -> Result<PubSub, BackendError> {
        within(CONNECT_DEADLINE, self.client.get_async_pubsub()).await.inspect_err(|_| self.forget())
    }

    async fn answered(
        &self,
        asked: impl Future<Output = Result<(), RedisError>>,
    ) -> Result<(), BackendError> {
        within(COMMAND_DEADLINE, async { asked.await.inspect_err(|error| self.note(error)) }).await
    }

    fn forget(&self) {
        self.code.lock().clear();
    }
}

fn in_step(what: &str, error: &BackendError) -> BackendError {
    let text = format!("this node cannot {what} there: {error}");
    match error {
        BackendError::Missing(_) => BackendError::Missing(text),
        BackendError::Denied(_) => BackendError::Denied(text),
        BackendError::Invalid(_) => BackendError::Invalid(text),
        BackendError::Unavailable(_) => BackendError::Unavailable(text),
    }
}

async fn within<T>(
    limit: Duration,
    asked: impl Future<Output = Result<T, RedisError>>,
) -> Result<T, BackendError> {
    match timeout(limit, asked).await {
        Ok(answer) => answer.map_err(|e| class(&e)),
        Err(_) => Err(BackendError::Unavailable("Redis did not answer in time".into())),
    }
}

/// Evaluates the answer to `INFO memory`.
fn eviction(info: &str) -> Result<Option<String>, RedisProblem> {
    let value = |name: &str| info.lines().find_map(|line| line.trim().strip_prefix(name)?.strip_prefix(':'));
    let policy = value("maxmemory_policy").unwrap_or("unknown");
    let is_bounded = value("maxmemory").is_none_or(|bytes| bytes != "0");
    match policy {
        "noeviction" => Ok(None),
        policy if policy.starts_with("allkeys-") && is_bounded => Err(RedisProblem {
            error: BackendError::Invalid(format!(
                "it evicts any key when its memory is full (maxmemory-policy {policy}), and the journals of \
                 jobs in flight are stored nowhere else"
            )),
            mend: "Set its maxmemory-policy to noeviction.",
        }),
        policy => Ok(Some(format!(
            "Redis has the maxmemory-policy {policy}: when its memory is full it may evict results and \
             leases, and jobs end as LOST. Set it to noeviction"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_policy_that_evicts_journals_stops_the_start() {
        for (policy, maxmemory, expected) in [
            ("noeviction", "0", "good"),
            ("noeviction", "100", "good"),
            ("volatile-lru", "100", "warning"),
            ("volatile-ttl", "0", "warning"),
            ("allkeys-lru", "100", "unfit"),
            ("allkeys-random", "1", "unfit"),
            // Allowed as long as its memory is unbounded.
            ("allkeys-lfu", "0", "warning"),
        ] {
            let info = format!(
                "# Memory\r\nmaxmemory:{maxmemory}\r\nmaxmemory_human:0B\r\nmaxmemory_policy:{policy}\r\n"
            );
            let found = match eviction(&info) {
                Ok(None) => "good",
                Ok(Some(warning)) if warning.contains(policy) => "warning",
                Err(RedisProblem { error: BackendError::Invalid(text), .. }) if text.contains(policy) => {
                    "unfit"
                }
                _ => "something else",
            };
            assert_eq!(found, expected, "{policy} {maxmemory}");
        }
        assert!(matches!(eviction("# Memory\r\n"), Ok(Some(_))), "the policy is not reported");
    }
}
