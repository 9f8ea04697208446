//! A Redis server of one test, and a minimal client.

use super::process::{Process, Scratch, start_on_free_port};
use super::wait::{SOON, eventually};
use nix::sys::signal::Signal;
use std::io::{Error, ErrorKind, Result};
use std::net::SocketAddr;
use std::path::Path;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

/// Not shared between tests, although that would save about 20 ms for each: a gateway adopts the jobs of all
/// dead nodes in its Redis, and must not adopt those of another test.
pub struct Redis {
    process: Option<Process>,
    port: u16,
    password: Option<String>,
    dir: Scratch,
}

impl Redis {
    pub async fn start(password: Option<&str>) -> Self {
        let dir = Scratch::new("redis");
        let password = password.map(ToOwned::to_owned);
        let start = |port| redis_server(port, password.as_deref(), dir.path());
        let (process, port) = start_on_free_port("redis-server", start, answers).await;
        Self { process: Some(process), port, password, dir }
    }

    pub fn addr(&self) -> SocketAddr {
        ([127, 0, 0, 1], self.port).into()
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn password(&self) -> Option<&str> {
        self.password.as_deref()
    }

    /// The value of `REDIS_URL`.
    pub fn url(&self) -> String {
        let login = self.password.as_ref().map_or(String::new(), |password| format!(":{password}@"));
        format!("redis://{login}{}", self.addr())
    }

    /// Kills the server. Its data is lost.
    pub fn kill(&mut self) {
        if let Some(process) = self.process.take() {
            process.kill();
        }
    }

    pub fn signal(&self, signal: Signal) {
        self.process.as_ref().expect("it runs").signal(signal);
    }

    /// Starts again without data, on the same port.
    pub async fn restart(&mut self) {
        self.kill();
        let start = |_| redis_server(self.port, self.password.as_deref(), self.dir.path());
        let at = self.port;
        let (process, _) = start_on_free_port("redis-server", start, |_| answers(at)).await;
        self.process = Some(process);
    }

    /// Sends one command on a new connection.
    pub async fn command(&self, words: &[&[u8]]) -> Reply {
        let mut client = Client::open(self).await.expect("Redis accepts connections");
        client.command(words).await.expect("Redis answers")
    }

    /// Sends one command, which must succeed. `words` is separated by spaces.
    pub async fn order(&self, words: &str) -> Reply {
        let words: Vec<&[u8]> = words.split(' ').map(str::as_bytes).collect();
        match self.command(&words).await {
            Reply::Error(error) => panic!("{words:?}: {error}"),
            reply => reply,
        }
    }

    /// Becomes a replica of `primary`, and waits until it has its data.
    pub async fn follow(&self, primary: &Self) {
        self.order(&format!("REPLICAOF 127.0.0.1 {}", primary.port)).await;
        eventually("replication", SOON, || async {
            match self.order("ROLE").await {
                Reply::Array(role) if role.contains(&Reply::Bulk(b"connected".to_vec())) => Ok(()),
                role => Err(format!("{role:?}")),
            }
        })
        .await;
    }

    pub async fn publish(&self, channel: &str, payload: &[u8]) -> i64 {
        match self.command(&[b"PUBLISH", channel.as_bytes(), payload]).await {
            Reply::Integer(receivers) => receivers,
            other => panic!("PUBLISH: {other:?}"),
        }
    }

    /// Publishes until there is a subscriber: a node may be subscribing again. Returns the number of
    /// receivers.
    pub async fn publish_until_received(&self, channel: &str, payload: &[u8]) -> i64 {
        eventually(&format!("a subscriber of {channel}"), SOON, || async {
            match self.publish(channel, payload).await {
                0 => Err("no subscriber".to_owned()),
                receivers => Ok(receivers),
            }
        })
        .await
    }

    /// The number of calls of these commands.
    pub async fn calls(&self, commands: &[&str]) -> u64 {
        let Reply::Bulk(stats) = self.order("INFO commandstats").await else { panic!("INFO is text") };
        let stats = String::from_utf8(stats).expect("INFO is text");
        let calls = |line: &str| {
            let (command, rest) = line.strip_prefix("cmdstat_")?.split_once(":calls=")?;
            commands.contains(&command).then(|| rest.split(',').next()?.parse::<u64>().ok())?
        };
        stats.lines().filter_map(calls).sum()
    }

    /// The unique ids of the connections with subscriptions.
    pub async fn subscribers(&self) -> Vec<String> {
        let Reply::Bulk(list) = self.order("CLIENT LIST TYPE pubsub").await else { panic!("a list is text") };
        let list = String::from_utf8(list).expect("a list is text");
        list.lines().map(|line| line.split(' ').next().expect("an id").to_owned()).collect()
    }

    /// The number of jobs in the journal of a job's node.
    pub async fn journaled(&self, job_id: &str) -> i64 {
        let key = format!("inflight:{{{}}}", &job_id[..8]);
        match self.command(&[b"HLEN", key.as_bytes()]).await {
            Reply::Integer(count) => count,
            other => panic!("HLEN returns {other:?}"),
        }
    }

    pub async fn store_result(&self, request_id: &str, result: &[u8]) {
        let key = format!("job:{request_id}");
        let reply = self.command(&[b"SETEX", key.as_bytes(), b"3600", result]).await;
        assert_eq!(reply, Reply::Simple("OK".into()));
    }
}

fn redis_server(port: u16, password: Option<&str>, dir: &Path) -> Result<Process> {
    let port = port.to_string();
    let mut args = vec!["--port", &port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"];
    if let Some(password) = password {
        args.extend(["--requirepass", password]);
    }
    Process::start("redis-server", Path::new("redis-server"), &args, &super::path_env(), dir)
}

fn answers(port: u16) -> bool {
    std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
}

/// A reply of Redis.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    Simple(String),
    Error(String),
    Integer(i64),
    Bulk(Vec<u8>),
    Nil,
    Array(Vec<Reply>),
}

pub struct Client(BufReader<TcpStream>);

impl Client {
    pub async fn open(redis: &Redis) -> Result<Self> {
        let mut client = Self(BufReader::new(TcpStream::connect(redis.addr()).await?));
        if let Some(password) = &redis.password {
            client.command(&[b"AUTH", password.as_bytes()]).await?;
        }
        Ok(client)
    }

