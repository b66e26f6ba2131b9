//! What a path's task asks a controller before it uses it.
#![forbid(unsafe_code)]

use super::admin::Admin;
use super::geometry::{Identity, Known};
use super::queue::SLOTS_MAX;
use crate::nvme::ana::{AnaLog, AnaState, CMIC_ANA};
use crate::nvme::identify::{
    CNTRLTYPE_DISCOVERY, IdentifyController, IdentifyNamespace, IdentifyNvmController, NamespaceIds, cns,
};
use crate::nvme::properties::Capabilities;
use crate::uri::NvmeUri;

/// Entries of an I/O queue that we ask for: twice the depth that saturates one core here.
const IO_ENTRIES: u16 = 256;
/// The longest ANA log page that we read.
const ANA_LOG_MAX: u32 = 64 << 10;

/// Asks a controller that was started everything.
pub(super) async fn identify(
    admin: &Admin,
    capabilities: Capabilities,
    uri: &NvmeUri,
) -> Result<Identity, String> {
    let data = admin.identify("identify the controller", cns::CONTROLLER, 0).await?;
    let controller = IdentifyController::from_bytes(&data);
    if controller.controller_type == CNTRLTYPE_DISCOVERY {
        return Err(format!("{} is a discovery service, not a subsystem", uri.subsystem_nqn));
    }
    let data = admin.identify("identify the namespace", cns::NAMESPACE, uri.nsid).await?;
    let namespace = IdentifyNamespace::from_bytes(&data);
    // Controllers before 1.3 have no list of identifiers, those before 1.4 no command set's own limits.
    let what = "identify the namespace's identifiers";
    let ids = match admin.identify_if_known(what, cns::NAMESPACE_IDS, uri.nsid).await? {
        Some(data) => NamespaceIds::from_bytes(&data),
        None => NamespaceIds { nguid: namespace.nguid, eui64: namespace.eui64, ..NamespaceIds::default() },
    };
    let what = "identify the command set's limits";
    let nvm = match admin.identify_if_known(what, cns::COMMAND_SET_CONTROLLER, 0).await? {
        Some(data) => IdentifyNvmController::from_bytes(&data),
        None => IdentifyNvmController::default(),
    };
    Ok(Identity { capabilities, controller, nvm, namespace, ids })
}

pub(super) fn known(identity: &Identity, uri: &NvmeUri) -> Result<Known, String> {
    Known::of(identity).map_err(|why| format!("namespace {}: {why}", uri.nsid))
}

/// How the namespace can be reached through this controller; `None` when it does not say.
pub(super) async fn ana(admin: &Admin, identity: &Identity) -> Result<Option<AnaState>, String> {
    let IdentifyController { multipath, ana_groups, namespaces, .. } = identity.controller;
    if multipath & CMIC_ANA == 0 {
        return Ok(None);
    }
    let len = AnaLog::len_for(ana_groups, namespaces.min(1024)).min(ANA_LOG_MAX);
    // A group that the log does not have is one that is not there.
    let state = admin.ana_state(identity.namespace.ana_group, len).await?;
    Ok(Some(state.unwrap_or(AnaState::Inaccessible)))
}

/// As many entries as we like, the controller's queues have, and its commands may be.
pub(super) fn io_entries(identity: &Identity) -> u16 {
    let queue = identity.capabilities.queue_entries_max.saturating_add(1);
    let commands = match identity.controller.commands_max {
        0 => u16::MAX,
        max => max,
    };
    IO_ENTRIES.min(queue).min(commands).clamp(2, SLOTS_MAX)
}
