//! The arguments of bubblewrap (`bwrap`, 0.7 or later): what a program sees.
//!
//! ```text
//! /usr, /bin, /lib, …   as on the host, read-only
//! /etc                  made: users, hosts, name servers; of the host only what libraries and TLS need
//! /proc                 of its own PID namespace
//! /dev                  null, zero, random, and /dev/shm in memory
//! /function             the code, read-only; the working directory
//! /tmp                  in memory, with `home` and `output`; the only place to write besides /dev/shm
//! ```
//!
//! Each bind mount costs 0.1 ms, because bubblewrap reads all mounts for it. So small files are copied, and
//! only the devices that programs use are there.
//!
//! All arguments, with the environment of the program, are in a file in memory (`--args`): arguments of a
//! process are visible to every user of the host. bubblewrap itself runs with an empty environment, because
//! it runs outside of the sandbox, where a variable such as `LD_PRELOAD` must not have an effect.

use super::descriptors::InheritedFds;
use super::view::{FUNCTION_DIR, HOME_DIR, OUTPUT_DIR};
use crate::config::Network;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// User and group in the sandbox.
const USER_ID: &str = "1000";
const PASSWD: &str = "root:x:0:0:root:/root:/usr/sbin/nologin\n\
                      function:x:1000:1000:function:/tmp/home:/bin/sh\n\
                      nobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n";
const GROUP: &str = "root:x:0:\nfunction:x:1000:\nnogroup:x:65534:\n";
const HOSTS: &str = "127.0.0.1 localhost\n::1 localhost\n127.0.1.1 function\n";
const NSSWITCH: &str = "passwd: files\ngroup: files\nhosts: files dns\nservices: files\nprotocols: files\n";
/// Top directories that a host has beside `/usr`, or as links into it.
const TOP_DIRS: [&str; 6] = ["/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"];
/// Files and directories of the host that programs need in each sandbox.
const SYSTEM_FILES: [&str; 3] = ["/etc/alternatives", "/etc/crypto-policies", "/etc/ld.so.cache"];
/// Those that they need for TLS: of Debian, Red Hat and Arch.
const TLS_FILES: [&str; 5] = [
    "/etc/ssl/certs",
    "/etc/ssl/openssl.cnf",
    "/etc/pki/tls/certs",
    "/etc/pki/ca-trust/extracted",
    "/etc/ca-certificates/extracted",
];
/// With the network of the host, names are resolved as on the host.
const NAME_FILES: [&str; 2] = ["/etc/hosts", "/etc/resolv.conf"];
const DEVICES: [&str; 3] = ["/dev/null", "/dev/zero", "/dev/urandom"];
const DEVICE_LINKS: [(&str, &str); 5] = [
    // The same since Linux 5.6.
    ("urandom", "/dev/random"),
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];
/// A directory of the worker that contains one of these is not hidden, because no program would work.
const SYSTEM_DIRS: [&str; 5] = ["/usr/bin", "/usr/lib", "/usr/local/bin", "/usr/local/lib", "/usr/share"];
/// Size of `/dev/shm`, as in Docker, and of `/dev` itself.
const SHM_BYTES: u64 = 64 << 20;
const DEV_BYTES: u64 = 64 << 10;
/// Variables that every program needs, unless the caller sets them.
const VARIABLES: [(&str, &str); 4] = [
    ("PATH", "/usr/local/bin:/usr/bin:/bin"),
    ("HOME", HOME_DIR),
    ("TMPDIR", "/tmp"),
    ("OUTPUT_DIR", OUTPUT_DIR),
];

