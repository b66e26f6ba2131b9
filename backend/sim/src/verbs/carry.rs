//! How one request of a queue is carried out, step by step.

use super::fabric::{
    ACCESS, BIND, Bound, Fabric, PROTECTION, Progress, RECEIVES, RETRIES, RETRIES_FOR, SENDS, STEP_NS_MAX,
    Work, flushed, regions,
};
use crate::net::Side;
use hawser_runtime::Instant;
use hawser_verbs_abi::{Segment, SendRequest, WorkCompletion, access, operation};
use std::collections::VecDeque;

/// What is in the memory of a request that has not completed.
fn gather(segments: &[Segment]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for segment in segments {
        // SAFETY: registered memory of the poster's, valid until the request has completed.
        bytes.extend_from_slice(unsafe {
            std::slice::from_raw_parts(segment.address as *const u8, segment.len as usize)
        });
    }
    bytes
}

impl Fabric {
    /// Begins a request: what is local is done, and what is not is on its way.
    fn begin(&mut self, queue: u64, work: &Work) -> Progress {
        let (request, now) = (&work.request, self.now);
        let done = |status| Progress::Back(now, now, status, Vec::new());
        let is_registered = |segment: &Segment| {
            let region = regions().get(&u64::from(segment.key)).copied();
            region.is_some_and(|region| region.has(segment.address, u64::from(segment.len)))
        };
        if !work.segments.iter().all(is_registered) {
            return done(PROTECTION);
        }
        match request.operation {
            operation::BIND => done(if self.bind(queue, request) { 0 } else { BIND }),
            operation::INVALIDATE => {
                if self.window_of(request.key).is_none_or(|window| window.bound.is_none()) {
                    return done(BIND);
                }
                // As late as can be: when the completion is seen.
                if let Some(pair) = self.pairs.get_mut(&queue) {
                    pair.dying.insert(request.user, request.key);
                }
                done(0)
            }
            _ => {
                let is_read = request.operation == operation::READ;
                let bytes = if is_read { Vec::new() } else { gather(&work.segments) };
                let id = self.pairs.get(&queue).map_or(0, |pair| pair.id);
                Progress::Going(now, self.held_arrival(id), bytes)
            }
        }
    }

    /// As [`Fabric::arrival`], for messages of a queue: silence is looked at when they arrive.
    fn held_arrival(&mut self, from: u64) -> Instant {
        let soon = self.soon(STEP_NS_MAX);
        let held = self.ends.get(&from).and_then(|end| self.ends.get(&end.peer)).map(|end| end.held);
        soon.max(held.unwrap_or_default())
    }

    fn bind(&mut self, queue: u64, request: &SendRequest) -> bool {
        let region = regions().get(&(request.region as u64)).copied();
        let may = region.is_some_and(|region| {
            region.access & access::WINDOW_BIND != 0 && region.has(request.address, request.len)
        });
        let Some(window) = self.windows.get_mut(&(request.window as u64)) else { return false };
        // A window is bound when it is free, and by another name each time.
        if !may || window.bound.is_some() || window.key == request.key || window.key >> 8 != request.key >> 8
        {
            return false;
        }
        window.key = request.key;
        let (start, len, access) = (request.address, request.len, request.access);
        window.bound = Some(Bound { start, len, access, queue });
        true
    }

    /// Carries out what has arrived at `peer`. `Err`: `ibv_wc_status`; `None`: no receive is there yet.
    pub(super) fn arrive(
        &mut self,
        peer: u64,
        request: &SendRequest,
        bytes: &[u8],
        segments: &[Segment],
    ) -> Option<Result<Vec<u8>, u32>> {
        match request.operation {
            operation::SEND | operation::SEND_INVALIDATE => {
                let side = self.pairs.get(&peer).and_then(|pair| self.ends.get(&pair.id)).map(|end| end.side);
                let pair = self.pairs.get_mut(&peer)?;
                let Some(receive) = pair.receives.front().copied() else {
                    self.counts.starved += u64::from(side == Some(Side::Host));
                    return None;
                };
                let keeps_keys = self.disturbance.keeps_keys;
                let keeps = self.one_in(keeps_keys);
                let invalidates = request.operation == operation::SEND_INVALIDATE && !keeps;
                if invalidates {
                    match self.window_of(request.key) {
                        Some(window) if window.bound.is_some_and(|bound| bound.queue == peer) => {
                            window.bound = None
                        }
                        _ => {
                            self.counts.refused += 1;
                            return Some(Err(ACCESS));
                        }
                    }
                }
                let len = bytes.len().min(receive.segment.len as usize);
                // SAFETY: a receive that was posted: its memory is valid until it has completed, which is below.
                unsafe {
                    std::ptr::copy_nonoverlapping(bytes.as_ptr(), receive.segment.address as *mut u8, len);
                }
                if let Some(pair) = self.pairs.get_mut(&peer) {
                    pair.receives.pop_front();
                }
                let completion = WorkCompletion {
                    user: receive.user,
                    len: u32::try_from(len).unwrap_or(0),
                    invalidated: if invalidates { request.key } else { 0 },
                    has_invalidated: invalidates,
                    ..WorkCompletion::NONE
                };
                self.complete(peer, RECEIVES, completion);
                Some(Ok(Vec::new()))
            }
            operation::WRITE => {
                if !self.may(peer, request.key, (request.address, bytes.len() as u64), access::REMOTE_WRITE) {
                    return Some(Err(ACCESS));
                }
                // SAFETY: registered, and its owner keeps it until the key is dead, or its queue is gone.
                unsafe { std::ptr::copy(bytes.as_ptr(), request.address as *mut u8, bytes.len()) };
                Some(Ok(Vec::new()))
            }
            operation::READ => {
                let len: u64 = segments.iter().map(|segment| u64::from(segment.len)).sum();
                if !self.may(peer, request.key, (request.address, len), access::REMOTE_READ) {
                    return Some(Err(ACCESS));
                }
                let len = usize::try_from(len).unwrap_or(0);
                // SAFETY: as above.
                Some(Ok(unsafe { std::slice::from_raw_parts(request.address as *const u8, len) }.to_vec()))
            }
            _ => Some(Err(2)),
        }
    }

