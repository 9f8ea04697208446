//! A simulated Redis, for simulations that must be repeatable.
//!
//! [`SimulatedRedis`] is the server: it runs the commands that this crate sends, and the Lua scripts as they
//! are, on a clock that the caller passes. [`SimulatedConnection`] is the client's side: it takes the place
//! of a connection of the `redis` crate, so that everything above it is the code of production. Between the
//! two stands a [`RedisLink`], which belongs to the simulation: it delays, loses or breaks what it carries.
//!
//! What the server does not know is a gap of the simulation, not an error of the caller. So it panics.

use futures_util::future::BoxFuture;
use mlua::{Function, Lua, LuaOptions, StdLib, String as LuaString, Table, Value as LuaValue, Variadic};
use redis::aio::ConnectionLike;
use redis::{Arg, Cmd, Pipeline, RedisError, RedisFuture, Script, Value};
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::sync::Arc;

/// The words of one command.
pub type Command = Vec<Vec<u8>>;

/// The answer of the server to one command.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    Nil,
    Int(i64),
    Bulk(Vec<u8>),
    Status(String),
    Array(Vec<Reply>),
    Error { code: String, text: String },
}

impl Reply {
    fn bulk(bytes: impl Into<Vec<u8>>) -> Self {
        Self::Bulk(bytes.into())
    }

    fn flag(is_true: bool) -> Self {
        Self::Int(i64::from(is_true))
    }

    fn count(items: usize) -> Self {
        Self::Int(i64::try_from(items).expect("a number of items"))
    }

    fn bulk_or_nil(bytes: Option<&Vec<u8>>) -> Self {
        bytes.map_or(Self::Nil, |bytes| Self::Bulk(bytes.clone()))
    }

    fn error(code: &str, text: impl Into<String>) -> Self {
        Self::Error { code: code.to_owned(), text: text.into() }
    }
}

impl From<Reply> for Value {
    fn from(reply: Reply) -> Self {
        match reply {
            Reply::Nil => Self::Nil,
            Reply::Int(number) => Self::Int(number),
            Reply::Bulk(bytes) => Self::BulkString(bytes),
            Reply::Status(text) if text == "OK" => Self::Okay,
            Reply::Status(text) => Self::SimpleString(text),
            Reply::Array(items) => Self::Array(items.into_iter().map(Self::from).collect()),
            // Only the parser of the crate can make a server error. Connections return it as a value; the
            // command or the pipeline that receives the value turns it into an error.
            Reply::Error { code, text } => {
                let line = format!("-{code} {}\r\n", text.replace(['\r', '\n'], " "));
                redis::parse_redis_value(line.as_bytes()).expect("a line with an error")
            }
        }
    }
}

/// Why a link did not deliver an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkError {
    /// The connection broke. It is not known whether the commands ran.
    Broken,
    /// No connection could be made.
    Refused,
}

impl From<LinkError> for RedisError {
    fn from(error: LinkError) -> Self {
        // The kinds that the crate reports for a connection that is closed, and for one that TCP refuses.
        // For both `is_connection_dropped` is true.
        let kind = match error {
            LinkError::Broken => io::ErrorKind::BrokenPipe,
            LinkError::Refused => io::ErrorKind::ConnectionRefused,
        };
        Self::from(io::Error::from(kind))
    }
}

/// What carries commands to a server, and answers back.
pub trait RedisLink: Send + Sync {
    /// Makes a connection. Returns its number.
    fn connect(&self) -> BoxFuture<'static, Result<u64, LinkError>>;

    /// Sends the commands in order. Returns one reply for each. `is_transaction`: they run as one atomic step
    /// (MULTI, EXEC).
    fn call(
        &self,
        connection: u64,
        commands: Vec<Command>,
        is_transaction: bool,
    ) -> BoxFuture<'static, Result<Vec<Reply>, LinkError>>;
}

/// A connection over a link.
#[derive(Clone)]
pub struct SimulatedConnection {
    link: Arc<dyn RedisLink>,
    number: u64,
}

