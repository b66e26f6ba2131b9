//! Identify data (base 5.17.2, NVM 4.1.5): what a controller and a namespace say of themselves.

use super::bytes::{
    get_array, get_padded, get_u16, get_u32, get_u64, low8, put_padded, put_u16, put_u32, put_u64,
};
use super::{FieldError, get_nqn, put_nqn};

/// CNS values: what Identify is asked for.
pub mod cns {
    /// A namespace.
    pub const NAMESPACE: u8 = 0x00;
    /// The controller.
    pub const CONTROLLER: u8 = 0x01;
    /// The active namespaces with a larger NSID.
    pub const ACTIVE_NAMESPACES: u8 = 0x02;
    /// A namespace's identifiers.
    pub const NAMESPACE_IDS: u8 = 0x03;
    /// A namespace, the part that one command set defines.
    pub const COMMAND_SET_NAMESPACE: u8 = 0x05;
    /// The controller, the part that one command set defines.
    pub const COMMAND_SET_CONTROLLER: u8 = 0x06;
    /// A namespace, the part that is the same for all command sets.
    pub const INDEPENDENT_NAMESPACE: u8 = 0x08;
}

/// The size of each answer to Identify, in bytes.
pub const LEN: usize = 4096;

/// ONCS: Dataset Management.
pub const ONCS_DATASET_MANAGEMENT: u16 = 1 << 2;
/// ONCS: Write Zeroes.
pub const ONCS_WRITE_ZEROES: u16 = 1 << 3;
/// ONCS: reservations.
pub const ONCS_RESERVATIONS: u16 = 1 << 5;
/// RESCAP: all six types, through power loss too, with IEKEY as of NVMe 1.3.
pub const RESCAP_ALL: u8 = 0xff;
/// ONCS: Compare.
pub const ONCS_COMPARE: u16 = 1 << 0;
/// OAES: namespace attribute notices.
pub const OAES_NAMESPACE_ATTRIBUTE: u32 = 1 << 8;
/// OAES: asymmetric access change notices.
pub const OAES_ANA_CHANGE: u32 = 1 << 11;
/// OAES: notices of the end of Cross-Controller Resets.
pub const OAES_CROSS_CONTROLLER_RESET: u32 = 1 << 20;
/// OAES: discovery log change notices.
pub const OAES_DISCOVERY_CHANGE: u32 = 1 << 31;
/// CNTRLTYPE: an I/O controller.
pub const CNTRLTYPE_IO: u8 = 1;
/// CNTRLTYPE: a discovery controller.
pub const CNTRLTYPE_DISCOVERY: u8 = 2;
/// VWC: a volatile write cache is present.
pub const VWC_PRESENT: u8 = 1;
/// VWC bits 2:1 = 10b: Flush with NSID FFFFFFFFh is not supported.
pub const VWC_FLUSH_ALL_UNSUPPORTED: u8 = 2 << 1;
/// VWC bits 2:1 = 11b: Flush with NSID FFFFFFFFh is supported.
pub const VWC_FLUSH_ALL: u8 = 3 << 1;

/// The first bytes of the vendor's area in Identify Controller of our target: they promise that its Connect waits until
/// the commands of closed and expired associations of the same host NQN and ID have ended. The last byte is a version.
pub const VENDOR_MARK: [u8; 8] = *b"hawser\0\x01";

