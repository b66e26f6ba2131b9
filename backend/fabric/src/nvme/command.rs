//! The submission queue entry (base 3.3.3.1): 64 bytes that say what to do, and the builders of those that we use.

use super::bytes::{bits, get_array, get_u16, get_u32, get_u64, low16, low32, put_u16, put_u32, put_u64};

/// Admin command opcodes (base figure "Opcodes for Admin Commands").
#[expect(missing_docs, reason = "the specification's names")]
pub mod admin_opcode {
    pub const GET_LOG_PAGE: u8 = 0x02;
    pub const IDENTIFY: u8 = 0x06;
    pub const ABORT: u8 = 0x08;
    pub const SET_FEATURES: u8 = 0x09;
    pub const GET_FEATURES: u8 = 0x0A;
    pub const ASYNC_EVENT_REQUEST: u8 = 0x0C;
    pub const KEEP_ALIVE: u8 = 0x18;
    pub const CROSS_CONTROLLER_RESET: u8 = 0x38;
    pub const FABRICS: u8 = 0x7F;
}

/// I/O command opcodes (NVM figure "Opcodes for NVM Commands").
#[expect(missing_docs, reason = "the specification's names")]
pub mod io_opcode {
    pub const FLUSH: u8 = 0x00;
    pub const WRITE: u8 = 0x01;
    pub const READ: u8 = 0x02;
    pub const COMPARE: u8 = 0x05;
    pub const WRITE_ZEROES: u8 = 0x08;
    pub const DATASET_MANAGEMENT: u8 = 0x09;
    pub const RESERVATION_REGISTER: u8 = 0x0D;
    pub const RESERVATION_REPORT: u8 = 0x0E;
    pub const RESERVATION_ACQUIRE: u8 = 0x11;
    pub const RESERVATION_RELEASE: u8 = 0x15;
    pub const FABRICS: u8 = 0x7F;
}

/// One SGL descriptor (base 4.1.2): where a command's data is. NVMe/TCP uses two kinds, NVMe/RDMA one of them and a third.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sgl {
    /// Address or offset.
    pub address: u64,
    /// Length in bytes.
    pub len: u32,
    /// Of a keyed descriptor: the key by which the controller reaches the data. Others have none.
    pub key: u32,
    /// Descriptor type (bits 7:4) and sub type (bits 3:0).
    pub identifier: u8,
}

impl Sgl {
    /// No data. (A data block of length 0 at address 0, as Linux sends.)
    pub const NONE: Sgl = Sgl { address: 0, len: 0, key: 0, identifier: 0 };
    /// SGL Data Block descriptor with the sub type Offset: the data is in the capsule.
    pub const IN_CAPSULE: u8 = 0x01;
    /// Transport SGL Data Block descriptor (type 5h, sub type Ah): the transport moves the data in PDUs of its own.
    pub const TRANSPORT: u8 = 0x5A;

    /// Keyed SGL Data Block descriptor (type 4h): memory that the controller reaches by RDMA.
    pub const KEYED: u8 = 0x40;
    /// Its sub type Fh: the controller invalidates the key with its answer.
    pub const INVALIDATE: u8 = 0x0F;
    /// No data, over RDMA: a keyed data block of length 0, as Linux sends.
    pub const NO_KEY: Sgl = Sgl { address: 0, len: 0, key: 0, identifier: Sgl::KEYED };

    /// The longest data of a keyed descriptor: its length has 24 bits.
    pub const KEYED_LEN_MAX: u32 = (1 << 24) - 1;

    /// Memory that the controller reaches by a key, of at most [`Sgl::KEYED_LEN_MAX`] bytes.
    #[must_use]
    pub fn keyed(address: u64, len: u32, key: u32, invalidate: bool) -> Sgl {
        Sgl { address, len, key, identifier: Sgl::KEYED | if invalidate { Sgl::INVALIDATE } else { 0 } }
    }

