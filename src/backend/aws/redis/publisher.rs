//! Publishes the results of runs, and stores a copy of each.
//!
//! PUBLISH comes before SETEX, as in every worker (see docs/worker-protocol.md). Both may run twice: the
//! gateway counts the first result only.
//!
//! The message of a job is deleted after its result is stored. A Redis with replicas answers before it has
//! replicated anything, so a failover would lose the result, and nobody would run the job again. Therefore a
//! batch ends with WAIT, if Redis has replicas. WAIT covers the writes of its own connection, and holds that
//! connection until it is answered. So all results that are ready go in one batch, and the connection is used
//! for nothing else.
//!
//! A batch that no replica confirms has failed, and its callers publish their results again. That is bounded:
//! after [`UNCONFIRMED_MAX`] without a confirmation, replicas are not waited for. Redis itself drops a silent
//! replica later, after its `repl-timeout` (60 s).

use super::connection::{COMMAND_DEADLINE, CommandConnection, class};
use super::results::{STORED_S, channel, stored_key};
use crate::backend::BackendError;
use crate::backend::aws::coalescer::{BatchBounds, Coalescer, ItemOutcome};
use bytes::Bytes;
use parking_lot::Mutex;
use redis::{RedisError, RedisResult, Value, cmd};
use std::time::Duration;
use tokio::time::Instant;

/// One batch at a time, because WAIT holds the connection. The bytes reach Redis twice.
const BATCHES: BatchBounds = BatchBounds { calls_max: 1, items_max: 64, bytes_max: 1 << 20 };
/// Replicas that must have a result before its message is deleted.
const REPLICAS_MIN: u32 = 1;
/// Deadline of WAIT, in milliseconds; below that of a command.
const WAIT_MS: u64 = 500;
/// How long the answer whether Redis has replicas is used. After a batch that no replica has confirmed, Redis
/// is asked again at once.
const KNOWN_FOR: Duration = Duration::from_secs(10);
/// After this time without a confirmation, replicas are not waited for.
const UNCONFIRMED_MAX: Duration = Duration::from_secs(30);
/// How long they are not waited for, before the next batch tries again.
const UNWAITED_FOR: Duration = Duration::from_secs(60);

/// A connection that is slower than this fails.
const BYTES_A_SECOND_MIN: usize = 2 << 20;

pub struct ResultPublisher {
    commands: CommandConnection,
    batches: Coalescer<Publication>,
    replicas: Mutex<ReplicaWatch>,
}

#[derive(Clone)]
struct Publication {
    request_id: String,
    result: Bytes,
}

impl ResultPublisher {
    /// `commands`: a connection that nobody else uses, because WAIT delays every command behind it.
    pub fn new(commands: CommandConnection) -> Self {
        Self { commands, batches: Coalescer::new(BATCHES), replicas: Mutex::default() }
    }

    /// Publishes a result, stores it for [`STORED_S`] seconds, and waits for a replica if Redis has one.
    ///
    /// # Errors
    /// The result may have been published and stored. Another call repeats all steps.
    pub async fn publish(&self, request_id: &str, result: Bytes) -> Result<(), BackendError> {
        let bytes = result.len();
        let publication = Publication { request_id: request_id.to_owned(), result };
        self.batches.call(publication, bytes, |batch| self.send(batch)).await
    }

    async fn send(&self, batch: Vec<Publication>) -> Vec<ItemOutcome> {
        let outcome = self.send_all(&batch).await;
        vec![outcome; batch.len()]
    }

