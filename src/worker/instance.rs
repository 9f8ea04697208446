//! One process of a function, in its sandbox, with all that belongs to it.
//!
//! An instance is created by [`super::instance_start`], and does one of two things: it runs a program to its
//! end ([`super::script_run`]), or it serves events ([`super::handler_process`]).

use super::code_cache::CachedCode;
use super::control::ControlSocket;
use super::message::ProcessPaths;
use super::output::OutputPipes;
use super::runtime::ProcessEnv;
use super::sandbox::Fence;
use super::slot_dir::SlotDir;
use super::slot_number::SlotNumber;
use super::supervised::SupervisedChild;
use crate::ambient;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::time::timeout;

/// How long a process that is not needed any more has to end by itself.
const FAREWELL_MAX: Duration = Duration::from_secs(1);
/// How long the end of a killed process is waited for. Its supervisor gives up before that.
const REAP_MAX: Duration = Duration::from_secs(60);

/// Where an instance runs: a number, and a directory on the host. Deleted on drop, which blocks.
pub(super) struct InstancePlace {
    pub(super) dir: SlotDir,
    // Dropped after the directory, so that nobody else uses it meanwhile.
    pub(super) number: SlotNumber,
    /// Generations of processes between the supervisor and the program, which belong to the sandbox.
    pub(super) sandbox_levels: u32,
    /// The files of the process, as it sees them.
    pub(super) paths: Arc<ProcessPaths>,
}

/// A running process. On drop it is killed, and its place is cleaned up and freed in the background.
pub(super) struct Instance {
    /// `None`: it has none, or the process was told all that it needs.
    pub(super) control: Option<ControlSocket>,
    pub(super) pipes: OutputPipes,
    pub(super) process: InstanceProcess,
    /// The environment with which it was started, without the variables of its bootstrap program.
    pub(super) env: ProcessEnv,
}

/// The process of an instance. Killed and cleaned up on drop.
pub(super) struct InstanceProcess {
    /// `None` only during the drop.
    held: Option<HeldProcess>,
    farewell: Duration,
}

struct HeldProcess {
    child: SupervisedChild,
    /// `None` while it is admitted.
    fence: Option<Fence>,
    place: InstancePlace,
    /// The code that it has. The cache keeps code that is in use.
    code: Option<CachedCode>,
}

impl InstanceProcess {
    pub(super) fn new(
        child: SupervisedChild,
        fence: Fence,
        place: InstancePlace,
        code: Option<CachedCode>,
    ) -> Self {
        let held = HeldProcess { child, fence: Some(fence), place, code };
        Self { held: Some(held), farewell: Duration::ZERO }
    }

    fn held(&self) -> &HeldProcess {
        self.held.as_ref().expect("it is there until the drop")
    }

    fn held_mut(&mut self) -> &mut HeldProcess {
        self.held.as_mut().expect("it is there until the drop")
    }

    pub(super) fn child(&mut self) -> &mut SupervisedChild {
        &mut self.held_mut().child
    }

    /// Keeps the code of the process in the cache as long as the process lives.
    pub(super) fn hold(&mut self, code: CachedCode) {
        self.held_mut().code = Some(code);
    }

    /// Asks for the end of the process and all that it has started.
    pub(super) fn kill(&self) {
        self.held().child.kill();
    }

    /// `None` if it was never admitted.
    pub(super) fn fence(&self) -> Option<&Fence> {
        self.held().fence.as_ref()
    }

    pub(super) fn paths(&self) -> Arc<ProcessPaths> {
        Arc::clone(&self.held().place.paths)
    }

    /// The directory on the host that the process has as its code.
    pub(super) fn function_dir(&self) -> PathBuf {
        self.held().place.dir.function()
    }

    pub(super) fn sandbox_levels(&self) -> u32 {
        self.held().place.sandbox_levels
    }

    /// The `/tmp` of the process; see [`Fence::tmp_dir`].
    pub(super) fn tmp_dir(&self) -> io::Result<File> {
        self.fence().ok_or_else(|| io::Error::other("the process was not admitted"))?.tmp_dir()
    }

    /// Lets the program start, when its sandbox is set up.
    ///
    /// # Errors
    /// Then the program never runs.
    pub(super) async fn admit(&mut self) -> io::Result<()> {
        let Some(mut fence) = self.held_mut().fence.take() else { return Ok(()) };
        let (fence, admitted) = ambient::blocking(move || {
            let admitted = fence.admit();
            (fence, admitted)
        })
        .await;
        let held = self.held_mut();
        held.fence = Some(fence);
        if admitted.is_err() {
            held.child.kill();
        }
        admitted
    }
}

impl Instance {
    /// Ends a process that is not needed any more. It has a moment to do so by itself.
    pub(super) fn dismiss(mut self) {
        // The end of the control socket tells it.
        self.control = None;
        self.process.farewell = FAREWELL_MAX;
    }

    /// Whether the process still waits for its next request.
    pub(super) fn is_quiet(&self) -> bool {
        self.control.as_ref().is_some_and(ControlSocket::is_quiet)
    }
}

impl Drop for InstanceProcess {
    fn drop(&mut self) {
        let Some(held) = self.held.take() else { return };
        if self.farewell.is_zero() {
            held.child.kill();
        }
        // Without a runtime, this process ends, and its supervisors with it.
        if Handle::try_current().is_ok() {
            #[expect(
                clippy::disallowed_methods,
                reason = "one task for each place, whose number is bounded"
            )]
            ambient::spawn(held.end(self.farewell));
        }
    }
}

impl HeldProcess {
    /// Waits for the end of all processes. Then cleans up and frees the place.
    async fn end(mut self, farewell: Duration) {
        if !farewell.is_zero() {
            let _ = timeout(farewell, self.child.exit()).await;
            self.child.kill();
        }
        match timeout(REAP_MAX, self.child.exit()).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::warn!(%error, "The end of a function's process is not known"),
            Err(_) => tracing::error!("A function's process cannot be killed: it hangs in the kernel"),
        }
        let Self { child, fence, place, code } = self;
        ambient::blocking(move || {
            // In this order: the control group, then the directory, then the number.
            drop((child, fence));
            drop((place, code));
        })
        .await;
    }
}
