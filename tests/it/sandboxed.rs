//! Hostile functions on `dev`, in its sandbox: each fails at what it tries, the next run works, and nothing
//! is left behind.

use crate::harness::aws::Cloud;
use crate::harness::gateway::{Exited, Gateway, put_file, start_through};
use crate::harness::hold::{HOLDING, Hold};
use crate::harness::leftovers::{Leftovers, processes_with, wait_until_gone};
use crate::harness::own_worker::{WorkerSettings, WorkerSetup};
use crate::harness::platform::{Backend, HELLO, new_key};
use crate::harness::process::Scratch;
use crate::harness::redis::Redis;
use crate::harness::upload::Function;
use crate::harness::{Platform, Setup};
use serde_json::{Value, json};
use std::io::ErrorKind;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Size of the files of a run, in MiB.
const WORK_MB: u64 = 16;
/// Most processes and threads of a run. Control groups allow some more, for those of the sandbox.
const TASKS_MAX: u64 = 1_024 + 8;
/// Deadline of a start that fails.
const ENDS_WITHIN: Duration = Duration::from_secs(90);

/// A `dev` that keeps no processes: whatever it has after a run was left by the run.
struct Target {
    platform: Platform,
}

impl Target {
    async fn start(network: &str) -> Self {
        let setup = Setup::new(Backend::Dev)
            .worker_setting("sandbox.mode", "required")
            .worker_setting("sandbox.network", network)
            .worker_setting("sandbox.work_mb_max", WORK_MB)
            .worker_setting("warm.interpreters", 0)
            .worker_setting("warm.function_max", 0);
        Self { platform: setup.start().await }
    }

    async fn create(&self, source: &str, memory_mb: u64) -> String {
        let function = Function { memory_mb, ..Function::python(source) };
        self.platform.gateway.create(&function).await
    }

    /// Runs a program. Afterwards nothing is left of it, and the next run works.
    async fn run(&self, source: &str, memory_mb: u64, input: &Value) -> Value {
        let id = self.create(source, memory_mb).await;
        let result = self.platform.gateway.run(&id, input).send().await.expect(200).json();
        self.assert_unharmed().await;
        result
    }

    /// [`Self::run`] with a time limit.
    async fn run_limited(&self, source: &str, timeout_ms: u64, input: &Value) -> Value {
        let id = self.create(source, 128).await;
        let result = self.platform.run_limited(&id, timeout_ms, input).await;
        self.assert_unharmed().await;
        result
    }

    async fn assert_unharmed(&self) {
        let gateway = &self.platform.gateway;
        let hello = gateway.run(HELLO, &json!({ "name": "Ada" })).send().await.expect(200).json();
        assert_eq!(hello["status"], "SUCCESS", "{hello}");
        Leftovers::wait_for_none(gateway.pid(), &self.platform.data_dir().join("runs")).await;
    }

    /// Stops `dev`. Nothing is left of it.
    async fn finish(self) {
        let (pid, runs_dir) = (self.platform.gateway.pid(), self.platform.data_dir().join("runs"));
        self.platform.finish().await;
        Leftovers::wait_for_none_after(pid, &runs_dir).await;
    }
}

