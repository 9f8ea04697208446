//! Calls from a process to a service: delayed, lost before or after they take effect, or done twice.

use super::world::{Outage, Service, World, trace, world};
use crate::ambient::replaced::{self, ProcessNumber};
use crate::backend::BackendError;
use crate::backend::aws::simulation::{Command, LinkError, RedisLink, Reply};
use futures_util::future::BoxFuture;
use rand::Rng;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::{sleep, timeout};

/// How long a caller waits for a table or the queue, as in `backend::aws::json_call`. A slower call takes its
/// effect after its caller has given up and gone on.
const CALL_TIMEOUT: Duration = Duration::from_secs(2);
/// Longer than any caller waits.
const NEVER: Duration = Duration::from_secs(3600);

/// What happens to one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Done,
    /// It takes no effect, and the caller learns that at once.
    Refused,
    RequestLost,
    AnswerLost,
    /// It takes effect twice, the second time later.
    Twice,
}

struct Trip {
    there: Duration,
    back: Duration,
    fate: Fate,
    /// How long the caller waits for an answer that does not come.
    patience: Duration,
}

/// Why a call has no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoAnswer {
    /// It took no effect.
    Refused,
    /// Whether it took effect is not known.
    Lost,
}

impl From<NoAnswer> for BackendError {
    fn from(_: NoAnswer) -> Self {
        Self::Unavailable("simulated: no answer".into())
    }
}

impl World {
    fn plan(&mut self, service: Service, process: Option<ProcessNumber>) -> Trip {
        let outage = self.outage(service, process);
        let profile = self.profile;
        let quick = |world: &mut Self| Duration::from_micros(world.rng.random_range(200..3000));
        let (mut there, mut back) = (quick(self), quick(self));
        if self.chance(profile.slow_calls) {
            self.bite("slow call");
            there = Duration::from_millis(self.rng.random_range(10..6000));
        }
        if self.chance(profile.slow_calls) {
            back = Duration::from_millis(self.rng.random_range(10..3000));
        }
        let fate = match outage {
            Some(Outage { refuses: true, .. }) => Fate::Refused,
            Some(_) => Fate::RequestLost,
            None if self.chance(profile.refused_calls) => Fate::Refused,
            None if self.chance(profile.lost_requests) => Fate::RequestLost,
            None if self.chance(profile.lost_answers) => Fate::AnswerLost,
            // TCP delivers once, and the connection to Redis repeats commands itself.
            None if service != Service::Redis && self.chance(profile.repeated_calls) => Fate::Twice,
            None => Fate::Done,
        };
        match (outage, fate) {
            (Some(_), _) => self.bite("call in an outage"),
            (_, Fate::Refused) => self.bite("refused call"),
            (_, Fate::RequestLost) => self.bite("lost request"),
            _ => {}
        }
        let patience = Duration::from_millis(self.rng.random_range(500..5000));
        Trip { there, back, fate, patience }
    }
}

/// Calls a service. `apply` is its effect, in one step. The call goes on if its caller is dropped or killed.
pub async fn call<T: Send + 'static>(
    service: Service,
    what: &'static str,
    apply: impl Fn(&mut World) -> T + Send + 'static,
) -> Result<T, NoAnswer> {
    let process = replaced::current();
    let trip = world(|world| world.plan(service, process));
    let (answer, answered) = oneshot::channel();
    detach(carry(trip, process, what, apply, answer));
    // The sender is kept until there is an answer.
    match service {
        // The command connection has a deadline of its own.
        Service::Redis => answered.await.unwrap_or(Err(NoAnswer::Lost)),
        _ => match timeout(CALL_TIMEOUT, answered).await {
            Ok(answer) => answer.unwrap_or(Err(NoAnswer::Lost)),
            Err(_) => Err(NoAnswer::Lost),
        },
    }
}

async fn carry<T: Send + 'static>(
    trip: Trip,
    process: Option<ProcessNumber>,
    what: &'static str,
    apply: impl Fn(&mut World) -> T + Send + 'static,
    answer: oneshot::Sender<Result<T, NoAnswer>>,
) {
    let Trip { there, back, fate, patience } = trip;
    sleep(there).await;
    trace(|| format!("call {} {what} {fate:?}", shown(process)));
    let outcome = match fate {
        Fate::Refused => Err(NoAnswer::Refused),
        Fate::RequestLost => {
            sleep(patience).await;
            Err(NoAnswer::Lost)
        }
        Fate::AnswerLost => {
            let _ = world(|world| {
                world.bite("lost answer");
                apply(world)
            });
            sleep(patience).await;
            Err(NoAnswer::Lost)
        }
        Fate::Done | Fate::Twice => {
            let value = world(&apply);
            if fate == Fate::Twice {
                let after = world(|world| Duration::from_millis(world.rng.random_range(1..2000)));
                detach(async move {
                    sleep(after).await;
                    trace(|| format!("call {} {what} again", shown(process)));
                    let _ = world(|world| {
                        world.bite("repeated call");
                        apply(world)
                    });
                });
            }
            if answer.is_closed() {
                world(|world| world.bite("call of a caller that has gone on or died"));
            }
            Ok(value)
        }
    };
    sleep(back).await;
    let _ = answer.send(outcome);
}

fn shown(process: Option<ProcessNumber>) -> String {
    process.map_or_else(|| "-".to_owned(), |process| format!("p{}", process.0))
}

