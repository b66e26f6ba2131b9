//! What Identify and Get Log Page answer.

use super::super::namespace::Namespace;
use super::super::registry::{Controller, Subsystem};
use crate::nvme::ana::{ANACAP_ALL_STATES, ANACAP_GROUP_IS_FIXED, CMIC_ANA};
use crate::nvme::discovery::{
    Entry, FAMILY_IPV4, FAMILY_IPV6, Header, SUBTYPE_NVM, SUBTYPE_REFERRAL, TREQ_NO_FLOW_CONTROL,
    TransportType,
};
use crate::nvme::fabrics::CNTLID_DYNAMIC;
use crate::nvme::identify::{
    CNTRLTYPE_DISCOVERY, CNTRLTYPE_IO, DLFEAT_READS_ZEROES, DLFEAT_WRITE_ZEROES_DEALLOCATES,
    IdentifyController, IdentifyNamespace, IdentifyNvmController, LEN, NSATTR_WRITE_PROTECTED,
    NSFEAT_OPTIMAL_PERFORMANCE, NamespaceIds, NamespaceList, OAES_ANA_CHANGE, OAES_CROSS_CONTROLLER_RESET,
    OAES_DISCOVERY_CHANGE, OAES_NAMESPACE_ATTRIBUTE, ONCS_COMPARE, ONCS_DATASET_MANAGEMENT,
    ONCS_RESERVATIONS, ONCS_WRITE_ZEROES, RESCAP_ALL, VWC_FLUSH_ALL_UNSUPPORTED, VWC_PRESENT, cns,
};
use crate::nvme::vendor::Vendor;
use crate::nvme::{DISCOVERY_NQN, Sqe, StatusCode, admin_opcode, io_opcode, log};
use crate::simulated::is_foreign;
use crate::target::rdma::IN_CAPSULE;
use crate::target::{
    ANA_TRANSITION_SECONDS, ASYNC_EVENTS_MAX, CROSS_RESETS_MAX, IN_CAPSULE_BYTES_MAX, QUEUE_ENTRIES_MAX,
    RETRY_DELAY, Shared, VERSION,
};
use crate::uri::Transport;
use hawser_block::Geometry;
use std::collections::BTreeSet;
use std::net::SocketAddr;

/// KAS: the keep-alive timer's unit is 1 s.
const KEEP_ALIVE_GRANULARITY: u16 = 10;
/// CTRATT: 128-bit host identifiers, and any command counts as a sign of life (TBKAS).
const ATTRIBUTES: u32 = 1 | 1 << 6;
/// CMIC: more than one controller at a time.
const MULTIPATH_CONTROLLERS: u8 = 1 << 1;
/// LPA bits: the Commands Supported log, and offsets in log pages.
const LOG_ATTRIBUTES: u8 = 1 << 1 | 1 << 2;
/// SGLS: SGLs without alignment, and offsets in capsules.
const SGL_SUPPORT: u32 = 1 | 1 << 20;
/// The same over RDMA, and keyed descriptors.
const SGL_SUPPORT_RDMA: u32 = SGL_SUPPORT | 1 << 2;
/// RDMA_QPTYPE in the discovery log: reliable, connected.
const RDMA_CONNECTED: u8 = 1;
/// "All namespaces".
const NSID_ALL: u32 = 0xffff_ffff;

pub(super) fn identify(controller: &Controller, sqe: &Sqe) -> Result<Vec<u8>, StatusCode> {
    let Some(subsystem) = &controller.subsystem else {
        return match sqe.identify_cns() {
            cns::CONTROLLER => Ok(discovery_controller(controller).to_bytes().to_vec()),
            _ => Err(StatusCode::INVALID_FIELD),
        };
    };
    // A controller that knows one command set answers for that alone.
    let nvm_only = || if sqe.identify_csi() == 0 { Ok(()) } else { Err(StatusCode::INVALID_FIELD) };
    let bytes = match sqe.identify_cns() {
        cns::CONTROLLER => io_controller(controller, subsystem).to_bytes(),
        cns::NAMESPACE => match active(subsystem, sqe.nsid)? {
            Some((there, geometry)) => namespace(&geometry, there.ana_group).to_bytes(),
            None => [0; LEN],
        },
        cns::ACTIVE_NAMESPACES => {
            if sqe.nsid >= NSID_ALL - 1 {
                return Err(StatusCode::INVALID_NAMESPACE);
            }
            let known = subsystem.namespaces.iter().filter(|namespace| namespace.device.geometry().is_some());
            let ids =
                known.map(|namespace| namespace.nsid).filter(|nsid| *nsid > sqe.nsid).take(1024).collect();
            NamespaceList { ids }.to_bytes()
        }
        cns::NAMESPACE_IDS => match active(subsystem, sqe.nsid)? {
            Some((namespace, _)) => {
                NamespaceIds { uuid: namespace.uuid, ..NamespaceIds::default() }.to_bytes()
            }
            None => return Err(StatusCode::INVALID_NAMESPACE),
        },
        cns::COMMAND_SET_NAMESPACE => {
            nvm_only()?;
            active(subsystem, sqe.nsid)?;
            [0; LEN]
        }
        cns::COMMAND_SET_CONTROLLER => {
            nvm_only()?;
            IdentifyNvmController::default().to_bytes()
        }
        cns::INDEPENDENT_NAMESPACE => match active(subsystem, sqe.nsid)? {
            Some((there, geometry)) => independent(&geometry, there.ana_group),
            None => [0; LEN],
        },
        _ => return Err(StatusCode::INVALID_FIELD),
    };
    Ok(bytes.to_vec())
}

