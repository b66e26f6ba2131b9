//! What a command without a daemon has begun at a target, kept until it has ended in order: what one that failed, or was killed,
//! has asked for may still be carried out when the next one writes.

use crate::assemble::device::{self, Kind};
use crate::durable::{self, Machine};
use hawser_config::{Config, DeviceConfig, Placed};
use std::path::PathBuf;

pub(super) struct Unfinished {
    /// `None`: nobody needs to know. A file's lock does the same.
    record: Option<PathBuf>,
    pub(super) had_predecessor: bool,
}

impl Unfinished {
    pub(super) fn begin(config: &Config, placed: &Placed<DeviceConfig>) -> Unfinished {
        if !matches!(Kind::parse(&placed.value.uri), Ok(Kind::Nvme { .. })) {
            return Unfinished { record: None, had_predecessor: false };
        }
        let record = device::import_record(config, &placed.value.name);
        // Who may not make it is told when the record cannot be written.
        let _ = durable::make_folder(&Machine, &config.daemon.state_dir, 0o755);
        let had_predecessor = record.exists();
        Unfinished { record: Some(record), had_predecessor }
    }

    pub(super) fn end(self) {
        // It may never have come to be.
        let _ = self.record.map(std::fs::remove_file);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each import took itself for the first: writes of one that was killed, still under way at the target, landed on those of
    /// the next.
    #[test]
    fn an_import_that_did_not_end_is_known_to_the_next() {
        let folder = tempfile::tempdir().unwrap();
        let text = "[daemon]\nstate_dir = \"@/lib\"\n[[device]]\nname = \"r\"\nuri = \"nvme+tcp://h/nqn.x\"\n\
                    [[device]]\nname = \"m\"\nuri = \"mem:?size=1MiB\"\n";
        let text = text.replace('@', &folder.path().display().to_string());
        let config = Config::parse(&[(folder.path().join("h.toml"), text)]).unwrap();
        let begin = |name: &str| Unfinished::begin(&config, config.device(name).unwrap());
        assert!(!begin("r").had_predecessor && !begin("r").had_predecessor, "none has reached its target");
        std::fs::write(folder.path().join("lib/import-r"), "of an association").unwrap();
        let second = begin("r");
        assert!(second.had_predecessor && !begin("m").had_predecessor);
        second.end();
        assert!(!begin("r").had_predecessor);
    }
}
