//! A request on its way, and what becomes of one that is larger than its controller takes.
//!
//! Requests are made for the limits that the device offered; while they wait, the controller may come back with smaller
//! ones. Then they go in pieces, each a request of its own here, and end once.
#![forbid(unsafe_code)]

use super::cache::{Came, LostPaths};
use hawser_block::WriteZeroesLimits;
use hawser_block::{BlockCount, DiscardLimits, Geometry, Lba, Operation, Outcome, Request, Status};
use hawser_runtime::{Instant, Slab};

/// A request on its way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Held {
    pub(super) request: Request,
    pub(super) channel: usize,
    pub(super) sequence: u64,
    pub(super) submitted: Instant,
    pub(super) sent: Instant,
    /// How often a controller refused it for now.
    pub(super) tries: u8,
    /// How often it was refused because the namespace moves between controllers.
    pub(super) moves: u8,
    /// Where it should not go next, if there is another way as good.
    pub(super) avoid: Option<usize>,
    /// It may have reached the controller of this association, which was lost since.
    pub(super) unknown: Option<u64>,
    /// Its channel wants it back.
    pub(super) aborted: bool,
    /// Its channel wants it back though it may still be carried out: a write, which counts in [`super::unknown`] for that.
    pub(super) left: bool,
    /// A flush for the controller of this path and association.
    pub(super) only: Option<(usize, u64)>,
    /// How many writes it reaches there.
    pub(super) written: u64,
    /// Of a flush: paths that are lost, and whose cache it reaches.
    pub(super) lost_paths: LostPaths,
    /// Of a flush: how things were when it came.
    pub(super) came: Came,
    /// It is a piece of this one.
    pub(super) whole: Option<usize>,
}

impl Held {
    /// A request that has just come.
    pub(super) fn new(request: Request, channel: usize, sequence: u64, now: Instant) -> Held {
        Held {
            request,
            channel,
            sequence,
            submitted: now,
            sent: now,
            tries: 0,
            moves: 0,
            avoid: None,
            unknown: None,
            aborted: false,
            left: false,
            only: None,
            written: 0,
            lost_paths: LostPaths::default(),
            came: Came::default(),
            whole: None,
        }
    }

    /// Sending it again must wait until earlier associations are quiet; ending it too, unless it was left.
    pub(super) fn is_unknown_write(&self) -> bool {
        self.unknown.is_some() && self.request.operation.is_write()
    }
}

/// What a request is to a controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fit {
    /// One command.
    Whole,
    /// Several, of at most so many blocks each.
    Pieces(u32),
    /// Nothing that it does.
    Never(Status),
}

/// What `request` is to a controller with these limits.
pub(super) fn fit(request: &Request, limits: &Geometry) -> Fit {
    if request.operation.is_write() && limits.read_only {
        return Fit::Never(Status::ReadOnly);
    }
    let blocks_max = match request.operation {
        Operation::Read | Operation::Write { .. } => Some(limits.transfer_blocks_max),
        Operation::Flush => return Fit::Whole,
        Operation::Discard => limits.discard.map(|limits| limits.blocks_max),
        Operation::WriteZeroes { .. } => limits.write_zeroes.map(|limits| limits.blocks_max),
    };
    match blocks_max {
        None => Fit::Never(Status::Unsupported),
        Some(blocks_max) if request.blocks.0 <= blocks_max => Fit::Whole,
        Some(blocks_max) => Fit::Pieces(blocks_max.max(1)),
    }
}

/// What requests may still be made for that was offered before or is now.
pub(super) fn widest(before: Option<&Geometry>, now: &Geometry) -> Geometry {
    let Some(before) = before else { return *now };
    let discard = match (before.discard, now.discard) {
        (Some(old), Some(new)) => {
            Some(DiscardLimits { blocks_max: old.blocks_max.max(new.blocks_max), ..new })
        }
        (old, new) => new.or(old),
    };
    let write_zeroes = match (before.write_zeroes, now.write_zeroes) {
        (Some(old), Some(new)) => {
            Some(WriteZeroesLimits { blocks_max: old.blocks_max.max(new.blocks_max), ..new })
        }
        (old, new) => new.or(old),
    };
    let transfer_blocks_max = before.transfer_blocks_max.max(now.transfer_blocks_max);
    Geometry { transfer_blocks_max, discard, write_zeroes, ..*now }
}

/// Requests that are under way in pieces.
#[derive(Default)]
pub(super) struct Wholes(Slab<Whole>);

struct Whole {
    held: Held,
    left: u32,
    outcome: Outcome,
}

