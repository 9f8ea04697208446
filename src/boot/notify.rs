//! Reports the state of the process to a service manager: systemd with `Type=notify` or `notify-reload`.
//!
//! Without `NOTIFY_SOCKET` in the environment each call does nothing. A message that cannot be sent is logged
//! and does not stop the process.
//!
//! `MAINPID` is never sent. A successor (`serve --upgrade`) is the main process of its own unit, an instance
//! beside that of its predecessor. In one unit an upgrade is not possible: systemd stops the whole unit when
//! its main process exits.

use sd_notify::NotifyState;

/// The process takes traffic, or has taken its new settings.
pub fn ready() {
    send(&[NotifyState::Ready]);
}

/// The process reads its settings again. [`ready`] ends it.
pub fn reloading() {
    // systemd 253 and later compare the time with that of their SIGHUP.
    match NotifyState::monotonic_usec_now() {
        Ok(now) => send(&[NotifyState::Reloading, now]),
        Err(_) => send(&[NotifyState::Reloading]),
    }
}

/// The process drains. From now on TimeoutStopSec counts.
pub fn stopping() {
    send(&[NotifyState::Stopping]);
}

fn send(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, "The service manager was not notified; check NOTIFY_SOCKET and NotifyAccess");
    }
}
