//! The handler of a function: the code that a worker calls for each run. Without one it starts a program.

use super::Runtime;

/// Two or more identifiers with dots between them, at most 128 bytes, such as `main.handler`. The last one
/// names a function. The others are the path of the module that contains it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handler(Box<str>);

impl Handler {
    /// Maximum length in bytes; all its characters are ASCII.
    pub const LEN_MAX: usize = 128;

    /// Returns `None` if `raw` is not a valid handler.
    pub fn parse(raw: &str) -> Option<Self> {
        let is_identifier = |part: &str| {
            part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
                && part.bytes().next().is_some_and(|first| !first.is_ascii_digit())
        };
        let fits = raw.len() <= Self::LEN_MAX && raw.contains('.') && raw.split('.').all(is_identifier);
        fits.then(|| Self(raw.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The files that can contain the module, as paths in the code. One of them must exist. Empty for a
    /// runtime whose functions have no handler.
    pub fn module_files(&self, runtime: Runtime) -> Vec<String> {
        let endings: &[&str] = match runtime {
            Runtime::Python => &[".py", "/__init__.py"],
            Runtime::Nodejs => &[".js", ".cjs", ".mjs"],
            Runtime::Cpp | Runtime::Go => &[],
        };
        let module = self.0.rsplit_once('.').map_or("", |(module, _)| module).replace('.', "/");
        endings.iter().map(|ending| format!("{module}{ending}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_dotted_identifiers_are_parsed() {
        let long = format!("a.{}", "b".repeat(126));
        for good in ["main.handler", "pkg.mod.fn", "a.b", "_a1.B_", "index.default", &long] {
            assert_eq!(Handler::parse(good).expect(good).as_str(), good);
        }
        let too_long = format!("{long}b");
        for bad in [
            "",
            "main",
            ".",
            ".handler",
            "main.",
            "main..handler",
            "main.1handler",
            "1main.handler",
            "main.handler ",
            " main.handler",
            "main.handler\n",
            "main.händler",
            "my-main.handler",
            "lib/main.handler",
            "..main.handler",
            "main.$handler",
            "main:handler",
            "main.handler()",
            "main.\0",
            &too_long,
        ] {
            assert_eq!(Handler::parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn the_module_is_a_file_of_the_runtime() {
        for (handler, runtime, files) in [
            ("main.handler", Runtime::Python, "main.py main/__init__.py"),
            ("pkg.mod.fn", Runtime::Python, "pkg/mod.py pkg/mod/__init__.py"),
            ("index.handler", Runtime::Nodejs, "index.js index.cjs index.mjs"),
            ("lib.tasks.run", Runtime::Nodejs, "lib/tasks.js lib/tasks.cjs lib/tasks.mjs"),
            ("main.handler", Runtime::Cpp, ""),
            ("main.handler", Runtime::Go, ""),
        ] {
            assert_eq!(Handler::parse(handler).unwrap().module_files(runtime).join(" "), files, "{handler}");
            assert_eq!(runtime.has_handlers(), !files.is_empty(), "{runtime:?}");
        }
    }
}
