//! The sandbox of functions: what they see, use and reach.
//!
//! bubblewrap gives a program namespaces and a root of its own, and a seccomp filter. Control groups bound
//! its memory and processes. With the network `public`, slirp4netns connects its network namespace to the
//! internet, behind a packet filter. If the worker is root, each slot has a user id of its own.
//!
//! ```text
//! worker ── fork ── supervisor ── fork ── bwrap ── clone ── bwrap: process 1 ── fork ── program
//!   │                                       │                 │ waits for one byte
//!   └─ Fence::admit ←── id of process 1 ────┘                 │
//!        limits, network, then that byte ─────────────────────┘
//! ```
//!
//! Everything that a program must not see is absent, instead of forbidden: its root has only what
//! `bubblewrap.rs` lists. So `.env`, `~/.aws`, `conf/`, the data directory and other slots do not exist
//! there.

mod bubblewrap;
mod cgroup;
mod cgroup_tree;
mod child;
mod descriptors;
mod fence;
mod launcher;
mod obstacles;
mod packet_filter;
mod probe;
mod process_info;
mod seccomp;
#[cfg(test)]
mod tests;
mod uplink;
mod view;

pub use cgroup_tree::CgroupKind;
pub use child::ChildSetup;
pub(super) use child::lower;
pub use fence::Fence;
pub use launcher::Enclosed;
pub use probe::SandboxStatus;
pub use view::{FUNCTION_DIR, HOME_DIR, OUTPUT_DIR, SandboxSettings, TASKS_MAX, View};

use launcher::Launcher;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;

/// Encloses the programs of a worker.
#[derive(Debug)]
pub struct Sandbox {
    launcher: Launcher,
    status: SandboxStatus,
}

impl Sandbox {
    /// Finds out what works here by trial runs. Also removes the control groups of workers that have died.
    ///
    /// # Errors
    /// If the settings require a sandbox, and it does not work: a sentence that says what is missing, and
    /// what to install or set.
    pub async fn probe(settings: &SandboxSettings) -> Result<Self, String> {
        let (launcher, status) = probe::probe(settings).await?;
        Ok(Self { launcher, status })
    }

    /// What was found, for the log, `/health` and the metrics.
    pub fn status(&self) -> &SandboxStatus {
        &self.status
    }

    /// The command that runs `program` (its path on the host, and its arguments) in a new sandbox, with this
    /// environment and the usual variables that it lacks. The program inherits `control` as descriptor 3, and
    /// no other besides the first three.
    ///
    /// # Errors
    /// If the program is not below `/usr`, or the system has no room for another control group, pipe or
    /// file.
    pub fn enclose(
        &self,
        view: &View<'_>,
        program: &[OsString],
        env: &BTreeMap<String, String>,
        control: Option<OwnedFd>,
    ) -> io::Result<Enclosed> {
        self.launcher.enclose(view, program, env, control)
    }
}
