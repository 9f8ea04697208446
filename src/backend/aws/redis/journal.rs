//! Stores the jobs in flight in Redis, one hash per node: `inflight:{<node>}`, job id →
//! `<deadline in Unix ms>:<function id>[:<idempotency key>]`. The braces keep all keys of a node in one slot
//! of a Redis Cluster.
//!
//! The sums of ended jobs stay beside it, function id → sums, until they are in the function table: sums
//! without a number in `unposted:{<node>}`, numbered sums in `posting:{<node>}`. A function stores the number
//! of the last sums it received from a node, and accepts only higher numbers. So sums are added exactly once,
//! even if an answer is late or lost, or a node dies between two steps. The three Lua scripts describe the
//! steps.

use super::connection::CommandConnection;
use crate::backend::aws::dynamodb::functions::{CounterStore, PostNumber};
use crate::backend::{
    Addition, BackendError, EndOutcome, EndedJob, GIVEN_UP_KEPT, GIVEN_UP_MAX, Journal, JournalEntry,
    JournalState, NumberedSums, POSTED_MAX, UnpostedSums,
};
use crate::model::{FunctionId, IdempotencyKey, Job, JobId, NodeId, Sums, UnixMs, now_ms};
use async_trait::async_trait;
use futures_util::StreamExt;
use redis::{Cmd, Script, Value, cmd};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;

/// Entries per page of a hash scan, approximately.
const PAGE_ENTRIES: usize = 1000;

/// Initial capacity for an entry, in bytes; the buffer grows if necessary.
const ENTRY_BYTES: usize = 96;

pub struct RedisJournal {
    commands: Arc<CommandConnection>,
    functions: Arc<dyn CounterStore>,
    end: Script,
    number: Script,
    posted: Script,
    standing: Script,
}

/// KEYS: the journal of a node, its completeness marker, the adopter of the node. ARGV: a job id, and its
/// acceptance time in Unix milliseconds. Answer: 0 if the journal does not hold the job; 3 if it does not and
/// is incomplete; 1 if it does; 2 if it does and the process that accepted the job is gone.
const STANDING: &str = "local mark = redis.call('GET', KEYS[2])
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return mark and 0 or 3 end
local started = tonumber(mark or '') or 0
if redis.call('EXISTS', KEYS[3]) == 1 or tonumber(ARGV[2]) < started then return 2 end
return 1";

impl RedisJournal {
    pub fn new(commands: Arc<CommandConnection>, functions: Arc<dyn CounterStore>) -> Self {
        Self {
            commands,
            functions,
            end: Script::new(include_str!("journal_end.lua")),
            number: Script::new(include_str!("journal_number.lua")),
            posted: Script::new(include_str!("journal_posted.lua")),
            standing: Script::new(STANDING),
        }
    }

    /// Removes sums that have been added. After a failure they are added again, which has no effect.
    async fn forget(&self, node: NodeId, added: &[NumberedSums]) {
        if added.is_empty() {
            return;
        }
        let mut call = self.posted.prepare_invoke();
        call.key(key(POSTING, node));
        for numbered in added {
            call.arg(numbered.function.as_str()).arg(numbered_text(numbered));
        }
        let call = &call;
        let forgotten: Result<(), _> =
            self.commands.run(async |mut connection| call.invoke_async(&mut connection).await).await;
        if let Err(e) = forgotten {
            tracing::debug!(error = %e, "Posted sums not removed from the journal");
        }
    }
}

#[async_trait]
impl Journal for RedisJournal {
    async fn enter(&self, jobs: &[Job]) -> Result<(), BackendError> {
        // Almost always one call: a job of another node occurs only when it is sent again.
        for (node, jobs) in by_node(jobs, |job| job.id) {
            let mut command = Cmd::with_capacity(2 + 2 * jobs.len(), ENTRY_BYTES * (jobs.len() + 1));
            command.arg("HSET").arg(key(INFLIGHT, node));
            let mut place = [0; JobId::TEXT_BYTES];
            for job in jobs {
                let key = job.idempotency_key.as_deref();
                command.arg(job.id.text(&mut place)).arg(entry_text(job.deadline, &job.function, key));
            }
            self.commands.query::<()>(&command).await?;
        }
        Ok(())
    }

