//! C++ and Go: the program `main` of the code is run. Code without one is built first, once a version, if
//! this worker has a compiler.

use super::language::{Build, Introduction, Language, Question, ScriptStart};
use crate::model::Runtime;
use crate::worker::code_version::PROGRAM;
use std::path::Path;

/// A compiled language. It has only script mode.
pub(super) struct Native {
    runtime: Runtime,
    /// The main file of the source.
    source: &'static str,
    compilers: &'static [&'static str],
    /// Prints a line with the version.
    question: &'static [&'static str],
    /// A shell script that builds `$1/main` with the compiler `$2`.
    build: &'static str,
}

pub(super) static CPP: Native = Native {
    runtime: Runtime::Cpp,
    source: "main.cpp",
    compilers: &["g++"],
    question: &["--version"],
    build: r#""$2" -O2 -pthread -o "$1/main" main.cpp"#,
};

pub(super) static GO: Native = Native {
    runtime: Runtime::Go,
    source: "main.go",
    compilers: &["go", "/usr/local/go/bin/go", "/usr/lib/go/bin/go"],
    question: &["version"],
    // Without cgo it needs no C compiler. No other version of Go is downloaded.
    build: r#"export GOCACHE="$1/cache" GOPATH="$1/path" GOTOOLCHAIN=local CGO_ENABLED=0
if [ -f go.mod ]; then what=.; else what=main.go; fi
"$2" build -o "$1/main" "$what""#,
};

impl Language for Native {
    fn runtime(&self) -> Runtime {
        self.runtime
    }

    fn programs(&self) -> &'static [&'static str] {
        self.compilers
    }

    fn question(&self) -> Question {
        Question { args: self.question, input: b"" }
    }

    fn introduction(&self, answer: &[u8]) -> Option<Introduction> {
        // `g++ (Debian 12.2.0-14) 12.2.0`, `go version go1.19.8 linux/amd64`
        let line = str::from_utf8(answer).ok()?.lines().next()?;
        let mut words = line.split_whitespace().map(|word| word.trim_start_matches("go"));
        let version = words.rfind(|word| word.starts_with(|c: char| c.is_ascii_digit()))?;
        Some(Introduction { path: None, version: version.to_owned(), bootstrap: None })
    }

    fn script(
        &self,
        has_file: &dyn Fn(&str) -> bool,
        dir: &Path,
        program: Option<&Path>,
        _memory_mb: u64,
    ) -> Result<ScriptStart, String> {
        if has_file(PROGRAM) {
            return Ok(ScriptStart::Program { argv: vec![dir.join(PROGRAM).into()], is_warm: false });
        }
        let source = self.source;
        if !has_file(source) {
            return Err(format!("the code has neither a program `{PROGRAM}` nor {source}"));
        }
        let Some(compiler) = program else {
            return Err(format!(
                "{source} must be compiled, but this worker has no {}: install it on the worker, or upload \
                 the compiled program as `{PROGRAM}`",
                self.compilers[0]
            ));
        };
        Ok(ScriptStart::Build(self.build(compiler)))
    }
}

impl Native {
    fn build(&self, compiler: &Path) -> Build {
        // What the compiler prints goes to stderr. It does not get descriptor 3.
        let script = format!(
            "set -eu\nto=$(mktemp -d)\nset -- \"$to\" \"$1\"\n{{\n{}\n}} >&2 3>&-\n\
             exec cat \"$1/{PROGRAM}\" >&3",
            self.build
        );
        let argv = vec!["/bin/sh".into(), "-c".into(), script.into(), "build".into(), compiler.into()];
        Build { argv }
    }
}
