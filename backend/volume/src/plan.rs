//! What has to be done on the members for one request. Pure arithmetic.

use hawser_block::{BlockCount, Geometry, Lba, Operation, Request, Status};

/// The longest read or write that a volume takes, in bytes; what is longer than a member takes is split.
pub const TRANSFER_BYTES_MAX: u32 = 4 << 20;

/// The most pieces that a discard or write-zeroes becomes; the volume offers no longer ones than that makes.
pub const PIECES_MAX: u32 = 32;

/// What a request becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// One member request: the request as it is.
    Whole,
    /// This many member requests: [`piece`] gives each.
    Pieces(u32),
    /// It cannot be done.
    Refused(Status),
}

/// Says what `request` becomes on a member of geometry `member`; `read_only` is the volume's own.
#[must_use]
pub fn resolve(request: &Request, member: &Geometry, read_only: bool) -> Plan {
    if request.operation == Operation::Flush {
        return Plan::Whole;
    }
    if request.operation.is_write() && (read_only || member.read_only) {
        return Plan::Refused(Status::ReadOnly);
    }
    if !member.contains(request.lba.0, request.blocks) {
        return Plan::Refused(Status::Invalid);
    }
    if request.operation.has_payload() {
        let bytes = u64::from(request.blocks.0) << member.block_size.shift();
        if request.buffers.len() as u64 != bytes || bytes > u64::from(TRANSFER_BYTES_MAX) {
            return Plan::Refused(Status::Invalid);
        }
    }
    let Some(blocks_max) = blocks_max(request.operation, member) else {
        return Plan::Refused(Status::Unsupported);
    };
    match request.blocks.0.div_ceil(blocks_max) {
        1 => Plan::Whole,
        pieces if pieces > PIECES_MAX && !request.operation.has_payload() => Plan::Refused(Status::Invalid),
        pieces => Plan::Pieces(pieces),
    }
}

/// The `index`-th of the pieces that [`resolve`] counted, with `token`.
#[must_use]
pub fn piece(request: &Request, member: &Geometry, index: u32, token: hawser_block::Token) -> Request {
    let blocks_max =
        blocks_max(request.operation, member).expect("resolve() refused what the member cannot do");
    let before = index * blocks_max;
    let blocks = blocks_max.min(request.blocks.0 - before);
    let buffers = if request.operation.has_payload() {
        let shift = member.block_size.shift();
        request.buffers.slice((before as usize) << shift, (blocks as usize) << shift)
    } else {
        request.buffers
    };
    let lba = Lba(request.lba.0 + u64::from(before));
    Request { lba, blocks: BlockCount(blocks), buffers, token, ..*request }
}

/// The most blocks of one such operation on the member; `None` when it cannot do it.
fn blocks_max(operation: Operation, member: &Geometry) -> Option<u32> {
    let blocks_max = match operation {
        Operation::Read | Operation::Write { .. } => member.transfer_blocks_max,
        Operation::Discard => member.discard?.blocks_max,
        Operation::WriteZeroes { .. } => member.write_zeroes?.blocks_max,
        Operation::Flush => 1,
    };
    Some(blocks_max.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hawser_block::{BlockSize, Buffers, DiscardLimits, Token};

    fn request(operation: Operation, lba: u64, blocks: u32) -> Request {
        Request {
            operation,
            lba: Lba(lba),
            blocks: BlockCount(blocks),
            buffers: Buffers::EMPTY,
            token: Token(3),
        }
    }

    #[test]
    fn ranges_past_the_end_or_empty_or_wrapping_are_invalid() {
        let member = Geometry {
            discard: Some(DiscardLimits { blocks_max: 64, granularity_blocks: 1, reads_zeroes: true }),
            ..Geometry::new(BlockSize::B512, 100)
        };
        let invalid = Plan::Refused(Status::Invalid);
        for (lba, blocks, plan) in [
            (0, 0, invalid),
            (100, 1, invalid),
            (99, 2, invalid),
            (u64::MAX, 1, invalid),
            (u64::MAX - 1, u32::MAX, invalid),
            (0, u32::MAX, invalid),
            (99, 1, Plan::Whole),
            (0, 64, Plan::Whole),
            (0, 65, Plan::Pieces(2)),
            (0, 100, Plan::Pieces(2)),
        ] {
            assert_eq!(
                resolve(&request(Operation::Discard, lba, blocks), &member, false),
                plan,
                "{lba}+{blocks}"
            );
        }
    }

    #[test]
    fn a_guest_cannot_ask_for_endless_pieces() {
        let limits = DiscardLimits { blocks_max: 1, granularity_blocks: 1, reads_zeroes: true };
        let member = Geometry { discard: Some(limits), ..Geometry::new(BlockSize::B512, 1 << 40) };
        let discard = |blocks| resolve(&request(Operation::Discard, 0, blocks), &member, false);
        assert_eq!(discard(PIECES_MAX), Plan::Pieces(PIECES_MAX));
        assert_eq!(discard(PIECES_MAX + 1), Plan::Refused(Status::Invalid));
        assert_eq!(discard(u32::MAX), Plan::Refused(Status::Invalid));
    }

    #[test]
    fn what_the_member_cannot_do_is_unsupported_and_read_only_refuses_writes_first() {
        let member = Geometry::new(BlockSize::B4096, 8);
        let zeroes = Operation::WriteZeroes { unmap: false, fua: false };
        assert_eq!(resolve(&request(zeroes, 0, 1), &member, false), Plan::Refused(Status::Unsupported));
        assert_eq!(
            resolve(&request(Operation::Discard, 0, 1), &member, true),
            Plan::Refused(Status::ReadOnly)
        );
        assert_eq!(resolve(&request(Operation::Flush, 0, 0), &member, true), Plan::Whole);
        let payload_missing = request(Operation::Read, 0, 1);
        assert_eq!(resolve(&payload_missing, &member, false), Plan::Refused(Status::Invalid));
    }
}
