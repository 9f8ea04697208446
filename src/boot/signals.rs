//! Signals of the process.
//!
//! The first SIGTERM or SIGINT starts the drain, the second one ends the process immediately. SIGHUP reloads
//! the configuration, except in `dev` without `--conf`, where it stops the process.

use std::io::Write;
use tokio::signal::unix::{Signal, SignalKind, signal};

pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// SIGHUP, if it stops the process: a terminal that is closed sends it.
    hangup: Option<Signal>,
}

/// SIGHUP as the request to reload the configuration. `None`: it stops the process instead.
pub struct ReloadSignals(Option<Signal>);

impl ReloadSignals {
    pub async fn next(&mut self) {
        heard(&mut self.0).await;
    }
}

impl Signals {
    /// Must be called inside a runtime, and early: from then on no signal ends the process by default.
    pub fn listen(hangup_ends: bool) -> std::io::Result<(Self, ReloadSignals)> {
        let hangup = signal(SignalKind::hangup())?;
        let (hangup, reloads) = if hangup_ends { (Some(hangup), None) } else { (None, Some(hangup)) };
        let terminate = signal(SignalKind::terminate())?;
        Ok((Self { terminate, interrupt: signal(SignalKind::interrupt())?, hangup }, ReloadSignals(reloads)))
    }

    /// Waits for the next signal, and returns its number.
    pub async fn next(&mut self) -> i32 {
        tokio::select! {
            _ = self.terminate.recv() => SignalKind::terminate().as_raw_value(),
            _ = self.interrupt.recv() => SignalKind::interrupt().as_raw_value(),
            () = heard(&mut self.hangup) => SignalKind::hangup().as_raw_value(),
        }
    }

    /// Ends the process at the next signal, whatever it does.
    pub async fn exit_on_next(mut self) {
        let signal = self.next().await;
        // Standard error may be closed.
        let _ = writeln!(std::io::stderr(), "infra-controller: second signal, exiting at once");
        crate::log::finish();
        std::process::exit(128 + signal);
    }
}

async fn heard(signal: &mut Option<Signal>) {
    match signal {
        Some(signal) => drop(signal.recv().await),
        None => std::future::pending().await,
    }
}
