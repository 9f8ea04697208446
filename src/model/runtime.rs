//! The languages of functions, with the entry files and the memory bounds of each.

use std::ops::RangeInclusive;

/// A language that workers run. Older items of the function table may name others, which workers receive
/// unchanged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runtime {
    Python,
    Nodejs,
    Cpp,
    Go,
}

impl Runtime {
    pub const ALL: [Self; 4] = [Self::Python, Self::Nodejs, Self::Cpp, Self::Go];

    /// Returns `None` for an unknown name. Names are lower case.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|runtime| runtime.name() == name)
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Python => "python",
            Self::Nodejs => "nodejs",
            Self::Cpp => "cpp",
            Self::Go => "go",
        }
    }

    /// The files that can start a run. One of them must be at the top level of the code.
    pub fn entry_files(self) -> &'static [&'static str] {
        match self {
            Self::Python => &["main.py"],
            Self::Nodejs => &["index.js"],
            Self::Cpp => &["main", "main.cpp"],
            Self::Go => &["main", "main.go"],
        }
    }

    /// Whether functions of the runtime may have a handler. The others are programs.
    pub fn has_handlers(self) -> bool {
        matches!(self, Self::Python | Self::Nodejs)
    }

    /// The memory bounds for a change of a function, in MiB. An unknown runtime has the bounds that all
    /// runtimes share.
    ///
    /// The lower bound is the smallest recommendation of workers, because clients apply it unchanged.
    pub fn memory_mb_bounds(name: &str) -> RangeInclusive<u64> {
        const LEAST: u64 = 32;
        match Self::parse(name) {
            Some(Self::Python) => LEAST..=10_240,
            Some(Self::Nodejs | Self::Cpp | Self::Go) | None => LEAST..=1_024,
        }
    }

    /// The memory bounds for a new function, in MiB.
    pub fn new_memory_mb_bounds(self) -> RangeInclusive<u64> {
        128..=*Self::memory_mb_bounds(self.name()).end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_bounds() {
        for runtime in Runtime::ALL {
            assert_eq!(Runtime::parse(runtime.name()), Some(runtime));
        }
        for other in ["", "Python", "ruby"] {
            assert_eq!(Runtime::parse(other), None);
            assert_eq!(Runtime::memory_mb_bounds(other), 32..=1024);
        }
        assert_eq!(Runtime::memory_mb_bounds("python"), 32..=10_240);
        assert_eq!(Runtime::Python.new_memory_mb_bounds(), 128..=10_240);
        assert_eq!(Runtime::Go.new_memory_mb_bounds(), 128..=1024);
    }
}
