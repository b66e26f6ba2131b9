//! How far this host last had a pool: what is older than that does not start by itself.
//!
//! ```text
//!   state_dir/pool-UUID     GENERATION OPENINGS          of the superblocks, two numbers in one line
//! ```
//!
//! A member that was away does not know it: its superblock calls all members in sync, and only those of the others say that it is
//! behind. If it comes back alone, after the power, nothing on it tells that there is something newer elsewhere.
//!
//! Owns: that file. Must not know: what is done about it.

use crate::durable::{self, Machine};
use hawser_config::value::Uuid;
use hawser_volume::pool::{Label, PoolView};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// How often the superblocks were changed, and how often the pool was opened; the greater knows more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Past {
    generation: u64,
    openings: u64,
}

impl Past {
    pub(crate) fn of(view: &PoolView) -> Past {
        Past { generation: view.generation, openings: view.openings }
    }
}

/// Where that is kept.
pub(crate) fn file_of(state_dir: &Path, pool: &[u8; 16]) -> PathBuf {
    state_dir.join(format!("pool-{}", Uuid(*pool)))
}

/// Why what `label` says is not the newest that there is, if this host has had it newer.
pub(crate) fn is_older(state_dir: &Path, label: &Label) -> Option<String> {
    let file = file_of(state_dir, &label.pool_uuid);
    let last = match fs::read_to_string(&file) {
        Ok(text) => parse(&text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            log::warn!("{}: cannot be read: {error}", file.display());
            return None;
        }
    };
    let Some(last) = last else {
        log::warn!("{}: does not say how far its pool was, and is not used", file.display());
        return None;
    };
    let found = Past { generation: label.generation, openings: label.openings };
    (found < last).then(|| {
        format!(
            "what is there is older than what this host last had (generation {}, opened {} times, want {} and {}): the newer members \
             are waited for; --degraded, or without {}, it goes on from the old",
            found.generation,
            found.openings,
            last.generation,
            last.openings,
            file.display()
        )
    })
}

/// Writes it down, durably.
pub(crate) fn keep(state_dir: &Path, pool: &[u8; 16], past: Past) {
    let file = file_of(state_dir, pool);
    let text = format!("{} {}\n", past.generation, past.openings);
    let kept = durable::make_folder(&Machine, state_dir, 0o755)
        .and_then(|()| durable::replace(&Machine, &file, text.as_bytes(), 0o644));
    if let Err(error) = kept {
        log::warn!("{}: cannot be written: {error}", file.display());
    }
}

fn parse(text: &str) -> Option<Past> {
    let (generation, openings) = text.trim().split_once(' ')?;
    Some(Past { generation: generation.parse().ok()?, openings: openings.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use hawser_volume::raid::Level;

    #[test]
    fn only_what_is_older_is_held_back() {
        let folder = tempfile::tempdir().unwrap();
        let label = |generation, openings| Label {
            pool: "p".to_owned(),
            pool_uuid: [7; 16],
            level: Level::Raid1,
            place: Some(0),
            members: 1,
            in_sync: vec![true],
            generation,
            openings,
            uuid: [1; 16],
            member_uuids: vec![[1; 16]],
            spare_uuids: Vec::new(),
            replacement: None,
            opened_by: None,
        };
        assert_eq!(is_older(folder.path(), &label(0, 0)), None, "never seen");
        keep(folder.path(), &[7; 16], Past { generation: 9, openings: 3 });
        assert!(
            is_older(folder.path(), &label(8, 4))
                .unwrap()
                .contains("(generation 8, opened 4 times, want 9 and 3)")
        );
        assert!(is_older(folder.path(), &label(9, 2)).is_some());
        assert_eq!(is_older(folder.path(), &label(9, 3)), None);
        assert_eq!(is_older(folder.path(), &label(10, 1)), None);
        fs::write(file_of(folder.path(), &[7; 16]), "no number").unwrap();
        assert_eq!(is_older(folder.path(), &label(0, 0)), None);
    }
}