/// Identify Controller (base figure "Identify Controller Data Structure").
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IdentifyController {
    /// VID: PCI vendor.
    pub vendor_id: u16,
    /// SSVID.
    pub subsystem_vendor_id: u16,
    /// SN: at most 20 characters.
    pub serial: String,
    /// MN: at most 40 characters.
    pub model: String,
    /// FR: at most 8 characters.
    pub firmware: String,
    /// RAB.
    pub arbitration_burst: u8,
    /// CMIC: bit 1 = more than one controller, bit 3 = ANA.
    pub multipath: u8,
    /// MDTS: the most data of one command is 2^this memory pages (of CAP.MPSMIN); 0 = no limit.
    pub transfer_size_max: u8,
    /// CNTLID.
    pub cntlid: u16,
    /// VER.
    pub version: u32,
    /// OAES.
    pub async_events: u32,
    /// CTRATT: bit 0 = 128-bit host ID, bit 6 = traffic based keep-alive.
    pub attributes: u32,
    /// CNTRLTYPE.
    pub controller_type: u8,
    /// CRDT1 to CRDT3: retry delays in 100 ms.
    pub retry_delays: [u16; 3],
    /// CIU: counts the controller's lives, never 0; 0 = not said.
    pub instance_uniquifier: u8,
    /// CIRN: a random number for each of its lives.
    pub instance_random: u64,
    /// OACS: optional admin commands.
    pub admin_commands: u16,
    /// ACL: abort limit, counted from 0.
    pub abort_limit: u8,
    /// AERL: limit of outstanding Asynchronous Event Requests, counted from 0.
    pub async_event_limit: u8,
    /// FRMW.
    pub firmware_updates: u8,
    /// LPA: bit 2 = offsets and long lengths in Get Log Page.
    pub log_page_attributes: u8,
    /// ELPE: entries of the error log, counted from 0.
    pub error_log_entries: u8,
    /// KAS: granularity of the keep-alive timer in 100 ms; 0 = no keep-alive.
    pub keep_alive_granularity: u16,
    /// ANATT: longest ANA transition in seconds.
    pub ana_transition_time: u8,
    /// ANACAP.
    pub ana_capabilities: u8,
    /// ANAGRPMAX.
    pub ana_group_max: u32,
    /// NANAGRPID.
    pub ana_groups: u32,
    /// CQT: how long commands may go on after the association is lost, in milliseconds; 0 = not said.
    pub quiesce_time_ms: u16,
    /// SQES: bits 3:0 required, 7:4 largest size of an SQE, as powers of 2.
    pub sqe_size: u8,
    /// CQES: as SQES.
    pub cqe_size: u8,
    /// MAXCMD: the most commands outstanding on one queue.
    pub commands_max: u16,
    /// NN: the largest NSID.
    pub namespaces: u32,
    /// ONCS: optional I/O commands.
    pub io_commands: u16,
    /// FUSES.
    pub fused_operations: u16,
    /// VWC.
    pub volatile_write_cache: u8,
    /// AWUN: atomic write unit, blocks counted from 0.
    pub atomic_write_unit: u16,
    /// AWUPF: the same in a power failure.
    pub atomic_write_unit_power_fail: u16,
    /// SGLS: bits 1:0 = SGLs, bit 20 = offsets in capsules.
    pub sgl_support: u32,
    /// MNAN: the most namespaces at once.
    pub namespaces_max: u32,
    /// SUBNQN; empty when it cannot be read.
    pub subsystem_nqn: String,
    /// IOCCSZ: capsule size of an I/O command in 16 bytes: 64 bytes of SQE and the most in-capsule data.
    pub command_capsule_size: u32,
    /// IORCSZ: capsule size of a response in 16 bytes.
    pub response_capsule_size: u32,
    /// ICDOFF: offset of in-capsule data in 16 bytes.
    pub in_capsule_data_offset: u16,
    /// FCATT: bit 0 = static controller model.
    pub controller_attributes: u8,
    /// MSDBD: the most SGL descriptors in a capsule.
    pub sgl_descriptors_max: u8,
    /// OFCS: bit 0 = Disconnect.
    pub fabrics_commands: u16,
    /// CCRL: the most Cross-Controller Resets under way that this controller was asked for; 0 = not supported.
    pub cross_resets_max: u8,
    /// The first bytes of the vendor's area: see [`VENDOR_MARK`] and [`super::vendor`].
    pub vendor: [u8; 32],
}

