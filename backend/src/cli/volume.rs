//! `hawser volume create|list|resize|snapshot|clone|delete|export`

use super::client::Client;
use super::offline::{Offline, Purpose, WhereArgs};
use super::progress::Bar;
use super::table::{self, Align, Table};
use super::{Failure, all_is_shown, print_json, say, warn};
use crate::assemble::pool as assemble;
use crate::daemon::api::pool_view::{
    CreateVolume, MakeClone, SetVolume, TakeSnapshot, TakeSnapshots, VolumeView,
};
use crate::image::{self, Progress};
use clap::{Args, Subcommand};
use hawser_config::value::{ByteSize, Name, VolumePath};
use hawser_volume::pool::Pool;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

#[derive(Subcommand)]
pub(super) enum VolumeCommand {
    /// Make a volume; it takes space as it is written to
    Create(CreateArgs),
    /// Show all volumes
    List(ListArgs),
    /// Make a volume larger, or smaller where nothing was written; its VM sees it at once
    Resize(CreateArgs),
    /// Keep what volumes have now, all at the same instant
    Snapshot(SnapshotArgs),
    /// Make a volume with the content of a snapshot
    Clone(CloneArgs),
    /// Delete a volume or snapshot that nothing uses
    Delete(DeleteArgs),
    /// Copy a volume to a raw image file, as it is at one instant
    Export(ExportArgs),
}

#[derive(Args)]
pub(super) struct CreateArgs {
    /// The volume
    #[arg(value_name = "POOL/VOLUME")]
    path: VolumePath,
    /// As its VM sees it, such as 20GiB
    #[arg(long)]
    size: ByteSize,
    #[command(flatten)]
    at: WhereArgs,
}

#[derive(Args)]
pub(super) struct ListArgs {
    /// The pool; all of them if not said
    pool: Option<Name>,
    #[command(flatten)]
    at: WhereArgs,
}

#[derive(Args)]
pub(super) struct SnapshotArgs {
    /// A volume and the name of its snapshot, as often as wanted; all of one pool
    #[arg(required = true, value_name = "POOL/VOLUME SNAPSHOT", num_args = 2..)]
    pairs: Vec<String>,
    #[command(flatten)]
    at: WhereArgs,
}

#[derive(Args)]
pub(super) struct CloneArgs {
    /// The snapshot
    #[arg(value_name = "POOL/SNAPSHOT")]
    snapshot: VolumePath,
    /// The new volume, in the same pool
    #[arg(value_name = "POOL/VOLUME")]
    path: VolumePath,
    #[command(flatten)]
    at: WhereArgs,
}

#[derive(Args)]
pub(super) struct DeleteArgs {
    /// The volume or snapshot
    #[arg(value_name = "POOL/VOLUME")]
    path: VolumePath,
    #[command(flatten)]
    at: WhereArgs,
}

#[derive(Args)]
pub(super) struct ExportArgs {
    /// The volume or snapshot
    #[arg(value_name = "POOL/VOLUME")]
    path: VolumePath,
    /// The new file: as large as the volume, with holes where that is zero
    file: PathBuf,
    #[command(flatten)]
    at: WhereArgs,
}

pub(super) fn run(command: &VolumeCommand) -> Result<(), Failure> {
    match command {
        VolumeCommand::Create(args) => create(args),
        VolumeCommand::List(args) => list(args),
        VolumeCommand::Resize(args) => resize(args),
        VolumeCommand::Snapshot(args) => snapshot(args),
        VolumeCommand::Clone(args) => clone(args),
        VolumeCommand::Delete(args) => delete(args),
        VolumeCommand::Export(args) => export(args),
    }
}

fn url(path: &VolumePath) -> String {
    format!("/v1/pools/{}/volumes/{}", path.pool, path.volume)
}

/// Changes a pool without a daemon; the volume of that name as it is then.
fn offline(
    at: &WhereArgs,
    file: &Path,
    path: &VolumePath,
    change: impl FnOnce(&Offline, &Pool) -> Result<(), Failure>,
) -> Result<VolumeView, Failure> {
    let offline = Offline::begin(at, file, Purpose::Change)?;
    let done = offline.with_pool(path.pool.as_str(), |offline, pool| {
        change(offline, pool)?;
        view_of(offline, pool, path)
    });
    Ok(offline.end(done))
}

