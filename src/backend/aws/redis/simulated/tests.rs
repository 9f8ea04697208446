//! Tests of the simulated server, and of the code of production over it.

use super::*;
use crate::backend::aws::dynamodb::functions::{CounterStore, PostNumber};
use crate::backend::aws::redis::connection::CommandConnection;
use crate::backend::aws::redis::journal::RedisJournal;
use crate::backend::aws::redis::membership::RedisMembership;
use crate::backend::{
    Addition, BackendError, EndOutcome, EndedJob, FleetState, Journal, JournalPart, LeaseRenewal, Membership,
    NumberedSums, UnpostedSums,
};
use crate::model::{FunctionId, Job, JobId, NodeId, ProcessToken, Sums};
use async_trait::async_trait;
use std::cell::RefCell;
use std::slice::from_ref;
use std::time::Duration;

const NOW: u64 = 1_795_000_000_000_000;

fn typed(command: &str) -> Command {
    command.split(' ').map(|word| word.as_bytes().to_vec()).collect()
}

fn eval(code: &str, args: &[&str]) -> Command {
    ["EVAL", code].iter().chain(args).map(|word| word.as_bytes().to_vec()).collect()
}

fn shown(reply: &Reply) -> String {
    match reply {
        Reply::Nil => "nil".to_owned(),
        Reply::Int(number) => number.to_string(),
        Reply::Bulk(bytes) => format!("'{}'", String::from_utf8_lossy(bytes)),
        Reply::Status(text) => text.clone(),
        Reply::Array(items) => {
            format!("[{}]", items.iter().map(shown).collect::<Vec<_>>().join(" "))
        }
        Reply::Error { code, text } => format!("{code} {text}"),
    }
}

/// Each command with its time in milliseconds and its reply.
fn check(rows: &[(u64, &str, &str)]) {
    let mut server = SimulatedRedis::new();
    for (ms, command, expected) in rows {
        let reply = server.run(ms * 1000, &typed(command));
        assert_eq!(shown(&reply), *expected, "{command} at {ms}");
    }
}

const WRONG_TYPE: &str = "WRONGTYPE Operation against a key holding the wrong kind of value";

#[test]
fn texts_are_stored_and_expire() {
    check(&[
        (0, "PING", "PONG"),
        (1_500, "TIME", "['1' '500000']"),
        (0, "GET k", "nil"),
        (0, "SET k v NX", "OK"),
        (0, "set k w NX", "nil"),
        (0, "SET absent v XX", "nil"),
        (0, "GET k", "'v'"),
        (100, "SET k w XX PX 10", "OK"),
        (110, "GET k", "'w'"),
        (111, "GET k", "nil"),
        (0, "SETEX k 2 v", "OK"),
        (2_000, "EXISTS k k absent", "2"),
        (2_000, "EXPIRE k 1", "1"),
        (3_000, "PEXPIRE k 5", "1"),
        (3_005, "MGET k absent", "['v' nil]"),
        (3_006, "EXPIRE k 1", "0"),
        (0, "SET k v", "OK"),
        (0, "EXPIRE k 0", "1"),
        (0, "DEL k", "0"),
        (0, "SET k v EX 0", "ERR invalid expire time in 'set' command"),
        (0, "SET k v", "OK"),
        (0, "EXPIRE k x", "ERR value is not an integer or out of range"),
        (0, "HGET k f", WRONG_TYPE),
        (0, "ZADD k 1 a", WRONG_TYPE),
        (0, "DEL k absent", "1"),
        (0, "PUBLISH c hello", "0"),
    ]);
}

#[test]
fn hashes_and_sorted_sets_are_stored() {
    check(&[
        (0, "HSET h b 2 a 1", "2"),
        (0, "HSET h a 3", "0"),
        (0, "HGET h a", "'3'"),
        (0, "HGET h z", "nil"),
        (0, "HMGET h a z", "['3' nil]"),
        (0, "HEXISTS h b", "1"),
        (0, "HLEN h", "2"),
        (0, "HGETALL h", "['a' '3' 'b' '2']"),
        (0, "HGETALL absent", "[]"),
        (0, "HSCAN h 0 COUNT 10", "['0' ['a' '3' 'b' '2']]"),
        (0, "GET h", WRONG_TYPE),
        (0, "MGET h", "[nil]"),
        (0, "HDEL h a z", "1"),
        (0, "HDEL h b", "1"),
        (0, "EXISTS h", "0"),
        (0, "ZADD z 2 b 1 a", "2"),
        (0, "ZADD z NX 9 a 3 c", "1"),
        (0, "ZSCORE z a", "'1'"),
        (0, "ZSCORE z x", "nil"),
        (0, "ZCARD z", "3"),
        (0, "ZCOUNT z (1 +inf", "2"),
        (0, "ZRANGEBYSCORE z -inf (3", "['a' 'b']"),
        (0, "ZRANGEBYSCORE z 2 3 WITHSCORES", "['b' '2' 'c' '3']"),
        (0, "ZRANGEBYSCORE z -inf +inf LIMIT 1 1", "['b']"),
        (0, "ZADD z x y", "ERR value is not a valid float"),
        (0, "ZCOUNT z x 1", "ERR min or max is not a float"),
        (0, "ZREM z a b c x", "3"),
        (0, "EXISTS z", "0"),
    ]);
}

