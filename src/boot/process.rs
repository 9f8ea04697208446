//! What a serving process asks of the kernel for itself.

use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Called before the first request. What is refused is logged: the process works without it, only less well.
pub fn prepare() {
    // The kernel clears a huge page (and a virtual machine gets it from its host) while the thread that touched it
    // waits, and everybody with it: 7 ms were measured, at every few megabytes of growth.
    if let Err(error) = prctl::set_thp_disable(true) {
        tracing::warn!(%error, "Huge Pages Not Turned Off");
    }
    // Each connection is an open file, and many systems start a process with a limit of 1,024.
    if let Err(error) = raise_to_hard_limit(Resource::RLIMIT_NOFILE) {
        tracing::warn!(%error, "Limit Of Open Files Not Raised");
    }
}

fn raise_to_hard_limit(resource: Resource) -> nix::Result<()> {
    let (soft, hard) = getrlimit(resource)?;
    if soft < hard {
        setrlimit(resource, hard, hard)?;
    }
    Ok(())
}
