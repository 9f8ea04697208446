//! The command connection to Redis: one multiplexed connection, with a deadline for every command.
//!
//! `redis::aio::ConnectionManager` was rejected. If a reconnect ends in anything but an I/O error (a password
//! that is changed for a moment, `SELECT` on a replica that is still loading), it stays in that state. And
//! while it reconnects, every command waits for its whole series of retries. Here the first command without a
//! connection makes one, the others wait for that attempt, and for a moment after a failure no command tries
//! to connect.
//!
//! A command without an answer may still run: its bytes wait in the socket of a server that was stopped, or
//! the network delivers them late. If its repetition on a new connection runs first, the old one then undoes
//! what came after it. For example, it enters a job in the journal that has left it, and the job would be
//! counted twice. So a new connection first makes the server close the connections that it replaces (CLIENT
//! KILL). What they have not run by then never runs. A process that has died or is paused may have such
//! commands too. So each process stores the address of its connection in Redis, and a process that takes over
//! its node first closes that connection (see [`CommandConnection::record_client`]).

#[cfg(test)]
use super::simulated::{RedisLink, SimulatedConnection};
use crate::backend::BackendError;
use parking_lot::Mutex;
use redis::aio::{ConnectionLike, MultiplexedConnection};
use redis::io::tcp::TcpSettings;
use redis::io::tcp::socket2::TcpKeepalive;
use redis::{
    AsyncConnectionConfig, Client, Cmd, ErrorKind, FromRedisValue, IntoConnectionInfo, Pipeline, RedisError,
    RedisFuture, Value,
};
use std::collections::VecDeque;
use std::future::Future;
#[cfg(test)]
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::{Instant, timeout};

/// Deadline of a command, including the connection set-up.
pub const COMMAND_DEADLINE: Duration = Duration::from_secs(1);
/// Deadline of the connection set-up, including authentication.
pub const CONNECT_DEADLINE: Duration = Duration::from_millis(500);
/// Pause between attempts to connect after a failure. Commands fail immediately during it.
const PAUSE_AFTER_FAILURE: Duration = Duration::from_millis(50);
/// The kernel closes a connection when sent data stays unacknowledged for this long.
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(3);
/// Interval of keepalive probes, so that a firewall that drops packets silently is noticed.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Maximum number of former connections that are still to be closed by the server.
const DROPPED_MAX: usize = 16;
/// Commands that may wait to be written.
const PIPELINE_MAX: usize = 1024;

/// A `redis://` or `rediss://` URL. It may hold a password, so Debug and Display show only scheme, host and
/// port.
#[derive(Clone, PartialEq, Eq)]
pub struct RedisUrl(String);

impl RedisUrl {
    pub fn new(url: impl Into<String>) -> Self {
        Self(url.into())
    }
}

impl std::fmt::Debug for RedisUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl std::fmt::Display for RedisUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(address_of(&self.0).as_deref().unwrap_or("(not a Redis URL)"))
    }
}

/// Scheme, host and port, taken from the text. A URL parser would take a `/` in the password for the end of
/// the host and show what precedes it. Everything up to the last `@` is hidden, and so is a text that is not
/// a valid host and port.
fn address_of(url: &str) -> Option<String> {
    let (scheme, rest) = url.split_once("://").filter(|(scheme, _)| matches!(*scheme, "redis" | "rediss"))?;
    let rest = rest.rsplit_once('@').map_or(rest, |(_, rest)| rest);
    let authority = rest.split(['/', '?', '#']).next()?;
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (authority, None),
    };
    let is_of_host = |b: u8| b.is_ascii_alphanumeric() || b"._-:[]%".contains(&b);
    let is_host = !host.is_empty() && host.bytes().all(is_of_host);
    let is_port = port.is_none_or(|port| port.parse::<u16>().is_ok());
    (is_host && is_port).then(|| format!("{scheme}://{authority}"))
}

