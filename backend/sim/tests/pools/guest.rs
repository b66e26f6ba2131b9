//! Who uses a volume: random requests from memory that outlives the process which carries them out, as a guest's does.

use crate::model::{self, Flush, Models};
use hawser_block::{BlockCount, Buffers, Channel, Completion, Lba, Operation, Request, Status, Token};
use hawser_runtime::{Event, Runtime, Source, SourceId};
use hawser_sim::{Random, Trap, World};
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

const SLOTS: usize = 5;
const BYTES_MAX: usize = 128 << 10;
/// What memory holds that no request names.
const POISON: u8 = 0xee;

/// What everybody in a history shares.
#[derive(Clone)]
pub(crate) struct Shared {
    pub(crate) models: Rc<RefCell<Models>>,
    pub(crate) troubles: Rc<RefCell<Vec<String>>>,
    pub(crate) rules: Rc<RefCell<Rules>>,
    pub(crate) world: World,
    pub(crate) trap: Arc<Trap>,
    pub(crate) block_bytes: usize,
}

/// What may happen to requests.
#[derive(Default)]
pub(crate) struct Rules {
    /// Any may fail: there is no redundancy, and there are faults.
    pub(crate) may_fail: bool,
    /// Volumes whose next FLUSH may tell that something was lost.
    pub(crate) may_tell_loss: BTreeSet<String>,
    /// Those that have to be told: acknowledged writes that nobody had flushed, up to this number.
    pub(crate) must_be_told: BTreeMap<String, u64>,
    /// A request's number, as it was when that was lost: what began before tells nothing of it when it ends.
    pub(crate) lost_at: u64,
    /// Writes that were under way then, and have not ended.
    pub(crate) straddling: usize,
    /// The same as `lost_at`, when the last of them has.
    pub(crate) lost_until: u64,
    /// Writes that need space may not get it.
    pub(crate) may_lack_space: bool,
    /// How often they did not.
    pub(crate) no_space: u64,
    pub(crate) ended: u64,
    pub(crate) failed: u64,
    /// Requests that were sent again to the next process.
    pub(crate) replayed: u64,
    pub(crate) verified: u64,
}

struct Busy {
    request: Request,
    /// In the model: of a write its number in order, of a read its request.
    number: u64,
    flush: Option<Flush>,
    is_verify: bool,
    /// The process died with it.
    to_replay: bool,
    /// It was begun again by the next one, behind all that had ended.
    is_replay: bool,
}

struct Slot {
    memory: Box<[u8]>,
    iovec: Box<libc::iovec>,
    /// Bytes of the memory that a request has named.
    used: usize,
    busy: Option<Busy>,
}

thread_local! {
    /// Memory of slots that are gone, for the next: all poison.
    static KEPT: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

impl Slot {
    fn new() -> Slot {
        let kept = KEPT.with_borrow_mut(Vec::pop);
        let mut memory = kept.unwrap_or_else(|| vec![POISON; BYTES_MAX].into_boxed_slice());
        let iovec = Box::new(libc::iovec { iov_base: memory.as_mut_ptr().cast(), iov_len: 0 });
        Slot { memory, iovec, used: 0, busy: None }
    }

    /// Nothing has written to what a request named, since that ended.
    fn is_poison(&self) -> bool {
        const POISONED: [u8; 512] = [POISON; 512];
        self.memory[..self.used].chunks(POISONED.len()).all(|chunk| *chunk == POISONED[..chunk.len()])
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut memory = std::mem::take(&mut self.memory);
        memory[..self.used].fill(POISON);
        // A thread that ends keeps nothing.
        let _ = KEPT.try_with(|kept| kept.borrow_mut().push(memory));
    }
}

/// How a guest behaves.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Habits {
    /// The longest pause between two batches.
    pub(crate) pause_ns_max: u64,
    /// In 1000 requests.
    pub(crate) flushes: u64,
    pub(crate) discards: u64,
    pub(crate) zeroes: u64,
    pub(crate) writes: u64,
    /// In 1000 writes.
    pub(crate) fua: u64,
    /// Blocks are written although a write to them is under way.
    pub(crate) overlaps: bool,
    /// The most blocks of most requests.
    pub(crate) small_blocks: u64,
    /// Requests stay within the first so many blocks, mostly.
    pub(crate) hot_blocks: u64,
}