/// What of this host a sandbox shows, found once.
#[derive(Debug)]
pub(super) struct HostRoot {
    /// Links into `/usr`: target and path.
    links: Vec<(PathBuf, &'static str)>,
    /// Directories that are bound, `/usr` first.
    dirs: Vec<&'static str>,
    system_files: Vec<&'static str>,
    tls_files: Vec<&'static str>,
    /// Directories below `dirs` that are replaced by empty ones.
    hidden: Vec<PathBuf>,
}

impl HostRoot {
    pub(super) fn find(hidden: &[PathBuf]) -> Self {
        let (mut links, mut dirs) = (Vec::new(), vec!["/usr"]);
        for dir in TOP_DIRS {
            if let Ok(target) = fs::read_link(dir) {
                links.push((target, dir));
            } else if Path::new(dir).is_dir() {
                dirs.push(dir);
            }
        }
        let existing = |files: &[&'static str]| {
            files.iter().copied().filter(|file| Path::new(file).exists()).collect::<Vec<_>>()
        };
        let is_shown = |path: &PathBuf| dirs.iter().any(|dir| path.starts_with(dir));
        let is_system = |path: &PathBuf| SYSTEM_DIRS.iter().any(|dir| Path::new(dir).starts_with(path));
        let real = hidden.iter().filter_map(|path| fs::canonicalize(path).ok());
        let hidden = real.filter(|path| path.is_dir() && is_shown(path) && !is_system(path)).collect();
        let (system_files, tls_files) = (existing(&SYSTEM_FILES), existing(&TLS_FILES));
        Self { links, dirs, system_files, tls_files, hidden }
    }

    /// Whether a program at this host path is in the sandbox too. Links must not lead out of it.
    pub(super) fn shows(&self, program: &Path) -> bool {
        let is_below_dir = |path: &Path| self.dirs.iter().any(|dir| path.starts_with(dir));
        let is_below_link = self.links.iter().any(|(_, link)| program.starts_with(link));
        let real = fs::canonicalize(program);
        (is_below_dir(program) || is_below_link) && real.is_ok_and(|real| is_below_dir(&real))
    }
}

/// What one sandbox is made of.
#[derive(Clone, Copy)]
pub(super) struct SandboxPlan<'a> {
    /// What bubblewrap binds to `/function`.
    pub(super) function_dir: &'a Path,
    pub(super) network: Network,
    /// For the network `public`.
    pub(super) resolvers: &'a [Ipv4Addr],
    /// Size of `/tmp`, in bytes.
    pub(super) tmp_bytes: u64,
    pub(super) filters: [&'a [u8]; 2],
    pub(super) env: &'a BTreeMap<String, String>,
    /// Where bubblewrap writes about the sandbox, and where it waits for one byte before it starts the
    /// program.
    pub(super) info: RawFd,
    pub(super) block: RawFd,
}

/// The arguments, each ended by a zero byte. Adds the files that they name to `inherited`.
pub(super) fn arguments(
    host: &HostRoot,
    plan: &SandboxPlan<'_>,
    inherited: &mut InheritedFds,
) -> io::Result<Vec<u8>> {
    let mut list = ArgumentList::default();
    list.add(["--unshare-user", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]);
    if plan.network != Network::Full {
        list.add(["--unshare-net"]);
    }
    list.add(["--uid", USER_ID, "--gid", USER_ID, "--hostname", "function", "--cap-drop", "ALL"]);
    list.add(["--die-with-parent", "--new-session"]);
    list.add_root(host);
    list.add_etc(host, plan, inherited)?;
    list.add(["--proc", "/proc"]);
    list.add_dev();
    list.add(["--size", &plan.tmp_bytes.to_string(), "--perms", "1777", "--tmpfs", "/tmp"]);
    list.add(["--perms", "0700", "--dir", HOME_DIR, "--perms", "0700", "--dir", OUTPUT_DIR]);
    list.add(["--symlink", "/tmp", "/var/tmp"]);
    list.add([OsStr::new("--ro-bind"), plan.function_dir.as_os_str(), OsStr::new(FUNCTION_DIR)]);
    // The root is in memory as well, and without a limit.
    list.add(["--chdir", FUNCTION_DIR, "--remount-ro", "/"]);
    list.add(["--info-fd", &plan.info.to_string(), "--block-fd", &plan.block.to_string()]);
    for filter in plan.filters {
        list.add(["--add-seccomp-fd", &inherited.add_file(filter)?.to_string()]);
    }
    let usual = VARIABLES.iter().filter(|(name, _)| !plan.env.contains_key(*name));
    let given = plan.env.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    for (name, value) in usual.copied().chain(given) {
        list.add(["--setenv", name, value]);
    }
    list.end()
}

/// Arguments, each ended by a zero byte.
#[derive(Default)]
struct ArgumentList {
    bytes: Vec<u8>,
    has_zero: bool,
}

impl ArgumentList {
    fn add<const N: usize>(&mut self, arguments: [impl AsRef<OsStr>; N]) {
        for argument in arguments {
            let argument = argument.as_ref().as_bytes();
            self.has_zero |= argument.contains(&0);
            self.bytes.extend_from_slice(argument);
            self.bytes.push(0);
        }
    }

