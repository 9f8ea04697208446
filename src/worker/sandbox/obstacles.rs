//! Why a sandbox does not work on a machine, and what to install or set, in sentences.

use std::fs;
use std::path::Path;

/// Most bytes of what bubblewrap says that are repeated.
const QUOTE_BYTES_MAX: usize = 400;

pub(super) const NO_BWRAP: &str =
    "bubblewrap was not found in /usr/bin, /bin or /usr/local/bin: apt-get install bubblewrap";

/// What the machine says about itself.
#[derive(Clone, Copy, Debug, Default)]
struct Facts {
    /// `kernel.unprivileged_userns_clone` is 0 (Debian).
    no_unprivileged: bool,
    /// `user.max_user_namespaces` is 0.
    no_namespaces: bool,
    /// `kernel.apparmor_restrict_unprivileged_userns` is 1 (Ubuntu from 23.10).
    apparmor_restricts: bool,
    /// This is a container of Docker, Podman or Kubernetes.
    in_container: bool,
}

impl Facts {
    fn read() -> Self {
        let is = |setting: &str, value: &str| {
            fs::read_to_string(Path::new("/proc/sys").join(setting)).is_ok_and(|text| text.trim() == value)
        };
        let marks = ["/.dockerenv", "/run/.containerenv", "/var/run/secrets/kubernetes.io"];
        Self {
            no_unprivileged: is("kernel/unprivileged_userns_clone", "0"),
            no_namespaces: is("user/max_user_namespaces", "0"),
            apparmor_restricts: is("kernel/apparmor_restrict_unprivileged_userns", "1"),
            in_container: marks.iter().any(|mark| Path::new(mark).exists()),
        }
    }
}

/// Explains a failed trial. `said`: the standard error of bubblewrap. `failed`: what the worker noticed.
pub(super) fn explain(said: &str, failed: &str) -> String {
    explain_with(Facts::read(), said, failed)
}

fn explain_with(facts: Facts, said: &str, failed: &str) -> String {
    let quote = quote(said);
    let said_by = if quote.is_empty() { failed.to_owned() } else { format!("`{quote}`") };
    let has = |text: &str| said.contains(text);
    let no_namespace = has("No permissions to create") || has("Creating new namespace failed");
    let no_rights_inside = has("setting up uid map") || has("loopback: ") || has("Failed to make / slave");
    let advice = if has("Unknown option") {
        "install bubblewrap 0.7 or later"
    } else if has("Can't mount proc") {
        "the container hides parts of /proc, so no new one can be mounted: start it with --security-opt \
         systempaths=unconfined (Docker), --security-opt unmask=ALL (Podman) or procMount: Unmasked \
         (Kubernetes)"
    } else if has("Can't find source path") && has("Permission denied") {
        "make the directory of runs reachable for all users (chmod o+x on each directory of its path)"
    } else if facts.no_namespaces && no_namespace {
        "sysctl -w user.max_user_namespaces=28633"
    } else if facts.no_unprivileged && no_namespace {
        "sysctl -w kernel.unprivileged_userns_clone=1, or run the worker as root"
    } else if facts.apparmor_restricts && (no_namespace || no_rights_inside) {
        "AppArmor restricts user namespaces: add a profile for /usr/bin/bwrap with `userns,` (the package \
         apparmor-profiles has one: bwrap-userns-restrict), or sysctl -w \
         kernel.apparmor_restrict_unprivileged_userns=0"
    } else if facts.in_container && (no_namespace || no_rights_inside) {
        "the container forbids user namespaces: start it with --security-opt seccomp=unconfined \
         --security-opt apparmor=unconfined --security-opt systempaths=unconfined, or with a seccomp profile \
         that allows clone, unshare, mount, pivot_root and setns"
    } else if no_namespace {
        "allow user namespaces: see user.max_user_namespaces and the kernel option CONFIG_USER_NS"
    } else {
        "run `bwrap --unshare-all --ro-bind / / --proc /proc true` as the user of the worker for more"
    };
    format!("bubblewrap does not work here ({said_by}): {advice}")
}

/// The last lines of what a program says, without control characters.
fn quote(said: &str) -> String {
    let said = said.trim();
    let mut from = said.len().saturating_sub(QUOTE_BYTES_MAX);
    while !said.is_char_boundary(from) {
        from += 1;
    }
    said[from..].chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Explains a failed trial with the network `public`, after one without a network has worked.
pub(super) fn explain_network(said: &str, failed: &str) -> String {
    let quote = quote(said);
    let said_by = if quote.is_empty() { failed.to_owned() } else { format!("{failed}: `{quote}`") };
    format!(
        "the network `public` does not work here ({said_by}): it needs slirp4netns, a usable /dev/net/tun, \
         and nftables in the kernel (CONFIG_NF_TABLES, CONFIG_NF_TABLES_INET, CONFIG_NFT_REJECT_INET; \
         `modprobe nf_tables`)"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_obstacle_has_its_advice() {
        let nothing = Facts::default();
        let namespace =
            "bwrap: No permissions to create a new namespace, likely because the kernel does not …";
        let uid_map = "bwrap: setting up uid map: Permission denied";
        for (facts, said, expected) in [
            (Facts { no_unprivileged: true, ..nothing }, namespace, "kernel.unprivileged_userns_clone=1"),
            (Facts { no_namespaces: true, ..nothing }, namespace, "user.max_user_namespaces="),
            (Facts { apparmor_restricts: true, ..nothing }, uid_map, "bwrap-userns-restrict"),
            (Facts { in_container: true, ..nothing }, namespace, "seccomp=unconfined"),
            (nothing, namespace, "CONFIG_USER_NS"),
            (nothing, "bwrap: Can't mount proc on /newroot/proc: Operation not permitted", "systempaths"),
            (nothing, "bwrap: Unknown option --size", "0.7 or later"),
            (nothing, "bwrap: Can't find source path /srv/x: Permission denied", "chmod o+x"),
            (nothing, "bwrap: something else", "--unshare-all"),
            (nothing, "", "timed out"),
        ] {
            let explained = explain_with(facts, said, "timed out");
            assert!(explained.contains(expected), "{said}: {explained}");
            assert!(explained.contains(said), "{said}: {explained}");
        }
    }

    #[test]
    fn quotes_are_short_and_printable() {
        let long = format!("{}é\n\u{1b}[0m end", "x".repeat(2 * QUOTE_BYTES_MAX));
        let quoted = quote(&long);
        assert!(quoted.len() <= QUOTE_BYTES_MAX && quoted.ends_with("é  [0m end"), "{quoted}");
        assert!(quote(&"é".repeat(QUOTE_BYTES_MAX)).starts_with('é'));
    }
}
