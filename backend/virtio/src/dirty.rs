//! The log of dirty pages: one bit for each 4 KiB of guest memory that was written, for a front end that migrates its VM.
//!
//! The vhost-user specification, "Migration": `log[page / 8] |= 1 << page % 8`, from guest address 0 on. The front end takes
//! bits away while we set them, and copies their pages then. So a bit is set after what it stands for was written: set before,
//! it could be taken, and the page copied, between the two.
//!
//! Must not know requests. Invariants: no bit is set outside of the log; a queue owns the log that it marks in.

use crate::mapping::{Mapping, MappingError};
use crate::message::LogDescription;
use crate::shared;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;

/// VHOST_LOG_PAGE.
const PAGE_SHIFT: u32 = 12;

/// The front end's log, mapped.
#[derive(Debug)]
pub(crate) struct DirtyLog {
    mapping: Mapping,
    start: usize,
    bytes: u64,
}

/// Why a log was not taken.
#[derive(Debug)]
pub(crate) struct DirtyLogError(MappingError);

impl fmt::Display for DirtyLogError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            MappingError::PastEnd { file_bytes } => {
                write!(f, "mmap offset + size is past the end of the file ({file_bytes} bytes)")
            }
            MappingError::Full => f.write_str("no more mappings can be watched"),
            MappingError::Map(error) => write!(f, "mmap: {error}"),
        }
    }
}

impl DirtyLog {
    /// Maps a log of the front end's.
    pub(crate) fn map(description: LogDescription, file: &OwnedFd) -> Result<Arc<DirtyLog>, DirtyLogError> {
        let mapping =
            Mapping::new(file, description.file_offset, description.bytes).map_err(DirtyLogError)?;
        Ok(Arc::new(DirtyLog { start: mapping.wanted(), bytes: description.bytes, mapping }))
    }

    /// The first guest address that it has no bit for.
    pub(crate) fn end(&self) -> u64 {
        self.bytes.saturating_mul(8 << PAGE_SHIFT)
    }

    /// Whether the front end took it away under us.
    pub(crate) fn faulted(&self) -> bool {
        self.mapping.faulted()
    }

    /// Marks `len` (not 0) bytes from guest address `address` on, which were written.
    pub(crate) fn mark(&self, address: u64, len: u64) {
        let last = address.saturating_add(len - 1) >> PAGE_SHIFT;
        let mut page = address >> PAGE_SHIFT;
        while page <= last {
            let byte = page / 8;
            if byte >= self.bytes {
                // Whoever set the log has seen to it that it covers the memory.
                return;
            }
            let in_byte = page % 8..(last - page / 8 * 8).min(7) + 1;
            let bits = in_byte.fold(0u8, |bits, bit| bits | 1 << bit);
            // The mapping is smaller than the address space.
            let at = self.start.wrapping_add(usize::try_from(byte).unwrap_or(0)) as *mut u8;
            // SAFETY: within the log's mapped bytes (checked above).
            unsafe { shared::or_u8(at, bits) };
            page = (byte + 1) * 8;
        }
    }
}

/// Where one queue marks what it writes.
#[derive(Clone, Debug)]
pub(crate) struct Marks {
    pub(crate) log: Arc<DirtyLog>,
    /// The used ring's address as the log knows it; `None`: writes to it are not logged.
    pub(crate) used: Option<u64>,
}

impl Marks {
    /// Marks bytes of the used ring, by their place in it.
    pub(crate) fn used(&self, offset: u64, len: u64) {
        if let Some(used) = self.used {
            self.log.mark(used.saturating_add(offset), len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::tests::memfd;
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    #[test]
    fn marks_agree_with_a_page_wise_model_and_stay_within_the_log() {
        const BYTES: usize = 6;
        let file = memfd(4096);
        // Not aligned to anything; bytes before and behind it are others'.
        let description = LogDescription { bytes: BYTES as u64, file_offset: 13 };
        let log = DirtyLog::map(description, &file).unwrap();
        assert_eq!(log.end(), 48 << 12);
        let file = File::from(file);
        for (address, len) in [
            (0, 1),
            (0xfff, 2),
            (0x1000, 0x1000),
            (0x6fff, 0x2002),
            (0x3000, 0x1_2345),
            (0x2f_f000, 0x1000),
            (0x2f_ffff, 5),
            (0x30_0000, 1),
            (u64::MAX, 1),
            (u64::MAX - 5, 100),
            (0, u64::MAX),
        ] {
            file.write_all_at(&[0; 64], 0).unwrap();
            log.mark(address, len);
            let mut model = [0u8; 64];
            for page in 0..8 * BYTES as u64 {
                let (first, last) = (page << 12, (page << 12) + 0xfff);
                if address <= last && address.saturating_add(len - 1) >= first {
                    model[13 + usize::try_from(page / 8).unwrap()] |= 1 << (page % 8);
                }
            }
            let mut found = [0; 64];
            file.read_exact_at(&mut found, 0).unwrap();
            assert_eq!(found, model, "{address:#x} {len:#x}");
        }
        assert!(DirtyLog::map(LogDescription { bytes: 4096, file_offset: 1 }, &file.into()).is_err());
    }
}
