//! Fuzz entry: whatever a target sends, in whatever pieces, the queue pair takes it or refuses it, and touches only the
//! memory of the commands that are under way.

use super::queue::{Limits, QueuePair, Transfer};
use crate::nvme::{Sgl, Sqe};
use crate::tcp::Digests;
use hawser_block::Buffers;
use hawser_runtime::buffers::AlignedBuffer;

/// Two segments: a small one and one that is large enough to be received in place.
const SEGMENTS: [usize; 2] = [512, 300 << 10];

/// Gives `data` to a queue pair with a read, a large write and a flush under way, the first byte says with which digests, and in
/// which pieces.
pub fn fuzz(data: &[u8]) {
    let Some((first, data)) = data.split_first() else { return };
    let (cut, digests) = (first >> 2, Digests { header: first & 1 != 0, data: first & 2 != 0 });
    let memory = SEGMENTS.map(AlignedBuffer::new);
    let iovecs = [0, 1].map(|at| libc::iovec { iov_base: memory[at].as_ptr().cast(), iov_len: SEGMENTS[at] });
    let len = u32::try_from(SEGMENTS[0] + SEGMENTS[1]).unwrap_or(0);
    // SAFETY: memory and iovecs outlive the queue pair, which is the last thing made and the first dropped.
    let buffers = unsafe { Buffers::new(iovecs.as_ptr(), 2, len) };
    let blocks = len / 512;
    let limits = Limits { in_capsule_max: 4096, host_data_max: 8192, alignment: 4, digests, flow: None };
    let mut pair = QueuePair::new(4, limits);
    pair.submit(Sqe::read(1, 0, blocks, Sgl::NONE), Transfer::ToHost(buffers), 1u8);
    pair.submit(Sqe::write(1, 0, blocks, false, Sgl::NONE), Transfer::FromHost(buffers), 2);
    pair.submit(Sqe::flush(1), Transfer::None, 3);
    let mut iovecs_out = Vec::new();
    pair.poll_transmit(&mut iovecs_out);
    pair.transmitted();
    for mut piece in data.chunks(1 + usize::from(cut) * 160) {
        if let Some(place) = pair.receive_into() {
            let take = piece.len().min(place.len());
            // SAFETY: the read has not ended; `piece` is apart from its memory.
            unsafe { place.slice(0, take).copy_from(piece.as_ptr()) };
            if pair.handle_in_place(u32::try_from(take).unwrap_or(0)).is_err() {
                break;
            }
            piece = &piece[take..];
        }
        if pair.handle_bytes(piece).is_err() {
            break;
        }
        pair.ended().for_each(drop);
        pair.poll_transmit(&mut iovecs_out);
        pair.transmitted();
    }
    pair.drain();
}
