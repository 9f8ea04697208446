//! Writes to files whose failures the simulation must see: a full disk, a torn write, a failed sync.
//!
//! Without a simulation each is the call of the same name in `std`.

#[cfg(test)]
use super::replaced::{self, DiskStep};
use std::fs::File;
use std::io::{self, Write};
#[cfg(test)]
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Creates a file that does not exist yet, for appending.
pub fn create_new(path: &Path) -> io::Result<File> {
    #[cfg(test)]
    fail(DiskStep::Create)?;
    File::options().create_new(true).append(true).open(path)
}

pub fn write_all(file: &mut File, bytes: &[u8]) -> io::Result<()> {
    #[cfg(test)]
    if let Some(done) = fault(DiskStep::Write) {
        let done = usize::try_from(done).unwrap_or(0) * bytes.len() / 1000;
        file.write_all(&bytes[..done])?;
        return Err(io::ErrorKind::StorageFull.into());
    }
    file.write_all(bytes)
}

pub fn sync_data(file: &File) -> io::Result<()> {
    #[cfg(test)]
    fail(DiskStep::Sync)?;
    file.sync_data()?;
    #[cfg(test)]
    note_synced(file)?;
    Ok(())
}

pub fn set_len(file: &File, len: u64) -> io::Result<()> {
    #[cfg(test)]
    fail(DiskStep::Truncate)?;
    file.set_len(len)
}

pub fn remove_file(path: &Path) -> io::Result<()> {
    #[cfg(test)]
    fail(DiskStep::Remove)?;
    std::fs::remove_file(path)
}

#[cfg(test)]
fn fault(step: DiskStep) -> Option<u64> {
    let process = replaced::current()?;
    replaced::with(|surroundings| surroundings.disk_fault(process, step))?
}

#[cfg(test)]
fn fail(step: DiskStep) -> io::Result<()> {
    fault(step).map_or(Ok(()), |_| Err(io::Error::other("the simulated disk fails")))
}

#[cfg(test)]
fn note_synced(file: &File) -> io::Result<()> {
    let metadata = file.metadata()?;
    let _ = replaced::with(|surroundings| surroundings.synced(metadata.ino(), metadata.len()));
    Ok(())
}
