//! The Lua scripts of the journal. Each job counts once, in any order and number of calls. Sums get
//! increasing numbers, and none after Redis has lost its data.

use crate::harness::redis::{Redis, Reply};

const SCRIPT: &str = include_str!("../../src/backend/aws/redis/journal_end.lua");
const KEYS: [&str; 5] = ["inflight:{1}", "whole:{1}", "unposted:{1}", "givenup:{1}", "counted:{1}"];
const NUMBER: &str = include_str!("../../src/backend/aws/redis/journal_number.lua");
const NUMBER_KEYS: [&str; 4] = ["unposted:{1}", "posting:{1}", "posting:last:{1}", "whole:{1}"];

struct Journal(Redis);

impl Journal {
    async fn command(&self, words: &[&str]) -> Reply {
        let words: Vec<&[u8]> = words.iter().map(|word| word.as_bytes()).collect();
        self.0.command(&words).await
    }

    /// Each line: job, function, errors, duration (µs), executions with a handler duration, their sum (µs),
    /// 1 for lost plus 2 for shared.
    async fn end(&self, lines: &[&str]) -> Reply {
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        let room = "2"; // remembered lost jobs
        let call = [&["EVAL", SCRIPT, "5"], &KEYS[..], &[room, "100", &text]].concat();
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
async fn a_job_counts_once() {
    let journal = Journal(Redis::start(None).await);
    assert_eq!(journal.end(&["a f 0 5 1 2 0 0"]).await, Reply::Integer(0), "Redis has lost its data");
    journal.command(&["SET", KEYS[1], "1"]).await;
    for id in ["a", "b", "c", "d", "e", "g", "h"] {
        journal.command(&["HSET", KEYS[0], id, "1:f"]).await;
    }
    // A job twice in one call, two functions, and a job that was never journaled.
    let ended = ["a f 0 5 1 2 0 0", "a f 0 5 1 2 0 0", "b other 1 7 0 0 0 0", "z f 0 9 1 1 0 0"];
    for added in ["1010", "0000"] {
        assert_eq!(journal.end(&ended).await, digits(added));
        assert_eq!(
            (journal.sums("f").await.as_str(), journal.sums("other").await.as_str()),
            ("1:0:5:1:2", "1:1:7:0:0")
        );
    }
    // A lost job with a late result, in two calls and in one, in either order.
    for (lines, added, sums) in [
        (&["c f 1 0 0 0 0 1", "c f 1 0 0 0 0 1"][..], "10", "2:1:5:1:2"),
        (&["c f 1 0 0 0 0 1"], "0", "2:1:5:1:2"),
        (&["c f 0 4 1 3 1 0", "c f 0 4 1 3 1 0"], "20", "2:0:9:2:5:1"),
        (&["d f 1 0 0 0 0 1", "d f 0 1 1 1 0 0"], "12", "3:0:10:3:6:1"),
        (&["e f 0 1 1 1 0 0", "e f 1 0 0 0 0 1"], "10", "4:0:11:4:7:1"),
    ] {
        assert_eq!(journal.end(lines).await, digits(added));
        assert_eq!(journal.sums("f").await, sums, "{lines:?}");
    }
    assert_eq!(journal.count(KEYS[3]).await, Reply::Integer(0));
    // More lost jobs than are remembered.
    journal.command(&["HSET", KEYS[3], "x", "f", "y", "f"]).await;
    journal.end(&["g f 1 0 0 0 0 1"]).await;
    journal.end(&["g f 0 1 0 0 0 0"]).await;
    assert_eq!(
        (journal.sums("f").await.as_str(), journal.count(KEYS[0]).await),
        ("5:1:11:4:7:1", Reply::Integer(1))
    );
    assert_eq!(journal.end(&[]).await, Reply::Integer(1));
    journal.command(&["HSET", KEYS[0], "i", "1:f"]).await;
    assert_eq!(journal.end(&["i other 0 1 0 0 0 0"]).await, Reply::Integer(1));
    assert_eq!(journal.sums("other").await, "2:1:8:0:0");
}

/// A command of a dead process may enter a job once more that another node has sent and ended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shared_job_counts_once_even_if_it_enters_again() {
    let journal = Journal(Redis::start(None).await);
    journal.command(&["SET", KEYS[1], "1"]).await;
    let enter = async |id| journal.command(&["HSET", KEYS[0], id, "1:f"]).await;
    enter("a").await;
    assert_eq!(journal.end(&["a f 0 5 0 0 0 2"]).await, Reply::Integer(1));
    enter("a").await;
    assert_eq!(journal.end(&["a f 0 5 0 0 0 2"]).await, digits("0"));
    assert_eq!(
        (journal.sums("f").await.as_str(), journal.count(KEYS[0]).await),
        ("1:0:5:0:0", Reply::Integer(0))
    );
    // LOST at first; its late result adds the difference.
    enter("b").await;
    assert_eq!(journal.end(&["b f 1 0 0 0 0 3"]).await, Reply::Integer(1));
    enter("b").await;
    assert_eq!(journal.end(&["b f 0 7 0 0 0 2"]).await, digits("2"));
    assert_eq!(journal.sums("f").await, "2:0:12:0:0");
    // No room to remember a third one.
    enter("c").await;
    assert_eq!(journal.end(&["c f 0 1 0 0 0 2"]).await, Reply::Integer(1));
    assert_eq!(journal.count(KEYS[4]).await, Reply::Integer(2));
    assert_eq!(journal.sums("f").await, "3:0:13:0:0");
}

/// What each job added.
fn digits(added: &str) -> Reply {
    Reply::Bulk(added.into())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sums_get_increasing_numbers_and_none_after_data_loss() {
    let journal = Journal(Redis::start(None).await);
    let number = async |floor: &str| {
        let call = [&["EVAL", NUMBER, "4"], &NUMBER_KEYS[..], &[floor, "f", "g"]].concat();
        journal.command(&call).await
    };
    let texts = |reply: Reply| match reply {
        Reply::Array(parts) => parts
            .into_iter()
            .map(|part| match part {
                Reply::Bulk(text) => String::from_utf8(text).expect("text"),
                other => panic!("{other:?}"),
            })
            .collect::<Vec<_>>(),
        other => panic!("{other:?}"),
    };
    journal.command(&["HSET", NUMBER_KEYS[0], "f", "1:0:5:0:0"]).await;
    assert_eq!(number("0").await, Reply::Nil, "the mark of a complete journal is gone");
    assert_eq!(journal.count(NUMBER_KEYS[0]).await, Reply::Integer(1), "the sums are unchanged");
    journal.command(&["SET", NUMBER_KEYS[3], "1"]).await;
    // Above the current time: from a Redis whose clock was ahead.
    let floor = 4_000_000_000_000_000_u64;
    let first = format!("{}:1:0:5:0:0", floor + 1);
    assert_eq!(texts(number(&floor.to_string()).await), [first.as_str(), "", "", ""]);
    // A sum keeps its number until it is posted.
    journal.command(&["HSET", NUMBER_KEYS[0], "f", "2:0:7:0:0", "g", "3:0:9:0:0"]).await;
    let of_g = format!("{}:3:0:9:0:0", floor + 2);
    assert_eq!(texts(number("0").await), [first.as_str(), "2:0:7:0:0", of_g.as_str(), ""]);
}
