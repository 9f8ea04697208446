//! The script by which jobs end: each is counted once, whoever ends it, in whatever order, however often.

use crate::harness::redis::{Redis, Reply};

const SCRIPT: &str = include_str!("../../src/backend/aws/journal_end.lua");
const KEYS: [&str; 4] = ["inflight:{1}", "whole:{1}", "unposted:{1}", "givenup:{1}"];

struct Journal(Redis);

impl Journal {
    async fn command(&self, words: &[&str]) -> Reply {
        let words: Vec<&[u8]> = words.iter().map(|word| word.as_bytes()).collect();
        self.0.command(&words).await
    }

    /// Each line: job, function, errors, microseconds, runs with a handler's time, its microseconds, lost.
    async fn end(&self, lines: &[&str]) -> Reply {
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        let room = "2"; // jobs that are given up
        let call = [&["EVAL", SCRIPT, "4"], &KEYS[..], &[room, "100", &text]].concat();
        self.command(&call).await
    }

    async fn sums(&self, function: &str) -> String {
        match self.command(&["HGET", KEYS[2], function]).await {
            Reply::Bulk(text) => String::from_utf8(text).expect("text"),
            other => panic!("{other:?}"),
        }
    }

    async fn count(&self, key: &str) -> Reply {
        self.command(&["HLEN", key]).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_is_counted_once() {
    let journal = Journal(tokio::task::block_in_place(|| Redis::start(None)));
    assert_eq!(journal.end(&["a f 0 5 1 2 0"]).await, Reply::Integer(0), "Redis has lost its data");
    journal.command(&["SET", KEYS[1], "1"]).await;
    for id in ["a", "b", "c", "d", "e", "g", "h"] {
        journal.command(&["HSET", KEYS[0], id, "1:f"]).await;
    }
    // Twice in one call, of two functions, and one that was never journaled.
    let ended = ["a f 0 5 1 2 0", "a f 0 5 1 2 0", "b other 1 7 0 0 0", "z f 0 9 1 1 0"];
    for _ in 0..2 {
        assert_eq!(journal.end(&ended).await, Reply::Integer(1));
        assert_eq!(
            (journal.sums("f").await.as_str(), journal.sums("other").await.as_str()),
            ("1:0:5:1:2", "1:1:7:0:0")
        );
    }
    // Lost, and then not, in two calls and in one, in either order.
    for (lines, sums) in [
        (&["c f 1 0 0 0 1", "c f 1 0 0 0 1"][..], "2:1:5:1:2"),
        (&["c f 1 0 0 0 1"], "2:1:5:1:2"),
        (&["c f 0 4 1 3 0", "c f 0 4 1 3 0"], "2:0:9:2:5"),
        (&["d f 1 0 0 0 1", "d f 0 1 1 1 0"], "3:0:10:3:6"),
        (&["e f 0 1 1 1 0", "e f 1 0 0 0 1"], "4:0:11:4:7"),
    ] {
        assert_eq!(journal.end(lines).await, Reply::Integer(1));
        assert_eq!(journal.sums("f").await, sums, "{lines:?}");
    }
    assert_eq!(journal.count(KEYS[3]).await, Reply::Integer(0));
    // More are lost than are remembered.
    journal.command(&["HSET", KEYS[3], "x", "f", "y", "f"]).await;
    journal.end(&["g f 1 0 0 0 1"]).await;
    journal.end(&["g f 0 1 0 0 0"]).await;
    assert_eq!(
        (journal.sums("f").await.as_str(), journal.count(KEYS[0]).await),
        ("5:1:11:4:7", Reply::Integer(1))
    );
    assert_eq!(journal.end(&[]).await, Reply::Integer(1));
}
