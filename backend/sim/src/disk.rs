//! A disk with a seed: memory that answers late, out of order, and with errors when told to, behind a cache that can be lost.

use crate::random::Random;
use hawser_block::{
    Buffers, Channel, Completion, Device, DeviceState, Geometry, Operation, Outcome, Request, StatsSet,
    Status, channel,
};
use hawser_runtime::{Event, Runtime, Source, SourceId};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::{Rc, Weak};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What a simulated disk holds, and how it behaves.
#[derive(Debug)]
pub struct SimDiskState {
    /// The blocks as reads see them.
    pub content: Vec<u8>,
    /// The blocks as a loss of power leaves them at worst.
    pub stable: Vec<u8>,
    /// Blocks whose content is not stable, with every content that they had since they were.
    unstable: BTreeMap<u64, Vec<Vec<u8>>>,
    /// Requests are executed and answered between 0 and this many nanoseconds after they came.
    pub latency_ns_max: u64,
    /// In 1000 requests, how many take as long as `stuck_ns` instead.
    pub stuck_permille: u64,
    /// See there.
    pub stuck_ns: u64,
    /// An abort ends nothing: what is under way ends in its own time, as operations of the system do.
    pub ignores_aborts: bool,
    /// In 1000 requests, how many end with `error` and without effect.
    pub errors_permille: u64,
    /// See there.
    pub error: Status,
    /// Flushes that have ended.
    pub flushes: u64,
    /// What names its cache; a loss of power makes it another one.
    pub cache_identity: Option<[u8; 16]>,
    geometry: Geometry,
    /// What happens to requests whose process dies under them.
    random: Random,
}

impl SimDiskState {
    /// Loses what is in the cache: each block that is not stable has any content that it had since it was, or the stable one.
    pub fn lose_cache(&mut self) {
        let size = self.block_bytes();
        for (block, contents) in std::mem::take(&mut self.unstable) {
            let from = usize::try_from(block).unwrap_or(0) * size;
            let chosen = self.random.index(contents.len() + 1);
            if let Some(content) = contents.get(chosen) {
                self.stable[from..from + size].copy_from_slice(content);
            }
        }
        self.content.copy_from_slice(&self.stable);
        if let Some(identity) = &mut self.cache_identity {
            identity[8..].copy_from_slice(&self.random.next_u64().to_le_bytes());
        }
    }

    fn block_bytes(&self) -> usize {
        1 << self.geometry.block_size.shift()
    }