    /// Whether the descriptor is a keyed one.
    #[must_use]
    pub fn is_keyed(&self) -> bool {
        self.identifier & 0xf0 == Sgl::KEYED
    }

    /// Bytes 8 to 15. A keyed descriptor (base 4.1.2.1) has 24 bits of length, and then 32 of key.
    fn len_to_bytes(self) -> [u8; 8] {
        let mut bytes = [0; 8];
        put_u32(&mut bytes, 0, self.len);
        if self.is_keyed() {
            put_u32(&mut bytes, 3, self.key);
        }
        bytes[7] = self.identifier;
        bytes
    }

    fn from_bytes(address: u64, bytes: &[u8; 8]) -> Sgl {
        let sgl = Sgl { address, len: get_u32(bytes, 0), key: 0, identifier: bytes[7] };
        if sgl.is_keyed() { Sgl { len: sgl.len & 0xff_ffff, key: get_u32(bytes, 3), ..sgl } } else { sgl }
    }

    /// Data within the capsule, right after the command.
    #[must_use]
    pub fn in_capsule(len: u32) -> Sgl {
        Sgl { address: 0, len, key: 0, identifier: Sgl::IN_CAPSULE }
    }

    /// Data that the transport moves: C2HData, or H2CData after R2T.
    #[must_use]
    pub fn transport(len: u32) -> Sgl {
        Sgl { address: 0, len, key: 0, identifier: Sgl::TRANSPORT }
    }
}

/// A command, as its 64 bytes: common fields by name, the rest as command dwords.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sqe {
    /// OPC.
    pub opcode: u8,
    /// Byte 1: FUSE (bits 1:0) and PSDT (bits 7:6). [`Sqe::FLAGS_SGL`] in Fabrics.
    pub flags: u8,
    /// CID.
    pub cid: u16,
    /// NSID; for Fabrics commands the lowest byte is FCTYPE.
    pub nsid: u32,
    /// CDW2 and CDW3.
    pub cdw2_3: u64,
    /// MPTR.
    pub mptr: u64,
    /// DPTR as SGL1.
    pub sgl: Sgl,
    /// CDW10 to CDW15.
    pub cdw: [u32; 6],
}

/// Read, Write and Write Zeroes, dword 12 bit 30: Force Unit Access.
const FUA: u32 = 1 << 30;
/// Write Zeroes, dword 12 bit 25: deallocate the blocks if that reads as zeroes.
const DEAC: u32 = 1 << 25;
/// Dataset Management, dword 11 bit 2: Attribute - Deallocate.
const DSM_DEALLOCATE: u32 = 1 << 2;

impl Sqe {
    /// Its size in bytes.
    pub const LEN: usize = 64;
    /// FUSE: the command is a half of a fused operation.
    pub const FLAGS_FUSED: u8 = 3;
    /// PSDT 01b: the data pointer is an SGL, as Fabrics demands.
    pub const FLAGS_SGL: u8 = 0x40;

    /// A command with all else zero. The CID is filled in when it gets a slot.
    #[must_use]
    pub fn new(opcode: u8, nsid: u32, sgl: Sgl) -> Sqe {
        Sqe { opcode, flags: Sqe::FLAGS_SGL, cid: 0, nsid, cdw2_3: 0, mptr: 0, sgl, cdw: [0; 6] }
    }