impl IdentifyController {
    /// As on the wire.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        let b = &mut bytes;
        put_u16(b, 0, self.vendor_id);
        put_u16(b, 2, self.subsystem_vendor_id);
        put_padded(&mut b[4..24], &self.serial);
        put_padded(&mut b[24..64], &self.model);
        put_padded(&mut b[64..72], &self.firmware);
        b[72] = self.arbitration_burst;
        b[76] = self.multipath;
        b[77] = self.transfer_size_max;
        put_u16(b, 78, self.cntlid);
        put_u32(b, 80, self.version);
        put_u32(b, 92, self.async_events);
        put_u32(b, 96, self.attributes);
        b[111] = self.controller_type;
        for (index, delay) in self.retry_delays.iter().enumerate() {
            put_u16(b, 128 + 2 * index, *delay);
        }
        b[135] = self.instance_uniquifier;
        put_u64(b, 136, self.instance_random);
        put_u16(b, 256, self.admin_commands);
        b[258] = self.abort_limit;
        b[259] = self.async_event_limit;
        b[260] = self.firmware_updates;
        b[261] = self.log_page_attributes;
        b[262] = self.error_log_entries;
        put_u16(b, 320, self.keep_alive_granularity);
        b[342] = self.ana_transition_time;
        b[343] = self.ana_capabilities;
        put_u32(b, 344, self.ana_group_max);
        put_u32(b, 348, self.ana_groups);
        put_u16(b, 386, self.quiesce_time_ms);
        b[512] = self.sqe_size;
        b[513] = self.cqe_size;
        put_u16(b, 514, self.commands_max);
        put_u32(b, 516, self.namespaces);
        put_u16(b, 520, self.io_commands);
        put_u16(b, 522, self.fused_operations);
        b[525] = self.volatile_write_cache;
        put_u16(b, 526, self.atomic_write_unit);
        put_u16(b, 528, self.atomic_write_unit_power_fail);
        put_u32(b, 536, self.sgl_support);
        put_u32(b, 540, self.namespaces_max);
        put_nqn(&mut b[768..1024], &self.subsystem_nqn);
        put_u32(b, 1792, self.command_capsule_size);
        put_u32(b, 1796, self.response_capsule_size);
        put_u16(b, 1800, self.in_capsule_data_offset);
        b[1802] = self.controller_attributes;
        b[1803] = self.sgl_descriptors_max;
        put_u16(b, 1804, self.fabrics_commands);
        b[1807] = self.cross_resets_max;
        b[3072..3104].copy_from_slice(&self.vendor);
        bytes
    }

    /// From the wire.
    #[must_use]
    pub fn from_bytes(b: &[u8; LEN]) -> IdentifyController {
        IdentifyController {
            vendor_id: get_u16(b, 0),
            subsystem_vendor_id: get_u16(b, 2),
            serial: get_padded(&b[4..24]),
            model: get_padded(&b[24..64]),
            firmware: get_padded(&b[64..72]),
            arbitration_burst: b[72],
            multipath: b[76],
            transfer_size_max: b[77],
            cntlid: get_u16(b, 78),
            version: get_u32(b, 80),
            async_events: get_u32(b, 92),
            attributes: get_u32(b, 96),
            controller_type: b[111],
            retry_delays: std::array::from_fn(|index| get_u16(b, 128 + 2 * index)),
            instance_uniquifier: b[135],
            instance_random: get_u64(b, 136),
            admin_commands: get_u16(b, 256),
            abort_limit: b[258],
            async_event_limit: b[259],
            firmware_updates: b[260],
            log_page_attributes: b[261],
            error_log_entries: b[262],
            keep_alive_granularity: get_u16(b, 320),
            ana_transition_time: b[342],
            ana_capabilities: b[343],
            ana_group_max: get_u32(b, 344),
            ana_groups: get_u32(b, 348),
            quiesce_time_ms: get_u16(b, 386),
            sqe_size: b[512],
            cqe_size: b[513],
            commands_max: get_u16(b, 514),
            namespaces: get_u32(b, 516),
            io_commands: get_u16(b, 520),
            fused_operations: get_u16(b, 522),
            volatile_write_cache: b[525],
            atomic_write_unit: get_u16(b, 526),
            atomic_write_unit_power_fail: get_u16(b, 528),
            sgl_support: get_u32(b, 536),
            namespaces_max: get_u32(b, 540),
            subsystem_nqn: get_nqn(&b[768..1024], "Identify Controller", "SUBNQN").unwrap_or_default(),
            command_capsule_size: get_u32(b, 1792),
            response_capsule_size: get_u32(b, 1796),
            in_capsule_data_offset: get_u16(b, 1800),
            controller_attributes: b[1802],
            sgl_descriptors_max: b[1803],
            fabrics_commands: get_u16(b, 1804),
            cross_resets_max: b[1807],
            vendor: get_array(b, 3072),
        }
    }

    /// How many bytes of data an I/O command capsule may carry.
    #[must_use]
    pub fn in_capsule_data_max(&self) -> u32 {
        self.command_capsule_size.saturating_mul(16).saturating_sub(64)
    }
}

