//! Clients: they run functions with and without idempotency keys, wait or not, disconnect, and repeat.

use super::checks;
use super::network::detach;
use super::process::{LiveNode, spawn_in};
use super::truth::{Request, RequestKind};
use super::world::{elapsed_us, trace, world};
use crate::dispatch::SubmitError;
use crate::functions::FunctionChange;
use crate::lifecycle::Phase;
use crate::limiter::RateLimitState;
use crate::model::{ConfigAction, FunctionId, JobId, Outcome, RunRequest};
use crate::runs::{RunError, RunOrder, RunOutcome};
use rand::Rng;
use rand::seq::IndexedRandom;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};

/// The longest wait that a client asks for, in seconds.
const WAIT_S_MAX: u64 = 20;
/// A request is answered this long after its wait at the latest, unless its process is stopped or ends.
const ANSWERED_WITHIN: Duration = Duration::from_secs(60);
/// How often a client repeats a request with a key.
const REPEATS_MAX: u32 = 8;

/// What a client learns.
#[derive(Debug)]
enum Answer {
    Accepted(JobId),
    Finished(Option<JobId>, Outcome),
    Recorded(JobId),
    StillRunning(JobId),
    /// No job is on the queue.
    #[expect(dead_code, reason = "the trace shows it")]
    Denied(String),
    /// The job may be on the queue.
    #[expect(dead_code, reason = "the trace shows it")]
    Unclear(String),
    ConnectionLost,
}

impl Answer {
    /// The job that it names.
    fn id(&self) -> Option<JobId> {
        match self {
            Self::Accepted(id) | Self::Recorded(id) | Self::StillRunning(id) => Some(*id),
            Self::Finished(id, _) => *id,
            Self::Denied(_) | Self::Unclear(_) | Self::ConnectionLost => None,
        }
    }
}

/// Sends the requests of a run until `end`.
pub fn start(end: Instant, requests: usize) {
    detach(async move {
        let pause_max = world(|world| world.profile.seconds * 2000 / requests as u64).max(2);
        for _ in 0..requests {
            sleep(world(|world| world.millis(0..pause_max))).await;
            if Instant::now() >= end {
                return;
            }
            let number = new_request();
            let clients = world(|world| match world.truth.requests[number].key {
                Some(_) if world.rng.random_bool(0.3) => 2,
                _ => 1,
            });
            for _ in 0..clients {
                detach(client(number));
            }
        }
    });
    detach(async move {
        while Instant::now() < end {
            sleep(world(|world| world.millis(500..8000))).await;
            detach(resize());
        }
    });
}

fn new_request() -> usize {
    world(|world| {
        let number = world.truth.requests.len();
        let functions: Vec<FunctionId> = world.tables.functions.keys().cloned().collect();
        let function = functions.choose(&mut world.rng).expect("there are functions").clone();
        let has_key = world.rng.random_bool(0.4);
        let kind = match world.rng.random_range(0..20) {
            0 => RequestKind::NeverAnswered,
            1 => RequestKind::RefusedByQueue,
            _ => RequestKind::Usual,
        };
        world.truth.requests.push(Request {
            key: has_key.then(|| format!("key-{number}")),
            function,
            is_async: world.rng.random_bool(0.5),
            kind,
            ids: std::collections::BTreeSet::new(),
            is_denied: true,
            answers: 0,
        });
        number
    })
}

async fn client(number: usize) {
    let request = world(|world| world.truth.requests[number].clone());
    for attempt in 0..REPEATS_MAX {
        let node = world(|world| {
            let serving = world.processes.serving();
            serving.choose(&mut world.rng).cloned()
        });
        let Some(node) = node else {
            sleep(Duration::from_secs(1)).await;
            continue;
        };
        let answer = ask(&node, number, &request).await;
        trace(|| format!("request {number} at p{}: {answer:?}", node.process.0));
        checks::bounds(&node);
        drop(node);
        note(number, &answer);
        let is_final = matches!(answer, Answer::Accepted(_) | Answer::Finished(..) | Answer::Recorded(_));
        let again =
            request.key.is_some() && (!is_final || attempt == 0 && world(|world| world.rng.random_bool(0.3)));
        if !again {
            return;
        }
        sleep(world(|world| world.millis(50..6000))).await;
    }
}

/// Makes a request of a process, as its edge does.
async fn ask(node: &Arc<LiveNode>, number: usize, request: &Request) -> Answer {
    let (wait_s, patience) = world(|world| {
        let wait_s = world.rng.random_range(0..WAIT_S_MAX);
        let disconnects = world.rng.random_bool(0.1);
        let patience = match disconnects {
            true => world.millis(1..3000),
            false => Duration::from_secs(wait_s) + ANSWERED_WITHIN,
        };
        (wait_s, patience)
    });
    let is_patient = patience >= ANSWERED_WITHIN;
    let (answer, answered) = oneshot::channel();
    let (served, request) = (Arc::clone(node), request.clone());
    let task = spawn_in(node.process, async move {
        let _ = answer.send(handle(&served, number, &request, wait_s).await);
    });
    match timeout(patience, answered).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(_)) => Answer::ConnectionLost,
        Err(_) => {
            // The edge drops the future of a client that has left.
            task.abort();
            let was_stopped = world(|world| world.bites.contains_key("process stopped"));
            if is_patient && !was_stopped {
                world(|world| {
                    world.truth.violated(format!("request {number} was not answered in {patience:?}"));
                });
            }
            Answer::ConnectionLost
        }
    }
}