    /// As on the wire.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; Sqe::LEN] {
        let mut bytes = [0; Sqe::LEN];
        bytes[0] = self.opcode;
        bytes[1] = self.flags;
        put_u16(&mut bytes, 2, self.cid);
        put_u32(&mut bytes, 4, self.nsid);
        put_u64(&mut bytes, 8, self.cdw2_3);
        put_u64(&mut bytes, 16, self.mptr);
        put_u64(&mut bytes, 24, self.sgl.address);
        bytes[32..40].copy_from_slice(&self.sgl.len_to_bytes());
        for (index, dword) in self.cdw.iter().enumerate() {
            put_u32(&mut bytes, 40 + 4 * index, *dword);
        }
        bytes
    }

    /// From the wire.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; Sqe::LEN]) -> Sqe {
        Sqe {
            opcode: bytes[0],
            flags: bytes[1],
            cid: get_u16(bytes, 2),
            nsid: get_u32(bytes, 4),
            cdw2_3: get_u64(bytes, 8),
            mptr: get_u64(bytes, 16),
            sgl: Sgl::from_bytes(get_u64(bytes, 24), &get_array(bytes, 32)),
            cdw: std::array::from_fn(|index| get_u32(bytes, 40 + 4 * index)),
        }
    }

    fn blocks(opcode: u8, nsid: u32, lba: u64, count: u32, sgl: Sgl) -> Sqe {
        let mut sqe = Sqe::new(opcode, nsid, sgl);
        sqe.cdw[0] = low32(lba);
        sqe.cdw[1] = low32(lba >> 32);
        sqe.cdw[2] = u32::from(low16(count.wrapping_sub(1)));
        sqe
    }

    /// Read (NVM 3.2.4) of `count` blocks, 1 to 65536.
    #[must_use]
    pub fn read(nsid: u32, lba: u64, count: u32, sgl: Sgl) -> Sqe {
        Sqe::blocks(io_opcode::READ, nsid, lba, count, sgl)
    }

    /// Write (NVM 3.2.6) of `count` blocks, 1 to 65536.
    #[must_use]
    pub fn write(nsid: u32, lba: u64, count: u32, fua: bool, sgl: Sgl) -> Sqe {
        let mut sqe = Sqe::blocks(io_opcode::WRITE, nsid, lba, count, sgl);
        sqe.cdw[2] |= if fua { FUA } else { 0 };
        sqe
    }

    /// Write Zeroes (NVM 3.2.8) over `count` blocks, 1 to 65536.
    #[must_use]
    pub fn write_zeroes(nsid: u32, lba: u64, count: u32, deallocate: bool, fua: bool) -> Sqe {
        let mut sqe = Sqe::blocks(io_opcode::WRITE_ZEROES, nsid, lba, count, Sgl::NONE);
        sqe.cdw[2] |= if fua { FUA } else { 0 } | if deallocate { DEAC } else { 0 };
        sqe
    }

    /// Flush (base 7.1).
    #[must_use]
    pub fn flush(nsid: u32) -> Sqe {
        Sqe::new(io_opcode::FLUSH, nsid, Sgl::NONE)
    }

    /// Dataset Management (NVM 3.2.3) that deallocates `ranges` ranges (1 to 256), which are the data.
    #[must_use]
    pub fn deallocate(nsid: u32, ranges: u32, sgl: Sgl) -> Sqe {
        let mut sqe = Sqe::new(io_opcode::DATASET_MANAGEMENT, nsid, sgl);
        sqe.cdw[0] = ranges.wrapping_sub(1) & 0xff;
        sqe.cdw[1] = DSM_DEALLOCATE;
        sqe
    }

    /// Identify (base 5.17): `cns` says what, for namespace `nsid`.
    #[must_use]
    pub fn identify(cns: u8, nsid: u32, sgl: Sgl) -> Sqe {
        let mut sqe = Sqe::new(admin_opcode::IDENTIFY, nsid, sgl);
        sqe.cdw[0] = u32::from(cns);
        sqe
    }

    /// Set Features (base 5.27) without data.
    #[must_use]
    pub fn set_features(feature: u8, value: u32) -> Sqe {
        let mut sqe = Sqe::new(admin_opcode::SET_FEATURES, 0, Sgl::NONE);
        sqe.cdw[0] = u32::from(feature);
        sqe.cdw[1] = value;
        sqe
    }

    /// Get Log Page (base 5.16): `len` bytes from `offset`, both multiples of 4; `retain` keeps the event that told of it.
    #[must_use]
    pub fn get_log_page(log: u8, nsid: u32, offset: u64, len: u32, retain: bool, sgl: Sgl) -> Sqe {
        let mut sqe = Sqe::new(admin_opcode::GET_LOG_PAGE, nsid, sgl);
        let dwords = (len / 4).saturating_sub(1);
        sqe.cdw[0] = u32::from(log) | u32::from(retain) << 15 | (dwords & 0xffff) << 16;
        sqe.cdw[1] = dwords >> 16;
        sqe.cdw[2] = low32(offset);
        sqe.cdw[3] = low32(offset >> 32);
        sqe
    }

    /// The same Get Log Page with LSP: what the log page defines, 7 bits.
    #[must_use]
    pub fn with_log_specific(mut self, parameter: u8) -> Sqe {
        self.cdw[0] |= u32::from(parameter & 0x7f) << 8;
        self
    }

    /// Keep Alive (base 5.18).
    #[must_use]
    pub fn keep_alive() -> Sqe {
        Sqe::new(admin_opcode::KEEP_ALIVE, 0, Sgl::NONE)
    }

    /// Asynchronous Event Request (base 5.2).
    #[must_use]
    pub fn async_event_request() -> Sqe {
        Sqe::new(admin_opcode::ASYNC_EVENT_REQUEST, 0, Sgl::NONE)
    }

    /// SLBA of Read, Write, Compare and Write Zeroes.
    #[must_use]
    pub fn lba(&self) -> u64 {
        u64::from(self.cdw[0]) | u64::from(self.cdw[1]) << 32
    }

    /// NLB of Read, Write, Compare and Write Zeroes as a count: 1 to 65536.
    #[must_use]
    pub fn block_count(&self) -> u32 {
        (self.cdw[2] & 0xffff) + 1
    }

    /// FUA of Read, Write, Compare and Write Zeroes.
    #[must_use]
    pub fn fua(&self) -> bool {
        self.cdw[2] & FUA != 0
    }

    /// DEAC of Write Zeroes.
    #[must_use]
    pub fn deallocate_zeroes(&self) -> bool {
        self.cdw[2] & DEAC != 0
    }

    /// NR of Dataset Management as a count: 1 to 256.
    #[must_use]
    pub fn dsm_ranges(&self) -> u32 {
        (self.cdw[0] & 0xff) + 1
    }

    /// AD of Dataset Management.
    #[must_use]
    pub fn dsm_deallocates(&self) -> bool {
        self.cdw[1] & DSM_DEALLOCATE != 0
    }

    /// CNS of Identify.
    #[must_use]
    pub fn identify_cns(&self) -> u8 {
        super::bytes::low8(self.cdw[0])
    }

    /// CSI of Identify: the command set that CNS 05h to 08h are about; 0 = NVM.
    #[must_use]
    pub fn identify_csi(&self) -> u8 {
        super::bytes::low8(self.cdw[1] >> 24)
    }

    /// FID of Set Features and Get Features.
    #[must_use]
    pub fn feature_id(&self) -> u8 {
        super::bytes::low8(self.cdw[0])
    }

    /// LID of Get Log Page.
    #[must_use]
    pub fn log_id(&self) -> u8 {
        super::bytes::low8(self.cdw[0])
    }

    /// LSP of Get Log Page: what the log page defines.
    #[must_use]
    pub fn log_specific(&self) -> u8 {
        super::bytes::low8(bits(u64::from(self.cdw[0]), 14, 8))
    }

    /// RAE of Get Log Page: the event that told of the log stays outstanding.
    #[must_use]
    pub fn log_retains_event(&self) -> bool {
        self.cdw[0] & 1 << 15 != 0
    }

    /// NUMD of Get Log Page as a length in bytes, at least 4. (2^32 dwords do not fit: `None`.)
    #[must_use]
    pub fn log_len(&self) -> Option<u32> {
        let dwords = bits(u64::from(self.cdw[0]), 31, 16) | (self.cdw[1] & 0xffff) << 16;
        dwords.checked_add(1)?.checked_mul(4)
    }

    /// LPO of Get Log Page, in bytes.
    #[must_use]
    pub fn log_offset(&self) -> u64 {
        u64::from(self.cdw[2]) | u64::from(self.cdw[3]) << 32
    }
}