impl Wholes {
    /// Cuts `held` into pieces of `blocks_max` blocks of `1 << shift` bytes, in order.
    pub(super) fn split(&mut self, held: &Held, blocks_max: u32, shift: u32) -> impl Iterator<Item = Held> {
        let count = held.request.blocks.0.div_ceil(blocks_max);
        // A piece of a piece is a piece of the same.
        let whole = match held.whole {
            None => self.0.insert(Whole { held: *held, left: count, outcome: Ok(()) }),
            Some(key) => {
                self.0.get_mut(key).expect("a piece has a whole").left += count - 1;
                key
            }
        };
        let held = *held;
        (0..count).map(move |index| {
            let request = held.request;
            let before = index * blocks_max;
            let blocks = blocks_max.min(request.blocks.0 - before);
            let buffers = if request.operation.has_payload() {
                request.buffers.slice((before as usize) << shift, (blocks as usize) << shift)
            } else {
                request.buffers
            };
            let lba = Lba(request.lba.0 + u64::from(before));
            let request = Request { lba, blocks: BlockCount(blocks), buffers, ..request };
            Held { request, whole: Some(whole), ..held }
        })
    }

    /// Makes a flush of each controller out of one of all, which are `paths`.
    pub(super) fn split_flush<'a>(
        &mut self,
        held: &Held,
        paths: &'a [(usize, u64)],
    ) -> impl Iterator<Item = Held> + 'a {
        let left = u32::try_from(paths.len()).unwrap_or(u32::MAX);
        let whole = match held.whole {
            None => self.0.insert(Whole { held: *held, left, outcome: Ok(()) }),
            Some(key) => {
                self.0.get_mut(key).expect("a piece has a whole").left += left - 1;
                key
            }
        };
        let held = *held;
        paths.iter().map(move |only| Held { only: Some(*only), whole: Some(whole), ..held })
    }

    /// Counts a piece of `key` down; gives the whole and how it ended, when that was its last.
    pub(super) fn piece_ended(&mut self, key: usize, outcome: Outcome) -> Option<(Held, Outcome)> {
        let whole = self.0.get_mut(key).expect("a piece ends once");
        whole.left -= 1;
        if outcome.is_err() && matches!(whole.outcome, Ok(()) | Err(Status::Aborted)) {
            whole.outcome = outcome;
        }
        if whole.left > 0 {
            return None;
        }
        self.0.remove(key).map(|whole| (whole.held, whole.outcome))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hawser_block::{BlockSize, Buffers, Token};

    fn held(operation: Operation, blocks: u32) -> Held {
        let request = Request {
            operation,
            lba: Lba(100),
            blocks: BlockCount(blocks),
            buffers: Buffers::EMPTY,
            token: Token(5),
        };
        Held::new(request, 0, 3, Instant(0))
    }

    #[test]
    fn what_a_controller_cannot_take_goes_in_pieces_or_never() {
        let plain = Geometry { transfer_blocks_max: 8, ..Geometry::new(BlockSize::B512, 1000) };
        assert_eq!(fit(&held(Operation::Read, 8).request, &plain), Fit::Whole);
        assert_eq!(fit(&held(Operation::Read, 9).request, &plain), Fit::Pieces(8));
        assert_eq!(fit(&held(Operation::Discard, 1).request, &plain), Fit::Never(Status::Unsupported));
        let read_only = Geometry { read_only: true, ..plain };
        let write = held(Operation::Write { fua: false }, 1);
        assert_eq!(fit(&write.request, &read_only), Fit::Never(Status::ReadOnly));
    }

    #[test]
    fn pieces_of_pieces_end_as_one_with_the_first_failure() {
        let mut wholes = Wholes::default();
        let pieces: Vec<_> = wholes.split(&held(Operation::Discard, 20), 8, 9).collect();
        let ranges = |pieces: &[Held]| {
            pieces.iter().map(|piece| (piece.request.lba.0, piece.request.blocks.0)).collect::<Vec<_>>()
        };
        assert_eq!(ranges(&pieces), [(100, 8), (108, 8), (116, 4)]);
        let again: Vec<_> = wholes.split(&pieces[1], 5, 9).collect();
        assert_eq!(ranges(&again), [(108, 5), (113, 3)]);
        let key = pieces[0].whole.unwrap();
        for outcome in [Ok(()), Err(Status::Aborted), Err(Status::Media)] {
            assert!(wholes.piece_ended(key, outcome).is_none());
        }
        let (whole, outcome) = wholes.piece_ended(key, Ok(())).unwrap();
        assert_eq!((whole.request.blocks.0, outcome), (20, Err(Status::Media)));
    }
}