#[test]
fn scripts_run_as_in_redis() {
    let mut server = SimulatedRedis::new();
    for (code, expected) in [
        ("return {KEYS[1], ARGV[1], #ARGV, 2.9, true, false, {'in'}, nil, 1}", "['k' 'v' 1 2 1 nil ['in']]"),
        ("local unused = 1", "nil"),
        ("return {ok = 'FINE'}", "FINE"),
        ("return {err = 'BAD thing'}", "BAD thing"),
        ("return redis.call('SET', 'n', 1e15)", "OK"),
        ("return redis.call('GET', 'n')", "'1000000000000000'"),
        ("redis.call('SET', 'n', 0.1) return redis.call('GET', 'n')", "'0.10000000000000001'"),
        ("return redis.call('GET', 'absent') == false", "1"),
        ("return redis.call('EXISTS', 'n') == 1", "1"),
        ("return math.max(unpack(redis.call('TIME')))", "1795000000"),
        ("return redis.call('HLEN', 'n')", WRONG_TYPE),
    ] {
        assert_eq!(shown(&server.run(NOW, &eval(code, &["1", "k", "v"]))), expected, "{code}");
    }
    for code in ["left = 1", "return missing", "return (", "return redis.call('GET', {})"] {
        assert!(shown(&server.run(NOW, &eval(code, &["0"]))).starts_with("ERR "), "{code}");
    }
    let Reply::Bulk(sha) = server.run(NOW, &typed("SCRIPT LOAD return'x'")) else { panic!("no SHA-1") };
    let call = vec![b"EVALSHA".to_vec(), sha, b"0".to_vec()];
    assert_eq!(shown(&server.run(NOW, &call)), "'x'");
    let kept = server.snapshot();
    server.lose_everything();
    assert_eq!(shown(&server.run(NOW, &call)), "NOSCRIPT No matching script. Please use EVAL.");
    assert_eq!(shown(&server.run(NOW, &typed("EXISTS n"))), "0");
    server.restore(kept);
    assert_eq!(shown(&server.run(NOW, &typed("EXISTS n"))), "1");
    server.run(NOW, &typed("PUBLISH c hello"));
    assert_eq!(server.published, [("c".to_owned(), b"hello".to_vec())]);
}

thread_local! {
    static SERVER: RefCell<SimulatedRedis> = RefCell::new(SimulatedRedis::new());
}

/// Answers at once from the server of the thread, or fails.
struct TestLink(Option<LinkError>);

impl RedisLink for TestLink {
    fn connect(&self) -> BoxFuture<'static, Result<u64, LinkError>> {
        let refused = self.0.filter(|error| *error == LinkError::Refused);
        Box::pin(std::future::ready(refused.map_or(Ok(1), Err)))
    }

    fn call(
        &self,
        _connection: u64,
        commands: Vec<Command>,
        _is_transaction: bool,
    ) -> BoxFuture<'static, Result<Vec<Reply>, LinkError>> {
        if commands[0][0] == b"CLIENT" {
            let denied = Reply::Error { code: "NOPERM".into(), text: "no permission".into() };
            return Box::pin(std::future::ready(Ok(vec![denied])));
        }
        let replies: Vec<Reply> = SERVER
            .with_borrow_mut(|server| commands.iter().map(|command| server.run(NOW, command)).collect());
        Box::pin(std::future::ready(self.0.map_or(Ok(replies), Err)))
    }
}

struct NoCounters;

#[async_trait]
impl CounterStore for NoCounters {
    async fn add_counters(&self, _: &FunctionId, _: Sums, _: PostNumber) -> Result<(), BackendError> {
        Ok(())
    }
}

/// A connection to a new server of this thread.
fn connection(failure: Option<LinkError>) -> Arc<CommandConnection> {
    SERVER.set(SimulatedRedis::new());
    Arc::new(CommandConnection::simulated(Arc::new(TestLink(failure))))
}

#[tokio::test(start_paused = true)]
async fn transactions_and_failures_are_those_of_a_connection() {
    SERVER.set(SimulatedRedis::new());
    let mut connection = SimulatedConnection::connect(Arc::new(TestLink(None))).await.unwrap();
    for is_atomic in [true, false] {
        let mut pipe = redis::pipe();
        if is_atomic {
            pipe.atomic();
        }
        pipe.cmd("SET").arg("k").arg(5).ignore();
        pipe.cmd("GET").arg("k").cmd("GET").arg("absent");
        let found: (u64, Option<u64>) = pipe.query_async(&mut connection).await.unwrap();
        assert_eq!(found, (5, None));
        pipe.cmd("HLEN").arg("k");
        let failed: Result<(), RedisError> = pipe.query_async(&mut connection).await;
        assert!(failed.unwrap_err().to_string().contains("WRONGTYPE"));
    }
    let failed: Result<(), RedisError> = redis::cmd("HLEN").arg("k").query_async(&mut connection).await;
    assert_eq!(failed.unwrap_err().code(), Some("WRONGTYPE"));
    let (broken, refused) = (RedisError::from(LinkError::Broken), RedisError::from(LinkError::Refused));
    assert!(broken.is_io_error() && broken.is_connection_dropped() && !broken.is_connection_refusal());
    assert!(refused.is_io_error() && refused.is_connection_dropped() && refused.is_connection_refusal());
}

