//! Who uses a device: random requests from memory that outlives the process which carries them out, as a guest's does.

use crate::model::{self, BLOCK, Model, Snapshot};
use hawser_block::regions::{Announced, Regions, Span};
use hawser_block::{BlockCount, Buffers, Channel, Completion, Lba, Operation, Request, Token};
use hawser_runtime::{Event, Runtime, Source, SourceId};
use hawser_sim::{Random, SimDisk, World};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

const SLOTS: usize = 6;
/// More than what goes in a capsule: these wait for an R2T.
const BLOCKS_MAX: usize = 48;
/// What memory holds that no request names.
const POISON: u8 = 0xee;

struct Busy {
    request: Request,
    /// Of a write.
    id: u64,
    /// Of a flush.
    snapshot: Option<Snapshot>,
    /// The process died with it.
    to_replay: bool,
}

struct Slot {
    /// Devices may be given keys to it. First, so that it ends before the memory does.
    announced: Option<Announced>,
    memory: Box<[u8]>,
    iovec: Box<libc::iovec>,
    /// Bytes of the memory that a request has named.
    used: usize,
    busy: Option<Busy>,
}

impl Slot {
    fn announce(&mut self) {
        let span = Span { start: self.memory.as_ptr() as usize, len: self.memory.len() };
        self.announced = Some(Regions::of_process().announce(span));
    }
}

/// One queue of a guest.
pub(crate) struct Guest {
    pub(crate) model: Rc<RefCell<Model>>,
    pub(crate) troubles: Rc<RefCell<Vec<String>>>,
    pub(crate) disk: Arc<SimDisk>,
    pub(crate) world: World,
    pub(crate) random: Random,
    /// Its device's blocks.
    pub(crate) region: (u64, u64),
    /// Requests that it still makes.
    pub(crate) to_do: usize,
    /// The longest pause between two batches.
    pub(crate) pause_ns_max: u64,
    /// Requests may fail: the disk does.
    pub(crate) may_fail: bool,
    pub(crate) ended: u64,
    /// How much of its memory is announced; 0: none ever.
    announced_permille: u64,
    next_request: u64,
    slots: Vec<Slot>,
}

impl Guest {
    pub(crate) fn new(
        (model, troubles): (Rc<RefCell<Model>>, Rc<RefCell<Vec<String>>>),
        disk: Arc<SimDisk>,
        world: World,
        random: Random,
        region: (u64, u64),
        (to_do, announced_permille): (usize, u64),
    ) -> Guest {
        let slot = || {
            let mut memory = vec![POISON; BLOCKS_MAX * BLOCK].into_boxed_slice();
            let iovec = Box::new(libc::iovec { iov_base: memory.as_mut_ptr().cast(), iov_len: 0 });
            Slot { memory, iovec, used: 0, busy: None, announced: None }
        };
        let mut slots: Vec<Slot> = (0..SLOTS).map(|_| slot()).collect();
        slots.iter_mut().filter(|_| announced_permille > 0).for_each(Slot::announce);
        let (pause_ns_max, may_fail, ended, next_request) = (40_000_000, false, 0, 0);
        Guest {
            model,
            troubles,
            disk,
            world,
            random,
            region,
            to_do,
            pause_ns_max,
            may_fail,
            ended,
            announced_permille,
            next_request,
            slots,
        }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.slots.iter().all(|slot| slot.busy.is_none())
    }

    /// What it waits for, for people.
    pub(crate) fn waits_for(&self) -> String {
        let busy = self.slots.iter().filter_map(|slot| slot.busy.as_ref());
        busy.map(|busy| {
            let Request { operation, lba, blocks, .. } = busy.request;
            format!("{operation:?} {}+{} ", lba.0, blocks.0)
        })
        .collect()
    }

    /// Its process has died.
    pub(crate) fn process_died(&mut self) {
        for busy in self.slots.iter_mut().filter_map(|slot| slot.busy.as_mut()) {
            busy.to_replay = true;
        }
    }

    fn trouble(&self, what: String) {
        self.troubles.borrow_mut().push(what);
    }

