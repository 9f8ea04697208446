//! Live events: what watchers get, how they continue, and how their streams end.

use crate::harness::conf_lines::key_lines;
use crate::harness::gateway::Conf;
use crate::harness::http::{Message, Request};
use crate::harness::platform::HELLO;
use crate::harness::{Gateway, SOON, Setup, within};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

on_both_backends!(
    events_follow_jobs_functions_and_workers,
    watchers_continue_where_they_were,
    places_are_bounded_and_freed,
    a_key_sees_its_functions_only,
    a_drain_ends_streams,
);

const WATCHERS: &str = "infra_event_watchers";

/// A client of `/events`.
struct EventReader {
    stream: TcpStream,
    head: Message,
    /// Received chunks that are not complete.
    raw: Vec<u8>,
    text: String,
    /// The body is complete.
    has_ended: bool,
}

impl EventReader {
    async fn open(gateway: &Gateway, target: &str) -> Self {
        Self::of(gateway.request("GET", target)).await
    }

    async fn after(gateway: &Gateway, id: &str) -> Self {
        Self::of(gateway.request("GET", "/events").header("last-event-id", id)).await
    }

    async fn of(request: Request) -> Self {
        let mut stream = TcpStream::connect(request.addr()).await.expect("the gateway accepts");
        stream.write_all(&request.to_bytes()).await.expect("the gateway reads");
        let mut raw = Vec::new();
        let end = loop {
            if let Some(end) = raw.windows(4).position(|window| window == b"\r\n\r\n") {
                break end;
            }
            let read = within("the head", SOON, stream.read_buf(&mut raw)).await.expect("an answer");
            assert!(read > 0, "closed: {}", String::from_utf8_lossy(&raw));
        };
        let head: Vec<u8> = raw.drain(..end + 4).take(end).collect();
        let head = Message::of_head(std::str::from_utf8(&head).expect("ASCII")).expect("a head");
        assert_eq!(head.status().expect("a status"), 200, "{head:?} {}", String::from_utf8_lossy(&raw));
        Self { stream, head, raw, text: String::new(), has_ended: false }
    }

    /// Moves complete chunks to the text.
    fn decode(&mut self) {
        while let Some(end) = self.raw.windows(2).position(|window| window == b"\r\n") {
            let size = std::str::from_utf8(&self.raw[..end]).expect("ASCII");
            let size = usize::from_str_radix(size, 16).expect("the size of a chunk");
            if self.raw.len() < end + size + 4 {
                return;
            }
            let chunk: Vec<u8> = self.raw.drain(..end + size + 4).skip(end + 2).take(size).collect();
            self.text += std::str::from_utf8(&chunk).expect("UTF-8");
            self.has_ended |= size == 0;
        }
    }

    /// Reads more. `false`: the connection is closed.
    async fn read(&mut self) -> bool {
        let read = self.stream.read_buf(&mut self.raw).await.unwrap_or(0);
        self.decode();
        read > 0
    }

    /// Reads until the text has `wanted`.
    async fn until(&mut self, wanted: &str) {
        let found = async {
            while !self.text.contains(wanted) {
                assert!(self.read().await && !self.has_ended, "no {wanted:?} in {}", self.text);
            }
        };
        within(wanted, 3 * SOON, found).await;
    }

    /// Reads up to the end of the body.
    async fn end(&mut self) {
        let ended = async {
            while !self.has_ended {
                assert!(self.read().await, "cut off after {}", self.text);
            }
        };
        within("the end of the stream", SOON, ended).await;
    }

    /// The events so far: id and data.
    fn events(&self) -> Vec<(String, Value)> {
        let message = |message: &str| {
            let field = |name: &str| message.lines().find_map(|line| line.strip_prefix(name));
            let data = serde_json::from_str(field("data: ")?).expect("data is JSON");
            Some((field("id: ").expect("an event has an id").to_owned(), data))
        };
        self.text.split("\n\n").filter_map(message).collect()
    }

