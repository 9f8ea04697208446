//! Programs in real sandboxes, as hostile as they can be.

use super::*;
use crate::config::{Network, SandboxMode};
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

const WORK_MB: u64 = 16;
const MEMORY_MB: u64 = 128;
/// Deadline for what a busy machine can delay.
const SOON: Duration = Duration::from_secs(30);
/// Tests run at the same time, and each slot has its user.
static SLOT: AtomicU32 = AtomicU32::new(1);

struct Bench {
    sandbox: Sandbox,
    scratch: tempfile::TempDir,
    network: Network,
    memory_mb: u64,
}

impl Bench {
    async fn new(network: Network) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        fs::create_dir(scratch.path().join("function")).unwrap();
        let settings = SandboxSettings {
            mode: SandboxMode::Required,
            network,
            work_mb_max: WORK_MB,
            uid_first: 200_000,
            runs_dir: scratch.path().to_owned(),
            hidden_dirs: Vec::new(),
        };
        let sandbox = Sandbox::probe(&settings).await.expect("scripts/setup.sh test installs what it needs");
        assert!(sandbox.status().is_isolated && sandbox.status().network == network);
        Self { sandbox, scratch, network, memory_mb: MEMORY_MB }
    }

    /// Runs a Python program to its end.
    fn run(&self, code: &str, args: &[&str], control: Option<UnixStream>) -> (Output, Fence) {
        let function_dir = self.scratch.path().join("function");
        let view = View {
            slot: SLOT.fetch_add(1, Ordering::Relaxed),
            function_dir: &function_dir,
            tmp_dir: Path::new("/nonexistent"),
            memory_mb: self.memory_mb,
            network: self.network,
        };
        let mut program: Vec<OsString> = ["/usr/bin/python3", "-I", "-c", code].map(OsString::from).to_vec();
        program.extend(args.iter().map(OsString::from));
        let env = BTreeMap::from([("GREETING".to_owned(), "hello".to_owned())]);
        let enclosed = self.sandbox.enclose(&view, &program, &env, control.map(OwnedFd::from)).unwrap();
        let Enclosed { mut command, setup, mut fence } = enclosed;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // SAFETY: it makes system calls only, as it says.
        #[expect(unsafe_code, reason = "the child sets itself up between fork and exec")]
        unsafe {
            command.pre_exec(move || setup.apply())
        };
        let child = command.spawn().unwrap();
        drop(command);
        let admitted = fence.admit();
        let output = child.wait_with_output().unwrap();
        admitted.unwrap_or_else(|e| panic!("{e}: {output:?}"));
        (output, fence)
    }

    /// The output of a program that succeeds.
    fn text(&self, code: &str, args: &[&str]) -> String {
        let (output, _fence) = self.run(code, args, None);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }
}

#[tokio::test]
async fn a_program_sees_its_code_and_nothing_of_the_host() {
    let bench = Bench::new(Network::None).await;
    fs::write(bench.scratch.path().join("function/main.py"), "code").unwrap();
    let runs_dir = bench.scratch.path().to_str().unwrap();
    let seen = bench.text(
        r#"
import os, sys
print(sorted(os.listdir("/")), os.listdir("/function"), open("main.py").read(), os.getcwd())
print(sorted(os.listdir("/tmp")), os.environ["GREETING"], os.environ["HOME"], os.getuid(), os.getgid())
print([p for p in sys.argv[1:] if os.path.exists(p)], len(os.environ))
names = ("CapEff", "CapBnd", "NoNewPrivs", "Seccomp:")
print([line.split()[1] for line in open("/proc/self/status") if line.startswith(names)])
for path in ("/x", "/usr/x", "/etc/x", "/dev/x", "/function/x", "/var/x", "/proc/sys/kernel/hostname"):
    try:
        open(path, "w")
        print("wrote", path)
    except OSError:
        pass
for path in ("/tmp/x", "/tmp/home/x", "/tmp/output/x", "/dev/shm/x", "/var/tmp/y"):
    open(path, "w").write("x")
"#,
        &["/root", "/home", "/etc/shadow", "/etc/hostname", "/run", "/sys", runs_dir],
    );
    let roots =
        |line: &str| line.contains("'function'") && line.contains("'usr'") && !line.contains("'root'");
    let lines: Vec<&str> = seen.lines().collect();
    assert!(roots(lines[0]) && lines[0].ends_with("['main.py'] code /function"), "{seen}");
    assert_eq!(lines[1], "['home', 'output'] hello /tmp/home 1000 1000");
    // Besides ours: PATH, HOME, TMPDIR, OUTPUT_DIR, PWD, and LC_CTYPE of Python.
    assert!(lines[2] == "[] 6" || lines[2] == "[] 7", "{seen}");
    assert_eq!(&lines[3..], ["['0000000000000000', '0000000000000000', '1', '2']"], "{seen}");
}

