//! Copying disk images to devices, and devices to images, without a daemon.
//!
//! Owns: reading images (`source`), keeping several MiB in flight to a device (`lane`), the order of a copy ([`import()`], [`export()`]).
//! Must not know: the command line, what kind of device it is.

mod export;
mod lane;
mod source;

pub use export::{NewFile, export, read};
pub use source::Image;

use hawser_block::{Device, DeviceState, Geometry, Operation, Status};
use hawser_runtime::ReactorHandle;
use lane::{Job, Lane, Work};
use source::Piece;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

/// How long a device may take to be reached.
const REACH_MAX: Duration = Duration::from_secs(20);
/// One request; large enough that a request's own cost does not matter.
const PIECE_BYTES: u32 = 1 << 20;
/// Requests under way at a time: 8 MiB.
const IN_FLIGHT_MAX: usize = 8;

/// What a copy tells of itself while it runs.
pub trait Progress {
    /// A part begins: its name, and how many bytes there are to go.
    fn begin(&self, part: &'static str, bytes: u64);
    /// So many bytes of the part are done.
    fn done(&self, bytes: u64);
}

/// Waits until the device is reached.
///
/// # Errors
/// When it is not, in time: one line.
pub fn reach(device: &Arc<dyn Device>) -> Result<Geometry, String> {
    reach_within(device, REACH_MAX)
}

fn reach_within(device: &Arc<dyn Device>, limit: Duration) -> Result<Geometry, String> {
    let (sender, news) = mpsc::channel();
    device.subscribe(Box::new(move || {
        // Nobody waits any more: fine.
        let _ = sender.send(());
    }));
    let since = Instant::now();
    loop {
        match (device.geometry(), device.state()) {
            (Some(geometry), DeviceState::Ready) => return Ok(geometry),
            (_, DeviceState::Failed) => return Err(trouble_of(device)),
            _ => {}
        }
        let left = limit.saturating_sub(since.elapsed());
        if left.is_zero() || news.recv_timeout(left) == Err(RecvTimeoutError::Disconnected) {
            let trouble = trouble_of(device);
            let why = if trouble.is_empty() { String::new() } else { format!(": {trouble}") };
            return Err(format!("not reached within {} s{why}", limit.as_secs()));
        }
    }
}

/// Without the device's name, which whoever asked knows.
fn trouble_of(device: &Arc<dyn Device>) -> String {
    let (trouble, name) = (device.trouble(), format!("{}: ", device.name()));
    let each = trouble.split("; ").map(|part| part.strip_prefix(&name).unwrap_or(part));
    each.collect::<Vec<_>>().join("; ")
}

/// Copies `image` to `device`, makes it durable, and with `verify` reads it back and compares.
///
/// # Errors
/// One line. When the image does not fit, nothing has been written.
pub fn import(
    image: &Image,
    device: &Arc<dyn Device>,
    reactor: &ReactorHandle,
    verify: bool,
    progress: &dyn Progress,
) -> Result<(), String> {
    let geometry = reach(device)?;
    if geometry.read_only {
        return Err("is read-only, want a device that can be written".to_owned());
    }
    if image.size_bytes() > geometry.size_bytes() {
        return Err(format!(
            "has {} bytes and the image {}, want a device of at least the image's size",
            geometry.size_bytes(),
            image.size_bytes()
        ));
    }
    let lane = Lane::open(device, reactor)?;
    let mut copy = Copy { image, geometry, lane, in_flight: 0, answers: true, progress };
    let done = copy.write().and_then(|()| if verify { copy.verify() } else { Ok(()) });
    copy.close();
    done
}

struct Copy<'a> {
    image: &'a Image,
    geometry: Geometry,
    lane: Lane,
    in_flight: usize,
    /// The device ends what it is asked for.
    answers: bool,
    progress: &'a dyn Progress,
}

