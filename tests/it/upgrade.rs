//! Upgrades: a second process takes over the sockets, and no request fails.

use crate::harness::gateway::{Conf, run_to_end};
use crate::harness::http::{Conn, Request};
use crate::harness::platform::HELLO;
use crate::harness::process::{Scratch, free_port, listening_on};
use crate::harness::tls::{Authority, client, connect};
use crate::harness::{Gateway, Platform, SOON, Setup, eventually, join_all, pause, spawn};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::task::JoinHandle;

const STEADY_CLIENTS: usize = 6;
const ONE_SHOT_CLIENTS: usize = 2;

async fn start(state: &Scratch) -> Platform {
    let state_dir = state.path().to_str().expect("the path is UTF-8");
    Setup::serve().conf(Conf::default()).env("STATE_DIR", state_dir).start().await
}

/// Clients that send one request after the other. They panic on any failure.
struct Clients {
    stop: watch::Sender<bool>,
    /// Number of answers of each client.
    answered: Arc<[AtomicUsize]>,
    tasks: Vec<JoinHandle<Vec<String>>>,
}

impl Clients {
    /// The first `steady` of `count` clients keep their connections. The others open one for each request.
    fn start(gateway: &Gateway, count: usize, steady: usize) -> Self {
        let (stop, stopped) = watch::channel(false);
        let answered: Arc<[AtomicUsize]> = (0..count).map(|_| AtomicUsize::new(0)).collect();
        let tasks = (0..count).map(|n| {
            let (addr, key) = (gateway.addr(), gateway.key().to_owned());
            spawn(ask(addr, key, n < steady, stopped.clone(), (n, Arc::clone(&answered))))
        });
        let tasks = tasks.collect();
        Self { stop, answered, tasks }
    }

    /// Waits until each client has an answer to a request that it has sent after this call.
    async fn wait_for_answers(&self) {
        let counts = || -> Vec<usize> { self.answered.iter().map(|n| n.load(Ordering::Relaxed)).collect() };
        let before = counts();
        eventually("an answer for each client", 3 * SOON, || async {
            // The first answer may belong to a request sent before.
            let has_two = counts().iter().zip(&before).all(|(now, before)| *now >= before + 2);
            // A client ends when it fails.
            let failed = self.tasks.iter().any(JoinHandle::is_finished);
            if has_two || failed { Ok(()) } else { Err(format!("{before:?}, {:?}", counts())) }
        })
        .await;
    }

    /// Returns the ids of all accepted jobs.
    async fn stop(self) -> Vec<String> {
        self.stop.send_replace(true);
        join_all("the clients", 3 * SOON, self.tasks).await.concat()
    }
}

/// During an upgrade a connection may be closed when it has been idle for this long. On a busy machine a
/// client may leave it idle for longer than [`PACE`].
const IDLE_MAX: Duration = Duration::from_secs(2);
/// Pause between two requests of a client.
const PACE: Duration = Duration::from_millis(15);

async fn ask(
    addr: SocketAddr,
    key: String,
    keeps_alive: bool,
    stopped: watch::Receiver<bool>,
    (number, answered): (usize, Arc<[AtomicUsize]>),
) -> Vec<String> {
    let mut ids = Vec::new();
    // The connection, and when its last request was sent.
    let mut kept: Option<(Conn, Instant)> = None;
    while !*stopped.borrow() {
        let run = Request::new(addr, "POST", "/run").described().header("x-api-key", &key);
        let run = run.json(&json!({ "functionId": HELLO, "inputData": ids.len() }));
        let is_async = ids.len() % 2 == 0;
        let run = if is_async { run.header("x-async", "true") } else { run };
        let (mut conn, used_at) = match kept.take() {
            Some((conn, used_at)) => (conn, Some(used_at)),
            None => (Conn::open(addr).await.expect("the gateway accepts connections"), None),
        };
        let sent_at = Instant::now();
        let answer = async {
            conn.write(&run.to_bytes()).await?;
            conn.answer(false).await
        };
        let answer = match answer.await {
            Ok(answer) => answer,
            // Retried on a new connection. If the job had run, there would be one row too many in the end.
            Err(_) if used_at.is_some_and(|used_at| used_at.elapsed() >= IDLE_MAX) => continue,
            Err(e) => panic!("a connection was closed before the answer: {e}"),
        };
        run.check(&answer);
        let (member, status) = if is_async { ("jobId", 202) } else { ("requestId", 200) };
        ids.push(answer.clone().expect(status).json()[member].as_str().expect("an id").to_owned());
        answered[number].fetch_add(1, Ordering::Relaxed);
        // The server may require a new connection.
        let is_closed = answer.header("connection").is_some_and(|v| v.eq_ignore_ascii_case("close"));
        kept = (keeps_alive && !is_closed).then_some((conn, sent_at));
        pause(PACE).await;
    }
    ids
}

