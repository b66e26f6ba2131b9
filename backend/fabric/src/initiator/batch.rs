//! One send of a queue pair: headers, digests, data, as iovecs.
//!
//! Owns: room in the pair's header and copy buffers while a send is put together. Must not know: slots, commands.

use crate::nvme::bytes::low32;
use crate::tcp::{Digests, pdu};
use hawser_block::Buffers;
use hawser_runtime::buffers::AlignedBuffer;

/// How much one send carries, so that new commands do not wait behind megabytes of older data.
pub(super) const SEND_BYTES_MAX: usize = 1 << 20;
/// The most iovecs of one send (Linux's UIO_MAXIOV is 1024).
pub(super) const SEND_IOVECS_MAX: usize = 1000;
/// How much a send has when nothing more is added, where data has digests and goes out from a private copy: the copy stays in the
/// second-level cache until the kernel has taken it. One command's data is not divided for it.
const COPIED_BYTES_MAX: usize = 256 << 10;
/// In-capsule data beyond this is asked for by the controller where there are data digests.
pub(super) const COPIED_CAPSULE_MAX: usize = 128 << 10;
/// Room for the private copies of one send's data, where it has digests: the guest may change its pages meanwhile.
pub(super) const COPIES_LEN: usize = SEND_BYTES_MAX + COPIED_CAPSULE_MAX;
/// What is copied before its digest is computed: it is in the first-level cache then.
pub(super) const DIGEST_PIECE: usize = 16 << 10;
/// Room for the headers of one send: 256 commands of 72 bytes, 16 of inline data, and some H2CData.
pub(super) const HEADERS_LEN: usize = 32 << 10;
/// One send being put together.
pub(super) struct Batch<'a> {
    pub(super) headers: &'a AlignedBuffer,
    pub(super) used: usize,
    pub(super) copies: Option<&'a AlignedBuffer>,
    pub(super) copied: usize,
    pub(super) digests: Digests,
    pub(super) iovecs: &'a mut Vec<libc::iovec>,
    pub(super) bytes: usize,
}

impl Batch<'_> {
    /// Room for a header with padding and inline data, and `segments` more iovecs.
    pub(super) fn has_room(&self, segments: usize) -> bool {
        self.used + 256 <= self.headers.len()
            && self.iovecs.len() + segments < SEND_IOVECS_MAX
            && self.bytes < if self.copies.is_some() { COPIED_BYTES_MAX } else { SEND_BYTES_MAX }
    }

    /// Room for a private copy of `len` bytes, if there are such.
    pub(super) fn has_copy_room(&self, len: u32) -> bool {
        self.copies.is_none_or(|copies| len as usize <= copies.len() - self.copied)
    }

    /// How much of `len` bytes from `offset` fits, a multiple of 4 if not all. What has a digest and would fit into a send of its
    /// own is not divided: Linux's nvmet (6.1, 6.12) computes the digest of each H2CData over all of its command's data.
    pub(super) fn fitting(&self, buffers: &Buffers, offset: u32, len: u32) -> u32 {
        if let Some(copies) = self.copies {
            return match low32((copies.len() - self.copied) as u64) {
                room if len <= room => len,
                _ if self.copied > 0 => 0,
                room => room & !3,
            };
        }
        let room = SEND_IOVECS_MAX - self.iovecs.len() - 1;
        let mut segments = buffers.slice(offset as usize, len as usize).segments();
        let mut fits = 0;
        for _ in 0..room {
            let Some(segment) = segments.next() else { return len };
            fits += low32(segment.len as u64);
        }
        if segments.next().is_none() { len } else { fits & !3 }
    }

    /// A header with its digest, and padding up to `data_offset` if that is beyond it.
    pub(super) fn push_padded(&mut self, header: &[u8], data_offset: u8) {
        self.push_header(header);
        let mut len = header.len();
        if self.digests.header {
            self.push_header(&pdu::digest(header));
            len += Digests::LEN as usize;
        }
        let padding = usize::from(data_offset).saturating_sub(len);
        if padding > 0 {
            self.push_header(&[0; 128][..padding]);
        }
    }

    pub(super) fn push_header(&mut self, header: &[u8]) {
        assert!(header.len() <= self.headers.len() - self.used, "the caller looked for room");
        // SAFETY: inside the buffer (just asserted); no send is under way that names it (`poll_transmit` asserts), so
        // nobody reads it; `header` is elsewhere.
        let place = unsafe {
            let place = self.headers.as_ptr().add(self.used);
            std::ptr::copy_nonoverlapping(header.as_ptr(), place, header.len());
            place
        };
        self.used += header.len();
        self.bytes += header.len();
        // Headers lie one after the other: commands without data make one run.
        match self.iovecs.last_mut() {
            Some(last) if last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == place => {
                last.iov_len += header.len();
            }
            _ => self.iovecs.push(libc::iovec { iov_base: place.cast(), iov_len: header.len() }),
        }
    }

    /// Data of our own, and its digest.
    pub(super) fn push_data(&mut self, bytes: &[u8]) {
        self.push_header(bytes);
        if self.digests.data {
            self.push_header(&pdu::digest(bytes));
        }
    }

    /// A request's data; with digests a copy of it, which its owner cannot change any more.
    pub(super) fn push_buffers(&mut self, buffers: &Buffers) {
        if let Some(copies) = self.copies {
            let len = buffers.len();
            assert!(len <= copies.len() - self.copied, "the caller looked for room");
            // SAFETY: inside the buffer (just asserted).
            let place = unsafe { copies.as_ptr().add(self.copied) };
            let mut crc = 0;
            for from in (0..len).step_by(DIGEST_PIECE) {
                let piece = buffers.slice(from, DIGEST_PIECE.min(len - from));
                // SAFETY: inside the buffer, as above; no send is under way that names it (`poll_transmit` asserts), so nobody
                // reads it; the request has not ended, so its buffers are valid, and they are elsewhere.
                let copy = unsafe {
                    piece.copy_to(place.add(from));
                    copies.slice(self.copied + from, piece.len())
                };
                crc = crc32c::crc32c_append(crc, copy);
            }
            self.copied += len;
            self.bytes += len;
            self.iovecs.push(libc::iovec { iov_base: place.cast(), iov_len: len });
            self.push_header(&crc.to_le_bytes());
            return;
        }
        for segment in buffers.segments() {
            self.iovecs.push(libc::iovec { iov_base: segment.start.cast(), iov_len: segment.len });
        }
        self.bytes += buffers.len();
    }
}