impl Copy<'_> {
    fn piece_bytes(&self) -> u64 {
        u64::from(PIECE_BYTES)
            .min(u64::from(self.geometry.transfer_blocks_max) << self.geometry.block_size.shift())
    }

    fn write(&mut self) -> Result<(), String> {
        self.progress.begin("writing", self.image.size_bytes());
        let zero_max = self
            .geometry
            .write_zeroes
            .map(|limits| u64::from(limits.blocks_max) << self.geometry.block_size.shift());
        let mut at = 0;
        while at < self.image.size_bytes() {
            let piece = self.image.piece(at, self.piece_bytes(), zero_max.unwrap_or(self.piece_bytes()))?;
            at += piece.len();
            let job = match piece {
                Piece::Data { offset, len } => {
                    let mut job = self.job(offset, len, Operation::Write { fua: false });
                    job.work = Work::filled(self.whole_blocks(len), |to| self.image.read_at(offset, to))?;
                    if zero_max.is_some_and(|max| len <= max) && job.work.is_all_zero() {
                        job = self.job(offset, len, self.zero_operation());
                    }
                    job
                }
                Piece::Zero { offset, len } if zero_max.is_some() => {
                    self.job(offset, len, self.zero_operation())
                }
                Piece::Zero { offset, len } => {
                    let mut job = self.job(offset, len, Operation::Write { fua: false });
                    job.work = Work::zeroes(self.whole_blocks(len));
                    job
                }
            };
            self.submit(job, |_, _| Ok(()))?;
        }
        self.drain(|_, _| Ok(()))?;
        self.submit(
            Job { operation: Operation::Flush, lba: 0, blocks: 0, len: 0, work: Work::none() },
            |_, _| Ok(()),
        )?;
        self.drain(|_, _| Ok(()))
    }

    /// Space is given back only where it then reads as zeroes for certain.
    fn zero_operation(&self) -> Operation {
        let unmap = self.geometry.write_zeroes.is_some_and(|limits| limits.may_unmap)
            && self.geometry.discard.is_some_and(|limits| limits.reads_zeroes);
        Operation::WriteZeroes { unmap, fua: false }
    }

    fn verify(&mut self) -> Result<(), String> {
        self.progress.begin("verifying", self.image.size_bytes());
        let piece_bytes = self.piece_bytes();
        let mut at = 0;
        while at < self.image.size_bytes() {
            let len = piece_bytes.min(self.image.size_bytes() - at);
            let mut job = self.job(at, len, Operation::Read);
            job.work = Work::zeroes(self.whole_blocks(len));
            at += len;
            self.submit(job, compare)?;
        }
        self.drain(compare)
    }

    /// The image's last block may be a part of one: the rest of it is zero.
    fn whole_blocks(&self, len: u64) -> usize {
        let bytes = len.next_multiple_of(u64::from(self.geometry.block_size.bytes()));
        usize::try_from(bytes).expect("a piece is at most 1 MiB")
    }

    fn job(&self, offset: u64, len: u64, operation: Operation) -> Job {
        let shift = self.geometry.block_size.shift();
        let blocks = len.div_ceil(u64::from(self.geometry.block_size.bytes()));
        let blocks = u32::try_from(blocks).expect("pieces are bounded by 32-bit limits");
        Job { operation, lba: offset >> shift, blocks, len, work: Work::none() }
    }

    /// Starts a job; when enough are under way, first sees one to its end.
    fn submit(&mut self, job: Job, ended: impl Fn(&Image, &Job) -> Result<(), String>) -> Result<(), String> {
        if self.in_flight == IN_FLIGHT_MAX {
            self.end_one(&ended)?;
        }
        self.in_flight += 1;
        self.lane.submit(job);
        Ok(())
    }

    fn drain(&mut self, ended: impl Fn(&Image, &Job) -> Result<(), String>) -> Result<(), String> {
        while self.in_flight > 0 {
            self.end_one(&ended)?;
        }
        Ok(())
    }

    /// Gives the device back, once nothing is under way. One that does not answer keeps its lane: what is under way names memory of that.
    fn close(mut self) {
        while self.answers && self.in_flight > 0 {
            self.answers = self.lane.wait().is_ok();
            self.in_flight -= 1;
        }
        if self.answers {
            self.lane.close();
        }
    }

    fn end_one(&mut self, ended: &impl Fn(&Image, &Job) -> Result<(), String>) -> Result<(), String> {
        let (job, outcome) = self.lane.wait().inspect_err(|_| self.answers = false)?;
        self.in_flight -= 1;
        outcome.map_err(|status| failure(&job, self.geometry, status))?;
        ended(self.image, &job)?;
        self.progress.done(job.len);
        Ok(())
    }
}

