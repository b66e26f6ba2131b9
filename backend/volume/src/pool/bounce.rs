//! Memory of our own for payload: for metadata, and for what the guest must not change while copies of it are written.
//!
//! A buffer and the iovec that names it live in one place, so that a buffer that is used again costs no allocation, and is passed on as a pointer.
#![allow(unsafe_code)]

use hawser_block::Buffers;
use hawser_runtime::buffers::AlignedBuffer;
use std::cell::RefCell;
use std::ops::Range;
use std::rc::Rc;

/// Page-aligned memory, named by an iovec. Shared by the requests that read from it or write to it: it goes back when the last of
/// them has ended.
pub(crate) struct Bounce {
    memory: Option<Box<Memory>>,
    home: Option<Rc<Spare>>,
}

struct Memory {
    /// Asked for; the buffer may be longer.
    len: usize,
    buffer: AlignedBuffer,
    iovec: libc::iovec,
}

/// The most that is kept for the next time, of each size.
const SPARE_BYTES_MAX: usize = 8 << 20;

/// Buffers that nobody uses now, by log2 of their size.
#[derive(Default)]
pub(crate) struct Spare {
    #[expect(
        clippy::vec_box,
        reason = "requests name the iovec: it stays where it is, whoever has the buffer"
    )]
    by_size: RefCell<[Vec<Box<Memory>>; 32]>,
}

fn size_of(len: usize) -> usize {
    len.next_power_of_two().max(AlignedBuffer::ALIGNMENT)
}

impl Memory {
    fn new(len: usize) -> Box<Memory> {
        let buffer = AlignedBuffer::new(size_of(len));
        let iovec = libc::iovec { iov_base: buffer.as_ptr().cast(), iov_len: buffer.len() };
        Box::new(Memory { len, buffer, iovec })
    }
}

impl Spare {
    /// A buffer of at least `len` bytes, with whatever was in it.
    pub(crate) fn take(self: &Rc<Self>, len: usize) -> Bounce {
        let kept = self.by_size.borrow_mut()[size_of(len).ilog2() as usize].pop();
        let mut memory = kept.unwrap_or_else(|| Memory::new(len));
        memory.len = len;
        Bounce { memory: Some(memory), home: Some(Rc::clone(self)) }
    }
}

impl Bounce {
    /// A buffer of at least `len` zero bytes.
    pub(crate) fn zeroed(len: usize) -> Bounce {
        Bounce { memory: Some(Memory::new(len)), home: None }
    }

    /// A buffer with this content, and zeroes behind it.
    pub(crate) fn holding(bytes: &[u8]) -> Bounce {
        let bounce = Bounce::zeroed(bytes.len());
        bounce.fill(0, bytes);
        bounce
    }

    /// How many bytes it has.
    pub(crate) fn len(&self) -> usize {
        self.memory().len
    }

    fn memory(&self) -> &Memory {
        self.memory.as_ref().expect("there until it is dropped")
    }

    /// The first `len` bytes from `offset` on, for a request; whoever makes one of them holds the bounce until it has ended.
    pub(crate) fn buffers(&self, offset: usize, len: usize) -> Buffers {
        let Memory { buffer, iovec, .. } = self.memory();
        let whole = u32::try_from(buffer.len()).expect("buffers are far below 4 GiB");
        // SAFETY: the iovec is on the heap and names the whole buffer, which is not empty; both stay in place until the bounce is
        // dropped, and `Lanes` and the channel's slots keep it until every request with it has ended.
        unsafe { Buffers::new(iovec, 1, whole) }.slice(offset, len)
    }

    /// The bytes, while no request is under way that writes to them.
    pub(crate) fn bytes(&self, offset: usize, len: usize) -> &[u8] {
        // SAFETY: only this reactor's tasks name the memory; they look when their reads have ended, and what goes on may only read it.
        unsafe { self.memory().buffer.slice(offset, len) }
    }

