//! SIGTERM and SIGINT: the first asks the process to stop, the second makes it. SIGHUP: the configuration is read again.

use tokio::signal::unix::{Signal, SignalKind, signal};

pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// If it ends the process too: that is how a terminal that is closed says so.
    hangup: Option<Signal>,
}

/// Those that ask for the configuration to be read again.
pub struct Hangups(Option<Signal>);

impl Hangups {
    pub async fn next(&mut self) {
        heard(&mut self.0).await;
    }
}

impl Signals {
    /// Must be called inside a runtime, and early: from now on none of them ends the process by itself.
    pub fn listen(hangup_ends: bool) -> std::io::Result<(Self, Hangups)> {
        let hangup = signal(SignalKind::hangup())?;
        let (hangup, reloads) = if hangup_ends { (Some(hangup), None) } else { (None, Some(hangup)) };
        let terminate = signal(SignalKind::terminate())?;
        Ok((Self { terminate, interrupt: signal(SignalKind::interrupt())?, hangup }, Hangups(reloads)))
    }

    /// The next signal, as its number.
    pub async fn next(&mut self) -> i32 {
        tokio::select! {
            _ = self.terminate.recv() => SignalKind::terminate().as_raw_value(),
            _ = self.interrupt.recv() => SignalKind::interrupt().as_raw_value(),
            () = heard(&mut self.hangup) => SignalKind::hangup().as_raw_value(),
        }
    }
}

async fn heard(signal: &mut Option<Signal>) {
    match signal {
        Some(signal) => drop(signal.recv().await),
        None => std::future::pending().await,
    }
}