/// A text that no other process of this machine has among its arguments.
fn new_mark() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("mark-of-a-run-{}-{}-end", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// Opens what its input names, in every way, and looks for the text `mark` in all files that it sees.
const READS: &str = r#"
import json, os
asked = json.loads(os.environ["PAYLOAD"])
ways = ["", "/proc/self/root", "/proc/1/root", "/proc/self/cwd/../../../../../../.."]
ways += [f"/proc/{pid}/root" for pid in (os.getppid(), asked["pid"])] + [f"/proc/{asked['pid']}/cwd"]
for path in asked["paths"]:
    for way in ways:
        for use in (lambda path: open(path).close(), os.listdir, lambda path: open(path, "r+b").close()):
            try:
                use(way + path)
                print("reached", way + path)
            except OSError:
                pass
    os.symlink(path, "/tmp/link")
    if os.path.exists("/tmp/link"):
        print("reached by a link", path)
    os.unlink("/tmp/link")
mark = asked["mark"].encode()
skipped = ("proc", "sys", "usr", "lib", "lib32", "lib64", "libx32", "bin", "sbin")
for root, directories, files in os.walk("/"):
    if root == "/":
        directories[:] = [name for name in directories if name not in skipped]
    for name in files:
        path = os.path.join(root, name)
        try:
            if os.path.isfile(path) and mark in open(path, "rb").read(1 << 20):
                print("found the mark in", path)
        except OSError:
            pass
print(len([pid for pid in os.listdir("/proc") if pid.isdigit()]) <= 3, os.getuid() != 0)
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn secrets_of_the_machine_are_out_of_reach() {
    let (dir, key) = (Scratch::new("secrets"), new_key());
    let root = dir.path().to_owned();
    let at = |name: &str| root.join(name);
    for directory in ["data", "conf", ".aws"] {
        std::fs::create_dir(at(directory)).expect("the directory is writable");
    }
    std::fs::write(at("data/api-key"), &key).expect("the directory is writable");
    for file in [".env", ".aws/credentials"] {
        std::fs::write(at(file), format!("SECRET={key}\n")).expect("the directory is writable");
    }
    let settings = WorkerSettings::new().with("sandbox.mode", "required").with("sandbox.network", "none");
    put_file(&at("conf/worker.toml"), &settings.to_toml());
    let args = ["dev", "--port", "0", "--data-dir", "data", "--conf", "conf"];
    let gateway = Gateway::start_in(dir, &args, &[], &key, &[]).await;

    let files = ".env .aws .aws/credentials conf conf/worker.toml data data/api-key data/infra.sqlite \
                 data/infra.sqlite-wal data/lock data/code data/runs data/code-cache";
    let mut paths: Vec<String> =
        files.split_whitespace().map(|file| at(file).display().to_string()).collect();
    let of_host = "/root /home /etc/shadow /etc/hostname /run /sys /boot /var/lib";
    paths.extend(of_host.split(' ').map(str::to_owned));
    // Without its end: the whole key is a secret of the log.
    let mark = &key[..key.len() - 7];
    let input = json!({ "paths": paths, "pid": gateway.pid(), "mark": mark });
    // The second run finds an interpreter that was started ahead.
    let id = gateway.create(&Function::python(READS)).await;
    for _ in 0..2 {
        let result = gateway.run(&id, &input).send().await.expect(200).json();
        assert_eq!((&result["stdout"], &result["stderr"]), (&json!("True True\n"), &json!("")), "{result}");
    }
    gateway.finish().await;
}

/// Keeps secrets in all places where it can write, and waits.
const KEEPS: &str = r#"
import json, os, socket
asked = json.loads(os.environ["PAYLOAD"])
for directory in ("/tmp", os.environ["HOME"], os.environ["OUTPUT_DIR"], "/dev/shm"):
    open(directory + "/secret", "w").write(asked["token"])
with socket.create_connection(("127.0.0.1", asked["port"])) as held:
    held.sendall((os.environ["REQUEST_ID"] + "\n").encode())
    held.recv(1)
print(all(open(d + "/secret").read() == asked["token"] for d in ("/tmp", "/dev/shm")))
"#;

/// While the one runs, and when it has ended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_of_other_runs_are_out_of_reach() {
    let target = Target::start("full").await;
    let gateway = &target.platform.gateway;
    let hold = Hold::of(target.create(KEEPS, 128).await).await;
    let kept = gateway.run_async(&hold.function, &hold.input("secret-of-another-run")).await;
    hold.wait_for_runs(1).await;
    let reader = target.create(READS, 128).await;
    let slots = target.platform.data_dir().join("runs");
    let paths =
        ["/tmp/secret", "/tmp/home/secret", "/tmp/output/secret", "/dev/shm/secret"].map(str::to_owned);
    let paths: Vec<String> = paths.into_iter().chain([slots.display().to_string()]).collect();
    let input = json!({ "paths": paths, "pid": gateway.pid(), "mark": "secret-of-another" });
    let reads = async || {
        let result = gateway.run(&reader, &input).send().await.expect(200).json();
        assert_eq!((&result["stdout"], &result["stderr"]), (&json!("True True\n"), &json!("")), "{result}");
    };
    reads().await;
    hold.release();
    assert_eq!(gateway.result_of(&kept).await.json()["stdout"], "True\n");
    reads().await;
    target.assert_unharmed().await;
    target.finish().await;
}

