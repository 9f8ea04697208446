//! What really happened, as nobody inside the system can know it: the base of all checks.

use crate::model::{Execution, FunctionId, Job, JobId, Outcome};
use bytes::Bytes;
use std::collections::{BTreeMap, BTreeSet};

#[derive(Default)]
pub struct Truth {
    pub requests: Vec<Request>,
    /// The jobs of which a send was attempted, with the number of their request.
    pub attempted: BTreeMap<JobId, u64>,
    /// The jobs that another node than theirs has sent, and when last, in Unix milliseconds.
    pub resent: BTreeMap<JobId, u64>,
    /// The jobs that were ever on the queue, with the number of their request.
    pub on_queue: BTreeMap<JobId, u64>,
    /// Jobs whose ids a client was given.
    pub accepted: BTreeMap<JobId, u64>,
    pub results: BTreeMap<JobId, Vec<Produced>>,
    /// Redis has come back with older data: counters may be off, and some jobs forgotten.
    pub is_redis_rolled_back: bool,
    /// When Redis lost all data, in Unix milliseconds.
    pub redis_emptied_at: Vec<u64>,
    /// It did so while a node was adopted.
    pub is_emptied_in_adoption: bool,
    /// When Redis last lost data, in Unix milliseconds.
    pub redis_lost_at: Option<u64>,
    /// When the limiter let requests pass, in microseconds since the run began.
    pub passed: Vec<u64>,
    pub violations: Vec<String>,
}

/// One request of a client, repeated or not.
#[derive(Clone, Debug)]
pub struct Request {
    pub key: Option<String>,
    pub function: FunctionId,
    pub is_async: bool,
    pub kind: RequestKind,
    /// The ids in its answers.
    pub ids: BTreeSet<JobId>,
    /// Every answer said that no job is on the queue.
    pub is_denied: bool,
    pub answers: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RequestKind {
    Usual,
    /// Its job gets no result.
    NeverAnswered,
    /// The queue rejects its message.
    RefusedByQueue,
}

/// A result that a worker has produced.
#[derive(Clone, Debug)]
pub struct Produced {
    pub payload: Bytes,
    pub is_stored: bool,
    /// When it was produced first, and stored first, in Unix milliseconds of the true time.
    pub at: u64,
}

/// The number of a request, as its message carries it.
pub fn number_of(message: &[u8]) -> u64 {
    let body: serde_json::Value = serde_json::from_slice(message).expect("a message is JSON");
    body["input"]["n"].as_u64().expect("every request has a number")
}

impl Truth {
    pub fn violated(&mut self, what: String) {
        self.violations.push(what);
    }

    pub fn enqueued(&mut self, job: &Job) {
        let number = number_of(&job.message);
        self.on_queue.insert(job.id, number);
    }

    pub fn resent_at(&mut self, id: JobId) {
        self.resent.insert(id, super::world::true_ms());
    }

    pub fn is_refused_by_queue(&self, message: &[u8]) -> bool {
        self.is_of_kind(number_of(message), RequestKind::RefusedByQueue)
    }

    pub fn is_never_answered(&self, request: u64) -> bool {
        self.is_of_kind(request, RequestKind::NeverAnswered)
    }

    fn is_of_kind(&self, request: u64, kind: RequestKind) -> bool {
        usize::try_from(request).ok().and_then(|n| self.requests.get(n)).is_some_and(|r| r.kind == kind)
    }

    pub fn produced(&mut self, id: JobId, payload: &[u8], is_stored: bool) {
        let at = super::world::true_ms();
        let of = self.results.entry(id).or_default();
        match of.iter_mut().find(|known| known.payload == payload) {
            Some(known) if is_stored && !known.is_stored => (known.is_stored, known.at) = (true, at),
            Some(_) => {}
            None => of.push(Produced { payload: Bytes::copy_from_slice(payload), is_stored, at }),
        }
    }

    /// Whether a worker has produced this result.
    pub fn has_result(&self, id: JobId, payload: &Bytes) -> bool {
        self.results.get(&id).is_some_and(|all| all.iter().any(|produced| produced.payload == payload))
    }

    /// Whether a row tells the result of a worker.
    pub fn explains(&self, id: JobId, row: &Execution) -> bool {
        self.results.get(&id).into_iter().flatten().any(|produced| {
            let outcome = Outcome::new(produced.payload.clone());
            let expected = Execution::of(id, row.function.clone(), &outcome.fields());
            (&expected.status, expected.duration_ms, &expected.message)
                == (&row.status, row.duration_ms, &row.message)
        })
    }
}