    async fn leave(&self, ids: &[JobId]) -> Result<(), BackendError> {
        for (node, ids) in by_node(ids, |id| *id) {
            let mut command = Cmd::with_capacity(2 + ids.len(), JobId::TEXT_BYTES * (ids.len() + 1));
            command.arg("HDEL").arg(key(INFLIGHT, node));
            let mut place = [0; JobId::TEXT_BYTES];
            for id in ids {
                command.arg(id.text(&mut place));
            }
            self.commands.query::<()>(&command).await?;
        }
        Ok(())
    }

    async fn end(&self, node: NodeId, ended: &[EndedJob]) -> Result<EndOutcome, BackendError> {
        let mut call = self.end.prepare_invoke();
        call.key(key(INFLIGHT, node)).key(key(WHOLE, node)).key(key(UNPOSTED, node));
        call.key(key(GIVEN_UP, node)).key(key(COUNTED, node));
        call.arg(GIVEN_UP_MAX).arg(GIVEN_UP_KEPT.as_secs()).arg(ended_text(ended));
        let call = &call;
        let answer: Value =
            self.commands.run(async |mut connection| call.invoke_async(&mut connection).await).await?;
        Ok(match answer {
            Value::Int(0) => EndOutcome::Incomplete,
            Value::BulkString(digits) if digits.len() == ended.len() => {
                EndOutcome::Each(digits.into_iter().map(addition).collect())
            }
            Value::Int(1) => EndOutcome::AllAdded,
            _ => return Err(BackendError::Unavailable("the journal answered in an unknown form".into())),
        })
    }

    async fn given_up(&self, node: NodeId) -> Result<Vec<(JobId, FunctionId)>, BackendError> {
        let all: Vec<(Vec<u8>, Vec<u8>)> =
            self.commands.query(cmd("HGETALL").arg(key(GIVEN_UP, node))).await?;
        let text = |bytes: &[u8]| std::str::from_utf8(bytes).ok().map(str::to_owned);
        let parse = |(id, function): &(Vec<u8>, Vec<u8>)| {
            Some((JobId::parse(&text(id)?)?, FunctionId::parse(&text(function)?)?))
        };
        Ok(all.iter().filter_map(parse).collect())
    }

    async fn unposted(&self, node: NodeId) -> Result<Option<UnpostedSums>, BackendError> {
        // Read atomically: sums that are numbered in between would be seen twice or never.
        let mut all = redis::pipe();
        all.atomic().cmd("EXISTS").arg(key(WHOLE, node));
        all.hgetall(key(UNPOSTED, node)).hgetall(key(POSTING, node));
        let all = &all;
        let (is_whole, sums, numbered): (bool, Texts, Texts) =
            self.commands.run(async |mut connection| all.query_async(&mut connection).await).await?;
        if !is_whole {
            return Ok(None);
        }
        let mut unposted = UnpostedSums::default();
        for (function, text) in named(&sums) {
            unposted.sums.push((function, parse_sums(text).ok_or_else(unreadable)?));
        }
        for (function, text) in named(&numbered) {
            let (number, sums) = parse_numbered(text).ok_or_else(unreadable)?;
            unposted.numbered.push(NumberedSums { function, number, sums });
        }
        Ok(Some(unposted))
    }

