//! Tracks the nodes of the fleet in Redis:
//!
//! * `nodes:{<log table>}`: a sorted set of node ids by the end of their lease in Unix milliseconds.
//! * `adopted:{<node>}`: the node that has adopted the jobs of `<node>`.
//! * `whole:{<node>}`: the completeness marker of its journal.
//! * `telling:{<node>}`: exists while its journal is being restored after a loss of data.
//! * `link:{<node>}`: the connection of its process, as Redis names it: id and address. Who takes over the
//!   node closes that connection first, so that no command of the process runs later.
//!
//! More keys per node are in the slot of the set. The first two last as long as a lease:
//!
//! * `nodes:{<log table>}:holder:<node>`: the token of the process that holds the lease.
//! * `nodes:{<log table>}:contested:<node>`: exists while another process tries to renew it, or changes the
//!   journal of the node.
//! * `nodes:{<log table>}:adoptions:<node>`: grows while the node is adopted.
//!
//! A process of an earlier version has no token: it renews the lease and does not change the holder.

use super::connection::CommandConnection;
use super::journal::{
    ADOPTED, GIVEN_UP, INFLIGHT, POSTING, UNPOSTED, WHOLE, WHOLE_KEPT_S, entry_text, key, numbered_text,
    sums_text,
};
use crate::backend::{
    AdoptOutcome, BackendError, FleetState, GIVEN_UP_KEPT, JournalEntry, JournalPart, LeaseHolder,
    LeaseOutcome, LeaseRenewal, Membership, Predecessor,
};
use crate::model::{NodeId, ProcessToken, UnixMs, millis};
use async_trait::async_trait;
use redis::{Script, cmd};
use std::sync::Arc;
use std::time::Duration;

/// KEYS: the nodes; the holder of a node. ARGV: the node, the lease in milliseconds, the token of the caller,
/// and the holder from which the lease may be taken before it lapses: a token, `""` (a process without one)
/// or `"-"` (none). Answer: whether the lease was taken; otherwise its holder, the end of the lease, and the
/// milliseconds until then.
const TAKE: &str = "local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local ends = tonumber(redis.call('ZSCORE', KEYS[1], ARGV[1]) or 0)
local holder = redis.call('GET', KEYS[2]) or ''
if ends >= now and holder ~= ARGV[3] and holder ~= ARGV[4] then
  return {0, holder, string.format('%.0f', ends), string.format('%.0f', ends - now)}
end
redis.call('SET', KEYS[2], ARGV[3], 'PX', ARGV[2])
redis.call('ZADD', KEYS[1], string.format('%.0f', now + ARGV[2]), ARGV[1])
return {1, '', '0', '0'}";

/// The connection of the process that holds the lease.
const LINK: &str = "link";

/// The restore marker: if it vanishes, Redis has lost its data again during the restore.
const TELLING: &str = "telling";

/// How long a node looks for what another node changes in its journal, in seconds: the longest send
/// (`batch.send_deadline_ms`, at most 60 s), and two of the intervals at which a node reads its journal.
const ENTRUSTED_S: u64 = 90;

/// Maximum duration of a restore, in seconds.
const TELLING_MAX_S: u64 = 3600;

/// KEYS: the nodes; the holder of a node; its contested marker; its adoptions. ARGV: the node, its lease in
/// milliseconds, the token of the caller. Answer: whether the lease was renewed; up to 16 nodes whose lease
/// has lapsed; the number of live nodes; whether the lease is contested; the adoptions.
const RENEW: &str = "local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local holder = redis.call('GET', KEYS[2])
if holder and holder ~= ARGV[3] then
  redis.call('SET', KEYS[3], ARGV[3], 'PX', ARGV[2])
  return {0, {}, 0, 0, '0'}
