//! The life of a job apart from its result: who started it, and when it reached each step.

use super::JobId;
use super::outcome::ResultFields;
use super::text::cut;
use super::time::{UnixMs, parse_rfc3339_ms};
use crate::model::ids::NodeId;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// Maximum length of the id of a worker in a row, in bytes; the rest is cut off.
const WORKER_ID_BYTES_MAX: usize = 128;

/// The part of a life that is known when a job is accepted.
#[derive(Clone, Debug, Default)]
pub struct JobOrigin {
    /// The name of the API key.
    pub key_name: Option<Arc<str>>,
    /// The version of the configuration of the function.
    pub config_version: u64,
    /// The memory that the function has, in MiB.
    pub memory_mb: u64,
    /// The trace id of the client, as hexadecimal digits. `None`: that of the job.
    pub trace_id: Option<Arc<str>>,
}

/// The steps of a job on this node. The entry of the job and its send share it, so that a step needs no
/// look-up.
///
/// All times are the first one plus what a monotonic clock has counted since then. So they are in order, even
/// if the clock of the machine is set meanwhile.
#[derive(Debug)]
pub struct JobProgress {
    origin: JobOrigin,
    began: UnixMs,
    began_at: Instant,
    /// Whether an earlier process or another node may have sent it before.
    maybe_sent_before: bool,
    sent: StepTime,
    confirmed: StepTime,
}

/// Milliseconds since the beginning, plus 1. 0: the step was not reached.
#[derive(Debug, Default)]
struct StepTime(AtomicU32);

impl StepTime {
    fn of(elapsed: Duration) -> u32 {
        u32::try_from(elapsed.as_millis()).unwrap_or(u32::MAX).saturating_add(1)
    }

    fn after(&self, began: UnixMs) -> Option<UnixMs> {
        let ms = self.0.load(Ordering::Relaxed).checked_sub(1)?;
        Some(began + UnixMs::from(ms))
    }
}

/// Each job has its own.
impl PartialEq for JobProgress {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
    }
}

impl Eq for JobProgress {}

impl JobProgress {
    /// `began`: the time now, by the clock of this node. `maybe_sent_before`: an earlier process or another
    /// node may have sent the job, so its first send is not known.
    pub fn new(origin: JobOrigin, began: UnixMs, maybe_sent_before: bool) -> Self {
        let (sent, confirmed) = (StepTime::default(), StepTime::default());
        Self { origin, began, began_at: Instant::now(), maybe_sent_before, sent, confirmed }
    }

    /// The time now.
    pub fn now(&self) -> UnixMs {
        self.began + UnixMs::try_from(self.began_at.elapsed().as_millis()).unwrap_or(0)
    }

    /// Records an attempt to send the job. Only the first one counts.
    pub fn note_sent(&self, at: Instant) {
        if !self.maybe_sent_before {
            let ms = StepTime::of(at.duration_since(self.began_at));
            let _ = self.sent.0.compare_exchange(0, ms, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    /// Records that the queue has confirmed the job. The last time counts.
    pub fn note_confirmed(&self, at: Instant) {
        let ms = StepTime::of(at.duration_since(self.began_at));
        self.confirmed.0.store(ms, Ordering::Relaxed);
    }

    /// What is known now.
    pub fn life(self: &Arc<Self>) -> RowLife {
        RowLife {
            sent_at: self.sent.after(self.began),
            confirmed_at: self.confirmed.after(self.began),
            progress: Some(Arc::clone(self)),
            key_name: self.origin.key_name.clone(),
            config_version: Some(self.origin.config_version),
            allocated_mb: Some(self.origin.memory_mb),
            trace_id: self.origin.trace_id.clone(),
            ..RowLife::default()
        }
    }
}

/// What a row tells of the life of its job apart from the result. `None`: not known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RowLife {
    /// When the job was first sent to the queue.
    pub sent_at: Option<UnixMs>,
    /// When the queue last confirmed it.
    pub confirmed_at: Option<UnixMs>,
    /// When the run started, by the clock of the worker.
    pub started_at: Option<UnixMs>,
    /// When the row was written.
    pub written_at: Option<UnixMs>,
    pub worker_id: Option<Box<str>>,
    /// The node that ended the job, if it is not that of its id.
    pub ended_by: Option<NodeId>,
    /// The name of the API key.
    pub key_name: Option<Arc<str>>,
    /// The version of the configuration of the function.
    pub config_version: Option<u64>,
    /// The memory that the run had, in MiB.
    pub allocated_mb: Option<u64>,
    /// The trace id of the client.
    pub trace_id: Option<Arc<str>>,
    pub exit_code: Option<i64>,
    /// The steps of a job whose row is not written yet: the queue may confirm it after its result.
    pub progress: Option<Arc<JobProgress>>,
}

impl RowLife {
    /// When the queue last confirmed the job, as far as is known now.
    pub fn confirmed_at(&self) -> Option<UnixMs> {
        let now = self.progress.as_ref().and_then(|progress| progress.confirmed.after(progress.began));
        now.or(self.confirmed_at)
    }

    /// Takes over the steps that were reached since. Called before the row is written.
    pub fn complete(&mut self) {
        self.confirmed_at = self.confirmed_at();
        self.progress = None;
    }

    /// A life of which all is known, for tests.
    #[cfg(test)]
    pub fn sample() -> Self {
        let at = 1_795_305_600_123;
        Self {
            sent_at: Some(at + 1),
            confirmed_at: Some(at + 2),
            started_at: Some(at - 1),
            written_at: Some(at + 4),
            worker_id: Some("worker \"1\"".into()),
            ended_by: Some(NodeId(0xab)),
            key_name: Some("billing".into()),
            config_version: Some(7),
            allocated_mb: Some(256),
            trace_id: Some("0af7651916cd43dd8448eb211c80319c".into()),
            exit_code: Some(-3),
            progress: None,
        }
    }

    /// What the worker reported.
    pub(super) fn of(fields: &ResultFields<'_>) -> Self {
        Self {
            started_at: fields.started_at.as_deref().and_then(parse_rfc3339_ms),
            worker_id: fields.worker_id.as_deref().map(|id| cut(id, WORKER_ID_BYTES_MAX).into()),
            allocated_mb: fields.allocated_memory_mb.map(|mb| mb.round() as u64),
            exit_code: fields.exit_code,
            ..Self::default()
        }
    }

    /// Adds what only `other` knows.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            sent_at: self.sent_at.or(other.sent_at),
            confirmed_at: self.confirmed_at.or(other.confirmed_at),
            started_at: self.started_at.or(other.started_at),
            written_at: self.written_at.or(other.written_at),
            worker_id: self.worker_id.or(other.worker_id),
            ended_by: self.ended_by.or(other.ended_by),
            key_name: self.key_name.or(other.key_name),
            config_version: self.config_version.or(other.config_version),
            allocated_mb: self.allocated_mb.or(other.allocated_mb),
            trace_id: self.trace_id.or(other.trace_id),
            exit_code: self.exit_code.or(other.exit_code),
            progress: self.progress.or(other.progress),
        }
    }