    async fn number(
        &self,
        node: NodeId,
        functions: &[FunctionId],
        floor: u64,
    ) -> Result<Option<UnpostedSums>, BackendError> {
        assert!(functions.len() <= POSTED_MAX, "{} functions at once", functions.len());
        let mut call = self.number.prepare_invoke();
        call.key(key(UNPOSTED, node))
            .key(key(POSTING, node))
            .key(key(LAST_NUMBER, node))
            .key(key(WHOLE, node));
        call.arg(floor);
        for function in functions {
            call.arg(function.as_str());
        }
        let call = &call;
        let answer: Option<Vec<(String, String)>> =
            self.commands.run(async |mut connection| call.invoke_async(&mut connection).await).await?;
        let Some(answer) = answer else { return Ok(None) };
        let mut unposted = UnpostedSums::default();
        for (function, (numbered, sums)) in functions.iter().zip(answer) {
            if !sums.is_empty() {
                unposted.sums.push((function.clone(), parse_sums(&sums).ok_or_else(unreadable)?));
            }
            if !numbered.is_empty() {
                let (number, sums) = parse_numbered(&numbered).ok_or_else(unreadable)?;
                unposted.numbered.push(NumberedSums { function: function.clone(), number, sums });
            }
        }
        Ok(Some(unposted))
    }

    async fn post(
        &self,
        node: NodeId,
        numbered: Vec<NumberedSums>,
        at_a_time: usize,
    ) -> (Vec<NumberedSums>, Option<BackendError>) {
        let adding = numbered.into_iter().map(async |numbered| {
            let stamp = PostNumber { node, number: numbered.number };
            (self.functions.add_counters(&numbered.function, numbered.sums, stamp).await, numbered)
        });
        let mut adding = futures_util::stream::iter(adding).buffer_unordered(at_a_time);
        let (mut added, mut left, mut failure) = (Vec::new(), Vec::new(), None);
        while let Some((result, numbered)) = adding.next().await {
            match result {
                Ok(()) => added.push(numbered),
                Err(error) => {
                    left.push(numbered);
                    failure = Some(error);
                }
            }
        }
        self.forget(node, &added).await;
        (left, failure)
    }

    async fn contains(&self, id: JobId) -> Result<bool, BackendError> {
        self.commands.query(cmd("HEXISTS").arg(key(INFLIGHT, id.node())).arg(id.to_string())).await
    }

    async fn standing(&self, id: JobId) -> Result<JournalState, BackendError> {
        let node = id.node();
        let mut call = self.standing.prepare_invoke();
        call.key(key(INFLIGHT, node)).key(key(WHOLE, node)).key(key(ADOPTED, node));
        call.arg(id.to_string()).arg(id.accepted_at());
        let call = &call;
        let standing: u8 =
            self.commands.run(async |mut connection| call.invoke_async(&mut connection).await).await?;
        Ok(match standing {
            0 => JournalState::Absent,
            1 => JournalState::Held,
            2 => JournalState::Orphaned,
            _ => JournalState::Unknown,
        })
    }

    async fn entry(&self, id: JobId) -> Result<Option<JournalEntry>, BackendError> {
        let field = id.to_string();
        let value: Option<Vec<u8>> =
            self.commands.query(cmd("HGET").arg(key(INFLIGHT, id.node())).arg(&field)).await?;
        Ok(value.and_then(|value| entry(field.as_bytes(), &value)))
    }

    async fn adopter(&self, node: NodeId) -> Result<Option<NodeId>, BackendError> {
        let value: Option<Vec<u8>> = self.commands.query(cmd("GET").arg(key(ADOPTED, node))).await?;
        Ok(value.and_then(|value| NodeId::parse(std::str::from_utf8(&value).ok()?)))
    }

    async fn started(&self, node: NodeId) -> Result<(), BackendError> {
        let mut command = cmd("SET");
        command.arg(key(WHOLE, node)).arg(now_ms()).arg("XX").arg("EX").arg(WHOLE_KEPT_S);
        self.commands.query::<Option<String>>(&command).await.map(drop)
    }