    /// Moves one request of a queue on by a step; says whether there was one.
    pub(super) fn step(&mut self, queue: u64) -> bool {
        let now = self.now;
        let Some(pair) = self.pairs.get_mut(&queue).filter(|pair| !pair.failed) else { return false };
        let id = pair.id;
        let mut works = std::mem::take(&mut pair.works);
        let mut end = None;
        let mut moved = false;
        let (own, other) = match self.ends.get(&id) {
            Some(end) => {
                let other = if end.side == Side::Host { Side::Target } else { Side::Host };
                (self.silent_until(end.address, end.side), self.silent_until(end.address, other))
            }
            None => Default::default(),
        };
        if let Some(work) = works.front() {
            let is_local = [operation::BIND, operation::INVALIDATE].contains(&work.request.operation);
            let own = if is_local { now } else { own };
            // A peer that has no receive is waited for; silence is not.
            let (since, waits) = match &work.state {
                Progress::Posted(_) => (now, false),
                Progress::Going(since, arrives, _) => (*since, *arrives > now || other > now),
                Progress::Back(since, ..) => (*since, own > now),
            };
            if waits && self.is_timed && since + RETRIES_FOR <= now {
                end = Some(RETRIES);
            } else if let Progress::Back(_, at, status, bytes) = &work.state
                && *at <= now
                && own <= now
            {
                end = Some(*status);
                let mut bytes = &bytes[..];
                for segment in work.segments.iter().filter(|_| !bytes.is_empty()) {
                    let (here, rest) = bytes.split_at((segment.len as usize).min(bytes.len()));
                    // SAFETY: registered memory of the poster's, valid until this has completed.
                    unsafe {
                        std::ptr::copy_nonoverlapping(here.as_ptr(), segment.address as *mut u8, here.len());
                    }
                    bytes = rest;
                }
            }
        }
        if end.is_none() {
            moved = self.step_inside(queue, &mut works, other);
        }
        let ended = end.and_then(|status| works.pop_front().map(|work| (status, work.request)));
        match self.pairs.get_mut(&queue).filter(|pair| !pair.failed) {
            Some(pair) => pair.works = works,
            // It has failed meanwhile, without these.
            None => {
                for work in works {
                    self.complete(queue, SENDS, flushed(work.request.user));
                }
                return true;
            }
        }
        let Some((status, request)) = ended else { return moved };
        if status != 0 || request.signalled {
            self.complete(
                queue,
                SENDS,
                WorkCompletion { user: request.user, status, ..WorkCompletion::NONE },
            );
        }
        if status != 0 {
            self.counts.breaks += u64::from(status == RETRIES);
            self.fail(queue);
        }
        true
    }

    /// Begins the next request, or lets the next one arrive.
    fn step_inside(&mut self, queue: u64, works: &mut VecDeque<Work>, silent: Instant) -> bool {
        let now = self.now;
        for index in 0..works.len() {
            match &works[index].state {
                Progress::Back(..) => {}
                Progress::Going(_, arrives, _) if *arrives > now || silent > now => {
                    // What is behind it may begin, but not overtake it.
                    continue;
                }
                Progress::Going(since, _, bytes) => {
                    if works.iter().take(index).any(|before| matches!(before.state, Progress::Going(..))) {
                        continue;
                    }
                    let since = *since;
                    let Some(peer) = self.peer_queue(queue) else {
                        // Nobody answers: the device finds out in time.
                        let at = if self.is_timed { now + RETRIES_FOR } else { now };
                        works[index].state = Progress::Back(since, at, RETRIES, Vec::new());
                        return true;
                    };
                    // What was lost on the way is sent once more, as it is now.
                    let (request, mut bytes) = (works[index].request, bytes.clone());
                    if request.operation != operation::READ && self.random.chance(500) {
                        bytes = gather(&works[index].segments);
                    }
                    let Some(result) = self.arrive(peer, &request, &bytes, &works[index].segments) else {
                        continue;
                    };
                    let at = self.soon(STEP_NS_MAX);
                    works[index].state = match result {
                        Ok(bytes) => Progress::Back(since, at, 0, bytes),
                        Err(status) => {
                            // A peer whose memory was not to be reached so has an error too.
                            self.fail(peer);
                            Progress::Back(since, at, status, Vec::new())
                        }
                    };
                    return true;
                }
                Progress::Posted(at) if *at <= now => {
                    if works.iter().take(index).any(|before| matches!(before.state, Progress::Posted(_))) {
                        continue;
                    }
                    let state = self.begin(queue, &works[index]);
                    works[index].state = state;
                    return true;
                }
                Progress::Posted(_) => return false,
            }
        }
        false
    }
}