/// The volumes of an open pool.
fn views_of(offline: &Offline, pool: &Pool) -> Vec<VolumeView> {
    let view = |volume| {
        let mut view = assemble::volume_view(pool.name(), volume);
        view.used_by = view.path().map(|path| offline.users_of(&path)).unwrap_or_default();
        view
    };
    pool.volumes().iter().map(view).collect()
}

/// One volume of an open pool.
fn view_of(offline: &Offline, pool: &Pool, path: &VolumePath) -> Result<VolumeView, Failure> {
    let mut all = views_of(offline, pool);
    match all.iter().position(|volume| volume.name == path.volume.as_str()) {
        Some(at) => Ok(all.swap_remove(at)),
        None => {
            let names: Vec<&str> = all.iter().map(|volume| volume.name.as_str()).collect();
            let there = if names.is_empty() {
                "there is none".to_owned()
            } else {
                format!("there are {}", names.join(", "))
            };
            Err(Failure::Failed(format!("volume {path} is not there; {there}")))
        }
    }
}

fn create(args: &CreateArgs) -> Result<(), Failure> {
    let CreateArgs { path, size, at } = args;
    let volume: VolumeView = match &at.config {
        None => {
            let body = CreateVolume { name: path.volume.to_string(), size_bytes: size.0 };
            at.client().post(&format!("/v1/pools/{}/volumes", path.pool), Some(&body))?
        }
        Some(file) => {
            offline(at, file, path, |_, pool| Ok(pool.create_volume(path.volume.as_str(), size.0).wait()?))?
        }
    };
    show(at, &volume, "created")
}

fn resize(args: &CreateArgs) -> Result<(), Failure> {
    let CreateArgs { path, size, at } = args;
    let volume: VolumeView = match &at.config {
        None => at.client().patch(&url(path), &SetVolume { size_bytes: size.0 })?,
        Some(file) => {
            offline(at, file, path, |offline, pool| {
                let before = view_of(offline, pool, path)?.size_bytes;
                // The VM of a daemon that died has seen how large it was, and waits.
                if size.0 < before
                    && let Some(user) = offline.user_of(path).filter(|_| offline.after_death())
                {
                    let what = format!(
                        "volume {path} is {user}'s, it can only grow until its daemon has ended in order"
                    );
                    return Err(Failure::Failed(what));
                }
                Ok(pool.resize_volume(path.volume.as_str(), size.0).wait()?)
            })?
        }
    };
    show(at, &volume, "resized")
}

fn snapshot(args: &SnapshotArgs) -> Result<(), Failure> {
    let at = &args.at;
    let mut snapshots = Vec::new();
    let mut pool: Option<Name> = None;
    for pair in args.pairs.chunks(2) {
        let [volume, name] = pair else {
            return Err(Failure::Usage(format!(
                "{} has no name for its snapshot, want POOL/VOLUME SNAPSHOT",
                pair[0]
            )));
        };
        let volume: VolumePath = volume.parse().map_err(Failure::Usage)?;
        // Its pool is known: whoever says it again is not wrong.
        let name = name.strip_prefix(&format!("{}/", volume.pool)).unwrap_or(name);
        let name: Name = name.parse().map_err(Failure::Usage)?;
        if let Some(first) = pool.replace(volume.pool.clone())
            && first != volume.pool
        {
            let what = format!(
                "volumes of pools {first} and {} have no instant in common, want one command for each",
                volume.pool
            );
            return Err(Failure::Usage(what));
        }
        snapshots.push(TakeSnapshot { volume: volume.volume.to_string(), name: name.to_string() });
    }
    let Some(pool) = pool else { return Err(Failure::Usage("want POOL/VOLUME SNAPSHOT".to_owned())) };
    let volumes: Vec<VolumeView> = match &at.config {
        None => {
            let body = TakeSnapshots { snapshots };
            at.client().post(&format!("/v1/pools/{pool}/snapshots"), Some(&body))?
        }
        Some(file) => {
            let offline = Offline::begin(at, file, Purpose::Change)?;
            let wanted = snapshots.iter().map(|one| (one.volume.clone(), one.name.clone())).collect();
            let done = offline.with_pool(pool.as_str(), |offline, open| {
                open.snapshot(wanted).wait()?;
                let names = |name: &String| snapshots.iter().any(|one| one.name == *name);
                let mut taken = views_of(offline, open);
                taken.retain(|volume| names(&volume.name));
                Ok(taken)
            });
            offline.end(done)
        }
    };
    if at.json {
        return print_json(&volumes);
    }
    let lines = volumes.iter().map(|volume| {
        format!("snapshot {}/{} of {}\n", volume.pool, volume.name, volume.origin.as_deref().unwrap_or("-"))
    });
    say(&lines.collect::<String>());
    Ok(())
}