/// A namespace by its NSID: `None` for one that does not exist or is not reached yet.
fn active(subsystem: &Subsystem, nsid: u32) -> Result<Option<(&Namespace, Geometry)>, StatusCode> {
    if nsid == 0 || nsid > subsystem.nsid_max() {
        return Err(StatusCode::INVALID_NAMESPACE);
    }
    let Some(position) = subsystem.position(nsid) else { return Ok(None) };
    let namespace = &subsystem.namespaces[position];
    Ok(namespace.device.geometry().map(|geometry| (namespace, geometry)))
}

/// What both kinds of controllers say.
fn any_controller(controller: &Controller) -> IdentifyController {
    IdentifyController {
        model: "hawser".to_owned(),
        firmware: env!("CARGO_PKG_VERSION").to_owned(),
        transfer_size_max: u8::try_from((controller.transfer_bytes_max >> 12).trailing_zeros()).unwrap_or(0),
        cntlid: controller.cntlid,
        version: VERSION,
        attributes: ATTRIBUTES,
        async_event_limit: u8::try_from(ASYNC_EVENTS_MAX - 1).unwrap_or(0),
        log_page_attributes: LOG_ATTRIBUTES,
        keep_alive_granularity: KEEP_ALIVE_GRANULARITY,
        commands_max: QUEUE_ENTRIES_MAX,
        sgl_support: if controller.is_rdma() { SGL_SUPPORT_RDMA } else { SGL_SUPPORT },
        command_capsule_size: (64 + if controller.is_rdma() { IN_CAPSULE } else { IN_CAPSULE_BYTES_MAX })
            / 16,
        response_capsule_size: 1,
        sgl_descriptors_max: 1,
        ..IdentifyController::default()
    }
}

fn discovery_controller(controller: &Controller) -> IdentifyController {
    IdentifyController {
        controller_type: CNTRLTYPE_DISCOVERY,
        async_events: OAES_DISCOVERY_CHANGE,
        subsystem_nqn: DISCOVERY_NQN.to_owned(),
        ..any_controller(controller)
    }
}

fn io_controller(controller: &Controller, subsystem: &Subsystem) -> IdentifyController {
    let geometries: Vec<Geometry> = subsystem.geometries().into_values().flatten().collect();
    let any = |able: fn(&Geometry) -> bool| geometries.iter().any(able);
    let (ana_groups, ana_group_max) = controller.ana_group_count();
    let mut io_commands = ONCS_COMPARE | ONCS_RESERVATIONS;
    if any(|geometry| geometry.discard.is_some()) {
        io_commands |= ONCS_DATASET_MANAGEMENT;
    }
    if any(|geometry| geometry.write_zeroes.is_some()) {
        io_commands |= ONCS_WRITE_ZEROES;
    }
    IdentifyController {
        serial: subsystem.serial.clone(),
        multipath: MULTIPATH_CONTROLLERS | CMIC_ANA,
        ana_transition_time: ANA_TRANSITION_SECONDS,
        ana_capabilities: ANACAP_ALL_STATES | ANACAP_GROUP_IS_FIXED,
        ana_group_max,
        ana_groups,
        async_events: OAES_NAMESPACE_ATTRIBUTE | OAES_ANA_CHANGE | OAES_CROSS_CONTROLLER_RESET,
        instance_uniquifier: controller.instance.uniquifier,
        instance_random: controller.instance.random,
        cross_resets_max: if is_foreign() { 0 } else { CROSS_RESETS_MAX },
        retry_delays: [RETRY_DELAY, 0, 0],
        quiesce_time_ms: if is_foreign() { 0 } else { subsystem.quiescing().to_ms() },
        controller_type: CNTRLTYPE_IO,
        abort_limit: 3,
        // One slot, which cannot be written.
        firmware_updates: 1 | 1 << 1,
        sqe_size: 0x66,
        cqe_size: 0x44,
        namespaces: subsystem.nsid_max(),
        // How many there are, which is what hosts make room for in the ANA log.
        namespaces_max: u32::try_from(subsystem.namespaces.len()).unwrap_or(u32::MAX),
        io_commands,
        volatile_write_cache: VWC_FLUSH_ALL_UNSUPPORTED
            | if any(|geometry| geometry.volatile_cache) { VWC_PRESENT } else { 0 },
        subsystem_nqn: subsystem.nqn.clone(),
        vendor: match is_foreign() {
            true => [0; 32],
            false => Vendor { cache_identity: subsystem.cache_identity() }.to_bytes(),
        },
        ..any_controller(controller)
    }
}

