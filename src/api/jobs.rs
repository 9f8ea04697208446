//! `GET /jobs/:id`: the life of a job, from its acceptance to its row.

use super::call::Call;
use super::problem::ApiError;
use super::query::Query;
use super::reply::Reply;
use crate::api::number::number;
use crate::backend::ExecutionStore;
use crate::dispatch::{Dispatcher, KnownLife};
use crate::model::{Execution, ExecutionEnd, FunctionId, JobId, Outcome, RowId, RowLife, UnixMs, rfc3339_ms};
use http::StatusCode;
use serde_json::{Map, Value};
use std::sync::Arc;
use uuid::Uuid;

const MB_PER_GB: f64 = 1024.0;

/// The handler of the lives of jobs.
pub struct Jobs {
    dispatcher: Dispatcher,
    executions: Arc<dyn ExecutionStore>,
    /// The price of one second with one GB. `None`: no cost is shown.
    gb_second: Option<f64>,
}

impl Jobs {
    pub fn new(dispatcher: Dispatcher, executions: Arc<dyn ExecutionStore>, gb_second: Option<f64>) -> Self {
        Self { dispatcher, executions, gb_second }
    }

    /// The life of a job. While no more than its id is known, its row can be found only with the parameter
    /// `functionId`.
    ///
    /// # Errors
    /// `NoSuchJob` or `FunctionNeeded` if it is unknown, or the key may not run its function.
    pub async fn get(&self, call: &Call) -> Result<Reply, ApiError> {
        let query = Query::read(&call.uri, &["functionId"])?;
        let raw = call.params.first().map_or("", String::as_str);
        let id = JobName::parse(raw).ok_or(ApiError::NoSuchJob)?;
        let unknown = || match query.get("functionId") {
            Some(_) => ApiError::NoSuchJob,
            None => ApiError::FunctionNeeded,
        };
        let named = match query.get("functionId") {
            Some(text) => Some(FunctionId::parse(text).ok_or(ApiError::NoSuchJob)?),
            None => None,
        };
        let known = self.known(&id).await?;
        // A worker may name any function in its result. The key of the row is proof.
        let is_wrong = |known: &KnownLife| {
            known.outcome.is_some() && named.as_ref().is_some_and(|named| *named != known.function)
        };
        let known = known.filter(|known| !is_wrong(known));
        let of_known = known.as_ref().map(|known| known.function.clone());
        let is_other = of_known.as_ref().zip(named.as_ref()).is_some_and(|(known, named)| known != named);
        let function = of_known.or(named).filter(|_| !is_other).ok_or_else(unknown)?;
        if !call.caller.as_ref().is_none_or(|caller| caller.may_run(&function)) {
            return Err(unknown());
        }
        if let Some(known) = known.as_ref().filter(|known| known.outcome.is_none()) {
            return Ok(Reply::value(StatusCode::OK, &pending(&id, known)));
        }
        let row = self.executions.get(&function, &id.text).await;
        let row = row.map_err(|e| ApiError::backend("the log table", &e))?;
        // The row is written shortly after the result.
        let row = row.or_else(|| known.map(|known| unwritten(&id, known))).ok_or(ApiError::NoSuchJob)?;
        Ok(Reply::value(StatusCode::OK, &ended(&id, &row, self.gb_second)))
    }

    async fn known(&self, id: &JobName) -> Result<Option<KnownLife>, ApiError> {
        let lives = self.dispatcher.lives();
        let known = match id.job {
            Some(job) => lives.of(job).await,
            None => lives.of_foreign(&id.text).await,
        };
        known.map_err(|e| ApiError::backend("the result store", &e))
    }
}

/// A job id of this program, or one of the old controller.
struct JobName {
    job: Option<JobId>,
    /// As stored.
    text: String,
}

impl JobName {
    fn parse(raw: &str) -> Option<Self> {
        let job = JobId::parse(raw);
        // Both controllers store ids in lower case. Clients may have changed the case.
        let text = match job {
            Some(job) => job.to_string(),
            None => Uuid::try_parse(raw).ok()?.hyphenated().to_string(),
        };
        Some(Self { job, text })
    }
}

/// The row that a job gets whose row is not written yet.
fn unwritten(id: &JobName, known: KnownLife) -> Execution {
    let of = id.job.map_or_else(|| RowId::stored(String::new(), id.text.clone()), RowId::Job);
    let ending = known.outcome.unwrap_or_else(|| Outcome::lost(false)).into_read(ExecutionEnd::of).1;
    Execution::unwritten(of, known.function, ending).with_life(None, known.life)
}

/// An object without the members that are not known.
#[derive(Default)]
struct KnownMembers(Map<String, Value>);

impl KnownMembers {
    fn add(&mut self, name: &str, value: Option<impl Into<Value>>) {
        if let Some(value) = value {
            self.0.insert(name.to_owned(), value.into());
        }
    }

    fn add_time(&mut self, name: &str, at: Option<UnixMs>) {
        self.add(name, at.map(rfc3339_ms));
    }
}

/// The members that jobs in flight and ended jobs have.
fn common(id: &JobName, function: &FunctionId, status: &str, life: &RowLife) -> KnownMembers {
    let mut shown = KnownMembers::default();
    shown.add("requestId", Some(id.text.as_str()));
    shown.add("functionId", Some(function.as_str()));
    shown.add("status", Some(status));
    shown.add("node", id.job.map(|job| job.node().to_string()));
    shown.add("adopter", life.ended_by.map(|node| node.to_string()));
    shown.add("version", life.config_version);
    shown.add("key", life.key_name.as_deref());
    shown.add("workerId", life.worker_id.as_deref());
    shown.add("memoryMb", life.allocated_mb);
    shown.add("traceId", id.job.and_then(|job| life.trace_id(job)));
    shown
}

