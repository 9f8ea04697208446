//! Workers: they run jobs, publish results and store them, in the order of the worker protocol, and fail at
//! every step.

use super::network::detach;
use super::queue::Message;
use super::world::{Service, trace, true_ms, world};
use crate::backend::aws::simulation::{Command, Reply};
use crate::model::{JobId, Status, parse_rfc3339_ms};
use rand::Rng;
use serde_json::{Value, json};
use std::time::Duration;
use tokio::time::sleep;

/// How long a worker tries to store a result before it leaves the message to others.
const STORE_TRIES: u32 = 6;

/// Runs the workers until the run ends.
pub fn start() {
    let workers = world(|world| world.rng.random_range(1..=3));
    for _ in 0..workers {
        detach(async {
            loop {
                let pause = world(|world| world.millis(20..400));
                sleep(pause).await;
                let is_away = world(|world| world.outage(Service::Queue, None).is_some());
                while !is_away && let Some((number, message)) = world(|world| world.queue.receive()) {
                    detach(run(number, message));
                }
            }
        });
    }
}

/// How a job ends, as its id decides: each of its runs reports the same.
struct Ending {
    status: &'static str,
    duration_us: u64,
}

fn ending(request: u64, run: u64) -> Ending {
    let mixed = (request ^ (run << 32)).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 20;
    let status = match mixed % 8 {
        0 => Status::FAILED,
        1 => Status::TIMEOUT,
        _ => Status::SUCCESS,
    };
    Ending { status, duration_us: mixed % 5_000_000 }
}

async fn run(number: u64, message: Message) {
    let body: Value = serde_json::from_slice(&message.body).expect("a message is JSON");
    let request = body["input"]["n"].as_u64().expect("every request has a number");
    let deadline = body["deadline"].as_str().and_then(parse_rfc3339_ms).expect("a message has a deadline");
    let profile = world(|world| world.profile);
    let id = message.id;
    if deadline < true_ms() && world(|world| world.rng.random_bool(0.5)) {
        world(|world| world.queue.messages.remove(&number));
        return;
    }
    let is_silent = world(|world| world.truth.is_never_answered(request));
    let duration = world(|world| {
        if world.chance(profile.slow_workers) {
            world.bite("slow worker");
            return world.millis(1_000..60_000);
        }
        world.millis(1..300)
    });
    sleep(duration).await;
    if is_silent || world(|world| world.chance(profile.dead_workers)) {
        world(|world| world.bite("worker died before its result"));
        return;
    }
    let run = if profile.differing_results { world(|world| world.rng.random_range(0..4)) } else { 0 };
    let payload = result(id, &message, request, run);
    let payload = if world(|world| world.chance(profile.broken_results)) {
        world(|world| world.bite("broken result"));
        b"no JSON".to_vec()
    } else {
        payload
    };
    world(|world| world.truth.produced(id, &payload, false));
    publish(id, &payload, profile.lost_publications).await;
    if world(|world| world.chance(profile.dead_workers)) {
        world(|world| world.bite("worker died before it stored its result"));
        return;
    }
    if !store(id, &payload).await {
        return;
    }
    if world(|world| world.chance(profile.dead_workers)) {
        world(|world| world.bite("worker died before it deleted its message"));
        return;
    }
    world(|world| world.queue.messages.remove(&number));
}

fn result(id: JobId, message: &Message, request: u64, run: u64) -> Vec<u8> {
    let Ending { status, duration_us } = ending(request, run);
    let mut result = json!({
        "requestId": id.to_string(),
        "functionId": message.function.as_str(),
        "status": status,
        "exitCode": i32::from(status != Status::SUCCESS),
        "stdout": format!("{request}.{run}"),
        "stderr": "",
        "durationMs": duration_us as f64 / 1000.0,
    });
    if request.is_multiple_of(3) {
        result["handlerDurationMs"] = json!(duration_us as f64 / 2000.0);
        result["coldStart"] = json!(run.is_multiple_of(2));
    }
    if request.is_multiple_of(5) {
        result["recommendedMemoryMb"] = json!(64);
    }
    result.to_string().into_bytes()
}

async fn publish(id: JobId, payload: &[u8], lost: f64) {
    let pause = world(|world| world.millis(0..10));
    sleep(pause).await;
    let is_lost = world(|world| {
        let is_lost = world.chance(lost) || world.outage(Service::Redis, None).is_some();
        if is_lost {
            world.bite("publication lost");
        }
        is_lost
    });
    if !is_lost {
        trace(|| format!("published {id}"));
        world(|world| world.publish(&format!("result:{id}"), payload.to_vec()));
    }
}

/// Stores the copy of a result. Returns `false` if Redis did not take it.
async fn store(id: JobId, payload: &[u8]) -> bool {
    for _ in 0..STORE_TRIES {
        let pause = world(|world| world.millis(0..10));
        sleep(pause).await;
        if world(|world| world.outage(Service::Redis, None).is_none()) {
            trace(|| format!("stored {id}"));
            world(|world| {
                let words: [&[u8]; 4] = [b"SETEX", &format!("job:{id}").into_bytes(), b"3600", payload];
                let command: Command = words.iter().map(|word| word.to_vec()).collect();
                let replies = world.run_on_redis(&[command]);
                assert!(!matches!(replies[..], [Reply::Error { .. }]), "{replies:?}");
                world.truth.produced(id, payload, true);
            });
            return true;
        }
        sleep(Duration::from_secs(1)).await;
    }
    world(|world| world.bite("result not stored"));
    false
}