impl SimulatedConnection {
    pub async fn connect(link: Arc<dyn RedisLink>) -> Result<Self, RedisError> {
        let number = link.connect().await?;
        Ok(Self { link, number })
    }
}

impl ConnectionLike for SimulatedConnection {
    fn req_packed_command<'a>(&'a mut self, cmd: &'a Cmd) -> RedisFuture<'a, Value> {
        let (link, number, command) = (Arc::clone(&self.link), self.number, words(cmd));
        Box::pin(async move {
            let mut replies = link.call(number, vec![command], false).await?;
            let reply = replies.pop().expect("a link returns a reply for each command");
            Ok::<Value, RedisError>(Value::from(reply))
        })
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        pipeline: &'a Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        let (link, number) = (Arc::clone(&self.link), self.number);
        let is_transaction = pipeline.is_transaction();
        let commands: Vec<Command> = pipeline.cmd_iter().map(words).collect();
        let sent = commands.len();
        Box::pin(async move {
            let replies = link.call(number, commands, is_transaction).await?;
            assert_eq!(replies.len(), sent, "a link returns a reply for each command");
            let values: Vec<Value> = replies.into_iter().map(Value::from).collect();
            // Of a transaction a pipeline skips the answers to MULTI and to each queued command, and reads
            // only that to EXEC, which holds all replies.
            let answers = if is_transaction {
                assert_eq!((offset, count), (sent + 1, 1), "the answers that a transaction reads");
                vec![Value::Array(values)]
            } else {
                values.into_iter().skip(offset).take(count).collect()
            };
            Ok::<Vec<Value>, RedisError>(answers)
        })
    }

    fn get_db(&self) -> i64 {
        0
    }
}

fn words(cmd: &Cmd) -> Command {
    let words = cmd.args_iter().map(|arg| match arg {
        Arg::Simple(word) => word.to_vec(),
        other => panic!("the simulated Redis has no argument {other:?}"),
    });
    words.collect()
}

type Fields = BTreeMap<Vec<u8>, Vec<u8>>;
type Scores = BTreeMap<Vec<u8>, f64>;

/// A hash or a sorted set that does not exist is empty.
static NO_FIELDS: Fields = Fields::new();
static NO_SCORES: Scores = Scores::new();

#[derive(Clone, Debug, PartialEq)]
enum Data {
    Text(Vec<u8>),
    Hash(Fields),
    Sorted(Scores),
}

#[derive(Clone, Debug, PartialEq)]
struct Entry {
    data: Data,
    /// In Unix milliseconds.
    expires_ms: Option<u64>,
}

impl Entry {
    fn new(data: Data) -> Self {
        Self { data, expires_ms: None }
    }

    /// As in Redis, a key still exists in its last millisecond.
    fn has_expired(&self, now_ms: u64) -> bool {
        self.expires_ms.is_some_and(|expires_ms| now_ms > expires_ms)
    }
}

/// The data of a server.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Keyspace(BTreeMap<Vec<u8>, Entry>);

/// A reply, or a reply that is an error.
type Answer = Result<Reply, Reply>;

fn wrong_type() -> Reply {
    Reply::error("WRONGTYPE", "Operation against a key holding the wrong kind of value")
}

fn syntax() -> Reply {
    Reply::error("ERR", "syntax error")
}

fn gap(name: &str, args: &[Vec<u8>]) -> ! {
    let args: Vec<_> = args.iter().map(|arg| String::from_utf8_lossy(arg)).collect();
    panic!("the simulated Redis has no command {name} with the arguments {args:?}")
}

fn upper(word: &[u8]) -> String {
    String::from_utf8_lossy(word).to_ascii_uppercase()
}

/// The name of a command, and its arguments.
fn named(command: &[Vec<u8>]) -> (String, &[Vec<u8>]) {
    let (name, args) = command.split_first().expect("a command has a name");
    (upper(name), args)
}

fn int(word: &[u8]) -> Result<i64, Reply> {
    let number = std::str::from_utf8(word).ok().and_then(|text| text.parse().ok());
    number.ok_or_else(|| Reply::error("ERR", "value is not an integer or out of range"))
}

