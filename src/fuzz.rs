//! Fuzz tests for the parsers of untrusted input.
//!
//! A target is a unit test beside its parser, with a name that begins with `fuzz_`. Its corpus is
//! `tests/corpus/<target>`. The test runs each input of the corpus unchanged, then random mutations of them:
//! for 2 s in `make test`, for `FUZZ_SECONDS` in `make fuzz`. A failing input is minimized and added to the
//! corpus. This uses proptest, because cargo-fuzz requires a nightly compiler.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};
use std::path::PathBuf;
use std::time::{Duration, Instant};

const SECONDS_DEFAULT: u64 = 2;
/// Fixed, so that `make test` is reproducible. `make fuzz` uses a new seed for each run.
const SEED_DEFAULT: u64 = 20_261_123;
const CASES: u32 = 512;
const INPUT_BYTES_MAX: usize = 16 << 10;

/// Fragments that are likely to reach edge cases of the parsers.
const WORDS: &[&[u8]] = &[
    b"\r\n",
    b"\n",
    b"\r",
    b"\0",
    b" ",
    b"\t",
    b":",
    b";",
    b",",
    b"=",
    b"#",
    b"%",
    b"\"",
    b"\\",
    b"{",
    b"}",
    b"[",
    b"]",
    b"0\r\n\r\n",
    b"Content-Length: 1\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Host: b\r\n",
    b" HTTP/1.1\r\n",
    b"HTTP/2.0",
    b"\\ud800",
    b"\\u0000",
    b"1e999",
    b"-1",
    b"18446744073709551616",
    b"null",
    b"\xff",
    b"\xc3\x28",
    b"[[limit]]\n",
    b"[http]\n",
    b"functionId",
    b"inputData",
    b"requestId",
    b"stderr",
];

#[derive(Clone, Debug)]
enum Change {
    Flip(Index, u8),
    Set(Index, u8),
    Insert(Index, Vec<u8>),
    Delete(Index, usize),
    Repeat(Index, usize, usize),
    Cut(Index),
    /// Replaces the rest by a part of another input of the corpus.
    Splice(Index, Index, Index),
}

fn change() -> impl Strategy<Value = Change> {
    let word = || select(WORDS).prop_map(<[u8]>::to_vec);
    prop_oneof![
        (any::<Index>(), 0..8_u8).prop_map(|(at, bit)| Change::Flip(at, 1 << bit)),
        (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Change::Set(at, byte)),
        (any::<Index>(), word()).prop_map(|(at, word)| Change::Insert(at, word)),
        (any::<Index>(), vec(any::<u8>(), 1..16)).prop_map(|(at, bytes)| Change::Insert(at, bytes)),
        (any::<Index>(), 1..32_usize).prop_map(|(at, len)| Change::Delete(at, len)),
        (any::<Index>(), 1..32_usize, 1..64_usize)
            .prop_map(|(at, len, times)| Change::Repeat(at, len, times)),
        any::<Index>().prop_map(Change::Cut),
        (any::<Index>(), any::<Index>(), any::<Index>())
            .prop_map(|(at, of, from)| Change::Splice(at, of, from)),
    ]
}

impl Change {
    fn apply(&self, input: &mut Vec<u8>, corpus: &[Vec<u8>]) {
        let place = |at: &Index, len: usize| if len == 0 { 0 } else { at.index(len) };
        match self {
            Self::Flip(..) | Self::Set(..) if input.is_empty() => {}
            Self::Flip(at, bit) => {
                let at = at.index(input.len());
                input[at] ^= bit;
            }
            Self::Set(at, byte) => {
                let at = at.index(input.len());
                input[at] = *byte;
            }
            Self::Insert(at, bytes) => {
                let at = at.index(input.len() + 1);
                input.splice(at..at, bytes.iter().copied());
            }
            Self::Delete(at, len) => {
                let at = place(at, input.len());
                input.drain(at..(at + len).min(input.len()));
            }
            Self::Repeat(at, len, times) => {
                let at = place(at, input.len());
                let part = input[at..(at + len).min(input.len())].repeat(*times);
                input.splice(at..at, part);
            }
            Self::Cut(at) => input.truncate(place(at, input.len())),
            Self::Splice(at, of, from) => {
                let other = of.get(corpus);
                input.truncate(place(at, input.len()));
                input.extend_from_slice(&other[place(from, other.len())..]);
            }
        }
        input.truncate(INPUT_BYTES_MAX);
    }
}

fn variable(name: &str, default: u64) -> u64 {
    let value = std::env::var(name).ok().filter(|value| !value.is_empty());
    value.map_or(default, |value| value.parse().expect("a number"))
}

/// Calls `property` with the corpus of `target` and with mutations of it. The property fails by a panic.
///
/// # Panics
/// An input fails. The message names the file of the minimized input.
pub fn run(target: &str, property: impl Fn(&[u8])) {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(target);
    let mut files: Vec<PathBuf> =
        std::fs::read_dir(&dir).expect("the corpus").map(|file| file.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty(), "the corpus of {target} is empty");
    let corpus: Vec<Vec<u8>> = files.iter().map(|file| std::fs::read(file).unwrap()).collect();
    corpus.iter().for_each(|input| property(input));

    let mut seed = [0; 32];
    seed[..8].copy_from_slice(&variable("FUZZ_SEED", SEED_DEFAULT).to_le_bytes());
    let mut rng = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
    let config = Config { cases: CASES, failure_persistence: None, ..Config::default() };
    let input = (any::<Index>(), vec(change(), 0..8)).prop_map(|(of, changes)| {
        let mut input = of.get(&corpus).clone();
        changes.iter().for_each(|change| change.apply(&mut input, &corpus));
        input
    });
    let end = Instant::now() + Duration::from_secs(variable("FUZZ_SECONDS", SECONDS_DEFAULT));
    let inputs = std::cell::Cell::new(0_u64);
    while Instant::now() < end {
        // A runner ends after `CASES` cases, so each round needs a new one.
        let mut runner = TestRunner::new_with_rng(
            config.clone(),
            TestRng::from_seed(RngAlgorithm::ChaCha, &rng.random::<[u8; 32]>()),
        );
        let ran = runner.run(&input, |input| {
            inputs.set(inputs.get() + 1);
            property(&input);
            Ok::<(), TestCaseError>(())
        });
        if let Err(TestError::Fail(why, input)) = ran {
            let file = dir.join(format!("found-{:08x}", crc32fast::hash(&input)));
            std::fs::write(&file, &input).expect("the corpus is writable");
            panic!("{target}: {why}; the input is {}: {:?}", file.display(), String::from_utf8_lossy(&input));
        }
    }
    println!("{target}: {} inputs", inputs.get());
}