    fn types(&self) -> Vec<String> {
        let name = |(_, data): &(String, Value)| data["type"].as_str().expect("a type").to_owned();
        self.events().iter().map(name).collect()
    }

    /// The id of the last message.
    fn last_id(&self) -> String {
        let last = self.text.lines().filter_map(|line| line.strip_prefix("id: ")).next_back();
        last.expect("a message with an id").to_owned()
    }
}

/// Creates functions until the node publishes: it may not know yet that somebody watches. Returns the last.
async fn changed(publisher: &Gateway, reader: &mut EventReader) -> String {
    for _ in 0..100 {
        let id = publisher.upload("x").await;
        let seen = async {
            while !reader.text.contains(&id) {
                assert!(reader.read().await, "closed: {}", reader.text);
            }
        };
        if tokio::time::timeout(Duration::from_secs(2), seen).await.is_ok() {
            return id;
        }
    }
    panic!("no event of a change: {}", reader.text);
}

async fn events_follow_jobs_functions_and_workers(setup: Setup) {
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let mut all = EventReader::open(gateway, "/api/events/").await;
    assert_eq!(all.head.header("content-type"), Some("text/event-stream"));
    assert_eq!(all.head.header("cache-control"), Some("no-store"));
    assert_eq!(all.head.header("x-accel-buffering"), Some("no"));
    assert_eq!(all.head.header("content-length"), None);
    all.until("retry: ").await;
    let mut deleted = EventReader::open(gateway, "/events?type=function.deleted,job.lost").await;
    let mut failed = EventReader::open(gateway, "/events?status=FAILED&functionId=hello").await;

    let run = gateway.run(HELLO, &json!(1)).send().await.expect(200).json();
    let job = run["requestId"].as_str().expect("an id");
    all.until("job.finished").await;
    let of_job: Vec<Value> =
        all.events().into_iter().map(|(_, data)| data).filter(|data| data["requestId"] == job).collect();
    assert_eq!((&of_job[0]["type"], &of_job[0]["functionId"]), (&json!("job.accepted"), &json!(HELLO)));
    assert_eq!((&of_job[1]["type"], &of_job[1]["status"]), (&json!("job.finished"), &json!("SUCCESS")));
    assert!(of_job[1]["durationMs"].is_number() && of_job[1]["node"].is_string(), "{of_job:?}");

    let id = gateway.upload("x").await;
    all.until("function.changed").await;
    gateway.request("DELETE", &format!("/functions/{id}")).send().await.expect(200);
    all.until("function.deleted").await;
    deleted.until(&id).await;
    assert_eq!(deleted.types(), ["function.deleted"]);
    for (status, wanted) in [("healthy", "worker.joined"), ("busy", ""), ("draining", "worker.left")] {
        let beat = json!({ "workerId": "w-1", "status": status });
        gateway.request("POST", "/worker/heartbeat").json(&beat).send().await.expect(200);
        all.until(wanted).await;
    }
    let of_worker = all.types().iter().filter(|name| name.starts_with("worker.")).count();
    assert_eq!(of_worker, 2, "{:?}", all.types());
    let left = all.events().pop().expect("events").1;
    assert_eq!((&left["workerId"], &left["reason"]), (&json!("w-1"), &json!("stopped")));
    let ids: Vec<String> = all.events().into_iter().map(|(id, _)| id).collect();
    assert!(ids.windows(2).all(|two| two[0] != two[1]), "{ids:?}");

    // The ordinary run is not in it; a later event of all proves that it would be.
    assert_eq!(failed.types(), [""; 0]);
    failed.until("retry: ").await;
    gateway.wait_for_metric(WATCHERS, 3.0).await;
    drop((all, deleted, failed));
    gateway.wait_for_metric(WATCHERS, 0.0).await;
    platform.finish().await;
}

