//! The lower bound: bare Pingora, which answers every request with one fixed 202, immediately or after a
//! wait.
//!
//! The cost of the gateway is given as a ratio to this one, on as many connections and after the same wait. A
//! wait costs one more wake-up than an immediate answer.

use async_trait::async_trait;
use clap::Parser;
use http::Response;
use infra_controller::log;
use pingora::apps::http_app::ServeHttp;
use pingora::listeners::ListenerConfig;
use pingora::protocols::http::ServerSession;
use pingora::protocols::l4::stream::L4BufferSettings;
use pingora::server::Server;
use pingora::server::configuration::ServerConf;
use pingora::services::listening::Service;
use std::net::SocketAddr;
use std::time::Duration;

/// Mean delay of a timer, as in the stand-in for AWS: timers tick in whole milliseconds, and `epoll` waits
/// for whole ones.
const LATE: Duration = Duration::from_micros(1500);
const BODY: &str = r#"{"status":"ACCEPTED","jobId":"00000000-0000-8000-8000-000000000000"}"#;

#[derive(Parser)]
struct Args {
    #[arg(long)]
    listen: SocketAddr,
    /// Time from the request to the answer.
    #[arg(long, default_value_t = 0)]
    wait_ms: u64,
    /// Write one log line a request, as the gateway does.
    #[arg(long)]
    log: bool,
}

struct Bare {
    wait: Duration,
    log: bool,
}

#[async_trait]
impl ServeHttp for Bare {
    async fn response(&self, session: &mut ServerSession) -> Response<Vec<u8>> {
        while let Ok(Some(_)) = session.read_request_body().await {}
        if !self.wait.is_zero() {
            tokio::time::sleep(self.wait.saturating_sub(LATE)).await;
        }
        if self.log {
            tracing::info!(
                target: "infra_controller", // the filter drops other targets
                requestId = "00000000-0000-8000-8000-000000000000",
                functionId = "fn-0",
                mode = "ASYNC",
                "Run Request"
            );
        }
        let mut response = Response::new(BODY.as_bytes().to_vec());
        *response.status_mut() = http::StatusCode::ACCEPTED;
        let headers = response.headers_mut();
        headers.insert("content-type", http::HeaderValue::from_static("application/json; charset=utf-8"));
        headers.insert("content-length", http::HeaderValue::from(BODY.len()));
        response
    }
}

fn main() {
    let args = Args::parse();
    let _log = log::start();
    let conf = ServerConf {
        threads: 1,
        grace_period_seconds: Some(0),
        graceful_shutdown_timeout_seconds: Some(0),
        ..ServerConf::default()
    };
    let mut server = Server::new_with_opt_and_conf(None, conf);
    let app = Bare { wait: Duration::from_millis(args.wait_ms), log: args.log };
    let mut service = Service::new("bare".to_owned(), app);
    // As the gateway sets them.
    let buffers = L4BufferSettings::new(8192, 4096);
    service.add_listener(ListenerConfig::tcp(args.listen.to_string()).l4_buffer(buffers));
    server.add_service(service);
    server.run_forever();
}
