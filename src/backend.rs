//! The ports: what the gateway needs of the outside, as traits.
//!
//! A trait stands only where the fleet ([`aws`]) and the single machine ([`embedded`]) differ. The traits are
//! object-safe and small; `boot` chooses the backend, nobody else knows which one runs.

#[cfg(feature = "aws")]
pub mod aws;
pub mod embedded;

use crate::model::{
    BodyHash, ConfigRecord, Execution, Function, FunctionId, IdempotencyKey, Job, JobId, NodeId,
    ProcessToken, Recommendation, RetiredCode, Sums, UnixMs,
};
use async_trait::async_trait;
use bytes::Bytes;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Most jobs in one [`JobQueue::send_batch`]: what SQS takes in one call.
pub const BATCH_JOBS_MAX: usize = 10;
/// Most rows in one [`ExecutionStore::put`]: what DynamoDB takes in one call.
pub const ROWS_MAX: usize = 25;
/// Most ids in one [`Results::stored`].
pub const STORED_MAX: usize = 64;
/// Most jobs in one [`Journal::end`].
pub const ENDED_MAX: usize = 512;
/// Most functions in one [`Journal::number`].
pub const POSTED_MAX: usize = 256;
/// Most jobs of a node that are remembered after they were given up. The results of others that come late are only
/// counted.
pub const GIVEN_UP_MAX: usize = 65_536;
/// For how long they are remembered.
pub const GIVEN_UP_KEPT: Duration = Duration::from_secs(6 * 3600);

/// Why a backend did not do what was asked. The text is for the log, never for a client.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BackendError {
    /// The queue, table or bucket does not exist.
    #[error("{0}")]
    Missing(String),
    /// The credentials or the password do not allow it.
    #[error("{0}")]
    Denied(String),
    /// The request itself is at fault; the same request will fail again.
    #[error("{0}")]
    Invalid(String),
    /// No answer, a broken connection, throttling, a fault on the other side: may pass. Whether the
    /// request took effect is not known.
    #[error("{0}")]
    Unavailable(String),
}

impl BackendError {
    /// Whether the same call may succeed later.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Unavailable(_))
    }
}

/// Why a job is not (known to be) on the queue.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The queue refused this job and would refuse it again.
    #[error("the queue refused the job: {0}")]
    Refused(String),
    /// The job is certainly not on the queue; a later try may succeed.
    #[error("the queue did not take the job: {0}")]
    NotSent(String),
    /// No answer came: the job may be on the queue or not.
    #[error("the queue did not answer: {0}")]
    Unknown(String),
}

/// What a queue is like; read once, at start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueTraits {
    /// Largest message, and largest batch, in bytes.
    pub message_bytes_max: usize,
    /// How long a message is kept, and so how long a job may wait.
    pub retention: Duration,
    /// Order is kept within a function: at most one batch with a function's jobs may be in flight.
    pub fifo: bool,
}

/// The task queue.
#[async_trait]
pub trait JobQueue: Send + Sync {
    /// One result per job, in order. At most [`BATCH_JOBS_MAX`] jobs, within `message_bytes_max` in all.
    async fn send_batch(&self, jobs: &[Job]) -> Vec<Result<(), SendError>>;

    fn traits(&self) -> QueueTraits;

    /// Jobs waiting on the queue, roughly. Also the queue's health check.
    async fn depth(&self) -> Result<u64, BackendError>;
}

/// What [`Results::next`] tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ResultEvent {
    /// A worker published this result for one of the node's jobs.
    Published { id: JobId, payload: Bytes },
    /// Something was published under the node's prefix that is no job id.
    Malformed,
    /// The subscription stands (again): whatever was published before this may have been missed.
    Subscribed,
    /// What is known of the subscription has changed.
    Hearing(Hearing),
}

/// Whether a subscription receives what is published. A backend proves it with beats: messages to itself that
/// it publishes the way others publish theirs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hearing {
    /// It stands; after missed beats only once a beat has arrived.
    Proven,
    /// It stands, and beats are denied: whether it receives anything is not known.
    Unproven,
    /// Its connection broke, or cannot be made.
    Broken,
    /// Its connection stands, and beats did not arrive: it is made again.
    Missed,
}

impl Hearing {
    /// Whether the subscription may be relied on.
    pub fn is_heard(self) -> bool {
        matches!(self, Self::Proven | Self::Unproven)
    }
}

/// Where workers leave their results.
#[async_trait]
pub trait Results: Send + Sync {
    /// The next event for this node. Reconnects by itself and never ends; one caller at a time.
    async fn next(&self) -> ResultEvent;

