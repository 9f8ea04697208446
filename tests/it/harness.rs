//! Real parts on free loopback ports: Redis, the AWS emulator, the Python worker, gateways.
//!
//! A test takes a [`Setup`], starts a [`Platform`] from it, and ends with [`Platform::finish`], which asserts a
//! clean end: nothing waits, nothing is in flight, SIGTERM is answered with exit code 0. A test that fails shows
//! what its processes printed last. What is missing on the machine is a failure, never a skip.

pub mod aws;
pub mod client;
pub mod crowd;
pub mod description;
pub mod gateway;
pub mod http;
pub mod http2;
pub mod job;
pub mod keys;
pub mod link;
pub mod orders;
pub mod platform;
pub mod process;
pub mod proxy;
pub mod redis;
pub mod secure;
pub mod tls;
pub mod upload;
pub mod upstream;
pub mod wait;
pub mod worker;

pub use gateway::Gateway;
pub use platform::{Platform, Setup};
pub use wait::{SOON, eventually, join_all, spawn, within};

/// The only variable a child inherits.
pub fn path_env() -> Vec<(String, String)> {
    vec![("PATH".to_owned(), std::env::var("PATH").unwrap_or_default())]
}
