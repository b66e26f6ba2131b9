//! PDUs as far as a proxy has to know them: where one ends, and which command it belongs to.
//!
//! Must not know: hawser's own codec, which is among what is tested through us.
#![forbid(unsafe_code)]

use std::collections::HashMap;

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the host to the target.
    ToTarget,
    /// From the target to the host.
    ToHost,
}

/// PDU types (TCP 3.6).
#[expect(missing_docs, reason = "the specification's names")]
pub mod kind {
    pub const ICREQ: u8 = 0x00;
    pub const ICRESP: u8 = 0x01;
    pub const CAPSULE_CMD: u8 = 0x04;
    pub const CAPSULE_RESP: u8 = 0x05;
    pub const H2C_DATA: u8 = 0x06;
    pub const C2H_DATA: u8 = 0x07;
    pub const R2T: u8 = 0x09;
}

/// I/O command opcodes.
#[expect(missing_docs, reason = "the specification's names")]
pub mod opcode {
    pub const FLUSH: u8 = 0x00;
    pub const WRITE: u8 = 0x01;
    pub const READ: u8 = 0x02;
    pub const FABRICS: u8 = 0x7f;
}

/// A command that went by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Command {
    /// OPC.
    pub opcode: u8,
    /// SLBA; of I/O commands with blocks only.
    pub lba: u64,
    /// NLB counted from 1; of I/O commands with blocks only.
    pub blocks: u32,
}

/// One PDU on its way.
#[derive(Clone, Copy, Debug)]
pub struct Pdu<'a> {
    /// The connection, counted from 0.
    pub link: u64,
    /// The connection's queue ID, from its Connect on.
    pub queue: Option<u16>,
    /// Where it goes.
    pub way: Way,
    /// All of it.
    pub bytes: &'a [u8],
    /// The command that it is, answers or carries data of.
    pub command: Option<Command>,
}

impl Pdu<'_> {
    /// The PDU type: see [`kind`].
    #[must_use]
    pub fn kind(&self) -> u8 {
        self.bytes.first().copied().unwrap_or(u8::MAX)
    }

    /// Where its data begins, if it has any.
    #[must_use]
    pub fn data_at(&self) -> Option<usize> {
        let at = usize::from(*self.bytes.get(3)?);
        (at != 0 && at < self.bytes.len()).then_some(at)
    }

    /// Whether it belongs to an I/O command of this opcode, on its way to the target or back.
    #[must_use]
    pub fn is(&self, way: Way, opcode: u8) -> bool {
        let io = self.queue.is_some_and(|queue| queue != 0);
        io && self.way == way && self.command.is_some_and(|command| command.opcode == opcode)
    }

    /// Whether it carries (a part of) a write to this block on its way to the target: its capsule, or its data.
    #[must_use]
    pub fn writes(&self, lba: u64) -> bool {
        let there = |command: Command| {
            lba.checked_sub(command.lba).is_some_and(|offset| offset < u64::from(command.blocks))
        };
        self.is(Way::ToTarget, opcode::WRITE) && self.command.is_some_and(there)
    }
}

/// What is known of the commands of a connection.
#[derive(Default)]
pub(crate) struct Commands {
    pub(crate) queue: Option<u16>,
    by_cid: HashMap<u16, Command>,
}

/// A PDU is longer than its common header and no longer than this, or the stream is not NVMe/TCP.
const PDU_MAX: usize = 32 << 20;

/// The length of the PDU that begins here: `Ok(None)` when too little is there to say; `Err` when it is none.
pub(crate) fn length(bytes: &[u8]) -> Result<Option<usize>, ()> {
    let Some(field) = bytes.get(4..8) else { return Ok(None) };
    let length = field.iter().rev().fold(0usize, |all, byte| all << 8 | usize::from(*byte));
    if (8..=PDU_MAX).contains(&length) { Ok(Some(length)) } else { Err(()) }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

impl Commands {
    /// Takes down what a PDU says, and which command it belongs to.
    pub(crate) fn note(&mut self, pdu: &[u8]) -> Option<Command> {
        match *pdu.first()? {
            kind::CAPSULE_CMD => {
                // The SQE begins at byte 8: CID at its byte 2, SLBA at 40, NLB at 48.
                let opcode = *pdu.get(8)?;
                let lba = u64::from_le_bytes(pdu.get(48..56)?.try_into().ok()?);
                let blocks = u32::from(u16_at(pdu, 56)?) + 1;
                let command = Command { opcode, lba, blocks };
                self.by_cid.insert(u16_at(pdu, 10)?, command);
                // Connect: FCTYPE 1 at byte 4, QID at byte 42 of the SQE.
                if opcode == opcode::FABRICS && *pdu.get(12)? == 1 {
                    self.queue = u16_at(pdu, 50);
                }
                Some(command)
            }
            // The CQE's CID is at its byte 12.
            kind::CAPSULE_RESP => self.by_cid.get(&u16_at(pdu, 20)?).copied(),
            kind::H2C_DATA | kind::C2H_DATA | kind::R2T => self.by_cid.get(&u16_at(pdu, 8)?).copied(),
            _ => None,
        }
    }
}
