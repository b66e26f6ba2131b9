//! What leaves a lane: which requests may go now, on which way, as which commands.
//!
//! Owns: the order of sending and the choice of a path. Must not know: connections from the inside, tasks.

use super::{LEFT_CHECK, Lane};
use crate::initiator::cache::{Fate, Flush};
use crate::initiator::config::IoPolicy;
use crate::initiator::held::{Fit, Held, fit};
use crate::initiator::queue::Transfer;
use crate::initiator::way::Way;
use crate::nvme::ana::AnaState;
use crate::nvme::command::DsmRange;
use crate::nvme::{Sgl, Sqe};
use crate::simulated::is_broken;
use hawser_block::{Geometry, Operation, Request, Status};
use hawser_runtime::Instant;
use std::ops::Range;

/// How much a path gets in its turn of a round-robin, and what a command counts at least. What is submitted at once goes out
/// in one send for each path that it is spread over, so turns of single commands would double the system calls: 4k at depth
/// 32 over two paths had 0.88 of one path's IOPS.
const TURN_BYTES: u32 = 128 << 10;
const TURN_COMMAND_BYTES_MIN: u32 = 4 << 10;

impl Lane {
    /// The way that the next command takes, if there is one that has room; another one than `avoid`, if there is one.
    fn choose(&mut self, avoid: Option<usize>) -> Option<usize> {
        // One of its ways has failed it: what is left of the others counts, non-optimized ones too.
        let avoid = avoid.filter(|avoid| {
            self.ways.iter().enumerate().any(|(index, way)| index != *avoid && way.is_good())
        });
        let mut ways = self.ways.iter().enumerate();
        let best = if ways.any(|(at, way)| Some(at) != avoid && way.ana() == Some(AnaState::Optimized)) {
            AnaState::Optimized
        } else {
            AnaState::NonOptimized
        };
        let good = |at: usize, way: &Way| Some(at) != avoid && way.ana() == Some(best);
        let count = self.ways.len();
        let others = |from: usize| (0..count).map(move |step| (from + step) % count);
        let chosen = match self.policy {
            // The nearest; of several the one that was taken last, or the next good one.
            IoPolicy::Numa => {
                let all = others(self.current).filter(|at| good(*at, &self.ways[*at]));
                all.min_by_key(|at| self.ways[*at].distance)
            }
            IoPolicy::RoundRobin => {
                let may = |index: &usize| good(*index, &self.ways[*index]) && self.ways[*index].room() > 0;
                if self.turn > 0 && may(&self.current) {
                    Some(self.current)
                } else {
                    self.turn = TURN_BYTES;
                    others(self.current + 1).find(may)
                }
            }
            IoPolicy::QueueDepth => {
                let with_room = others(self.current);
                let with_room =
                    with_room.filter(|at| good(*at, &self.ways[*at]) && self.ways[*at].room() > 0);
                with_room.min_by_key(|index| self.ways[*index].outstanding())
            }
        };
        self.current = chosen?;
        (self.ways[self.current].room() > 0).then_some(self.current)
    }

