//! The files of a run in the code directory of its place: the code, and an input that is too long for a
//! variable.

use super::code_cache::CachedCode;
use crate::ambient;
use rand::RngCore;
use std::fs::{File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Most files that are linked for a run, at 4 µs each. The directory of more files is mounted instead.
const LINKED_FILES_MAX: usize = 256;
const INPUT_MODE: u32 = 0o444;

/// What a process finds in its code directory.
#[derive(Clone)]
pub(super) struct CodeLayout {
    pub(super) code: CachedCode,
    /// The input as JSON, if it is passed in a file.
    pub(super) input: Option<String>,
    /// Without a sandbox, a function could change linked files.
    pub(super) as_copies: bool,
}

impl CodeLayout {
    /// Whether the process gets the directory of the cache itself. That must be known when it is started.
    pub(super) fn is_mounted(&self) -> bool {
        !self.as_copies && self.input.is_none() && self.code.files().len() > LINKED_FILES_MAX
    }

    /// Fills the directory. Returns the name of the file with the input. Blocks.
    pub(super) fn fill(&self, dir: &Path) -> io::Result<Option<String>> {
        if self.is_mounted() {
            return Ok(None);
        }
        self.code.link_into(dir, self.as_copies)?;
        let Some(input) = &self.input else { return Ok(None) };
        // No file of the code has this name.
        let name = format!(".input-{:016x}.json", ambient::rng().next_u64());
        let mut file = File::create_new(dir.join(&name))?;
        file.write_all(input.as_bytes())?;
        // The function may be another user.
        file.set_permissions(Permissions::from_mode(INPUT_MODE))?;
        Ok(Some(name))
    }
}