end
redis.call('SET', KEYS[2], ARGV[3], 'PX', ARGV[2])
redis.call('ZADD', KEYS[1], string.format('%.0f', now + ARGV[2]), ARGV[1])
return {1, redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', string.format('(%.0f', now), 'LIMIT', 0, 16),
  redis.call('ZCOUNT', KEYS[1], string.format('%.0f', now), '+inf'), redis.call('EXISTS', KEYS[3]),
  redis.call('GET', KEYS[4]) or '0'}";

/// KEYS: the nodes; the adoptions of one of them. ARGV: that node, and the expiry in seconds. Answer: 1 if
/// the lease of the node has lapsed and the adoption is counted. A node that renews its lease later finds
/// that it was adopted.
const COUNT_ADOPTION: &str = "local time = redis.call('TIME')
local ends = redis.call('ZSCORE', KEYS[1], ARGV[1])
if ends and tonumber(ends) >= time[1] * 1000 + math.floor(time[2] / 1000) then return 0 end
redis.call('INCR', KEYS[2])
redis.call('EXPIRE', KEYS[2], ARGV[2])
return 1";

/// KEYS: the adopter of a node. ARGV: the caller, and the duration in milliseconds. Answer: whether the
/// caller is the adopter now.
const ADOPT: &str = "local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1";

/// KEYS: the nodes; the contested marker of one of them. ARGV: that node, the caller, and the duration of the
/// marker in seconds. After Redis has lost its data, a live node is not listed until its next renewal. So an
/// unlisted node counts as alive for that time. Otherwise an adopter would restore its journal first, without
/// the jobs and sums that only the node itself knows.
const ENTRUST: &str = "local time = redis.call('TIME')
redis.call('SET', KEYS[2], ARGV[2], 'EX', ARGV[3])
redis.call('ZADD', KEYS[1], 'NX', string.format('%.0f', (time[1] + ARGV[3]) * 1000), ARGV[1])";

/// KEYS: the nodes; the contested marker of one of them. ARGV: that node. Answer: 1 if its lease had lapsed
/// and it was removed from the set. It stays while another node may change its journal.
const DISMISS: &str = "if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
local time = redis.call('TIME')
local ends = redis.call('ZSCORE', KEYS[1], ARGV[1])
if ends and tonumber(ends) >= time[1] * 1000 then return 0 end
redis.call('ZREM', KEYS[1], ARGV[1])
return 1";

/// KEYS: the restore marker, the completeness marker. ARGV: the token of the restore, and the expiry of the
/// first marker in seconds. Answer: 1 if the restore has begun; 0 if the journal is complete.
const BEGIN: &str = "if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'EX', ARGV[2])
return 1";

/// KEYS: the restore marker, a part of the journal. ARGV: the token of the restore, the expiry of the part in
/// seconds or an empty string, and fields with their values. Answer: 1 if they were written; 0 if the restore
/// was lost or another one has begun or ended. A node that stood still in between must not write any more.
const RESTORE: &str = "if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[2], unpack(ARGV, 3))
if ARGV[2] ~= '' then redis.call('EXPIRE', KEYS[2], ARGV[2]) end
return 1";

/// KEYS: the restore marker, the completeness marker. ARGV: the token of the restore, and the expiry of the
/// second marker in seconds. Answer: 1 if the journal is complete now; 0 if the restore was lost or another
/// one has begun.
const RETOLD: &str = "if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[2], '1', 'EX', ARGV[2])
return 1";

pub struct RedisMembership {
    commands: Arc<CommandConnection>,
    /// The key of the set. It has the table name in it, so that fleets that share Redis but no tables stay
    /// separate.
    nodes: String,
    process: ProcessToken,
    take: Script,
    renew: Script,
    count_adoption: Script,
    adopt: Script,
    entrust: Script,
    dismiss: Script,
    begin: Script,
    restore: Script,
    retold: Script,
}

impl RedisMembership {
    /// `process` is the token of this process.
    pub fn new(commands: Arc<CommandConnection>, logs_table: &str, process: ProcessToken) -> Self {
        let nodes = format!("nodes:{{{logs_table}}}");
        let [take, renew] = [TAKE, RENEW].map(Script::new);
        let [count_adoption, adopt] = [COUNT_ADOPTION, ADOPT].map(Script::new);
        let [entrust, dismiss] = [ENTRUST, DISMISS].map(Script::new);
        let [begin, restore, retold] = [BEGIN, RESTORE, RETOLD].map(Script::new);
        Self {
            commands,
            nodes,
            process,
            take,
            renew,
            count_adoption,
            adopt,
            entrust,
            dismiss,
            begin,
            restore,
            retold,
        }
    }

    fn holder(&self, node: NodeId) -> String {
        format!("{}:holder:{node}", self.nodes)
    }

    fn contested(&self, node: NodeId) -> String {
        format!("{}:contested:{node}", self.nodes)
    }

    fn adoptions(&self, node: NodeId) -> String {
        format!("{}:adoptions:{node}", self.nodes)
    }
}

#[async_trait]
impl Membership for RedisMembership {
    async fn take(
        &self,
        node: NodeId,
        lease: Duration,
        predecessor: Predecessor,
    ) -> Result<LeaseOutcome, BackendError> {
        let from = match predecessor {
            Predecessor::Nobody => "-".to_owned(),
            Predecessor::Process(token) => token.to_string(),
            Predecessor::Unnamed => String::new(),
        };
        let mut call = self.take.prepare_invoke();
        call.key(&self.nodes).key(self.holder(node));
        call.arg(node.to_string()).arg(millis(lease)).arg(self.process.to_string()).arg(from);
        let call = &call;
        let (is_taken, process, until, left): (bool, String, UnixMs, u64) =
            self.commands.run(async |mut connection| call.invoke_async(&mut connection).await).await?;
        if is_taken {
            self.commands.close_recorded(&key(LINK, node)).await?;
            self.commands.record_client(key(LINK, node), WHOLE_KEPT_S).await?;
            return Ok(LeaseOutcome::Yes);
        }
        let process = ProcessToken::parse(&process);
        Ok(LeaseOutcome::No(LeaseHolder { process, until, left: Duration::from_millis(left) }))
    }

    async fn renew(&self, node: NodeId, lease: Duration) -> Result<LeaseRenewal, BackendError> {
        let mut call = self.renew.prepare_invoke();
        call.key(&self.nodes).key(self.holder(node)).key(self.contested(node)).key(self.adoptions(node));
        call.arg(node.to_string()).arg(millis(lease)).arg(self.process.to_string());
        let call = &call;
        let (is_renewed, lapsed, alive, is_contested, adoptions): (bool, Vec<Vec<u8>>, usize, bool, u64) =
            self.commands.run(async |mut connection| call.invoke_async(&mut connection).await).await?;
        if !is_renewed {
            return Ok(LeaseRenewal::Lost);
        }
        // Members that are not node ids are ignored.
        let lapsed =
            lapsed.iter().filter_map(|name| NodeId::parse(std::str::from_utf8(name).ok()?)).collect();
        Ok(LeaseRenewal::Renewed { others: FleetState { lapsed, alive }, is_contested, adoptions })
    }

    async fn adopt(&self, dead: NodeId, by: NodeId, lease: Duration) -> Result<AdoptOutcome, BackendError> {
        let mut count = self.count_adoption.prepare_invoke();
        count.key(&self.nodes).key(self.adoptions(dead)).arg(dead.to_string()).arg(WHOLE_KEPT_S);
        let count = &count;
        if !self.commands.run(async |mut connection| count.invoke_async(&mut connection).await).await? {
            return Ok(AdoptOutcome::Alive);
        }
        let mut call = self.adopt.prepare_invoke();
        call.key(key(ADOPTED, dead)).arg(by.to_string()).arg(millis(lease));
        let call = &call;
        let is_adopter: bool =
            self.commands.run(async |mut connection| call.invoke_async(&mut connection).await).await?;
        if !is_adopter {
            return Ok(AdoptOutcome::ByAnother);
        }
        self.commands.close_recorded(&key(LINK, dead)).await?;
        Ok(AdoptOutcome::Adopted)
    }

    async fn dismiss(&self, dead: NodeId) -> Result<bool, BackendError> {
        for part in [INFLIGHT, UNPOSTED, POSTING] {
            let len: u64 = self.commands.query(cmd("HLEN").arg(key(part, dead))).await?;
            if len > 0 {
                return Ok(false);
            }
        }
        let mut call = self.dismiss.prepare_invoke();
        call.key(&self.nodes).key(self.contested(dead)).arg(dead.to_string());
        let call = &call;
        self.commands.run(async |mut connection| call.invoke_async(&mut connection).await).await
    }

    async fn relist(&self, node: NodeId) -> Result<bool, BackendError> {
        self.commands.query(cmd("ZADD").arg(&self.nodes).arg("NX").arg(0).arg(node.to_string())).await
    }

    async fn entrust(&self, node: NodeId) -> Result<(), BackendError> {
        let mut call = self.entrust.prepare_invoke();
        call.key(&self.nodes).key(self.contested(node));
        call.arg(node.to_string()).arg(self.process.to_string()).arg(ENTRUSTED_S);
        let call = &call;
        self.commands.run(async |mut connection| call.invoke_async(&mut connection).await).await
    }

    async fn is_complete(&self, node: NodeId) -> Result<bool, BackendError> {
        // EXPIRE reports whether the key exists, and renews its expiry.
        self.commands.query(cmd("EXPIRE").arg(key(WHOLE, node)).arg(WHOLE_KEPT_S)).await
    }

    async fn begin_restore(&self, node: NodeId, token: u64) -> Result<bool, BackendError> {
        let mut call = self.begin.prepare_invoke();
        call.key(key(TELLING, node)).key(key(WHOLE, node)).arg(token).arg(TELLING_MAX_S);
        let call = &call;
        self.commands.run(async |mut connection| call.invoke_async(&mut connection).await).await
    }

    async fn restore(&self, node: NodeId, token: u64, told: JournalPart<'_>) -> Result<bool, BackendError> {
        let (part, fields): (_, Vec<(String, String)>) = match told {
            JournalPart::Jobs(jobs) => {
                let text = |job: &JournalEntry| {
                    entry_text(job.deadline, &job.function, job.idempotency_key.as_deref())
                };
                (INFLIGHT, jobs.iter().map(|job| (job.id.to_string(), text(job))).collect())
            }
            JournalPart::Sums(sums) => {
                let texts = sums.iter().map(|(function, sums)| (function.to_string(), sums_text(sums)));
                (UNPOSTED, texts.collect())
            }
            JournalPart::Numbered(numbered) => {
                let texts = numbered.iter().map(|n| (n.function.to_string(), numbered_text(n)));
                (POSTING, texts.collect())
            }
            JournalPart::GivenUp(jobs) => {
                let texts = jobs.iter().map(|(id, function)| (id.to_string(), function.to_string()));
                (GIVEN_UP, texts.collect())
            }
        };
        if fields.is_empty() {
            return Ok(true);
        }
        let expiry = if part == GIVEN_UP { GIVEN_UP_KEPT.as_secs().to_string() } else { String::new() };
        let mut call = self.restore.prepare_invoke();
        call.key(key(TELLING, node)).key(key(part, node)).arg(token).arg(expiry);
        for (field, value) in fields {
            call.arg(field).arg(value);
        }
        let call = &call;
        self.commands.run(async |mut connection| call.invoke_async(&mut connection).await).await
    }

    async fn finish_restore(&self, node: NodeId, token: u64) -> Result<bool, BackendError> {
        let mut call = self.retold.prepare_invoke();
        call.key(key(TELLING, node)).key(key(WHOLE, node)).arg(token).arg(WHOLE_KEPT_S);
        let call = &call;
        self.commands.run(async |mut connection| call.invoke_async(&mut connection).await).await
    }
}