/// Creates a client for the URL without connecting.
pub fn client(url: &RedisUrl) -> Result<Client, BackendError> {
    // Several providers are linked, so rustls cannot choose one. The call fails harmlessly if one is
    // installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let tcp = TcpSettings::default()
        .set_nodelay(true)
        .set_user_timeout(UNACKNOWLEDGED_MAX)
        .set_keepalive(TcpKeepalive::new().with_time(KEEPALIVE).with_interval(KEEPALIVE));
    let info = url.0.as_str().into_connection_info().map_err(|e| class(&e))?;
    Client::open(info.set_tcp_settings(tcp)).map_err(|e| class(&e))
}

/// Classifies a Redis failure by its code, never by its text.
pub fn class(error: &RedisError) -> BackendError {
    let code = error.code().unwrap_or_default();
    match error.kind() {
        ErrorKind::AuthenticationFailed => BackendError::Denied("Redis rejected the password".into()),
        _ if matches!(code, "NOAUTH" | "WRONGPASS" | "NOPERM" | "DENIED") => {
            BackendError::Denied(format!("Redis answered {code}"))
        }
        // The text of an I/O error comes from the operating system.
        ErrorKind::Io => BackendError::Unavailable(error.to_string()),
        ErrorKind::InvalidClientConfig => BackendError::Invalid("the Redis URL is malformed".into()),
        ErrorKind::Parse => BackendError::Unavailable("the answer does not follow the Redis protocol".into()),
        ErrorKind::UnexpectedReturnType => {
            BackendError::Invalid("Redis answered with an unexpected type".into())
        }
        _ if matches!(code, "ERR" | "WRONGTYPE" | "CROSSSLOT") => {
            BackendError::Invalid(format!("Redis answered {code}"))
        }
        _ if code.is_empty() => BackendError::Unavailable(error.category().to_owned()),
        _ => BackendError::Unavailable(format!("Redis answered {code}")),
    }
}

/// One connection. Its clones share it.
#[derive(Clone)]
pub enum Connection {
    Server(MultiplexedConnection),
    #[cfg(test)]
    Simulated(SimulatedConnection),
}

impl ConnectionLike for Connection {
    fn req_packed_command<'a>(&'a mut self, cmd: &'a Cmd) -> RedisFuture<'a, Value> {
        match self {
            Self::Server(connection) => connection.req_packed_command(cmd),
            #[cfg(test)]
            Self::Simulated(connection) => connection.req_packed_command(cmd),
        }
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        pipeline: &'a Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        match self {
            Self::Server(connection) => connection.req_packed_commands(pipeline, offset, count),
            #[cfg(test)]
            Self::Simulated(connection) => connection.req_packed_commands(pipeline, offset, count),
        }
    }

    fn get_db(&self) -> i64 {
        match self {
            Self::Server(connection) => connection.get_db(),
            #[cfg(test)]
            Self::Simulated(connection) => connection.get_db(),
        }
    }
}

/// The shared connection for commands. The next command re-establishes it after a failure.
pub struct CommandConnection {
    client: Client,
    config: AsyncConnectionConfig,
    /// Takes the place of the network in a simulation.
    #[cfg(test)]
    link: Option<Arc<dyn RedisLink>>,
    state: Mutex<ConnectionState>,
    /// Held while a connection is made.
    connecting: tokio::sync::Mutex<()>,
}

/// How a server names a connection. The address alone is not enough: long after its process has ended,
/// another client may have it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct ClientName {
    /// A server gives an id to one connection only, until it is restarted.
    id: String,
    address: String,
}

impl ClientName {
    /// The name in an answer to CLIENT INFO.
    fn of(info: &str) -> Option<Self> {
        let field = |name| info.split(' ').find_map(|part| part.strip_prefix(name)).map(str::to_owned);
        Some(Self { id: field("id=")?, address: field("addr=")? })
    }

    fn text(&self) -> String {
        format!("{} {}", self.id, self.address)
    }

    /// Parses [`Self::text`].
    fn parse(text: &str) -> Option<Self> {
        let (id, address) = text.split_once(' ')?;
        Some(Self { id: id.to_owned(), address: address.to_owned() })
    }
}