fn clone(args: &CloneArgs) -> Result<(), Failure> {
    let CloneArgs { snapshot, path, at } = args;
    if snapshot.pool != path.pool {
        return Err(Failure::Usage(format!(
            "{snapshot} and {path} are in two pools, want a clone in its snapshot's pool"
        )));
    }
    let volume: VolumeView = match &at.config {
        None => {
            let body = MakeClone { snapshot: snapshot.volume.to_string(), name: path.volume.to_string() };
            at.client().post(&format!("/v1/pools/{}/clones", path.pool), Some(&body))?
        }
        Some(file) => offline(at, file, path, |_, pool| {
            Ok(pool.clone_volume(snapshot.volume.as_str(), path.volume.as_str()).wait()?)
        })?,
    };
    show(at, &volume, "cloned")
}

fn delete(args: &DeleteArgs) -> Result<(), Failure> {
    let DeleteArgs { path, at } = args;
    let volume: VolumeView = match &at.config {
        None => at.client().delete(&url(path))?,
        Some(file) => {
            let offline = Offline::begin(at, file, Purpose::Change)?;
            let done = offline.with_pool(path.pool.as_str(), |offline, pool| {
                let view = view_of(offline, pool, path)?;
                if let Some(user) = offline.user_of(path) {
                    return Err(Failure::Failed(format!(
                        "volume {path} is {user}'s in {}, want that removed first",
                        offline.file().display()
                    )));
                }
                pool.delete_volume(path.volume.as_str()).wait()?;
                Ok(view)
            });
            offline.end(done)
        }
    };
    show(at, &volume, "deleted")
}

fn list(args: &ListArgs) -> Result<(), Failure> {
    let ListArgs { pool, at } = args;
    let (volumes, left_out): (Vec<VolumeView>, Vec<String>) = match (&at.config, pool) {
        (None, None) => (at.client().get("/v1/volumes")?, Vec::new()),
        (None, Some(pool)) => (at.client().get(&format!("/v1/pools/{pool}/volumes"))?, Vec::new()),
        (Some(file), pool) => {
            let offline = Offline::begin(at, file, Purpose::Look)?;
            let done = match pool {
                Some(pool) => Ok(vec![pool.to_string()]),
                None => Ok(offline.found().into_iter().map(|found| found.label.pool).collect::<Vec<_>>()),
            };
            let done = done.and_then(|pools| {
                let mut all = Vec::new();
                let one_is_meant = pool.is_some();
                let mut left_out = if one_is_meant { Vec::new() } else { offline.left_out() };
                for pool in pools {
                    let views = |offline: &Offline, pool: &Pool| Ok(views_of(offline, pool));
                    match offline.with_pool(&pool, views) {
                        Ok(views) => all.extend(views),
                        Err(Failure::Failed(what)) if !one_is_meant => {
                            warn(&format!("hawser: left out: {what}"));
                            left_out.push(format!("pool {pool}"));
                        }
                        Err(failure) => return Err(failure),
                    }
                }
                Ok((all, left_out))
            });
            offline.end(done)
        }
    };
    if at.json {
        print_json(&volumes)?;
    } else {
        say(&table_of(&volumes));
    }
    all_is_shown(&left_out)
}