    async fn entries(&self, node: NodeId) -> Result<Vec<JournalEntry>, BackendError> {
        // A map, because HSCAN may return an entry twice while the hash is resized.
        let mut entries = BTreeMap::new();
        let mut odd = 0_usize;
        let mut cursor = 0_u64;
        loop {
            let mut command = cmd("HSCAN");
            command.arg(key(INFLIGHT, node)).arg(cursor).arg("COUNT").arg(PAGE_ENTRIES);
            let (next, page): (u64, Vec<(Vec<u8>, Vec<u8>)>) = self.commands.query(&command).await?;
            for (field, value) in page {
                match entry(&field, &value) {
                    Some(entry) => drop(entries.insert(entry.id, entry)),
                    None => odd += 1,
                }
            }
            cursor = next;
            if cursor == 0 {
                break;
            }
        }
        if odd > 0 {
            tracing::warn!(%node, entries = odd, "Journal entries of an unknown format skipped");
        }
        Ok(entries.into_values().collect())
    }
}

/// The prefixes of the keys that Redis holds for a node.
pub const INFLIGHT: &str = "inflight";
/// The completeness marker: exists while the journal holds all jobs that entered it, and vanishes when Redis
/// loses its data. Jobs accepted before its value, in Unix milliseconds, belong to an earlier process of the
/// node.
pub const WHOLE: &str = "whole";
/// Expiry of the marker after its node is gone, in seconds; longer than any job may wait.
pub const WHOLE_KEPT_S: u64 = 30 * 24 * 3600;
/// The node that has adopted the jobs of a node.
pub const ADOPTED: &str = "adopted";
pub const UNPOSTED: &str = "unposted";
pub const POSTING: &str = "posting";
const LAST_NUMBER: &str = "posting:last";
pub const GIVEN_UP: &str = "givenup";
/// Jobs that several nodes may have sent, and that have counted.
const COUNTED: &str = "counted";

/// Splits the items into runs with the same node.
fn by_node<T>(items: &[T], id: impl Fn(&T) -> JobId + Copy) -> impl Iterator<Item = (NodeId, &[T])> {
    let node = move |item: &T| id(item).node();
    items.chunk_by(move |a, b| node(a) == node(b)).map(move |run| (node(&run[0]), run))
}

pub fn key(part: &str, node: NodeId) -> String {
    format!("{part}:{{{node}}}")
}

/// The value stored under the id of a job.
pub fn entry_text(deadline: UnixMs, function: &FunctionId, key: Option<&IdempotencyKey>) -> String {
    let mut text = String::with_capacity(ENTRY_BYTES);
    let _ = write!(text, "{deadline}:{function}"); // writing to a String cannot fail
    if let Some(key) = key {
        let _ = write!(text, ":{key}");
    }
    text
}

fn addition(digit: u8) -> Addition {
    match digit {
        b'1' => Addition::Whole,
        b'2' => Addition::Difference,
        _ => Addition::Nothing,
    }
}

/// Ended jobs, one per line. One text, because Redis would copy each part three times if it were a separate
/// argument.
fn ended_text(ended: &[EndedJob]) -> String {
    let mut text = String::with_capacity(ENTRY_BYTES * ended.len());
    for EndedJob { id, function, adds, is_lost, is_shared } in ended {
        let Sums { errors, duration_us, handler_invocations, handler_us, cold_starts, .. } = adds;
        text.push_str(id.text(&mut [0; JobId::TEXT_BYTES]));
        let flag = u8::from(*is_lost) + 2 * u8::from(*is_shared);
        // Writing to a String cannot fail.
        let _ = write!(text, " {function} {errors} {duration_us} {handler_invocations} {handler_us}");
        let _ = writeln!(text, " {cold_starts} {flag}");
    }
    text
}

/// Sums in the format of the scripts. The last number, of cold starts, is left out if it is 0: earlier
/// versions, which may run beside this one during an update, cannot read it.
pub fn sums_text(sums: &Sums) -> String {
    let Sums { invocations, errors, duration_us, handler_invocations, handler_us, cold_starts } = sums;
    let mut text = format!("{invocations}:{errors}:{duration_us}:{handler_invocations}:{handler_us}");
    if *cold_starts != 0 {
        let _ = write!(text, ":{cold_starts}"); // writing to a String cannot fail
    }
    text
}

