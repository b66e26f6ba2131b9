//! ANA states that were set while a daemon ran, for the one after it: `ana.toml` in the state directory.
//!
//! An address that was made inaccessible, because the blocks behind it may not be used there, must not come back `optimized` with
//! the daemon. Written whole before a state is in force, by [`durable::replace`]; what is `optimized` is not in it.

use crate::daemon::api::view::SubsystemView;
use crate::durable::{self, Machine};
use hawser_config::Config;
use hawser_fabric::nvme::ana::AnaState;
use hawser_fabric::target::AnaSetting;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    #[serde(default)]
    state: Vec<Kept>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    nqn: String,
    /// As it is configured: an address stays the same when others come and go.
    listen: String,
    group: u32,
    state: String,
}

fn file(config: &Config) -> PathBuf {
    config.daemon.state_dir.join("ana.toml")
}

/// What was kept, as far as the configuration still has it.
///
/// # Errors
/// When it cannot be read or understood: one line with the file's name.
pub(super) fn read(config: &Config) -> Result<Vec<AnaSetting>, String> {
    let file = file(config);
    let named = |what: &dyn std::fmt::Display| format!("{}: {what}", file.display());
    let text = match std::fs::read_to_string(&file) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(named(&format!("cannot be read: {error}"))),
    };
    let document: Document = toml::from_str(&text).map_err(|error| named(&error.message()))?;
    let mut settings = Vec::new();
    for Kept { nqn, listen, group, state } in document.state {
        let state: AnaState = state.parse().map_err(|what: String| named(&what))?;
        let subsystem = config.subsystems.iter().find(|placed| placed.value.nqn.as_str() == nqn);
        let addresses = subsystem.map_or(&[][..], |placed| &placed.value.listen).iter().enumerate();
        let here = addresses.filter(|(_, address)| address.to_string() == listen);
        settings.extend(here.map(|(port, _)| AnaSetting { nqn: nqn.clone(), port, group, state }));
    }
    Ok(settings)
}

/// Keeps the states that `subsystems` show, but with `setting`.
///
/// # Errors
/// When it cannot be written: one line. Then the old ones are kept.
pub(crate) fn write(
    config: &Config,
    subsystems: &[SubsystemView],
    setting: &AnaSetting,
) -> Result<(), String> {
    let mut document = Document::default();
    for view in subsystems {
        let subsystem = config.subsystems.iter().find(|placed| placed.value.nqn.as_str() == view.nqn);
        let addresses = subsystem.map_or(&[][..], |placed| &placed.value.listen);
        for (port, (there, address)) in view.ports.iter().zip(addresses).enumerate() {
            for group in &there.ana_groups {
                let is_set = view.nqn == setting.nqn && port == setting.port && group.grpid == setting.group;
                let state = if is_set { setting.state.name() } else { &group.ana_state };
                if state != AnaState::Optimized.name() {
                    document.state.push(Kept {
                        nqn: view.nqn.clone(),
                        listen: address.to_string(),
                        group: group.grpid,
                        state: state.to_owned(),
                    });
                }
            }
        }
    }
    let file = file(config);
    let cannot = |error: &dyn std::fmt::Display| format!("{}: cannot be written: {error}", file.display());
    let text = toml::to_string(&document).map_err(|error| cannot(&error))?;
    let text = format!("# Written by hawser when an ANA state is set.\n{text}");
    durable::make_folder(&Machine, &config.daemon.state_dir, 0o755).map_err(|error| cannot(&error))?;
    durable::replace(&Machine, &file, text.as_bytes(), 0o644).map_err(|error| cannot(&error))
}
