//! What a worker needs of a backend: its jobs, the code of their functions, and a place for results.

use super::BackendError;
use crate::model::UnixMs;
use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Identifies the latest delivery of a job to this worker. Only the source that made it can read it. Clones
/// are one receipt.
#[derive(Clone, Debug)]
pub struct Receipt(Arc<Mutex<Arc<str>>>);

impl Receipt {
    pub fn new(text: impl Into<Arc<str>>) -> Self {
        Self(Arc::new(Mutex::new(text.into())))
    }

    pub fn text(&self) -> Arc<str> {
        self.0.lock().clone()
    }

    /// Takes over the receipt of a later delivery, which has made this one invalid.
    pub fn renew(&self, later: &Self) {
        let text = later.text();
        *self.0.lock() = text;
    }
}

/// Longest id of a job, in bytes.
pub const REQUEST_ID_BYTES_MAX: usize = 128;

/// Whether an id can be one part of a key, of a path and of a log line. Ids of this gateway and of the
/// earlier controller, which are UUIDs, can.
pub fn is_request_id(id: &str) -> bool {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    (1..=REQUEST_ID_BYTES_MAX).contains(&id.len()) && id.bytes().all(is_plain)
}

/// A job that a worker has received.
#[derive(Clone, Debug)]
pub struct ReceivedJob {
    pub receipt: Receipt,
    /// The id of the job. Jobs of the old controller have ids of another form.
    pub request_id: String,
    pub function: String,
    /// After this time nobody expects a result. [`UnixMs::MAX`]: the message does not say.
    pub deadline: UnixMs,
    /// Earlier starts whose end was not recorded.
    pub starts: u32,
    /// Jobs of one group run one after the other, in the order in which they were received. `None`: any
    /// order.
    pub group: Option<String>,
    pub message: Bytes,
}

#[cfg(test)]
impl ReceivedJob {
    /// A job for tests, without a message. Its receipt is `receipt of <id>`.
    pub fn sample(id: &str) -> Self {
        Self {
            receipt: Receipt::new(format!("receipt of {id}")),
            request_id: id.to_owned(),
            function: "f".to_owned(),
            deadline: UnixMs::MAX,
            starts: 0,
            group: None,
            message: Bytes::new(),
        }
    }
}

/// How a source delivers jobs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobSourceTraits {
    /// How long a received job is hidden from other workers, unless it is extended. `None`: as long as this
    /// process lives.
    pub lease: Option<Duration>,
    /// A job with this many starts without an end fails. `None`: the source gives such jobs up itself.
    pub starts_max: Option<u32>,
    /// Most jobs of one [`JobSource::receive`].
    pub receive_max: usize,
}

/// Where a worker gets its jobs, and where it leaves their results.
#[async_trait]
pub trait JobSource: Send + Sync {
    fn traits(&self) -> JobSourceTraits;

    /// Waits until there is a job, or for some seconds. Returns at most `max` jobs, in their order. If the
    /// future is dropped, jobs may stay hidden until their lease ends.
    async fn receive(&self, max: usize) -> Result<Vec<ReceivedJob>, BackendError>;

    /// Records that a job is about to start.
    async fn start(&self, job: &ReceivedJob) -> Result<(), BackendError>;

    /// Hides jobs for one more lease, counted from now. Jobs that have left the queue are ignored.
    async fn extend(&self, receipts: &[Receipt]) -> Result<(), BackendError>;

    /// Returns jobs to the queue, for an immediate delivery to any worker. Their starts do not count.
    async fn give_back(&self, jobs: &[ReceivedJob]) -> Result<(), BackendError>;

    /// Hands on the result of a job, and then removes the job from the queue. May be repeated after an error.
    async fn finish(&self, job: &ReceivedJob, result: Bytes) -> Result<(), BackendError>;

    /// Removes a job from the queue without a result.
    async fn discard(&self, job: &ReceivedJob) -> Result<(), BackendError>;
}

/// Why code could not be fetched.
#[derive(Clone, Debug, thiserror::Error)]
pub enum FetchError {
    /// There is no such code, and there will not be. A sentence for the owner of the function.
    #[error("{0}")]
    Missing(String),
    /// A later attempt may succeed.
    #[error(transparent)]
    Away(#[from] BackendError),
}

/// Where a worker gets the code of functions.
#[async_trait]
pub trait CodeSource: Send + Sync {
    /// Writes the zip archive under `s3_key` of `bucket` to the new file `to`. A key never changes its
    /// contents.
    async fn fetch(&self, bucket: &str, s3_key: &str, to: &Path) -> Result<(), FetchError>;
}

/// Where a worker leaves the files that functions have written for their callers.
#[async_trait]
pub trait OutputStore: Send + Sync {
    /// Stores `file` under `key`. Returns what the result shows for it.
    async fn store(&self, key: &str, file: &Path) -> Result<String, BackendError>;
}