/// Identify Controller of the NVM command set (NVM figure "I/O Command Set Specific Identify Controller Data Structure",
/// CNS 06h with CSI 0). All 0 where a controller does not say.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IdentifyNvmController {
    /// WZSL: the most blocks of one Write Zeroes is 2^this memory pages of CAP.MPSMIN; 0 = no limit.
    pub write_zeroes_size_max: u8,
    /// DMRL: the most ranges of one Dataset Management; 0 = not said.
    pub dsm_ranges_max: u8,
    /// DMRSL: the most blocks of one range; 0 = not said.
    pub dsm_range_blocks_max: u32,
    /// DMSL: the most blocks of one Dataset Management; 0 = not said.
    pub dsm_blocks_max: u64,
}

impl IdentifyNvmController {
    /// As on the wire.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; LEN] {
        let mut b = [0; LEN];
        b[1] = self.write_zeroes_size_max;
        b[3] = self.dsm_ranges_max;
        put_u32(&mut b, 4, self.dsm_range_blocks_max);
        put_u64(&mut b, 8, self.dsm_blocks_max);
        b
    }

    /// From the wire.
    #[must_use]
    pub fn from_bytes(b: &[u8; LEN]) -> IdentifyNvmController {
        IdentifyNvmController {
            write_zeroes_size_max: b[1],
            dsm_ranges_max: b[3],
            dsm_range_blocks_max: get_u32(b, 4),
            dsm_blocks_max: get_u64(b, 8),
        }
    }
}

/// One LBA format: how blocks look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LbaFormat {
    /// MS: metadata bytes per block.
    pub metadata_bytes: u16,
    /// LBADS: the block size is 2^this bytes.
    pub block_shift: u8,
    /// RP: relative performance, 0 best to 3.
    pub performance: u8,
}

/// Identify Namespace for the NVM command set (NVM figure "Identify Namespace Data Structure").
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdentifyNamespace {
    /// NSZE: size in blocks; 0 for a namespace that is not active.
    pub size: u64,
    /// NCAP: blocks that may be allocated.
    pub capacity: u64,
    /// NUSE: blocks that are allocated.
    pub used: u64,
    /// NSFEAT: bit 0 = thin, bit 4 = NPWG, NPWA, NPDG, NPDA and NOWS are given.
    pub features: u8,
    /// NLBAF: the last valid index into `formats`.
    pub format_last: u8,
    /// FLBAS: bits 3:0 and 6:5 choose the format.
    pub format_choice: u8,
    /// DPS: end-to-end protection; 0 = none.
    pub protection: u8,
    /// NMIC: bit 0 = may be shared.
    pub sharing: u8,
    /// RESCAP: reservation types; 0 = none.
    pub reservations: u8,
    /// DLFEAT: bits 2:0 = 1 deallocated blocks read as zeroes; bit 3 = Write Zeroes honours DEAC.
    pub deallocate_features: u8,
    /// NOIOB: preferred boundary in blocks, 0 = none.
    pub optimal_boundary: u16,
    /// NPWG: preferred write granularity in blocks, counted from 0.
    pub write_granularity: u16,
    /// NPWA: its alignment, counted from 0.
    pub write_alignment: u16,
    /// NPDG: preferred deallocate granularity in blocks, counted from 0.
    pub deallocate_granularity: u16,
    /// NPDA: its alignment, counted from 0.
    pub deallocate_alignment: u16,
    /// NOWS: optimal write size in blocks, counted from 0.
    pub optimal_write_size: u16,
    /// ANAGRPID.
    pub ana_group: u32,
    /// NSATTR: bit 0 = write protected.
    pub attributes: u8,
    /// NGUID; all zero = none.
    pub nguid: [u8; 16],
    /// EUI64; all zero = none.
    pub eui64: [u8; 8],
    /// LBAF0 to LBAF15. (Those from 16 on need an Identify that asks for extended formats.)
    pub formats: [LbaFormat; 16],
}