    /// The stored result of each job, in order; at most [`STORED_MAX`] ids.
    async fn stored(&self, ids: &[JobId]) -> Result<Vec<Option<Bytes>>, BackendError>;

    /// The result stored under an id that is not of our kind (an old controller's job).
    async fn stored_foreign(&self, request_id: &str) -> Result<Option<Bytes>, BackendError>;

    /// Waits for the result of another node's job. Dropping the future ends the subscription.
    async fn wait_for(&self, id: JobId) -> Result<Bytes, BackendError>;

    /// What keeps the results, as `/health` names it.
    fn store_name(&self) -> &'static str;

    /// Health check.
    async fn ping(&self) -> Result<(), BackendError>;
}

/// A message that the queue has given up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeadLetter {
    /// `None`: no job of our kind.
    pub job: Option<(JobId, FunctionId)>,
    /// By which the store knows it.
    pub receipt: String,
}

/// Messages that came to workers too often, and that none deleted.
#[async_trait]
pub trait DeadLetters: Send + Sync {
    /// A few of them, those that were not read for a while; none if there are no others.
    async fn read(&self) -> Result<Vec<DeadLetter>, BackendError>;

    /// Leaves a result for the job of one, as a worker does, unless there is a result. `false`: there is.
    async fn answer(&self, id: JobId, result: Bytes) -> Result<bool, BackendError>;

    /// Of one [`Self::read`].
    async fn delete(&self, letters: &[DeadLetter]) -> Result<(), BackendError>;
}

/// What the journal keeps of one job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JournalEntry {
    pub id: JobId,
    pub function: FunctionId,
    pub deadline: UnixMs,
    pub idempotency_key: Option<Box<IdempotencyKey>>,
}

/// A job whose row is written, and what its execution adds to its function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ended {
    pub id: JobId,
    pub function: FunctionId,
    pub adds: Sums,
    /// It was given up without a result. A late one may still come.
    pub is_lost: bool,
}

/// Sums of one function under the number by which they are told from others of the same node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Numbered {
    pub function: FunctionId,
    pub number: u64,
    pub sums: Sums,
}

/// The sums of some functions that are still to be posted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unposted {
    /// Sums with a number.
    pub numbered: Vec<Numbered>,
    /// Sums without a number.
    pub sums: Vec<(FunctionId, Sums)>,
}

/// Where a job stands in the journal of its node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It has left the journal, or has never been in it.
    Absent,
    /// The journal does not hold it, and has lost what it held.
    Unknown,
    /// The process that accepted it knows what became of its send.
    Held,
    /// That process has ended, or its lease has: nobody can know whether the queue has the job.
    Left,
}

impl Standing {
    /// Whether the journal holds the job.
    pub fn is_held(self) -> bool {
        matches!(self, Self::Held | Self::Left)
    }
}

/// The durable set of a node's jobs in flight, and what ended jobs add to their functions until that is posted. A
/// job enters before it is sent, and leaves when its row is written or its send has definitely failed.
///
/// Sums are posted in two steps: they get a number, and then they are added to their function, which remembers the
/// number. Until that is known the number stays with them, so whoever posts them, and however often, adds once. A
/// store that adds at once, with the end of the job, has nothing to post.
///
/// A store that has lost its data does nothing with jobs that end, and with sums, until it has been told again what it
/// had (see [`Membership::retold`]). An answer from before that would be taken for the truth.
#[async_trait]
pub trait Journal: Send + Sync {
    async fn enter(&self, jobs: &[Job]) -> Result<(), BackendError>;

    /// Takes out jobs that never ran.
    async fn leave(&self, ids: &[JobId]) -> Result<(), BackendError>;

    /// Takes out jobs of `node` whose rows are written; at most [`ENDED_MAX`]. In the same step it keeps what those of
    /// them add that were still there, so each job adds once, whoever ends it and however often; and what a result
    /// changes that came after its job was given up. `false`: the store has lost its data, and nothing was done.
    async fn end(&self, node: NodeId, ended: &[Ended]) -> Result<bool, BackendError>;

    /// Jobs of `node` that were given up lately, and for which no result has come; at most [`GIVEN_UP_MAX`].
    async fn given_up(&self, node: NodeId) -> Result<Vec<(JobId, FunctionId)>, BackendError>;