    /// Sends what may be sent.
    pub(super) fn pump(&mut self) {
        self.turn = 0;
        // Blocks that writes of unknown outcome may still change.
        let mut held_back = std::mem::take(&mut self.held_back);
        held_back.clear();
        if !self.ghosts.is_empty() {
            held_back.extend(self.pending.iter().filter(|held| held.is_unknown_write()).map(blocks_of));
        }
        // Of what was left, here or in another lane, nobody knows any more where it goes.
        let is_left = self.unknown.is_any_left();
        let anywhere = is_left || self.ghosts.iter().any(|ghosts| ghosts.anywhere);
        let waits = |held: &Held| {
            let blocks = blocks_of(held);
            let overlaps = |other: &Range<u64>| other.start < blocks.end && blocks.start < other.end;
            held.request.operation.is_write() && (anywhere || held_back.iter().any(overlaps))
        };
        let now = self.runtime.now();
        self.flushes_wait_until = Instant::NEVER;
        self.writes_wait_until = Instant::NEVER;
        let mut at = 0;
        while at < self.pending.len() {
            if (is_left || !self.ghosts.is_empty()) && waits(&self.pending[at]) {
                if is_left {
                    // Its end is told to the lane that it was in.
                    self.writes_wait_until = now + LEFT_CHECK;
                }
                at += 1;
                continue;
            }
            let path = match self.pending[at].only {
                None => match self.choose(self.pending[at].avoid) {
                    Some(path) => path,
                    // The others may take the way that has failed this one.
                    None if self.pending[at].avoid.is_some() => {
                        at += 1;
                        continue;
                    }
                    None => break,
                },
                Some((path, association)) if self.ways[path].is_started(association) => path,
                Some(_) => {
                    // That one was lost before it was flushed.
                    self.pending[at].only = None;
                    continue;
                }
            };
            if self.ways[path].room() == 0 {
                at += 1;
                continue;
            }
            let Some(mut held) = self.pending.remove(at) else { break };
            if held.is_control() {
                self.send_control(path, held);
                continue;
            }
            if held.request.operation == Operation::Flush {
                let flush = match held.only {
                    Some(_) => Flush::Goes(Fate::Kept),
                    None => self.caches.flush(held.came, now, |path| self.ways[path].started.is_some()),
                };
                match flush {
                    Flush::Goes(fate @ Fate::Trusted(_)) => {
                        log::warn!("{}: a FLUSH succeeds: {fate}", self.name);
                    }
                    Flush::Goes(_) => {}
                    Flush::Fails => {
                        log::error!("{}: a FLUSH fails: {}", self.name, Fate::Lost(0));
                        self.end(&held, Err(Status::Media));
                        continue;
                    }
                    Flush::Waits(until) => {
                        self.flushes_wait_until = until;
                        self.pending.insert(at, held);
                        at += 1;
                        continue;
                    }
                }
                if held.only.is_none() {
                    // To each controller that may have unflushed writes; without one, to whichever answers.
                    let mut cached = self.ways.iter().enumerate().filter_map(Way::cached);
                    match (cached.next(), cached.next()) {
                        (None, _) => {}
                        (Some((one, _)), None) if one == path => {}
                        (only, None) => {
                            self.pending.insert(at, Held { only, ..held });
                            continue;
                        }
                        (_, Some(_)) => {
                            let all: Vec<_> = self.ways.iter().enumerate().filter_map(Way::cached).collect();
                            let pieces = self.wholes.split_flush(&held, &all);
                            for (index, piece) in pieces.enumerate() {
                                self.pending.insert(at + index, piece);
                            }
                            continue;
                        }
                    }
                }
                held.written = self.caches.written(path);
                held.lost_paths = self.caches.lost_paths(path);
            }
            let Some(start) = self.ways[path].started else { unreachable!("only such a way is chosen") };
            held.sent = now;
            held.unknown = None;
            held.avoid = None;
            match fit(&held.request, &start.limits) {
                Fit::Whole => {}
                Fit::Pieces(blocks_max) => {
                    let pieces = self.wholes.split(&held, blocks_max, start.limits.block_size.shift());
                    for (index, piece) in pieces.enumerate() {
                        self.pending.insert(at + index, piece);
                    }
                    continue;
                }
                Fit::Never(status) => {
                    self.end(&held, Err(status));
                    continue;
                }
            }
            let (sqe, transfer) = command(&held.request, start.nsid, &start.limits, self.write_through);
            let bytes =
                held.request.blocks.0.checked_shl(start.limits.block_size.shift()).unwrap_or(u32::MAX);
            self.turn = self.turn.saturating_sub(bytes.max(TURN_COMMAND_BYTES_MIN));
            let connection = self.ways[path].connection.as_mut().expect("a way with room has a connection");
            connection.submit(sqe, transfer, held);
            self.runtime.add_outstanding(connection.unspun(1));
        }
        self.held_back = held_back;
        for connection in self.ways.iter_mut().filter_map(|way| way.connection.as_mut()) {
            connection.flush();
        }
    }
}

fn blocks_of(held: &Held) -> Range<u64> {
    let first = held.request.lba.0;
    first..first + u64::from(held.request.blocks.0)
}

/// A request as a command.
fn command(request: &Request, nsid: u32, geometry: &Geometry, durable: bool) -> (Sqe, Transfer) {
    let (lba, blocks) = (request.lba.0, request.blocks.0);
    match request.operation {
        Operation::Read => (Sqe::read(nsid, lba, blocks, Sgl::NONE), Transfer::ToHost(request.buffers)),
        Operation::Write { fua } => {
            let fua = (fua && !is_broken("forget_fua")) || (durable && !is_broken("forget_write_through"));
            (Sqe::write(nsid, lba, blocks, fua, Sgl::NONE), Transfer::FromHost(request.buffers))
        }
        Operation::Flush => (Sqe::flush(nsid), Transfer::None),
        Operation::Discard => {
            let range = DsmRange { attributes: 0, blocks, lba };
            (Sqe::deallocate(nsid, 1, Sgl::NONE), Transfer::Inline(range.to_bytes(), 16))
        }
        Operation::WriteZeroes { unmap, fua } => {
            let deallocate = unmap && geometry.write_zeroes.is_some_and(|limits| limits.may_unmap);
            (Sqe::write_zeroes(nsid, lba, blocks, deallocate, fua || durable), Transfer::None)
        }
    }
}
