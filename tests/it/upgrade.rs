//! A second process takes over the port: no client notices.

use crate::harness::gateway::{Conf, run_to_end};
use crate::harness::http::{Conn, Request};
use crate::harness::platform::HELLO;
use crate::harness::process::{Scratch, free_port, listening_on};
use crate::harness::tls::{Authority, client, connect};
use crate::harness::{Gateway, Platform, SOON, Setup, eventually, join_all, spawn};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::sync::watch;

const STEADY_CLIENTS: usize = 6;
const ONE_SHOT_CLIENTS: usize = 2;

/// No job is refused because a busy machine makes the queue slow.
const NOTHING_IS_SHED: &str = "[overload]\nconfirm_target_ms = 0\n";

async fn start(state: &Scratch) -> Platform {
    let state_dir = state.path().to_str().expect("the path is UTF-8");
    let conf = Conf { limits: NOTHING_IS_SHED.into(), ..Conf::default() };
    Setup::serve().conf(conf).env("STATE_DIR", state_dir).start().await
}

/// Asks one request after the other, and gives the ids of what was accepted. Any failure is a panic.
async fn ask(
    addr: SocketAddr,
    key: String,
    keeps_alive: bool,
    stopped: watch::Receiver<bool>,
) -> Vec<String> {
    let mut ids = Vec::new();
    let mut conn = None;
    while !*stopped.borrow() {
        let run = Request::new(addr, "POST", "/run").described().header("x-api-key", &key);
        let run = run.json(&json!({ "functionId": HELLO, "inputData": ids.len() }));
        let run = if ids.len() % 2 == 0 { run.header("x-async", "true") } else { run };
        let mut used = match conn.take() {
            Some(conn) => conn,
            None => Conn::open(addr).await.expect("somebody listens"),
        };
        used.write(&run.to_bytes()).await.expect("the connection stands");
        let answer = used.answer(false).await.expect("an answer comes");
        run.check(&answer);
        let member = if ids.len() % 2 == 0 { "jobId" } else { "requestId" };
        let status = if ids.len() % 2 == 0 { 202 } else { 200 };
        ids.push(answer.clone().expect(status).json()[member].as_str().expect("an id").to_owned());
        // A client that is told so opens another one.
        let is_closed = answer.header("connection").is_some_and(|v| v.eq_ignore_ascii_case("close"));
        conn = (keeps_alive && !is_closed).then_some(used);
        tokio::time::sleep(Duration::from_millis(15)).await;
    }
    ids
}

async fn upgrade(platform: &mut Platform) {
    let successor = platform.fleet().start_successor().await;
    assert_eq!(successor.addr(), platform.gateway.addr());
    let old = std::mem::replace(&mut platform.gateway, successor);
    let status = old.ended(SOON).await;
    assert_eq!(status.code(), Some(0), "it ends by itself: {}", old.output().tail(30));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_upgrades_under_load_fail_no_request() {
    let state = Scratch::new("state");
    let mut platform = start(&state).await;
    let (stop, stopped) = watch::channel(false);
    let clients = (0..STEADY_CLIENTS + ONE_SHOT_CLIENTS).map(|n| {
        let (addr, key) = (platform.gateway.addr(), platform.gateway.key().to_owned());
        spawn(ask(addr, key, n < STEADY_CLIENTS, stopped.clone()))
    });
    let clients: Vec<_> = clients.collect();
    for _ in 0..2 {
        tokio::time::sleep(Duration::from_millis(500)).await;
        upgrade(&mut platform).await;
    }
    stop.send_replace(true);
    let ids: Vec<String> = join_all("the clients", SOON, clients).await.concat();
    assert!(ids.len() > 100, "{} requests", ids.len());

    platform.gateway.idle().await;
    let mut rows: BTreeMap<String, usize> = BTreeMap::new();
    for row in platform.fleet().cloud.wait_for_rows(HELLO, ids.len()).await {
        assert_eq!(row["status"]["S"], "SUCCESS", "{row}");
        *rows.entry(row["requestId"]["S"].as_str().expect("an id").to_owned()).or_default() += 1;
    }
    assert!(ids.iter().all(|id| rows.get(id) == Some(&1)), "each has its row");
    platform.finish().await;
}

/// A job of the one that goes is known to the one that comes, and who waits for it there is answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_and_waiting_clients_survive() {
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
    assert_eq!(old.ended(SOON).await.code(), Some(0));
    platform.fleet().cloud.wait_for_rows(HELLO, 1).await;
    platform.finish().await;
}

/// What cannot work takes nothing over; and where nobody runs, `--upgrade` just starts.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_successor_that_cannot_work_changes_nothing() {
    let state = Scratch::new("state");
    let state_dir = ("STATE_DIR".to_owned(), state.path().display().to_string());
    let platform = start(&state).await;
    let mut env = platform.fleet().gateway_env();
    env.push(("SQS_URL".into(), "http://127.0.0.1:9/000000000000/none".into()));
    env.push(("AWS_ENDPOINT_URL_SQS".into(), "http://127.0.0.1:9".into()));
    env.push(state_dir);
    let dir = Scratch::new("broken");
    let run =
        tokio::task::block_in_place(|| run_to_end(&["serve", "--upgrade"], &env, dir.path(), SOON, || {}));
    assert_eq!(run.code, Some(69), "{}", run.output);
    platform.gateway.run(HELLO, &json!(1)).send().await.expect(200);
    platform.gateway.idle().await;

    // As after SIGKILL: the socket is still there, and nobody waits at it.
    platform.gateway.signal(Signal::SIGKILL);
    platform.gateway.ended(SOON).await;
    let alone: Gateway = platform.fleet().start_successor().await;
    alone.run(HELLO, &json!(1)).send().await.expect(200);
    alone.finish().await;
}