    /// All sums of `node` that are to be posted, as they are at one moment. `None`: the store has lost its data.
    async fn unposted(&self, _node: NodeId) -> Result<Option<Unposted>, BackendError> {
        Ok(Some(Unposted::default()))
    }

    /// Gives the sums of these functions of `node` their numbers, unless earlier ones have a number already; at most
    /// [`POSTED_MAX`] functions. The numbers are above `floor`, and above all that the store has given. Gives all that is
    /// to be posted for these functions now. `None`: the store has lost its data, and nothing was done.
    async fn number(
        &self,
        _node: NodeId,
        _functions: &[FunctionId],
        _floor: u64,
    ) -> Result<Option<Unposted>, BackendError> {
        Ok(Some(Unposted::default()))
    }

    /// Adds sums of `node` to their functions, if those (still) exist, up to `at_a_time` side by side. Gives back what
    /// is not known to be added, and why.
    async fn post(
        &self,
        _node: NodeId,
        _numbered: Vec<Numbered>,
        _at_a_time: usize,
    ) -> (Vec<Numbered>, Option<BackendError>) {
        (Vec::new(), None)
    }

    /// Whether the node that the id names holds the job.
    async fn contains(&self, id: JobId) -> Result<bool, BackendError>;

    /// The same, and what the node can know of it.
    async fn standing(&self, id: JobId) -> Result<Standing, BackendError> {
        Ok(if self.contains(id).await? { Standing::Held } else { Standing::Absent })
    }

    /// The process that runs `node` has started: what the journal holds by now was left by an earlier one.
    async fn started(&self, _node: NodeId) -> Result<(), BackendError> {
        Ok(())
    }

    /// All that `node` holds: what a restarted node goes on with.
    async fn entries(&self, node: NodeId) -> Result<Vec<JournalEntry>, BackendError>;
}

/// A part of what a journal should hold.
#[derive(Clone, Copy, Debug)]
pub enum Told<'a> {
    Jobs(&'a [JournalEntry]),
    Sums(&'a [(FunctionId, Sums)]),
    Numbered(&'a [Numbered]),
    GivenUp(&'a [(JobId, FunctionId)]),
}

/// How long a request may be repeated under its key.
pub const CLAIMED: Duration = Duration::from_secs(24 * 3600);
/// Largest result that is kept with the key, in bytes: what an item of DynamoDB holds, and some room. Larger ones are
/// found as long as the worker's own copy.
pub const KEPT_BYTES_MAX: usize = 350 * 1024;

/// A request's claim to be the one of its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    pub key: IdempotencyKey,
    pub body: BodyHash,
    pub job: JobId,
    pub function: FunctionId,
}

/// A claim that stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claimed {
    pub claim: Claim,
    /// The latest attempt to send the job: the job's own id for the first one, a new id for each one after it. It says
    /// which node makes the attempt, and since when.
    pub attempt: JobId,
    /// The job is known to be on the queue, or to have been.
    pub is_sent: bool,
    pub result: Option<Bytes>,
}

/// The requests that are to be carried out once; each is forgotten after [`CLAIMED`].
#[async_trait]
pub trait Claims: Send + Sync {
    /// Claims the key, if nobody has it. Else gives who has; nothing is written then.
    async fn claim(&self, claim: &Claim) -> Result<Option<Claimed>, BackendError>;

    /// Who has the key.
    async fn find(&self, key: &IdempotencyKey) -> Result<Option<Claimed>, BackendError>;

    /// Claims the next attempt to send the job, after the one in `claimed`. `false`: the job is confirmed or released, or
    /// another attempt came first.
    async fn try_again(&self, claimed: &Claimed, attempt: JobId) -> Result<bool, BackendError>;

    /// The job is on the queue.
    async fn confirm(&self, claim: &Claim) -> Result<(), BackendError>;

    /// The job is certainly not on the queue, and the key is free again. `false`: the job is confirmed, or another attempt
    /// to send it has begun.
    async fn release(&self, claim: &Claim, attempt: JobId) -> Result<bool, BackendError>;

    /// Keeps the result of the job that has the key.
    async fn keep(&self, key: &IdempotencyKey, job: JobId, result: &Bytes) -> Result<(), BackendError>;
}

/// The nodes of a fleet: who lives, and who goes on with the jobs of those that do not.
///
/// A lease says when others may look after a node's jobs. It need not keep two from doing so at once: a row
/// is the same whoever writes it, and a job ends once (see [`Journal::end`]). But it belongs to one process:
/// two that admit jobs under one id would leave the jobs of the one that dies to nobody, because the other
/// renews their lease.
#[async_trait]
pub trait Membership: Send + Sync {
    /// Takes the lease of `node` for this process, if it has lapsed or `predecessor` holds it. By the clock
    /// of the store.
    async fn take(
        &self,
        node: NodeId,
        lease: Duration,
        predecessor: Predecessor,
    ) -> Result<Taken, BackendError>;

    /// Renews the lease of `node`, by the clock of the store, unless another process holds it: that one is
    /// told.
    async fn renew(&self, node: NodeId, lease: Duration) -> Result<Renewal, BackendError>;

    /// Takes, or renews, the part of the one that looks after the jobs of `dead`. `false`: another node has it.
    async fn adopt(&self, dead: NodeId, by: NodeId, lease: Duration) -> Result<bool, BackendError>;

    /// Lists `dead` no more, if its journal is empty and its lease has not been renewed. `false`: it is still listed.
    async fn dismiss(&self, dead: NodeId) -> Result<bool, BackendError>;

    /// Lists a node as one whose lease has lapsed, if it is not listed. `false`: it is.
    async fn relist(&self, node: NodeId) -> Result<bool, BackendError>;

    /// Whether the journal of `node` holds all that was told; if not, the store has lost its data, and nothing ends
    /// there until [`Self::retold`].
    async fn is_whole(&self, node: NodeId) -> Result<bool, BackendError>;

    /// Begins to tell the journal of `node` again what it has lost. `token`: another one each time.
    async fn begin_retelling(&self, node: NodeId, token: u64) -> Result<(), BackendError>;

    /// Tells the journal of `node` again what it has lost.
    async fn retell(&self, node: NodeId, told: Told<'_>) -> Result<(), BackendError>;

    /// The journal of `node` has been told all since it was begun under `token`. `false`: the store has lost its data
    /// again since then, or another node tells it, and it still counts as incomplete.
    async fn retold(&self, node: NodeId, token: u64) -> Result<bool, BackendError>;
}

/// Whose lease may be taken although it has not lapsed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Predecessor {
    Nobody,
    /// A process that is known to be gone.
    Process(ProcessToken),
    /// A process without a token: one of an earlier version.
    Unnamed,
}

/// What becomes of a [`Membership::take`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Taken {
    Yes,
    No(HeldBy),
}

