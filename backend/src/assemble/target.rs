//! From `[[subsystem]]`s to the target that other hosts connect to.

use super::ana;
use super::device::Kind;
use super::reactors::Reactors;
use crate::daemon::api::view::{AnaGroupView, NamespaceView, PortView, SubsystemView};
use hawser_block::Device;
use hawser_config::value::{self, Listen, Nqn};
use hawser_config::{Backing, Config};
use hawser_fabric::target::{AnaConfig, Lineage, NamespaceConfig, SubsystemConfig, Target};
use hawser_fabric::uri::Transport;
use hawser_volume::Volume;
use std::sync::Arc;

/// Starts to listen for all subsystems of the configuration; `None` when there are none.
///
/// # Errors
/// When an address cannot be had, or a name is not right: one line.
pub fn start(
    config: &Config,
    reactors: &Reactors,
    lineage: &Lineage,
    behind: impl Fn(&Backing) -> Option<Arc<dyn Device>> + Copy,
) -> Result<Option<Target>, String> {
    if config.subsystems.is_empty() {
        return Ok(None);
    }
    let mut subsystems = Vec::new();
    for placed in &config.subsystems {
        let subsystem = &placed.value;
        let mut namespaces = Vec::new();
        for namespace in &subsystem.namespaces {
            let backing = namespace.backing().map_err(|(_, what)| what)?;
            let device = behind(&backing).ok_or_else(|| format!("no {} {backing}", backing.key()))?;
            let kind = namespace.device.as_ref().and_then(|name| config.device(name.as_str()));
            let in_memory =
                matches!(kind.map(|device| Kind::parse(&device.value.uri)), Some(Ok(Kind::Mem { .. })));
            let uuid = namespace.uuid.map(|uuid| uuid.0).or(in_memory.then(|| device.uuid()));
            namespaces.push(NamespaceConfig { nsid: namespace.nsid, device: as_namespace(device), uuid });
        }
        subsystems.push(SubsystemConfig {
            nqn: subsystem.nqn.to_string(),
            listen: subsystem.listen.iter().map(|listen| listen.address).collect(),
            transports: subsystem.listen.iter().map(|listen| transport(listen.transport)).collect(),
            allowed_hosts: subsystem
                .allowed_hosts
                .as_ref()
                .map(|hosts| hosts.iter().map(Nqn::to_string).collect()),
            serial: serial(&subsystem.nqn),
            namespaces,
        });
    }
    let folder = config.daemon.state_dir.join("reservations");
    let ana = AnaConfig { groups: ana_groups(config), states: ana::read(config)? };
    let target = Target::start_keeping(subsystems, reactors.handles(), &folder, lineage, &ana);
    let target = target.map_err(|what| {
        let about = config.subsystems.iter().find(|placed| what.starts_with(placed.value.nqn.as_str()));
        about.map_or_else(|| what.clone(), |placed| placed.error("listen", &what).to_string())
    })?;
    target.set_referrals(config.discovery.referrals.iter().map(|referral| referral.0).collect());
    Ok(Some(target))
}

fn transport(named: value::Transport) -> Transport {
    match named {
        value::Transport::Tcp => Transport::Tcp,
        value::Transport::Rdma => Transport::Rdma,
    }
}

fn ana_groups(config: &Config) -> Vec<(String, u32, u32)> {
    let subsystems = config.subsystems.iter().map(|placed| &placed.value);
    let of = |it: &hawser_config::SubsystemConfig| {
        let nqn = it.nqn.to_string();
        let groups = it.namespaces.iter().map(|namespace| (nqn.clone(), namespace.nsid, namespace.ana_group));
        groups.collect::<Vec<_>>()
    };
    subsystems.flat_map(of).collect()
}

/// A device as hosts see it: what they may send in one command stays the same while the device's own limits change with the
/// controller behind it.
fn as_namespace(device: Arc<dyn Device>) -> Arc<dyn Device> {
    Arc::new(Volume::whole(device.name().to_owned(), device, false))
}

/// A subsystem's serial number, the same for the same name for ever: hosts make device links of it. FNV-1a in hexadecimal.
fn serial(nqn: &Nqn) -> String {
    let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    format!("{:016x}", nqn.as_str().bytes().fold(0xcbf2_9ce4_8422_2325, step))
}

/// What there is.
#[must_use]
pub fn views(config: &Config, target: &Target) -> Vec<SubsystemView> {
    let addresses = target.addresses();
    let view = |placed: &hawser_config::Placed<hawser_config::SubsystemConfig>| {
        let subsystem = &placed.value;
        let groups = target.ana_groups(subsystem.nqn.as_str());
        let bound = addresses.iter().find(|(nqn, _)| nqn == subsystem.nqn.as_str());
        let listen: Vec<String> = bound.map_or_else(Vec::new, |(_, bound)| {
            let both = bound.iter().zip(&subsystem.listen);
            both.map(|(address, listen)| Listen { address: *address, ..*listen }.to_string()).collect()
        });
        SubsystemView {
            nqn: subsystem.nqn.to_string(),
            ports: listen
                .iter()
                .zip(groups)
                .map(|(listen, groups)| PortView {
                    listen: listen.clone(),
                    ana_groups: groups
                        .into_iter()
                        .map(|(grpid, state)| AnaGroupView { grpid, ana_state: state.to_string() })
                        .collect(),
                })
                .collect(),
            listen,
            allowed_hosts: target.allowed_hosts(subsystem.nqn.as_str()),
            hosts: target.hosts(subsystem.nqn.as_str()),
            namespaces: subsystem
                .namespaces
                .iter()
                .map(|namespace| NamespaceView {
                    nsid: namespace.nsid,
                    device: namespace.device.as_ref().map(ToString::to_string),
                    volume: namespace.volume.as_ref().map(ToString::to_string),
                })
                .collect(),
        }
    };
    config.subsystems.iter().map(view).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use hawser_block::fake::FakeDevice;
    use hawser_block::{BlockSize, Geometry};

    /// The transfer size is told at Connect. A target behind us that came back with a smaller one made the host's larger
    /// commands fail.
    #[test]
    fn a_namespace_takes_whole_commands_whatever_its_device_takes() {
        let mut geometry = Geometry::new(BlockSize::B512, 4096);
        geometry.transfer_blocks_max = 8;
        let namespace = as_namespace(Arc::new(FakeDevice::new(geometry)));
        let geometry = namespace.geometry().unwrap();
        assert!(geometry.transfer_blocks_max << geometry.block_size.shift() >= 1 << 20);
    }

    #[test]
    fn a_serial_fits_and_tells_names_apart() {
        let serial = |nqn: &str| serial(&nqn.parse().unwrap());
        assert_eq!(serial("nqn.a"), serial("nqn.a"));
        assert_ne!(serial("nqn.a"), serial("nqn.b"));
        assert_eq!(serial("nqn.a").len(), 16);
    }
}
