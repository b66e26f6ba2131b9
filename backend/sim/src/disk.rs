//! A disk with a seed: memory that answers late, out of order, and with errors when told to, behind a cache that can be lost.
//!
//! ```text
//!   content   what reads see
//!   unstable  each block written since the last FLUSH, with every content that it had before: the first of them is stable
//! ```
//!
//! After a loss of power a block that is not stable has any content that it had since it was, or the stable one.

mod left;

use crate::memory::{Memory, OldPage, PAGE_BYTES};
use crate::random::Random;
use crate::trap::Trap;
use hawser_block::{
    BlockCount, Buffers, Channel, Completion, Device, DeviceState, Geometry, Lba, Operation, Outcome,
    Request, StatsSet, Status, channel,
};
use hawser_runtime::{Event, Runtime, Source, SourceId};
use left::{Left, give_up_left};
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::rc::{Rc, Weak};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What a simulated disk holds, and how it behaves.
#[derive(Debug)]
pub struct SimDiskState {
    /// The blocks as reads see them.
    pub content: Memory,
    /// What was written since the last FLUSH.
    unstable: Unstable,
    /// Writes so far.
    writes: u64,
    /// Requests are executed and answered between 0 and this many nanoseconds after they came.
    pub latency_ns_max: u64,
    /// In 1000 requests, how many take as long as `stuck_ns` instead.
    pub stuck_permille: u64,
    /// See there.
    pub stuck_ns: u64,
    /// Reads and FLUSHes do not: who answers in the place of a target that is gone ends them at once.
    pub writes_stick: bool,
    /// An abort ends nothing: what is under way ends in its own time, as operations of the system do. Who leaves its writes gets them back, and
    /// they are carried out in their time all the same.
    pub ignores_aborts: bool,
    /// Writes that have come in this epoch and not ended,
    waiting_writes: u64,
    /// and those of earlier ones: nobody knows what becomes of them.
    doubtful_writes: u64,
    /// Writes that have ended, and that will still be carried out.
    left_writes: u64,
    /// Writes that were left and carried out since, after their end.
    pub ghost_writes: u64,
    /// In 1000 requests, how many end with `error` and without effect.
    pub errors_permille: u64,
    /// See there.
    pub error: Status,
    /// Flushes that have ended.
    pub flushes: u64,
    /// Bytes that it has been written.
    pub written_bytes: u64,
    /// What names its cache; a loss of power makes it another one.
    pub cache_identity: Option<[u8; 16]>,
    /// How often it has lost its power alone, which it tells, whether its cache has a name or not.
    pub cache_losses: u64,
    /// One of these was told to nobody.
    pub owes_a_loss: bool,
    /// Reads of these blocks end as `Media` until they are written again.
    pub media_errors: BTreeSet<u64>,
    /// Writes to these blocks end with `error` and without effect.
    pub unwritable: Range<u64>,
    /// After so many reads of these blocks, one ends with `error`.
    pub read_that_fails: Option<(Range<u64>, u64)>,
    /// Writes that are given up may leave some of their blocks and not others, rather than all or none.
    pub tears: bool,
    /// So many steps after the next write that it fails, the trap springs.
    pub trap_after_failure: Option<u64>,
    /// Takes a step with each request; once it has sprung, what the process submits has no effect and does not end.
    pub trap: Option<Arc<Trap>>,
    /// Losses of the cache.
    pub cuts: u64,
    /// Writes that such a loss, or the end of a process, has left in part.
    pub torn_writes: u64,
    /// Blocks that are older after such a loss than before.
    pub lost_blocks: u64,
    /// Every request ends so: see [`SimDisk::fail_all`].
    failing: Option<Status>,
    /// Raised when what is under way may not end as it should.
    epoch: u64,
    geometry: Geometry,
    /// What is read where something was discarded.
    filler: u8,
    /// What happens to requests whose process dies under them.
    random: Random,
}

