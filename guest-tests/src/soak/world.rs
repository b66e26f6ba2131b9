//! What a soak runs on: a VM on a daemon's disk, whose device is behind two fault proxies and another daemon; a second device for
//! disks that come and go.
//!
//! ```text
//!   fio ── QEMU ──► serve ──┬─► proxy 0 ─► port 0 ┐
//!   blkclient ──────┘       └─► proxy 1 ─► port 1 ┴─ target ──► disk.raw, data.raw
//! ```

#![forbid(unsafe_code)]

use crate::daemon::Daemon;
use crate::image::DISK_BYTES;
use crate::lab::{Lab, NQN};
use crate::qemu::{Firmware, Qemu};
use crate::scratch::Scratch;
use crate::suite::boot;
use crate::suite::pieces::{DISK, host_section};
use crate::{Result, progress};
use faults::{Door, Proxy};
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;

/// The device that disks are made of and removed from.
pub(super) const EXTRA: &str = "extra";
const EXTRA_BYTES: u64 = 32 << 20;
/// What the disk grows by at a time.
const GROWTH_BYTES: u64 = 1 << 20;

/// Field order is drop order: the VM's side ends first.
pub(super) struct World {
    pub(super) guest: Qemu,
    pub(super) serve: Daemon,
    pub(super) proxies: Vec<Proxy>,
    pub(super) target: Daemon,
    pub(super) disk_bytes: u64,
    scratch: Scratch,
}

fn file_error(path: &std::path::Path) -> impl Fn(std::io::Error) -> String {
    move |error| format!("{}: {error}", path.display())
}

/// The addresses at which a target listens.
fn listeners(target: &Daemon) -> Result<Vec<SocketAddr>> {
    let status = target.status()?;
    let subsystem = status.array("subsystems")?.first().ok_or("the target has no subsystem")?;
    let address = |at: usize| -> Result<SocketAddr> {
        let text = subsystem.text(&format!("listen.{at}"))?;
        text.trim_start_matches("tcp://").parse().map_err(|e| format!("{text}: {e}"))
    };
    (0..subsystem.array("listen")?.len()).map(address).collect()
}

impl World {
    pub(super) fn start(lab: &Lab) -> Result<World> {
        let scratch = Scratch::new()?;
        let (disk, data) = (scratch.file("disk.raw"), scratch.file("data.raw"));
        fs::copy(&lab.image.disk, &disk).map_err(file_error(&disk))?;
        fs::File::create(&data).and_then(|file| file.set_len(EXTRA_BYTES)).map_err(file_error(&data))?;
        let sections = format!(
            "[[device]]\nname = \"n0\"\nuri = \"file://{}\"\n\n[[device]]\nname = \"n1\"\nuri = \"file://{}\"\n\n\
            [[subsystem]]\nnqn = \"{NQN}\"\nlisten = [\"tcp://127.0.0.1:0\", \"tcp://127.0.0.1:0\"]\n\n\
            [[subsystem.namespace]]\nnsid = 1\ndevice = \"n0\"\n\n[[subsystem.namespace]]\nnsid = 2\ndevice = \"n1\"\n",
            disk.display(),
            data.display()
        );
        let target = Daemon::start("target", &lab.hawser, scratch.path(), &sections)?;
        let proxy = |address: SocketAddr| Proxy::start(address).map_err(|e| format!("proxy: {e}"));
        let proxies = listeners(&target)?.into_iter().map(proxy).collect::<Result<Vec<_>>>()?;
        let uris = |nsid: u32| {
            let uri = |proxy: &Proxy| {
                let address = proxy.address();
                format!("\"nvme+tcp://{address}/{NQN}?nsid={nsid}&hdr_digest=1&data_digest=1\"")
            };
            proxies.iter().map(uri).collect::<Vec<_>>().join(", ")
        };
        let mut sections = host_section();
        for (name, nsid) in [(DISK, 1), (EXTRA, 2)] {
            sections += &format!(
                "[[device]]\nname = \"{name}\"\nuri = [{}]\nkeep_alive_tmo = 2\nreconnect_delay = 1\n\n",
                uris(nsid)
            );
        }
        let folder = scratch.path().display();
        sections += &format!(
            "[[disk]]\nname = \"{DISK}\"\ndevice = \"{DISK}\"\nsocket = \"{folder}/{DISK}.sock\"\nserial = \"{DISK}\"\nqueues = 2\n"
        );
        let mut serve = Daemon::start("serve", &lab.hawser, scratch.path(), &sections)?;
        serve.await_disk(DISK, "listening")?;
        progress("the VM boots through both proxies");
        let guest = boot(lab, "migration.cfg", Firmware::SeaBios, scratch.path(), &[])?;
        Ok(World { guest, serve, proxies, target, disk_bytes: DISK_BYTES, scratch })
    }

    /// Where a disk's socket is.
    pub(super) fn socket(&self, disk: &str) -> PathBuf {
        self.scratch.file(&format!("{disk}.sock"))
    }

    /// A file for a process's output.
    pub(super) fn log(&self, name: &str) -> PathBuf {
        self.scratch.file(&format!("{name}.log"))
    }

    /// Starts the target again; it listens elsewhere.
    pub(super) fn launch_target(&mut self) -> Result<()> {
        self.target.launch()?;
        for (proxy, address) in self.proxies.iter().zip(listeners(&self.target)?) {
            proxy.set_target(address);
        }
        Ok(())
    }

    /// Sets the ANA state of one of the target's addresses.
    pub(super) fn set_ana(&self, port: usize, state: &str) -> Result<()> {
        let address = listeners(&self.target)?.get(port).copied().ok_or("no such address")?;
        let listen = format!("tcp://{address}");
        self.target.command(&["subsystem", "ana", NQN, state, "--listen", &listen]).map(drop)
    }

    /// Makes the disk's file longer.
    pub(super) fn grow(&mut self) -> Result<()> {
        let path = self.scratch.file("disk.raw");
        self.disk_bytes += GROWTH_BYTES;
        let file = fs::OpenOptions::new().write(true).open(&path);
        file.and_then(|file| file.set_len(self.disk_bytes)).map_err(file_error(&path))
    }

    /// Opens all doors.
    pub(super) fn heal(&self) {
        for proxy in &self.proxies {
            proxy.set_door(Door::Open);
            proxy.hold_ends(false);
        }
    }

    /// Both daemons end in order.
    pub(super) fn stop(mut self) -> Result<()> {
        self.guest.sync_and_quit()?;
        self.serve.terminate()?;
        self.target.terminate()
    }
}
