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

/// Whether `request` is a read or a write that is whole on the member, as nearly all are; when not, [`resolve`] says what it is.
#[inline]
pub(crate) fn is_plain(request: &Request, member: &Geometry, read_only: bool) -> bool {
    let is_allowed = match request.operation {
        Operation::Read => true,
        Operation::Write { .. } => !(read_only || member.read_only),
        _ => false,
    };
    let bytes = u64::from(request.blocks.0) << member.block_size.shift();
    is_allowed
        && member.contains(request.lba.0, request.blocks)
        && request.buffers.len() as u64 == bytes
        && bytes <= u64::from(TRANSFER_BYTES_MAX)
        && request.blocks.0 <= member.transfer_blocks_max
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
    let Some(cut) = Cut::new(request, member) else { return Plan::Refused(Status::Unsupported) };
    if !request.operation.has_payload() && request.blocks.0 > cut.unit.saturating_mul(PIECES_MAX) {
        return Plan::Refused(Status::Invalid);
    }
    match request.blocks.0.saturating_sub(cut.first).div_ceil(cut.unit) {
        0 => Plan::Whole,
        more => Plan::Pieces(1 + more),
    }
}

/// The `index`-th of the pieces that [`resolve`] counted, with `token`.
#[must_use]
pub fn piece(request: &Request, member: &Geometry, index: u32, token: hawser_block::Token) -> Request {
    let cut = Cut::new(request, member).expect("resolve() refused what the member cannot do");
    let before = if index == 0 { 0 } else { cut.first + (index - 1) * cut.unit };
    let most = if index == 0 { cut.first } else { cut.unit };
    let blocks = most.min(request.blocks.0 - before);
    let buffers = if request.operation.has_payload() {
        let shift = member.block_size.shift();
        request.buffers.slice((before as usize) << shift, (blocks as usize) << shift)
    } else {
        request.buffers
    };
    let lba = Lba(request.lba.0 + u64::from(before));
    Request { lba, blocks: BlockCount(blocks), buffers, token, ..*request }
}

/// The most blocks that a volume offers of what its member takes `blocks_max` of.
pub(crate) fn offered(blocks_max: u32, granularity_blocks: u32) -> u32 {
    unit(blocks_max, granularity_blocks).saturating_mul(PIECES_MAX)
}

/// How a request is cut: the lengths of its first piece and of the others.
struct Cut {
    first: u32,
    unit: u32,
}

impl Cut {
    /// `None` when the member cannot do it.
    fn new(request: &Request, member: &Geometry) -> Option<Cut> {
        let (blocks_max, granularity) = match request.operation {
            Operation::Read | Operation::Write { .. } => (member.transfer_blocks_max, 1),
            // A device may do nothing for the part of a discard that is less than a granule: a cut in the middle of one
            // would leave two such parts where there was none.
            Operation::Discard => {
                let limits = member.discard?;
                (limits.blocks_max, limits.granularity_blocks)
            }
            Operation::WriteZeroes { .. } => (member.write_zeroes?.blocks_max, 1),
            Operation::Flush => (1, 1),
        };
        let unit = unit(blocks_max, granularity);
        if request.blocks.0 <= blocks_max || unit < granularity {
            return Some(Cut { first: blocks_max.max(1), unit });
        }
        let beyond = u32::try_from(request.lba.0 % u64::from(granularity.max(1))).unwrap_or(0);
        Some(Cut { first: unit - beyond, unit })
    }
}

/// The most whole granules that one request takes; where not even one fits, what fits.
fn unit(blocks_max: u32, granularity: u32) -> u32 {
    let whole = blocks_max - blocks_max % granularity.max(1);
    if whole > 0 { whole } else { blocks_max.max(1) }
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

    /// Most requests are told by a look that knows less.
    #[test]
    fn what_is_plain_is_whole_and_all_that_has_payload_and_is_whole_is_plain() {
        let bounce = crate::pool::bounce::Bounce::zeroed(16 << 10);
        let member = Geometry { transfer_blocks_max: 8, ..Geometry::new(BlockSize::B512, 24) };
        let mut seen = [0; 2];
        for operation in
            [Operation::Read, Operation::Write { fua: true }, Operation::Discard, Operation::Flush]
        {
            for (lba, blocks, len) in (0..26).flat_map(|lba| (0..10).map(move |blocks| (lba, blocks, blocks)))
            {
                for (len, read_only, lba) in
                    [(len, false, lba), (len + 1, false, lba), (len, true, lba), (len, false, u64::MAX - lba)]
                {
                    let buffers = bounce.buffers(0, len as usize * 512);
                    let request = Request { buffers, ..request(operation, lba, blocks) };
                    let is_whole = resolve(&request, &member, read_only) == Plan::Whole;
                    let is_plain = is_plain(&request, &member, read_only);
                    assert_eq!(is_plain, is_whole && operation.has_payload(), "{request:?}");
                    seen[usize::from(is_plain)] += 1;
                }
            }
        }
        assert!(seen.iter().all(|count| *count > 100), "{seen:?}");
    }

    /// A discard of 64 blocks in granules of 16, for a member that takes 40 at once, was cut at 40 and discarded only the
    /// granules 0, 1 and 3: the third lay on both sides of the cut.
    #[test]
    fn a_discard_is_cut_between_granules() {
        let limits = DiscardLimits { blocks_max: 40, granularity_blocks: 16, reads_zeroes: false };
        let member = Geometry { discard: Some(limits), ..Geometry::new(BlockSize::B512, 1 << 20) };
        for (lba, blocks, want) in [
            (0, 64, vec![(0, 32), (32, 32)]),
            (8, 64, vec![(8, 24), (32, 32), (64, 8)]),
            (15, 41, vec![(15, 17), (32, 24)]),
            (3, 40, vec![(3, 40)]),
        ] {
            let request = request(Operation::Discard, lba, blocks);
            let count = match resolve(&request, &member, false) {
                Plan::Whole => 1,
                Plan::Pieces(count) => count,
                Plan::Refused(status) => panic!("{status:?}"),
            };
            let pieces = (0..count).map(|index| piece(&request, &member, index, Token(1)));
            let pieces: Vec<_> = pieces.map(|piece| (piece.lba.0, piece.blocks.0)).collect();
            assert_eq!(pieces, want);
        }
        // A granule that does not fit into one request cannot be kept whole.
        let coarse = DiscardLimits { blocks_max: 4, granularity_blocks: 16, reads_zeroes: false };
        let member = Geometry { discard: Some(coarse), ..member };
        assert_eq!(resolve(&request(Operation::Discard, 1, 9), &member, false), Plan::Pieces(3));
    }
}