/// Blocks whose content is not stable, with every content that they had until it was written over.
#[derive(Debug, Default)]
struct Unstable {
    /// In the order of the writes.
    overwritten: Vec<Overwritten>,
    /// Contents of blocks that are smaller than pages,
    bytes: Vec<u8>,
    /// and of those that are pages.
    pages: Vec<OldPage>,
}

#[derive(Clone, Copy, Debug)]
struct Overwritten {
    block: u64,
    /// Which write has done it.
    write: u64,
    before: Before,
}

/// What a block was before it was written.
#[derive(Clone, Copy, Debug)]
enum Before {
    /// Its page was as at first.
    Untouched,
    /// There in `bytes`.
    At(usize),
    /// This one of `pages`.
    Page(usize),
    /// It does not matter any more: the block is stable after this write.
    Gone,
}

impl Unstable {
    /// All of a block is about to be written, and what was there is nobody's any more.
    fn push(&mut self, block: u64, write: u64, content: &mut Memory, size: usize) {
        let from = usize::try_from(block).unwrap_or(0) * size;
        let before = if size == PAGE_BYTES {
            content.take(from).map(|page| {
                self.pages.push(page);
                Before::Page(self.pages.len() - 1)
            })
        } else {
            content.written(from..from + size).map(|bytes| {
                self.bytes.extend_from_slice(bytes);
                Before::At(self.bytes.len() - size)
            })
        };
        self.overwritten.push(Overwritten { block, write, before: before.unwrap_or(Before::Untouched) });
    }

    fn is_stable(&mut self, block: u64) {
        if !self.overwritten.is_empty() {
            self.overwritten.push(Overwritten { block, write: 0, before: Before::Gone });
        }
    }

    /// By block, and each block's in the order of its writes.
    fn sort(&mut self) {
        self.overwritten.sort_by_key(|overwritten| overwritten.block);
    }

    /// Those of each block that is not stable, after `sort`.
    fn blocks(&self) -> impl Iterator<Item = &[Overwritten]> {
        let by_block = self.overwritten.chunk_by(|one, other| one.block == other.block);
        let since = |all: &[Overwritten]| {
            all.iter().rposition(|it| matches!(it.before, Before::Gone)).map_or(0, |at| at + 1)
        };
        by_block.map(move |all| &all[since(all)..]).filter(|all| !all.is_empty())
    }

    /// What it was before, put back.
    fn restore(&self, overwritten: Overwritten, content: &mut Memory, size: usize) {
        let from = usize::try_from(overwritten.block).unwrap_or(0) * size;
        match overwritten.before {
            Before::Untouched => content.forget(from..from + size),
            Before::At(at) => content.write(from, &self.bytes[at..at + size]),
            Before::Page(page) => content.write(from, &self.pages[page]),
            Before::Gone => {}
        }
    }

    fn clear(&mut self) {
        self.overwritten.clear();
        self.bytes.clear();
        self.pages.clear();
    }
}

impl SimDiskState {
    /// The same as [`SimDiskState::lose_cache`], without the process that uses it: it is to be told ([`SimDisk::tell`]). What is under way
    /// is sent again, or else may fail and have any effect.
    pub fn lose_cache_alone(&mut self, is_sent_again: bool) {
        self.lose_content();
        self.cache_losses += 1;
        if !is_sent_again {
            self.next_epoch();
        }
    }

    /// Loses what is in the cache: each block that is not stable has any content that it had since it was, or the stable one.
    pub fn lose_cache(&mut self) {
        self.lose_content();
        self.next_epoch();
    }