fn float(word: &[u8]) -> Option<f64> {
    let number: f64 = std::str::from_utf8(word).ok()?.parse().ok()?;
    (!number.is_nan()).then_some(number)
}

/// One end of a range of scores.
struct Bound {
    score: f64,
    is_exclusive: bool,
}

impl Bound {
    fn parse(word: &[u8]) -> Result<Self, Reply> {
        let (number, is_exclusive) = word.strip_prefix(b"(").map_or((word, false), |number| (number, true));
        let score = float(number).ok_or_else(|| Reply::error("ERR", "min or max is not a float"))?;
        Ok(Self { score, is_exclusive })
    }
}

/// One command, or all calls of one script: the clock stands still, as in Redis.
struct Step<'a> {
    now_us: u64,
    keys: &'a mut BTreeMap<Vec<u8>, Entry>,
    published: &'a mut Vec<(String, Vec<u8>)>,
}

impl Step<'_> {
    fn run(&mut self, name: &str, args: &[Vec<u8>]) -> Reply {
        let answer = match name.as_bytes().first() {
            Some(b'H') => self.hash_command(name, args),
            Some(b'Z') => self.sorted_command(name, args),
            _ => self.plain_command(name, args),
        };
        match answer {
            Ok(reply) | Err(reply) => reply,
        }
    }

    fn plain_command(&mut self, name: &str, args: &[Vec<u8>]) -> Answer {
        Ok(match (name, args) {
            ("PING", []) => Reply::Status("PONG".to_owned()),
            ("TIME", []) => {
                let (seconds, micros) = (self.now_us / 1_000_000, self.now_us % 1_000_000);
                Reply::Array(vec![Reply::bulk(seconds.to_string()), Reply::bulk(micros.to_string())])
            }
            ("GET", [key]) => match self.entry(key) {
                None => Reply::Nil,
                Some(Entry { data: Data::Text(text), .. }) => Reply::bulk(text.clone()),
                Some(_) => return Err(wrong_type()),
            },
            ("INCR", [key]) => {
                let Data::Text(text) = &mut self.entry_or(key, Data::Text(b"0".to_vec())).data else {
                    return Err(wrong_type());
                };
                let number = int(text)? + 1;
                *text = number.to_string().into_bytes();
                Reply::Int(number)
            }
            ("SET", [key, value, options @ ..]) => return self.set(key, value, options),
            ("SETEX", [key, seconds, value]) => {
                return self.set(key, value, &[b"EX".to_vec(), seconds.clone()]);
            }
            ("MGET", [_, ..]) => Reply::Array(args.iter().map(|key| self.text_or_nil(key)).collect()),
            ("DEL", [_, ..]) => Reply::count(args.iter().filter(|key| self.remove(key)).count()),
            ("EXISTS", [_, ..]) => Reply::count(args.iter().filter(|key| self.entry(key).is_some()).count()),
            ("EXPIRE", [key, seconds]) => return self.expire(key, seconds, 1000),
            ("PEXPIRE", [key, millis]) => return self.expire(key, millis, 1),
            ("PUBLISH", [channel, payload]) => {
                self.published.push((String::from_utf8_lossy(channel).into_owned(), payload.clone()));
                // The number of receivers is known only to the simulation.
                Reply::Int(0)
            }
            _ => gap(name, args),
        })
    }

    fn hash_command(&mut self, name: &str, args: &[Vec<u8>]) -> Answer {
        Ok(match (name, args) {
            ("HSET", [key, pairs @ ..]) if !pairs.is_empty() && pairs.len().is_multiple_of(2) => {
                let fields = self.hash_to_write(key)?;
                let mut added = 0;
                for pair in pairs.chunks_exact(2) {
                    added += usize::from(fields.insert(pair[0].clone(), pair[1].clone()).is_none());
                }
                Reply::count(added)
            }
            ("HGET", [key, field]) => Reply::bulk_or_nil(self.hash(key)?.get(field)),
            ("HMGET", [key, names @ ..]) if !names.is_empty() => {
                let fields = self.hash(key)?;
                Reply::Array(names.iter().map(|name| Reply::bulk_or_nil(fields.get(name))).collect())
            }
            ("HDEL", [key, names @ ..]) if !names.is_empty() => {
                if self.hash(key)?.is_empty() {
                    return Ok(Reply::Int(0));
                }
                let fields = self.hash_to_write(key)?;
                let mut removed = 0;
                for name in names {
                    removed += usize::from(fields.remove(name).is_some());
                }
                if fields.is_empty() {
                    self.keys.remove(key);
                }
                Reply::count(removed)
            }
            ("HEXISTS", [key, field]) => Reply::flag(self.hash(key)?.contains_key(field)),
            ("HLEN", [key]) => Reply::count(self.hash(key)?.len()),
            ("HGETALL", [key]) => pairs_of(self.hash(key)?),
            ("HSCAN", [key, _cursor]) => one_page(self.hash(key)?),
            ("HSCAN", [key, _cursor, option, _]) if upper(option) == "COUNT" => one_page(self.hash(key)?),
            _ => gap(name, args),
        })
    }

    fn sorted_command(&mut self, name: &str, args: &[Vec<u8>]) -> Answer {
        Ok(match (name, args) {
            ("ZADD", [key, option, pairs @ ..]) if upper(option) == "NX" => {
                return self.add_scores(key, pairs, false);
            }
            ("ZADD", [key, pairs @ ..]) => return self.add_scores(key, pairs, true),
            ("ZREM", [key, members @ ..]) if !members.is_empty() => {
                if self.sorted(key)?.is_empty() {
                    return Ok(Reply::Int(0));
                }
                let scores = self.sorted_to_write(key)?;
                let mut removed = 0;
                for member in members {
                    removed += usize::from(scores.remove(member).is_some());
                }
                if scores.is_empty() {
                    self.keys.remove(key);
                }
                Reply::count(removed)
            }
            ("ZSCORE", [key, member]) => {
                self.sorted(key)?.get(member).map_or(Reply::Nil, |score| Reply::bulk(score.to_string()))
            }
            ("ZCARD", [key]) => Reply::count(self.sorted(key)?.len()),
            ("ZCOUNT", [key, min, max]) => Reply::count(self.range(key, min, max)?.len()),
            ("ZRANGEBYSCORE", [key, min, max, options @ ..]) => {
                return self.range_command(key, min, max, options);
            }
            _ => gap(name, args),
        })
    }

    /// Removes a key that has expired.
    fn entry(&mut self, key: &[u8]) -> Option<&mut Entry> {
        let now_ms = self.now_us / 1000;
        if self.keys.get(key).is_some_and(|entry| entry.has_expired(now_ms)) {
            self.keys.remove(key);
        }
        self.keys.get_mut(key)
    }

    /// Returns an entry to write to, made of `data` if there is none.
    fn entry_or(&mut self, key: &[u8], data: Data) -> &mut Entry {
        if self.entry(key).is_none() {
            self.keys.insert(key.to_vec(), Entry::new(data));
        }
        self.keys.get_mut(key).expect("the entry exists")
    }

    fn remove(&mut self, key: &[u8]) -> bool {
        self.entry(key).is_some() && self.keys.remove(key).is_some()
    }

    fn text_or_nil(&mut self, key: &[u8]) -> Reply {
        match self.entry(key) {
            Some(Entry { data: Data::Text(text), .. }) => Reply::bulk(text.clone()),
            _ => Reply::Nil,
        }
    }

    fn set(&mut self, key: &[u8], value: &[u8], options: &[Vec<u8>]) -> Answer {
        let (mut must_exist, mut expires_ms) = (None, None);
        let mut options = options.iter();
        while let Some(option) = options.next() {
            let unit_ms = match upper(option).as_str() {
                "NX" => {
                    must_exist = Some(false);
                    continue;
                }
                "XX" => {
                    must_exist = Some(true);
                    continue;
                }
                "EX" => 1000,
                "PX" => 1,
                other => panic!("the simulated Redis has no option {other} of SET"),
            };
            let after = int(options.next().ok_or_else(syntax)?)?;
            let after = u64::try_from(after).ok().filter(|after| *after > 0);
            let after = after.ok_or_else(|| Reply::error("ERR", "invalid expire time in 'set' command"))?;
            expires_ms = Some((self.now_us / 1000).saturating_add(after.saturating_mul(unit_ms)));
        }
        let exists = self.entry(key).is_some();
        if must_exist.is_some_and(|must_exist| must_exist != exists) {
            return Ok(Reply::Nil);
        }
        self.keys.insert(key.to_vec(), Entry { data: Data::Text(value.to_vec()), expires_ms });
        Ok(Reply::Status("OK".to_owned()))
    }

    fn expire(&mut self, key: &[u8], after: &[u8], unit_ms: u64) -> Answer {
        let (after, now_ms) = (int(after)?, self.now_us / 1000);
        let Some(entry) = self.entry(key) else { return Ok(Reply::Int(0)) };
        match u64::try_from(after) {
            Ok(after) if after > 0 => {
                entry.expires_ms = Some(now_ms.saturating_add(after.saturating_mul(unit_ms)));
            }
            _ => {
                self.keys.remove(key);
            }
        }
        Ok(Reply::Int(1))
    }

    fn hash(&mut self, key: &[u8]) -> Result<&Fields, Reply> {
        match self.entry(key).map(|entry| &entry.data) {
            None => Ok(&NO_FIELDS),
            Some(Data::Hash(fields)) => Ok(fields),
            Some(_) => Err(wrong_type()),
        }
    }

    fn hash_to_write(&mut self, key: &[u8]) -> Result<&mut Fields, Reply> {
        match &mut self.entry_or(key, Data::Hash(Fields::new())).data {
            Data::Hash(fields) => Ok(fields),
            _ => Err(wrong_type()),
        }
    }

    fn sorted(&mut self, key: &[u8]) -> Result<&Scores, Reply> {
        match self.entry(key).map(|entry| &entry.data) {
            None => Ok(&NO_SCORES),
            Some(Data::Sorted(scores)) => Ok(scores),
            Some(_) => Err(wrong_type()),
        }
    }

    fn sorted_to_write(&mut self, key: &[u8]) -> Result<&mut Scores, Reply> {
        match &mut self.entry_or(key, Data::Sorted(Scores::new())).data {
            Data::Sorted(scores) => Ok(scores),
            _ => Err(wrong_type()),
        }
    }

    fn add_scores(&mut self, key: &[u8], pairs: &[Vec<u8>], are_replaced: bool) -> Answer {
        if pairs.is_empty() || !pairs.len().is_multiple_of(2) {
            return Err(syntax());
        }
        // All scores are read first: a command that fails adds nothing.
        let mut read = Vec::with_capacity(pairs.len() / 2);
        for pair in pairs.chunks_exact(2) {
            let score = float(&pair[0]).ok_or_else(|| Reply::error("ERR", "value is not a valid float"))?;
            read.push((score, pair[1].clone()));
        }
        let scores = self.sorted_to_write(key)?;
        let mut added = 0;
        for (score, member) in read {
            let is_new = !scores.contains_key(&member);
            added += usize::from(is_new);
            if is_new || are_replaced {
                scores.insert(member, score);
            }
        }
        Ok(Reply::count(added))
    }

    /// The members within a range of scores, in the order of the scores.
    fn range(&mut self, key: &[u8], min: &[u8], max: &[u8]) -> Result<Vec<(f64, Vec<u8>)>, Reply> {
        let (min, max) = (Bound::parse(min)?, Bound::parse(max)?);
        let is_within = |score: f64| {
            let is_above = if min.is_exclusive { score > min.score } else { score >= min.score };
            let is_below = if max.is_exclusive { score < max.score } else { score <= max.score };
            is_above && is_below
        };
        let mut found = Vec::new();
        for (member, score) in self.sorted(key)? {
            if is_within(*score) {
                found.push((*score, member.clone()));
            }
        }
        // Stable: members with the same score stay in their own order.
        found.sort_by(|(a, _), (b, _)| a.total_cmp(b));
        Ok(found)
    }

    fn range_command(&mut self, key: &[u8], min: &[u8], max: &[u8], options: &[Vec<u8>]) -> Answer {
        let (mut with_scores, mut from, mut most) = (false, 0, usize::MAX);
        let mut options = options.iter();
        while let Some(option) = options.next() {
            match upper(option).as_str() {
                "WITHSCORES" => with_scores = true,
                "LIMIT" => {
                    let offset = int(options.next().ok_or_else(syntax)?)?;
                    let count = int(options.next().ok_or_else(syntax)?)?;
                    // Nothing follows a negative offset, and a negative count is no limit.
                    from = usize::try_from(offset).unwrap_or(usize::MAX);
                    most = usize::try_from(count).unwrap_or(usize::MAX);
                }
                other => panic!("the simulated Redis has no option {other} of ZRANGEBYSCORE"),
            }
        }
        let mut items = Vec::new();
        for (score, member) in self.range(key, min, max)?.into_iter().skip(from).take(most) {
            items.push(Reply::Bulk(member));
            if with_scores {
                items.push(Reply::bulk(score.to_string()));
            }
        }
        Ok(Reply::Array(items))
    }

    /// `redis.call` of a script.
    fn call(&mut self, lua: &Lua, words: &[LuaValue]) -> mlua::Result<LuaValue> {
        let words = words.iter().map(|word| word_of(lua, word)).collect::<mlua::Result<Command>>()?;
        let (name, args) = named(&words);
        to_lua(lua, self.run(&name, args))
    }
}