/// A lease that another process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldBy {
    /// `None`: a process without a token, of an earlier version.
    pub process: Option<ProcessToken>,
    /// When the lease lapses, by the clock of the store; later with each renewal.
    pub until: UnixMs,
    /// Until then.
    pub left: Duration,
}

/// What becomes of a [`Membership::renew`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Renewal {
    Renewed {
        others: Others,
        /// Another process has lately tried to renew the lease: it may have jobs in the journal that only it
        /// knows.
        is_contested: bool,
    },
    /// Another process holds the lease.
    Lost,
}

/// What a node hears of the others when it renews its lease.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Others {
    /// Those whose lease has lapsed, a few at a time.
    pub lapsed: Vec<NodeId>,
    /// Nodes whose lease holds, the one that asks included.
    pub alive: usize,
}

/// A change of one function, with all that must be written with it.
#[derive(Clone, Debug, PartialEq)]
pub struct FunctionWrite {
    /// The function as it was read; `None`: it must not exist. The write happens only if its version and time of
    /// change are still the same.
    pub before: Option<Function>,
    /// As it shall be; `None`: deleted. Counters and recommendation are not written: they change by themselves.
    pub after: Option<Function>,
    pub record: ConfigRecord,
    /// Code that nothing points to after this; enters the code list.
    pub retire: Option<RetiredCode>,
    /// Code that is pointed to after this; its entry leaves the code list. Without the entry there is a conflict:
    /// the code may have been swept away.
    pub adopt: Option<RetiredCode>,
}

/// What became of a [`FunctionWrite`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    Done,
    /// The function is no longer (or already) there, or was changed since it was read, or its code was swept away.
    /// Nothing was written.
    Conflict,
}

/// One page of the functions.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FunctionPage {
    pub functions: Vec<Function>,
    /// Where to go on; `None`: this was the last page.
    pub next: Option<String>,
}

/// The function metadata.
#[async_trait]
pub trait FunctionStore: Send + Sync {
    /// A consistent read.
    async fn get(&self, id: &FunctionId) -> Result<Option<Function>, BackendError>;

    /// At most `limit` functions (at least 1), in an order that is the store's own and does not change;
    /// `after`: the `next` of the page before.
    async fn list(&self, limit: usize, after: Option<&str>) -> Result<FunctionPage, BackendError>;