/// Sends signals to processes of the host, and looks into them.
const SIGNALS: &str = r#"
import ctypes, json, os, signal
asked = json.loads(os.environ["PAYLOAD"])
libc = ctypes.CDLL(None, use_errno=True)
for pid in asked["pids"]:
    for number in (0, signal.SIGTERM, signal.SIGKILL):
        for process in (pid, -pid):
            try:
                os.kill(process, number)
                print("signalled", process)
            except OSError:
                pass
    for file in ("status", "environ", "mem", "maps", "root", "cwd", "fd"):
        if os.path.lexists(f"/proc/{pid}/{file}"):
            print("sees", pid, file)
    PTRACE_ATTACH, PTRACE_SEIZE = 16, 0x4206
    for request in (PTRACE_ATTACH, PTRACE_SEIZE):
        if libc.ptrace(request, pid, 0, 0) == 0:
            print("traces", pid)
# Everything that it may signal. The gateway is not among it.
try:
    os.kill(-1, signal.SIGKILL)
except OSError:
    pass
print("alive")
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_of_the_machine_are_out_of_reach() {
    let target = Target::start("none").await;
    let pids = [target.platform.gateway.pid(), i32::try_from(std::process::id()).expect("a pid fits")];
    // Its own processes have the first numbers.
    assert!(pids.iter().all(|pid| *pid > 64), "{pids:?}");
    let result = target.run(SIGNALS, 128, &json!({ "pids": pids })).await;
    assert_eq!((&result["stdout"], &result["stderr"]), (&json!("alive\n"), &json!("")), "{result}");
    target.finish().await;
}

/// Forks processes that do nothing, then starts threads.
const FORKS: &str = r#"
import os, signal, threading
count = 0
try:
    while count < 10000:
        if os.fork() == 0:
            signal.pause()
        count += 1
except OSError:
    pass
try:
    threading.Thread(target=lambda: None).start()
    print("one more thread")
except RuntimeError:
    pass
print(count)
"#;

/// Forks as fast as it can.
const BOMB: &str = "
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_are_bounded() {
    let target = Target::start("none").await;
    // Each process has page tables and some pages of its own.
    let result = target.run(FORKS, 2_048, &json!({})).await;
    if result["status"] == "SUCCESS" {
        let count: u64 =
            result["stdout"].as_str().and_then(|text| text.trim().parse().ok()).expect("a number");
        assert!((16..=TASKS_MAX).contains(&count), "{result}");
    } else {
        // Or it was stopped.
        assert_eq!(result["exitCode"], 137, "{result}");
    }
    let result = target.run_limited(BOMB, 2_000, &json!({})).await;
    let exit_code = result["exitCode"].as_i64().unwrap_or_default();
    assert!(result["status"] == "FAILED" && [1, 124, 137].contains(&exit_code), "{result}");
    target.finish().await;
}

/// Writes 10 GiB to each place, and shows how many MiB of them there were.
const FILLS: &str = r#"
import os
def fill(directory):
    total = 0
    try:
        for number in range(100):
            with open(f"{directory}/{number}", "wb", buffering=0) as file:
                for _ in range(100):
                    total += file.write(bytes(1 << 20))
    except OSError:
        pass
    for name in os.listdir(directory):
        if name.isdigit():
            os.remove(f"{directory}/{name}")
    return total >> 20
with open("/tmp/sparse", "wb") as file:
    try:
        os.truncate(file.fileno(), 10 << 30)
        print("sparse")
    except OSError:
        pass
os.remove("/tmp/sparse")
print(fill("/tmp"), fill(os.environ["OUTPUT_DIR"]), fill("/dev/shm"))
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_are_bounded() {
    let target = Target::start("none").await;
    let result = target.run(FILLS, 256, &json!({})).await;
    assert_eq!(result["status"], "SUCCESS", "{result}");
    let text = result["stdout"].as_str().expect("a text");
    let sizes: Vec<u64> = text.split_whitespace().map(|size| size.parse().expect("a number")).collect();
    // `/dev/shm` has 64 MiB, as in Docker.
    assert!(
        matches!(sizes[..], [tmp, out, shm] if tmp <= WORK_MB && out <= WORK_MB && shm <= 64),
        "{result}"
    );
    assert!(sizes[0] >= WORK_MB / 2, "less than it may have: {result}");
    target.finish().await;
}