fn pairs_of(fields: &Fields) -> Reply {
    let mut items = Vec::with_capacity(2 * fields.len());
    for (field, value) in fields {
        items.push(Reply::Bulk(field.clone()));
        items.push(Reply::Bulk(value.clone()));
    }
    Reply::Array(items)
}

/// The answer to HSCAN: the last cursor, and everything.
fn one_page(fields: &Fields) -> Reply {
    Reply::Array(vec![Reply::bulk("0"), pairs_of(fields)])
}

/// How often keys that have expired and that nobody reads are removed, in commands.
const SWEEP_EVERY: u64 = 1024;

/// Redis rejects both too: a script that leaves something behind would depend on the scripts before it.
const GLOBALS_ARE_FIXED: &str = "setmetatable(_G, {
  __newindex = function(_, name)
    error('Script attempted to create global variable ' .. tostring(name), 2)
  end,
  __index = function(_, name)
    error('Script attempted to access nonexistent global variable ' .. tostring(name), 2)
  end,
})";

/// A server.
pub struct SimulatedRedis {
    lua: Lua,
    /// The table `redis` of the scripts.
    library: Table,
    /// By the SHA-1 of their code.
    scripts: BTreeMap<String, Function>,
    keys: Keyspace,
    commands: u64,
    /// Publications, oldest first: channel and payload. The simulation takes them out and delivers them.
    pub published: Vec<(String, Vec<u8>)>,
}