/// One queue of a guest.
pub(crate) struct Guest {
    pub(crate) shared: Shared,
    pub(crate) volume: String,
    pub(crate) random: Random,
    pub(crate) habits: Habits,
    /// Requests that it still makes.
    pub(crate) to_do: usize,
    /// What it still reads, besides.
    pub(crate) to_verify: VecDeque<(u64, u64)>,
    /// What it gives back, so that others get space; these do not wait for anybody.
    pub(crate) to_discard: VecDeque<(u64, u64)>,
    /// Writes one after the other from here to there, besides.
    pub(crate) to_fill: (u64, u64),
    pub(crate) read_only: bool,
    next_request: u64,
    slots: Vec<Slot>,
}

impl Guest {
    pub(crate) fn new(shared: Shared, volume: &str, random: Random, habits: Habits) -> Guest {
        // The last is for what is given back.
        let slots = (0..=SLOTS).map(|_| Slot::new()).collect();
        let read_only = shared.models.borrow().is_snapshot(volume);
        let (volume, to_verify) = (volume.to_owned(), VecDeque::new());
        Guest {
            shared,
            volume,
            random,
            habits,
            to_do: 0,
            to_verify,
            to_discard: VecDeque::new(),
            to_fill: (0, 0),
            read_only,
            next_request: 0,
            slots,
        }
    }

    pub(crate) fn is_idle(&self) -> bool {
        self.slots.iter().all(|slot| slot.busy.is_none())
    }

    fn has_work(&self) -> bool {
        let has_some = self.to_do > 0 || !self.to_verify.is_empty() || self.to_fill.0 < self.to_fill.1;
        has_some || !self.to_discard.is_empty()
    }

    /// There is a slot for what it has to do.
    fn can_go_on(&self) -> bool {
        let has_some = self.to_do > 0 || !self.to_verify.is_empty() || self.to_fill.0 < self.to_fill.1;
        let is_free = |slot: &Slot| slot.busy.is_none();
        has_some && self.slots[..SLOTS].iter().any(is_free)
            || !self.to_discard.is_empty() && is_free(&self.slots[SLOTS])
    }

    pub(crate) fn writes_under_way(&self) -> usize {
        let busy = self.slots.iter().filter_map(|slot| slot.busy.as_ref());
        busy.filter(|busy| busy.request.operation.is_write()).count()
    }

    pub(crate) fn is_done(&self) -> bool {
        !self.has_work() && self.is_idle()
    }

    /// Begins nothing any more.
    pub(crate) fn stop(&mut self) {
        self.to_do = 0;
        self.to_fill = (0, 0);
        self.to_verify.clear();
        self.to_discard.clear();
    }

    /// What it waits for, for people.
    pub(crate) fn waits_for(&self) -> String {
        let busy = self.slots.iter().filter_map(|slot| slot.busy.as_ref());
        busy.map(|busy| {
            let Request { operation, lba, blocks, .. } = busy.request;
            format!("{} {operation:?} {}+{} ", self.volume, lba.0, blocks.0)
        })
        .collect()
    }

    /// Its process has died; `replays`: the guest lives on, and what was under way is carried out by the next one.
    pub(crate) fn process_died(&mut self, replays: bool) {
        let Guest { shared, slots, volume, .. } = self;
        for slot in slots {
            let Some(busy) = &mut slot.busy else { continue };
            if replays {
                busy.to_replay = true;
                continue;
            }
            let range = range(&busy.request);
            let mut models = shared.models.borrow_mut();
            match busy.request.operation {
                Operation::Read => {
                    let _ = models.read_ends(volume, busy.number, range, None);
                    if busy.is_verify {
                        self.to_verify.push_back(range);
                    }
                }
                Operation::Flush => {}
                _ => models.write_ends(volume, busy.number, range, false, false),
            }
            slot.memory[..slot.used].fill(POISON);
            slot.busy = None;
        }
    }

    fn trouble(&self, what: String) {
        self.shared.troubles.borrow_mut().push(what);
    }