    /// All of it, or nothing. The same write again, after [`BackendError::Unavailable`], changes nothing more.
    async fn write(&self, write: &FunctionWrite) -> Result<Written, BackendError>;

    /// Keeps a recommendation, if the function (still) exists and has none of a later execution.
    async fn recommend(&self, id: &FunctionId, recommendation: &Recommendation) -> Result<(), BackendError>;

    /// Health check: the table exists and may be read.
    async fn probe(&self) -> Result<(), BackendError>;
}

/// The durable list of code that is to be deleted when it is due.
#[async_trait]
pub trait CodeList: Send + Sync {
    /// Puts code on the list, in place of an entry for the same key.
    async fn add(&self, code: &RetiredCode) -> Result<(), BackendError>;

    /// At most `limit` entries that are due.
    async fn due(&self, now: UnixMs, limit: usize) -> Result<Vec<RetiredCode>, BackendError>;

    /// Takes an entry off, unless it has another due time by now.
    async fn remove(&self, code: &RetiredCode) -> Result<(), BackendError>;
}

/// Where the code of functions lies.
#[async_trait]
pub trait CodeStore: Send + Sync {
    /// Stores the file under the key, durably, without holding it in memory. The file may be moved away.
    async fn put(&self, s3_key: &str, file: &Path) -> Result<(), BackendError>;

    /// Deletes what is there, if anything.
    async fn delete(&self, s3_key: &str) -> Result<(), BackendError>;
}

/// How long a worker that says nothing more is known.
pub const WORKER_FORGOTTEN: Duration = Duration::from_secs(300);
/// Most workers that are known at a time.
pub const WORKERS_MAX: usize = 1000;

/// What a worker last said of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerSeen {
    /// The JSON object it was put with.
    pub state: Bytes,
    /// How long ago, by the clock of the store.
    pub age: Duration,
    /// When, by a clock that all nodes share.
    pub at: UnixMs,
}

/// The workers that report, as all nodes see them.
#[async_trait]
pub trait WorkerRegistry: Send + Sync {
    /// Keeps what a worker says of itself until it says something else or is forgotten. `false`: there are
    /// [`WORKERS_MAX`] others.
    async fn put(&self, worker_id: &str, state: &str) -> Result<bool, BackendError>;

    /// Those heard of within [`WORKER_FORGOTTEN`], by id.
    async fn all(&self) -> Result<Vec<WorkerSeen>, BackendError>;

    /// What a lone worker that does not report says of the system.
    async fn lone_status(&self) -> Result<Option<Bytes>, BackendError>;
}

/// Which rows of a function's log to list.
#[derive(Clone, Debug, PartialEq)]
pub struct LogQuery {
    pub function: FunctionId,
    /// Most rows of a page.
    pub limit: usize,
    /// Earliest acceptance time, inclusive.
    pub start: Option<UnixMs>,
    /// Latest acceptance time, exclusive.
    pub end: Option<UnixMs>,
    pub status: Option<String>,
    /// Range key of the last row of the page before.
    pub after: Option<String>,
}

/// One page of a log, newest first.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LogPage {
    pub rows: Vec<Execution>,
    /// Range key to go on after; `None`: this was the last page.
    pub next: Option<String>,
}

/// The execution log.
#[async_trait]
pub trait ExecutionStore: Send + Sync {
    /// One result per row, in order; at most [`ROWS_MAX`] rows, no key twice. Writing a row again changes nothing.
    async fn put(&self, rows: &[Execution]) -> Vec<Result<(), BackendError>>;

    /// Live rows only.
    async fn list(&self, query: &LogQuery) -> Result<LogPage, BackendError>;

    /// The live row of a request, also if an old controller wrote it.
    async fn get(&self, function: &FunctionId, request_id: &str) -> Result<Option<Execution>, BackendError>;

    /// Health check: the table exists and may be read.
    async fn probe(&self) -> Result<(), BackendError>;
}

/// A rate limit: `rate` requests each `period`, with up to `burst` at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Quota {
    pub rate: u32,
    pub period: Duration,
    pub burst: u32,
}