/// Ways to use 10 GiB of memory.
const GROWS: [(&str, &str); 5] = [
    ("objects", "x = [bytes([n % 255 + 1]) * (1 << 20) for n in range(10240)]"),
    (
        "shared memory",
        "import mmap
shared = mmap.mmap(-1, 10 << 30)
for at in range(0, 10 << 30, 4096):
    shared[at] = 1",
    ),
    (
        "processes",
        "import os, time
for n in range(20):
    if os.fork() == 0:
        x = bytes([n + 1]) * (64 << 20)
        time.sleep(30)
        os._exit(0)
for _ in range(20):
    os.wait()",
    ),
    (
        "processes of other sessions",
        "import os, time
for n in range(20):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            x = bytes([n + 1]) * (64 << 20)
            time.sleep(30)
        os._exit(0)
time.sleep(30)",
    ),
    (
        "files without a name",
        "import os
for n in range(1000):
    file = os.memfd_create(str(n))
    for _ in range(10):
        os.write(file, bytes(1 << 20))",
    ),
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_is_bounded() {
    let target = Target::start("none").await;
    for (name, source) in GROWS {
        let result = target.run(source, 128, &json!({})).await;
        assert_eq!(result["status"], "FAILED", "{name}: {result}");
        // Without control groups files without a name are denied, and a small machine denies shared memory.
        let is_denied = result["exitCode"] == 1 && ["files without a name", "shared memory"].contains(&name);
        assert!(result["exitCode"] == 137 || is_denied, "{name}: {result}");
        let reason = result["stderr"].as_str().expect("a text");
        assert!(is_denied || reason.contains("128"), "{name}: the reason names the limit: {result}");
    }
    target.finish().await;
}

/// Starts processes in all ways that may outlive a run. They ignore signals, and keep its pipes open.
const OUTLIVES: &str = r#"
import ctypes, json, os, signal, sys, time
asked = json.loads(os.environ["PAYLOAD"])
SLEEP = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
def stay(*leave):
    for step in leave:
        step()
    ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)  # no PR_SET_PDEATHSIG
    os.execv("/usr/bin/python3", ["python3", "-c", SLEEP, asked["mark"]])
def fork(*leave):
    if os.fork() == 0:
        stay(*leave)
def fork_twice(*leave):
    if os.fork() == 0:
        for step in leave:
            step()
        if os.fork() == 0:
            stay()
        os._exit(0)
own_group = lambda: os.setpgid(0, 0)
hang_up = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
for start in (fork, fork_twice):
    start()
    start(os.setsid)
    start(own_group)
    start(os.setsid, hang_up)
def has_mark(pid):
    try:
        return asked["mark"].encode() in open(f"/proc/{pid}/cmdline", "rb").read()
    except OSError:
        return False
while sum(has_mark(pid) for pid in os.listdir("/proc") if pid.isdigit()) < 8:
    time.sleep(0.01)
print("begun")
if asked["end"] == "stop":
    os.kill(os.getpid(), signal.SIGSTOP)
if asked["end"] == "wait":
    time.sleep(600)
"#;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_outlives_its_run() {
    let target = Target::start("none").await;
    for (end, timeout_ms, code) in [("exit", 60_000, 0), ("wait", 5_000, 124), ("stop", 5_000, 124)] {
        let mark = new_mark();
        let input = json!({ "mark": mark, "end": end });
        let result = target.run_limited(OUTLIVES, timeout_ms, &input).await;
        assert_eq!(result["exitCode"], code, "{end}: {result}");
        // The machine may be too slow for so many processes until the time limit.
        assert!(result["stdout"] == "begun\n" || code == 124, "{end}: {result}");
        wait_until_gone(&mark).await;
    }
    target.finish().await;
}