    /// The first `len` bytes from `offset` on, to be changed. Who has the bounce alone has no request under way with it: those hold it, too.
    pub(crate) fn bytes_mut(&mut self, offset: usize, len: usize) -> &mut [u8] {
        let buffer = &self.memory().buffer;
        assert!(offset + len <= buffer.len(), "outside of the buffer");
        // SAFETY: inside the allocation (asserted), initialised (zeroed at the start); borrowed for as long as the bounce is, which no
        // request shares.
        unsafe { std::slice::from_raw_parts_mut(buffer.as_ptr().add(offset), len) }
    }

    /// The parities of columns of a stripe, all in this buffer: `data` strips from `at` on, one behind the other; P, and perhaps Q, come where they
    /// are wanted. Before the first request with it.
    pub(crate) fn sums(
        &mut self,
        (at, strip, data): (usize, usize, usize),
        columns: Range<usize>,
        p_at: usize,
        q_at: Option<usize>,
    ) {
        let end = p_at.min(q_at.unwrap_or(p_at));
        assert!(
            at + data * strip <= end && data <= crate::parity::DATA_MAX && columns.end <= strip,
            "parities stand behind their data"
        );
        let all = self.memory().buffer.len();
        let (before, behind) = self.bytes_mut(0, all).split_at_mut(end);
        let mut strips: [&[u8]; crate::parity::DATA_MAX] = [&[]; crate::parity::DATA_MAX];
        for (index, place) in strips[..data].iter_mut().enumerate() {
            let first = at + index * strip;
            *place = &before[first + columns.start..first + columns.end];
        }
        let strips = &strips[..data];
        match q_at {
            None => crate::parity::xor(strips, &mut behind[columns]),
            Some(q_at) => {
                assert!(q_at == p_at + strip, "Q stands behind P");
                let (p, q) = behind[..2 * strip].split_at_mut(strip);
                crate::parity::pq(strips, &mut p[columns.clone()], &mut q[columns]);
            }
        }
    }

    /// Overwrites a part, while no request is under way with it.
    pub(crate) fn fill(&self, offset: usize, bytes: &[u8]) {
        let buffer = &self.memory().buffer;
        assert!(offset + bytes.len() <= buffer.len(), "outside of the buffer");
        // SAFETY: inside the allocation (asserted); nothing else names the memory now, and `bytes` is apart from it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), buffer.as_ptr().add(offset), bytes.len()) };
    }

    /// Zeroes a part, while no request is under way with it.
    pub(crate) fn zero(&self, offset: usize, len: usize) {
        let buffer = &self.memory().buffer;
        assert!(offset + len <= buffer.len(), "outside of the buffer");
        // SAFETY: inside the allocation (asserted); nothing else names the memory now.
        unsafe { std::ptr::write_bytes(buffer.as_ptr().add(offset), 0, len) };
    }

    /// Takes a copy of the payload of a write that has not ended.
    pub(crate) fn copy_payload(&self, offset: usize, payload: &Buffers) {
        let buffer = &self.memory().buffer;
        assert!(offset + payload.len() <= buffer.len(), "outside of the buffer");
        // SAFETY: there is room (asserted), the request has not ended, and its memory is the guest's, apart from ours.
        unsafe { payload.copy_to(buffer.as_ptr().add(offset)) };
    }
}

impl Drop for Bounce {
    fn drop(&mut self) {
        let (Some(memory), Some(home)) = (self.memory.take(), &self.home) else { return };
        let len = memory.buffer.len();
        let kept = &mut home.by_size.borrow_mut()[len.ilog2() as usize];
        if (kept.len() + 1) * len <= SPARE_BYTES_MAX {
            kept.push(memory);
        }
    }
}

/// Fills a part of the payload of a read that has not ended.
pub(crate) fn fill_payload(payload: &Buffers, bytes: &[u8]) {
    assert!(payload.len() == bytes.len(), "{} bytes for {}", bytes.len(), payload.len());
    // SAFETY: `bytes` has as many as the payload (asserted) and is ours; the caller has the request, which has not ended and is a read.
    unsafe { payload.copy_from(bytes.as_ptr()) };
}

/// Zeroes the payload of a read that has not ended.
pub(crate) fn zero_payload(payload: &Buffers) {
    // SAFETY: the caller has the request, which has not ended and is a read.
    unsafe { payload.zero() };
}
