//! From a `[[disk]]` to a vhost-user socket.

use super::reactors::Reactors;
use hawser_block::Device;
use hawser_config::DiskConfig;
use hawser_virtio::{CrashFile, DiskConfig as VhostConfig, DiskError, SocketAccess, VhostDisk};
use hawser_volume::Volume;
use std::sync::Arc;
use std::time::Duration;

// The configuration knows no other crate of ours.
const _: () = assert!(hawser_config::QUEUES_MAX == hawser_virtio::QUEUES_MAX, "a disk may have what is said");

/// Serves `device` at the disk's socket, from the time on when its size is known.
///
/// `index` numbers the disks, so that their queues spread over the reactors.
///
/// # Errors
/// When the socket cannot be had: one line.
pub fn start(
    config: &DiskConfig,
    index: usize,
    device: Arc<dyn Device>,
    reactors: &Reactors,
    drain_timeout: Duration,
    crash: &Arc<CrashFile>,
) -> Result<VhostDisk, String> {
    let name = config.name.to_string();
    let volume = Volume::whole(name.clone(), device, config.read_only);
    let vhost = VhostConfig {
        name,
        socket: config.socket.as_path().to_owned(),
        access: SocketAccess {
            mode: config.socket_mode.map(|mode| mode.0),
            user: config.socket_user.clone(),
            group: config.socket_group.clone(),
        },
        serial: config.serial().to_string(),
        queues: config.queues,
        read_only: config.read_only,
        drain_timeout,
        index,
        crash: Some(Arc::clone(crash)),
    };
    VhostDisk::start(vhost, Arc::new(volume), reactors.handles().to_vec()).map_err(|error| match error {
        // Who reads it knows from the key that it is about the socket.
        DiskError::Socket(error) => error.to_string(),
        error => error.to_string(),
    })
}