    fn add_root(&mut self, host: &HostRoot) {
        for dir in &host.dirs {
            self.add(["--ro-bind", dir, dir]);
        }
        for dir in &host.hidden {
            self.add(["--size", "4096", "--perms", "0555", "--tmpfs"]);
            self.add([dir.as_os_str()]);
            self.add([OsStr::new("--remount-ro"), dir.as_os_str()]);
        }
        for (target, link) in &host.links {
            self.add([OsStr::new("--symlink"), target.as_os_str(), OsStr::new(link)]);
        }
    }

    fn add_etc(
        &mut self,
        host: &HostRoot,
        plan: &SandboxPlan<'_>,
        inherited: &mut InheritedFds,
    ) -> io::Result<()> {
        let mut add_file = |list: &mut Self, path: &str, text: &str| -> io::Result<()> {
            let number = inherited.add_file(text.as_bytes())?.to_string();
            list.add(["--perms", "0444", "--file", &number, path]);
            Ok(())
        };
        add_file(self, "/etc/passwd", PASSWD)?;
        add_file(self, "/etc/group", GROUP)?;
        add_file(self, "/etc/nsswitch.conf", NSSWITCH)?;
        if plan.network == Network::Full {
            self.add_host_files(&NAME_FILES);
        } else {
            add_file(self, "/etc/hosts", HOSTS)?;
        }
        if plan.network == Network::Public {
            let servers = plan.resolvers.iter().map(|address| format!("nameserver {address}\n"));
            add_file(self, "/etc/resolv.conf", &servers.collect::<String>())?;
        }
        self.add_host_files(&host.system_files);
        if plan.network != Network::None {
            self.add_host_files(&host.tls_files);
        }
        Ok(())
    }

    fn add_host_files(&mut self, files: &[&str]) {
        for file in files {
            self.add(["--ro-bind-try", file, file]);
        }
    }

    fn add_dev(&mut self) {
        self.add(["--size", &DEV_BYTES.to_string(), "--perms", "0755", "--tmpfs", "/dev"]);
        for device in DEVICES {
            self.add(["--dev-bind", device, device]);
        }
        for (target, link) in DEVICE_LINKS {
            self.add(["--symlink", target, link]);
        }
        self.add(["--size", &SHM_BYTES.to_string(), "--perms", "1777", "--tmpfs", "/dev/shm"]);
        self.add(["--remount-ro", "/dev"]);
    }

