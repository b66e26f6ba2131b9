//! What every leaf device does alike: check a request against the geometry, and count a batch of requests.
//!
//! Must not know: what the device is made of.

use hawser_block::{Geometry, IoKind, IoStats, Operation, Outcome, Request, Status};

/// Whether a device of this geometry can take the request at all.
pub(crate) fn check(geometry: &Geometry, request: &Request) -> Outcome {
    let within = |blocks_max: u32| {
        let ok = geometry.contains(request.lba.0, request.blocks) && request.blocks.0 <= blocks_max;
        if ok { Ok(()) } else { Err(Status::Invalid) }
    };
    let writable = || if geometry.read_only { Err(Status::ReadOnly) } else { Ok(()) };
    match request.operation {
        Operation::Read => within(geometry.transfer_blocks_max)?,
        Operation::Write { .. } => {
            writable()?;
            within(geometry.transfer_blocks_max)?;
        }
        Operation::Flush => return Ok(()),
        Operation::Discard => {
            writable()?;
            return within(geometry.discard.ok_or(Status::Unsupported)?.blocks_max);
        }
        Operation::WriteZeroes { .. } => {
            writable()?;
            return within(geometry.write_zeroes.ok_or(Status::Unsupported)?.blocks_max);
        }
    }
    if request.buffers.len() == bytes_of(geometry, request) { Ok(()) } else { Err(Status::Invalid) }
}

/// How many bytes the request covers.
pub(crate) fn bytes_of(geometry: &Geometry, request: &Request) -> usize {
    (request.blocks.0 as usize) << geometry.block_size.shift()
}

/// Counts of a batch whose requests took the same time: the shared statistics are touched once for each kind.
#[derive(Default)]
pub(crate) struct Tally {
    requests: [u64; IoKind::COUNT],
    bytes: [u64; IoKind::COUNT],
}

impl Tally {
    /// Counts one request that ended well.
    pub(crate) fn add(&mut self, operation: Operation, bytes: usize) {
        let kind = IoKind::from(operation) as usize;
        self.requests[kind] += 1;
        self.bytes[kind] += bytes as u64;
    }

    /// Adds everything to `stats`, `latency_ns` for each request.
    pub(crate) fn record(&self, stats: &IoStats, latency_ns: u64) {
        for kind in IoKind::ALL {
            let requests = self.requests[kind as usize];
            if requests > 0 {
                let stats = stats.kind(kind);
                stats.requests.add(requests);
                stats.bytes.add(self.bytes[kind as usize]);
                stats.latency.record(latency_ns, requests);
            }
        }
    }
}

/// A size in whole blocks.
///
/// # Errors
/// One line that says what is wrong and what would be right.
pub(crate) fn blocks_of(size_bytes: u64, block_size: hawser_block::BlockSize) -> Result<u64, String> {
    let block = u64::from(block_size.bytes());
    if size_bytes < block {
        return Err(format!("size {size_bytes} is less than one block of {block} bytes"));
    }
    if !size_bytes.is_multiple_of(block) {
        let down = size_bytes / block * block;
        return Err(format!(
            "size {size_bytes} is not a multiple of the block size {block}; {down} or {} would be",
            down + block
        ));
    }
    Ok(size_bytes >> block_size.shift())
}