    fn end(&mut self, completion: Completion) {
        let index = usize::try_from(completion.token.0 % 16).unwrap();
        let slot = &mut self.slots[index];
        let Some(busy) = slot.busy.take_if(|busy| busy.request.token == completion.token) else {
            return self.trouble(format!("request {} ends that is not under way", completion.token.0));
        };
        let Request { operation, token, .. } = busy.request;
        let (outcome, range) = (completion.outcome, range(&busy.request));
        let ok = outcome.is_ok();
        let failed = outcome.err().map_or(0, |status| status as u64);
        self.shared.world.note(&[4, token.0, failed, range.0, range.1]);
        if crate::tells() {
            let (now, volume) = (self.shared.world.now(), &self.volume);
            println!("{now:?} {volume} ends {operation:?} {range:?} #{:#x} {outcome:?}", busy.number);
        }
        let mut models = self.shared.models.borrow_mut();
        let checked = match operation {
            Operation::Read => {
                let bytes = usize::try_from(range.1).unwrap() * self.shared.block_bytes;
                models.read_ends(&self.volume, busy.number, range, ok.then_some(&slot.memory[..bytes]))
            }
            Operation::Flush => {
                if ok {
                    models.flush_ends(&self.volume, busy.flush.expect("a flush has one"));
                }
                Ok(())
            }
            Operation::Write { fua } | Operation::WriteZeroes { fua, .. } => {
                models.write_ends(&self.volume, busy.number, range, ok, fua);
                Ok(())
            }
            Operation::Discard => {
                models.write_ends(&self.volume, busy.number, range, ok, false);
                Ok(())
            }
        };
        drop(models);
        // From now on the memory is somebody else's.
        slot.memory[..slot.used].fill(POISON);
        let mut rules = self.shared.rules.borrow_mut();
        rules.ended += 1;
        rules.failed += u64::from(!ok);
        rules.verified += u64::from(busy.is_verify && ok);
        // Who gives back needs no room.
        let takes = operation.is_write() && operation != Operation::Discard;
        let lacks_space = outcome == Err(Status::NoSpace) && takes && rules.may_lack_space;
        rules.no_space += u64::from(lacks_space);
        let flushes = matches!(
            operation,
            Operation::Flush | Operation::Write { fua: true } | Operation::WriteZeroes { fua: true, .. }
        );
        let tells = flushes && outcome == Err(Status::Media) && rules.may_tell_loss.contains(&self.volume);
        if operation.is_write() && busy.number < rules.lost_at && rules.straddling > 0 {
            rules.straddling -= 1;
            rules.lost_until = self.shared.models.borrow_mut().request();
        }
        let owed = rules.must_be_told.get(&self.volume).copied().filter(|_| flushes);
        let is_untold = ok && operation == Operation::Flush && owed.is_some() && busy.number > rules.lost_at;
        // It had flushed before that was lost.
        let is_durable = ok && operation == Operation::Flush && busy.number < rules.lost_at;
        if owed.is_some_and(|last| busy.number > last || busy.is_replay)
            && (outcome == Err(Status::Media) || is_durable)
        {
            rules.must_be_told.remove(&self.volume);
        }
        // A write with FUA may have nothing to flush but itself.
        if operation == Operation::Flush && ok && rules.straddling == 0 && busy.number > rules.lost_until {
            rules.may_tell_loss.remove(&self.volume);
        }
        let may_fail = rules.may_fail || lacks_space || tells;
        drop(rules);
        if let Err(why) = checked {
            self.trouble(why);
        }
        if is_untold {
            self.trouble(format!(
                "a FLUSH of {} succeeds, and a cache was lost with what came before it",
                self.volume
            ));
        }
        if !ok && !may_fail {
            self.trouble(format!("{operation:?} of {range:?} of {} ends as {outcome:?}", self.volume));
        }
    }

    fn begin(&mut self, index: usize, operation: Operation, range: (u64, u64), is_verify: bool) -> Request {
        self.next_request += 1;
        let token = Token(self.next_request * 16 + index as u64);
        let slot = &mut self.slots[index];
        let touched = !slot.is_poison();
        let block_bytes = self.shared.block_bytes;
        let bytes = if operation.has_payload() { usize::try_from(range.1).unwrap() * block_bytes } else { 0 };
        slot.used = bytes;
        let mut models = self.shared.models.borrow_mut();
        let mut flush = None;
        let number = match operation {
            Operation::Write { .. } => {
                let (number, id) = models.write_begins(&self.volume, range, false, false);
                for (block, memory) in slot.memory[..bytes].chunks_exact_mut(block_bytes).enumerate() {
                    model::fill(memory, id, range.0 + block as u64);
                }
                number
            }
            Operation::WriteZeroes { .. } => models.write_begins(&self.volume, range, true, false).0,
            Operation::Discard => models.write_begins(&self.volume, range, true, true).0,
            Operation::Read => {
                let number = models.request();
                models.read_begins(&self.volume, number, range);
                number
            }
            Operation::Flush => {
                flush = Some(models.flush_begins(&self.volume));
                models.request()
            }
        };
        drop(models);
        let buffers = if operation.has_payload() {
            slot.iovec.iov_len = bytes;
            // SAFETY: memory and iovec are boxed, and stay as long as the guest, which outlives every device.
            unsafe { Buffers::new(&raw const *slot.iovec, 1, u32::try_from(bytes).unwrap()) }
        } else {
            Buffers::EMPTY
        };
        let blocks = BlockCount(u32::try_from(range.1).unwrap());
        let request = Request { operation, lba: Lba(range.0), blocks, buffers, token };
        slot.busy = Some(Busy { request, number, flush, is_verify, to_replay: false, is_replay: false });
        if crate::tells() {
            let (now, volume) = (self.shared.world.now(), &self.volume);
            println!("{now:?} {volume} begins {operation:?} {range:?} #{number:#x}");
        }
        if touched {
            self.trouble("memory was touched after its request had ended".to_owned());
        }
        request
    }

