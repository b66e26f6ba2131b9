//! A pool, the targets that its members are on, and a daemon that serves volumes of it.
//!
//! ```text
//!   VM ── vm1.sock ── serve: pool p0 ──┬── NVMe/TCP ── t0: t0.raw
//!                     golden, vm1, …   ├── NVMe/TCP ── t1: t1.raw
//!                                      └── …
//! ```
//!
//! Owns: their configurations, and how `hawser pool` and `hawser volume` are asked. Must not know: hawser's crates.
//! Invariants: members are `m0`, `m1`, … in the order of their places.

#![forbid(unsafe_code)]

use crate::Result;
use crate::daemon::Daemon;
use crate::json::Json;
use crate::lab::{Lab, NQN};
use crate::process::Deadline;
use crate::scratch::Scratch;
use crate::suite::pieces::{DISK, host_section};
use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

/// The pool's name.
pub const POOL: &str = "p0";
/// The volume with the guest image.
pub const GOLDEN: &str = "p0/golden";
/// Its snapshot, which VMs' disks are clones of.
pub const SNAPSHOT: &str = "p0/golden-1";
/// The clone behind the first VM's disk.
pub const CLONE: &str = "p0/vm1";

/// Room of a member: the image with what is written to it, and the pool's metadata.
pub const MEMBER_BYTES: u64 = 768 << 20;

/// A target of ours for each member: a daemon `tN` with a file of `bytes`.
pub fn targets(lab: &Lab, scratch: &Scratch, count: usize, bytes: u64) -> Result<Vec<Daemon>> {
    (0..count).map(|number| target(lab, scratch, number, bytes)).collect()
}

/// The same, one: number `number`.
pub(crate) fn target(lab: &Lab, scratch: &Scratch, number: usize, bytes: u64) -> Result<Daemon> {
    let file = empty_file(scratch, &format!("t{number}.raw"), bytes)?;
    let nqn = nqn_of(number);
    let sections = format!(
        "[[device]]\nname = \"f\"\nuri = \"file://{file}\"\n\n\
        [[subsystem]]\nnqn = \"{nqn}\"\nlisten = [\"tcp://127.0.0.1:0\"]\n\n\
        [[subsystem.namespace]]\nnsid = 1\ndevice = \"f\"\n"
    );
    let target = Daemon::start(&format!("t{number}"), &lab.hawser, scratch.path(), &sections)?;
    // One that dies must come back where it was.
    target.keep_ports(&nqn)?;
    Ok(target)
}

/// A new file that is all holes; its path.
pub(crate) fn empty_file(scratch: &Scratch, name: &str, bytes: u64) -> Result<String> {
    let path = scratch.file(name);
    let made = File::create(&path).and_then(|file| file.set_len(bytes));
    made.map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(path.display().to_string())
}

fn nqn_of(number: usize) -> String {
    format!("{NQN}-{number}")
}

/// The URI of the namespace of such a target.
pub fn uri_of_target(target: &Daemon, number: usize) -> Result<String> {
    let nqn = nqn_of(number);
    Ok(format!("nvme+tcp://{}/{nqn}?nsid=1", target.listener(&nqn)?))
}

/// A pool and its daemon. Field order is drop order: the VM's side ends before the targets'.
pub struct Pooled {
    /// The daemon that has the pool.
    pub serve: Daemon,
    /// The daemons that its members are on.
    pub targets: Vec<Daemon>,
    scratch: Scratch,
}

/// What `hawser status` says of the pool.
#[derive(Debug, Clone, PartialEq)]
pub struct View {
    /// `ready`, `degraded`, `waiting`, `failed`.
    pub state: String,
    /// The state of each member, in the order of their places.
    pub members: Vec<String>,
    /// Bytes that are given to volumes.
    pub used_bytes: f64,
    /// What is wrong.
    pub troubles: Vec<String>,
    /// Kind, bytes done, whether it has ended.
    pub tasks: Vec<(String, f64, bool)>,
}