fn failure(job: &Job, geometry: Geometry, status: Status) -> String {
    let what = match job.operation {
        Operation::Read => "reading",
        Operation::Write { .. } => "writing",
        Operation::Flush => return format!("flushing failed: {}", status.name()),
        Operation::Discard | Operation::WriteZeroes { .. } => "zeroing",
    };
    let from = job.lba << geometry.block_size.shift();
    format!("{what} {} bytes at {from} failed: {}", job.len, status.name())
}

/// Compares what was read back with the image.
fn compare(image: &Image, job: &Job) -> Result<(), String> {
    let found = job.work.bytes();
    let mut wanted = vec![0; found.len()];
    let offset = job.lba * (found.len() as u64 / u64::from(job.blocks));
    image.read_at(offset, &mut wanted)?;
    match found.iter().zip(&wanted).position(|(found, wanted)| found != wanted) {
        None => Ok(()),
        Some(at) => Err(format!("differs from the image at byte {}", offset + at as u64)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hawser_block::fake::FakeDevice;
    use hawser_block::{BlockSize, DiscardLimits, WriteZeroesLimits};
    use hawser_runtime::{ReactorConfig, ReactorThread};

    struct Quiet;

    impl Progress for Quiet {
        fn begin(&self, _: &'static str, _: u64) {}
        fn done(&self, _: u64) {}
    }

    /// Space is given back where it then reads as zeroes for certain, and not where the device only may.
    #[test]
    fn empty_parts_are_deallocated_only_where_that_reads_as_zeroes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        std::fs::write(&path, [7; 4096]).unwrap();
        std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(4 << 20).unwrap();
        let image = Image::open(&path).unwrap();
        let reactor = ReactorThread::spawn("test", ReactorConfig { cpu: None, poll_us: 0 }).unwrap();
        let zeroes = WriteZeroesLimits { blocks_max: 1 << 16, may_unmap: true };
        let discard =
            |reads_zeroes| DiscardLimits { blocks_max: 1 << 16, granularity_blocks: 1, reads_zeroes };
        for (discard, write_zeroes, want) in [
            (Some(discard(true)), Some(zeroes), Some(true)),
            (Some(discard(false)), Some(zeroes), Some(false)),
            (None, Some(zeroes), Some(false)),
            (Some(discard(true)), Some(WriteZeroesLimits { may_unmap: false, ..zeroes }), Some(false)),
            // No command that zeroes: zeroes are written, and nothing is discarded.
            (Some(discard(true)), None, None),
        ] {
            let mut geometry = Geometry::new(BlockSize::B512, 8192);
            (geometry.discard, geometry.write_zeroes) = (discard, write_zeroes);
            let fake = Arc::new(FakeDevice::new(geometry));
            fake.state().content.fill(0xee);
            let device: Arc<dyn Device> = Arc::clone(&fake) as Arc<dyn Device>;
            import(&image, &device, reactor.handle(), true, &Quiet).unwrap();
            let state = fake.state();
            let unmaps: Vec<bool> = state
                .log
                .iter()
                .filter_map(|(operation, ..)| match operation {
                    Operation::WriteZeroes { unmap, .. } => Some(*unmap),
                    _ => None,
                })
                .collect();
            assert_eq!(unmaps.is_empty(), want.is_none(), "{discard:?} {write_zeroes:?}");
            assert!(
                unmaps.iter().all(|unmap| Some(*unmap) == want),
                "{discard:?} {write_zeroes:?}: {unmaps:?}"
            );
            assert!(!state.log.iter().any(|(operation, ..)| *operation == Operation::Discard));
            assert!(state.content[4096..].iter().all(|byte| *byte == 0));
        }
    }
}
