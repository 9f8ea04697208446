//! The network `public`: a namespace of its own, which slirp4netns connects to the internet.
//!
//! `pasta` was rejected. As root it drops to the user `nobody`, who may not enter the namespaces of others,
//! and the version of Debian 12 does not know the options of later ones. Both answer for any address, so what
//! must not be reached is stopped in the namespace: see `packet_filter.rs`.
//!
//! The order makes it fail closed: the namespace has no interface but its loopback until slirp4netns runs,
//! and slirp4netns runs only if the kernel has accepted the filter.

use super::child::{ChildSetup, ChildUser};
use super::descriptors::{InheritedFds, wait_readable};
use super::packet_filter::{BatchReply, PacketFilter};
use super::process_info::SandboxProcess;
use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::libc;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use std::fs::{self, File};
use std::io::{self, PipeWriter, Read};
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Most name servers, as in the C library.
const RESOLVERS_MAX: usize = 3;
/// Most addresses of this machine that are blocked one by one. Further ones are an error.
const OWN_ADDRESSES_MAX: usize = 256;
/// Most open files of slirp4netns: connections of an instance.
const OPEN_FILES_MAX: u64 = 1_024;
/// Deadline for the kernel to accept the filter.
const FILTER_MAX: Duration = Duration::from_secs(5);
/// Addresses of the namespace and of slirp4netns itself: in a network that no machine uses (RFC 2544).
const CIDR: &str = "198.19.255.0/24";
const INTERFACE: &str = "tap0";
const TUN: &str = "/dev/net/tun";
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// The name servers behind the one that systemd-resolved has on the loopback.
const RESOLV_CONF_SYSTEMD: &str = "/run/systemd/resolve/resolv.conf";

/// How instances with the network `public` are connected.
#[derive(Debug)]
pub(super) struct Uplink {
    slirp: PathBuf,
    /// Whether slirp4netns runs as the user of its instance. If only root may open [`TUN`], it runs as root,
    /// without capabilities and in its own sandbox.
    is_own_user: bool,
}

/// The connection of one instance. Dropping it ends slirp4netns.
#[derive(Debug)]
pub(super) struct UplinkProcess {
    slirp: Child,
    /// slirp4netns ends when this is closed, also if the worker is killed.
    _exit: PipeWriter,
}

impl Uplink {
    /// The error is a sentence that says what to do.
    pub(super) fn find(slirp: Option<PathBuf>) -> Result<Self, String> {
        let slirp = slirp.ok_or(
            "the network `public` needs slirp4netns, which was not found: apt-get install slirp4netns",
        )?;
        let tun = fs::metadata(TUN).map_err(|e| {
            format!(
                "the network `public` needs {TUN} ({e}): modprobe tun, or start the container with \
                 --device {TUN}"
            )
        })?;
        if resolvers().is_empty() {
            return Err(format!(
                "the network `public` needs a name server outside of this machine's loopback in \
                 {RESOLV_CONF} or {RESOLV_CONF_SYSTEMD}"
            ));
        }
        Ok(Self { slirp, is_own_user: tun.permissions().mode() & 0o006 == 0o006 })
    }

    /// Connects an instance whose program has not started. `groups`: where slirp4netns joins its control
    /// groups, so that its CPU time counts for the instance. `user`: the user of the instance, if it has one
    /// of its own. Blocks until the network is up.
    pub(super) fn connect(
        &self,
        instance: &SandboxProcess,
        resolvers: &[Ipv4Addr],
        groups: Vec<File>,
        user: Option<u32>,
        deadline: Instant,
    ) -> io::Result<UplinkProcess> {
        let filter = PacketFilter::public(resolvers, &own_addresses()?);
        set_filter(instance, filter).map_err(|e| {
            io::Error::new(e.kind(), format!("the packet filter of the sandbox was not set: {e}"))
        })?;
        let user = user.filter(|_| self.is_own_user);
        let (mut ready, is_ready) = io::pipe()?;
        let (exit, closes_exit) = io::pipe()?;
        let mut inherited = InheritedFds::default();
        let (is_ready, exit) = (inherited.add(is_ready.into())?, inherited.add(exit.into())?);
        let mut command = Command::new(&self.slirp);
        command.args(["--configure", "--mtu=65520", "--disable-host-loopback", "--enable-seccomp"]).args([
            format!("--cidr={CIDR}"),
            format!("--ready-fd={is_ready}"),
            format!("--exit-fd={exit}"),
        ]);
        if user.is_none() && nix::unistd::geteuid().is_root() {
            // It needs root: outside of a user namespace that maps root it cannot.
            command.arg("--enable-sandbox");
        }
        command.arg(instance.pid.to_string()).arg(INTERFACE).env_clear();
        // Hostile packets make it log, so its output must not fill a pipe or a disk.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // The thread that runs this may end earlier, so it must not end with its parent.
        let user = user.map(|id| ChildUser { id, stage: None, dies_with_parent: false });
        let open_files_max = Some(OPEN_FILES_MAX);
        let setup = ChildSetup { inherited, groups, open_files_max, user, ..ChildSetup::default() };
        // SAFETY: it makes system calls only, as it says.
        #[expect(
            unsafe_code,
            reason = "descriptors are passed, and the user changed, between fork and exec"
        )]
        unsafe {
            command.pre_exec(move || setup.apply())
        };
        let uplink = UplinkProcess { slirp: command.spawn()?, _exit: closes_exit };
        // Closes the descriptors that slirp4netns has inherited, so that the end of it is noticed.
        drop(command);
        wait_readable(&ready, deadline)?;
        match ready.read(&mut [0])? {
            0 => Err(io::Error::other("slirp4netns ended before the network of the sandbox was up")),
            _ => Ok(uplink),
        }
    }
}