/// Tries to reach services of the host, and prints what it has reached.
const CONNECTS: &str = r#"
import json, os, socket
asked = json.loads(os.environ["PAYLOAD"])
hosts = ["127.0.0.1", "127.0.0.53", "10.0.2.2", "10.0.2.3", "198.19.255.2", "169.254.169.254", "::1"]
for device in (b"", b"tap0\0", b"lo\0"):
    for host in hosts + asked["hosts"]:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        for port in asked["ports"]:
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
                try:
                    with socket.socket(family, kind) as s:
                        s.settimeout(0.5)
                        if device:
                            s.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)
                        s.connect((host, port))
                        if kind == socket.SOCK_STREAM:
                            print("reached", host, port, device)
                        else:
                            s.send(b"x")
                except OSError:
                    pass
for name in asked["names"]:
    with socket.socket(socket.AF_UNIX) as s:
        try:
            s.connect("\0" + name)
            print("reached", name)
        except OSError:
            pass
print("done")
"#;

async fn the_host_is_out_of_reach(network: &str) {
    use std::os::linux::net::SocketAddrExt;
    let target = Target::start(network).await;
    let tcp = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a free port");
    let udp = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a free port");
    let name = new_mark();
    let abstract_name = std::os::unix::net::SocketAddr::from_abstract_name(&name).expect("it is short");
    let unix = std::os::unix::net::UnixListener::bind_addr(&abstract_name).expect("the name is new");
    tcp.set_nonblocking(true).expect("a socket");
    udp.set_nonblocking(true).expect("a socket");
    unix.set_nonblocking(true).expect("a socket");
    let port = |at: std::io::Result<std::net::SocketAddr>| at.expect("it is bound").port();
    let ports =
        [port(tcp.local_addr()), port(udp.local_addr()), target.platform.gateway.addr().port()].to_vec();
    let own = nix::ifaddrs::getifaddrs().expect("Linux");
    let own = own.filter_map(|interface| Some(interface.address?.as_sockaddr_in()?.ip().to_string()));
    let input = json!({ "ports": ports, "hosts": own.collect::<Vec<_>>(), "names": [name] });
    let result = target.run(CONNECTS, 128, &input).await;
    assert_eq!((&result["stdout"], &result["stderr"]), (&json!("done\n"), &json!("")), "{result}");
    // A connection or a packet without an answer counts, too.
    let would_block = |kind: Option<ErrorKind>| assert_eq!(kind, Some(ErrorKind::WouldBlock));
    would_block(tcp.accept().err().map(|e| e.kind()));
    would_block(udp.recv(&mut [0; 16]).err().map(|e| e.kind()));
    would_block(unix.accept().err().map(|e| e.kind()));
    target.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_network_the_host_is_out_of_reach() {
    the_host_is_out_of_reach("none").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_the_public_network_the_host_is_out_of_reach() {
    // In a container without this device there is no such network.
    if Path::new("/dev/net/tun").exists() {
        the_host_is_out_of_reach("public").await;
    } else {
        eprintln!("not tested: there is no /dev/net/tun");
    }
}

/// Processes that wait for their jobs, and those of handlers: they end with `dev`, however it ends.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_outlives_the_worker() {
    let (dir, key) = (Scratch::new("killed"), new_key());
    let [data, conf] = ["data", "conf"].map(|name| dir.path().join(name));
    std::fs::create_dir(&conf).expect("the directory is writable");
    let settings = WorkerSettings::new().with("sandbox.mode", "required").with("warm.interpreters", 2);
    put_file(&conf.join("worker.toml"), &settings.to_toml());
    let [data_dir, conf_dir] = [&data, &conf].map(|path| path.to_str().expect("the path is UTF-8"));
    let args = ["dev", "--port", "0", "--data-dir", data_dir, "--conf", conf_dir];
    let env = [("INFRA_API_KEY".to_owned(), key.clone())];
    let runs_dir = data.join("runs");
    let mut left = Vec::new();
    for is_killed in [true, false] {
        let gateway = Gateway::start(&args, &env, &key, &[]).await;
        for old in left.drain(..) {
            Leftovers::wait_for_none_after(old, &runs_dir).await;
        }
        // The directories of the worker that was killed are gone as well.
        let now = Leftovers::of(gateway.pid(), &runs_dir);
        assert!(now.slots <= 16 && now.mounts == 0, "{now:?}");
        let mark = new_mark();
        let handler = "import subprocess\ndef handler(event, context):\n    \
                       subprocess.Popen(['sh', '-c', 'sleep 600; :', event]); return 1";
        let handler = gateway.create(&Function::python_handler(handler)).await;
        gateway.run(&handler, &json!(mark)).send().await.expect(200);
        let hold = Hold::of(gateway.upload_python(HOLDING).await).await;
        let held = gateway.run_async(&hold.function, &hold.input("held")).await;
        hold.wait_for_runs(1).await;
        if is_killed {
            left.push(gateway.pid());
            gateway.kill();
        } else {
            // The job of the killed one runs again, and those of this one end with it.
            let pid = gateway.pid();
            hold.release();
            gateway.result_of(&held).await;
            gateway.stop().await;
            Leftovers::wait_for_none_after(pid, &runs_dir).await;
        }
        wait_until_gone(&mark).await;
    }
    assert!(processes_with(data_dir).is_empty(), "{:?}", processes_with(data_dir));
}

/// Arguments of `unshare` for a namespace of mounts, if this machine permits one.
fn mount_namespace() -> &'static [&'static str] {
    const WAYS: [&[&str]; 2] = [&["--mount"], &["--user", "--map-root-user", "--mount"]];
    let works = |way: &&&[&str]| {
        let tried = std::process::Command::new("unshare").args(**way).arg("true").status();
        tried.is_ok_and(|status| status.success())
    };
    WAYS.iter()
        .find(works)
        .expect("`unshare --mount` is permitted: run this as root, or with user namespaces")
}