#[tokio::test]
async fn the_control_socket_is_descriptor_3_and_the_last_one() {
    let bench = Bench::new(Network::None).await;
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.write_all(b"ping").unwrap();
    let code = "import os\n\
                print([f for f in range(3, 1024) if os.path.exists(f'/proc/self/fd/{f}')])\n\
                os.write(3, os.read(3, 4).upper())";
    let (output, _fence) = bench.run(code, &[], Some(theirs));
    assert_eq!((String::from_utf8_lossy(&output.stdout).trim(), output.status.code()), ("[3]", Some(0)));
    let mut answer = String::new();
    ours.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "PING");
}

#[tokio::test]
async fn other_processes_are_invisible_and_cannot_be_killed() {
    let bench = Bench::new(Network::None).await;
    let us = std::process::id().to_string();
    let code = r#"
import os, sys
print(len([p for p in os.listdir("/proc") if p.isdigit()]) <= 3, os.path.exists("/proc/" + sys.argv[1]))
for pid in (int(sys.argv[1]), -int(sys.argv[1])):
    try:
        os.kill(pid, 0)
        print("reached", pid)
    except ProcessLookupError:
        print("none")
"#;
    assert_eq!(bench.text(code, &[&us]), "True False\nnone\nnone\n");
}

#[tokio::test]
async fn a_fork_bomb_is_bounded() {
    // Each process has page tables and some pages of its own.
    let bench = Bench { memory_mb: 2_048, ..Bench::new(Network::None).await };
    let code = r#"
import os, signal
count = 0
try:
    while count < 10000:
        if os.fork() == 0:
            signal.pause()
        count += 1
except OSError as e:
    print(count, e.errno)
"#;
    let text = bench.text(code, &[]);
    let (count, errno) = text.trim().split_once(' ').unwrap();
    // Control groups leave some more, for the processes of the sandbox.
    assert!(count.parse::<u64>().unwrap() <= TASKS_MAX + 8 && errno == "11", "{text}");
    // The next program of the same worker is not affected.
    assert_eq!(bench.text("print(1)", &[]), "1\n");
}

#[tokio::test]
async fn files_are_bounded() {
    let bench = Bench::new(Network::None).await;
    let code = r#"
import os
def fill(directory):
    total = 0
    try:
        for number in range(100):
            with open(f"{directory}/{number}", "wb", buffering=0) as file:
                for _ in range(4096):
                    total += file.write(bytes(1 << 20))
    except OSError:
        return total >> 20
try:
    os.truncate(open("/tmp/large", "wb").name, 10 << 30)
    print("large")
except OSError:
    pass
os.remove("/tmp/large")
print(fill("/tmp"), fill("/dev/shm"))
"#;
    let text = bench.text(code, &[]);
    let (tmp, shm) = text.trim().split_once(' ').unwrap();
    let (tmp, shm): (u64, u64) = (tmp.parse().unwrap(), shm.parse().unwrap());
    assert!((WORK_MB - 1..=WORK_MB).contains(&tmp) && shm <= 64, "{text}");
}

#[tokio::test]
async fn memory_is_bounded_by_the_control_group() {
    let bench = Bench::new(Network::None).await;
    if bench.sandbox.status().cgroups == CgroupKind::None {
        eprintln!("not tested: {:?}", bench.sandbox.status().notes);
        return;
    }
    let code = "x = [bytes([n % 255 + 1]) * (1 << 20) for n in range(10240)]";
    let (output, fence) = bench.run(code, &[], None);
    assert_eq!(output.status.code(), Some(137), "{output:?}");
    assert!(fence.is_out_of_memory() && fence.cpu_time() > Some(Duration::ZERO), "{fence:?}");
}

