//! Which bytes of a request one command moves, and how.
//!
//! A memory window stands for one run of memory, and targets commonly take one keyed descriptor a command: a request over several runs
//! goes in several commands, or, where its runs are short, by way of a chunk of memory of the connection's own.

use super::layout::LARGE;
use crate::nvme::bytes::low32;
use crate::rdma::domain::{Entries, Entry};
use hawser_block::Buffers;
use std::sync::OnceLock;

/// A run of at least so many bytes has a command of its own, however many there are: eight pages, so that what is copied for want of a
/// command is less than that in one piece. A choice: nothing was measured.
pub(super) const DIRECT_MIN: u32 = 32 << 10;
/// Up to so many runs in a request have a command each, however short they are; more are copied. Measured with `HAWSER_RDMA_ROUNDS=3 cargo
/// xtask guest our_initiator_over_rdma_verifies`, which prints it: reads of pages that lie anywhere, at depth 8, each way the best of three
/// times (Soft-RoCE, Linux 6.12, QEMU's TCG on a busy machine).
///
/// | runs | copied | a command each |
/// |---|---|---|
/// | 2 | 370/s | 370/s |
/// | 3 | 352/s | 279/s |
/// | 4 | 336/s | 237/s |
/// | 6 | 264/s | 214/s |
/// | 8 | 161/s | 133/s |
/// | 16 | 116/s | 81/s |
///
/// Where both are as fast, nothing is copied. There a doorbell is a system call, and binding a window is the CPU's work; hardware may be
/// measured with the same variable.
pub(super) const RUNS_MAX: usize = 2;

/// Names another number than [`RUNS_MAX`], for measurements.
const VARIABLE: &str = "HAWSER_RDMA_RUNS_MAX";

/// [`RUNS_MAX`], or what the environment says.
pub(super) fn runs_max() -> usize {
    static NUMBER: OnceLock<usize> = OnceLock::new();
    let said = || std::env::var(VARIABLE).ok().and_then(|said| said.parse().ok());
    *NUMBER.get_or_init(|| said().unwrap_or(RUNS_MAX).min(1 << 16))
}

/// How the bytes of one command are moved.
#[derive(Clone, Copy, Debug)]
pub(super) enum Place {
    /// The target moves them to or from where they are.
    Direct { start: usize, entry: Entry },
    /// They are in the capsule, from where they are.
    Capsule,
    /// They are in the capsule, by way of a chunk: their memory is not registered, or in too many segments.
    CapsuleCopy { scattered: bool },
    /// The target moves them to or from a chunk.
    Copy { scattered: bool },
}

/// What one command does of a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) len: u32,
    pub(super) place: Place,
}

/// A run of memory that goes by one key: neighbours count as one.
struct Run {
    start: usize,
    len: u32,
    /// `None`: it is not registered.
    entry: Option<Entry>,
}

/// The runs of a request's bytes, in order.
fn runs<'a>(buffers: &Buffers, entries: &'a Entries) -> impl Iterator<Item = Run> + use<'a> {
    let mut segments = buffers.segments();
    let mut rest: Option<(usize, usize)> = None;
    let mut next = move || -> Option<Run> {
        let (start, len) = rest.take().or_else(|| segments.next().map(|it| (it.start as usize, it.len)))?;
        let entry = entries.find(start).copied();
        // Of a segment over the end of what is registered, the rest is a run of its own.
        let here = entry.map_or(len, |entry| len.min(entry.start + entry.len - start));
        if here < len {
            rest = Some((start + here, len - here));
        }
        Some(Run { start, len: low32(here as u64), entry })
    };
    let mut ahead: Option<Run> = None;
    std::iter::from_fn(move || {
        let mut run = ahead.take().or_else(&mut next)?;
        loop {
            match next() {
                None => return Some(run),
                Some(more) => {
                    let follows = run.start + run.len as usize == more.start;
                    let same = match (&run.entry, &more.entry) {
                        (Some(one), Some(other)) => one.start == other.start,
                        (None, None) => true,
                        _ => false,
                    };
                    if !(follows && same) {
                        ahead = Some(more);
                        return Some(run);
                    }
                    run.len += more.len;
                }
            }
        }
    })
}

