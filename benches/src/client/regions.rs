//! Memory that comes and goes while jobs run: a region is added, written and read by, and removed again, as a VM's memory devices are.
//!
//! Owns: a queue of its own, and the last bytes of the disk, which no job uses. Must not know: the jobs.

use blkio::{Blkio, Blkioq, Completion, ReqFlags};
use std::mem::MaybeUninit;

use super::options::Options;
use crate::{to_u64, to_usize};

/// See the module's text.
pub(super) struct Regions {
    queue: Blkioq,
    /// Where on the disk its half of a region goes.
    at: u64,
    len: usize,
    turns: u64,
}

impl Regions {
    /// `None` where the options do not ask for it. The jobs use nothing from `end` on.
    pub(super) fn new(
        options: &Options,
        device: &Blkio,
        queue: Option<Blkioq>,
        end: u64,
    ) -> Result<Option<Self>, String> {
        if options.churn == 0 {
            return Ok(None);
        }
        let capacity = device.get_u64("capacity").map_err(|e| format!("capacity: {e}"))?;
        let half = options.churn / 2;
        let Some(at) = capacity.checked_sub(half).filter(|at| *at >= end) else {
            let left = capacity.saturating_sub(end);
            return Err(format!("--churn={}: {left} bytes are behind the jobs' (see --size)", options.churn));
        };
        let queue = queue.ok_or("--churn: needs a queue more than --numjobs")?;
        Ok(Some(Regions { queue, at, len: to_usize(half), turns: 0 }))
    }

    /// How often a region came and went.
    pub(super) fn turns(&self) -> u64 {
        self.turns
    }

    /// Adds a region, writes from its first half, reads into the second, compares, and removes it.
    pub(super) fn turn(&mut self, device: &mut Blkio) -> Result<(), String> {
        let failed = |e: blkio::Error| format!("a memory region that comes and goes: {e}");
        let region = device.alloc_mem_region(2 * self.len).map_err(failed)?;
        device.map_mem_region(&region).map_err(failed)?;
        self.turns += 1;
        let halves = [region.addr, region.addr + self.len].map(std::ptr::with_exposed_provenance_mut::<u8>);
        let seed = self.turns.to_le_bytes()[0];
        // SAFETY: the region is ours, mapped, and has so many bytes in each half; no request names it yet.
        let (from, to) = unsafe {
            let slice = |half| std::slice::from_raw_parts_mut::<u8>(half, self.len);
            (slice(halves[0]), slice(halves[1]))
        };
        for (index, byte) in from.iter_mut().enumerate() {
            *byte = (index >> 9).to_le_bytes()[0].wrapping_mul(31) ^ index.to_le_bytes()[0] ^ seed;
        }
        to.fill(0xee);
        self.queue.write(self.at, halves[0], self.len, 0, ReqFlags::empty());
        self.wait("write")?;
        self.queue.read(self.at, halves[1], self.len, 0, ReqFlags::empty());
        self.wait("read")?;
        // SAFETY: as above; both requests have ended.
        let same = unsafe {
            let slice = |half| std::slice::from_raw_parts::<u8>(half, self.len);
            slice(halves[0]) == slice(halves[1])
        };
        device.unmap_mem_region(&region);
        device.free_mem_region(&region);
        match same {
            true => Ok(()),
            false => {
                Err(format!("a memory region that comes and goes: turn {} reads back wrong", self.turns))
            }
        }
    }

    fn wait(&mut self, what: &str) -> Result<(), String> {
        let mut completions = [const { MaybeUninit::<Completion>::uninit() }; 1];
        while self.queue.do_io(&mut completions, 1, None, None).map_err(|e| format!("the queue: {e}"))? == 0 {
        }
        // SAFETY: do_io has initialised what it counts.
        match unsafe { completions[0].assume_init_ref() }.ret {
            0 => Ok(()),
            ret => Err(format!(
                "a {what} by a region that comes and goes, at byte {} ({} bytes): {}",
                self.at,
                to_u64(self.len),
                std::io::Error::from_raw_os_error(-ret)
            )),
        }
    }
}