/// DLFEAT bits 2:0: deallocated blocks read as zeroes.
pub const DLFEAT_READS_ZEROES: u8 = 1;
/// DLFEAT bit 3: Write Zeroes may deallocate (DEAC).
pub const DLFEAT_WRITE_ZEROES_DEALLOCATES: u8 = 1 << 3;
/// NSFEAT bit 4: the preferred granularities are given.
pub const NSFEAT_OPTIMAL_PERFORMANCE: u8 = 1 << 4;
/// NSATTR bit 0: write protected.
pub const NSATTR_WRITE_PROTECTED: u8 = 1;

impl IdentifyNamespace {
    /// A namespace of `size` blocks of 2^`block_shift` bytes, plain in all else.
    #[must_use]
    pub fn plain(size: u64, block_shift: u8) -> IdentifyNamespace {
        let mut namespace = IdentifyNamespace::from_bytes(&[0; LEN]);
        namespace.size = size;
        namespace.capacity = size;
        namespace.used = size;
        namespace.formats[0].block_shift = block_shift;
        namespace
    }

    /// As on the wire.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        let b = &mut bytes;
        put_u64(b, 0, self.size);
        put_u64(b, 8, self.capacity);
        put_u64(b, 16, self.used);
        b[24] = self.features;
        b[25] = self.format_last;
        b[26] = self.format_choice;
        b[29] = self.protection;
        b[30] = self.sharing;
        b[31] = self.reservations;
        b[33] = self.deallocate_features;
        put_u16(b, 46, self.optimal_boundary);
        put_u16(b, 64, self.write_granularity);
        put_u16(b, 66, self.write_alignment);
        put_u16(b, 68, self.deallocate_granularity);
        put_u16(b, 70, self.deallocate_alignment);
        put_u16(b, 72, self.optimal_write_size);
        put_u32(b, 92, self.ana_group);
        b[99] = self.attributes;
        b[104..120].copy_from_slice(&self.nguid);
        b[120..128].copy_from_slice(&self.eui64);
        for (index, format) in self.formats.iter().enumerate() {
            put_u16(b, 128 + 4 * index, format.metadata_bytes);
            b[130 + 4 * index] = format.block_shift;
            b[131 + 4 * index] = format.performance & 3;
        }
        bytes
    }

    /// From the wire.
    #[must_use]
    pub fn from_bytes(b: &[u8; LEN]) -> IdentifyNamespace {
        IdentifyNamespace {
            size: get_u64(b, 0),
            capacity: get_u64(b, 8),
            used: get_u64(b, 16),
            features: b[24],
            format_last: b[25],
            format_choice: b[26],
            protection: b[29],
            sharing: b[30],
            reservations: b[31],
            deallocate_features: b[33],
            optimal_boundary: get_u16(b, 46),
            write_granularity: get_u16(b, 64),
            write_alignment: get_u16(b, 66),
            deallocate_granularity: get_u16(b, 68),
            deallocate_alignment: get_u16(b, 70),
            optimal_write_size: get_u16(b, 72),
            ana_group: get_u32(b, 92),
            attributes: b[99],
            nguid: get_array(b, 104),
            eui64: get_array(b, 120),
            formats: std::array::from_fn(|index| LbaFormat {
                metadata_bytes: get_u16(b, 128 + 4 * index),
                block_shift: b[130 + 4 * index],
                performance: b[131 + 4 * index] & 3,
            }),
        }
    }

    /// The format that is in use, if blocks of it can be served as they are.
    ///
    /// # Errors
    /// When the format has metadata or protection, an unusual block size, or is not among the first 16.
    pub fn format(&self) -> Result<LbaFormat, FieldError> {
        let structure = "Identify Namespace";
        let error = |field, value: u64, expected| FieldError { structure, field, value, expected };
        let index = usize::from(self.format_choice & 0xf) | usize::from(self.format_choice >> 5 & 3) << 4;
        let Some(format) = self.formats.get(index) else {
            return Err(error("FLBAS", u64::from(self.format_choice), "one of the formats 0 to 15"));
        };
        if format.metadata_bytes != 0 {
            return Err(error("LBAF.MS", u64::from(format.metadata_bytes), "0: metadata is not supported"));
        }
        if self.protection & 7 != 0 {
            return Err(error(
                "DPS",
                u64::from(self.protection),
                "0: protection information is not supported",
            ));
        }
        if !(9..=16).contains(&format.block_shift) {
            return Err(error("LBAF.LBADS", u64::from(format.block_shift), "9 to 16 (512 bytes to 64 KiB)"));
        }
        Ok(*format)
    }
}