/// The first command for `rest`, the bytes that are still to be moved. They may be cut every `block` bytes; 0: not at all, and then
/// they are at most [`LARGE`].
/// A request in at most `runs_max` runs goes in a command for each.
pub(super) fn plan(rest: &Buffers, entries: &Entries, block: u32, runs_max: usize) -> Piece {
    let total = low32(rest.len() as u64);
    let cut = |len: u32| {
        if block == 0 || len == total { if len == total { len } else { 0 } } else { len - len % block }
    };
    let mut first = None;
    let mut count = 0;
    // No more than the first few are looked at.
    for run in runs(rest, entries).take(runs_max + 1) {
        count += 1;
        first.get_or_insert(run);
    }
    let Some(run) = first else { unreachable!("a request with data has some") };
    let whole = cut(run.len);
    if let Some(entry) = run.entry
        && whole > 0
        && (whole >= DIRECT_MIN || count <= runs_max)
    {
        return Piece { len: whole, place: Place::Direct { start: run.start, entry } };
    }
    // Up to the next run that has a command of its own, and so that what follows begins with a block.
    let mut len = 0;
    for (index, run) in runs(rest, entries).enumerate() {
        if len >= LARGE {
            break;
        }
        if index > 0 && run.entry.is_some() && run.len >= DIRECT_MIN + block {
            len = if block == 0 { total } else { len.next_multiple_of(block).min(total) };
            break;
        }
        len += run.len;
    }
    let len = match cut(len.min(LARGE)) {
        0 => total.min(LARGE),
        len => len,
    };
    Piece { len, place: Place::Copy { scattered: run.entry.is_some() } }
}

/// How data of `len` bytes at most that goes in a capsule gets there, with at most `segments_max` segments.
pub(super) fn in_capsule(buffers: &Buffers, entries: &Entries, segments_max: usize) -> Place {
    let mut count = 0;
    for run in runs(buffers, entries) {
        count += 1;
        match run.entry {
            None => return Place::CapsuleCopy { scattered: false },
            Some(_) if count > segments_max => return Place::CapsuleCopy { scattered: true },
            Some(_) => {}
        }
    }
    Place::Capsule
}

