//! One running node: connect, listen, serve, drain.
//!
//! Pingora's own shutdown sleeps for a fixed grace period and then drops its tasks. Here the node drains
//! itself step by step, and only then lets Pingora return: see [`Node::drain`].

use super::accept::{Acceptor, ReservedDescriptors};
use super::build::{Background, Built, ListenerParts};
use super::disk::StateDirMonitor;
use super::plan::{Connect, ConnectedBackend, Exit, NodePlan, NodeSettings, explain};
use super::signals::Signals;
use super::sockets::{BoundSockets, Socket, Transport, heritage, listening};
use super::upgrade::Handover;
use super::upgrade::SocketOffer;
use super::{notify, process};
use crate::boot::plan::BackendLoop;
use crate::config::Conf;
use crate::engine::RunningEngine;
use crate::fleet::Adopter;
use crate::gateway::GuardState;
use crate::lifecycle::{Lifecycle, Phase};
use crate::model::NodeId;
use async_trait::async_trait;
use pingora::proxy::http_proxy;
use pingora::server::configuration::ServerConf;
use pingora::server::{ListenFds, RunArgs, Server, ShutdownSignal, ShutdownSignalWatch, ShutdownWatch};
use pingora::services::Service;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

/// Time after the drain deadline to answer the clients that still wait.
const CLOSING_MAX: Duration = Duration::from_secs(5);
/// How long connections are served after a successor has taken over. Each response closes its connection, so
/// the client reconnects to the successor. Connections that are still idle afterwards are closed.
const HANDED_OVER_LINGER: Duration = Duration::from_secs(2);

/// Runs a node until a signal, a successor or an internal error stops it.
pub fn run(plan: NodePlan) -> Exit {
    process::prepare();
    let threads = match plan.settings.conf.listen.threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        n => n,
    };
    let conf = ServerConf {
        daemon: false, // Pingora would fork after boot and lose every thread
        threads,
        work_stealing: true,
        grace_period_seconds: Some(0),
        graceful_shutdown_timeout_seconds: Some(0),
        ..ServerConf::default()
    };
    let mut server = Server::new_with_opt_and_conf(None, conf);
    let (done, is_done) = watch::channel(None);
    let server_conf = Arc::clone(&server.configuration);
    server.add_service(Node { plan: Some(plan), server_conf, done });
    server.run(RunArgs { shutdown_signal: Box::new(Done(is_done.clone())) });
    let exit = *is_done.borrow();
    exit.unwrap_or(Exit::Internal)
}

/// Lets Pingora return once the node is done.
struct Done(watch::Receiver<Option<Exit>>);

#[async_trait]
impl ShutdownSignalWatch for Done {
    async fn recv(&self) -> ShutdownSignal {
        // A dropped sender means that the service panicked, so there is nothing left to wait for.
        let _ = self.0.clone().wait_for(Option::is_some).await;
        ShutdownSignal::FastShutdown
    }
}

struct Node {
    plan: Option<NodePlan>,
    server_conf: Arc<ServerConf>,
    done: watch::Sender<Option<Exit>>,
}

#[async_trait]
impl Service for Node {
    async fn start_service(&mut self, _: Option<ListenFds>, _: ShutdownWatch, _: usize) {
        let exit = match self.plan.take() {
            Some(plan) => self.live(plan).await,
            None => Exit::Internal,
        };
        self.done.send_replace(Some(exit));
    }

    fn name(&self) -> &str {
        "node"
    }
}

impl Node {
    async fn live(&self, plan: NodePlan) -> Exit {
        let NodePlan { settings, connect: connect_backend } = plan;
        let at_a_terminal = settings.banner.is_some();
        let hangup_ends = at_a_terminal && settings.source.dir.is_none();
        let (mut signals, hangups) = match Signals::listen(hangup_ends) {
            Ok(signals) => signals,
            Err(e) => {
                eprintln!("infra-controller: cannot listen for signals: {e}");
                return Exit::Internal;
            }
        };
        let connected = match connect(connect_backend, &mut signals).await {
            Ok(connected) => connected,
            Err(exit) => return exit,
        };

        let lifecycle = Lifecycle::default();
        let mut built = match Built::new(&settings, hangups, &connected, &lifecycle) {
            Ok(built) => built,
            Err(e) => {
                eprintln!("infra-controller: {e:#}");
                return Exit::Internal;
            }
        };
        if let Err(exit) = restore(&mut built.background.engine.adopter).await {
            return exit;
        }
        let BoundSockets { sockets, heir } = match listening(&settings).await {
            Ok(listening) => listening,
            Err(exit) => return exit,
        };
        let heritage = heritage(&settings, &sockets);
        let bound: Vec<SocketAddr> = sockets.iter().map(|socket| socket.bound).collect();

        let stop = StopCause::default();
        let acceptors = match self.acceptors(built.door, sockets, &stop) {
            Ok(acceptors) => acceptors,
            Err(e) => return no_acceptor(&e),
        };
        let disk =
            StateDirMonitor { claim: connected.claim.clone(), rows: built.background.engine.disk.clone() };
        let mut loops = Loops::start(built.background, disk, connected.extra_loop);
        let listeners = acceptors.into_iter().map(|acceptor| spawn(acceptor.run())).collect();
        lifecycle.enter(Phase::Ready);
        if let Some(claim) = &connected.claim {
            claim.keep();
        }
        if let Some(heir) = heir {
            notify_predecessor(heir).await;
        }
        notify::ready();
        report_start(connected.node, &bound, &settings);

        let exit = tokio::select! {
            signal = signals.next() => {
                tracing::info!(signal, "Stopping");
                Exit::Ok
            }
            () = taken(heritage) => {
                tracing::info!("Stopping, because a successor has taken over");
                stop.linger.send_replace(HANDED_OVER_LINGER);
                Exit::Ok
            }
            () = loops.any_ended() => Exit::Internal,
        };
        loops.exit_on_second(signals);
        Self::drain(&settings.conf, &lifecycle, loops, &stop, listeners).await;
        tracing::info!("Stopped");
        exit
    }

