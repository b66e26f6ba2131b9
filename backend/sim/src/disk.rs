//! A disk with a seed: memory that answers late, out of order, and with errors when told to.

use hawser_block::{
    Buffers, Channel, Completion, Device, DeviceState, Geometry, Operation, Outcome, Request, StatsSet,
    Status, channel,
};
use hawser_runtime::{Event, Runtime, Source, SourceId};
use std::cell::RefCell;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What a simulated disk holds, and how it behaves.
#[derive(Debug)]
pub struct SimDiskState {
    /// The blocks as reads see them.
    pub content: Vec<u8>,
    /// Requests are executed and answered between 0 and this many nanoseconds after they came.
    pub latency_ns_max: u64,
    /// In 1000 requests, how many end with a medium error and without effect.
    pub errors_permille: u64,
    /// Flushes that have ended.
    pub flushes: u64,
}

/// A disk for simulations. It lives on one world's reactors only.
pub struct SimDisk {
    name: String,
    geometry: Geometry,
    uuid: [u8; 16],
    state: Arc<Mutex<SimDiskState>>,
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
        let state = SimDiskState { content, latency_ns_max: 50_000, errors_permille: 0, flushes: 0 };
        let name = name.to_owned();
        SimDisk { name, geometry, uuid, state: Arc::new(Mutex::new(state)), stats: Arc::default() }
    }

    /// To look and to interfere.
    pub fn state(&self) -> MutexGuard<'_, SimDiskState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for SimDisk {
    fn name(&self) -> &str {
        &self.name
    }

    fn geometry(&self) -> Option<Geometry> {
        Some(self.geometry)
    }

    fn state(&self) -> DeviceState {
        DeviceState::Ready
    }

    fn uuid(&self) -> [u8; 16] {
        self.uuid
    }

    fn subscribe(&self, _: Box<dyn Fn() + Send + Sync>) {}

    fn channel(&self, runtime: &Runtime, user: SourceId) -> Box<dyn channel::Channel> {
        let inner = Rc::new(RefCell::new(Inner {
            geometry: self.geometry,
            state: Arc::clone(&self.state),
            user,
            waiting: Vec::new(),
            ended: Vec::new(),
        }));
        let source = runtime.add_source(Rc::clone(&inner) as Rc<RefCell<dyn Source>>);
        Box::new(SimChannel { runtime: runtime.clone(), source, inner, next_key: 0 })
    }

    fn stats(&self) -> Arc<StatsSet> {
        Arc::clone(&self.stats)
    }
}

struct Inner {
    geometry: Geometry,
    state: Arc<Mutex<SimDiskState>>,
    user: SourceId,
    waiting: Vec<(u32, Request)>,
    ended: Vec<Completion>,
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
        let latency_ns_max = inner.state.lock().unwrap_or_else(PoisonError::into_inner).latency_ns_max;
        for request in batch.drain(..) {
            let wait = Duration::from_nanos(self.runtime.random() % latency_ns_max.max(1));
            self.runtime.timer(self.source, self.runtime.now() + wait, self.next_key);
            inner.waiting.push((self.next_key, request));
            self.next_key = self.next_key.wrapping_add(1);
        }
    }

    fn reap(&mut self, ended: &mut Vec<Completion>) {
        ended.append(&mut self.inner.borrow_mut().ended);
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
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            let failed = state.errors_permille > 0 && runtime.random() % 1000 < state.errors_permille;
            let outcome =
                if failed { Err(Status::Media) } else { execute(&mut state, self.geometry, &request) };
            drop(state);
            self.ended.push(Completion { token: request.token, outcome });
            runtime.wake(self.user);
        }
    }
}

fn execute(state: &mut SimDiskState, geometry: Geometry, request: &Request) -> Outcome {
    if request.operation == Operation::Flush {
        state.flushes += 1;
        return Ok(());
    }
    let too_long = request.operation.has_payload() && request.blocks.0 > geometry.transfer_blocks_max;
    if too_long || !geometry.contains(request.lba.0, request.blocks) {
        return Err(Status::Invalid);
    }
    let shift = geometry.block_size.shift();
    let from = usize::try_from(request.lba.0 << shift).map_err(|_| Status::Invalid)?;
    let len = (request.blocks.0 as usize) << shift;
    let content = &mut state.content[from..from + len];
    match request.operation {
        Operation::Read => read(content, &request.buffers),
        Operation::Write { .. } => write(content, &request.buffers),
        _ => {
            content.fill(0);
            Ok(())
        }
    }
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