    fn end(&mut self, completion: Completion) {
        let index = usize::try_from(completion.token.0 % 16).unwrap();
        let slot = &mut self.slots[index];
        let Some(busy) = slot.busy.take_if(|busy| busy.request.token == completion.token) else {
            return self.trouble(format!("request {} ends that is not under way", completion.token.0));
        };
        let Request { operation, lba, blocks, token, .. } = busy.request;
        let (ok, range) = (completion.outcome.is_ok(), (lba.0, u64::from(blocks.0)));
        self.world.note(&[4, token.0, u64::from(ok), lba.0, u64::from(blocks.0)]);
        if std::env::var_os("HAWSER_SIM_TELL").is_some() {
            let now = self.world.now();
            println!(
                "{now:?} {operation:?} {range:?} id {:#x} token {} {:?}",
                busy.id, token.0, completion.outcome
            );
        }
        let mut model = self.model.borrow_mut();
        let checked = match operation {
            Operation::Read => model.read_ends(busy.id, range, ok.then_some(&slot.memory[..])),
            Operation::Flush if !ok && self.may_fail => {
                model.flush_fails(&busy.snapshot.expect("a flush has one"));
                Ok(())
            }
            Operation::Flush => {
                let stable = self.disk.state().stable();
                let ended = model.flush_ends(&busy.snapshot.expect("a flush has one"), ok, &stable);
                ended.map_err(|why| format!("{why} ({:?})", completion.outcome))
            }
            Operation::Write { fua } | Operation::WriteZeroes { fua, .. } => {
                model.write_ends(busy.id, range, ok, fua);
                Ok(())
            }
            Operation::Discard => Ok(()),
        };
        drop(model);
        // From now on the memory is somebody else's.
        let is_reached = self.world.reaches(&slot.memory[..]);
        slot.memory[..slot.used].fill(POISON);
        self.ended += 1;
        if let Err(why) = checked {
            self.trouble(why);
        }
        if is_reached {
            self.trouble(format!(
                "{operation:?} of {range:?} has ended, and a device may still use its memory"
            ));
        }
        if !ok && !self.may_fail && operation != Operation::Flush {
            let outcome = completion.outcome;
            self.trouble(format!(
                "{operation:?} of {range:?} ends as {outcome:?}: guests see pauses, not errors"
            ));
        }
    }

    fn begin(&mut self, index: usize, operation: Operation) -> Request {
        let (from, to) = self.region;
        let room = to - from;
        let most = if self.random.chance(100) { BLOCKS_MAX as u64 } else { 6 };
        let count = (1 + self.random.below(most)).min(room);
        let lba = from + self.random.below(room - count + 1);
        let flush = operation == Operation::Flush;
        let (lba, count) = if flush { (0, 0) } else { (lba, count) };
        self.next_request += 1;
        let token = Token(self.next_request * 16 + index as u64);
        let slot = &mut self.slots[index];
        if self.announced_permille > 0 && self.random.chance(50) {
            // Nobody uses it now: it may go, and come.
            slot.announced = None;
            if self.random.chance(self.announced_permille) {
                slot.announce();
            }
        }
        let touched = slot.memory[..slot.used].iter().any(|byte| *byte != POISON);
        let bytes = usize::try_from(count).unwrap() * BLOCK;
        slot.used = bytes;
        let mut model = self.model.borrow_mut();
        let id = match operation {
            Operation::WriteZeroes { .. } => 0,
            _ => model.next_id(),
        };
        if operation.is_write() {
            model.write_begins(id, lba, count);
        }
        match operation {
            Operation::Write { .. } => {
                for (block, memory) in slot.memory[..bytes].chunks_exact_mut(BLOCK).enumerate() {
                    model::fill(memory, id, lba + block as u64);
                }
            }
            Operation::Read => model.read_begins(id, lba, count),
            _ => {}
        }
        let buffers = if operation.has_payload() {
            slot.iovec.iov_len = bytes;
            // SAFETY: memory and iovec are boxed, and stay as long as the guest, which outlives every device.
            unsafe { Buffers::new(&raw const *slot.iovec, 1, u32::try_from(bytes).unwrap()) }
        } else {
            Buffers::EMPTY
        };
        let snapshot = flush.then(|| model.flush_begins());
        drop(model);
        let blocks = BlockCount(u32::try_from(count).unwrap());
        let request = Request { operation, lba: Lba(lba), blocks, buffers, token };
        slot.busy = Some(Busy { request, id, snapshot, to_replay: false });
        if std::env::var_os("HAWSER_SIM_TELL").is_some() {
            println!(
                "{:?} begins {operation:?} {lba}+{count} id {id:#x} token {}",
                self.world.now(),
                token.0
            );
        }
        if touched {
            self.trouble("memory was touched after its request had ended".to_owned());
        }
        request
    }