    async fn send_all(&self, batch: &[Publication]) -> Result<(), BackendError> {
        let waits = self.has_replica().await?;
        let mut all = redis::pipe();
        for Publication { request_id, result } in batch {
            let text: &[u8] = result;
            all.cmd("PUBLISH").arg(channel(request_id)).arg(text);
            all.cmd("SETEX").arg(stored_key(request_id)).arg(STORED_S).arg(text);
        }
        if waits {
            all.cmd("WAIT").arg(REPLICAS_MIN).arg(WAIT_MS);
        }
        // Otherwise the error of a whole pipeline hides the codes of its commands.
        all.ignore_errors();
        let all = &all;
        let bytes: usize = batch.iter().map(|publication| publication.result.len()).sum();
        let deadline = COMMAND_DEADLINE + Duration::from_secs((2 * bytes / BYTES_A_SECOND_MIN) as u64);
        let confirmed = self.commands.run_within(deadline, async |mut connection| {
            let mut answers: Vec<RedisResult<Value>> = all.query_async(&mut connection).await?;
            let confirmed = if waits { answers.pop() } else { None };
            answers.into_iter().collect::<RedisResult<Vec<Value>>>()?;
            Ok::<_, RedisError>(confirmed)
        });
        match confirmed.await? {
            Some(answer) => self.confirmed(answer),
            None => Ok(()),
        }
    }

    /// Whether the next batch waits for a replica.
    async fn has_replica(&self) -> Result<bool, BackendError> {
        let step = self.replicas.lock().step(Instant::now());
        match step {
            WaitStep::Wait => return Ok(true),
            WaitStep::Skip => return Ok(false),
            WaitStep::Ask => {}
        }
        match self.commands.query::<String>(cmd("INFO").arg("replication")).await {
            Ok(info) => {
                let has_replica = online_replicas(&info) >= REPLICAS_MIN as usize;
                self.replicas.lock().learned(Instant::now(), has_replica);
                Ok(has_replica)
            }
            Err(error @ (BackendError::Unavailable(_) | BackendError::Missing(_))) => Err(error),
            Err(error @ (BackendError::Denied(_) | BackendError::Invalid(_))) => {
                self.cannot_wait(&error);
                Ok(false)
            }
        }
    }

    /// Evaluates the answer to WAIT.
    fn confirmed(&self, answer: Result<Value, RedisError>) -> Result<(), BackendError> {
        match answer {
            Ok(Value::Int(replicas)) if replicas >= i64::from(REPLICAS_MIN) => {
                if self.replicas.lock().confirmed() {
                    tracing::info!("Replicas of Redis confirm results again");
                }
                Ok(())
            }
            Ok(_) => match self.replicas.lock().missed(Instant::now()) {
                MissOutcome::Retry => Err(BackendError::Unavailable(format!(
                    "no replica of Redis has confirmed the result within {WAIT_MS} ms"
                ))),
                MissOutcome::GoOn => {
                    tracing::warn!(
                        seconds = UNCONFIRMED_MAX.as_secs(),
                        "No replica of Redis confirms results. They are stored on the primary only, and a \
                         failover loses them. Check the replication"
                    );
                    Ok(())
                }
            },
            Err(error) => match class(&error) {
                error @ (BackendError::Unavailable(_) | BackendError::Missing(_)) => Err(error),
                error @ (BackendError::Denied(_) | BackendError::Invalid(_)) => {
                    self.cannot_wait(&error);
                    Ok(())
                }
            },
        }
    }

    /// Redis does not allow this user INFO or WAIT. Logged once.
    fn cannot_wait(&self, error: &BackendError) {
        let mut replicas = self.replicas.lock();
        replicas.learned(Instant::now(), false);
        if !std::mem::replace(&mut replicas.is_denied, true) {
            tracing::warn!(
                %error,
                "Results are not confirmed by replicas, so a failover of Redis may lose them. Allow the user \
                 +info and +wait"
            );
        }
    }
}

/// What a batch does about replicas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WaitStep {
    /// Ask Redis whether it has replicas.
    Ask,
    Wait,
    Skip,
}

/// What follows from a batch that no replica has confirmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum MissOutcome {
    Retry,
    GoOn,
}

/// What is known about the replicas of Redis.
#[derive(Default)]
struct ReplicaWatch {
    /// When Redis was asked, and whether it had a replica then.
    known: Option<(Instant, bool)>,
    /// Since when no replica has confirmed a batch.
    unconfirmed_since: Option<Instant>,
    unwaited_until: Option<Instant>,
    is_denied: bool,
}

impl ReplicaWatch {
    fn step(&self, now: Instant) -> WaitStep {
        if self.unwaited_until.is_some_and(|until| now < until) {
            return WaitStep::Skip;
        }
        match self.known {
            Some((at, has_replica)) if now < at + KNOWN_FOR && self.unconfirmed_since.is_none() => {
                if has_replica {
                    WaitStep::Wait
                } else {
                    WaitStep::Skip
                }
            }
            _ => WaitStep::Ask,
        }
    }