    pub async fn command(&mut self, words: &[&[u8]]) -> Result<Reply> {
        let mut bytes = format!("*{}\r\n", words.len()).into_bytes();
        for word in words {
            bytes.extend_from_slice(format!("${}\r\n", word.len()).as_bytes());
            bytes.extend_from_slice(word);
            bytes.extend_from_slice(b"\r\n");
        }
        self.0.get_mut().write_all(&bytes).await?;
        self.reply().await
    }

    /// The next reply, or the next message of a subscription.
    pub async fn reply(&mut self) -> Result<Reply> {
        match tokio::time::timeout(SOON, Box::pin(self.read_reply())).await {
            Ok(reply) => reply,
            Err(_) => Err(Error::new(ErrorKind::TimedOut, "Redis does not answer")),
        }
    }

    async fn read_reply(&mut self) -> Result<Reply> {
        let mut line = String::new();
        self.0.read_line(&mut line).await?;
        let line = line.trim_end();
        let (kind, rest) = line.split_at_checked(1).ok_or(ErrorKind::UnexpectedEof)?;
        let number = || rest.parse::<i64>().map_err(|_| Error::new(ErrorKind::InvalidData, line.to_owned()));
        Ok(match kind {
            "+" => Reply::Simple(rest.to_owned()),
            "-" => Reply::Error(rest.to_owned()),
            ":" => Reply::Integer(number()?),
            "$" | "*" if number()? < 0 => Reply::Nil,
            "$" => {
                let length = usize::try_from(number()?).unwrap_or(0);
                let mut bytes = vec![0; length + 2];
                self.0.read_exact(&mut bytes).await?;
                bytes.truncate(length);
                Reply::Bulk(bytes)
            }
            "*" => {
                let mut items = Vec::new();
                for _ in 0..number()? {
                    items.push(Box::pin(self.read_reply()).await?);
                }
                Reply::Array(items)
            }
            _ => return Err(Error::new(ErrorKind::InvalidData, line.to_owned())),
        })
    }
}