#[derive(Default)]
struct ConnectionState {
    connection: Option<Connection>,
    /// The connection, as the server names it. `None`: the server does not tell.
    client: Option<ClientName>,
    /// The key that holds this name, for successors of this process, and its expiry in seconds.
    recorded: Option<(String, u64)>,
    /// Former connections that the server may still serve.
    dropped: VecDeque<ClientName>,
    /// The server does not close connections for this user. Logged once.
    is_unfenced: bool,
    /// Counts connections, so that a late failure of an old one does not drop its successor.
    number: u64,
    failed: Option<(Instant, BackendError)>,
}

impl ConnectionState {
    fn drop_connection(&mut self) {
        self.connection = None;
        self.dropped.extend(self.client.take());
        // Those of a server that is gone are never confirmed.
        if self.dropped.len() > DROPPED_MAX {
            self.dropped.pop_front();
        }
    }
}

impl CommandConnection {
    pub fn new(client: Client) -> Self {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT_DEADLINE))
            .set_response_timeout(None) // one deadline around all, in `run`
            .set_pipeline_buffer_size(PIPELINE_MAX);
        Self {
            client,
            config,
            #[cfg(test)]
            link: None,
            state: Mutex::default(),
            connecting: tokio::sync::Mutex::default(),
        }
    }

    /// Connects over `link` instead of the network.
    #[cfg(test)]
    pub fn simulated(link: Arc<dyn RedisLink>) -> Self {
        // Nothing ever connects to this address.
        let unused = client(&RedisUrl::new("redis://simulated")).expect("the URL is valid");
        Self { link: Some(link), ..Self::new(unused) }
    }

    #[cfg(test)]
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// Runs one command.
    pub async fn query<T: FromRedisValue>(&self, command: &redis::Cmd) -> Result<T, BackendError> {
        self.run(async |mut connection| command.query_async(&mut connection).await).await
    }

    /// Runs `command` on the connection. Runs it once more on a new one if the connection broke, because
    /// Redis may have been restarted since the last command. So commands must be idempotent. After
    /// [`BackendError::Unavailable`] it is not known whether the command ran.
    pub async fn run<T, F>(&self, command: impl Fn(Connection) -> F + Send + Sync) -> Result<T, BackendError>
    where
        F: Future<Output = Result<T, RedisError>> + Send,
    {
        self.run_within(COMMAND_DEADLINE, command).await
    }

    /// The same with another deadline, for commands with many bytes.
    pub async fn run_within<T, F>(
        &self,
        deadline: Duration,
        command: impl Fn(Connection) -> F + Send + Sync,
    ) -> Result<T, BackendError>
    where
        F: Future<Output = Result<T, RedisError>> + Send,
    {
        // The connection that the command runs on: a late time-out must not drop its successor.
        let used = AtomicU64::new(0);
        let in_time = timeout(deadline, async {
            let mut again = true;
            loop {
                let (connection, number) = self.connection().await?;
                used.store(number, Ordering::Relaxed);
                let error = match command(connection).await {
                    Ok(answer) => return Ok(answer),
                    Err(error) => error,
                };
                // READONLY: after a failover this server is a replica, and the name leads to another server.
                if error.is_io_error() || error.is_unrecoverable_error() || error.code() == Some("READONLY") {
                    self.drop_connection(number);
                }
                if !(again && error.is_connection_dropped()) {
                    return Err(class(&error));
                }
                again = false;
            }
        });
        in_time.await.unwrap_or_else(|_| {
            // A silent connection may be dead. The next command makes a new one.
            self.drop_connection(used.load(Ordering::Relaxed));
            Err(BackendError::Unavailable("Redis did not answer in time".into()))
        })
    }

    /// Stores the name of this connection, and of those that replace it, under a key.
    pub async fn record_client(&self, key: String, expiry_s: u64) -> Result<(), BackendError> {
        self.state().recorded = Some((key, expiry_s));
        let store = async |mut connection| self.store_client(&mut connection).await;
        self.run(store).await
    }

    async fn store_client(&self, connection: &mut Connection) -> Result<(), RedisError> {
        let (recorded, client) = {
            let state = self.state();
            (state.recorded.clone(), state.client.clone())
        };
        let (Some((key, expiry_s)), Some(client)) = (recorded, client) else { return Ok(()) };
        redis::cmd("SET").arg(key).arg(client.text()).arg("EX").arg(expiry_s).query_async(connection).await
    }

    /// Makes the server close the connection whose name is under a key, if that is not this one.
    pub async fn close_recorded(&self, key: &str) -> Result<(), BackendError> {
        let recorded: Option<String> = self.query(redis::cmd("GET").arg(key)).await?;
        let client = recorded.and_then(|text| ClientName::parse(&text));
        let Some(client) = client.filter(|client| self.state().client.as_ref() != Some(client)) else {
            return Ok(());
        };
        let kill = async |mut connection| self.close(&mut connection, &client).await;
        self.run(kill).await
    }

    pub async fn ping(&self) -> Result<(), BackendError> {
        self.query::<()>(&redis::cmd("PING")).await
    }

    /// Drops the connection. The next command makes a new one to the address that the name resolves to then.
    pub fn reconnect(&self) {
        self.state().drop_connection();
    }

    async fn connection(&self) -> Result<(Connection, u64), BackendError> {
        if let Some(standing) = self.standing() {
            return standing;
        }
        let _only_one = self.connecting.lock().await;
        // Another task may have connected, or failed, while this one waited.
        if let Some(standing) = self.standing() {
            return standing;
        }
        // An attempt that was cancelled may have left a connection.
        self.state().drop_connection();
        let connected = async {
            let mut connection = self.connect().await?;
            let client = self.close_former(&mut connection).await?;
            self.state().client = client;
            self.store_client(&mut connection).await?;
            Ok::<_, RedisError>(connection)
        };
        let connected = connected.await;
        let mut state = self.state();
        match connected {
            Ok(connection) => {
                state.number += 1;
                state.connection = Some(connection.clone());
                state.failed = None;
                Ok((connection, state.number))
            }
            Err(error) => {
                let error = class(&error);
                state.drop_connection();
                state.failed = Some((Instant::now(), error.clone()));
                Err(error)
            }
        }
    }

    /// Makes the server close the connections that this one replaces. Returns the name of this one.
    async fn close_former(&self, connection: &mut Connection) -> Result<Option<ClientName>, RedisError> {
        let info = redis::cmd("CLIENT").arg("INFO").query_async::<String>(connection).await;
        let Some(info) = self.unless_denied(info)? else { return Ok(None) };
        loop {
            let Some(former) = self.state().dropped.front().cloned() else { break };
            self.close(connection, &former).await?;
            self.state().dropped.retain(|client| *client != former);
        }
        Ok(ClientName::of(&info))
    }

    async fn close(&self, connection: &mut Connection, client: &ClientName) -> Result<(), RedisError> {
        let mut kill = redis::cmd("CLIENT");
        kill.arg("KILL").arg("ID").arg(&client.id).arg("ADDR").arg(&client.address);
        let killed = kill.query_async::<u64>(connection).await;
        self.unless_denied(killed).map(drop)
    }

    /// `None`: the user may not call the command, or this version of Redis does not have it.
    fn unless_denied<T>(&self, answer: Result<T, RedisError>) -> Result<Option<T>, RedisError> {
        let error = match answer {
            Ok(answer) => return Ok(Some(answer)),
            Err(error) => error,
        };
        let reason = match class(&error) {
            BackendError::Denied(reason) | BackendError::Invalid(reason) => reason,
            BackendError::Missing(_) | BackendError::Unavailable(_) => return Err(error),
        };
        if !std::mem::replace(&mut self.state().is_unfenced, true) {
            tracing::warn!(
                reason,
                "Former connections are not closed by Redis, so a delayed command may run late. Allow the \
                 user client|info and client|kill (Redis 6.2 or later)"
            );
        }
        Ok(None)
    }

    async fn connect(&self) -> Result<Connection, RedisError> {
        #[cfg(test)]
        if let Some(link) = &self.link {
            // The client has the same deadline in its configuration, and reports it as a time-out of I/O.
            let connected = timeout(CONNECT_DEADLINE, SimulatedConnection::connect(Arc::clone(link))).await;
            let timed_out = || RedisError::from(std::io::Error::from(std::io::ErrorKind::TimedOut));
            return connected.unwrap_or_else(|_| Err(timed_out())).map(Connection::Simulated);
        }
        let connected = self.client.get_multiplexed_async_connection_with_config(&self.config).await;
        connected.map(Connection::Server)
    }

    /// The current connection, or a failure that is too recent for another attempt.
    fn standing(&self) -> Option<Result<(Connection, u64), BackendError>> {
        let state = self.state();
        if let Some(connection) = &state.connection {
            return Some(Ok((connection.clone(), state.number)));
        }
        let fresh = state.failed.as_ref().filter(|(at, _)| at.elapsed() < PAUSE_AFTER_FAILURE);
        fresh.map(|(_, error)| Err(error.clone()))
    }

    fn drop_connection(&self, number: u64) {
        let mut state = self.state();
        if state.number == number {
            state.drop_connection();
        }
    }

    fn state(&self) -> parking_lot::MutexGuard<'_, ConnectionState> {
        self.state.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_never_shows_its_password() {
        for (url, shown) in [
            ("redis://user:secret@host:6380/1", "redis://host:6380"),
            ("rediss://:secret@host", "rediss://host"),
            ("redis://u:secret@[::1]:6380", "redis://[::1]:6380"),
            ("redis://[fe80::1]", "redis://[fe80::1]"),
            // Special characters that are not percent-encoded.
            ("redis://:sec/ret@host:6380", "redis://host:6380"),
            ("redis://:sec#ret@host", "redis://host"),
            ("redis://:sec?ret@host/0", "redis://host"),
            ("redis://:sec@ret@host", "redis://host"),
            ("redis://:1/secret@host", "redis://host"),
            ("redis://secret/@x@host", "redis://host"),
            // No valid host remains.
            ("redis://:secret", "(not a Redis URL)"),
            ("redis://u:secret@", "(not a Redis URL)"),
            ("redis://host:secret", "(not a Redis URL)"),
            ("redis://h,secret", "(not a Redis URL)"),
            ("secret", "(not a Redis URL)"),
            ("http://secret@host", "(not a Redis URL)"),
        ] {
            assert_eq!(format!("{:?}", RedisUrl::new(url)), shown);
        }
    }

    #[test]
    fn a_connection_is_named_by_its_id_and_its_address() {
        let info = "id=3 addr=127.0.0.1:49266 laddr=127.0.0.1:6379 fd=8 name= age=0 db=0\n";
        let client = ClientName::of(info).unwrap();
        assert_eq!(client.text(), "3 127.0.0.1:49266");
        assert_eq!(ClientName::parse(&client.text()), Some(client));
        for text in ["", "127.0.0.1:49266"] {
            assert_eq!((ClientName::of(text), ClientName::parse(text)), (None, None), "{text}");
        }
    }

    #[test]
    fn a_malformed_url_is_invalid() {
        for bad in ["", "host:6379", "http://host", "redis://host:port", "redis://host/x"] {
            assert!(matches!(client(&RedisUrl::new(bad)), Err(BackendError::Invalid(_))), "{bad}");
        }
        for good in ["redis://host", "rediss://u:p@host:1/2"] {
            assert!(client(&RedisUrl::new(good)).is_ok(), "{good}");
        }
    }

    #[test]
    fn codes_are_classified() {
        let answer = |code: &str| class(&redis::make_extension_error(code.into(), Some("secret".into())));
        assert_eq!(answer("WRONGPASS"), BackendError::Denied("Redis answered WRONGPASS".into()));
        assert_eq!(answer("WRONGTYPE"), BackendError::Invalid("Redis answered WRONGTYPE".into()));
        assert_eq!(answer("OOM"), BackendError::Unavailable("Redis answered OOM".into()));
    }
}
