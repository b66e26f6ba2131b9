//! From `[[subsystem]]`s to a target.

use super::reactors::Reactors;
use crate::config::Config;
use crate::config::value::Name;
use crate::daemon::api::view::SubsystemView;
use hawser_block::Device;
use std::sync::Arc;
use std::time::Duration;

/// All subsystems that other hosts reach.
pub struct Target {}

impl Target {
    /// What there is.
    #[must_use]
    pub fn views(&self) -> Vec<SubsystemView> {
        Vec::new()
    }

    /// Takes no more commands and waits for those under way, up to `drain`.
    pub fn stop(&self, _drain: Duration) {}
}

/// Starts to listen.
///
/// # Errors
/// When an address cannot be had: one line.
pub fn targets(
    config: &Config,
    _reactors: &Reactors,
    _device: impl Fn(&Name) -> Option<Arc<dyn Device>>,
) -> Result<Vec<Target>, String> {
    match config.subsystems.first() {
        None => Ok(Vec::new()),
        Some(subsystem) => Err(subsystem.error("nqn", "this build serves no subsystems").to_string()),
    }
}
