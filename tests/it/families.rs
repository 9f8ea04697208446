//! IPv4 and IPv6.

use crate::harness::gateway::start_process;
use crate::harness::http::Request;
use crate::harness::platform::{Backend, HELLO, new_key};
use crate::harness::process::{Scratch, Stream, listening_on};
use crate::harness::{SOON, Setup, eventually};
use serde_json::json;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

on_both_backends!(ipv4_and_ipv6_clients_are_served);

/// Addresses in the hexadecimal form of the kernel.
const ANY_V6: &str = "00000000000000000000000000000000";
const LOOPBACK: &str = "0100007F";
const LOOPBACK_V6: &str = "00000000000000000000000001000000";

/// Needs a machine with IPv6.
async fn ipv4_and_ipv6_clients_are_served(setup: Setup) {
    let expected = match setup.backend {
        Backend::Serve => vec![ANY_V6],
        Backend::Dev => vec![LOOPBACK_V6, LOOPBACK],
    };
    let platform = setup.start().await;
    let gateway = &platform.gateway;
    let port = gateway.addr().port();
    let mut on = listening_on(port);
    on.sort();
    assert_eq!(on, expected);
    for ip in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
        let run = Request::new(SocketAddr::new(ip, port), "POST", "/run").header("x-api-key", gateway.key());
        let run = run.json(&json!({ "functionId": HELLO, "inputData": { "from": ip } }));
        let result = run.send().await.expect(200).json();
        assert!(result["stdout"].as_str().is_some_and(|text| text.contains(&ip.to_string())), "{result}");
        // The log has the address of the client, for either socket.
        let wrong = Request::new(SocketAddr::new(ip, port), "GET", "/functions").header("x-api-key", "wrong");
        wrong.send().await.expect(401);
        let seen = || async {
            let entries = gateway.get("/logs").await.expect(200).json();
            let entries = entries.as_array().cloned().unwrap_or_default();
            let found = entries.iter().any(|entry| entry["ip"] == ip.to_string());
            if found { Ok(()) } else { Err(format!("{entries:?}")) }
        };
        eventually(&format!("the wrong key of {ip}"), SOON, seen).await;
    }
    platform.finish().await;
}

/// For each form of the listen address.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_banner_shows_a_working_url() {
    for (listen, shown) in [
        (None, "http://localhost:"),
        (Some("127.0.0.1"), "http://127.0.0.1:"),
        (Some("::1"), "http://[::1]:"),
        (Some("::"), "http://localhost:"),
    ] {
        let dir = Scratch::new("banner");
        let mut args = vec!["dev", "--port", "0", "--data-dir", "data"];
        args.extend(listen.map(|address| ["--listen", address]).into_iter().flatten());
        let process = start_process(&args, &[("INFRA_API_KEY".into(), new_key())], dir.path());
        let url = eventually("the banner", SOON, || async {
            let lines = process.output().lines(Stream::Err);
            let url =
                lines.iter().find_map(|line| line.split_once("is ready: ").map(|(_, url)| url.to_owned()));
            url.ok_or_else(|| process.output().tail(20))
        })
        .await;
        let port: u16 =
            url.strip_prefix(shown).unwrap_or_else(|| panic!("{listen:?}: {url}")).parse().expect(&url);
        let ip = if listen == Some("::1") { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
        Request::new(SocketAddr::new(ip, port), "GET", "/livez").send().await.expect(200);
        process.kill();
    }
}