async fn watchers_continue_where_they_were(setup: Setup) {
    let platform = setup.no_worker().start().await;
    let gateway = &platform.gateway;
    let mut one = EventReader::open(gateway, "/events").await;
    let first = changed(gateway, &mut one).await;
    let seen = one.last_id();
    drop(one);
    let (second, third) = (gateway.upload("x").await, gateway.upload("x").await);
    let mut again = EventReader::after(gateway, &seen).await;
    again.until(&third).await;
    let fourth = gateway.upload("x").await;
    again.until(&fourth).await;
    let ids: Vec<Value> = again.events().into_iter().map(|(_, data)| data["functionId"].clone()).collect();
    assert_eq!(ids, [json!(second), json!(third), json!(fourth)], "each once, in order");
    assert!(!again.text.contains(&first) && !again.text.contains("resync"), "{}", again.text);

    for unknown in ["1-1", "99999999999999-0", "x"] {
        let mut late = EventReader::after(gateway, unknown).await;
        let fifth = changed(gateway, &mut late).await;
        assert_eq!(late.types()[0], "resync", "{unknown}");
        assert!(late.text.contains(&fifth));
    }
    drop(again);
    platform.finish().await;
}

/// A node that was never watched before continues the stream of another one.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watchers_continue_on_another_node() {
    let platform = Setup::serve().no_worker().start().await;
    let one = &platform.gateway;
    let two = platform.fleet().start_gateway().await;
    let mut reader = EventReader::open(one, "/events").await;
    changed(one, &mut reader).await;
    // From now on both publish.
    changed(&two, &mut reader).await;
    let (seen, known) = (reader.last_id(), reader.events().len());
    let mut made = Vec::new();
    for n in 0..10 {
        made.push(if n % 2 == 0 { one } else { &two }.upload("x").await);
    }
    let mut other = EventReader::after(&two, &seen).await;
    for id in &made {
        reader.until(id).await;
        other.until(id).await;
    }
    let shown = |reader: &EventReader, skipped: usize| -> Vec<(String, Value)> {
        let is_change = |event: &(String, Value)| event.1["type"] == "function.changed";
        reader.events().into_iter().skip(skipped).filter(is_change).collect()
    };
    assert_eq!(shown(&reader, known), shown(&other, 0), "the same events with the same ids");
    assert_eq!(shown(&other, 0).len(), made.len());

    two.signal(Signal::SIGTERM);
    reader.until("node.left").await;
    other.end().await;
    two.wait_for_exit(2 * SOON).await;
    drop(reader);
    platform.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn watchers_are_told_that_redis_has_lost_its_data() {
    let mut platform = Setup::serve().no_worker().start().await;
    let mut reader = EventReader::open(&platform.gateway, "/events").await;
    changed(&platform.gateway, &mut reader).await;
    platform.fleet_mut().redis.restart().await;
    reader.until("resync").await;
    changed(&platform.gateway, &mut reader).await;
    drop(reader);
    platform.gateway.wait_for_health("Redis is back", |status, _| status == 200).await;
    platform.finish().await;
}

async fn places_are_bounded_and_freed(setup: Setup) {
    let server = "[events]\nwatchers_max = 2\nheartbeat_s = 1\n".to_owned();
    let platform = setup.no_worker().conf(Conf { server, ..Conf::default() }).start().await;
    let gateway = &platform.gateway;
    let mut one = EventReader::open(gateway, "/events").await;
    let two = EventReader::open(gateway, "/events").await;
    // A comment, without an id.
    one.until("\n\n:\n\n").await;
    let full = gateway.get("/events").await.expect_problem(503);
    assert_eq!((full.json()["code"].as_str(), full.need("retry-after")), (Some("overloaded"), "1"));
    drop(two);
    gateway.wait_for_metric(WATCHERS, 1.0).await;
    let head = gateway.request("HEAD", "/events").send().await.expect(200);
    assert_eq!((head.need("content-type"), head.body().len()), ("text/event-stream", 0));
    gateway.wait_for_metric(WATCHERS, 1.0).await;
    for bad in ["type=job", "type=job.lost,", "functionId=a%20b", "key=x", "status="] {
        let problem = gateway.get(&format!("/events?{bad}")).await.expect_problem(400).json();
        assert_eq!(problem["code"], "invalid_request", "{bad}");
    }
    drop(one);
    platform.finish().await;
}