/// Number and sums in the format of the scripts.
pub fn numbered_text(numbered: &NumberedSums) -> String {
    format!("{}:{}", numbered.number, sums_text(&numbered.sums))
}

fn parse_numbered(text: &str) -> Option<(u64, Sums)> {
    let (number, sums) = text.split_once(':')?;
    Some((number.parse().ok()?, parse_sums(sums)?))
}

fn parse_sums(text: &str) -> Option<Sums> {
    let numbers: Option<Vec<i64>> = text.split(':').map(|number| number.parse().ok()).collect();
    let numbers = numbers?;
    let [invocations, errors, duration_us, handler_invocations, handler_us, ref rest @ ..] = numbers[..]
    else {
        return None;
    };
    let cold_starts = match *rest {
        [] => 0,
        [cold_starts] => cold_starts,
        _ => return None,
    };
    Some(Sums { invocations, errors, duration_us, handler_invocations, handler_us, cold_starts })
}

/// Fields and values of a hash.
type Texts = Vec<(Vec<u8>, Vec<u8>)>;

/// The entries whose field is a function id.
fn named(texts: &Texts) -> impl Iterator<Item = (FunctionId, &str)> {
    let text = |bytes| std::str::from_utf8(bytes).ok();
    texts.iter().filter_map(move |(name, value)| Some((FunctionId::parse(text(name)?)?, text(value)?)))
}

fn unreadable() -> BackendError {
    BackendError::Invalid("the sums in Redis have an unknown format".into())
}

fn entry(field: &[u8], value: &[u8]) -> Option<JournalEntry> {
    let id = JobId::parse(std::str::from_utf8(field).ok()?)?;
    let mut parts = std::str::from_utf8(value).ok()?.split(':');
    let (deadline, function) = (parts.next()?.parse().ok()?, FunctionId::parse(parts.next()?)?);
    let idempotency_key = match parts.next() {
        Some(text) => Some(Box::new(IdempotencyKey::parse(text)?)),
        None => None,
    };
    Some(JournalEntry { id, function, deadline, idempotency_key })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_parsed_and_foreign_ones_are_skipped() {
        let id = JobId::new(NodeId(0xab), 5, 6);
        let read = entry(id.to_string().as_bytes(), b"17:f.1").unwrap();
        assert_eq!((read.id, read.deadline, read.function.as_str()), (id, 17, "f.1"));
        assert_eq!(key(INFLIGHT, id.node()), "inflight:{000000ab}");
        let idempotency_key = IdempotencyKey::of("a", "b");
        let text = entry_text(17, &read.function, Some(&idempotency_key));
        let with_key = entry(id.to_string().as_bytes(), text.as_bytes()).unwrap();
        assert_eq!(with_key, JournalEntry { idempotency_key: Some(Box::new(idempotency_key)), ..read });
        for bad in ["", "17", ":f", "x:f", "17:", "17:a/b", "17:f:x"] {
            assert_eq!(entry(id.to_string().as_bytes(), bad.as_bytes()), None, "{bad}");
        }
        assert_eq!(entry(b"x", b"17:f"), None);
    }

    #[test]
    fn numbered_sums_survive_a_round_trip() {
        for (cold_starts, text) in [(0, "0:-1:7000:1:5000"), (2, "0:-1:7000:1:5000:2")] {
            let (errors, duration_us, handler_us) = (-1, 7000, 5000);
            let sums =
                Sums { invocations: 0, errors, duration_us, handler_invocations: 1, handler_us, cold_starts };
            assert_eq!(sums_text(&sums), text);
            let numbered = NumberedSums { function: FunctionId::parse("f").unwrap(), number: 1 << 52, sums };
            assert_eq!(parse_numbered(&numbered_text(&numbered)), Some((numbered.number, sums)));
        }
        for bad in ["", "1", "1:2:3:4:5", "1:2:3:4:5:6:7:8", "1:2:3:4:5:x", "1:2:3:4:5:6:x", "-1:2:3:4:5:6"] {
            assert_eq!(parse_numbered(bad), None, "{bad}");
        }
    }
}
