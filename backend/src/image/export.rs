//! Copying devices to raw image files.

use super::lane::{Job, Lane, Work};
use super::{IN_FLIGHT_MAX, PIECE_BYTES, Progress, reach};
use hawser_block::{Device, Geometry, Operation};
use hawser_runtime::ReactorHandle;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
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
    let geometry = reach(device)?;
    let file =
        OpenOptions::new().write(true).create_new(true).open(path).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => "the file is there already, want another path".to_owned(),
            _ => format!("the file cannot be made: {error}"),
        })?;
    let done = copy(device, reactor, geometry, &file, progress);
    if done.is_err() {
        // Half an image is none.
        let _ = std::fs::remove_file(path);
    }
    done.map(|()| geometry.size_bytes())
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
    let shift = geometry.block_size.shift();
    let piece_bytes = u64::from(PIECE_BYTES).min(u64::from(geometry.transfer_blocks_max) << shift);
    progress.begin("reading", size);
    let lane = Lane::open(device, reactor)?;
    let (mut at, mut in_flight) = (0, 0);
    while at < size || in_flight > 0 {
        if at < size && in_flight < IN_FLIGHT_MAX {
            let len = piece_bytes.min(size - at);
            let blocks = u32::try_from(len >> shift).expect("a piece is at most 1 MiB");
            let bytes = usize::try_from(len).expect("a piece is at most 1 MiB");
            lane.submit(Job {
                operation: Operation::Read,
                lba: at >> shift,
                blocks,
                len,
                work: Work::zeroes(bytes),
            });
            (at, in_flight) = (at + len, in_flight + 1);
            continue;
        }
        let (job, outcome) = lane.wait()?;
        in_flight -= 1;
        let offset = job.lba << shift;
        outcome
            .map_err(|status| format!("reading {} bytes at {offset} failed: {}", job.len, status.name()))?;
        if !job.work.is_all_zero() {
            file.write_all_at(job.work.bytes(), offset).map_err(cannot)?;
        }
        progress.done(job.len);
    }
    lane.close();
    file.sync_all().map_err(cannot)
}