impl Default for SimulatedRedis {
    fn default() -> Self {
        Self::new()
    }
}

impl SimulatedRedis {
    pub fn new() -> Self {
        // Without `os` and `io`: a script must not read a real clock.
        let libraries = StdLib::TABLE | StdLib::STRING | StdLib::MATH;
        let lua = Lua::new_with(libraries, LuaOptions::default()).expect("a Lua state");
        let library = lua.create_table().expect("memory for a table");
        lua.globals().raw_set("redis", &library).expect("memory for a name");
        lua.load(GLOBALS_ARE_FIXED).exec().expect("the prelude runs");
        Self {
            lua,
            library,
            scripts: BTreeMap::new(),
            keys: Keyspace::default(),
            commands: 0,
            published: Vec::new(),
        }
    }

    /// The names of the keys that exist at this time.
    pub fn key_names(&self, now_us: u64) -> Vec<String> {
        let live = self.keys.0.iter().filter(|(_, entry)| !entry.has_expired(now_us / 1000));
        live.map(|(name, _)| String::from_utf8_lossy(name).into_owned()).collect()
    }

    /// Runs one command. `now_us`: the clock of this server, in Unix microseconds.
    ///
    /// # Panics
    /// The command is not simulated.
    pub fn run(&mut self, now_us: u64, command: &Command) -> Reply {
        self.commands += 1;
        if self.commands.is_multiple_of(SWEEP_EVERY) {
            self.keys.0.retain(|_, entry| !entry.has_expired(now_us / 1000));
        }
        let (name, args) = named(command);
        match (name.as_str(), args) {
            ("SCRIPT", [what, code]) if upper(what) == "LOAD" => match self.load(code) {
                Ok(sha) => Reply::bulk(sha),
                Err(error) => error,
            },
            ("EVAL", [code, rest @ ..]) => match self.load(code) {
                Ok(sha) => self.run_script(now_us, &sha, rest),
                Err(error) => error,
            },
            ("EVALSHA", [sha, rest @ ..]) => {
                let sha = String::from_utf8_lossy(sha).to_ascii_lowercase();
                self.run_script(now_us, &sha, rest)
            }
            (name, args) => {
                let (keys, published) = (&mut self.keys.0, &mut self.published);
                Step { now_us, keys, published }.run(name, args)
            }
        }
    }