#[tokio::test(start_paused = true)]
async fn a_command_runs_once_more_after_a_break() {
    let commands = connection(Some(LinkError::Broken));
    let publish = commands.query::<u64>(redis::cmd("PUBLISH").arg("c").arg("hello")).await;
    assert!(matches!(publish, Err(BackendError::Unavailable(_))));
    assert_eq!(SERVER.with_borrow(|server| server.published.len()), 2);
    let commands = connection(Some(LinkError::Refused));
    assert!(matches!(commands.ping().await, Err(BackendError::Unavailable(_))));
}

#[tokio::test(start_paused = true)]
async fn the_journal_and_the_membership_run_on_it() {
    let commands = connection(None);
    let member = |process| RedisMembership::new(Arc::clone(&commands), "logs", ProcessToken(process));
    let (membership, other) = (member(1), member(2));
    let journal = RedisJournal::new(Arc::clone(&commands), Arc::new(NoCounters));
    let (node, function) = (NodeId(0xab), FunctionId::parse("f").unwrap());
    let id = JobId::new(node, 5, 6);
    let job = Job {
        progress: None,
        id,
        function: function.clone(),
        deadline: 17,
        idempotency_key: None,
        is_promised: true,
        message: bytes::Bytes::new(),
        trace: None,
    };
    journal.enter(from_ref(&job)).await.unwrap();
    let entries = journal.entries(node).await.unwrap();
    assert_eq!(entries.iter().map(|entry| (entry.id, entry.deadline)).collect::<Vec<_>>(), [(id, 17)]);

    let sums = Sums {
        invocations: 1,
        errors: 0,
        duration_us: 7000,
        handler_invocations: 1,
        handler_us: 5000,
        cold_starts: 1,
    };
    let ended = EndedJob { id, function: function.clone(), adds: sums, is_lost: false, is_shared: false };
    let outcome = journal.end(node, from_ref(&ended)).await;
    assert_eq!(outcome, Ok(EndOutcome::Incomplete), "the journal is not complete");
    let sums_of = [(function.clone(), Sums::default())];
    let restore = async |token| membership.restore(node, token, JournalPart::Sums(&sums_of)).await;
    assert_eq!(restore(1).await, Ok(false), "no restore has begun");
    for token in [1, 2] {
        assert_eq!(membership.begin_restore(node, token).await, Ok(true));
    }
    assert_eq!((restore(1).await, restore(2).await), (Ok(false), Ok(true)));
    assert_eq!(membership.finish_restore(node, 1).await, Ok(false));
    assert_eq!(membership.finish_restore(node, 2).await, Ok(true));
    assert_eq!((membership.begin_restore(node, 3).await, restore(2).await), (Ok(false), Ok(false)));
    for outcome in [EndOutcome::AllAdded, EndOutcome::Each(vec![Addition::Nothing])] {
        assert_eq!(journal.end(node, from_ref(&ended)).await, Ok(outcome));
    }
    assert_eq!(journal.entries(node).await, Ok(Vec::new()));
    let unposted = UnpostedSums { numbered: Vec::new(), sums: vec![(function.clone(), sums)] };
    assert_eq!(journal.unposted(node).await, Ok(Some(unposted)));
    let numbered = NumberedSums { function: function.clone(), number: NOW + 1, sums };
    let unposted = UnpostedSums { numbered: vec![numbered.clone()], sums: Vec::new() };
    assert_eq!(journal.number(node, from_ref(&function), 0).await, Ok(Some(unposted)));
    assert_eq!(journal.post(node, vec![numbered], 4).await, (Vec::new(), None));
    assert_eq!(journal.unposted(node).await, Ok(Some(UnpostedSums::default())));

    let lease = Duration::from_secs(5);
    for is_contested in [false, true] {
        let others = FleetState { lapsed: Vec::new(), alive: 1 };
        let renewed = LeaseRenewal::Renewed { others, is_contested, adoptions: 0 };
        assert_eq!(membership.renew(node, lease).await, Ok(renewed));
        assert_eq!(other.renew(node, lease).await, Ok(LeaseRenewal::Lost));
    }
}

#[test]
fn keys_that_nobody_reads_are_removed() {
    let mut server = SimulatedRedis::new();
    server.run(0, &typed("SET k v PX 1"));
    (0..SWEEP_EVERY).for_each(|_| drop(server.run(NOW, &typed("PING"))));
    assert_eq!(server.snapshot(), Keyspace::default());
}
