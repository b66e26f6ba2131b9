//! A request: one operation over a run of blocks, from a guest or a host, towards a device.

use crate::buffers::Buffers;
use crate::status::Outcome;

/// A logical block address, in blocks of the device that the request goes to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lba(pub u64);

/// A number of blocks of the device that the request goes to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockCount(pub u32);

/// Names a request to whoever submitted it. The top bit belongs to `volume`, which marks the pieces of split requests
/// with it; everybody else's tokens have it clear.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(pub u64);

impl Token {
    /// The bit that `volume` uses.
    pub const VOLUME_BIT: u64 = 1 << 63;
}

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "fua, unmap: said in each variant's text")]
pub enum Operation {
    /// Blocks to buffers.
    Read,
    /// Buffers to blocks. With `fua` the blocks are durable when it ends.
    Write { fua: bool },
    /// All writes that ended before this began are durable when it ends. Covers the whole device; lba and blocks are 0.
    Flush,
    /// The content of the blocks is not needed any more.
    Discard,
    /// The blocks read as zeroes from now on; `unmap`: their space may be given back. `fua` as for a write.
    WriteZeroes { unmap: bool, fua: bool },
}

impl Operation {
    /// Whether it changes blocks.
    #[must_use]
    pub fn is_write(self) -> bool {
        matches!(self, Operation::Write { .. } | Operation::Discard | Operation::WriteZeroes { .. })
    }

    /// Whether it moves payload.
    #[must_use]
    pub fn has_payload(self) -> bool {
        matches!(self, Operation::Read | Operation::Write { .. })
    }
}

/// One request. A plain value: who submits it keeps what `buffers` names until the [`Completion`].
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// What is to be done.
    pub operation: Operation,
    /// The first block.
    pub lba: Lba,
    /// How many blocks.
    pub blocks: BlockCount,
    /// The payload of a read or write: exactly `blocks` long. Else empty.
    pub buffers: Buffers,
    /// Comes back in the completion.
    pub token: Token,
}

/// The end of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The request's token.
    pub token: Token,
    /// How it ended.
    pub outcome: Outcome,
}