fn export(args: &ExportArgs) -> Result<(), Failure> {
    let ExportArgs { path, file, at } = args;
    if file.as_os_str() == "-" {
        let what = "FILE: \"-\" would be stdout, and an image with holes is a file's: want a path, or ./- for a file of that name";
        return Err(Failure::Usage(what.to_owned()));
    }
    let bytes = match &at.config {
        None => export_online(at, path, file)?,
        Some(config) => export_offline(at, config, path, file)?,
    };
    if at.json {
        return print_json(&serde_json::json!({ "volume": path.to_string(), "size_bytes": bytes }));
    }
    say(&format!("{path} exported to {}: {}\n", file.display(), table::bytes(bytes)));
    Ok(())
}

/// What is asked of a daemon at a time.
const DATA_BYTES: u64 = 8 << 20;

/// How often, and how long after each other, it is tried to delete the snapshot that an export has made.
const DELETE_TRIES: u32 = 10;
const DELETE_AGAIN: Duration = Duration::from_millis(200);

/// A snapshot that is there as long as a volume is exported: what VMs write meanwhile is not in the file.
struct Moment<'a> {
    client: Client,
    volume: &'a VolumePath,
    snapshot: Option<VolumePath>,
}

impl<'a> Moment<'a> {
    fn take(client: Client, volume: &'a VolumePath) -> Result<Moment<'a>, Failure> {
        let uuid = assemble::new_uuid().map_err(Failure::Failed)?;
        let name: String = uuid[..8].iter().map(|byte| format!("{byte:02x}")).collect();
        let name = format!("export-{name}");
        let one = TakeSnapshot { volume: volume.volume.to_string(), name: name.clone() };
        let body = TakeSnapshots { snapshots: vec![one] };
        let _: Vec<VolumeView> = client.post(&format!("/v1/pools/{}/snapshots", volume.pool), Some(&body))?;
        let snapshot = format!("{}/{name}", volume.pool).parse().map_err(Failure::Failed)?;
        Ok(Moment { client, volume, snapshot: Some(snapshot) })
    }

    fn path(&self) -> &VolumePath {
        self.snapshot.as_ref().unwrap_or(self.volume)
    }
}

impl Drop for Moment<'_> {
    fn drop(&mut self) {
        let Some(snapshot) = self.snapshot.take() else { return };
        let mut left = String::new();
        // Its last reader may just be leaving.
        for _ in 0..DELETE_TRIES {
            match self.client.delete::<VolumeView>(&url(&snapshot)) {
                Ok(_) => return,
                Err(Failure::Usage(what) | Failure::Failed(what)) => left = what,
            }
            std::thread::sleep(DELETE_AGAIN);
        }
        warn(&format!("{snapshot} was made for the export and is left: {left}"));
    }
}

/// From a daemon, piece by piece: of a snapshot, or of one that is made for it.
fn export_online(at: &WhereArgs, path: &VolumePath, to: &Path) -> Result<u64, Failure> {
    let client = at.client();
    let named = |what: String| Failure::Failed(format!("volume {path} to {}: {what}", to.display()));
    let mut volume: VolumeView = client.get(&url(path))?;
    let new = image::NewFile::create(to).map_err(named)?;
    let moment = match volume.snapshot {
        true => Moment { client: at.client(), volume: path, snapshot: None },
        false => {
            let moment = Moment::take(at.client(), path)?;
            volume = client.get(&url(moment.path()))?;
            moment
        }
    };
    let file = new.file();
    let bar = Bar::new();
    bar.begin("reading", volume.size_bytes);
    let copy = || {
        file.set_len(volume.size_bytes).map_err(|error| named(error.to_string()))?;
        let mut offset = 0;
        while offset < volume.size_bytes {
            let length = DATA_BYTES.min(volume.size_bytes - offset);
            let data =
                client.bytes(&format!("{}/data?offset={offset}&length={length}", url(moment.path())))?;
            file.write_all_at(&data, offset).map_err(|error| named(error.to_string()))?;
            offset += length;
            bar.done(length);
        }
        file.sync_all().map_err(|error| named(error.to_string()))
    };
    let done = copy();
    bar.clear();
    done?;
    new.finish().map_err(named)?;
    Ok(volume.size_bytes)
}