#[tokio::test]
async fn what_a_program_leaves_in_tmp_can_be_read_when_it_has_ended() {
    let bench = Bench::new(Network::None).await;
    let (output, fence) = bench.run("open('/tmp/output/a', 'w').write('left')", &[], None);
    assert!(output.status.success(), "{output:?}");
    let tmp = fence.tmp_dir().unwrap();
    let file = format!("/proc/self/fd/{}/output/a", tmp.as_raw_fd());
    assert_eq!(fs::read_to_string(file).unwrap(), "left");
}

#[tokio::test]
async fn no_process_outlives_its_program() {
    let bench = Bench::new(Network::None).await;
    let mark = format!("mark-{}", std::process::id());
    let code = r#"
import os, sys
for leave in (os.setsid, os.setpgrp):
    if os.fork() == 0:
        leave()
        if os.fork() == 0:
            os.execv("/usr/bin/python3", ["python3", "-c", "import time; time.sleep(600)", sys.argv[1]])
        os._exit(0)
    os.wait()
"#;
    assert_eq!(bench.text(code, &[&mark]), "");
    let is_left = || {
        fs::read_dir("/proc").unwrap().flatten().any(|process| {
            let command = fs::read(process.path().join("cmdline")).unwrap_or_default();
            command.windows(mark.len()).any(|window| window == mark.as_bytes())
        })
    };
    let deadline = Instant::now() + SOON;
    while is_left() {
        assert!(Instant::now() < deadline, "a process was left");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Tries to reach services of the host, and prints what it has reached.
const REACH: &str = r#"
import socket, sys
tcp, udp = int(sys.argv[1]), int(sys.argv[2])
hosts = ["127.0.0.1", "127.0.0.53", "198.19.255.2", "198.19.255.3", "169.254.169.254"]
for device in (b"", b"tap0\0"):
    for address in hosts + sys.argv[3:]:
        for port in (tcp, 80):
            with socket.socket() as s:
                s.settimeout(0.5)
                try:
                    if device:
                        s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)
                    s.connect((address, port))
                    print("reached", address, port, device)
                except OSError:
                    pass
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            try:
                if device:
                    s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)
                s.sendto(b"x", (address, udp))
            except OSError:
                pass
with socket.socket() as ours, socket.socket() as client:
    ours.bind(("127.0.0.1", 0))
    ours.listen()
    client.connect(ours.getsockname())
    print("own loopback works")
"#;

async fn cannot_reach_the_host(network: Network) {
    let bench = Bench::new(network).await;
    let tcp = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    let udp = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
    tcp.set_nonblocking(true).unwrap();
    udp.set_nonblocking(true).unwrap();
    let ports =
        [&tcp.local_addr(), &udp.local_addr()].map(|address| address.as_ref().unwrap().port().to_string());
    let own = nix::ifaddrs::getifaddrs().unwrap();
    let own = own.filter_map(|interface| Some(interface.address?.as_sockaddr_in()?.ip().to_string()));
    let args: Vec<String> = ports.into_iter().chain(own).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    assert_eq!(bench.text(REACH, &args), "own loopback works\n");
    // A connection or a packet without an answer counts too.
    let accepted = tcp.accept().map(|(_, from)| from);
    assert_eq!(accepted.unwrap_err().kind(), io::ErrorKind::WouldBlock);
    assert_eq!(udp.recv(&mut [0; 16]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
}

#[tokio::test]
async fn without_a_network_the_host_is_out_of_reach() {
    cannot_reach_the_host(Network::None).await;
}

#[tokio::test]
async fn with_the_public_network_the_host_is_out_of_reach() {
    if !Path::new("/dev/net/tun").exists() {
        eprintln!("not tested: there is no /dev/net/tun");
        return;
    }
    cannot_reach_the_host(Network::Public).await;
    let bench = Bench::new(Network::Public).await;
    let code = "print(open('/etc/resolv.conf').read().split()[0], [l.split(':')[0].strip() for l in \
                open('/proc/net/dev') if 'tap0' in l])";
    assert_eq!(bench.text(code, &[]), "nameserver ['tap0']\n");
}