    fn lose_content(&mut self) {
        let size = self.block_bytes();
        // Of each write: blocks that are there, or newer; blocks that are older.
        let mut left: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
        self.unstable.sort();
        for all in self.unstable.blocks() {
            // The content after that write; or, behind the last, the stable one.
            let chosen = self.random.index(all.len() + 1);
            for (at, overwritten) in all.iter().enumerate() {
                let (there, lost) = left.entry(overwritten.write).or_default();
                let is_there = chosen < all.len() && chosen >= at;
                *(if is_there { there } else { lost }) += 1;
            }
            self.lost_blocks += u64::from(chosen + 1 != all.len());
            if let Some(overwritten) = all.get((chosen + 1) % (all.len() + 1)) {
                self.unstable.restore(*overwritten, &mut self.content, size);
            }
        }
        self.unstable.clear();
        self.torn_writes += left.values().filter(|(there, lost)| *there > 0 && *lost > 0).count() as u64;
        self.cuts += 1;
        if let Some(identity) = &mut self.cache_identity {
            identity[8..].copy_from_slice(&self.random.next_u64().to_le_bytes());
        }
    }

    /// What is under way may not end as it should.
    fn next_epoch(&mut self) {
        self.epoch += 1;
        self.doubtful_writes += std::mem::take(&mut self.waiting_writes);
    }

    /// One that had come has ended, or was left.
    fn has_ended(&mut self, waiting: &Waiting) {
        let writes = u64::from(waiting.request.operation.is_write());
        match waiting.epoch == self.epoch {
            true => self.waiting_writes -= writes,
            false => self.doubtful_writes -= writes,
        }
    }

    /// Everything is stable, as after a FLUSH.
    pub fn flush(&mut self) {
        self.flushes += 1;
        self.unstable.clear();
    }

    /// The blocks as a loss of power leaves them at worst.
    #[must_use]
    pub fn stable(&mut self) -> Memory {
        let mut stable = self.content.clone();
        let size = self.block_bytes();
        self.unstable.sort();
        for overwritten in self.unstable.blocks().filter_map(|all| all.first()) {
            self.unstable.restore(*overwritten, &mut stable, size);
        }
        stable
    }

    /// Comes back empty, as another disk in its place would.
    pub fn wipe(&mut self) {
        self.content.clear();
        self.unstable.clear();
        self.media_errors.clear();
        self.next_epoch();
    }

    /// What reads see now, to be restored later.
    #[must_use]
    pub fn snapshot(&self) -> Vec<u8> {
        self.content.get(0..self.content.len()).into_owned()
    }

    /// Comes back with this content, stable.
    ///
    /// # Panics
    /// When it is larger than this disk.
    pub fn restore(&mut self, content: &[u8]) {
        self.content.write(0, content);
        self.unstable.clear();
        self.media_errors.clear();
        self.next_epoch();
    }

    /// Requests are executed and answered between 0 and this long after they came.
    pub fn set_latency(&mut self, most: Duration) {
        self.latency_ns_max = u64::try_from(most.as_nanos()).unwrap_or(u64::MAX);
    }

    /// The content of these blocks, whichever reads would fail.
    #[must_use]
    pub fn blocks(&self, lba: u64, count: u64) -> Cow<'_, [u8]> {
        let size = self.block_bytes();
        let at = |block: u64| usize::try_from(block).unwrap_or(usize::MAX).saturating_mul(size);
        let range = at(lba)..at(lba + count);
        if range.end <= self.content.len() { self.content.get(range) } else { Cow::default() }
    }

    /// It was used before, and holds what nobody knows: another disk, by `number`, something else.
    pub fn fill_with_junk(&mut self, number: u64) {
        self.content = Memory::junk(self.content.len(), number);
    }

    fn is_read_that_fails(&mut self, lbas: &Range<u64>) -> bool {
        let Some((blocks, left)) = &mut self.read_that_fails else { return false };
        if lbas.start >= blocks.end || blocks.start >= lbas.end {
            return false;
        }
        let is_it = *left == 0;
        *left = left.saturating_sub(1);
        if is_it {
            self.read_that_fails = None;
        }
        is_it
    }

    /// It has failed a write.
    fn set_trap(&mut self) {
        if let (Some(steps), Some(trap)) = (self.trap_after_failure.take(), &self.trap) {
            trap.set(steps);
        }
    }

    fn block_bytes(&self) -> usize {
        1 << self.geometry.block_size.shift()
    }

    /// Blocks `from..to` of bytes are about to be written.
    fn writes(&mut self, from: usize, to: usize, durable: bool) {
        let size = self.block_bytes();
        self.writes += 1;
        for at in (from..to).step_by(size) {
            let block = (at / size) as u64;
            if !self.media_errors.is_empty() {
                self.media_errors.remove(&block);
            }
            if durable {
                self.unstable.is_stable(block);
            } else {
                self.unstable.push(block, self.writes, &mut self.content, size);
            }
        }
    }
}