    fn learned(&mut self, now: Instant, has_replica: bool) {
        self.known = Some((now, has_replica));
        if !has_replica {
            self.unconfirmed_since = None;
            self.unwaited_until = None;
        }
    }

    /// Returns whether replicas were not waited for.
    fn confirmed(&mut self) -> bool {
        self.unconfirmed_since = None;
        self.unwaited_until.take().is_some()
    }

    fn missed(&mut self, now: Instant) -> MissOutcome {
        let since = *self.unconfirmed_since.get_or_insert(now);
        if now - since < UNCONFIRMED_MAX {
            return MissOutcome::Retry;
        }
        self.unwaited_until = Some(now + UNWAITED_FOR);
        MissOutcome::GoOn
    }
}

/// The number of replicas that receive writes, by the answer to `INFO replication`. Such a line is
/// `slave0:ip=10.0.0.2,port=6379,state=online,offset=1,lag=0`.
fn online_replicas(info: &str) -> usize {
    let is_online = |line: &str| {
        let Some((name, fields)) = line.trim().split_once(':') else { return false };
        let number = name.strip_prefix("slave").unwrap_or_default();
        let is_replica = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
        is_replica && fields.split(',').any(|field| field == "state=online")
    };
    info.lines().filter(|line| is_online(line)).count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::aws::redis::simulated::{Command, LinkError, RedisLink, Reply};
    use futures_util::future::{BoxFuture, join_all};
    use std::sync::Arc;
    use tokio::time::advance;

    const ONE_REPLICA: &str = "# Replication\r\nrole:master\r\nconnected_slaves:1\r\n\
         slave0:ip=10.0.0.2,port=6379,state=online,offset=1,lag=0\r\nmaster_repl_offset:1\r\n";

    /// A server with prepared answers to INFO and WAIT. The other commands succeed, unless `refusal` is set.
    struct Server {
        sent: Mutex<Vec<String>>,
        info: Mutex<Reply>,
        replicas: Mutex<Reply>,
        refusal: Mutex<Option<Reply>>,
    }

    impl Server {
        fn new(info: &str, replicas: i64) -> Arc<Self> {
            Arc::new(Self {
                sent: Mutex::default(),
                info: Mutex::new(Reply::Bulk(info.into())),
                replicas: Mutex::new(Reply::Int(replicas)),
                refusal: Mutex::default(),
            })
        }

        fn publisher(self: &Arc<Self>) -> ResultPublisher {
            let link: Arc<dyn RedisLink> = self.clone();
            ResultPublisher::new(CommandConnection::simulated(link))
        }

        fn sent(&self) -> Vec<String> {
            std::mem::take(&mut self.sent.lock())
        }

        fn reply(&self, command: &Command) -> Reply {
            let words: Vec<_> = command.iter().map(|word| String::from_utf8_lossy(word)).collect();
            if words[0] == "CLIENT" {
                return Reply::Bulk(b"id=1 addr=10.0.0.1:1".to_vec());
            }
            self.sent.lock().push(words.join(" "));
            match &*words[0] {
                "INFO" => self.info.lock().clone(),
                "WAIT" => self.replicas.lock().clone(),
                "SETEX" => self.refusal.lock().clone().unwrap_or(Reply::Status("OK".into())),
                _ => Reply::Int(1),
            }
        }
    }

    impl RedisLink for Server {
        fn connect(&self) -> BoxFuture<'static, Result<u64, LinkError>> {
            Box::pin(async { Ok(1) })
        }

        fn call(
            &self,
            _connection: u64,
            commands: Vec<Command>,
            _is_transaction: bool,
        ) -> BoxFuture<'static, Result<Vec<Reply>, LinkError>> {
            let replies = commands.iter().map(|command| self.reply(command)).collect();
            Box::pin(async move {
                // Time for other results to come.
                tokio::task::yield_now().await;
                Ok(replies)
            })
        }
    }

    fn error(code: &str) -> Reply {
        Reply::Error { code: code.into(), text: "no".into() }
    }

    const INFO: &str = "INFO replication";
    const WAIT: &str = "WAIT 1 500";

    #[tokio::test(start_paused = true)]
    async fn results_are_published_then_stored_then_confirmed() {
        let server = Server::new("role:master\r\nconnected_slaves:0\r\n", 0);
        let publisher = server.publisher();
        for _ in 0..2 {
            assert_eq!(publisher.publish("a", "1".into()).await, Ok(()));
        }
        let once = ["PUBLISH result:a 1", "SETEX job:a 3600 1"];
        assert_eq!(server.sent(), [&[INFO][..], &once, &once].concat(), "no replica");

        *server.info.lock() = Reply::Bulk(ONE_REPLICA.into());
        *server.replicas.lock() = Reply::Int(1);
        advance(KNOWN_FOR).await;
        let calls = ["a", "b", "c"].map(|id| publisher.publish(id, "1".into()));
        assert_eq!(join_all(calls).await, [Ok(()), Ok(()), Ok(())]);
        let rest = ["PUBLISH result:b 1", "SETEX job:b 3600 1", "PUBLISH result:c 1", "SETEX job:c 3600 1"];
        assert_eq!(server.sent(), [&[INFO][..], &once, &[WAIT], &rest, &[WAIT]].concat());
    }

    #[tokio::test(start_paused = true)]
    async fn a_replica_that_confirms_nothing_is_waited_for_within_bounds() {
        let server = Server::new(ONE_REPLICA, 0);
        let publisher = server.publisher();
        let publish = async || publisher.publish("a", "1".into()).await;
        for _ in 0..3 {
            assert!(matches!(publish().await, Err(BackendError::Unavailable(_))));
            advance(UNCONFIRMED_MAX / 3).await;
            assert!(server.sent().contains(&INFO.to_owned()), "Redis is asked each time");
        }
        assert_eq!(publish().await, Ok(()), "the bound is reached");
        assert!(server.sent().contains(&WAIT.to_owned()));
        assert_eq!(publish().await, Ok(()));
        assert!(!server.sent().contains(&WAIT.to_owned()));
        advance(UNWAITED_FOR).await;
        *server.replicas.lock() = Reply::Int(1);
        for _ in 0..2 {
            assert_eq!(publish().await, Ok(()));
            assert!(server.sent().contains(&WAIT.to_owned()), "it confirms again");
        }
        *server.replicas.lock() = Reply::Int(0);
        assert!(publish().await.is_err(), "the time starts again");
        *server.info.lock() = Reply::Bulk(b"role:master".to_vec());
        assert_eq!(publish().await, Ok(()), "the replica is gone");
    }

    #[tokio::test(start_paused = true)]
    async fn refusals_are_classified() {
        let server = Server::new(ONE_REPLICA, 1);
        let publisher = server.publisher();
        let publish = async || publisher.publish("a", "1".into()).await;
        *server.refusal.lock() = Some(error("OOM"));
        assert_eq!(publish().await, Err(BackendError::Unavailable("Redis answered OOM".into())));
        *server.refusal.lock() = Some(error("NOPERM"));
        assert_eq!(publish().await, Err(BackendError::Denied("Redis answered NOPERM".into())));
        *server.refusal.lock() = None;
        *server.replicas.lock() = error("NOPERM");
        assert_eq!(publish().await, Ok(()), "a user without WAIT");
        *server.info.lock() = error("NOPERM");
        advance(KNOWN_FOR).await;
        server.sent();
        assert_eq!(publish().await, Ok(()), "a user without INFO");
        assert!(!server.sent().contains(&WAIT.to_owned()));
    }

    #[test]
    fn replicas_are_counted() {
        for (info, count) in [
            (ONE_REPLICA, 1),
            ("role:master\nconnected_slaves:0\n", 0),
            ("slave0:ip=a,state=online\nslave1:ip=b,state=wait_bgsave\nslave12:state=online", 2),
            ("slave_priority:100\nslave:state=online\nslave0", 0),
            ("", 0),
        ] {
            assert_eq!(online_replicas(info), count, "{info}");
        }
    }
}