fn export_offline(at: &WhereArgs, config: &Path, path: &VolumePath, file: &Path) -> Result<u64, Failure> {
    let offline = Offline::begin(at, config, Purpose::Look)?;
    let done = offline.with_pool(path.pool.as_str(), |offline, pool| {
        view_of(offline, pool, path)?;
        let device = pool.device(path.volume.as_str());
        let device = device.ok_or_else(|| Failure::Failed(format!("volume {path} is not there")))?;
        let bar = Bar::new();
        let done = image::export(&device, offline.reactor(), file, &bar);
        bar.clear();
        done.map_err(|what| Failure::Failed(format!("volume {path} to {}: {what}", file.display())))
    });
    Ok(offline.end(done))
}

fn show(at: &WhereArgs, volume: &VolumeView, what: &str) -> Result<(), Failure> {
    if at.json {
        return print_json(volume);
    }
    say(&format!("volume {}/{} {what}: {}\n", volume.pool, volume.name, table::bytes(volume.size_bytes)));
    Ok(())
}

pub(super) fn table_of(volumes: &[VolumeView]) -> String {
    let mut table = Table::new(&[
        ("VOLUME", Align::Left),
        ("KIND", Align::Left),
        ("SIZE", Align::Right),
        ("MAPPED", Align::Right),
        ("USERS", Align::Right),
        ("SLOW", Align::Right),
        ("ORIGIN", Align::Left),
    ]);
    for volume in volumes {
        let kind = match (volume.snapshot, &volume.origin) {
            (true, _) => "snapshot",
            (false, Some(_)) => "clone",
            (false, None) => "volume",
        };
        table.row(vec![
            format!("{}/{}", volume.pool, volume.name),
            kind.to_owned(),
            table::bytes(volume.size_bytes),
            table::bytes(volume.mapped_bytes),
            volume.used_by.len().to_string(),
            table::count(volume.slow.values().sum()),
            volume.origin.clone().unwrap_or_default(),
        ]);
    }
    table.text()
}

/// Requests that did not take the hot path, for those volumes that have any.
pub(super) fn slow_lines(volumes: &[VolumeView]) -> String {
    let line = |volume: &VolumeView| {
        let classes = volume.slow.iter().filter(|(_, count)| **count > 0);
        let classes: Vec<String> =
            classes.map(|(class, count)| format!("{class} {}", table::count(*count))).collect();
        (!classes.is_empty())
            .then(|| format!("slow in {}/{}: {}\n", volume.pool, volume.name, classes.join(", ")))
    };
    volumes.iter().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_shown_with_what_they_are_and_what_was_slow() {
        let volume = |name: &str, snapshot, origin: Option<&str>, slow: &[(&str, u64)]| VolumeView {
            pool: "p0".to_owned(),
            name: name.to_owned(),
            uuid: "u".to_owned(),
            size_bytes: 20 << 30,
            mapped_bytes: 3 << 20,
            snapshot,
            origin: origin.map(str::to_owned),
            users: 2,
            used_by: vec!["disk a".to_owned(), "subsystem nqn.x".to_owned()],
            slow: slow.iter().map(|(class, count)| ((*class).to_owned(), *count)).collect(),
        };
        let volumes = [
            volume("v", false, None, &[("write_miss", 1200), ("read_miss", 0), ("copy_on_write", 3)]),
            volume("s", true, Some("v"), &[]),
            volume("c", false, Some("s"), &[]),
        ];
        let want = "VOLUME  KIND        SIZE  MAPPED  USERS   SLOW  ORIGIN\n\
                    p0/v    volume    20 GiB   3 MiB      2  1.2 k\n\
                    p0/s    snapshot  20 GiB   3 MiB      2      0  v\n\
                    p0/c    clone     20 GiB   3 MiB      2      0  s\n";
        assert_eq!(table_of(&volumes), want);
        assert_eq!(slow_lines(&volumes), "slow in p0/v: copy_on_write 3, write_miss 1.2 k\n");
    }
}