impl Drop for UplinkProcess {
    fn drop(&mut self) {
        // It has only its own memory to lose, so it need not end in order.
        let _ = self.slirp.kill();
        let _ = self.slirp.wait();
    }
}

/// The name servers that instances with the network `public` ask, at most three.
pub(super) fn resolvers() -> Vec<Ipv4Addr> {
    let read = |file: &str| name_servers(&fs::read_to_string(Path::new(file)).unwrap_or_default());
    let found = read(RESOLV_CONF);
    if found.is_empty() { read(RESOLV_CONF_SYSTEMD) } else { found }
}

/// Those in a `resolv.conf` that a namespace can reach: IPv4, and not on the loopback of the host.
fn name_servers(text: &str) -> Vec<Ipv4Addr> {
    let values = text.lines().filter_map(|line| line.trim().strip_prefix("nameserver"));
    let addresses = values.filter_map(|value| value.trim().parse::<Ipv4Addr>().ok());
    addresses
        .filter(|address| !address.is_loopback() && !address.is_unspecified())
        .take(RESOLVERS_MAX)
        .collect()
}

/// The addresses of this machine: services on public ones among them must not be reached either.
fn own_addresses() -> io::Result<Vec<Ipv4Addr>> {
    let addresses = getifaddrs()?.filter_map(|interface| Some(interface.address?.as_sockaddr_in()?.ip()));
    let addresses: Vec<Ipv4Addr> = addresses.collect();
    if addresses.len() > OWN_ADDRESSES_MAX {
        let (count, most) = (addresses.len(), OWN_ADDRESSES_MAX);
        return Err(io::Error::other(format!("this machine has {count} addresses, and at most {most} fit")));
    }
    Ok(addresses)
}

/// Sets the filter in the network namespace of an instance, from a child process: a process with threads
/// cannot enter a user namespace.
fn set_filter(instance: &SandboxProcess, filter: PacketFilter) -> io::Result<()> {
    let (user, network) = (instance.namespace(c"ns/user")?, instance.namespace(c"ns/net")?);
    // It never becomes this program: the closure ends the process.
    let mut command = Command::new("/nonexistent");
    let in_child = move || -> io::Result<()> {
        setns(&user, CloneFlags::CLONE_NEWUSER)?;
        setns(&network, CloneFlags::CLONE_NEWNET)?;
        send_batch(&filter)?;
        end_child()
    };
    // SAFETY: it makes system calls only, and neither allocates nor locks.
    #[expect(unsafe_code, reason = "a namespace can be entered between fork and exec only")]
    unsafe {
        command.pre_exec(in_child)
    };
    // An error of the closure is an error of the spawn.
    let ended = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?.wait()?;
    if ended.success() { Ok(()) } else { Err(io::Error::other(format!("the process that sets it: {ended}"))) }
}

#[expect(unsafe_code, reason = "std's exit would run the exit handlers of the worker")]
fn end_child() -> ! {
    // SAFETY: it ends this process, and touches nothing.
    unsafe { libc::_exit(0) }
}

fn send_batch(filter: &PacketFilter) -> nix::Result<()> {
    let protocol = SockProtocol::NetlinkNetFilter;
    let netlink = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
    let seconds = i64::try_from(FILTER_MAX.as_secs()).unwrap_or(1);
    setsockopt(&netlink, sockopt::ReceiveTimeout, &TimeVal::new(seconds, 0))?;
    let sent = send(netlink.as_raw_fd(), &filter.messages, MsgFlags::empty())?;
    if sent != filter.messages.len() {
        return Err(Errno::EMSGSIZE);
    }
    let mut replies = [0; 8192];
    loop {
        let length = recv(netlink.as_raw_fd(), &mut replies, MsgFlags::empty())?;
        match filter.read_replies(replies.get(..length).unwrap_or_default()) {
            BatchReply::Accepted => return Ok(()),
            BatchReply::Rejected(error) => return Err(Errno::from_raw(error)),
            BatchReply::Incomplete => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_on_the_loopback_are_left_out() {
        for (text, expected) in [
            ("nameserver 10.0.0.2\n", vec![[10, 0, 0, 2]]),
            (
                "# comment\nsearch example.com\nnameserver\t1.1.1.1 \nnameserver 127.0.0.53\n",
                vec![[1, 1, 1, 1]],
            ),
            ("nameserver ::1\nnameserver 2606:4700::1111\noptions edns0\n", vec![]),
            ("nameserver 0.0.0.0\nnameserver\nnameservers 1.1.1.1\n", vec![]),
            ("nameserver 1.0.0.1\n".repeat(9).as_str(), vec![[1, 0, 0, 1]; 3]),
        ] {
            let expected: Vec<Ipv4Addr> = expected.into_iter().map(Ipv4Addr::from).collect();
            assert_eq!(name_servers(text), expected, "{text}");
        }
    }

    #[test]
    fn the_addresses_of_this_machine_are_known() {
        assert!(own_addresses().unwrap().contains(&Ipv4Addr::LOCALHOST));
    }
}
