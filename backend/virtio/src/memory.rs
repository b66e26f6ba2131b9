//! A front end's memory as we see it: regions, their mappings, and the translation of addresses.
//!
//! [`GuestMemory`] is an epoch: it never changes. A new table makes a new epoch; queues and operations in flight own the
//! one that their pointers come from, and a [`Region`] is unmapped when the last epoch that has it is gone.
//!
//! Must not know messages or rings. Invariants:
//! - No Rust reference to guest memory is ever made; only raw pointers leave this module.
//! - Every pointer that leaves it was checked against its region with its whole length, without overflow.
//! - Regions of one epoch do not overlap, neither in guest nor in user addresses.

use crate::mapping::{Mapping, MappingError};
use crate::message::RegionDescription;
use hawser_block::regions::{self, Announced, Regions};
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Why a region was not taken.
#[derive(Debug)]
pub(crate) enum RegionError {
    Overlap,
    /// The table has no more slots.
    Full,
    /// The session holds as many regions as it may.
    Share,
    Mapping(MappingError),
}

impl fmt::Display for RegionError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RegionError::Overlap => f.write_str("it overlaps a region that is there already"),
            RegionError::Full | RegionError::Mapping(MappingError::Full) => {
                f.write_str("no memory slot is free")
            }
            RegionError::Share => {
                write!(
                    f,
                    "{REGIONS_MAX} regions are mapped, in old tables that requests in flight still name"
                )
            }
            RegionError::Mapping(MappingError::PastEnd { file_bytes }) => {
                write!(f, "mmap offset + size is past the end of the file ({file_bytes} bytes)")
            }
            RegionError::Mapping(MappingError::Map(error)) => write!(f, "mmap: {error}"),
        }
    }
}

/// Regions that one session may have mapped: its table, the one that takes its place, and as many again in older ones that
/// requests in flight still name. Each is a mapping of the process, which has 65,530 of them (`vm.max_map_count`) for all.
const REGIONS_MAX: usize = 4 * GuestMemory::SLOTS;

/// How many regions a session has mapped.
#[derive(Clone, Debug, Default)]
pub(crate) struct Share(Arc<AtomicUsize>);

/// One of them; given back when dropped.
#[derive(Debug)]
struct Ticket(Arc<AtomicUsize>);

