//! Runs that begin, tell the test so, and complete when the test releases them.
//!
//! A run connects to a socket of the test, sends its request id, and waits for the end of the connection. So
//! the test knows which jobs have begun, how often and in which order. A function needs the network `full`
//! for that, or no sandbox; see [`super::own_worker::WorkerSettings`].

use super::wait::{SOON, eventually, spawn};
use serde_json::{Value, json};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// A python function that waits for its [`Hold`], then prints its input.
pub const HOLDING: &str = "import json, os, socket
asked = json.loads(os.environ['PAYLOAD'])
with socket.create_connection(('127.0.0.1', asked['port'])) as held:
    held.sendall((os.environ['REQUEST_ID'] + '\\n').encode())
    held.recv(1)
print(json.dumps(asked))
";

pub struct Hold {
    /// The function to run.
    pub function: String,
    port: u16,
    runs: Arc<HeldRuns>,
    released: watch::Sender<bool>,
    accepting: JoinHandle<()>,
}

#[derive(Default)]
struct HeldRuns {
    /// Ids, in the order in which the runs have begun.
    begun: Mutex<Vec<String>>,
    /// Number of runs that are held now.
    held: AtomicUsize,
}

impl Hold {
    /// `function`: behaves as [`HOLDING`].
    pub async fn of(function: String) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("loopback has a free port");
        let port = listener.local_addr().expect("a bound socket has an address").port();
        let (released, of_runs) = watch::channel(false);
        let runs = Arc::<HeldRuns>::default();
        let accepted = Arc::clone(&runs);
        let accepting = spawn(async move {
            while let Ok((run, _)) = listener.accept().await {
                spawn(hold(run, Arc::clone(&accepted), of_runs.clone()));
            }
        });
        Self { function, port, runs, released, accepting }
    }

    /// The input of a run that prints `token` when it is released.
    pub fn input(&self, token: &str) -> Value {
        json!({ "behave": "hold", "port": self.port, "token": token })
    }

    /// Releases all runs, those that begin later included.
    pub fn release(&self) {
        self.released.send_replace(true);
    }

    /// The ids of the runs that have begun, in this order. A job that runs twice is there twice.
    pub fn begun(&self) -> Vec<String> {
        self.runs.begun.lock().expect("the lock is not poisoned").clone()
    }

    /// Waits until no run is held: those that were have been released, or killed.
    pub async fn wait_for_none(&self) {
        eventually("the end of the held runs", SOON, || async {
            let held = self.runs.held.load(Ordering::Relaxed);
            if held == 0 { Ok(()) } else { Err(format!("{held} runs")) }
        })
        .await;
    }

    /// Waits until `count` runs have begun.
    pub async fn wait_for_runs(&self, count: usize) {
        eventually(&format!("{count} runs"), 6 * SOON, || async {
            let begun = self.begun().len();
            if begun >= count { Ok(()) } else { Err(format!("{begun} have begun")) }
        })
        .await;
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Ends with the release, with the run, or with the [`Hold`].
async fn hold(run: TcpStream, runs: Arc<HeldRuns>, mut released: watch::Receiver<bool>) {
    let mut run = BufReader::new(run);
    let mut id = String::new();
    if !run.read_line(&mut id).await.is_ok_and(|bytes| bytes > 0) {
        return;
    }
    runs.held.fetch_add(1, Ordering::Relaxed);
    runs.begun.lock().expect("the lock is not poisoned").push(id.trim().to_owned());
    tokio::select! {
        _ = released.wait_for(|released| *released) => {}
        // A run sends nothing more, so this is its end.
        _ = run.read_u8() => {}
    }
    runs.held.fetch_sub(1, Ordering::Relaxed);
}