/// The Namespace Identification Descriptor list (base figure "Namespace Identification Descriptor").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NamespaceIds {
    /// EUI64; all zero = none.
    pub eui64: [u8; 8],
    /// NGUID; all zero = none.
    pub nguid: [u8; 16],
    /// UUID; all zero = none.
    pub uuid: [u8; 16],
    /// CSI: the command set; 0 = NVM.
    pub command_set: u8,
}

impl NamespaceIds {
    /// As on the wire.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        let mut at = 0;
        let mut put = |kind: u8, id: &[u8], always: bool| {
            if always || id.iter().any(|byte| *byte != 0) {
                bytes[at] = kind;
                bytes[at + 1] = low8(u32::try_from(id.len()).unwrap_or(0));
                bytes[at + 4..at + 4 + id.len()].copy_from_slice(id);
                at += 4 + id.len();
            }
        };
        put(1, &self.eui64, false);
        put(2, &self.nguid, false);
        put(3, &self.uuid, false);
        put(4, &[self.command_set], true);
        bytes
    }

    /// From the wire. Descriptors of unknown type or wrong length are passed over; the first of each type counts.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; LEN]) -> NamespaceIds {
        let mut ids = NamespaceIds::default();
        let mut at = 0;
        while at + 4 <= LEN && bytes[at + 1] != 0 {
            let len = usize::from(bytes[at + 1]);
            let Some(id) = bytes.get(at + 4..at + 4 + len) else { break };
            match (bytes[at], len) {
                (1, 8) if ids.eui64 == [0; 8] => ids.eui64.copy_from_slice(id),
                (2, 16) if ids.nguid == [0; 16] => ids.nguid.copy_from_slice(id),
                (3, 16) if ids.uuid == [0; 16] => ids.uuid.copy_from_slice(id),
                (4, 1) => ids.command_set = id[0],
                _ => {}
            }
            at += 4 + len;
        }
        ids
    }
}

/// A list of NSIDs in rising order (base 4.4.2), at most 1024.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NamespaceList {
    /// The NSIDs.
    pub ids: Vec<u32>,
}