/// Segments of data that goes in a capsule from where it is.
pub(super) fn capsule_segments(
    buffers: &Buffers,
    entries: &Entries,
    mut add: impl FnMut(hawser_verbs_abi::Segment),
) {
    for run in runs(buffers, entries) {
        let key = run.entry.map_or(0, |entry| entry.keys.local);
        add(hawser_verbs_abi::Segment { address: run.start as u64, len: run.len, key });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hawser_verbs_abi::Keys;
    use proptest::prelude::*;

    fn entry(start: usize, len: usize) -> Entry {
        Entry {
            start,
            len,
            region: std::ptr::null_mut(),
            number: 0,
            keys: Keys { local: low32(start as u64), remote: 0 },
            withdrawn: false,
        }
    }

    fn iovecs(segments: &[(usize, usize)]) -> Vec<libc::iovec> {
        segments
            .iter()
            .map(|(start, len)| libc::iovec { iov_base: *start as *mut _, iov_len: *len })
            .collect()
    }

    fn pieces(segments: &[(usize, usize)], entries: &Entries, block: u32) -> Vec<(u32, &'static str)> {
        let iovecs = iovecs(segments);
        let total: usize = segments.iter().map(|(_, len)| len).sum();
        // SAFETY: the memory is never touched; the iovecs live to the end.
        let all = unsafe { Buffers::new(iovecs.as_ptr(), low32(iovecs.len() as u64), low32(total as u64)) };
        let (mut at, mut found) = (0, Vec::new());
        while at < total {
            let piece = plan(&all.slice(at, total - at), entries, block, RUNS_MAX);
            let name = match piece.place {
                Place::Direct { .. } => "direct",
                Place::Copy { scattered: true } => "scattered",
                Place::Copy { scattered: false } => "unregistered",
                _ => "?",
            };
            found.push((piece.len, name));
            at += piece.len as usize;
        }
        found
    }

    #[test]
    fn requests_are_cut_where_their_memory_is() {
        const MIB: usize = 1 << 20;
        let entries = Entries::new(vec![entry(0x10_0000, 16 * MIB), entry(0x110_0000, MIB)]);
        let page = |index: usize| (0x10_0000 + index * 0x2000, 0x1000);
        for (segments, block, want) in [
            // Neighbours are one run; the border of two registrations is not crossed.
            (vec![(0x10_0000, 0x1000), (0x10_1000, 0x3000)], 512, vec![(0x4000, "direct")]),
            (vec![(0x10f_f000, 0x2000)], 512, vec![(0x1000, "direct"), (0x1000, "direct")]),
            // Few runs have a command each, many do not.
            ((0..2).map(page).collect(), 512, vec![(0x1000, "direct"); 2]),
            ((0..3).map(page).collect(), 512, vec![(0x3000, "scattered")]),
            ((0..40).map(page).collect(), 512, vec![(0x20000, "scattered"), (0x8000, "scattered")]),
            // A long one among many short ones does.
            (
                [(0..5).map(page).collect::<Vec<_>>(), vec![(0x20_0000, MIB)]].concat(),
                512,
                vec![(0x5000, "scattered"), (0x10_0000, "direct")],
            ),
            // What is cut within a block is copied around it.
            (
                vec![(0x10_0000, 0x1100), (0x20_0000, 0x10f00)],
                4096,
                vec![(0x1000, "direct"), (0x1000, "scattered"), (0x10000, "direct")],
            ),
            // What is not registered.
            (vec![(0x1000, 0x1000)], 512, vec![(0x1000, "unregistered")]),
            (vec![(0x1000, 3 * 0x10000)], 512, vec![(0x20000, "unregistered"), (0x10000, "unregistered")]),
            (vec![(0x1000, 0x1000), (0x4000, 0x200)], 0, vec![(0x1200, "unregistered")]),
        ] {
            assert_eq!(pieces(&segments, &entries, block), want, "{segments:x?}");
        }
    }

    proptest! {
        /// Every byte is in one piece, every cut is at a block, and nothing goes by a key of other memory.
        #[test]
        fn any_request_is_cut_into_what_can_be_done(
            cuts in prop::collection::vec((0usize..64, 1usize..9), 1..40),
            shift in 0u32..4,
        ) {
            // Segments in units of 512 bytes, over memory of which a part is registered.
            let segments: Vec<_> = cuts.iter().map(|(at, len)| (0x10_0000 + at * 0x1200, len * 512)).collect();
            let entries = Entries::new(vec![entry(0x10_0000, 0x9000), entry(0x11_2000, 0x20000)]);
            let iovecs = iovecs(&segments);
            let total: usize = segments.iter().map(|(_, len)| len).sum();
            let block = 512u32 << shift;
            let total = total - total % block as usize;
            prop_assume!(total > 0);
            // SAFETY: the memory is never touched; the iovecs live to the end.
            let all = unsafe { Buffers::new(iovecs.as_ptr(), low32(iovecs.len() as u64), low32(total as u64)) };
            let mut at = 0;
            while at < total {
                let rest = all.slice(at, total - at);
                let piece = plan(&rest, &entries, block, RUNS_MAX);
                prop_assert!(piece.len > 0 && piece.len as usize <= total - at);
                prop_assert!(piece.len.is_multiple_of(block));
                match piece.place {
                    Place::Direct { start, entry } => {
                        prop_assert!(entry.has(start, piece.len as usize));
                        let mut expected = start;
                        for segment in rest.slice(0, piece.len as usize).segments() {
                            prop_assert_eq!(segment.start as usize, expected);
                            expected += segment.len;
                        }
                    }
                    Place::Copy { .. } => prop_assert!(piece.len <= LARGE),
                    other => prop_assert!(false, "{:?}", other),
                }
                at += piece.len as usize;
            }
        }
    }
}