    fn replays(&mut self) -> Vec<Request> {
        let busy = self.slots.iter_mut().filter_map(|slot| slot.busy.as_mut());
        let mut replayed: Vec<Request> = busy
            .filter_map(|busy| {
                busy.is_replay |= busy.to_replay;
                std::mem::take(&mut busy.to_replay).then_some(busy.request)
            })
            .collect();
        // As the in-flight log has them.
        replayed.sort_by_key(|request| request.token.0);
        self.shared.rules.borrow_mut().replayed += replayed.len() as u64;
        replayed
    }

    fn operation(&mut self) -> Operation {
        let Habits { flushes, discards, zeroes, writes, fua, .. } = self.habits;
        let drawn = self.random.below(1000);
        let mut sum = 0;
        let mut is = |share: u64| {
            sum += share;
            drawn < sum
        };
        if is(flushes) {
            Operation::Flush
        } else if self.read_only {
            Operation::Read
        } else if is(discards) {
            Operation::Discard
        } else if is(zeroes) {
            Operation::WriteZeroes { unmap: self.random.chance(500), fua: self.random.chance(fua) }
        } else if is(writes) {
            Operation::Write { fua: self.random.chance(fua) }
        } else {
            Operation::Read
        }
    }

    fn range(&mut self, operation: Operation) -> (u64, u64) {
        if operation == Operation::Flush {
            return (0, 0);
        }
        let size = self.shared.models.borrow().size_blocks(&self.volume);
        let room = if self.random.chance(850) { size.min(self.habits.hot_blocks) } else { size };
        let most = match (operation.has_payload(), self.random.chance(120)) {
            (true, true) => (BYTES_MAX / self.shared.block_bytes) as u64,
            // Whole extents, and several.
            (false, true) => (2 << 20) / self.shared.block_bytes as u64,
            _ => self.habits.small_blocks,
        };
        let count = (1 + self.random.below(most)).min(room).max(1);
        let mut lba = self.random.below(room.saturating_sub(count) + 1);
        if self.random.chance(300) {
            // What begins or ends with others.
            lba -= lba % self.habits.small_blocks.max(1);
        }
        let extent_blocks = self.shared.models.borrow().extent_blocks;
        if operation == Operation::Discard && count >= extent_blocks && self.random.chance(500) {
            return (lba - lba % extent_blocks, (count - count % extent_blocks).min(size - lba));
        }
        (lba, count.min(size - lba))
    }

    fn is_being_written(&self, range: (u64, u64)) -> bool {
        self.shared.models.borrow().is_being_written(&self.volume, range)
    }

    fn is_of_whole_extents(&self, (lba, count): (u64, u64)) -> bool {
        let extent_blocks = self.shared.models.borrow().extent_blocks;
        lba.is_multiple_of(extent_blocks) && count.is_multiple_of(extent_blocks)
    }

    fn batch(&mut self) -> Vec<Request> {
        let mut batch = Vec::new();
        for index in 0..SLOTS {
            if self.slots[index].busy.is_some() {
                continue;
            }
            if self.to_do > 0 && self.random.chance(700) {
                self.to_do -= 1;
                let operation = self.operation();
                let range = self.range(operation);
                // Mirrors carry out writes that overlap each in its own order; whole extents that are given back meanwhile are all the same
                // to them.
                let gives_back = operation == Operation::Discard && self.is_of_whole_extents(range);
                let is_ordered = operation.is_write() && !(gives_back && self.random.chance(500));
                let is_busy = !self.habits.overlaps && is_ordered && self.is_being_written(range);
                let operation = if is_busy { Operation::Read } else { operation };
                let range = if is_busy { self.range(operation) } else { range };
                batch.push(self.begin(index, operation, range, false));
            } else if self.to_fill.0 < self.to_fill.1 && !self.read_only {
                let most = (BYTES_MAX / self.shared.block_bytes) as u64;
                let at = self.to_fill.0;
                let count = (1 + self.random.below(most)).min(self.to_fill.1 - at);
                self.to_fill.0 += count;
                if !self.habits.overlaps && self.is_being_written((at, count)) {
                    continue;
                }
                batch.push(self.begin(index, Operation::Write { fua: false }, (at, count), false));
            } else if let Some(range) = self.to_verify.pop_front() {
                batch.push(self.begin(index, Operation::Read, range, true));
            }
        }
        if self.slots[SLOTS].busy.is_none()
            && let Some(range) = self.to_discard.pop_front()
        {
            batch.push(self.begin(SLOTS, Operation::Discard, range, false));
        }
        batch
    }