impl NamespaceList {
    /// As on the wire.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        for (index, id) in self.ids.iter().take(LEN / 4).enumerate() {
            put_u32(&mut bytes, 4 * index, *id);
        }
        bytes
    }

    /// From the wire: up to the first 0.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; LEN]) -> NamespaceList {
        let ids = (0..LEN / 4).map(|index| get_u32(bytes, 4 * index)).take_while(|id| *id != 0).collect();
        NamespaceList { ids }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_controller_is_the_bytes_that_the_specification_says() {
        let controller = IdentifyController {
            serial: "S1".into(),
            model: "M".into(),
            transfer_size_max: 5,
            cntlid: 0x0102,
            version: 0x0002_0000,
            keep_alive_granularity: 1,
            io_commands: ONCS_WRITE_ZEROES | ONCS_DATASET_MANAGEMENT,
            volatile_write_cache: 7,
            command_capsule_size: (64 + 8192) / 16,
            subsystem_nqn: "nqn.s".into(),
            instance_uniquifier: 3,
            instance_random: 0x0102,
            cross_resets_max: 4,
            vendor: [9; 32],
            ..IdentifyController::default()
        };
        let b = controller.to_bytes();
        assert_eq!(&b[4..8], b"S1  ");
        assert_eq!(&b[24..26], b"M ");
        assert_eq!((b[77], b[78], b[79]), (5, 2, 1));
        assert_eq!(b[80..84], [0, 0, 2, 0]);
        assert_eq!((b[320], b[520], b[525]), (1, 0x0c, 7));
        assert_eq!(b[1792..1796], [0x04, 0x02, 0, 0]);
        assert_eq!(&b[768..774], b"nqn.s\0");
        assert_eq!((b[135], b[136], b[137], b[1807], b[3072]), (3, 2, 1, 4, 9));
        assert_eq!(IdentifyController::from_bytes(&b), controller);
        assert_eq!(controller.in_capsule_data_max(), 8192);
    }

    #[test]
    fn a_namespace_is_the_bytes_that_the_specification_says() {
        let mut namespace = IdentifyNamespace::plain(0x1000, 12);
        namespace.deallocate_features = DLFEAT_READS_ZEROES | DLFEAT_WRITE_ZEROES_DEALLOCATES;
        namespace.nguid = [3; 16];
        let b = namespace.to_bytes();
        assert_eq!(b[..8], [0, 0x10, 0, 0, 0, 0, 0, 0]);
        assert_eq!((b[33], b[104], b[128], b[129], b[130]), (9, 3, 0, 0, 12));
        assert_eq!(IdentifyNamespace::from_bytes(&b), namespace);
        assert_eq!(namespace.format().map(|format| format.block_shift), Ok(12));
    }

    #[test]
    fn a_format_that_cannot_be_served_is_refused_by_name() {
        let plain = IdentifyNamespace::plain(8, 9);
        let mut metadata = plain.clone();
        metadata.formats[0].metadata_bytes = 8;
        assert_eq!(metadata.format().unwrap_err().field, "LBAF.MS");
        let mut protected = plain.clone();
        protected.protection = 1;
        assert_eq!(protected.format().unwrap_err().field, "DPS");
        let mut tiny = plain.clone();
        tiny.formats[0].block_shift = 8;
        assert_eq!(tiny.format().unwrap_err().field, "LBAF.LBADS");
        let mut far = plain;
        far.format_choice = 1 << 5;
        assert_eq!(far.format().unwrap_err().field, "FLBAS");
    }

    #[test]
    fn identifiers_are_the_bytes_that_the_specification_says() {
        let ids = NamespaceIds { uuid: [0xaa; 16], ..NamespaceIds::default() };
        let b = ids.to_bytes();
        assert_eq!(b[..5], [3, 16, 0, 0, 0xaa]);
        assert_eq!(b[20..26], [4, 1, 0, 0, 0, 0]);
        assert_eq!(NamespaceIds::from_bytes(&b), ids);
        // A descriptor that we do not know is passed over.
        let mut b = [0; LEN];
        b[..6].copy_from_slice(&[9, 2, 0, 0, 1, 1]);
        b[6..26].copy_from_slice(&NamespaceIds { nguid: [5; 16], ..ids }.to_bytes()[..20]);
        assert_eq!(NamespaceIds::from_bytes(&b).nguid, [5; 16]);
    }

    #[test]
    fn a_namespace_list_ends_at_zero() {
        let list = NamespaceList { ids: vec![1, 2, 0x0102_0304] };
        assert_eq!(list.to_bytes()[..16], [1, 0, 0, 0, 2, 0, 0, 0, 4, 3, 2, 1, 0, 0, 0, 0]);
        assert_eq!(NamespaceList::from_bytes(&list.to_bytes()), list);
    }
}