    fn replays(&mut self) -> Vec<Request> {
        let busy = self.slots.iter_mut().filter_map(|slot| slot.busy.as_mut());
        let mut replayed: Vec<Request> =
            busy.filter_map(|busy| std::mem::take(&mut busy.to_replay).then_some(busy.request)).collect();
        // As the in-flight log has them.
        replayed.sort_by_key(|request| request.token.0);
        replayed
    }

    fn batch(&mut self) -> Vec<Request> {
        let mut batch = Vec::new();
        for index in 0..SLOTS {
            if self.to_do == 0 || self.slots[index].busy.is_some() || self.random.chance(300) {
                continue;
            }
            self.to_do -= 1;
            let operation = match self.random.below(24) {
                0..2 => Operation::Flush,
                2 => Operation::WriteZeroes { unmap: false, fua: self.random.chance(200) },
                3..11 => Operation::Read,
                _ => Operation::Write { fua: self.random.chance(150) },
            };
            batch.push(self.begin(index, operation));
        }
        batch
    }

    /// A FLUSH, when nothing else is under way.
    fn last_flush(&mut self) -> Request {
        self.begin(0, Operation::Flush)
    }
}

/// A guest's queue in one process.
pub(crate) struct Client {
    pub(crate) guest: Rc<RefCell<Guest>>,
    channel: Option<Box<dyn Channel>>,
    id: Option<SourceId>,
    ended: Vec<Completion>,
}

impl Client {
    /// Begins to use `channel`, which `open` makes.
    pub(crate) fn start(
        runtime: &Runtime,
        guest: Rc<RefCell<Guest>>,
        open: impl FnOnce(SourceId) -> Box<dyn Channel>,
    ) -> Rc<RefCell<Client>> {
        let client = Rc::new(RefCell::new(Client { guest, channel: None, id: None, ended: Vec::new() }));
        let id = runtime.add_source(Rc::clone(&client) as Rc<RefCell<dyn Source>>);
        let mut this = client.borrow_mut();
        let mut channel = open(id);
        let mut replays = this.guest.borrow_mut().replays();
        if !replays.is_empty() {
            channel.submit(&mut replays);
        }
        (this.id, this.channel) = (Some(id), Some(channel));
        runtime.timer(id, runtime.now(), 0);
        drop(this);
        client
    }

    /// Asks for a FLUSH.
    pub(crate) fn flush(&mut self) {
        let request = self.guest.borrow_mut().last_flush();
        if let Some(channel) = &mut self.channel {
            channel.submit(&mut vec![request]);
        }
    }

    /// Sees that the guest has so many requests to make.
    pub(crate) fn more(&mut self, runtime: &Runtime, least: usize) {
        let mut guest = self.guest.borrow_mut();
        let was_done = guest.to_do == 0;
        guest.to_do = guest.to_do.max(least);
        if let Some(id) = self.id.filter(|_| was_done) {
            runtime.timer(id, runtime.now(), 0);
        }
    }

    /// Leaves the device.
    pub(crate) fn close(&mut self) {
        self.channel = None;
    }
}

impl Source for Client {
    fn poll(&mut self, runtime: &Runtime, events: &mut Vec<Event>) {
        let (Some(channel), Some(id)) = (&mut self.channel, self.id) else { return };
        let mut guest = self.guest.borrow_mut();
        channel.reap(&mut self.ended);
        for completion in self.ended.drain(..) {
            guest.end(completion);
        }
        if !events.drain(..).any(|event| matches!(event, Event::Timer { .. })) {
            return;
        }
        let mut batch = guest.batch();
        if !batch.is_empty() {
            channel.submit(&mut batch);
        }
        if guest.to_do > 0 {
            // Any order of magnitude.
            let most = guest.pause_ns_max >> guest.random.below(12);
            let pause = Duration::from_nanos(10_000 + guest.random.below(most.max(1)));
            runtime.timer(id, runtime.now() + pause, 0);
        }
    }
}