/// Who is told of changes.
type Listener = Box<dyn Fn() + Send + Sync>;

/// A disk for simulations. It lives on one world's reactors only.
pub struct SimDisk {
    name: String,
    uuid: [u8; 16],
    state: Arc<Mutex<SimDiskState>>,
    listeners: Mutex<Vec<Listener>>,
    stats: Arc<StatsSet>,
}

impl SimDisk {
    /// A disk of this geometry, all zero.
    ///
    /// # Panics
    /// When it does not fit into memory.
    #[must_use]
    pub fn new(name: &str, geometry: Geometry, uuid: [u8; 16]) -> SimDisk {
        let size = usize::try_from(geometry.size_bytes()).expect("a simulated disk is small");
        let state = SimDiskState {
            content: Memory::new(size),
            unstable: Unstable::default(),
            writes: 0,
            latency_ns_max: 50_000,
            stuck_permille: 0,
            stuck_ns: 0,
            writes_stick: false,
            ignores_aborts: false,
            waiting_writes: 0,
            doubtful_writes: 0,
            left_writes: 0,
            ghost_writes: 0,
            errors_permille: 0,
            error: Status::Media,
            flushes: 0,
            written_bytes: 0,
            cache_identity: None,
            cache_losses: 0,
            owes_a_loss: false,
            media_errors: BTreeSet::new(),
            unwritable: 0..0,
            read_that_fails: None,
            tears: false,
            trap: None,
            trap_after_failure: None,
            cuts: 0,
            torn_writes: 0,
            lost_blocks: 0,
            failing: None,
            epoch: 0,
            geometry,
            filler: uuid[0],
            random: Random::new(u64::from_le_bytes([uuid[0]; 8])),
        };
        let name = name.to_owned();
        let state = Arc::new(Mutex::new(state));
        SimDisk { name, uuid, state, listeners: Mutex::default(), stats: Arc::default() }
    }