/// Whether a namespace of the controller has a cache that Flush empties.
pub(super) fn has_volatile_cache(controller: &Controller) -> bool {
    controller
        .subsystem
        .as_ref()
        .is_some_and(|subsystem| subsystem.geometries().into_values().flatten().any(|g| g.volatile_cache))
}

fn namespace(geometry: &Geometry, ana_group: u32) -> IdentifyNamespace {
    let shift = geometry.block_size.shift();
    let mut namespace = IdentifyNamespace::plain(geometry.blocks, u8::try_from(shift).unwrap_or(9));
    // Counts from 0, of blocks.
    let zero_based = |blocks: u32| u16::try_from(blocks.max(1) - 1).unwrap_or(u16::MAX);
    let physical = zero_based(geometry.physical_block_bytes >> shift);
    namespace.features = NSFEAT_OPTIMAL_PERFORMANCE;
    namespace.write_granularity = physical;
    namespace.write_alignment = physical;
    namespace.optimal_write_size = zero_based(geometry.optimal_io_bytes >> shift);
    namespace.sharing = 1;
    namespace.reservations = RESCAP_ALL;
    namespace.ana_group = ana_group;
    if let Some(discard) = &geometry.discard {
        let granularity = zero_based(discard.granularity_blocks);
        namespace.deallocate_granularity = granularity;
        namespace.deallocate_alignment = granularity;
        if discard.reads_zeroes {
            namespace.deallocate_features |= DLFEAT_READS_ZEROES;
        }
    }
    if geometry.write_zeroes.is_some_and(|limits| limits.may_unmap) {
        namespace.deallocate_features |= DLFEAT_WRITE_ZEROES_DEALLOCATES;
    }
    if geometry.read_only {
        namespace.attributes = NSATTR_WRITE_PROTECTED;
    }
    namespace
}

/// The I/O Command Set Independent Identify Namespace data (base figure of CNS 08h).
fn independent(geometry: &Geometry, ana_group: u32) -> [u8; LEN] {
    let mut bytes = [0; LEN];
    bytes[0] = NSFEAT_OPTIMAL_PERFORMANCE;
    bytes[1] = 1; // NMIC: shared
    bytes[2] = RESCAP_ALL;
    bytes[4..8].copy_from_slice(&ana_group.to_le_bytes());
    bytes[8] = if geometry.read_only { NSATTR_WRITE_PROTECTED } else { 0 };
    bytes[14] = 1; // NSTAT: ready
    bytes
}