    /// The data as they are now, for a later [`Self::restore`].
    pub fn snapshot(&self) -> Keyspace {
        self.keys.clone()
    }

    /// Continues with these data: a replica has taken over, or the server has restarted from its disk.
    /// Neither has the scripts.
    pub fn restore(&mut self, keys: Keyspace) {
        self.keys = keys;
        self.scripts.clear();
    }

    /// The server has restarted without its data and scripts.
    pub fn lose_everything(&mut self) {
        self.restore(Keyspace::default());
    }

    /// Compiles a script, unless it is known. Returns its SHA-1, as the `redis` crate computes it.
    fn load(&mut self, code: &[u8]) -> Result<String, Reply> {
        let code = std::str::from_utf8(code).expect("the code of a script is text");
        let sha = Script::new(code).get_hash().to_owned();
        if self.scripts.contains_key(&sha) {
            return Ok(sha);
        }
        let compiled = self.lua.load(code).set_name("@user_script").into_function();
        let script = compiled.map_err(|error| {
            Reply::error("ERR", format!("Error compiling script (new function): {error}"))
        })?;
        self.scripts.insert(sha.clone(), script);
        Ok(sha)
    }

    /// `args`: the number of keys, the keys, and the other arguments.
    fn run_script(&mut self, now_us: u64, sha: &str, args: &[Vec<u8>]) -> Reply {
        let Some(script) = self.scripts.get(sha).cloned() else {
            return Reply::error("NOSCRIPT", "No matching script. Please use EVAL.");
        };
        let (count, words) = args.split_first().expect("a script call has a number of keys");
        let count = int(count).ok().and_then(|count| usize::try_from(count).ok());
        let count = count.filter(|count| *count <= words.len()).expect("the number of keys");
        let (keys, argv) = words.split_at(count);
        self.call_script(now_us, &script, keys, argv).unwrap_or_else(|error| error_of(&error))
    }