impl View {
    fn parse(pool: &Json) -> Result<View> {
        let text = |json: &Json| match json {
            Json::Text(text) => text.clone(),
            other => format!("{other:?}"),
        };
        let members = pool.array("members")?.iter().filter(|member| member.number("place").is_ok());
        let task = |task: &Json| {
            let is_done = task.get("done") == Some(&Json::Bool(true));
            Ok((task.text("kind")?.to_owned(), task.number("done_bytes")?, is_done))
        };
        Ok(View {
            state: pool.text("state")?.to_owned(),
            members: members.map(|member| Ok(member.text("state")?.to_owned())).collect::<Result<_>>()?,
            // While it waits, it has no sizes.
            used_bytes: pool.number("size_bytes").unwrap_or(0.0) - pool.number("free_bytes").unwrap_or(0.0),
            troubles: pool.array("troubles")?.iter().map(text).collect(),
            tasks: pool.array("tasks")?.iter().map(task).collect::<Result<_>>()?,
        })
    }

    /// Everything is as it should be, and nothing is left to do.
    pub fn is_whole(&self) -> bool {
        self.state == "ready"
            && self.members.iter().all(|state| state == "in_sync")
            && self.tasks.iter().all(|(_, _, is_done)| *is_done)
    }

    /// Bytes that the last work on members has copied, after a crash (resync) or an absence (rebuild).
    pub fn copied_bytes(&self) -> f64 {
        let copies = self.tasks.iter().rev().filter(|(kind, _, _)| kind == "resync" || kind == "rebuild");
        copies.map(|(_, bytes, _)| *bytes).next().unwrap_or(0.0)
    }
}

impl Pooled {
    /// A pool of `level` over the devices at `uris`, which are empty; its daemon is configured with `disks` and not
    /// started yet.
    pub fn create(
        lab: &Lab,
        scratch: Scratch,
        targets: Vec<Daemon>,
        uris: &[String],
        level: &str,
        disks: &[DiskOn],
    ) -> Result<Pooled> {
        Pooled::create_on(lab, scratch, targets, uris, (level, uris.len()), disks)
    }

    /// The same, over the first `members` of the devices: the others are there for later.
    fn create_on(
        lab: &Lab,
        scratch: Scratch,
        targets: Vec<Daemon>,
        uris: &[String],
        (level, members): (&str, usize),
        disks: &[DiskOn],
    ) -> Result<Pooled> {
        let mut sections = host_section();
        for (number, uri) in uris.iter().enumerate() {
            // A member whose target is away is done without, soon.
            let policy =
                if uri.starts_with("nvme") { "fast_io_fail_tmo = 2\nreconnect_delay = 1\n" } else { "" };
            sections += &format!("[[device]]\nname = \"m{number}\"\nuri = \"{uri}\"\n{policy}\n");
        }
        for DiskOn { name, volume, socket } in disks {
            let socket = scratch.file(socket);
            sections += &format!(
                "[[disk]]\nname = \"{name}\"\nvolume = \"{volume}\"\nsocket = \"{}\"\nserial = \"{name}\"\nqueues = 2\n\n",
                socket.display()
            );
        }
        let serve = Daemon::configure("serve", &lab.hawser, scratch.path(), &sections)?;
        let pooled = Pooled { serve, targets, scratch };
        let members: Vec<String> = (0..members).map(|number| format!("m{number}")).collect();
        let mut args = vec!["pool", "create", POOL, "--raid", level];
        args.extend(members.iter().map(String::as_str));
        pooled.serve.offline(&args)?;
        Ok(pooled)
    }

    /// Puts the guest image into a volume, and takes a snapshot; without the daemon.
    pub fn import(&self, lab: &Lab, shown: bool) -> Result<()> {
        Daemon::import(&lab.hawser, &self.serve.config(), &lab.image.disk, GOLDEN, shown)?;
        self.serve.offline(&["volume", "snapshot", GOLDEN, name_of(SNAPSHOT)]).map(drop)
    }

    /// A pool of `level` over `members` targets of ours, with the image, and a VM's disk on a clone of it, which listens. There are so many
    /// targets `more`, whose devices are no members yet.
    pub(crate) fn with_vm(lab: &Lab, level: &str, members: usize, more: usize) -> Result<Pooled> {
        let scratch = Scratch::new()?;
        let targets = targets(lab, &scratch, members + more, MEMBER_BYTES)?;
        let uris = targets.iter().enumerate().map(|(number, target)| uri_of_target(target, number));
        let uris = uris.collect::<Result<Vec<_>>>()?;
        Pooled::create_on(lab, scratch, targets, &uris, (level, members), &[the_disk()])?.serving(lab)
    }