async fn upgrade(platform: &mut Platform) {
    let successor = platform.fleet().start_successor().await;
    assert_eq!(successor.addr(), platform.gateway.addr());
    let old = std::mem::replace(&mut platform.gateway, successor);
    let status = old.wait_for_exit(3 * SOON).await;
    assert_eq!(status.code(), Some(0), "the old process does not exit cleanly: {}", old.output().tail(30));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_upgrades_under_load_fail_no_request() {
    let state = Scratch::new("state");
    let mut platform = start(&state).await;
    let clients = Clients::start(&platform.gateway, STEADY_CLIENTS + ONE_SHOT_CLIENTS, STEADY_CLIENTS);
    clients.wait_for_answers().await;
    for _ in 0..2 {
        upgrade(&mut platform).await;
        clients.wait_for_answers().await;
    }
    let ids = clients.stop().await;
    platform.gateway.wait_until_idle().await;
    let mut rows: BTreeMap<String, usize> = BTreeMap::new();
    for row in platform.fleet().cloud.wait_for_rows(HELLO, ids.len()).await {
        assert_eq!(row["status"]["S"], "SUCCESS", "{row}");
        *rows.entry(row["requestId"]["S"].as_str().expect("an id").to_owned()).or_default() += 1;
    }
    assert!(ids.iter().all(|id| rows.get(id) == Some(&1)), "a job has no row");
    platform.finish().await;
}

/// The new process knows the jobs of the old one, and clients that wait at the old one are answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_and_waiting_clients_survive_an_upgrade() {
    let state = Scratch::new("state");
    let state_dir = state.path().to_str().expect("the path is UTF-8");
    let mut platform = Setup::serve().no_worker().env("STATE_DIR", state_dir).start().await;
    let run = platform.gateway.run(HELLO, &json!(1));
    let client = spawn(async move { run.send().await });
    let (_, message) = platform.fleet().cloud.receive().await;
    let message: Value = serde_json::from_str(&message).expect("JSON");
    let id = message["requestId"].as_str().expect("an id").to_owned();
    let successor = platform.fleet().start_successor().await;
    let old = std::mem::replace(&mut platform.gateway, successor);
    let pending = platform.gateway.get(&format!("/status/{id}")).await.expect(200).json();
    assert_eq!(pending["status"], "pending");

    let result = format!(r#"{{"requestId":"{id}","status":"SUCCESS","stdout":"slow"}}"#);
    let redis = &platform.fleet().redis;
    redis.publish(&format!("result:{id}"), result.as_bytes()).await;
    redis.store_result(&id, result.as_bytes()).await;
    assert_eq!(client.await.expect("no panic").expect(200).text(), result);
    assert_eq!(platform.gateway.result_of(&id).await.text(), result);
    assert_eq!(old.wait_for_exit(SOON).await.code(), Some(0));
    platform.fleet().cloud.wait_for_rows(HELLO, 1).await;
    platform.finish().await;
}

/// Without a running process `--upgrade` is a plain start.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_that_fails_changes_nothing() {
    let state = Scratch::new("state");
    let state_dir = ("STATE_DIR".to_owned(), state.path().display().to_string());
    let platform = start(&state).await;
    let mut env = platform.fleet().gateway_env();
    env.push(("SQS_URL".into(), "http://127.0.0.1:9/000000000000/none".into()));
    env.push(("AWS_ENDPOINT_URL_SQS".into(), "http://127.0.0.1:9".into()));
    env.push(state_dir);
    let dir = Scratch::new("broken");
    let run = run_to_end(&["serve", "--upgrade"], &env, dir.path(), 2 * SOON).await;
    assert_eq!(run.code, Some(69), "{}", run.output);
    platform.gateway.run(HELLO, &json!(1)).send().await.expect(200);
    platform.gateway.wait_until_idle().await;

    // After SIGKILL the upgrade socket still exists, without a listener.
    platform.gateway.signal(Signal::SIGKILL);
    platform.gateway.wait_for_exit(SOON).await;
    let alone: Gateway = platform.fleet().start_successor().await;
    alone.run(HELLO, &json!(1)).send().await.expect(200);
    alone.finish().await;
}

