//! Instructions a request: `make instructions`.
//!
//! A time measured on a shared machine varies by 10 % and more. This count varies by less than 0.1 %, so it
//! shows small changes of cost. It covers user space only and no cache misses: it complements `make bench`
//! and `make loadtest` and does not replace them.
//!
//! The program starts itself under valgrind's callgrind and makes a fixed number of requests after a warm-up.
//! Noise is kept out as follows:
//!
//! * One thread runs the server, its loops and the clients. Only its instructions count.
//! * Counting begins after the warm-up and ends with the last answer. Start and stop are not part of it.
//! * Time is virtual (see [`clock`]): the work of periodic loops does not depend on the load of the machine.
//! * The environment is empty, so the layout of the stack is always the same.
//!
//! The count includes the client: one write, one read, and the parse of a response's head.

mod clock;
#[expect(dead_code, unused_imports, reason = "the benchmarks use the other parts")]
#[path = "../request/fixture.rs"]
mod fixture;

use fixture::{Client, Fixture, Json};
use futures_util::future::join_all;
use std::fs;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

// As in the server.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Connections, each with one request at a time: as many as a batch of the queue holds.
const CLIENTS: usize = 10;
/// Requests of each client before counting begins. Caches, pools and buffers grow to their size.
const WARM_UP: usize = 200;
/// Requests of each client that count.
const COUNTED: usize = 300;
const MODES: [&str; 2] = ["asynchronous", "synchronous"];
/// The bounds, relative to the root of the package.
const BOUNDS: &str = "benches/instructions.toml";

#[derive(serde::Deserialize)]
struct Bounds {
    tolerance_percent: f64,
    asynchronous: u64,
    synchronous: u64,
}

impl Bounds {
    fn path() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join(BOUNDS)
    }

    fn of(text: &str) -> Self {
        toml::from_str(text).expect("benches/instructions.toml is valid")
    }
}

fn main() -> ExitCode {
    // Cargo adds `--bench`.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => check(),
        ["accept"] => accept(),
        ["drive", mode] => drive(mode),
        _ => {
            eprintln!("arguments: none, to compare with {BOUNDS}; or `accept`, to write it");
            ExitCode::from(2)
        }
    }
}

fn check() -> ExitCode {
    let bounds =
        Bounds::of(&fs::read_to_string(Bounds::path()).expect("benches/instructions.toml is readable"));
    let tolerance = bounds.tolerance_percent;
    let mut exceeded = Vec::new();
    for (mode, bound) in MODES.into_iter().zip([bounds.asynchronous, bounds.synchronous]) {
        let counted = count(mode);
        let change = (counted as f64 / bound as f64 - 1.0) * 100.0;
        println!("{mode:<12} {counted:>7} instructions a request ({change:+.2} % of the bound {bound})");
        if change > tolerance {
            exceeded.push(mode);
        } else if change < -tolerance {
            println!("{mode:<12} is cheaper than its bound. Lower the bound: make instructions ACCEPT=1");
        }
    }
    let Some(mode) = exceeded.first() else { return ExitCode::SUCCESS };
    eprintln!(
        "\nA request costs over {tolerance} % more than its bound in {BOUNDS}. To find out why, compare the \
         profiles of two versions:\n  callgrind_annotate --inclusive=yes {}\n\
         If the cost is intended, set new bounds with `make instructions ACCEPT=1`, and commit {BOUNDS} with \
         the reason.",
        profile_of(mode).display(),
    );
    ExitCode::FAILURE
}

fn accept() -> ExitCode {
    let text = fs::read_to_string(Bounds::path()).expect("benches/instructions.toml is readable");
    let comments: String =
        text.lines().filter(|line| line.starts_with('#')).flat_map(|line| [line, "\n"]).collect();
    let tolerance = Bounds::of(&text).tolerance_percent;
    let [asynchronous, synchronous] = MODES.map(count);
    let bounds = format!(
        "tolerance_percent = {tolerance:?}\nasynchronous = {asynchronous}\nsynchronous = {synchronous}\n"
    );
    fs::write(Bounds::path(), format!("{comments}{bounds}")).expect("benches/instructions.toml is writable");
    print!("{BOUNDS}:\n{bounds}");
    ExitCode::SUCCESS
}

/// Where callgrind writes what the main thread did between [`counting_begins`] and [`counting_ends`].
fn profile_of(mode: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("callgrind.{mode}.1-01"))
}

/// Instructions a request.
fn count(mode: &str) -> u64 {
    let profile = profile_of(mode);
    let _ = fs::remove_file(&profile);
    let name = profile.to_str().and_then(|name| name.strip_suffix(".1-01")).expect("a path in UTF-8");
    let status = Command::new("valgrind")
        .args(["--tool=callgrind", "--separate-threads=yes", "--quiet"])
        .args(["--zero-before=counting_begins", "--dump-before=counting_ends"])
        .arg(format!("--callgrind-out-file={name}"))
        .arg(std::env::current_exe().expect("this program has a path"))
        .args(["drive", mode])
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin")
        .stdin(Stdio::null())
        .status()
        .expect("valgrind is installed: scripts/setup.sh instructions");
    assert!(status.success(), "the run under valgrind failed: {status}");
    let text = fs::read_to_string(&profile).expect("callgrind has written a profile");
    let totals = text.lines().find_map(|line| line.strip_prefix("totals: ")).expect("a line of totals");
    totals.trim().parse::<u64>().expect("a number") / (CLIENTS * COUNTED) as u64
}

/// Makes requests, one at a time on each of [`CLIENTS`] connections.
fn drive(mode: &str) -> ExitCode {
    let subscriber = tracing_subscriber::fmt().with_writer(std::io::sink).event_format(Json).finish();
    tracing::subscriber::set_global_default(subscriber).expect("there is no other subscriber");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let mut fixture = Fixture::start();
        let mut clients = Vec::with_capacity(CLIENTS);
        for _ in 0..CLIENTS {
            clients.push(fixture.client(mode == "asynchronous").await);
        }
        run(&mut clients, WARM_UP).await;
        counting_begins();
        run(&mut clients, COUNTED).await;
        counting_ends();
    });
    ExitCode::SUCCESS
}

async fn run(clients: &mut [Client], requests: usize) {
    let all = clients.iter_mut().map(async |client| {
        for _ in 0..requests {
            client.run().await;
        }
    });
    join_all(all).await;
}

/// Callgrind knows the function by its name, and sets its counts to zero.
#[expect(unsafe_code, reason = "the name must not be mangled")]
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn counting_begins() {
    black_box(());
}

/// Callgrind writes its counts.
#[expect(unsafe_code, reason = "the name must not be mangled")]
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn counting_ends() {
    black_box(());
}