    fn call_script(
        &mut self,
        now_us: u64,
        script: &Function,
        keys: &[Vec<u8>],
        argv: &[Vec<u8>],
    ) -> mlua::Result<Reply> {
        let (lua, library) = (&self.lua, &self.library);
        let globals = lua.globals();
        globals.raw_set("KEYS", texts(lua, keys)?)?;
        globals.raw_set("ARGV", texts(lua, argv)?)?;
        let mut step = Step { now_us, keys: &mut self.keys.0, published: &mut self.published };
        // The function ends with the scope, so that Lua keeps no reference to the data.
        lua.scope(|scope| {
            let call = scope.create_function_mut(|lua: &Lua, words: Variadic<LuaValue>| {
                step.call(lua, words.as_slice())
            })?;
            library.raw_set("call", call)?;
            let answer: LuaValue = script.call(())?;
            from_lua(&answer)
        })
    }
}

fn texts(lua: &Lua, words: &[Vec<u8>]) -> mlua::Result<Table> {
    let table = lua.create_table()?;
    for word in words {
        table.raw_push(lua.create_string(word)?)?;
    }
    Ok(table)
}

/// A word of a command, as Redis makes it of a Lua value.
fn word_of(lua: &Lua, value: &LuaValue) -> mlua::Result<Vec<u8>> {
    match value {
        LuaValue::String(text) => Ok(text.as_bytes().to_vec()),
        LuaValue::Integer(number) => Ok(number.to_string().into_bytes()),
        // Lua's own conversion has 14 digits.
        LuaValue::Number(number) => {
            let library: Table = lua.globals().raw_get("string")?;
            let format: Function = library.raw_get("format")?;
            let text: LuaString = format.call(("%.17g", *number))?;
            Ok(text.as_bytes().to_vec())
        }
        _ => Err(mlua::Error::runtime("Lua redis lib command arguments must be strings or integers")),
    }
}

