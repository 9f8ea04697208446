//! Kernel settings of a serving process: huge pages off, and the limit of open files raised.

use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Must be called before the first request. Failures are only logged, because the process works without them.
pub fn prepare() {
    // The kernel clears a huge page while the thread that touched it waits, and all tasks on that thread with
    // it. In a virtual machine the page also has to come from the host. Measured: 7 ms, once for every few
    // megabytes of growth.
    if let Err(error) = prctl::set_thp_disable(true) {
        tracing::warn!(%error, "Huge pages not disabled; growing memory may delay requests by some ms");
    }
    // Each connection is an open file, and many systems start processes with a limit of 1,024.
    if let Err(error) = raise_to_hard_limit(Resource::RLIMIT_NOFILE) {
        tracing::warn!(%error, "Limit of open files not raised; fewer connections may be possible");
    }
}

fn raise_to_hard_limit(resource: Resource) -> nix::Result<()> {
    let (soft, hard) = getrlimit(resource)?;
    if soft < hard {
        setrlimit(resource, hard, hard)?;
    }
    Ok(())
}