async fn handle(node: &LiveNode, number: usize, request: &Request, wait_s: u64) -> Answer {
    let _counted = node.lifecycle.request();
    if node.lifecycle.phase() != Phase::Ready {
        return Answer::Denied("not ready".into());
    }
    let caller: Arc<str> = "key".into();
    let mut counted = RateLimitState::default();
    let limited = node.engine.limiter.check("/run", Some(&caller), || None, &mut counted).await;
    if limited.is_err() {
        return Answer::Denied("limited".into());
    }
    world(|world| world.truth.passed.push(elapsed_us()));
    if node.engine.runs.admit().is_err() {
        return Answer::Denied("shed".into());
    }
    let body = format!("{{\"functionId\":\"{}\",\"inputData\":{{\"n\":{number}}}}}", request.function);
    let parsed = RunRequest::parse(body.as_bytes()).expect("a valid request");
    let order = RunOrder {
        request: &parsed,
        body: body.as_bytes(),
        idempotency_key: Ok(request.key.as_deref()),
        caller: None,
        counted: &counted,
        traceparent: None,
        tracestate: None,
        request_trace: None,
        is_async: request.is_async,
        wait_s: Some(wait_s),
    };
    match node.engine.runs.run(&order).await {
        Ok(RunOutcome::Accepted(id)) => Answer::Accepted(id),
        Ok(RunOutcome::Finished(outcome)) => {
            let id = serde_json::from_slice::<serde_json::Value>(outcome.published()).ok();
            let id = id.and_then(|result| JobId::parse(result["requestId"].as_str()?));
            Answer::Finished(id, outcome)
        }
        Ok(RunOutcome::Recorded(id, _)) => Answer::Recorded(id),
        Ok(RunOutcome::StillRunning(id)) => Answer::StillRunning(id),
        Err(error) => denied_or_unclear(error),
    }
}

fn denied_or_unclear(error: RunError) -> Answer {
    match error {
        RunError::Submit(SubmitError::Unknown) | RunError::AttemptUnresolved => {
            Answer::Unclear(format!("{error:?}"))
        }
        _ => Answer::Denied(format!("{error:?}")),
    }
}

/// Checks an answer against what really happened.
fn note(number: usize, answer: &Answer) {
    world(|world| {
        let truth = &mut world.truth;
        truth.requests[number].answers += 1;
        let is_of_another =
            |id: &JobId| truth.on_queue.get(id).is_some_and(|request| *request != number as u64);
        if answer.id().is_some_and(|id| is_of_another(&id)) {
            truth.violated(format!("request {number} got a job of another request: {answer:?}"));
        }
        let id = match answer {
            Answer::Denied(_) => None,
            Answer::Unclear(_) | Answer::ConnectionLost => {
                truth.requests[number].is_denied = false;
                None
            }
            Answer::Accepted(id) => {
                if !truth.on_queue.contains_key(id) {
                    truth.violated(format!("request {number}: {id} is accepted and not on the queue"));
                }
                Some(*id)
            }
            Answer::Finished(id, outcome) => {
                let is_own = |id: &JobId| truth.has_result(*id, outcome.published());
                let is_known = match id {
                    Some(id) => is_own(id),
                    // A result that is no JSON, or none at all.
                    None => {
                        let of = |(_, request): &(&JobId, &u64)| **request == number as u64;
                        outcome.is_lost() || truth.on_queue.iter().filter(of).any(|(id, _)| is_own(id))
                    }
                };
                if !is_known {
                    truth.violated(format!("request {number}: a result that nobody produced"));
                }
                *id
            }
            Answer::Recorded(id) | Answer::StillRunning(id) => Some(*id),
        };
        if let Some(id) = id {
            truth.requests[number].is_denied = false;
            truth.requests[number].ids.insert(id);
            truth.accepted.insert(id, number as u64);
        }
        if matches!(answer, Answer::Finished(None, _)) {
            truth.requests[number].is_denied = false;
        }
    });
}

/// An operator resizes a function through one of the nodes.
async fn resize() {
    let Some((node, function)) = world(|world| {
        let serving = world.processes.serving();
        let functions: Vec<FunctionId> = world.tables.functions.keys().cloned().collect();
        Some((serving.choose(&mut world.rng)?.clone(), functions.choose(&mut world.rng)?.clone()))
    }) else {
        return;
    };
    let process = node.process;
    spawn_in(process, async move {
        let memory_mb = Some(world(|world| world.rng.random_range(1..8) * 128));
        let decide = |_: &crate::model::Function| {
            Ok::<_, ()>(FunctionChange { memory_mb, ..FunctionChange::default() })
        };
        let changed = node.engine.editor.change("tuner", &function, ConfigAction::Update, None, decide).await;
        trace(|| format!("resize of {function} at p{}: {}", process.0, changed.is_ok()));
    });
}
