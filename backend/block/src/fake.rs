//! A device for tests of the layers above: memory, a log of what was asked, and failures on demand.

use crate::channel::{Channel, Device, DeviceState};
use crate::geometry::Geometry;
use crate::request::{Completion, Operation, Request};
use crate::stats::StatsSet;
use crate::status::{Outcome, Status};
use hawser_runtime::{Runtime, SourceId};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What happened to a fake device, and what it shall do next.
#[derive(Debug)]
pub struct FakeState {
    /// The content.
    pub content: Vec<u8>,
    /// What was asked: operation, first block, number of blocks.
    pub log: Vec<(Operation, u64, u32)>,
    /// The outcomes of the next requests; when it is empty they succeed.
    pub outcomes: VecDeque<Outcome>,
    /// While set, requests are taken and not ended; clear it and wake the users.
    pub hold: bool,
}

/// A device in plain memory that keeps a log.
pub struct FakeDevice {
    geometry: Geometry,
    state: Arc<Mutex<FakeState>>,
    stats: Arc<StatsSet>,
}

impl FakeDevice {
    /// A device of this geometry, all zero.
    ///
    /// # Panics
    /// When it does not fit into memory.
    #[must_use]
    pub fn new(geometry: Geometry) -> FakeDevice {
        let content = vec![0; usize::try_from(geometry.size_bytes()).expect("a test device is small")];
        let state = FakeState { content, log: Vec::new(), outcomes: VecDeque::new(), hold: false };
        FakeDevice { geometry, state: Arc::new(Mutex::new(state)), stats: Arc::default() }
    }

    /// To look and to interfere.
    pub fn state(&self) -> MutexGuard<'_, FakeState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Device for FakeDevice {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn geometry(&self) -> Option<Geometry> {
        Some(self.geometry)
    }

    fn state(&self) -> DeviceState {
        DeviceState::Ready
    }

    fn uuid(&self) -> [u8; 16] {
        [0; 16]
    }

    fn subscribe(&self, _: Box<dyn Fn() + Send + Sync>) {}

    fn channel(&self, runtime: &Runtime, user: SourceId) -> Box<dyn Channel> {
        Box::new(FakeChannel {
            geometry: self.geometry,
            state: Arc::clone(&self.state),
            runtime: runtime.clone(),
            user,
            held: Vec::new(),
            aborted: false,
        })
    }

    fn stats(&self) -> Arc<StatsSet> {
        Arc::clone(&self.stats)
    }
}

struct FakeChannel {
    geometry: Geometry,
    state: Arc<Mutex<FakeState>>,
    runtime: Runtime,
    user: SourceId,
    held: Vec<Request>,
    aborted: bool,
}

impl Channel for FakeChannel {
    fn submit(&mut self, batch: &mut Vec<Request>) {
        self.held.append(batch);
        self.runtime.wake(self.user);
    }

    fn reap(&mut self, ended: &mut Vec<Completion>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.hold && !self.aborted {
            return;
        }
        for request in self.held.drain(..) {
            let outcome = if self.aborted {
                Err(Status::Aborted)
            } else {
                execute(&mut state, self.geometry, &request)
            };
            ended.push(Completion { token: request.token, outcome });
        }
        self.aborted = false;
    }

    fn abort(&mut self) {
        self.aborted = true;
        self.runtime.wake(self.user);
    }
}

fn execute(state: &mut FakeState, geometry: Geometry, request: &Request) -> Outcome {
    state.log.push((request.operation, request.lba.0, request.blocks.0));
    if let Some(outcome) = state.outcomes.pop_front() {
        outcome?;
    }
    if request.operation == Operation::Flush {
        return Ok(());
    }
    let ok = geometry.contains(request.lba.0, request.blocks)
        && (!request.operation.has_payload() || request.blocks.0 <= geometry.transfer_blocks_max);
    if !ok {
        return Err(Status::Invalid);
    }
    let shift = geometry.block_size.shift();
    let from = usize::try_from(request.lba.0 << shift).map_err(|_| Status::Invalid)?;
    let len = (request.blocks.0 as usize) << shift;
    let content = &mut state.content[from..from + len];
    match request.operation {
        Operation::Flush => {}
        Operation::Discard | Operation::WriteZeroes { .. } => content.fill(0),
        Operation::Read | Operation::Write { .. } if request.buffers.len() != len => {
            return Err(Status::Invalid);
        }
        // SAFETY: the request has not ended; the lengths were compared; our content is apart from its buffers.
        Operation::Read => unsafe { request.buffers.copy_from(content.as_ptr()) },
        // SAFETY: as above.
        Operation::Write { .. } => unsafe { request.buffers.copy_to(content.as_mut_ptr()) },
    }
    Ok(())
}