impl Quota {
    /// What drains from a bucket in a microsecond and what a request costs, in the smallest whole numbers that stand
    /// in the quota's proportion. A period counts in whole microseconds, and no quota is slower than one request
    /// in it.
    pub fn drain(&self) -> (u64, u64) {
        let rate = u64::from(self.rate.max(1));
        let period = u64::try_from(self.period.as_micros()).unwrap_or(u64::MAX).max(1);
        let divisor = gcd(rate, period);
        (rate / divisor, period / divisor)
    }
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// What a limiter says of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Decision {
    pub allowed: bool,
    /// Requests that would be let through at once after this one.
    pub remaining: u32,
    /// Until one request would be let through; zero if allowed.
    pub retry_after: Duration,
}

/// A call about a lease: what its holder still has, what it gives back, and what it would like. In tokens; a token
/// is one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseCall {
    pub bucket: String,
    pub quota: Quota,
    /// Never used by two processes, nor by one before and after it lost what it knew.
    pub holder: u64,
    /// Grows with each call of the holder for the bucket. 0: the call is for `need` alone, and nothing is leased.
    pub seq: u64,
    /// Tokens kept from the lease before.
    pub held: u32,
    /// Tokens given back.
    pub back: u32,
    /// Tokens to be spent at once; as many of them as there are.
    pub need: u32,
    /// Tokens to be leased on top of `held`, if there is plenty.
    pub want: u32,
    /// How long the lease lasts, from when the call takes effect.
    pub ttl: Duration,
}

/// The answer to a [`LeaseCall`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// `false`: a later call of the holder came first, and this one changed nothing.
    pub applied: bool,
    /// Tokens leased in all, those still held included.
    pub amount: u32,
    /// Tokens of `need` that may be spent.
    pub taken: u32,
    /// Tokens the bucket has left.
    pub left: u32,
    /// Until the bucket has a token; zero if it has.
    pub retry_after: Duration,
    /// Holders with a live lease of the bucket, this one included.
    pub nodes: u32,
}

/// The count behind the rate limits, shared by all nodes.
#[async_trait]
pub trait LimitStore: Send + Sync {
    /// Takes one request from each bucket, unless one of them is empty: then from none. One decision per bucket.
    async fn take(&self, buckets: &[(String, Quota)]) -> Result<Vec<Decision>, BackendError>;

    /// Reports on a lease and renews it. The buckets of [`Self::take`] are others, also where they have the same name. A
    /// call that fails may have taken effect.
    async fn lease(&self, call: &LeaseCall) -> Result<Grant, BackendError>;
}

/// What is heard of changes to functions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChangeEvent {
    /// Announced by some node, this one included.
    Changed(String),
    /// From now on every announcement is heard, or none is. When they are heard again, some of before may not
    /// have been.
    Hearing(Hearing),
}

/// How nodes tell each other which functions they have changed.
#[async_trait]
pub trait ChangeFeed: Send + Sync {
    /// Tells every node that hears.
    async fn announce(&self, id: &str) -> Result<(), BackendError>;

    /// The next event. One caller at a time; it must not pause for long.
    async fn next(&self) -> ChangeEvent;
}

/// Everything a backend gives, for `boot` to hand on piece by piece.
#[derive(Clone)]
pub struct Backend {
    pub queue: Arc<dyn JobQueue>,
    pub results: Arc<dyn Results>,
    pub journal: Arc<dyn Journal>,
    /// `None`: there is one node.
    pub claims: Arc<dyn Claims>,
    /// `None`: the queue gives no message up.
    pub dead_letters: Option<Arc<dyn DeadLetters>>,
    pub membership: Option<Arc<dyn Membership>>,
    pub functions: Arc<dyn FunctionStore>,
    pub executions: Arc<dyn ExecutionStore>,
    pub code: Arc<dyn CodeStore>,
    pub code_list: Arc<dyn CodeList>,
    pub workers: Arc<dyn WorkerRegistry>,
    /// `None`: the process is alone.
    pub changes: Option<Arc<dyn ChangeFeed>>,
    /// `None`: limits are counted in this process.
    pub limits: Option<Arc<dyn LimitStore>>,
}

/// What keeps a backend from starting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StartProblem {
    /// Which part: `the queue`, `Redis`, `the log table InfraExecutionLogs`.
    pub what: String,
    pub error: BackendError,
    /// What an operator can do about it, as an imperative sentence.
    pub mend: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotas_are_reduced() {
        for (rate, period_s, reduced) in [
            (3000, 60, (1, 20_000)),
            (7, 1, (7, 1_000_000)),
            (0, 1, (1, 1_000_000)),
            (100_000, 86_400, (1, 864_000)),
        ] {
            let quota = Quota { rate, period: Duration::from_secs(period_s), burst: 1 };
            assert_eq!(quota.drain(), reduced);
        }
    }
}