/// One range of Dataset Management (NVM 3.2.3): 16 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DsmRange {
    /// Context attributes: hints.
    pub attributes: u32,
    /// Length in blocks; not counted from 0.
    pub blocks: u32,
    /// First block.
    pub lba: u64,
}

impl DsmRange {
    /// Its size in bytes.
    pub const LEN: usize = 16;

    /// As on the wire.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; DsmRange::LEN] {
        let mut bytes = [0; DsmRange::LEN];
        put_u32(&mut bytes, 0, self.attributes);
        put_u32(&mut bytes, 4, self.blocks);
        put_u64(&mut bytes, 8, self.lba);
        bytes
    }

    /// From the wire.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; DsmRange::LEN]) -> DsmRange {
        DsmRange { attributes: get_u32(bytes, 0), blocks: get_u32(bytes, 4), lba: get_u64(bytes, 8) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_is_the_bytes_that_the_specification_says() {
        let mut sqe = Sqe::write(0x0403_0201, 0x1817_1615_1413_1211, 8, true, Sgl::in_capsule(4096));
        sqe.cid = 0xa0b0;
        let mut expected = [0u8; 64];
        expected[..8].copy_from_slice(&[0x01, 0x40, 0xb0, 0xa0, 1, 2, 3, 4]);
        expected[32..36].copy_from_slice(&[0, 0x10, 0, 0]);
        expected[39] = 0x01;
        expected[40..48].copy_from_slice(&[0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18]);
        expected[48..52].copy_from_slice(&[7, 0, 0, 0x40]);
        assert_eq!(sqe.to_bytes(), expected);
        assert_eq!((sqe.lba(), sqe.block_count(), sqe.fua()), (0x1817_1615_1413_1211, 8, true));
    }

    #[test]
    fn fields_read_back_what_builders_wrote() {
        let zeroes = Sqe::write_zeroes(1, 5, 65536, true, false);
        assert_eq!(zeroes.to_bytes()[48..52], [0xff, 0xff, 0, 0x02]);
        assert!(zeroes.deallocate_zeroes() && !zeroes.fua());
        assert_eq!(zeroes.block_count(), 65536);
        let dsm = Sqe::deallocate(1, 256, Sgl::in_capsule(4096));
        assert_eq!((dsm.dsm_ranges(), dsm.dsm_deallocates()), (256, true));
        assert_eq!(dsm.to_bytes()[40..48], [0xff, 0, 0, 0, 4, 0, 0, 0]);
        let log = Sqe::get_log_page(0x70, 0, 0x1_0000_0400, 0x0004_0004, true, Sgl::transport(0x0004_0004));
        assert_eq!(log.to_bytes()[40..56], [0x70, 0x80, 0, 0, 1, 0, 0, 0, 0, 4, 0, 0, 1, 0, 0, 0]);
        assert_eq!(
            (log.log_id(), log.log_retains_event(), log.log_len(), log.log_offset()),
            (0x70, true, Some(0x0004_0004), 0x1_0000_0400)
        );
        assert_eq!(log.with_log_specific(1).to_bytes()[40..42], [0x70, 0x81]);
        assert_eq!(log.with_log_specific(0x7f).log_specific(), 0x7f);
        assert_eq!(Sqe::identify(1, 0, Sgl::transport(4096)).to_bytes()[39], 0x5a);
        let range = DsmRange { attributes: 0, blocks: 3, lba: 0x10 };
        assert_eq!(range.to_bytes(), [0, 0, 0, 0, 3, 0, 0, 0, 0x10, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(DsmRange::from_bytes(&range.to_bytes()), range);
    }
}