    /// # Errors
    /// If an argument has a zero byte, which would end it and begin another one.
    fn end(self) -> io::Result<Vec<u8>> {
        if self.has_zero {
            let why = "a path or a variable of the environment has a zero byte";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        Ok(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> HostRoot {
        HostRoot {
            links: vec![("usr/lib".into(), "/lib")],
            dirs: vec!["/usr", "/bin"],
            system_files: vec!["/etc/ld.so.cache"],
            tls_files: vec!["/etc/ssl/certs"],
            hidden: vec!["/usr/src/app".into()],
        }
    }

    /// The arguments as one text. Descriptors are `#`.
    fn list(network: Network, env: &[(&str, &str)]) -> io::Result<String> {
        let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let plan = SandboxPlan {
            function_dir: Path::new("/runs/7/function"),
            network,
            resolvers: &[Ipv4Addr::new(10, 0, 0, 2)],
            tmp_bytes: 1 << 20,
            filters: [b"12345678"; 2],
            env: &env,
            info: 17,
            block: 18,
        };
        let bytes = arguments(&host(), &plan, &mut InheritedFds::default())?;
        let words: Vec<String> = bytes
            .split(|byte| *byte == 0)
            .map(|word| {
                let word = String::from_utf8(word.to_vec()).unwrap();
                let is_descriptor = word.parse::<u32>().is_ok_and(|number| (3..1_000).contains(&number));
                if is_descriptor { "#".to_owned() } else { word }
            })
            .collect();
        Ok(words.join(" "))
    }

    #[test]
    fn each_network_has_its_files() {
        for (network, has, lacks) in [
            (Network::None, &["--unshare-net", "--file # /etc/hosts"][..], &["resolv.conf", "/etc/ssl"][..]),
            (
                Network::Public,
                &[
                    "--unshare-net",
                    "--file # /etc/resolv.conf",
                    "--ro-bind-try /etc/ssl/certs /etc/ssl/certs",
                ],
                &["--ro-bind-try /etc/resolv.conf"],
            ),
            (
                Network::Full,
                &["--ro-bind-try /etc/resolv.conf /etc/resolv.conf", "--ro-bind-try /etc/hosts /etc/hosts"],
                &["--unshare-net", "--file # /etc/hosts"],
            ),
        ] {
            let list = list(network, &[]).unwrap();
            for text in has {
                assert!(list.contains(text), "{text}: {list}");
            }
            for text in lacks {
                assert!(!list.contains(text), "{text}: {list}");
            }
        }
    }

    #[test]
    fn a_sandbox_is_read_only_and_without_privileges() {
        let list = list(Network::None, &[]).unwrap();
        for text in [
            "--unshare-user --unshare-pid --unshare-ipc --unshare-uts",
            "--cap-drop ALL --die-with-parent --new-session --ro-bind /usr /usr --ro-bind /bin /bin",
            "/bin --size 4096 --perms # --tmpfs /usr/src/app --remount-ro /usr/src/app --symlink",
            "--ro-bind-try /etc/ld.so.cache /etc/ld.so.cache",
            "--remount-ro /dev --size 1048576 --perms 1777 --tmpfs /tmp",
            "--ro-bind /runs/7/function /function --chdir /function --remount-ro / --info-fd # --block-fd #",
            "--add-seccomp-fd # --add-seccomp-fd # --setenv PATH",
        ] {
            assert!(list.contains(text), "{text}: {list}");
        }
        assert!(!list.contains(" --bind"), "{list}");
    }

    #[test]
    fn the_environment_of_the_caller_wins() {
        let list = list(Network::None, &[("HOME", "/elsewhere"), ("LD_PRELOAD", "a --bind / /")]).unwrap();
        assert!(list.contains("--setenv HOME /elsewhere --setenv LD_PRELOAD a --bind / /"), "{list}");
        assert_eq!(list.matches("--setenv HOME").count(), 1);
        assert!(list.contains("--setenv TMPDIR /tmp"), "{list}");
    }

    #[test]
    fn an_argument_cannot_end_early() {
        for (name, value) in [("A", "x\0--bind\0/\0/"), ("A\0B", "x")] {
            assert!(list(Network::None, &[(name, value)]).is_err());
        }
    }

    #[test]
    fn directories_of_the_worker_below_usr_are_hidden() {
        let dirs = ["/usr/share/doc", "/usr", "/usr/local", "/usr/bin", "/etc", "/usr/no-such-directory"];
        let host = HostRoot::find(&dirs.map(PathBuf::from));
        assert_eq!(host.hidden, [PathBuf::from("/usr/share/doc")]);
    }

    #[test]
    fn programs_outside_of_the_sandbox_are_known() {
        let host = HostRoot::find(&[]);
        for (program, expected) in [
            ("/usr/bin/env", true),
            ("/bin/sh", true),
            ("/usr/bin/no-such-program", false),
            ("/etc/passwd", false),
            ("/proc/self/exe", false),
        ] {
            assert_eq!(host.shows(Path::new(program)), expected, "{program}");
        }
    }
}
