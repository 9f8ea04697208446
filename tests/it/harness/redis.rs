//! A Redis of a test's own, and the few words of its protocol that the tests speak.

use super::process::{Process, Scratch, start_on_free_port};
use super::wait::{SOON, eventually};
use nix::sys::signal::Signal;
use std::io::{Error, ErrorKind, Result};
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// Not shared between tests, though that would be cheaper by some 20 ms each: a gateway looks after the jobs
/// of dead nodes of *its* Redis, and must not find those of another test.
pub struct Redis {
    process: Option<Process>,
    port: u16,
    password: Option<String>,
    dir: Scratch,
}

impl Redis {
    pub fn start(password: Option<&str>) -> Self {
        let dir = Scratch::new("redis");
        let password = password.map(ToOwned::to_owned);
        let start = |port| redis_server(port, password.as_deref(), dir.path());
        let (process, port) = start_on_free_port("redis-server", start, answers);
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

    /// As `REDIS_URL` wants it.
    pub fn url(&self) -> String {
        let login = self.password.as_ref().map_or(String::new(), |password| format!(":{password}@"));
        format!("redis://{login}{}", self.addr())
    }

    /// As SIGKILL leaves it: gone, with all its data.
    pub fn kill(&mut self) {
        if let Some(process) = self.process.take() {
            process.kill();
        }
    }

    pub fn signal(&self, signal: Signal) {
        self.process.as_ref().expect("it runs").signal(signal);
    }

    /// Starts again, empty, on the same port.
    pub fn restart(&mut self) {
        self.kill();
        let start = |_| redis_server(self.port, self.password.as_deref(), self.dir.path());
        let at = self.port;
        let (process, _) = start_on_free_port("redis-server", start, |_| answers(at));
        self.process = Some(process);
    }

    /// One command on a connection of its own.
    pub async fn command(&self, words: &[&[u8]]) -> Reply {
        let mut client = Client::open(self).await.expect("Redis takes connections");
        client.command(words).await.expect("Redis answers")
    }

    /// One command that must succeed, in words.
    pub async fn order(&self, words: &str) -> Reply {
        let words: Vec<&[u8]> = words.split(' ').map(str::as_bytes).collect();
        match self.command(&words).await {
            Reply::Error(error) => panic!("{words:?}: {error}"),
            reply => reply,
        }
    }

    /// Becomes a replica of another one, and has its data.
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

    /// What a worker does with a result, first half.
    /// How many jobs the journal of a job's node holds.
    pub async fn journaled(&self, job_id: &str) -> i64 {
        let key = format!("inflight:{{{}}}", &job_id[..8]);
        match self.command(&[b"HLEN", key.as_bytes()]).await {
            Reply::Integer(count) => count,
            other => panic!("HLEN answers {other:?}"),
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

/// What Redis said.
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
        match tokio::time::timeout(ANSWER_WITHIN, Box::pin(self.read_reply())).await {
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