/// The error of a call, which ends the script that made it.
#[derive(Debug)]
struct RaisedError(Reply);

impl fmt::Display for RaisedError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Reply::Error { code, text } => write!(f, "{code} {text}"),
            other => write!(f, "{other:?}"),
        }
    }
}

impl std::error::Error for RaisedError {}

/// What `redis.call` returns to a script.
fn to_lua(lua: &Lua, reply: Reply) -> mlua::Result<LuaValue> {
    Ok(match reply {
        Reply::Nil => LuaValue::Boolean(false),
        Reply::Int(number) => LuaValue::Number(number as f64),
        Reply::Bulk(bytes) => LuaValue::String(lua.create_string(&bytes)?),
        Reply::Status(text) => {
            let table = lua.create_table()?;
            table.raw_set("ok", text)?;
            LuaValue::Table(table)
        }
        Reply::Array(items) => {
            let table = lua.create_table()?;
            for item in items {
                table.raw_push(to_lua(lua, item)?)?;
            }
            LuaValue::Table(table)
        }
        error @ Reply::Error { .. } => return Err(mlua::Error::external(RaisedError(error))),
    })
}

/// What a script returns to its caller.
fn from_lua(value: &LuaValue) -> mlua::Result<Reply> {
    Ok(match value {
        LuaValue::Boolean(true) => Reply::Int(1),
        LuaValue::Integer(number) => Reply::Int(*number),
        LuaValue::Number(number) => Reply::Int(*number as i64),
        LuaValue::String(text) => Reply::Bulk(text.as_bytes().to_vec()),
        LuaValue::Table(table) => return from_table(table),
        // Also nil and false.
        _ => Reply::Nil,
    })
}

fn from_table(table: &Table) -> mlua::Result<Reply> {
    let text = |name: &str| table.raw_get::<Option<LuaString>>(name);
    if let Some(error) = text("err")? {
        let line = error.to_string_lossy();
        let (code, text) = line.split_once(' ').unwrap_or((line.as_str(), ""));
        return Ok(Reply::error(code, text));
    }
    if let Some(status) = text("ok")? {
        return Ok(Reply::Status(status.to_string_lossy()));
    }
    let mut items = Vec::new();
    loop {
        let item: LuaValue = table.raw_get(items.len() + 1)?;
        if matches!(item, LuaValue::Nil) {
            return Ok(Reply::Array(items));
        }
        items.push(from_lua(&item)?);
    }
}

/// The answer to a script that failed: the error of its call, or what Lua reports.
fn error_of(error: &mlua::Error) -> Reply {
    let mut error = error;
    while let mlua::Error::CallbackError { cause, .. } = error {
        error = cause.as_ref();
    }
    match error.downcast_ref::<RaisedError>() {
        Some(RaisedError(reply)) => reply.clone(),
        None => Reply::error("ERR", format!("Error running script: {error}")),
    }
}

#[cfg(test)]
mod tests;