/// As the kernel writes them.
const ANY: &str = "00000000";
const LOOPBACK: &str = "0100007F";
const ANY_V6: &str = "00000000000000000000000000000000";

/// What `server.toml` says of listening: `[listen] address`, and `[tls] address` and `port`.
fn server(listen: &str, tls: Option<(&str, u16)>) -> String {
    let tls = tls.map(|(address, port)| {
        format!("[tls]\naddress = \"{address}\"\nport = {port}\ncertificate = \"certificate.pem\"\nkey = \"key.pem\"\n")
    });
    format!("[listen]\naddress = \"{listen}\"\n{}", tls.unwrap_or_default())
}

/// Where anybody listens on these ports.
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
        let conf = Conf { server, files, limits: NOTHING_IS_SHED.into(), ..Conf::default() };
        let setup = Setup::serve().conf(conf).env("STATE_DIR", state_dir).env("PORT", &port.to_string());
        Self { platform: setup.start().await, authority, port, _state: state }
    }

    fn write(&self, server: &str) {
        std::fs::write(self.platform.conf_file("server.toml"), server).expect("the directory is writable");
    }

    async fn tls_is_served(&self, port: u16) {
        let addr = SocketAddr::from(([127, 0, 0, 1], port));
        connect(&client(&self.authority, &["http/1.1"], None), addr).await.expect("a handshake");
    }

    /// An upgrade that is refused: its exit code, and what it says. The one that runs goes on.
    async fn refused(&self, server: &str) -> (Option<i32>, String) {
        let before = std::fs::read_to_string(self.platform.conf_file("server.toml")).expect("readable");
        self.write(server);
        let (dir, conf) = (Scratch::new("refused"), self.platform.conf_dir());
        let args = ["serve", "--upgrade", "--conf", conf.to_str().expect("the path is UTF-8")];
        let env = self.platform.fleet().gateway_env();
        let run = tokio::task::block_in_place(|| run_to_end(&args, &env, dir.path(), SOON, || {}));
        self.write(&before);
        self.platform.gateway.run(HELLO, &json!(1)).send().await.expect(200);
        (run.code, run.stderr.join("\n"))
    }
}

/// Each row is an upgrade from the one above it, under load: what listens afterwards is what is configured,
/// and what has listened on a part of it before. No client of an address that stays notices.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sockets_are_taken_over_by_address() {
    let mut at = Listeners::start(server("0.0.0.0", None)).await;
    let (plain, tls, other_tls) = (at.port, free_port(), free_port());
    let (stop, stopped) = watch::channel(false);
    let clients = (0..4).map(|n| {
        let (addr, key) = (at.platform.gateway.addr(), at.platform.gateway.key().to_owned());
        spawn(ask(addr, key, n % 2 == 0, stopped.clone()))
    });
    let clients: Vec<_> = clients.collect();
    let on_plain = |addresses: &[&'static str]| vec![(plain, addresses.to_vec())];
    let with = |port: u16, address: &'static str| vec![(plain, vec![ANY]), (port, vec![address])];
    let steps = [
        ("the same again", server("0.0.0.0", None), on_plain(&[ANY])),
        ("TLS comes", server("0.0.0.0", Some(("0.0.0.0", tls))), with(tls, ANY)),
        ("its address is another one", server("0.0.0.0", Some(("127.0.0.1", tls))), with(tls, LOOPBACK)),
        (
            "its port is another one",
            server("0.0.0.0", Some(("127.0.0.1", other_tls))),
            with(other_tls, LOOPBACK),
        ),
        ("both families", server("::", Some(("127.0.0.1", other_tls))), {
            vec![(plain, vec![ANY, ANY_V6]), (other_tls, vec![LOOPBACK])]
        }),
        ("both families again, and TLS goes", server("::", None), on_plain(&[ANY, ANY_V6])),
        ("this machine only", server("127.0.0.1", None), on_plain(&[LOOPBACK])),
        ("everybody again", server("0.0.0.0", None), on_plain(&[ANY, LOOPBACK])),
        ("and once more", server("0.0.0.0", None), on_plain(&[ANY, LOOPBACK])),
        // What older versions listened on stays, and what is missing of it is bound beside it.
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
    }
    stop.send_replace(true);
    let ids: Vec<String> = join_all("the clients", SOON, clients).await.concat();
    assert!(ids.len() > 100, "{} requests", ids.len());
    at.platform.finish().await;
}

/// What cannot be listened on takes nothing over, and says why. So does nobody who asks at another port.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upgrade_that_cannot_listen_is_refused() {
    let at = Listeners::start(server("0.0.0.0", None)).await;
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
    let taken_port = taken.local_addr().expect("it is bound").port();
    let port = at.port;
    for (server, told) in [
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
        let (code, stderr) = at.refused(&server).await;
        assert_eq!(code, Some(78), "{stderr}");
        assert!(stderr.contains(&told), "{told}: {stderr}");
        assert_eq!(listening(&[port]), BTreeMap::from([(port, vec![ANY.to_owned()])]));
    }

    // Processes meet by PORT: with another one this is a second process, and says so.
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
