//! The nodes of the fleet, in Redis: `nodes:{<log table>}`, a sorted set of node ids by the end of their lease in Unix
//! milliseconds; `adopted:{<node>}`, who looks after the jobs of a node; `whole:{<node>}`, there while its journal is;
//! `telling:{<node>}`, there while the journal is told again what it has lost.

use super::journal::{
    GIVEN_UP, INFLIGHT, POSTING, UNPOSTED, WHOLE, entry_text, key, numbered_text, sums_text,
};
use super::redis::Commands;
use crate::backend::{BackendError, GIVEN_UP_KEPT, Membership, Others, Told};
use crate::model::NodeId;
use async_trait::async_trait;
use redis::{Cmd, Script, cmd};
use std::sync::Arc;
use std::time::Duration;

const ADOPTED: &str = "adopted";

/// The mark that a journal is being told: a Redis that loses its data meanwhile has not heard all.
const TELLING: &str = "telling";

/// How long that may take, in seconds.
const TELLING_MAX_S: u64 = 3600;

/// How long the mark of a journal outlives its node, in seconds: longer than anybody would have its jobs wait.
const WHOLE_KEPT_S: u64 = 30 * 24 * 3600;

/// KEYS: the nodes. ARGV: a node, its lease in milliseconds. Answer: up to 16 whose lease has lapsed; how many live.
const RENEW: &str = "local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZADD', KEYS[1], string.format('%.0f', now + ARGV[2]), ARGV[1])
return {redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', string.format('(%.0f', now), 'LIMIT', 0, 16),
  redis.call('ZCOUNT', KEYS[1], string.format('%.0f', now), '+inf')}";

/// KEYS: who has adopted a node. ARGV: who would, for how many milliseconds. Answer: whether that one has.
const ADOPT: &str = "local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1";

/// KEYS: the nodes. ARGV: one of them. Answer: 1 if its lease had lapsed and it is off the list.
const DISMISS: &str = "local time = redis.call('TIME')
local ends = redis.call('ZSCORE', KEYS[1], ARGV[1])
if ends and tonumber(ends) >= time[1] * 1000 then return 0 end
redis.call('ZREM', KEYS[1], ARGV[1])
return 1";

/// KEYS: the mark that a journal is being told, the mark that it is whole. ARGV: who tells, and for how many seconds the second mark
/// is kept. Answer: 1 if it is whole now; 0: what was told before is lost, or another one tells.
const RETOLD: &str = "if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[2], '1', 'EX', ARGV[2])
return 1";

pub(super) struct RedisMembership {
    commands: Arc<Commands>,
    /// Nodes that share a Redis and not their tables know nothing of each other.
    nodes: String,
    renew: Script,
    adopt: Script,
    dismiss: Script,
    retold: Script,
}

impl RedisMembership {
    pub(super) fn new(commands: Arc<Commands>, logs_table: &str) -> Self {
        let nodes = format!("nodes:{{{logs_table}}}");
        let [renew, adopt, dismiss, retold] = [RENEW, ADOPT, DISMISS, RETOLD].map(Script::new);
        Self { commands, nodes, renew, adopt, dismiss, retold }
    }
}

#[async_trait]
impl Membership for RedisMembership {
    async fn renew(&self, node: NodeId, lease: Duration) -> Result<Others, BackendError> {
        let mut call = self.renew.prepare_invoke();
        call.key(&self.nodes).arg(node.to_string()).arg(millis(lease));
        let call = &call;
        let (lapsed, alive): (Vec<Vec<u8>>, usize) =
            self.commands.run(async |mut connection| call.invoke_async(&mut connection).await).await?;
        // What is no node is left alone.
        let lapsed =
            lapsed.iter().filter_map(|name| NodeId::parse(std::str::from_utf8(name).ok()?)).collect();
        Ok(Others { lapsed, alive })
    }

    async fn adopt(&self, dead: NodeId, by: NodeId, lease: Duration) -> Result<bool, BackendError> {
        let mut call = self.adopt.prepare_invoke();
        call.key(key(ADOPTED, dead)).arg(by.to_string()).arg(millis(lease));
        let call = &call;
        self.commands.run(async |mut connection| call.invoke_async(&mut connection).await).await
    }

    async fn dismiss(&self, dead: NodeId) -> Result<bool, BackendError> {
        for part in [INFLIGHT, UNPOSTED, POSTING] {
            let len: u64 = self.commands.query(cmd("HLEN").arg(key(part, dead))).await?;
            if len > 0 {
                return Ok(false);
            }
        }
        let mut call = self.dismiss.prepare_invoke();
        call.key(&self.nodes).arg(dead.to_string());
        let call = &call;
        self.commands.run(async |mut connection| call.invoke_async(&mut connection).await).await
    }

    async fn relist(&self, node: NodeId) -> Result<bool, BackendError> {
        self.commands.query(cmd("ZADD").arg(&self.nodes).arg("NX").arg(0).arg(node.to_string())).await
    }

    async fn is_whole(&self, node: NodeId) -> Result<bool, BackendError> {
        // Says whether it is there, and keeps it there.
        self.commands.query(cmd("EXPIRE").arg(key(WHOLE, node)).arg(WHOLE_KEPT_S)).await
    }

    async fn begin_retelling(&self, node: NodeId, token: u64) -> Result<(), BackendError> {
        self.commands.query(cmd("SET").arg(key(TELLING, node)).arg(token).arg("EX").arg(TELLING_MAX_S)).await
    }

    async fn retell(&self, node: NodeId, told: Told<'_>) -> Result<(), BackendError> {
        let command = match told {
            Told::Jobs(jobs) => hset(
                INFLIGHT,
                node,
                jobs.iter().map(|job| {
                    (
                        job.id.to_string(),
                        entry_text(job.deadline, &job.function, job.idempotency_key.as_deref()),
                    )
                }),
            ),
            Told::Sums(sums) => hset(
                UNPOSTED,
                node,
                sums.iter().map(|(function, sums)| (function.to_string(), sums_text(sums))),
            ),
            Told::Numbered(numbered) => {
                hset(POSTING, node, numbered.iter().map(|n| (n.function.to_string(), numbered_text(n))))
            }
            Told::GivenUp(jobs) => {
                hset(GIVEN_UP, node, jobs.iter().map(|(id, function)| (id.to_string(), function.to_string())))
            }
        };
        if let Some(command) = command {
            self.commands.query::<()>(&command).await?;
        }
        if matches!(told, Told::GivenUp(_)) {
            let expire = GIVEN_UP_KEPT.as_secs();
            self.commands.query::<()>(cmd("EXPIRE").arg(key(GIVEN_UP, node)).arg(expire)).await?;
        }
        Ok(())
    }

    async fn retold(&self, node: NodeId, token: u64) -> Result<bool, BackendError> {
        let mut call = self.retold.prepare_invoke();
        call.key(key(TELLING, node)).key(key(WHOLE, node)).arg(token).arg(WHOLE_KEPT_S);
        let call = &call;
        self.commands.run(async |mut connection| call.invoke_async(&mut connection).await).await
    }
}

/// `None`: there is nothing to tell.
fn hset(part: &str, node: NodeId, fields: impl Iterator<Item = (String, String)>) -> Option<Cmd> {
    let mut command = cmd("HSET");
    command.arg(key(part, node));
    let mut told = 0;
    for (name, value) in fields {
        command.arg(name).arg(value);
        told += 1;
    }
    (told > 0).then_some(command)
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