impl Share {
    fn take(&self) -> Result<Ticket, RegionError> {
        let ticket = Ticket(Arc::clone(&self.0));
        if self.0.fetch_add(1, Ordering::AcqRel) < REGIONS_MAX { Ok(ticket) } else { Err(RegionError::Share) }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// One mapped region.
#[derive(Debug)]
pub(crate) struct Region {
    description: RegionDescription,
    /// Where its first byte is in our address space.
    host: usize,
    /// Before the mapping: what devices know of it goes first.
    _announced: Announced,
    mapping: Mapping,
    _ticket: Ticket,
}

impl Region {
    /// Maps a region of a file that the front end shares. libblkio's begin and end anywhere.
    pub(crate) fn map(
        description: RegionDescription,
        file: &OwnedFd,
        share: &Share,
    ) -> Result<Arc<Region>, RegionError> {
        let ticket = share.take()?;
        let mapping =
            Mapping::new(file, description.file_offset, description.bytes).map_err(RegionError::Mapping)?;
        let host = mapping.wanted();
        let span = regions::Span { start: host, len: usize::try_from(description.bytes).unwrap_or(0) };
        let announced = Regions::of_process().announce(span);
        Ok(Arc::new(Region { description, host, _announced: announced, mapping, _ticket: ticket }))
    }

    pub(crate) fn description(&self) -> &RegionDescription {
        &self.description
    }

    /// Whether these bytes of our address space touch it.
    pub(crate) fn touches(&self, start: usize, len: usize) -> bool {
        let end = self.host + usize::try_from(self.description.bytes).unwrap_or(0);
        start < end && self.host < start.saturating_add(len)
    }
}

/// One region as the hot path needs it.
#[derive(Clone, Copy, Debug)]
struct Span {
    start: u64,
    bytes: u64,
    host: usize,
}

/// All memory of a front end at one time.
#[derive(Debug, Default)]
pub(crate) struct GuestMemory {
    /// By guest address.
    spans: Vec<Span>,
    /// The same by their place with us.
    by_host: Vec<Span>,
    regions: Vec<Arc<Region>>,
}

impl GuestMemory {
    /// The most regions in one table: what QEMU calls memory slots.
    pub(crate) const SLOTS: usize = 509;

    /// An epoch of these regions.
    pub(crate) fn new(mut regions: Vec<Arc<Region>>) -> Result<GuestMemory, RegionError> {
        if regions.len() > GuestMemory::SLOTS {
            return Err(RegionError::Full);
        }
        let overlap = |key: fn(&RegionDescription) -> u64, regions: &mut Vec<Arc<Region>>| {
            regions.sort_by_key(|region| key(&region.description));
            regions
                .windows(2)
                .any(|two| key(&two[0].description) + two[0].description.bytes > key(&two[1].description))
        };
        if overlap(|region| region.user_address, &mut regions)
            || overlap(|region| region.guest_address, &mut regions)
        {
            return Err(RegionError::Overlap);
        }
        let spans: Vec<Span> = regions
            .iter()
            .map(|region| Span {
                start: region.description.guest_address,
                bytes: region.description.bytes,
                host: region.host,
            })
            .collect();
        let mut by_host = spans.clone();
        by_host.sort_by_key(|span| span.host);
        Ok(GuestMemory { spans, by_host, regions })
    }

    /// The regions, by guest address.
    pub(crate) fn regions(&self) -> &[Arc<Region>] {
        &self.regions
    }

    /// Whether the front end took memory away under us: a region of this epoch had a SIGBUS.
    pub(crate) fn faulted(&self) -> bool {
        self.regions.iter().any(|region| region.mapping.faulted())
    }

    #[inline]
    fn find(&self, address: u64) -> Option<&Span> {
        if self.spans.len() <= 8 {
            return self.spans.iter().find(|span| address.wrapping_sub(span.start) < span.bytes);
        }
        let index = self.spans.partition_point(|span| span.start <= address).checked_sub(1)?;
        Some(&self.spans[index]).filter(|span| address - span.start < span.bytes)
    }

    /// The first byte of `len` (not 0) bytes at a guest address, when they lie in one region.
    #[inline]
    pub(crate) fn contiguous(&self, address: u64, len: u64) -> Option<*mut u8> {
        let span = self.find(address)?;
        let offset = address - span.start;
        // `offset < span.bytes`, so this does not wrap.
        (len <= span.bytes - offset).then(|| (span.host + host_offset(offset)) as *mut u8)
    }

    /// Gives the pieces of `len` bytes at a guest address to `piece`, in order. Whether all of them are there; `piece` may
    /// refuse one.
    #[inline]
    pub(crate) fn pieces(
        &self,
        mut address: u64,
        mut len: u64,
        mut piece: impl FnMut(*mut u8, usize) -> bool,
    ) -> bool {
        while len > 0 {
            let Some(span) = self.find(address) else { return false };
            let offset = address - span.start;
            let here = len.min(span.bytes - offset);
            if !piece((span.host + host_offset(offset)) as *mut u8, host_offset(here)) {
                return false;
            }
            len -= here;
            // The end of the address space is the end of every region: nothing can follow it.
            let Some(next) = address.checked_add(here) else { return len == 0 };
            address = next;
        }
        true
    }

    /// The guest address of `len` bytes at a place of ours that came from this epoch, so that they lie in one region.
    pub(crate) fn guest_address(&self, host: usize, len: usize) -> Option<u64> {
        let index = self.by_host.partition_point(|span| span.host <= host).checked_sub(1)?;
        let span = &self.by_host[index];
        let offset = (host - span.host) as u64;
        (offset < span.bytes && len as u64 <= span.bytes - offset).then(|| span.start + offset)
    }

    /// The first guest address behind all regions.
    pub(crate) fn end(&self) -> u64 {
        self.spans.last().map_or(0, |span| span.start + span.bytes)
    }

    /// Copies bytes at a guest address out, also across regions.
    pub(crate) fn read<const N: usize>(&self, address: u64) -> Option<[u8; N]> {
        let mut bytes = [0u8; N];
        let mut filled = 0;
        let whole = self.pieces(address, N as u64, |start, len| {
            // SAFETY: `start..start + len` lies in a mapped region (checked by `pieces`), and the pieces add up to N.
            // The guest may write meanwhile: the copy is then torn, and is validated as any other input.
            unsafe { std::ptr::copy_nonoverlapping(start, bytes.as_mut_ptr().add(filled), len) };
            filled += len;
            true
        });
        whole.then_some(bytes)
    }

    /// The first of `len` bytes at a user address of the front end, for its rings.
    pub(crate) fn user(&self, address: u64, len: u64) -> Option<*mut u8> {
        let region = self.regions.iter().find(|region| {
            let start = region.description.user_address;
            address >= start && address - start < region.description.bytes
        })?;
        let offset = address - region.description.user_address;
        (len <= region.description.bytes - offset).then(|| (region.host + host_offset(offset)) as *mut u8)
    }
}

/// An offset within a mapped region, which is never larger than our address space.
#[inline]
#[expect(
    clippy::cast_possible_truncation,
    reason = "mapped regions are smaller than isize::MAX (Mapping::new)"
)]
fn host_offset(offset: u64) -> usize {
    offset as usize
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::fault;
    use std::os::fd::{AsRawFd, FromRawFd};

    pub(crate) fn memfd(bytes: u64) -> OwnedFd {
        // SAFETY: a literal C string and plain system calls; the descriptor is ours.
        unsafe {
            let fd = libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC);
            assert!(fd >= 0);
            assert_eq!(libc::ftruncate(fd, i64::try_from(bytes).unwrap()), 0);
            OwnedFd::from_raw_fd(fd)
        }
    }

    pub(crate) fn region(guest: u64, bytes: u64, offset: u64) -> Arc<Region> {
        let description = RegionDescription {
            guest_address: guest,
            bytes,
            user_address: guest + 0x7f00_0000_0000,
            file_offset: offset,
        };
        Region::map(description, &memfd(offset + bytes), &Share::default()).unwrap()
    }

    #[test]
    fn translation_agrees_with_a_byte_wise_model() {
        // Unaligned, adjacent, with a gap, and at the end of the address space.
        let few = vec![
            region(0x1000, 0x1800, 0),
            region(0x2800, 0x33, 77),
            region(0x4000, 0x1000, 0x1234),
            region(u64::MAX - 0x7f00_0000_0000 - 0x100, 0x100, 0),
        ];
        let mut many = few.clone();
        many.extend((0..20).map(|index| region(0x10_0000 + index * 0x2000, 0x1000, index)));
        for regions in [few, many] {
            let memory = GuestMemory::new(regions.clone()).unwrap();
            let model = |address: u64| {
                regions.iter().find_map(|region| {
                    let offset = address.checked_sub(region.description.guest_address)?;
                    (offset < region.description.bytes).then(|| region.host + host_offset(offset))
                })
            };
            for start in [0xfff, 0x1000, 0x27ff, 0x2800, 0x2832, 0x2833, 0x3fff, 0x4fff, 0x10_0fff] {
                for len in [1u64, 2, 0x33, 0x34, 0x1800, 0x1833, 0x1834, 0x4000] {
                    let bytes: Option<Vec<usize>> = (start..start + len).map(model).collect();
                    let mut found = Vec::new();
                    let whole = memory.pieces(start, len, |at, len| {
                        found.extend((0..len).map(|index| at as usize + index));
                        true
                    });
                    assert_eq!(whole.then_some(found), bytes, "{start:#x} {len:#x}");
                    let contiguous = memory.contiguous(start, len).map(|at| at as usize);
                    let in_one = bytes.filter(|bytes| {
                        regions.iter().any(|region| {
                            region.touches(bytes[0], 1) && region.touches(*bytes.last().unwrap(), 1)
                        })
                    });
                    assert_eq!(contiguous, in_one.map(|bytes| bytes[0]), "{start:#x} {len:#x}");
                    // And back; not a byte further than the region.
                    if let (Some(host), Ok(len)) = (contiguous, usize::try_from(len)) {
                        assert_eq!(memory.guest_address(host, len), Some(start), "{start:#x} {len:#x}");
                        assert_eq!(memory.guest_address(host, 1 << 30), None);
                    }
                }
            }
            assert!(memory.contiguous(u64::MAX, u64::MAX).is_none());
            assert!(!memory.pieces(0x1000, u64::MAX, |_, _| true));
        }
    }

    #[test]
    fn overlaps_and_regions_past_their_file_are_refused() {
        let overlap = GuestMemory::new(vec![region(0, 0x1000, 0), region(0xfff, 0x1000, 0)]);
        assert!(matches!(overlap, Err(RegionError::Overlap)));
        let description =
            RegionDescription { guest_address: 0, bytes: 4097, user_address: 0, file_offset: 0 };
        assert!(matches!(
            Region::map(description, &memfd(4096), &Share::default()),
            Err(RegionError::Mapping(MappingError::PastEnd { file_bytes: 4096 }))
        ));
    }

    #[test]
    fn truncated_memory_is_marked_and_does_not_kill_us() {
        fault::install();
        let file = memfd(0x4000);
        let description =
            RegionDescription { guest_address: 0, bytes: 0x4000, user_address: 0, file_offset: 0 };
        let memory =
            GuestMemory::new(vec![Region::map(description, &file, &Share::default()).unwrap()]).unwrap();
        let other = GuestMemory::new(vec![region(0, 0x1000, 0)]).unwrap();
        assert_eq!(memory.read::<4>(0x3ffe), None);
        assert_eq!(memory.read::<4>(0x2000), Some([0; 4]));
        // SAFETY: plain system call on our own descriptor.
        assert_eq!(unsafe { libc::ftruncate(file.as_raw_fd(), 0x1000) }, 0);
        assert!(!memory.faulted());
        assert_eq!(memory.read::<4>(0x2000), Some([0; 4]));
        assert!(memory.faulted());
        assert!(!other.faulted());
    }
}