/// A machine without bubblewrap: its program is hidden. All is said, and nothing runs where a sandbox is
/// required.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_missing_sandbox_is_reported_or_refused() {
    let hide = "for program in /usr/bin/bwrap /bin/bwrap /usr/local/bin/bwrap; do
    if [ -e $program ]; then mount --bind /dev/null $program; fi
done
exec \"$@\"";
    let wrapper = [&["unshare"][..], mount_namespace(), &["--", "sh", "-c", hide, "sh"]].concat();
    let (dir, key) = (Scratch::new("no-sandbox"), new_key());
    let data = dir.path().join("data").display().to_string();
    let conf = dir.path().join("conf");
    std::fs::create_dir(&conf).expect("the directory is writable");
    let file = conf.join("worker.toml");
    let conf = conf.display().to_string();
    let env = [("INFRA_API_KEY".to_owned(), key.clone())];
    let args = ["dev", "--port", "0", "--data-dir", &data, "--conf", &conf];

    // The default of `dev`, and none on purpose.
    for mode in ["", "sandbox.mode = \"off\"\n"] {
        put_file(&file, mode);
        let gateway = Gateway::start_through(&wrapper, &args, &env, &key).await;
        gateway.wait_for_output("functions run WITHOUT a sandbox").await;
        let is_told = |status, health: &Value| {
            status == 200
                && health["status"] == "DEGRADED"
                && health["checks"]["sandbox"]["status"] == "DEGRADED"
        };
        gateway.wait_for_health("there is no sandbox", is_told).await;
        assert_eq!(gateway.metric("infra_worker_isolated").await, Some(0.0));
        let network = r#"infra_worker_sandbox_info{cgroups="#;
        let metrics = gateway.anonymous("GET", "/metrics").send().await.expect(200).text();
        assert!(metrics.contains(network) && metrics.contains(r#"network="full""#), "no kind of sandbox");
        let hello = gateway.run(HELLO, &json!({ "name": "Ada" })).send().await.expect(200).json();
        assert_eq!(hello["status"], "SUCCESS", "{hello}");
        gateway.finish().await;
    }

    // Where it is required: in `dev` by a setting, in `worker` by default.
    put_file(&file, "sandbox.mode = \"required\"\n");
    let (redis, cloud) = (Redis::start(None).await, Cloud::start(&[]).await);
    let worker = WorkerSetup::new(&cloud, &redis);
    for (args, env) in [(&args[..], env.to_vec()), (&["worker"][..], worker.all_env())] {
        let process = start_through(&wrapper, args, &env, dir.path());
        let run = Exited::of(&process, ENDS_WITHIN).await;
        assert_eq!(run.code, Some(78), "{args:?}: {}", run.output);
        for text in ["bubblewrap", "apt-get install bubblewrap", "sandbox.mode"] {
            assert!(run.output.contains(text), "{args:?}, {text}: {}", run.output);
        }
    }
}
