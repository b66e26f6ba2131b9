//! What a queue starts with, and how it starts.

use super::{KEY_KICK, NO_PIECE, PIECES_INLINE, Queue, Queues, Slot, with_queue};
use crate::blk::RANGES_MAX;
use crate::chain::{Chain, PIECES_MAX};
use crate::crash::Recorder;
use crate::dirty::Marks;
use crate::disk::DiskShared;
use crate::gate::Gate;
use crate::inflight::{QueueLog, Unfinished};
use crate::interrupt::Interrupt;
use crate::memory::GuestMemory;
use crate::ring::Ring;
use crate::session::SessionShared;
use hawser_block::IoKind;
use hawser_runtime::{Fd, Instant, Runtime, Source};
use std::cell::RefCell;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;

/// Everything that a queue starts with.
pub(crate) struct QueueSetup {
    pub(crate) index: u16,
    pub(crate) ring: Ring,
    /// Where the rings and the requests' pieces are.
    pub(crate) memory: Arc<GuestMemory>,
    /// `None`: the front end does not kick, we look.
    pub(crate) kick: Option<OwnedFd>,
    /// Made by the session, so that a failure ends that.
    pub(crate) interrupt: Interrupt,
    pub(crate) event_idx: bool,
    pub(crate) indirect: bool,
    /// FLUSH was negotiated: without it every write is durable.
    pub(crate) flush: bool,
    pub(crate) log: Option<QueueLog>,
    /// Where what is written is marked.
    pub(crate) marks: Option<Marks>,
    /// What is to be executed again, in order.
    pub(crate) unfinished: Vec<Unfinished>,
    pub(crate) next_available: u16,
    pub(crate) next_used: u16,
    pub(crate) gate: Arc<Gate>,
    pub(crate) disk: Arc<DiskShared>,
    pub(crate) session: Arc<SessionShared>,
    pub(crate) recorder: Recorder,
}

impl Queue {
    /// Starts a queue on this reactor under a key that is its own in the process.
    pub(crate) fn start(runtime: &Runtime, key: u64, setup: QueueSetup) {
        let size = usize::from(setup.ring.size());
        let slot = || Slot {
            status: std::ptr::null_mut(),
            started: Instant::default(),
            bytes: 0,
            used_len: 0,
            pending: 0,
            pieces: 0,
            generation: 0,
            kind: IoKind::Read,
            busy: false,
            awaited: false,
            outcome: Ok(()),
            inline: [NO_PIECE; PIECES_INLINE],
        };
        let queue = Queue {
            key,
            // Replaced below: a source has its name only once it is in.
            id: None,
            index: setup.index,
            ring: setup.ring,
            memory: setup.memory,
            old_memory: Vec::new(),
            generation: 0,
            kick_armed: setup.kick.is_some(),
            kick: setup.kick,
            interrupt: setup.interrupt,
            event_idx: setup.event_idx,
            indirect: setup.indirect,
            flush: setup.flush,
            silent: false,
            // With a log, an index of 0 may be one that has wrapped.
            owes_interrupt: setup.next_used != 0 || setup.log.is_some(),
            log: setup.log,
            marks: None,
            replaying: !setup.unfinished.is_empty(),
            replay: setup.unfinished.into(),
            open: false,
            next_available: setup.next_available,
            next_used: setup.next_used,
            published: setup.next_used,
            signalled: setup.next_used,
            held_since: None,
            joining_since: None,
            deep: false,
            counter: 0,
            slots: std::iter::repeat_with(slot).take(size).collect(),
            // SAFETY: an iovec of zeroes is a valid one.
            overflow: unsafe { Box::new_zeroed_slice(size * PIECES_MAX).assume_init() },
            in_flight: 0,
            bytes_in_flight: 0,
            chain: Chain::new(),
            requests: Vec::with_capacity(size + RANGES_MAX),
            ended: Vec::with_capacity(size + RANGES_MAX),
            batch: Vec::with_capacity(size),
            channel: None,
            stats: setup.disk.stats.writer(runtime),
            gate: setup.gate,
            disk: setup.disk,
            session: setup.session,
            recorder: setup.recorder,
            replay_noted: None,
            // Looks once at the start: what happened before counts too.
            faults: u64::MAX,
            failed: false,
            aborting: false,
            disowned: false,
            left_in_log: false,
            stopping: None,
            replay_all: false,
            awaited: 0,
            awaited_ended: None,
        };
        let queue = Rc::new(RefCell::new(queue));
        let id = runtime.add_source(Rc::clone(&queue) as Rc<RefCell<dyn Source>>);
        {
            let mut queue = queue.borrow_mut();
            queue.id = Some(id);
            queue.channel = Some(queue.disk.device.channel(runtime, id));
            queue.recorder.adopt_thread();
            queue.set_marks(setup.marks);
            if let Some(kick) = &queue.kick {
                runtime.poll_readable(id, KEY_KICK, Fd(kick.as_raw_fd()));
            }
            if queue.replaying {
                queue.replay_noted = Some(queue.recorder.replay());
            } else {
                queue.gate.set_unfinished(queue.index, false);
            }
            queue.open = queue.gate.enter(
                &runtime.handle(),
                Box::new(move |runtime| {
                    with_queue(runtime, key, |queue, runtime| {
                        queue.open = true;
                        runtime.wake(queue.id());
                    });
                }),
            );
        }
        runtime.local::<Queues>().0.borrow_mut().insert(key, queue);
        runtime.watch(id);
        runtime.wake(id);
    }
}