async fn a_key_sees_its_functions_only(setup: Setup) {
    const NARROW: &str = "a-key-that-may-see-one-function";
    let keys = key_lines("narrow", NARROW, &["read"]) + "functions = [\"hello\"]\n";
    let platform = setup.conf(Conf { keys: keys.clone(), ..Conf::default() }).start().await;
    let gateway = &platform.gateway;
    let of_key = || Request::new(gateway.addr(), "GET", "/events").header("x-api-key", NARROW);
    let mut narrow = EventReader::of(of_key()).await;
    let mut all = EventReader::open(gateway, "/events").await;
    let hidden = changed(gateway, &mut all).await;
    gateway.run(HELLO, &json!(1)).send().await.expect(200);
    narrow.until("job.finished").await;
    all.until("job.finished").await;
    assert!(!narrow.text.contains(&hidden) && !narrow.text.contains("function."), "{}", narrow.text);
    // The key may see another function, so its stream ends.
    platform.put_conf("keys.toml", &keys.replace("\"hello\"", "\"other\""));
    narrow.end().await;
    gateway.wait_for_metric("infra_event_watchers_dropped_total{reason=\"key\"}", 1.0).await;
    drop(all);
    platform.finish().await;
}

async fn a_drain_ends_streams(setup: Setup) {
    let platform = setup.no_worker().start().await;
    let mut readers = Vec::new();
    for target in ["/events", "/api/events"] {
        readers.push(EventReader::open(&platform.gateway, target).await);
    }
    // A client that reads nothing must not hold up the drain.
    let _frozen = EventReader::open(&platform.gateway, "/events").await;
    let ended = async {
        for reader in &mut readers {
            reader.end().await;
        }
    };
    tokio::join!(platform.stop(), ended);
}

/// A slow client loses its place, and nobody waits for it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frozen_watcher_is_dropped_while_another_goes_on() {
    let platform = Setup::serve().no_worker().start().await;
    let gateway = &platform.gateway;
    let mut healthy = EventReader::open(gateway, "/events").await;
    let socket = TcpSocket::new_v4().expect("a socket");
    socket.set_recv_buffer_size(4096).expect("a small buffer");
    let mut frozen = socket.connect(gateway.addr()).await.expect("the gateway accepts");
    frozen.write_all(&gateway.request("GET", "/events").to_bytes()).await.expect("the gateway reads");
    gateway.wait_for_metric(WATCHERS, 2.0).await;
    // Events of another node, large enough to fill the buffers of the kernel soon.
    let redis = &platform.fleet().redis;
    let stream = format!("events:{{{}}}", platform.fleet().cloud.logs_table);
    let padding = "x".repeat(60_000);
    let dropped = "infra_event_watchers_dropped_total{reason=\"slow\"}";
    for n in 0.. {
        assert!(n < 500, "the frozen watcher is not dropped");
        let body = format!(r#"{{"type":"job.accepted","functionId":"f-{n}","padding":"{padding}"}}"#);
        for _ in 0..4 {
            redis.command(&[b"XADD", stream.as_bytes(), b"*", b"e", body.as_bytes()]).await;
        }
        healthy.until(&format!("\"f-{n}\"")).await;
        healthy.text.clear();
        if gateway.metric(dropped).await == Some(1.0) {
            break;
        }
    }
    gateway.wait_for_metric(WATCHERS, 1.0).await;
    changed(gateway, &mut healthy).await;
    drop((healthy, frozen));
    platform.finish().await;
}
