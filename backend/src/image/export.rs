//! Copying devices to raw image files, and pieces of them to whoever asks. They are reached, and nobody else writes to them.

use super::lane::{Job, Lane, Work};
use super::{IN_FLIGHT_MAX, PIECE_BYTES, Progress};
use hawser_block::{Device, Geometry, Operation, Outcome};
use hawser_runtime::ReactorHandle;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Copies a device to the new file at `path`, with holes where it is zero; how many bytes it has.
///
/// # Errors
/// One line. No file is left then.
pub fn export(
    device: &Arc<dyn Device>,
    reactor: &ReactorHandle,
    path: &Path,
    progress: &dyn Progress,
) -> Result<u64, String> {
    let geometry = device.geometry().ok_or("is not there")?;
    let new = NewFile::create(path)?;
    copy(device, reactor, geometry, new.file(), progress)?;
    new.finish()?;
    Ok(geometry.size_bytes())
}

/// A file that was not there; until it is whole it has `.partial` behind its name.
pub struct NewFile {
    file: File,
    partial: PathBuf,
    path: PathBuf,
    is_whole: bool,
}

impl NewFile {
    /// Makes it.
    ///
    /// # Errors
    /// When there is one already, or it cannot be: one line without the path.
    pub fn create(path: &Path) -> Result<NewFile, String> {
        let mut partial = path.as_os_str().to_owned();
        partial.push(".partial");
        let partial = PathBuf::from(partial);
        if path.symlink_metadata().is_ok() {
            return Err("the file is there already, want another path".to_owned());
        }
        let file = OpenOptions::new().write(true).create_new(true).open(&partial);
        let file = file.map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => {
                format!("{} is there already: want it removed, or another path", partial.display())
            }
            _ => format!("the file cannot be made: {error}"),
        })?;
        Ok(NewFile { file, partial, path: path.to_owned(), is_whole: false })
    }

    /// What is written to.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Everything is in it, and durable.
    ///
    /// # Errors
    /// When it cannot get its name: one line without the path.
    pub fn finish(mut self) -> Result<(), String> {
        // Unlike a rename, this takes nobody's place.
        std::fs::hard_link(&self.partial, &self.path).or_else(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => Err("the file is there already, want another path".to_owned()),
            // Not every file system has links.
            _ => std::fs::rename(&self.partial, &self.path)
                .map_err(|error| format!("the file cannot be named: {error}")),
        })?;
        // A name too many does no harm.
        let _ = std::fs::remove_file(&self.partial);
        self.is_whole = true;
        Ok(())
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.is_whole {
            // Half an image is none.
            let _ = std::fs::remove_file(&self.partial);
        }
    }
}

/// Reads `len` bytes of a device from `offset` on, both in whole blocks; `None`: they are all zero. At most one caller at a time
/// on a reactor.
///
/// # Errors
/// One line.
pub fn read(
    device: &Arc<dyn Device>,
    reactor: &ReactorHandle,
    offset: u64,
    len: u64,
) -> Result<Option<Vec<u8>>, String> {
    let geometry = device.geometry().ok_or("is not there")?;
    let narrow = |value: u64| usize::try_from(value).map_err(|error| error.to_string());
    let mut bytes: Option<Vec<u8>> = None;
    let (mut at, mut failed) = (0, None);
    let lane = Lane::open(device, reactor)?;
    while at < len && failed.is_none() {
        let piece = piece_bytes(geometry).min(len - at);
        lane.submit(job(geometry, offset + at, piece));
        // One that does not answer keeps its lane: what is under way names memory of that.
        let (job, outcome) = lane.wait()?;
        match ended(geometry, &job, outcome) {
            Err(what) => failed = Some(what),
            Ok(()) if job.work.is_all_zero() => {}
            Ok(()) => {
                let (whole, from) = (narrow(len)?, narrow(at)?);
                let bytes = bytes.get_or_insert_with(|| vec![0; whole]);
                bytes[from..from + job.work.bytes().len()].copy_from_slice(job.work.bytes());
            }
        }
        at += piece;
    }
    lane.close();
    failed.map_or(Ok(bytes), Err)
}

fn copy(
    device: &Arc<dyn Device>,
    reactor: &ReactorHandle,
    geometry: Geometry,
    file: &File,
    progress: &dyn Progress,
) -> Result<(), String> {
    let cannot = |error: io::Error| format!("the file cannot be written: {error}");
    let size = geometry.size_bytes();
    file.set_len(size).map_err(cannot)?;
    progress.begin("reading", size);
    let lane = Lane::open(device, reactor)?;
    let (mut at, mut in_flight) = (0, 0);
    let mut done = Ok(());
    // What is under way is seen to its end whatever has failed.
    while (at < size && done.is_ok()) || in_flight > 0 {
        if at < size && in_flight < IN_FLIGHT_MAX && done.is_ok() {
            let len = piece_bytes(geometry).min(size - at);
            lane.submit(job(geometry, at, len));
            (at, in_flight) = (at + len, in_flight + 1);
            continue;
        }
        // One that does not answer keeps its lane: what is under way names memory of that.
        let (job, outcome) = lane.wait()?;
        in_flight -= 1;
        let put = ended(geometry, &job, outcome).and_then(|()| match job.work.is_all_zero() {
            true => Ok(()),
            false => {
                let offset = job.lba << geometry.block_size.shift();
                file.write_all_at(job.work.bytes(), offset).map_err(cannot)
            }
        });
        done = done.and(put);
        progress.done(job.len);
    }
    lane.close();
    done.and_then(|()| file.sync_all().map_err(cannot))
}

fn piece_bytes(geometry: Geometry) -> u64 {
    u64::from(PIECE_BYTES).min(u64::from(geometry.transfer_blocks_max) << geometry.block_size.shift())
}

fn job(geometry: Geometry, offset: u64, len: u64) -> Job {
    let shift = geometry.block_size.shift();
    let blocks = u32::try_from(len >> shift).expect("a piece is at most 1 MiB");
    let bytes = usize::try_from(len).expect("a piece is at most 1 MiB");
    Job { operation: Operation::Read, lba: offset >> shift, blocks, len, work: Work::zeroes(bytes) }
}

fn ended(geometry: Geometry, job: &Job, outcome: Outcome) -> Result<(), String> {
    let offset = job.lba << geometry.block_size.shift();
    outcome.map_err(|status| format!("reading {} bytes at {offset} failed: {}", job.len, status.name()))
}
