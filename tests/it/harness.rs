//! Real processes on free loopback ports: Redis, the AWS emulator, workers, gateways.
//!
//! A test builds a [`Setup`], starts a [`Platform`] from it, and ends with [`Platform::finish`], which
//! asserts a clean end: no waiters, no jobs in flight, exit code 0 on SIGTERM. A failing test prints the last
//! output of its processes. A missing program is a failure, never a skip.

pub mod aws;
pub mod aws_proxy;
pub mod client;
pub mod collector;
pub mod conf_lines;
pub mod description;
pub mod gateway;
pub mod hold;
pub mod http;
pub mod http2;
pub mod job;
pub mod leftovers;
pub mod load_clients;
pub mod messages;
pub mod own_worker;
pub mod platform;
pub mod process;
pub mod redis;
pub mod redis_proxy;
pub mod retrying_clients;
pub mod tls;
pub mod tls_gateway;
pub mod upload;
pub mod upstream;
pub mod wait;
pub mod worker;

pub use gateway::Gateway;
pub use platform::{Platform, Setup};
pub use wait::{SOON, eventually, join_all, pause, spawn, within};

/// The only variable that a child process inherits.
pub fn path_env() -> Vec<(String, String)> {
    vec![("PATH".to_owned(), std::env::var("PATH").unwrap_or_default())]
}