    /// Imports, clones, and starts the daemon; the VM's disk listens.
    pub(crate) fn serving(mut self, lab: &Lab) -> Result<Pooled> {
        self.import(lab, false)?;
        self.serve.offline(&["volume", "clone", SNAPSHOT, CLONE])?;
        self.serve.launch()?;
        self.serve.await_disk(DISK, "listening")?;
        Ok(self)
    }

    /// The folder with all sockets.
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }

    /// How the pool is doing.
    pub fn view(&self) -> Result<View> {
        let status = self.serve.status()?;
        let pools = status.array("pools")?;
        let pool = pools.iter().find(|pool| pool.text("name") == Ok(POOL));
        View::parse(pool.ok_or_else(|| format!("hawser status knows no pool {POOL}"))?)
    }

    /// Waits until the pool is as `condition` says; how long that took.
    pub fn wait(&mut self, what: &str, condition: impl Fn(&View) -> bool) -> Result<Duration> {
        let started = Instant::now();
        let deadline = Deadline::new(90, format!("pool {POOL} to be {what}"));
        loop {
            self.serve.must_live()?;
            let view = self.view().map_err(|e| self.serve.explain(&e))?;
            if condition(&view) {
                return Ok(started.elapsed());
            }
            deadline.nap().map_err(|e| self.serve.explain(&format!("{e}; it is {view:?}")))?;
        }
    }

    /// Bytes of a volume that are mapped to extents of the pool.
    pub fn mapped_bytes(&self, volume: &str) -> Result<f64> {
        let status = self.serve.status()?;
        let volumes = status.array("volumes")?;
        let found = volumes.iter().find(|found| found.text("name") == Ok(name_of(volume)));
        found.ok_or_else(|| format!("hawser status knows no volume {volume}"))?.number("mapped_bytes")
    }

    /// No member differs from another: while the daemon serves.
    pub fn scrub(&self) -> Result<()> {
        self.serve.command(&["pool", "scrub", POOL, "--wait"]).map(drop)
    }

    /// SIGTERM to the daemon, which must exit with 0; then what is on the members must go together, and the golden image be what
    /// was imported.
    pub(crate) fn close(&mut self, lab: &Lab) -> Result<()> {
        self.serve.terminate()?;
        self.check()?;
        let export = self.scratch.file("golden.raw");
        self.export(GOLDEN, &export)?;
        same_content(&lab.image.disk, &export)
    }

    /// What is on the members must go together, offline.
    pub(crate) fn check(&self) -> Result<()> {
        self.serve.offline(&["pool", "check", POOL]).map(drop)
    }

    /// A volume's content in a new file, offline.
    pub(crate) fn export(&self, volume: &str, file: &Path) -> Result<()> {
        self.serve.offline(&["volume", "export", volume, &file.display().to_string()]).map(drop)
    }

    /// SIGTERM to the targets, which must exit with 0.
    pub fn stop(mut self) -> Result<()> {
        self.targets.iter_mut().try_for_each(Daemon::terminate)
    }
}

/// A VM's disk on a volume.
pub struct DiskOn {
    /// Its name.
    pub name: String,
    /// The volume.
    pub volume: String,
    /// Its socket, in the lab's folder.
    pub socket: String,
}

/// The first VM's disk, on the clone, where `qemu-configs/` look for it.
pub fn the_disk() -> DiskOn {
    DiskOn { name: DISK.to_owned(), volume: CLONE.to_owned(), socket: format!("{DISK}.sock") }
}

/// A volume's name in its pool.
fn name_of(volume: &str) -> &str {
    volume.split_once('/').map_or(volume, |(_, name)| name)
}

/// The first `original.len()` bytes of both are the same.
fn same_content(original: &Path, copy: &Path) -> Result<()> {
    let bytes = std::fs::metadata(original).map_err(|e| format!("{}: {e}", original.display()))?.len();
    let mut cmp = std::process::Command::new("cmp");
    cmp.arg("-n").arg(bytes.to_string()).arg(original).arg(copy);
    crate::process::output(&mut cmp).map(drop)
}
