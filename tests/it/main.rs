//! Integration tests: real processes and real sockets. They are written from the contract, not from the code.
//!
//! Tests that both backends must pass are written once (see [`on_both_backends`]), and so are those that our
//! worker must pass on both (see [`on_both_workers`]).

/// Defines the tests `name::dev` and `name::serve` for each `async fn name(setup: Setup)`.
#[cfg(test)]
macro_rules! on_both_backends {
    ($($name:ident),+ $(,)?) => { $(
        mod $name {
            use crate::harness::{Setup, platform::Backend};

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn dev() {
                super::$name(Setup::new(Backend::Dev)).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn serve() {
                super::$name(Setup::new(Backend::Serve)).await;
            }
        }
    )+ };
}

/// Defines the tests `name::dev` and `name::fleet` for each `async fn name(setup: Setup)`: with the worker of
/// `dev`, and with `infra-controller worker` beside `serve`.
#[cfg(test)]
macro_rules! on_both_workers {
    ($($name:ident),+ $(,)?) => { $(
        mod $name {
            use crate::harness::{Setup, platform::Backend};

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn dev() {
                super::$name(Setup::new(Backend::Dev)).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn fleet() {
                super::$name(Setup::serve().own_worker()).await;
            }
        }
    )+ };
}

/// As [`on_both_backends`], and `name::fleet`: with `infra-controller worker` in place of the Python worker.
#[cfg(test)]
macro_rules! on_all_workers {
    ($($name:ident),+ $(,)?) => { $(
        mod $name {
            use crate::harness::{Setup, platform::Backend};

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn dev() {
                super::$name(Setup::new(Backend::Dev)).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn serve() {
                super::$name(Setup::serve().python_worker()).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn fleet() {
                super::$name(Setup::serve().own_worker()).await;
            }
        }
    )+ };
}

#[cfg(test)]
mod changes;
#[cfg(test)]
mod clients;
#[cfg(test)]
mod contract;
#[cfg(test)]
mod copies;
#[cfg(test)]
mod dashboards;
#[cfg(test)]
mod dead_letters;
#[cfg(test)]
mod deployment;
#[cfg(test)]
mod descriptors;
#[cfg(test)]
mod disk;
#[cfg(test)]
mod documents;
#[cfg(test)]
mod edge;
#[cfg(test)]
mod edge_clients;
#[cfg(test)]
mod events;
#[cfg(test)]
mod failover;
#[cfg(test)]
mod families;
#[cfg(test)]
mod faults;
#[cfg(test)]
mod fleet;
#[cfg(test)]
mod fleet_worker;
#[cfg(test)]
mod functions;
#[cfg(test)]
mod functions_run;
#[cfg(test)]
mod guard;
#[cfg(test)]
mod harness;
#[cfg(test)]
mod idempotency;
#[cfg(test)]
mod jobs;
#[cfg(test)]
mod journal;
#[cfg(test)]
mod keys;
#[cfg(test)]
mod limits;
#[cfg(test)]
mod load;
#[cfg(test)]
mod local_worker;
#[cfg(test)]
mod observe;
#[cfg(test)]
mod overload;
#[cfg(test)]
mod overview;
#[cfg(test)]
mod pages;
#[cfg(test)]
mod protocol;
#[cfg(test)]
mod reload;
#[cfg(test)]
mod results;
#[cfg(test)]
mod rows;
#[cfg(test)]
mod run;
#[cfg(test)]
mod sandboxed;
#[cfg(test)]
mod schema;
#[cfg(test)]
mod self_check;
#[cfg(test)]
mod setup;
#[cfg(test)]
mod shutdown;
#[cfg(test)]
mod start;
#[cfg(test)]
mod status;
#[cfg(test)]
mod tidy;
#[cfg(test)]
mod tls;
#[cfg(test)]
mod traces;
#[cfg(test)]
mod upgrade;
#[cfg(test)]
mod upstreams;
#[cfg(test)]
mod worker_documents;
#[cfg(test)]
mod worker_faults;
#[cfg(test)]
mod worker_soak;
#[cfg(test)]
mod workers;