    /// Blocks `from..to` of bytes were written.
    fn wrote(&mut self, from: usize, to: usize, durable: bool) {
        let size = self.block_bytes();
        for at in (from..to).step_by(size) {
            let (block, content) = ((at / size) as u64, &self.content[at..at + size]);
            if durable {
                self.stable[at..at + size].copy_from_slice(content);
                self.unstable.remove(&block);
            } else {
                self.unstable.entry(block).or_default().push(content.to_vec());
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
        let content = vec![0; usize::try_from(geometry.size_bytes()).expect("a simulated disk is small")];
        let state = SimDiskState {
            stable: content.clone(),
            content,
            unstable: BTreeMap::new(),
            latency_ns_max: 50_000,
            stuck_permille: 0,
            stuck_ns: 0,
            ignores_aborts: false,
            errors_permille: 0,
            error: Status::Media,
            flushes: 0,
            cache_identity: None,
            geometry,
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
            state.content.resize(bytes, 0);
            state.stable.resize(bytes, 0);
        }
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
        DeviceState::Ready
    }

    fn uuid(&self) -> [u8; 16] {
        self.uuid
    }

    fn cache_identity(&self) -> Option<[u8; 16]> {
        self.state().cache_identity
    }

    fn subscribe(&self, listener: Listener) {
        lock(&self.listeners).push(listener);
    }

    fn channel(&self, runtime: &Runtime, user: SourceId) -> Box<dyn channel::Channel> {
        let inner = Rc::new(RefCell::new(Inner {
            state: Arc::clone(&self.state),
            user,
            waiting: Vec::new(),
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

struct Inner {
    state: Arc<Mutex<SimDiskState>>,
    user: SourceId,
    waiting: Vec<(u32, Request)>,
    ended: Vec<Completion>,
}

impl Inner {
    /// Those that wait end now, each with its effect or without, as chance has it.
    fn give_up(&mut self) {
        let mut state = lock(&self.state);
        for (_, request) in self.waiting.drain(..) {
            if state.random.chance(500) {
                let _ = execute(&mut state, &request);
            }
            self.ended.push(Completion { token: request.token, outcome: Err(Status::Aborted) });
        }
    }
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
        let (latency_ns_max, stuck_permille, stuck_ns) = {
            let state = lock(&inner.state);
            (state.latency_ns_max, state.stuck_permille, state.stuck_ns)
        };
        for request in batch.drain(..) {
            let is_stuck = stuck_permille > 0 && self.runtime.random() % 1000 < stuck_permille;
            let latency = if is_stuck { stuck_ns } else { self.runtime.random() % latency_ns_max.max(1) };
            let wait = Duration::from_nanos(latency);
            self.runtime.timer(self.source, self.runtime.now() + wait, self.next_key);
            inner.waiting.push((self.next_key, request));
            self.next_key = self.next_key.wrapping_add(1);
        }
    }

    fn reap(&mut self, ended: &mut Vec<Completion>) {
        ended.append(&mut self.inner.borrow_mut().ended);
    }

    fn abort(&mut self) {
        let mut inner = self.inner.borrow_mut();
        let ignored = lock(&inner.state).ignores_aborts;
        if !ignored {
            inner.give_up();
            self.runtime.wake(inner.user);
        }
    }
}

impl Drop for SimChannel {
    fn drop(&mut self) {
        assert!(self.inner.borrow().waiting.is_empty(), "a channel is dropped when it is idle");
        self.runtime.remove_source(self.source);
    }
}

impl Source for Inner {
    fn poll(&mut self, runtime: &Runtime, events: &mut Vec<Event>) {
        for event in events.drain(..) {
            let Event::Timer { key: due } = event else { continue };
            let Some(position) = self.waiting.iter().position(|(key, _)| *key == due) else { continue };
            let (_, request) = self.waiting.remove(position);
            let mut state = lock(&self.state);
            let failed = state.errors_permille > 0 && runtime.random() % 1000 < state.errors_permille;
            let outcome = if failed { Err(state.error) } else { execute(&mut state, &request) };
            drop(state);
            self.ended.push(Completion { token: request.token, outcome });
            runtime.wake(self.user);
        }
    }
}

fn execute(state: &mut SimDiskState, request: &Request) -> Outcome {
    let geometry = state.geometry;
    if request.operation == Operation::Flush {
        state.flushes += 1;
        let size = state.block_bytes();
        for block in std::mem::take(&mut state.unstable).into_keys() {
            let from = usize::try_from(block).unwrap_or(0) * size;
            state.stable[from..from + size].copy_from_slice(&state.content[from..from + size]);
        }
        return Ok(());
    }
    let too_long = request.operation.has_payload() && request.blocks.0 > geometry.transfer_blocks_max;
    if too_long || !geometry.contains(request.lba.0, request.blocks) {
        return Err(Status::Invalid);
    }
    let shift = geometry.block_size.shift();
    let from = usize::try_from(request.lba.0 << shift).map_err(|_| Status::Invalid)?;
    let to = from + ((request.blocks.0 as usize) << shift);
    let content = &mut state.content[from..to];
    let durable = match request.operation {
        Operation::Read => return read(content, &request.buffers),
        Operation::Write { fua } => {
            write(content, &request.buffers)?;
            fua
        }
        Operation::WriteZeroes { fua, .. } => {
            content.fill(0);
            fua
        }
        _ => {
            content.fill(0);
            false
        }
    };
    state.wrote(from, to, durable);
    Ok(())
}

fn read(content: &[u8], buffers: &Buffers) -> Outcome {
    if buffers.len() != content.len() {
        return Err(Status::Invalid);
    }
    // SAFETY: the request has not ended, is a read, and has our length; our content is apart from its buffers.
    unsafe { buffers.copy_from(content.as_ptr()) };
    Ok(())
}

fn write(content: &mut [u8], buffers: &Buffers) -> Outcome {
    if buffers.len() != content.len() {
        return Err(Status::Invalid);
    }
    // SAFETY: the request has not ended and has our length; our content is apart from its buffers.
    unsafe { buffers.copy_to(content.as_mut_ptr()) };
    Ok(())
}