    /// Builds an accept loop for each bound socket.
    fn acceptors(
        &self,
        door: ListenerParts,
        sockets: Vec<Socket>,
        stop: &StopCause,
    ) -> io::Result<Vec<Acceptor>> {
        let ListenerParts { gateway, edge, http2, metrics } = door;
        let spares = Arc::new(ReservedDescriptors::new(Arc::clone(&metrics)));
        let proxy = http_proxy(&self.server_conf, gateway);
        let guarded = Arc::new(GuardState::new(proxy, edge, &http2, metrics));
        let (plain, tls) = (Arc::new(guarded.plain()), guarded.tls().map(Arc::new));
        let mut acceptors = Vec::new();
        for Socket { listener, bound, speaks } in sockets {
            let guard = match speaks {
                Transport::Plain => Arc::clone(&plain),
                Transport::Tls => {
                    tracing::info!(port = bound.port(), "Listening for TLS");
                    // A TLS socket exists only if the settings have TLS, and then the guard exists too.
                    Arc::clone(tls.as_ref().ok_or(io::ErrorKind::InvalidInput)?)
                }
            };
            listener.set_nonblocking(true)?;
            acceptors.push(Acceptor {
                listener: TcpListener::from_std(listener)?,
                guard,
                spares: Arc::clone(&spares),
                stopped: stop.now.subscribe(),
                linger: stop.linger.subscribe(),
            });
        }
        Ok(acceptors)
    }

    /// In this order: report not ready; close the listeners; let requests in flight finish; answer the
    /// clients that still wait; send the accepted jobs; write the rows.
    async fn drain(
        conf: &Conf,
        lifecycle: &Lifecycle,
        mut loops: Loops,
        stop: &StopCause,
        listeners: Vec<JoinHandle<()>>,
    ) {
        lifecycle.enter(Phase::Draining);
        notify::stopping();
        // A successor serves new connections already, so no load balancer has to notice first.
        let handed_over = !stop.linger.borrow().is_zero();
        if !handed_over {
            tokio::time::sleep(Duration::from_millis(conf.shutdown.lame_duck_ms)).await;
        }
        stop.now.send_replace(true);
        // The accept loops end and close idle connections. Connections with a request stay open.
        for listener in listeners {
            let _ = listener.await;
        }
        let drain = Duration::from_secs(conf.shutdown.drain_timeout_s);
        if tokio::time::timeout(drain, lifecycle.idle()).await.is_err() {
            tracing::warn!(
                requests = lifecycle.requests_in_flight(),
                "Drain deadline passed; clients that still wait are answered now"
            );
        }
        lifecycle.enter(Phase::Closing);
        let _ = tokio::time::timeout(CLOSING_MAX, lifecycle.idle()).await;
        loops.stop().await;
    }
}

fn no_acceptor(error: &io::Error) -> Exit {
    eprintln!("infra-controller: connections cannot be accepted: {error}");
    Exit::Internal
}

fn report_start(node: NodeId, bound: &[SocketAddr], settings: &NodeSettings) {
    let port = bound.first().map_or(settings.port, SocketAddr::port);
    let addresses = bound.iter().map(SocketAddr::to_string).collect::<Vec<_>>().join(", ");
    tracing::info!(port, addresses, node = %node, "Infra Controller v{} Started", env!("CARGO_PKG_VERSION"));
    if let Some(banner) = &settings.banner {
        let is_localhost = settings.listen_beside.is_some();
        let url = url(settings.conf.listen.address, port, is_localhost);
        eprintln!("{}", banner.replace("{url}", &url));
    }
}

/// URL of the server for a client on this machine. IPv6 addresses are in brackets (RFC 3986).
fn url(listen: IpAddr, port: u16, is_localhost: bool) -> String {
    if is_localhost || listen.is_unspecified() {
        return format!("http://localhost:{port}");
    }
    format!("http://{}", SocketAddr::new(listen, port))
}