fn times(accepted: Option<String>, life: &RowLife) -> KnownMembers {
    let mut times = KnownMembers::default();
    times.add("accepted", accepted);
    times.add_time("sent", life.sent_at);
    times.add_time("confirmed", life.confirmed_at);
    times.add_time("started", life.started_at);
    times
}

fn accepted(id: &JobName) -> Option<String> {
    id.job.map(|job| rfc3339_ms(job.accepted_at()))
}

/// A job in flight.
fn pending(id: &JobName, known: &KnownLife) -> Value {
    let mut shown = common(id, &known.function, "pending", &known.life);
    shown.add("confirmed", known.is_unconfirmed.then_some(false));
    shown.add_time("deadline", known.deadline);
    shown.add("times", Some(times(accepted(id), &known.life).0));
    Value::Object(shown.0)
}

/// A job that has ended.
fn ended(id: &JobName, row: &Execution, gb_second: Option<f64>) -> Value {
    let life = &row.life;
    let mut shown = common(id, &row.function, row.status.as_str(), life);
    // A row has 0 for what the worker did not report.
    let duration_ms = (!row.is_lost()).then_some(row.duration_ms);
    shown.add("peakMemoryMb", (row.memory_mb > 0).then_some(row.memory_mb));
    shown.add("coldStart", row.cold_start);
    shown.add("durationMs", duration_ms.map(number));
    shown.add("handlerDurationMs", row.handler_duration_ms.map(number));
    shown.add("exitCode", life.exit_code);
    shown.add("cost", cost(life.allocated_mb, duration_ms, gb_second).map(number));
    let of_key = || Some(row.id.timestamp()).filter(|timestamp| !timestamp.is_empty());
    let mut times = times(accepted(id).or_else(of_key), life);
    times.add_time("resultHeard", row.completed_at);
    times.add_time("rowWritten", life.written_at);
    shown.add("times", Some(times.0));
    Value::Object(shown.0)
}

/// Memory in GB × duration in seconds × price.
fn cost(memory_mb: Option<u64>, duration_ms: Option<f64>, gb_second: Option<f64>) -> Option<f64> {
    Some(memory_mb? as f64 / MB_PER_GB * duration_ms? / 1000.0 * gb_second?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::NodeId;
    use serde_json::json;

    const AT: UnixMs = 1_795_305_600_123;

    fn name() -> JobName {
        JobName::parse(&JobId::new(NodeId(0xab), AT, 2).to_string()).unwrap()
    }

    fn function() -> FunctionId {
        FunctionId::parse("f").unwrap()
    }

    #[test]
    fn ids_of_both_controllers_are_read_in_any_case() {
        let id = JobId::new(NodeId(1), AT, 2);
        let ours = JobName::parse(&id.to_string().to_ascii_uppercase()).unwrap();
        assert_eq!((ours.job, ours.text), (Some(id), id.to_string()));
        let old = JobName::parse("67E55044-10B1-426F-9247-BB680E5FE0C8").unwrap();
        assert_eq!((old.job, &*old.text), (None, "67e55044-10b1-426f-9247-bb680e5fe0c8"));
        assert!(JobName::parse("no-job").is_none());
    }

    #[test]
    fn a_job_in_flight_shows_what_is_known() {
        let life = RowLife { sent_at: Some(AT + 1), key_name: Some("k".into()), ..RowLife::default() };
        let (function, deadline) = (function(), Some(AT + 1000));
        let mut known = KnownLife { function, outcome: None, deadline, is_unconfirmed: false, life };
        let expected = json!({
            "requestId": name().text, "functionId": "f", "status": "pending", "node": "000000ab", "key": "k",
            "deadline": "2026-11-22T00:00:01.123Z",
            "times": { "accepted": "2026-11-22T00:00:00.123Z", "sent": "2026-11-22T00:00:00.124Z" },
        });
        assert_eq!(pending(&name(), &known), expected);
        known.is_unconfirmed = true;
        assert_eq!(pending(&name(), &known)["confirmed"], false);
    }

    #[test]
    fn an_ended_job_shows_its_row_and_its_cost() {
        let outcome =
            Outcome::new(r#"{"status":"SUCCESS","durationMs":2000,"peakMemoryBytes":1048576}"#.into());
        let mut row = Execution::of(name().job.unwrap(), function(), &outcome.fields());
        row.completed_at = Some(AT + 3);
        row.life = RowLife::sample();
        let shown = ended(&name(), &row, Some(0.5));
        for (member, expected) in [
            ("status", json!("SUCCESS")),
            ("adopter", json!("000000ab")),
            ("version", json!(7)),
            ("memoryMb", json!(256)),
            ("peakMemoryMb", json!(1)),
            ("durationMs", json!(2000)),
            ("exitCode", json!(-3)),
            ("cost", json!(0.25)),
        ] {
            assert_eq!(shown[member], expected, "{member}");
        }
        assert_eq!(shown["times"]["rowWritten"], "2026-11-22T00:00:00.127Z");
        assert!(ended(&name(), &row, None).get("cost").is_none());
    }

    #[test]
    fn a_lost_job_has_no_duration() {
        let row = Execution::lost(name().job.unwrap(), function(), false);
        let shown = ended(&name(), &row, Some(1.0));
        assert_eq!(shown["status"], "LOST");
        assert!(["durationMs", "cost", "workerId"].iter().all(|absent| shown.get(absent).is_none()));
    }
}