    /// Reads what was ever written with what is around it, and some more; now and then a whole volume.
    pub(crate) fn verify(&mut self) {
        let (models, random) = (self.shared.models.borrow(), &mut self.random);
        let most = (BYTES_MAX / self.shared.block_bytes) as u64;
        let size = models.size_blocks(&self.volume);
        let is_small = size * self.shared.block_bytes as u64 <= 4 << 20;
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        if is_small && random.chance(100) {
            ranges.push((0, size));
        } else {
            ranges.extend(models.written_closely(&self.volume));
            let few = (most / 8).min(size);
            ranges.extend((0..3).map(|_| (random.below(size - few + 1), few)));
        }
        drop(models);
        self.to_verify.clear();
        for (from, count) in ranges {
            let mut at = from;
            while at < from + count {
                let here = (1 + random.below(most)).max(most / 2).min(from + count - at);
                self.to_verify.push_back((at, here));
                at += here;
            }
        }
    }
}

fn range(request: &Request) -> (u64, u64) {
    (request.lba.0, u64::from(request.blocks.0))
}

/// A guest's queue in one process.
pub(crate) struct Client {
    pub(crate) guest: Rc<RefCell<Guest>>,
    channel: Option<Box<dyn Channel>>,
    id: Option<SourceId>,
    ended: Vec<Completion>,
    /// A timer is set.
    is_going: bool,
}

impl Client {
    /// Begins to use `channel`, which `open` makes.
    pub(crate) fn start(
        runtime: &Runtime,
        guest: Rc<RefCell<Guest>>,
        open: impl FnOnce(SourceId) -> Box<dyn Channel>,
    ) -> Rc<RefCell<Client>> {
        let client = Client { guest, channel: None, id: None, ended: Vec::new(), is_going: false };
        let client = Rc::new(RefCell::new(client));
        let id = runtime.add_source(Rc::clone(&client) as Rc<RefCell<dyn Source>>);
        let mut this = client.borrow_mut();
        let mut channel = open(id);
        let mut replays = this.guest.borrow_mut().replays();
        if !replays.is_empty() {
            channel.submit(&mut replays);
        }
        (this.id, this.channel) = (Some(id), Some(channel));
        drop(this);
        client.borrow_mut().go(runtime);
        client
    }

    /// Sees that the guest goes on with what it has to do.
    pub(crate) fn go(&mut self, runtime: &Runtime) {
        if let Some(id) = self.id.filter(|_| !self.is_going) {
            self.is_going = true;
            runtime.timer(id, runtime.now(), 0);
        }
    }

    /// Leaves the device, when nothing is under way.
    pub(crate) fn close(&mut self, runtime: &Runtime) {
        self.channel = None;
        if let Some(id) = self.id.take() {
            runtime.remove_source(id);
        }
    }

    /// Its process dies.
    pub(crate) fn abandon(&mut self) {
        self.id = None;
    }
}

impl Source for Client {
    fn poll(&mut self, runtime: &Runtime, events: &mut Vec<Event>) {
        let (Some(channel), Some(id)) = (&mut self.channel, self.id) else { return };
        let mut guest = self.guest.borrow_mut();
        channel.reap(&mut self.ended);
        let some_ended = !self.ended.is_empty();
        for completion in self.ended.drain(..) {
            // The process may die between two of them.
            if guest.shared.trap.passes() {
                guest.end(completion);
            }
        }
        if guest.shared.trap.is_sprung() {
            return;
        }
        let is_due = events.drain(..).any(|event| matches!(event, Event::Timer { .. }));
        if !is_due && (self.is_going || !some_ended) {
            return;
        }
        if is_due {
            let mut batch = guest.batch();
            if !batch.is_empty() {
                channel.submit(&mut batch);
            }
        }
        // Who has no slot left goes on when a request has ended.
        self.is_going = guest.can_go_on();
        if self.is_going {
            // Any order of magnitude.
            let is_verify = guest.to_do == 0;
            let most = if is_verify { 20_000 } else { guest.habits.pause_ns_max >> guest.random.below(12) };
            let pause = Duration::from_nanos(10_000 + guest.random.below(most.max(1)));
            runtime.timer(id, runtime.now() + pause, 0);
        }
    }
}