    /// The id of the trace that the message of the job named. If the origin of the job is known and its
    /// client sent none, that is the id of the job.
    pub fn trace_id(&self, id: JobId) -> Option<String> {
        let own = || self.config_version.map(|_| format!("{:032x}", id.trace().trace_id()));
        self.trace_id.as_deref().map(str::to_owned).or_else(own)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEGAN: UnixMs = 1_795_305_600_123;

    fn progress(maybe_sent_before: bool) -> Arc<JobProgress> {
        let origin = JobOrigin { config_version: 7, memory_mb: 128, ..JobOrigin::default() };
        Arc::new(JobProgress::new(origin, BEGAN, maybe_sent_before))
    }

    #[tokio::test(start_paused = true)]
    async fn a_confirmation_after_the_result_is_not_lost() {
        let progress = progress(false);
        progress.note_sent(Instant::now());
        let mut life = progress.life();
        tokio::time::advance(Duration::from_millis(5)).await;
        assert_eq!(life.confirmed_at, None);
        progress.note_confirmed(Instant::now());
        life.complete();
        assert_eq!((life.confirmed_at, life.progress), (Some(BEGAN + 5), None));
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_send_and_the_last_confirmation_count() {
        let progress = progress(false);
        assert_eq!((progress.life().sent_at, progress.life().confirmed_at), (None, None));
        progress.note_sent(Instant::now());
        for _ in 0..2 {
            tokio::time::advance(Duration::from_millis(5)).await;
            progress.note_sent(Instant::now());
            progress.note_confirmed(Instant::now());
        }
        let life = progress.life();
        assert_eq!((life.sent_at, life.confirmed_at), (Some(BEGAN), Some(BEGAN + 10)));
        assert_eq!(
            (life.config_version, life.allocated_mb, progress.now()),
            (Some(7), Some(128), BEGAN + 10)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_send_of_a_job_that_was_perhaps_sent_before_is_not_known() {
        let progress = progress(true);
        progress.note_sent(Instant::now());
        progress.note_confirmed(Instant::now());
        assert_eq!((progress.life().sent_at, progress.life().confirmed_at), (None, Some(BEGAN)));
    }

    #[test]
    fn what_the_worker_reports_comes_first() {
        let fields = ResultFields {
            started_at: Some("2026-11-22T00:00:00.123Z".into()),
            worker_id: Some("ä".repeat(WORKER_ID_BYTES_MAX).into()),
            allocated_memory_mb: Some(256.0),
            exit_code: Some(3),
            ..ResultFields::default()
        };
        let life = RowLife::of(&fields).or(progress(false).life());
        assert_eq!((life.started_at, life.allocated_mb, life.exit_code), (Some(BEGAN), Some(256), Some(3)));
        assert_eq!(life.worker_id.unwrap().len(), WORKER_ID_BYTES_MAX);
        assert_eq!(life.config_version, Some(7));
    }

    #[test]
    fn a_trace_is_that_of_the_client_or_of_the_job() {
        let id = JobId::new(NodeId(1), BEGAN, 2);
        assert_eq!(RowLife::default().trace_id(id), None);
        let own = RowLife { config_version: Some(1), ..RowLife::default() };
        assert_eq!(own.trace_id(id), Some(id.to_string().replace('-', "")));
        let of_client = RowLife { trace_id: Some("ab".into()), ..own };
        assert_eq!(of_client.trace_id(id).as_deref(), Some("ab"));
    }
}
