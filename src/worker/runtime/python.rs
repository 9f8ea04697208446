//! Python 3.8 or later.
//!
//! A process that waits for its job is started exactly as a run would be, as `python3 main.py`. But before
//! the interpreter opens main.py, it imports a module `sitecustomize`, if there is one. Here there is one, in
//! a zip that is the standard input of the process, and `PYTHONPATH` names it: bootstrap.py. It waits for the
//! job. For a script it then steps aside, and the interpreter goes on to main.py by itself. So `__main__`,
//! tracebacks, exit codes, `atexit` and multiprocessing are those of the interpreter.
//!
//! Rejected: `python3 -c`, which must imitate all of that, and compiles its text at each start; a file in the
//! sandbox, which would have to be installed and mounted.

use super::language::{Introduction, Language, ProcessEnv, Question, ScriptStart, missing};
use crate::model::Runtime;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

const PROGRAM: &str = "python3";
const ENTRY: &str = "main.py";
/// The standard input, as a directory of modules. The bootstrap program has the same path.
const ARCHIVE: &str = "/proc/self/fd/0";
/// Prints the path of the interpreter, its version, and a zip with the compiled bootstrap program, which it
/// reads. Compiled code only fits the interpreter that has compiled it.
const QUESTION: &str = r#"
import importlib.util, io, marshal, os, platform, sys, zipfile
source = sys.stdin.buffer.read()
code = marshal.dumps(compile(source, "<bootstrap>", "exec", dont_inherit=True, optimize=2))
archive = io.BytesIO()
with zipfile.ZipFile(archive, "w") as file:
    file.writestr("sitecustomize.pyc", importlib.util.MAGIC_NUMBER + bytes(12) + code)
about = os.fsencode(sys.executable or "") + b"\n" + platform.python_version().encode() + b"\n"
sys.stdout.buffer.write(about + archive.getvalue())
"#;

pub(super) struct Python;

impl Language for Python {
    fn runtime(&self) -> Runtime {
        Runtime::Python
    }

    fn programs(&self) -> &'static [&'static str] {
        &[PROGRAM]
    }

    fn question(&self) -> Question {
        // Isolated, because otherwise it would import modules of the current directory.
        Question { args: &["-I", "-c", QUESTION], input: include_bytes!("bootstrap.py") }
    }

    fn introduction(&self, answer: &[u8]) -> Option<Introduction> {
        let mut parts = answer.splitn(3, |byte| *byte == b'\n');
        let (path, version, archive) = (parts.next()?, parts.next()?, parts.next()?);
        let version = str::from_utf8(version).ok()?;
        archive.starts_with(b"PK").then(|| Introduction {
            path: Some(PathBuf::from(OsStr::from_bytes(path))),
            version: version.to_owned(),
            bootstrap: Some(archive.to_vec()),
        })
    }

    fn environment(&self) -> &'static [(&'static str, &'static str)] {
        // Otherwise buffered output is lost when the run is killed.
        &[("PYTHONUNBUFFERED", "1")]
    }

    fn start_variables(&self) -> &'static [&'static str] {
        // `HOME` contains the packages of the user.
        &["PYTHON*", "HOME"]
    }

    fn script(
        &self,
        _has_file: &dyn Fn(&str) -> bool,
        _dir: &Path,
        program: Option<&Path>,
        _memory_mb: u64,
    ) -> Result<ScriptStart, String> {
        // Without a main.py, the interpreter says so.
        let program = program.ok_or_else(|| missing(self.runtime(), PROGRAM))?;
        Ok(ScriptStart::Program { argv: vec![program.into(), ENTRY.into()], is_warm: true })
    }

    fn warm(&self, program: &Path, _memory_mb: u64, env: &mut ProcessEnv) -> Option<Vec<OsString>> {
        let path = match env.get("PYTHONPATH") {
            Some(path) if !path.is_empty() => format!("{ARCHIVE}:{path}"),
            _ => ARCHIVE.to_owned(),
        };
        env.insert("PYTHONPATH".to_owned(), path);
        Some(vec![program.into(), ENTRY.into()])
    }
}