/// Addresses in the hexadecimal form of the kernel.
const ANY: &str = "00000000";
const LOOPBACK: &str = "0100007F";
const ANY_V6: &str = "00000000000000000000000000000000";

/// A `server.toml` with `[listen] address`, and `[tls] address` and `port`.
fn server(listen: &str, tls: Option<(&str, u16)>) -> String {
    let tls = tls.map(|(address, port)| {
        format!(
            "[tls]\naddress = \"{address}\"\nport = {port}\n\
             certificate = \"certificate.pem\"\nkey = \"key.pem\"\n"
        )
    });
    format!("[listen]\naddress = \"{listen}\"\n{}", tls.unwrap_or_default())
}

/// The listening addresses of these ports.
fn listening(ports: &[u16]) -> BTreeMap<u16, Vec<String>> {
    let on = |port: u16| {
        let mut addresses = listening_on(port);
        addresses.sort();
        (port, addresses)
    };
    ports.iter().map(|port| on(*port)).filter(|(_, addresses)| !addresses.is_empty()).collect()
}

struct Listeners {
    platform: Platform,
    authority: Authority,
    port: u16,
    _state: Scratch,
}

impl Listeners {
    async fn start(server: String) -> Self {
        let (state, port, authority) = (Scratch::new("state"), free_port(), Authority::new());
        let state_dir = state.path().to_str().expect("the path is UTF-8");
        let identity = authority.issue("gateway.test");
        let files =
            vec![("certificate.pem".to_owned(), identity.certificate), ("key.pem".to_owned(), identity.key)];
        let conf = Conf { server, files, ..Conf::default() };
        let setup = Setup::serve().conf(conf).env("STATE_DIR", state_dir).env("PORT", &port.to_string());
        Self { platform: setup.start().await, authority, port, _state: state }
    }

    fn write(&self, server: &str) {
        self.platform.put_conf("server.toml", server);
    }

    async fn tls_is_served(&self, port: u16) {
        let addr = SocketAddr::from(([127, 0, 0, 1], port));
        connect(&client(&self.authority, &["http/1.1"], None), addr).await.expect("a handshake");
    }

    /// An upgrade that fails: its exit code and stderr. The running process must keep serving.
    async fn failed_upgrade(&self, server: &str) -> (Option<i32>, String) {
        let before = std::fs::read_to_string(self.platform.conf_file("server.toml")).expect("readable");
        self.write(server);
        let (dir, conf) = (Scratch::new("refused"), self.platform.conf_dir());
        let args = ["serve", "--upgrade", "--conf", conf.to_str().expect("the path is UTF-8")];
        let env = self.platform.fleet().gateway_env();
        let run = run_to_end(&args, &env, dir.path(), 2 * SOON).await;
        self.write(&before);
        self.platform.gateway.run(HELLO, &json!(1)).send().await.expect(200);
        (run.code, run.stderr.join("\n"))
    }
}