/// Starts a task outside all processes.
#[expect(clippy::disallowed_methods, reason = "tasks of the simulated world end with its runtime")]
pub fn detach(task: impl Future<Output = ()> + Send + 'static) {
    tokio::spawn(task);
}

/// The way to Redis. A connection breaks with the server that it leads to.
pub struct Link;

impl RedisLink for Link {
    fn connect(&self) -> BoxFuture<'static, Result<u64, LinkError>> {
        Box::pin(async {
            let connected = call(Service::Redis, "redis connect", |world| world.redis.connect()).await;
            match connected {
                Ok(number) => Ok(number),
                Err(NoAnswer::Refused) => Err(LinkError::Refused),
                Err(NoAnswer::Lost) => {
                    sleep(NEVER).await;
                    Err(LinkError::Refused)
                }
            }
        })
    }

    fn call(
        &self,
        connection: u64,
        commands: Vec<Command>,
        _is_transaction: bool, // a call is one step anyway
    ) -> BoxFuture<'static, Result<Vec<Reply>, LinkError>> {
        Box::pin(async move {
            let what = name_of(&commands);
            let answer = call(Service::Redis, what, move |world| {
                if !world.redis.connections.contains(&connection) {
                    world.bite("command of a closed connection");
                    return None;
                }
                Some(world.run_on_connection(connection, &commands))
            })
            .await;
            let is_open = world(|world| world.redis.connections.contains(&connection));
            match answer {
                Ok(Some(replies)) if is_open => Ok(replies),
                Ok(_) | Err(NoAnswer::Refused) => Err(LinkError::Broken),
                Err(NoAnswer::Lost) => {
                    // The command's own deadline ends it.
                    sleep(NEVER).await;
                    Err(LinkError::Broken)
                }
            }
        })
    }
}

/// A short name of the commands for the trace.
fn name_of(commands: &[Command]) -> &'static str {
    const NAMES: [&str; 14] = [
        "HSET", "HDEL", "HSCAN", "HGETALL", "HEXISTS", "HLEN", "EVALSHA", "EVAL", "SCRIPT", "MGET", "SET",
        "EXPIRE", "ZADD", "PUBLISH",
    ];
    let first = commands.first().and_then(|words| words.first());
    let known = first.and_then(|word| NAMES.into_iter().find(|name| name.as_bytes() == word.as_slice()));
    known.unwrap_or("redis")
}

/// The words of commands, shortened: without the code of scripts and with the beginning of long texts.
fn shown_commands(commands: &[Command]) -> String {
    const WORD_CHARS: usize = 4000;
    let mut shown = String::from("redis:");
    for command in commands {
        for word in command {
            let text = String::from_utf8_lossy(word);
            let is_code = text.contains("redis.call");
            let text =
                if is_code { "(code)".into() } else { text.chars().take(WORD_CHARS).collect::<String>() };
            shown.push(' ');
            shown.push_str(text.trim_end());
        }
        shown.push(';');
    }
    shown.replace('\n', " | ")
}

/// The address of a connection, as Redis shows it.
const ADDRESS: &str = "10.0.0.1:";

fn shown_replies(replies: &[Reply]) -> String {
    const CHARS: usize = 120;
    let shown: Vec<String> = replies.iter().map(shown_reply).collect();
    shown.join(" ").chars().take(CHARS).collect()
}

fn shown_reply(reply: &Reply) -> String {
    match reply {
        Reply::Nil => "nil".to_owned(),
        Reply::Int(number) => number.to_string(),
        Reply::Bulk(text) => String::from_utf8_lossy(text).into_owned(),
        Reply::Status(text) => text.clone(),
        Reply::Array(items) => format!("[{}]", items.iter().map(shown_reply).collect::<Vec<_>>().join(" ")),
        Reply::Error { code, text } => format!("{code} {text}"),
    }
}

impl World {
    /// Runs the commands of a connection. Those about connections are answered here.
    fn run_on_connection(&mut self, connection: u64, commands: &[Command]) -> Vec<Reply> {
        let words: Vec<Vec<&[u8]>> =
            commands.iter().map(|command| command.iter().map(Vec::as_slice).collect()).collect();
        match words.first().map(Vec::as_slice) {
            Some([b"CLIENT", b"INFO"]) => {
                vec![Reply::Bulk(format!("id={connection} addr={ADDRESS}{connection} name=\n").into_bytes())]
            }
            Some([b"CLIENT", b"KILL", b"ID", id, b"ADDR", address]) => {
                let [id, address] = [id, address].map(|text| String::from_utf8_lossy(text));
                let former = id.parse().ok().filter(|former| address == format!("{ADDRESS}{former}"));
                let is_closed = former.is_some_and(|former| self.redis.connections.remove(&former));
                vec![Reply::Int(i64::from(is_closed))]
            }
            _ => self.run_on_redis(commands),
        }
    }

    /// Runs commands on Redis, and hands on what they publish.
    pub fn run_on_redis(&mut self, commands: &[Command]) -> Vec<Reply> {
        let now = self.redis_us();
        let replies: Vec<Reply> =
            commands.iter().map(|command| self.redis.server.run(now, command)).collect();
        self.note(|| format!("{} → {}", shown_commands(commands), shown_replies(&replies)));
        for (channel, payload) in std::mem::take(&mut self.redis.server.published) {
            self.publish(&channel, payload);
        }
        replies
    }
}
