//! `--save`: disks that are kept in files of their own, `conf.d/disk-NAME.toml`.
//!
//! A file is there whole or not at all, also after a power cut; what people wrote elsewhere is never edited.

use crate::durable::{self, Files};
use hawser_config::value::Name;
use hawser_config::{Config, DiskConfig};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct OneDisk {
    disk: [DiskConfig; 1],
}

fn disk_file(config: &Config, name: &Name) -> PathBuf {
    config.conf_d().join(format!("disk-{name}.toml"))
}

/// Writes the file that brings `disk` back at the next start.
///
/// # Errors
/// When it is there already or cannot be written: one line. Nothing is left behind then.
pub(super) fn save_disk(files: &impl Files, config: &Config, disk: &DiskConfig) -> Result<PathBuf, String> {
    let file = disk_file(config, &disk.name);
    let cannot = |error: &dyn std::fmt::Display| format!("{}: cannot be written: {error}", file.display());
    if file.exists() {
        return Err(format!("{}: is there already, want it moved away or no --save", file.display()));
    }
    let text = toml::to_string(&OneDisk { disk: [disk.clone()] }).map_err(|error| cannot(&error))?;
    let text = format!("# Written by `hawser disk add --save`.\n{text}");
    durable::make_folder(files, &config.conf_d(), 0o755).map_err(|error| cannot(&error))?;
    durable::replace(files, &file, text.as_bytes(), 0o644).map_err(|error| cannot(&error))?;
    Ok(file)
}

/// Removes the file that would bring the disk back; `saved_in` is the file that it came from.
///
/// # Errors
/// When the disk stands in a file that is not ours to change: one line that names it.
pub(super) fn unsave_disk(config: &Config, name: &Name, saved_in: Option<&Path>) -> Result<(), String> {
    let file = disk_file(config, name);
    match saved_in {
        None => return Err(format!("disk {name} is in no file, want no --save")),
        Some(saved_in) if saved_in != file => {
            return Err(format!(
                "disk {name} is named in {}, want it removed there by hand",
                saved_in.display()
            ));
        }
        Some(_) => {}
    }
    let cannot = |error: &dyn std::fmt::Display| format!("{}: cannot be removed: {error}", file.display());
    let text = fs::read_to_string(&file).map_err(|error| cannot(&error))?;
    if toml::from_str::<OneDisk>(&text).is_err() {
        return Err(format!(
            "{}: holds more than disk {name}, want it removed there by hand",
            file.display()
        ));
    }
    durable::remove(&durable::Machine, &file).map_err(|error| cannot(&error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::durable::Machine;
    use crate::durable::model::{Image, Model};

    fn config(folder: &Path) -> Config {
        let file = folder.join("h.toml");
        fs::write(&file, "[[device]]\nname = \"n0\"\nuri = \"mem:?size=1GiB\"\n").unwrap();
        Config::load(&file).unwrap()
    }

    fn disk() -> DiskConfig {
        DiskConfig {
            name: "d".parse().unwrap(),
            device: Some("n0".parse().unwrap()),
            volume: None,
            socket: "/run/d.sock".parse().unwrap(),
            socket_mode: Some("0660".parse().unwrap()),
            socket_user: None,
            socket_group: Some("kvm".to_owned()),
            serial: Some("s".parse().unwrap()),
            queues: 3,
            read_only: true,
            shared: true,
        }
    }

    #[test]
    fn a_saved_disk_is_read_back_as_it_was_and_removed_without_trace() {
        let folder = tempfile::tempdir().unwrap();
        let before = config(folder.path());
        let file = save_disk(&Machine, &before, &disk()).unwrap();
        let after = Config::load(&before.file).unwrap();
        assert_eq!(after.disks[0].value, disk());
        assert_eq!(after.disks[0].file(), file);
        assert!(save_disk(&Machine, &before, &disk()).unwrap_err().contains("is there already"));
        unsave_disk(&before, &disk().name, Some(&file)).unwrap();
        assert_eq!(fs::read_dir(before.conf_d()).unwrap().count(), 0);
    }

    #[test]
    fn what_people_wrote_is_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let config = config(folder.path());
        let error = unsave_disk(&config, &disk().name, Some(&config.file)).unwrap_err();
        assert_eq!(
            error,
            format!("disk d is named in {}, want it removed there by hand", config.file.display())
        );
        let file = save_disk(&Machine, &config, &disk()).unwrap();
        let text =
            fs::read_to_string(&file).unwrap() + "[[device]]\nname = \"x\"\nuri = \"mem:?size=1GiB\"\n";
        fs::write(&file, text).unwrap();
        let error = unsave_disk(&config, &disk().name, Some(&file)).unwrap_err();
        assert!(error.contains("holds more than disk d"), "{error}");
        assert!(file.exists());
    }

    #[test]
    fn a_power_cut_leaves_no_half_disk_and_none_that_was_saved_is_lost() {
        let text = ("h.toml".into(), "[[device]]\nname = \"n0\"\nuri = \"mem:?size=1GiB\"\n".to_owned());
        let config = Config::parse(&[("/etc/h.toml".into(), text.1.clone())]).unwrap();
        let model = Model::with(&["/etc"], &[("/etc/h.toml", &text.1)]);
        let file = Path::new("/etc/conf.d/disk-d.toml");
        let save =
            |files: &Model| save_disk(files, &config, &disk()).map(drop).map_err(std::io::Error::other);
        let right = |image: &Image, done: bool| {
            // As the daemon reads it: names that begin with a dot are left out.
            let Some(saved) = image.get(file) else { return !done };
            let Ok(saved) = String::from_utf8(saved.clone()) else { return false };
            let read = Config::parse(&[text.clone(), (file.to_owned(), saved)]);
            read.is_ok_and(|read| read.disks.len() == 1 && read.disks[0].value == disk())
        };
        let operations = model.cut_everywhere(None, save, right).unwrap();
        let needed = (0..operations).filter(|skip| model.cut_everywhere(Some(*skip), save, right).is_err());
        assert!(needed.count() >= 3, "the folder, the file and its name are each synced");
    }
}