/// Each row is an upgrade from the row above, under load. Afterwards the configured addresses listen, and
/// sockets of before that are part of a new address. No request to a kept address fails.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sockets_are_taken_over_by_address() {
    let mut at = Listeners::start(server("0.0.0.0", None)).await;
    let (plain, tls, other_tls) = (at.port, free_port(), free_port());
    let clients = Clients::start(&at.platform.gateway, 4, 2);
    clients.wait_for_answers().await;
    let on_plain = |addresses: &[&'static str]| vec![(plain, addresses.to_vec())];
    let with = |port: u16, address: &'static str| vec![(plain, vec![ANY]), (port, vec![address])];
    let steps = [
        ("the same again", server("0.0.0.0", None), on_plain(&[ANY])),
        ("with TLS", server("0.0.0.0", Some(("0.0.0.0", tls))), with(tls, ANY)),
        ("TLS on another address", server("0.0.0.0", Some(("127.0.0.1", tls))), with(tls, LOOPBACK)),
        ("TLS on another port", server("0.0.0.0", Some(("127.0.0.1", other_tls))), with(other_tls, LOOPBACK)),
        ("both families", server("::", Some(("127.0.0.1", other_tls))), {
            vec![(plain, vec![ANY, ANY_V6]), (other_tls, vec![LOOPBACK])]
        }),
        ("both families, without TLS", server("::", None), on_plain(&[ANY, ANY_V6])),
        ("loopback only", server("127.0.0.1", None), on_plain(&[LOOPBACK])),
        ("all addresses", server("0.0.0.0", None), on_plain(&[ANY, LOOPBACK])),
        ("all addresses again", server("0.0.0.0", None), on_plain(&[ANY, LOOPBACK])),
        // A socket of an earlier version stays, and the missing part of the default is bound too.
        ("the default", String::new(), on_plain(&[ANY, ANY_V6, LOOPBACK])),
    ];
    for (what, server, expected) in steps {
        at.write(&server);
        upgrade(&mut at.platform).await;
        let expected: BTreeMap<u16, Vec<String>> = expected
            .into_iter()
            .map(|(port, on)| (port, on.into_iter().map(str::to_owned).collect()))
            .collect();
        eventually(what, SOON, || async {
            let found = listening(&[plain, tls, other_tls]);
            if found == expected { Ok(()) } else { Err(format!("{found:?} is not {expected:?}")) }
        })
        .await;
        for port in expected.keys().filter(|port| **port != plain) {
            at.tls_is_served(*port).await;
        }
        clients.wait_for_answers().await;
    }
    clients.stop().await;
    at.platform.finish().await;
}

/// A successor with another port takes nothing over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upgrade_that_cannot_listen_is_rejected() {
    let at = Listeners::start(server("0.0.0.0", None)).await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
    let taken_port = taken.local_addr().expect("it is bound").port();
    let port = at.port;
    for (server, error) in [
        (
            server("0.0.0.0", Some(("127.0.0.1", taken_port))),
            format!("cannot listen on 127.0.0.1:{taken_port}: "),
        ),
        (
            server("0.0.0.0", Some(("127.0.0.1", port))),
            format!("cannot listen on both 0.0.0.0:{port} and 127.0.0.1:{port}"),
        ),
        (server("192.0.2.1", None), format!("cannot listen on 192.0.2.1:{port}")),
    ] {
        let (code, stderr) = at.failed_upgrade(&server).await;
        assert_eq!(code, Some(78), "{stderr}");
        assert!(stderr.contains(&error), "{error}: {stderr}");
        assert_eq!(listening(&[port]), BTreeMap::from([(port, vec![ANY.to_owned()])]));
    }

    // Processes find each other by PORT. With another one this is a second node, with a warning.
    let other_port = free_port();
    let env = [("PORT".to_owned(), other_port.to_string())];
    let second = at.platform.fleet().start_successor_with(&env).await;
    let warned = second.log().into_iter().find(|line| line["other_ports"].is_string()).expect("a warning");
    assert_eq!(warned["other_ports"], port.to_string());
    for gateway in [&second, &at.platform.gateway] {
        gateway.run(HELLO, &json!(1)).send().await.expect(200);
    }
    second.finish().await;
    at.platform.finish().await;
}