/// Resumes the jobs that an earlier process of this node left unfinished.
async fn restore(members: &mut Adopter) -> Result<(), Exit> {
    match members.begin().await {
        Ok(0) => Ok(()),
        Ok(jobs) => {
            tracing::info!(jobs, "Unfinished jobs restored");
            Ok(())
        }
        Err(e) => {
            eprintln!("infra-controller: the unfinished jobs of this node cannot be read: {e}");
            Err(if e.is_transient() { Exit::Unavailable } else { Exit::Config })
        }
    }
}

/// Stops the listeners, and sets how long their connections may stay.
struct StopCause {
    now: watch::Sender<bool>,
    linger: watch::Sender<Duration>,
}

impl Default for StopCause {
    fn default() -> Self {
        Self { now: watch::Sender::new(false), linger: watch::Sender::new(Duration::ZERO) }
    }
}

async fn taken(heritage: Option<SocketOffer>) {
    match heritage {
        Some(heritage) => heritage.taken().await,
        None => std::future::pending().await,
    }
}

/// Connects, unless a signal arrives first.
async fn connect(connect: Connect, signals: &mut Signals) -> Result<ConnectedBackend, Exit> {
    let connected = tokio::select! {
        connected = connect() => connected.map_err(|problems| explain(&problems))?,
        _ = signals.next() => return Err(Exit::Ok),
    };
    for warning in &connected.warnings {
        tracing::warn!(warning, "Warning at start");
    }
    Ok(connected)
}

/// Notifies the process whose sockets were taken over that this process serves.
async fn notify_predecessor(heir: Handover) {
    if let Err(e) = heir.serves().await {
        tracing::warn!(
            error = %e,
            "Predecessor not notified; it may serve beside this process. Stop it if it does not exit"
        );
    }
}

/// The background loops.
struct Loops {
    engine: RunningEngine,
    /// Loops of the process around the engine. They never end by themselves.
    endless: JoinSet<()>,
    stop_extra: watch::Sender<bool>,
    extra: Option<JoinHandle<()>>,
    stop_export: watch::Sender<bool>,
    export: Option<JoinHandle<()>>,
}

impl Loops {
    fn start(background: Background, disk: StateDirMonitor, extra: Option<BackendLoop>) -> Self {
        let Background { engine, reload, tending, summaries, worker, traces, export } = background;
        let (stop_extra, extra_stopped) = watch::channel(false);
        let (stop_export, export_stopped) = watch::channel(false);
        let mut endless = JoinSet::new();
        endless.spawn(reload.run());
        endless.spawn(tending.run());
        endless.spawn(summaries.run());
        endless.spawn(disk.run());
        let engine = engine.start();
        let extra = extra.zip(worker).map(|(run, metrics)| spawn(run(extra_stopped, metrics, traces)));
        let export = export.map(|export| spawn(export.run(turned(export_stopped))));
        Self { engine, endless, stop_extra, extra, stop_export, export }
    }

    /// Resolves when a loop has ended that should not end. It has panicked.
    async fn any_ended(&mut self) {
        tokio::select! {
            _ = self.endless.join_next() => {
                tracing::error!("A background loop ended unexpectedly; the process stops");
            }
            () = self.engine.any_ended() => {}
        }
    }

    /// From now on, a signal ends the process immediately.
    fn exit_on_second(&mut self, signals: Signals) {
        self.endless.spawn(signals.exit_on_next());
    }

    async fn stop(&mut self) {
        // The local worker first: it runs jobs during the drain, and their results must still be written.
        self.stop_extra.send_replace(true);
        if let Some(extra) = self.extra.take() {
            let _ = extra.await;
        }
        self.engine.stop().await;
        // After everything that records spans. It has a deadline of its own.
        self.stop_export.send_replace(true);
        if let Some(export) = self.export.take() {
            let _ = export.await;
        }
        // Last, because the task that waits for a second signal is one of them.
        self.endless.shutdown().await;
    }
}

async fn turned(mut watch: watch::Receiver<bool>) {
    // A dropped sender means that the node is gone.
    let _ = watch.wait_for(|stop| *stop).await;
}

#[expect(clippy::disallowed_methods, reason = "the one place where the loops of a node are started")]
fn spawn(task: impl Future<Output = ()> + Send + 'static) -> JoinHandle<()> {
    tokio::spawn(task)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_of_both_address_families() {
        for (listen, is_localhost, expected) in [
            ("127.0.0.1", true, "http://localhost:8080"),
            ("127.0.0.1", false, "http://127.0.0.1:8080"),
            ("0.0.0.0", false, "http://localhost:8080"),
            ("::", false, "http://localhost:8080"),
            ("::1", false, "http://[::1]:8080"),
            ("2001:db8:0:1::", false, "http://[2001:db8:0:1::]:8080"),
        ] {
            assert_eq!(url(listen.parse().unwrap(), 8080, is_localhost), expected, "{listen}");
        }
    }
}