    /// To look and to interfere.
    pub fn state(&self) -> MutexGuard<'_, SimDiskState> {
        lock(&self.state)
    }

    /// What chance decides on this disk follows from `seed`.
    pub fn seed(&self, seed: u64) {
        self.state().random = Random::new(seed);
    }

    /// Adds blocks at the end.
    pub fn grow(&self, blocks: u64) {
        {
            let state = &mut *self.state();
            state.geometry.blocks += blocks;
            let bytes = usize::try_from(state.geometry.size_bytes()).unwrap_or(state.content.len());
            state.content.grow(bytes);
        }
        self.tell();
    }

    /// From now on every request ends with this status and without effect, as of a disk that is dead; `None`: no more. What is
    /// under way when it dies may have its effect, and fails all the same.
    pub fn fail_all(&self, status: Option<Status>) {
        {
            let mut state = self.state();
            if state.failing.is_none() && status.is_some() {
                state.next_epoch();
            }
            state.failing = status;
        }
        self.tell();
    }

    /// Loses its power, alone, and comes back at once: its cache is lost; what is under way is sent again, or fails and has any
    /// effect.
    pub fn lose_power(&self) {
        self.state().lose_cache_alone(false);
        self.tell();
    }

    /// Tells what has happened to it.
    pub fn tell(&self) {
        for listener in lock(&self.listeners).iter() {
            listener();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Device for SimDisk {
    fn name(&self) -> &str {
        &self.name
    }

    fn geometry(&self) -> Option<Geometry> {
        Some(self.state().geometry)
    }

    fn state(&self) -> DeviceState {
        if self.state().failing.is_some() { DeviceState::Failed } else { DeviceState::Ready }
    }

    fn uuid(&self) -> [u8; 16] {
        self.uuid
    }

    fn cache_identity(&self) -> Option<[u8; 16]> {
        self.state().cache_identity
    }

    fn cache_losses(&self) -> u64 {
        self.state().cache_losses
    }

    fn owes_a_loss(&self) -> bool {
        self.state().owes_a_loss
    }

    fn has_unknown_writes(&self) -> bool {
        let state = self.state();
        state.ignores_aborts && state.doubtful_writes > 0
    }

    fn has_left_behind(&self) -> bool {
        self.state().left_writes > 0
    }

    fn subscribe(&self, listener: Listener) {
        lock(&self.listeners).push(listener);
    }

    fn channel(&self, runtime: &Runtime, user: SourceId) -> Box<dyn channel::Channel> {
        let inner = Rc::new(RefCell::new(Inner {
            state: Arc::clone(&self.state),
            user,
            waiting: Vec::new(),
            left: Vec::new(),
            ended: Vec::new(),
        }));
        runtime.local::<Channels>().0.borrow_mut().push(Rc::downgrade(&inner));
        let source = runtime.add_source(Rc::clone(&inner) as Rc<RefCell<dyn Source>>);
        Box::new(SimChannel { runtime: runtime.clone(), source, inner, next_key: 0 })
    }

    fn stats(&self) -> Arc<StatsSet> {
        Arc::clone(&self.stats)
    }
}

/// The channels that live on a reactor.
#[derive(Default)]
struct Channels(RefCell<Vec<Weak<RefCell<Inner>>>>);

/// The process that this reactor is of is killed: what it has under way, the kernel carries out or not.
pub(crate) fn kill(runtime: &Runtime) {
    for inner in runtime.local::<Channels>().0.borrow().iter().filter_map(Weak::upgrade) {
        inner.borrow_mut().give_up();
    }
}

struct Waiting {
    key: u32,
    request: Request,
    /// The disk's when it came.
    epoch: u64,
    /// It came when its process was dead.
    is_void: bool,
}

struct Inner {
    state: Arc<Mutex<SimDiskState>>,
    user: SourceId,
    waiting: Vec<Waiting>,
    left: Vec<Left>,
    ended: Vec<Completion>,
}

impl Inner {
    /// Those that wait end now, each with its effect or without, as chance has it.
    fn give_up(&mut self) {
        let mut state = lock(&self.state);
        give_up_left(&mut self.left, &mut state);
        for waiting in self.waiting.drain(..) {
            state.has_ended(&waiting);
            let Waiting { request, is_void, .. } = waiting;
            if !is_void && state.failing.is_none() {
                give_up(&mut state, &request);
            }
            self.ended.push(Completion { token: request.token, outcome: Err(Status::Aborted) });
        }
    }
}

impl Drop for Inner {
    /// The end of a process that leaves something behind.
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        give_up_left(&mut self.left, &mut state);
        self.waiting.iter().for_each(|waiting| state.has_ended(waiting));
    }
}

/// A request of which nobody knows what becomes.
fn give_up(state: &mut SimDiskState, request: &Request) {
    if !state.tears || !state.random.chance(400) {
        if state.random.chance(500) {
            let _ = execute(state, request);
        }
        return;
    }
    let (mut there, mut lost) = (0u32, 0u32);
    for block in 0..request.blocks.0 {
        if !request.operation.is_write() || state.random.chance(500) {
            lost += 1;
            continue;
        }
        there += 1;
        let size = state.block_bytes();
        let buffers = match request.operation.has_payload() {
            true => request.buffers.slice(block as usize * size, size),
            false => Buffers::EMPTY,
        };
        let lba = Lba(request.lba.0 + u64::from(block));
        let _ = execute(state, &Request { lba, blocks: BlockCount(1), buffers, ..*request });
    }
    state.torn_writes += u64::from(there > 0 && lost > 0);
}

struct SimChannel {
    runtime: Runtime,
    source: SourceId,
    inner: Rc<RefCell<Inner>>,
    next_key: u32,
}

impl Channel for SimChannel {
    fn submit(&mut self, batch: &mut Vec<Request>) {
        let mut inner = self.inner.borrow_mut();
        let (latency_ns_max, stuck_permille, stuck_ns, writes_stick, epoch, trap) = {
            let state = lock(&inner.state);
            let stuck = (state.stuck_permille, state.stuck_ns, state.writes_stick);
            (state.latency_ns_max, stuck.0, stuck.1, stuck.2, state.epoch, state.trap.clone())
        };
        for request in batch.drain(..) {
            let is_void = trap.as_ref().is_some_and(|trap| trap.is_sprung());
            if !is_void {
                let may_stick = stuck_permille > 0 && (!writes_stick || request.operation.is_write());
                let is_stuck = may_stick && self.runtime.random() % 1000 < stuck_permille;
                let latency = if is_stuck { stuck_ns } else { self.runtime.random() % latency_ns_max.max(1) };
                let wait = Duration::from_nanos(latency);
                self.runtime.timer(self.source, self.runtime.now() + wait, self.next_key);
            }
            lock(&inner.state).waiting_writes += u64::from(request.operation.is_write());
            inner.waiting.push(Waiting { key: self.next_key, request, epoch, is_void });
            self.next_key = self.next_key.wrapping_add(1);
            if let Some(trap) = &trap {
                trap.passes();
            }
        }
    }

    fn reap(&mut self, ended: &mut Vec<Completion>) {
        ended.append(&mut self.inner.borrow_mut().ended);
    }

    fn abort(&mut self) {
        let mut inner = self.inner.borrow_mut();
        let ignored = lock(&inner.state).ignores_aborts;
        if !ignored {
            self.abort_now(&mut inner);
        }
    }

    fn leave(&mut self) {
        let mut inner = self.inner.borrow_mut();
        let inner = &mut *inner;
        let mut state = lock(&inner.state);
        if !state.ignores_aborts {
            drop(state);
            return self.abort_now(inner);
        }
        for waiting in inner.waiting.drain(..) {
            inner.ended.push(Completion { token: waiting.request.token, outcome: Err(Status::Aborted) });
            state.has_ended(&waiting);
            if waiting.request.operation.is_write() {
                state.left_writes += 1;
                inner.left.push(Left::new(waiting));
            }
        }
        drop(state);
        self.runtime.wake(inner.user);
    }
}

impl SimChannel {
    fn abort_now(&self, inner: &mut Inner) {
        inner.give_up();
        self.runtime.wake(inner.user);
    }
}

impl Drop for SimChannel {
    fn drop(&mut self) {
        let is_idle = self.inner.borrow().waiting.is_empty();
        assert!(is_idle || std::thread::panicking(), "a channel is dropped when it is idle");
        // What was left is carried out though nobody is there any more: the source stays for that.
        if self.inner.borrow().left.is_empty() {
            self.runtime.remove_source(self.source);
        }
    }
}

impl Source for Inner {
    fn poll(&mut self, runtime: &Runtime, events: &mut Vec<Event>) {
        for event in events.drain(..) {
            let Event::Timer { key: due } = event else { continue };
            if let Some(position) = self.left.iter().position(|left| left.waiting.key == due) {
                let left = self.left.remove(position);
                let epoch = left.waiting.epoch;
                left.end(&mut lock(&self.state), |state, request| {
                    state.ghost_writes += u64::from(answer(state, request, epoch, runtime).is_ok());
                });
                continue;
            }
            let Some(position) = self.waiting.iter().position(|waiting| waiting.key == due) else { continue };
            let waiting = self.waiting.remove(position);
            let outcome = {
                let state = &mut *lock(&self.state);
                state.has_ended(&waiting);
                let Waiting { request, epoch, .. } = waiting;
                let outcome = answer(state, &request, epoch, runtime);
                if outcome.is_err() && request.operation.is_write() {
                    state.set_trap();
                }
                outcome
            };
            self.ended.push(Completion { token: waiting.request.token, outcome });
            runtime.wake(self.user);
        }
    }
}

fn answer(state: &mut SimDiskState, request: &Request, epoch: u64, runtime: &Runtime) -> Outcome {
    // It was under way when the disk died or lost its power: nobody knows what became of it, or it was sent again.
    let is_doubtful = epoch != state.epoch;
    if let Some(status) = state.failing {
        if is_doubtful {
            give_up(state, request);
        }
        return Err(status);
    }
    if is_doubtful && state.random.chance(500) {
        give_up(state, request);
        return Err(Status::Path);
    }
    let failed = state.errors_permille > 0 && runtime.random() % 1000 < state.errors_permille;
    if failed { Err(state.error) } else { execute(state, request) }
}

fn execute(state: &mut SimDiskState, request: &Request) -> Outcome {
    let geometry = state.geometry;
    if request.operation == Operation::Flush {
        state.flush();
        return Ok(());
    }
    let too_long = request.operation.has_payload() && request.blocks.0 > geometry.transfer_blocks_max;
    if too_long || !geometry.contains(request.lba.0, request.blocks) {
        return Err(Status::Invalid);
    }
    let lbas = request.lba.0..request.lba.0 + u64::from(request.blocks.0);
    if request.operation == Operation::Read && state.media_errors.range(lbas.clone()).next().is_some() {
        return Err(Status::Media);
    }
    if request.operation == Operation::Read && state.is_read_that_fails(&lbas) {
        return Err(state.error);
    }
    let is_refused = lbas.start < state.unwritable.end && state.unwritable.start < lbas.end;
    if is_refused && request.operation.is_write() {
        return Err(state.error);
    }
    let shift = geometry.block_size.shift();
    let from = usize::try_from(request.lba.0 << shift).map_err(|_| Status::Invalid)?;
    let to = from + ((request.blocks.0 as usize) << shift);
    if request.operation == Operation::Read {
        return read(&state.content, from..to, &request.buffers);
    }
    match request.operation {
        Operation::Write { fua } => {
            if request.buffers.len() != to - from {
                return Err(Status::Invalid);
            }
            state.writes(from, to, fua);
            state.written_bytes += (to - from) as u64;
            let mut at = 0;
            state.content.write_with(from..to, |piece| {
                // SAFETY: the request has not ended and has our length; our content is apart from its buffers.
                unsafe { request.buffers.slice(at, piece.len()).copy_to(piece.as_mut_ptr()) };
                at += piece.len();
            });
        }
        Operation::WriteZeroes { fua, .. } => {
            state.writes(from, to, fua);
            state.content.zero(from..to);
        }
        _ => {
            state.writes(from, to, false);
            // Nothing that two disks agree on, unless they say so.
            let is_zero = geometry.discard.is_none_or(|limits| limits.reads_zeroes);
            let filler = state.filler;
            state.content.write_with(from..to, |piece| piece.fill(if is_zero { 0 } else { filler }));
        }
    }
    Ok(())
}

fn read(content: &Memory, range: Range<usize>, buffers: &Buffers) -> Outcome {
    if buffers.len() != range.len() {
        return Err(Status::Invalid);
    }
    let mut at = 0;
    for piece in content.pieces(range) {
        // SAFETY: the request has not ended, is a read, and has our length; our content is apart from its buffers.
        unsafe { buffers.slice(at, piece.len()).copy_from(piece.as_ptr()) };
        at += piece.len();
    }
    Ok(())
}