/// A log page that needs no state.
pub(super) fn plain_log(id: u8, discovery: bool) -> Result<Vec<u8>, StatusCode> {
    use log::id::{COMMANDS_AND_EFFECTS, ERROR_INFORMATION, FIRMWARE_SLOTS, SMART, SUPPORTED_LOG_PAGES};
    const IO: [u8; 9] = [
        SUPPORTED_LOG_PAGES,
        ERROR_INFORMATION,
        SMART,
        FIRMWARE_SLOTS,
        log::id::CHANGED_NAMESPACES,
        COMMANDS_AND_EFFECTS,
        log::id::ANA,
        log::id::RESERVATION_NOTIFICATION,
        log::id::CROSS_CONTROLLER_RESET,
    ];
    const DISCOVERY: [u8; 2] = [SUPPORTED_LOG_PAGES, log::id::DISCOVERY];
    match id {
        SUPPORTED_LOG_PAGES => {
            let mut page = vec![0; 1024];
            for id in if discovery { &DISCOVERY[..] } else { &IO[..] } {
                page[usize::from(*id) * 4] = 1;
            }
            Ok(page)
        }
        // No errors are kept: one entry without an error in it.
        ERROR_INFORMATION if !discovery => Ok(vec![0; 64]),
        SMART if !discovery => Ok(log::smart_healthy().to_vec()),
        FIRMWARE_SLOTS if !discovery => {
            let mut page = vec![0; 512];
            page[0] = 1;
            let version = env!("CARGO_PKG_VERSION").as_bytes();
            let len = version.len().min(8);
            page[8..16].fill(b' ');
            page[8..8 + len].copy_from_slice(&version[..len]);
            Ok(page)
        }
        COMMANDS_AND_EFFECTS if !discovery => {
            let admin = [
                admin_opcode::GET_LOG_PAGE,
                admin_opcode::IDENTIFY,
                admin_opcode::ABORT,
                admin_opcode::SET_FEATURES,
                admin_opcode::GET_FEATURES,
                admin_opcode::ASYNC_EVENT_REQUEST,
                admin_opcode::KEEP_ALIVE,
                admin_opcode::CROSS_CONTROLLER_RESET,
            ];
            let io = [
                (io_opcode::FLUSH, false),
                (io_opcode::COMPARE, false),
                (io_opcode::WRITE, true),
                (io_opcode::READ, false),
                (io_opcode::WRITE_ZEROES, true),
                (io_opcode::DATASET_MANAGEMENT, true),
                (io_opcode::RESERVATION_REGISTER, false),
                (io_opcode::RESERVATION_REPORT, false),
                (io_opcode::RESERVATION_ACQUIRE, false),
                (io_opcode::RESERVATION_RELEASE, false),
            ];
            Ok(log::commands_supported(&admin, &io).to_vec())
        }
        _ => Err(StatusCode::INVALID_LOG_PAGE),
    }
}

/// The Changed Namespace List (base 5.16.1.5).
pub(super) fn changed_namespaces(changed: &BTreeSet<u32>) -> Vec<u8> {
    let ids: Vec<u32> = if changed.len() > 1024 { vec![NSID_ALL] } else { changed.iter().copied().collect() };
    NamespaceList { ids }.to_bytes().to_vec()
}

/// The discovery log: each address of each subsystem that the host may use, then the other discovery services. `local` is the
/// address that it dialled, for listeners that have none of their own.
pub(super) fn discovery_log(shared: &Shared, host_nqn: &str, local: Option<SocketAddr>) -> Vec<u8> {
    let entry = |subtype, nqn: &str, port_id, (transport, address): (Transport, SocketAddr)| {
        let ip = match local {
            Some(local) if address.ip().is_unspecified() => local.ip(),
            _ => address.ip(),
        };
        let entry = Entry {
            transport: match transport {
                Transport::Tcp => TransportType::TCP,
                Transport::Rdma => TransportType::RDMA,
            },
            family: if ip.is_ipv4() { FAMILY_IPV4 } else { FAMILY_IPV6 },
            subtype,
            requirements: TREQ_NO_FLOW_CONTROL,
            port_id,
            cntlid: CNTLID_DYNAMIC,
            admin_queue_size: 32,
            flags: 0,
            service: address.port().to_string(),
            subsystem_nqn: nqn.to_owned(),
            address: ip.to_string(),
            security: match transport {
                Transport::Tcp => 0,
                // RDMA_QPTYPE: connected. What the network is, and that rdma_cm sets connections up, follows.
                Transport::Rdma => RDMA_CONNECTED,
            },
        };
        entry.to_bytes()
    };
    let mut entries = Vec::new();
    for subsystem in shared.subsystems().iter().filter(|subsystem| subsystem.allows(host_nqn)) {
        // Each address is a port of its own: its ANA state is.
        for (port_id, port) in (1..).zip(&subsystem.ports) {
            entries.extend_from_slice(&entry(
                SUBTYPE_NVM,
                &subsystem.nqn,
                port_id,
                (port.transport, port.address),
            ));
        }
    }
    for address in shared.referrals().iter() {
        entries.extend_from_slice(&entry(SUBTYPE_REFERRAL, DISCOVERY_NQN, 1, (Transport::Tcp, *address)));
    }
    let records = (entries.len() / Entry::LEN) as u64;
    // GENCTR has to be another when the content is, over restarts too: it is made from it (FNV-1a).
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    let generation = entries.iter().fold(0xcbf2_9ce4_8422_2325, step);
    let mut page = Header { generation, records, record_format: 0 }.to_bytes().to_vec();
    page.append(&mut entries);
    page
}
